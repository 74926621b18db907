"""The bookkeeping of a round in five launches; see the reference for what each step means.

Plain torch needs about two hundred small launches for it, two microseconds each. Here a program serves one group (or one
particle of it), reads and writes the slots of the `GroupState` in place, and keeps its N particles in the lanes of one
warp. Copies inherit in place: survivors keep their places, so nobody reads what another program writes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smc_plugin.group_state import END_LENGTH, END_NONE, END_STOP, STOP_MATCH, GroupState
from smc_plugin.kernels.launch import launch, let_next_start, next_power_of_2, wait_for_inputs
from smc_plugin.kernels.weights import as_bytes, is_finite
from smc_plugin.reference.groups import SUMMARY_COLUMNS, Committed, Opened
from smc_plugin.reference.resample import Resampled
from smc_plugin.reference.sampling import Sampled

__all__ = ["SUMMARY_COLUMNS", "Committed", "Opened", "close_round", "commit", "find_ends", "open_round"]

_BLOCK = 256
_NONE, _STOP, _LENGTH = tl.constexpr(END_NONE), tl.constexpr(END_STOP), tl.constexpr(END_LENGTH)
_MATCH = tl.constexpr(STOP_MATCH)


@triton.jit
def _copy_row(source, target, count, BLOCK: tl.constexpr):
    """Copy `count` elements from pointer to pointer."""
    for start in range(0, count, BLOCK):
        column = start + tl.arange(0, BLOCK)
        valid = column < count
        tl.store(target + column, tl.load(source + column, mask=valid, other=0), mask=valid)


@triton.jit
def _open_kernel(
    slots,
    seed, round_number, position, generated, num_blocks, active,
    temperature, draft_temperature, alpha, ess_threshold, log_evidence,
    previous, frontier, log_weights, finished, block_table,
    seed_out, step_out, lane_out, position_out, generated_out,
    temperature_out, draft_temperature_out, alpha_out, inputs_out, table_out,
    num_blocks_out, needed_out, group_seed_out, group_alpha_out, threshold_out, evidence_out, weights_out, finished_out,
    num_particles,
    state_particles,
    columns,
    num_draft_tokens,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    let_next_start(PDL)
    lane, group = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + group)
    row = group * num_particles + lane
    at = slot * state_particles + lane
    own_seed, own_alpha = tl.load(seed + slot), tl.load(alpha + slot)
    own_position = tl.load(position + slot)
    tl.store(seed_out + row, own_seed)
    tl.store(step_out + row, tl.load(round_number + slot) + 1)
    tl.store(lane_out + row, lane.to(tl.int64))
    tl.store(position_out + row, own_position)
    tl.store(generated_out + row, tl.load(generated + slot))
    tl.store(temperature_out + row, tl.load(temperature + slot))
    tl.store(draft_temperature_out + row, tl.load(draft_temperature + slot))
    tl.store(alpha_out + row, own_alpha)
    tl.store(inputs_out + 2 * row, tl.load(previous + at))
    tl.store(inputs_out + 2 * row + 1, tl.load(frontier + at))
    tl.store(weights_out + row, tl.load(log_weights + at))
    tl.store(finished_out + row, tl.load(finished + at))
    if lane == 0:
        held = tl.load(num_blocks + slot)
        needed = (own_position + num_draft_tokens) // PAGE_SIZE + 1
        needed = tl.where(tl.load(active + slot) != 0, tl.maximum(needed, held), held)
        tl.store(num_blocks_out + group, held)
        tl.store(needed_out + group, needed)
        tl.store(group_seed_out + group, own_seed)
        tl.store(group_alpha_out + group, own_alpha)
        tl.store(threshold_out + group, tl.load(ess_threshold + slot))
        tl.store(evidence_out + group, tl.load(log_evidence + slot))
    _copy_row(block_table + at * columns, table_out + row * columns, columns, BLOCK)


def open_round(state: GroupState, slots: Tensor, num_particles: int, num_draft_tokens: int, page_size: int) -> Opened:
    """Read what a round's passes need, in one launch; see the reference."""
    groups, columns, device = slots.shape[0], state.block_table.shape[2], slots.device
    rows = groups * num_particles
    i64, f32, f64 = torch.int64, torch.float32, torch.float64

    def new(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    opened = Opened(
        seed=new(i64, rows),
        step=new(i64, rows),
        lane=new(i64, rows),
        position=new(i64, rows),
        generated=new(i64, rows),
        temperature=new(f32, rows),
        draft_temperature=new(f32, rows),
        alpha=new(f32, rows),
        inputs=new(i64, rows, 2),
        block_table=new(torch.int32, groups, num_particles, columns),
        num_blocks=new(i64, groups),
        needed_blocks=new(i64, groups),
        group_seed=new(i64, groups),
        group_alpha=new(f32, groups),
        ess_threshold=new(f64, groups),
        log_evidence=new(f64, groups),
        log_weights=new(f64, groups, num_particles),
        finished=new(torch.bool, groups, num_particles),
    )
    launch(
        _open_kernel,
        (num_particles, groups),
        *(slots, state.seed, state.round_number, state.position, state.generated, state.num_blocks),
        *(as_bytes(state.active), state.temperature, state.draft_temperature, state.alpha, state.ess_threshold),
        *(state.log_evidence, state.previous, state.frontier, state.log_weights, as_bytes(state.finished)),
        *(state.block_table, opened.seed, opened.step, opened.lane, opened.position, opened.generated),
        *(opened.temperature, opened.draft_temperature, opened.alpha, opened.inputs, opened.block_table),
        *(opened.num_blocks, opened.needed_blocks, opened.group_seed, opened.group_alpha, opened.ess_threshold),
        *(opened.log_evidence, opened.log_weights, as_bytes(opened.finished)),
        *(num_particles, state.frontier.shape[1], columns, num_draft_tokens),
        PAGE_SIZE=page_size,
        BLOCK=_BLOCK,
        num_warps=1,
    )
    return opened


@triton.jit
def _is_stop(token, own_stop_ids, num_stop_ids, STOPS: tl.constexpr):
    """Whether each lane's token is among the stop ids."""
    index = tl.arange(0, STOPS)
    ids = tl.load(own_stop_ids + index, mask=index < num_stop_ids, other=-1)
    return tl.max((token[:, None] == ids[None, :]).to(tl.int32), axis=1) > 0


@triton.jit
def _ends_kernel(
    slots,
    tokens, draft_lse, score_lse,
    stop_ids, stop_state, max_tokens, generated, finished, log_weights, active, failed, stop_tables,
    end_out, failed_out,
    num_particles,
    state_particles,
    num_stop_ids,
    num_states,
    vocab_size,
    num_draft_tokens,
    TABLES: tl.constexpr,
    STOPS: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    let_next_start(PDL)
    group = tl.program_id(0)
    slot = tl.load(slots + group)
    lane = tl.arange(0, LANES)
    valid = lane < num_particles
    row, at = group * num_particles + lane, slot * state_particles + lane
    automaton = tl.load(stop_state + at, mask=valid, other=0)
    left = tl.load(max_tokens + slot) - tl.load(generated + slot)
    end = tl.zeros([LANES], tl.int64) + num_draft_tokens + 1
    bad = lane < 0
    for k in range(num_draft_tokens):
        lse = tl.load(score_lse + row * (num_draft_tokens + 1) + k, mask=valid, other=0.0)
        drawn_from = tl.load(draft_lse + row * num_draft_tokens + k, mask=valid, other=0.0)
        running = end > num_draft_tokens
        bad = bad | (running & ~(is_finite(lse) & is_finite(drawn_from)))
        token = tl.load(tokens + row * num_draft_tokens + k, mask=valid, other=0)
        ends = _is_stop(token, stop_ids + slot * num_stop_ids, num_stop_ids, STOPS) | (k + 1 >= left)
        if TABLES:
            automaton = tl.load(stop_tables + (slot * num_states + automaton) * vocab_size + token).to(tl.int64)
            ends = ends | (automaton == _MATCH)
        end = tl.where(running & ends, k + 1, end)
    lse = tl.load(score_lse + row * (num_draft_tokens + 1) + num_draft_tokens, mask=valid, other=0.0)
    bad = bad | ((end > num_draft_tokens) & ~is_finite(lse))
    counted = valid & (tl.load(finished + at, mask=valid, other=1) == 0) & (tl.load(active + slot) != 0)
    counted = counted & is_finite(tl.load(log_weights + at, mask=valid, other=float("-inf")))
    fails = tl.max((counted & bad).to(tl.int32), axis=0)
    tl.store(end_out + row, end, mask=valid)
    tl.store(failed_out + group, (fails | tl.load(failed + slot).to(tl.int32)).to(tl.int8))


def _stop_options(state: GroupState, stop_tables: Tensor | None, num_particles: int) -> tuple[Tensor, dict[str, int]]:
    """The table pointer and the sizes that the two kernels which look for ends share."""
    given = state.stop_state if stop_tables is None else stop_tables
    sizes = {
        "num_particles": num_particles,
        "state_particles": state.frontier.shape[1],
        "num_stop_ids": state.stop_ids.shape[1],
        "num_states": 0 if stop_tables is None else stop_tables.shape[1],
        "vocab_size": 0 if stop_tables is None else stop_tables.shape[2],
        "TABLES": stop_tables is not None,
        "STOPS": next_power_of_2(state.stop_ids.shape[1]),
        "LANES": next_power_of_2(num_particles),
        "num_warps": 1 if num_particles <= 32 else 4,
    }
    return given, sizes


def find_ends(
    state: GroupState,
    slots: Tensor,
    tokens: Tensor,
    draft_lse: Tensor,
    score_lse: Tensor,
    stop_tables: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Find where draft tokens end each particle, and which groups failed, in one launch; see the reference."""
    groups, num_particles, num_draft_tokens = tokens.shape
    end = torch.empty((groups, num_particles), dtype=torch.int64, device=slots.device)
    failed = torch.empty(groups, dtype=torch.bool, device=slots.device)
    table, sizes = _stop_options(state, stop_tables, num_particles)
    launch(
        _ends_kernel,
        (groups,),
        *(slots, tokens.contiguous(), draft_lse.contiguous(), score_lse.contiguous(), state.stop_ids),
        *(state.stop_state, state.max_tokens, state.generated, as_bytes(state.finished), state.log_weights),
        *(as_bytes(state.active), as_bytes(state.failed), table, end, as_bytes(failed)),
        num_draft_tokens=num_draft_tokens,
        **sizes,
    )
    return end, failed


@triton.jit
def _commit_kernel(  # noqa: PLR0915 - one idea: a group's tokens, one after the other
    slots,
    tokens, log_p, bonus_tokens, bonus_log_p, bonus_zeta, log_weights, committed, end, failed,
    stop_ids, max_tokens, active, stop_tables,
    position, generated, round_number, failed_state,
    finished, length, end_kind, stop_state, frontier, previous, history, history_log_p,
    weights_out, round_number_out, eligible_out, shared_out,
    num_particles,
    state_particles,
    num_stop_ids,
    num_states,
    vocab_size,
    num_draft_tokens,
    history_size,
    PAGE_SIZE: tl.constexpr,
    TABLES: tl.constexpr,
    STOPS: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    let_next_start(PDL)
    group = tl.program_id(0)
    slot = tl.load(slots + group)
    lane = tl.arange(0, LANES)
    valid = lane < num_particles
    row, at = group * num_particles + lane, slot * state_particles + lane
    stands, fails = tl.load(committed + group), tl.load(failed + group) != 0
    moves = (tl.load(active + slot) != 0) & (fails == 0)
    before, place = tl.load(generated + slot), tl.load(position + slot)
    left = tl.load(max_tokens + slot) - before
    was_over = tl.load(finished + at, mask=valid, other=1) != 0

    weight = tl.load(log_weights + row, mask=valid, other=float("-inf"))
    takes = (was_over == 0) & (tl.load(end + row, mask=valid, other=0) > stands) & (fails == 0) & is_finite(weight)
    zeta = tl.load(bonus_zeta + row, mask=valid, other=0.0).to(tl.float64)
    tl.store(weights_out + row, weight + tl.where(takes, zeta, 0.0), mask=valid)

    writes = valid & moves
    automaton = tl.load(stop_state + at, mask=valid, other=0)
    over, kind = was_over, tl.zeros([LANES], tl.int64)
    size = tl.zeros([LANES], tl.int64)
    bonus = tl.load(bonus_tokens + row, mask=valid, other=0)
    bonus_p = tl.load(bonus_log_p + row, mask=valid, other=0.0)
    for k in range(stands + 1):
        is_draft = k < stands
        source = row * num_draft_tokens + k
        token = tl.where(is_draft, tl.load(tokens + source, mask=valid & is_draft, other=0), bonus)
        chance = tl.where(is_draft, tl.load(log_p + source, mask=valid & is_draft, other=0.0), bonus_p)
        column = at * history_size + before + k
        tl.store(history + column, token, mask=writes)
        tl.store(history_log_p + column, chance, mask=writes)
        stops = _is_stop(token, stop_ids + slot * num_stop_ids, num_stop_ids, STOPS)
        if TABLES:
            automaton = tl.load(stop_tables + (slot * num_states + automaton) * vocab_size + token).to(tl.int64)
            stops = stops | (automaton == _MATCH)
        ends_now = (over == 0) & (stops | (k + 1 >= left))
        kind = tl.where(ends_now, tl.where(stops, _STOP, _LENGTH), kind)
        size = tl.where(ends_now, before + k + 1, size)
        over = over | ends_now
    ended = writes & (kind != _NONE)
    tl.store(length + at, size, mask=ended)
    tl.store(end_kind + at, kind, mask=ended)
    tl.store(finished + at, over.to(tl.int8), mask=writes)
    # Before the bonus stands the last draft token that does, or the old frontier.
    has_draft = stands > 0
    last_draft = tl.load(tokens + row * num_draft_tokens + stands - 1, mask=valid & has_draft, other=0)
    before_bonus = tl.where(has_draft, last_draft, tl.load(frontier + at, mask=valid, other=0))
    tl.store(previous + at, before_bonus, mask=writes)
    tl.store(frontier + at, bonus, mask=writes)
    tl.store(stop_state + at, automaton, mask=writes)
    # A group that does not move keeps its particles as they are, ended or not.
    unfinished = tl.max((valid & (over == 0)).to(tl.int32), axis=0) > 0
    after = place + tl.where(moves, stands + 1, 0)
    # Every lane has read these before any thread writes them.
    tl.debug_barrier()
    number = tl.load(round_number + slot) + 1
    tl.store(round_number_out + group, number)
    tl.store(eligible_out + group, (moves & unfinished).to(tl.int8))
    tl.store(shared_out + group, tl.maximum(after - 1, 0) // PAGE_SIZE)
    tl.debug_barrier()
    tl.store(round_number + slot, number)
    tl.store(position + slot, after)
    tl.store(generated + slot, before + tl.where(moves, stands + 1, 0))
    tl.store(failed_state + slot, fails.to(tl.int8))


def commit(
    state: GroupState,
    slots: Tensor,
    tokens: Tensor,
    log_p: Tensor,
    bonus: Sampled,
    log_weights: Tensor,
    committed: Tensor,
    end: Tensor,
    failed: Tensor,
    stop_tables: Tensor | None,
    page_size: int,
) -> Committed:
    """Append a round's tokens, end particles, move the frontier, in one launch; see the reference."""
    groups, num_particles, num_draft_tokens = tokens.shape
    device = slots.device
    result = Committed(
        torch.empty((groups, num_particles), dtype=torch.float64, device=device),
        torch.empty(groups, dtype=torch.int64, device=device),
        torch.empty(groups, dtype=torch.bool, device=device),
        torch.empty(groups, dtype=torch.int64, device=device),
    )
    table, sizes = _stop_options(state, stop_tables, num_particles)
    launch(
        _commit_kernel,
        (groups,),
        *(slots, tokens.contiguous(), log_p.contiguous(), bonus.tokens, bonus.log_prob, bonus.log_zeta),
        *(log_weights.contiguous(), committed, end, as_bytes(failed), state.stop_ids, state.max_tokens),
        *(as_bytes(state.active), table, state.position, state.generated, state.round_number),
        *(as_bytes(state.failed), as_bytes(state.finished), state.length, state.end_kind, state.stop_state),
        *(state.frontier, state.previous, state.tokens, state.log_probs, result.log_weights, result.round_number),
        *(as_bytes(result.eligible), result.shared_blocks),
        num_draft_tokens=num_draft_tokens,
        history_size=state.tokens.shape[2],
        PAGE_SIZE=page_size,
        **sizes,
    )
    return result


@triton.jit
def _inherit_kernel(
    slots,
    ancestors, block_table, log_weights,
    generated,
    state_weights, state_table, finished, length, end_kind, stop_state, frontier, previous, history, history_log_p,
    num_particles,
    state_particles,
    columns,
    history_size,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    let_next_start(PDL)
    lane, group = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slots + group)
    row, at = group * num_particles + lane, slot * state_particles + lane
    tl.store(state_weights + at, tl.load(log_weights + row))
    _copy_row(block_table + row * columns, state_table + at * columns, columns, BLOCK)
    ancestor = tl.load(ancestors + row)
    if ancestor != lane:
        source = slot * state_particles + ancestor
        tl.store(finished + at, tl.load(finished + source))
        tl.store(length + at, tl.load(length + source))
        tl.store(end_kind + at, tl.load(end_kind + source))
        tl.store(stop_state + at, tl.load(stop_state + source))
        tl.store(frontier + at, tl.load(frontier + source))
        tl.store(previous + at, tl.load(previous + source))
        count = tl.load(generated + slot)
        _copy_row(history + source * history_size, history + at * history_size, count, BLOCK)
        _copy_row(history_log_p + source * history_size, history_log_p + at * history_size, count, BLOCK)


@triton.jit
def _close_kernel(  # noqa: PLR0915 - one idea: a group's row of the summary
    slots,
    ancestors, log_weights, log_evidence, ess, resampled, committed, recovered, exhausted, num_blocks,
    generated, position, failed, finished, length, history,
    active, settled, state_blocks, state_evidence,
    packed,
    num_particles,
    state_particles,
    history_size,
    width,
    HEADER: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(PDL)
    let_next_start(PDL)
    group = tl.program_id(0)
    slot = tl.load(slots + group)
    lane = tl.arange(0, LANES)
    valid = lane < num_particles
    row, at = group * num_particles + lane, slot * state_particles + lane
    live = valid & is_finite(tl.load(log_weights + row, mask=valid, other=float("-inf")))
    over = tl.load(finished + at, mask=valid, other=1) != 0
    count = tl.load(generated + slot)
    was_active = tl.load(active + slot) != 0
    unfinished = tl.max((valid & (over == 0)).to(tl.int32), axis=0) > 0
    fails = tl.load(failed + slot) != 0
    is_active = was_active & (fails == 0) & unfinished

    # A group without a live particle shows particle 0, and has settled all that was written.
    first = tl.min(tl.where(live, lane, LANES), axis=0)
    first = tl.where(first == LANES, 0, first)
    any_live = tl.max(live.to(tl.int32), axis=0) > 0
    limit = tl.where(over, tl.load(length + at, mask=valid, other=0), count)
    limit = tl.min(tl.where(live, limit, history_size), axis=0)
    shown = history + (slot * state_particles + first) * history_size
    # What has settled stays so: the search goes on where it ended before.
    reached = tl.load(settled + slot)
    agree = any_live
    while agree & (reached < limit):
        column = reached + tl.arange(0, BLOCK)
        inside = column < limit
        mine = tl.load(shown + column, mask=inside, other=0)
        theirs = tl.load(
            history + (at * history_size)[:, None] + column[None, :], mask=live[:, None] & inside[None, :], other=0
        )
        differs = (theirs != mine[None, :]) & live[:, None]
        differs = (tl.max(differs.to(tl.int32), axis=0) > 0) & inside
        where = tl.min(tl.where(differs, column, limit), axis=0)
        where = tl.minimum(where, reached + BLOCK)
        agree = where == reached + BLOCK
        reached = tl.minimum(where, limit)
    reached = tl.where(any_live, reached, history_size)

    out = packed + group * width
    for start in range(0, history_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < history_size
        token = tl.load(shown + column, mask=inside, other=0)
        tl.store(out + HEADER + num_particles + column, token.to(tl.float64), mask=inside)
    tl.store(out + HEADER + lane, tl.load(ancestors + row, mask=valid, other=0).to(tl.float64), mask=valid)
    tl.store(out + 0, count.to(tl.float64))
    tl.store(out + 1, tl.load(position + slot).to(tl.float64))
    tl.store(out + 2, reached.to(tl.float64))
    tl.store(out + 3, tl.load(committed + group).to(tl.float64))
    tl.store(out + 4, (is_active == 0).to(tl.float64))
    tl.store(out + 5, fails.to(tl.float64))
    tl.store(out + 6, ((tl.load(recovered + group) != 0) & was_active).to(tl.float64))
    tl.store(out + 7, (tl.load(resampled + group) != 0).to(tl.float64))
    tl.store(out + 8, tl.load(ess + group))
    tl.store(out + 9, (tl.load(exhausted) != 0).to(tl.float64))
    tl.debug_barrier()
    tl.store(active + slot, is_active.to(tl.int8))
    tl.store(settled + slot, reached)
    tl.store(state_blocks + slot, tl.load(num_blocks + group))
    tl.store(state_evidence + slot, tl.load(log_evidence + group))


def close_round(
    state: GroupState,
    slots: Tensor,
    decided: Resampled,
    block_table: Tensor,
    num_blocks: Tensor,
    committed: Tensor,
    recovered: Tensor,
    exhausted: Tensor,
) -> Tensor:
    """Write the round's end into the slots and sum it up, in two launches; see the reference."""
    groups, num_particles, columns = block_table.shape
    state_particles, history_size = state.tokens.shape[1:]
    ancestors, weights = decided.ancestors.contiguous(), decided.log_weights.contiguous()
    launch(
        _inherit_kernel,
        (num_particles, groups),
        *(slots, ancestors, block_table.contiguous(), weights, state.generated, state.log_weights),
        *(state.block_table, as_bytes(state.finished), state.length, state.end_kind, state.stop_state),
        *(state.frontier, state.previous, state.tokens, state.log_probs),
        *(num_particles, state_particles, columns, history_size),
        BLOCK=_BLOCK,
        num_warps=1,
    )
    width = SUMMARY_COLUMNS + num_particles + history_size
    packed = torch.empty((groups, width), dtype=torch.float64, device=slots.device)
    launch(
        _close_kernel,
        (groups,),
        *(slots, ancestors, weights, decided.log_evidence.contiguous(), decided.ess, as_bytes(decided.resampled)),
        *(committed, as_bytes(recovered), exhausted.view(torch.int8), num_blocks.contiguous()),
        *(state.generated, state.position, as_bytes(state.failed), as_bytes(state.finished), state.length),
        *(state.tokens, as_bytes(state.active), state.settled, state.num_blocks, state.log_evidence, packed),
        *(num_particles, state_particles, history_size, width),
        HEADER=SUMMARY_COLUMNS,
        LANES=next_power_of_2(num_particles),
        BLOCK=max(16, 2048 // next_power_of_2(num_particles)),
        num_warps=4,
    )
    return packed
