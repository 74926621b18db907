"""Skinny matrix products and how they are cut into programs; plain data, so that manifests can hold it without triton."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Product:
    """What a tactic is chosen for: [rows, inner] times [inner, columns], or twice as many columns when gated.

    element_bytes is that of the weights, input_bytes that of what they are multiplied with.
    """

    rows: int
    columns: int
    inner: int
    gated: bool = False
    element_bytes: int = 2
    input_bytes: int = 2


@dataclass(frozen=True)
class Tactic:
    """How a product is cut into programs.

    Args:
        rows, columns, inner: the tile; powers of two, at least 16.
        splits: parts of the inner dimension.
        num_warps, num_stages: of a program.
        prefetch: inner rows of its own weights that a program asks for before it waits; a power of two, or 0.
        swap: compute the transposed product, weights on the left.
        tail: rows beyond `rows` that a program multiplies with the same weights; a power of two, at least 16, or 0. 72 rows are
            64 and 16 of them, where a tile alone would be 128.
    """

    rows: int
    columns: int
    inner: int
    splits: int
    num_warps: int
    num_stages: int
    prefetch: int = 0
    swap: bool = False
    tail: int = 0

    def __post_init__(self) -> None:
        least = {"prefetch": 0, "tail": 0}
        for name in ("rows", "columns", "inner", "splits", "num_warps", "num_stages", "prefetch", "tail"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least.get(name, 1):
                raise ValueError(f"{name} of a tactic is {value!r}, expected a whole number from {least.get(name, 1)}")

    @property
    def height(self) -> int:
        """Rows of a program."""
        return self.rows + self.tail
