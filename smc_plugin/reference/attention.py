"""Rotary embedding, KV write and attention through block tables.

One call serves every use: a prefill chunk (1 sequence, many queries), a draft pass (1 or 2 queries a sequence) and a
score pass (K + 1 queries). Query j of sequence b stands at position start_b + j and sees positions 0 to start_b + j.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

FP8_MAX = 448.0


@dataclass(frozen=True)
class AttentionContext:
    """What the calls of one forward pass share.

    Args:
        cos, sin: [B * Q, head_dim / 2] float32.
        slots: [B * Q] int64, page * page_size + offset to write to.
        pages: [B, C] int64, leading block-table columns.
        visible: [B, 1, Q, C * page_size] bool.
        written: [B, C * page_size, 1, 1] bool; a position beyond the last query holds garbage, perhaps NaN.
    """

    cos: Tensor
    sin: Tensor
    slots: Tensor
    pages: Tensor
    visible: Tensor
    written: Tensor


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
    """Prepare a forward pass.

    Args:
        start, offset: [B] int64 plus a number, position of each sequence's first query.
        block_table: [B, C] int32.
        inv_freq: [head_dim / 2] float32, radians per position.
        max_context: no sequence is longer than this after the pass; bounds how much is gathered.
        shared: not needed here; see the kernels.
    """
    start = start + offset
    positions = start[:, None] + torch.arange(num_queries, device=start.device)
    angles = positions.reshape(-1, 1).to(torch.float32) * inv_freq
    column = positions // page_size
    slots = block_table.gather(1, column).long() * page_size + positions % page_size
    columns = min((max_context + page_size - 1) // page_size, block_table.shape[1])
    key_position = torch.arange(columns * page_size, device=start.device)
    visible = key_position <= positions[..., None]
    written = key_position < (start + num_queries)[:, None]
    return AttentionContext(
        angles.cos(),
        angles.sin(),
        slots.reshape(-1),
        block_table[:, :columns].long(),
        visible[:, None],
        written[..., None, None],
    )


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + head_dim/2) of x [R, heads, head_dim] in float32."""
    first, second = x.to(torch.float32).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _head_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm over head_dim (Qwen3's q and k norms); unchanged without a weight."""
    if weight is None:
        return x
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def rope_and_write(
    qkv: Tensor,
    layer_cache: Tensor,
    context: AttentionContext,
    num_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """Rotate queries and keys, write keys and values to their pages.

    Args:
        qkv: [R, (num_heads + 2 kv_heads) * head_dim].
        layer_cache: [2, P, page_size, kv_heads, head_dim], changed in place; the activations' type or FP8.
        q_norm, k_norm: [head_dim] or None.
    Returns:
        [R, num_heads, head_dim] rotated queries.
    """
    kv_heads, head_dim = layer_cache.shape[-2:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    query, key, value = heads.split([num_heads, kv_heads, kv_heads], dim=1)
    query = _rotate(_head_norm(query, q_norm, eps), context.cos, context.sin)
    key = _rotate(_head_norm(key, k_norm, eps), context.cos, context.sin)
    flat = _movable(layer_cache).view(2, -1, kv_heads, head_dim)
    flat[0].index_copy_(0, context.slots, _movable(_rounded(key, layer_cache.dtype)))
    flat[1].index_copy_(0, context.slots, _movable(_rounded(value, layer_cache.dtype)))
    return query


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a page holds it; beyond the largest FP8 value, 448, torch would make NaN, a GPU's conversion stops there."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(dtype) if dtype == torch.float8_e4m3fn else x.to(dtype)


def _movable(x: Tensor) -> Tensor:
    """FP8 as bytes, which every op that only moves elements knows."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def paged_attention(query: Tensor, layer_cache: Tensor, context: AttentionContext) -> Tensor:
    """Causal attention over each sequence's pages.

    Args:
        query: [B * Q, num_heads, head_dim].
        layer_cache: [2, P, page_size, kv_heads, head_dim].
    Returns:
        [B * Q, num_heads * head_dim] in the query's dtype; scale 1/sqrt(head_dim).
    """
    kv_heads, head_dim = layer_cache.shape[-2:]
    batch = context.pages.shape[0]
    num_heads = query.shape[1]
    # [2, B, C, page, kv, d] -> [2, B, T, kv, d]; zeros where nothing was written, because 0 * NaN is NaN.
    gathered = _movable(layer_cache)[:, context.pages].reshape(2, batch, -1, kv_heads, head_dim)
    gathered = torch.where(context.written, gathered.view(layer_cache.dtype).to(query.dtype), 0)
    keys, values = gathered.transpose(2, 3).unbind(0)
    queries = query.view(batch, -1, num_heads, head_dim).transpose(1, 2)
    out = functional.scaled_dot_product_attention(queries, keys, values, context.visible, enable_gqa=True)
    return out.transpose(1, 2).reshape(query.shape[0], num_heads * head_dim)


def attend(
    qkv: Tensor,
    layer_cache: Tensor,
    context: AttentionContext,
    num_heads: int,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> Tensor:
    """`rope_and_write`, then `paged_attention`: from qkv rows to attention rows.

    Args:
        qkv: [R, (num_heads + 2 kv_heads) * head_dim].
        layer_cache: [2, P, page_size, kv_heads, head_dim], changed in place.
        q_norm, k_norm: [head_dim] both, or None both.
    Returns:
        [R, num_heads * head_dim] in qkv's dtype.
    """
    query = rope_and_write(qkv, layer_cache, context, num_heads, q_norm, k_norm, eps)
    return paged_attention(query, layer_cache, context)
