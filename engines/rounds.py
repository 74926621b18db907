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
from smc_plugin.backend import Kernels
from smc_plugin.reference import random


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
    """What the draft proposes.

    Args:
        tokens: [G, N, K]. log_q: [G, N, K] float32.
        usable: [G, N, K] bool, whether the row that each token was drawn from was finite.
        scaled: [G, N, K, V] draft logits after temperature and filters; speculative mode only, else None.
    """

    tokens: Tensor
    log_q: Tensor
    usable: Tensor
    scaled: Tensor | None


@dataclass(frozen=True)
class Score:
    """What the target says about [frontier, d1..dK].

    Args:
        logits: [G * N * (K + 1), V]. temperature: [G * N * (K + 1)], or None where the logits are scaled already.
        log_p: [G, N, K] float32 of the draft tokens. lse: [G, N, K + 1] float32.
    """

    logits: Tensor
    temperature: Tensor | None
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

    @property
    def kernels(self) -> Kernels:
        """What computes everything outside the regions."""
        return self.target.kernels


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
    kind, sampling = context.kind, context.kernels.sampling
    group = state.gather(slot, kind.num_particles)
    shared = (prompt_end - 1) // context.target.page_size
    exhausted = torch.zeros((), dtype=torch.bool, device=slot.device)
    if kind.num_particles > 1:
        table = group.block_table.clone()
        exhausted = context.kernels.pages.reserve(context.ref_count, table[:, 1:], shared, shared + 1, 1)
        _fork_pages(context, table, torch.zeros_like(group.frontier), shared)
        group = replace(group, block_table=table)

    none = torch.zeros_like(group.generated)
    logits, temperature = _shape(context, group, logits, group.temperature, none)
    scaled = logits.to(torch.float32) if temperature is None else sampling.scale(logits, temperature)
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
    ess = context.kernels.weights.effective_sample_size(group.log_weights)
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
    exhausted = context.kernels.pages.reserve(context.ref_count, table, group.num_blocks, needed, k // page_size + 2)
    return replace(group, block_table=table, num_blocks=torch.maximum(group.num_blocks, needed)), exhausted


def _shape(
    context: RoundContext, group: GroupState, logits: Tensor, temperature: Tensor, index: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Apply the requests' filters, where this kind of round has any.

    Args:
        logits: [G * m, V] in group-major order; temperature, index: [G * m], index counts the tokens generated before
            each row.
    Returns:
        logits and the temperature still to divide by: what came in, or scaled and filtered logits and None.
    """
    if not context.kind.filtered:
        return logits, temperature
    repeats, sampling = logits.shape[0] // group.top_k.shape[0], context.kernels.sampling

    def rows(values: Tensor) -> Tensor:
        return _per_row(values, repeats)

    scaled = sampling.scale(logits, temperature)
    scaled = sampling.ban_tokens(scaled, rows(group.stop_ids), index < rows(group.min_tokens))
    return sampling.apply_filters(scaled, rows(group.top_k), rows(group.top_p), rows(group.min_p)), None


def _per_row(values: Tensor, repeats: int) -> Tensor:
    """[G, ...] to [G * repeats, ...], each group's value `repeats` times in a row."""
    return values[:, None].expand(-1, repeats, *values.shape[1:]).reshape(-1, *values.shape[1:])


@dataclass(frozen=True)
class _Names:
    """Names of this round's draws, [G * N] int64 each: one draw per particle and purpose (see random)."""

    seed: Tensor
    step: Tensor
    lane: Tensor

    @classmethod
    def of(cls, group: GroupState) -> _Names:
        num_particles = group.frontier.shape[1]
        lane = torch.arange(num_particles, device=group.seed.device).expand_as(group.frontier).reshape(-1)
        return cls(_per_row(group.seed, num_particles), _per_row(group.round_number + 1, num_particles), lane)

    def draw(self, purpose: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Seed, step, lane, purpose of one draw a particle."""
        return self.seed, self.step, self.lane, torch.full_like(self.seed, purpose)


def _propose(context: RoundContext, group: GroupState) -> Draft:
    """Draw K tokens a particle from the draft, in K passes (one more in the legacy schedule)."""
    groups, particles = group.frontier.shape
    k, draft, sampling = context.kind.num_draft_tokens, context.draft, context.kernels.sampling
    if k == 0 or draft is None:
        empty = group.log_weights.new_zeros((groups, particles, 0), dtype=torch.float32)
        return Draft(empty.long(), empty, empty > 0, empty[..., None])
    table = group.block_table.flatten(0, 1)
    position = _per_row(group.position, particles)
    temperature = _per_row(group.draft_temperature, particles)
    frontier = group.frontier.reshape(-1, 1)
    if context.kind.draft_schedule == "deferred":
        inputs, start = torch.cat([group.previous.reshape(-1, 1), frontier], dim=1), position - 1
    else:
        inputs, start = frontier, position
    generated, names = _per_row(group.generated, particles), _Names.of(group)
    drawn, kept = [], []
    for step in range(k):
        hidden = draft.forward(inputs, start, table, context.max_context)
        logits, heat = _shape(context, group, draft.logits(hidden[:, -1]), temperature, generated + step)
        name = names.draw(random.PURPOSE_DRAFT + random.PURPOSE_STRIDE * step)
        drawn.append(sampling.sample(logits, heat, *name))
        if context.kind.speculative:
            kept.append(logits if heat is None else sampling.scale(logits, heat))
        inputs, start = drawn[-1].tokens[:, None], position + 1 + step
    if context.kind.draft_schedule == "legacy":
        draft.forward(inputs, start, table, context.max_context)
    shape = (groups, particles, k)
    return Draft(
        torch.stack([each.tokens for each in drawn], dim=-1).view(shape),
        torch.stack([each.log_prob for each in drawn], dim=-1).view(shape),
        torch.stack([each.lse for each in drawn], dim=-1).view(shape).isfinite(),
        torch.stack(kept, dim=1).view(*shape, -1) if kept else None,
    )


def _score(context: RoundContext, group: GroupState, draft: Draft) -> Score:
    """Score [frontier, d1..dK] with the target in one pass."""
    groups, particles, k = draft.tokens.shape
    inputs = torch.cat([group.frontier[..., None], draft.tokens], dim=-1).flatten(0, 1)
    position = _per_row(group.position, particles)
    hidden = context.target.forward(inputs, position, group.block_table.flatten(0, 1), context.max_context)
    rows = particles * (k + 1)
    index = group.generated[:, None, None] + torch.arange(k + 1, device=inputs.device).expand(groups, particles, -1)
    logits = context.target.logits(hidden).flatten(0, 1)
    logits, heat = _shape(context, group, logits, _per_row(group.temperature, rows), index.reshape(-1))
    # Row k scores draft token k + 1; the last row scores nothing.
    tokens = torch.nn.functional.pad(draft.tokens, (0, 1), value=-1)
    log_p, lse = context.kernels.sampling.score(logits, tokens.reshape(-1), heat)
    shape = (groups, particles, k + 1)
    return Score(logits, heat, log_p.view(shape)[..., :k], lse.view(shape))


def _failed(group: GroupState, draft: Draft, score: Score, end: Tensor) -> Tensor:
    """[G]: an unfinished, live particle met NaN logits or a row without a finite one, at or before its end.

    Args:
        end: [G, N], see `_find_end`; rows 0 to end - 1 matter.
    """
    counted = ~group.finished & group.log_weights.isfinite() & group.active[:, None]
    index = torch.arange(score.lse.shape[-1], device=end.device)
    bad = ~score.lse.isfinite()
    bad[..., :-1] |= ~draft.usable
    bad = (bad & (index < end[..., None])).any(dim=-1)
    return group.failed | (counted & bad).any(dim=1)


def _append_bonus(draft: Draft, score: Score, bonus: Tensor, log_p: Tensor, committed: Tensor) -> Emission:
    """Put the bonus [G, N], with its log p, right after the committed draft tokens."""
    place = committed[:, None, None].expand(-1, bonus.shape[1], 1)
    tokens = torch.cat([draft.tokens, bonus[..., None]], dim=-1).scatter(2, place, bonus[..., None])
    log_p = log_p.view_as(bonus)[..., None]
    return Emission(tokens, torch.cat([score.log_p, log_p], dim=-1).scatter(2, place, log_p), committed)


def _rows_at(score: Score, committed: Tensor) -> Tensor:
    """[G * N] int64: which row of the score follows each particle's committed draft tokens."""
    groups, particles, rows = score.lse.shape
    first = torch.arange(groups * particles, device=committed.device) * rows
    return first + _per_row(committed, particles)


def _weigh(context: RoundContext, group: GroupState, draft: Draft, score: Score) -> tuple[Emission, GroupState, Tensor]:
    """Importance weights instead of rejection: ℓ_k = α log p - log q, then the bonus and its log ζ."""
    particles = group.frontier.shape[1]
    end, _, _ = _find_end(context, group, draft.tokens, torch.full_like(group.generated, draft.tokens.shape[-1]))
    failed = _failed(group, draft, score, end)
    weighed = context.kernels.weights.weigh(
        group.log_weights, score.log_p, draft.log_q, group.alpha, end, group.finished, failed
    )
    rows = _rows_at(score, weighed.committed)
    bonus = context.kernels.sampling.sample(
        score.logits,
        None if score.temperature is None else _per_row(group.temperature, particles),
        *_Names.of(group).draw(random.PURPOSE_BONUS),
        alpha=_per_row(group.alpha, particles),
        rows=rows,
    )
    takes_bonus = ~group.finished & (end > weighed.committed[:, None]) & ~failed[:, None]
    takes_bonus &= weighed.log_weights.isfinite()
    log_weights = weighed.log_weights + torch.where(takes_bonus, bonus.log_zeta.view_as(end), 0.0)
    emission = _append_bonus(draft, score, bonus.tokens.view_as(end), bonus.log_prob, weighed.committed)
    group = replace(group, log_weights=log_weights, failed=failed)
    return emission, group, weighed.recovered & group.active


def _verify(
    context: RoundContext, group: GroupState, draft: Draft, score: Score
) -> tuple[Emission, GroupState, Tensor]:
    """Lossless speculative sampling (N = 1): accept d_k with probability min(1, p/q), else draw from (p - q)+.

    Source: Leviathan, Kalman & Matias (2023), arXiv:2211.17192; Chen et al. (2023), arXiv:2302.01318.
    """
    assert draft.scaled is not None
    groups, particles, k = draft.tokens.shape
    sampling, names = context.kernels.sampling, _Names.of(group)
    end, _, _ = _find_end(context, group, draft.tokens, torch.full_like(group.generated, k))
    group = replace(group, failed=_failed(group, draft, score, end))
    scaled = score.logits if score.temperature is None else sampling.scale(score.logits, score.temperature)
    scaled = scaled.view(groups, particles, k + 1, -1)
    p = (scaled * group.alpha[:, None, None, None]).softmax(dim=-1, dtype=torch.float64)
    q = draft.scaled.softmax(dim=-1, dtype=torch.float64)
    p_token = p[:, :, :k].gather(3, draft.tokens[..., None])[..., 0]
    q_token = q.gather(3, draft.tokens[..., None])[..., 0]
    purposes = [random.PURPOSE_ACCEPT + random.PURPOSE_STRIDE * step for step in range(k)]
    u = torch.stack([random.uniform(*names.draw(purpose)) for purpose in purposes], dim=-1).view_as(p_token)
    committed = (u * q_token < p_token).long().cumprod(dim=-1).sum(dim=-1)[:, 0]

    place = committed[:, None, None, None].expand(-1, particles, 1, p.shape[-1])
    p_row = p.gather(2, place).flatten(0, 2)
    # Row K is not preceded by a rejection: subtracting a zero row leaves p.
    q_row = torch.cat([q, torch.zeros_like(p[:, :, :1])], dim=2).gather(2, place).flatten(0, 2)
    residual = (p_row - q_row).clamp(min=0)
    residual = torch.where(residual.sum(dim=-1, keepdim=True) > 0, residual, p_row)
    bonus = sampling.draw(residual.log().to(torch.float32), *names.draw(random.PURPOSE_RESIDUAL))
    log_p, _ = sampling.log_prob(scaled.gather(2, place).flatten(0, 2), bonus)
    emission = _append_bonus(draft, score, bonus.view(groups, particles), log_p, committed)
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
    unfinished = (~group.finished).any(dim=1)
    decided = context.kernels.resample.resample_if_needed(
        group.log_weights,
        group.seed,
        group.round_number,
        group.ess_threshold,
        group.active & ~group.failed & unfinished,
        group.log_evidence,
    )
    ancestors = decided.ancestors
    if context.kind.num_particles < 2:
        return group, ancestors, decided.ess, decided.resampled
    shared = (group.position - 1).clamp(min=0) // context.target.page_size
    table = group.block_table.clone()
    _fork_pages(context, table, ancestors, shared)
    inherited = {name: getattr(group, name).gather(1, ancestors) for name in _INHERITED}
    history = ancestors[..., None].expand_as(group.tokens)
    group = replace(
        group,
        **inherited,
        tokens=group.tokens.gather(1, history),
        log_probs=group.log_probs.gather(1, history),
        block_table=table,
        log_weights=decided.log_weights,
        log_evidence=decided.log_evidence,
    )
    return group, ancestors, decided.ess, decided.resampled


_INHERITED = ("finished", "length", "end_kind", "stop_state", "frontier", "previous")


def _fork_pages(context: RoundContext, table: Tensor, ancestors: Tensor, shared: Tensor) -> None:
    """Share full pages with the ancestor and copy the last one, in both models' caches."""
    source, destination = context.kernels.pages.fork(context.ref_count, table, ancestors, shared)
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
