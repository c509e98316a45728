"""Routing metadata: every row once, in its expert, in the order it came."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.kernels.moe_triton import row_tiles
from train.kernels.routing import route


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    experts = draw(st.integers(1, 9))
    tokens, topk = draw(st.integers(0, 40)), draw(st.integers(1, 4))
    # few distinct experts, so that empty ones and crowded ones occur
    used = draw(st.lists(st.integers(0, experts - 1), min_size=1, max_size=3))
    flat = draw(st.lists(st.sampled_from(used), min_size=tokens * topk, max_size=tokens * topk))
    return torch.tensor(flat, dtype=torch.int64).view(tokens, topk), experts


@settings(deadline=None, max_examples=60)
@given(routings())
def test_route_sorts_stably_and_inverts(case: tuple[torch.Tensor, int]) -> None:
    ids, experts = case
    order, inverse, offsets, token = route(ids, experts)
    flat, rows = ids.flatten(), torch.arange(ids.numel())
    assert torch.equal(order[inverse], rows)
    assert torch.equal(inverse[order], rows)
    assert torch.equal(offsets.diff(), torch.bincount(flat, minlength=experts))
    assert offsets[0] == 0
    assert offsets[-1] == ids.numel()
    assert torch.equal(token, order // ids.shape[1])
    for e in range(experts):
        mine = order[offsets[e] : offsets[e + 1]]
        assert torch.equal(mine, torch.where(flat == e)[0])


@settings(deadline=None, max_examples=60)
@given(routings(), st.sampled_from([1, 4, 16]))
def test_row_tiles_cover_each_row_once_within_its_expert(case: tuple[torch.Tensor, int], size: int) -> None:
    ids, experts = case
    offsets = route(ids, experts).offsets
    tile_expert, tile_row = row_tiles(offsets, ids.numel(), size)
    seen = torch.zeros(ids.numel(), dtype=torch.int64)
    used = tile_expert >= 0
    assert torch.equal(used, used.sort(descending=True, stable=True).values), "unused tiles come last"
    for e, row in zip(tile_expert[used].tolist(), tile_row[used].tolist(), strict=True):
        end = int(offsets[e + 1])
        assert int(offsets[e]) <= row < end
        assert (row - int(offsets[e])) % size == 0
        seen[row : min(row + size, end)] += 1
    assert torch.equal(seen, torch.ones_like(seen))


@pytest.mark.parametrize("wrong", [-1, 5])
def test_ids_out_of_range_never_point_outside(wrong: int) -> None:
    """A GPU does not check the ids; their rows must belong to no expert instead of to memory elsewhere."""
    routing = route(torch.tensor([[0, wrong], [4, 2]]), 5)
    tile_expert, tile_row = row_tiles(routing.offsets, 4, 2)
    assert int(routing.offsets.min()) >= 0
    assert int(routing.offsets.max()) <= 4
    assert torch.equal(routing.offsets.diff(), torch.tensor([1, 0, 1, 0, 1]))
    assert int(tile_expert.max()) < 5
    assert ((tile_row >= 0) & (tile_row < 4))[tile_expert >= 0].all()
