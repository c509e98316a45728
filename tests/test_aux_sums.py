"""Layer inputs under tensor parallelism, where each rank holds a part of what the layer before adds.

vLLM's CUDA class of DeepSeek-V3.2 needs a GPU. What stands here in its place are layers with its calling
convention (`vllm/models/deepseek_v32/nvidia/model.py`, vllm 0.32.0): called with positions, this rank's part
of a feed-forward and the residual, they sum the part over the ranks in their first norm and return a part
again. The ranks, their groups and the sum are vLLM's own, on gloo.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytestmark = pytest.mark.engine

TOKENS, WIDTH, INNER, CHOSEN, RANKS = 5, 16, 32, [2, 3, 5], 2


class Layer(nn.Module):
    """One layer of a rank; `reduce` sums over the ranks, and does nothing where there is one."""

    def __init__(self, number: int, rank: int, ranks: int, reduce) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(number)
        up = torch.randn(INNER, WIDTH, generator=generator) / WIDTH**0.5
        down = torch.randn(WIDTH, INNER, generator=generator) / INNER**0.5
        self.up, self.down, self.reduce = up.chunk(ranks)[rank], down.chunk(ranks, 1)[rank], reduce

    def forward(self, positions, hidden_states, residual, attn_in=None):
        if residual is None:
            residual = hidden_states
        else:
            residual = self.reduce(hidden_states) + residual
        normed = nn.functional.rms_norm(residual, (WIDTH,))
        return nn.functional.silu(normed @ self.up.T) @ self.down.T, residual


def run(layers: nn.ModuleList) -> dict[int, torch.Tensor]:
    """Run the layers as the model does; returns what it hands out itself for the chosen ones."""
    hidden = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(99))
    residual, handed = None, {}
    for k, layer in enumerate(layers):
        if k in CHOSEN:
            handed[k] = hidden + residual
        hidden, residual = layer(torch.arange(TOKENS), hidden, residual, None)
    return handed


def rank_job(rank: int, port: int) -> None:
    """Body of a rank: what is taken is whole, and what the model hands out is not."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        init_distributed_environment,
        initialize_model_parallel,
        tensor_model_parallel_all_reduce,
    )

    from pipeline.capture.model import take_inputs

    expected = run(nn.ModuleList(Layer(k, 0, 1, lambda x: x) for k in range(6)))
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(RANKS, rank, f"tcp://127.0.0.1:{port}", rank, "gloo")
        initialize_model_parallel(RANKS)
        layers = nn.ModuleList(Layer(k, rank, RANKS, tensor_model_parallel_all_reduce) for k in range(6))
        taken = take_inputs(layers, CHOSEN)
        for _ in range(2):
            taken.clear()
            handed = run(layers)
            assert len(taken) == len(CHOSEN)
            for found, k in zip(taken, CHOSEN, strict=True):
                assert (found - expected[k]).abs().max() < 1e-5, k
                assert (handed[k] - expected[k]).abs().max() > 0.1, k


def test_layer_inputs_are_summed_over_two_tensor_parallel_ranks():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from tests.test_aux_sums import rank_job; rank_job(*map(int, sys.argv[1:]))"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(port)],
            cwd=Path(__file__).parent.parent,
            # of different names: ranks that share one pass memory instead of messages
            env=os.environ | {"VLLM_DIST_IDENT": f"rank-{rank}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(RANKS)
    ]
    said = [process.communicate(timeout=120)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * RANKS, "\n".join(said)[-3000:]
