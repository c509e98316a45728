"""vLLM 0.32.0 on CPU checks drafts at the wrong temperatures: the one function that mends it.

Its own expansion writes values that are no int64 into a copy that is dropped (`utils/cpu_triton_utils.py`,
`_expand_kernel_impl`): temperatures are what happened to be in memory, and next to no sampled draft is
accepted. GPUs run another kernel.
"""

import torch

__all__ = ["expand_batch_to_tokens", "mend"]


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """Each request's value, repeated for its drafted tokens: [batch_size] to [num_tokens].

    Example: [a, b, c] with cu_num_tokens [2, 5, 6] gives [a, a, b, b, b, c].
    Source: the function of this name in vLLM's `v1/sample/rejection_sampler.py`.
    """
    counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    return torch.where(x == replace_from, replace_to, x).repeat_interleave(counts, output_size=num_tokens)


def mend() -> None:
    """Put our form of it in the place of vLLM's, where vLLM runs on CPU; in every process of an engine."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.sample import rejection_sampler

        rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
