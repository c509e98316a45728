"""What vLLM has to be told to serve a draft beside a target: directory, method, view."""

from pathlib import Path
from typing import Any, Literal

import torch

from configs import run_dir
from configs.contract import require_same, target_contract
from configs.eagle3 import ARCHITECTURE, architectures, recognise
from configs.errors import InputError
from configs.progress import log
from configs.schema import RunConfig
from export.check import check, check_eagle3, refuse_name
from export.checkpoint import Checkpoint

__all__ = [
    "CPU_ENGINE",
    "draft_directory",
    "draft_path",
    "is_eagle3",
    "refuse_draft_name",
    "require_draft",
    "speculative_config",
    "view_of",
]

# arguments of an engine where there is no GPU
CPU_ENGINE = {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30}


def view_of(view: Literal["auto", "native", "v3"]) -> Literal["native", "v3"]:
    """How vLLM is to see V3.2 (`pipeline.view`); `auto` takes the view where there is no GPU."""
    return ("native" if torch.cuda.is_available() else "v3") if view == "auto" else view


def is_eagle3(draft: Path) -> bool:
    """Whether a draft directory holds an EAGLE-3 layer, by its architecture; raises as `architectures`."""
    return ARCHITECTURE in architectures(Checkpoint(draft).config, f"{draft}/config.json")


def draft_path(config: RunConfig, draft: str) -> Path | None:
    """Where the draft of a setting lies: `trained` (the export) or a path; None of `released` and `none`."""
    if draft in ("released", "none"):
        return None
    return config.export_dir if draft == "trained" else Path(draft)


def draft_directory(config: RunConfig, draft: str) -> Path | None:
    """As `draft_path`, of a draft that is there.

    Raises:
        InputError: there is no such directory.
    """
    directory = draft_path(config, draft)
    if directory is not None and not directory.is_dir():
        raise InputError(
            f"there is no {'export' if draft == 'trained' else 'draft'} at {directory}",
            "run `layer61 export` with the same settings first"
            if draft == "trained"
            else "name trained, released or the directory of a draft",
        )
    return directory


def refuse_draft_name(config: RunConfig, draft: Path) -> None:
    """Refuse the path of an MTP draft that would mislead vLLM; that of an EAGLE-3 draft means nothing to it.

    Raises:
        ConfigError: as `refuse_name`.
    """
    made = (draft / "config.json").is_file()
    if not (is_eagle3(draft) if made else draft == config.export_dir and config.train.draft == "eagle3"):
        refuse_name(draft)


def require_draft(target: Checkpoint, draft: Path | None, view: str = "native", ranks: int = 1) -> None:
    """Refuse a draft that vLLM would not load beside the target, or that was made for another one.

    Warns of one that it would load and serve badly.

    Args:
        target: the target.
        draft: its directory; None for the released layer.
        view: `native` or `v3`.
        ranks: tensor-parallel ranks.

    Raises:
        ConfigError: the draft's path would mislead vLLM.
        InputError: the target has no MTP layer, or the draft does not load beside it or is damaged.
        ContractError: the draft was made for another target.
    """
    if draft is None:
        # vLLM reads the released layer from the target's own directory
        target.mtp_names()
        refuse_name(target.directory, "target.path")
        return
    if recognise(draft, target.config) is not None:
        if problems := check_eagle3(draft, target.directory)["vllm"]:
            raise InputError(
                f"{draft} is not a vLLM draft for {target.directory}: {problems[0]}", "export it again"
            )
        if ranks > 1 and view == "native" and target.config.get("index_topk"):
            log(
                "draft",
                f"warning: vLLM 0.32.0 does not sum the layer inputs of DeepSeek-V3.2 over its {ranks} GPUs:"
                " this EAGLE-3 draft will accept fewer tokens than it can",
            )
    else:
        target.mtp_names()
        refuse_name(draft)
        if problems := check(draft, target.directory)["vllm"]:
            raise InputError(
                f"{draft} is not a vLLM draft for {target.directory}: {problems[0]}",
                "export it again for this target, layout nextn, quantisation auto",
            )
    if not (draft / run_dir.META).is_file():
        return
    made_for = run_dir.read_export(draft)["identity"]["target"]
    require_same(
        {"target": made_for},
        {"target": target_contract(target.directory).model_dump(mode="json")},
        f"draft {draft} and target {target.directory}",
        hint="set export.dir to the draft of this target, or target.path to the draft's",
    )


def speculative_config(draft: Path | None, num_speculative_tokens: int) -> dict[str, Any]:
    """vLLM's speculative_config of a draft directory; of None, the target's own layer."""
    if draft is None:
        return {"method": "mtp", "num_speculative_tokens": num_speculative_tokens}
    return {
        "method": "eagle3" if is_eagle3(draft) else "mtp",
        "model": str(draft),
        "num_speculative_tokens": num_speculative_tokens,
    }
