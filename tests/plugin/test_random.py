"""Random streams: known answers, uniformity, and that no two draws of a request share a name."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from smc_engines.sampling_params import SamplingParams
from smc_plugin.reference import random, sampling
from tests.toy import Toy


def words(key: int, counter: tuple[int, int, int, int]) -> list[int]:
    signed = key - 2**64 if key >= 2**63 else key
    return [int(word[0]) for word in random.philox(*(torch.tensor([value]) for value in (signed, *counter)))]


# Known answers that Random123 publishes for philox4x32-10; the key's first word is its low half.
KNOWN = {
    "zeros": (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        0x299F31D0A4093822,
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize("case", KNOWN)
def test_philox_gives_the_known_answers(case: str) -> None:
    key, counter, expected = KNOWN[case]
    assert words(key, counter) == list(expected)


def test_philox_broadcasts_like_separate_calls() -> None:
    seeds, lanes = torch.tensor([[3], [2**40 + 1]]), torch.tensor([0, 1, 7])
    zero = torch.tensor(0)
    table = random.philox(seeds, zero, zero + 5, lanes, zero + 2)
    for row, seed in enumerate((3, 2**40 + 1)):
        for column, lane in enumerate((0, 1, 7)):
            assert [int(word[row, column]) for word in table] == words(seed, (0, 5, lane, 2))


def test_uniform_is_uniform_and_below_one() -> None:
    seeds = torch.arange(20000)
    zero = torch.zeros_like(seeds)
    u = random.uniform(seeds, zero, zero, zero).numpy()
    assert u.min() >= 0
    assert u.max() < 1
    ranks = np.sort(u)
    gap = np.abs(ranks - (np.arange(20000) + 0.5) / 20000).max()
    assert gap < 1.95 / np.sqrt(20000)  # Kolmogorov-Smirnov, 0.1 %


def test_exponential_has_its_law_and_each_token_its_own_word() -> None:
    rows = torch.arange(400)
    zero = torch.zeros_like(rows)
    noise = random.exponential(rows, zero + 1, zero, zero, 10)
    assert noise.shape == (400, 10)
    assert noise.unique().numel() > 3990
    sample = np.sort(noise.numpy().ravel())
    gap = np.abs(1 - np.exp(-sample) - (np.arange(4000) + 0.5) / 4000).max()
    assert gap < 1.95 / np.sqrt(4000)
    first = words(0, (1, 1, 0, 0))  # block 1 belongs to tokens 4 to 7
    assert float(noise[0, 6]) == pytest.approx(-np.log1p(-(first[2] + 0.5) / 2**32), rel=1e-5)
    # A longer vocabulary begins with the same noise.
    torch.testing.assert_close(random.exponential(rows, zero + 1, zero, zero, 13)[:, :10], noise, rtol=0, atol=0)


def test_the_largest_words_give_finite_noise() -> None:
    """Words that round to 2^32 in float32 once gave infinite noise: greedy drew token 0 every 30 million draws."""
    seed, zero = torch.tensor([2871038]), torch.tensor([0])
    assert words(2871038, (0, 0, 0, 0))[2] == 2**32 - 95
    noise = random.exponential(seed, zero, zero, zero, 4)
    assert float(noise[0, 2]) == pytest.approx(24 * np.log(2), rel=1e-3)
    greedy = torch.tensor([[-np.inf, -np.inf, 0.0, -np.inf]], dtype=torch.float32)
    assert sampling.draw(greedy, seed, zero, zero, zero).tolist() == [2]


def test_no_two_draws_of_a_request_share_a_name(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name that a request uses, uniform or over the vocabulary, is used once."""
    names: list[tuple[int, ...]] = []
    real_uniform, real_exponential = random.uniform, random.exponential

    def note(seed, step, lane, purpose) -> None:
        parts = torch.broadcast_tensors(seed, step, lane, purpose)
        names.extend(zip(*(part.flatten().tolist() for part in parts), strict=True))

    def uniform(*name):
        note(*name)
        return real_uniform(*name)

    def exponential(*name):
        note(*name[:4])
        return real_exponential(*name)

    monkeypatch.setattr(random, "uniform", uniform)
    monkeypatch.setattr(sampling, "exponential", exponential)
    executor = toy.executor()
    base = SamplingParams(num_particles=4, num_draft_tokens=5, max_tokens=12, ignore_eos=True, seed=9, temperature=1.0)
    for params in (replace(base, ess_threshold=1.0), replace(base, mode="speculative"), replace(base, mode="target")):
        names.clear()
        output = executor.generate([toy.prompt], params)[0]
        assert len(output.token_ids) == 12
        assert len(names) > 12
        assert len(set(names)) == len(names), params.mode
        assert {name[0] for name in names} == {9}
