"""The residual stream after a sum over ranks: add it, and norm the result, in one launch.

With one rank the products do this themselves (see matmul); a sum over ranks comes between product and norm.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smc_plugin.kernels.launch import launch, let_next_start, next_power_of_2, wait_for_inputs


@triton.jit
def _add_norm_kernel(
    x, x_stride, residual, residual_stride, weight, out, normed, eps, width, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    wait_for_inputs(PDL)
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    valid = column < width
    added = tl.load(x + row * x_stride + column, mask=valid, other=0.0).to(tl.float32)
    added += tl.load(residual + row * residual_stride + column, mask=valid, other=0.0).to(tl.float32)
    stored = added.to(out.dtype.element_ty)
    tl.store(out + row * width + column, stored, mask=valid)
    # Of the rounded values, which is what the residual stream holds.
    wide = stored.to(tl.float32)
    scaled = (wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)).to(stored.dtype)
    tl.store(normed + row * width + column, tl.load(weight + column, mask=valid, other=0.0) * scaled, mask=valid)


def add_and_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = x + residual and y's RMS norm; see the reference.

    Args:
        x, residual: [rows, width], columns contiguous.
        weight: [width]; eps: of the norm.
    Returns:
        y and norm(y), [rows, width] in the residual's dtype.
    """
    rows, width = x.shape
    out, normed = (torch.empty((rows, width), dtype=residual.dtype, device=x.device) for _ in range(2))
    block = next_power_of_2(width)
    launch(
        _add_norm_kernel,
        (rows,),
        *(x, x.stride(0), residual, residual.stride(0), weight, out, normed, eps, width),
        BLOCK=block,
        num_warps=8 if block >= 2048 else 4,
    )
    return out, normed
