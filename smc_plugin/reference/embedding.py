"""From tokens to the first rows of the residual stream."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def embed(tokens: Tensor, table: Tensor) -> Tensor:
    """Look tokens up.

    Args:
        tokens: [R] int64.
        table: [V, hidden].
    Returns:
        [R, hidden].
    """
    return functional.embedding(tokens, table)
