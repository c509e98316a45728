"""What served answers say of other numbers of draft tokens, and which number is recommended."""

import numpy as np
import pytest

from configs.acceptance import acceptance_length
from pipeline.replay import recommend, served_counts, speedups


def answers(*steps, cut=0):
    """Answers whose steps accepted so many drafts, and whose last lacks `cut` of its tokens."""
    outputs = [[7] * (1 + sum(n + 1 for n in accepted) - cut) for accepted in steps]
    return {"outputs": outputs, "accepted": [list(accepted) for accepted in steps]}


def test_a_number_that_was_served_is_counted_and_a_smaller_one_walked():
    # six tokens drafted a step: all taken twice, then one, then none
    counts = served_counts({6: answers([6, 6, 1, 0]), 2: answers([2, 0])}, 6)[0]
    assert counts[5].tolist() == [[4, 3, 2, 2, 2, 2], [3, 2, 2, 2, 2, 2]]
    assert counts[1].tolist() == [[2, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
    # AAAAAA AAAAAA A. . with three a step: the tokens between whole drafts are taken too
    assert counts[2].tolist() == [[5, 4, 4, 0, 0, 0], [4, 4, 4, 0, 0, 0]]


def test_what_is_accepted_behind_the_end_of_an_answer_counts_for_nothing():
    # the second draft of four is taken whole, but only two of its tokens are in the answer
    cut = answers([1, 4], cut=3)
    assert len(cut["outputs"][0]) == 1 + 2 + 2
    counts = served_counts({4: cut}, 4)[0]
    assert counts[3].tolist() == [[2, 2, 0, 0], [2, 1, 0, 0]]
    # with one token a step the fourth token of the answer is the target's own again
    assert counts[0, :, 0].tolist() == [2, 2]
    # refused just where the answer ends: a draft had still been tried
    assert served_counts({4: answers([1, 1])}, 4)[0, 3].tolist() == [[2, 2, 0, 0], [2, 0, 0, 0]]


def test_smaller_numbers_do_not_count_hard_places_too_often():
    # half of a text is easy, half hard: served with one token a step it takes 1/2 + 1 steps for 2 tokens
    easy_and_hard = [[6] * 100 + [0] * 700]
    found = acceptance_length(served_counts({6: answers(*easy_and_hard)}, 6)[0])
    assert found[0] == pytest.approx(1400 / (350 + 700), rel=0.01)
    cut = np.minimum(easy_and_hard[0], 1)
    assert 1 + cut.mean() == pytest.approx(1.125)


def rows(*lengths):
    return [{"num_steps": k, "temperature": 0, "acceptance_length": a} for k, a in enumerate(lengths, 1)]


def test_speed_follows_from_acceptance_and_the_measured_steps():
    measured = {"2": {"1": 1.5, "4": 3.0}, "4": {"1": 2.0, "4": 5.0}}
    found = speedups(rows(1.5, 2.0, 2.4, 2.6), {"1": 1.0, "4": 2.0, "16": 9.0}, measured)
    of = {(row["num_steps"], row["concurrency"]): row["speedup"] for row in found}
    assert of[2, 1] == pytest.approx(2.0 / 1.5)
    assert of[1, 1] == pytest.approx(1.5 / 1.25)
    assert of[3, 4] == pytest.approx(2.4 * 2 / 4)
    # 16 at a time were not timed with drafts
    assert {c for _, c in of} == {1, 4}
    assert recommend("trained", found, 0) == (
        "Serve the trained draft with 2 draft tokens a step: it is expected to be 1.33 times as fast as the"
        " target alone with 1 request at a time and 1.33 times with 4 (tokens a second at temperature 0)."
    )
    assert "bench-serve" in recommend("trained", [], 0)


def test_where_no_draft_pays_that_is_said_and_by_how_much():
    slow = speedups(rows(1.5, 2.0), {"1": 1.0, "4": 1.5}, {"2": {"1": 4.0, "4": 6.0}})
    assert recommend("/runs/mine/nextn", slow, 1.0) == (
        "Serve without the nextn draft on this machine, where no number of draft tokens pays: with 1 a step,"
        " its best, it is expected to be 40% slower than the target alone with 1 request at a time and 40%"
        " with 4 (tokens a second at temperature 1)."
    )
    mixed = speedups(rows(1.5), {"1": 1.0, "4": 1.0, "16": 1.0}, {"1": {"1": 1.2, "4": 1.2, "16": 2.0}})
    assert recommend("trained", mixed, 0).endswith("; with 16 the target alone is faster.")
