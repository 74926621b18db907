"""What launches the kernel, and when it can."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from smc_plugin.kernels.launch import Gpu, cdiv, gpu_of, is_recording, launch, next_power_of_2, refuse_first_in_capture
from smc_plugin.kernels.peers import Peers
from smc_plugin.kernels.rope import AttentionContext
from smc_plugin.kernels.whole_pass.attention import STRETCHES
from smc_plugin.kernels.whole_pass.kernel import whole_pass_kernel
from smc_plugin.kernels.whole_pass.products import LINE_ELEMENTS
from smc_plugin.kernels.whole_pass.shape import DecoderShape
from smc_plugin.kernels.whole_pass.weights import STAGE_BYTES, fits, pack, packed_bytes

MAX_ROWS = 16
MAX_CONTEXT = 1024  # tokens; beyond, prompts that sequences share are better read once for all of them
_MAX_STAGES, _MIN_STAGES = 13, 4  # of the ring; more than 13 fit no GPU, fewer than 4 leave nothing ahead
_FLYING = 2  # stages under way at a time
_TOKENS = 4  # of a stretch's turn in attention
# Of MAX_CONTEXT whatever a pass's own bound is, so that one kernel serves all of them: a tile costs 512 bytes.
_TILES = next_power_of_2(cdiv(MAX_CONTEXT, STRETCHES.value * _TOKENS))
_MAX_QUERIES = 2
_STATE_WORDS = 2  # which side is next, and how many programs have left


def _heads_per_program(batch: int, kv_heads: int, group: int, programs: int) -> int:
    """Query heads that share a KV head and a program: as few as leave no program with two turns."""
    heads = group
    while heads % 2 == 0 and batch * kv_heads * (group // heads) * 2 <= programs:
        heads //= 2
    return heads


def shared_bytes(shape: DecoderShape, batch: int, queries: int, programs: int, stages: int) -> int:
    """Shared memory that a program takes, in bytes, as the compiler lays it out.

    Args:
        shape: the decoder's sizes.
        batch, queries: sequences of the pass, and new tokens of each.
        programs: of the launch.
        stages: of the ring.
    """
    heads = _heads_per_program(batch, shape.num_kv_heads, shape.group, programs)
    barriers = 2 * 8 * stages + 8 * (stages % 2)  # full and empty; each begins at 16 bytes
    places = 4 * _TILES * STRETCHES.value * _TOKENS
    # Sums over the warps: of a product's [16, 8], and of attention's [heads, head_dim], never both at once; float32.
    sums = max(16 * 8, heads * queries * shape.head_dim) * 8 * 4
    return stages * STAGE_BYTES + barriers + places + sums + 4  # 4: what the copying warp is told to do


def stages_that_fit(shape: DecoderShape, batch: int, queries: int, gpu: Gpu) -> int:
    """Stages of the largest ring that a pass has room for; 0 where it would be too small to stream."""
    for stages in range(_MAX_STAGES, _MIN_STAGES - 1, -1):
        if shared_bytes(shape, batch, queries, gpu.sm_count, stages) <= gpu.shared_bytes:
            return stages
    return 0


def _values_shape(shape: DecoderShape, rows: int) -> tuple[int, int, int]:
    """Of what programs hand to one another, 16 bits each: two sides, layers and what comes in, and a layer's values."""
    width = 2 * shape.hidden_size + shape.qkv_size + shape.q_size + shape.ffn_size
    return 2, shape.num_layers + 1, rows * width + 2 * (shape.hidden_size // 16) * 32


def _inbox_words(shape: DecoderShape, rows: int, num_ranks: int) -> int:
    """32-bit words of a rank's inbox: two sides, two products a layer, and a part of every rank."""
    return 2 * shape.num_layers * 2 * shape.hidden_size * num_ranks * rows if num_ranks > 1 else 0


class WholePass:
    """A model's forward pass for few rows, as one launch.

    Args:
        shape: the decoder's sizes.
        weights: canonical names to tensors on one device; 16-bit, matrices perhaps FP8. Matrices are held a second time, in
            streaming order.
        ranks: who has the other parts, if the model is one rank's part; they can share memory.
        gpu: what to cut the work for, no larger than the GPU that the weights are on; None takes that one.
    """

    def __init__(
        self,
        shape: DecoderShape,
        weights: Mapping[str, Tensor],
        ranks: Peers | None = None,
        gpu: Gpu | None = None,
    ) -> None:
        self._shape = shape
        self._device = weights["embed"].device
        self._gpu = gpu or gpu_of(self._device)
        self._programs = self._gpu.sm_count
        self._embedding = weights["embed"]
        self._ranks = ranks
        self._rank, self._num_ranks = (0, 1) if ranks is None else (ranks.rank, ranks.size)
        self._values: dict[int, tuple[Tensor, Tensor]] = {}  # by number of rows, as are the inboxes
        self._inboxes: dict[int, Tensor] = {}
        self._ran: set[tuple[int, int, int, torch.dtype]] = set()
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
            and stages_that_fit(shape, 1, 1, gpu) > 0
        )

    @staticmethod
    def extra_bytes(
        shape: DecoderShape, element_bytes: int, gpu: Gpu, rows: Iterable[int] = (), num_ranks: int = 1
    ) -> int:
        """Memory that it takes beside the weights: the matrices again, in streaming order, and what passes exchange.

        Args:
            shape: the decoder's sizes, of one rank's part where there are several.
            element_bytes: of a matrix's element; 1 comes with scales.
            gpu: that it runs on.
            rows: what `prepare` is called with.
            num_ranks: that share the model.
        """
        layers, hidden = shape.num_layers, shape.hidden_size
        norms = (2 * layers + 1) * hidden + 2 * layers * shape.head_dim * shape.qk_norm
        biases = layers * shape.qkv_size * shape.qkv_bias
        scales = layers * (shape.qkv_size + 2 * hidden + 2 * shape.ffn_size) if element_bytes == 1 else 0
        exchanged = sum(
            2 * math.prod(_values_shape(shape, count)) + 4 * _STATE_WORDS + 4 * _inbox_words(shape, count, num_ranks)
            for count in set(rows)
        )
        return packed_bytes(shape, element_bytes, gpu.sm_count) + 2 * (norms + biases) + 4 * scales + exchanged

    @property
    def held_bytes(self) -> int:
        """Memory that it has taken so far; see extra_bytes."""
        own = [self.packed, self._attn_norms, *self._stacks, *self._scales, *itertools.chain(*self._values.values())]
        inboxes = sum(4 * _inbox_words(self._shape, count, self._num_ranks) for count in self._inboxes)
        return sum(tensor.nbytes for tensor in own if tensor is not self._embedding) + inboxes

    def takes(self, batch: int, queries: int, max_context: int) -> bool:
        """Whether it takes a pass of `batch` sequences of `queries` tokens, none longer than `max_context` after it."""
        return (
            queries <= _MAX_QUERIES
            and batch * queries <= MAX_ROWS
            and batch * self._shape.num_kv_heads <= self._programs
            and max_context <= MAX_CONTEXT
            and stages_that_fit(self._shape, batch, queries, self._gpu) > 0
        )

    def __call__(self, tokens: Tensor, context: AttentionContext, cache: Tensor) -> Tensor:
        """Run a pass; see PagedModel.forward.

        Args:
            tokens: [B * Q] int64.
            context: of the pass.
            cache: [layers, 2, P, page_size, KV heads, head_dim], contiguous, changed in place.
        Returns:
            [B * Q, hidden] bfloat16 after the final norm.
        Raises:
            ConfigError: it is captured before such a pass ever ran.
        """
        shape, programs = self._shape, self._programs
        rows, device = tokens.shape[0], self._device
        batch = rows // context.num_queries
        hidden, units = shape.hidden_size, shape.hidden_size // 16
        kind = rows, context.num_queries, context.page_size, cache.dtype
        if kind not in self._ran:
            refuse_first_in_capture(device)
        if rows not in self._inboxes:
            self.prepare([rows])
        (exchange, state), inboxes = self._values[rows], self._inboxes[rows]
        residual, out = (torch.empty((rows, hidden), dtype=torch.bfloat16, device=device) for _ in range(2))
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
            STAGES=stages_that_fit(shape, batch, context.num_queries, self._gpu),
            FLYING=_FLYING,
            TOKENS=_TOKENS,
            TILES=_TILES,
            TILE_PARTS=next_power_of_2(units),
            PROGRAMS=programs,
            RANKS=self._num_ranks,
            num_warps=8,
        )
        if not is_recording():
            self._ran.add(kind)
        return out

    def _reserve(self, rows: Iterable[int]) -> None:
        """Take this GPU's own memory for passes of these numbers of rows."""
        for count in set(rows) - self._values.keys():
            values = torch.full(_values_shape(self._shape, count), -1, dtype=torch.int16, device=self._device)
            state = torch.zeros(_STATE_WORDS, dtype=torch.int32, device=self._device)
            self._values[count] = values.view(torch.bfloat16), state

    def prepare(self, rows: Iterable[int]) -> None:
        """Make what passes of these numbers of rows need; others are prepared by their first call.

        All ranks call this together with the same numbers, and so they make the first call of another number.

        Raises:
            RankError: some rank has no room; of a single process torch.OutOfMemoryError.
        """
        missing = sorted(set(rows) - self._inboxes.keys())
        if not missing:
            return
        if self._ranks is None:
            self._reserve(missing)
            self._inboxes |= {count: self._values[count][1] for count in missing}  # not read
            return
        words = [_inbox_words(self._shape, count, self._num_ranks) for count in missing]
        addresses = self._ranks.share_words(sum(words), lambda: self._reserve(missing))
        for count, before in zip(missing, itertools.accumulate(words, initial=0), strict=False):
            self._inboxes[count] = addresses + 4 * before
