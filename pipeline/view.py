"""A V3 view of a V3.2 checkpoint: the same weights as a model without sparse attention.

vLLM has no sparse attention on CPU. Up to `index_topk` tokens sparse attention attends to every token, so
dense attention computes the same; there the view is exact. It is a directory of links with a rewritten
`config.json` (`deepseek_v3`, no `index_*`). vLLM's V3 class skips the backbone's indexer tensors, but its MTP
class knows no such names and fails on them, so files with indexer tensors of the MTP layer are written anew
without these.
"""

import os
import shutil
from pathlib import Path

from configs.files import explain_full_disk, write_json
from export.checkpoint import INDEX, Checkpoint, mtp_prefix
from export.directory import save

__all__ = ["make_view"]


def make_view(target_dir: Path | str, out_dir: Path | str) -> Path:
    """Write the view of a V3.2 target or draft directory, replacing an older one by rename.

    Args:
        target_dir: a checkpoint or a draft directory (`config.json` of model_type deepseek_v32).
        out_dir: directory of the view.

    Returns:
        `out_dir`; `target_dir` itself where it is a V3 checkpoint already.

    Raises:
        InputError: `target_dir` is not a checkpoint.
        Layer61Error: the disk is full.
    """
    source = Checkpoint(target_dir)
    out = Path(out_dir).absolute()
    if source.config.get("model_type") != "deepseek_v32":
        return source.directory
    indexer = f"{mtp_prefix(source.config)}self_attn.indexer."
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with explain_full_disk("a view of the checkpoint", out, "everything else is untouched"):
            _fill(source, partial, indexer)
        shutil.rmtree(out, ignore_errors=True)
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _fill(source: Checkpoint, out: Path, indexer: str) -> None:
    """Write the view without the tensors that begin with `indexer`."""
    rewritten = {source.file(name) for name in source.names if name.startswith(indexer)}
    out.mkdir(parents=True)
    for path in source.directory.iterdir():
        if path.name not in ("config.json", INDEX, *rewritten) and path.is_file():
            (out / path.name).symlink_to(path.resolve())
    kept = {name: source.file(name) for name in source.names if not name.startswith(indexer)}
    for file in sorted(rewritten):
        tensors = {name: source.get(name, raw=True) for name, held_by in kept.items() if held_by == file}
        save(out / file, tensors)
    write_json(out / INDEX, {"metadata": {}, "weight_map": kept})
    config = {k: v for k, v in source.config.items() if not k.startswith("index_")}
    config |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    write_json(out / "config.json", config)
