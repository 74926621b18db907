"""Systematic resampling that moves as little as possible.

    >>> log_weights = torch.tensor([[0.6, 0.0, 0.1, 0.3]], dtype=torch.float64).log()
    >>> systematic_resample(log_weights, torch.tensor([0.5], dtype=torch.float64)).tolist()
    [[0, 0, 2, 3]]

Positions are .125, .375, .625, .875 and the CDF is .6, .6, .7, 1: ancestors 0, 0, 2, 3. Survivors 0, 2 and 3 stay where
they are; particle 0's surplus copy overwrites dead particle 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smc_plugin.reference import random
from smc_plugin.reference.weights import effective_sample_size, log_mean_exp, normalise


@dataclass(frozen=True)
class Resampled:
    """What the end of a round decides.

    Args:
        log_weights: [G, N] float64 after resampling (0 where it happened).
        log_evidence: [G] float64.
        ancestors: [G, N] int64, 0, 1, …, N - 1 where nothing was resampled.
        ess: [G] float64, before resampling.
        resampled: [G] bool.
        committed: [G] int64, recovered: [G] bool (see weights.Weighed); None from `resample_if_needed`.
    """

    log_weights: Tensor
    log_evidence: Tensor
    ancestors: Tensor
    ess: Tensor
    resampled: Tensor
    committed: Tensor | None = None
    recovered: Tensor | None = None


def systematic_ancestors(log_weights: Tensor, u: Tensor) -> Tensor:
    """Sorted ancestors by systematic resampling.

    Args:
        log_weights: [G, N] float64, unnormalised natural log; -inf is a dead particle.
        u: [G] float64 in [0, 1), one offset per request.
    Returns:
        ancestors: [G, N] int64, non-decreasing; each particle appears ⌊N w̄⌋ or ⌈N w̄⌉ times, a dead one never. A group
        with no finite weight gives 0, 1, …, N - 1.
    Source: Douc, Cappé & Moulines (2005), arXiv:cs/0507025.
    """
    num_particles = log_weights.shape[-1]
    index = torch.arange(num_particles, device=log_weights.device)
    weights = normalise(log_weights)
    cdf = weights.cumsum(dim=-1)
    positions = (u[:, None] + index) / num_particles
    # Counting cdf_j <= position skips dead particles in front and between; the clamp handles u near 1 and a dead tail.
    ancestors = torch.searchsorted(cdf, positions, right=True)
    last_live = (index * (weights > 0)).amax(dim=-1, keepdim=True)
    ancestors = torch.minimum(ancestors, last_live)
    return torch.where(cdf[:, -1:] > 0, ancestors, index)


def keep_survivors(ancestors: Tensor) -> Tensor:
    """Rearrange sorted ancestors so that every survivor keeps its own place.

    Args:
        ancestors: [G, N] int64, any order.
    Returns:
        [G, N] int64 with the same counts; ancestors[i] == i for every i that has an offspring, so a copy never reads a
        place that another copy writes.
    """
    num_particles = ancestors.shape[-1]
    index = torch.arange(num_particles, device=ancestors.device).expand_as(ancestors)
    counts = torch.zeros_like(ancestors).scatter_add_(1, ancestors, torch.ones_like(ancestors))
    dead = counts == 0
    surplus_cdf = (counts - 1).clamp(min=0).cumsum(dim=-1)
    order_among_dead = dead.long().cumsum(dim=-1) - 1
    parent = torch.searchsorted(surplus_cdf, order_among_dead, right=True)
    return torch.where(dead, parent, index)


def systematic_resample(log_weights: Tensor, u: Tensor) -> Tensor:
    """Ancestors in place: `keep_survivors(systematic_ancestors(log_weights, u))`.

    Args:
        log_weights: [G, N] float64; u: [G] float64 in [0, 1).
    Returns:
        [G, N] int64; never indexes a dead particle while a live one exists.
    """
    return keep_survivors(systematic_ancestors(log_weights, u))


def resample_if_needed(
    log_weights: Tensor,
    seed: Tensor,
    round_number: Tensor,
    ess_threshold: Tensor,
    eligible: Tensor,
    log_evidence: Tensor,
) -> Resampled:
    """Resample the groups whose ESS fell below θ N.

    Args:
        log_weights: [G, N] float64.
        seed, round_number: [G] int64, name u with lane 0 and PURPOSE_RESAMPLE.
        ess_threshold: [G] float64, θ.
        eligible: [G] bool; others keep their weights (idle, failed or finished groups).
        log_evidence: [G] float64, before.
    Source: docs/algorithm.md, step 7.
    """
    num_particles = log_weights.shape[1]
    ess = effective_sample_size(log_weights)
    index = torch.arange(num_particles, device=ess.device).expand_as(log_weights)
    if num_particles < 2:
        return Resampled(log_weights, log_evidence, index, ess, torch.zeros_like(eligible))
    resampled = eligible & (ess < ess_threshold * num_particles)
    zero = torch.zeros_like(seed)
    u = random.uniform(seed, round_number, zero, zero + random.PURPOSE_RESAMPLE)
    return Resampled(
        torch.where(resampled[:, None], 0.0, log_weights),
        torch.where(resampled, log_evidence + log_mean_exp(log_weights), log_evidence),
        torch.where(resampled[:, None], systematic_resample(log_weights, u), index),
        ess,
        resampled,
    )
