"""Which conversations are held out: a rule that every stage computes alone."""

import numpy as np

from configs.held_out import is_held_out, uid_group


def test_one_and_many_agree_and_the_share_is_met():
    groups = np.random.default_rng(0).integers(0, 2**32, 20_000).astype(np.uint64)
    held_out = is_held_out(groups, 0.05, 3)
    assert abs(held_out.mean() - 0.05) < 0.01
    assert held_out[:200].tolist() == [is_held_out(int(g), 0.05, 3) for g in groups[:200]]
    assert not is_held_out(groups, 0.0, 3).any()
    assert is_held_out(groups, 1.0, 3).all()


def test_neighbouring_groups_are_independent_and_a_larger_share_keeps_the_smaller():
    groups = np.arange(20_000, dtype=np.uint64)
    few, many, others = (is_held_out(groups, s, seed) for s, seed in ((0.1, 0), (0.3, 0), (0.1, 1)))
    assert abs(few.mean() - 0.1) < 0.01
    assert not (few & ~many).any()
    assert abs((few & others).mean() - 0.01) < 0.005


def test_the_rule_does_not_change_between_versions():
    """Stores, checkpoints and results of earlier runs depend on these very numbers."""
    assert np.flatnonzero(is_held_out(np.arange(100, dtype=np.uint64), 0.1, 0)).tolist() == [
        1,
        18,
        25,
        27,
        43,
        47,
        58,
        73,
        75,
    ]


def test_documents_of_one_conversation_have_one_group():
    uids = np.array([0xDEADBEEF00000001, 0xDEADBEEFFFFFFFFF], np.uint64)
    assert uid_group(uids).tolist() == [0xDEADBEEF] * 2
    assert uid_group(int(uids[0])) == 0xDEADBEEF
