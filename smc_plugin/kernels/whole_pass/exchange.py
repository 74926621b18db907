"""How the programs of a pass hand results to one another without a barrier: every value says itself whether it is there.

Before a pass all places hold a pattern of bits that no result has (all ones, a NaN that arithmetic does not make). Who needs
a value loads it, and loads again for as long as it is that pattern: one trip to the second-level cache, where a barrier is
three (the stores, the count, the poll) before the load can even start. Each layer has its own places, so none is written
twice in a pass, and there are two sides of all of them: while a pass uses one, it unsets the other, which the pass before
has left.

Values come from many programs, and asking again for each in turn would add up. So a reader first waits for one value of every
program, the last that it stores, and then loads all: few have to be asked for again.

Ranks add up their parts of o and down in the same way: the program that has some columns on one rank stores its sums into the
inbox of every rank, in peer-to-peer memory, and waits for those of the same program on the others. So there is no kernel and no
barrier between a product and its sum. A program unsets its part of the other side of its own inbox, and says so by a fence
before its last sum of the pass: a rank that starts the next pass has got that sum from all others.

Why nothing more has to be ordered:

- A value is 16 or 32 bits, aligned, so it arrives whole. Each says for itself whether it is there, and nothing is concluded
  from one about another: await_words only makes it likely, `settled` looks at every value that is used. Nothing else that a
  pass reads is written in it by another program: residuals are read by the threads that wrote them, and pages only at positions
  that were there before the pass.
- The other side is unset by plain stores while nobody reads it: the pass that left it has ended (a launch waits for all of the
  one before it, with programmatic dependent launch by gdc_wait), and the next one begins after all stores of this one.
- Which side is next is stored by the last program to leave. Each has read it before it added itself to the count, and who reads
  it next is another launch. The count goes back to 0 the same way.
- gdc_launch_dependents before the last product lets the next kernel begin, not read: it waits for the end of this one.
- Sums from other ranks: a peer's stores for a side come in a launch after the one that got our last sum of the pass in which we
  unset that side, and thus after the fence. Every thread makes it after a barrier, so that it covers what the others unset. Nor
  can they be of an older pass: that one ended here only when all of them were there.
- A peer is at most one pass ahead: to end the next pass it needs our sums of it.
- The weights, read before gdc_wait, are written by no kernel.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# The sums of a product's warps, a thread holding one: [16 rows, 8 columns].
SUM = gl.constexpr(gl.SliceLayout(0, gl.BlockedLayout([8, 1, 1], [1, 4, 8], [1, 8, 1], [2, 1, 0])))
_SQUARES = gl.constexpr(gl.BlockedLayout([1, 1], [2, 16], [8, 1], [1, 0]))


@gluon.jit
def place_of(row, column, ROWS: gl.constexpr):
    """Where rows that a product multiplies hold an element: 32 columns of all rows side by side, as a warp reads them."""
    return column // 32 * (32 * ROWS) + row * 32 + column % 32


@gluon.jit
def as_floats(place):
    """The same address, of float32."""
    return place.to(gl.pointer_type(gl.float32), bitcast=True)


@gluon.jit
def await_words(words):
    """Wait until 16 bits at each of 256 places are not unset; what lies around them has then come too, most likely."""
    gl.inline_asm_elementwise(
        """
        {
        .reg .pred unset, some;
        .reg .b16 seen;
        mov.b32 $0, 0;
        setp.eq.u32 unset, 0, 0;
        CHECK:
        @unset ld.relaxed.gpu.global.u16 seen, [$1];
        @unset setp.eq.u16 unset, seen, 0xffff;
        vote.sync.any.pred some, unset, 0xffffffff;
        @some bra.uni CHECK;
        bar.warp.sync 0xffffffff;
        }
        """,
        "=r,l",
        [words.to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )
    gl.thread_barrier()


@gluon.jit
def last_units(UNITS: gl.constexpr, PROGRAMS: gl.constexpr):
    """The last unit of each program, for 256 threads."""
    program = gl.minimum(gl.arange(0, 256, layout=gl.BlockedLayout([1], [32], [8], [0])), min(PROGRAMS, UNITS) - 1)
    return (UNITS - 1 - program) // PROGRAMS * PROGRAMS + program


@gluon.jit
def await_squares(squares, UNITS: gl.constexpr, ROWS: gl.constexpr, PROGRAMS: gl.constexpr):
    """Wait for the sums of squares, which are stored after what they are of."""
    halves = squares.to(gl.pointer_type(gl.bfloat16), bitcast=True)
    await_words(halves + last_units(UNITS, PROGRAMS) * 32 + 2 * (ROWS - 1) + 1)


@gluon.jit
def settled(x, at):
    """Loaded bfloat16, eight a thread side by side, loaded again for as long as some is unset."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .pred unset, some;
        .reg .b32 most, other;
        mov.b32 $0, $4;
        mov.b32 $1, $5;
        mov.b32 $2, $6;
        mov.b32 $3, $7;
        CHECK:
        max.u16x2 most, $0, $1;
        max.u16x2 other, $2, $3;
        max.u16x2 most, most, other;
        shl.b32 other, most, 16;
        max.u32 most, most, other;
        setp.ge.u32 unset, most, 0xffff0000;
        vote.sync.any.pred some, unset, 0xffffffff;
        @unset ld.relaxed.gpu.global.v4.b32 {$0, $1, $2, $3}, [$8];
        @some bra.uni CHECK;
        bar.warp.sync 0xffffffff;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r,r,r,l,l,l,l,l,l,l,l",
        [x, at.to(gl.int64)],
        dtype=gl.bfloat16,
        is_pure=False,
        pack=8,
    )


@gluon.jit
def _settled_float(x, at):
    """Loaded float32, loaded again for as long as it is unset."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .pred unset, some;
        mov.b32 $0, $1;
        CHECK:
        setp.eq.u32 unset, $0, 0xffffffff;
        vote.sync.any.pred some, unset, 0xffffffff;
        @unset ld.relaxed.sys.global.b32 $0, [$2];
        @some bra.uni CHECK;
        bar.warp.sync 0xffffffff;
        }
        """,
        "=&r,r,l",
        [x, at.to(gl.int64)],
        dtype=gl.float32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _send(x, at, inside):
    """Store float32 where another GPU reads."""
    gl.inline_asm_elementwise(
        """
        {
        .reg .pred inside;
        setp.ne.b32 inside, $3, 0;
        @inside st.relaxed.sys.global.b32 [$2], $1;
        mov.b32 $0, 0;
        }
        """,
        "=r,r,l,r",
        [x, at.to(gl.int64), inside.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def sum_over_ranks(x0, x1, peers, place, rank, ROWS: gl.constexpr, RANKS: gl.constexpr):
    """The sums over the ranks of two tiles [16 rows, 8 columns]: each rank sends its own to all, and adds in their order.

    `place` is where the unit's RANKS parts begin in an inbox of `peers`, in float32.
    """
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, SUM))
    eight = gl.arange(0, 8, layout=gl.SliceLayout(0, SUM))
    inside = (row < ROWS)[:, None] & (eight >= 0)[None, :]
    local = row[:, None] * 8 + eight[None, :]
    PART: gl.constexpr = 16 * ROWS
    for peer in gl.static_range(RANKS):
        at = peers[peer] + place + rank * PART + local
        _send(x0, at, inside)
        _send(x1, at + 8 * ROWS, inside)
    own = peers[RANKS] + place + local
    found0, found1 = (), ()
    for peer in gl.static_range(RANKS):
        found0 = found0 + (gl.load(own + peer * PART, mask=inside, other=0.0, cache_modifier=".cg"),)
        found1 = found1 + (gl.load(own + peer * PART + 8 * ROWS, mask=inside, other=0.0, cache_modifier=".cg"),)
    total0, total1 = gl.zeros_like(x0), gl.zeros_like(x1)
    for peer in gl.static_range(RANKS):
        total0 += _settled_float(found0[peer], own + peer * PART)
        total1 += _settled_float(found1[peer], own + peer * PART + 8 * ROWS)
    return total0, total1


@gluon.jit
def find_peers(inboxes, rank, RANKS: gl.constexpr):
    """The inboxes of all ranks, and this rank's own once more."""
    peers = ()
    for peer in gl.static_range(RANKS):
        peers = peers + (gl.load(inboxes + peer).to(gl.pointer_type(gl.float32)),)
    return peers + (gl.load(inboxes + rank).to(gl.pointer_type(gl.float32)),)


@gluon.jit
def unset_inbox(inbox, program, units, UNITS: gl.constexpr, ROWS: gl.constexpr, RANKS: gl.constexpr,
                PROGRAMS: gl.constexpr):  # fmt: skip
    """Mark what this program gets from the ranks in a layer as not yet there, both products."""
    SIZE: gl.constexpr = RANKS * 16 * ROWS
    words = inbox.to(gl.pointer_type(gl.int32), bitcast=True)
    at = gl.arange(0, 256, layout=gl.BlockedLayout([1], [32], [8], [0]))
    for turn in range(units):
        for product in gl.static_range(2):
            part = words + (product * UNITS + turn * PROGRAMS + program) * SIZE
            for first in gl.static_range(0, SIZE, 256):
                gl.store(part + first + at, gl.full([256], -1, gl.int32, at.type.layout), mask=first + at < SIZE)


@gluon.jit
def fence_ranks():
    """What the program stored before is seen by all ranks that see what one of its threads stores after."""
    gl.thread_barrier()
    at = gl.arange(0, 256, layout=gl.BlockedLayout([1], [32], [8], [0]))
    gl.inline_asm_elementwise("fence.acq_rel.sys; mov.b32 $0, 0;", "=r,r", [at], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def unset_share(block, program, SIZE: gl.constexpr, PROGRAMS: gl.constexpr):
    """Mark this program's share of a block as not yet there."""
    SPAN: gl.constexpr = 2048
    words = block.to(gl.pointer_type(gl.int16), bitcast=True)
    at = gl.arange(0, SPAN, layout=gl.BlockedLayout([8], [32], [8], [0]))
    for share in range(program, (SIZE + SPAN - 1) // SPAN, PROGRAMS):
        place = share * SPAN + at
        gl.store(words + place, gl.full([SPAN], -1, gl.int16, at.type.layout), mask=place < SIZE)


@gluon.jit
def _places_of_squares(squares, PARTS: gl.constexpr, TILE: gl.constexpr, ROWS: gl.constexpr):
    """Where sums of squares [PARTS, 16] lie, and which there are."""
    part = gl.arange(0, TILE, layout=gl.SliceLayout(1, _SQUARES))
    row = gl.arange(0, 16, layout=gl.SliceLayout(0, _SQUARES))
    return squares + part[:, None] * 16 + row[None, :], (part < PARTS)[:, None] & (row < ROWS)[None, :]


@gluon.jit
def load_squares(squares, PARTS: gl.constexpr, TILE: gl.constexpr, ROWS: gl.constexpr):
    """Sums of squares as they are now, perhaps not all set."""
    at, inside = _places_of_squares(squares, PARTS, TILE, ROWS)
    return gl.load(at, mask=inside, other=0.0, cache_modifier=".cg")


@gluon.jit
def inverse_rms(found, squares, eps, PARTS: gl.constexpr, TILE: gl.constexpr, WIDTH: gl.constexpr, ROWS: gl.constexpr):
    """1 / rms of each of 16 rows, from what load_squares found, once all is set."""
    at, _ = _places_of_squares(squares, PARTS, TILE, ROWS)
    sums = gl.sum(_settled_float(found, at), axis=0)
    return gl.rsqrt(gl.convert_layout(sums, gl.SliceLayout(1, SUM)) / WIDTH + eps)


@gluon.jit
def publish(y0, y1, norms, unit, normed, squares, residual, HIDDEN: gl.constexpr, ROWS: gl.constexpr):
    """Store 16 columns of the residual stream, and what the next product needs of them: y times the norm, and sums of y²."""
    row = gl.arange(0, 16, layout=gl.SliceLayout(1, SUM))
    column = gl.arange(0, 8, layout=gl.SliceLayout(0, SUM)) + unit * 16
    inside = (row < ROWS)[:, None] & (column >= 0)[None, :]
    place = row[:, None] * HIDDEN + column[None, :]
    gl.store(residual + place, y0.to(gl.bfloat16), mask=inside)
    gl.store(residual + place + 8, y1.to(gl.bfloat16), mask=inside)
    normed += place_of(row[:, None], column[None, :], ROWS)
    gl.store(normed, (y0 * norms[0].to(gl.float32)[None, :]).to(gl.bfloat16), mask=inside)
    gl.store(normed + 8, (y1 * norms[1].to(gl.float32)[None, :]).to(gl.bfloat16), mask=inside)
    gl.store(squares + unit * 16 + row, gl.sum(y0 * y0 + y1 * y1, axis=1), mask=row < ROWS)
