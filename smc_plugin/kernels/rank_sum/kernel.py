"""The kernel: a program has a row; see the package."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

SIDES = gl.constexpr(3)
VECTOR_BYTES = gl.constexpr(16)


@gluon.constexpr_function
def _await_asm(count, stride):
    """Loads `count` vectors of 16 bytes, `stride` bytes apart, again and again until no half of a word has all bits set."""
    loads, words = [], [f"${word}" for word in range(4 * count)]
    for vector in range(count):
        into = ", ".join(words[4 * vector : 4 * vector + 4])
        loads.append(f"@unset ld.relaxed.sys.global.v4.b32 {{{into}}}, [${4 * count} + {vector * stride}];")
    largest = [f"max.u16x2 most, {words[0]}, {words[1]};", *(f"max.u16x2 most, most, {word};" for word in words[2:])]
    lines = [
        ".reg .pred unset, some;",
        ".reg .b32 most, low;",
        "setp.eq.u32 unset, 0, 0;",
        "AGAIN:",
        *loads,
        *largest,
        "shl.b32 low, most, 16;",
        "max.u32 most, most, low;",
        "setp.ge.u32 unset, most, 0xffff0000;",
        "vote.sync.any.pred some, unset, 0xffffffff;",
        "@some bra.uni AGAIN;",
    ]
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.constexpr_function
def _await_constraints(count):
    return ",".join(["=&r"] * (4 * count) + ["l"])


@gluon.constexpr_function
def _await_types(count):
    return (gl.int32,) * (4 * count)


@gluon.jit
def _await(at, COUNT: gl.constexpr, STRIDE: gl.constexpr):
    """Wait for COUNT vectors, STRIDE bytes apart: four words of each."""
    return gl.inline_asm_elementwise(
        _await_asm(COUNT, STRIDE), _await_constraints(COUNT), [at], dtype=_await_types(COUNT), is_pure=False, pack=1
    )


@gluon.jit
def _load(at):
    """Four words, from the second-level cache."""
    return gl.inline_asm_elementwise(
        "ld.global.cg.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,l",
        [at],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=False,
        pack=1,
    )


@gluon.constexpr_function
def _store_asm(where):
    return f"""
    {{
    .reg .pred inside;
    setp.ne.b32 inside, $6, 0;
    @inside st.{where}.v4.b32 [$1], {{$2, $3, $4, $5}};
    mov.b32 $0, 0;
    }}
    """


@gluon.jit
def _store(at, w0, w1, w2, w3, inside, WHERE: gl.constexpr):
    """Store four words."""
    gl.inline_asm_elementwise(
        _store_asm(WHERE),
        "=r,l,r,r,r,r,r",
        [at, w0, w1, w2, w3, inside.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _as_set(word):
    """Two bfloat16 of which none has the bits of unset; another NaN stands for that one."""
    return gl.inline_asm_elementwise(
        "min.u16x2 $0, $1, $2;", "=r,r,r", [word, gl.full_like(word, -65538)], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _pair(low, high):
    """Two float32 rounded to bfloat16, in one word; the NaN that this makes is not unset."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _low(word):
    return (word << 16).to(gl.float32, bitcast=True)


@gluon.jit
def _high(word):
    return (word & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def _keep(at, words, vector: gl.constexpr, inside):
    """Store a vector on this GPU."""
    first: gl.constexpr = 4 * vector
    _store(at, words[first], words[first + 1], words[first + 2], words[first + 3], inside, "global")


@gluon.jit
def _send(at, words, vector: gl.constexpr, inside):
    """Store a vector where a rank reads it."""
    first: gl.constexpr = 4 * vector
    _store(at, words[first], words[first + 1], words[first + 2], words[first + 3], inside, "relaxed.sys.global")


@gluon.jit
def _sum(words, first: gl.constexpr, STEP: gl.constexpr, COUNT: gl.constexpr):
    """Add COUNT vectors, STEP apart, in their order: eight float32."""
    sums = ()
    for word in gl.static_range(4):
        low, high = _low(words[4 * first + word]), _high(words[4 * first + word])
        for part in gl.static_range(1, COUNT):
            low += _low(words[4 * (first + part * STEP) + word])
            high += _high(words[4 * (first + part * STEP) + word])
        sums = sums + (low, high)
    return sums


@gluon.jit(do_not_specialize=["rank"])
def rank_sum_norm_kernel(
    x, residual, weight, out, normed, inboxes, calls, rank, eps,
    WIDTH: gl.constexpr, RANKS: gl.constexpr, TURNS: gl.constexpr, TWO_SHOT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A row. A thread has TURNS vectors of eight columns, STRIDE bytes apart; in two shots, one of each rank's share."""
    SHARE: gl.constexpr = WIDTH // 8 // TURNS
    STRIDE: gl.constexpr = SHARE * VECTOR_BYTES
    ROW: gl.constexpr = TURNS * STRIDE
    SIDE: gl.constexpr = 2 * ROW if TWO_SHOT else RANKS * ROW  # of an inbox; in two shots parts, then sums
    row = gl.program_id(0).to(gl.int64)
    thread = gl.arange(0, 32 * gl.num_warps(), layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    inside = thread < SHARE
    at = gl.minimum(thread, SHARE - 1).to(gl.int64) * VECTOR_BYTES
    own, peers = gl.load(inboxes + rank), ()
    for turn in gl.static_range(RANKS):  # no two ranks begin with the same, and each ends with itself
        peers = peers + (gl.load(inboxes + (rank + 1 + turn) % RANKS),)
    scales = ()
    for turn in gl.static_range(TURNS):
        scales = scales + _load(weight.to(gl.int64) + turn * STRIDE + at)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    call = gl.load(calls + row, cache_modifier=".cg")
    begin = row * ROW + at
    parts, stream = (), ()
    for turn in gl.static_range(TURNS):
        share = turn
        if TWO_SHOT:
            share = (rank + 1 + turn) % RANKS
        w0, w1, w2, w3 = _load(x.to(gl.int64) + begin + share * STRIDE)
        parts = parts + (_as_set(w0), _as_set(w1), _as_set(w2), _as_set(w3))
    for turn in gl.static_range(TURNS):
        stream = stream + _load(residual.to(gl.int64) + begin + turn * STRIDE)
    side = (row * SIDES + call) * SIDE + at
    old = own + (row * SIDES + (call + 2) % SIDES) * SIDE + at

    for peer in gl.static_range(RANKS):
        if TWO_SHOT:
            _send(peers[peer] + side + rank * STRIDE, parts, peer, inside)
        else:
            for turn in gl.static_range(TURNS):
                _send(peers[peer] + side + rank * ROW + turn * STRIDE, parts, turn, inside)
    all_set = gl.full_like(parts[0], -1)
    unset = (all_set, all_set, all_set, all_set)
    for vector in gl.static_range(SIDE // STRIDE):
        _keep(old + vector * STRIDE, unset, 0, inside)
    if TWO_SHOT:
        sums = _sum(_await(own + side, RANKS, STRIDE), 0, 1, RANKS)
        words = (
            _pair(sums[0], sums[1]), _pair(sums[2], sums[3]), _pair(sums[4], sums[5]), _pair(sums[6], sums[7])
        )  # fmt: skip
        for peer in gl.static_range(RANKS):
            _send(peers[peer] + side + ROW + rank * STRIDE, words, 0, inside)
        found = _await(own + side + ROW, TURNS, STRIDE)
    else:
        found = _await(own + side, RANKS * TURNS, STRIDE)

    squares = gl.zeros_like(_low(parts[0]))
    rounded = ()
    for turn in gl.static_range(TURNS):
        sums = _sum(found, turn, TURNS, 1 if TWO_SHOT else RANKS)
        for word in gl.static_range(4):
            held = stream[4 * turn + word]
            y = _pair(sums[2 * word] + _low(held), sums[2 * word + 1] + _high(held))
            # Of the rounded values, which is what the residual stream holds.
            squares += _low(y) * _low(y) + _high(y) * _high(y)
            rounded = rounded + (y,)
        _keep(out.to(gl.int64) + begin + turn * STRIDE, rounded, turn, inside)
    scale = gl.rsqrt(gl.sum(gl.where(inside, squares, 0.0), axis=0) / WIDTH + eps)
    for turn in gl.static_range(TURNS):
        words = ()
        for word in gl.static_range(4):
            y, w = rounded[4 * turn + word], scales[4 * turn + word]
            y = _pair(_low(y) * scale, _high(y) * scale)
            words = words + (_pair(_low(y) * _low(w), _high(y) * _high(w)),)
        _keep(normed.to(gl.int64) + begin + turn * STRIDE, words, 0, inside)
    gl.thread_barrier()  # all threads know the call's number
    gl.store(calls + row, (call + 1) % SIDES)
