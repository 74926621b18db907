"""KV pages: who holds which, counted on the device.

A page is free exactly when its reference count is 0, so there is no separate free list to keep in step. Page 0 is the
trash page: never given out, it takes the writes of rows that have no page of their own. Every block table has one extra
last column that only absorbs masked writes.

A group's particles advance together. With the frontier at position L (its KV not yet written), pages that hold position
L - 1 or later belong to one particle each; pages before that may be shared. Position L - 1 counts because the deferred
bonus writes its draft KV in the next round.
"""

from __future__ import annotations

import torch
from torch import Tensor

TRASH_PAGE = 0


def reserve(
    ref_count: Tensor, block_table: Tensor, num_blocks: Tensor, needed_blocks: Tensor, max_new_blocks: int
) -> Tensor:
    """Give every particle its own new pages up to the needed number.

    Args:
        ref_count: [P] int32, changed in place.
        block_table: [G, N, B + 1] int32, changed in place.
        num_blocks: [G] int64, pages each particle of the group has.
        needed_blocks: [G] int64, pages each must have; at most max_new_blocks more than it has.
    Returns:
        [] bool: the pool was too small (some particle got the trash page). Admission rules this out.
    """
    offsets = torch.arange(max_new_blocks, device=ref_count.device)
    column = num_blocks[:, None] + offsets
    wanted = (column < needed_blocks[:, None])[:, None, :].expand(-1, block_table.shape[1], -1)
    free_rank = (ref_count == 0).long().cumsum(dim=0)
    order = wanted.reshape(-1).long().cumsum(dim=0)
    page = torch.searchsorted(free_rank, order).reshape(wanted.shape)
    available = wanted & (page < ref_count.shape[0])
    page = torch.where(available, page, TRASH_PAGE)
    ref_count.index_add_(0, page.reshape(-1), available.reshape(-1).to(ref_count.dtype))
    trash_column = block_table.shape[-1] - 1
    column = torch.where(wanted, column[:, None, :], trash_column)
    block_table.scatter_(2, column, page.to(block_table.dtype))
    return (wanted & ~available).any()


def fork(ref_count: Tensor, block_table: Tensor, ancestors: Tensor, shared_blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Let each particle continue its ancestor: share full pages, plan the copy of the last one.

    Args:
        ref_count: [P] int32, changed in place.
        block_table: [G, N, B + 1] int32, changed in place.
        ancestors: [G, N] int64 with ancestors[i] == i for every survivor.
        shared_blocks: [G] int64, leading pages that nobody will write again; page number shared_blocks of each table is
            the one to copy.
    Returns:
        (source, destination): [G, N] int32 pages to copy; both are the trash page where nothing moves.
    """
    num_columns = block_table.shape[-1]
    index = torch.arange(ancestors.shape[1], device=ancestors.device)
    moved = ancestors != index
    theirs = block_table.gather(1, ancestors[..., None].expand(-1, -1, num_columns))
    shared = moved[..., None] & (torch.arange(num_columns, device=ancestors.device) < shared_blocks[:, None, None])
    delta = shared.reshape(-1).to(ref_count.dtype)
    ref_count.index_add_(0, theirs.reshape(-1), delta)
    ref_count.index_add_(0, block_table.reshape(-1), -delta)
    last = shared_blocks[:, None, None].expand(-1, ancestors.shape[1], 1)
    source, destination = theirs.gather(2, last)[..., 0], block_table.gather(2, last)[..., 0]
    block_table.copy_(torch.where(shared, theirs, block_table))
    _pin_trash(ref_count)
    return torch.where(moved, source, TRASH_PAGE), torch.where(moved, destination, TRASH_PAGE)


def count_shared(block_table: Tensor) -> Tensor:
    """Leading columns in which a group's block tables agree.

    Args:
        block_table: [G, N, B + 1] int32.
    Returns:
        [G] int64; unused columns may agree too, so take only those before a position that all particles have reached.
    """
    agree = (block_table == block_table[:, :1]).all(dim=1)
    return agree.long().cumprod(dim=1).sum(dim=1)


def release(ref_count: Tensor, block_table: Tensor, num_blocks: Tensor) -> None:
    """Give up every page of some groups; their block tables point at the trash page afterwards.

    Args:
        ref_count: [P] int32, changed in place.
        block_table: [G, N, B + 1] int32, changed in place.
        num_blocks: [G] int64.
    """
    held = torch.arange(block_table.shape[-1], device=ref_count.device) < num_blocks[:, None, None]
    held = held.expand_as(block_table)
    ref_count.index_add_(0, block_table.reshape(-1), -held.reshape(-1).to(ref_count.dtype))
    block_table.fill_(TRASH_PAGE)
    _pin_trash(ref_count)


def _pin_trash(ref_count: Tensor) -> None:
    """Tables of particles without pages point at the trash page, so its own count means nothing but 'taken'."""
    # fill_, because assigning a number to an element copies from the host, which a CUDA graph cannot capture.
    ref_count[TRASH_PAGE : TRASH_PAGE + 1].fill_(1)


def copy_pages(cache: Tensor, source: Tensor, destination: Tensor) -> None:
    """Copy whole pages in every layer, keys and values.

    Args:
        cache: [layers, 2, P, page_size, kv_heads, head_dim], changed in place.
        source, destination: int32, equal shapes; no destination but the trash page is a source or appears twice.
    """
    moved = cache.view(torch.uint8)  # not every element type can be indexed
    moved.index_copy_(2, destination.reshape(-1).long(), moved.index_select(2, source.reshape(-1).long()))
