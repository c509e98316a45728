"""Gradients under ZeRO-3, on two ranks and several micro-batches, against plain autograd on all of them."""

import sys
from pathlib import Path

import torch

from tests import rank_jobs
from tests.rank_jobs import run_job, together
from tests.stores import write_store
from train import zero

STEPS, MICRO_BATCHES, LENGTHS = 4, 2, (11, 7)


def rank_of_two(target: Path) -> None:
    """What each rank runs: raises where a gradient differs."""
    import torch
    from deepspeed.utils import safe_get_full_grad

    from configs.schema import TrainConfig
    from export.checkpoint import Checkpoint
    from tests.test_unroll import defined, packed, relative_error
    from train import zero
    from train.model import load_layer
    from train.unroll import unroll

    class Loss(torch.nn.Module):
        def __init__(self, layer: torch.nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, ids, hidden, cu, form):
            return form(self.layer, ids, hidden, cu, STEPS)[defined(LENGTHS, STEPS)].square().sum()

    rank, ranks = zero.init_distributed()
    train = TrainConfig(
        dtype="float32",
        freeze=["self_attn.indexer."],
        gradient_accumulation_steps=MICRO_BATCHES,
        deepspeed={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    )
    config = zero.deepspeed_config(train, num_parameters=1000)
    layer = zero.build_layer(Checkpoint(target), train, config)
    engine = zero.initialize(Loss(layer), train, config)
    # two optimizer steps' worth: the first one is what DeepSpeed records its order of gathers from
    for last in (False, True):
        for i in range(MICRO_BATCHES):
            engine.backward(engine(*packed(layer, LENGTHS, seed=10 * rank + i), unroll))
            if i == MICRO_BATCHES - 1:
                found = {n: safe_get_full_grad(p) for n, p in layer.named_parameters() if p.requires_grad}
            if not last:
                engine.step()
    plain = load_layer(target)
    with torch.no_grad():
        for (name, p), whole in zip(layer.named_parameters(), plain.parameters(), strict=True):
            with zero.gathered([p]):
                assert p.shape == whole.shape, name
                whole.copy_(p)
    loss = Loss(plain)
    for seed in (10 * r + i for r in range(ranks) for i in range(MICRO_BATCHES)):
        (loss(*packed(plain, LENGTHS, seed), unroll.__wrapped__) / (ranks * MICRO_BATCHES)).backward()
    expected = {n: p.grad for n, p in plain.named_parameters() if "indexer" not in n}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-5, name
    # what DeepSpeed compiles with
    assert "setuptools" not in sys.modules
    zero.shutdown()


def two_ranks(target: Path) -> None:
    together(2, lambda: rank_of_two(target))


def test_gradients_of_partitioned_experts_equal_plain_autograds(tiny_checkpoint):
    run_job(two_ranks, tiny_checkpoint)


def test_every_parameter_is_gathered_once_an_optimizer_step(tmp_path, tiny_checkpoint):
    store = write_store(tmp_path / "store", tiny_checkpoint, lengths=[24] * 48)
    said = run_job(rank_jobs.count_gathers, tiny_checkpoint, store, tmp_path / "run")
    layer, *gathered = map(int, said.split("gathered ")[1].split())
    # DeepSpeed gathers more often in the first step, while it records the order of modules. Two micro-batches
    # a step; there are evaluations after steps 2 and 4 and a checkpoint after step 3.
    assert gathered[2:] == [0, layer] * 3


def test_a_rank_binds_its_device_before_anything_else_happens(monkeypatch):
    calls = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "3")
    # restored afterwards: vLLM's engines, which other tests start, refuse it
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(device))
    monkeypatch.setattr(zero.deepspeed, "init_distributed", lambda **_: calls.append("join"))
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: calls.append("rank") or 3)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 8)
    assert zero.init_distributed() == (3, 8)
    assert calls == [torch.device("cuda", 3), "join", "rank"]
