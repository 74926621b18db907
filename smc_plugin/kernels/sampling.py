"""From logits to tokens and log-probabilities in one pass over the logits.

A row of the vocabulary is split over several programs; each keeps the maximum and the sum of exponentials of its part,
and the winner of its part of the exponential race. A second, small kernel combines the parts of a row. So the 8 rows of
a draft step become 8 * 63 = 504 programs of two tiles each at 128256 tokens, enough to fill the GPU.

`sample` does what `scale`, `draw`, `log_prob` and `log_zeta` do one after another, and reads the logits once. `score`
is `scale` and `log_prob` for given tokens. `scale`, `ban_tokens` and `systematic_tokens` are the reference's: elementwise,
a few numbers, or once a request.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from smc_plugin.kernels.filters import apply_filters
from smc_plugin.kernels.launch import cdiv, launch, let_next_start, next_power_of_2, sm_count, wait_for_inputs
from smc_plugin.kernels.random import race_noise
from smc_plugin.reference.sampling import NEG_INF, Sampled, ban_tokens, scale, systematic_tokens

__all__ = [
    "NEG_INF",
    "Sampled",
    "apply_filters",
    "ban_tokens",
    "draw",
    "log_prob",
    "log_zeta",
    "sample",
    "scale",
    "score",
    "systematic_tokens",
]

_BLOCK = 1024
_PARTS = 5  # max, sum of exp, max and sum of the powered logits, best race value


@triton.jit
def _add_to_lse(values, valid, top, total):
    """Fold a tile into a running maximum and sum of exponentials; NaN and +inf end up as NaN in the sum."""
    values = tl.where(valid, values, float("-inf"))
    new_top = tl.maximum(top, tl.max(values, axis=0))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    return new_top, total * tl.exp(top - shift) + tl.sum(tl.exp(values - shift), axis=0)


@triton.jit
def _partial_kernel(
    logits,
    row_stride,
    rows,
    temperature,
    alpha,
    seed,
    step,
    lane,
    purpose,
    parts,
    best_tokens,
    vocab_size,
    first_block,
    tiles_per_split,
    num_splits,
    INDIRECT: tl.constexpr,
    SCALED: tl.constexpr,
    POWERED: tl.constexpr,
    RACE: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    let_next_start(PDL)
    row, split = tl.program_id(1), tl.program_id(0)
    source = tl.load(rows + row) if INDIRECT else row.to(tl.int64)
    base = logits + source * row_stride
    divisor = tl.load(temperature + row).to(tl.float32) if SCALED else 1.0
    power = tl.load(alpha + row).to(tl.float32) if POWERED else 1.0
    if RACE:
        row_seed, row_step = tl.load(seed + row), tl.load(step + row)
        row_lane, row_purpose = tl.load(lane + row), tl.load(purpose + row)
    top = tl.full([], float("-inf"), tl.float32)
    total = tl.full([], 0.0, tl.float32)
    powered_top, powered_total = top, total
    best, best_token = top, tl.full([], 0, tl.int32)
    first = split * tiles_per_split * BLOCK
    for tile in range(tiles_per_split):
        start = first + tile * BLOCK
        token = start + tl.arange(0, BLOCK)
        valid = token < vocab_size
        value = tl.load(base + token, mask=valid, other=0.0).to(tl.float32)
        if SCALED:
            value = tl.div_rn(value, divisor)
        top, total = _add_to_lse(value, valid, top, total)
        if POWERED:
            value = value * power
            powered_top, powered_total = _add_to_lse(value, valid, powered_top, powered_total)
        if RACE:
            race = value - race_noise(row_seed, first_block + start // 4, row_step, row_lane, row_purpose, BLOCK)
            # A NaN never wins, so that some valid token does.
            race = tl.where(valid & (race == race), race, float("-inf"))  # noqa: PLR0124
            winner, place = tl.max(race, axis=0, return_indices=True, return_indices_tie_break_left=True)
            best_token = tl.where(winner > best, start + place, best_token)
            best = tl.maximum(best, winner)
    out = parts + (row * num_splits + split) * NUM_PARTS
    tl.store(out, top)
    tl.store(out + 1, total)
    if POWERED:
        tl.store(out + 2, powered_top)
        tl.store(out + 3, powered_total)
    if RACE:
        tl.store(out + 4, best)
        tl.store(best_tokens + row * num_splits + split, best_token)


@triton.jit
def _combine_lse(parts, valid):
    """log-sum-exp over a row's parts; parts points at each part's maximum."""
    tops = tl.load(parts, mask=valid, other=float("-inf"))
    totals = tl.load(parts + 1, mask=valid, other=0.0)
    top = tl.max(tops, axis=0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    return shift + tl.log(tl.sum(totals * tl.exp(tops - shift), axis=0))


@triton.jit
def _combine_kernel(
    logits,
    row_stride,
    rows,
    temperature,
    alpha,
    parts,
    best_tokens,
    tokens,
    log_prob_out,
    lse_out,
    zeta_out,
    num_splits,
    INDIRECT: tl.constexpr,
    SCALED: tl.constexpr,
    POWERED: tl.constexpr,
    RACE: tl.constexpr,
    CHOSEN: tl.constexpr,
    SPLITS: tl.constexpr,
    NUM_PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    let_next_start(PDL)
    row = tl.program_id(0)
    split = tl.arange(0, SPLITS)
    valid = split < num_splits
    part = parts + (row * num_splits + split) * NUM_PARTS
    lse = _combine_lse(part, valid)
    tl.store(lse_out + row, lse)
    if RACE:
        race = tl.load(part + 4, mask=valid, other=float("-inf"))
        _, winner = tl.max(race, axis=0, return_indices=True, return_indices_tie_break_left=True)
        token = tl.load(best_tokens + row * num_splits + winner).to(tl.int64)
        tl.store(tokens + row, token)
    else:
        token = tl.load(tokens + row)
    if CHOSEN:
        source = tl.load(rows + row) if INDIRECT else row.to(tl.int64)
        value = tl.load(logits + source * row_stride + tl.maximum(token, 0)).to(tl.float32)
        if SCALED:
            value = tl.div_rn(value, tl.load(temperature + row).to(tl.float32))
        tl.store(log_prob_out + row, tl.where(token >= 0, value - lse, 0.0))
    if POWERED:
        power = tl.load(alpha + row).to(tl.float32)
        zeta = _combine_lse(part + 2, valid) - power * lse
        tl.store(zeta_out + row, tl.where(power == 1.0, 0.0, zeta))
    else:
        tl.store(zeta_out + row, 0.0)


def _splits(rows: int, vocab_size: int, device: torch.device) -> tuple[int, int]:
    """Tiles per split and number of splits, for about four programs a multiprocessor."""
    tiles = cdiv(vocab_size, _BLOCK)
    wanted = min(tiles, max(1, cdiv(4 * sm_count(device), rows)))
    tiles_per_split = cdiv(tiles, wanted)
    return tiles_per_split, cdiv(tiles, tiles_per_split)


@dataclass(frozen=True)
class Parts:
    """What the programs of each row leave: parts [R, splits, _PARTS] float32, best [R, splits] int32, and what they read."""

    logits: Tensor
    parts: Tensor
    best: Tensor


def _run_parts(
    logits: Tensor,
    rows: Tensor | None,
    temperature: Tensor | None,
    alpha: Tensor | None,
    names: tuple[Tensor, ...] | None,
    first_token: int = 0,
) -> Parts:
    """The first kernel; None switches a part off. Random numbers are those of tokens from first_token on."""
    count = logits.shape[0] if rows is None else rows.shape[0]
    vocab_size, device = logits.shape[-1], logits.device
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    tiles_per_split, num_splits = _splits(count, vocab_size, device)
    parts = torch.empty((count, num_splits, _PARTS), dtype=torch.float32, device=device)
    best = torch.empty((count, num_splits), dtype=torch.int32, device=device)
    # Pointers that a variant does not read still need some tensor.
    seed, step, lane, purpose = (name.contiguous() for name in names) if names else (best,) * 4
    launch(
        _partial_kernel,
        (num_splits, count),
        *(logits, logits.stride(0), best if rows is None else rows.contiguous()),
        *(parts if temperature is None else temperature.contiguous(), parts if alpha is None else alpha.contiguous()),
        *(seed, step, lane, purpose, parts, best, vocab_size, first_token // 4, tiles_per_split, num_splits),
        INDIRECT=rows is not None,
        SCALED=temperature is not None,
        POWERED=alpha is not None,
        RACE=names is not None,
        BLOCK=_BLOCK,
        NUM_PARTS=_PARTS,
        num_warps=4,
    )
    return Parts(logits, parts, best)


def _run(
    logits: Tensor,
    rows: Tensor | None,
    temperature: Tensor | None,
    alpha: Tensor | None,
    names: tuple[Tensor, ...] | None,
    tokens: Tensor | None,
) -> Sampled:
    """Both kernels; None switches a part off. With neither names nor tokens only lse (and zeta) mean anything."""
    made = _run_parts(logits, rows, temperature, alpha, names)
    (count, num_splits, _), device = made.parts.shape, logits.device
    chosen = tokens if tokens is not None else torch.empty(count, dtype=torch.int64, device=device)
    log_p, lse = (torch.empty(count, dtype=torch.float32, device=device) for _ in range(2))
    zeta = torch.empty_like(lse)
    launch(
        _combine_kernel,
        (count,),
        *(made.logits, made.logits.stride(0), chosen if rows is None else rows.contiguous()),
        # Pointers that a variant does not read still need some tensor.
        *(lse if temperature is None else temperature.contiguous(), lse if alpha is None else alpha.contiguous()),
        *(made.parts, made.best, chosen, log_p, lse, zeta, num_splits),
        INDIRECT=rows is not None,
        SCALED=temperature is not None,
        POWERED=alpha is not None,
        RACE=names is not None,
        NUM_PARTS=_PARTS,
        CHOSEN=names is not None or tokens is not None,
        SPLITS=next_power_of_2(num_splits),
        num_warps=1,
    )
    return Sampled(chosen, log_p, lse, zeta)


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
    return _run(logits, rows, temperature, alpha, (seed, step, lane, purpose), None)


def score(logits: Tensor, tokens: Tensor, temperature: Tensor | None) -> tuple[Tensor, Tensor]:
    """Log-probability of given tokens under softmax(logits / temperature), and every row's log-sum-exp.

    Args:
        logits: [R, V], any float dtype; computed in float32.
        tokens: [R] int64; a row with a negative one has log-probability 0 (row K of a round scores nothing).
        temperature: [R] float32 > 0, or None where the logits are scaled already.
    Returns:
        ([R] float32, [R] float32).
    """
    result = _run(logits, None, temperature, None, None, tokens.contiguous())
    return result.log_prob, result.lse


def draw(scaled: Tensor, seed: Tensor, step: Tensor, lane: Tensor, purpose: Tensor) -> Tensor:
    """Draw one token a row from softmax(scaled); see the reference."""
    return sample(scaled, None, seed, step, lane, purpose).tokens


def log_prob(scaled: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of given tokens and log-sum-exp; see the reference."""
    return score(scaled, tokens, None)


def log_zeta(scaled: Tensor, lse: Tensor, alpha: Tensor) -> Tensor:
    """log ζ = lse(α s) - α lse(s), exactly 0 where α = 1; see the reference. `sample` gives it for less."""
    powered = _run(scaled, None, None, alpha, None, None)
    return torch.where(alpha == 1, torch.zeros_like(lse), powered.log_zeta + alpha * (powered.lse - lse))
