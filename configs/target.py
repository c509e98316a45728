"""The sizes of the target, for plans that load no model."""

from pathlib import Path
from typing import Any

from configs.errors import ConfigError, InputError
from configs.files import read_json
from configs.progress import log

__all__ = ["RELEASED", "target_config"]

# config.json of DeepSeek-V3.2 as released
RELEASED = Path(__file__).parent / "deepseek-v3.2.config.json"


def target_config(path: Path | None, *, planning: bool = False) -> dict[str, Any]:
    """Parse the config.json of a target.

    Args:
        path: the setting `target.path`.
        planning: take the sizes of the released DeepSeek-V3.2, and say so, where the target is not at hand.

    Raises:
        ConfigError: `target.path` is not set.
        InputError: there is no checkpoint, or its config.json does not parse.
    """
    if path is None:
        raise ConfigError("target.path is not set", "set it to the directory of the target checkpoint")
    if planning and not path.exists():
        log("plan", f"{path} is not on this machine; the sizes are those of the released DeepSeek-V3.2")
        path = RELEASED.parent
        file = RELEASED
    else:
        file = path / "config.json"
    try:
        config = read_json(file)
    except FileNotFoundError:
        raise InputError(
            f"there is no checkpoint at {path}: {file} does not exist",
            "set target.path to a checkpoint; `make target` builds the tiny one",
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not valid JSON: {error}", "copy it from the checkpoint again") from None
    if not isinstance(config, dict):
        raise InputError(f"{file} holds {type(config).__name__}, expected an object")
    return config
