"""K that follows the past rounds' ESS: the rule, the laws it keeps, and that nobody else's rounds matter."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from smc_engines.adapt import WINDOW, choose_draft_tokens, draft_token_grid
from smc_engines.outputs import RequestOutput, RoundInfo
from smc_engines.sampling_params import SamplingParams
from smc_plugin.errors import RequestError
from tests.engines.test_laws import GROUPS, evidence
from tests.toy import Toy, assert_means, info_of, make_toy, sample

BASE = SamplingParams(
    temperature=1.0, max_tokens=10, ignore_eos=True, num_particles=4, num_draft_tokens=2, adapt_draft_tokens=0.85
)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Three tokens and answers of ten: the first rounds cannot adapt, those after them can."""
    return make_toy(tmp_path_factory.mktemp("deep"), vocab_size=3, depth=10)


def drafted(output: RequestOutput) -> list[int]:
    """K of every round but the last, which `max_tokens` may cut."""
    lengths = [3, *(entry.context_len for entry in info_of(output).trace)]
    return [after - before - 1 for before, after in pairwise(lengths[:-1])]


def trace(*rounds: tuple[float, bool, int], particles: int = 16) -> list[RoundInfo]:
    """Rounds from their ESS, whether they resampled, and the context length after them."""
    return [RoundInfo(ess, again, tuple(range(particles)), 0, length, False) for ess, again, length in rounds]


def test_the_rule_is_what_its_text_says() -> None:
    assert draft_token_grid(16) == (4, 8, 12, 16)
    assert draft_token_grid(2) == (1, 2)
    one = trace((5.3, True, 27))
    assert choose_draft_tokens([], 10, 0.5, 16) == 16
    assert choose_draft_tokens(one, 10, 0.5, 16) == 8
    assert choose_draft_tokens(one, 10, 0.575, 16) == 4  # 8.5 tokens may be drafted, a round of K = 8 has nine
    assert choose_draft_tokens(one, 10, 0.3, 16) == 16
    assert choose_draft_tokens(one, 10, 1.0, 16) == 4
    assert choose_draft_tokens(trace((16.0, False, 27)), 10, 1.0, 16) == 16
    # 16 tokens more at no cost of their own: the weights of the first round are still there, not spent once more
    assert choose_draft_tokens(trace((5.3, False, 27), (5.3, True, 44)), 10, 0.5, 16) == 16
    assert choose_draft_tokens(trace((5.3, True, 27), (5.3, True, 44)), 10, 0.5, 16) == 8
    # what is further back than the window is forgotten, what it left in the weights is not charged to the window
    late = [(16.0, False, 44 + 17 * index) for index in range(WINDOW)]
    assert choose_draft_tokens(trace((1.0, True, 27), *late), 10, 0.5, 16) == 16
    spread = [(4.0, False, 44 + 17 * index) for index in range(WINDOW)]
    assert choose_draft_tokens(trace((4.0, False, 27), *spread), 10, 1.0, 16) == 16


def last_two(output: RequestOutput) -> dict[tuple[int, ...], float]:
    """Probability of the last two tokens given a request's particles."""
    found: dict[tuple[int, ...], float] = defaultdict(float)
    for particle in info_of(output).particles:
        found[particle.token_ids[-2:]] += np.exp(particle.log_weight)
    return defaultdict(float, {end: mass / sum(found.values()) for end, mass in found.items()})


@pytest.mark.parametrize(
    "others", [{}, {"power_alpha": 1.5, "ess_threshold": 0.9}, {"truncate_rounds": True}, {"exact_below": 0.6}]
)
def test_weights_and_evidence_stay_unbiased(deep: Toy, others: dict[str, float]) -> None:
    """The mass of the last two tokens, which stand in rounds whose K was chosen, against all 59049 answers."""
    params = replace(BASE, **others, select="argmax")  # type: ignore[arg-type]
    outputs = sample(deep.executor(**GROUPS), deep.prompt, params, 500, seed=70)
    law = deep.law(params)
    ends: dict[tuple[int, ...], float] = defaultdict(float)
    for answer, mass in law.items():
        ends[answer[-2:]] += mass
    mass = evidence(outputs)[:, None] * np.array([[share[end] for end in ends] for share in map(last_two, outputs)])
    assert_means(mass.sum(axis=1, keepdims=True), [sum(law.values())])
    assert_means(mass, list(ends.values()))
    if not others.keys() & {"truncate_rounds", "exact_below"}:
        # one token, three and three of two rounds, then two (and a fourth round) or three
        rounds = [info_of(output).rounds for output in outputs]
        assert set(rounds) == {3, 4}
        assert min(rounds.count(3), rounds.count(4)) > 50


def test_the_first_two_rounds_draft_as_asked_and_the_others_by_the_rule(letters: Toy) -> None:
    params = replace(BASE, max_tokens=40, num_draft_tokens=5, adapt_draft_tokens=0.7)
    for output in sample(letters.executor(**GROUPS), letters.prompt, params, 20, seed=3):
        found, past = drafted(output), info_of(output).trace
        assert found[:2] == [5, 5]
        for number in range(2, len(found)):
            assert found[number] == choose_draft_tokens(past[: number - 1], 3, 0.7, 5)


def same(ours: Sequence[RequestOutput], theirs: Sequence[RequestOutput]) -> bool:
    """Whether answers, particles and K are the same."""
    return all(
        (one.token_ids, drafted(one), [p.token_ids for p in info_of(one).particles])
        == (other.token_ids, drafted(other), [p.token_ids for p in info_of(other).particles])
        for one, other in zip(ours, theirs, strict=True)
    )


def test_neither_overlap_nor_company_changes_a_token(letters: Toy) -> None:
    params = replace(BASE, max_tokens=40, num_draft_tokens=5, adapt_draft_tokens=0.7)
    plain = sample(letters.executor(**GROUPS), letters.prompt, params, 12, seed=5)
    assert len({k for output in plain for k in drafted(output)}) > 2
    assert same(plain, sample(letters.executor(**GROUPS, overlap=True), letters.prompt, params, 12, seed=5))
    assert same(plain, sample(letters.executor(max_groups=1, num_pages=200), letters.prompt, params, 12, seed=5))


def test_it_has_no_effect_where_there_is_nothing_to_adapt(letters: Toy) -> None:
    for others in ({"num_particles": 1}, {"mode": "speculative"}, {"exact_below": 1.0}, {"num_draft_tokens": 1}):
        params = replace(BASE, max_tokens=20, **others)  # type: ignore[arg-type]
        ours = sample(letters.executor(**GROUPS), letters.prompt, params, 5)
        theirs = sample(letters.executor(**GROUPS), letters.prompt, replace(params, adapt_draft_tokens=0.0), 5)
        assert same(ours, theirs)


def test_a_fraction_above_one_is_refused() -> None:
    with pytest.raises(RequestError, match="adapt_draft_tokens must be in"):
        SamplingParams(adapt_draft_tokens=1.01)
