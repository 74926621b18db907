"""Particle weights: what a round adds to them, and where a group that would die ends its round.

Weights are unnormalised natural logs in float64: a long answer sums thousands of terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weighed:
    """Result of `accumulate`.

    Args:
        log_weights: [G, N] float64 after the committed draft tokens, before the bonus.
        committed: [G] int64, draft tokens that stand: K, or fewer where the round was recovered.
        recovered: [G] bool.
    """

    log_weights: Tensor
    committed: Tensor
    recovered: Tensor


def accumulate(log_weights: Tensor, increments: Tensor, end: Tensor, finished: Tensor) -> Weighed:
    """Add a round's draft increments up to each particle's end.

    If every particle of a group is dead after draft token k, the group's round ends at k - 1.

    Args:
        log_weights: [G, N] float64.
        increments: [G, N, K] float64, ℓ_k; -inf kills the particle.
        end: [G, N] int64, 1-based draft token that ends the particle (its weight included); above K where none does.
        finished: [G, N] bool; these add 0.
    Source: docs/algorithm.md, steps 3 and 5 and the recovery rule.
    """
    path = weight_paths(log_weights, increments, end, finished)
    alive = path.isfinite().any(dim=1)
    committed = alive[:, 1:].sum(dim=-1)
    chosen = committed[:, None, None].expand(-1, log_weights.shape[1], 1)
    return Weighed(path.gather(2, chosen)[..., 0], committed, committed < increments.shape[-1])


def weight_paths(log_weights: Tensor, increments: Tensor, end: Tensor, finished: Tensor) -> Tensor:
    """Log weights before the round and after each of its draft tokens: [G, N, K + 1]; arguments as in `accumulate`."""
    index = torch.arange(1, increments.shape[-1] + 1, device=end.device)
    # Whatever a dead particle goes on to draw, NaN included, must not touch its -inf.
    counts = (log_weights.isfinite() & ~finished)[..., None] & (index <= end[..., None])
    steps = torch.where(counts, increments, 0.0).cumsum(dim=-1)
    return torch.cat([log_weights[..., None], log_weights[..., None] + steps], dim=-1)


def weigh(
    log_weights: Tensor, log_p: Tensor, log_q: Tensor, alpha: Tensor, end: Tensor, finished: Tensor, failed: Tensor
) -> Weighed:
    """Form ℓ_k = α log p - log q and accumulate it.

    Args:
        log_weights: [G, N] float64.
        log_p, log_q: [G, N, K] float32.
        alpha: [G] float32.
        end: [G, N] int64; finished: [G, N] bool (see accumulate).
        failed: [G] bool; these groups' increments are 0.
    """
    increments = (alpha[:, None, None] * log_p - log_q).to(torch.float64)
    return accumulate(log_weights, torch.where(failed[:, None, None], 0.0, increments), end, finished)


def normalise(log_weights: Tensor) -> Tensor:
    """Weights that sum to one.

    Args:
        log_weights: [G, N] float64.
    Returns:
        [G, N] float64; all zero where a group has no finite weight.
    """
    shifted = log_weights - log_weights.amax(dim=-1, keepdim=True)
    weights = torch.where(log_weights.isfinite(), shifted.exp(), 0.0)
    total = weights.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, weights / total, 0.0)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """ESS = 1 / Σ w̄².

    Args:
        log_weights: [G, N] float64.
    Returns:
        [G] float64 in [1, N]; 0 where a group has no finite weight.
    """
    squares = normalise(log_weights).square().sum(dim=-1)
    return torch.where(squares > 0, 1.0 / squares, 0.0)


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """lse(log_w) - log N: the factor a resampling (or the end) adds to log_evidence.

    Args:
        log_weights: [G, N] float64.
    Returns:
        [G] float64; exactly 0 where all weights are 0.
    """
    top = log_weights.amax(dim=-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0)
    return (log_weights - top).exp().mean(dim=-1).log() + top[:, 0]
