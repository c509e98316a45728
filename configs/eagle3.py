"""Write an EAGLE-3 draft as a directory that vLLM and sglang load."""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["ARCHITECTURE", "draft_config"]

ARCHITECTURE = "Eagle3DeepseekV2ForCausalLM"

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
        "eagle_aux_hidden_state_layer_ids": ids,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True},
    }
    if draft_vocab_size is not None:
        config["draft_vocab_size"] = draft_vocab_size
    if fc_norm:
        config["fc_norm"] = True
    if carry == "post_norm":
        config["norm_output"] = True
    return config
