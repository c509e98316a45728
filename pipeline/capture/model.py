"""vLLM's DeepSeek classes with a paged cache for the states after the final norm and chosen layer inputs.

The cache is one more layer of vLLM's own kind for stored states, which computes nothing: the engine gives it
blocks beside those of attention, so chunked prefill, preemption and prefix caching need no bookkeeping here.
vLLM's `extract_hidden_states` fills the same kind of layer, but as a speculative method: it verifies a
drafted token at every step of decoding, and its states are taken before the final norm. In the CUDA class of
DeepSeek-V3.2 those lack the last layer, and with tensor parallelism they are sums of one rank only; what
`forward` returns is after the norm and whole on every rank (vllm/models/deepseek_v32/nvidia/model.py, vllm
0.32.0). The layer inputs that this class hands out for EAGLE-3 are such sums of one rank too: the result of a
feed-forward is summed over the ranks only in the norm behind it. There we take what enters the chosen layers
ourselves, and sum it.

vLLM's layer declares no support for CUDA graphs, and the engine takes the least that any layer declares: a
target without compiled pieces would run without graphs at all. Ours declares what holds: the copy into the
cache is a scatter by the engine's own slot mapping, whose buffer stays in place from step to step, and rows
of padding go to the null block, which no request owns.

Legend: T tokens of a step, S states of a token, D hidden_size.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_world_size
from vllm.model_executor.models.deepseek_v2 import DeepseekV3ForCausalLM
from vllm.model_executor.models.extract_hidden_states import (
    CacheOnlyAttentionBackend,
    CacheOnlyAttentionImpl,
    CacheOnlyAttentionLayer,
    CacheOnlyAttentionMetadataBuilder,
    basic_cache,
)
from vllm.model_executor.models.utils import maybe_prefix
from vllm.models.deepseek_v32 import DeepseekV32ForCausalLM
from vllm.sequence import IntermediateTensors
from vllm.v1.attention.backend import AttentionCGSupport

from configs.errors import CaptureError

__all__ = ["CapturingDeepseekV3ForCausalLM", "CapturingDeepseekV32ForCausalLM", "StatesLayer", "take_inputs"]

CONNECTOR = "StoreConnector"

WORD = torch.complex128  # of sixteen bytes, which are copied as they are


class StatesBuilder(CacheOnlyAttentionMetadataBuilder):
    _cudagraph_support = AttentionCGSupport.ALWAYS


class StatesBackend(CacheOnlyAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[StatesBuilder]:
        return StatesBuilder


class StatesImpl(CacheOnlyAttentionImpl):
    def do_kv_cache_update(
        self, layer: Any, to_cache: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        # a CPU scatters these three times as fast as single numbers
        basic_cache(to_cache.view(WORD), kv_cache.view(WORD), slot_mapping)


class StatesLayer(CacheOnlyAttentionLayer):
    """vLLM's layer that only caches: by words, and with the backend that may be part of a CUDA graph."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.attn_backend = StatesBackend
        self.impl = StatesImpl(
            self.num_heads, self.head_size, self.impl.kv_cache_dtype, self.kv_cache_torch_dtype
        )


def take_inputs(layers: nn.ModuleList, chosen: list[int]) -> list[torch.Tensor]:
    """Let chosen layers leave what enters them, [T, D] each and whole on every rank, in the list returned.

    Layers are called with (positions, what the layer before adds to the residual, residual, ...), of which
    the second is each rank's own part of a sum.
    """
    taken: list[torch.Tensor] = []

    def take(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        part, residual = arguments[1:3]
        # some devices sum in place, and the layer sums the part again
        taken.append(tensor_model_parallel_all_reduce(part.clone()) + residual)

    for k in chosen:
        layers[k].register_forward_pre_hook(take)
    return taken


class Capturing:
    """Mixin: keeps the states of every token where the engine was given our connector."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        transfer = vllm_config.kv_transfer_config
        self.states: StatesLayer | None = None
        self.taken: list[torch.Tensor] | None = None
        if transfer is None or transfer.kv_connector != CONNECTOR:
            return
        aux_layers = list(transfer.get_from_extra_config("aux_layers", ()))
        if aux_layers:
            self._choose(aux_layers)
        if not get_pp_group().is_last_rank:
            return
        self.states = StatesLayer(
            num_heads=len(aux_layers) + 1,
            head_size=vllm_config.model_config.get_hidden_size(),
            # states keep the model's dtype whatever that of the attention cache
            cache_config=replace(vllm_config.cache_config, cache_dtype="auto"),
            # the engine orders caches by the number in their names: this one is behind the last layer
            prefix=maybe_prefix(prefix, f"states.{vllm_config.model_config.get_total_num_hidden_layers()}"),
        )

    def _choose(self, aux_layers: list[int]) -> None:
        model: Any = self.model  # type: ignore[attr-defined]
        if get_pp_group().world_size > 1:
            raise CaptureError(
                "layer inputs are captured on one pipeline rank only", "set dump.tensor_parallel_size instead"
            )
        partial = isinstance(self, DeepseekV32ForCausalLM) and get_tensor_model_parallel_world_size() > 1
        # with sequence-parallel experts a rank has whole sums of some tokens, and vLLM gathers them
        if partial and not getattr(model, "use_sequence_parallel", False):
            self.taken = take_inputs(model.layers, aux_layers)
        else:
            model.aux_hidden_state_layers = tuple(aux_layers)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """As the stock class: states after the final norm [T, D], of which the cache keeps a copy."""
        if self.taken is not None:
            self.taken.clear()
        out = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)  # type: ignore[misc]
        hidden, aux = out if isinstance(out, tuple) else (out, self.taken or [])
        if self.states is not None:
            self.states(torch.stack([*aux, hidden], 1) if aux else hidden.unsqueeze(1))
        return hidden


class CapturingDeepseekV3ForCausalLM(Capturing, DeepseekV3ForCausalLM):
    pass


class CapturingDeepseekV32ForCausalLM(Capturing, DeepseekV32ForCausalLM):
    pass
