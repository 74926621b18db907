"""Sampling over shards of a vocabulary says what sampling over the whole says; ranks are threads that really gather."""

import threading
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smc_plugin.reference import sampling, shards

Result = TypeVar("Result")
INF = float("inf")


def on_ranks(size: int, function: Callable[[int, shards.Gather], Result]) -> list[Result]:
    """Run a function on every rank; `gather` waits for all of them, as MPI would."""
    barrier, held, results = threading.Barrier(size, timeout=20), [torch.empty(0)] * size, {}

    def run(rank: int) -> None:
        def gather(x: Tensor) -> Tensor:
            held[rank] = x
            barrier.wait()
            stacked = torch.stack(held)
            barrier.wait()
            return stacked

        results[rank] = function(rank, gather)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[rank] for rank in range(size)]


def split(values: Tensor, size: int) -> list[Tensor]:
    """Shards of equal width, the last ones padded with -inf."""
    width = -(-values.shape[-1] // (size * 4)) * 4
    wide = torch.nn.functional.pad(values, (0, size * width - values.shape[-1]), value=-INF)
    return list(wide.split(width, dim=-1))


def logits(rows: int, vocab: int, seed: int = 0) -> Tensor:
    return torch.randn((rows, vocab), generator=torch.Generator().manual_seed(seed)) * 3


def names(rows: int, seed: int = 3) -> tuple[Tensor, ...]:
    index = torch.arange(rows)
    return index * 7 + seed, index % 5, index % 3, index * 8 + 1


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("vocab", [5, 101, 1024])
def test_draws_and_scores_are_those_of_one_rank(size: int, vocab: int) -> None:
    rows = 64
    values, temperature, alpha = logits(rows, vocab), torch.linspace(0.3, 2, rows), torch.linspace(0.5, 2, rows)
    alpha[::2] = 1
    parts = split(values, size)
    width = parts[0].shape[1]
    given_tokens = torch.arange(rows) % vocab
    given_tokens[3] = -1
    whole = sampling.sample(values, temperature, *names(rows), alpha=alpha)
    log_p, lse = sampling.score(values, given_tokens, temperature)

    def run(rank: int, gather: shards.Gather):
        first = rank * width
        drawn = shards.shard_stats(parts[rank], temperature, first, names(rows), alpha)
        scored = shards.shard_stats(parts[rank], temperature, first, tokens=given_tokens)
        return shards.combine(gather(drawn), alpha), shards.combine(gather(scored), None, given_tokens)

    for drawn, scored in on_ranks(size, run):
        assert torch.equal(drawn.tokens, whole.tokens)
        torch.testing.assert_close(drawn.log_prob, whole.log_prob, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(drawn.log_zeta, whole.log_zeta, rtol=1e-4, atol=1e-5)
        assert bool((drawn.log_zeta[::2] == 0).all())
        torch.testing.assert_close(scored.log_prob, log_p, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scored.lse, lse, rtol=1e-5, atol=1e-5)


@given(
    seed=st.integers(0, 10_000),
    levels=st.sampled_from([2, 5, 10_000]),
    top_k=st.sampled_from([0, 1, 2, 7, 40, 10_000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.9]),
    size=st.sampled_from([2, 4]),
)
@settings(max_examples=60, deadline=None)
def test_filters_keep_what_one_rank_keeps(
    seed: int, levels: int, top_k: int, top_p: float, min_p: float, size: int
) -> None:
    """Few levels make many ties, which the lower token id wins, across ranks as well."""
    values = torch.round(logits(3, 90, seed) * levels / 8) * 8 / levels
    values[1, ::3] = -INF
    limits = torch.tensor([top_k] * 3), torch.tensor([top_p] * 3), torch.tensor([min_p] * 3)
    expected = split(sampling.apply_filters(values, *limits), size)
    parts = split(values, size)
    found = on_ranks(size, lambda rank, gather: shards.apply_filters(parts[rank], *limits, rank, gather))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [2, 4])
def test_systematic_first_tokens_are_those_of_one_rank(size: int) -> None:
    for seed in range(30):
        values = logits(1, 50, seed)
        values[0, seed % 50 :: 4] = -INF
        u = torch.tensor([[0.0, 0.5, 1 - 2**-32][seed % 3]], dtype=torch.float64)
        parts = split(values, size)
        width = parts[0].shape[1]

        def run(rank: int, gather: shards.Gather, parts=parts, u=u, width=width) -> Tensor:
            return shards.systematic_tokens(parts[rank], u, 8, rank * width, rank, gather)

        expected = sampling.systematic_tokens(values, u, 8)
        for found in on_ranks(size, run):
            assert torch.equal(found, expected)


def test_bans_and_picks_reach_the_rank_that_holds_the_token() -> None:
    values = logits(4, 24)
    ids = torch.tensor([[0, 23, -1]] * 4)
    banned = torch.tensor([True, False, True, True])
    expected = split(sampling.ban_tokens(values, ids, banned), 3)
    for rank, part in enumerate(split(values, 3)):
        assert torch.equal(shards.ban_tokens(part, ids, banned, rank * 8), expected[rank])
    tokens = torch.tensor([[0], [9], [23], [15]])
    picked = sum(shards.pick_own(part, tokens, rank * 8, 0.0) for rank, part in enumerate(split(values, 3)))
    assert torch.equal(picked, values.gather(1, tokens))  # type: ignore[arg-type]


@pytest.mark.parametrize("poison", [float("nan"), INF])
def test_a_row_without_finite_sum_is_seen_by_every_rank(poison: float) -> None:
    values = logits(2, 16)
    values[1, 13] = poison
    parts = split(values, 2)
    for sampled in on_ranks(
        2, lambda rank, gather: shards.combine(gather(shards.shard_stats(parts[rank], None, 8 * rank, names(2))))
    ):
        assert sampled.lse.isfinite().tolist() == [True, False]
        assert bool((sampled.tokens < 16).all())


def test_a_row_of_nothing_gives_some_token_of_the_vocabulary() -> None:
    parts = split(torch.full((1, 5), -INF), 2)
    for sampled in on_ranks(
        2, lambda rank, gather: shards.combine(gather(shards.shard_stats(parts[rank], None, 4 * rank, names(1))))
    ):
        assert 0 <= int(sampled.tokens) < 5
        assert not sampled.lse.isfinite()
