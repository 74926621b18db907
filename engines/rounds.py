"""One round of the algorithm: draft, score, weigh, commit, resample.

A round sees device state only. Its shapes are fixed by a `RoundKind` and the number of slots, nothing is decided on the
host, and no value is read back, so that the same function can be captured as one CUDA graph. What the host may want to
know comes back as a `RoundSummary` of small tensors.

One round of one request with N = 2, K = 2 and frontier b at position 9, deferred bonus: the draft runs [token 8, b] at
positions 8 and 9 and draws d1, runs d1 at position 10 and draws d2; the target runs [b, d1, d2] at positions 9 to 11 and
draws the bonus from its last row; the new frontier is the bonus at position 12.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from smc_engines.config import DraftSchedule
from smc_engines.model import PagedModel
from smc_engines.vocabulary import Vocabulary
from smc_plugin.backend import Kernels
from smc_plugin.group_state import GroupState
from smc_plugin.reference import options, random
from smc_plugin.reference.groups import SUMMARY_COLUMNS, Committed, Opened, per_row
from smc_plugin.reference.options import Resampling
from smc_plugin.reference.resample import Resampled
from smc_plugin.reference.sampling import Sampled
from smc_plugin.reference.weights import Weighed


@dataclass(frozen=True)
class RoundKind:
    """What fixes a round's shapes and branches; requests of one kind run together.

    Args:
        speculative: lossless accept-reject instead of weights, over num_particles sequences that begin alike.
        mixed: rounds are weighed or lossless as `GroupState.exact_next` says (see SamplingParams.exact_below).
        truncated: rounds end where the ESS gets low.
        resampling, tempered: the scheme, and whether some request resamples by a power of the weights.
        filtered: some request uses top-k, top-p, min-p or min_tokens.
        stop_strings: some request has stop strings.
    """

    num_particles: int
    num_draft_tokens: int
    speculative: bool = False
    mixed: bool = False
    truncated: bool = False
    resampling: Resampling = "systematic"
    tempered: bool = False
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

    @classmethod
    def unpack(cls, packed: Tensor, num_particles: int) -> RoundSummary:
        """Read what `groups.close_round` packed, [G, columns] float64; integers below 2^53 come back exactly."""
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
            ancestors=packed[:, SUMMARY_COLUMNS : SUMMARY_COLUMNS + num_particles].long(),
            tokens=packed[:, SUMMARY_COLUMNS + num_particles :].long(),
            pool_exhausted=(packed[:, 9] > 0).any(),
        )


@dataclass(frozen=True)
class Draft:
    """What the draft proposes.

    Args:
        tokens: [G, N, K]. log_q: [G, N, K] float32.
        lse: [G, N, K] float32, log-sum-exp of the row that each token was drawn from.
        scaled: [G, N, K, V] float32 draft logits after temperature and filters; where rounds may be lossless, else None.
    """

    tokens: Tensor
    log_q: Tensor
    lse: Tensor
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


def run_round(context: RoundContext, state: GroupState, slots: Tensor) -> Tensor:
    """Run one round for the groups in `slots`.

    Args:
        context: models, pages and the kind of round.
        state: all slots; changed in place.
        slots: [G] int64, all of the context's kind; the spare slot may pad the batch.
    Returns:
        the packed summary (see RoundSummary.unpack).
    """
    kind, kernels, page_size = context.kind, context.kernels, context.target.page_size
    opened = kernels.groups.open_round(state, slots, kind.num_particles, kind.num_draft_tokens, page_size)
    exhausted = kernels.pages.reserve(
        *(context.ref_count, opened.block_table, opened.num_blocks, opened.needed_blocks),
        kind.num_draft_tokens // page_size + 2,
    )
    # Pages that no particle will write again are read once a group.
    shared = kernels.pages.count_shared(opened.block_table) if kind.num_particles > 1 else None
    draft = _propose(context, state, slots, opened, shared)
    score = _score(context, state, slots, opened, draft, shared)
    end, failed = kernels.groups.find_ends(state, slots, draft.tokens, draft.lse, score.lse, context.stop_tables)
    exact = None
    if kind.speculative and kind.num_particles == 1:
        weighed, bonus = _verify(context, opened, draft, score, failed)
    else:
        weighed, bonus, exact = _weigh_or_verify(context, state, slots, opened, draft, score, end, failed)
    committed = kernels.groups.commit(
        *(state, slots, draft.tokens, score.log_p, bonus, weighed.log_weights, weighed.committed, end, failed),
        *(context.stop_tables, page_size),
    )
    decided = _resample(context, state, slots, opened, committed, exact)
    if kind.num_particles > 1:
        _fork_pages(context, opened.block_table, decided.ancestors, committed.shared_blocks)
    return kernels.groups.close_round(
        *(state, slots, decided, opened.block_table, opened.needed_blocks),
        *(weighed.committed, weighed.recovered, exhausted),
    )


def begin(
    context: RoundContext, state: GroupState, slot: Tensor, prompt_end: Tensor, last_token: Tensor, logits: Tensor
) -> Tensor:
    """Turn a prefilled prompt into N particles, each with its own first token.

    The prompt's pages are held by particle 0 until now; full ones become shared, the last one is copied.

    Args:
        slot: [1] int64.
        prompt_end: [1] int64, position after the prompt, where the frontier will stand.
        last_token: [1] int64, the prompt's last token.
        logits: [1, V] of the target after the prompt.
    Returns:
        the packed summary (see RoundSummary.unpack).
    """
    kernels, particles, page_size = context.kernels, context.kind.num_particles, context.target.page_size
    _reset(state, slot, prompt_end, last_token)
    table = state.block_table[slot][:, :particles].contiguous()
    shared = (prompt_end - 1) // page_size
    no = torch.zeros_like(slot, dtype=torch.bool)
    exhausted = no[0]
    if particles > 1:
        others = table[:, 1:].contiguous()
        exhausted = kernels.pages.reserve(context.ref_count, others, shared, shared + 1, 1)
        table[:, 1:] = others
        _fork_pages(context, table, slot.new_zeros((1, particles)), shared)

    zero, alpha, seed = torch.zeros_like(slot), state.alpha[slot], state.seed[slot]
    vocabulary = context.target.vocabulary
    logits, temperature = _shape(context, vocabulary, state, slot, logits, state.temperature[slot], zero)
    scaled = logits.to(torch.float32) if temperature is None else kernels.sampling.scale(logits, temperature)
    u = random.uniform(seed, zero, zero, zero + random.PURPOSE_FIRST)
    # Lossless rounds need sequences that begin alike.
    draws = 1 if context.kind.speculative else particles
    first, lse = vocabulary.first_tokens(scaled, alpha, u, draws)
    if draws < particles:
        first = Sampled(
            *(per_row(values, particles) for values in (first.tokens, first.log_prob, first.lse, first.log_zeta))
        )
    none = torch.zeros((1, particles, 0), dtype=torch.float32, device=slot.device)
    flat = torch.zeros((1, particles), dtype=torch.float64, device=slot.device)
    committed = kernels.groups.commit(
        *(state, slot, none.long(), none, first, flat, zero, torch.ones_like(flat, dtype=torch.int64), ~lse.isfinite()),
        *(context.stop_tables, page_size),
    )
    index = torch.arange(particles, device=slot.device).expand(1, -1)
    decided = Resampled(
        *(committed.log_weights, torch.zeros_like(flat[:, 0]), index),
        *(kernels.weights.effective_sample_size(committed.log_weights), no),
    )
    return kernels.groups.close_round(state, slot, decided, table, shared + 1, zero, no, exhausted)


def _reset(state: GroupState, slot: Tensor, prompt_end: Tensor, last_token: Tensor) -> None:
    """Put a slot where its prompt ends, before its particles' first tokens."""
    zero, no = torch.zeros_like(slot), torch.zeros_like(slot, dtype=torch.bool)
    particles = state.frontier.shape[1]
    values = {"generated": zero, "settled": zero, "round_number": zero, "failed": no, "active": ~no}
    values["position"] = prompt_end - 1  # the commit moves it past the one token drawn here
    values |= {"frontier": last_token[:, None].expand(-1, particles), "finished": no[:, None].expand(-1, particles)}
    values["stop_state"] = zero[:, None].expand(-1, particles)
    for name, value in values.items():
        getattr(state, name).index_copy_(0, slot, value)


def _shape(
    context: RoundContext,
    vocabulary: Vocabulary,
    state: GroupState,
    slots: Tensor,
    logits: Tensor,
    temperature: Tensor,
    index: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Apply the requests' filters, where this kind of round has any.

    Args:
        vocabulary: of the model that made the logits.
        logits: [G * m, V] in group-major order; temperature, index: [G * m], index counts the tokens generated before
            each row.
    Returns:
        logits and the temperature still to divide by: what came in, or scaled and filtered logits and None.
    """
    if not context.kind.filtered:
        return logits, temperature
    repeats = logits.shape[0] // slots.shape[0]

    def rows(values: Tensor) -> Tensor:
        return per_row(values[slots], repeats)

    scaled = context.kernels.sampling.scale(logits, temperature)
    banned = index < rows(state.min_tokens)
    filters = rows(state.top_k), rows(state.top_p), rows(state.min_p)
    return vocabulary.filtered(scaled, rows(state.stop_ids), banned, *filters), None


def _name(opened: Opened, purpose: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Name of one draw a particle: seed, step, lane, purpose, [R] each (see random)."""
    return opened.seed, opened.step, opened.lane, _constant(purpose, opened.seed.shape[0], opened.seed.device)


@cache
def _constant(value: int, rows: int, device: torch.device) -> Tensor:
    """[rows] int64 of one value, made once: a round that is replayed should not write it anew."""
    return torch.full((rows,), value, device=device)


def _propose(context: RoundContext, state: GroupState, slots: Tensor, opened: Opened, shared: Tensor | None) -> Draft:
    """Draw K tokens a particle from the draft, in K passes (one more in the legacy schedule)."""
    (groups, particles), k = opened.finished.shape, context.kind.num_draft_tokens
    draft, sampling, table = context.draft, context.kernels.sampling, opened.block_table.flatten(0, 1)
    if k == 0 or draft is None:
        empty = torch.zeros((groups, particles, 0), dtype=torch.float32, device=slots.device)
        return Draft(empty.long(), empty, empty, None)
    inputs, offset = opened.inputs, -1
    if context.kind.draft_schedule == "legacy":
        inputs, offset = opened.inputs[:, 1:], 0
    drawn, kept = [], []
    for step in range(k):
        hidden = draft.forward(inputs, opened.position, table, context.max_context, offset, shared)
        logits, heat = draft.logits(hidden[:, -1]), opened.draft_temperature
        logits, heat = _shape(context, draft.vocabulary, state, slots, logits, heat, opened.generated + step)
        name = _name(opened, random.PURPOSE_DRAFT + random.PURPOSE_STRIDE * step)
        drawn.append(draft.vocabulary.sample(logits, heat, name))
        if context.kind.speculative or context.kind.mixed:
            kept.append(logits if heat is None else sampling.scale(logits, heat))
        inputs, offset = drawn[-1].tokens[:, None], 1 + step
    if context.kind.draft_schedule == "legacy":
        draft.forward(inputs, opened.position, table, context.max_context, offset, shared)
    shape = (groups, particles, k)
    return Draft(
        torch.stack([each.tokens for each in drawn], dim=-1).view(shape),
        torch.stack([each.log_prob for each in drawn], dim=-1).view(shape),
        torch.stack([each.lse for each in drawn], dim=-1).view(shape),
        torch.stack(kept, dim=1).view(*shape, -1) if kept else None,
    )


def _score(
    context: RoundContext, state: GroupState, slots: Tensor, opened: Opened, draft: Draft, shared: Tensor | None
) -> Score:
    """Score [frontier, d1..dK] with the target in one pass."""
    groups, particles, k = draft.tokens.shape
    inputs = torch.cat([opened.inputs[:, 1:], draft.tokens.flatten(0, 1)], dim=1)
    hidden = context.target.forward(
        inputs, opened.position, opened.block_table.flatten(0, 1), context.max_context, shared=shared
    )
    index = opened.generated[:, None] + torch.arange(k + 1, device=slots.device)
    logits, heat = context.target.logits(hidden).flatten(0, 1), per_row(opened.temperature, k + 1)
    logits, heat = _shape(context, context.target.vocabulary, state, slots, logits, heat, index.reshape(-1))
    # Row k scores draft token k + 1; the last row scores nothing.
    tokens = functional.pad(draft.tokens, (0, 1), value=-1)
    log_p, lse = context.target.vocabulary.score(logits, tokens.reshape(-1), heat)
    shape = (groups, particles, k + 1)
    return Score(logits, heat, log_p.view(shape)[..., :k].contiguous(), lse.view(shape))


def _weigh(
    context: RoundContext,
    state: GroupState,
    slots: Tensor,
    opened: Opened,
    draft: Draft,
    score: Score,
    end: Tensor,
    failed: Tensor,
) -> tuple[Weighed, Sampled]:
    """Importance weights instead of rejection: ℓ_k = α log p - log q, then the bonus and its log ζ."""
    terms = (opened.log_weights, score.log_p, draft.log_q, opened.group_alpha, end, opened.finished, failed)
    particles, rows = score.lse.shape[1:]
    if context.kind.truncated:
        least = opened.ess_threshold * particles
        weighed = options.weigh_until(*terms, least)
    else:
        weighed = context.kernels.weights.weigh(*terms)
    # The bonus comes from the row after the last draft token that stands.
    first = torch.arange(opened.seed.shape[0], device=end.device) * rows
    bonus = context.target.vocabulary.sample(
        score.logits,
        None if score.temperature is None else opened.temperature,
        _name(opened, random.PURPOSE_BONUS),
        alpha=opened.alpha,
        rows=first + per_row(weighed.committed, particles),
    )
    return weighed, bonus


@dataclass(frozen=True)
class Exact:
    """What lossless verification found, and for whom it counts.

    Args:
        here: [G] bool, groups whose round is lossless. winner: [G] int64, the sequence that stands.
        ess: [G] float64, what the ESS would be had the round been weighed.
    """

    here: Tensor
    winner: Tensor
    ess: Tensor


def _weigh_or_verify(
    context: RoundContext,
    state: GroupState,
    slots: Tensor,
    opened: Opened,
    draft: Draft,
    score: Score,
    end: Tensor,
    failed: Tensor,
) -> tuple[Weighed, Sampled, Exact | None]:
    """Weigh, or verify the N drafts without loss, or in a mixed kind each for the groups whose turn it is."""
    kind, particles = context.kind, score.lse.shape[1]
    if not (kind.speculative or kind.mixed):
        return *_weigh(context, state, slots, opened, draft, score, end, failed), None
    stands, found, winner = _verify_many(context, opened, draft, score)
    none = torch.zeros_like(failed)
    if kind.speculative:
        same = torch.full_like(opened.log_evidence, particles)
        return Weighed(opened.log_weights, stands, none), found, Exact(~none, winner, same)
    weighed, bonus = _weigh(context, state, slots, opened, draft, score, end, failed)
    here = state.exact_next[slots]
    rows = per_row(here, particles)
    ess = context.kernels.weights.effective_sample_size(weighed.log_weights)
    weighed = Weighed(
        torch.where(here[:, None], opened.log_weights, weighed.log_weights),
        torch.where(here, stands, weighed.committed),
        weighed.recovered & ~here,
    )
    fields = ("tokens", "log_prob", "lse", "log_zeta")
    bonus = Sampled(*(torch.where(rows, getattr(found, name), getattr(bonus, name)) for name in fields))
    return weighed, bonus, Exact(here, winner, ess)


def _resample(
    context: RoundContext, state: GroupState, slots: Tensor, opened: Opened, committed: Committed, exact: Exact | None
) -> Resampled:
    """Decide who continues whom, and in a mixed kind whether the next round is lossless."""
    kind = context.kind
    terms = (committed.log_weights, opened.group_seed, committed.round_number, opened.ess_threshold)
    terms += (committed.eligible, opened.log_evidence)
    if kind.resampling != "systematic" or kind.tempered:
        decided = options.resample_if_needed(*terms, kind.resampling, state.resample_power[slots])
    else:
        decided = context.kernels.resample.resample_if_needed(*terms)
    if exact is None:
        return decided
    if not kind.speculative:
        ess = torch.where(exact.here, exact.ess, decided.ess)
        low = committed.eligible & (ess < state.exact_below[slots] * kind.num_particles)
        named = (opened.group_seed, committed.round_number, opened.log_evidence)
        decided = options.collapse(decided, low & ~exact.here, committed.log_weights, *named)
        state.exact_next.index_copy_(0, slots, low)
    return options.follow(decided, exact.here, exact.winner, exact.ess, committed.log_weights, opened.log_evidence)


def _verify_many(context: RoundContext, opened: Opened, draft: Draft, score: Score) -> tuple[Tensor, Sampled, Tensor]:
    """Lossless sampling from N drafted sequences that begin alike.

    Returns:
        draft tokens that stand [G], the token after them for every particle [G * N], the sequence that stands [G].
    """
    assert draft.scaled is not None
    groups, particles, k = draft.tokens.shape
    sampling = context.kernels.sampling
    scaled = score.logits if score.temperature is None else sampling.scale(score.logits, score.temperature)
    scaled = scaled.view(groups, particles, k + 1, -1)
    powered = scaled * opened.group_alpha[:, None, None, None]
    committed, winner, residual = options.verify_many(
        powered, draft.scaled, draft.tokens, _accept_uniforms(opened, draft)
    )
    first = torch.arange(groups, device=winner.device)
    names = [values.view(groups, particles)[:, 0] for values in _name(opened, random.PURPOSE_RESIDUAL)]
    tokens = sampling.draw(residual.log().to(torch.float32), *names)
    log_p, lse = sampling.log_prob(scaled[first, winner, committed], tokens)
    one = Sampled(tokens, log_p, lse, torch.zeros_like(lse))
    fields = ("tokens", "log_prob", "lse", "log_zeta")
    return committed, Sampled(*(per_row(getattr(one, name), particles) for name in fields)), winner


def _accept_uniforms(opened: Opened, draft: Draft) -> Tensor:
    """One uniform a draft token: [G, N, K] float64."""
    purposes = random.PURPOSE_ACCEPT + random.PURPOSE_STRIDE * torch.arange(
        draft.tokens.shape[2], device=opened.seed.device
    )
    # All at once: in plain torch a draw is over a hundred operations, whatever its size.
    seed, step, lane = (name[:, None] for name in (opened.seed, opened.step, opened.lane))
    return random.uniform(seed, step, lane, purposes).view(draft.tokens.shape)


def _verify(
    context: RoundContext, opened: Opened, draft: Draft, score: Score, failed: Tensor
) -> tuple[Weighed, Sampled]:
    """Lossless speculative sampling (N = 1): accept d_k with probability min(1, p/q), else draw from (p - q)+.

    Source: Leviathan, Kalman & Matias (2023), arXiv:2211.17192; Chen et al. (2023), arXiv:2302.01318.
    """
    assert draft.scaled is not None
    assert context.draft is not None
    groups, particles, k = draft.tokens.shape
    sampling, vocabulary = context.kernels.sampling, context.target.vocabulary
    scaled = score.logits if score.temperature is None else sampling.scale(score.logits, score.temperature)
    scaled = scaled.view(groups, particles, k + 1, -1)
    p = vocabulary.softmax(scaled * opened.group_alpha[:, None, None, None])
    q = context.draft.vocabulary.softmax(draft.scaled)
    p_token = vocabulary.pick(p[:, :, :k], draft.tokens)
    q_token = context.draft.vocabulary.pick(q, draft.tokens)
    q = vocabulary.own_columns(q, context.draft.vocabulary)
    u = _accept_uniforms(opened, draft)
    committed = (u * q_token < p_token).long().cumprod(dim=-1).sum(dim=-1)[:, 0]

    place = committed[:, None, None, None].expand(-1, particles, 1, p.shape[-1])
    p_row = p.gather(2, place).flatten(0, 2)
    # Row K is not preceded by a rejection: subtracting a zero row leaves p.
    q_row = torch.cat([q, torch.zeros_like(p[:, :, :1])], dim=2).gather(2, place).flatten(0, 2)
    residual = (p_row - q_row).clamp(min=0)
    residual = torch.where(vocabulary.total(residual)[:, None] > 0, residual, p_row)
    bonus = vocabulary.sample(residual.log().to(torch.float32), None, _name(opened, random.PURPOSE_RESIDUAL)).tokens
    log_p, lse = vocabulary.score(scaled.gather(2, place).flatten(0, 2), bonus, None)
    none = torch.zeros_like(failed)
    return Weighed(opened.log_weights, committed, none), Sampled(bonus, log_p, lse, torch.zeros_like(lse))


def _fork_pages(context: RoundContext, table: Tensor, ancestors: Tensor, shared: Tensor) -> None:
    """Share full pages with the ancestor and copy the last one, in both models' caches."""
    source, destination = context.kernels.pages.fork(context.ref_count, table, ancestors, shared)
    context.target.copy_pages(source, destination)
    if context.draft is not None:
        context.draft.copy_pages(source, destination)
