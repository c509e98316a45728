"""Small stores of made-up documents that fit a checkpoint."""

import itertools
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from configs.contract import Contract, Engine, State, Template, norm_and_head_sha256, target_contract
from configs.held_out import is_held_out, uid_group
from export.checkpoint import Checkpoint
from featurestore import StoreWriter, publish


def contract_of(target: Path, **changes) -> dict:
    """A contract for a target, as a dump would write it."""
    identity = target_contract(target)
    contract = Contract(
        target=identity,
        norm_and_head_sha256=norm_and_head_sha256(target),
        tokenizer_sha256="0" * 64,
        template=Template(name="test", sha256="0" * 64),
        engine=Engine(name="test", version="0", tp=1, view="v3"),
        states=(State(site="post_norm", layer=identity.num_hidden_layers),),
        max_length=512,
    )
    return contract.model_dump(mode="json") | changes


def write_store(
    path: Path,
    target: Path,
    *,
    lengths: list[int],
    held_out_every: int = 8,
    seed: int = 0,
    kinds: int = 6,
    contract: dict | None = None,
    first_uid: int = 1,
    not_a_number: Collection[int] = (),
    sources: Sequence[str] = ("test",),
    aux_layers: Collection[int] = (),
) -> Path:
    """Publish documents whose second half is an answer: each token of it is what the state before says.

    States are one of `kinds` directions and a little noise, so that a layer can learn the next token.
    Those of the documents `not_a_number` are none. The inputs of `aux_layers` are the same state in other
    lengths.
    """
    checkpoint = Checkpoint(target)
    head = checkpoint.get("lm_head.weight", dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(kinds, head.shape[1], generator=generator)
    uids = (n << 32 for n in itertools.count(first_uid))
    agreed = contract or contract_of(target)
    if aux_layers:
        inputs = [{"site": "layer_input", "layer": k} for k in aux_layers]
        agreed = agreed | {"states": [*inputs, *agreed["states"]]}
    with StoreWriter(str(path), agreed) as writer:
        for uid, length in enumerate(lengths):
            kind = (torch.arange(length) * (1 + uid % 2) + uid) % kinds
            hidden = directions[kind] + 0.05 * torch.randn(length, head.shape[1], generator=generator)
            hidden = hidden.bfloat16()
            if uid in not_a_number:
                hidden.fill_(float("nan"))
            said = (hidden.float() @ head.T).argmax(-1)
            ids = torch.randint(len(head), (length,), generator=generator)
            answer = length // 2
            ids[answer:] = said[answer - 1 : -1]
            mask = torch.arange(length) >= answer
            kept = uid % held_out_every == held_out_every - 1
            writer.append(
                # of a conversation that is held out by default, or is not
                next(n for n in uids if is_held_out(uid_group(n), 0.05, 0) == kept),
                ids.numpy().astype("uint32"),
                mask.numpy().astype("uint8"),
                torch.stack([*(hidden * (k + 1) / 4 for k in range(len(aux_layers))), hidden], 1),
                source=sources[uid % len(sources)],
                held_out=kept,
            )
    publish(str(path))
    return path
