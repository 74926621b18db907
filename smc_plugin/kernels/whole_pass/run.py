"""What launches the kernel, and when it can."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from smc_plugin.kernels.launch import Gpu, cdiv, gpu_of, launch, next_power_of_2
from smc_plugin.kernels.peers import Peers
from smc_plugin.kernels.rope import AttentionContext
from smc_plugin.kernels.whole_pass.kernel import whole_pass_kernel
from smc_plugin.kernels.whole_pass.products import LINE_ELEMENTS
from smc_plugin.kernels.whole_pass.shape import DecoderShape
from smc_plugin.kernels.whole_pass.weights import STAGE_BYTES, fits, pack, packed_bytes

MAX_ROWS = 16
MAX_CONTEXT = 1024  # tokens; beyond, prompts that sequences share are better read once for all of them
_STAGES = 13
_FLYING = 2  # stages under way at a time
_TOKENS = 16  # of a warp's turn in attention
_MAX_QUERIES = 2
_OTHER_BYTES = 13 << 10  # of shared memory: sums of warps, places of tokens, barriers


def _heads_per_program(batch: int, kv_heads: int, group: int, programs: int) -> int:
    """Query heads that share a KV head and a program: as few as leave no program with two turns."""
    heads = group
    while heads % 2 == 0 and batch * kv_heads * (group // heads) * 2 <= programs:
        heads //= 2
    return heads


class WholePass:
    """A model's forward pass for few rows, as one launch.

    Args:
        shape: the decoder's sizes.
        weights: canonical names to tensors on one device; 16-bit, matrices perhaps FP8. Matrices are held a second time, in
            streaming order.
        ranks: who has the other parts, if the model is one rank's part; they can share memory.
    """

    def __init__(self, shape: DecoderShape, weights: Mapping[str, Tensor], ranks: Peers | None = None) -> None:
        self._shape = shape
        self._device = weights["embed"].device
        self._gpu = gpu_of(self._device)
        self._programs = self._gpu.sm_count
        self._embedding = weights["embed"]
        self._ranks = ranks
        self._rank, self._num_ranks = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        self._exchanges: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self.packed = pack(shape, weights, self._programs)
        size = self.packed.element_size()
        lines = self.packed.view(-1, LINE_ELEMENTS.value)
        block = [STAGE_BYTES // size // LINE_ELEMENTS.value, LINE_ELEMENTS.value]
        self._stream = TensorDescriptor.from_tensor(lines, block, gl.NVMMASharedLayout(0, 8 * size, 2))

        def stacked(name: str) -> Tensor:
            found = [weights.get(f"layers.{layer}.{name}") for layer in range(shape.num_layers)]
            return torch.stack([one for one in found if one is not None]) if found[0] is not None else self._embedding

        self._attn_norms = torch.cat([stacked("attn_norm"), weights["final_norm"][None]])
        self._stacks = [stacked(name) for name in ("mlp_norm", "qkv_bias", "q_norm", "k_norm")]
        self._scales = [stacked(f"{name}_scale") for name in ("qkv", "o", "gate_up", "down")]

    @staticmethod
    def suits(shape: DecoderShape, gpu: Gpu) -> bool:
        """Whether such a model in bfloat16, matrices perhaps FP8, can run so on this GPU at all."""
        return (
            fits(shape)
            and shape.head_dim in (64, 128)
            and shape.group & (shape.group - 1) == 0
            and gpu.capability >= (9, 0)
            and gpu.shared_bytes >= _STAGES * STAGE_BYTES + _OTHER_BYTES
        )

    @staticmethod
    def extra_bytes(shape: DecoderShape, element_bytes: int, gpu: Gpu) -> int:
        """Memory that it takes beside the weights: the matrices again, in streaming order."""
        return packed_bytes(shape, element_bytes, gpu.sm_count)

    def takes(self, batch: int, queries: int, max_context: int) -> bool:
        """Whether it takes a pass of `batch` sequences of `queries` tokens, none longer than `max_context` after it."""
        return (
            queries <= _MAX_QUERIES
            and batch * queries <= MAX_ROWS
            and batch * self._shape.num_kv_heads <= self._programs
            and max_context <= MAX_CONTEXT
        )

    def __call__(self, tokens: Tensor, context: AttentionContext, cache: Tensor) -> Tensor:
        """Run a pass; see PagedModel.forward.

        Args:
            tokens: [B * Q] int64.
            context: of the pass.
            cache: [layers, 2, P, page_size, KV heads, head_dim], contiguous, changed in place.
        Returns:
            [B * Q, hidden] bfloat16 after the final norm.
        """
        shape, programs = self._shape, self._programs
        rows, device = tokens.shape[0], self._device
        batch = rows // context.num_queries
        hidden, units = shape.hidden_size, shape.hidden_size // 16
        residual, out = (torch.empty((rows, hidden), dtype=torch.bfloat16, device=device) for _ in range(2))
        exchange, state, inboxes = self._exchange(rows)
        fp8 = self.packed.element_size() == 1
        launch(
            whole_pass_kernel,
            (programs,),
            *(tokens, self._embedding, context.start, context.offset, context.block_table),
            *(context.block_table.stride(0), context.cos, context.sin, context.slots),
            *(cache, cache.stride(0), cache.stride(1), self._attn_norms, *self._stacks, *self._scales),
            *(self._stream, residual, exchange, out, state, inboxes, self._rank),
            *(shape.num_layers, math.log2(math.e) / math.sqrt(shape.head_dim), shape.rms_eps),
            HIDDEN=hidden,
            FFN=shape.ffn_size,
            KV_HEADS=shape.num_kv_heads,
            GROUP=shape.group,
            HEAD_DIM=shape.head_dim,
            PAGE_SIZE=context.page_size,
            ROWS=rows,
            QUERIES=context.num_queries,
            HEADS=_heads_per_program(batch, shape.num_kv_heads, shape.group, programs),
            BIAS=shape.qkv_bias,
            NORM=shape.qk_norm,
            SCALED=fp8,
            VECTORS=2 if fp8 else 1,
            ELEMENTS=STAGE_BYTES // self.packed.element_size(),
            STAGES=_STAGES,
            FLYING=_FLYING,
            TOKENS=_TOKENS,
            TILES=next_power_of_2(cdiv(context.max_context, 8 * _TOKENS)),
            TILE_PARTS=next_power_of_2(units),
            PROGRAMS=programs,
            RANKS=self._num_ranks,
            num_warps=8,
        )
        return out

    def _exchange(self, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """What programs hand to one another at this number of rows, two sides of it; which side is next; the ranks' inboxes.

        The first call of each number is one that all ranks make together, and outside a capture.
        """
        if rows not in self._exchanges:
            shape = self._shape
            width = 2 * shape.hidden_size + shape.qkv_size + shape.q_size + shape.ffn_size
            block = rows * width + 2 * (shape.hidden_size // 16) * 32
            values = torch.full((2, shape.num_layers + 1, block), -1, dtype=torch.int16, device=self._device)
            state = torch.zeros(2, dtype=torch.int32, device=self._device)
            inboxes = state  # not read
            if self._ranks is not None:
                inboxes = self._ranks.share_words(2 * shape.num_layers * 2 * shape.hidden_size * self._num_ranks * rows)
            self._exchanges[rows] = values.view(torch.bfloat16), state, inboxes
        return self._exchanges[rows]
