"""What a driver and an engine say to each other, whichever engine it is; plain data."""

from dataclasses import dataclass, field
from typing import Any

from pipeline.prompts import Turns

__all__ = ["EngineSettings", "PartResult", "Refused", "too_many_bad"]

# below so many bad documents nobody can tell a rule from chance
FEW_BAD = 8


@dataclass(frozen=True)
class EngineSettings:
    """What the engine's process has to know; plain data.

    Attributes:
        turns: marks, end tokens and bounds of the conversations.
        temperature, top_p: of the answers; 0 always takes the most likely token.
        held_out: share of conversations that the store notes as held out, by `seed`.
        max_loop_share: documents with more of their answers in loops are rejected.
        max_bad_share: share of documents that may be bad before the engine is taken to be.
        open_parts: parts whose documents are in the engine at the same time.
        engine: `vllm` or `transformers`.
        vllm, transformers: what is passed through to each.
        batch_tokens: see `dump.batch_tokens`.
        watch_routers: write down which experts the routers choose for each probe.
    """

    model: str
    tensor_parallel_size: int
    seed: int
    turns: Turns
    store: str
    contract: dict[str, Any]
    compression: str
    writer_threads: int
    queue_bytes: int
    log: str
    vllm: dict[str, Any]
    temperature: float = 0.0
    top_p: float = 1.0
    held_out: float = 0.0
    max_loop_share: float = 1.0
    max_bad_share: float = 0.01
    open_parts: int = 1
    engine: str = "vllm"
    transformers: dict[str, Any] = field(default_factory=dict)
    batch_tokens: int = 2048
    watch_routers: bool = False


@dataclass(frozen=True)
class PartResult:
    """What a committed part holds, and what the engine did since the one before.

    Attributes:
        name: of the part.
        there: another process had committed it; all else is zero.
        documents, tokens, bytes: stored.
        rejected: documents that were found bad, or whose answers run in circles, by uid, and why.
        bad: how many of them the engine is to blame for.
        loops: tokens in loops and tokens, of the stored answers, by source.
        writer_seconds: time of the threads that write.
        steps, busy: steps of the engine since the last part, and the sum of the shares of its sequences that
            were kept busy in each.
    """

    name: str
    there: bool = False
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    rejected: dict[int, str] = field(default_factory=dict)
    bad: int = 0
    loops: dict[str, tuple[int, int]] = field(default_factory=dict)
    writer_seconds: float = 0.0
    steps: int = 0
    busy: float = 0.0


@dataclass(frozen=True)
class Refused:
    """A part that the store would not take, as `error` describes; its documents are left to do."""

    name: str
    error: dict[str, Any]


def too_many_bad(bad: int, done: int, share: float) -> bool:
    """Whether so many of `done` documents are bad that the engine, not they, must be at fault."""
    return bad > max(FEW_BAD, share * done) or (bad == done > FEW_BAD // 2)
