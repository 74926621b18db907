"""Filters against their definitions, draws against their law, and the first token's systematic draw."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smc_engines.sampling_params import SamplingParams
from smc_plugin.reference import sampling
from tests.toy import filtered, log_softmax

# Quarter steps make ties frequent and keep sums exact.
LOGITS = st.lists(st.integers(-8, 8).map(lambda n: n / 4), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    logits=LOGITS,
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([1.0, 0.9, 0.53, 0.31, 0.07]),
    min_p=st.sampled_from([0.0, 0.04, 0.3, 0.99]),
)
def test_filters_keep_what_their_definition_keeps(logits, top_k, top_p, min_p) -> None:
    rows = torch.tensor([logits, logits[::-1]])
    out = sampling.apply_filters(
        rows, torch.tensor([top_k, top_k]), torch.tensor([top_p, top_p]), torch.tensor([min_p, min_p])
    )
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    for row, values in zip(out, (logits, logits[::-1]), strict=True):
        np.testing.assert_array_equal(row.numpy(), filtered(np.array(values), params).astype(np.float32))


def test_filters_differ_by_row_and_leave_a_removed_token_removed() -> None:
    rows = torch.tensor([[0.0, 1.0, 2.0, -math.inf]] * 4)
    out = sampling.apply_filters(
        rows, torch.tensor([0, 2, 0, 4]), torch.tensor([1.0, 1.0, 0.5, 1.0]), torch.tensor([0.0, 0.0, 0.0, 0.3])
    )
    assert out.isfinite().tolist() == [
        [True, True, True, False],
        [False, True, True, False],
        [False, False, True, False],
        [False, True, True, False],
    ]


def test_ties_with_the_kth_are_cut_and_the_lower_token_wins() -> None:
    rows = torch.tensor([[1.0, 3.0, 3.0, 3.0]])
    one, off = torch.tensor([1.0]), torch.tensor([0.0])
    assert sampling.apply_filters(rows, torch.tensor([2]), one, off).isfinite().tolist() == [[False, True, True, False]]
    assert sampling.apply_filters(rows, torch.tensor([1]), one, off).argmax() == rows.argmax() == 1


def test_banned_tokens_are_banned_in_their_rows_only() -> None:
    rows = torch.arange(8.0).view(2, 4)
    ids = torch.tensor([[0, 3, -1, -1], [0, 3, -1, -1]])
    out = sampling.ban_tokens(rows, ids, torch.tensor([True, False]))
    assert out.tolist() == [[-math.inf, 1.0, 2.0, -math.inf], [4.0, 5.0, 6.0, 7.0]]


def test_draws_follow_the_softmax() -> None:
    logits = np.array([0.0, 1.5, -1.0, -math.inf, 0.7])
    count = 20000
    rows = torch.tensor(logits, dtype=torch.float32).expand(count, -1)
    zero = torch.zeros(count, dtype=torch.int64)
    drawn = sampling.draw(rows, torch.arange(count), zero, zero, zero + 1)
    expected = np.exp(log_softmax(logits)) * count
    counts = np.bincount(drawn.numpy(), minlength=5)
    assert counts[3] == 0
    chi_square = ((counts - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    assert chi_square < 21  # 3 degrees of freedom, 0.01 %


@pytest.mark.parametrize("alpha", [1.0, 0.5, 2.0, 7.0])
def test_log_zeta_is_the_log_total_of_the_power(alpha: float) -> None:
    logits = np.array([[0.3, -2.0, 5.0, -math.inf], [1.0, 1.0, 1.0, 1.0]])
    rows = torch.tensor(logits, dtype=torch.float32)
    got = sampling.log_zeta(rows, rows.logsumexp(dim=-1), torch.tensor([alpha, alpha]))
    expected = [math.log(np.exp(alpha * log_softmax(row)).sum()) for row in logits]
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-5)
    if alpha == 1:
        assert got.tolist() == [0.0, 0.0]


def test_log_prob_and_its_log_sum_exp() -> None:
    rows = torch.tensor([[0.0, 1.0, -math.inf], [math.nan, 0.0, 0.0], [-math.inf] * 3])
    log_p, lse = sampling.log_prob(rows, torch.tensor([1, 0, 2]))
    assert float(log_p[0]) == pytest.approx(1 - math.log(1 + math.e), abs=1e-6)
    assert lse.isfinite().tolist() == [True, False, False]


@settings(max_examples=100, deadline=None)
@given(logits=LOGITS, holes=st.sets(st.integers(0, 11)), u=st.floats(0, 1, exclude_max=True), n=st.integers(1, 9))
def test_first_tokens_are_the_quantiles_of_the_group(logits, holes, u, n) -> None:
    masked = [-math.inf if index in holes else value for index, value in enumerate(logits)]
    if all(value == -math.inf for value in masked):
        masked[0] = 0.0
    rows = torch.tensor([masked], dtype=torch.float32)
    tokens = sampling.systematic_tokens(rows, torch.tensor([u], dtype=torch.float64), n)[0].numpy()
    probs = np.exp(log_softmax(np.array(masked)))
    assert (np.diff(tokens) >= 0).all()
    assert (probs[tokens] > 0).all()
    counts = np.bincount(tokens, minlength=len(masked))
    assert (counts >= np.floor(n * probs - 1e-6)).all()
    assert (counts <= np.ceil(n * probs + 1e-6)).all()


def test_first_tokens_at_the_largest_uniform_never_fall_off_the_end() -> None:
    rows = torch.tensor([[0.0, 0.0, -math.inf], [-math.inf, 0.0, -math.inf]])
    u = torch.tensor([1 - 2.0**-53, 0.0], dtype=torch.float64)
    assert sampling.systematic_tokens(rows, u, 3).tolist() == [[0, 1, 1], [1, 1, 1]]


def test_scaling_is_division_in_float32() -> None:
    out = sampling.scale(torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16), torch.tensor([0.7]))
    assert out.dtype == torch.float32
    assert out[0].tolist() == pytest.approx([1 / 0.7, 3 / 0.7], rel=1e-6)
