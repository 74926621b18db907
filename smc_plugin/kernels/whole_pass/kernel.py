"""The kernel: which step follows which; see the package."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from smc_plugin.kernels.whole_pass.attention import (
    STRETCHES,
    attend,
    attention_layout,
    await_new,
    find_places,
    load_tile,
)
from smc_plugin.kernels.whole_pass.exchange import (
    SUM,
    as_floats,
    await_squares,
    fence_ranks,
    find_peers,
    inverse_rms,
    load_squares,
    place_of,
    publish,
    unset_inbox,
    unset_share,
)
from smc_plugin.kernels.whole_pass.products import (
    LINE,
    LINE_ELEMENTS,
    MMA,
    add_product,
    await_stage,
    load_rows,
    release_stage,
    settle_rows,
    stages_a_layer,
    stream_weights,
    sum_of_warps,
    weight_operand,
)


@gluon.jit
def _embed(
    tokens, embedding, norm, program, units, normed, squares, residual,
    HIDDEN: gl.constexpr, ROWS: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """The tokens' embeddings; see publish."""
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, SUM))
    eight = gl.arange(0, 8, layout=gl.SliceLayout(0, SUM))
    inside = (row < ROWS)[:, None] & (eight >= 0)[None, :]
    token = gl.load(tokens + row, mask=row < ROWS, other=0)
    for turn in range(units):
        unit = turn * PROGRAMS + program
        column = unit * 16 + eight
        at = embedding + (token * HIDDEN)[:, None] + column[None, :]
        y0 = gl.load(at, mask=inside, other=0.0).to(gl.float32)
        y1 = gl.load(at + 8, mask=inside, other=0.0).to(gl.float32)
        norms = gl.load(norm + column), gl.load(norm + column + 8)
        publish(y0, y1, norms, unit, normed, squares, residual, HIDDEN, ROWS)


@gluon.jit
def _normed(
    normed, squares, eps, INNER: gl.constexpr, DEPTH: gl.constexpr, TILE_PARTS: gl.constexpr, ROWS: gl.constexpr,
    PROGRAMS: gl.constexpr,
):  # fmt: skip
    """The stretches of the residual stream times its norm, and 1 / rms [16 rows], once all is there."""
    UNITS: gl.constexpr = INNER // 16
    await_squares(squares, UNITS, ROWS, PROGRAMS)
    found = load_rows(normed, INNER, DEPTH, ROWS)
    sums = load_squares(squares, UNITS, TILE_PARTS, ROWS)
    return settle_rows(found, normed, INNER, DEPTH, ROWS), inverse_rms(
        sums, squares, eps, UNITS, TILE_PARTS, INNER, ROWS
    )


@gluon.jit
def _qkv(
    normed, squares, out, ring, full, empty, stage, program, units, scales, biases, eps,
    INNER: gl.constexpr, DEPTH: gl.constexpr, WIDTH: gl.constexpr, TILE_PARTS: gl.constexpr, ROWS: gl.constexpr,
    PROGRAMS: gl.constexpr, BIAS: gl.constexpr, SCALED: gl.constexpr, VECTORS: gl.constexpr, ELEMENTS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Queries, keys and values of all rows, this program's columns; returns the next stage."""
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, SUM))
    eight = gl.arange(0, 8, layout=gl.SliceLayout(0, SUM))
    rows, scale = _normed(normed, squares, eps, INNER, DEPTH, TILE_PARTS, ROWS, PROGRAMS)
    for turn in range(units):
        acc = gl.zeros([8, 16, 8], gl.float32, MMA)
        column = (turn * PROGRAMS + program) * 8 + eight
        if SCALED:
            column_scale = gl.load(scales + column)[None, :]
        if BIAS:
            bias = gl.load(biases + column).to(gl.float32)[None, :]
        for chunk in gl.static_range((INNER + DEPTH - 1) // DEPTH):
            w = weight_operand(await_stage(ring, full, stage, ELEMENTS, STAGES), 0, DEPTH, VECTORS)
            release_stage(empty, stage, STAGES)
            acc = mma_v2(rows[chunk], w, acc)
            stage += 1
        y = sum_of_warps(acc) * scale[:, None]
        if SCALED:
            y *= column_scale
        if BIAS:
            y += bias
        inside = (row < ROWS)[:, None] & (eight >= 0)[None, :]
        gl.store(out + row[:, None] * WIDTH + column[None, :], y.to(gl.bfloat16), mask=inside)
    return stage


@gluon.jit
def _gate_up(
    normed, squares, out, ring, full, empty, stage, program, units, scales, eps,
    INNER: gl.constexpr, DEPTH: gl.constexpr, WIDTH: gl.constexpr, TILE_PARTS: gl.constexpr, ROWS: gl.constexpr,
    PROGRAMS: gl.constexpr, SCALED: gl.constexpr, VECTORS: gl.constexpr, ELEMENTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """silu(gate) * up of all rows, this program's columns; returns the next stage."""
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, SUM))
    eight = gl.arange(0, 8, layout=gl.SliceLayout(0, SUM))
    rows, scale = _normed(normed, squares, eps, INNER, DEPTH, TILE_PARTS, ROWS, PROGRAMS)
    for turn in range(units):
        gate_acc = gl.zeros([8, 16, 8], gl.float32, MMA)
        up_acc = gl.zeros([8, 16, 8], gl.float32, MMA)
        column = (turn * PROGRAMS + program) * 8 + eight
        if SCALED:
            gate_scale, up_scale = gl.load(scales + column)[None, :], gl.load(scales + WIDTH + column)[None, :]
        for chunk in gl.static_range((INNER + DEPTH - 1) // DEPTH):
            weights = await_stage(ring, full, stage, ELEMENTS, STAGES)
            w0 = weight_operand(weights, 0, DEPTH, VECTORS)
            w1 = weight_operand(weights, 1, DEPTH, VECTORS)
            release_stage(empty, stage, STAGES)
            gate_acc = mma_v2(rows[chunk], w0, gate_acc)
            up_acc = mma_v2(rows[chunk], w1, up_acc)
            stage += 1
        gate, up = sum_of_warps(gate_acc) * scale[:, None], sum_of_warps(up_acc) * scale[:, None]
        if SCALED:
            gate *= gate_scale
            up *= up_scale
        y = gate / (1.0 + gl.exp(-gate)) * up
        inside = (row < ROWS)[:, None] & (eight >= 0)[None, :]
        gl.store(out + place_of(row[:, None], column[None, :], ROWS), y.to(gl.bfloat16), mask=inside)
    return stage


@gluon.jit
def _finish(
    squares, residual, norm, out, program, units, eps,
    HIDDEN: gl.constexpr, TILE_PARTS: gl.constexpr, ROWS: gl.constexpr, PROGRAMS: gl.constexpr,
):  # fmt: skip
    """The final norm of this program's columns."""
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, SUM))
    eight = gl.arange(0, 8, layout=gl.SliceLayout(0, SUM))
    inside = (row < ROWS)[:, None] & (eight >= 0)[None, :]
    await_squares(squares, HIDDEN // 16, ROWS, PROGRAMS)
    sums = load_squares(squares, HIDDEN // 16, TILE_PARTS, ROWS)
    scale = inverse_rms(sums, squares, eps, HIDDEN // 16, TILE_PARTS, HIDDEN, ROWS)
    for turn in range(units):
        for half in gl.static_range(2):
            column = (turn * PROGRAMS + program) * 16 + 8 * half + eight
            place = row[:, None] * HIDDEN + column[None, :]
            y = gl.load(residual + place, mask=inside, other=0.0, cache_modifier=".cg").to(gl.float32)
            y = (y * scale[:, None]).to(gl.bfloat16).to(gl.float32) * gl.load(norm + column).to(gl.float32)[None, :]
            gl.store(out + place, y.to(gl.bfloat16), mask=inside)


@gluon.jit
def _compute(
    ring, full, empty, tokens, embedding, start, offset, block_table, table_stride, cos, sin, slots, cache,
    layer_cache, half_cache, attn_norms, mlp_norms, biases, q_norms, k_norms, qkv_scales, o_scales, gate_up_scales,
    down_scales, residual, exchange, out, state, inboxes, rank, num_layers, scale_log2, eps,
    HIDDEN: gl.constexpr, FFN: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    PAGE_SIZE: gl.constexpr, ROWS: gl.constexpr, QUERIES: gl.constexpr, HEADS: gl.constexpr, BIAS: gl.constexpr,
    NORM: gl.constexpr, SCALED: gl.constexpr, VECTORS: gl.constexpr, ELEMENTS: gl.constexpr, STAGES: gl.constexpr,
    TOKENS: gl.constexpr, TILES: gl.constexpr, TILE_PARTS: gl.constexpr, PROGRAMS: gl.constexpr, RANKS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """All that is computed, step after step; the weights arrive by themselves."""
    QKV: gl.constexpr = (GROUP + 2) * KV_HEADS * HEAD_DIM
    ATTN: gl.constexpr = GROUP * KV_HEADS * HEAD_DIM
    NARROW: gl.constexpr = ELEMENTS // 8  # inner elements of a stage of 8 columns
    WIDE: gl.constexpr = ELEMENTS // 16
    UNITS: gl.constexpr = HIDDEN // 16
    PARTS: gl.constexpr = GROUP // HEADS
    TASKS: gl.constexpr = ROWS // QUERIES * KV_HEADS * PARTS
    # What is handed over in a layer: the residual stream times its norm, qkv, what attention gives, the stream again, and what
    # down multiplies; sums of squares in float32, at the end.
    NEW: gl.constexpr = ROWS * HIDDEN
    ATTENDED: gl.constexpr = NEW + ROWS * QKV
    MLP_NORMED: gl.constexpr = ATTENDED + ROWS * ATTN
    INNER: gl.constexpr = MLP_NORMED + ROWS * HIDDEN
    SQUARES: gl.constexpr = INNER + ROWS * FFN
    MLP_SQUARES: gl.constexpr = SQUARES + UNITS * 32
    BLOCK: gl.constexpr = MLP_SQUARES + UNITS * 32
    program = gl.program_id(0)
    own_units = (UNITS - program + PROGRAMS - 1) // PROGRAMS
    qkv_units = (QKV // 8 - program + PROGRAMS - 1) // PROGRAMS
    gate_units = (FFN // 8 - program + PROGRAMS - 1) // PROGRAMS
    sequence = program // (KV_HEADS * PARTS)
    kv_head = program // PARTS % KV_HEADS
    part = program % PARTS
    has_task = program < TASKS
    if PDL:
        gdc_wait()
    side = gl.load(state).to(gl.int64) & 1
    size = (num_layers + 1).to(gl.int64) * BLOCK
    block, other = exchange + side * size, exchange + (1 - side) * size
    PRODUCT: gl.constexpr = UNITS * RANKS * 16 * ROWS  # of an inbox, in float32: the ranks' parts of o or of down
    inbox, other_inbox = side * (num_layers * 2 * PRODUCT), (1 - side) * (num_layers * 2 * PRODUCT)
    peers = (exchange,)
    if RANKS > 1:
        peers = find_peers(inboxes, rank, RANKS)
    _embed(
        tokens, embedding, attn_norms, program, own_units, block, as_floats(block + SQUARES), residual,
        HIDDEN, ROWS, PROGRAMS,
    )  # fmt: skip
    length = 0
    places = gl.allocate_shared_memory(gl.int32, [TILES, STRETCHES * TOKENS], LINE)
    if has_task:
        length = gl.minimum(gl.load(start + sequence).to(gl.int32) + offset, TILES * STRETCHES * TOKENS)
        find_places(places, block_table + sequence * table_stride, length, PAGE_SIZE, STRETCHES * TOKENS)
    stage = 0
    LAYOUT: gl.constexpr = attention_layout(HEADS * QUERIES, HEAD_DIM)
    for layer in range(num_layers):
        # Pages need nothing of this pass, and all programs ask for theirs: the earlier, the less they wait together.
        pages = cache + gl.to_tensor(layer).to(gl.int64) * layer_cache
        tile0 = load_tile(pages, half_cache, places, 0, length, kv_head, KV_HEADS, HEAD_DIM, TILES, TOKENS, LAYOUT)
        tile1 = load_tile(pages, half_cache, places, 1, length, kv_head, KV_HEADS, HEAD_DIM, TILES, TOKENS, LAYOUT)
        stage = _qkv(
            block, as_floats(block + SQUARES), block + NEW, ring, full, empty, stage, program, qkv_units,
            qkv_scales + layer * QKV, biases + layer * QKV, eps,
            HIDDEN, NARROW, QKV, TILE_PARTS, ROWS, PROGRAMS, BIAS, SCALED, VECTORS, ELEMENTS, STAGES,
        )  # fmt: skip
        if has_task:
            await_new(block + NEW, sequence, kv_head, part, QUERIES, HEADS, GROUP, KV_HEADS, HEAD_DIM)
            attend(
                sequence, kv_head, part, block + NEW, pages, half_cache, places, length, tile0, tile1, cos, sin, slots,
                q_norms + layer * HEAD_DIM, k_norms + layer * HEAD_DIM, block + ATTENDED, scale_log2, eps,
                NORM, QUERIES, HEADS, GROUP, KV_HEADS, HEAD_DIM, TILES, TOKENS, ROWS,
            )  # fmt: skip
        stage = add_product(
            block + ATTENDED, ring, full, empty, stage, program, own_units, o_scales + layer * HIDDEN,
            mlp_norms + layer * HIDDEN, block + MLP_NORMED, as_floats(block + MLP_SQUARES), residual,
            peers, inbox, rank,
            ATTN, WIDE, HIDDEN, ROWS, PROGRAMS, SCALED, VECTORS, ELEMENTS, STAGES, True, QUERIES, TASKS, RANKS,
        )  # fmt: skip
        unset_share(other, program, BLOCK, PROGRAMS)
        if RANKS > 1:
            unset_inbox(peers[RANKS] + other_inbox, program, own_units, UNITS, ROWS, RANKS, PROGRAMS)
            if layer == num_layers - 1:
                fence_ranks()
        stage = _gate_up(
            block + MLP_NORMED, as_floats(block + MLP_SQUARES), block + INNER, ring, full, empty, stage, program,
            gate_units, gate_up_scales + layer * (2 * FFN), eps,
            HIDDEN, WIDE, FFN, TILE_PARTS, ROWS, PROGRAMS, SCALED, VECTORS, ELEMENTS, STAGES,
        )  # fmt: skip
        if PDL and layer == num_layers - 1:
            gdc_launch_dependents()
        # The norm that follows is the next layer's; after the last layer's own stands the final one.
        stage = add_product(
            block + INNER, ring, full, empty, stage, program, own_units, down_scales + layer * HIDDEN,
            attn_norms + (layer + 1) * HIDDEN, block + BLOCK, as_floats(block + BLOCK + SQUARES), residual,
            peers, inbox + PRODUCT, rank,
            FFN, WIDE, HIDDEN, ROWS, PROGRAMS, SCALED, VECTORS, ELEMENTS, STAGES, False, QUERIES, TASKS, RANKS,
        )  # fmt: skip
        block += BLOCK
        other += BLOCK
        inbox += 2 * PRODUCT
        other_inbox += 2 * PRODUCT
    unset_share(other, program, BLOCK, PROGRAMS)
    _finish(
        as_floats(block + SQUARES), residual, attn_norms + num_layers * HIDDEN, out, program, own_units, eps,
        HIDDEN, TILE_PARTS, ROWS, PROGRAMS,
    )  # fmt: skip
    # The last to leave turns the sides.
    gl.thread_barrier()
    if gl.atomic_add(state + 1, 1, sem="acq_rel", scope="gpu") == PROGRAMS - 1:
        gl.store(state + 1, 0)
        gl.store(state, (1 - side).to(gl.int32))


@gluon.jit(do_not_specialize=["offset", "num_layers", "rank"])
def whole_pass_kernel(
    tokens, embedding, start, offset, block_table, table_stride, cos, sin, slots, cache, layer_cache, half_cache,
    attn_norms, mlp_norms, biases, q_norms, k_norms, qkv_scales, o_scales, gate_up_scales, down_scales,
    stream, residual, exchange, out, state, inboxes, rank, num_layers, scale_log2, eps,
    HIDDEN: gl.constexpr, FFN: gl.constexpr, KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr,
    PAGE_SIZE: gl.constexpr, ROWS: gl.constexpr, QUERIES: gl.constexpr, HEADS: gl.constexpr, BIAS: gl.constexpr,
    NORM: gl.constexpr, SCALED: gl.constexpr, VECTORS: gl.constexpr, ELEMENTS: gl.constexpr, STAGES: gl.constexpr,
    FLYING: gl.constexpr, TOKENS: gl.constexpr, TILES: gl.constexpr,
    TILE_PARTS: gl.constexpr, PROGRAMS: gl.constexpr, RANKS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Set up the ring, then stream and compute at the same time."""
    LINES: gl.constexpr = ELEMENTS // LINE_ELEMENTS
    program = gl.program_id(0)
    ring = gl.allocate_shared_memory(stream.dtype, [STAGES, LINES, LINE_ELEMENTS], stream.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(STAGES):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(empty.index(place), count=1)
    total = stages_a_layer(program, HIDDEN, FFN, KV_HEADS, GROUP, HEAD_DIM, ELEMENTS, PROGRAMS) * num_layers
    gl.warp_specialize(
        [
            (
                _compute,
                (
                    ring, full, empty, tokens, embedding, start, offset, block_table, table_stride, cos, sin, slots, cache,
                    layer_cache, half_cache, attn_norms, mlp_norms, biases, q_norms, k_norms, qkv_scales, o_scales,
                    gate_up_scales, down_scales, residual, exchange, out, state, inboxes, rank, num_layers,
                    scale_log2, eps, HIDDEN, FFN, KV_HEADS, GROUP, HEAD_DIM, PAGE_SIZE, ROWS, QUERIES, HEADS, BIAS, NORM,
                    SCALED, VECTORS, ELEMENTS, STAGES, TOKENS, TILES, TILE_PARTS, PROGRAMS, RANKS, PDL,
                ),
            ),
            (stream_weights, (stream, ring, full, empty, program, total, PROGRAMS, LINES, STAGES, FLYING)),
        ],
        [1],
        [24],
    )  # fmt: skip
