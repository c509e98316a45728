"""Acceptance lengths by number of draft tokens, temperature, source and length, with bootstrap intervals.

Both the offline evaluator and the measurement in vLLM count by document how often each draft step was tried,
all steps before it accepted, and how often it was accepted then. Documents are drawn again, whole, because
the tokens of one are alike: an interval over tokens would be too narrow.

Legend: N documents, T temperatures, K numbers of draft tokens (1 to K), S draft steps (K of them).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["ACCEPTED", "TRIED", "acceptance_length", "length_bucket", "share_accepted", "tables"]

RESAMPLES = 1000
# bounds of the middle 95 %
BOUNDS = (2.5, 97.5)
# draws held at once
DRAWN = 1 << 24
# the two counts of a step
TRIED, ACCEPTED = 0, 1


def share_accepted(counts: np.ndarray) -> np.ndarray:
    """Share of drafts accepted through each step, [..., 2, S] to [..., S].

    It is the product of the shares at each step of those still alive: near the end of a text the last targets
    of a draft may be unknown, and it counts for the steps it has.
    """
    return np.cumprod(counts[..., ACCEPTED, :] / np.maximum(counts[..., TRIED, :], 1), -1)


def acceptance_length(counts: np.ndarray) -> np.ndarray:
    """Tokens a draft yields on average, the target's own included: [..., 2, S] to [...]."""
    return 1 + share_accepted(counts).sum(-1)


def interval(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Bounds of the acceptance length by a bootstrap over documents, seeded.

    Args:
        counts: of each document, [N, ..., 2, S].

    Returns:
        Lower and upper bounds, each [...]; None where there are fewer than two documents.
    """
    N = len(counts)
    if N < 2:
        return None
    generator = np.random.default_rng(0)
    flat = counts.reshape(N, -1).astype(np.float64)
    drawn = []
    for done in range(0, RESAMPLES, step := max(DRAWN // N, 1)):
        rows = min(step, RESAMPLES - done)
        which = generator.integers(N, size=(rows, N)) + np.arange(rows)[:, None] * N
        times = np.bincount(which.ravel(), minlength=rows * N).reshape(rows, N)
        drawn.append(acceptance_length((times @ flat).reshape(rows, *counts.shape[1:])))
    low, high = np.percentile(np.concatenate(drawn), BOUNDS, axis=0)
    return low, high


def length_bucket(tokens: int) -> str:
    """The bucket of a document's length: `1-128`, then up to each power of two."""
    upper = max(int(tokens - 1).bit_length(), 7)
    return f"{2 ** (upper - 1) + 1 if upper > 7 else 1}-{2**upper}"


def _rows(
    counts: np.ndarray, temperatures: Sequence[float], tokens: np.ndarray, **named: Any
) -> list[dict[str, Any]]:
    """An entry for each temperature and number of draft tokens, of documents [N, T, K, 2, S]."""
    length, bounds = acceptance_length(counts.sum(0, dtype=np.float64)), interval(counts)
    return [
        {
            **named,
            "num_steps": k + 1,
            "temperature": temperature,
            "acceptance_length": float(length[t, k]),
            "low": None if bounds is None else float(bounds[0][t, k]),
            "high": None if bounds is None else float(bounds[1][t, k]),
            "tokens": int(tokens.sum()),
            "documents": len(counts),
        }
        for t, temperature in enumerate(temperatures)
        for k in range(counts.shape[2])
    ]


def tables(
    counts: np.ndarray,
    temperatures: Sequence[float],
    tokens: np.ndarray,
    sources: Sequence[str] | np.ndarray,
    lengths: Sequence[int] | np.ndarray,
) -> dict[str, Any]:
    """What counts say, as JSON: `by_num_steps`, `by_source` and `by_length`.

    Args:
        counts: tried and accepted steps of each document, [N, T, K, 2, S]; steps from K on are zero.
        temperatures: of T.
        tokens: answer tokens of each document, [N].
        sources: of each document.
        lengths: of each document, in tokens.

    Returns:
        Lists of `num_steps`, `temperature`, `acceptance_length`, `low`, `high`, `tokens`, `documents`; with
        `source` or `length` in the latter two. `low` and `high` are None below two documents.
    """
    found: dict[str, Any] = {"by_num_steps": _rows(counts, temperatures, tokens)}
    buckets = np.array([length_bucket(int(n)) for n in lengths], dtype=object)
    ascending = sorted(set(buckets), key=lambda bucket: int(bucket.partition("-")[0]))
    kinds = np.asarray(sources, dtype=object)
    for key, of, groups in (("source", kinds, sorted(set(kinds))), ("length", buckets, ascending)):
        found[f"by_{key}"] = [
            row
            for group in groups
            for row in _rows(counts[of == group], temperatures, tokens[of == group], **{key: group})
        ]
    return found
