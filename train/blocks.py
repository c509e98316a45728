"""What a layer of the target is made of: attention, feed-forward, router and experts, with checkpoint names.

Faithful to vLLM 0.32.0 `model_executor/models/deepseek_v2.py`; deviations are listed in `train/mtp.py`.

Legend: T tokens, A rows that ask, D hidden_size, H heads, E experts, K experts a token, F expert width,
P nope, R rope, Q = P + R, C value width of a head, L kv_lora_rank, N q_lora_rank.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.attention import packed_causal_attention, packed_sparse_attention
from train.dims import Dims
from train.indexer import Indexer
from train.kernels.moe import moe
from train.kernels.norm import RMSNorm

__all__ = ["MLP", "Attention", "DecoderLayer", "Gate", "MoE", "Projected", "rotary"]


def rotary(x: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    """Rotate the interleaved pairs (2j, 2j+1) of the last dimension.

    Args:
        x: [T, heads, R].
        cos_TR, sin_TR: float32 [T, R/2] of the tokens' positions.

    Returns:
        The rotated tensor, in the order and dtype of `x`.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos_TR, sin_TR)[:, None]).flatten(-2).to(x.dtype)


class Projected(NamedTuple):
    """What attention makes of its input.

    Attributes:
        q_AHQ: queries of the rows asked for; the rotary part is the last R of Q.
        compressed_AN: what they are made of, after its norm; the indexer's queries are made of it too.
        latent_TL: what keys and values of all heads are made of, after its norm.
        k_pe_TR: the rotated key that all heads share.
    """

    q_AHQ: Tensor
    compressed_AN: Tensor
    latent_TL: Tensor
    k_pe_TR: Tensor


class Attention(nn.Module):
    """Multi-head latent attention (`self_attn.*`, arXiv 2412.19437, section 2.1.1), sparse where V3.2's is.

    Args:
        dims: sizes of the target.
        input_size: width of the input where it is not the hidden size.
    """

    def __init__(self, dims: Dims, input_size: int | None = None) -> None:
        super().__init__()
        self.dims = dims
        heads, input_size = dims.num_attention_heads, input_size or dims.hidden_size
        q_width = dims.qk_nope_head_dim + dims.qk_rope_head_dim
        self.q_a_proj = nn.Linear(input_size, dims.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(dims.q_lora_rank, eps=dims.rms_norm_eps)
        self.q_b_proj = nn.Linear(dims.q_lora_rank, heads * q_width, bias=False)
        kv_width = dims.kv_lora_rank + dims.qk_rope_head_dim
        self.kv_a_proj_with_mqa = nn.Linear(input_size, kv_width, bias=False)
        self.kv_a_layernorm = RMSNorm(dims.kv_lora_rank, eps=dims.rms_norm_eps)
        self.kv_b_proj = nn.Linear(
            dims.kv_lora_rank, heads * (dims.qk_nope_head_dim + dims.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * dims.v_head_dim, dims.hidden_size, bias=False)
        if dims.index_topk:
            self.indexer = Indexer(dims)

    def project(self, x_TD: Tensor, positions_T: Tensor, rows_A: Tensor | None = None) -> Projected:
        """Queries, and what keys and values are made of.

        Args:
            x_TD: normed input of the attention.
            positions_T: place of each token in its document, int64 [T].
            rows_A: rows to make queries of, int64 [A]; by default all.
        """
        dims = self.dims
        heads, rope = dims.num_attention_heads, dims.qk_rope_head_dim
        angles = positions_T[:, None].float() * dims.inv_freq(x_TD.device)
        cos, sin = angles.cos(), angles.sin()
        latent_TL, k_pe = self.kv_a_proj_with_mqa(x_TD).split((dims.kv_lora_rank, rope), -1)
        latent_TL, k_pe = self.kv_a_layernorm(latent_TL), rotary(k_pe[:, None], cos, sin)[:, 0]
        if rows_A is not None:
            x_TD, cos, sin = (x.index_select(0, rows_A) for x in (x_TD, cos, sin))
        compressed = self.q_a_layernorm(self.q_a_proj(x_TD))
        q = self.q_b_proj(compressed).unflatten(-1, (heads, -1))
        q_nope, q_pe = q.split((dims.qk_nope_head_dim, rope), -1)
        return Projected(torch.cat((q_nope, rotary(q_pe, cos, sin)), -1), compressed, latent_TL, k_pe)

    def expand(self, latent_TL: Tensor, k_pe_TR: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [T, H, Q] and values [T, H, C] of each head; the rotary part is the last R of Q."""
        dims = self.dims
        kv = self.kv_b_proj(latent_TL).unflatten(-1, (dims.num_attention_heads, -1))
        k_nope, v_THC = kv.split((dims.qk_nope_head_dim, dims.v_head_dim), -1)
        # one rotary key for all heads
        k_pe = k_pe_TR[:, None].expand(-1, dims.num_attention_heads, -1)
        return torch.cat((k_nope, k_pe), -1), v_THC

    def up(self, like: Tensor) -> Tensor:
        """What `kv_b_proj` makes of each number of a latent, [L, H, P + C], in the dtype of `like`.

        Taken from its forward: only there is a partitioned weight whole.
        """
        eye = torch.eye(self.dims.kv_lora_rank, dtype=like.dtype, device=like.device)
        return self.kv_b_proj(eye).unflatten(-1, (self.dims.num_attention_heads, -1))

    def output(self, o_THC: Tensor) -> Tensor:
        """Project the heads' results back to [T, D]."""
        return self.o_proj(o_THC.flatten(-2))

    def forward(self, x_TD: Tensor, positions_T: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Causal attention within each packed document; x and result [T, D].

        Sparse, by the layer's own indexer, in documents of more than `index_topk` tokens: up to that many it
        keeps every key. No gradient reaches the indexer.
        """
        made, topk = self.project(x_TD, positions_T), self.dims.index_topk
        k, v = self.expand(made.latent_TL, made.k_pe_TR)
        if not topk or int(cu_seqlens.diff().max()) <= topk:
            o = packed_causal_attention(made.q_AHQ, k, v, cu_seqlens, self.dims.softmax_scale)
        else:
            with torch.no_grad():
                index = self.indexer(x_TD, made.compressed_AN, positions_T)
            scale = self.dims.softmax_scale
            o = packed_sparse_attention(made.q_AHQ, k, v, index, cu_seqlens, scale, topk)
        return self.output(o)


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
        self.input_layernorm = RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        self.self_attn = Attention(dims)
        self.post_attention_layernorm = RMSNorm(dims.hidden_size, eps=dims.rms_norm_eps)
        dense = layer_idx < dims.first_k_dense_replace
        self.mlp: nn.Module = MLP(dims.hidden_size, dims.intermediate_size) if dense else MoE(dims)

    def forward(self, x_TD: Tensor, positions_T: Tensor, cu_seqlens: Tensor) -> Tensor:
        """One layer over packed documents; x and result [T, D]."""
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), positions_T, cu_seqlens)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))
