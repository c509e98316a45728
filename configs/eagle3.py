"""The config.json of an EAGLE-3 draft, by which its directory is recognised."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError, InputError
from configs.target import target_config

if TYPE_CHECKING:  # what only reads a draft's config needs none of the settings' packages
    from configs.schema import RunConfig

__all__ = [
    "ARCHITECTURE",
    "IDS",
    "architectures",
    "draft_config",
    "new_config",
    "recognise",
    "refuse_layers",
    "usual_layers",
]

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


def refuse_layers(ids: Sequence[int]) -> None:
    """Refuse layer inputs that one server would take from other layers.

    Raises:
        ConfigError: they begin with layer 1.
    """
    if list(ids[:1]) == [1]:
        raise ConfigError(
            f"an EAGLE-3 draft of the inputs of layers {list(ids)} would be served wrongly: sglang adds 1 to"
            " all of them where the first is 1",
            "dump with dump.aux_layers from 2 on",
        )


def usual_layers(target: Mapping[str, Any]) -> list[int]:
    """The layers that both servers take where a draft names none; of a very small target the last two."""
    count = target["num_hidden_layers"]
    return [2, count // 2, count - 3] if count > 8 else [count - 2, count - 1]


def new_config(config: "RunConfig", target: Mapping[str, Any], layers: Sequence[int]) -> dict[str, Any]:
    """The config.json of the draft that `[eagle3]` describes, with the inputs of these layers.

    Raises:
        ConfigError: a server would shift the layers.
    """
    refuse_layers(layers)
    settings = config.eagle3
    size = settings.draft_vocab_size
    if size is None and settings.head == "trained":
        size = target["vocab_size"]
    return draft_config(
        target,
        layers,
        intermediate_size=settings.intermediate_size,
        carry=settings.carry,
        fc_norm=settings.fc_norm,
        draft_vocab_size=size,
    )


# of SHARED: may differ between a draft and its target
LOOSE = ("max_position_embeddings",)
# settings of other programs under which servers compute another function than the one trained here
OTHERWISE = ("norm_before_residual", "mla_use_nope")
# names of the target's own MTP layer, in directories that carry a config.json of their own
MTP_ARCHITECTURES = ("DeepseekV3ForCausalLM", "DeepseekV32ForCausalLM", "DeepseekV3ForCausalLMNextN")


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """How positions are rotated, in the older form of config.json and the newer one."""
    found = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind, older = found.pop("rope_type", None), found.pop("type", None)
    # their ratio alone counts, which is 1 in a target
    found.pop("mscale", None)
    return {"rope_theta": config.get("rope_theta"), **found, "rope_type": kind or older}


def architectures(config: Mapping[str, Any], where: str) -> list[str]:
    """Names of the classes that a config.json asks for; none where it says nothing.

    Raises:
        InputError: they are no list of names.
    """
    names = config.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"{where} has architectures = {names!r}, expected a list of names",
            f'write it as a list, ["{ARCHITECTURE}"] for an EAGLE-3 draft',
        )
    return names


def recognise(directory: Path | str, target: Mapping[str, Any]) -> dict[str, Any] | None:
    """What a directory of trained tensors says it is.

    Args:
        directory: a checkpoint's weights, or an export.
        target: config.json of the target it is to serve.

    Returns:
        The config.json of an EAGLE-3 draft; None for an MTP layer, which has the target's or none.

    Raises:
        InputError: it is a draft of another architecture, or of a target with other sizes or fewer layers,
            or one of the two does not say its architecture as a list.
    """
    if not (Path(directory) / "config.json").is_file():
        return None
    config = target_config(directory)
    names = architectures(config, f"{directory}/config.json")
    if ARCHITECTURE not in names:
        if set(names) & {*MTP_ARCHITECTURES, *architectures(target, "the target's config.json")}:
            return None
        raise InputError(
            f"{directory}/config.json says it is {', '.join(names) or 'nothing'}, expected"
            f" {ARCHITECTURE} or an MTP layer of the target",
            "name a draft of one of these kinds; names of tensors alone do not say what they compute",
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
    mine, theirs = _rope(config), _rope(target)
    other += [f"{key} {mine.get(key)!r}, not {x!r}" for key, x in theirs.items() if mine.get(key) != x]
    other += [f"{key} is set" for key in OTHERWISE if config.get(key)]
    missing = [key for key in ("hidden_size", "vocab_size", "intermediate_size") if key not in config]
    if other or missing:
        found = "; ".join([*other, *(f"{key} is missing" for key in missing)])
        raise InputError(f"{where} does not fit the target: {found}", "use the draft of this target")
    return {**config, IDS: ids}
