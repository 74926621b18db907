"""Sampling over a part of the vocabulary: the two kernels of a rank, before and after the ranks' numbers are gathered.

The parts of a row are made by the same kernel that serves a whole vocabulary (sampling), told the number of its first token;
`_fold_kernel` reduces them to the rank's seven numbers a row, `_join_kernel` puts the ranks' numbers together. Filters,
bans, probabilities of whole rows and the systematic first draw are the reference's: once a request, or only where asked for.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smc_plugin.kernels.launch import launch, let_next_start, next_power_of_2, wait_for_inputs
from smc_plugin.kernels.sampling import _run_parts
from smc_plugin.reference.sampling import Sampled
from smc_plugin.reference.shards import (
    CHOSEN,
    NUM_STATS,
    POWERED_TOP,
    POWERED_TOTAL,
    RACE,
    TOKEN,
    TOP,
    TOTAL,
    Names,
    apply_filters,
    ban_tokens,
    pick_own,
    softmax,
    systematic_tokens,
)

__all__ = [
    "NUM_STATS",
    "apply_filters",
    "ban_tokens",
    "combine",
    "pick_own",
    "shard_stats",
    "softmax",
    "systematic_tokens",
]

_TOP, _TOTAL = tl.constexpr(TOP), tl.constexpr(TOTAL)
_POWERED_TOP, _POWERED_TOTAL = tl.constexpr(POWERED_TOP), tl.constexpr(POWERED_TOTAL)
_RACE, _TOKEN, _CHOSEN = tl.constexpr(RACE), tl.constexpr(TOKEN), tl.constexpr(CHOSEN)


@triton.jit
def _fold(tops, totals):
    """Maximum and sum of exponentials over parts of both."""
    top = tl.max(tops, axis=0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    return top, tl.sum(totals * tl.exp(tops - shift), axis=0)


@triton.jit
def _fold_kernel(
    logits,
    row_stride,
    rows,
    temperature,
    parts,
    best_tokens,
    tokens,
    stats,
    width,
    first_token,
    num_splits,
    INDIRECT: tl.constexpr,
    SCALED: tl.constexpr,
    POWERED: tl.constexpr,
    RACED: tl.constexpr,
    GIVEN: tl.constexpr,
    SPLITS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    NUM_STATS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    let_next_start(PDL)
    row = tl.program_id(0)
    split = tl.arange(0, SPLITS)
    valid = split < num_splits
    part = parts + (row * num_splits + split) * NUM_PARTS
    out = stats + row * NUM_STATS
    top, total = _fold(tl.load(part, mask=valid, other=float("-inf")), tl.load(part + 1, mask=valid, other=0.0))  # pyright: ignore
    tl.store(out + _TOP, top)
    tl.store(out + _TOTAL, total)
    if POWERED:
        top, total = _fold(tl.load(part + 2, mask=valid, other=float("-inf")), tl.load(part + 3, mask=valid, other=0.0))  # pyright: ignore
    tl.store(out + _POWERED_TOP, top)
    tl.store(out + _POWERED_TOTAL, total)
    place = tl.full([], -1, tl.int64)
    best = tl.full([], float("-inf"), tl.float32)
    if RACED:
        race = tl.load(part + 4, mask=valid, other=float("-inf"))
        best, winner = tl.max(race, axis=0, return_indices=True, return_indices_tie_break_left=True)
        place = tl.load(best_tokens + row * num_splits + winner).to(tl.int64)
    elif GIVEN:
        place = tl.load(tokens + row) - first_token
    tl.store(out + _RACE, best)
    tl.store(out + _TOKEN, (place + first_token).to(tl.float32))
    inside = (place >= 0) & (place < width)
    source = tl.load(rows + row) if INDIRECT else row.to(tl.int64)
    value = tl.load(logits + source * row_stride + tl.minimum(tl.maximum(place, 0), width - 1)).to(tl.float32)
    if SCALED:
        value = tl.div_rn(value, tl.load(temperature + row).to(tl.float32))
    tl.store(out + _CHOSEN, tl.where(inside, value, float("-inf")))


def shard_stats(
    logits: Tensor,
    temperature: Tensor | None,
    first_token: int,
    names: Names | None = None,
    alpha: Tensor | None = None,
    rows: Tensor | None = None,
    tokens: Tensor | None = None,
) -> Tensor:
    """Reduce a rank's columns of each row to what `combine` needs, in two launches; see the reference."""
    made = _run_parts(logits, rows, temperature, alpha, names, first_token)
    count, device = made.parts.shape[0], logits.device
    stats = torch.empty((count, NUM_STATS), dtype=torch.float32, device=device)
    given = made.best if tokens is None else tokens.contiguous()
    launch(
        _fold_kernel,
        (count,),
        *(made.logits, made.logits.stride(0), given if rows is None else rows.contiguous()),
        *(stats if temperature is None else temperature.contiguous(), made.parts, made.best, given, stats),
        *(logits.shape[-1], first_token, made.parts.shape[1]),
        INDIRECT=rows is not None,
        SCALED=temperature is not None,
        POWERED=alpha is not None,
        RACED=names is not None,
        GIVEN=tokens is not None,
        SPLITS=next_power_of_2(made.parts.shape[1]),
        NUM_PARTS=made.parts.shape[2],
        NUM_STATS=NUM_STATS,
        num_warps=1,
    )
    return stats


@triton.jit
def _join_lse(part, valid, TOP_AT: tl.constexpr):
    tops = tl.load(part + TOP_AT, mask=valid, other=float("-inf"))
    totals = tl.load(part + TOP_AT + 1, mask=valid, other=0.0)
    top, total = _fold(tops, totals)  # pyright: ignore
    return tl.where(top == float("-inf"), 0.0, top) + tl.log(total)


@triton.jit
def _join_kernel(
    stats,
    alpha,
    tokens,
    log_prob_out,
    lse_out,
    zeta_out,
    num_rows,
    num_ranks,
    POWERED: tl.constexpr,
    GIVEN: tl.constexpr,
    RANKS: tl.constexpr,
    NUM_STATS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    let_next_start(PDL)
    row = tl.program_id(0)
    rank = tl.arange(0, RANKS)
    valid = rank < num_ranks
    part = stats + (rank * num_rows + row) * NUM_STATS
    lse = _join_lse(part, valid, _TOP)
    tl.store(lse_out + row, lse)
    chosen = tl.load(part + _CHOSEN, mask=valid, other=float("-inf"))
    if GIVEN:
        # A NaN among the ranks' values has made lse NaN already, whatever this maximum does.
        value = tl.where(tl.load(tokens + row) >= 0, tl.max(chosen, axis=0) - lse, 0.0)
    else:
        race = tl.load(part + _RACE, mask=valid, other=float("-inf"))
        _, winner = tl.max(race, axis=0, return_indices=True, return_indices_tie_break_left=True)
        own = stats + (winner * num_rows + row) * NUM_STATS
        tl.store(tokens + row, tl.load(own + _TOKEN).to(tl.int64))
        value = tl.load(own + _CHOSEN) - lse
    tl.store(log_prob_out + row, value)
    if POWERED:
        power = tl.load(alpha + row).to(tl.float32)
        zeta = _join_lse(part, valid, _POWERED_TOP) - power * lse
        tl.store(zeta_out + row, tl.where(power == 1.0, 0.0, zeta))
    else:
        tl.store(zeta_out + row, 0.0)


def combine(stats: Tensor, alpha: Tensor | None = None, tokens: Tensor | None = None) -> Sampled:
    """Put the ranks' statistics together in one launch; see the reference."""
    ranks, count, _ = stats.shape
    given = tokens is not None
    chosen = tokens.contiguous() if tokens is not None else torch.empty(count, dtype=torch.int64, device=stats.device)
    log_p, lse, zeta = (torch.empty(count, dtype=torch.float32, device=stats.device) for _ in range(3))
    launch(
        _join_kernel,
        (count,),
        *(stats.contiguous(), lse if alpha is None else alpha.contiguous(), chosen, log_p, lse, zeta, count, ranks),
        POWERED=alpha is not None,
        GIVEN=given,
        RANKS=next_power_of_2(ranks),
        NUM_STATS=NUM_STATS,
        num_warps=1,
    )
    return Sampled(chosen, log_p, lse, zeta)
