"""DeepSpeed ZeRO-3: its configuration, the partitioned layer, the engine.

ZeRO *partitions* parameters, gradients and optimizer state over all ranks and gathers a module's parameters
while it runs. Nothing here needs a compiler: collectives are gloo's or NCCL's, the optimizer torch's AdamW.
"""

# ruff: noqa: E402 - deepspeed reads the environment when it is imported
import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    # DeepSpeed warns in every process when it has to find this out by itself
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# of torch 2.13, about a function DeepSpeed calls in every collective
warnings.filterwarnings("ignore", category=FutureWarning, message=".*(all_gather|reduce_scatter).*")

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from configs.errors import ConfigError
from configs.importing import importing
from configs.schema import TrainConfig
from export.checkpoint import Checkpoint
from train.blocks import MoE
from train.model import Layer, load_tables, make_layer
from train.plan import REDUCE_BUCKET, check_prefixes, is_frozen, learning_rate_factor
from train.start import Start, released

__all__ = [
    "Partition",
    "build_layer",
    "collect",
    "deepspeed_config",
    "device",
    "dtype_of",
    "from_first",
    "gathered",
    "import_optimizers",
    "init_distributed",
    "initialize",
    "optimizer_step",
    "partitions",
    "reduce",
    "shutdown",
    "take_over",
]

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
# elements; more than any layer has
WHOLE = 100_000_000_000


def dtype_of(train: TrainConfig) -> torch.dtype:
    """Dtype of parameters and matrix products."""
    return torch.bfloat16 if train.dtype == "bfloat16" else torch.float32


def device() -> torch.device:
    """Where this rank computes."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def init_distributed() -> tuple[int, int]:
    """Join the process group that the environment names, or one of this process alone.

    Returns:
        (rank, world size).
    """
    # while nothing is there yet that may become garbage
    with importing():
        import_optimizers()
    if "RANK" not in os.environ:
        # DeepSpeed wants these for a single process too; at port 0 the system picks a free one
        os.environ.update(ALONE | {"MASTER_PORT": "0"})
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # which of its operators it could compile, it asks a compiler in every rank; the one that it would then
    # compile is an all-reduce in shared memory, and gloo needs none
    deepspeed.ops.__compatible_ops__ = {}
    if torch.cuda.is_available():
        # gathers are allocated on a stream of their own, whose freed blocks the main one could not use
        # otherwise; read at the first allocation, and not set elsewhere, for vLLM's connectors refuse it
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        # the first collective, whoever makes it, puts its tensors on the current device
        torch.cuda.set_device(device())
    deepspeed.init_distributed(verbose=False)
    return dist.get_rank(), dist.get_world_size()


def shutdown() -> None:
    """Leave the process group, so that this process can join another one."""
    if dist.is_initialized():
        deepspeed.comm.destroy_process_group()
    if all(os.environ.get(key) == value for key, value in ALONE.items()):
        for key in (*ALONE, "MASTER_PORT"):
            os.environ.pop(key, None)


def _merge(into: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    for key, value in new.items():
        into[key] = _merge(dict(into.get(key, {})), value) if isinstance(value, dict) else value
    return into


def deepspeed_config(train: TrainConfig, *, num_parameters: int = REDUCE_BUCKET) -> dict[str, Any]:
    """The DeepSpeed configuration of a run, `train.deepspeed` merged over ours.

    Args:
        train: the settings.
        num_parameters: trainable parameters; small layers get small buckets.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": train.gradient_accumulation_steps,
        "gradient_clipping": train.gradient_clipping,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": torch.cuda.is_available(),
            "contiguous_gradients": True,
            # it would replace torch.nn.functional.linear in the whole process
            "memory_efficient_linear": False,
            "reduce_bucket_size": min(REDUCE_BUCKET, num_parameters),
            # every draft step of every micro-batch runs the same modules: what is gathered stays until the
            # optimizer changes it, evaluations included, so that each parameter is gathered once a step
            "stage3_param_persistence_threshold": WHOLE,
            "stage3_max_live_parameters": WHOLE,
            "stage3_max_reuse_distance": WHOLE,
            "stage3_gather_16bit_weights_on_model_save": False,
        },
    }
    if train.dtype == "bfloat16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    return _merge(config, train.deepspeed)


def gathered(parameters: Sequence[Any], modifier_rank: int | None = None) -> Any:
    """Context in which partitioned parameters are whole; all ranks must enter it in the same order."""
    if modifier_rank is None and all(p.ds_status is ZeroParamStatus.AVAILABLE for p in parameters):
        # DeepSpeed would divide them at the end, though they are to stay whole
        return contextlib.nullcontext()
    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=modifier_rank)


def build_layer(
    target: Checkpoint,
    train: TrainConfig,
    ds_config: dict[str, Any],
    weights: Path | None = None,
    *,
    begin: Start | None = None,
    seed: int = 0,
) -> Layer:
    """Create the layer partitioned and fill it, one tensor at a time.

    No rank ever holds more than its partitions, one whole parameter and the frozen tables.

    Args:
        target: the target checkpoint.
        train: the settings.
        ds_config: from `deepspeed_config`.
        weights: directory of tensors to begin with instead of `begin`'s own.
        begin: the kind of draft and its first values; by default the released layer.
        seed: of a random start.

    Raises:
        InputError: as `train.model.load_layer`.
    """
    begin, dtype = begin or released(target.config), dtype_of(train)
    # the dtype comes from the configuration; the argument of that name is ignored on CPU
    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        layer = make_layer(target.config, begin.draft)
    first = dist.get_rank() == 0
    # only rank 0 reads; the partitions travel from there
    tensors = begin.tensors(target, seed, weights, dtype=dtype) if first else None
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())
    check_prefixes(parameters, train)
    for op in begin.ops:
        name, value = next(tensors) if tensors is not None else (op.training, None)
        assert name == op.training
        if name in parameters:
            with gathered([parameters[name]], modifier_rank=0):
                if value is not None:
                    parameters[name].data.copy_(value)
        else:
            # the router bias decides near ties in float32, whatever the dtype of the layer
            kind = buffers[name].dtype
            buffer = torch.empty(op.shape, dtype=torch.float32 if kind.is_floating_point else kind)
            buffer = buffer if value is None else value
            buffer = buffer.to(device())
            dist.broadcast(buffer, 0)
            owner, _, leaf = name.rpartition(".")
            assert name in buffers
            setattr(layer.get_submodule(owner), leaf, buffer)
    load_tables(layer, target, dtype=dtype, device=device())
    for name, parameter in parameters.items():
        parameter.requires_grad_(not is_frozen(name, train))
    if isinstance(layer.mlp, MoE):
        layer.mlp.experts.backend = None if train.moe_backend == "auto" else train.moe_backend
    return layer


def import_optimizers() -> None:
    """Import what comes with the first optimizer, whichever it is: torch's compiler, and one of DeepSpeed's.

    That one's decorators would load the whole of Inductor, a second of every rank's start.
    """
    import torch._dynamo  # noqa: F401

    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        if before is None:
            del os.environ["TORCHDYNAMO_DISABLE"]
        else:
            os.environ["TORCHDYNAMO_DISABLE"] = before


def initialize(module: nn.Module, train: TrainConfig, ds_config: dict[str, Any]) -> Any:
    """Wrap a module, whose `layer` came from `build_layer`, in a DeepSpeed engine with AdamW.

    Its groups of parameters say as `factor` what their learning rate is multiplied by.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in module.get_submodule("layer").named_parameters():
        if parameter.requires_grad:
            # gains of norms are meant to be near 1, not near 0
            decay = train.weight_decay if len(parameter.ds_shape) > 1 else 0.0  # type: ignore[attr-defined]
            groups.setdefault((learning_rate_factor(name, train), decay), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": found, "factor": f, "weight_decay": decay} for (f, decay), found in groups.items()],
        lr=train.learning_rate,
        betas=(train.beta1, train.beta2),
        fused=True,
    )
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=ds_config, dist_init_required=False
    )
    return engine


@dataclass(frozen=True)
class Partition:
    """This rank's part of a trained parameter and of its optimizer state.

    Attributes:
        name: training name of the parameter.
        numel: elements of the whole parameter.
        start, stop: which of them, in the order of the flattened parameter, this rank has.
        state: `master`, `exp_avg` and `exp_avg_sq`, each float32 [stop - start]: views of what the optimizer
            works on, without the padding that makes all ranks' parts alike.
    """

    name: str
    numel: int
    start: int
    stop: int
    state: dict[str, Tensor]


def _adam(engine: Any) -> Iterator[tuple[list[Any], Tensor, dict[str, Tensor]]]:
    """Parameters, flat master weights and AdamW's state of each group in which DeepSpeed steps them."""
    zero = engine.optimizer
    for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True):
        numel = sum(p.partition_numel() for p in group)
        if flat.numel() != numel or getattr(zero, "partial_offload", 1.0) != 1.0:
            raise ConfigError(
                "train.deepspeed offloads optimizer state to NVMe or in part, which no checkpoint can hold",
                "offload it to the CPU whole, or not at all",
            )
        state = zero.optimizer.state[flat]
        if not state:
            # AdamW makes it at its first step, in this form
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(flat), torch.zeros_like(flat)
        yield group, flat, state


def partitions(engine: Any) -> list[Partition]:
    """What this rank has of every trained parameter, in the layer's order.

    Raises:
        ConfigError: `train.deepspeed` keeps optimizer state where it cannot be read.
    """
    names = {id(p): name for name, p in engine.module.layer.named_parameters()}
    found, rank = {}, dist.get_rank()
    for group, flat, state in _adam(engine):
        tensors = {"master": flat.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        offset = 0
        for parameter in group:
            width, numel = parameter.partition_numel(), parameter.ds_numel
            start, stop = min(rank * width, numel), min((rank + 1) * width, numel)
            mine = {key: tensor.narrow(0, offset, stop - start) for key, tensor in tensors.items()}
            offset += width
            found[names[id(parameter)]] = Partition(names[id(parameter)], numel, start, stop, mine)
    return [found[name] for name in names.values() if name in found]


def optimizer_step(engine: Any) -> int:
    """Steps that AdamW has done; skipped ones do not count."""
    return int(next(state["step"] for _, _, state in _adam(engine)))


def take_over(engine: Any, step: int) -> None:
    """Make the parameters what `partitions` now says, after `step` steps of AdamW; all ranks call this."""
    zero = engine.optimizer
    zero.checkpoint_event_prologue()
    for i, (_, _, state) in enumerate(_adam(engine)):
        state["step"].fill_(step)
        zero._reassign_or_swap_out_partitioned_parameters(i)
    # gathers the parameters that stay whole
    zero.checkpoint_event_epilogue()


def reduce(values: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """All-reduce in place and return the tensor."""
    dist.all_reduce(values, op)
    return values


def from_first(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    found = [value]
    dist.broadcast_object_list(found)
    return found[0]


def collect(values: list[Any]) -> list[Any]:
    """The values of all ranks, in the order of the ranks."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, values)
    return [value for mine in found for value in mine]
