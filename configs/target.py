"""The config.json of a checkpoint, read in one place; the released one serves plans made without a target."""

from pathlib import Path
from typing import Any

from configs.errors import InputError
from configs.files import read_json
from configs.progress import log

__all__ = ["RELEASED", "require_directory", "target_config"]

# config.json of DeepSeek-V3.2 as released
RELEASED = Path(__file__).parent / "deepseek-v3.2.config.json"
HINT = "name a directory with config.json and *.safetensors files; `make target` builds the tiny target"


def require_directory(path: Path | str) -> Path:
    """The path of a checkpoint. Raises InputError: it is missing, or a file."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(
            f"{path} is a file, not a checkpoint directory"
            if path.is_file()
            else f"there is no checkpoint at {path}: no such directory",
            HINT,
        )
    return path


def target_config(directory: Path | str, *, planning: bool = False) -> dict[str, Any]:
    """Parse `config.json` of a checkpoint directory.

    Args:
        directory: the checkpoint.
        planning: take the sizes of the released DeepSeek-V3.2, and say so, where the target is not at hand.

    Raises:
        InputError: the directory or the file is missing, or the file is not a JSON object.
    """
    if planning and not Path(directory).exists():
        log("plan", f"{directory} is not on this machine; the sizes are those of the released DeepSeek-V3.2")
        file = RELEASED
    else:
        file = require_directory(directory) / "config.json"
    try:
        config = read_json(file)
    except FileNotFoundError:
        raise InputError(f"{directory} is not a checkpoint: it has no config.json", HINT) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file}: {error}", "copy it from the checkpoint again") from None
    if not isinstance(config, dict):
        raise InputError(f"{file} holds a JSON {type(config).__name__}, not an object")
    return config
