"""Load every layout of an export with sglang's own code and run its layer beside ours, on CPU.

    make check-sglang                       # a small random target, every layout
    make check-sglang ARGS='TARGET DRAFT'   # a draft of one's own

What runs is sglang's resolution of its arguments, its choice of a model class, its loader and `load_weights`:
all parameters are NaN before, and are compared bit by bit with the files. Then its forward, float32: a prompt
and two more draft steps beside `train.unroll`. Of an fp8 draft the loading alone: its kernels need a GPU.

Replaced are what no CPU has: the device's capability and synchronisation, the paged attention kernel (here
dense attention over all latents) and the indexer, which keeps all keys of so short a prompt. torchvision is
imported by sglang and never called here; a stub stands for it. sglang 0.5.23, outside the lock.
"""

# sglang is imported after what stands in for a GPU
# ruff: noqa: E402

import argparse
import importlib.machinery
import json
import logging
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers  # noqa: F401  before the stub: it asks for the metadata of torchvision
from safetensors.torch import load_file, save_file

STEPS, PROMPT = 3, 33
TOLERANCE = 1e-5
AUX = (2, 3)


class Stub(types.ModuleType):
    """A module that has whatever is asked of it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Torchvision:
    """Finds torchvision, as far as importing goes."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        wanted = name.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None  # type: ignore[arg-type]

    def create_module(self, spec: Any) -> types.ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


sys.meta_path.insert(0, Torchvision())
torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]
torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None  # type: ignore[assignment]
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)

from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch, ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_loader import get_model
from sglang.srt.models.deepseek_nextn import DeepseekV3ForCausalLMNextN
from sglang.srt.models.kimi_k25_eagle3 import Eagle3DeepseekV2ForCausalLM
from sglang.srt.runtime_context import SpawnRanks, publish
from sglang.srt.server_args import ServerArgs
from sglang.srt.speculative.eagle_info import EagleDraftInput

from configs.eagle3 import draft_config, recognise
from configs.schema import TinyConfig
from export import eagle3, nextn
from export.checkpoint import Checkpoint
from export.keymap import eagle3_keymap
from pipeline.tiny.write import random_checkpoint
from train.model import load_layer
from train.unroll import unroll

# sglang's fused parameters, and what they are made of
FUSED = {
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "wk_weights_proj": ("wk", "weights_proj"),
}
# of an fp8 cache: absent, as in V3.2
CACHE_SCALES = (".k_scale", ".v_scale")
# besides the target's tables, which are set later
ELSEWHERE = ("embed_tokens.weight", "lm_head.weight", *CACHE_SCALES)
SKIPPED = ("embed_tokens.weight", "shared_head.head.weight", "d2t", "t2d")


def wanted(name: str, held: dict[str, torch.Tensor], used: set[str]) -> torch.Tensor | None:
    """What a parameter of sglang has to hold, from the draft's files; None where they do not say."""

    def take(one: str) -> torch.Tensor:
        used.add(one)
        return held[one]

    short = name.removeprefix("model.").replace("decoder.", "").replace("midlayer.", "")
    if short == "lm_head.weight" and short in held:
        return take(short)
    if short.endswith(ELSEWHERE):
        return None
    stem, _, kind = short.rpartition(".")
    if "experts.w13_" in short or "experts.w2_" in short:
        numbers = sorted({int(n.split(".")[2]) for n in held if n.startswith("mlp.experts.")})
        parts = ("gate_proj", "up_proj") if "w13" in kind else ("down_proj",)
        suffix = "weight_scale_inv" if "scale" in kind else "weight"
        return torch.stack(
            [torch.cat([take(f"mlp.experts.{e}.{p}.{suffix}") for p in parts]) for e in numbers]
        )
    for fused, parts in FUSED.items():
        if stem.endswith(fused):
            return torch.cat([take(f"{stem.removesuffix(fused)}{part}.{kind}") for part in parts])
    return take(short)


def compare(model: Any, directory: Path) -> tuple[int, list[str]]:
    """Compare sglang's parameters with the files: every tensor arrives, every parameter is filled."""
    held: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        held |= load_file(file)
    config = json.loads((directory / "config.json").read_text())
    if not isinstance(model, Eagle3DeepseekV2ForCausalLM):
        number = 0 if config["num_hidden_layers"] == 1 else config["num_hidden_layers"]
        held = {n: t for n, t in held.items() if n.startswith(f"model.layers.{number}.")}
        held = {n.split(".", 3)[3]: t for n, t in held.items()}
    else:
        held = {n.removeprefix("layers.0."): t for n, t in held.items()}
    used: set[str] = set()
    problems = []
    for name, parameter in model.named_parameters():
        try:
            expected = wanted(name, held, used)
        except KeyError as error:
            problems.append(f"{name}: the files have no {error}")
            continue
        if expected is None:
            continue
        found = parameter.detach()
        if name == "lm_head.weight":
            found = found[: len(expected)]  # sglang pads it
        if found.shape != expected.shape or not torch.equal(found.float(), expected.to(found.dtype).float()):
            problems.append(f"{name} is not what the files hold")
    lost = [n for n in held if n not in used and not n.endswith(SKIPPED)]
    return len(used), problems + [f"{n} reaches no parameter" for n in lost]


def load(directory: Path, target: Path, *, dtype: str) -> tuple[Any, int, list[str]]:
    """sglang's model of a draft as its server builds it; tensors that arrived, and what is wrong."""
    eagle = recognise(directory, Checkpoint(target).config) is not None
    server = ServerArgs(
        model_path=str(target),
        device="cpu",
        speculative_algorithm="EAGLE3" if eagle else "EAGLE",
        speculative_draft_model_path=str(directory),
        speculative_num_steps=STEPS,
        speculative_eagle_topk=1,
        speculative_num_draft_tokens=STEPS + 1,
        dtype=dtype,
    )
    publish(server, role="test", ranks=SpawnRanks(world_rank=0))
    if not torch.distributed.is_initialized():
        init_distributed_environment(world_size=1, rank=0, local_rank=0, backend="gloo")
        initialize_model_parallel(backend="gloo")
    config = ModelConfig.from_server_args(server, model_path=str(directory), is_draft_model=True)
    kind = Eagle3DeepseekV2ForCausalLM if eagle else DeepseekV3ForCausalLMNextN
    original = kind.load_weights
    result: list[tuple[int, list[str]]] = []

    def load_weights(model: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, parameter in model.named_parameters():
            if not name.endswith(CACHE_SCALES):
                parameter.data.reshape(-1).view(torch.uint8).fill_(0xFF)  # NaN in every dtype of a weight
        original(model, weights)
        result.append(compare(model, directory))  # before quantised parameters are repacked

    kind.load_weights = load_weights
    try:
        model = get_model(model_config=config, load_config=LoadConfig(), device_config=DeviceConfig("cpu"))
    finally:
        kind.load_weights = original
    assert isinstance(model, kind)
    return model, *result[0]


class Dense(AttentionBackend):
    """Causal attention of one request over all its latents: what the paged kernels compute."""

    prefill_attention_backend_str = decode_attention_backend_str = "dsa"
    use_mha = False

    def __init__(self) -> None:
        self.cache: torch.Tensor | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None: ...

    def forward(
        self, q: Any, k: Any, v: Any, layer: Any, *_: Any, q_rope: Any, k_rope: Any, **__: Any
    ) -> Any:
        query, new = torch.cat((q.view(*q_rope.shape[:2], -1), q_rope), -1), torch.cat((k, k_rope), -1)[:, 0]
        self.cache = new if self.cache is None else torch.cat((self.cache, new))
        logits = torch.einsum("thl,sl->hts", query, self.cache) * layer.scaling
        T, S = logits.shape[1:]
        logits = logits.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), float("-inf"))
        out = torch.einsum("hts,sl->thl", logits.softmax(-1), self.cache[:, : layer.v_head_dim])
        return out.flatten(1)


class KeepsAll(torch.nn.Module):
    """The indexer of a prompt within `index_topk`."""

    def forward(self, *_: Any, **__: Any) -> None: ...


def step(model: Any, backend: Dense, ids: torch.Tensor, hidden: torch.Tensor, first: int) -> torch.Tensor:
    """One forward of sglang's draft: what it carries to the next step, and its logits for the last place."""
    n, end = len(ids), torch.tensor([first + len(ids)])
    batch = ForwardBatch(
        forward_mode=ForwardMode.EXTEND if first == 0 else ForwardMode.DECODE,
        batch_size=1,
        input_ids=ids,
        req_pool_indices=torch.zeros(1, dtype=torch.int64),
        seq_lens=end,
        seq_lens_cpu=end,
        seq_lens_sum=int(end),
        out_cache_loc=torch.arange(first, first + n),
        positions=torch.arange(first, first + n),
        spec_info=EagleDraftInput(hidden_states=hidden),
        capture_hidden_mode=CaptureHiddenMode.FULL,
        extend_num_tokens=n,
        extend_seq_lens=torch.tensor([n]),
        extend_seq_lens_cpu=[n],
        extend_prefix_lens=torch.tensor([0]),
        extend_prefix_lens_cpu=[0],
        extend_start_loc=torch.tensor([0]),
    )
    with torch.no_grad(), forward_context(ForwardContext(attn_backend=backend)):
        out = model(ids, batch.positions, batch)
    return out.hidden_states, out.next_token_logits


def differences(model: Any, weights: Path | None, target: Path) -> list[float]:
    """Relative difference of each draft step's logits for the last place from ours, both float32."""
    ours = load_layer(target, weights=weights)
    D, V, K = ours.dims.hidden_size, ours.dims.vocab_size, len(ours.aux_layers)
    own_head = getattr(ours, "own_head", None)
    embed, head = (torch.nn.Parameter(table, False) for table in (ours.embed_tokens, ours.lm_head))
    if own_head is None:
        model.set_embed_and_head(embed, head)
    else:
        model.set_embed(embed)
    attention = (model.model.midlayer if K else model.model.decoder).self_attn
    if getattr(attention, "indexer", None) is not None:
        attention.indexer = KeepsAll()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (PROMPT + STEPS,), generator=generator)
    states = torch.randn(PROMPT + STEPS, *([K] if K else []), D, generator=generator)
    bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        # sglang masks nothing at position 0
        wanted_SAD = unroll(ours, ids, states, bounds, STEPS, False, anchors=torch.tensor([PROMPT - 1]))
    head = ours.lm_head if own_head is None else own_head.weight.detach()
    backend, found = Dense(), []
    hidden = states[:PROMPT].flatten(1)
    for s in range(STEPS):
        first = 0 if s == 0 else PROMPT + s - 1
        some = ids[1 : PROMPT + 1] if s == 0 else ids[PROMPT + s : PROMPT + s + 1]
        carried, logits = step(model, backend, some, hidden, first)
        hidden = carried[-1:]
        want = wanted_SAD[s] @ head.T
        found.append(float((logits[-1] - want[0]).norm() / want.norm()))
    return found


def small(folder: Path) -> tuple[Path, dict[str, tuple[Path, Path | None]]]:
    """A random target of a few MB; a draft of it in every layout, and where its weights are for us."""
    tiny = TinyConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=128,
        moe_intermediate_size=128,
        n_routed_experts=8,
        num_experts_per_tok=2,
        q_lora_rank=128,
        vocab_size=512,
    )
    target = random_checkpoint(folder / "target", tiny)
    drafts: dict[str, tuple[Path, Path | None]] = {}
    for layout in ("nextn", "sglang-legacy", "stitched"):
        for quantization in ("none", "fp8") if layout != "stitched" else ("none",):
            place = folder / f"{layout}-{quantization}"
            nextn.export(target, target, place, layout=layout, quantization=quantization)
            drafts[f"{layout}, {quantization}"] = (place, None)
    for name, size in (("eagle3", None), ("eagle3, 96 tokens", 96)):
        generator = torch.Generator().manual_seed(0)
        config = draft_config(Checkpoint(target).config, AUX)
        weights = folder / f"weights-{size}"
        weights.mkdir()
        (weights / "config.json").write_text(json.dumps(config))
        tensors = {
            op.checkpoint[0]: (
                torch.randn(op.shape, generator=generator) * op.shape[-1] ** -0.5 + (len(op.shape) == 1)
            ).bfloat16()
            for op in eagle3_keymap(config)
        }
        save_file(tensors, weights / "model.safetensors")
        place = folder / f"draft-{size}"
        eagle3.export(weights, target, place, draft_vocab_size=size, keep=lambda n: torch.arange(0, 5 * n, 5))
        drafts[name] = (place, place)
    return target, drafts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", type=Path, nargs="?")
    parser.add_argument("draft", type=Path, nargs="?")
    args = parser.parse_args()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29777", "RANK": "0", "WORLD_SIZE": "1"}
    os.environ["LOCAL_RANK"] = "0"
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.draft:
            target, drafts = args.target, {args.draft.name: (args.draft, args.draft)}
        else:
            target, drafts = small(Path(folder))
        for name, (directory, weights) in drafts.items():
            quantized = "quantization_config" in json.loads((directory / "config.json").read_text())
            model, arrived, problems = load(directory, target, dtype="auto" if quantized else "float32")
            steps = [] if quantized or problems else differences(model, weights, target)
            if any(not x < TOLERANCE for x in steps):
                problems.append("its layer differs from ours")
            result[name] = {"class": type(model).__name__, "tensors": arrived, "steps": steps}
            result[name] |= {"problems": problems}
            ran = ", ".join(f"{x:.1e}" for x in steps)
            print(f"{name}: {arrived} tensors" + (f", logits of each step differ by {ran}" if ran else ""))
            for problem in problems:
                print(f"  {problem}")
    print(json.dumps({"sglang": version("sglang"), "drafts": result}))
    torch.distributed.destroy_process_group()
    return int(any(one["problems"] for one in result.values()))


if __name__ == "__main__":
    sys.exit(main())
