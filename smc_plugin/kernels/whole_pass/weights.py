"""The order of weights in which a pass streams them: for each program and layer, stage after stage, 16 kB each.

A stage is what a program multiplies at a time: 8 columns, or 8 and 8 of them, by a stretch of the inner dimension, an eighth of
it for each of 8 warps. Columns are dealt to the programs in turn, so that all have as many, or one unit less:

    qkv       units of 8 columns
    o, down   units of 16 columns
    gate/up   units of 8 gate columns and the 8 up columns that they meet

Within a stage a thread's operands lie side by side, 16 bytes for each load: 8 warps, steps of the inner dimension, 8 columns,
4 quarters of a step, and in a quarter 8 inner elements (twice 8 where a weight is one byte). Inner dimensions are padded with
zeros to whole stages.

Example: Llama-1B in bfloat16 on 132 multiprocessors: a stage of qkv is 8 columns by 1024 inner elements; program 0 has 3 of 384
units of qkv, so 6 stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from smc_plugin.kernels.launch import cdiv
from smc_plugin.kernels.whole_pass.shape import DecoderShape

STAGE_BYTES = 16384
_WARPS, _COLUMNS, _QUARTERS, _ELEMENTS = 8, 8, 4, 8


@dataclass(frozen=True)
class StreamedProduct:
    """How one product is cut.

    Args:
        inner: elements of the inner dimension.
        halves: tiles of 8 columns in a unit, 1 or 2.
        units: of all programs.
        chunks: stages that a unit takes.
        depth: inner elements of a stage.
    """

    inner: int
    halves: int
    units: int
    chunks: int
    depth: int


@dataclass(frozen=True)
class Streams:
    """How a model's products are cut for a number of programs and a number of bytes a weight."""

    programs: int
    element_bytes: int
    qkv: StreamedProduct
    o: StreamedProduct
    gate_up: StreamedProduct
    down: StreamedProduct

    @classmethod
    def of(cls, shape: DecoderShape, programs: int, element_bytes: int) -> Streams:
        """Cut a model's products."""

        def product(inner: int, columns: int, halves: int) -> StreamedProduct:
            depth = STAGE_BYTES // (element_bytes * _COLUMNS * halves)
            return StreamedProduct(inner, halves, columns // (_COLUMNS * halves), cdiv(inner, depth), depth)

        return cls(
            programs,
            element_bytes,
            product(shape.hidden_size, shape.qkv_size, 1),
            product(shape.q_size, shape.hidden_size, 2),
            product(shape.hidden_size, 2 * shape.ffn_size, 2),
            product(shape.ffn_size, shape.hidden_size, 2),
        )

    @property
    def products(self) -> dict[str, StreamedProduct]:
        """By the weights' names, in the order of a layer."""
        return {"qkv": self.qkv, "o": self.o, "gate_up": self.gate_up, "down": self.down}

    @property
    def stage_elements(self) -> int:
        """Weights in a stage."""
        return STAGE_BYTES // self.element_bytes

    def units_of(self, product: StreamedProduct, program: int) -> int:
        """Units that a program has."""
        return max(0, cdiv(product.units - program, self.programs)) if product.units > program else 0

    @property
    def most_stages(self) -> int:
        """Stages that program 0, which has the most, takes for a layer."""
        return sum(self.units_of(product, 0) * product.chunks for product in self.products.values())


def fits(shape: DecoderShape) -> bool:
    """Whether a model's columns come in whole units, and its rows in 32 columns."""
    return all(size % 32 == 0 for size in (shape.hidden_size, shape.q_size, shape.ffn_size)) and shape.qkv_size % 8 == 0


def packed_bytes(shape: DecoderShape, element_bytes: int, programs: int) -> int:
    """Bytes of what `pack` returns."""
    return shape.num_layers * Streams.of(shape, programs, element_bytes).most_stages * programs * STAGE_BYTES


def pack(shape: DecoderShape, weights: Mapping[str, Tensor], programs: int) -> Tensor:
    """All layers' matrices in streaming order.

    Args:
        shape: the decoder's shapes, for which `fits` holds.
        weights: canonical names to tensors; matrices [inner, columns] in 16 bits, or FP8 [columns, inner].
        programs: of the launch.
    Returns:
        [layers * most_stages, programs, stage elements] in the matrices' dtype; a program's stages follow one another with no
        gap between layers, and what is left at the end is 0. What all programs ask for at one time lies side by side,
        which spreads it over the memory's channels.
    """
    some = weights["layers.0.qkv"]
    streams = Streams.of(shape, programs, some.element_size())
    size = streams.stage_elements
    packed = torch.zeros((shape.num_layers * streams.most_stages, programs, size), dtype=some.dtype, device=some.device)
    filled = [0] * programs
    for layer in range(shape.num_layers):
        for name, product in streams.products.items():
            stages = _stages(weights[f"layers.{layer}.{name}"], product, name == "gate_up")
            for program in range(programs):
                own = stages[program::programs].reshape(-1, size)
                packed[filled[program] : filled[program] + own.shape[0], program] = own
                filled[program] += own.shape[0]
    return packed


def _stages(matrix: Tensor, product: StreamedProduct, gated: bool) -> Tensor:
    """[units, elements of a unit's stages] of one matrix."""
    columns = matrix if matrix.element_size() == 1 else matrix.T
    # Bytes move the same whatever they mean, and torch pads and permutes few operations' worth of FP8.
    if columns.element_size() == 1:
        return _ordered(columns.view(torch.uint8), product, gated, 2).view(matrix.dtype)
    return _ordered(columns, product, gated, 1)


def _ordered(columns: Tensor, product: StreamedProduct, gated: bool, vectors: int) -> Tensor:
    if gated:
        columns = columns.reshape(2, product.units, _COLUMNS, product.inner).transpose(0, 1)
    columns = columns.reshape(product.units, product.halves, _COLUMNS, product.inner)
    columns = torch.nn.functional.pad(columns, (0, product.chunks * product.depth - product.inner))
    steps = product.depth // (_WARPS * vectors * _QUARTERS * _ELEMENTS)
    tiles = columns.reshape(
        *(product.units, product.halves, _COLUMNS, product.chunks, _WARPS, steps, vectors, _QUARTERS, _ELEMENTS)
    )
    # unit, chunk, half, warp, step, column, quarter, vector, element
    return tiles.permute(0, 3, 1, 4, 5, 2, 7, 6, 8).reshape(product.units, -1)
