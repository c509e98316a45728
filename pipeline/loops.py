"""Text that goes round in circles: which tokens of an answer repeat the ones just before them.

A run of tokens is a loop where each equals the token one period earlier, for at least twice the period and
at least `SHORTEST` tokens: the text stands there three times or more. Greedy decoding ends in such loops,
above all of small models; a draft learns to continue them and looks better than it is.
"""

from collections.abc import Iterable

import numpy as np

__all__ = ["LONGEST_PERIOD", "SHORTEST", "loop_share", "loop_tokens"]

LONGEST_PERIOD = 32
SHORTEST = 8


def loop_tokens(ids: np.ndarray) -> np.ndarray:
    """The tokens that repeat earlier ones in a loop; O(T) for each period up to `LONGEST_PERIOD`.

    Args:
        ids: integers [T], one answer.

    Returns:
        bool [T].
    """
    found = np.zeros(len(ids), bool)
    for period in range(1, LONGEST_PERIOD + 1):
        least = max(SHORTEST, 2 * period)
        if len(ids) < period + least:
            break
        same = np.zeros(len(ids) + 2, np.int8)  # with a place that differs at either end
        same[period + 1 : -1] = ids[period:] == ids[:-period]
        if np.count_nonzero(same) < least:
            continue
        edges = np.flatnonzero(np.diff(same))
        for start, stop in edges.reshape(-1, 2):
            if stop - start >= least:
                found[start:stop] = True
    return found


def loop_share(ids: np.ndarray, spans: Iterable[tuple[int, int | None]]) -> tuple[int, int]:
    """Tokens in loops, and tokens, of the answers of a document.

    Args:
        ids: integers [T], the whole document.
        spans: token ranges [start, stop) of its answers; stop None means up to the end.
    """
    answers = [ids[start:stop] for start, stop in spans]
    return sum(int(loop_tokens(a).sum()) for a in answers), sum(map(len, answers))
