"""Weights: increments up to each end, where a dying group stops, and sums that stay exact."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smc_plugin.reference import weights

INF = math.inf


def accumulate(log_weights, increments, end, finished=None) -> weights.Weighed:
    log_weights = torch.tensor([log_weights], dtype=torch.float64)
    finished = torch.tensor([finished or [False] * log_weights.shape[1]])
    increments = torch.tensor([increments], dtype=torch.float64)
    return weights.accumulate(log_weights, increments, torch.tensor([end]), finished)


def test_increments_count_up_to_the_end_inclusive() -> None:
    got = accumulate([1.0, 0.0, 0.5, 7.0], [[1, 2, 4]] * 4, [4, 2, 1, 4], [False, False, False, True])
    assert got.log_weights.tolist() == [[8.0, 3.0, 1.5, 7.0]]
    assert (got.committed.tolist(), got.recovered.tolist()) == ([3], [False])


def test_a_group_that_would_die_stops_before() -> None:
    got = accumulate([0.0, 0.0], [[1, -INF, 5], [-INF, 1, 1]], [4, 4])
    assert got.log_weights.tolist() == [[1.0, -INF]]  # the second died first and stays dead
    assert (got.committed.tolist(), got.recovered.tolist()) == ([1], [True])
    got = accumulate([0.0, -INF], [[-INF, 0, 0], [1, 1, 1]], [4, 4])
    assert got.log_weights.tolist() == [[0.0, -INF]]
    assert got.committed.tolist() == [0]


def test_death_past_the_end_or_beside_a_finished_particle_is_no_recovery() -> None:
    got = accumulate([0.0], [[1, -INF, 5]], [1])
    assert (got.log_weights.tolist(), got.recovered.tolist()) == ([[1.0]], [False])
    got = accumulate([0.0, -3.0], [[-INF, 1], [9, 9]], [3, 3], [False, True])
    assert (got.log_weights.tolist(), got.recovered.tolist()) == ([[-INF, -3.0]], [False])


def test_a_dead_particle_stays_dead_whatever_its_logits_are() -> None:
    """NaN past a death used to turn the dead weight into NaN, and with it every sum over the group."""
    got = accumulate([-INF, 0.0], [[math.nan, INF], [1.0, 1.0]], [3, 3])
    assert got.log_weights.tolist() == [[-INF, 2.0]]
    assert got.committed.tolist() == [2]


def test_no_draft_tokens() -> None:
    got = accumulate([0.3, -INF], [[], []], [1, 1])
    assert (got.log_weights.tolist(), got.committed.tolist(), got.recovered.tolist()) == ([[0.3, -INF]], [0], [False])


LOG_WEIGHTS = st.lists(st.one_of(st.floats(-700, 700), st.just(-INF)), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(LOG_WEIGHTS)
def test_normalise_ess_and_log_mean_exp_against_plain_sums(log_weights) -> None:
    row = torch.tensor([log_weights], dtype=torch.float64)
    normal = weights.normalise(row)[0].numpy()
    ess, mean = float(weights.effective_sample_size(row)), float(weights.log_mean_exp(row))
    if all(value == -INF for value in log_weights):
        assert (normal.tolist(), ess, mean) == ([0.0] * len(log_weights), 0.0, -INF)
        return
    top = max(log_weights)
    shares = np.exp(np.array(log_weights) - top)
    np.testing.assert_allclose(normal, shares / shares.sum(), rtol=1e-12)
    assert normal.sum() == pytest.approx(1, rel=1e-12)
    assert ess == pytest.approx(shares.sum() ** 2 / (shares**2).sum(), rel=1e-9)
    assert 1 - 1e-9 <= ess <= len(log_weights) + 1e-9
    assert mean == pytest.approx(top + math.log(shares.mean()), rel=1e-9, abs=1e-9)


def test_equal_weights_give_log_mean_exp_of_exactly_zero_and_full_ess() -> None:
    zeros = torch.zeros(3, 7, dtype=torch.float64)
    assert weights.log_mean_exp(zeros).tolist() == [0.0] * 3
    assert weights.effective_sample_size(zeros).tolist() == pytest.approx([7.0] * 3)


def test_thousands_of_terms_keep_their_digits() -> None:
    terms = torch.full((1, 1, 4096), 1e-4, dtype=torch.float64)
    start = torch.tensor([[-1e5]], dtype=torch.float64)
    got = weights.accumulate(start, terms, torch.tensor([[5000]]), torch.tensor([[False]]))
    assert float(got.log_weights) == pytest.approx(-1e5 + 0.4096, abs=1e-8)
