"""Page kernels against the torch reference, under the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smc_plugin.kernels import pages as kernels
from smc_plugin.reference import pages

I32 = torch.int32


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.floats(0, 1))
def test_reserve_chooses_the_pages_of_the_reference(
    seed: int, groups: int, particles: int, most: int, taken: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    ref_count = (torch.rand(37, generator=generator) < taken).to(I32)
    ref_count[0] = 1
    table = torch.randint(1, 37, (groups, particles, 11), generator=generator, dtype=I32)
    held = torch.randint(0, 6, (groups,), generator=generator)
    needed = held + torch.randint(-1, most + 1, (groups,), generator=generator)
    ours, theirs = (ref_count.clone(), table.clone()), (ref_count.clone(), table.clone())
    exhausted = kernels.reserve(*ours, held, needed, most)
    assert exhausted == pages.reserve(*theirs, held, needed, most)
    assert torch.equal(ours[0], theirs[0])
    # The last column only absorbs the reference's masked writes; the kernel leaves it alone.
    assert torch.equal(ours[1][..., :-1], theirs[1][..., :-1])


def test_reserve_scans_beyond_one_tile_and_takes_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_SCAN_BLOCK", 8)
    ref_count = torch.ones(100, dtype=I32)
    ref_count[[7, 8, 40, 41, 99]] = 0
    tables = [torch.zeros((1, 4, 6), dtype=I32) for _ in range(2)]
    counts = [ref_count.clone(), ref_count.clone()]
    held, needed = torch.tensor([1]), torch.tensor([2])
    assert not kernels.reserve(counts[0], tables[0][:, 1:], held, needed, 1)
    assert not pages.reserve(counts[1], tables[1][:, 1:], held, needed, 1)
    assert torch.equal(tables[0], tables[1])
    assert torch.equal(counts[0], counts[1])
    assert tables[0][0, 1:, 1].tolist() == [7, 8, 40]


def test_fork_and_release_keep_the_counts_of_the_reference() -> None:
    generator = torch.Generator().manual_seed(2)
    for _ in range(5):
        groups, particles, columns = 3, 6, 140  # more columns than one tile of the kernels
        table = torch.zeros((groups, particles, columns), dtype=I32)
        held = torch.tensor([130, 1, 5])
        page = 1
        for group, count in enumerate(held.tolist()):
            fresh = torch.arange(page, page + particles * count, dtype=I32)
            table[group, :, :count] = fresh.view(particles, count)
            page += particles * count
        ref_count = torch.bincount(table.flatten(), minlength=page + 3).to(I32)
        ref_count[0] = 1
        ancestors = torch.arange(particles).repeat(groups, 1)
        ancestors[0, [1, 4]] = 0
        ancestors[2, 1:] = torch.where(torch.rand(5, generator=generator) < 0.5, 0, ancestors[2, 1:])
        shared = held - 1
        ours, theirs = (ref_count.clone(), table.clone()), (ref_count.clone(), table.clone())
        source, destination = kernels.fork(*ours, ancestors, shared)
        expected = pages.fork(*theirs, ancestors, shared)
        assert torch.equal(source, expected[0])
        assert torch.equal(destination, expected[1])
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        kernels.release(*ours, held)
        pages.release(*theirs, held)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
        assert ours[0].sum() == 1  # all but the trash page are free again


def test_shared_columns_are_counted_up_to_the_first_that_differs() -> None:
    """Equal tables agree everywhere, also past the block that a program looks at in one turn."""
    table = torch.arange(300, dtype=I32).repeat(4, 3, 1)
    table[1, 2, 0] = 9
    table[2, 1, 131] = 0
    table[2, 0, 200] = 0
    expected = [300, 0, 131, 300]
    assert pages.count_shared(table).tolist() == expected
    assert kernels.count_shared(table).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_copy_pages(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    cache = torch.randn((3, 2, 9, 4, 2, 6), generator=generator)
    cache[:, :, 8] = float("nan")
    cache = cache.to(dtype)
    source = torch.tensor([[3, 0, 3], [7, 0, 2]], dtype=I32)
    destination = torch.tensor([[1, 0, 8], [4, 0, 2]], dtype=I32)
    ours, theirs = cache.clone(), cache.clone()
    kernels.copy_pages(ours, source, destination)
    pages.copy_pages(theirs, source, destination)
    ours, theirs, cache = (pages.view(torch.uint8) for pages in (ours, theirs, cache))
    assert torch.equal(ours, theirs)
    assert torch.equal(ours[:, :, 8], cache[:, :, 3])
