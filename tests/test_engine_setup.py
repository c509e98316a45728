"""How an engine is set up for GPUs; none is started, and nothing here needs one."""

import pytest
import torch

from configs.errors import CaptureError, ConfigError
from configs.load import load_config
from pipeline.capture import gpu


def resolved(builder: type, compiled: bool) -> str:
    """The mode of CUDA graphs vLLM settles on where `builder` declares the least support."""
    from vllm.config import CompilationConfig, CUDAGraphMode
    from vllm.config.compilation import CompilationMode

    config = CompilationConfig(
        mode=CompilationMode.VLLM_COMPILE if compiled else CompilationMode.NONE,
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
        cudagraph_capture_sizes=[1, 2, 4, 8],
    )
    mode = config.resolve_cudagraph_mode_and_sizes(
        builder.get_cudagraph_support(None, None), builder.__name__, 1, use_v2_model_runner=True
    )
    return mode.name


@pytest.mark.parametrize("compiled", [False, True], ids=["V3.2, not compiled", "compiled"])
def test_the_cache_of_states_does_not_switch_cuda_graphs_off(compiled):
    from vllm.config import VllmConfig, set_current_vllm_config

    from pipeline.capture.model import StatesLayer

    dtype = torch.get_default_dtype()
    with set_current_vllm_config(VllmConfig()):
        layer = StatesLayer(num_heads=1, head_size=64, prefix="states.2")
    assert torch.get_default_dtype() == dtype
    assert resolved(layer.get_attn_backend().get_builder_cls(), compiled) == "FULL_AND_PIECEWISE"


def test_an_engine_without_cuda_graphs_is_refused_unless_it_was_asked_for():
    gpu.require_cudagraphs("FULL_AND_PIECEWISE", {})
    gpu.require_cudagraphs("PIECEWISE", {})
    for asked in (
        {"enforce_eager": True},
        {"compilation_config": {"cudagraph_mode": "NONE"}},
        {"compilation_config": 0},
    ):
        gpu.require_cudagraphs("NONE", asked)
    for unasked in ({}, {"compilation_config": {"cudagraph_mode": "FULL"}}, {"compilation_config": 3}):
        with pytest.raises(CaptureError, match="without CUDA graphs"):
            gpu.require_cudagraphs("NONE", unasked)


def test_a_start_waits_until_the_gpus_have_the_memory_that_was_promised():
    seen = iter([[0.1, 0.95], [0.5, 0.95], [0.9, 0.95]])
    asked = []

    def free() -> list[float]:
        asked.append(next(seen))
        return asked[-1]

    assert gpu.wait_for_memory(free, {"gpu_memory_utilization": 0.8}, patience_s=60)
    assert len(asked) == 3
    assert not gpu.wait_for_memory(lambda: [0.95, 0.1], {}, patience_s=0.01)
    assert gpu.wait_for_memory(lambda: [0.1], {"gpu_memory_utilization": 0.05}, patience_s=0)


def test_data_parallel_ranks_and_those_that_divide_a_document_are_refused_by_name(monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ConfigError, match=r"dump\.vllm\.data_parallel_size: .*cannot be data-parallel"):
        load_config([], ["dump.vllm.data_parallel_size=8"])
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size", "dcp_comm_backend"):
        assert name in EngineArgs.__dataclass_fields__, "vLLM calls it something else now"
        expected = rf"dump\.vllm\.{name}: .*tokens over ranks; .*dump\.tensor_parallel_size"
        with pytest.raises(ConfigError, match=expected):
            load_config([], [f"dump.vllm.{name}=2"])
    gpu.refuse_data_parallel()
    monkeypatch.setenv("VLLM_DP_SIZE", "8")
    with pytest.raises(ConfigError, match="VLLM_DP_SIZE is 8"):
        gpu.refuse_data_parallel()
