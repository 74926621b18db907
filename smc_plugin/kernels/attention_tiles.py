"""Pieces of the attention kernel: tiles of keys and values from pages, and the running softmax that folds them in."""

from __future__ import annotations

import triton
import triton.language as tl

from smc_plugin.kernels.rope import normed_and_rotated


@triton.jit
def attend_tile(q, keys, values, visible, top, total, acc, scale_log2):
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
def fold_parts(
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
def pages_of(block_row, token, stop, PAGE_SIZE: tl.constexpr):
    """The page that holds each position `token` below `stop`, 0 from there on."""
    return tl.load(block_row + token // PAGE_SIZE, mask=token < stop, other=0, cache_modifier=".cg")


@triton.jit
def old_tile(cache, half_cache, page, token, stop, kv_heads, kv_head, PAGE_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Keys and values [TOKENS, HEAD_DIM] of positions `token` below `stop`, 0 from there on."""
    valid = (token < stop)[:, None]
    place = ((page.to(tl.int64) * PAGE_SIZE + token % PAGE_SIZE) * kv_heads + kv_head) * HEAD_DIM
    tile = cache + place[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    keys = tl.load(tile, mask=valid, other=0.0, cache_modifier=".cg")
    values = tl.load(tile + half_cache, mask=valid, other=0.0, cache_modifier=".cg")
    return keys, values


@triton.jit
def shared_tokens(shared, group, first_position, least_shared, PAGE_SIZE: tl.constexpr):
    """Positions that a group's programs read once for all its sequences: whole pages, none if too few to be worth it."""
    pages = tl.minimum(tl.load(shared + group, cache_modifier=".cg").to(tl.int32), first_position // PAGE_SIZE)
    return tl.where(pages * PAGE_SIZE >= least_shared, pages * PAGE_SIZE, 0)


@triton.jit
def part_tokens(tokens, num_splits, min_chunk, TOKENS: tl.constexpr):
    """Positions that each part of a stretch of `tokens` takes: whole tiles."""
    return tl.maximum(tl.cdiv(tl.cdiv(tokens, num_splits), TOKENS) * TOKENS, min_chunk)


@triton.jit
def rotated_queries(
    query, row_stride, line, head, is_row, cos, sin, q_norm, eps,
    NORM: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Both halves [ROWS, HALF] of the queries of heads `head` in lines `line`, rotated."""
    turn = line[:, None] * HALF + tl.arange(0, HALF)[None, :]
    row_cos = tl.load(cos + turn, mask=is_row[:, None], other=0.0)
    row_sin = tl.load(sin + turn, mask=is_row[:, None], other=0.0)
    base = query + line * row_stride + head * (2 * HALF)
    return normed_and_rotated(base, is_row, row_cos, row_sin, q_norm, eps, NORM, HALF)


@triton.jit
def joined(first, second, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """[ROWS, HEAD_DIM] of two halves."""
    return tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), [ROWS, HEAD_DIM])
