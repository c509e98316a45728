"""What a driver and an engine say to each other, whichever engine it is; plain data."""

from dataclasses import dataclass
from typing import Any

__all__ = ["BlockResult", "EngineSettings"]


@dataclass(frozen=True)
class EngineSettings:
    """What the engine's process has to know; plain data."""

    model: str
    max_length: int
    tensor_parallel_size: int
    seed: int
    stop_ids: tuple[int, ...]
    store: str
    contract: dict[str, Any]
    compression: str
    writer_threads: int
    queue_bytes: int
    log: str
    vllm: dict[str, Any]
    held_out: float = 0.0


@dataclass(frozen=True)
class BlockResult:
    """What a committed block holds: documents, tokens, bytes of states, and seconds of engine and writers."""

    documents: int
    tokens: int
    bytes: int
    seconds: float
    writer_seconds: float
