"""From the settings of a run to what its engine is told, and to the contract of what it captures."""

import os
from typing import Any

from torch import cuda

from configs import run_dir
from configs.contract import Contract, Engine, State, norm_and_head_sha256, target_contract
from configs.eagle3 import refuse_layers
from configs.errors import ConfigError
from configs.provenance import engine_version
from configs.schema import RunConfig
from pipeline.capture.engine import EngineSettings
from pipeline.prompts import Prompts, Turns
from pipeline.view import make_view

__all__ = ["check_aux_layers", "choose_view", "contract", "engine_settings"]

# keys passed through to an engine that say how the work is done and change no number beyond its rounding
NO_NUMBERS = frozenset(
    {"max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "kv_cache_memory_bytes"}
    | {"num_gpu_blocks_override", "enable_prefix_caching", "enable_chunked_prefill", "disable_log_stats"}
    | {"load_format", "model_loader_extra_config", "download_dir", "distributed_executor_backend"}
    | {"device_map", "max_memory", "offload_folder"}
)
# with as many sequences as a part has documents, two parts still leave a fifth of them empty
OPEN_PARTS = 3


def choose_view(config: RunConfig, target: dict[str, Any], *, gpu: bool | None = None) -> str:
    """`native` or `v3`, from `dump.view` and what the engine's machine can do.

    Args:
        config: the settings.
        target: the target's `config.json`.
        gpu: whether that machine has a GPU; None where it is this one.

    Raises:
        ConfigError: the view cannot serve this target there, or at this document length.
    """
    sparse = target.get("model_type") == "deepseek_v32"
    view = config.dump.view
    if not sparse:
        return "native"
    if gpu is None:
        gpu = cuda.is_available()
    everywhere = config.dump.engine == "transformers"
    if view == "auto":
        view = "native" if gpu or everywhere else "v3"
    if view == "native" and not gpu and not everywhere:
        raise ConfigError(
            "dump.view = 'native': vLLM has no sparse attention without a GPU",
            "set dump.view to auto or v3, or dump.engine to transformers",
        )
    if view == "v3" and config.prompts.max_length > target["index_topk"]:
        raise ConfigError(
            f"prompts.max_length = {config.prompts.max_length} is more than index_topk ="
            f" {target['index_topk']} tokens, up to which the V3 view computes what the target computes",
            f"set prompts.max_length to {target['index_topk']} or less, dump.view to native on a GPU, or"
            " dump.engine to transformers",
        )
    return view


def check_aux_layers(config: RunConfig, target: dict[str, Any]) -> None:
    """Refuse layers that the target does not have, or whose draft a server would shift.

    Raises:
        ConfigError: a layer of `dump.aux_layers` is not below `num_hidden_layers`, or the first is 1.
    """
    ids, layers = config.dump.aux_layers, target["num_hidden_layers"]
    # now, not when all is dumped
    refuse_layers(ids)
    if ids and ids[-1] >= layers:
        raise ConfigError(
            f"dump.aux_layers = {list(ids)}: the last of the target's {layers} layers is {layers - 1}",
            f"the usual choice is [2, {layers // 2}, {layers - 3}]" if layers > 8 else None,
        )


def contract(config: RunConfig, prompts: Prompts, view: str) -> Contract:
    """What the states of this dump are, and which target they belong to; reads the target's norm and head.

    Raises:
        InputError: the target is incomplete.
    """
    target = target_contract(config.require_target())
    passed = config.dump.vllm if config.dump.engine == "vllm" else config.dump.transformers
    return Contract(
        target=target,
        norm_and_head_sha256=norm_and_head_sha256(config.require_target()),
        tokenizer_sha256=prompts.tokenizer_sha256,
        template=prompts.template,
        engine=Engine(
            name=config.dump.engine,
            version=engine_version(config.dump.engine).partition("+")[0],
            tp=config.dump.tensor_parallel_size,
            view=view,
            kv_cache_dtype=str(passed.get("kv_cache_dtype", "auto")),
            settings={k: v for k, v in passed.items() if k not in NO_NUMBERS | {"kv_cache_dtype"}},
        ),
        states=(
            *(State(site="layer_input", layer=k) for k in config.dump.aux_layers),
            State(site="post_norm", layer=target.num_hidden_layers),
        ),
        max_length=config.prompts.max_length,
    )


def engine_settings(
    config: RunConfig, turns: Turns, agreed: dict[str, Any], view: str, *, gpu: bool, name: str | None = None
) -> EngineSettings:
    """What the engine of this worker is told, paths absolute; makes the view it serves in the run directory.

    Args:
        config: the settings.
        turns: of the input.
        agreed: the store's contract.
        view: as `choose_view` found.
        gpu: whether the engine's machine has one.
        name: of its log and view in the run directory; by default `dump.worker`.
    """
    model, name = config.require_target(), name or config.dump.worker
    if view == "v3":
        model = make_view(model, run_dir.view(config.run.dir, name))
    return EngineSettings(
        model=str(model.absolute()),
        tensor_parallel_size=config.dump.tensor_parallel_size,
        seed=config.run.seed,
        turns=turns,
        temperature=config.prompts.temperature,
        top_p=config.prompts.top_p,
        held_out=config.prompts.held_out,
        max_loop_share=config.prompts.max_loop_share,
        max_bad_share=config.dump.max_bad_share,
        open_parts=config.dump.open_parts or (OPEN_PARTS if gpu and config.dump.engine == "vllm" else 1),
        store=config.store_path if "://" in config.store_path else os.path.abspath(config.store_path),
        contract=agreed,
        compression=config.dump.compression,
        writer_threads=config.dump.writer_threads,
        queue_bytes=config.dump.queue_bytes,
        log=str(run_dir.engine_log(config.run.dir, name).absolute()),
        vllm=config.dump.vllm,
        engine=config.dump.engine,
        transformers=config.dump.transformers,
        batch_tokens=config.dump.batch_tokens,
    )
