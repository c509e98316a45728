"""Which tokens of an answer count as loops."""

import numpy as np
import pytest

from pipeline.loops import LONGEST_PERIOD, SHORTEST, loop_share, loop_tokens


def slow(ids: list[int]) -> list[bool]:
    """The definition, token by token."""
    bad = [False] * len(ids)
    for p in range(1, LONGEST_PERIOD + 1):
        same = [i >= p and ids[i] == ids[i - p] for i in range(len(ids))]
        i = 0
        while i < len(ids):
            j = i
            while j < len(ids) and same[j]:
                j += 1
            if j - i >= max(SHORTEST, 2 * p):
                bad[i:j] = [True] * (j - i)
            i = max(j, i + 1)
    return bad


@pytest.mark.parametrize("seed", range(20))
def test_loops_are_those_of_the_definition(seed):
    random = np.random.default_rng(seed)
    pieces = []
    for _ in range(12):
        piece = random.integers(0, int(random.integers(2, 40)), int(random.integers(1, 40)))
        pieces.append(np.tile(piece, int(random.integers(1, 6))))
    ids = np.concatenate(pieces)
    assert loop_tokens(ids).tolist() == slow(ids.tolist())


def test_text_that_only_repeats_a_word_or_a_sentence_once_is_no_loop():
    assert not loop_tokens(np.arange(500)).any()
    assert not loop_tokens(np.tile(np.arange(20), 2)).any()
    assert not loop_tokens(np.array([7] * SHORTEST)).any()  # the first one repeats nothing
    assert loop_tokens(np.array([7] * (SHORTEST + 1))).tolist() == [False] + [True] * SHORTEST


def test_share_is_of_each_answer_by_itself():
    ids = np.concatenate([np.full(20, 5), np.full(21, 5), np.arange(9)])
    assert loop_share(ids, [(20, 41), (41, None)]) == (20, 30)
    assert loop_share(ids, []) == (0, 0)
    assert loop_share(ids[:41], [(38, None)]) == (0, 3)  # the loop of the prompt is not the target's
