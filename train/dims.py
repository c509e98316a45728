"""The sizes of a target, read from its config.json, and what follows from them alone."""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from configs.errors import InputError

__all__ = ["Dims"]


@dataclass(frozen=True)
class Dims:
    """The sizes of a target, by their config.json names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    # moe
    moe_intermediate_size: int
    first_k_dense_replace: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    # mla
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    # yarn
    rope_theta: float
    rope_factor: float
    beta_fast: float
    beta_slow: float
    mscale_all_dim: float
    original_max_position_embeddings: int
    # index; 0 in a target without sparse attention
    index_n_heads: int = 0
    index_head_dim: int = 0
    index_topk: int = 0

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Dims":
        """Take the sizes from a parsed config.json.

        Raises:
            InputError: a key is missing, or the target is not of the deepseek_v3 or deepseek_v32 kind.
        """
        kind = config.get("model_type")
        if kind not in ("deepseek_v3", "deepseek_v32"):
            raise InputError(
                f"config.json says model_type {kind!r}; expected deepseek_v3 or deepseek_v32",
                "set target.path to a DeepSeek-V3.2 checkpoint",
            )
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        # transformers 5 keeps rope_theta among the rope parameters
        flat = {
            **config,
            **{k: v for k, v in rope.items() if k != "factor"},
            "rope_factor": rope.get("factor"),
        }
        expected = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 1}
        expected |= {"hidden_act": "silu", "n_shared_experts": 1}
        wrong = [f"{k} = {flat.get(k)!r}, not {v!r}" for k, v in expected.items() if flat.get(k) != v]
        if rope.get("rope_type", rope.get("type")) != "yarn":
            wrong.append("rope_scaling is not of type yarn")
        if rope.get("mscale", 1.0) != rope.get("mscale_all_dim", 0.0):
            # their ratio scales cos and sin; it is 1 in every released checkpoint
            wrong.append("rope_scaling.mscale differs from rope_scaling.mscale_all_dim")
        values: dict[str, Any] = {f.name: flat.get(f.name) for f in fields(cls)}
        optional = {"index_n_heads", "index_head_dim", "index_topk"}
        wrong += [f"{k} is missing" for k, v in values.items() if v is None and k not in optional]
        if wrong:
            raise InputError(
                "config.json does not describe a DeepSeek-V3.2 target: " + "; ".join(wrong),
                "set target.path to a checkpoint of model_type deepseek_v32 or deepseek_v3",
            )
        return cls(**{k: v for k, v in values.items() if v is not None})

    @property
    def softmax_scale(self) -> float:
        """Factor of the attention logits: Q**-0.5 times the square of YaRN's mscale (0.135234 for V3.2)."""
        mscale = 0.1 * self.mscale_all_dim * math.log(self.rope_factor) + 1 if self.rope_factor > 1 else 1.0
        return (self.qk_nope_head_dim + self.qk_rope_head_dim) ** -0.5 * mscale * mscale

    def inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        """YaRN's blend of stretched and plain rotary frequencies, float32 [R/2] (arXiv 2309.00071)."""
        d, base = self.qk_rope_head_dim, self.rope_theta
        plain = base ** -(torch.arange(0, d, 2, dtype=torch.float32, device=device) / d)

        def dim_of(rotations: float) -> float:
            period = self.original_max_position_embeddings / (rotations * 2 * math.pi)
            return d * math.log(period) / (2 * math.log(base))

        low = max(math.floor(dim_of(self.beta_fast)), 0)
        high = min(math.ceil(dim_of(self.beta_slow)), d - 1)
        ramp = (torch.arange(d // 2, dtype=torch.float32, device=device) - low) / max(high - low, 1e-3)
        keep = 1 - ramp.clamp(0, 1)
        return plain / self.rope_factor * (1 - keep) + plain * keep
