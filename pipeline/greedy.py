"""Did the draft change greedy output, or did rounding?

A draft must not change what the target says. But the engine checks several tokens of several requests in one
forward pass, and other shapes round differently: two candidates with nearly equal logits change places, and a
router on the edge sends a token to another expert. So two outputs may diverge without any fault. At the
first token where they do both still have one prefix, and the target alone has a logit there for either
candidate. The divergence is a *tie* if these two logits differ by no more than the larger of

    TIE_STEPS    steps of the serving dtype at their size; a step is eps * 2**floor(log2 |logit|)
    the noise    the most that the distance between the target's two best candidates moves, over all tokens,
                 when the target alone reads in one pass what it has written token by token

and *different* otherwise. The noise is measured in the same engine, without any draft; how often the best
candidate changes there says how many divergences to expect.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["TIE_STEPS", "Divergence", "compare", "divergences", "noise"]

# either logit may be rounded up in one run and down in the other
TIE_STEPS = 2.0
Logits = Mapping[int, float]


@dataclass(frozen=True)
class Divergence:
    """Where two outputs of a request diverge; a candidate is None where that output has ended."""

    request: int
    position: int
    plain: int | None
    draft: int | None


def divergences(plain: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> list[Divergence]:
    """The first difference of every request that has one."""
    found = []
    for request, (a, b) in enumerate(zip(plain, other, strict=True)):
        if list(a) != list(b):
            same = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
            at = next(same, min(len(a), len(b)))
            x, y = (tokens[at] if at < len(tokens) else None for tokens in (a, b))
            found.append(Divergence(request, at, x, y))
    return found


def noise(pairs: Iterable[tuple[Logits, Logits]]) -> dict[str, Any]:
    """How far the target's own rounding moves two candidates.

    Args:
        pairs: for each token the largest logits when it was written and when its text was read in one pass.

    Returns:
        `tokens` compared, `flipped` (the best candidate is another one), `largest` and `median` change of
        the distance between the two that were best when written.
    """
    changes: list[float] = []
    flipped = 0
    for written, read in pairs:
        first, second = sorted(written, key=lambda token: -written[token])[:2]
        flipped += max(read, key=lambda token: read[token]) != first
        if first in read and second in read:
            changes.append(abs((written[first] - written[second]) - (read[first] - read[second])))
    changes.sort()
    return {
        "tokens": len(changes),
        "flipped": flipped,
        "largest": changes[-1] if changes else 0.0,
        "median": changes[len(changes) // 2] if changes else 0.0,
    }


def compare(
    plain: Sequence[Sequence[int]],
    other: Sequence[Sequence[int]],
    logits: Mapping[tuple[int, int], Logits],
    *,
    eps: float,
    largest_noise: float,
) -> dict[str, Any]:
    """Compare greedy outputs with a draft with those of the target alone, request by request.

    Args:
        plain: token ids of the target alone.
        other: token ids with a draft.
        logits: largest logits of the target alone by (request, position), wherever the outputs diverge.
        eps: relative step of the serving dtype (2**-7 in bfloat16).
        largest_noise: from `noise`.

    Returns:
        `requests` = `equal` + `ties` + `different`; `tokens` of the target alone; `diverged`: for each
        request that diverged its number, position, candidates, and the distance of their logits, absolute
        and in steps (null where one was not among the largest).
    """
    diverged: list[dict[str, Any]] = []
    ties = 0
    for first in divergences(plain, other):
        entry: dict[str, Any] = {**vars(first), "distance": None, "steps": None}
        known = logits.get((first.request, first.position), {})
        x, y = (known.get(token) if token is not None else None for token in (first.plain, first.draft))
        if x is not None and y is not None:
            size = max(abs(x), abs(y))
            step = eps * 2.0 ** math.floor(math.log2(size)) if size else eps
            entry |= {"distance": abs(x - y), "steps": abs(x - y) / step}
            ties += entry["distance"] <= max(TIE_STEPS * step, largest_noise)
        diverged.append(entry)
    return {
        "requests": len(plain),
        "equal": len(plain) - len(diverged),
        "ties": ties,
        "different": len(diverged) - ties,
        "tokens": sum(map(len, plain)),
        "diverged": diverged,
    }
