"""The products of a pass: weights stream through a ring in shared memory, a warp multiplies an eighth of the inner dimension.

The ring is filled by one warp of its own with bulk copies, whatever the others wait for. No more than two stages are under
way at a time: with more, the memory is no faster, and what other programs have to say queues up behind them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from smc_plugin.kernels.whole_pass.exchange import (
    SUM,
    await_words,
    last_units,
    place_of,
    publish,
    settled,
    sum_over_ranks,
)

LINE_ELEMENTS = gl.constexpr(256)  # of a line of the stream; a copy takes whole lines
# Matrix instructions: a warp for each eighth of the inner dimension, 16 rows, 8 columns. With 8 inner elements a thread
# at a time, operands are vectors of 16 bytes.
MMA = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [8, 1, 1], [1, 16, 8]))
_LEFT = gl.constexpr(gl.DotOperandLayout(0, gl.NVMMADistributedLayout([2, 0], [8, 1, 1], [1, 16, 8]), 8))
_RIGHT = gl.constexpr(gl.DotOperandLayout(1, gl.NVMMADistributedLayout([2, 0], [8, 1, 1], [1, 16, 8]), 8))
# The warps' sums side by side in a thread; their total is in exchange.SUM.
_SUMS = gl.constexpr(gl.BlockedLayout([8, 1, 1], [1, 4, 8], [1, 8, 1], [2, 1, 0]))
_LEAD = gl.constexpr(4)  # stretches multiplied while those waited for are on their way
LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
_TILE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [5, 4, 3, 2, 1, 0]))


@gluon.constexpr_function
def _fragment(steps, vectors):
    """Registers, lanes and warps of a tile [warp, step, column, quarter, vector, element] as the matrix unit wants it."""
    registers = [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 2], [0, 0, 0, 0, 0, 4]]
    if vectors == 2:
        registers.append([0, 0, 0, 0, 1, 0])
    step = 1
    while step < steps:
        registers.append([0, step, 0, 0, 0, 0])
        step *= 2
    lanes = [[0, 0, 0, 1, 0, 0], [0, 0, 0, 2, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 2, 0, 0, 0], [0, 0, 4, 0, 0, 0]]
    warps = [[1, 0, 0, 0, 0, 0], [2, 0, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [8, steps, 8, 4, vectors, 8])


@gluon.jit
def _widened(w):
    """FP8 weights as bfloat16; see matmul._widened."""
    if w.dtype == gl.float8e4nv:
        return gl.inline_asm_elementwise(
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
            dtype=gl.bfloat16,
            is_pure=True,
            pack=4,
        )
    else:
        return w


@gluon.jit
def stages_a_layer(program, HIDDEN: gl.constexpr, FFN: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
                    HEAD_DIM: gl.constexpr, ELEMENTS: gl.constexpr, PROGRAMS: gl.constexpr):  # fmt: skip
    """Stages of a program for each layer, as `pack` has them."""
    NARROW: gl.constexpr = ELEMENTS // 8
    WIDE: gl.constexpr = ELEMENTS // 16
    ATTN: gl.constexpr = GROUP * KV_HEADS * HEAD_DIM
    QKV: gl.constexpr = (GROUP + 2) * KV_HEADS * HEAD_DIM
    qkv_units = (QKV // 8 - program + PROGRAMS - 1) // PROGRAMS
    own_units = (HIDDEN // 16 - program + PROGRAMS - 1) // PROGRAMS
    gate_units = (FFN // 8 - program + PROGRAMS - 1) // PROGRAMS
    own_chunks: gl.constexpr = (ATTN + WIDE - 1) // WIDE + (FFN + WIDE - 1) // WIDE
    return (
        qkv_units * ((HIDDEN + NARROW - 1) // NARROW)
        + own_units * own_chunks
        + gate_units * ((HIDDEN + WIDE - 1) // WIDE)
    )


@gluon.jit
def stream_weights(
    stream, ring, full, empty, program, total,
    PROGRAMS: gl.constexpr, LINES: gl.constexpr, STAGES: gl.constexpr, FLYING: gl.constexpr,
):  # fmt: skip
    """Ask for all stages in turn, each when its place is free and no more than FLYING are on their way."""
    for stage in range(total):
        place = stage % STAGES
        mbarrier.wait(empty.index(place), ((stage // STAGES) & 1) ^ 1)
        early = gl.maximum(stage - FLYING, 0)
        mbarrier.wait(full.index(early % STAGES), (early // STAGES) & 1, pred=stage >= FLYING)
        mbarrier.expect(full.index(place), stream.block_type.nbytes)
        line = (stage * PROGRAMS + program) * LINES
        tma.async_copy_global_to_shared(stream, [line, 0], full.index(place), ring.index(place))


@gluon.jit
def await_stage(ring, full, stage, ELEMENTS: gl.constexpr, STAGES: gl.constexpr):
    """The stage's weights, once they are there."""
    mbarrier.wait(full.index(stage % STAGES), (stage // STAGES) & 1)
    return ring.index(stage % STAGES)._reinterpret(ring.dtype, [ELEMENTS], LINE)


@gluon.jit
def release_stage(empty, stage, STAGES: gl.constexpr):
    """Give the stage's place back. Reads that are under way must end first: copies do not queue up behind them."""
    fence_async_shared()
    mbarrier.arrive(empty.index(stage % STAGES))


@gluon.jit
def weight_operand(slot, half: gl.constexpr, DEPTH: gl.constexpr, VECTORS: gl.constexpr):
    """Half `half` of a stage, [8 warps, inner, 8 columns]."""
    STEPS: gl.constexpr = DEPTH // (256 * VECTORS)
    SIZE: gl.constexpr = DEPTH * 8
    part = slot.slice(half * SIZE, SIZE)._reinterpret(slot.dtype, [8, STEPS, 8, 4, VECTORS, 8], _TILE)
    tile = part.load(_fragment(STEPS, VECTORS))
    tile = gl.reshape(gl.permute(tile, (0, 1, 4, 3, 5, 2)), [8, DEPTH // 8, 8])
    return _widened(gl.convert_layout(tile, _RIGHT, assert_trivial=True))


@gluon.jit
def _places_of_rows(x, chunk, DEPTH: gl.constexpr, ROWS: gl.constexpr):
    """Where a stretch of x lies, and the row and inner index of each: [8 warps, 16 rows, inner]."""
    WIDTH: gl.constexpr = DEPTH // 8
    warp = gl.arange(0, 8, layout=gl.SliceLayout(1, gl.SliceLayout(2, _LEFT)))
    row = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, _LEFT)))
    k = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, gl.SliceLayout(1, _LEFT)))
    inner = chunk * DEPTH + warp[:, None, None] * WIDTH + k[None, None, :]
    return x + place_of(row[None, :, None], inner, ROWS), row, inner


@gluon.jit
def _rows(x, chunk, INNER: gl.constexpr, DEPTH: gl.constexpr, ROWS: gl.constexpr):
    """A stretch of x as it is now, perhaps not all set; 0 beyond ROWS and INNER."""
    at, row, inner = _places_of_rows(x, chunk, DEPTH, ROWS)
    return gl.load(at, mask=(row < ROWS)[None, :, None] & (inner < INNER), other=0.0, cache_modifier=".cg")


@gluon.jit
def _settled_rows(found, x, chunk, DEPTH: gl.constexpr, ROWS: gl.constexpr):
    """What _rows found, once all is set."""
    at, _, _ = _places_of_rows(x, chunk, DEPTH, ROWS)
    return settled(found, at)


@gluon.jit
def load_rows(x, INNER: gl.constexpr, DEPTH: gl.constexpr, ROWS: gl.constexpr):
    """All stretches of x as they are now."""
    found = ()
    for chunk in gl.static_range((INNER + DEPTH - 1) // DEPTH):
        found = found + (_rows(x, chunk, INNER, DEPTH, ROWS),)
    return found


@gluon.jit
def settle_rows(found, x, INNER: gl.constexpr, DEPTH: gl.constexpr, ROWS: gl.constexpr):
    """What load_rows found, once all is set."""
    sure = ()
    for chunk in gl.static_range((INNER + DEPTH - 1) // DEPTH):
        sure = sure + (_settled_rows(found[chunk], x, chunk, DEPTH, ROWS),)
    return sure


@gluon.jit
def sum_of_warps(acc):
    """The warps' sums added in order: [16 rows, 8 columns] float32."""
    return gl.sum(gl.convert_layout(acc, _SUMS), axis=0)


@gluon.jit
def _await_input(x, IS_ATTENTION: gl.constexpr, INNER: gl.constexpr, ROWS: gl.constexpr, QUERIES: gl.constexpr,
                 TASKS: gl.constexpr, PROGRAMS: gl.constexpr):  # fmt: skip
    """Wait for what o or down multiplies."""
    if IS_ATTENTION:
        SEQUENCE_TASKS: gl.constexpr = TASKS * QUERIES // ROWS
        task = gl.minimum(gl.arange(0, 256, layout=gl.BlockedLayout([1], [32], [8], [0])), TASKS - 1)
        line = task // SEQUENCE_TASKS * QUERIES + QUERIES - 1
        await_words(x + place_of(line, (task % SEQUENCE_TASKS + 1) * (INNER // SEQUENCE_TASKS) - 1, ROWS))
    else:
        await_words(x + place_of(ROWS - 1, last_units(INNER // 8, PROGRAMS) * 8 + 7, ROWS))


@gluon.constexpr_function
def _asked(chunk, ahead, late, wait, chunks):
    """How many stretches of x have been asked for when `chunk` is multiplied; those from `late` on not before `wait`."""
    return 0 if chunk < 0 else min(chunk + ahead, chunks if chunk >= wait else late)


@gluon.jit
def add_product(
    x, ring, full, empty, stage, program, own_units, scale, norm, normed, squares, residual, peers, inbox, rank,
    INNER: gl.constexpr, DEPTH: gl.constexpr, HIDDEN: gl.constexpr, ROWS: gl.constexpr, PROGRAMS: gl.constexpr,
    SCALED: gl.constexpr, VECTORS: gl.constexpr, ELEMENTS: gl.constexpr, STAGES: gl.constexpr,
    IS_ATTENTION: gl.constexpr, QUERIES: gl.constexpr, TASKS: gl.constexpr, RANKS: gl.constexpr,
):  # fmt: skip
    """The residual plus x @ w, summed over the ranks, for this program's columns; see publish."""
    CHUNKS: gl.constexpr = (INNER + DEPTH - 1) // DEPTH
    AHEAD: gl.constexpr = 65536 // (DEPTH * (8 if ROWS <= 8 else 16))  # stretches of x on their way: 128 registers
    # What down multiplies is mostly there: the programs made it turn by turn. Only stretches of their last turn are waited for,
    # and only when those before are nearly used up.
    LATE: gl.constexpr = 0 if IS_ATTENTION else (INNER // 8 - 1) // PROGRAMS * PROGRAMS * 8 // DEPTH
    WAIT: gl.constexpr = max(LATE - _LEAD, 0)
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, SUM))
    for turn in range(own_units):
        unit = turn * PROGRAMS + program
        column = gl.arange(0, 8, layout=gl.SliceLayout(0, SUM)) + unit * 16
        inside = (row < ROWS)[:, None] & (column >= 0)[None, :]
        place = row[:, None] * HIDDEN + column[None, :]
        old0 = gl.load(residual + place, mask=inside, other=0.0, cache_modifier=".cg").to(gl.float32)
        old1 = gl.load(residual + place + 8, mask=inside, other=0.0, cache_modifier=".cg").to(gl.float32)
        acc0 = gl.zeros([8, 16, 8], gl.float32, MMA)
        acc1 = gl.zeros([8, 16, 8], gl.float32, MMA)
        ahead = ()
        for chunk in gl.static_range(CHUNKS):
            if chunk == WAIT:
                _await_input(x, IS_ATTENTION, INNER, ROWS, QUERIES, TASKS, PROGRAMS)
            for asked in gl.static_range(
                _asked(chunk - 1, AHEAD, LATE, WAIT, CHUNKS), _asked(chunk, AHEAD, LATE, WAIT, CHUNKS)
            ):
                ahead = ahead + (_rows(x, asked, INNER, DEPTH, ROWS),)
            if chunk == 0:
                # Answers come in the order of the questions: what may be far is asked for last.
                norms = gl.load(norm + column), gl.load(norm + column + 8)
                if SCALED:
                    scale0, scale1 = gl.load(scale + column)[None, :], gl.load(scale + column + 8)[None, :]
            weights = await_stage(ring, full, stage, ELEMENTS, STAGES)
            w0 = weight_operand(weights, 0, DEPTH, VECTORS)
            w1 = weight_operand(weights, 1, DEPTH, VECTORS)
            release_stage(empty, stage, STAGES)
            rows = _settled_rows(ahead[0], x, chunk, DEPTH, ROWS)
            acc0 = mma_v2(rows, w0, acc0)
            acc1 = mma_v2(rows, w1, acc1)
            ahead = ahead[1:]
            stage += 1
        sum0, sum1 = sum_of_warps(acc0), sum_of_warps(acc1)
        if SCALED:
            sum0 *= scale0
            sum1 *= scale1
        if RANKS > 1:
            sum0, sum1 = sum_over_ranks(sum0, sum1, peers, inbox + unit * (RANKS * 16 * ROWS), rank, ROWS, RANKS)
        y0 = (sum0 + old0).to(gl.bfloat16).to(gl.float32)
        y1 = (sum1 + old1).to(gl.bfloat16).to(gl.float32)
        publish(y0, y1, norms, unit, normed, squares, residual, HIDDEN, ROWS)
    return stage
