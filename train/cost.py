"""What a batch costs: floating-point operations, beside what devices can do, and memory.

Imports neither settings nor stores, so that a bare machine with a GPU can count too.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from train.eagle3 import Eagle3Layer
from train.indexer import HELD
from train.loss import default_chunk
from train.model import Layer
from train.unroll import Scored

__all__ = ["activation_bytes", "device_tflops", "model_flops", "work"]

# dense bfloat16, from the data sheets of the SXM forms
TFLOPS = {"H100": 989.5, "H200": 989.5, "GH200": 989.5, "B200": 2250.0, "A100": 312.0}


def device_tflops(name: str) -> float | None:
    """Dense bfloat16 TFLOP/s of a device by its name; None for one that is not listed."""
    words = re.split(r"[ -]", name)
    return next((rate for word, rate in TFLOPS.items() if word in words and "PCIe" not in words), None)


def work(cu_seqlens: Tensor, scored: Scored) -> Tensor:
    """What the cost of a batch follows from: anchors, keys of step 0 they see, predictions; float64 [3].

    Args:
        cu_seqlens: document boundaries, int32 [B+1].
        scored: what is predicted.
    """
    document_A = torch.searchsorted(cu_seqlens, scored.anchors.to(cu_seqlens.dtype), right=True) - 1
    keys = (scored.anchors - cu_seqlens[document_A] + 1).sum()
    sizes = [keys.new_tensor(len(scored.anchors)), keys, keys.new_tensor(len(scored.tokens))]
    return torch.stack(sizes).double()


def model_flops(
    layer: Layer,
    tokens: int,
    anchors: int,
    keys: int,
    predictions: int,
    steps: int,
    *,
    sparse: bool = False,
    form: str | None = None,
) -> float:
    """Floating-point operations of the matrix products of an unroll and its loss, forward and backward.

    Args:
        layer: the layer.
        tokens: tokens of all documents; step 0 projects them all.
        anchors, keys, predictions: from `work`.
        steps: draft steps.
        sparse: whether attention is; a frozen indexer scores every key that an anchor sees, forward alone.
        form: `gather` reads the kept keys alone, as latents; any other one masks.
    """
    dims, K = layer.dims, len(layer.aux_layers)
    D, H, V = dims.hidden_size, dims.num_attention_heads, dims.vocab_size
    query = dims.qk_nope_head_dim + dims.qk_rope_head_dim
    # of an EAGLE-3 layer the attention's input is 2 D wide; of an MTP one, eh_proj's
    wide, joined = (2 * D, 0) if K else (D, 2 * D * D)
    project = joined + wide * dims.q_lora_rank + dims.q_lora_rank * H * query
    project += wide * (dims.kv_lora_rank + dims.qk_rope_head_dim)
    project += dims.kv_lora_rank * H * (dims.qk_nope_head_dim + dims.v_head_dim)
    forward = 3 * D * dims.intermediate_size
    if not K:
        forward = 3 * (dims.num_experts_per_tok + dims.n_shared_experts) * D * dims.moe_intermediate_size
        forward += dims.n_routed_experts * D
    rest = H * dims.v_head_dim * D + forward
    layers: float = tokens * K * D * D + (tokens + (steps - 1) * anchors) * project + steps * anchors * rest
    if form == "gather":
        kept = min(keys, anchors * dims.index_topk)
        layers += steps * kept * H * (2 * dims.kv_lora_rank + dims.qk_rope_head_dim)
    else:
        layers += steps * keys * H * (query + dims.v_head_dim)
    if sparse:
        layers += steps * keys * dims.index_n_heads * dims.index_head_dim / 3
    # the teacher's logits, and the students' with the gradient of their states; of a trained head its own too
    own = layer.own_head.weight if isinstance(layer, Eagle3Layer) and layer.own_head is not None else None
    N = layer.draft_vocab_size if isinstance(layer, Eagle3Layer) else V
    passes = 3 if own is not None and own.requires_grad else 2
    return 6 * layers + 2 * D * predictions * (V + passes * steps * N)


def activation_bytes(
    model: Mapping[str, Any],
    draft: Mapping[str, Any] | None,
    *,
    tokens: int,
    anchors: int,
    steps: int,
    size: int,
    longest: int,
    sparse: bool = False,
    form: str | None = None,
    indexer: str = "frozen",
) -> tuple[int, int]:
    """Most bytes that come and go beside the layer and its gradients: before the backward, and at its end.

    Before it, everything autograd keeps, and the loss; at its end, the rows from which the gradients of the
    experts are formed.

    Args:
        model: the target's config.json.
        draft: the config.json of an EAGLE-3 draft.
        tokens: of a micro-batch; they count where step 0 projects them.
        anchors: of a micro-batch; they count where a step of the unroll goes on.
        steps: draft steps.
        size: bytes of an element; 2 stands for the forms that a GPU takes.
        longest: tokens of the longest document.
        sparse: whether attention is.
        form: `gather`, or None for the device's default.
        indexer: `train.indexer`.
    """
    D, F, V = model["hidden_size"], model["moe_intermediate_size"], model["vocab_size"]
    H, E, K = model["num_attention_heads"], model["n_routed_experts"], model["num_experts_per_tok"]
    if draft is not None:
        F, E, K = draft["intermediate_size"], 1, 1
    L, low = model["kv_lora_rank"], model["q_lora_rank"]
    nope, rope, value = model["qk_nope_head_dim"], model["qk_rope_head_dim"], model["v_head_dim"]
    rows = steps * anchors
    # embedding, carried state, both joined, residual, normed; queries, keys, values and their latents
    project = 6 * D + 3 * low + 2 * H * (nope + rope) + H * (nope + value) + 2 * L + rope
    # residuals, normed, states, students and their gradients; heads, experts and the shared one
    onwards = 8 * D + H * value + 2 * K * F + 4 * F
    kept = (tokens + rows - anchors) * project + rows * onwards + anchors * (D + H * (nope + rope))
    # in float32: rotary parts and the router's scores
    kept_32 = (tokens + rows - anchors) * 2 * H * rope + rows * 4 * E
    # rows gathered for the experts, their results and the gradients of both
    passing = 4 * anchors * K * D
    if draft is not None:
        # the layers of the target that it joins
        passing = tokens * len(draft["eagle_aux_hidden_state_layer_ids"]) * D
    on_gpu = size == 2
    if on_gpu:
        logits = 2 * default_chunk(V, torch.device("cuda")) * V * size
    else:
        # the plain form keeps the attention's weights; logits are held in several forms
        if form != "gather":
            kept += rows * H * min(longest, tokens)
        logits = 6 * default_chunk(V, torch.device("cpu")) * V * 4
    forward = (kept + passing) * size + kept_32 * 4 + logits
    if sparse or indexer != "frozen":
        heads, width, topk = model["index_n_heads"], model["index_head_dim"], model["index_topk"]
        entry, query = L + rope, H * (nope + rope)
        # queries are made for anchors alone
        forward -= (tokens - anchors) * ((3 * low + query) * size + 8 * H * rope)
        # index keys, a step's queries, and scores beside what orders them
        scored = min(HELD["cuda" if on_gpu else "cpu"], longest * min(longest, anchors))
        forward += (tokens + rows) * width * size + anchors * heads * width * (size + 8) + 32 * scored
        if form == "gather":
            # entries instead of expanded keys and values; the places kept
            forward -= (tokens + rows - anchors) * (query + H * (nope + value)) * size
            forward += (tokens + anchors * steps * (steps + 1) // 2) * entry * size + 4 * rows * topk
        elif sparse and on_gpu:
            # a bit for each key in the fused form
            forward += rows * tokens // 8
        if indexer != "frozen":
            # gradients of its queries, formed at once; absorbed queries of a step
            forward += rows * heads * width * size + (tokens + rows + anchors * H) * entry * size
    left = rows * (4 * K * F + 3 * D) + (0 if on_gpu else rows * K * D)
    return forward, left * size
