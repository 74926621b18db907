"""Page references against a plain count: reserve, fork, release and copy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smc_plugin.reference import pages

NUM_PAGES = 40


class Pages:
    """Two groups of three particles over a pool of 39 pages, and what the references must be."""

    def __init__(self) -> None:
        self.ref_count = torch.zeros(NUM_PAGES, dtype=torch.int32)
        self.ref_count[pages.TRASH_PAGE] = 1
        self.table = torch.zeros(2, 3, 9, dtype=torch.int32)
        self.num_blocks = torch.zeros(2, dtype=torch.int64)

    def reserve(self, needed: tuple[int, int]) -> bool:
        want = torch.maximum(torch.tensor(needed), self.num_blocks)
        room = int((want - self.num_blocks).max())
        exhausted = pages.reserve(self.ref_count, self.table, self.num_blocks, want, max(room, 1))
        self.num_blocks = want
        return bool(exhausted)

    def held(self) -> list[int]:
        return [int(page) for g in range(2) for row in self.table[g] for page in row[: self.num_blocks[g]]]

    def check(self) -> None:
        expected = torch.bincount(torch.tensor(self.held(), dtype=torch.int64), minlength=NUM_PAGES).int()
        expected[pages.TRASH_PAGE] = 1
        assert self.ref_count.tolist() == expected.tolist()
        assert pages.TRASH_PAGE not in self.held()


def test_reserved_pages_are_new_and_distinct() -> None:
    state = Pages()
    assert not state.reserve((2, 0))
    state.check()
    before = state.table.clone()
    assert not state.reserve((3, 2))
    state.check()
    assert torch.equal(state.table[0, :, :2], before[0, :, :2])
    assert len(set(state.held())) == len(state.held()) == 15


def test_an_exhausted_pool_says_so_and_gives_the_trash_page() -> None:
    state = Pages()
    assert state.reserve((8, 8))  # 48 pages of 39
    assert (state.ref_count[1:] == 1).all()
    assert (torch.tensor(state.held()) == pages.TRASH_PAGE).sum() == 9


STEPS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 1), st.lists(st.integers(0, 2), min_size=3, max_size=3)), max_size=8
)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_counts_are_conserved_over_rounds(steps) -> None:
    """Grow a group, then resample it: shared pages gain a reader, dropped ones become free."""
    state = Pages()
    state.reserve((1, 1))
    for group, grow, drawn in steps:
        needed = [int(count) for count in state.num_blocks]
        needed[group] = min(needed[group] + grow, 6)
        assert not state.reserve((needed[0], needed[1]))
        chosen = torch.arange(3).repeat(2, 1)
        survivors = set(drawn)
        chosen[group] = torch.tensor([i if i in survivors else drawn[0] for i in range(3)])
        shared = state.num_blocks - 1
        before = state.table.clone()
        source, destination = pages.fork(state.ref_count, state.table, chosen, shared)
        state.check()
        for g in range(2):
            for i in range(3):
                ancestor = int(chosen[g, i])
                last = int(shared[g])
                assert state.table[g, i, :last].tolist() == before[g, ancestor, :last].tolist()
                assert state.table[g, i, last] == before[g, i, last]  # the page it will write stays its own
                moved = ancestor != i
                assert int(source[g, i]) == (int(before[g, ancestor, last]) if moved else pages.TRASH_PAGE)
                assert int(destination[g, i]) == (int(before[g, i, last]) if moved else pages.TRASH_PAGE)
    pages.release(state.ref_count, state.table, state.num_blocks)
    assert state.ref_count.tolist() == [1] + [0] * (NUM_PAGES - 1)
    assert (state.table == pages.TRASH_PAGE).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_move_whole_pages_of_every_layer(dtype: torch.dtype) -> None:
    cache = torch.randn(2, 2, 6, 4, 1, 3).to(dtype)
    before = cache.clone()
    pages.copy_pages(cache, torch.tensor([[2, 0, 5]], dtype=torch.int32), torch.tensor([[3, 0, 1]], dtype=torch.int32))
    assert torch.equal(cache[:, :, 3], before[:, :, 2])
    assert torch.equal(cache[:, :, 1], before[:, :, 5])
    untouched = [2, 4, 5]
    assert torch.equal(cache[:, :, untouched], before[:, :, untouched])
