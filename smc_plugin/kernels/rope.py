"""What attention needs before it starts: positions turned into rotations and page slots, and queries and keys rotated.

`make_context` is one launch a forward pass, shared by all layers. `rope_and_write` serves long prefill chunks; decode-like
passes rotate inside attention itself, with the same `normed_and_rotated`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from smc_plugin.errors import ConfigError
from smc_plugin.kernels.launch import cdiv, launch, let_next_start, next_power_of_2, wait_for_inputs

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
def normed_and_rotated(base, valid, cos, sin, weight, eps, NORM: tl.constexpr, HALF: tl.constexpr):
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
def rounded(x, dtype: tl.constexpr):
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
        first, second = normed_and_rotated(base, is_query, turn_cos, turn_sin, q_norm, eps, NORM, HALF)
        out = query_out + (row * num_heads + head)[:, None] * (2 * HALF) + pair[None, :]
        tl.store(out, first, mask=is_query[:, None])
        tl.store(out + HALF, second, mask=is_query[:, None])
    if tl.program_id(1) * HEADS + HEADS > num_heads:
        first, second = normed_and_rotated(base, is_key, turn_cos, turn_sin, k_norm, eps, NORM, HALF)
        place = cache + (slot * kv_heads + head - num_heads)[:, None] * (2 * HALF) + pair[None, :]
        tl.store(place, rounded(first, cache.dtype.element_ty), mask=is_key[:, None])
        tl.store(place + HALF, rounded(second, cache.dtype.element_ty), mask=is_key[:, None])
        at = base[:, None] + pair[None, :]
        first = tl.load(at, mask=is_value[:, None], other=0.0)
        second = tl.load(at + HALF, mask=is_value[:, None], other=0.0)
        place += half_cache - kv_heads * (2 * HALF)
        tl.store(place, rounded(first, cache.dtype.element_ty), mask=is_value[:, None])
        tl.store(place + HALF, rounded(second, cache.dtype.element_ty), mask=is_value[:, None])


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
    check_shapes(head_dim, context.page_size)
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


def check_shapes(head_dim: int, page_size: int) -> None:
    """Refuse what the kernels' power-of-two tiles cannot hold."""
    for name, value, least in (("head_dim", head_dim, 16), ("page_size", page_size, 1)):
        if value < least or value & (value - 1):
            raise ConfigError(
                f"paged attention was given {name} {value}, expected a power of two of at least {least}: pad it, or use "
                "smc_plugin.reference"
            )
