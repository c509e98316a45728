"""vLLM's DeepSeek classes with a paged cache for the states after the final norm.

The cache is one more layer of vLLM's own kind for stored states, which computes nothing: the engine gives it
blocks beside those of attention, so chunked prefill, preemption and prefix caching need no bookkeeping here.
vLLM's `extract_hidden_states` fills the same kind of layer, but as a speculative method: it verifies a
drafted token at every step of decoding, and its states are taken before the final norm. In the CUDA class of
DeepSeek-V3.2 those lack the last layer, and with tensor parallelism they are sums of one rank only; what
`forward` returns is after the norm and whole on every rank (vllm/models/deepseek_v32/nvidia/model.py, vllm
0.32.0).

Legend: T tokens of a step, S states of a token, D hidden_size.
"""

from dataclasses import replace

import torch
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group
from vllm.model_executor.models.deepseek_v2 import DeepseekV3ForCausalLM
from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer
from vllm.model_executor.models.utils import maybe_prefix
from vllm.models.deepseek_v32 import DeepseekV32ForCausalLM
from vllm.sequence import IntermediateTensors

__all__ = ["PostNormDeepseekV3ForCausalLM", "PostNormDeepseekV32ForCausalLM"]

CONNECTOR = "StoreConnector"


class PostNorm:
    """Mixin: keeps the state after the final norm where the engine was given our connector."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        transfer = vllm_config.kv_transfer_config
        self.states: CacheOnlyAttentionLayer | None = None
        if transfer is None or transfer.kv_connector != CONNECTOR or not get_pp_group().is_last_rank:
            return
        self.states = CacheOnlyAttentionLayer(
            num_heads=1,
            head_size=vllm_config.model_config.get_hidden_size(),
            # states keep the model's dtype whatever that of the attention cache
            cache_config=replace(vllm_config.cache_config, cache_dtype="auto"),
            # the engine orders caches by the number in their names: this one is behind the last layer
            prefix=maybe_prefix(prefix, f"states.{vllm_config.model_config.get_total_num_hidden_layers()}"),
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """As the stock class: states after the final norm [T, D], of which the cache keeps a copy."""
        hidden = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds)  # type: ignore[misc]
        if self.states is not None:
            self.states(hidden.unsqueeze(1))
        return hidden


class PostNormDeepseekV3ForCausalLM(PostNorm, DeepseekV3ForCausalLM):
    pass


class PostNormDeepseekV32ForCausalLM(PostNorm, DeepseekV32ForCausalLM):
    pass
