"""Weight and resampling kernels against the torch reference, under the interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smc_plugin.kernels import resample as kernel_resample
from smc_plugin.kernels import weights as kernels
from smc_plugin.reference import random, resample, weights

INF, NAN = float("inf"), float("nan")
F64 = torch.float64


def log_weights(groups: int, particles: int, seed: int = 0, dead: float = 0.2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn((groups, particles), generator=generator, dtype=F64) * 3
    return values.masked_fill(torch.rand((groups, particles), generator=generator) < dead, -INF)


def round_inputs(groups: int, particles: int, drafts: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (groups, particles, drafts)
    return {
        "log_p": -torch.rand(shape, generator=generator) * 5,
        "log_q": -torch.rand(shape, generator=generator) * 5,
        "alpha": torch.rand(groups, generator=generator) + 0.5,
        "end": torch.randint(1, drafts + 2, (groups, particles), generator=generator),
        "finished": torch.rand((groups, particles), generator=generator) < 0.25,
        "failed": torch.arange(groups) % 3 == 2,
    }


def increments_of(given_: dict[str, Tensor]) -> Tensor:
    values = (given_["alpha"][:, None, None] * given_["log_p"] - given_["log_q"]).to(F64)
    return torch.where(given_["failed"][:, None, None], 0.0, values)


def assert_weighed(ours: weights.Weighed, expected: weights.Weighed) -> None:
    torch.testing.assert_close(ours.log_weights, expected.log_weights, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(ours.committed, expected.committed)
    assert torch.equal(ours.recovered, expected.recovered)


@pytest.mark.parametrize(("particles", "drafts"), [(1, 1), (5, 3), (8, 8), (33, 2), (4, 0)])
def test_accumulate_equals_the_reference_bit_for_bit(particles: int, drafts: int) -> None:
    start = log_weights(3, particles)
    generator = torch.Generator().manual_seed(1)
    increments = torch.randn((3, particles, drafts), generator=generator, dtype=F64)
    increments[torch.rand(increments.shape, generator=generator) < 0.2] = -INF
    increments[1, :, drafts // 2 :] = -INF  # a group that dies and is recovered
    inputs = round_inputs(3, particles, drafts)
    given_ = (start, increments, inputs["end"], inputs["finished"])
    assert_weighed(kernels.accumulate(*given_), weights.accumulate(*given_))


def test_accumulate_keeps_nan_and_dead_particles_where_the_reference_does() -> None:
    start = torch.tensor([[0.0, -INF, NAN], [0.5, 0.5, 0.5]], dtype=F64)
    increments = torch.tensor([[[1, NAN], [NAN, NAN], [1, 1]], [[NAN, 1], [-INF, NAN], [1, 2]]], dtype=F64)
    end, finished = torch.full((2, 3), 3), torch.zeros((2, 3), dtype=torch.bool)
    given_ = (start, increments, end, finished)
    assert_weighed(kernels.accumulate(*given_), weights.accumulate(*given_))


def test_weigh_forms_the_increments_as_the_round_does() -> None:
    start, inputs = log_weights(4, 6), round_inputs(4, 6, 3)
    inputs["log_p"][0, 1, 2] = -INF
    expected = weights.accumulate(start, increments_of(inputs), inputs["end"], inputs["finished"])
    assert_weighed(kernels.weigh(start, **inputs), expected)


@pytest.mark.parametrize("particles", [1, 6, 64])
def test_summaries(particles: int) -> None:
    values = log_weights(6, particles)
    values[0], values[1], values[2, 0], values[3, 0] = 0.0, -INF, NAN, INF
    torch.testing.assert_close(kernels.normalise(values), weights.normalise(values), rtol=1e-13, atol=1e-15)
    ess = kernels.effective_sample_size(values)
    torch.testing.assert_close(ess, weights.effective_sample_size(values), rtol=1e-13, atol=0)
    rows = [0, 1, 3, 4, 5]  # NaN has no answer
    torch.testing.assert_close(
        kernels.log_mean_exp(values)[rows], weights.log_mean_exp(values)[rows], rtol=1e-13, atol=1e-13, equal_nan=True
    )
    assert kernels.log_mean_exp(values)[0] == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3, 8, 13, 64]), st.sampled_from([0.0, 0.3, 0.9]))
def test_ancestors_equal_the_reference_bit_for_bit(seed: int, particles: int, dead: float) -> None:
    values = log_weights(1, particles, seed, dead)
    u = torch.rand(1, generator=torch.Generator().manual_seed(seed), dtype=F64)
    assert torch.equal(kernel_resample.systematic_ancestors(values, u), resample.systematic_ancestors(values, u))
    assert torch.equal(kernel_resample.systematic_resample(values, u), resample.systematic_resample(values, u))


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2.0**-53])
@pytest.mark.parametrize("particles", [2, 3, 7, 8, 49])
def test_ancestors_where_positions_meet_the_cdf(u: float, particles: int) -> None:
    equal = torch.zeros((1, particles), dtype=F64)
    one = torch.full((1, particles), -INF, dtype=F64)
    one[0, particles // 2] = -1234.5
    tail = equal.clone()
    tail[0, particles // 2 + 1 :] = -INF
    values = torch.cat([equal, one, tail, torch.full_like(one, -INF), torch.full_like(one, NAN)])
    us = torch.full((5,), u, dtype=F64)
    ours = kernel_resample.systematic_resample(values, us)
    assert torch.equal(ours, resample.systematic_resample(values, us))
    assert (ours[1] == particles // 2).all()
    assert ours[3].tolist() == list(range(particles))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=9, max_size=9))
def test_keep_survivors_for_any_order(ancestors: list[int]) -> None:
    given_ = torch.tensor([ancestors])
    before = given_.clone()
    assert torch.equal(kernel_resample.keep_survivors(given_), resample.keep_survivors(given_))
    assert torch.equal(given_, before)


def expected_end(values: Tensor, threshold: Tensor, eligible: Tensor, evidence: Tensor, seed: Tensor, step: Tensor):
    particles = values.shape[1]
    ess = weights.effective_sample_size(values)
    resampled = eligible & (ess < threshold * particles)
    zero = torch.zeros_like(seed)
    u = random.uniform(seed, step, zero, zero + random.PURPOSE_RESAMPLE)
    ancestors = torch.where(resampled[:, None], resample.systematic_resample(values, u), torch.arange(particles))
    gain = torch.where(resampled, weights.log_mean_exp(values), 0.0)
    return torch.where(resampled[:, None], 0.0, values), evidence + gain, ancestors, ess, resampled


def test_fused_end_of_a_round() -> None:
    groups, particles, drafts = 7, 8, 3
    start, inputs = log_weights(groups, particles, 5), round_inputs(groups, particles, drafts, 5)
    start[3] = 0.0
    inputs["finished"][4] = True
    zeta = torch.rand((groups, particles), generator=torch.Generator().manual_seed(6), dtype=F64)
    seed, step = torch.arange(groups) - 3, torch.arange(groups) + 2**31
    threshold = torch.tensor([1.0, 0.5, 0.0, 0.9, 1.0, 0.5, 1.0], dtype=F64)
    eligible = torch.tensor([True, True, True, True, True, True, False])
    evidence = torch.linspace(-1, 1, groups, dtype=F64)

    weighed = weights.accumulate(start, increments_of(inputs), inputs["end"], inputs["finished"])
    bonus = ~inputs["finished"] & (inputs["end"] > weighed.committed[:, None]) & ~inputs["failed"][:, None]
    values = weighed.log_weights + torch.where(bonus, zeta, 0.0)
    expected = expected_end(values, threshold, eligible, evidence, seed, step)
    assert 1 < expected[4].sum() < groups

    last = (seed, step, threshold, eligible, evidence)
    fused = kernel_resample.weigh_and_resample(
        start, **inputs, bonus_log_zeta=zeta, **dict(zip(LAST, last, strict=True))
    )
    alone = kernel_resample.resample_if_needed(values, *last)
    assert fused.committed is not None
    assert torch.equal(fused.committed, weighed.committed)
    for ours in (fused, alone):
        torch.testing.assert_close(ours.log_weights, expected[0], rtol=0, atol=0)
        torch.testing.assert_close(ours.log_evidence, expected[1], rtol=1e-13, atol=1e-13)
        assert torch.equal(ours.ancestors, expected[2])
        torch.testing.assert_close(ours.ess, expected[3], rtol=1e-13, atol=0)
        assert torch.equal(ours.resampled, expected[4])


LAST = ("seed", "round_number", "ess_threshold", "eligible", "log_evidence")


def test_groups_do_not_notice_each_other() -> None:
    values = log_weights(5, 8, 9)
    u = torch.rand(5, generator=torch.Generator().manual_seed(3), dtype=F64)
    order = torch.tensor([2, 0, 4, 1, 3])
    whole = kernel_resample.systematic_resample(values, u)
    assert torch.equal(kernel_resample.systematic_resample(values[order], u[order]), whole[order])
