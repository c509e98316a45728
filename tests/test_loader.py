"""Packed batches: order, packing, resumption at every step, other world sizes and budgets, read-ahead."""

import heapq
import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import ConfigError, StoreCorruptError, StoreError
from featurestore import Batch, Loader, open_store, publish, steps_per_epoch
from featurestore.order import Position, epoch_order, pack, plan
from tests.documents import Made, make, same_bits, write

LENGTHS = [int(n) for n in np.clip(np.random.default_rng(0).lognormal(3.6, 0.8, 60), 1, 200)]
MADE = [make(uid, n, 2, 16) for uid, n in enumerate(LENGTHS)]
TRAIN = [d.uid for d in MADE if not d.held_out]
Copy = tuple[list[int], torch.Tensor, torch.Tensor, int]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("loader") / "store"
    write(path, MADE[:25], part="a")
    write(path, MADE[25:40], part="b", compression="zstd")
    write(path, MADE[40:], part="c")
    publish(path)
    return open_store(path)


def check(batch: Batch, made: list[Made]) -> None:
    """A batch holds exactly the documents it names."""
    edges = batch.cu_seqlens.tolist()
    assert batch.cu_seqlens.dtype == torch.int32
    assert edges[0] == 0
    assert edges[-1] == len(batch.input_ids) == len(batch.loss_mask) == len(batch.hidden)
    assert len(batch.uids) == len(edges) - 1
    for uid, a, b in zip(batch.uids, edges, edges[1:], strict=False):
        document = made[uid]
        assert torch.equal(batch.input_ids[a:b], document.input_ids)
        assert torch.equal(batch.loss_mask[a:b], document.loss_mask)
        assert same_bits(batch.hidden[a:b], document.hidden)


def copied(batch: Batch) -> Copy:
    return batch.uids, batch.input_ids.clone(), batch.hidden.clone().view(torch.int16), batch.epoch


def equal(a: list[Copy], b: list[Copy]) -> bool:
    return len(a) == len(b) and all(
        x[0] == y[0] and torch.equal(x[1], y[1]) and torch.equal(x[2], y[2]) and x[3] == y[3]
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize(("threads", "ring"), [(1, 2), (2, 3), (4, 5)])
def test_batches_hold_their_documents(store, threads, ring) -> None:
    seen: list[int] = []
    with Loader(store, 400, seed=1, threads=threads, ring=ring, epochs=2) as loader:
        for batch in loader:
            check(batch, MADE)
            assert len(batch.input_ids) <= 400
            seen += batch.uids
    assert sorted(seen) == sorted(TRAIN + TRAIN)


def test_dtypes_are_as_promised(store) -> None:
    batch = next(Loader(store, 400))
    assert batch.input_ids.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.bool
    assert batch.hidden.dtype == torch.bfloat16
    assert batch.hidden.shape[1:] == (2, 16)


def test_a_batch_is_valid_until_the_next(store) -> None:
    loader = Loader(store, 300, ring=2, threads=3)
    for _ in range(20):
        batch = next(loader)
        before = copied(batch)
        for _, _, futures in loader._ahead:  # all that is read ahead has arrived
            for future in futures:
                future.result()
        assert equal([before], [copied(batch)])


def test_buffers_are_reused(store) -> None:
    loader = Loader(store, 300, ring=3)
    places = {next(loader).hidden.data_ptr() for _ in range(12)}
    assert len(places) == 3


def test_restoring_at_every_step_of_two_epochs_gives_the_same_rest(store) -> None:
    loader = Loader(store, 256, rank=1, world_size=2, seed=3)
    states, batches = [loader.state_dict()], []
    while loader.position.epoch < 2:
        batches.append(copied(next(loader)))
        states.append(json.loads(json.dumps(loader.state_dict())))
    assert len(batches) > 10
    again = Loader(store, 256, rank=1, world_size=2, seed=3)
    for i, state in enumerate(states):
        again.load_state_dict(state)
        assert again.state_dict() == state
        assert equal([copied(next(again)) for _ in batches[i:]], batches[i:])
    fresh = Loader(store, 256, rank=1, world_size=2, seed=3)
    fresh.load_state_dict(states[5])
    assert equal([copied(next(fresh)) for _ in batches[5:]], batches[5:])


@pytest.mark.parametrize("split", ["train", "all"])
@pytest.mark.parametrize("sizes", [(1,), (2,), (3,), (8,), (1, 8, 3, 2), (8, 1), (3, 2, 8, 1)])
@pytest.mark.parametrize("budgets", [(256,), (256, 700, 210)])
def test_each_document_once_an_epoch_over_world_sizes_and_budgets(store, sizes, budgets, split) -> None:
    """The world size and the budget change in mid-epoch, at a different step each time."""
    everything = TRAIN if split == "train" else [d.uid for d in MADE]
    delivered: list[int] = []
    state = None
    for turn, (size, budget) in enumerate(
        zip(itertools.cycle(sizes), itertools.cycle(budgets), strict=False)
    ):
        ranks = [Loader(store, budget, r, size, seed=7, split=split, ring=2, threads=1) for r in range(size)]
        for loader in ranks:
            if state is not None:
                loader.load_state_dict(state)
        for _ in range(1 + turn % 3):
            step = [(uid, loader) for loader in ranks for uid in next(loader).uids]
            assert {loader for _, loader in step} == set(ranks)  # no rank goes without
            delivered += order_of_step(store, [uid for uid, _ in step], everything, len(delivered))
        states = [loader.state_dict() for loader in ranks]
        for loader in ranks:
            loader.close()
        assert all(s == states[0] for s in states)
        state = states[0]
        assert state["epoch"] * len(everything) + state["consumed"] == len(delivered)
        if len(delivered) >= 3 * len(everything):
            break
    for epoch in range(3):
        assert sorted(delivered[epoch * len(everything) : (epoch + 1) * len(everything)]) == everything


def order_of_step(store, uids: list[int], everything: list[int], consumed: int) -> list[int]:
    """The documents of a step in the order of the epochs; its ranks must hold just these."""
    uid = np.array(everything, np.uint64)
    count = len(everything)
    wanted = []
    for place in range(consumed, consumed + len(uids)):
        epoch, i = divmod(place, count)
        wanted.append(int(uid[epoch_order(uid, 7, epoch)[i]]))
    assert sorted(uids) == sorted(wanted)
    return wanted


def test_held_out_documents_are_never_trained_on(store) -> None:
    held = Loader(store, 400, split="held_out", epochs=1)
    assert sorted(uid for batch in held for uid in batch.uids) == [d.uid for d in MADE if d.held_out]
    train = Loader(store, 400, epochs=1)
    assert sorted(uid for batch in train for uid in batch.uids) == TRAIN


@pytest.mark.parametrize("world_size", [1, 3])
def test_one_pass_ends_for_all_ranks_at_the_same_step(store, world_size) -> None:
    loaders = [Loader(store, 300, r, world_size, split="held_out", epochs=1) for r in range(world_size)]
    batches = [list(map(copied, loader)) for loader in loaders]
    assert len({len(b) for b in batches}) == 1
    seen = sorted(uid for rank in batches for batch in rank for uid in batch[0])
    assert seen == [d.uid for d in MADE if d.held_out]
    for loader in loaders:
        with pytest.raises(StopIteration):
            next(loader)


def test_state_pins_the_manifest_version(tmp_path) -> None:
    write(tmp_path, MADE[:10], part="a")
    publish(tmp_path)
    loader = Loader(open_store(tmp_path), 400, split="all")
    next(loader)
    state = loader.state_dict()
    rest = [next(loader).uids for _ in range(5)]
    write(tmp_path, MADE[10:], part="b")
    publish(tmp_path)
    resumed = Loader(open_store(tmp_path), 400, split="all")
    resumed.load_state_dict(state)
    assert [next(resumed).uids for _ in range(5)] == rest
    assert resumed.state_dict()["manifest"] == 1


def test_states_that_do_not_fit_are_refused(store) -> None:
    loader = Loader(store, 400, seed=1)
    state = loader.state_dict()
    for change, message in (
        ({"version": 2}, "has version 2, not 1"),
        ({"seed": 5}, "seed 5, not 1"),
        ({"split": "all"}, "split 'all', not 'train'"),
        ({"consumed": 999}, "document 999 of"),
        ({"manifest": 77}, "no manifest version 77"),
    ):
        with pytest.raises(StoreError, match=message):
            loader.load_state_dict({**state, **change})
    next(loader)


@pytest.mark.parametrize(
    "change", [{"consumed": 1.5}, {"consumed": 10**6}, {"manifest": None}, {"epoch": -1}]
)
def test_a_refused_state_changes_nothing(store, change) -> None:
    with Loader(store, 256, split="all") as loader, Loader(store, 256, split="all") as other:
        for _ in range(2):
            assert next(loader).uids == next(other).uids
        before = loader.state_dict()
        with pytest.raises(StoreError, match="loader state"):
            loader.load_state_dict({**before, **change})
        assert loader.state_dict() == before
        assert next(loader).uids == next(other).uids


def test_documents_beyond_the_budget_are_named(store) -> None:
    longest = max((d for d in MADE if not d.held_out), key=lambda d: len(d.input_ids))
    with pytest.raises(ConfigError, match=rf"train\.tokens_per_rank = 50 .*uid {longest.uid}: "):
        Loader(store, 50)
    empty_split = open_store(store.url)
    empty_split.held_out = np.zeros(len(store), bool)
    with pytest.raises(ConfigError, match="no documents in its held_out split"):
        Loader(empty_split, 400, split="held_out")
    with pytest.raises(ConfigError, match="rank is 2, world_size 2"):
        Loader(store, 400, rank=2, world_size=2)


def test_a_bad_document_stops_the_loader(tmp_path) -> None:
    write(tmp_path, MADE[:10], part="a")
    publish(tmp_path)
    file = tmp_path / "parts/a/hidden/c/0/0/0"
    changed = bytearray(file.read_bytes())
    changed[1000] ^= 1
    file.write_bytes(changed)
    with (
        Loader(open_store(tmp_path), 400, split="all", epochs=1) as loader,
        pytest.raises(StoreCorruptError, match="chunk 0 fails its checksum"),
    ):
        list(loader)


def test_steps_of_an_epoch_are_counted_without_reading(store) -> None:
    for world_size, budget in ((1, 256), (3, 400), (8, 210)):
        loader = Loader(store, budget, 0, world_size, seed=2)
        expected = loader.steps_per_epoch()
        steps = 0
        while loader.position.epoch == 0:
            next(loader)
            steps += 1
        assert steps == expected


def test_steps_of_a_large_store_are_extrapolated_closely() -> None:
    uid = np.arange(40_000, dtype=np.uint64)
    lengths = np.random.default_rng(1).integers(50, 900, len(uid))
    guess = steps_per_epoch(uid, lengths, tokens_per_rank=1000, world_size=8, seed=0)
    exact = sum(1 for _ in plan(uid, lengths, tokens_per_rank=1000, world_size=8, seed=0, epochs=1))
    assert guess == pytest.approx(exact, rel=0.01)


# ------------------------------------------------------------------ pure functions


@given(
    st.lists(st.integers(0, 2**64 - 1), unique=True, max_size=50), st.integers(0, 2**32), st.integers(0, 9)
)
def test_order_is_a_permutation_that_ignores_listing(uids, seed, epoch) -> None:
    uid = np.array(uids, np.uint64)
    order = uid[epoch_order(uid, seed, epoch)]
    assert sorted(order.tolist()) == sorted(uids)
    assert order.tolist() == uid[::-1][epoch_order(uid[::-1], seed, epoch)].tolist()
    some = uid[::2]  # documents added later leave the others' relative order alone
    kept = some[epoch_order(some, seed, epoch)].tolist()
    assert kept == [u for u in order.tolist() if u in set(kept)]


def test_orders_of_seeds_and_epochs_differ() -> None:
    uid = np.arange(1000, dtype=np.uint64)
    orders = {epoch_order(uid, seed, epoch).tobytes() for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert abs(np.corrcoef(np.arange(1000), epoch_order(uid, 0, 0))[0, 1]) < 0.1


def test_order_never_changes() -> None:
    """A resumed run relies on it: these places were computed once and must stay."""
    uid = np.array([3, 14, 159, 2653, 58979, 2**64 - 1], np.uint64)
    assert epoch_order(uid, 0, 0).tolist() == slow_order(uid, 0, 0)
    assert epoch_order(uid, 123, 4).tolist() == slow_order(uid, 123, 4)


def slow_order(uid: np.ndarray, seed: int, epoch: int) -> list[int]:
    """The order in Python's own integers."""

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    key = mix((mix(seed * 0x9E3779B97F4A7C15 % 2**64) + epoch) % 2**64)
    return sorted(range(len(uid)), key=lambda i: mix(mix(int(uid[i])) ^ key))


lengths_strategy = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@given(lengths_strategy, st.integers(1, 6), st.integers(30, 60))
@settings(deadline=None)
def test_a_step_is_the_longest_prefix_that_packs(lengths, bins, capacity) -> None:
    uid = np.arange(len(lengths), dtype=np.uint64)
    array = np.array(lengths)
    position = 0
    for step in plan(uid, array, tokens_per_rank=capacity, world_size=bins, seed=1, epochs=1):
        order = epoch_order(uid, 1, 0)[position:]
        taken = sorted(n for bin_ in step.bins for n in bin_)
        assert taken == sorted(order[: len(taken)].tolist())
        assert all(sum(lengths[n] for n in bin_) <= capacity for bin_ in step.bins)
        fits = [
            m for m in range(1, len(order) + 1) if slow_pack([lengths[n] for n in order[:m]], bins, capacity)
        ]
        assert len(taken) == max(fits)
        assert step.before == Position(0, position)
        position += len(taken)
    assert position == len(lengths)


def slow_pack(lengths: list[int], bins: int, capacity: int) -> bool:
    filled = [0] * bins
    for length in sorted(lengths, reverse=True):
        least = heapq.nsmallest(1, range(bins), key=lambda b: filled[b])[0]
        filled[least] += length
        if filled[least] > capacity:
            return False
    return True


def test_packing_fills_the_budget() -> None:
    lengths = np.clip(np.random.default_rng(3).lognormal(6.75, 0.75, 4000), 200, 4000).astype(int)
    uid = np.arange(len(lengths), dtype=np.uint64)
    steps = list(plan(uid, lengths, tokens_per_rank=8192, world_size=8, seed=0, epochs=1))[:-1]
    fill = sum(lengths[b].sum() for s in steps for b in s.bins) / (len(steps) * 8 * 8192)
    assert fill >= 0.95
    assert pack(np.array([5, 5]), 1, 9) is None
