"""Rotary embedding, KV write and attention through block tables, for decoding, scoring and prefill.

`attend` does all three in one launch for decode-like passes: each program rotates its queries, walks its part of the
pages that earlier passes wrote, and the program of the last part takes the new keys and values from the qkv rows
themselves and writes them to their pages. The first tile of old keys and values is read while the product that makes qkv
still runs. Pages that all sequences of a group share (a prompt's, for its particles) are read once for all of them, by
programs of their own that come first in the grid; each sequence's own program waits for their parts at its end: 8 particles
of Llama-1B with 4096 tokens in common read 8 MB a layer in place of 67. `rope_and_write` and `paged_attention` mirror the
reference and serve long prefill chunks.

A program serves one sequence and one KV head with all query heads that share it: Llama-8B scoring K + 1 = 9 tokens has
9 * 4 = 36 query rows, padded to 64. A long context is split over programs, a short one is not: how many parts there are
is decided on the device, so that a captured pass suits every length; the last program to finish a (sequence, KV head)
combines the parts. Sequences are the fastest in the grid: those that share too few pages to read them once still read them at
about the same time, so that all but the first find them in the L2 cache.
Positions at or beyond a sequence's length are masked on load: garbage there, NaN included, is never used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from smc_plugin.kernels.attention_tiles import (
    attend_tile,
    fold_parts,
    joined,
    old_tile,
    pages_of,
    part_tokens,
    rotated_queries,
    shared_tokens,
)
from smc_plugin.kernels.launch import (
    cdiv,
    counters,
    is_last_arrival,
    launch,
    let_next_start,
    next_power_of_2,
    sm_count,
    wait_for_inputs,
)
from smc_plugin.kernels.rope import AttentionContext, check_shapes, make_context, rope_and_write, rounded

__all__ = ["AttentionContext", "attend", "make_context", "paged_attention", "rope_and_write"]

_FUSED_ROWS = 64  # query rows a program holds; a (sequence, KV head) with more takes the two-launch path
_LEAST_CHUNK = 512  # tokens of the context that one program takes before others help
_LEAST_SHARED = 512  # tokens that a group must share to be worth programs of their own
_FEW_QUERIES = 2  # new tokens that are folded in one by one, without a tile
_TILE_BYTES = 16384  # of a tile's keys; twice as many where the queries are few


@triton.jit
def _shared_part(
    program, query, row_stride, cache, half_cache, block_table, table_stride, start, offset, cos, sin, q_norm,
    shared, acc_parts, stat_parts, done, scale_log2, eps, num_heads, kv_heads, num_queries, num_groups, group_size,
    num_blocks, num_splits, own_splits, min_chunk, least_shared,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, ROWS: tl.constexpr, OWN_ROWS: tl.constexpr,
    TOKENS: tl.constexpr, SEQUENCES: tl.constexpr, QUERIES: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One part of the pages that a group's sequences share, for the queries of SEQUENCES of them."""
    kv_head = program % kv_heads
    block = program // kv_heads % num_blocks
    group = program // (kv_heads * num_blocks) % num_groups
    split = program // (kv_heads * num_blocks * num_groups)
    leader = group * group_size
    first_position = tl.load(start + leader, cache_modifier=".cg").to(tl.int32) + offset
    tokens = shared_tokens(shared, group, first_position, least_shared, PAGE_SIZE)
    chunk = part_tokens(tokens, num_splits, min_chunk, TOKENS)
    stop = tl.minimum(tokens, (split + 1) * chunk)
    block_row = block_table + leader * table_stride
    token = split * chunk + tl.arange(0, TOKENS)
    page = pages_of(block_row, token, stop, PAGE_SIZE)
    keys, values = old_tile(cache, half_cache, page, token, stop, kv_heads, kv_head, PAGE_SIZE, HEAD_DIM)
    page = pages_of(block_row, token + TOKENS, stop, PAGE_SIZE)
    wait_for_inputs(PDL)
    let_next_start(PDL)
    if split * chunk < tokens:
        EACH: tl.constexpr = QUERIES * GROUP
        row = tl.arange(0, ROWS)
        place, own_row = block * SEQUENCES + row // EACH, row % EACH
        is_row = (row < SEQUENCES * EACH) & (place < group_size)
        line = ((leader + place) * num_queries + own_row // GROUP).to(tl.int64)
        first, second = rotated_queries(
            query, row_stride, line, kv_head * GROUP + own_row % GROUP, is_row, cos, sin, q_norm, eps,
            NORM, HEAD_DIM // 2,
        )  # fmt: skip
        q = joined(first, second, ROWS, HEAD_DIM)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
        for at in range(split * chunk, stop, TOKENS):
            token = at + TOKENS + tl.arange(0, TOKENS)
            next_keys, next_values = old_tile(
                cache, half_cache, page, token, stop, kv_heads, kv_head, PAGE_SIZE, HEAD_DIM
            )
            page = pages_of(block_row, token + TOKENS, stop, PAGE_SIZE)
            visible = (token - TOKENS < stop)[None, :]
            top, total, acc = attend_tile(q, keys.to(q.dtype), values.to(q.dtype), visible, top, total, acc, scale_log2)
            keys, values = next_keys, next_values
        # Beside the parts that the sequences' own programs store.
        part = ((leader + place) * kv_heads + kv_head).to(tl.int64) * (own_splits + num_splits) + own_splits + split
        own = part * OWN_ROWS + own_row
        tl.store(acc_parts + own[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :], acc, mask=is_row[:, None])
        stat = stat_parts + part * (2 * OWN_ROWS) + own_row
        tl.store(stat, top, mask=is_row)
        tl.store(stat + OWN_ROWS, total, mask=is_row)
        tl.debug_barrier()
        tl.atomic_add(done + group * kv_heads + kv_head, 1, sem="release")


@triton.jit
def _wait_for_shared_parts(done, left, expected, group_size):
    """Wait until all programs of `_shared_part` have stored theirs; the last of the group's waiters resets the counters.

    Those programs come first in the grid, so they run or have ended when this one runs.
    """
    while tl.atomic_add(done, 0, sem="acquire") < expected:
        pass
    tl.debug_barrier()
    if tl.atomic_add(left, 1, sem="relaxed") == group_size - 1:
        tl.store(done, 0)
        tl.store(left, 0)


@triton.jit(
    do_not_specialize=[
        *("offset", "num_splits", "min_chunk", "num_groups", "group_size", "shared_blocks", "shared_splits"),
        "shared_chunk",
    ]
)
def _attention_kernel(  # noqa: PLR0912, PLR0915 - one idea: a program's queries against its part of the context
    query,
    row_stride,
    cache,
    half_cache,
    block_table,
    table_stride,
    start,
    offset,
    cos,
    sin,
    slots,
    q_norm,
    k_norm,
    shared,
    out,
    acc_parts,
    stat_parts,
    arrivals,
    scale_log2,
    eps,
    num_heads,
    kv_heads,
    num_queries,
    batch,
    num_splits,
    min_chunk,
    num_groups,
    group_size,
    shared_blocks,
    shared_splits,
    shared_chunk,
    least_shared,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    NEW: tl.constexpr,
    QUERIES: tl.constexpr,
    FUSED: tl.constexpr,
    NORM: tl.constexpr,
    SPLIT: tl.constexpr,
    SHARED_ROWS: tl.constexpr,
    SHARED_TOKENS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    SHARED: tl.constexpr = SHARED_ROWS > 0
    program = tl.program_id(0)
    if SHARED:
        shared_programs = num_groups * shared_blocks * kv_heads * shared_splits
        done = arrivals + batch * kv_heads
        if program < shared_programs:
            _shared_part(
                program, query, row_stride, cache, half_cache, block_table, table_stride, start, offset, cos, sin,
                q_norm, shared, acc_parts, stat_parts, done, scale_log2, eps, num_heads, kv_heads, num_queries,
                num_groups, group_size, shared_blocks, shared_splits, num_splits, shared_chunk, least_shared,
                GROUP, HEAD_DIM, PAGE_SIZE, SHARED_ROWS, ROWS, SHARED_TOKENS, SEQUENCES, QUERIES, NORM, PDL,
            )  # fmt: skip
            return
        program -= shared_programs
    num_tiles = tl.cdiv(num_queries * GROUP, ROWS)
    sequence = program % batch
    kv_head = program // batch % kv_heads
    row_block = program // (batch * kv_heads) % num_tiles
    split = program // (batch * kv_heads * num_tiles)
    row = row_block * ROWS + tl.arange(0, ROWS)
    query_index = row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_row = query_index < num_queries
    line = (sequence * num_queries + query_index).to(tl.int64)
    column = tl.arange(0, HEAD_DIM)
    block_row = block_table + sequence * table_stride
    # FUSED reads first what was written two or more launches ago: start, the block table and what earlier passes left
    # in the pages. cos, sin, slots and qkv may come from the launch before.
    if not FUSED:
        wait_for_inputs(PDL)
    first_position = tl.load(start + sequence, cache_modifier=".cg").to(tl.int32) + offset
    if FUSED:
        length = first_position
    else:
        last_query = tl.minimum((row_block * ROWS + ROWS - 1) // GROUP, num_queries - 1)
        length = first_position + last_query + 1
    begin = 0
    if SHARED:
        begin = shared_tokens(shared, sequence // group_size, first_position, least_shared, PAGE_SIZE)
    chunk = part_tokens(length - begin, num_splits, min_chunk, TOKENS)
    num_parts = tl.maximum(tl.cdiv(length - begin, chunk), 1)
    first_token = begin + split * chunk
    stop = tl.minimum(length, first_token + chunk)
    token = first_token + tl.arange(0, TOKENS)
    page = pages_of(block_row, token, stop, PAGE_SIZE)
    keys, values = old_tile(cache, half_cache, page, token, stop, kv_heads, kv_head, PAGE_SIZE, HEAD_DIM)
    page = pages_of(block_row, token + TOKENS, stop, PAGE_SIZE)
    if FUSED:
        wait_for_inputs(PDL)
    let_next_start(PDL)
    if split >= num_parts:
        return

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    if FUSED:
        first, second = rotated_queries(query, row_stride, line, head, is_row, cos, sin, q_norm, eps, NORM, HALF)
        q = joined(first, second, ROWS, HEAD_DIM)
        # The last part's program also takes the new keys and values and writes them to their pages. What attention sees is
        # what later passes will read: rounded to the cache's dtype.
        is_last = split == num_parts - 1
        if NEW == 0:
            for new in tl.static_range(QUERIES):
                new_line = (sequence * num_queries + new).to(tl.int64)
                new_lines = new_line + tl.zeros([1], tl.int64)
                is_new = tl.full([1], 1, tl.int1) & is_last
                new_first, new_second = rotated_queries(
                    query, row_stride, new_lines, num_heads + kv_head, is_new, cos, sin, k_norm, eps, NORM, HALF
                )
                value_at = query + new_lines * row_stride + (num_heads + kv_heads + kv_head) * HEAD_DIM
                new_value = tl.load(value_at[:, None] + column[None, :], mask=is_new[:, None], other=0.0)
                slot = tl.load(slots + new_lines, mask=is_new, other=0)
                new_place = cache + ((slot * kv_heads + kv_head) * HEAD_DIM)[:, None]
                pair = tl.arange(0, HALF)[None, :]
                new_first = rounded(new_first, cache.dtype.element_ty)
                new_second = rounded(new_second, cache.dtype.element_ty)
                new_value = rounded(new_value, cache.dtype.element_ty)
                tl.store(new_place + pair, new_first, mask=is_new[:, None])
                tl.store(new_place + HALF + pair, new_second, mask=is_new[:, None])
                tl.store(new_place + half_cache + column[None, :], new_value, mask=is_new[:, None])
                products = first.to(tl.float32) * new_first.to(tl.float32)
                products += second.to(tl.float32) * new_second.to(tl.float32)
                score = tl.sum(products, axis=1) * scale_log2
                score = tl.where((query_index >= new) & is_last, score, float("-inf"))
                new_top = tl.maximum(top, score)
                shift = tl.where(new_top == float("-inf"), 0.0, new_top)
                weight, fade = tl.exp2(score - shift), tl.exp2(top - shift)
                total = total * fade + weight
                acc = acc * fade[:, None] + weight[:, None] * new_value.to(tl.float32)
                top = new_top
        elif is_last:
            new = tl.arange(0, NEW)
            is_new = new < num_queries
            new_line = (sequence * num_queries + new).to(tl.int64)
            new_first, new_second = rotated_queries(
                query, row_stride, new_line, num_heads + kv_head, is_new, cos, sin, k_norm, eps, NORM, HALF
            )
            value_at = query + new_line * row_stride + (num_heads + kv_heads + kv_head) * HEAD_DIM
            new_values = tl.load(value_at[:, None] + column[None, :], mask=is_new[:, None], other=0.0)
            slot = tl.load(slots + new_line, mask=is_new, other=0)
            new_keys = rounded(joined(new_first, new_second, NEW, HEAD_DIM), cache.dtype.element_ty)
            new_values = rounded(new_values, cache.dtype.element_ty)
            new_place = cache + ((slot * kv_heads + kv_head) * HEAD_DIM)[:, None] + column[None, :]
            tl.store(new_place, new_keys, mask=is_new[:, None])
            tl.store(new_place + half_cache, new_values, mask=is_new[:, None])
            new_visible = is_new[None, :] & (new[None, :] <= query_index[:, None])
            top, total, acc = attend_tile(
                q, new_keys.to(q.dtype), new_values.to(q.dtype), new_visible, top, total, acc, scale_log2
            )
    else:
        query_at = query + line * row_stride + head * HEAD_DIM
        q = tl.load(query_at[:, None] + column[None, :], mask=is_row[:, None], other=0.0)

    # A page's number is known one turn before its keys are asked for, and these one turn before they are used.
    for at in range(first_token, stop, TOKENS):
        token = at + TOKENS + tl.arange(0, TOKENS)
        next_keys, next_values = old_tile(cache, half_cache, page, token, stop, kv_heads, kv_head, PAGE_SIZE, HEAD_DIM)
        page = pages_of(block_row, token + TOKENS, stop, PAGE_SIZE)
        visible = (token - TOKENS < stop)[None, :]
        if not FUSED:
            visible = visible & ((token - TOKENS)[None, :] <= (first_position + query_index)[:, None])
        top, total, acc = attend_tile(q, keys.to(q.dtype), values.to(q.dtype), visible, top, total, acc, scale_log2)
        keys, values = next_keys, next_values

    writes = True
    tile_index = ((sequence * num_tiles + row_block) * kv_heads + kv_head).to(tl.int64)
    accs = acc_parts + tile_index * (num_splits + shared_splits) * ROWS * HEAD_DIM
    stats = stat_parts + tile_index * (num_splits + shared_splits) * 2 * ROWS
    if SPLIT:  # noqa: SIM102 - the outer condition is decided at compile time
        if num_parts > 1:
            local = tl.arange(0, ROWS)
            tl.store(accs + split * ROWS * HEAD_DIM + local[:, None] * HEAD_DIM + column[None, :], acc)
            tl.store(stats + (split * 2) * ROWS + local, top)
            tl.store(stats + (split * 2 + 1) * ROWS + local, total)
            writes = is_last_arrival(arrivals + tile_index, num_parts)
            if writes:
                top = tl.full([ROWS], float("-inf"), tl.float32)
                total = tl.zeros([ROWS], tl.float32)
                acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
                top, total, acc = fold_parts(accs, stats, num_parts, top, total, acc, ROWS, HEAD_DIM, AT_ONCE)
    if writes:
        if SHARED:  # noqa: SIM102 - the outer condition is decided at compile time
            if begin > 0:
                parts = tl.cdiv(begin, part_tokens(begin, shared_splits, shared_chunk, SHARED_TOKENS))
                of_group = sequence // group_size * kv_heads + kv_head
                left = done + num_groups * kv_heads
                _wait_for_shared_parts(done + of_group, left + of_group, parts * shared_blocks, group_size)
                accs += num_splits * ROWS * HEAD_DIM
                stats += num_splits * 2 * ROWS
                top, total, acc = fold_parts(accs, stats, parts, top, total, acc, ROWS, HEAD_DIM, AT_ONCE)
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        target = out + line[:, None] * (num_heads * HEAD_DIM) + (head * HEAD_DIM)[:, None] + column[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=is_row[:, None])


def _split(programs: int, max_context: int, tokens: int, device: torch.device) -> tuple[int, int]:
    """At most how many parts of the context, and at least how many tokens a part.

    Two programs a multiprocessor are enough. Where there are many anyway, parts only cost their combination.
    """
    sms = sm_count(device)
    min_chunk = 2 * tokens if 4 * programs <= sms else cdiv(_LEAST_CHUNK, tokens) * tokens
    return max(1, min(2 * sms // programs, cdiv(max_context, min_chunk))), min_chunk


@dataclass(frozen=True)
class _Shared:
    """How the pages that a group's sequences share are cut into programs; see _shared_part.

    Args:
        rows, tokens, sequences: of a program's tile, 0 rows where nothing is shared.
        blocks, splits: programs a group and KV head: over sequences, and over positions, at most.
        chunk: at least so many positions a part.
    """

    groups: int = 1
    rows: int = 0
    tokens: int = 16
    sequences: int = 1
    blocks: int = 0
    splits: int = 0
    chunk: int = 1


def _cut_shared(context: AttentionContext, rows_each: int, kv_heads: int, tokens: int) -> _Shared:
    batch, device = context.start.shape[0], context.start.device
    if context.shared is None or context.shared.shape[0] == batch:
        return _Shared()
    groups = context.shared.shape[0]
    size = batch // groups
    rows = max(16, min(128, next_power_of_2(size * rows_each)))
    sequences = min(size, rows // rows_each)
    blocks = cdiv(size, sequences)
    splits = max(1, min(sm_count(device) // (groups * blocks * kv_heads), cdiv(context.max_context, _LEAST_CHUNK)))
    return _Shared(groups, rows, tokens, sequences, blocks, splits, cdiv(_LEAST_CHUNK, tokens) * tokens)


def _launch_attention(
    query: Tensor,
    layer_cache: Tensor,
    context: AttentionContext,
    num_heads: int,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    fused: bool,
) -> Tensor:
    """The attention kernel over qkv rows (fused) or over rotated queries."""
    kv_heads, head_dim = layer_cache.shape[-2:]
    check_shapes(head_dim, context.page_size)
    group, queries = num_heads // kv_heads, context.num_queries
    batch, device = context.start.shape[0], query.device
    rows = max(16, min(_FUSED_ROWS, next_power_of_2(queries * group)))
    # float32 products take no tensor cores: larger tiles would not fit the registers.
    tile = 32 if query.element_size() == 4 else _TILE_BYTES // (2 * max(head_dim, 64))
    tokens = 2 * tile if rows == 16 else tile
    row_blocks = cdiv(queries * group, rows)
    tiles = batch * kv_heads * row_blocks
    splits, min_chunk = _split(tiles, context.max_context, tokens, device)
    shared = _cut_shared(context, queries * group, kv_heads, tile) if fused else _Shared()
    out = torch.empty((query.shape[0], num_heads * head_dim), dtype=query.dtype, device=device)
    parts = splits + shared.splits if splits + shared.splits > 1 else 0
    acc_parts = torch.empty((tiles * parts, rows, head_dim), dtype=torch.float32, device=device) if parts else out
    stat_parts = torch.empty((tiles * parts, 2, rows), dtype=torch.float32, device=device) if parts else out
    arrivals = counters(device, tiles + 2 * shared.groups * kv_heads) if parts else out
    q_norm, k_norm = norms if norms else (query, query)
    launch(
        _attention_kernel,
        (shared.groups * shared.blocks * kv_heads * shared.splits + tiles * splits,),
        *(query, query.stride(0), layer_cache, layer_cache.stride(0), context.block_table),
        *(context.block_table.stride(0), context.start, context.offset, context.cos, context.sin, context.slots),
        *(q_norm, k_norm, context.start if context.shared is None else context.shared),
        *(out, acc_parts, stat_parts, arrivals, math.log2(math.e) / math.sqrt(head_dim), eps),
        *(num_heads, kv_heads, queries, batch, splits, min_chunk),
        *(shared.groups, batch // shared.groups, shared.blocks, shared.splits, shared.chunk, _LEAST_SHARED),
        GROUP=group,
        HEAD_DIM=head_dim,
        PAGE_SIZE=context.page_size,
        ROWS=rows,
        TOKENS=tokens,
        NEW=max(16, next_power_of_2(queries)) if queries > _FEW_QUERIES else 0,
        QUERIES=queries if fused else 1,
        FUSED=fused,
        NORM=norms is not None,
        SPLIT=splits > 1,
        SHARED_ROWS=shared.rows,
        SHARED_TOKENS=shared.tokens,
        SEQUENCES=shared.sequences,
        AT_ONCE=max(1, 4096 // (rows * head_dim)),
        num_warps=8,
    )
    return out


def paged_attention(query: Tensor, layer_cache: Tensor, context: AttentionContext) -> Tensor:
    """Causal attention over each sequence's pages; see the reference.

    Args:
        query: [B * Q, num_heads, head_dim], rotated.
        layer_cache: [2, P, page_size, kv_heads, head_dim], contiguous; head_dim and page_size are powers of two.
    Returns:
        [B * Q, num_heads * head_dim] in the query's dtype; scale 1/sqrt(head_dim).
    """
    return _launch_attention(query.contiguous(), layer_cache, context, query.shape[1], None, 0.0, fused=False)


def attend(
    qkv: Tensor,
    layer_cache: Tensor,
    context: AttentionContext,
    num_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`paged_attention(rope_and_write(...))`, in one launch where a sequence has few queries.

    Args:
        qkv: [R, (num_heads + 2 kv_heads) * head_dim], columns contiguous.
        layer_cache: [2, P, page_size, kv_heads, head_dim], contiguous, changed in place.
        q_norm, k_norm: [head_dim] both, or None both.
    Returns:
        [R, num_heads * head_dim] in qkv's dtype.
    """
    kv_heads = layer_cache.shape[-2]
    if context.num_queries * (num_heads // kv_heads) > _FUSED_ROWS:
        query = rope_and_write(qkv, layer_cache, context, num_heads, q_norm, k_norm, eps)
        return paged_attention(query, layer_cache, context)
    norms = None if q_norm is None or k_norm is None else (q_norm, k_norm)
    return _launch_attention(qkv, layer_cache, context, num_heads, norms, eps, fused=True)
