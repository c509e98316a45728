"""`layer61 target`: build the tiny target, or keep the one that was built from the same things."""

import json
import math
import tempfile
from pathlib import Path

import torch

from configs.errors import InputError
from configs.files import read_json, sha256_file, sha256_json
from configs.progress import log
from configs.schema import PromptsConfig, TinyConfig
from pipeline.conversations import held_out_lines, require_conversations
from pipeline.tiny.backbone import Backbone
from pipeline.tiny.tokenizer import train_tokenizer
from pipeline.tiny.training import train
from pipeline.tiny.write import checkpoint_shapes, config_json, write_checkpoint
from train.dims import Dims

__all__ = ["build_key", "build_target", "dry_run"]

# part of the key: raise it when the same settings would give another target
BUILD = 1


def dry_run(tiny: TinyConfig) -> str:
    """One line: the size of the target and of its training."""
    shapes = checkpoint_shapes(config_json(tiny))
    copies = (f"layers.{tiny.num_hidden_layers}.embed_tokens.weight", "shared_head.head.weight")
    parameters = sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(copies))
    size = sum(math.prod(shape) for shape in shapes.values()) * 2
    return (
        f"target of {parameters / 1e6:.1f} M parameters ({size / 1e6:.0f} MB), {tiny.num_hidden_layers}"
        f" layers and the MTP layer, {tiny.vocab_size:,} tokens in the vocabulary; trains on"
        f" {tiny.train_tokens:,} tokens of {tiny.conversations}"
    )


def build_target(
    directory: Path, tiny: TinyConfig, seed: int = 0, prompts: PromptsConfig | None = None
) -> Path:
    """Train the tiny target in `directory`, or keep the one there if it was built from the same things.

    Conversations that `prompts` holds out are kept from this training as well: a target and an MTP layer that
    know them by heart would make the released layer look better on them than on anything else.

    The directory appears in one rename when all is done, so an interrupted build leaves nothing behind.

    Returns:
        `directory`.

    Raises:
        InputError: the conversations cannot be used, or `directory` holds something this did not build.
    """
    directory = Path(directory)
    _require_file(tiny)
    unseen: set[int] = set()
    if prompts is not None and prompts.path is not None:
        unseen = held_out_lines(tiny.conversations, prompts.held_out, seed)
    key = build_key(tiny, seed, unseen)
    if directory.exists() and any(directory.iterdir()):
        try:
            built = read_json(directory / "build.json")["key"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"{directory} exists and is not a target built here (it has no build.json)",
                hint="name another directory",
            ) from None
        if built == key:
            log("target", f"{directory} is built from the same settings and conversations: kept")
            return directory
        log("target", f"{directory} was built from other settings or conversations: building it again")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent):
        pass  # where nothing can be written that shows now, not after the training
    conversations = require_conversations(tiny.conversations)
    tokenizer = train_tokenizer(conversations, tiny.vocab_size)
    seen = [list(c.messages) for c in conversations if c.place.line not in unseen]
    texts = tokenizer.apply_chat_template(seen, tokenize=False)
    documents = [torch.tensor(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    total = sum(map(len, documents))
    log("target", f"{len(documents):,} conversations, {total:,} tokens, {len(tokenizer):,} in the vocabulary")
    backbone = Backbone(Dims.from_config(config_json(tiny)))
    measured = train(backbone, documents, tiny, seed)
    log("target", json.dumps({k: round(v, 4) for k, v in measured.items()}))
    record = {"format": 1, "key": key, "documents": len(documents), "tokens": total, "measured": measured}
    write_checkpoint(directory, tiny, tokenizer, dict(backbone.checkpoint_tensors()), record)
    return directory


def build_key(tiny: TinyConfig, seed: int, unseen: set[int]) -> str:
    """Hash of everything the target follows from: settings, conversations, seed and this code's version.

    Args:
        tiny, seed: the settings.
        unseen: lines of the conversations that it is not trained on.
    """
    _require_file(tiny)
    settings = tiny.model_dump(mode="json", exclude={"conversations"})
    made_from = {"build": BUILD, "tiny": settings, "conversations": sha256_file(tiny.conversations)}
    return sha256_json({**made_from, "seed": seed, "unseen": sorted(unseen)})


def _require_file(tiny: TinyConfig) -> None:
    if not tiny.conversations.is_file():
        raise InputError(
            f"tiny.conversations: no file {tiny.conversations}",
            hint="run `python -m data.make_conversations`, or name a JSONL file of conversations",
        )
