"""The exception tree, and how an exception passes between processes.

Every message says what was found, what was expected and what to do next.
"""

import traceback
from typing import Any

__all__ = [
    "BadStatesError",
    "CaptureError",
    "ConfigError",
    "ContractError",
    "InputError",
    "Layer61Error",
    "PartExistsError",
    "StoreCorruptError",
    "StoreError",
    "StoreNotFoundError",
    "StoreVersionError",
    "describe",
    "revive",
]


class Layer61Error(Exception):
    """Base of every error a user can cause or mend; the command line prints it without a traceback.

    Args:
        message: what was found and what was expected, in one sentence.
        hint: what to do next; shown on its own line as `hint: ...`.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message


class ConfigError(Layer61Error, ValueError):
    """A setting is unknown, out of range or contradicts another one, or the command line is wrong."""

    exit_code = 2


class InputError(Layer61Error, ValueError):
    """A file given as input (conversations, checkpoint, export) is not what the stage needs."""

    exit_code = 3


class ContractError(InputError):
    """Two things that must agree (store, target, checkpoint, export) were made under different contracts."""


class StoreError(Layer61Error):
    """A feature store cannot be written or read as asked."""

    exit_code = 3


class StoreNotFoundError(StoreError, FileNotFoundError):
    """The directory is missing or is not a feature store."""


class StoreVersionError(StoreError):
    """The store was written in a format this program does not know."""


class StoreCorruptError(StoreError, OSError):
    """An object of the store is missing, short, or fails its checksum."""


class PartExistsError(StoreError, FileExistsError):
    """A part of that name is committed already; a part is never written twice."""


class CaptureError(Layer61Error):
    """The engine returned something other than one finite state for each token sent."""


class BadStatesError(CaptureError):
    """More than a few documents came back wrong: the engine is at fault, and starting it again is no help."""


def describe(error: BaseException) -> dict[str, Any]:
    """An exception as plain data: `type`, `message`, `hint`, and a `trace` if it is not one of ours."""
    if isinstance(error, Layer61Error):
        return {"type": type(error).__name__, "message": error.message, "hint": error.hint, "trace": ""}
    trace = "".join(traceback.format_exception(error))
    return {
        "type": type(error).__name__,
        "message": f"{type(error).__name__}: {error}",
        "hint": None,
        "trace": trace,
    }


def revive(described: dict[str, Any], otherwise: type[Layer61Error] = Layer61Error) -> Layer61Error:
    """The exception that `describe` was given; one that is not ours becomes `otherwise`, with its trace."""
    kind = globals().get(described["type"])
    if isinstance(kind, type) and issubclass(kind, Layer61Error):
        return kind(described["message"], described["hint"])
    return otherwise(f"{described['message']}\n{described['trace']}".strip())
