"""Rounds against hand-computed weights: where answers end, what recovery does, what has settled.

Nothing is random about the expectations here: with θ = 0 no round resamples, so the log weight of a particle must be the
sum of its own increments, up to its end and not beyond. The sums come from float64 logits of transformers (tests/toy.py).
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from smc_engines import launch
from smc_engines.rounds import run_round
from smc_engines.sampling_params import SamplingParams
from tests.toy import LETTERS, Toy, assert_empty, build, info_of, log_softmax, sample

PARAMS = SamplingParams(
    temperature=1.0, max_tokens=4, num_particles=8, num_draft_tokens=2, ess_threshold=0.0, logprobs=True
)

ENDS = {
    "end token": {},
    "max_tokens no multiple of K + 1": {"max_tokens": 3, "num_draft_tokens": 4},
    "max_tokens 1": {"max_tokens": 1},
    "no draft": {"num_draft_tokens": 0, "power_alpha": 1.7},
    "powers": {"power_alpha": 0.6, "temperature": 0.8, "draft_temperature": 1.2},
    "stop_token_ids": {"stop_token_ids": (3, 4)},
    "min_tokens": {"min_tokens": 3, "stop_token_ids": (2,), "num_draft_tokens": 3},
    "ignore_eos": {"ignore_eos": True},
    "ignore_eos, other stop": {"ignore_eos": True, "stop_token_ids": (1,), "num_draft_tokens": 1},
}


@pytest.mark.parametrize("case", ENDS)
def test_each_particle_weighs_what_its_own_tokens_up_to_its_end_weigh(toy: Toy, case: str) -> None:
    params = replace(PARAMS, **ENDS[case])
    law, kinds, shared_end = toy.law(params), set(), 0
    for output in sample(toy.executor(), toy.prompt, params, 40, seed=31):
        info = info_of(output)
        assert info.resamples == info.recoveries == 0
        for particle in info.particles:
            assert particle.token_ids in law
            assert particle.log_weight == pytest.approx(toy.log_weight(particle.token_ids, params), abs=2e-4)
            stopped = particle.token_ids[-1] in toy.stop_ids(params)
            assert particle.finish_reason == ("stop" if stopped else "length")
            kinds.add((len(particle.token_ids), particle.finish_reason))
        log_weights = np.array([particle.log_weight for particle in info.particles])
        assert info.log_evidence == pytest.approx(np.log(np.exp(log_weights).mean()), abs=1e-6)
        shared_end += len({len(particle.token_ids) for particle in info.particles}) == 1
        answer = output.token_ids
        assert info.particles[info.selected].token_ids == answer
        expected = [toy.log_p(answer[:index], params)[token] for index, token in enumerate(answer)]
        assert info.token_logprobs == pytest.approx(expected, abs=2e-4)
        assert info.output_tokens == len(answer)
    # Every end that this request allows was really seen, and particles of one group ended apart.
    assert kinds == {(len(answer), "stop" if answer[-1] in toy.stop_ids(params) else "length") for answer in law}
    assert (shared_end < 40) == (len({len(answer) for answer in law}) > 1)


def test_weights_after_the_last_resampling_are_the_tokens_since(toy: Toy) -> None:
    params = replace(PARAMS, max_tokens=4, num_draft_tokens=1, ess_threshold=1.0, ignore_eos=True)
    seen = set()
    for output in sample(toy.executor(), toy.prompt, params, 30, seed=37):
        info = info_of(output)
        # Answers are x0, then (draft, bonus), then a last draft that ends by length: two rounds.
        assert info.rounds == 2
        assert not info.trace[1].resampled  # all particles are finished
        start = 3 if info.trace[0].resampled else 0
        seen.add(start)
        for particle in info.particles:
            assert particle.log_weight == pytest.approx(toy.log_weight(particle.token_ids, params, start), abs=2e-4)
    assert 3 in seen


def test_ess_and_resampling_follow_the_weights(toy: Toy) -> None:
    params = replace(PARAMS, ess_threshold=0.0, num_draft_tokens=3)
    free = sample(toy.executor(), toy.prompt, params, 30, seed=41)
    for theta in (0.3, 0.9):
        for output, twin in zip(
            free, sample(toy.executor(), toy.prompt, replace(params, ess_threshold=theta), 30, seed=41), strict=True
        ):
            first = info_of(twin).trace[0]
            log_weights = np.array(
                [toy.log_weight(particle.token_ids[:5], params) for particle in info_of(output).particles]
            )
            weights = np.exp(log_weights) / np.exp(log_weights).sum()
            unfinished = info_of(output).rounds > 1
            assert first.ess == pytest.approx(1 / (weights**2).sum(), rel=1e-3)
            assert first.resampled == (unfinished and first.ess < theta * 8)


@pytest.mark.parametrize(("k", "page_size"), [(1, 4), (2, 4), (3, 4), (5, 4), (2, 1), (3, 2), (4, 16)])
def test_long_answers_read_their_own_past_after_many_resamplings(letters: Toy, folder, k: int, page_size: int) -> None:
    """Shared, copied and rewritten pages must hold what a fresh forward over the whole answer would compute."""
    models = letters.engine_dir.parent
    executor = letters.executor()
    if page_size != executor.engine.page_size:
        options = {"page_size": page_size, "max_seq_len": 64}
        twin = build(folder / "engine", models / "target", models / "draft", **options)
        executor = replace(letters, engine_dir=twin).executor()
    params = replace(PARAMS, max_tokens=30, num_draft_tokens=k, num_particles=6, ess_threshold=1.0, ignore_eos=True)
    for output in sample(executor, letters.prompt, params, 4, seed=39):
        info = info_of(output)
        assert info.resamples > 20 // (k + 1)
        start = max(entry.context_len for entry in info.trace if entry.resampled) - len(letters.prompt)
        answers = [particle.token_ids for particle in info.particles]
        log_p, log_q = (
            np.array([[log_softmax(row)[t] for row, t in zip(rows, answer, strict=True)] for rows, answer in pairs])
            for pairs in (zip(tree.along(answers), answers, strict=True) for tree in (letters.target, letters.draft))
        )
        drafted = (np.arange(30) % (k + 1) > 0) & (np.arange(30) >= start)
        expected = ((log_p - log_q) * drafted).sum(axis=1)
        np.testing.assert_allclose([p.log_weight for p in info.particles], expected, atol=1e-3)
        np.testing.assert_allclose(info.token_logprobs, log_p[info.selected], atol=1e-3)


def test_finished_particles_keep_their_weight_and_their_place_as_ancestors(toy: Toy) -> None:
    params = replace(PARAMS, num_draft_tokens=1, ess_threshold=1.0)
    ended_ancestors = 0
    for output in sample(toy.executor(), toy.prompt, params, 40, seed=43):
        info = info_of(output)
        for particle in info.particles:
            if len(particle.token_ids) <= 3 and info.trace[-1].resampled is False and info.trace[0].resampled:
                assert particle.log_weight == pytest.approx(0.0, abs=1e-9)  # ended before the resampling: adds 0 since
                ended_ancestors += 1
    assert ended_ancestors > 20


def greedy(toy: Toy, params: SamplingParams) -> tuple[int, ...]:
    answer: tuple[int, ...] = ()
    while len(answer) < params.max_tokens and not (answer and answer[-1] in toy.stop_ids(params)):
        answer += (int(toy.target.logits(answer).argmax()),)
    return answer


@pytest.mark.parametrize("mode", ["smc", "speculative", "target"])
@pytest.mark.parametrize("n", [1, 4])
def test_temperature_zero_is_greedy_decoding(clash: Toy, mode, n: int) -> None:
    params = replace(PARAMS, mode=mode, temperature=0.0, num_particles=n, ignore_eos=True, ess_threshold=0.5)
    outputs = sample(clash.executor(), clash.prompt, params, 5, seed=47)
    assert {output.token_ids for output in outputs} == {greedy(clash, params)}
    assert all((info_of(output).recoveries > 0) == (mode == "smc") for output in outputs)
    assert all(info_of(output).log_evidence == 0.0 for output in outputs)


@pytest.mark.parametrize("mode", ["smc", "speculative"])
def test_temperature_zero_equals_target_mode_over_long_answers(clash: Toy, mode) -> None:
    executor = clash.executor()
    prompts = [(1,), (2, 3), (4, 4, 1), (3, 1, 2, 1, 4), (2,)]
    params = SamplingParams(mode="target", temperature=0.0, max_tokens=9, ignore_eos=True)
    expected = [output.token_ids for output in executor.generate(prompts, params)]
    assert len(set(expected)) > 2
    drafting = replace(params, mode=mode, num_particles=3, num_draft_tokens=4, seed=1)
    assert [output.token_ids for output in executor.generate(prompts, drafting)] == expected
    assert_empty(executor)


def test_a_round_in_which_all_would_die_ends_before_and_is_counted(clash: Toy) -> None:
    params = replace(PARAMS, top_k=1, temperature=1.0, num_draft_tokens=3, ignore_eos=True)
    answer = greedy(clash, params)
    agreed = 0  # drafted tokens that stand before the first that kills
    for index in range(1, 4):
        if int(clash.draft.logits(answer[:index]).argmax()) != answer[index]:
            break
        agreed += 1
    assert agreed < 3
    for output in sample(clash.executor(), clash.prompt, params, 5, seed=53):
        info = info_of(output)
        assert output.token_ids == answer
        assert info.trace[0].recovered
        assert info.trace[0].context_len == len(clash.prompt) + 1 + agreed + 1
        assert info.recoveries == sum(entry.recovered for entry in info.trace) > 0


def test_dead_particles_never_answer_and_never_revive(clash: Toy) -> None:
    params = replace(PARAMS, top_k=2, num_draft_tokens=1, num_particles=4)
    dead = 0
    for theta in (0.0, 0.5):
        for output in sample(clash.executor(), clash.prompt, replace(params, ess_threshold=theta), 60, seed=59):
            info = info_of(output)
            assert np.isfinite(info.log_evidence)
            assert np.isfinite(info.particles[info.selected].log_weight)
            probability = sum(info.token_logprobs)
            assert np.isfinite(probability)
            alive = [particle.token_ids for particle in info.particles if np.isfinite(particle.log_weight)]
            if info.trace:
                settled = info.trace[-1].settled  # the dead have no say in it
                assert len({tokens[:settled] for tokens in alive}) == 1
                assert len(set(alive)) == 1 or len({tokens[: settled + 1] for tokens in alive}) > 1
                assert settled <= min(map(len, alive))
                assert len(set(alive)) > 1 or settled == len(alive[0])
            for particle in info.particles:
                possible = np.isfinite(
                    sum(
                        clash.log_p(particle.token_ids[:index], params)[token]
                        for index, token in enumerate(particle.token_ids)
                    )
                )
                assert possible == np.isfinite(particle.log_weight)
                dead += not possible
    assert dead > 20


def test_settled_tokens_never_change_and_are_handed_out_once(letters: Toy) -> None:
    executor = letters.executor(max_groups=16)
    variants = [
        {"num_particles": 1},
        {"num_particles": 8, "ess_threshold": 0.9},
        {"num_particles": 4, "num_draft_tokens": 1},
        {"num_particles": 4, "top_k": 2},
        {"mode": "target"},
        {"mode": "speculative"},
    ]
    for number in range(36):
        params = replace(PARAMS, max_tokens=20, seed=number, return_particles=True, **variants[number % len(variants)])
        executor.submit(str(number), letters.prompt, params)
    handed: dict[str, tuple[int, ...]] = {}
    texts: dict[str, str] = {}
    early = 0
    while executor.has_work:
        for output in executor.step():
            name = output.request_id
            handed[name] = handed.get(name, ()) + output.new_token_ids
            texts[name] = texts.get(name, "") + output.new_text
            assert output.token_ids == handed[name]
            assert output.text == texts[name]
            early += bool(output.new_token_ids) and not output.finished
            if output.finished:
                _check_settled(output)
    assert len(handed) == 36
    assert early > 36
    assert_empty(executor)


def test_a_stop_token_that_settles_early_is_no_part_of_the_text(letters: Toy) -> None:
    """With all live particles ended alike and a dead one still going, the stop token's text used to be shown."""
    executor = letters.executor(max_groups=16)
    params = replace(PARAMS, num_particles=3, top_k=2, stop_token_ids=(1, 2), max_tokens=20, ignore_eos=True)
    settled_early = 0
    for seed in range(120):
        executor.submit(str(seed), letters.prompt, replace(params, seed=seed))
    while executor.has_work:
        for output in executor.step():
            ended = bool(output.token_ids) and output.token_ids[-1] in (1, 2)
            settled_early += ended and not output.finished
            if output.finished:
                assert output.text == said(output.token_ids[:-1] if ended else output.token_ids).decode(
                    errors="replace"
                )
    assert settled_early > 3


def _check_settled(output) -> None:
    """What settled in any round is shared by every particle that was alive at the end."""
    info = info_of(output)
    alive = [particle.token_ids for particle in info.particles if np.isfinite(particle.log_weight)]
    settled = [entry.settled for entry in info.trace]
    assert settled == sorted(settled)
    for length in settled[:-1]:
        assert {tokens[:length] for tokens in alive} == {output.token_ids[:length]}


def said(tokens: tuple[int, ...]) -> bytes:
    pieces = [b"", *(letter.encode() for letter in LETTERS), b"\xc3", b"\xa9"]
    return b"".join(pieces[token] for token in tokens)


@pytest.mark.parametrize("mode", ["smc", "speculative", "target"])
def test_stop_strings_end_each_particle_at_the_completing_token(letters: Toy, mode) -> None:
    stops = ("ab", "ca", "é", "bbcc")
    params = replace(PARAMS, mode=mode, max_tokens=12, stop=stops, ess_threshold=0.5, num_draft_tokens=3)
    ends = set()
    for output in sample(letters.executor(), letters.prompt, params, 40, seed=61):
        for particle in info_of(output).particles:
            text = said(particle.token_ids)
            stopped = [stop for stop in stops if stop.encode() in text]
            if particle.finish_reason is None:
                continue
            assert particle.finish_reason == ("stop" if stopped or particle.token_ids[-1] == 0 else "length")
            assert not any(stop.encode() in said(particle.token_ids[:-1]) for stop in stops)
            for stop in stopped:
                assert text.endswith(stop.encode())
                text = text.removesuffix(stop.encode())
                ends.add((len(particle.token_ids) - 1) % 4)
            assert particle.text == text.decode(errors="replace")
        assert not any(stop in output.text for stop in stops)
        # What was streamed never had to be taken back: the beginning of a stop string waits for what follows it.
        assert output.text == info_of(output).particles[info_of(output).selected].text
    assert len(ends) >= 3  # in the middle of a round, by the bonus, across both


def test_stop_strings_weigh_like_any_other_end(letters: Toy) -> None:
    params = replace(PARAMS, stop=("b", "é"), num_draft_tokens=3)
    stopped = 0
    for output in sample(letters.executor(), letters.prompt, params, 25, seed=67):
        for particle in info_of(output).particles:
            assert particle.log_weight == pytest.approx(letters.log_weight(particle.token_ids, params), abs=2e-4)
            stopped += particle.finish_reason == "stop" and len(particle.token_ids) == 2
    assert stopped > 5


class NoHostReads(TorchDispatchMode):
    """Fails on every operation whose result's value or shape the host would have to wait for."""

    READS = frozenset(
        ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim", "_unique2")
    )

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in self.READS, f"{func} reads a value back"
        return func(*args, **(kwargs or {}))


READING = {
    "smc": {},
    "alone, no draft": {"num_particles": 1, "num_draft_tokens": 0},
    "speculative": {"mode": "speculative", "min_p": 0.1},
    "target, greedy": {"mode": "target", "temperature": 0.0},
    "filters, stops, recoveries": {"top_k": 1, "top_p": 0.9, "min_tokens": 2, "stop": ("ab",), "power_alpha": 2.0},
}


@pytest.mark.parametrize("schedule", ["deferred", "legacy"])
@pytest.mark.parametrize("case", READING)
def test_a_round_reads_nothing_back_and_branches_on_no_value(
    letters: Toy, monkeypatch: pytest.MonkeyPatch, case: str, schedule
) -> None:
    rounds = []

    def refuse(tensor, *arguments, **options):
        raise AssertionError("a tensor's memory is read")

    def watched(context, state, slots):
        rounds.append(context.kind)
        # these read memory without an operation that a dispatch mode sees
        with NoHostReads(), pytest.MonkeyPatch.context() as patch:
            for name in ("tolist", "numpy", "cpu", "__array__"):
                patch.setattr(torch.Tensor, name, refuse)
            return run_round(context, state, slots)

    monkeypatch.setattr(launch, "run_round", watched)
    params = replace(PARAMS, ess_threshold=0.9, max_tokens=9, ignore_eos=True, **READING[case])
    sample(letters.executor(draft_schedule=schedule), letters.prompt, params, 4, seed=71)
    assert rounds
    with NoHostReads(), pytest.raises(AssertionError, match="reads a value back"):
        torch.ones(2).sum().item()
