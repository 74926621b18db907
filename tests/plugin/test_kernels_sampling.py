"""Sampling and filter kernels against the torch reference, under the interpreter."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smc_plugin.kernels import random as kernel_random
from smc_plugin.kernels import sampling as kernels
from smc_plugin.kernels.launch import launch
from smc_plugin.reference import random, sampling

INF = float("inf")
VOCAB = 2501  # three tiles, the last one ragged


def names(rows: int) -> tuple[Tensor, ...]:
    """Draw names with seeds of all 64 bits and steps of all 32."""
    index = torch.arange(rows)
    seeds = torch.tensor([5, -7, 1 << 62, -(1 << 63), 2**32 + 1, 0]).repeat(rows)[:rows]
    return seeds, (index * (2**31 - 5)) % 2**32, index % 3, index * 8 + 1


def logits(rows: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    return torch.randn((rows, vocab), generator=torch.Generator().manual_seed(seed)) * 3


def padded(values: Tensor) -> Tensor:
    """The same rows inside a wider tensor whose other columns are NaN."""
    wide = torch.full((values.shape[0], values.shape[1] + 77), float("nan"), dtype=values.dtype)
    wide[:, : values.shape[1]] = values
    return wide[:, : values.shape[1]]


@triton.jit
def _words_kernel(seed, step, lane, purpose, out, PDL: tl.constexpr):
    block = tl.arange(0, 64)
    words = kernel_random._philox_words(tl.load(seed), block, tl.load(step), tl.load(lane), tl.load(purpose))
    for j in tl.static_range(4):
        tl.store(out + 4 * block + j, words[j])


@pytest.mark.parametrize("row", range(6))
def test_philox_words_are_bit_exact(row: int) -> None:
    name = [part[row : row + 1].clone() for part in names(6)]
    out = torch.empty(256, dtype=torch.int32)
    launch(_words_kernel, (1,), *name, out)
    words = random.philox(name[0], torch.arange(64), *name[1:])
    assert torch.equal(out.long() & 0xFFFFFFFF, torch.stack(words, dim=-1).flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sample_is_the_reference_in_one_pass(dtype: torch.dtype) -> None:
    values = padded(logits(6).to(dtype))
    temperature = torch.tensor([0.7, 1.0, 2.0, 0.05, 1.3, 1.0])
    alpha = torch.tensor([1.0, 4.0, 0.5, 1.0, 2.0, 0.0])
    scaled = sampling.scale(values, temperature)
    drawn = kernels.sample(values, temperature, *names(6), alpha=alpha)
    assert torch.equal(drawn.tokens, sampling.draw(scaled * alpha[:, None], *names(6)))
    log_p, lse = sampling.log_prob(scaled, drawn.tokens)
    torch.testing.assert_close(drawn.log_prob, log_p, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn.lse, lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(drawn.log_zeta, sampling.log_zeta(scaled, lse, alpha), rtol=1e-4, atol=1e-4)
    assert drawn.log_zeta[[0, 3]].tolist() == [0.0, 0.0]


def test_sample_reads_the_rows_it_is_told_to() -> None:
    values, rows = logits(6), torch.tensor([4, 4, 0, 5])
    drawn = kernels.sample(values, None, *names(4), rows=rows)
    assert torch.equal(drawn.tokens, sampling.draw(values[rows], *names(4)))
    torch.testing.assert_close(drawn.log_prob, sampling.log_prob(values[rows], drawn.tokens)[0], rtol=1e-5, atol=1e-5)


def test_score_and_the_mirrored_functions() -> None:
    values, temperature = logits(5), torch.tensor([1.0, 0.3, 2.0, 1.0, 0.9])
    tokens = torch.tensor([0, VOCAB - 1, 1024, -1, 1023])
    scaled = sampling.scale(values, temperature)
    expected, lse = sampling.log_prob(scaled, tokens.clamp(min=0))
    log_p, kernel_lse = kernels.score(values, tokens, temperature)
    assert log_p[3] == 0
    torch.testing.assert_close(log_p, expected.where(tokens >= 0, 0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernel_lse, lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kernels.log_prob(scaled, tokens.clamp(min=0))[0], expected, rtol=1e-5, atol=1e-5)
    alpha = torch.tensor([1.0, 2.0, 0.5, 1.0, 3.0])
    zeta = kernels.log_zeta(scaled, kernel_lse, alpha)
    torch.testing.assert_close(zeta, sampling.log_zeta(scaled, lse, alpha), rtol=1e-4, atol=1e-4)
    assert torch.equal(kernels.draw(scaled, *names(5)), sampling.draw(scaled, *names(5)))


def test_a_draw_does_not_depend_on_its_row_or_on_other_rows() -> None:
    values, name = logits(5), names(5)
    order = torch.tensor([3, 1, 4, 0, 2])
    whole = kernels.sample(values, None, *name)
    permuted = kernels.sample(values[order], None, *(part[order] for part in name))
    alone = kernels.sample(values[2:3], None, *(part[2:3] for part in name))
    assert torch.equal(permuted.tokens, whole.tokens[order])
    assert torch.equal(permuted.log_prob, whole.log_prob[order])
    assert alone.tokens[0] == whole.tokens[2]


def test_rows_that_cannot_be_sampled_say_so() -> None:
    values = logits(5)
    values[0, 7] = float("nan")
    values[1] = -INF
    values[2, 2000] = INF
    values[3] = -INF
    values[3, 1999] = -40.0
    drawn = kernels.sample(values, None, *names(5))
    assert drawn.lse.isfinite().tolist() == [False, False, False, True, True]
    assert ((drawn.tokens >= 0) & (drawn.tokens < VOCAB)).all()
    assert drawn.tokens[3] == 1999
    assert drawn.log_prob[3] == 0


@pytest.mark.parametrize("vocab", [1, 3, 17, 1024, 4097])
def test_vocabularies_of_any_size(vocab: int) -> None:
    values = logits(2, vocab)
    drawn = kernels.sample(padded(values), None, *names(2))
    assert torch.equal(drawn.tokens, sampling.draw(values, *names(2)))
    torch.testing.assert_close(drawn.lse, values.logsumexp(dim=-1), rtol=1e-5, atol=1e-5)


def check_filters(values: Tensor, top_k: list[int], top_p: list[float], min_p: list[float]) -> None:
    arguments = torch.tensor(top_k), torch.tensor(top_p), torch.tensor(min_p)
    assert torch.equal(kernels.apply_filters(padded(values), *arguments), sampling.apply_filters(values, *arguments))


def test_filters_keep_what_the_sort_keeps() -> None:
    values = logits(6, 4200)
    check_filters(values, [0, 5, 100, 0, 1, 5000], [0.9, 1.0, 0.5, 0.3, 0.9, 1.0], [0.0, 0.1, 0.0, 0.2, 0.0, 0.01])


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_filters_cut_ties_at_the_lower_token(data: st.DataObject) -> None:
    rows, vocab = 2, data.draw(st.sampled_from([1, 5, 40]))
    # Few distinct values, zeros of both signs and removed tokens: ties everywhere.
    choice = st.sampled_from([-INF, -1.5, -0.0, 0.0, 0.25, 3.0])
    values = torch.tensor(data.draw(st.lists(choice, min_size=rows * vocab, max_size=rows * vocab))).view(rows, vocab)
    values[:, data.draw(st.integers(0, vocab - 1))] = 1.0
    ks = data.draw(st.lists(st.integers(0, vocab + 1), min_size=rows, max_size=rows))
    # Cuts that no sum of these masses meets to within a rounding.
    ps = data.draw(st.lists(st.sampled_from([0.0317, 0.31371, 0.7713, 0.91937, 1.0]), min_size=rows, max_size=rows))
    ms = data.draw(st.lists(st.sampled_from([0.0, 0.04, 0.5]), min_size=rows, max_size=rows))
    check_filters(values, ks, ps, ms)


def test_filters_keep_a_nan_row_unusable() -> None:
    values = logits(2, 100)
    values[0, 50] = float("nan")
    out = kernels.apply_filters(values, torch.tensor([3, 3]), torch.tensor([0.9, 0.9]), torch.tensor([0.0, 0.0]))
    assert not out[0].logsumexp(dim=-1).isfinite()
    assert out[1].isfinite().sum() <= 3
