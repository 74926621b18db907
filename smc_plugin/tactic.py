"""How a skinny matrix product is cut into programs; plain data, so that manifests can hold it without triton."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tactic:
    """How a product is cut into programs.

    Args:
        rows, columns, inner: the tile; powers of two, at least 16.
        splits: parts of the inner dimension.
        num_warps, num_stages: of a program.
        prefetch: inner rows at the start of each split that the launch before asks for when its own weights are read,
            so that the memory is busy between the two.
    """

    rows: int
    columns: int
    inner: int
    splits: int
    num_warps: int
    num_stages: int
    prefetch: int = 0
