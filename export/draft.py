"""The verb `export`: a run's checkpoint as a directory that servers load as a draft."""

from typing import Any

import torch

from configs import run_dir
from configs.eagle3 import new_config, usual_layers
from configs.errors import InputError
from configs.schema import RunConfig
from configs.target import target_config
from export import eagle3, fp8
from export.check import refuse_name
from export.keymap import DROPPED, is_quantized, layer_shapes
from export.nextn import Entry, check_place, export, prepare

__all__ = ["plan", "ready", "run"]


def _arguments(config: RunConfig, *, verify: bool) -> dict[str, Any]:
    target, wanted = config.require_target(), config.export.checkpoint
    return {
        "weights_dir": run_dir.find_weights(config.run.dir, wanted, target, verify=verify),
        "target_dir": target,
        "out_dir": config.export_dir,
        "layout": config.export.layout,
        "quantization": config.export.quantization,
    }


def plan(config: RunConfig) -> str:
    """One line: what `layer61 export` will write, with sizes; by the target's sizes alone before training.

    Raises:
        ConfigError, InputError: as `prepare`.
    """
    target, eagle = config.require_target(), config.train.draft == "eagle3"
    if not eagle:
        refuse_name(config.export_dir)
    if target.exists():
        try:
            planned = (
                _prepare_eagle3(config, verify=False)
                if eagle
                else prepare(**_arguments(config, verify=False))
            )
        except InputError as error:
            if run_dir.committed(config.run.dir) or config.export.checkpoint not in ("best", "last"):
                raise
            waiting = error.message
        else:
            if isinstance(planned, eagle3.Plan):
                eagle3.check_place(planned, replace=config.export.replace)
            else:
                check_place(planned, replace=config.export.replace)
            return planned.describe()
    else:
        waiting = f"there is no target at {target}"
    if eagle:
        return f"{_describe_eagle3(config)}; not yet: {waiting}"
    sizes = target_config(target, planning=True)
    as_fp8 = config.export.quantization == "fp8"
    as_fp8 |= config.export.quantization == "auto" and "quantization_config" in sizes
    count = num_bytes = 0
    for name, shape in layer_shapes(sizes).items():
        if name not in DROPPED:
            quantized = as_fp8 and is_quantized(name)
            dtype = torch.float8_e4m3fn if quantized else torch.bfloat16
            dtype = torch.float32 if name.endswith("e_score_correction_bias") else dtype
            entry = Entry(name, name, shape, dtype, quantized)
            count += 1 + quantized
            num_bytes += entry.num_bytes(fp8.BLOCK)
    return (
        f"a layer as {config.export.layout}, {'fp8' if as_fp8 else 'unquantised'}: {count:,} tensors,"
        f" {num_bytes / 1e9:,.3f} GB, to {config.export_dir.absolute()}; not yet: {waiting}"
    )


def _prepare_eagle3(config: RunConfig, *, verify: bool) -> eagle3.Plan:
    target = config.require_target()
    weights = run_dir.find_weights(config.run.dir, config.export.checkpoint, target, verify=verify)
    return eagle3.prepare(weights, target, config.export_dir, draft_vocab_size=config.export.draft_vocab_size)


def _describe_eagle3(config: RunConfig) -> str:
    """The export of a draft that is not trained yet."""
    target = target_config(config.require_target(), planning=True)
    draft = new_config(config, target, config.dump.aux_layers or usual_layers(target))
    if (size := config.export.draft_vocab_size) is not None and not config.eagle3.draft_vocab_size:
        draft["draft_vocab_size"] = size
    return eagle3.describe(draft, config.export_dir.absolute())


def ready(config: RunConfig) -> None:
    """Raises what `run` would: there is no such checkpoint."""
    run_dir.find_weights(config.run.dir, config.export.checkpoint, config.require_target(), verify=False)


def run(config: RunConfig, keep: eagle3.Keep | None = None) -> dict[str, Any]:
    """`layer61 export`: write the draft directory and return its manifest.

    Args:
        config: the settings.
        keep: gives the ids of so many tokens, for `export.draft_vocab_size`.
    """
    target = config.require_target()
    if config.train.draft == "eagle3":
        return eagle3.export(
            run_dir.find_weights(config.run.dir, config.export.checkpoint, target),
            target,
            config.export_dir,
            draft_vocab_size=config.export.draft_vocab_size,
            keep=keep,
            replace=config.export.replace,
        )
    return export(**_arguments(config, verify=True), replace=config.export.replace)
