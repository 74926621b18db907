"""From logits to tokens and log-probabilities.

`scale` applies temperature and the request's filters once; everything after it works on scaled logits s = z/T, with -inf
for tokens that top-k, top-p, min-p or min_tokens removed. Draws are exponential races: argmax of s - log E, E standard
exponential, which is Gumbel-max and needs one pass.
`sample` and `score` are those steps put together, for raw logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smc_plugin.reference.random import exponential

NEG_INF = float("-inf")


@dataclass(frozen=True)
class Sampled:
    """What `sample` draws.

    Args:
        tokens: [R] int64.
        log_prob, lse: [R] float32, of p = softmax(logits / T), whatever alpha is.
        log_zeta: [R] float32; 0 where alpha is 1.
    """

    tokens: Tensor
    log_prob: Tensor
    lse: Tensor
    log_zeta: Tensor


def scale(logits: Tensor, temperature: Tensor) -> Tensor:
    """Divide by the temperature in float32.

    Args:
        logits: [R, V].
        temperature: [R] > 0.
    Returns:
        [R, V] float32.
    """
    return logits.to(torch.float32) / temperature[:, None].to(torch.float32)


def apply_filters(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Remove unlikely tokens: top-k, then top-p, then min-p, each on what the one before left.

    Args:
        scaled: [R, V] float32 logits after temperature.
        top_k: [R] int64, 0 keeps all. Ties with the k-th are cut so that exactly k stay.
        top_p: [R] in (0, 1]: the smallest set of most likely tokens whose mass reaches top_p.
        min_p: [R] in [0, 1]: tokens less likely than min_p times the most likely one go.
    Returns:
        [R, V] float32 with -inf for removed tokens; the most likely token always stays.
    """
    vocab_size = scaled.shape[-1]
    # Stable, so that of equal logits the lower token id wins, as argmax does.
    values, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(vocab_size, device=scaled.device)
    keep = (rank < top_k[:, None]) | (top_k[:, None] <= 0)
    values = values.masked_fill(~keep, NEG_INF)
    probs = values.softmax(dim=-1, dtype=torch.float64)
    mass_before = probs.cumsum(dim=-1) - probs
    keep &= (mass_before < top_p[:, None]) | (top_p[:, None] >= 1)
    kept_probs = probs.masked_fill(~keep, 0)
    keep &= kept_probs >= min_p[:, None] * kept_probs[:, :1]
    keep[:, 0] = True
    return torch.full_like(scaled, NEG_INF).scatter(1, order, values.masked_fill(~keep, NEG_INF))


def ban_tokens(scaled: Tensor, token_ids: Tensor, banned: Tensor) -> Tensor:
    """Set some tokens' logits to -inf.

    Args:
        scaled: [R, V].
        token_ids: [R, M] int64; -1 is an unused entry.
        banned: [R] bool, the rows to which the ban applies.
    """
    hit = banned[:, None] & (token_ids >= 0)
    index = token_ids.clamp(min=0)
    current = scaled.gather(1, index)
    # amin: an unused entry points at token 0 with its own value and must not undo a real ban of token 0.
    return scaled.scatter_reduce(1, index, torch.where(hit, NEG_INF, current), reduce="amin")


def draw(scaled: Tensor, seed: Tensor, step: Tensor, lane: Tensor, purpose: Tensor) -> Tensor:
    """Draw one token a row from softmax(scaled).

    Args:
        scaled: [R, V] float32; a NaN row gives some valid token id, never an error.
        seed, step, lane, purpose: [R] int64, the draw's name (see random).
    Returns:
        [R] int64.
    """
    noise = exponential(seed, step, lane, purpose, scaled.shape[-1])
    return (scaled - noise.log_()).argmax(dim=-1)


def log_prob(scaled: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of given tokens under softmax(scaled).

    Args:
        scaled: [R, V] float32; tokens: [R] int64.
    Returns:
        ([R] float32 log-probability, [R] float32 log-sum-exp, not finite where the row holds NaN, +inf or no finite value).
    """
    lse = scaled.logsumexp(dim=-1)
    return scaled.gather(1, tokens[:, None])[:, 0] - lse, lse


def log_zeta(scaled: Tensor, lse: Tensor, alpha: Tensor) -> Tensor:
    """log ζ = lse(α s) - α lse(s): what a draw from softmax(α s) adds to the log weight. Exactly 0 where α = 1.

    Args:
        scaled: [R, V]; lse: [R]; alpha: [R].
    Returns:
        [R] float32.
    """
    powered = (scaled * alpha[:, None]).logsumexp(dim=-1) - alpha * lse
    return torch.where(alpha == 1, torch.zeros_like(lse), powered)


def systematic_tokens(scaled: Tensor, u: Tensor, num_particles: int) -> Tensor:
    """Each particle's own first token by one systematic draw over the group.

    Args:
        scaled: [G, V]; u: [G] float64 in [0, 1).
    Returns:
        [G, N] int64: the tokens at the quantiles (u + n)/N of softmax(scaled), never one of probability zero.
    """
    probs = scaled.softmax(dim=-1, dtype=torch.float64)
    cdf = probs.cumsum(dim=-1)
    positions = (u[:, None] + torch.arange(num_particles, device=u.device)) / num_particles
    tokens = torch.searchsorted(cdf, positions * cdf[:, -1:], right=True)
    possible = torch.arange(scaled.shape[-1], device=u.device) * (probs > 0)
    return torch.minimum(tokens, possible.amax(dim=-1, keepdim=True))


def sample(
    logits: Tensor,
    temperature: Tensor | None,
    seed: Tensor,
    step: Tensor,
    lane: Tensor,
    purpose: Tensor,
    alpha: Tensor | None = None,
    rows: Tensor | None = None,
) -> Sampled:
    """Draw one token a row from softmax(alpha * logits / temperature), with its log-probability at alpha = 1.

    Args:
        logits: [R', V], any float dtype; computed in float32.
        temperature: [R] float32 > 0, or None where the logits are scaled already.
        seed, step, lane, purpose: [R] int64, the draw's name (see random).
        alpha: [R] float32, or None for 1.
        rows: [R] int64, the row of logits that each draw reads; None for row r.
    """
    chosen = logits if rows is None else logits.index_select(0, rows)
    scaled = chosen.to(torch.float32) if temperature is None else scale(chosen, temperature)
    tokens = draw(scaled if alpha is None else scaled * alpha[:, None], seed, step, lane, purpose)
    log_p, lse = log_prob(scaled, tokens)
    return Sampled(tokens, log_p, lse, torch.zeros_like(lse) if alpha is None else log_zeta(scaled, lse, alpha))


def score(logits: Tensor, tokens: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probability of given tokens under softmax(logits / temperature), and every row's log-sum-exp.

    Args:
        logits: [R, V], any float dtype; computed in float32.
        tokens: [R] int64; a row with a negative one has log-probability 0 (row K of a round scores nothing).
        temperature: [R] float32 > 0, or None where the logits are scaled already.
    Returns:
        ([R] float32, [R] float32).
    """
    scaled = logits.to(torch.float32) if temperature is None else scale(logits, temperature)
    log_p, lse = log_prob(scaled, tokens.clamp(min=0))
    return torch.where(tokens < 0, 0.0, log_p), lse
