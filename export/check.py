"""Would a server load this directory? By its path, and by replaying on headers what the loaders do.

Faithful to vLLM 0.32.0 (`get_spec_layer_idx_from_weight_name` in `model_executor/models/utils.py`,
`DeepSeekMTP.load_weights` in `model_executor/models/deepseek_mtp.py`) and sglang 0.5.23
(`models/deepseek_common/deepseek_weight_loader.py`). The two differ in whose configuration they believe:

              layer number                   quantisation
    vLLM      the target's                   the target's
    sglang    the draft's; 0 if it has one   the draft's; with an explicit `--quantization`, that one
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.eagle3 import ARCHITECTURE, IDS, recognise
from configs.errors import ConfigError, InputError
from export import fp8
from export.checkpoint import Checkpoint, mtp_prefix
from export.keymap import DROPPED, eagle3_keymap, is_quantized, layer_shapes

__all__ = [
    "check",
    "check_eagle3",
    "map_problem",
    "refuse_name",
    "sglang_parameter",
    "vllm_parameter",
]

# vLLM picks the speculative method by these words anywhere in the draft's path, whatever the method asked for
FORBIDDEN = ("eagle", "dflash", "dspark")
# vLLM: names that stay beside the transformer block, and projections it stores as one (parameter, slot)
OUTSIDE_BLOCK = ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head")
FUSED = {
    "q_a_proj": ("fused_qkv_a_proj", 0),
    "kv_a_proj_with_mqa": ("fused_qkv_a_proj", 1),
    "wk": ("wk_weights_proj", 0),
    "weights_proj": ("wk_weights_proj", 1),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}
EXPERT = {"gate_proj": ("w13", "w1"), "up_proj": ("w13", "w3"), "down_proj": ("w2", "w2")}


def map_problem(d2t_N: Tensor, t2d_V: Tensor | None, vocab_size: int) -> str | None:
    """What is wrong with the vocabulary maps of a pruned draft, None if nothing is.

    Args:
        d2t_N: int64 [N], target id less draft id.
        t2d_V: bool [V], True where the target's token is the draft's; not every export has it.
        vocab_size: tokens of the target.
    """
    keep_N = d2t_N + torch.arange(len(d2t_N))
    if not (keep_N.diff() > 0).all() or keep_N[0] < 0 or keep_N[-1] >= vocab_size:
        return (
            f"d2t does not hold offsets: target ids from {int(keep_N.min())} to {int(keep_N.max())}, expected"
            f" ascending ones below {vocab_size}"
        )
    if t2d_V is not None and not torch.equal(t2d_V.bool().nonzero().flatten(), keep_N):
        return "t2d and d2t keep different tokens"
    return None


def refuse_name(path: Path | str, key: str = "export.dir") -> None:
    """Refuse a path that vLLM would take for another speculative method.

    Raises:
        ConfigError: `eagle`, `dflash` or `dspark` stands somewhere in the absolute path.
    """
    path = Path(path).absolute()
    word = next((w for w in FORBIDDEN if w in str(path).lower()), None)
    if word:
        raise ConfigError(
            f"{key} = {path} contains {word!r}: vLLM chooses the speculative method by that word in the path"
            " and would not load the directory as an MTP draft",
            f"set {key} to a path, parents included, without {', '.join(FORBIDDEN)}",
        )


def vllm_parameter(name: str, target: Mapping[str, Any]) -> tuple[str, str] | None:
    """Parameter and slot that vLLM's MTP model fills from a checkpoint name; None where it skips the name.

    Args:
        name: name in the draft directory.
        target: the *target's* config.json; only its layer number counts.

    Example: `model.layers.61.self_attn.q_a_proj.weight` ->
    (`model.layers.61.mtp_block.self_attn.fused_qkv_a_proj.weight`, `0`).
    """
    if not target.get("num_nextn_predict_layers"):
        return None
    prefix = mtp_prefix(target)
    if not name.startswith(prefix):
        return None
    short = name.removeprefix(prefix)
    if short.startswith("embed_tokens"):
        return "model." + short, ""
    if any(word in short for word in OUTSIDE_BLOCK):
        return name, ""
    block = f"{prefix}mtp_block."
    parts = short.split(".")
    if parts[:2] == ["mlp", "experts"]:
        parameter, slot = EXPERT[parts[3]]
        return f"{block}mlp.experts.{parameter}_{parts[4]}", f"{parts[2]}.{slot}"
    for i, part in enumerate(parts):
        if part in FUSED:
            fused, index = FUSED[part]
            return block + ".".join([*parts[:i], fused, *parts[i + 1 :]]), str(index)
    return block + short, ""


def sglang_parameter(name: str, draft: Mapping[str, Any]) -> str | None:
    """Parameter that sglang's NextN model fills from a checkpoint name; None where it skips the name.

    Args:
        name: name in the draft directory.
        draft: the *draft's* own config.json.
    """
    prefix = "model.layers.0." if draft["num_hidden_layers"] == 1 else mtp_prefix(draft)
    if not name.startswith(prefix) or "shared_head.head" in name or "embed_tokens" in name:
        return None
    short = name.removeprefix(prefix)
    outside = ("shared_head.norm", "eh_proj", "enorm", "hnorm")
    return ("model." if short.startswith(outside) else "model.decoder.") + short


def _check_quantization(
    draft: Checkpoint, names: list[str], quantization: Mapping[str, Any] | None, whose: str
) -> list[str]:
    """Compare each tensor's form with what a server expects under a quantisation_config."""
    problems = []
    for name in names:
        expected = quantization is not None and is_quantized(name)
        found = draft.scale_name(name) is not None
        if expected and not (found and draft.dtype(name) == torch.float8_e4m3fn):
            problems.append(f"{name} is {draft.dtype(name)} without scales, {whose} configuration says fp8")
        elif found and not expected:
            problems.append(f"{name} has scales, {whose} configuration says it is not quantised")
    return problems


def check(directory: Path | str, target_dir: Path | str) -> dict[str, list[str]]:
    """Say which servers would load a draft directory beside a target.

    Every tensor of the layer must reach exactly one place of the server's model, with the shape that
    the configuration gives it, in the quantisation that this server will assume.

    Args:
        directory: a draft directory, or a whole checkpoint.
        target_dir: the target it will serve.

    Returns:
        Problems by server, `vllm` and `sglang`; an empty list means that it loads.

    Raises:
        InputError: one of the directories is not a checkpoint.
    """
    target, draft = Checkpoint(target_dir), Checkpoint(directory)
    shapes = layer_shapes(target.config)
    needed = [name for name in shapes if name not in DROPPED]
    prefix = mtp_prefix(target.config)
    scales = {scale for name in draft.names if (scale := draft.scale_name(name)) is not None}
    plain = [name for name in draft.names if name not in scales]

    problems: dict[str, list[str]] = {"vllm": [], "sglang": []}
    rules: dict[str, Any] = {
        "vllm": lambda name: vllm_parameter(name, target.config),
        "sglang": lambda name: sglang_parameter(name, draft.config),
    }
    # where each tensor has to arrive, by the same rules from the names of the released layer
    destinations: dict[str, dict[Any, str]] = {
        "vllm": {vllm_parameter(prefix + n, target.config): n for n in needed},
        "sglang": {sglang_parameter(prefix + n, target.config): n for n in needed},
    }
    for server, rule in rules.items():
        found: dict[Any, str] = {}
        for name in plain:
            destination = rule(name)
            short = destinations[server].get(destination)
            if destination is None or (short is None and name.endswith(DROPPED)):
                continue
            if short is None:
                problems[server].append(f"{name} goes to {destination}, which the model does not have")
            elif destination in found:
                problems[server].append(f"{name} and {found[destination]} go to the same place")
            elif draft.shape(name) != shapes[short]:
                problems[server].append(
                    f"{name} has shape {draft.shape(name)}, the configuration says {shapes[short]}"
                )
            found.setdefault(destination, name)
            scale = draft.scale_name(name)
            if scale is not None and draft.shape(scale) != fp8.scale_shape(draft.shape(name), draft.block):
                problems[server].append(f"{scale} has shape {draft.shape(scale)}")
        missing = [short for destination, short in destinations[server].items() if destination not in found]
        if missing:
            problems[server].append(f"{len(missing)} tensors missing: {', '.join(missing[:3])}")
        whose, config = ("the target's", target) if server == "vllm" else ("its own", draft)
        problems[server] += _check_quantization(draft, list(found.values()), config.quantization, whose)
    if draft.config.get("num_nextn_predict_layers") != 1:
        problems["sglang"].append("num_nextn_predict_layers is not 1 in the draft's configuration")
    if target.config.get("num_nextn_predict_layers") != 1:
        problems["vllm"].append("num_nextn_predict_layers is not 1 in the target's configuration")
    for config in (target, draft):
        if not config.config.get("architectures"):
            raise InputError(f"{config.directory}/config.json names no architectures")
    return problems


# what the configuration of a draft must not say, and whom it would mislead
MISLEADING = {
    "num_nextn_predict_layers": "sglang takes it for the number of draft layers",
    "norm_before_residual": "vLLM reads it and sglang does not",
    "quantization_config": "sglang expects a draft without",
    "index_topk": "the draft's attention is dense",
}


def check_eagle3(directory: Path | str, target_dir: Path | str) -> dict[str, list[str]]:
    """As `check`, of an EAGLE-3 draft: no server notices a missing tensor, and vLLM refuses a surplus one.

    Faithful to vLLM 0.32.0 (`config/speculative.py`, `models/deepseek_eagle3.py`) and sglang 0.5.23
    (`srt/models/kimi_k25_eagle3.py`, `srt/speculative/spec_aux_hidden_state.py`).

    Raises:
        InputError: one of the directories is no checkpoint, or the draft is one of another target.
    """
    target, draft = Checkpoint(target_dir), Checkpoint(directory)
    said = draft.config
    config = recognise(directory, target.config)
    if config is None:
        raise InputError(f"{directory} is not an EAGLE-3 draft", "see architectures in its config.json")
    both: list[str] = []
    shapes = {op.checkpoint[0]: op.shape for op in eagle3_keymap(config)}
    if missing := sorted(shapes.keys() - set(draft.names)):
        both.append(f"{len(missing)} tensors missing: {', '.join(missing[:3])}")
    if surplus := sorted(set(draft.names) - shapes.keys()):
        both.append(f"tensors that the model does not have: {', '.join(surplus[:3])}")
    both += [
        f"{name} has shape {draft.shape(name)}, the configuration says {shape}"
        for name, shape in shapes.items()
        if name in draft and draft.shape(name) != shape
    ]
    wanted = {"d2t": torch.int64, "t2d": torch.bool}
    both += [
        f"{name} is {draft.dtype(name)}, not {wanted.get(name, torch.bfloat16)}"
        for name in shapes
        if name in draft and draft.dtype(name) != wanted.get(name, torch.bfloat16)
    ]
    if "d2t" in draft and "t2d" in draft and not both:
        problem = map_problem(draft.get("d2t"), draft.get("t2d"), target.config["vocab_size"])
        both += [problem] if problem else []
    for key, why in MISLEADING.items():
        if said.get(key):
            both.append(f"config.json has {key}: {why}")
    vllm, sglang = [*both], [*both]
    if said.get("model_type") != "deepseek_v2":
        vllm.append(f"model_type is {said.get('model_type')!r}: vLLM would take the draft for an MTP layer")
    if said.get("architectures") != [ARCHITECTURE]:
        sglang.append(f"architectures is {said.get('architectures')}, not [{ARCHITECTURE!r}]")
    top, nested = said.get(IDS), (said.get("eagle_config") or {}).get(IDS)
    if top is None:
        vllm.append(f"config.json has no {IDS} of its own, where vLLM reads it")
    if nested != top:
        sglang.append(f"eagle_config.{IDS} is {nested}, not {top}")
    if config[IDS][0] == 1:
        sglang.append(f"{IDS} begins with 1, so sglang adds 1 to all of them")
    if said.get("num_hidden_layers") != 1 or said.get("tie_word_embeddings"):
        sglang.append("num_hidden_layers must be 1 and tie_word_embeddings false")
    if said.get("n_routed_experts") != 0:
        vllm.append("n_routed_experts is not 0: vLLM would take the draft for a mixture")
    return {"vllm": vllm, "sglang": sglang}
