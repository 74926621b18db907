"""Top-k, top-p and min-p without a sort.

Tokens are ordered by logit, of equal logits the lower id first. What each filter keeps is a leading part of that order,
so the three together are one cut: a threshold and how many tokens equal to it stay. Float bits, turned so that they
order like the floats, are searched for the threshold from the top digit down: for top-k 8 bits at a time with
histograms, for top-p 4 bits at a time with sums of exp(s - max). One program a row; a row of 128256 float32 values is
0.5 MB, which stays in the L2 cache over the passes.

Example: logits [2, 5, 5, 1] with top_k = 2 keep tokens 1 and 2; with top_k = 1 token 1 alone. Masses are float32
exponentials whose tile sums are added in float64: a token whose mass_before is within about 1e-6 of top_p may be
decided otherwise than by the reference, which works in float64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smc_plugin.kernels.launch import cdiv, launch, let_next_start, next_power_of_2, wait_for_inputs

_BLOCK = 4096


@triton.jit
def _ordered(value):
    """uint32 keys that order like the floats: -0 equals 0, NaN is above +inf."""
    value = value + 0.0
    bits = value.to(tl.uint32, bitcast=True)
    key = tl.where(bits >= 0x80000000, 0xFFFFFFFF - bits, bits + 0x80000000)
    is_number = value == value  # noqa: PLR0124 - false for NaN
    return tl.where(is_number, key, tl.full(key.shape, 0xFFFFFFFF, tl.uint32))


@triton.jit
def _value_of(key):
    """The float of one key; the inverse of `_ordered`."""
    bits = tl.where(key >= 0x80000000, key - 0x80000000, 0xFFFFFFFF - key)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _load_keys(row, tile, vocab_size, BLOCK: tl.constexpr):
    token = tile * BLOCK + tl.arange(0, BLOCK)
    valid = token < vocab_size
    value = tl.load(row + token, mask=valid, other=float("-inf"))
    return token, valid, value, _ordered(value)


@triton.jit
def _count_threshold(row, vocab_size, num_tiles, k, BLOCK: tl.constexpr):
    """Key of the k-th largest token and how many tokens equal to it are among the first k."""
    prefix = tl.full([], 0, tl.uint32)
    remaining = k.to(tl.int32)
    digits = tl.arange(0, 256)
    fixed = tl.full([], 0, tl.uint32)  # the bits that are decided already
    for level in range(4):
        shift = 24 - 8 * level
        counts = tl.zeros([256], tl.int32)
        for tile in range(num_tiles):
            _, valid, _, key = _load_keys(row, tile, vocab_size, BLOCK)  # pyright: ignore
            inside = valid & ((key & fixed) == prefix)
            counts += tl.histogram(((key >> shift) & 0xFF).to(tl.int32), 256, mask=inside)
        above = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0)
        # The digit of the k-th: fewer than `remaining` tokens have a higher one, and with its own they suffice.
        digit = tl.min(tl.where((above < remaining) & (counts > 0), digits, 256), axis=0)
        remaining -= tl.sum(tl.where(digits == digit, above, 0), axis=0)
        prefix = prefix | (digit.to(tl.uint32) << shift)
        fixed = fixed | (tl.full([], 0xFF, tl.uint32) << shift)
    return prefix, remaining


@triton.jit
def _mass_above(row, vocab_size, num_tiles, top, threshold, BLOCK: tl.constexpr):
    """Sum of exp(s - top) over tokens above a threshold key, float64."""
    total = tl.full([], 0.0, tl.float64)
    for tile in range(num_tiles):
        _, valid, value, key = _load_keys(row, tile, vocab_size, BLOCK)  # pyright: ignore
        mass = tl.where(valid & (key > threshold), tl.exp(value - top), 0.0)
        total += tl.sum(mass, axis=0).to(tl.float64)
    return total


@triton.jit
def _mass_threshold(row, vocab_size, num_tiles, top, target, BLOCK: tl.constexpr):
    """Least key whose tokens have less than `target` mass above them, and how many equal to it have, in order."""
    prefix = tl.full([], 0, tl.uint32)
    above = tl.full([], 0.0, tl.float64)
    digits = tl.arange(0, 16)
    fixed = tl.full([], 0, tl.uint32)
    for level in range(8):
        shift = 28 - 4 * level
        sums = tl.zeros([16], tl.float64)
        for tile in range(num_tiles):
            _, valid, value, key = _load_keys(row, tile, vocab_size, BLOCK)  # pyright: ignore
            inside = valid & ((key & fixed) == prefix)
            if tl.max(inside.to(tl.int32), axis=0) > 0:
                mass = tl.where(inside, tl.exp(value - top), 0.0)
                own = (key >> shift) & 0xF
                for digit in tl.static_range(16):
                    part = tl.sum(tl.where(own == digit, mass, 0.0), axis=0)
                    sums += tl.where(digits == digit, part.to(tl.float64), 0.0)
        before = above + tl.sum(sums, axis=0) - tl.cumsum(sums, axis=0)
        chosen = tl.min(tl.where((before < target) & (sums > 0), digits, 15), axis=0)
        above = tl.sum(tl.where(digits == chosen, before, 0.0), axis=0)
        prefix = prefix | (chosen.to(tl.uint32) << shift)
        fixed = fixed | (tl.full([], 0xF, tl.uint32) << shift)
    mass = tl.exp(_value_of(prefix) - top).to(tl.float64)
    ties = tl.ceil((target - above) / tl.where(mass > 0, mass, 1.0))
    return prefix, tl.minimum(tl.maximum(ties, 1.0), vocab_size).to(tl.int32)


@triton.jit
def _filter_kernel(
    scaled,
    row_stride,
    top_k,
    top_p,
    min_p,
    out,
    vocab_size,
    num_tiles,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    let_next_start(PDL)
    index = tl.program_id(0).to(tl.int64)
    row, out_row = scaled + index * row_stride, out + index * vocab_size
    k, p = tl.load(top_k + index), tl.load(top_p + index).to(tl.float64)
    least = tl.load(min_p + index).to(tl.float32)
    top_key = tl.full([], 0, tl.uint32)
    for tile in range(num_tiles):
        _, valid, _, key = _load_keys(row, tile, vocab_size, BLOCK)  # pyright: ignore
        top_key = tl.maximum(top_key, tl.max(tl.where(valid, key, 0), axis=0))
    top = _value_of(top_key)

    threshold, ties = tl.full([], 0, tl.uint32), vocab_size + 0
    if (k > 0) & (k < vocab_size):
        threshold, ties = _count_threshold(row, vocab_size, num_tiles, k, BLOCK)
    # A row whose largest logit is not finite has no masses; it fails later, whatever is kept here.
    if (p < 1.0) & (tl.abs(top) < float("inf")):
        total = _mass_above(row, vocab_size, num_tiles, top, threshold, BLOCK)
        if threshold > 0:
            total += ties * tl.exp(_value_of(threshold) - top).to(tl.float64)
        p_threshold, p_ties = _mass_threshold(row, vocab_size, num_tiles, top, p * total, BLOCK)
        ties = tl.where(
            p_threshold > threshold, p_ties, tl.where(p_threshold == threshold, tl.minimum(ties, p_ties), ties)
        )
        threshold = tl.maximum(threshold, p_threshold)

    seen = tl.full([], 0, tl.int32)
    for tile in range(num_tiles):
        token, valid, value, key = _load_keys(row, tile, vocab_size, BLOCK)  # pyright: ignore
        tie = (valid & (key == threshold)).to(tl.int32)
        rank = seen + tl.cumsum(tie, axis=0)
        keep = (key > threshold) | ((tie > 0) & (rank <= ties))
        keep = keep & ((tl.exp(value - top) >= least) | (key == top_key))
        tl.store(out_row + token, tl.where(keep, value, float("-inf")), mask=valid)
        seen += tl.sum(tie, axis=0)


def apply_filters(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Remove unlikely tokens: top-k, then top-p, then min-p, each on what the one before left.

    Args:
        scaled: [R, V] float32 logits after temperature.
        top_k: [R] int64, 0 keeps all. Ties with the k-th are cut so that exactly k stay.
        top_p: [R] in (0, 1]: the smallest set of most likely tokens whose mass reaches top_p.
        min_p: [R] in [0, 1]: tokens less likely than min_p times the most likely one go.
    Returns:
        [R, V] float32 with -inf for removed tokens; the most likely token always stays.
    """
    rows, vocab_size = scaled.shape
    scaled = scaled.to(torch.float32)
    scaled = scaled if scaled.stride(-1) == 1 else scaled.contiguous()
    out = torch.empty((rows, vocab_size), dtype=torch.float32, device=scaled.device)
    block = min(_BLOCK, next_power_of_2(vocab_size))
    launch(
        _filter_kernel,
        (rows,),
        *(scaled, scaled.stride(0), top_k.contiguous(), top_p.contiguous(), min_p.contiguous(), out),
        *(vocab_size, cdiv(vocab_size, block)),
        BLOCK=block,
        num_warps=16,
    )
    return out
