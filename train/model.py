"""Layer 61 of DeepSeek-V3.2: the multi-token-prediction layer, with the checkpoint's own module names.

Faithful to vLLM 0.32.0 `model_executor/models/deepseek_mtp.py` and `deepseek_v2.py`, and to sglang 0.5.23
`srt/models/deepseek_nextn.py`, which compute the same function. Deviations:

1. Attention is dense. V3.2's sparse attention keeps the `index_topk` best keys of a query, so up to that many
   tokens it keeps all of them and both are equal. The indexer's tensors are carried along, never used.
2. The router multiplies in float32; the engines may route in the model's dtype and differ on near ties.
3. Nothing is quantised: served fp8 weights and activations round what is computed here.
4. Attention is computed in its expanded form (keys and values per head), the engines' decode in the
   absorbed one.

Draft step s at place i of a document with tokens t; h is the target's state at step 0, later the carried one:

    e = embed_tokens[t[i+s+1]]                       zero at position 0 in vLLM, not in sglang
    x = eh_proj(concat(enorm(e), hnorm(h)))          embedding first
    x = x + self_attn(input_layernorm(x))            position i + s
    x = x + mlp(post_attention_layernorm(x))
    h = shared_head.norm(x)                          carried to step s+1; lm_head(h) predicts t[i+s+2]

    place i          0        1        2
    state            h(t0)    h(t1)    h(t2)
    token joined     t1       t2       t3
    step 0 predicts  t2       t3       t4
    step 1 predicts  t3       t4       t5

Legend: T tokens, D hidden_size, H heads, E experts, K experts a token, F expert width, V vocabulary, P nope,
R rope, Q = P + R, C value width of a head, L kv_lora_rank.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.errors import InputError
from export.checkpoint import Checkpoint
from export.keymap import keymap, to_training
from train.attention import packed_causal_attention
from train.kernels.moe import moe

__all__ = [
    "MLP",
    "Attention",
    "DecoderLayer",
    "Dims",
    "Indexer",
    "MTPLayer",
    "MoE",
    "layer_tensors",
    "load_layer",
    "load_tables",
    "rotary",
]


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


def rotary(x: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the interleaved pairs (2j, 2j+1) of the last dimension.

    Args:
        x: [T, heads, R].
        cos_TR, sin_TR: float32 [T, R/2] of the tokens' positions.

    Returns:
        The rotated tensor, in the order and dtype of `x`.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_TR[:, None], sin_TR[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


class Indexer(nn.Module):
    """The tensors of V3.2's lightning indexer (`self_attn.indexer.*`), carried along (deviation 1)."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        heads, width = dims.index_n_heads, dims.index_head_dim
        self.wq_b = nn.Linear(dims.q_lora_rank, heads * width, bias=False)
        self.wk = nn.Linear(dims.hidden_size, width, bias=False)
        self.k_norm = nn.LayerNorm(width, eps=1e-6)
        self.weights_proj = nn.Linear(dims.hidden_size, heads, bias=False)


class Attention(nn.Module):
    """Multi-head latent attention (`self_attn.*`), expanded form (arXiv 2412.19437, section 2.1.1)."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.dims = dims
        heads = dims.num_attention_heads
        q_width = dims.qk_nope_head_dim + dims.qk_rope_head_dim
        self.q_a_proj = nn.Linear(dims.hidden_size, dims.q_lora_rank, bias=False)
        self.q_a_layernorm = nn.RMSNorm(dims.q_lora_rank, eps=dims.rms_norm_eps)
        self.q_b_proj = nn.Linear(dims.q_lora_rank, heads * q_width, bias=False)
        kv_width = dims.kv_lora_rank + dims.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(dims.hidden_size, kv_width, bias=False)
        self.kv_a_layernorm = nn.RMSNorm(dims.kv_lora_rank, eps=dims.rms_norm_eps)
        self.kv_b_proj = nn.Linear(
            dims.kv_lora_rank, heads * (dims.qk_nope_head_dim + dims.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * dims.v_head_dim, dims.hidden_size, bias=False)
        if dims.index_topk:
            self.indexer = Indexer(dims)

    def project(self, x_TD: Tensor, positions_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of each token.

        Args:
            x_TD: normed input of the attention.
            positions_T: place of each token in its document, int64 [T].

        Returns:
            q [T, H, Q], k [T, H, Q], v [T, H, C]; the rotary part is the last R of Q.
        """
        dims = self.dims
        heads, rope = dims.num_attention_heads, dims.qk_rope_head_dim
        angles = positions_T[:, None].float() * dims.inv_freq(x_TD.device)
        cos_TR, sin_TR = angles.cos(), angles.sin()
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_TD))).unflatten(-1, (heads, -1))
        q_nope, q_pe = q.split((dims.qk_nope_head_dim, rope), -1)
        latent_TL, k_pe = self.kv_a_proj_with_mqa(x_TD).split((dims.kv_lora_rank, rope), -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent_TL)).unflatten(-1, (heads, -1))
        k_nope, v_THC = kv.split((dims.qk_nope_head_dim, dims.v_head_dim), -1)
        # one rotary key for all heads
        k_pe = rotary(k_pe[:, None], cos_TR, sin_TR).expand(-1, heads, -1)
        q_THQ = torch.cat((q_nope, rotary(q_pe, cos_TR, sin_TR)), -1)
        return q_THQ, torch.cat((k_nope, k_pe), -1), v_THC

    def output(self, o_THC: Tensor) -> Tensor:
        """Project the heads' results back to [T, D]."""
        return self.o_proj(o_THC.flatten(-2))

    def forward(self, x_TD: Tensor, positions_T: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Dense causal attention within each packed document; x and result [T, D]."""
        q, k, v = self.project(x_TD, positions_T)
        return self.output(packed_causal_attention(q, k, v, cu_seqlens, self.dims.softmax_scale))


class MLP(nn.Module):
    """down_proj(silu(gate_proj x) * up_proj x); a dense layer's `mlp` and a mixture's `shared_experts`."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Gate(nn.Module):
    """The sigmoid router with group limits and a selection bias (`mlp.gate.*`)."""

    e_score_correction_bias: Tensor

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.dims = dims
        self.weight = nn.Parameter(torch.empty(dims.n_routed_experts, dims.hidden_size))
        # a buffer: it selects experts and never weighs them, so no gradient reaches it
        bias = torch.zeros(dims.n_routed_experts, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the experts of each token.

        Returns:
            topk_ids int64 [T, K]; topk_weights float32 [T, K], summing to routed_scaling_factor.

        Source: arXiv 2412.19437 eq. 12-16; `noaux_tc` in DeepSeek's inference code.
        """
        dims = self.dims
        with torch.autocast(x_TD.device.type, enabled=False):
            scores_TE = F.linear(x_TD.float(), self.weight.float()).sigmoid()
        with torch.no_grad():
            biased_TE = scores_TE + self.e_score_correction_bias.float()
            if dims.n_group > 1:
                groups = biased_TE.unflatten(-1, (dims.n_group, -1))
                score_of_group = groups.topk(2, -1).values.sum(-1)
                kept = score_of_group.topk(dims.topk_group, -1).indices
                dropped = torch.ones_like(score_of_group, dtype=torch.bool).scatter(1, kept, False)
                biased_TE = groups.masked_fill(dropped[..., None], float("-inf")).flatten(1)
            topk_ids_TK = biased_TE.topk(dims.num_experts_per_tok, -1).indices
        weights_TK = scores_TE.gather(1, topk_ids_TK)
        if dims.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return topk_ids_TK, weights_TK * dims.routed_scaling_factor


class Experts(nn.Module):
    """The routed experts, stacked: w1 and w3 (gate_proj, up_proj) [E, F, D], w2 (down_proj) [E, D, F]."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        E, F_, D = dims.n_routed_experts, dims.moe_intermediate_size, dims.hidden_size
        self.w1 = nn.Parameter(torch.empty(E, F_, D))
        self.w3 = nn.Parameter(torch.empty(E, F_, D))
        self.w2 = nn.Parameter(torch.empty(E, D, F_))
        self.backend: str | None = None

    def forward(self, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
        return moe(x_TD, topk_ids_TK, topk_weights_TK, self.w1, self.w3, self.w2, backend=self.backend)


class MoE(nn.Module):
    """Routed experts plus the shared one (`mlp.*` of a mixture layer)."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.gate = Gate(dims)
        self.experts = Experts(dims)
        self.shared_experts = MLP(dims.hidden_size, dims.moe_intermediate_size * dims.n_shared_experts)

    def forward(self, x_TD: Tensor) -> Tensor:
        topk_ids_TK, topk_weights_TK = self.gate(x_TD)
        return self.experts(x_TD, topk_ids_TK, topk_weights_TK) + self.shared_experts(x_TD)


class DecoderLayer(nn.Module):
    """One transformer layer of the target; dense below `first_k_dense_replace`, a mixture from there on."""

    def __init__(self, dims: Dims, layer_idx: int) -> None:
        super().__init__()
        self.dims = dims
        self.input_layernorm = nn.RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.self_attn = Attention(dims)
        self.post_attention_layernorm = nn.RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        dense = layer_idx < dims.first_k_dense_replace
        self.mlp: nn.Module = MLP(dims.hidden_size, dims.intermediate_size) if dense else MoE(dims)

    def forward(self, x_TD: Tensor, positions_T: Tensor, cu_seqlens: Tensor) -> Tensor:
        """One layer over packed documents; x and result [T, D]."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), positions_T, cu_seqlens)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class SharedHead(nn.Module):
    """`shared_head.norm`; the head itself is the target's and lives in `MTPLayer.lm_head`."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)


class MTPLayer(DecoderLayer):
    """The multi-token-prediction layer with everything the checkpoint keeps under `model.layers.61.`.

    Its parameters and persistent buffers have the names of the checkpoint after that prefix, experts stacked.
    The target's embedding, head and final norm are frozen tables: buffers outside the state dict.

    Attributes:
        embed_tokens, lm_head: [V, D]; norm_weight: [D], the target's `model.norm.weight`.
    """

    embed_tokens: Tensor
    lm_head: Tensor
    norm_weight: Tensor

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims, dims.num_hidden_layers)
        self.enorm = nn.RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.hnorm = nn.RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * dims.hidden_size, dims.hidden_size, bias=False)
        self.shared_head = SharedHead(dims)
        self.register_buffer("embed_tokens", torch.empty(0), persistent=False)
        self.register_buffer("lm_head", torch.empty(0), persistent=False)
        self.register_buffer("norm_weight", torch.empty(0), persistent=False)

    def combine(self, input_ids_T: Tensor, hidden_TD: Tensor, masked_T: Tensor | None = None) -> Tensor:
        """Join the embedding of the next token with the carried state.

        Args:
            input_ids_T: the tokens to embed, int64 [T]: token i+s+1 for place i at step s.
            hidden_TD: target state at step 0, the previous step's result after that.
            masked_T: bool [T], True where the embedding is replaced by zero (absolute position 0 in vLLM).
        """
        e_TD = F.embedding(input_ids_T, self.embed_tokens).to(self.enorm.weight.dtype)
        if masked_T is not None:
            e_TD = e_TD.masked_fill(masked_T[:, None], 0)
        hidden_TD = hidden_TD.to(e_TD.dtype)
        return self.eh_proj(torch.cat((self.enorm(e_TD), self.hnorm(hidden_TD)), -1))

    def forward(  # type: ignore[override]
        self,
        input_ids_T: Tensor,
        hidden_TD: Tensor,
        positions_T: Tensor,
        cu_seqlens: Tensor,
        masked_T: Tensor | None = None,
    ) -> Tensor:
        """Draft step 0 over packed documents, arguments as in `combine`; returns the carried [T, D]."""
        x_TD = self.combine(input_ids_T, hidden_TD, masked_T)
        return self.shared_head.norm(super().forward(x_TD, positions_T, cu_seqlens))


def layer_tensors(
    target: Checkpoint, weights: Path | None = None, *, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Yield the layer's tensors by training name, one at a time, dequantised.

    Args:
        target: the target checkpoint.
        weights: directory of trained tensors with checkpoint names; by default the target's own layer.
        dtype: dtype of every tensor but the router bias, which is float32.

    Raises:
        InputError: the layer is missing, incomplete, or of other sizes than config.json says.
    """
    source = Checkpoint(weights, config=target.config) if weights is not None else target
    scales = {source.scale_name(name) for name in source.names}
    names = [name for name in source.mtp_names() if name not in scales]

    def read(name: str) -> Tensor:
        return source.get(name, dtype=torch.float32 if name.endswith("e_score_correction_bias") else dtype)

    return to_training(keymap(target.config), names, read)


def load_tables(
    layer: MTPLayer, target: Checkpoint, *, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Give the layer the target's frozen embedding, head and final norm.

    Raises:
        InputError: the target lacks one of them, or it has another shape than config.json says.
    """
    V, D = layer.dims.vocab_size, layer.dims.hidden_size
    tables = {
        "embed_tokens": ("model.embed_tokens.weight", (V, D)),
        "lm_head": ("lm_head.weight", (V, D)),
        "norm_weight": ("model.norm.weight", (D,)),
    }
    for attribute, (name, shape) in tables.items():
        tensor = target.get(name, dtype=dtype)
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, config.json says {shape}")
        setattr(layer, attribute, tensor.to(device))


def load_layer(
    checkpoint_dir: Path | str,
    *,
    weights: Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> MTPLayer:
    """Load the MTP layer of a target, with the frozen embedding, head and final norm it needs.

    Args:
        checkpoint_dir: the target: config.json and safetensors files, bf16 or block fp8.
        weights: directory of trained tensors (a training checkpoint's `weights`, or an export);
            by default the target's own layer.
        dtype: dtype of parameters and tables; the router bias stays float32.
        device: where they live.

    Raises:
        InputError: not a DeepSeek-V3 or V3.2 checkpoint, no MTP layer, missing or misshapen tensors.
    """
    target = Checkpoint(checkpoint_dir)
    with torch.device("meta"):
        layer = MTPLayer(Dims.from_config(target.config))
    state = {name: x.to(device) for name, x in layer_tensors(target, weights, dtype=dtype)}
    layer.load_state_dict(state, assign=True)
    load_tables(layer, target, dtype=dtype, device=device)
    return layer
