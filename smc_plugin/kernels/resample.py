"""Systematic resampling, one program a group, and the fused end of a round.

The CDF is summed particle by particle, in the order of torch's cumsum on a CPU, so that ties between a position and the
CDF fall the same way: log weights [0, 0, 0] and u = 0 give positions 0, 1/3, 2/3 against a CDF of 1/3, 2/3, 1, and both
count 0, 1, 2. Loops over N particles take about a microsecond at N = 8 and a few at N = 64.

`resample_if_needed` draws u, decides, and gives the new weights in one launch. `weigh_and_resample` also adds the round's
increments: what the particle weighting and resampling plugin runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smc_plugin.kernels.launch import launch, let_next_start, wait_for_inputs
from smc_plugin.kernels.random import PURPOSE_RESAMPLE, uniform_scalar
from smc_plugin.kernels.weights import accumulate_group, as_bytes, ess_of, group_options, log_mean_exp_of, normalised
from smc_plugin.reference.resample import Resampled

__all__ = [
    "Resampled",
    "keep_survivors",
    "resample_if_needed",
    "systematic_ancestors",
    "systematic_resample",
    "weigh_and_resample",
]


@triton.jit
def _pick(values, lane, index):
    """The value of one lane as a scalar."""
    return tl.sum(tl.where(lane == index, values, 0), axis=0)


@triton.jit
def _systematic(weights, u, lane, num_particles):
    """Sorted ancestors: for each position the number of CDF values at or below it."""
    positions = (u + lane) / num_particles
    ancestors = tl.zeros_like(lane)
    cdf = tl.full([], 0.0, tl.float64)
    last_live = tl.full([], 0, tl.int32)
    for j in range(num_particles):
        weight = _pick(weights, lane, j)
        cdf += weight
        ancestors += (cdf <= positions).to(tl.int32)
        last_live = tl.where(weight > 0, j, last_live)
    return tl.where(cdf > 0, tl.minimum(ancestors, last_live), lane)


@triton.jit
def _keep_survivors(ancestors, lane, num_particles):
    """Survivors keep their places, surplus copies fill the dead ones in order."""
    valid = lane < num_particles
    counts = tl.zeros_like(lane)
    for j in range(num_particles):
        counts += (_pick(ancestors, lane, j) == lane).to(tl.int32)
    dead = valid & (counts == 0)
    surplus = tl.where(valid, tl.maximum(counts - 1, 0), 0)
    order = tl.cumsum(dead.to(tl.int32), axis=0) - 1
    parent = tl.zeros_like(lane)
    cdf = tl.full([], 0, tl.int32)
    for j in range(num_particles):
        cdf += _pick(surplus, lane, j)
        parent += (cdf <= order).to(tl.int32)
    return tl.where(dead, parent, lane)


@triton.jit
def _ancestors_kernel(
    log_weights,
    u,
    ancestors,
    num_particles,
    DRAW: tl.constexpr,
    KEEP: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    let_next_start(PDL)
    group = tl.program_id(0)
    lane = tl.arange(0, LANES)
    valid = lane < num_particles
    at = group * num_particles + lane
    if DRAW:
        values = tl.load(log_weights + at, mask=valid, other=float("-inf"))
        chosen = _systematic(normalised(values, valid), tl.load(u + group), lane, num_particles)
    else:
        chosen = tl.load(ancestors + at, mask=valid, other=-1).to(tl.int32)
    if KEEP:
        chosen = _keep_survivors(chosen, lane, num_particles)
    # In place when only rearranging: every lane has read before any writes.
    tl.debug_barrier()
    tl.store(ancestors + at, chosen.to(tl.int64), mask=valid)


@triton.jit
def _round_end_kernel(
    log_weights,
    log_p,
    log_q,
    alpha,
    end,
    finished,
    failed,
    zeta,
    seed,
    round_number,
    threshold,
    eligible,
    log_evidence,
    weights_out,
    evidence_out,
    ancestors_out,
    ess_out,
    resampled_out,
    committed_out,
    recovered_out,
    num_particles,
    num_draft_tokens,
    WEIGH: tl.constexpr,
    PURPOSE: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    let_next_start(PDL)
    group = tl.program_id(0)
    lane = tl.arange(0, LANES)
    valid = lane < num_particles
    at = group * num_particles + lane
    if WEIGH:
        values, committed, ends, over = accumulate_group(
            log_weights, log_p, log_p, log_q, alpha, end, finished, failed, group, num_particles, num_draft_tokens,
            lane, True,
        )  # fmt: skip
        takes_bonus = valid & (over == 0) & (ends > committed) & (tl.load(failed + group) == 0)
        values += tl.where(takes_bonus, tl.load(zeta + at, mask=valid, other=0.0), 0.0)
        tl.store(committed_out + group, committed)
        tl.store(recovered_out + group, (committed < num_draft_tokens).to(tl.int8))
    else:
        values = tl.load(log_weights + at, mask=valid, other=float("-inf"))
    weights = normalised(values, valid)
    ess = ess_of(weights)
    resamples = (tl.load(eligible + group) != 0) & (ess < tl.load(threshold + group) * num_particles)
    resamples = resamples & (num_particles > 1)
    evidence = tl.load(log_evidence + group)
    ancestors = lane
    if resamples:
        no_lane, purpose = tl.full([], 0, tl.int64), tl.full([], PURPOSE, tl.int64)
        u = uniform_scalar(tl.load(seed + group), tl.load(round_number + group), no_lane, purpose)
        ancestors = _keep_survivors(_systematic(weights, u, lane, num_particles), lane, num_particles)
        evidence += log_mean_exp_of(values, valid, num_particles)
        values = tl.zeros_like(values)
    tl.store(weights_out + at, values, mask=valid)
    tl.store(evidence_out + group, evidence)
    tl.store(ancestors_out + at, ancestors.to(tl.int64), mask=valid)
    tl.store(ess_out + group, ess)
    tl.store(resampled_out + group, resamples.to(tl.int8))


def _ancestors(log_weights: Tensor, u: Tensor, keep: bool) -> Tensor:
    groups, num_particles = log_weights.shape
    ancestors = torch.empty((groups, num_particles), dtype=torch.int64, device=log_weights.device)
    launch(
        _ancestors_kernel,
        (groups,),
        *(log_weights.contiguous(), u.contiguous(), ancestors, num_particles),
        DRAW=True,
        KEEP=keep,
        **group_options(num_particles),
    )
    return ancestors


def systematic_ancestors(log_weights: Tensor, u: Tensor) -> Tensor:
    """Sorted ancestors [G, N] int64 by systematic resampling; see the reference."""
    return _ancestors(log_weights, u, keep=False)


def systematic_resample(log_weights: Tensor, u: Tensor) -> Tensor:
    """`keep_survivors(systematic_ancestors(log_weights, u))` in one launch; see the reference."""
    return _ancestors(log_weights, u, keep=True)


def keep_survivors(ancestors: Tensor) -> Tensor:
    """Rearrange ancestors [G, N] so that every survivor keeps its own place; see the reference."""
    groups, num_particles = ancestors.shape
    out = ancestors.clone(memory_format=torch.contiguous_format)
    launch(
        _ancestors_kernel,
        (groups,),
        *(out, out, out, num_particles),
        DRAW=False,
        KEEP=True,
        **group_options(num_particles),
    )
    return out


def _round_end(
    log_weights: Tensor,
    terms: tuple[Tensor, ...] | None,
    seed: Tensor,
    round_number: Tensor,
    ess_threshold: Tensor,
    eligible: Tensor,
    log_evidence: Tensor,
) -> Resampled:
    groups, num_particles = log_weights.shape
    log_weights, device = log_weights.contiguous(), log_weights.device
    result = Resampled(
        torch.empty_like(log_weights),
        torch.empty(groups, dtype=torch.float64, device=device),
        torch.empty((groups, num_particles), dtype=torch.int64, device=device),
        torch.empty(groups, dtype=torch.float64, device=device),
        torch.empty(groups, dtype=torch.bool, device=device),
        torch.empty(groups, dtype=torch.int64, device=device) if terms else None,
        torch.empty(groups, dtype=torch.bool, device=device) if terms else None,
    )
    # Pointers that the variant without terms does not read still need some tensor.
    given = terms if terms else (log_weights,) * 7
    committed = log_weights if result.committed is None else result.committed
    recovered = log_weights if result.recovered is None else result.recovered.view(torch.int8)
    launch(
        _round_end_kernel,
        (groups,),
        *(log_weights, *given, seed.contiguous(), round_number.contiguous(), ess_threshold.contiguous()),
        *(as_bytes(eligible), log_evidence.contiguous(), result.log_weights, result.log_evidence),
        *(result.ancestors, result.ess, result.resampled.view(torch.int8), committed, recovered),
        *(num_particles, terms[0].shape[-1] if terms else 0),
        WEIGH=terms is not None,
        PURPOSE=PURPOSE_RESAMPLE,
        **group_options(num_particles),
    )
    return result


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
    """
    return _round_end(log_weights, None, seed, round_number, ess_threshold, eligible, log_evidence)


def weigh_and_resample(
    log_weights: Tensor,
    log_p: Tensor,
    log_q: Tensor,
    alpha: Tensor,
    end: Tensor,
    finished: Tensor,
    failed: Tensor,
    bonus_log_zeta: Tensor,
    seed: Tensor,
    round_number: Tensor,
    ess_threshold: Tensor,
    eligible: Tensor,
    log_evidence: Tensor,
) -> Resampled:
    """Add a round's increments and the bonus's, then resample where needed: `weigh`, then `resample_if_needed`.

    Args:
        log_weights, log_p, log_q, alpha, end, finished, failed: see weights.weigh.
        bonus_log_zeta: [G, N] float64, added where the bonus is emitted (end > committed, unfinished).
        seed, round_number, ess_threshold, eligible, log_evidence: see resample_if_needed.
    """
    terms = (
        *(log_p.contiguous(), log_q.contiguous(), alpha.contiguous(), end.contiguous()),
        *(as_bytes(finished), as_bytes(failed), bonus_log_zeta.contiguous()),
    )
    return _round_end(log_weights, terms, seed, round_number, ess_threshold, eligible, log_evidence)
