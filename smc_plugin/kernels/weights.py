"""Particle weights in float64, one program a group, a row of N particles padded to a power of two.

`accumulate`, `normalise`, `effective_sample_size` and `log_mean_exp` mirror the reference. `weigh` is what a round needs
in one launch: the increments ℓ_k = α log p(d_k) - log q(d_k) are formed inside, in the same float32 steps as the
reference (products and sums are not contracted), then added in float64.

The @triton.jit functions here are the pieces that `resample` fuses with resampling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from smc_plugin.kernels.launch import launch, let_next_start, next_power_of_2, wait_for_inputs
from smc_plugin.reference.weights import Weighed

__all__ = ["Weighed", "accumulate", "effective_sample_size", "log_mean_exp", "normalise", "weigh"]


@triton.jit
def is_finite(x):
    """False for NaN and both infinities."""
    return tl.abs(x) < float("inf")


@triton.jit
def accumulate_group(
    log_weights, increments, log_p, log_q, alpha, end, finished, failed, group, num_particles, num_draft_tokens, lane,
    FORM: tl.constexpr,
):  # fmt: skip
    """One group's weights after its committed draft tokens, how many those are, and each particle's end.

    With FORM the increments come from log_p, log_q and alpha (0 where the group failed), else from `increments`.
    """
    valid = lane < num_particles
    at = group * num_particles + lane
    start = tl.load(log_weights + at, mask=valid, other=float("-inf"))
    ends = tl.load(end + at, mask=valid, other=0)
    over = tl.load(finished + at, mask=valid, other=1) != 0
    weighs = valid & is_finite(start) & (over == 0)
    if FORM:
        power = tl.load(alpha + group).to(tl.float32)
        weighs = weighs & (tl.load(failed + group) == 0)
    steps = tl.zeros_like(start)
    chosen = start
    committed = tl.full([], 0, tl.int64)
    for k in range(num_draft_tokens):
        token = at * num_draft_tokens + k
        if FORM:
            p = tl.load(log_p + token, mask=valid, other=0.0)
            q = tl.load(log_q + token, mask=valid, other=0.0)
            increment = (power * p - q).to(tl.float64)
        else:
            increment = tl.load(increments + token, mask=valid, other=0.0)
        steps += tl.where(weighs & (k + 1 <= ends), increment, 0.0)
        path = start + steps
        alive = tl.sum((valid & is_finite(path)).to(tl.int32), axis=0) > 0
        # What is not finite stays so: the live positions are a leading run, and `chosen` ends at the last of them.
        chosen = tl.where(alive, path, chosen)
        committed += alive.to(tl.int64)
    return chosen, committed, ends, over


@triton.jit
def normalised(log_weights, valid):
    """Weights that sum to one; all zero where none is finite or one is NaN, as the reference has it."""
    top = tl.max(tl.where(valid, log_weights, float("-inf")), axis=0)
    is_nan = log_weights != log_weights  # noqa: PLR0124
    broken = tl.sum((valid & is_nan).to(tl.int32), axis=0) > 0
    live = valid & is_finite(log_weights) & (broken == 0)
    weights = tl.where(live, tl.exp(log_weights - top), 0.0)
    total = tl.sum(weights, axis=0)
    return tl.where(total > 0, weights / tl.where(total > 0, total, 1.0), 0.0)


@triton.jit
def ess_of(weights):
    """1 / Σ w̄², 0 where all weights are 0."""
    squares = tl.sum(weights * weights, axis=0)
    return tl.where(squares > 0, 1.0 / tl.where(squares > 0, squares, 1.0), 0.0)


@triton.jit
def log_mean_exp_of(log_weights, valid, num_particles):
    """lse(log_w) - log N; exactly 0 where all are 0."""
    top = tl.max(tl.where(valid, log_weights, float("-inf")), axis=0)
    top = tl.where(is_finite(top), top, 0.0)
    total = tl.sum(tl.where(valid, tl.exp(log_weights - top), 0.0), axis=0)
    return tl.log(total / num_particles) + top


@triton.jit
def _weigh_kernel(
    log_weights,
    increments,
    log_p,
    log_q,
    alpha,
    end,
    finished,
    failed,
    out,
    committed_out,
    recovered_out,
    num_particles,
    num_draft_tokens,
    FORM: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    let_next_start(PDL)
    group = tl.program_id(0)
    lane = tl.arange(0, LANES)
    result, committed, _, _ = accumulate_group(
        log_weights, increments, log_p, log_q, alpha, end, finished, failed, group, num_particles, num_draft_tokens,
        lane, FORM,
    )  # fmt: skip
    tl.store(out + group * num_particles + lane, result, mask=lane < num_particles)
    tl.store(committed_out + group, committed)
    tl.store(recovered_out + group, (committed < num_draft_tokens).to(tl.int8))


@triton.jit
def _summary_kernel(
    log_weights,
    weights_out,
    ess_out,
    mean_out,
    num_particles,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    let_next_start(PDL)
    group = tl.program_id(0)
    lane = tl.arange(0, LANES)
    valid = lane < num_particles
    values = tl.load(log_weights + group * num_particles + lane, mask=valid, other=float("-inf"))
    weights = normalised(values, valid)
    tl.store(weights_out + group * num_particles + lane, weights, mask=valid)
    tl.store(ess_out + group, ess_of(weights))
    tl.store(mean_out + group, log_mean_exp_of(values, valid, num_particles))


def group_options(num_particles: int) -> dict[str, int]:
    """Compile options of a kernel with one program a group: one warp up to 32 particles, without contraction."""
    lanes = next_power_of_2(num_particles)
    return {"LANES": lanes, "num_warps": 1 if lanes <= 32 else 4, "enable_fp_fusion": False}


def as_bytes(flags: Tensor) -> Tensor:
    """The same booleans as int8, without a copy where they are contiguous."""
    return flags.contiguous().view(torch.int8)


def _weigh(
    log_weights: Tensor,
    increments: Tensor | None,
    terms: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    end: Tensor,
    finished: Tensor,
) -> Weighed:
    groups, num_particles = log_weights.shape
    log_weights = log_weights.contiguous()
    out = torch.empty_like(log_weights)
    committed = torch.empty(groups, dtype=torch.int64, device=out.device)
    recovered = torch.empty(groups, dtype=torch.bool, device=out.device)
    if terms is None:
        assert increments is not None
        increments = increments.contiguous()
        log_p = log_q = alpha = failed = increments
        num_draft_tokens = increments.shape[-1]
    else:
        log_p, log_q, alpha, failed = (*(term.contiguous() for term in terms[:3]), as_bytes(terms[3]))
        increments, num_draft_tokens = log_p, log_p.shape[-1]
    launch(
        _weigh_kernel,
        (groups,),
        *(log_weights, increments, log_p, log_q, alpha, end.contiguous(), as_bytes(finished), failed),
        *(out, committed, recovered.view(torch.int8), num_particles, num_draft_tokens),
        FORM=terms is not None,
        **group_options(num_particles),
    )
    return Weighed(out, committed, recovered)


def accumulate(log_weights: Tensor, increments: Tensor, end: Tensor, finished: Tensor) -> Weighed:
    """Add a round's draft increments up to each particle's end; see the reference.

    Args:
        log_weights: [G, N] float64.
        increments: [G, N, K] float64.
        end: [G, N] int64.
        finished: [G, N] bool.
    """
    return _weigh(log_weights, increments, None, end, finished)


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
    return _weigh(log_weights, None, (log_p, log_q, alpha, failed), end, finished)


def _summarise(log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    groups, num_particles = log_weights.shape
    log_weights = log_weights.contiguous()
    weights = torch.empty_like(log_weights)
    ess, mean = (torch.empty(groups, dtype=torch.float64, device=log_weights.device) for _ in range(2))
    launch(
        _summary_kernel,
        (groups,),
        *(log_weights, weights, ess, mean, num_particles),
        **group_options(num_particles),
    )
    return weights, ess, mean


def normalise(log_weights: Tensor) -> Tensor:
    """Weights [G, N] that sum to one; all zero where a group has no finite weight."""
    return _summarise(log_weights)[0]


def effective_sample_size(log_weights: Tensor) -> Tensor:
    """ESS = 1 / Σ w̄², [G] float64; 0 where a group has no finite weight."""
    return _summarise(log_weights)[1]


def log_mean_exp(log_weights: Tensor) -> Tensor:
    """lse(log_w) - log N, [G] float64; exactly 0 where all weights are 0."""
    return _summarise(log_weights)[2]
