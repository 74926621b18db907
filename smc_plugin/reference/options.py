"""What a request may choose beside plain SMC: rounds that end early, other resampling, lossless rounds over N sequences.

Plain torch on every device: no value reaches the host and shapes are fixed, so a round that uses these can be captured too.

Example of an early end, N = 2, θ N = 1.5: log weights 0, 0 become 0.1, 0 after one draft token (ESS 2.0) and 2.0, 0 after
two (ESS 1.26): the second token is the last one that stands, the bonus follows it, and the group resamples there.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from smc_plugin.reference import random
from smc_plugin.reference.resample import Resampled, keep_survivors
from smc_plugin.reference.weights import Weighed, effective_sample_size, log_mean_exp, normalise, weight_paths

Resampling = Literal["systematic", "stratified", "residual"]


def weigh_until(
    log_weights: Tensor,
    log_p: Tensor,
    log_q: Tensor,
    alpha: Tensor,
    end: Tensor,
    finished: Tensor,
    failed: Tensor,
    least_ess: Tensor,
) -> Weighed:
    """Like weights.weigh, but a group's round ends at the first draft token after which its ESS is below `least_ess`.

    That token is a stopping time: whether it is the last depends on what was drawn up to it only, so that weights and
    log_evidence stay unbiased.

    Args:
        log_weights, log_p, log_q, alpha, end, finished, failed: see weights.weigh.
        least_ess: [G] float64, θ N; 0 never ends a round early.
    """
    increments = (alpha[:, None, None] * log_p - log_q).to(torch.float64)
    path = weight_paths(log_weights, torch.where(failed[:, None, None], 0.0, increments), end, finished)
    groups, particles, places = path.shape
    # a last column that is always low makes a first one exist
    ess = effective_sample_size(path.transpose(1, 2).reshape(-1, particles)).view(groups, places)[:, 1:]
    low = torch.cat([ess < least_ess[:, None], torch.ones_like(failed)[:, None]], dim=1)
    until = (low.long().argmax(dim=1) + 1).clamp(max=places - 1)
    living = path.isfinite().any(dim=1)[:, 1:].sum(dim=-1)
    committed = torch.minimum(living, until)
    chosen = path.gather(2, committed[:, None, None].expand(-1, particles, 1))[..., 0]
    return Weighed(chosen, committed, living < until)


def ancestors_by(scheme: Resampling, log_weights: Tensor, uniforms: Tensor) -> Tensor:
    """Sorted ancestors by one of the schemes.

    Args:
        scheme: `systematic` moves all positions together, `stratified` each within its own N-th, `residual` first gives every
            particle ⌊N w̄⌋ offspring and draws the rest stratified from what is left.
        log_weights: [G, N] float64, some of each row finite.
        uniforms: [G, N] float64 in [0, 1); `systematic` uses the first.
    Returns:
        [G, N] int64, non-decreasing; particle i has N w̄_i offspring on average, a dead one none.
    Source: Douc, Cappé & Moulines (2005), arXiv:cs/0507025.
    """
    particles = log_weights.shape[1]
    index = torch.arange(particles, device=log_weights.device)
    weights = normalise(log_weights)
    if scheme == "systematic":
        uniforms = uniforms[:, :1].expand_as(weights)
    if scheme != "residual":
        return _at_positions(weights, (uniforms + index) / particles)
    # the small constant keeps a weight of exactly 1/N, rounded down, from losing its sure offspring to chance
    sure = (weights * particles + 1e-9).floor()
    left = (weights * particles - sure).clamp(min=0)
    rest = particles - sure.sum(dim=1, keepdim=True)
    drawn = _at_positions(left, (uniforms + index) / rest.clamp(min=1) * left.sum(dim=1, keepdim=True))
    counts = sure.long().scatter_add_(1, drawn, (index < rest).long().expand_as(drawn).contiguous())
    return torch.searchsorted(counts.cumsum(dim=1), index.expand_as(counts).contiguous(), right=True)


def _at_positions(weights: Tensor, positions: Tensor) -> Tensor:
    """For each position the particle whose part of the cumulative weights it falls in; never one of weight 0."""
    index = torch.arange(weights.shape[1], device=weights.device)
    found = torch.searchsorted(weights.cumsum(dim=-1), positions.contiguous(), right=True)
    last_live = (index * (weights > 0)).amax(dim=-1, keepdim=True)
    return torch.minimum(found, last_live)


def resample_if_needed(
    log_weights: Tensor,
    seed: Tensor,
    round_number: Tensor,
    ess_threshold: Tensor,
    eligible: Tensor,
    log_evidence: Tensor,
    scheme: Resampling,
    power: Tensor,
) -> Resampled:
    """Like resample.resample_if_needed, by any scheme, and in proportion to w^power.

    An offspring of particle a keeps the weight w_a^(1 - power), which makes up for it; at power 1 that is 1.

    Args:
        log_weights, seed, round_number, ess_threshold, eligible, log_evidence: see resample.resample_if_needed.
        scheme: see ancestors_by.
        power: [G] float64 in (0, 1].
    """
    particles = log_weights.shape[1]
    index = torch.arange(particles, device=seed.device).expand_as(log_weights)
    ess = effective_sample_size(log_weights)
    resampled = eligible & (ess < ess_threshold * particles)
    lane = index.reshape(-1)

    def rows(values: Tensor) -> Tensor:
        return values[:, None].expand_as(index).reshape(-1)

    purpose = torch.full_like(lane, random.PURPOSE_RESAMPLE)
    uniforms = random.uniform(rows(seed), rows(round_number), lane, purpose).view_as(log_weights)
    tempered = power[:, None] * log_weights
    live = log_weights.isfinite().any(dim=1, keepdim=True)
    ancestors = torch.where(live, keep_survivors(ancestors_by(scheme, tempered, uniforms)), index)
    kept = ((1 - power[:, None]) * torch.where(log_weights.isfinite(), log_weights, 0.0)).gather(1, ancestors)
    return Resampled(
        torch.where(resampled[:, None], kept, log_weights),
        torch.where(resampled, log_evidence + log_mean_exp(tempered), log_evidence),
        torch.where(resampled[:, None], ancestors, index),
        ess,
        resampled,
    )


def collapse(
    decided: Resampled, chosen: Tensor, log_weights: Tensor, seed: Tensor, round_number: Tensor, log_evidence: Tensor
) -> Resampled:
    """Let one particle, drawn in proportion to the weights, be everybody's ancestor in the groups `chosen`.

    Args:
        decided: what stands in the other groups.
        chosen: [G] bool.
        log_weights: [G, N] float64 and log_evidence: [G] float64, before resampling.
        seed, round_number: [G] int64, name the draw as a resampling's.
    """
    zero = torch.zeros_like(seed)
    u = random.uniform(seed, round_number, zero, zero + random.PURPOSE_RESAMPLE)
    one = _at_positions(normalise(log_weights), u[:, None]).expand_as(log_weights)
    return Resampled(
        torch.where(chosen[:, None], 0.0, decided.log_weights),
        torch.where(chosen, log_evidence + log_mean_exp(log_weights), decided.log_evidence),
        torch.where(chosen[:, None], one, decided.ancestors),
        decided.ess,
        decided.resampled | chosen,
    )


def follow(
    decided: Resampled, here: Tensor, winner: Tensor, ess: Tensor, log_weights: Tensor, log_evidence: Tensor
) -> Resampled:
    """Let all particles continue the sequence that a lossless round kept, weights as they were.

    Args:
        decided: what stands in the other groups.
        here: [G] bool, groups whose round was lossless. winner: [G] int64. ess: [G] float64 to report for them.
        log_weights: [G, N] float64 and log_evidence: [G] float64, before resampling.
    """
    return Resampled(
        torch.where(here[:, None], log_weights, decided.log_weights),
        torch.where(here, log_evidence, decided.log_evidence),
        torch.where(here[:, None], winner[:, None], decided.ancestors),
        torch.where(here, ess, decided.ess),
        decided.resampled & ~here,
    )


def verify_many(target: Tensor, draft: Tensor, tokens: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lossless verification of N drafted sequences with one beginning: exactly the target's law comes out.

    At each depth the sequences that agree with what stands are tried in turn: token d is accepted with probability
    min(1, r(d)/q(d)), where r is the target's distribution, and after each rejection r becomes (r - q)+ normalised. If all
    are rejected, the next token is drawn from r.

    Args:
        target: [G, N, K + 1, V] logits, everything applied. draft: [G, N, K, V] logits the tokens were drawn from.
        tokens: [G, N, K] int64.
        uniforms: [G, N, K] float64 in [0, 1).
    Returns:
        committed [G] int64, draft tokens that stand; winner [G] int64, a sequence that begins with them; residual [G, V]
        float64, what the token after them is drawn from.
    Source: Miao et al. (2024), "SpecInfer", arXiv:2305.09781, algorithm 2 (multi-round speculative sampling), for
        sequences drawn with replacement.
    """
    groups, particles, depth = tokens.shape
    group = torch.arange(groups, device=tokens.device)
    active = torch.ones((groups, particles), dtype=torch.bool, device=tokens.device)
    running = active[:, 0]
    committed = torch.zeros_like(group)
    residual = target.new_zeros((groups, target.shape[-1]), dtype=torch.float64)
    for place in range(depth):
        lead = active.long().argmax(dim=1)
        r = target[group, lead, place].softmax(dim=-1, dtype=torch.float64)
        q = draft[group, lead, place].softmax(dim=-1, dtype=torch.float64)
        accepted, token = torch.zeros_like(running), tokens[:, 0, place]
        for particle in range(particles):
            drawn = tokens[:, particle, place]
            tried = running & active[:, particle] & ~accepted
            chance, odds = (values.gather(1, drawn[:, None])[:, 0] for values in (r, q))
            takes = tried & (uniforms[:, particle, place] * odds < chance)
            token = torch.where(takes, drawn, token)
            accepted = accepted | takes
            r = torch.where((tried & ~takes)[:, None], _without(r, q), r)
        residual = torch.where((running & ~accepted)[:, None], r, residual)
        running = running & accepted
        committed = committed + running
        active = active & ((tokens[:, :, place] == token[:, None]) | ~running[:, None])
    winner = active.long().argmax(dim=1)
    last = target[group, winner, depth].softmax(dim=-1, dtype=torch.float64)
    return committed, winner, torch.where(running[:, None], last, residual)


def _without(r: Tensor, q: Tensor) -> Tensor:
    """(r - q)+ normalised; r where nothing is left, which only rounding can bring about."""
    left = (r - q).clamp(min=0)
    total = left.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, left / total.clamp(min=1e-300), r)
