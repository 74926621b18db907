"""Sampling where each tensor-parallel rank holds a part of the vocabulary; nothing of vocabulary size leaves a rank.

A rank reduces its columns to a few numbers a row (`shard_stats`), the ranks' numbers are gathered, and every rank combines them
in the same way (`combine`), so all of them hold the same tokens. Random numbers are named by the token's number in the
whole vocabulary: the tokens are those that one rank would draw. Columns beyond the vocabulary hold -inf.

Example, two ranks of 3 columns, one row: [1, 2, 0] gives max 2, sum of exp(x - 2) 1.503, and [3, 0, 1] max 3 and 1.185;
together lse = 3 + log(1.503 e^-1 + 1.185) = 3.552. If the race is won with 2.4 by token 1 and with 3.9 by token 3, it is 3.

`gather` in the functions below stacks a tensor of every rank: [...] to [ranks, ...].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from smc_plugin.reference.random import exponential
from smc_plugin.reference.sampling import NEG_INF, Sampled, scale

Gather = Callable[[Tensor], Tensor]
Names = tuple[Tensor, ...]  # seed, step, lane, purpose
# Columns of the statistics. Token numbers are exact in float32 below 2^24.
TOP, TOTAL, POWERED_TOP, POWERED_TOTAL, RACE, TOKEN, CHOSEN = range(7)
NUM_STATS = 7
_DIGITS = 256


def shard_stats(
    logits: Tensor,
    temperature: Tensor | None,
    first_token: int,
    names: Names | None = None,
    alpha: Tensor | None = None,
    rows: Tensor | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """Reduce a rank's columns of each row to what `combine` needs.

    Args:
        logits: [R', W], any float dtype; computed in float32.
        temperature: [R] float32 > 0, or None where the logits are scaled already.
        first_token: number of the first column's token; a multiple of 4.
        names: seed, step, lane, purpose, [R] int64 each: draw a token (see random).
        alpha: [R] float32, or None for 1.
        rows: [R] int64, the row of logits that each row reads; None for row r.
        tokens: [R] int64: tokens given instead of drawn.
    Returns:
        [R, NUM_STATS] float32: maximum and sum of exp(s - maximum), the same of alpha * s, the best value of the race and its
        token, and the scaled logit of the drawn or given token, -inf where the rank does not hold it.
    """
    chosen = logits if rows is None else logits.index_select(0, rows)
    scaled = chosen.to(torch.float32) if temperature is None else scale(chosen, temperature)
    powered = scaled if alpha is None else scaled * alpha[:, None]
    stats = torch.full((scaled.shape[0], NUM_STATS), NEG_INF, dtype=torch.float32, device=scaled.device)
    stats[:, TOP], stats[:, TOTAL] = _top_and_total(scaled)
    stats[:, POWERED_TOP], stats[:, POWERED_TOTAL] = _top_and_total(powered)
    if names is not None:
        seed, step, lane, purpose = names
        noise = exponential(seed, step, lane, purpose, scaled.shape[-1], first_token)
        race = powered - noise.log_()
        # A NaN never wins, so that some valid token does.
        stats[:, RACE], place = torch.where(race.isnan(), NEG_INF, race).max(dim=-1)
        stats[:, TOKEN] = (place + first_token).to(torch.float32)
        stats[:, CHOSEN] = scaled.gather(1, place[:, None])[:, 0]
    elif tokens is not None:
        stats[:, CHOSEN] = pick_own(scaled, tokens[:, None], first_token, NEG_INF)[:, 0]
    return stats


def combine(stats: Tensor, alpha: Tensor | None = None, tokens: Tensor | None = None) -> Sampled:
    """Put the ranks' statistics together.

    Args:
        stats: [ranks, R, NUM_STATS].
        alpha: as given to `shard_stats`.
        tokens: [R] int64 as given to `shard_stats`; None takes the winners of the race.
    Returns:
        tokens, their log-probability at alpha = 1 (0 for a negative token), log-sum-exp and log ζ.
    """
    lse = _joined_lse(stats[..., TOP], stats[..., TOTAL])
    if tokens is None:
        winner = stats[..., RACE].argmax(dim=0, keepdim=True)
        drawn = stats[..., TOKEN].gather(0, winner)[0].to(torch.int64)
        log_prob = stats[..., CHOSEN].gather(0, winner)[0] - lse
    else:
        drawn = tokens
        log_prob = torch.where(tokens < 0, 0.0, stats[..., CHOSEN].amax(dim=0) - lse)
    zeta = torch.zeros_like(lse)
    if alpha is not None:
        powered = _joined_lse(stats[..., POWERED_TOP], stats[..., POWERED_TOTAL]) - alpha * lse
        zeta = torch.where(alpha == 1, zeta, powered)
    return Sampled(drawn, log_prob, lse, zeta)


def pick_own(values: Tensor, tokens: Tensor, first_token: int, otherwise: float) -> Tensor:
    """Each row's entries at given tokens where the rank holds them.

    Args:
        values: [..., W]; tokens: [..., M] int64.
    Returns:
        [..., M], `otherwise` where the rank does not hold the token.
    """
    place = tokens - first_token
    inside = (place >= 0) & (place < values.shape[-1])
    return torch.where(inside, values.gather(-1, place.clamp(0, values.shape[-1] - 1)), otherwise)


def ban_tokens(scaled: Tensor, token_ids: Tensor, banned: Tensor, first_token: int) -> Tensor:
    """Set some tokens' logits to -inf where the rank holds them (see sampling.ban_tokens)."""
    place = token_ids - first_token
    hit = banned[:, None] & (token_ids >= 0) & (place >= 0) & (place < scaled.shape[-1])
    index = place.clamp(0, scaled.shape[-1] - 1)
    return scaled.scatter_reduce(1, index, torch.where(hit, NEG_INF, scaled.gather(1, index)), reduce="amin")


def softmax(scaled: Tensor, gather: Gather) -> Tensor:
    """Probabilities of a rank's own columns, [..., W] float64."""
    wide = scaled.to(torch.float64)
    top = gather(wide.amax(dim=-1)).amax(dim=0)
    mass = (wide - top[..., None]).exp()
    return mass / gather(mass.sum(dim=-1)).sum(dim=0)[..., None]


def systematic_tokens(
    scaled: Tensor, u: Tensor, num_particles: int, first_token: int, rank: int, gather: Gather
) -> Tensor:
    """Each particle's own first token by one systematic draw over the group (see sampling.systematic_tokens).

    The token at a quantile is the number of entries of the CDF up to it, so the ranks only count and add.

    Returns:
        [G, N] int64.
    """
    probs = softmax(scaled, gather)
    totals = gather(probs.sum(dim=-1))
    ends = totals.cumsum(dim=0)
    before = ends[rank - 1] if rank > 0 else torch.zeros_like(ends[0])
    positions = (u[:, None] + torch.arange(num_particles, device=u.device)) / num_particles * ends[-1][:, None]
    cdf = before[:, None] + probs.cumsum(dim=-1)
    # Where a rank's part of the CDF ends is where the next rank's begins, whatever the rounding of its sum.
    cdf[:, -1] = ends[rank]
    counts = gather(torch.searchsorted(cdf.contiguous(), positions, right=True)).sum(dim=0)
    numbers = torch.arange(first_token, first_token + scaled.shape[-1], device=u.device)
    possible = gather((numbers * (probs > 0)).amax(dim=-1)).amax(dim=0)
    return torch.minimum(counts, possible[:, None])


def apply_filters(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, rank: int, gather: Gather) -> Tensor:
    """Remove unlikely tokens: top-k, then top-p, then min-p (see sampling.apply_filters), exactly as one rank would.

    Each filter keeps a leading part of the tokens in order of logit and number, that is, all above a threshold and some of
    those equal to it. The threshold is searched 8 bits at a time from the top, the ranks adding 256 counts or masses a row.

    Args:
        scaled: [R, W] float32, the rank's columns.
    Returns:
        [R, W] float32 with -inf for removed tokens.
    """
    keys, wide = _ordered(scaled), scaled.to(torch.float64)
    top = gather(wide.amax(dim=-1)).amax(dim=0)
    mass = (wide - top[:, None]).exp().nan_to_num(0.0)
    wanted = top_k.to(torch.float64)
    threshold, above = _threshold(keys, torch.ones_like(mass), wanted, gather)
    keep = _leading(keys, threshold, wanted - above, rank, gather) | (top_k <= 0)[:, None]
    mass = mass * keep
    wanted = top_p.to(torch.float64) * gather(mass.sum(dim=-1)).sum(dim=0)
    threshold, above = _threshold(keys, mass, wanted, gather)
    equal = gather((mass * (keys == threshold[:, None])).amax(dim=-1)).amax(dim=0)
    ties = ((wanted - above) / torch.where(equal > 0, equal, 1.0)).ceil().clamp(min=1)
    keep &= _leading(keys, threshold, ties, rank, gather) | (top_p >= 1)[:, None]
    keep &= mass >= min_p[:, None].to(torch.float64)
    return scaled.masked_fill(~keep, NEG_INF)


def _top_and_total(values: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and sum of exp(value - maximum) of each row."""
    top = values.amax(dim=-1)
    shift = torch.where(top == NEG_INF, 0.0, top)
    return top, (values - shift[:, None]).exp().sum(dim=-1)


def _joined_lse(tops: Tensor, totals: Tensor) -> Tensor:
    """log-sum-exp from the ranks' maxima and sums, [ranks, R] each."""
    top = tops.amax(dim=0)
    shift = torch.where(top == NEG_INF, 0.0, top)
    return shift + (totals * (tops - shift).exp()).sum(dim=0).log()


def _ordered(values: Tensor) -> Tensor:
    """Int64 keys in [0, 2^32) that order like float32 values: -0 equals 0, NaN is above +inf."""
    bits = (values + 0.0).view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    keys = torch.where(bits >= 1 << 31, 0xFFFFFFFF - bits, bits + (1 << 31))
    return torch.where(values.isnan(), 0xFFFFFFFF, keys)


def _threshold(keys: Tensor, mass: Tensor, wanted: Tensor, gather: Gather) -> tuple[Tensor, Tensor]:
    """The least key with less than `wanted` mass above it over all ranks, and that mass.

    Args:
        keys: [R, W] int64; mass: [R, W] float64; wanted: [R] float64.
    """
    prefix = torch.zeros_like(wanted, dtype=torch.int64)
    above = torch.zeros_like(wanted)
    for shift in (24, 16, 8, 0):
        inside = keys >> (shift + 8) == prefix[:, None]
        own = mass.new_zeros((keys.shape[0], _DIGITS))
        own.scatter_add_(1, keys >> shift & _DIGITS - 1, mass * inside)
        sums = gather(own).sum(dim=0)
        before = above[:, None] + sums.flip(1).cumsum(dim=1).flip(1) - sums
        digit = ((before < wanted[:, None]) & (sums > 0)).to(torch.int64).argmax(dim=1)
        above = before.gather(1, digit[:, None])[:, 0]
        prefix = prefix << 8 | digit
    return prefix, above


def _leading(keys: Tensor, threshold: Tensor, ties: Tensor, rank: int, gather: Gather) -> Tensor:
    """Tokens above the threshold, and the first `ties` [R] of those equal to it in the order of all ranks."""
    equal = keys == threshold[:, None]
    before = gather(equal.sum(dim=-1))[:rank].sum(dim=0)
    place = before[:, None] + equal.cumsum(dim=-1)
    return (keys > threshold[:, None]) | (equal & (place <= ties[:, None]))
