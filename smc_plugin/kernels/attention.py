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
combines the parts. Sequences are the fastest grid axis: particles that
share prompt pages read the same page at about the same time, so that all but the first find it in the L2 cache.
Positions at or beyond a sequence's length are masked on load: garbage there, NaN included, is never used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from smc_plugin.errors import ConfigError
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

_FUSED_ROWS = 64  # query rows a program holds; a (sequence, KV head) with more takes the two-launch path
_LEAST_CHUNK = 512  # tokens of the context that one program takes before others help
_LEAST_SHARED = 512  # tokens that a group must share to be worth programs of their own
_FEW_QUERIES = 2  # new tokens that are folded in one by one, without a tile
_TILE_BYTES = 16384  # of a tile's keys; twice as many where the queries are few
_HEADS_PER_PROGRAM = 8


@dataclass(frozen=True)
class AttentionContext:
    """What the calls of one forward pass share.

    Args:
        cos, sin: [B * Q, head_dim / 2] float32.
        slots: [B * Q] int64, page * page_size + offset to write to.
        start, offset: [B] int64 plus a number, position of each sequence's first query.
        block_table: [B, C] int32, columns contiguous.
        num_queries, page_size: Q and the page size.
        max_context: no sequence is longer than this after the pass; only decides how the work is split.
        shared: [G] int64, leading pages that each group of B / G sequences has in common, or None.
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor
    start: Tensor
    offset: int
    block_table: Tensor
    num_queries: int
    page_size: int
    max_context: int
    shared: Tensor | None = None


@triton.jit(do_not_specialize=["offset"])
def _context_kernel(
    start,
    block_table,
    table_stride,
    inv_freq,
    cos,
    sin,
    slots,
    offset,
    num_queries,
    half,
    PAGE_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    let_next_start(PDL)
    row = tl.program_id(0)
    sequence = row // num_queries
    position = tl.load(start + sequence) + offset + row % num_queries
    page = tl.load(block_table + sequence * table_stride + position // PAGE_SIZE).to(tl.int64)
    tl.store(slots + row, page * PAGE_SIZE + position % PAGE_SIZE)
    pair = tl.arange(0, HALF)
    valid = pair < half
    angle = position.to(tl.float32) * tl.load(inv_freq + pair, mask=valid, other=0.0)
    tl.store(cos + row * half + pair, tl.cos(angle), mask=valid)
    tl.store(sin + row * half + pair, tl.sin(angle), mask=valid)


def make_context(
    start: Tensor,
    num_queries: int,
    block_table: Tensor,
    page_size: int,
    inv_freq: Tensor,
    max_context: int,
    offset: int = 0,
    shared: Tensor | None = None,
) -> AttentionContext:
    """Prepare a forward pass, in one launch; see the reference.

    Args:
        start, offset: [B] int64 plus a number, position of each sequence's first query.
        block_table: [B, C] int32.
        inv_freq: [head_dim / 2] float32, radians per position.
        max_context: no sequence is longer than this after the pass.
        shared: [G] int64, leading pages that each group of B / G sequences has in common, or None.
    """
    rows, half = start.shape[0] * num_queries, inv_freq.shape[0]
    cos, sin = (torch.empty((rows, half), dtype=torch.float32, device=start.device) for _ in range(2))
    slots = torch.empty(rows, dtype=torch.int64, device=start.device)
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    start = start.contiguous()
    launch(
        _context_kernel,
        (rows,),
        *(start, block_table, block_table.stride(0), inv_freq, cos, sin, slots, offset, num_queries, half),
        PAGE_SIZE=page_size,
        HALF=next_power_of_2(half),
        num_warps=1,
    )
    return AttentionContext(cos, sin, slots, start, offset, block_table, num_queries, page_size, max_context, shared)


@triton.jit
def _normed_and_rotated(base, valid, cos, sin, weight, eps, NORM: tl.constexpr, HALF: tl.constexpr):
    """Both halves [rows, HALF] of heads at base [rows], after optional RMS norm and rotation, in the input's dtype.

    valid [rows]; cos and sin [rows, HALF]; weight points at [2 * HALF] or is not read.
    """
    pair = tl.arange(0, HALF)
    at = base[:, None] + pair[None, :]
    first = tl.load(at, mask=valid[:, None], other=0.0)
    second = tl.load(at + HALF, mask=valid[:, None], other=0.0)
    wide_1, wide_2 = first.to(tl.float32), second.to(tl.float32)
    if NORM:
        square = tl.sum(wide_1 * wide_1 + wide_2 * wide_2, axis=1) / (2 * HALF)
        scale = tl.rsqrt(square + eps)[:, None]
        weight_1 = tl.load(weight + pair)[None, :].to(tl.float32)
        weight_2 = tl.load(weight + HALF + pair)[None, :].to(tl.float32)
        # Rounded where the reference rounds: after the norm, and after the weight.
        wide_1 = (weight_1 * (wide_1 * scale).to(first.dtype).to(tl.float32)).to(first.dtype).to(tl.float32)
        wide_2 = (weight_2 * (wide_2 * scale).to(first.dtype).to(tl.float32)).to(first.dtype).to(tl.float32)
    turned_1 = wide_1 * cos - wide_2 * sin
    turned_2 = wide_2 * cos + wide_1 * sin
    return turned_1.to(first.dtype), turned_2.to(first.dtype)


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """x as a page of that type holds it; FP8 stops at its largest value."""
    if dtype == tl.float8e4nv:
        return tl.minimum(tl.maximum(x.to(tl.float32), -448.0, tl.PropagateNan.ALL), 448.0, tl.PropagateNan.ALL).to(
            dtype
        )
    else:
        return x.to(dtype)


@triton.jit
def _rope_kernel(
    qkv,
    row_stride,
    cache,
    half_cache,
    cos,
    sin,
    slots,
    q_norm,
    k_norm,
    query_out,
    eps,
    num_heads,
    kv_heads,
    NORM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    pair = tl.arange(0, HALF)
    base = qkv + row * row_stride + head * (2 * HALF)
    is_query, is_key = head < num_heads, (head >= num_heads) & (head < num_heads + kv_heads)
    is_value = (head >= num_heads + kv_heads) & (head < num_heads + 2 * kv_heads)
    turn_cos = tl.load(cos + row * HALF + pair)[None, :]
    turn_sin = tl.load(sin + row * HALF + pair)[None, :]
    slot = tl.load(slots + row)
    if tl.program_id(1) * HEADS < num_heads:
        first, second = _normed_and_rotated(base, is_query, turn_cos, turn_sin, q_norm, eps, NORM, HALF)
        out = query_out + (row * num_heads + head)[:, None] * (2 * HALF) + pair[None, :]
        tl.store(out, first, mask=is_query[:, None])
        tl.store(out + HALF, second, mask=is_query[:, None])
    if tl.program_id(1) * HEADS + HEADS > num_heads:
        first, second = _normed_and_rotated(base, is_key, turn_cos, turn_sin, k_norm, eps, NORM, HALF)
        place = cache + (slot * kv_heads + head - num_heads)[:, None] * (2 * HALF) + pair[None, :]
        tl.store(place, _rounded(first, cache.dtype.element_ty), mask=is_key[:, None])
        tl.store(place + HALF, _rounded(second, cache.dtype.element_ty), mask=is_key[:, None])
        at = base[:, None] + pair[None, :]
        first = tl.load(at, mask=is_value[:, None], other=0.0)
        second = tl.load(at + HALF, mask=is_value[:, None], other=0.0)
        place += half_cache - kv_heads * (2 * HALF)
        tl.store(place, _rounded(first, cache.dtype.element_ty), mask=is_value[:, None])
        tl.store(place + HALF, _rounded(second, cache.dtype.element_ty), mask=is_value[:, None])


def rope_and_write(
    qkv: Tensor,
    layer_cache: Tensor,
    context: AttentionContext,
    num_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Rotate queries and keys, write keys and values to their pages; see the reference.

    Args:
        qkv: [R, (num_heads + 2 kv_heads) * head_dim].
        layer_cache: [2, P, page_size, kv_heads, head_dim], contiguous, changed in place.
        q_norm, k_norm: [head_dim] both, or None both.
    Returns:
        [R, num_heads, head_dim] rotated queries.
    """
    kv_heads, head_dim = layer_cache.shape[-2:]
    _check_shapes(head_dim, context.page_size)
    query = torch.empty((qkv.shape[0], num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    q_weight, k_weight = (qkv, qkv) if q_norm is None or k_norm is None else (q_norm, k_norm)
    launch(
        _rope_kernel,
        (qkv.shape[0], cdiv(num_heads + 2 * kv_heads, _HEADS_PER_PROGRAM)),
        *(qkv, qkv.stride(0), layer_cache, layer_cache.stride(0), context.cos, context.sin, context.slots),
        *(q_weight, k_weight, query, eps, num_heads, kv_heads),
        NORM=q_norm is not None,
        HALF=head_dim // 2,
        HEADS=_HEADS_PER_PROGRAM,
        num_warps=4,
    )
    return query


@triton.jit
def _attend_tile(q, keys, values, visible, top, total, acc, scale_log2):
    """Fold a tile of keys and values into the running softmax."""
    scores = tl.dot(q, tl.trans(keys), input_precision="ieee") * scale_log2
    scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - shift[:, None])
    fade = tl.exp2(top - shift)
    acc = acc * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return new_top, total * fade + tl.sum(weights, axis=1), acc


@triton.jit
def _fold_parts(
    accs, stats, num_parts, top, total, acc,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Fold what other programs stored, AT_ONCE parts a turn, into the running softmax."""
    row, column = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    for first in range(0, num_parts, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        is_part = part < num_parts
        # .cg: other programs wrote these while this one ran; its first-level cache may not know.
        stat = stats + part[:, None] * (2 * ROWS) + row[None, :]
        tops = tl.load(stat, mask=is_part[:, None], other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(stat + ROWS, mask=is_part[:, None], other=0.0, cache_modifier=".cg")
        place = accs + (part[:, None, None] * ROWS + row[None, :, None]) * HEAD_DIM + column[None, None, :]
        values = tl.load(place, mask=is_part[:, None, None], other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        gains, fade = tl.exp2(tops - shift[None, :]), tl.exp2(top - shift)
        total = total * fade + tl.sum(totals * gains, axis=0)
        acc = acc * fade[:, None] + tl.sum(values * gains[:, :, None], axis=0)
        top = new_top
    return top, total, acc


@triton.jit
def _pages_of(block_row, token, stop, PAGE_SIZE: tl.constexpr):
    """The page that holds each position `token` below `stop`, 0 from there on."""
    return tl.load(block_row + token // PAGE_SIZE, mask=token < stop, other=0, cache_modifier=".cg")


@triton.jit
def _old_tile(cache, half_cache, page, token, stop, kv_heads, kv_head, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Keys and values [TOKENS, HEAD_DIM] of positions `token` below `stop`, 0 from there on."""
    valid = (token < stop)[:, None]
    place = ((page.to(tl.int64) * PAGE_SIZE + token % PAGE_SIZE) * kv_heads + kv_head) * HEAD_DIM
    tile = cache + place[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    keys = tl.load(tile, mask=valid, other=0.0, cache_modifier=".cg")
    values = tl.load(tile + half_cache, mask=valid, other=0.0, cache_modifier=".cg")
    return keys, values


@triton.jit
def _shared_tokens(shared, group, first_position, least_shared, PAGE_SIZE: tl.constexpr):
    """Positions that a group's programs read once for all its sequences: whole pages, none if too few to be worth it."""
    pages = tl.minimum(tl.load(shared + group, cache_modifier=".cg").to(tl.int32), first_position // PAGE_SIZE)
    return tl.where(pages * PAGE_SIZE >= least_shared, pages * PAGE_SIZE, 0)


@triton.jit
def _part_tokens(tokens, num_splits, min_chunk, TOKENS: tl.constexpr):
    """Positions that each part of a stretch of `tokens` takes: whole tiles."""
    return tl.maximum(tl.cdiv(tl.cdiv(tokens, num_splits), TOKENS) * TOKENS, min_chunk)


@triton.jit
def _rotated_queries(
    query, row_stride, line, head, is_row, cos, sin, q_norm, eps,
    NORM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Both halves [ROWS, HALF] of the queries of heads `head` in lines `line`, rotated."""
    turn = line[:, None] * HALF + tl.arange(0, HALF)[None, :]
    row_cos = tl.load(cos + turn, mask=is_row[:, None], other=0.0)
    row_sin = tl.load(sin + turn, mask=is_row[:, None], other=0.0)
    base = query + line * row_stride + head * (2 * HALF)
    return _normed_and_rotated(base, is_row, row_cos, row_sin, q_norm, eps, NORM, HALF)


@triton.jit
def _joined(first, second, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[ROWS, HEAD_DIM] of two halves."""
    return tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), [ROWS, HEAD_DIM])


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
    tokens = _shared_tokens(shared, group, first_position, least_shared, PAGE_SIZE)
    chunk = _part_tokens(tokens, num_splits, min_chunk, TOKENS)
    stop = tl.minimum(tokens, (split + 1) * chunk)
    block_row = block_table + leader * table_stride
    token = split * chunk + tl.arange(0, TOKENS)
    page = _pages_of(block_row, token, stop, PAGE_SIZE)
    keys, values = _old_tile(cache, half_cache, page, token, stop, kv_heads, kv_head, PAGE_SIZE, HEAD_DIM)
    page = _pages_of(block_row, token + TOKENS, stop, PAGE_SIZE)
    wait_for_inputs(PDL)
    let_next_start(PDL)
    if split * chunk < tokens:
        EACH: tl.constexpr = QUERIES * GROUP
        row = tl.arange(0, ROWS)
        place, own_row = block * SEQUENCES + row // EACH, row % EACH
        is_row = (row < SEQUENCES * EACH) & (place < group_size)
        line = ((leader + place) * num_queries + own_row // GROUP).to(tl.int64)
        first, second = _rotated_queries(
            query, row_stride, line, kv_head * GROUP + own_row % GROUP, is_row, cos, sin, q_norm, eps,
            NORM, HEAD_DIM // 2,
        )  # fmt: skip
        q = _joined(first, second, ROWS, HEAD_DIM)
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
        for at in range(split * chunk, stop, TOKENS):
            token = at + TOKENS + tl.arange(0, TOKENS)
            next_keys, next_values = _old_tile(
                cache, half_cache, page, token, stop, kv_heads, kv_head, PAGE_SIZE, HEAD_DIM
            )
            page = _pages_of(block_row, token + TOKENS, stop, PAGE_SIZE)
            visible = (token - TOKENS < stop)[None, :]
            top, total, acc = _attend_tile(
                q, keys.to(q.dtype), values.to(q.dtype), visible, top, total, acc, scale_log2
            )
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
        *("shared_chunk"),
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
        begin = _shared_tokens(shared, sequence // group_size, first_position, least_shared, PAGE_SIZE)
    chunk = _part_tokens(length - begin, num_splits, min_chunk, TOKENS)
    num_parts = tl.maximum(tl.cdiv(length - begin, chunk), 1)
    first_token = begin + split * chunk
    stop = tl.minimum(length, first_token + chunk)
    token = first_token + tl.arange(0, TOKENS)
    page = _pages_of(block_row, token, stop, PAGE_SIZE)
    keys, values = _old_tile(cache, half_cache, page, token, stop, kv_heads, kv_head, PAGE_SIZE, HEAD_DIM)
    page = _pages_of(block_row, token + TOKENS, stop, PAGE_SIZE)
    if FUSED:
        wait_for_inputs(PDL)
    let_next_start(PDL)
    if split >= num_parts:
        return

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    if FUSED:
        first, second = _rotated_queries(query, row_stride, line, head, is_row, cos, sin, q_norm, eps, NORM, HALF)
        q = _joined(first, second, ROWS, HEAD_DIM)
        # The last part's program also takes the new keys and values and writes them to their pages. What attention sees is
        # what later passes will read: rounded to the cache's dtype.
        is_last = split == num_parts - 1
        if NEW == 0:
            for new in tl.static_range(QUERIES):
                new_line = (sequence * num_queries + new).to(tl.int64)
                new_lines = new_line + tl.zeros([1], tl.int64)
                is_new = tl.full([1], 1, tl.int1) & is_last
                new_first, new_second = _rotated_queries(
                    query, row_stride, new_lines, num_heads + kv_head, is_new, cos, sin, k_norm, eps, NORM, HALF
                )
                value_at = query + new_lines * row_stride + (num_heads + kv_heads + kv_head) * HEAD_DIM
                new_value = tl.load(value_at[:, None] + column[None, :], mask=is_new[:, None], other=0.0)
                slot = tl.load(slots + new_lines, mask=is_new, other=0)
                new_place = cache + ((slot * kv_heads + kv_head) * HEAD_DIM)[:, None]
                pair = tl.arange(0, HALF)[None, :]
                new_first = _rounded(new_first, cache.dtype.element_ty)
                new_second = _rounded(new_second, cache.dtype.element_ty)
                new_value = _rounded(new_value, cache.dtype.element_ty)
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
            new_first, new_second = _rotated_queries(
                query, row_stride, new_line, num_heads + kv_head, is_new, cos, sin, k_norm, eps, NORM, HALF
            )
            value_at = query + new_line * row_stride + (num_heads + kv_heads + kv_head) * HEAD_DIM
            new_values = tl.load(value_at[:, None] + column[None, :], mask=is_new[:, None], other=0.0)
            slot = tl.load(slots + new_line, mask=is_new, other=0)
            new_keys = _rounded(_joined(new_first, new_second, NEW, HEAD_DIM), cache.dtype.element_ty)
            new_values = _rounded(new_values, cache.dtype.element_ty)
            new_place = cache + ((slot * kv_heads + kv_head) * HEAD_DIM)[:, None] + column[None, :]
            tl.store(new_place, new_keys, mask=is_new[:, None])
            tl.store(new_place + half_cache, new_values, mask=is_new[:, None])
            new_visible = is_new[None, :] & (new[None, :] <= query_index[:, None])
            top, total, acc = _attend_tile(
                q, new_keys.to(q.dtype), new_values.to(q.dtype), new_visible, top, total, acc, scale_log2
            )
    else:
        query_at = query + line * row_stride + head * HEAD_DIM
        q = tl.load(query_at[:, None] + column[None, :], mask=is_row[:, None], other=0.0)

    # A page's number is known one turn before its keys are asked for, and these one turn before they are used.
    for at in range(first_token, stop, TOKENS):
        token = at + TOKENS + tl.arange(0, TOKENS)
        next_keys, next_values = _old_tile(cache, half_cache, page, token, stop, kv_heads, kv_head, PAGE_SIZE, HEAD_DIM)
        page = _pages_of(block_row, token + TOKENS, stop, PAGE_SIZE)
        visible = (token - TOKENS < stop)[None, :]
        if not FUSED:
            visible = visible & ((token - TOKENS)[None, :] <= (first_position + query_index)[:, None])
        top, total, acc = _attend_tile(q, keys.to(q.dtype), values.to(q.dtype), visible, top, total, acc, scale_log2)
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
                top, total, acc = _fold_parts(accs, stats, num_parts, top, total, acc, ROWS, HEAD_DIM, AT_ONCE)
    if writes:
        if SHARED:  # noqa: SIM102 - the outer condition is decided at compile time
            if begin > 0:
                parts = tl.cdiv(begin, _part_tokens(begin, shared_splits, shared_chunk, SHARED_TOKENS))
                of_group = sequence // group_size * kv_heads + kv_head
                left = done + num_groups * kv_heads
                _wait_for_shared_parts(done + of_group, left + of_group, parts * shared_blocks, group_size)
                accs += num_splits * ROWS * HEAD_DIM
                stats += num_splits * 2 * ROWS
                top, total, acc = _fold_parts(accs, stats, parts, top, total, acc, ROWS, HEAD_DIM, AT_ONCE)
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        target = out + line[:, None] * (num_heads * HEAD_DIM) + (head * HEAD_DIM)[:, None] + column[None, :]
        tl.store(target, result.to(out.dtype.element_ty), mask=is_row[:, None])


def _check_shapes(head_dim: int, page_size: int) -> None:
    """Refuse what the kernels' power-of-two tiles cannot hold."""
    for name, value, least in (("head_dim", head_dim, 16), ("page_size", page_size, 1)):
        if value < least or value & (value - 1):
            raise ConfigError(
                f"paged attention was given {name} {value}, expected a power of two of at least {least}: pad it, or use "
                "smc_plugin.reference"
            )


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
    _check_shapes(head_dim, context.page_size)
    group, queries = num_heads // kv_heads, context.num_queries
    batch, device = context.start.shape[0], query.device
    rows = max(16, min(_FUSED_ROWS, next_power_of_2(queries * group)))
    # float32 products take no tensor cores: larger tiles would not fit the registers.
    shared_tokens = 32 if query.element_size() == 4 else _TILE_BYTES // (2 * max(head_dim, 64))
    tokens = shared_tokens * 2 if rows == 16 else shared_tokens
    row_blocks = cdiv(queries * group, rows)
    tiles = batch * kv_heads * row_blocks
    splits, min_chunk = _split(tiles, context.max_context, tokens, device)
    shared = _cut_shared(context, queries * group, kv_heads, shared_tokens) if fused else _Shared()
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
