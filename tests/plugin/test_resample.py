"""Systematic resampling: counts, edges, and survivors that stay where they are."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smc_plugin.reference import resample

INF = math.inf
WEIGHTS = st.lists(st.one_of(st.floats(-20, 20), st.just(-INF), st.just(0.0)), min_size=1, max_size=16)
# What random.uniform can give: 32 bits.
UNIFORMS = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 2**31, 2**32 - 1])).map(lambda word: word / 2**32)


def ancestors(log_weights, u, function=resample.systematic_ancestors) -> list[int]:
    return function(torch.tensor([log_weights], dtype=torch.float64), torch.tensor([u], dtype=torch.float64))[
        0
    ].tolist()


@settings(max_examples=300, deadline=None)
@given(log_weights=WEIGHTS, u=UNIFORMS)
def test_counts_are_floor_or_ceil_and_the_dead_have_no_offspring(log_weights, u) -> None:
    got = ancestors(log_weights, u)
    n = len(log_weights)
    if all(value == -INF for value in log_weights):
        assert got == list(range(n))
        return
    assert got == sorted(got)
    shares = np.exp(np.array(log_weights) - max(log_weights))
    expected = n * shares / shares.sum()
    counts = np.bincount(got, minlength=n)
    assert (counts >= np.floor(expected - 1e-9)).all()
    assert (counts <= np.ceil(expected + 1e-9)).all()
    assert all(log_weights[index] > -INF for index in got)


@settings(max_examples=300, deadline=None)
@given(log_weights=WEIGHTS, u=UNIFORMS)
def test_survivors_stay_and_counts_stay(log_weights, u) -> None:
    plain, placed = ancestors(log_weights, u), ancestors(log_weights, u, resample.systematic_resample)
    assert sorted(placed) == plain
    assert all(placed[survivor] == survivor for survivor in placed)


@pytest.mark.parametrize("u", [0.0, 0.3, 1 - 2.0**-32])
def test_edges(u: float) -> None:
    assert ancestors([-INF, -INF, 0.0, -INF], u) == [2, 2, 2, 2]
    assert ancestors([0.0, -INF, -INF, -INF], u) == [0, 0, 0, 0]
    assert set(ancestors([-INF, 0.0, 0.0, -INF], u)) == {1, 2}
    assert ancestors([-5.0], u) == [0]
    assert ancestors([-INF] * 3, u) == [0, 1, 2]
    assert ancestors([0.0] * 4, u) == [0, 1, 2, 3]
    # A weight that underflows to zero is as dead as -inf.
    assert ancestors([0.0, -2000.0], u) == [0, 0]


def test_a_uniform_that_rounds_to_one_still_finds_a_live_particle() -> None:
    u = 1 - 2.0**-53  # u + 1 is 2 in float64
    assert ancestors([0.0, 0.0, -INF], u)[-1] == 1
    assert ancestors([-INF, 0.0], u) == [1, 1]


def test_position_on_the_boundary_belongs_to_the_next_particle() -> None:
    # ancestor = #{j : cdf_j <= position}; positions .0 and .5 of weights (.5, .5) are particles 0 and 1.
    assert ancestors([0.0, 0.0], 0.0) == [0, 1]
    # Leading zero weight: position 0 must not choose it.
    assert ancestors([-INF, 0.0], 0.0) == [1, 1]


def test_expected_counts_are_n_times_the_weight() -> None:
    log_weights = np.log([0.6, 0.0004, 0.1, 0.2996])
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1]
    rows = torch.tensor(log_weights).expand(2000, -1)
    counts = torch.nn.functional.one_hot(resample.systematic_ancestors(rows, u), 4).sum(dim=1).double().mean(dim=0)
    np.testing.assert_allclose(counts.numpy(), 4 * np.exp(log_weights), atol=2e-3)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=7, max_size=7))
def test_keep_survivors_takes_any_order(drawn) -> None:
    placed = resample.keep_survivors(torch.tensor([drawn]))[0].tolist()
    assert sorted(placed) == sorted(drawn)
    assert all(placed[survivor] == survivor for survivor in set(drawn))


def test_groups_do_not_mix() -> None:
    rows = torch.tensor([[0.0, -INF, -INF], [-INF, -INF, 0.0], [-INF] * 3], dtype=torch.float64)
    u = torch.tensor([0.1, 0.9, 0.5], dtype=torch.float64)
    assert resample.systematic_resample(rows, u).tolist() == [[0, 0, 0], [2, 2, 2], [0, 1, 2]]
