"""Skinny matrix products that stream the weights once, with what surrounds them fused in.

    linear:           x @ w [+ bias] [+ residual]
    linear_and_norm:  y = x @ w + residual, and what the next product needs of y's RMS norm
    gated:            x @ (gate | up), then silu(gate) * up: [rows, inner] to [rows, f]
    rms_norm:         the norm alone

The rows are few (a draft step has 8, a score pass 72), so the time is that of reading the weights: tiles of w go through
shared memory, products accumulate in float32. An RMS norm costs no pass and no work in the loop: the product that makes
y also writes y times the norm's weight and the sums of y² over its columns (`Prenormed`), and the product that
consumes it multiplies its accumulator by 1/rms at the end. Narrow matrices are split over the inner dimension too; the
last program to finish a tile sums the parts in order, so results do not depend on timing.

FP8 weights are read as such, widened to x's type in registers (which holds them exactly), and their scales, one a
column, multiply the accumulator at the end.

Rows that a power of two would pad can be two tiles, which multiply the same weights (`Tactic.tail`): 72 are 64 and 16, where
one tile has 128.

Under programmatic dependent launch a program asks the L2 cache for its first weights before it waits for the kernel that
makes x, so that the memory is busy while one product ends and the next begins (1 to 6 % of a pass on an H100).

Example: Llama-1B's o projection, 8 rows, 2048 -> 2048, is 32 column tiles of 64 times 4 splits = 128 programs, each of
which streams 512 * 64 weights (64 kB).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from smc_plugin.kernels.launch import (
    Gpu,
    cdiv,
    counters,
    gpu_of,
    is_last_arrival,
    launch,
    let_next_start,
    next_power_of_2,
    wait_for_inputs,
)
from smc_plugin.tactic import Product, Tactic

__all__ = [
    "Prenormed",
    "Product",
    "Tactic",
    "candidate_tactics",
    "default_tactic",
    "gated",
    "linear",
    "linear_and_norm",
    "rms_norm",
]

_PREFETCH_BYTES = 32 << 10  # of its own weights that a program asks for before it waits


@dataclass(frozen=True)
class Prenormed:
    """A matrix x on its way through an RMS norm: norm(x) = values / sqrt(sum over squares / width + eps), row by row.

    Args:
        values: [rows, width], x times the norm's weight, in x's dtype.
        squares: [parts, rows] float32, sums of x² over stretches of columns.
        eps: of the norm.
    """

    values: Tensor
    squares: Tensor
    eps: float


@triton.jit
def _prefetch(pointers):
    """Ask the L2 cache for the lines at `pointers`."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _prefetch_weights(
    weight, inner_stride, column_stride, start, column, inner, columns,
    INNER_MAJOR: tl.constexpr, COLUMNS: tl.constexpr, AHEAD: tl.constexpr, LINE: tl.constexpr,
):  # fmt: skip
    """Ask for the first AHEAD inner rows of a program's weights, a line of 128 bytes (LINE elements) a pointer."""
    if INNER_MAJOR:
        LINES: tl.constexpr = (AHEAD + LINE - 1) // LINE
        line = tl.arange(0, COLUMNS * LINES)
        at = tl.minimum(column + line % COLUMNS, columns - 1).to(tl.int64) * column_stride
        _prefetch(weight + at + tl.minimum(start + line // COLUMNS * LINE, inner - 1))
    else:
        LINES: tl.constexpr = (COLUMNS + LINE - 1) // LINE
        line = tl.arange(0, AHEAD * LINES)
        at = tl.minimum(start + line // LINES, inner - 1).to(tl.int64) * inner_stride
        _prefetch(weight + at + tl.minimum(column + line % LINES * LINE, columns - 1))


@triton.jit
def _load_weights(pointers, is_inner, is_column, EVEN_INNER: tl.constexpr, EVEN_COLUMNS: tl.constexpr):
    """A tile of weights, read once, so not worth its place in the L2 cache (a hint that plain loads carry)."""
    if EVEN_INNER and EVEN_COLUMNS:
        return tl.load(pointers, eviction_policy="evict_first")
    inside = is_inner[:, None] & is_column[None, :]
    return tl.load(pointers, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _widened(w, dtype: tl.constexpr, HOPPER: tl.constexpr):
    """Weights in the inputs' type. FP8's exponent and mantissa, put where bfloat16 has them, are 2**-120 of the value.

    Triton's conversion ends in one from float16 to bfloat16 for each weight, of a low rate; these are ordinary instructions.
    """
    if HOPPER and w.dtype == tl.float8e4nv and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 low, high, sign, shifted, gain;
            mov.b32 gain, 0x7b807b80;
            prmt.b32 low, $2, 0, 0x1404;
            prmt.b32 high, $2, 0, 0x3424;
            and.b32 sign, low, 0x80008000;
            shr.u32 shifted, low, 4;
            lop3.b32 low, shifted, 0x07f007f0, sign, 0xea;
            and.b32 sign, high, 0x80008000;
            shr.u32 shifted, high, 4;
            lop3.b32 high, shifted, 0x07f007f0, sign, 0xea;
            mul.rn.bf16x2 $0, low, gain;
            mul.rn.bf16x2 $1, high, gain;
            }
            """,
            "=r,=r,r",
            [w],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:
        return w.to(dtype)


@triton.jit
def _product(tile, w, acc, SWAP: tl.constexpr):
    """acc plus tile [ROWS, INNER] @ w [INNER, COLUMNS]; with SWAP acc is the transposed product.

    Matrix units on Hopper take their left operand from registers, the right one from shared memory: weights that were
    widened in registers had better be the left one.
    """
    if SWAP:
        return tl.dot(tl.trans(w), tl.trans(tile), acc, input_precision="ieee")
    else:
        return tl.dot(tile, w, acc, input_precision="ieee")


@triton.jit
def _load_squares(squares, first, num_parts, row, is_row, num_rows, PARTS: tl.constexpr):
    """[ROWS, PARTS] float32 sums of squares from `first` on, 0 beyond num_parts."""
    part = first + tl.arange(0, PARTS)
    inside = is_row[:, None] & (part < num_parts)[None, :]
    return tl.load(squares + part[None, :] * num_rows + row[:, None], mask=inside, other=0.0)


@triton.jit
def _load_rows(pointers, is_row, is_inner, EVEN_INNER: tl.constexpr):
    """A tile of x. Only what can be ragged is masked: a mask costs the loop more than the load."""
    if EVEN_INNER:
        return tl.load(pointers, mask=is_row[:, None], other=0.0)
    return tl.load(pointers, mask=is_row[:, None] & is_inner[None, :], other=0.0)


@triton.jit
def _store_part(part, acc, up_acc, is_row, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store a split's sums [ROWS, COLUMNS]."""
    tl.store(part, acc, mask=is_row[:, None])
    if GATED:
        tl.store(part + ROWS * COLUMNS, up_acc, mask=is_row[:, None])


@triton.jit
def _add_parts(
    parts, first, own, num_splits, is_row,
    SIZE: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The sums of all splits, each SIZE long, in their order."""
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    up_acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for other in range(num_splits):
        # .cg: other programs wrote these while this one ran; its first-level cache may not know.
        part = parts + (first + other) * SIZE + own
        acc += tl.load(part, mask=is_row[:, None], other=0.0, cache_modifier=".cg")
        if GATED:
            up_acc += tl.load(part + ROWS * COLUMNS, mask=is_row[:, None], other=0.0, cache_modifier=".cg")
    return acc, up_acc


@triton.jit
def _finish(
    acc, up_acc, added, parts, place, inside, row, is_row, column, is_column, column_tile, column_scale, up_scale, squares,
    num_parts, eps, bias, out, next_norm, next_values, next_squares, num_rows, inner,
    SCALED: tl.constexpr, PRENORMED: tl.constexpr, BIAS: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
    NORM_NEXT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What surrounds a product, and the stores, for one of a program's tiles of rows."""
    if SCALED:
        acc = acc * column_scale[None, :]
        up_acc = up_acc * up_scale[None, :] if GATED else up_acc
    if PRENORMED:
        for later in range(PARTS, num_parts, PARTS):
            parts += _load_squares(squares, later, num_parts, row, is_row, num_rows, PARTS)
        scale = tl.rsqrt(tl.sum(parts, axis=1) / inner + eps)[:, None]
        acc = acc * scale
        up_acc = up_acc * scale
    if BIAS:
        acc += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
    if GATED:
        acc = acc / (1.0 + tl.exp(-acc)) * up_acc
    if RESIDUAL:
        acc += added.to(tl.float32)
    result = acc.to(out.dtype.element_ty)
    tl.store(out + place, result, mask=inside)
    if NORM_NEXT:
        # Of the rounded values, which is what the residual stream holds; beyond the columns they are 0.
        wide = tl.where(inside, result.to(tl.float32), 0.0)
        weights = tl.load(next_norm + column, mask=is_column, other=0.0).to(tl.float32)
        tl.store(next_values + place, (wide * weights[None, :]).to(out.dtype.element_ty), mask=inside)
        tl.store(next_squares + column_tile * num_rows + row, tl.sum(wide * wide, axis=1), mask=is_row)


# A machine code for each number of rows or parts would help nobody, and take a second each to compile.
@triton.jit(do_not_specialize=["num_rows", "num_parts", "num_splits"])
def _linear_kernel(  # noqa: PLR0912, PLR0915 - the branches are variants decided at compile time
    x,
    x_stride,
    weight,
    inner_stride,
    column_stride,
    weight_scale,
    bias,
    squares,
    num_parts,
    eps,
    residual,
    out,
    next_norm,
    next_values,
    next_squares,
    acc_parts,
    arrivals,
    num_rows,
    columns,
    inner,
    inner_per_split,
    num_splits,
    SCALED: tl.constexpr,
    PRENORMED: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    NORM_NEXT: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    INNER_MAJOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PARTS: tl.constexpr,
    LINE: tl.constexpr,
    SWAP: tl.constexpr,
    TAIL: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    column_tile, split, row_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = split * inner_per_split
    stop = tl.minimum(start + inner_per_split, inner)
    if PDL and PREFETCH > 0:
        _prefetch_weights(
            weight, inner_stride, column_stride, start, column_tile * COLUMNS, inner, columns,
            INNER_MAJOR, COLUMNS, PREFETCH, LINE,
        )  # fmt: skip
        if GATED:
            _prefetch_weights(
                weight + columns * column_stride, inner_stride, column_stride, start, column_tile * COLUMNS, inner,
                columns, INNER_MAJOR, COLUMNS, PREFETCH, LINE,
            )  # fmt: skip
    # Rows come in two tiles, so that 72 need not be padded to 128: what is about the second is called tail.
    row = row_tile * (ROWS + TAIL) + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = row < num_rows, column < columns
    k = start + tl.arange(0, INNER)
    x_at = x + row.to(tl.int64)[:, None] * x_stride + k[None, :]
    w_at = weight + k.to(tl.int64)[:, None] * inner_stride + (column.to(tl.int64) * column_stride)[None, :]
    w_step = INNER * inner_stride
    up_offset = columns * column_stride
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = is_row[:, None] & is_column[None, :]
    wait_for_inputs(PDL)
    let_next_start(PDL)
    # Asked for here and used after the loop, so that the end of a program waits for as little as possible.
    parts = _load_squares(squares, 0, num_parts, row, is_row, num_rows, PARTS) if PRENORMED else 0.0
    added = tl.load(residual + place, mask=inside, other=0.0) if RESIDUAL else 0.0
    column_scale = tl.load(weight_scale + column, mask=is_column, other=0.0) if SCALED else 0.0
    up_scale = tl.load(weight_scale + columns + column, mask=is_column, other=0.0) if SCALED and GATED else 0.0
    acc = tl.zeros([COLUMNS, ROWS] if SWAP else [ROWS, COLUMNS], tl.float32)
    up_acc = acc
    if TAIL > 0:
        tail_row = row_tile * (ROWS + TAIL) + ROWS + tl.arange(0, TAIL)
        is_tail = tail_row < num_rows
        tail_at = x + tail_row.to(tl.int64)[:, None] * x_stride + k[None, :]
        tail_parts = _load_squares(squares, 0, num_parts, tail_row, is_tail, num_rows, PARTS) if PRENORMED else 0.0
        tail_place = tail_row.to(tl.int64)[:, None] * columns + column[None, :]
        tail_inside = is_tail[:, None] & is_column[None, :]
        tail_added = tl.load(residual + tail_place, mask=tail_inside, other=0.0) if RESIDUAL else 0.0
        tail_acc = tl.zeros([COLUMNS, TAIL] if SWAP else [TAIL, COLUMNS], tl.float32)
        tail_up_acc = tail_acc
    for at in range(start, stop, INNER):
        is_inner = at + tl.arange(0, INNER) < stop
        tile = _load_rows(x_at, is_row, is_inner, EVEN_INNER)
        w = _load_weights(w_at, is_inner, is_column, EVEN_INNER, EVEN_COLUMNS)
        wide = _widened(w, tile.dtype, PDL)
        acc = _product(tile, wide, acc, SWAP)
        if TAIL > 0:
            tail = _load_rows(tail_at, is_tail, is_inner, EVEN_INNER)
            tail_acc = _product(tail, wide, tail_acc, SWAP)
            tail_at += INNER
        if GATED:
            up = _load_weights(w_at + up_offset, is_inner, is_column, EVEN_INNER, EVEN_COLUMNS)
            wide = _widened(up, tile.dtype, PDL)
            up_acc = _product(tile, wide, up_acc, SWAP)
            if TAIL > 0:
                tail_up_acc = _product(tail, wide, tail_up_acc, SWAP)
        x_at += INNER
        w_at += w_step

    if SWAP:
        acc, up_acc = tl.trans(acc), tl.trans(up_acc)
        if TAIL > 0:
            tail_acc, tail_up_acc = tl.trans(tail_acc), tl.trans(tail_up_acc)
    writes = True
    if SPLIT:
        MATRICES: tl.constexpr = 2 if GATED else 1
        SIZE: tl.constexpr = MATRICES * (ROWS + TAIL) * COLUMNS
        tile_index = row_tile * tl.num_programs(0) + column_tile
        own = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        first = tile_index.to(tl.int64) * num_splits
        _store_part(acc_parts + (first + split) * SIZE + own, acc, up_acc, is_row, GATED, ROWS, COLUMNS)
        if TAIL > 0:
            tail_own = (
                MATRICES * ROWS * COLUMNS + tl.arange(0, TAIL)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
            )
            tail_part = acc_parts + (first + split) * SIZE + tail_own
            _store_part(tail_part, tail_acc, tail_up_acc, is_tail, GATED, TAIL, COLUMNS)
        writes = is_last_arrival(arrivals + tile_index, num_splits)
        if writes:
            acc, up_acc = _add_parts(acc_parts, first, own, num_splits, is_row, SIZE, GATED, ROWS, COLUMNS)
            if TAIL > 0:
                tail_acc, tail_up_acc = _add_parts(
                    acc_parts, first, tail_own, num_splits, is_tail, SIZE, GATED, TAIL, COLUMNS
                )
    if writes:
        _finish(
            acc, up_acc, added, parts, place, inside, row, is_row, column, is_column, column_tile, column_scale, up_scale,
            squares, num_parts, eps, bias, out, next_norm, next_values, next_squares, num_rows, inner,
            SCALED, PRENORMED, BIAS, GATED, RESIDUAL, NORM_NEXT, PARTS,
        )  # fmt: skip
        if TAIL > 0:
            _finish(
                tail_acc, tail_up_acc, tail_added, tail_parts, tail_place, tail_inside, tail_row, is_tail, column, is_column,
                column_tile, column_scale, up_scale, squares, num_parts, eps, bias, out, next_norm, next_values,
                next_squares, num_rows, inner, SCALED, PRENORMED, BIAS, GATED, RESIDUAL, NORM_NEXT, PARTS,
            )  # fmt: skip


@triton.jit
def _norm_kernel(
    x,
    x_stride,
    weight,
    out,
    eps,
    width,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    valid = column < width
    values = tl.load(x + row * x_stride + column, mask=valid, other=0.0)
    wide = values.to(tl.float32)
    scaled = (wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)).to(values.dtype)
    scale = tl.load(weight + column, mask=valid, other=0.0)
    tl.store(out + row * width + column, scale * scaled, mask=valid)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Divide each row by the root of its mean square plus eps, in float32, and scale by the weight.

    Args:
        x: [rows, width], columns contiguous.
        weight: [width].
    Returns:
        [rows, width] in x's dtype.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = next_power_of_2(x.shape[1])
    launch(
        _norm_kernel,
        (x.shape[0],),
        *(x, x.stride(0), weight, out, eps, x.shape[1]),
        BLOCK=block,
        num_warps=8 if block >= 2048 else 4,
    )
    return out


def _tile_bytes(product: Product, rows: int, columns: int, inner: int, stages: int) -> int:
    """Shared memory of a program's tiles; up to 32 rows of 16 bits the tile in use has left it for registers."""
    buffers = stages - 1 if rows <= 32 and product.input_bytes == 2 else stages
    matrices = 2 if product.gated else 1
    row_bytes = columns * matrices * product.element_bytes + rows * product.input_bytes
    # Many rows multiply from shared memory, where narrower weights need a place for their widened tile too.
    widened = (
        columns * matrices * product.input_bytes if rows > 32 and product.element_bytes < product.input_bytes else 0
    )
    return inner * (buffers * row_bytes + widened)


# Tiles (columns, inner, stages) worth timing, the generally good ones first: for few rows and for many.
_SMALL_TILES = (
    *((64, 128, 6), (64, 256, 4), (64, 128, 4), (128, 64, 6), (32, 256, 4)),
    *((32, 128, 6), (64, 256, 3), (32, 256, 6), (64, 64, 6)),
)
_TALL_TILES = (
    *((64, 64, 6), (64, 128, 4), (128, 64, 3), (64, 128, 3)),
    *((32, 128, 4), (64, 64, 4), (32, 64, 5), (128, 128, 3)),
)
# With weights of one byte: as many bytes in flight, and wider tiles where the rows of x are the heavier part of them.
_SMALL_FP8_TILES = (
    *((64, 256, 4), (64, 128, 6), (64, 256, 6), (128, 128, 6), (32, 256, 6)),
    *((128, 128, 4), (32, 256, 4), (64, 256, 3), (64, 128, 4)),
)
_TALL_FP8_TILES = (
    *((128, 64, 4), (64, 128, 4), (64, 64, 6), (128, 64, 6)),
    *((128, 128, 3), (64, 128, 3), (32, 128, 4), (64, 64, 4)),
)
_TAILED_TILES = ((64, 64, 6), (128, 64, 4), (64, 128, 4))
_LEAST_TILE = (32, 32, 2)  # fits everywhere


def default_tactic(product: Product, gpu: Gpu) -> Tactic:
    """The tactic to use without measuring."""
    return candidate_tactics(product, gpu)[0]


def candidate_tactics(product: Product, gpu: Gpu) -> list[Tactic]:
    """Tactics worth timing, the default first.

    Tiles that fit a multiprocessor; the inner dimension is split until there are about as many programs as multiprocessors,
    once less, once more, and into as many parts as run at once.
    """
    rows, columns, inner, sms = product.rows, product.columns, product.inner, gpu.sm_count
    tile_rows = min(128, max(16, next_power_of_2(rows)))
    room = gpu.shared_bytes * 7 // 8  # the compiler needs some for itself
    tiles = [
        tile for tile in _tiles(tile_rows, product.element_bytes) if _tile_bytes(product, tile_rows, *tile) <= room
    ]
    found = []
    for tile_columns, deep, stages in tiles or [_LEAST_TILE]:
        tile_inner = min(deep, max(16, next_power_of_2(inner)))
        programs = cdiv(columns, tile_columns) * cdiv(rows, tile_rows)
        for parts in _splits(programs, inner, tile_inner, sms):
            prefetch = _prefetch_rows(product, tile_columns, inner // parts)
            found.append(Tactic(tile_rows, tile_columns, tile_inner, parts, _warps(tile_rows), stages, prefetch))
    # The best of the other order last: weights that are widened and many rows want them on the left.
    left = product.element_bytes < product.input_bytes and tile_rows > 32
    if product.input_bytes == 2:
        found = [replace(tactic, swap=left) for tactic in found] + [replace(one, swap=not left) for one in found[:4]]
        found += _tailed_tactics(product, sms, room)
    return list(dict.fromkeys(found))


def _splits(programs: int, inner: int, tile_inner: int, sms: int) -> list[int]:
    """Numbers of splits worth timing for so many programs, the generally good one first."""
    splits = 1
    while programs * splits * 4 <= 3 * sms and inner // (splits * 2) >= 2 * tile_inner:
        splits *= 2
    numbers = [splits, max(1, splits // 2)]
    if programs * 2 * splits <= 3 * sms:
        numbers.append(2 * splits)
    # As many as run at once, for widths that powers of two suit badly: 40 tiles on 132 multiprocessors, 3 splits.
    numbers.append(max(1, sms // programs))
    return [parts for parts in dict.fromkeys(numbers) if parts <= splits or inner // parts >= 2 * tile_inner]


def _tailed_tactics(product: Product, sms: int, room: int) -> list[Tactic]:
    """Tactics of rows in two tiles, 64 and 16 for 72: none where one tile is as small.

    Transposed: a matrix instruction takes 64 columns of the weights and any few rows.
    """
    rows, columns, inner = product.rows, product.columns, product.inner
    tile_rows = next_power_of_2(rows) // 2
    tail = max(16, next_power_of_2(rows - tile_rows)) if tile_rows >= 16 else 0
    if not 32 < rows <= 128 or tile_rows + tail >= next_power_of_2(rows):
        return []
    found = []
    for tile_columns, deep, stages in _TAILED_TILES:
        tile_inner = min(deep, max(16, next_power_of_2(inner)))
        if _tile_bytes(product, tile_rows + tail, tile_columns, tile_inner, stages) > room:
            continue
        for parts in _splits(cdiv(columns, tile_columns), inner, tile_inner, sms):
            prefetch = _prefetch_rows(product, tile_columns, inner // parts)
            warps = 8 if tile_columns > 64 else 4
            found.append(
                Tactic(tile_rows, tile_columns, tile_inner, parts, warps, stages, prefetch, swap=True, tail=tail)
            )
    return found


def _tiles(tile_rows: int, element_bytes: int) -> tuple[tuple[int, int, int], ...]:
    if element_bytes == 1:
        return _SMALL_FP8_TILES if tile_rows <= 32 else _TALL_FP8_TILES
    return _SMALL_TILES if tile_rows <= 32 else _TALL_TILES


def _warps(tile_rows: int) -> int:
    """Four make one matrix instruction of 64 rows; more rows need the registers of eight."""
    return 8 if tile_rows > 64 else 4


def _prefetch_rows(product: Product, tile_columns: int, inner_per_split: int) -> int:
    """Inner rows that make _PREFETCH_BYTES of weights, no more than a program has; a power of two."""
    wanted = _PREFETCH_BYTES // (product.element_bytes * tile_columns * (2 if product.gated else 1))
    return min(wanted, 1 << (max(inner_per_split, 1).bit_length() - 1))


def _inner_per_split(inner: int, tactic: Tactic) -> int:
    """Whole tiles in every split, so that only the last can be ragged."""
    return cdiv(cdiv(inner, tactic.splits), tactic.inner) * tactic.inner


def _linear(
    x: Tensor | Prenormed,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm: tuple[Tensor, float] | None,
    transpose_w: bool,
    gated: bool,
    dtype: torch.dtype | None,
    tactic: Tactic | None,
    scale: Tensor | None,
) -> tuple[Tensor, Prenormed | None]:
    prenormed, x = (x, x.values) if isinstance(x, Prenormed) else (None, x)
    rows, inner = x.shape
    width = weight.shape[0] if transpose_w else weight.shape[1]
    columns = width // 2 if gated else width
    device = x.device
    element_bytes = weight.element_size()
    tactic = tactic or default_tactic(
        Product(rows, columns, inner, gated, element_bytes, x.element_size()), gpu_of(device)
    )
    out = torch.empty((rows, columns), dtype=dtype or x.dtype, device=device)
    inner_per_split = _inner_per_split(inner, tactic)
    splits = cdiv(inner, inner_per_split)
    grid = (cdiv(columns, tactic.columns), splits, cdiv(rows, tactic.height))
    acc_parts = arrivals = out
    if splits > 1:
        elements = tactic.height * tactic.columns * (2 if gated else 1)
        acc_parts = torch.empty((grid[0] * grid[2] * splits, elements), dtype=torch.float32, device=device)
        arrivals = counters(device, grid[0] * grid[2])
    normed = None
    if norm is not None:
        squares = torch.empty((grid[0], rows), dtype=torch.float32, device=device)
        normed = Prenormed(torch.empty_like(out), squares, norm[1])
    num_parts = 0 if prenormed is None else prenormed.squares.shape[0]
    launch(
        _linear_kernel,
        grid,
        *(x, x.stride(0), weight, weight.stride(1 if transpose_w else 0), weight.stride(0 if transpose_w else 1)),
        x if scale is None else scale,
        *(x if bias is None else bias, x if prenormed is None else prenormed.squares, num_parts),
        *(0.0 if prenormed is None else prenormed.eps, x if residual is None else residual, out),
        *((out, out, out) if normed is None or norm is None else (norm[0], normed.values, normed.squares)),
        *(acc_parts, arrivals, rows, columns, inner, inner_per_split, splits),
        SCALED=scale is not None,
        PRENORMED=prenormed is not None,
        BIAS=bias is not None,
        GATED=gated,
        RESIDUAL=residual is not None,
        NORM_NEXT=normed is not None,
        SPLIT=splits > 1,
        EVEN_INNER=inner % tactic.inner == 0,
        EVEN_COLUMNS=columns % tactic.columns == 0,
        INNER_MAJOR=transpose_w,
        ROWS=tactic.rows,
        COLUMNS=tactic.columns,
        INNER=tactic.inner,
        # A tile that fits the registers; more parts take further turns.
        PARTS=min(max(16, 8192 // tactic.rows), next_power_of_2(max(num_parts, 1))),
        LINE=128 // element_bytes,
        SWAP=tactic.swap,
        TAIL=tactic.tail,
        PREFETCH=tactic.prefetch,
        num_warps=tactic.num_warps,
        num_stages=tactic.num_stages,
    )
    return out, normed


def linear(
    x: Tensor | Prenormed,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    transpose_w: bool = False,
    dtype: torch.dtype | None = None,
    tactic: Tactic | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """x @ weight * scale + bias + residual, each part but the product optional.

    Args:
        x: [rows, inner], columns contiguous; a `Prenormed` one is normalised first.
        weight: [inner, columns], or [columns, inner] with transpose_w; contiguous, x's dtype or float8_e4m3fn.
        bias: [columns].
        residual: [rows, columns], contiguous.
        dtype: of the result, x's by default.
        tactic: how to cut the work; None takes default_tactic.
        scale: [columns] float32, of FP8 weights.
    Returns:
        [rows, columns]; sums are made in float32 and rounded once.
    """
    return _linear(x, weight, bias, residual, None, transpose_w, False, dtype, tactic, scale)[0]


def linear_and_norm(
    x: Tensor | Prenormed,
    weight: Tensor,
    residual: Tensor,
    norm: tuple[Tensor, float],
    tactic: Tactic | None = None,
    transpose_w: bool = False,
    scale: Tensor | None = None,
) -> tuple[Tensor, Prenormed]:
    """y = x @ weight + residual, and y on its way through an RMS norm.

    Args:
        x, weight, residual, tactic, transpose_w, scale: see `linear`.
        norm: ([columns] weight, eps) of the norm.
    Returns:
        y [rows, columns], and what the product after the norm takes in place of norm(y).
    """
    out, normed = _linear(x, weight, None, residual, norm, transpose_w, False, None, tactic, scale)
    assert normed is not None
    return out, normed


def gated(
    x: Tensor | Prenormed,
    weight: Tensor,
    tactic: Tactic | None = None,
    transpose_w: bool = False,
    scale: Tensor | None = None,
) -> Tensor:
    """silu(x @ gate) * (x @ up).

    Args:
        x: [rows, inner], columns contiguous; a `Prenormed` one is normalised first.
        weight: [inner, 2 f], or [2 f, inner] with transpose_w, gate first; contiguous, x's dtype or float8_e4m3fn.
        tactic, scale: see `linear`; scale is [2 f].
    Returns:
        [rows, f] in x's dtype.
    """
    return _linear(x, weight, None, None, None, transpose_w, True, None, tactic, scale)[0]
