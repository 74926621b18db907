"""The bookkeeping of a round: what its passes read, where particles end, what is committed, what has settled.

These functions change a `GroupState` in place, at the slots of a batch. In the order of a round:

    open_round   rows for the passes: draw names, positions, temperatures, a working copy of the block tables
    find_ends    where each particle's draft tokens end it, and which groups met NaN
    commit       append draft tokens and bonus, end particles, move the frontier
    close_round  let copies inherit from their ancestors, count what settled, and pack a summary for the host

Example, K = 2, frontier at position 9, two of max_tokens 8 left: draft tokens d1, d2 and the bonus are committed, d2 ends
the particle by length (end 2), the frontier moves to position 12 and `generated` grows by 3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smc_plugin.group_state import END_LENGTH, END_NONE, END_STOP, STOP_MATCH, GroupState
from smc_plugin.reference.resample import Resampled
from smc_plugin.reference.sampling import Sampled

SUMMARY_COLUMNS = 10  # before the ancestors; see close_round


@dataclass(frozen=True)
class Opened:
    """What a round's passes and weights need.

    Args:
        seed, step, lane: [R] int64, names of the round's draws, one row a particle in group-major order, R = G * N.
        position, generated: [R] int64.
        temperature, draft_temperature, alpha: [R] float32.
        inputs: [R, 2] int64, previous and frontier tokens.
        block_table: [G, N, B + 1] int32, a copy to work on.
        num_blocks, needed_blocks: [G] int64, pages each particle has, and must have for this round.
        group_seed: [G] int64; group_alpha: [G] float32; ess_threshold, log_evidence: [G] float64.
        log_weights: [G, N] float64; finished: [G, N] bool.
    """

    seed: Tensor
    step: Tensor
    lane: Tensor
    position: Tensor
    generated: Tensor
    temperature: Tensor
    draft_temperature: Tensor
    alpha: Tensor
    inputs: Tensor
    block_table: Tensor
    num_blocks: Tensor
    needed_blocks: Tensor
    group_seed: Tensor
    group_alpha: Tensor
    ess_threshold: Tensor
    log_evidence: Tensor
    log_weights: Tensor
    finished: Tensor


@dataclass(frozen=True)
class Committed:
    """What resampling needs after a commit.

    Args:
        log_weights: [G, N] float64, the bonus's included.
        round_number: [G] int64, names the resampling draw.
        eligible: [G] bool, whether the group may resample: it runs and some particle is unfinished.
        shared_blocks: [G] int64, leading pages that no particle will write again.
    """

    log_weights: Tensor
    round_number: Tensor
    eligible: Tensor
    shared_blocks: Tensor


def per_row(values: Tensor, repeats: int) -> Tensor:
    """[G, ...] to [G * repeats, ...], contiguous, each group's value `repeats` times in a row."""
    # contiguous: of a single group, reshape would return a view of stride 0, which no kernel expects.
    return values[:, None].expand(-1, repeats, *values.shape[1:]).reshape(-1, *values.shape[1:]).contiguous()


def open_round(state: GroupState, slots: Tensor, num_particles: int, num_draft_tokens: int, page_size: int) -> Opened:
    """Read what a round's passes need.

    Args:
        state: all slots, unchanged.
        slots: [G] int64.
        num_draft_tokens: K; the round writes positions up to position + K.
    """
    group = state.gather(slots, num_particles)
    needed = torch.where(group.active, (group.position + num_draft_tokens) // page_size + 1, group.num_blocks)
    return Opened(
        seed=per_row(group.seed, num_particles),
        step=per_row(group.round_number + 1, num_particles),
        lane=torch.arange(num_particles, device=slots.device).expand_as(group.frontier).reshape(-1),
        position=per_row(group.position, num_particles),
        generated=per_row(group.generated, num_particles),
        temperature=per_row(group.temperature, num_particles),
        draft_temperature=per_row(group.draft_temperature, num_particles),
        alpha=per_row(group.alpha, num_particles),
        inputs=torch.stack([group.previous.reshape(-1), group.frontier.reshape(-1)], dim=1),
        block_table=group.block_table.contiguous(),
        num_blocks=group.num_blocks,
        needed_blocks=torch.maximum(needed, group.num_blocks),
        group_seed=group.seed,
        group_alpha=group.alpha,
        ess_threshold=group.ess_threshold,
        log_evidence=group.log_evidence,
        log_weights=group.log_weights,
        finished=group.finished,
    )


def find_ends(
    state: GroupState,
    slots: Tensor,
    tokens: Tensor,
    draft_lse: Tensor,
    score_lse: Tensor,
    stop_tables: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Find where draft tokens end each particle, and which groups met a row without finite logits before that.

    Args:
        state: all slots, unchanged.
        slots: [G] int64.
        tokens: [G, N, K] int64, drafted.
        draft_lse: [G, N, K] float32, log-sum-exp of the rows that the tokens were drawn from.
        score_lse: [G, N, K + 1] float32, of the target's rows; not finite means NaN or nothing finite.
        stop_tables: [S, states, V] int8, one automaton a slot, or None.
    Returns:
        end [G, N] int64: 1-based draft token that ends the particle, K + 1 where none does; failed [G] bool: this
        round or before, an unfinished, live particle's row at or before its end was not finite.
    """
    group = state.gather(slots, tokens.shape[1])
    limit = torch.full_like(group.generated, tokens.shape[-1])
    end, _, _ = _first_end(group, tokens, limit, stop_tables)
    bad = ~score_lse.isfinite()
    bad[..., :-1] |= ~draft_lse.isfinite()
    index = torch.arange(score_lse.shape[-1], device=end.device)
    bad = (bad & (index < end[..., None])).any(dim=-1)
    counted = ~group.finished & group.log_weights.isfinite() & group.active[:, None]
    return end, group.failed | (counted & bad).any(dim=1)


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
    """Append a round's tokens, end particles, add the bonus's weight, move the frontier.

    Args:
        state: all slots; tokens, log_probs, length, end_kind, finished, stop_state, previous, frontier, generated,
            position, round_number and failed change at `slots`.
        slots: [G] int64.
        tokens: [G, N, K] int64 draft tokens; log_p: [G, N, K] float32 of them under the target.
        bonus: [G * N] rows; its token follows the committed draft tokens.
        log_weights: [G, N] float64 after the draft tokens.
        committed: [G] int64, draft tokens that stand.
        end: [G, N], see find_ends. failed: [G] bool; a failed group does not move.
        stop_tables: see find_ends.
        page_size: tokens a page.
    """
    num_particles = tokens.shape[1]
    group = state.gather(slots, num_particles)
    takes_bonus = ~group.finished & (end > committed[:, None]) & ~failed[:, None] & log_weights.isfinite()
    log_weights = log_weights + torch.where(takes_bonus, bonus.log_zeta.view_as(end), 0.0)

    place = committed[:, None, None].expand(-1, num_particles, 1)
    bonus_token, bonus_log_p = bonus.tokens.view_as(end)[..., None], bonus.log_prob.view_as(end)[..., None]
    emitted = torch.cat([tokens, bonus_token], dim=-1).scatter(2, place, bonus_token)
    log_p = torch.cat([log_p, bonus_log_p], dim=-1).scatter(2, place, bonus_log_p)
    moves = group.active & ~failed
    last_end, kind, states = _first_end(group, emitted, committed + 1, stop_tables)
    ends = (kind != END_NONE) & ~group.finished & moves[:, None]
    columns = group.generated[:, None, None] + torch.arange(emitted.shape[-1], device=end.device)
    columns = columns.expand_as(emitted)
    with_frontier = torch.cat([group.frontier[..., None], emitted], dim=-1)
    step, keep = torch.where(moves, committed + 1, 0), ~moves[:, None]
    group = replace(
        group,
        tokens=group.tokens.scatter(2, columns, emitted),
        log_probs=group.log_probs.scatter(2, columns, log_p),
        length=torch.where(ends, group.generated[:, None] + last_end, group.length),
        end_kind=torch.where(ends, kind, group.end_kind),
        finished=group.finished | ends,
        previous=torch.where(keep, group.previous, with_frontier.gather(2, place)[..., 0]),
        frontier=torch.where(keep, group.frontier, emitted.gather(2, place)[..., 0]),
        stop_state=torch.where(keep, group.stop_state, states.gather(2, place)[..., 0]),
        generated=group.generated + step,
        position=group.position + step,
        round_number=group.round_number + 1,
        failed=failed,
    )
    state.scatter(slots, group)
    eligible = group.active & ~failed & (~group.finished).any(dim=1)
    shared = (group.position - 1).clamp(min=0) // page_size
    return Committed(log_weights, group.round_number, eligible, shared)


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
    """Write the round's end into the slots and sum it up for the host.

    Args:
        state: all slots; particles inherit from their ancestors, weights, evidence, block tables, settled and active change
            at `slots`.
        slots: [G] int64.
        decided: what resampling decided.
        block_table: [G, N, B + 1] int32 and num_blocks: [G] int64, after this round.
        committed: [G] int64; recovered: [G] bool; exhausted: [] bool, the page pool ran out.
    Returns:
        [G, SUMMARY_COLUMNS + N + T] float64: generated, position, settled, committed, done, failed, recovered, resampled,
        ess, exhausted; ancestors; the history of a live particle, whose first `settled` entries are final.
    """
    group, ancestors = state.gather(slots, block_table.shape[1]), decided.ancestors
    history = ancestors[..., None].expand_as(group.tokens)
    inherited = {name: getattr(group, name).gather(1, ancestors) for name in _INHERITED}
    group = replace(
        group,
        **inherited,
        tokens=group.tokens.gather(1, history),
        log_probs=group.log_probs.gather(1, history),
        block_table=block_table,
        num_blocks=num_blocks,
        log_weights=decided.log_weights,
        log_evidence=decided.log_evidence,
    )
    recovered = recovered & group.active
    active = group.active & ~group.failed & ~group.finished.all(dim=1)
    settled, tokens = _settled(group)
    state.scatter(slots, replace(group, active=active, settled=settled))
    numbers = [group.generated, group.position, settled, committed, ~active, group.failed, recovered, decided.resampled]
    numbers += [decided.ess, exhausted.expand_as(settled)]
    columns = torch.stack([number.to(torch.float64) for number in numbers], dim=1)
    return torch.cat([columns, ancestors.to(torch.float64), tokens.to(torch.float64)], dim=1)


_INHERITED = ("finished", "length", "end_kind", "stop_state", "frontier", "previous")


def _first_end(
    group: GroupState, tokens: Tensor, limit: Tensor, stop_tables: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the first token that ends each particle.

    Args:
        tokens: [G, N, J]; only the first limit [G] of them count.
    Returns:
        end [G, N]: 1-based, J + 1 where none ends it; kind [G, N]: END_NONE, END_STOP or END_LENGTH;
        states [G, N, J]: the stop automaton after each token (the old state where there is none).
    """
    index = torch.arange(1, tokens.shape[-1] + 1, device=tokens.device)
    stopped = (tokens[..., None] == group.stop_ids[:, None, None]).any(dim=-1)
    states = group.stop_state[..., None].expand_as(tokens)
    if stop_tables is not None:
        states = _advance(stop_tables, group, tokens)
        stopped |= states == STOP_MATCH
    at_length = (group.generated[:, None] + index >= group.max_tokens[:, None])[:, None]
    ends = (stopped | at_length) & (index <= limit[:, None])[:, None]
    if tokens.shape[-1] == 0:
        return torch.ones_like(group.length), torch.zeros_like(group.length), states
    found = ends.any(dim=-1)
    first = ends.long().argmax(dim=-1)
    by_stop = stopped.gather(2, first[..., None])[..., 0]
    kind = torch.where(found, torch.where(by_stop, END_STOP, END_LENGTH), END_NONE)
    return torch.where(found, first + 1, tokens.shape[-1] + 1), kind, states


def _advance(tables: Tensor, group: GroupState, tokens: Tensor) -> Tensor:
    """Run each particle's stop automaton over its tokens [G, N, J]; returns the state after each."""
    state, states = group.stop_state, []
    for column in tokens.unbind(dim=-1):
        state = tables[group.slot[:, None], state, column].long()
        states.append(state)
    return torch.stack(states, dim=-1) if states else state[..., None].expand_as(tokens)


def _settled(group: GroupState) -> tuple[Tensor, Tensor]:
    """Count the generated tokens that all live particles share; they can never change any more.

    Returns:
        their number [G] int64, and a live particle's history [G, T] that begins with them.
    """
    live = group.log_weights.isfinite()
    first = live.long().argmax(dim=1)[:, None, None].expand(-1, 1, group.tokens.shape[-1])
    history = group.tokens.gather(1, first)
    agree = ((group.tokens == history) | ~live[..., None]).all(dim=1)
    limit = torch.where(group.finished, group.length, group.generated[:, None])
    limit = torch.where(live, limit, group.tokens.shape[-1]).amin(dim=1)
    within = torch.arange(group.tokens.shape[-1], device=first.device) < limit[:, None]
    return (agree & within).long().cumprod(dim=-1).sum(dim=-1), history[:, 0]
