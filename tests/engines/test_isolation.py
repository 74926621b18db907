"""No request notices another: not its company, not its cancellation, not its NaN."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from smc_engines.config import ExecutorConfig
from smc_engines.executor import Executor
from smc_engines.outputs import RequestOutput
from smc_engines.sampling_params import SamplingParams
from smc_plugin.errors import NumericalError
from tests.tiny_models import make_checkpoint
from tests.toy import Toy, assert_empty, build, info_of

BASE = SamplingParams(temperature=1.0, max_tokens=10, num_particles=4, num_draft_tokens=2, return_particles=True)
KINDS = (
    {},
    {"num_particles": 8, "ess_threshold": 1.0},
    {"num_particles": 1},
    {"num_draft_tokens": 5, "power_alpha": 2.0, "num_particles": 3},
    {"num_draft_tokens": 0},
    {"mode": "target", "temperature": 0.7},
    {"mode": "speculative", "num_draft_tokens": 3},
    {"mode": "speculative", "temperature": 0.0, "ignore_eos": True},
    {"top_k": 2, "ignore_eos": True},
    {"temperature": 0.0, "ignore_eos": True},
    {"top_p": 0.8, "min_p": 0.05, "min_tokens": 4},
    {"stop": ("ab", "cc"), "max_tokens": 14},
    {"draft_temperature": 1.5, "stop_token_ids": (3,)},
    {"max_tokens": 1},
    {"adapt_draft_tokens": 0.9, "num_draft_tokens": 3, "max_tokens": 16, "ignore_eos": True},
)
Job = tuple[str, tuple[int, ...], SamplingParams]


def jobs(count: int, seed: int, vocab_size: int = 6) -> list[Job]:
    """Random prompts, some of which share a beginning, with every kind of parameters."""
    chance = random.Random(seed)
    common = tuple(chance.randrange(1, vocab_size) for _ in range(9))
    made = []
    for number in range(count):
        tail = tuple(chance.randrange(1, vocab_size) for _ in range(chance.randint(1, 12)))
        prompt = common[: chance.randint(0, 9)] + tail
        made.append((str(number), prompt, replace(BASE, seed=chance.randrange(2**40), **KINDS[number % len(KINDS)])))
    return made


def run(executor: Executor, work: Sequence[Job], arrivals: int = 1000, cancel=None) -> dict[str, RequestOutput]:
    """Submit a few jobs a step and step to the end.

    Args:
        arrivals: jobs submitted before each step.
        cancel: name to the step before which the job is cancelled.
    """
    ends: dict[str, RequestOutput] = {}
    waiting, step = list(work), 0
    while waiting or executor.has_work:
        for job in waiting[:arrivals]:
            executor.submit(*job)
        waiting = waiting[arrivals:]
        for name, when in (cancel or {}).items():
            if when == step:
                executor.cancel(name)
        ends |= {output.request_id: output for output in executor.step() if output.finished}
        step += 1
        if step % 3 == 0:
            executor.check_integrity()
    assert_empty(executor)
    return ends


def assert_same(one: RequestOutput, other: RequestOutput) -> None:
    assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
    ours, theirs = info_of(one), info_of(other)
    assert [p.token_ids for p in ours.particles] == [p.token_ids for p in theirs.particles]
    np.testing.assert_allclose(
        [p.log_weight for p in ours.particles], [p.log_weight for p in theirs.particles], rtol=0, atol=5e-5
    )
    assert ours.log_evidence == pytest.approx(theirs.log_evidence, abs=5e-5)
    assert [entry.ancestors for entry in ours.trace] == [entry.ancestors for entry in theirs.trace]


def test_the_same_seed_gives_the_same_answer_whatever_the_company(letters: Toy) -> None:
    work = jobs(30, seed=1)
    alone: dict[str, RequestOutput] = {}
    for job in work:
        alone |= run(letters.executor(prefix_cache=False), [job])
    for order, arrivals in ((work, 5), (random.Random(2).sample(work, 30), 30)):
        together = run(letters.executor(max_groups=20, prefill_chunk=16), order, arrivals)
        for name, output in alone.items():
            assert_same(together[name], output)
    resampled = sum(info_of(output).resamples for output in alone.values())
    assert resampled > 5


def test_the_same_run_twice_is_identical_to_the_last_bit(letters: Toy) -> None:
    work = jobs(15, seed=3)
    first, second = run(letters.executor(), work), run(letters.executor(), work)
    for name, output in first.items():
        assert output.token_ids == second[name].token_ids
        assert info_of(output).particles == info_of(second[name]).particles
        assert info_of(output).log_evidence == info_of(second[name]).log_evidence
    others = run(letters.executor(), [(name, prompt, replace(params, seed=1)) for name, prompt, params in work])
    assert any(others[name].token_ids != first[name].token_ids for name in first)


WILD = (
    {"top_k": 2**31 - 1, "temperature": 100.0},
    {"power_alpha": 100.0, "temperature": 1e-3},
    {"draft_temperature": 1e-4, "ess_threshold": 0.0, "num_particles": 8},
    {"min_p": 1.0, "top_p": 1e-6, "power_alpha": 1e-6},
    {"draft_temperature": 100.0, "num_draft_tokens": 5, "ess_threshold": 1.0, "num_particles": 8},
)


def test_wild_company_changes_no_token(letters: Toy) -> None:
    """Degenerate weights, filters that leave one token or all, extreme powers: others' answers stay what they are alone."""
    calm = jobs(10, seed=11)
    alone: dict[str, RequestOutput] = {}
    for job in calm:
        alone |= run(letters.executor(prefix_cache=False), [job])
    wild = [
        (f"wild {number}", (1, 2, 3), replace(BASE, seed=number, **WILD[number % len(WILD)], max_tokens=12))
        for number in range(15)
    ]
    mixed = random.Random(3).sample([*calm, *wild], len(calm) + len(wild))
    together = run(letters.executor(max_groups=16), mixed, arrivals=9)
    for name, output in alone.items():
        assert_same(together[name], output)


@pytest.fixture(scope="module")
def undisturbed(letters: Toy) -> dict[str, RequestOutput]:
    """200 requests that nobody cancels."""
    return run(letters.executor(max_groups=32), jobs(200, seed=5), arrivals=20)


@pytest.mark.parametrize("overlap", [False, True])
def test_cancelling_a_third_leaks_no_page_and_changes_no_other_answer(
    letters: Toy, undisturbed: dict[str, RequestOutput], overlap: bool
) -> None:
    work = jobs(200, seed=5)
    chance = random.Random(7)
    cancel = {name: chance.randint(0, 24) for name in chance.sample([job[0] for job in work], 67)}
    executor = letters.executor(max_groups=24, num_pages=700, overlap=overlap)
    ends = run(executor, work, arrivals=16, cancel=cancel)
    assert set(ends) == {job[0] for job in work}
    cancelled = {name for name, output in ends.items() if output.finish_reason == "cancelled"}
    assert cancelled <= set(cancel)
    assert len(cancelled) > 20  # the others had ended, or had not come yet
    assert any(ends[name].token_ids for name in cancelled)
    for name, output in ends.items():
        if name in cancelled:
            assert output.token_ids == undisturbed[name].token_ids[: len(output.token_ids)]
        else:
            assert_same(output, undisturbed[name])
    executor.pool.clear_prefix_cache()
    assert executor.pool.used_pages() == 0


BAD = 4  # the token whose embedding is NaN


def bad_pair(folder: Path, bad: str | None) -> Path:
    """An engine directory in which one model, or none, gives NaN to whoever meets token 4."""
    shape = {"vocab_size": 6, "hidden": 16, "heads": 2, "kv_heads": 1, "ffn": 24, "eos_id": 0, "tokenizer": False}
    models = {}
    for role, seed in (("target", 3), ("draft", 4)):
        models[role] = make_checkpoint(folder / role, **shape, seed=seed, scale=0.8)
    if bad is not None:
        file = models[bad] / "model.safetensors"
        tensors = load_file(file)
        tensors["model.embed_tokens.weight"][BAD] = math.nan
        save_file(tensors, file, {"format": "pt"})
    return build(folder / "engine", models["target"], models["draft"], max_seq_len=64)


@pytest.fixture(scope="module", params=["target", "draft"])
def poisoned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine directory in which one model gives NaN to whoever meets token 4."""
    return bad_pair(tmp_path_factory.mktemp("poisoned"), request.param)


def test_nan_ends_the_request_that_meets_it_and_nobody_else_notices(poisoned: Path) -> None:
    def load(**config) -> Executor:
        return Executor.from_engine_dir(poisoned, ExecutorConfig(device="cpu", **config))

    kinds = [kind for kind in KINDS if "stop" not in kind]
    work = [
        (
            name,
            prompt if index % 4 == 0 else tuple(t if t != BAD else 3 for t in prompt),
            replace(BASE, seed=index, **kind),
        )
        for index, ((name, prompt, _), kind) in enumerate(zip(jobs(56, seed=9), kinds * 4, strict=True))
    ]
    alone: dict[str, RequestOutput] = {}
    for job in work:
        alone |= run(load(prefix_cache=False), [job])
    failed = {name for name, output in alone.items() if output.finish_reason == "error"}
    in_prompt = {name for name, prompt, _ in work if BAD in prompt and name in failed}
    assert len(failed - in_prompt) > 3  # drawn in the answer
    assert len(in_prompt) > 3
    assert len(alone) - len(failed) > 10
    executor = load(max_groups=16, num_pages=500)
    for _ in range(2):  # the second time on pages that held NaN
        together = run(executor, work, arrivals=6)
        for name, output in alone.items():
            assert together[name].finish_reason == output.finish_reason, name
            if name in failed:
                error = together[name].error
                assert isinstance(error, NumericalError)
                assert "expected finite logits: check the checkpoint's weights" in str(error)
            else:
                assert_same(together[name], output)
    models = [model for model in (executor.engine.target, executor.engine.draft) if model is not None]
    assert any(torch.isnan(model.cache).any() for model in models)


def test_nan_counts_where_a_live_particle_reads_it_and_nowhere_else(tmp_path: Path) -> None:
    """What finished and dead particles, and live ones past their end, go on to draft may be NaN without harm.

    The draft is the model to test it with: it reads one token a pass. The target reads K + 1, and a NaN among them reaches
    the rows before it too (0 * NaN in attention).
    """
    engines = [bad_pair(tmp_path / name, bad) for name, bad in (("sound", None), ("bad", "draft"))]
    sound, bad = (Executor.from_engine_dir(folder, ExecutorConfig(device="cpu", max_groups=64)) for folder in engines)
    params = replace(BASE, ess_threshold=0.0, num_particles=2, num_draft_tokens=3, max_tokens=6)

    def reads_bad(tokens: tuple[int, ...]) -> bool:
        # A bonus that ends the answer (every fourth token) leaves the last draft token unread, and itself.
        read = tokens[:-2] if (len(tokens) - 1) % 4 == 0 else tokens[:-1]
        return BAD in read

    failed = survived = 0
    for seed in range(150):
        whole, cut = (executor.generate([(1, 2)], replace(params, seed=seed))[0] for executor in (sound, bad))
        met = any(reads_bad(particle.token_ids) for particle in info_of(whole).particles)
        assert cut.finish_reason == ("error" if met else whole.finish_reason), seed
        if not met:
            assert_same(whole, cut)
        failed, survived = failed + met, survived + (not met)
    assert min(failed, survived) > 20
    filtered = replace(params, num_particles=4, num_draft_tokens=1, top_k=3, max_tokens=8, ignore_eos=True)
    outputs = bad.generate([(3,)] * 100, [replace(filtered, seed=seed) for seed in range(100)])
    ignored = [p for output in outputs for p in info_of(output).particles if BAD in p.token_ids[:-2]]
    assert len(ignored) > 20
    assert {particle.log_weight for particle in ignored} == {-math.inf}
