"""The residual stream after a sum over ranks: add it, and norm the result."""

from __future__ import annotations

import torch
from torch import Tensor


def add_and_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = x + residual, rounded to the stream's dtype, and y's RMS norm.

    Args:
        x, residual: [rows, width].
        weight: [width]; eps: of the norm.
    Returns:
        y and norm(y), [rows, width] in the residual's dtype.
    """
    y = x + residual
    wide = y.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return y, weight * normed.to(y.dtype)
