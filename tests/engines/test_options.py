"""The options beside plain SMC keep its laws, on the toy of test_laws.py: unbiased where weighed, exact where lossless."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from smc_engines.outputs import RequestOutput
from smc_engines.sampling_params import SamplingParams
from smc_plugin.errors import RequestError
from smc_plugin.reference import options
from smc_plugin.reference.resample import Resampled
from smc_plugin.reference.weights import normalise
from tests.engines.test_laws import BASE, GROUPS, evidence, grouped
from tests.toy import Toy, assert_drawn_from, assert_means, info_of, log_softmax, merge_rare, particle_law, sample

UNBIASED = {
    "early ends": {"truncate_rounds": True, "ess_threshold": 0.8},
    "early ends, sharpened": {"truncate_rounds": True, "ess_threshold": 0.9, "power_alpha": 2.0, "num_draft_tokens": 1},
    "stratified": {"resampling": "stratified", "ess_threshold": 1.0, "num_draft_tokens": 1},
    "residual": {"resampling": "residual", "ess_threshold": 1.0, "num_draft_tokens": 1},
    "half the weights": {"resample_power": 0.5, "ess_threshold": 1.0, "num_draft_tokens": 1},
    "sometimes lossless": {"exact_below": 0.8, "num_draft_tokens": 1},
    "all at once": {
        **{"truncate_rounds": True, "ess_threshold": 0.8, "resampling": "residual", "resample_power": 0.7},
        **{"exact_below": 0.5},
    },
}


@pytest.mark.parametrize("case", UNBIASED)
def test_options_leave_weights_and_evidence_unbiased(toy: Toy, case: str) -> None:
    params = replace(BASE, num_draft_tokens=3, select="argmax")
    params = replace(params, **UNBIASED[case])
    outputs = sample(toy.executor(**GROUPS), toy.prompt, params, 150, seed=3000)
    law, proposal = toy.law(params), toy.proposal_law(params)
    answers = list(law)
    groups = merge_rare({answer: min(law[answer], proposal[answer]) for answer in law}, 0.03)
    mass = evidence(outputs)[:, None] * particle_law(outputs, answers)
    assert_means(mass.sum(axis=1, keepdims=True), [sum(law.values())])
    assert_means(grouped(mass, answers, groups), [sum(law[answer] for answer in group) for group in groups])
    assert sum(info_of(output).resamples for output in outputs) > 30


EXACT = {
    "two sequences": {"num_particles": 2, "num_draft_tokens": 2},
    "five sequences": {"num_particles": 5, "num_draft_tokens": 3},
    "one token at a time": {"num_particles": 4, "num_draft_tokens": 1, "draft_temperature": 0.7},
    "filtered": {"num_particles": 3, "top_k": 3, "top_p": 0.85},
    "sharpened": {"num_particles": 3, "power_alpha": 2.0},
}


@pytest.mark.parametrize("case", EXACT)
def test_lossless_rounds_over_many_sequences_follow_the_target_exactly(clash: Toy, case: str) -> None:
    """The draft of this pair knows nothing of its target, so a wrong residual would show at once."""
    params = replace(BASE, exact_below=1.0, **EXACT[case])
    outputs = sample(clash.executor(**GROUPS), clash.prompt, params, 400, seed=21)
    assert_drawn_from([output.token_ids for output in outputs], clash.normalised_law(params))
    for output in outputs[:20]:
        info = info_of(output)
        assert info.log_evidence == 0.0
        assert {particle.token_ids for particle in info.particles} == {output.token_ids}


def test_more_sequences_are_accepted_further(clash: Toy) -> None:
    params = replace(BASE, exact_below=1.0, max_tokens=12, ignore_eos=True, num_draft_tokens=3)
    passes = []
    for particles in (1, 4, 16):
        outputs = sample(clash.executor(**GROUPS), clash.prompt, replace(params, num_particles=particles), 60, seed=2)
        passes.append(sum(info_of(output).rounds for output in outputs))
    assert passes[2] < passes[1] < passes[0]


def test_one_sequence_is_speculative_decoding_token_for_token(clash: Toy) -> None:
    exact = replace(BASE, exact_below=1.0, num_particles=1)
    ours = sample(clash.executor(**GROUPS), clash.prompt, exact, 40, seed=4)
    theirs = sample(clash.executor(**GROUPS), clash.prompt, replace(BASE, mode="speculative"), 40, seed=4)
    assert [output.token_ids for output in ours] == [output.token_ids for output in theirs]


def test_just_above_zero_the_dial_is_plain_smc(toy: Toy) -> None:
    params = replace(BASE, num_draft_tokens=3, max_tokens=4)
    plain = sample(toy.executor(**GROUPS), toy.prompt, params, 40, seed=9)
    dialled = sample(toy.executor(**GROUPS), toy.prompt, replace(params, exact_below=1e-9), 40, seed=9)
    assert [output.token_ids for output in plain] == [output.token_ids for output in dialled]


def test_early_ends_stop_where_the_ess_gets_low(toy: Toy) -> None:
    params = replace(BASE, num_draft_tokens=5, max_tokens=10, ess_threshold=0.7, ignore_eos=True, num_particles=8)
    whole = sample(toy.executor(**GROUPS), toy.prompt, params, 40, seed=6)
    early = sample(toy.executor(**GROUPS), toy.prompt, replace(params, truncate_rounds=True), 40, seed=6)
    rounds = [sum(info_of(output).rounds for output in outputs) for outputs in (whole, early)]
    assert rounds[1] > rounds[0]
    ess = [np.concatenate([info_of(output).ess for output in outputs]).mean() for outputs in (whole, early)]
    assert ess[1] > ess[0]
    never = replace(params, truncate_rounds=True, ess_threshold=0.0)
    calm = sample(toy.executor(**GROUPS), toy.prompt, never, 20, seed=6)
    assert {info_of(output).rounds for output in calm} == {2}


def assert_follow(p: np.ndarray, tokens: list[int]) -> None:
    """Each token is drawn from its own row of p [R, V], given what precedes it: counts against their exact spread."""
    surplus = (np.eye(p.shape[1])[tokens] - p).sum(axis=0)
    z = surplus / np.sqrt((p * (1 - p)).sum(axis=0))
    assert np.abs(z).max() < 4.5, z


def test_the_bonus_of_a_round_that_ends_early_follows_its_last_token(clash: Toy) -> None:
    """At θ = 1 every round ends after one draft token, so that the third token of three is a bonus: p given the other two."""
    params = replace(BASE, num_particles=8, num_draft_tokens=3, max_tokens=3, ignore_eos=True, ess_threshold=1.0)
    outputs = sample(clash.executor(**GROUPS), clash.prompt, replace(params, truncate_rounds=True), 800, seed=23)
    answers = [output.token_ids for output in outputs]
    p = np.exp([log_softmax(logits) for logits in clash.target.along(answers)[:, 2]])
    assert_follow(p, [answer[2] for answer in answers])


def test_weighing_until_the_ess_is_low_stops_at_the_first_such_token() -> None:
    """The example of the module's text, and groups that die: recovery counts where it comes first, not after the end."""
    no = torch.zeros(4, dtype=torch.bool)
    log_p = torch.tensor([[[0.1, 1.9, 5.0], [0.0, 0.0, 0.0]]] * 4)
    log_p[1, :, 1] = -torch.inf
    log_p[3, :, 2] = -torch.inf
    weighed = options.weigh_until(
        torch.zeros(4, 2, dtype=torch.float64),
        *(log_p, torch.zeros(4, 2, 3), torch.ones(4), torch.full((4, 2), 4), torch.zeros(4, 2, dtype=torch.bool), no),
        torch.tensor([1.5, 1.5, 0.0, 1.5], dtype=torch.float64),
    )
    assert weighed.committed.tolist() == [2, 1, 3, 2]
    assert weighed.recovered.tolist() == [False, True, False, False]
    np.testing.assert_allclose(weighed.log_weights[:, 0], [2.0, 0.1, 7.0, 2.0], atol=1e-6)


@pytest.mark.parametrize("scheme", ["systematic", "stratified", "residual"])
def test_schemes_give_each_particle_its_share(scheme) -> None:
    generator = torch.Generator().manual_seed(5)
    log_weights = torch.tensor([[0.0, -1.0, -torch.inf, 0.5, -3.0, -0.2]], dtype=torch.float64)
    weights = log_weights.exp() / log_weights.exp().sum()
    uniforms = torch.rand(20000, 6, dtype=torch.float64, generator=generator)
    ancestors = options.ancestors_by(scheme, log_weights.expand(20000, -1), uniforms)
    counts = torch.nn.functional.one_hot(ancestors, 6).sum(dim=1)
    assert counts.sum(dim=1).unique().tolist() == [6]
    assert counts[:, 2].max() == 0
    assert_means(counts.double().numpy()[:, [0, 1, 3, 4, 5]], (6 * weights[0, [0, 1, 3, 4, 5]]).tolist())
    if scheme != "stratified":
        assert (counts >= (6 * weights).floor()).all()
    else:  # each position moves by itself, so that a count may be off by more
        assert (counts < (6 * weights).floor()).any()
    if scheme == "systematic":
        assert (counts <= (6 * weights).ceil()).all()


@pytest.mark.parametrize("power", [1.0, 0.75, 0.3])
@pytest.mark.parametrize("scheme", ["systematic", "stratified", "residual"])
def test_resampling_keeps_the_mass_of_each_particle(scheme, power: float) -> None:
    """Evidence times what its offspring weigh is on average what a particle weighed: closer than whole answers can tell."""
    log_weights = torch.tensor([[0.7, -1.0, -torch.inf, 1.5, -3.0, -0.2]], dtype=torch.float64).expand(20000, -1)
    zero, yes = torch.zeros(20000, dtype=torch.int64), torch.ones(20000, dtype=torch.bool)
    flat = torch.ones(20000, dtype=torch.float64)
    decided = options.resample_if_needed(
        *(log_weights, torch.arange(20000), zero, flat, yes, 0.4 * flat, scheme, power * flat)
    )
    assert decided.resampled.all()
    offspring = torch.nn.functional.one_hot(decided.ancestors, 6) * decided.log_weights.exp()[..., None]
    mass = (decided.log_evidence.exp()[:, None] * offspring.mean(dim=1)).numpy()
    live = [0, 1, 3, 4, 5]
    assert mass[:, 2].max() == 0
    assert_means(mass[:, live], (np.exp(0.4) * log_weights[0].exp() / 6)[live].tolist())
    assert (decided.log_weights.std(dim=1) > 0.1).any() == (power < 1)


def test_drawing_one_particle_keeps_the_mass_of_each() -> None:
    log_weights = torch.tensor([[0.7, -1.0, -torch.inf, 1.5]], dtype=torch.float64).expand(20000, -1)
    zero, flat = torch.zeros(20000, dtype=torch.int64), torch.ones(20000, dtype=torch.float64)
    as_before = options.follow(
        *(Resampled(log_weights, flat, zero[:, None].expand(-1, 4), flat, zero > 0), zero == 0, zero + 3, flat),
        *(log_weights, 0.4 * flat),
    )
    assert as_before.ancestors.unique().tolist() == [3]
    assert (as_before.log_evidence == 0.4).all()
    decided = options.collapse(as_before, torch.arange(20000) > 0, log_weights, torch.arange(20000), zero, 0.4 * flat)
    assert (decided.log_weights[1:] == 0).all()
    assert torch.equal(decided.log_weights[0], log_weights[0])
    one = decided.ancestors[1:, 0]
    assert (decided.ancestors[1:] == one[:, None]).all()
    mass = torch.nn.functional.one_hot(one, 4) * decided.log_evidence[1:].exp()[:, None]
    assert mass[:, 2].max() == 0
    live = [0, 1, 3]
    assert_means(mass.numpy()[:, live], (np.exp(0.4) * log_weights[0].exp() / 4)[live].tolist())


def first_forks(outputs) -> list[tuple[int, ...]]:
    """Ancestors of each request's first resampling, before which plain SMC and other resampling are the same."""
    traces = (info_of(output).trace for output in outputs)
    return [next(entry.ancestors for entry in trace if entry.resampled) for trace in traces]


def test_what_a_request_asks_of_resampling_is_what_it_gets(toy: Toy) -> None:
    """All schemes are unbiased, so the laws cannot tell an option that works from one that nobody reads."""
    params = replace(BASE, num_particles=16, ess_threshold=1.0, num_draft_tokens=1)
    executor = toy.executor(**GROUPS)
    forks = {
        name: first_forks(sample(executor, toy.prompt, replace(params, **others), 60, seed=14))
        for name, others in {
            "plain": {},
            "stratified": {"resampling": "stratified"},
            "residual": {"resampling": "residual"},
            "half": {"resample_power": 0.5},
        }.items()
    }
    for name in ("stratified", "residual", "half"):
        others = [fork for fork in forks if fork != name]
        for other in others:
            assert sum(a != b for a, b in zip(forks[name], forks[other], strict=True)) > 20, (name, other)
    survivors = {name: np.mean([len(set(fork)) for fork in found]) for name, found in forks.items()}
    assert survivors["half"] > survivors["plain"] + 1
    # the sure offspring of a residual scheme keep particles that two others may both lose
    assert survivors["residual"] == pytest.approx(survivors["plain"], abs=1)


@pytest.mark.parametrize("scheme", ["systematic", "stratified", "residual"])
def test_a_dead_tail_has_no_offspring_however_near_to_1_the_uniforms_are(scheme) -> None:
    """Their last position rounds to the end of the cumulative weights, where the first particle after it begins."""
    log_weights = torch.tensor([[0.3, 0.1, 0.6, 0.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64).log()
    uniforms = torch.full((1, 8), np.nextafter(1.0, 0.0), dtype=torch.float64)
    assert options.ancestors_by(scheme, log_weights, uniforms).max() == 2


def test_a_weight_of_one_nth_has_its_sure_offspring() -> None:
    """Of these weights a fifth comes out as a little less: rounding must not leave a sure offspring to chance."""
    log_weights = torch.tensor([0.3, 1.0, 1.0, 1.0, 1.7], dtype=torch.float64).log().expand(400, -1).contiguous()
    assert (normalise(log_weights)[0, 1:4] * 5 < 1).all()
    uniforms = torch.rand(400, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ancestors = options.ancestors_by("residual", log_weights, uniforms)
    counts = torch.nn.functional.one_hot(ancestors, 5).sum(dim=1)
    assert (counts[:, 1:4] == 1).all()
    assert counts[:, 0].sum() > 60


def test_a_poor_certificate_falls_back_to_the_target_itself(clash: Toy) -> None:
    """What fell back follows the target exactly, since its random numbers are new ones; what did not is as before."""
    params = replace(BASE, num_particles=2, fallback_below=-0.3)
    outputs = sample(clash.executor(**GROUPS), clash.prompt, params, 350, seed=31)
    plain = sample(clash.executor(**GROUPS), clash.prompt, replace(params, fallback_below=None), 350, seed=31)
    again = [output for output in outputs if info_of(output).fell_back]
    assert 60 < len(again) < 300
    assert_drawn_from([output.token_ids for output in again], clash.normalised_law(params))
    for output, before in zip(outputs, plain, strict=True):
        info, old = info_of(output), info_of(before)
        assert (info.log_evidence, info.final_ess) == (old.log_evidence, old.final_ess)
        assert info.fell_back == (old.log_evidence < -0.3)
        assert info.seed == old.seed
        assert info.discarded_rounds == (old.rounds if info.fell_back else 0)
        if not info.fell_back:
            assert output.token_ids == before.token_ids
    # with the numbers that led to a poor certificate it would be speculative decoding's answer to the same seed
    same = sample(clash.executor(**GROUPS), clash.prompt, replace(BASE, mode="speculative"), 350, seed=31)
    alike = [a.token_ids == b.token_ids for a, b in zip(outputs, same, strict=True) if info_of(a).fell_back]
    assert sum(alike) < len(alike) / 2


def test_nothing_is_shown_before_the_certificate_is_known(toy: Toy) -> None:
    executor = toy.executor(**GROUPS)

    def run(params: SamplingParams) -> list[RequestOutput]:
        executor.submit("a", toy.prompt, params)
        outputs = []
        while executor.has_work:
            outputs += executor.step()
        return outputs

    params = replace(BASE, num_particles=2, num_draft_tokens=1, max_tokens=12, ignore_eos=True, ess_threshold=1.0)
    early = 0
    for seed in range(6):
        early += len(run(replace(params, seed=seed))) > 1
        outputs = run(replace(params, fallback_below=0.0, seed=seed))
        if info_of(outputs[-1]).fell_back:
            shown = [token for output in outputs for token in output.new_token_ids]
            assert shown == list(outputs[-1].token_ids)
        else:
            assert len(outputs) == 1
    assert early > 2  # without a fallback some tokens go out before the end
    executor.check_integrity()
    with pytest.raises(RequestError, match="fallback_below needs mode smc"):
        replace(params, mode="target", fallback_below=0.0)


def test_the_estimated_spread_of_the_evidence_is_about_its_spread(toy: Toy) -> None:
    params = replace(BASE, num_particles=16, num_draft_tokens=1, ess_threshold=0.9)
    infos = [info_of(output) for output in sample(toy.executor(**GROUPS), toy.prompt, params, 150, seed=8)]
    spread = np.std([info.log_evidence for info in infos])
    estimate = np.sqrt(np.mean([info.log_evidence_sd**2 for info in infos]))
    assert 0.6 < estimate / spread < 1.7
    assert all(info.final_ess == info.ess[-1] for info in infos if info.ess)


def test_lossless_rounds_of_a_mix_draw_from_the_target(clash: Toy) -> None:
    """A token that a lossless round draws first follows p given what precedes it, which this draft knows nothing of."""
    params = replace(BASE, num_particles=2, num_draft_tokens=1, max_tokens=14, ignore_eos=True, exact_below=0.999)
    outputs = sample(clash.executor(**GROUPS), clash.prompt, replace(params, ess_threshold=0.0), 400, seed=17)
    answers = [output.token_ids for output in outputs]
    p = np.exp([[log_softmax(row) for row in logits] for logits in clash.target.along(answers)])
    rows, tokens = [], []
    for answer, odds, output in zip(answers, p, outputs, strict=True):
        for entry in info_of(output).trace[:-1]:
            if entry.ess < 0.999 * 2:  # then the next round is a lossless one, over two drafts of one sequence
                place = entry.context_len - len(clash.prompt)
                rows.append(odds[place])
                tokens.append(answer[place])
    assert len(rows) > 1500
    assert_follow(np.array(rows), tokens)


def test_a_lossless_round_of_a_mix_recovers_nothing(clash: Toy) -> None:
    """Weighing the drafts of such a round would kill them all now and then; nobody does."""
    params = replace(BASE, num_particles=2, num_draft_tokens=2, max_tokens=14, ignore_eos=True, top_k=2)
    params = replace(params, exact_below=0.999, ess_threshold=0.0)
    infos = [info_of(output) for output in sample(clash.executor(**GROUPS), clash.prompt, params, 60, seed=18)]
    rounds = [(before.ess < 0.999 * 2, entry) for info in infos for before, entry in pairwise(info.trace)]
    assert not any(entry.recovered for lossless, entry in rounds if lossless)
    assert sum(entry.recovered for lossless, entry in rounds if not lossless) > 5
    assert sum(lossless for lossless, _ in rounds) > 50


def test_the_certificate_of_a_mix_is_that_of_its_weights(toy: Toy) -> None:
    """A lossless round reports the ESS that weighing would have left; the weights it leaves as they are, equal ones."""
    params = replace(BASE, num_particles=8, max_tokens=10, ignore_eos=True, exact_below=0.9, ess_threshold=0.0)
    infos = [info_of(output) for output in sample(toy.executor(**GROUPS), toy.prompt, params, 60, seed=12)]
    for info in infos:
        weights = np.exp([particle.log_weight for particle in info.particles])
        assert info.final_ess == pytest.approx(weights.sum() ** 2 / (weights**2).sum())
        # one particle is drawn where the ESS got low, and by nothing else here
        means = [1 / entry.ess - 1 / 8 for entry in info.trace[:-1] if entry.resampled] + [1 / info.final_ess - 1 / 8]
        assert info.log_evidence_sd == pytest.approx(np.sqrt(sum(means)), abs=1e-9)
    assert sum(info.final_ess > 7.999 > info.ess[-1] for info in infos) > 5


def test_a_slot_forgets_what_kind_of_round_would_have_come_next(toy: Toy) -> None:
    """A request that is cancelled before a lossless round must not make the next one in its slot begin with one."""
    params = replace(
        BASE, num_particles=4, max_tokens=12, ignore_eos=True, exact_below=0.999, ess_threshold=0.0, seed=3
    )
    fresh = toy.executor(max_groups=1, num_pages=200).generate([toy.prompt], params)[0]
    executor = toy.executor(max_groups=1, num_pages=200)
    executor.submit("a", toy.prompt, replace(params, seed=1))
    for _ in range(2):
        executor.step()
    assert executor.slots.state.exact_next[0]
    executor.cancel("a")
    while executor.has_work:
        executor.step()
    again = executor.generate([toy.prompt], params)[0]
    assert [entry.ess for entry in info_of(again).trace] == [entry.ess for entry in info_of(fresh).trace]
    assert again.token_ids == fresh.token_ids


def test_the_mix_refuses_a_power_since_its_ends_differ_there() -> None:
    with pytest.raises(RequestError, match="expected one law: set exact_below to 0 or 1"):
        SamplingParams(exact_below=0.5, power_alpha=2.0)
    assert SamplingParams(exact_below=1.0, power_alpha=2.0).exact_below == 1.0
