"""Skinny matrix products that stream the weights once, with what surrounds them fused in.

    linear:   [RMS norm of x] @ w [+ bias] [+ residual]
    gated:    [RMS norm of x] @ (gate | up), then silu(gate) * up: [rows, inner] to [rows, f]
    rms_norm: the norm alone

The rows are few (a draft step has 8, a score pass 72), so the time is that of reading the weights: tiles of w go through
shared memory, products accumulate in float32. The norm's weight scales x's tile, its 1/rms scales the
accumulator at the end: no pass over x beforehand. Narrow matrices are split over the inner dimension too; the last
program to finish a tile sums the parts in order, so results do not depend on timing. Under programmatic dependent launch a
program asks for its first weights before it waits for the kernel that makes x.

Example: Llama-1B's o projection, 8 rows, 2048 -> 2048, is 64 column tiles of 32 times 4 splits = 256 programs, each of
which streams 512 * 32 weights (32 kB).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

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

_MAX_FUSED_NORM_ROWS = 32  # beyond, normalising x again in every column tile costs more than a launch
_SHARED_BYTES = 200 * 1024  # what a program may take on Hopper, with some room


@dataclass(frozen=True)
class Tactic:
    """How a product is cut into programs.

    Args:
        rows, columns, inner: the tile; powers of two, at least 16.
        splits: parts of the inner dimension.
        num_warps, num_stages: of a program.
        fuse_norm: normalise inside the product rather than in a launch before it.
    """

    rows: int
    columns: int
    inner: int
    splits: int
    num_warps: int
    num_stages: int
    fuse_norm: bool


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
    weight, inner_stride, column_stride, start, column, inner, columns, INNER_MAJOR: tl.constexpr, LINES: tl.constexpr
):
    """Ask for the first part of a program's weights, a line of 128 bytes (64 elements) a pointer."""
    if INNER_MAJOR:
        # w is stored [columns, inner]: two lines along the inner dimension for each of 64 columns.
        line = tl.arange(0, LINES)
        at = tl.minimum(column + line % 64, columns - 1).to(tl.int64) * column_stride
        _prefetch(weight + at + tl.minimum(start + line // 64 * 64, inner - 1))
    else:
        line = tl.arange(0, LINES)
        at = tl.minimum(start + line, inner - 1).to(tl.int64) * inner_stride
        _prefetch(weight + at + column)


@triton.jit
def _load_weights(pointers, is_inner, is_column, EVEN_INNER: tl.constexpr, EVEN_COLUMNS: tl.constexpr):
    """A tile of weights, read once, so not worth its place in the L2 cache (a hint that plain loads carry)."""
    if EVEN_INNER and EVEN_COLUMNS:
        return tl.load(pointers, eviction_policy="evict_first")
    inside = is_inner[:, None] & is_column[None, :]
    return tl.load(pointers, mask=inside, other=0.0, eviction_policy="evict_first")


@triton.jit
def _linear_kernel(  # noqa: PLR0912, PLR0915 - the branches are variants decided at compile time
    x,
    x_stride,
    weight,
    inner_stride,
    column_stride,
    bias,
    norm_weight,
    residual,
    out,
    acc_parts,
    square_parts,
    arrivals,
    eps,
    num_rows,
    columns,
    inner,
    inner_per_split,
    num_splits,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    GATED: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN_INNER: tl.constexpr,
    EVEN_COLUMNS: tl.constexpr,
    INNER_MAJOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PDL: tl.constexpr,
):
    column_tile, split, row_tile = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start = split * inner_per_split
    stop = tl.minimum(start + inner_per_split, inner)
    let_next_start(PDL)
    if PDL:
        _prefetch_weights(
            weight, inner_stride, column_stride, start, column_tile * COLUMNS, inner, columns, INNER_MAJOR, 256
        )
    wait_for_inputs(PDL)
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = row < num_rows, column < columns
    source = column.to(tl.int64) * column_stride
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    up_acc = acc
    # Summed over the tile after the loop: a reduction in every turn would stop the stream of weights.
    square_tile = tl.zeros([ROWS, INNER], tl.float32)
    ahead = start + tl.arange(0, INNER)
    scale = tl.load(norm_weight + ahead, mask=ahead < stop, other=0.0) if NORM else 0.0
    for at in range(start, stop, INNER):
        k = at + tl.arange(0, INNER)
        x_at = x + row.to(tl.int64)[:, None] * x_stride + k[None, :]
        w_at = weight + k.to(tl.int64)[:, None] * inner_stride + source[None, :]
        # Only what can be ragged is masked: a mask costs the loop more than the load.
        if EVEN_INNER:
            tile = tl.load(x_at, mask=is_row[:, None], other=0.0)
        else:
            tile = tl.load(x_at, mask=is_row[:, None] & (k < stop)[None, :], other=0.0)
        w = _load_weights(w_at, k < stop, is_column, EVEN_INNER, EVEN_COLUMNS)
        if NORM:
            wide = tile.to(tl.float32)
            square_tile += wide * wide
            tile = tile * scale[None, :]
            # For the next turn: such a narrow load is not pipelined, and its latency would show in every turn.
            scale = tl.load(norm_weight + k + INNER, mask=k + INNER < stop, other=0.0)
        acc = tl.dot(tile, w, acc, input_precision="ieee")
        if GATED:
            up_at = w_at + columns * column_stride
            up = _load_weights(up_at, k < stop, is_column, EVEN_INNER, EVEN_COLUMNS)
            up_acc = tl.dot(tile, up, up_acc, input_precision="ieee")

    squares = tl.sum(square_tile, axis=1)
    writes = True
    if SPLIT:
        MATRICES: tl.constexpr = 2 if GATED else 1
        tile_index = row_tile * tl.num_programs(0) + column_tile
        own = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        first = tile_index.to(tl.int64) * num_splits
        part = acc_parts + (first + split) * MATRICES * ROWS * COLUMNS + own
        tl.store(part, acc)
        if GATED:
            tl.store(part + ROWS * COLUMNS, up_acc)
        if NORM:
            tl.store(square_parts + (first + split) * ROWS + tl.arange(0, ROWS), squares)
        writes = is_last_arrival(arrivals + tile_index, num_splits)
        if writes:
            acc = tl.zeros([ROWS, COLUMNS], tl.float32)
            up_acc = tl.zeros([ROWS, COLUMNS], tl.float32)
            squares = tl.zeros([ROWS], tl.float32)
            for other in range(num_splits):
                # .cg: other programs wrote these while this one ran; its first-level cache may not know.
                part = acc_parts + (first + other) * MATRICES * ROWS * COLUMNS + own
                acc += tl.load(part, cache_modifier=".cg")
                if GATED:
                    up_acc += tl.load(part + ROWS * COLUMNS, cache_modifier=".cg")
                if NORM:
                    squares += tl.load(square_parts + (first + other) * ROWS + tl.arange(0, ROWS), cache_modifier=".cg")
    if writes:
        if NORM:
            per_row = tl.rsqrt(squares / inner + eps)[:, None]
            acc = acc * per_row
            up_acc = up_acc * per_row
        if BIAS:
            acc += tl.load(bias + column, mask=is_column, other=0.0).to(tl.float32)[None, :]
        if GATED:
            acc = acc / (1.0 + tl.exp(-acc)) * up_acc
        place = row.to(tl.int64)[:, None] * columns + column[None, :]
        inside = is_row[:, None] & is_column[None, :]
        if RESIDUAL:
            acc += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


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
    let_next_start(PDL)
    wait_for_inputs(PDL)
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


def _tile_bytes(columns: int, inner: int, rows: int, gated: bool, stages: int) -> int:
    """Shared memory of a program's 16-bit tiles."""
    return 2 * stages * inner * (columns * (2 if gated else 1) + rows)


def default_tactic(rows: int, columns: int, inner: int, gated: bool, sms: int) -> Tactic:
    """A tactic that fits without measuring: about two programs a multiprocessor, tiles of 64 to 128 inner elements.

    Args:
        rows: of x.
        columns: of the result.
        inner: of both.
        gated: two weight tiles a program.
        sms: multiprocessors.
    """
    tile_rows = min(128, max(16, next_power_of_2(rows)))
    small = tile_rows <= 32
    tile_columns = 32 if small and (gated or columns < 64 * sms) else 64
    tile_inner = min(128 if small else 64, max(16, next_power_of_2(inner)))
    programs = cdiv(columns, tile_columns) * cdiv(rows, tile_rows)
    splits = 1
    while programs * splits * 2 <= 3 * sms and inner // (splits * 2) >= 2 * tile_inner:
        splits *= 2
    return Tactic(tile_rows, tile_columns, tile_inner, splits, 4, 4, fuse_norm=rows <= _MAX_FUSED_NORM_ROWS)


def candidate_tactics(rows: int, columns: int, inner: int, gated: bool, sms: int) -> list[Tactic]:
    """Tactics worth timing on a GPU, the default first.

    Args:
        rows, columns, inner, gated, sms: see default_tactic.
    """
    default = default_tactic(rows, columns, inner, gated, sms)
    found = {default: None}
    for tile_columns, tile_inner, splits, stages in itertools.product(
        (32, 64, 128), (64, 128), (1, 2, 4, 8), (3, 4, 5)
    ):
        programs = cdiv(columns, tile_columns) * cdiv(rows, default.rows) * splits
        fits = _tile_bytes(tile_columns, tile_inner, default.rows, gated, stages) <= _SHARED_BYTES
        fills = sms <= 2 * programs and (splits == 1 or programs <= 6 * sms)
        if fits and fills and inner // splits >= 2 * tile_inner:
            warps = 8 if default.rows * tile_columns >= 128 * 128 else 4
            found[Tactic(default.rows, tile_columns, tile_inner, splits, warps, stages, default.fuse_norm)] = None
    return list(found)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, float] | None,
    residual: Tensor | None,
    transpose_w: bool,
    gated: bool,
    dtype: torch.dtype | None,
    tactic: Tactic | None,
) -> Tensor:
    rows, inner = x.shape
    width = weight.shape[0] if transpose_w else weight.shape[1]
    columns = width // 2 if gated else width
    device = x.device
    tactic = tactic or default_tactic(rows, columns, inner, gated, sm_count(device))
    if norm is not None and not tactic.fuse_norm:
        x, norm = rms_norm(x, *norm), None
    out = torch.empty((rows, columns), dtype=dtype or x.dtype, device=device)
    # Whole tiles in every split, so that only the last can be ragged.
    inner_per_split = cdiv(cdiv(inner, tactic.splits), tactic.inner) * tactic.inner
    splits = cdiv(inner, inner_per_split)
    grid = (cdiv(columns, tactic.columns), splits, cdiv(rows, tactic.rows))
    acc_parts = square_parts = arrivals = out
    if splits > 1:
        parts = grid[0] * grid[2] * splits
        elements = tactic.rows * tactic.columns * (2 if gated else 1)
        acc_parts = torch.empty((parts, elements), dtype=torch.float32, device=device)
        square_parts = torch.empty((parts, tactic.rows), dtype=torch.float32, device=device)
        arrivals = counters(device, grid[0] * grid[2])
    launch(
        _linear_kernel,
        grid,
        *(x, x.stride(0), weight, weight.stride(1 if transpose_w else 0), weight.stride(0 if transpose_w else 1)),
        *(x if bias is None else bias, x if norm is None else norm[0], x if residual is None else residual, out),
        *(acc_parts, square_parts, arrivals, 0.0 if norm is None else norm[1]),
        *(rows, columns, inner, inner_per_split, splits),
        NORM=norm is not None,
        BIAS=bias is not None,
        GATED=gated,
        RESIDUAL=residual is not None,
        SPLIT=splits > 1,
        EVEN_INNER=inner % tactic.inner == 0,
        EVEN_COLUMNS=columns % tactic.columns == 0,
        INNER_MAJOR=transpose_w,
        ROWS=tactic.rows,
        COLUMNS=tactic.columns,
        INNER=tactic.inner,
        num_warps=tactic.num_warps,
        num_stages=tactic.num_stages,
    )
    return out


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    transpose_w: bool = False,
    dtype: torch.dtype | None = None,
    tactic: Tactic | None = None,
) -> Tensor:
    """rms_norm(x) @ weight + bias + residual, each part but the product optional.

    Args:
        x: [rows, inner], columns contiguous.
        weight: [inner, columns], or [columns, inner] with transpose_w; contiguous, x's dtype.
        bias: [columns].
        norm: ([inner] weight, eps).
        residual: [rows, columns], contiguous.
        dtype: of the result, x's by default.
        tactic: how to cut the work; None takes default_tactic.
    Returns:
        [rows, columns]; sums are made in float32 and rounded once.
    """
    return _linear(x, weight, bias, norm, residual, transpose_w, False, dtype, tactic)


def gated(x: Tensor, weight: Tensor, norm: tuple[Tensor, float] | None = None, tactic: Tactic | None = None) -> Tensor:
    """silu(h @ gate) * (h @ up) with h = rms_norm(x) or x.

    Args:
        x: [rows, inner], columns contiguous.
        weight: [inner, 2 f], gate first; contiguous, x's dtype.
        norm: ([inner] weight, eps).
        tactic: how to cut the work; None takes default_tactic.
    Returns:
        [rows, f] in x's dtype.
    """
    return _linear(x, weight, None, norm, None, False, True, None, tactic)
