"""KV pages on the device: reserve, fork and release with reference counts, and the copy of whole pages.

The page choice is the reference's: the i-th wanted page, in the order group, particle, column, is the i-th free one. One
program walks the reference counts and lists as many free pages as are wanted, stopping as soon as it has them; a second
kernel, a program a particle, writes them into the block tables. Counts change by atomic integer additions, whose order
does not show. The trash page's count stays 1: no kernel touches it.

`copy_pages` moves 16 kB a program over all layers, keys and values; pairs with source == destination, which is how a
particle that stays says so, cost a program that ends at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smc_plugin.kernels.launch import cdiv, launch, let_next_start, next_power_of_2, wait_for_inputs
from smc_plugin.reference.pages import TRASH_PAGE

__all__ = ["TRASH_PAGE", "copy_pages", "count_shared", "fork", "release", "reserve"]

_SCAN_BLOCK = 4096
_COLUMN_BLOCK = 128
_COPY_BLOCK = 2048  # int64 elements: 16 kB


@triton.jit
def _new_blocks(num_blocks, needed_blocks, groups, lane, max_new):
    """How many pages each particle of each group gets, [lanes] int32."""
    valid = lane < groups
    have = tl.load(num_blocks + lane, mask=valid, other=0)
    need = tl.load(needed_blocks + lane, mask=valid, other=0)
    return tl.minimum(tl.maximum(need - have, 0), max_new).to(tl.int32)


@triton.jit
def _take_pages_kernel(
    ref_count,
    num_blocks,
    needed_blocks,
    taken,
    exhausted,
    groups,
    num_particles,
    num_pages,
    max_new,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    let_next_start(PDL)
    lane = tl.arange(0, GROUPS)
    wanted = tl.sum(_new_blocks(num_blocks, needed_blocks, groups, lane, max_new), axis=0) * num_particles
    found = tl.full([], 0, tl.int32)
    start = tl.full([], 0, tl.int32)
    while (found < wanted) & (start < num_pages):
        page = start + tl.arange(0, BLOCK)
        valid = page < num_pages
        free = (valid & (tl.load(ref_count + page, mask=valid, other=1) == 0)).to(tl.int32)
        rank = found + tl.cumsum(free, axis=0) - 1
        takes = (free > 0) & (rank < wanted)
        tl.store(taken + 1 + rank, page, mask=takes)
        tl.store(ref_count + page, 1, mask=takes)
        found = tl.minimum(found + tl.sum(free, axis=0), wanted)
        start += BLOCK
    tl.store(taken, found)
    tl.store(exhausted, (found < wanted).to(tl.int8))


@triton.jit
def _assign_kernel(
    block_table,
    group_stride,
    particle_stride,
    num_blocks,
    needed_blocks,
    taken,
    groups,
    num_particles,
    max_new,
    GROUPS: tl.constexpr,
    NEW: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    let_next_start(PDL)
    particle, group = tl.program_id(0), tl.program_id(1)
    lane = tl.arange(0, GROUPS)
    counts = _new_blocks(num_blocks, needed_blocks, groups, lane, max_new)
    before = tl.sum(tl.where(lane < group, counts, 0), axis=0)
    mine = tl.sum(tl.where(lane == group, counts, 0), axis=0)
    offset = tl.arange(0, NEW)
    order = before * num_particles + particle * mine + offset
    available = (offset < mine) & (order < tl.load(taken))
    page = tl.load(taken + 1 + order, mask=available, other=0)
    row = block_table + group * group_stride + particle * particle_stride
    tl.store(row + tl.load(num_blocks + group) + offset, page, mask=offset < mine)


@triton.jit
def _fork_kernel(
    ref_count,
    block_table,
    group_stride,
    particle_stride,
    ancestors,
    shared_blocks,
    source_out,
    destination_out,
    num_particles,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    let_next_start(PDL)
    particle, group = tl.program_id(0), tl.program_id(1)
    at = group * num_particles + particle
    ancestor = tl.load(ancestors + at)
    shared = tl.load(shared_blocks + group).to(tl.int32)
    source = tl.full([], 0, tl.int32)
    destination = source
    if ancestor != particle:
        # The ancestor survives, so nobody changes its table while this program reads it.
        mine = block_table + group * group_stride + particle * particle_stride
        theirs = block_table + group * group_stride + ancestor * particle_stride
        for start in range(0, shared, BLOCK):
            column = start + tl.arange(0, BLOCK)
            valid = column < shared
            gained = tl.load(theirs + column, mask=valid, other=0)
            lost = tl.load(mine + column, mask=valid, other=0)
            tl.atomic_add(ref_count + gained, 1, mask=gained > 0, sem="relaxed")
            tl.atomic_add(ref_count + lost, -1, mask=lost > 0, sem="relaxed")
            tl.store(mine + column, gained, mask=valid)
        source, destination = tl.load(theirs + shared), tl.load(mine + shared)
    tl.store(source_out + at, source)
    tl.store(destination_out + at, destination)


@triton.jit
def _release_kernel(
    ref_count,
    block_table,
    group_stride,
    particle_stride,
    num_blocks,
    num_columns,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    let_next_start(PDL)
    particle, group = tl.program_id(0), tl.program_id(1)
    held = tl.load(num_blocks + group).to(tl.int32)
    row = block_table + group * group_stride + particle * particle_stride
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        page = tl.load(row + column, mask=column < tl.minimum(held, num_columns), other=0)
        tl.atomic_add(ref_count + page, -1, mask=page > 0, sem="relaxed")
        tl.store(row + column, 0, mask=column < num_columns)


@triton.jit
def _copy_kernel(
    cache,
    source,
    destination,
    num_pages,
    page_words,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    let_next_start(PDL)
    pair, layer = tl.program_id(1), tl.program_id(2).to(tl.int64)
    take, put = tl.load(source + pair).to(tl.int64), tl.load(destination + pair).to(tl.int64)
    if take != put:
        word = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        valid = word < page_words
        base = cache + layer * num_pages * page_words
        values = tl.load(base + take * page_words + word, mask=valid)
        tl.store(base + put * page_words + word, values, mask=valid)


@triton.jit
def _shared_kernel(
    block_table,
    group_stride,
    particle_stride,
    shared_out,
    num_particles,
    num_columns,
    PARTICLES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    let_next_start(PDL)
    group = tl.program_id(0)
    particle = tl.minimum(tl.arange(0, PARTICLES), num_particles - 1)
    first = block_table + group * group_stride
    shared = tl.full([], 0, tl.int32)
    start = tl.full([], 0, tl.int32)
    while shared == start:
        column = start + tl.arange(0, BLOCK)
        valid = column < num_columns
        leads = tl.load(first + column, mask=valid, other=0)
        pages = tl.load(first + particle[:, None] * particle_stride + column[None, :], mask=valid[None, :], other=-1)
        differs = tl.max((pages != leads[None, :]).to(tl.int32), axis=0)
        shared += tl.min(tl.where(differs > 0, column - start, BLOCK), axis=0)
        start += BLOCK
    tl.store(shared_out + group, shared.to(tl.int64))


def _strides(block_table: Tensor) -> tuple[int, int]:
    """Element strides of groups and particles; the columns of a table are contiguous."""
    assert block_table.stride(2) == 1, "a block table's columns must be contiguous"
    return block_table.stride(0), block_table.stride(1)


def reserve(
    ref_count: Tensor, block_table: Tensor, num_blocks: Tensor, needed_blocks: Tensor, max_new_blocks: int
) -> Tensor:
    """Give every particle its own new pages up to the needed number; see the reference.

    Args:
        ref_count: [P] int32, changed in place.
        block_table: [G, N, B + 1] int32, changed in place; a view with contiguous columns will do.
        num_blocks, needed_blocks: [G] int64.
    Returns:
        [] bool: the pool was too small (some particle got the trash page).
    """
    groups, num_particles, _ = block_table.shape
    device = ref_count.device
    taken = torch.empty(1 + groups * num_particles * max_new_blocks, dtype=torch.int32, device=device)
    exhausted = torch.empty((), dtype=torch.bool, device=device)
    num_blocks, needed_blocks = num_blocks.contiguous(), needed_blocks.contiguous()
    lanes = next_power_of_2(groups)
    launch(
        _take_pages_kernel,
        (1,),
        *(ref_count, num_blocks, needed_blocks, taken, exhausted.view(torch.int8)),
        *(groups, num_particles, ref_count.shape[0], max_new_blocks),
        GROUPS=lanes,
        BLOCK=min(_SCAN_BLOCK, next_power_of_2(ref_count.shape[0])),
        num_warps=8,
    )
    launch(
        _assign_kernel,
        (num_particles, groups),
        *(block_table, *_strides(block_table), num_blocks, needed_blocks, taken),
        *(groups, num_particles, max_new_blocks),
        GROUPS=lanes,
        NEW=next_power_of_2(max_new_blocks),
        num_warps=1,
    )
    return exhausted


def fork(ref_count: Tensor, block_table: Tensor, ancestors: Tensor, shared_blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Let each particle continue its ancestor; see the reference.

    Args:
        ref_count: [P] int32, changed in place.
        block_table: [G, N, B + 1] int32, changed in place.
        ancestors: [G, N] int64 with ancestors[i] == i for every survivor.
        shared_blocks: [G] int64.
    Returns:
        (source, destination): [G, N] int32 pages to copy; both are the trash page where nothing moves.
    """
    groups, num_particles, columns = block_table.shape
    source, destination = (
        torch.empty((groups, num_particles), dtype=torch.int32, device=ref_count.device) for _ in range(2)
    )
    launch(
        _fork_kernel,
        (num_particles, groups),
        *(ref_count, block_table, *_strides(block_table), ancestors.contiguous(), shared_blocks.contiguous()),
        *(source, destination, num_particles),
        BLOCK=min(_COLUMN_BLOCK, next_power_of_2(columns)),
        num_warps=1,
    )
    return source, destination


def count_shared(block_table: Tensor) -> Tensor:
    """Leading columns in which a group's block tables agree; see the reference."""
    groups, num_particles, columns = block_table.shape
    shared = torch.empty(groups, dtype=torch.int64, device=block_table.device)
    launch(
        _shared_kernel,
        (groups,),
        *(block_table, *_strides(block_table), shared, num_particles, columns),
        PARTICLES=next_power_of_2(num_particles),
        BLOCK=min(_COLUMN_BLOCK, next_power_of_2(columns)),
        num_warps=4,
    )
    return shared


def release(ref_count: Tensor, block_table: Tensor, num_blocks: Tensor) -> None:
    """Give up every page of some groups; their tables point at the trash page afterwards; see the reference."""
    groups, num_particles, columns = block_table.shape
    launch(
        _release_kernel,
        (num_particles, groups),
        *(ref_count, block_table, *_strides(block_table), num_blocks.contiguous(), columns),
        BLOCK=min(_COLUMN_BLOCK, next_power_of_2(columns)),
        num_warps=1,
    )


def copy_pages(cache: Tensor, source: Tensor, destination: Tensor) -> None:
    """Copy whole pages in every layer, keys and values; see the reference.

    Args:
        cache: [layers, 2, P, page_size, kv_heads, head_dim], contiguous, changed in place; a page of one layer's keys is
            a multiple of 8 bytes.
        source, destination: int32, equal shapes.
    """
    layers, _, num_pages = cache.shape[:3]
    words = cache.view(layers * 2, num_pages, -1).view(torch.int64)
    page_words = words.shape[-1]
    block = min(_COPY_BLOCK, next_power_of_2(page_words))
    launch(
        _copy_kernel,
        (cdiv(page_words, block), source.numel(), layers * 2),
        *(words, source.contiguous(), destination.contiguous(), num_pages, page_words),
        BLOCK=block,
        num_warps=4,
    )
