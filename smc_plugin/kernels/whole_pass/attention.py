"""Attention of a pass: a program takes one sequence, one KV head and some of its query heads; 8 lanes take 4 tokens at a time.

Each 8 lanes keep the running maximum, sum and weighted values of their own tokens, so that they meet others' only at the end.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from smc_plugin.kernels.whole_pass.exchange import await_words, place_of, settled

STRETCHES = gl.constexpr(32)  # of tokens, side by side: 4 a warp
_TABLE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.constexpr_function
def attention_layout(query_rows, head_dim):
    """[query rows, stretches, tokens, head_dim]: 8 lanes for each stretch."""
    return gl.BlockedLayout([query_rows, 1, 4, head_dim // 8], [1, 4, 1, 8], [1, 8, 1, 1], [3, 2, 1, 0])


@gluon.jit
def _rounded(x, dtype: gl.constexpr):
    """x as a page of that type holds it; FP8 stops at its largest value, and NaN stays NaN. See rope.rounded."""
    if dtype == gl.float8e4nv:
        return gl.minimum(gl.maximum(x.to(gl.float32), -448.0, tl.PropagateNan.ALL), 448.0, tl.PropagateNan.ALL).to(
            dtype
        )
    else:
        return x.to(dtype)


@gluon.jit
def _turned(loaded, column, norm, pair_norm, eps, NORM: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Heads [.., HEAD_DIM] of _load_new after an optional RMS norm and rotation, rounded to bfloat16."""
    x, pair = settled(loaded[0], loaded[4]).to(gl.float32), settled(loaded[1], loaded[5]).to(gl.float32)
    if NORM:
        scale = gl.rsqrt(gl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
        x = (norm.to(gl.float32)[None, :] * (x * scale).to(gl.bfloat16).to(gl.float32)).to(gl.bfloat16).to(gl.float32)
        pair = pair_norm.to(gl.float32)[None, :] * (pair * scale).to(gl.bfloat16).to(gl.float32)
        pair = pair.to(gl.bfloat16).to(gl.float32)
    sign = gl.where(column < HEAD_DIM // 2, -1.0, 1.0)[None, :]
    return (x * loaded[2] + sign * pair * loaded[3]).to(gl.bfloat16)


@gluon.jit
def find_places(places, block_row, length, PAGE_SIZE: gl.constexpr, SPAN: gl.constexpr):
    """Write where each position's keys lie in a layer's pages, SPAN positions at a time; the same for all layers.

    Places of the last tile from `length` on are in page 0.
    """
    at = gl.arange(0, SPAN, layout=gl.BlockedLayout([1], [32], [8], [0]))
    for tile in range((length + SPAN - 1) // SPAN):
        token = tile * SPAN + at
        page = gl.load(block_row + token // PAGE_SIZE, mask=token < length, other=0)
        places.index(tile).store(page * PAGE_SIZE + token % PAGE_SIZE)


@gluon.jit
def load_tile(cache, half_cache, places, tile, length, kv_head, KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr,
              TILES: gl.constexpr, TOKENS: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """Keys and values [STRETCHES, TOKENS, HEAD_DIM] of a tile's positions; 0 from `length` on."""
    TILE: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    stretch = gl.arange(0, STRETCHES, layout=gl.SliceLayout(1, gl.SliceLayout(2, TILE)))
    local = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, gl.SliceLayout(2, TILE)))
    column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, gl.SliceLayout(1, TILE)))
    token = (tile * STRETCHES + stretch)[:, None] * TOKENS + local[None, :]
    found = places.index(gl.minimum(tile, TILES - 1))._reinterpret(gl.int32, [STRETCHES, TOKENS], _TABLE)
    place = (found.load(gl.SliceLayout(2, TILE)).to(gl.int64) * KV_HEADS + kv_head) * HEAD_DIM
    at = cache + place[:, :, None] + column[None, None, :]
    inside = (token < length)[:, :, None] & (column >= 0)[None, None, :]
    keys = gl.load(at, mask=inside, other=0.0, cache_modifier=".cg")
    values = gl.load(at + half_cache, mask=inside, other=0.0, cache_modifier=".cg")
    return keys, values


@gluon.jit
def await_new(qkv, sequence, kv_head, part, QUERIES: gl.constexpr, HEADS: gl.constexpr, GROUP: gl.constexpr,
               KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr):  # fmt: skip
    """Wait for the queries, keys and values of an attention task."""
    UNITS: gl.constexpr = HEAD_DIM // 8
    unit = gl.minimum(gl.arange(0, 256, layout=gl.BlockedLayout([1], [32], [8], [0])), (HEADS + 2) * UNITS - 1)
    head = unit // UNITS
    key_or_value = GROUP * KV_HEADS + (head - HEADS) * KV_HEADS + kv_head
    head = gl.where(head < HEADS, kv_head * GROUP + part * HEADS + head, key_or_value)
    line = sequence * QUERIES + QUERIES - 1
    await_words(qkv + line * ((GROUP + 2) * KV_HEADS * HEAD_DIM) + head * HEAD_DIM + unit % UNITS * 8 + 7)


@gluon.jit
def _merged(state, score, value, R: gl.constexpr, LAYOUT: gl.constexpr):
    """The running state of softmax after one more token: scores [R, stretches], -inf but in the first stretch."""
    ACC: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    top, total, acc = state
    new_top = gl.maximum(top, score)
    shift = gl.where(new_top == float("-inf"), 0.0, new_top)
    weight, fade = gl.exp2(score - shift), gl.exp2(top - shift)
    value = gl.convert_layout(value, gl.SliceLayout(0, gl.SliceLayout(1, ACC)))
    acc = acc * gl.convert_layout(fade, gl.SliceLayout(2, ACC))[:, :, None]
    acc += gl.convert_layout(weight, gl.SliceLayout(2, ACC))[:, :, None] * value[None, None, :]
    return new_top, total * fade + weight, acc


@gluon.jit
def _far(state, tile0, tile1, query, cache, half_cache, places, length, kv_head, scale_log2,
         KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, TILES: gl.constexpr, TOKENS: gl.constexpr,
         LAYOUT: gl.constexpr):  # fmt: skip
    """The running state of softmax after all tokens in the pages; two tiles are always on their way."""
    S: gl.constexpr = gl.SliceLayout(3, LAYOUT)
    ACC: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    stretch = gl.arange(0, STRETCHES, layout=gl.SliceLayout(0, gl.SliceLayout(2, S)))
    local = gl.arange(0, TOKENS, layout=gl.SliceLayout(0, gl.SliceLayout(1, S)))
    query = query[:, None, :][:, :, None, :]
    top, total, acc = state
    keys, values = tile0
    next_keys, next_values = tile1
    for tile in range((length + STRETCHES * TOKENS - 1) // (STRETCHES * TOKENS)):
        later_keys, later_values = load_tile(
            cache, half_cache, places, tile + 2, length, kv_head, KV_HEADS, HEAD_DIM, TILES, TOKENS, LAYOUT
        )
        score = gl.sum(query * keys.to(gl.float32)[None, :, :, :], axis=3) * scale_log2
        token = (tile * STRETCHES + stretch)[None, :, None] * TOKENS + local[None, None, :]
        score = gl.where(token < length, score, float("-inf"))
        new_top = gl.maximum(top, gl.max(score, axis=2))
        shift = gl.where(new_top == float("-inf"), 0.0, new_top)
        weights = gl.exp2(score - shift[:, :, None])
        fade = gl.exp2(top - shift)
        total = total * fade + gl.sum(weights, axis=2)
        acc *= gl.convert_layout(fade, gl.SliceLayout(2, ACC))[:, :, None]
        acc += gl.sum(weights[:, :, :, None] * values.to(gl.float32)[None, :, :, :], axis=2)
        top = new_top
        keys, values = next_keys, next_values
        next_keys, next_values = later_keys, later_values
    return top, total, acc


@gluon.jit
def _load_new(qkv, line, head, cos, sin, column, WIDTH: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Heads [.., HEAD_DIM] as they are now, their halves exchanged, cosines and sines, and where they lie."""
    HALF: gl.constexpr = HEAD_DIM // 2
    base = qkv + line * WIDTH + head * HEAD_DIM
    at = base[:, None] + column[None, :]
    pair_at = base[:, None] + ((column + HALF) % HEAD_DIM)[None, :]
    turn = line[:, None] * HALF + (column % HALF)[None, :]
    x, pair = gl.load(at, cache_modifier=".cg"), gl.load(pair_at, cache_modifier=".cg")
    return x, pair, gl.load(cos + turn), gl.load(sin + turn), at, pair_at


@gluon.jit
def attend(
    sequence, kv_head, part, qkv, cache, half_cache, places, length, tile0, tile1, cos, sin, slots,
    q_norm, k_norm, out, scale_log2, eps,
    NORM: gl.constexpr, QUERIES: gl.constexpr, HEADS: gl.constexpr, GROUP: gl.constexpr, KV_HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr, TILES: gl.constexpr, TOKENS: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """HEADS query heads of one sequence and KV head against the new keys and values and those in the pages.

    tile0 and tile1 are the first tiles of the pages, as load_tile found them.
    """
    R: gl.constexpr = HEADS * QUERIES
    LAYOUT: gl.constexpr = attention_layout(R, HEAD_DIM)
    QUERY: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT))  # [R, HEAD_DIM]
    STATE: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, LAYOUT))  # [R, stretches]
    ACC: gl.constexpr = gl.SliceLayout(2, LAYOUT)  # [R, stretches, HEAD_DIM]
    WIDTH: gl.constexpr = (GROUP + 2) * KV_HEADS * HEAD_DIM
    NUM_HEADS: gl.constexpr = GROUP * KV_HEADS
    r = gl.arange(0, R, layout=gl.SliceLayout(1, QUERY))
    one = gl.arange(0, 1, layout=gl.SliceLayout(1, QUERY))
    column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, QUERY))
    pair_column = (column + HEAD_DIM // 2) % HEAD_DIM
    # All loads first: what is not there yet is waited for together.
    query_head = kv_head * GROUP + part * HEADS + r % HEADS
    asked = _load_new(qkv, sequence * QUERIES + r // HEADS, query_head, cos, sin, column, WIDTH, HEAD_DIM)
    new_keys, new_values, new_slots = (), (), ()
    for new in gl.static_range(QUERIES):
        line = sequence * QUERIES + new + one
        found = _load_new(qkv, line, NUM_HEADS + kv_head, cos, sin, column, WIDTH, HEAD_DIM)
        new_keys = new_keys + (found,)
        new_values = new_values + (gl.load(found[4] + KV_HEADS * HEAD_DIM, cache_modifier=".cg"),)
        new_slots = new_slots + (gl.load(slots + line),)
    if NORM:
        q_norms, q_pair_norms = gl.load(q_norm + column), gl.load(q_norm + pair_column)
        k_norms, k_pair_norms = gl.load(k_norm + column), gl.load(k_norm + pair_column)
    else:
        q_norms, q_pair_norms, k_norms, k_pair_norms = column, column, column, column
    query = _turned(asked, column, q_norms, q_pair_norms, eps, NORM, HEAD_DIM).to(gl.float32)
    stretch = gl.arange(0, STRETCHES, layout=gl.SliceLayout(0, STATE))
    state_r = gl.arange(0, R, layout=gl.SliceLayout(1, STATE))
    top = gl.full([R, STRETCHES], float("-inf"), gl.float32, STATE)
    state = (top, gl.zeros([R, STRETCHES], gl.float32, STATE), gl.zeros([R, STRETCHES, HEAD_DIM], gl.float32, ACC))
    # The new keys and values, rounded as later passes will read them, are the first stretch's.
    for new in gl.static_range(QUERIES):
        key = _turned(new_keys[new], column, k_norms, k_pair_norms, eps, NORM, HEAD_DIM)
        key = _rounded(key, cache.dtype.element_ty)
        value = _rounded(settled(new_values[new], new_keys[new][4] + KV_HEADS * HEAD_DIM), cache.dtype.element_ty)
        place = cache + ((new_slots[new] * KV_HEADS + kv_head) * HEAD_DIM)[:, None] + column[None, :]
        writes = (one >= 0)[:, None] & (column >= 0)[None, :] & (part == 0)
        gl.store(place, key, mask=writes)
        gl.store(place + half_cache, value, mask=writes)
        score = gl.convert_layout(gl.sum(query * key.to(gl.float32), axis=1) * scale_log2, gl.SliceLayout(1, STATE))
        seen = (state_r // HEADS >= new)[:, None] & (stretch == 0)[None, :]
        score = gl.where(seen, score[:, None] + gl.zeros([R, STRETCHES], gl.float32, STATE), float("-inf"))
        state = _merged(state, score, gl.sum(value.to(gl.float32), axis=0), R, LAYOUT)
    top, total, acc = _far(
        state, tile0, tile1, query, cache, half_cache, places, length, kv_head, scale_log2,
        KV_HEADS, HEAD_DIM, TILES, TOKENS, LAYOUT,
    )  # fmt: skip
    gain = gl.exp2(top - gl.max(top, axis=1)[:, None])
    OUT: gl.constexpr = gl.SliceLayout(1, ACC)
    result = gl.sum(acc * gl.convert_layout(gain, gl.SliceLayout(2, ACC))[:, :, None], axis=1)
    result = result / gl.convert_layout(gl.sum(total * gain, axis=1), gl.SliceLayout(1, OUT))[:, None]
    out_r = gl.arange(0, R, layout=gl.SliceLayout(1, OUT))
    out_column = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, OUT))
    out_head = kv_head * GROUP + part * HEADS + out_r % HEADS
    line = sequence * QUERIES + out_r // HEADS
    place = place_of(line[:, None], out_head[:, None] * HEAD_DIM + out_column[None, :], ROWS)
    gl.store(out + place, result.to(gl.bfloat16))
