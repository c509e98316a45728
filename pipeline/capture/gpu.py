"""What only concerns an engine on GPUs: memory that comes free late, CUDA graphs, data-parallel ranks."""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

from configs.errors import CaptureError, ConfigError

__all__ = ["free_shares", "refuse_data_parallel", "require_cudagraphs", "wait_for_memory"]

# vLLM's own default (vllm/config/cache.py, vllm 0.32.0)
GPU_MEMORY_UTILIZATION = 0.92
# a process that was killed may hold its memory for some seconds more
MEMORY_PATIENCE_S = 90.0


def free_shares(count: int) -> list[float]:
    """Free share of the memory of the first `count` GPUs of this machine; leaves no context on them."""
    from torch import cuda
    from vllm.platforms import current_platform

    devices = range(min(count, cuda.device_count()))
    return [1 - cuda.device_memory_used(i) / current_platform.get_device_total_memory(i) for i in devices]


def wait_for_memory(
    free: Callable[[], Sequence[float]], vllm: dict[str, Any], patience_s: float = MEMORY_PATIENCE_S
) -> bool:
    """Wait until every GPU has the memory that the engine asks for; whether it has.

    An engine that was just ended may leave its memory to the next one only after a while, and vLLM refuses to
    start on less than it was promised. That refusal is left to vLLM where the patience ends.

    Args:
        free: free share of the memory of each GPU.
        vllm: the pass-through settings, of which `gpu_memory_utilization` is read.
        patience_s: seconds after which to give up.
    """
    wanted = float(vllm.get("gpu_memory_utilization", GPU_MEMORY_UTILIZATION))
    end = time.monotonic() + patience_s
    while min(free(), default=1.0) < wanted:
        if time.monotonic() >= end:
            return False
        time.sleep(min(1.0, patience_s))
    return True


def require_cudagraphs(mode: str, vllm: dict[str, Any]) -> None:
    """Refuse an engine that would launch every kernel of every step by itself, unless it was asked to.

    Args:
        mode: name of the mode vLLM settled on.
        vllm: the pass-through settings; `enforce_eager`, or a `compilation_config` with the mode NONE or 0,
            asks for no graphs.

    Raises:
        CaptureError: no graphs, and nobody asked for that.
    """
    compilation = vllm.get("compilation_config")
    asked = compilation.get("cudagraph_mode") if isinstance(compilation, dict) else compilation
    if mode == "NONE" and not vllm.get("enforce_eager") and asked not in ("NONE", 0):
        raise CaptureError(
            "the engine runs without CUDA graphs, which makes decoding two to four times slower",
            "its log says which layer does not support them; set dump.vllm.enforce_eager = true to go on so",
        )


def refuse_data_parallel() -> None:
    """Refuse an environment that makes the engine one of several data-parallel ranks.

    Raises:
        ConfigError: VLLM_DP_SIZE is more than 1.
    """
    size = os.environ.get("VLLM_DP_SIZE", "1")
    if size != "1":
        raise ConfigError(
            f"VLLM_DP_SIZE is {size}: the ranks of one engine would have to step together, and each engine of"
            " a dump is stepped by itself",
            "unset it; give each engine its GPUs with dump.tensor_parallel_size and start several with"
            " dump.worker or dump.ray",
        )
