"""The config.json of an EAGLE-3 draft, by which its directory is recognised."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.target import target_config

__all__ = ["ARCHITECTURE", "IDS", "draft_config", "recognise"]

ARCHITECTURE = "Eagle3DeepseekV2ForCausalLM"
IDS = "eagle_aux_hidden_state_layer_ids"

# sizes and positions of the target that the draft shares
SHARED = (
    *(
        "hidden_size",
        "hidden_act",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "vocab_size",
    ),
    *("max_position_embeddings", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim"),
    *("v_head_dim", "rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "initializer_range"),
    *("bos_token_id", "eos_token_id"),
)


def draft_config(
    target: Mapping[str, Any],
    aux_layers: Sequence[int],
    *,
    intermediate_size: int | None = None,
    carry: str = "pre_norm",
    fc_norm: bool = False,
    draft_vocab_size: int | None = None,
) -> dict[str, Any]:
    """The config.json of a draft: what both servers read, and nothing that one of them would misread.

    `model_type` is deepseek_v2 because vLLM takes a deepseek_v3 draft for an MTP layer. Servers take the
    target's head where `draft_vocab_size` is not set.

    Args:
        target: config.json of the target.
        aux_layers: layers whose inputs the draft starts from, ascending.
        intermediate_size: width of the feed-forward; the target's dense one by default.
        carry: `pre_norm` or `post_norm`.
        fc_norm: norm each layer input before the projection.
        draft_vocab_size: rows of the draft's own head, where it has one.

    Source: vllm 0.32.0 `config/speculative.py`, `models/deepseek_eagle3.py`; sglang 0.5.23
    `srt/models/kimi_k25_eagle3.py`.
    """
    ids = list(aux_layers)
    config = {key: target[key] for key in SHARED if key in target}
    config |= {
        "architectures": [ARCHITECTURE],
        "model_type": "deepseek_v2",
        "num_hidden_layers": 1,
        "n_routed_experts": 0,
        "intermediate_size": intermediate_size or target["intermediate_size"],
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        IDS: ids,
        "eagle_config": {IDS: ids, "use_aux_hidden_state": True},
    }
    if draft_vocab_size is not None:
        config["draft_vocab_size"] = draft_vocab_size
    if fc_norm:
        config["fc_norm"] = True
    if carry == "post_norm":
        config["norm_output"] = True
    return config


# of SHARED: may differ between a draft and its target
LOOSE = ("max_position_embeddings",)
# names of the target's own MTP layer, in directories that carry a config.json of their own
MTP_ARCHITECTURES = ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "DeepseekV3ForCausalLMNextN")


def recognise(directory: Path | str, target: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a directory of trained tensors says it is.

    Args:
        directory: a checkpoint's weights, or an export.
        target: config.json of the target it is to serve.

    Returns:
        The config.json of an EAGLE-3 draft; None for an MTP layer, which has the target's or none.

    Raises:
        InputError: it is a draft of another architecture, or of a target with other sizes or fewer layers.
    """
    if not (Path(directory) / "config.json").is_file():
        return None
    config = target_config(directory)
    names = config.get("architectures") or []
    if ARCHITECTURE not in names:
        if set(names) & {*MTP_ARCHITECTURES, *(target.get("architectures") or [])}:
            return None
        raise InputError(
            f"{directory}/config.json says it is {', '.join(names) or 'nothing'}, expected"
            f" {ARCHITECTURE} or an MTP layer of the target",
            "name an export or a checkpoint of this program",
        )
    where = f"{directory}/config.json"
    ids = config.get(IDS)
    ids = ids or (config.get("eagle_config") or {}).get(IDS)
    if not isinstance(ids, list) or not all(isinstance(k, int) for k in ids) or not ids:
        raise InputError(f"{where} has no eagle_aux_hidden_state_layer_ids: its layer inputs are not known")
    layers = target["num_hidden_layers"]
    if any(a >= b for a, b in zip((0, *ids), ids, strict=False)) or ids[-1] >= layers:
        raise InputError(
            f"{where} starts from the inputs of layers {ids}, not ascending from 1 to {layers - 1}",
            "the draft belongs to another target, or its ids have to be sorted",
        )
    other = [
        f"{key} {config.get(key)!r}, not {target[key]!r}"
        for key in SHARED[: SHARED.index("rope_theta")]
        if key in target and key in config and config[key] != target[key] and key not in LOOSE
    ]
    missing = [key for key in ("hidden_size", "vocab_size", "intermediate_size") if key not in config]
    if other or missing:
        found = "; ".join([*other, *(f"{key} is missing" for key in missing)])
        raise InputError(f"{where} does not fit the target: {found}", "use the draft of this target")
    return {**config, IDS: ids}
