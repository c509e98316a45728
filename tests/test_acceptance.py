"""Acceptance lengths and their intervals."""

import numpy as np
import pytest

from configs.acceptance import interval, length_bucket, tables


def documents(number, seed):
    """Counts of documents with 40 drafts of one token each, accepted by a chance of their own."""
    generator = np.random.default_rng(seed)
    accepted = generator.binomial(40, generator.uniform(0.4, 0.8, number))
    return np.stack([np.full(number, 40), accepted], 1)[:, None, None, :, None].astype(float)


def test_intervals_hold_the_true_acceptance_length_nineteen_times_in_twenty():
    found = [interval(documents(80, seed)) for seed in range(200)]
    held = [low[0, 0] <= 1.6 <= high[0, 0] for low, high in found]
    # a binomial of 200 at 0.95 lies here with a chance of 0.999; tokens drawn alone would give 0.56
    assert 0.89 <= np.mean(held) <= 0.995
    again = interval(documents(80, 0))
    assert [x.tolist() for x in again] == [x.tolist() for x in found[0]]


def test_more_draws_than_fit_at_once_are_those_of_one_go(monkeypatch):
    counts = documents(30, 1)
    whole = interval(counts)
    monkeypatch.setattr("configs.acceptance.DRAWN", 30 * 7)
    assert [x.tolist() for x in interval(counts)] == [x.tolist() for x in whole]


def test_one_document_has_no_interval_and_every_group_its_own_row():
    counts = documents(3, 2)
    found = tables(counts, [0], np.array([10, 20, 30]), ["web", "docs", "web"], [128, 129, 4097])
    first, second = found["by_source"]
    assert (first["source"], first["documents"], first["tokens"], first["low"]) == ("docs", 1, 20, None)
    assert (second["source"], second["documents"], second["tokens"]) == ("web", 2, 40)
    assert second["acceptance_length"] == pytest.approx(1 + counts[[0, 2], 0, 0, 1].sum() / 80)
    assert [row["length"] for row in found["by_length"]] == ["1-128", "129-256", "4097-8192"]
    assert length_bucket(1) == "1-128"
