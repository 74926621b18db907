"""One round of the algorithm: draft, score, weigh, commit, resample.

A round sees device state only. Its shapes are fixed by a `RoundKind` and the number of slots, nothing is decided on the
host, and no value is read back, so that the same function can be captured as one CUDA graph. What the host may want to
know comes back as a `RoundSummary` of small tensors.

One round of one request with N = 2, K = 2 and frontier b at position 9, deferred bonus: the draft runs [token 8, b] at
positions 8 and 9 and draws d1, runs d1 at position 10 and draws d2; the target runs [b, d1, d2] at positions 9 to 11 and
draws the bonus from its last row; the new frontier is the bonus at position 12.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smc_engines.config import DraftSchedule
from smc_engines.model import PagedModel
from smc_engines.state import END_LENGTH, END_NONE, END_STOP, STOP_MATCH, GroupState
from smc_plugin.reference import pages, random, resample, sampling, weights


@dataclass(frozen=True)
class RoundKind:
    """What fixes a round's shapes and branches; requests of one kind run together.

    Args:
        speculative: lossless accept-reject instead of weights (num_particles is 1).
        filtered: some request uses top-k, top-p, min-p or min_tokens.
        stop_strings: some request has stop strings.
    """

    num_particles: int
    num_draft_tokens: int
    speculative: bool = False
    filtered: bool = False
    stop_strings: bool = False
    draft_schedule: DraftSchedule = "deferred"


@dataclass(frozen=True)
class RoundSummary:
    """What the host may read after a round, one row a group.

    Args:
        generated, position, settled, accepted: [G] int64. settled counts generated tokens that all live particles share.
        done, failed, recovered, resampled: [G] bool.
        ess: [G] float64, before resampling.
        ancestors: [G, N] int64.
        tokens: [G, T] int64, history of a live particle; its first `settled` entries are final.
        pool_exhausted: [] bool, never true while admission holds.
    """

    generated: Tensor
    position: Tensor
    settled: Tensor
    accepted: Tensor
    done: Tensor
    failed: Tensor
    recovered: Tensor
    resampled: Tensor
    ess: Tensor
    ancestors: Tensor
    tokens: Tensor
    pool_exhausted: Tensor

    def pack(self) -> Tensor:
        """Put everything into one float64 tensor [G, columns], so that the host needs one copy."""
        groups = self.generated.shape[0]
        exhausted = self.pool_exhausted.expand(groups)
        columns = [self.generated, self.position, self.settled, self.accepted, self.done, self.failed, self.recovered]
        columns += [self.resampled, self.ess, exhausted]
        parts = [torch.stack([column.to(torch.float64) for column in columns], dim=1)]
        return torch.cat([*parts, self.ancestors.to(torch.float64), self.tokens.to(torch.float64)], dim=1)

    @classmethod
    def unpack(cls, packed: Tensor, num_particles: int) -> RoundSummary:
        """Undo `pack`; integers below 2^53 come back exactly."""
        generated, position, settled, accepted = packed[:, :4].long().unbind(dim=1)
        done, failed, recovered, resampled = (packed[:, 4:8] > 0).unbind(dim=1)
        return cls(
            generated,
            position,
            settled,
            accepted,
            done,
            failed,
            recovered,
            resampled,
            ess=packed[:, 8],
            ancestors=packed[:, 10 : 10 + num_particles].long(),
            tokens=packed[:, 10 + num_particles :].long(),
            pool_exhausted=(packed[:, 9] > 0).any(),
        )


@dataclass(frozen=True)
class Draft:
    """Proposed tokens [G, N, K], their log q, scaled draft logits [G, N, K, V], and whether each row was usable."""

    tokens: Tensor
    log_q: Tensor
    scaled: Tensor
    usable: Tensor


@dataclass(frozen=True)
class Score:
    """Scaled target logits [G, N, K + 1, V], log p of the draft tokens [G, N, K], log-sum-exp [G, N, K + 1]."""

    scaled: Tensor
    log_p: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Emission:
    """Tokens of a round.

    Args:
        tokens: [G, N, K + 1]; the bonus stands right after the committed draft tokens, what follows it is void.
        log_p: [G, N, K + 1] float32 of those tokens.
        committed: [G] draft tokens that stand.
    """

    tokens: Tensor
    log_p: Tensor
    committed: Tensor


@dataclass(frozen=True)
class RoundContext:
    """What a round works with beside the group rows.

    Args:
        draft: None when no request of this kind drafts.
        ref_count: [P] int32, page reference counts.
        stop_tables: [S, states, V] int8, one automaton a slot, or None.
        max_context: no context is longer than this after the round (known to the host; bounds gathers on a CPU).
    """

    kind: RoundKind
    target: PagedModel
    draft: PagedModel | None
    ref_count: Tensor
    stop_tables: Tensor | None
    max_context: int


def run_round(context: RoundContext, state: GroupState, slots: Tensor) -> RoundSummary:
    """Run one round for the groups in `slots`.

    Args:
        context: models, pages and the kind of round.
        state: all slots; changed in place.
        slots: [G] int64, all of the context's kind; the spare slot may pad the batch.
    """
    group = state.gather(slots, context.kind.num_particles)
    group, exhausted = _reserve_pages(context, group)
    draft = _propose(context, group)
    score = _score(context, group, draft)
    if context.kind.speculative:
        emission, group, recovered = _verify(context, group, draft, score)
    else:
        emission, group, recovered = _weigh(context, group, draft, score)
    group = _commit(context, group, emission)
    group, ancestors, ess, resampled = _resample_if_needed(context, group)
    group = _close_finished(group)
    state.scatter(slots, group)
    settled, tokens = settled_tokens(group)
    return RoundSummary(
        group.generated,
        group.position,
        settled,
        emission.committed,
        ~group.active,
        group.failed,
        recovered,
        resampled,
        ess,
        ancestors,
        tokens,
        exhausted,
    )


def begin(
    context: RoundContext, state: GroupState, slot: Tensor, prompt_end: Tensor, last_token: Tensor, logits: Tensor
) -> RoundSummary:
    """Turn a prefilled prompt into N particles, each with its own first token.

    The prompt's pages are held by particle 0 until now; full ones become shared, the last one is copied.

    Args:
        slot: [1] int64.
        prompt_end: [1] int64, position after the prompt, where the frontier will stand.
        last_token: [1] int64, the prompt's last token.
        logits: [1, V] of the target after the prompt.
    """
    kind = context.kind
    group = state.gather(slot, kind.num_particles)
    shared = (prompt_end - 1) // context.target.page_size
    others = group.block_table[:, 1:]
    exhausted = pages.reserve(context.ref_count, others, shared, shared + 1, 1)
    ancestors = torch.zeros_like(group.frontier)
    _fork_pages(context, group.block_table, ancestors, shared)

    scaled = _shape(context, group, sampling.scale(logits, group.temperature), torch.zeros_like(group.generated))
    lse = scaled.logsumexp(dim=-1)
    zero = torch.zeros_like(group.seed)
    u = random.uniform(group.seed, zero, zero, zero + random.PURPOSE_FIRST)
    tokens = sampling.systematic_tokens(scaled * group.alpha[:, None], u, kind.num_particles)
    zeta = sampling.log_zeta(scaled, lse, group.alpha).to(torch.float64)
    group = replace(
        group,
        failed=~lse.isfinite(),
        position=prompt_end - 1,  # _commit moves it past the one token drawn here
        generated=zero,
        round_number=zero,
        num_blocks=shared + 1,
        frontier=last_token[:, None].expand_as(tokens),
        log_weights=zeta[:, None].expand_as(group.log_weights).nan_to_num(),
        log_evidence=torch.zeros_like(group.log_evidence),
        finished=torch.zeros_like(group.finished),
        active=torch.ones_like(group.active),
        stop_state=torch.zeros_like(group.stop_state),
    )
    log_p = scaled.gather(1, tokens) - lse[:, None]
    group = _commit(context, group, Emission(tokens[..., None], log_p[..., None], zero))
    group = _close_finished(group)
    state.scatter(slot, group)
    no = torch.zeros_like(group.failed)
    ess = weights.effective_sample_size(group.log_weights)
    settled, history = settled_tokens(group)
    return RoundSummary(
        *(group.generated, group.position, settled, zero, ~group.active, group.failed, no, no, ess),
        ancestors=torch.arange(kind.num_particles, device=slot.device).expand_as(group.frontier),
        tokens=history,
        pool_exhausted=exhausted,
    )


def _reserve_pages(context: RoundContext, group: GroupState) -> tuple[GroupState, Tensor]:
    """Give every active particle pages up to position + K, the last place this round writes."""
    page_size, k = context.target.page_size, context.kind.num_draft_tokens
    needed = torch.where(group.active, (group.position + k) // page_size + 1, group.num_blocks)
    table = group.block_table.clone()
    exhausted = pages.reserve(context.ref_count, table, group.num_blocks, needed, k // page_size + 2)
    return replace(group, block_table=table, num_blocks=torch.maximum(group.num_blocks, needed)), exhausted


def _shape(context: RoundContext, group: GroupState, scaled: Tensor, index: Tensor) -> Tensor:
    """Apply the requests' filters to scaled logits; index counts the tokens generated before each row.

    Args:
        scaled: [G * m, V] in group-major order; index: [G * m] or [G].
    """
    if not context.kind.filtered:
        return scaled
    repeats = scaled.shape[0] // group.top_k.shape[0]

    def rows(values: Tensor) -> Tensor:
        return values.repeat_interleave(repeats, dim=0, output_size=scaled.shape[0])

    scaled = sampling.ban_tokens(scaled, rows(group.stop_ids), index < rows(group.min_tokens))
    return sampling.apply_filters(scaled, rows(group.top_k), rows(group.top_p), rows(group.min_p))


def _names(group: GroupState, purpose: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Names of one draw per particle, each [G * N]: seed, step, lane, purpose (see random)."""
    num_particles = group.frontier.shape[1]
    seed = group.seed[:, None].expand_as(group.frontier).reshape(-1)
    step = (group.round_number[:, None] + 1).expand_as(group.frontier).reshape(-1)
    lane = torch.arange(num_particles, device=seed.device).expand_as(group.frontier).reshape(-1)
    return seed, step, lane, torch.full_like(seed, purpose)


def _propose(context: RoundContext, group: GroupState) -> Draft:
    """Draw K tokens a particle from the draft, in K passes (one more in the legacy schedule)."""
    groups, particles = group.frontier.shape
    k, draft = context.kind.num_draft_tokens, context.draft
    if k == 0 or draft is None:
        empty = group.log_weights.new_zeros((groups, particles, 0), dtype=torch.float32)
        return Draft(empty.long(), empty, empty[..., None], torch.ones_like(group.finished))
    table = group.block_table.flatten(0, 1)
    position = group.position.repeat_interleave(particles, output_size=groups * particles)
    temperature = group.draft_temperature.repeat_interleave(particles, output_size=groups * particles)
    frontier = group.frontier.reshape(-1, 1)
    if context.kind.draft_schedule == "deferred":
        inputs, start = torch.cat([group.previous.reshape(-1, 1), frontier], dim=1), position - 1
    else:
        inputs, start = frontier, position
    generated = group.generated.repeat_interleave(particles, output_size=groups * particles)
    tokens, log_q, kept, usable = [], [], [], []
    for step in range(k):
        hidden = draft.forward(inputs, start, table, context.max_context)
        scaled = sampling.scale(draft.logits(hidden[:, -1]), temperature)
        scaled = _shape(context, group, scaled, generated + step)
        token = sampling.draw(scaled, *_names(group, random.PURPOSE_DRAFT + random.PURPOSE_STRIDE * step))
        chosen, lse = sampling.log_prob(scaled, token)
        tokens.append(token)
        log_q.append(chosen)
        usable.append(lse.isfinite())
        if context.kind.speculative:
            kept.append(scaled)
        inputs, start = token[:, None], position + 1 + step
    if context.kind.draft_schedule == "legacy":
        draft.forward(inputs, start, table, context.max_context)
    shape = (groups, particles, k)
    return Draft(
        torch.stack(tokens, dim=-1).view(shape),
        torch.stack(log_q, dim=-1).view(shape),
        torch.stack(kept, dim=1).view(*shape, -1) if kept else group.log_weights.new_zeros((*shape, 0)),
        torch.stack(usable, dim=-1).all(dim=-1).view(groups, particles),
    )


def _score(context: RoundContext, group: GroupState, draft: Draft) -> Score:
    """Score [frontier, d1..dK] with the target in one pass."""
    groups, particles, k = draft.tokens.shape
    inputs = torch.cat([group.frontier[..., None], draft.tokens], dim=-1).flatten(0, 1)
    position = group.position.repeat_interleave(particles, output_size=groups * particles)
    hidden = context.target.forward(inputs, position, group.block_table.flatten(0, 1), context.max_context)
    logits = context.target.logits(hidden).flatten(0, 1)
    rows = particles * (k + 1)
    scaled = sampling.scale(logits, group.temperature.repeat_interleave(rows, output_size=groups * rows))
    row = torch.arange(k + 1, device=scaled.device).expand(groups, particles, -1)
    scaled = _shape(context, group, scaled, (group.generated[:, None, None] + row).reshape(-1))
    scaled = scaled.view(groups, particles, k + 1, -1)
    lse = scaled.logsumexp(dim=-1)
    log_p = scaled[:, :, :k].gather(3, draft.tokens[..., None])[..., 0] - lse[..., :k]
    return Score(scaled, log_p, lse)


def _failed(group: GroupState, draft: Draft, score: Score) -> Tensor:
    """[G]: an unfinished, live particle met NaN logits or a row without a finite one."""
    counted = ~group.finished & group.log_weights.isfinite() & group.active[:, None]
    bad = ~(draft.usable & score.lse.isfinite().all(dim=-1))
    return group.failed | (counted & bad).any(dim=1)


def _append_bonus(draft: Draft, score: Score, bonus: Tensor, committed: Tensor) -> Emission:
    """Put the bonus [G, N] right after the committed draft tokens."""
    particles = bonus.shape[1]
    place = committed[:, None, None].expand(-1, particles, 1)
    vocabulary = score.scaled.shape[-1]
    row = score.scaled.gather(2, place[..., None].expand(-1, -1, -1, vocabulary))[:, :, 0]
    log_p = row.gather(2, bonus[..., None]) - score.lse.gather(2, place)
    tokens = torch.cat([draft.tokens, bonus[..., None]], dim=-1).scatter(2, place, bonus[..., None])
    return Emission(tokens, torch.cat([score.log_p, log_p], dim=-1).scatter(2, place, log_p), committed)


def _weigh(context: RoundContext, group: GroupState, draft: Draft, score: Score) -> tuple[Emission, GroupState, Tensor]:
    """Importance weights instead of rejection: ℓ_k = α log p - log q, then the bonus and its log ζ."""
    failed = _failed(group, draft, score)
    alpha = group.alpha[:, None]
    increments = (group.alpha[:, None, None] * score.log_p - draft.log_q).to(torch.float64)
    increments = torch.where(failed[:, None, None], 0.0, increments)
    end, _, _ = _find_end(context, group, draft.tokens, torch.full_like(group.generated, draft.tokens.shape[-1]))
    weighed = weights.accumulate(group.log_weights, increments, end, group.finished)

    place = weighed.committed[:, None, None].expand(-1, end.shape[1], 1)
    row = score.scaled.gather(2, place[..., None].expand(-1, -1, -1, score.scaled.shape[-1])).flatten(0, 2)
    row_alpha = alpha.expand_as(end).reshape(-1)
    bonus = sampling.draw(row * row_alpha[:, None], *_names(group, random.PURPOSE_BONUS)).view_as(end)
    zeta = sampling.log_zeta(row, score.lse.gather(2, place).reshape(-1), row_alpha).view_as(end)
    takes_bonus = ~group.finished & (end > weighed.committed[:, None]) & ~failed[:, None]
    takes_bonus &= weighed.log_weights.isfinite()
    log_weights = weighed.log_weights + torch.where(takes_bonus, zeta, 0.0)
    group = replace(group, log_weights=log_weights, failed=failed)
    return _append_bonus(draft, score, bonus, weighed.committed), group, weighed.recovered & group.active


def _verify(
    context: RoundContext, group: GroupState, draft: Draft, score: Score
) -> tuple[Emission, GroupState, Tensor]:
    """Lossless speculative sampling (N = 1): accept d_k with probability min(1, p/q), else draw from (p - q)+.

    Source: Leviathan, Kalman & Matias (2023), arXiv:2211.17192; Chen et al. (2023), arXiv:2302.01318.
    """
    group = replace(group, failed=_failed(group, draft, score))
    groups, particles, k = draft.tokens.shape
    powered = score.scaled * group.alpha[:, None, None, None]
    p = powered.softmax(dim=-1, dtype=torch.float64)
    q = draft.scaled.softmax(dim=-1, dtype=torch.float64)
    p_token = p[:, :, :k].gather(3, draft.tokens[..., None])[..., 0]
    q_token = q.gather(3, draft.tokens[..., None])[..., 0]
    names = [_names(group, random.PURPOSE_ACCEPT + random.PURPOSE_STRIDE * step) for step in range(k)]
    u = torch.stack([random.uniform(*name) for name in names], dim=-1).view_as(p_token) if k else p_token
    committed = (u * q_token < p_token).long().cumprod(dim=-1).sum(dim=-1)[:, 0]

    place = committed[:, None, None, None].expand(-1, particles, 1, p.shape[-1])
    p_row = p.gather(2, place).flatten(0, 2)
    # Row K is not preceded by a rejection: subtracting a zero row leaves p.
    q_row = torch.cat([q, torch.zeros_like(p[:, :, :1])], dim=2).gather(2, place).flatten(0, 2)
    residual = (p_row - q_row).clamp(min=0)
    residual = torch.where(residual.sum(dim=-1, keepdim=True) > 0, residual, p_row)
    bonus = sampling.draw(residual.log().to(torch.float32), *_names(group, random.PURPOSE_RESIDUAL))
    emission = _append_bonus(draft, score, bonus.view(groups, particles), committed)
    return emission, group, torch.zeros_like(group.failed)


def _find_end(context: RoundContext, group: GroupState, tokens: Tensor, limit: Tensor) -> tuple[Tensor, Tensor, Tensor]:
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
    if context.stop_tables is not None:
        states = _advance(context.stop_tables, group, tokens)
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


def _commit(context: RoundContext, group: GroupState, emission: Emission) -> GroupState:
    """Append the round's tokens, end particles, move the frontier."""
    emitted = emission.committed + 1
    end, kind, states = _find_end(context, group, emission.tokens, emitted)
    ends = (kind != END_NONE) & ~group.finished
    width = emission.tokens.shape[-1]
    columns = group.generated[:, None, None] + torch.arange(width, device=end.device)
    columns = columns.expand_as(emission.tokens)
    last = emission.committed[:, None, None].expand(-1, end.shape[1], 1)
    with_frontier = torch.cat([group.frontier[..., None], emission.tokens], dim=-1)
    moves = group.active & ~group.failed
    step = torch.where(moves, emitted, 0)
    keep = ~moves[:, None]
    return replace(
        group,
        tokens=group.tokens.scatter(2, columns, emission.tokens),
        log_probs=group.log_probs.scatter(2, columns, emission.log_p),
        length=torch.where(ends, group.generated[:, None] + end, group.length),
        end_kind=torch.where(ends, kind, group.end_kind),
        finished=group.finished | ends,
        previous=torch.where(keep, group.previous, with_frontier.gather(2, last)[..., 0]),
        frontier=torch.where(keep, group.frontier, emission.tokens.gather(2, last)[..., 0]),
        stop_state=torch.where(keep, group.stop_state, states.gather(2, last)[..., 0]),
        generated=group.generated + step,
        position=group.position + step,
        round_number=group.round_number + 1,
    )


def _resample_if_needed(context: RoundContext, group: GroupState) -> tuple[GroupState, Tensor, Tensor, Tensor]:
    """Resample groups whose ESS fell below θ N while some particle is unfinished.

    Returns:
        the groups, ancestors [G, N], ESS before [G], which groups resampled [G].
    """
    n = context.kind.num_particles
    ess = weights.effective_sample_size(group.log_weights)
    index = torch.arange(n, device=ess.device).expand_as(group.frontier)
    if n < 2:
        return group, index, ess, torch.zeros_like(group.failed)
    unfinished = (~group.finished).any(dim=1)
    resampled = group.active & ~group.failed & unfinished & (ess < group.ess_threshold * n)
    zero = torch.zeros_like(group.seed)
    u = random.uniform(group.seed, group.round_number, zero, zero + random.PURPOSE_RESAMPLE)
    ancestors = torch.where(resampled[:, None], resample.systematic_resample(group.log_weights, u), index)
    shared = (group.position - 1).clamp(min=0) // context.target.page_size
    table = group.block_table.clone()
    _fork_pages(context, table, ancestors, shared)
    log_evidence = group.log_evidence + weights.log_mean_exp(group.log_weights)
    inherited = {name: getattr(group, name).gather(1, ancestors) for name in _INHERITED}
    history = ancestors[..., None].expand_as(group.tokens)
    return (
        replace(
            group,
            **inherited,
            tokens=group.tokens.gather(1, history),
            log_probs=group.log_probs.gather(1, history),
            block_table=table,
            log_weights=torch.where(resampled[:, None], 0.0, group.log_weights),
            log_evidence=torch.where(resampled, log_evidence, group.log_evidence),
        ),
        ancestors,
        ess,
        resampled,
    )


_INHERITED = ("finished", "length", "end_kind", "stop_state", "frontier", "previous")


def _fork_pages(context: RoundContext, table: Tensor, ancestors: Tensor, shared: Tensor) -> None:
    """Share full pages with the ancestor and copy the last one, in both models' caches."""
    source, destination = pages.fork(context.ref_count, table, ancestors, shared)
    context.target.copy_pages(source, destination)
    if context.draft is not None:
        context.draft.copy_pages(source, destination)


def _close_finished(group: GroupState) -> GroupState:
    """A group whose particles have all ended, or that failed, runs no further round."""
    return replace(group, active=group.active & ~group.failed & ~group.finished.all(dim=1))


def settled_tokens(group: GroupState) -> tuple[Tensor, Tensor]:
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
