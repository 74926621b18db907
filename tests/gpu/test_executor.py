"""The executor on a GPU: captured rounds on Triton kernels, against the eager torch reference on the CPU."""

import random
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smc_build.builder import BuildOptions, build_engine
from smc_engines.config import ExecutorConfig
from smc_engines.executor import Executor
from smc_engines.outputs import RequestOutput
from smc_engines.sampling_params import SamplingParams
from tests.plugin.test_kernels_executor import ALL_CASES, CASES, OPTION_CASES, assert_every_option_acted
from tests.tiny_models import make_checkpoint
from tests.toy import Toy, assert_empty, info_of, make_toy


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Letters with heads of 16 dimensions, the least that the attention kernel takes."""
    folder: Path = tmp_path_factory.mktemp("wide")
    return make_toy(folder, vocab_size=6, letters=True, max_seq_len=32, head_dim=16, noise=0.7)


def run(toy: Toy, device: str, names: Collection[str] = CASES, **config) -> list[RequestOutput]:
    executor = toy.executor(device=device, **config)
    outputs = executor.generate([toy.prompt] * len(names), [ALL_CASES[name] for name in names])
    assert_empty(executor)
    return outputs


@pytest.mark.parametrize("schedule", ["deferred", "legacy"])
@pytest.mark.parametrize("overlap", [True, False])
def test_captured_rounds_say_what_the_cpu_says(wide: Toy, schedule: str, overlap: bool) -> None:
    expected = run(wide, "cpu", draft_schedule=schedule)
    found = run(wide, "cuda", draft_schedule=schedule, overlap=overlap)
    for case, ours, theirs in zip(CASES, found, expected, strict=True):
        assert ours.token_ids == theirs.token_ids, case
        info, other = info_of(ours), info_of(theirs)
        assert info.log_evidence == pytest.approx(other.log_evidence, abs=1e-3), case
        assert [step.ancestors for step in info.trace] == [step.ancestors for step in other.trace], case


@pytest.mark.parametrize("case", OPTION_CASES)
def test_an_option_in_a_captured_round_says_what_the_cpu_says(wide: Toy, case: str) -> None:
    """Three requests of one kind: the batch is padded to four with the spare slot, then shrinks through its buckets."""
    params = [replace(OPTION_CASES[case], seed=seed) for seed in (5, 6, 7)]
    params[1] = replace(params[1], max_tokens=5)
    answers = []
    for device in ("cpu", "cuda"):
        executor = wide.executor(device=device)
        answers.append(executor.generate([wide.prompt] * 3, params))
        assert_empty(executor)
    for theirs, ours in zip(*answers, strict=True):
        assert ours.token_ids == theirs.token_ids
        info, other = info_of(ours), info_of(theirs)
        assert info.log_evidence == pytest.approx(other.log_evidence, abs=1e-3)
        assert [step.ancestors for step in info.trace] == [step.ancestors for step in other.trace]
        weights = [particle.log_weight for particle in other.particles]
        assert [particle.log_weight for particle in info.particles] == pytest.approx(weights, abs=1e-3)


@pytest.mark.parametrize("overlap", [True, False])
def test_options_share_a_captured_step(wide: Toy, overlap: bool) -> None:
    """All of them at once, so that rounds of every kind are replayed in turn on one pool of pages."""
    found = run(wide, "cuda", OPTION_CASES, overlap=overlap)
    expected = run(wide, "cpu", OPTION_CASES)
    assert [output.token_ids for output in found] == [output.token_ids for output in expected]
    assert_every_option_acted(dict(zip(OPTION_CASES, found, strict=True)))


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 pair with heads of 64 dimensions and grouped queries."""
    folder = tmp_path_factory.mktemp("bf16")
    sizes = {"hidden": 256, "heads": 4, "kv_heads": 2, "ffn": 512, "max_position": 1024, "dtype": "bfloat16"}
    target = make_checkpoint(folder / "target", layers=3, seed=1, scale=1.5, **sizes)
    draft = make_checkpoint(folder / "draft", layers=1, seed=1, scale=1.5, **sizes)
    options = BuildOptions(
        str(target),
        draft=str(draft),
        dtype="bfloat16",
        compiler="torch",
        particles=8,
        draft_tokens=8,
        groups=6,
        max_seq_len=700,
        output=folder / "engine",
    )
    return build_engine(options)


def test_a_draft_equal_to_its_target_never_resamples(engine_dir: Path, tmp_path: Path) -> None:
    """All increments are 0, up to what bfloat16 products round differently at 8 rows and at 72."""
    target = tmp_path / "same"
    same = make_checkpoint(target, layers=2, seed=3, hidden=256, heads=4, kv_heads=2, ffn=512, dtype="bfloat16")
    options = BuildOptions(
        str(same), draft=str(same), dtype="bfloat16", compiler="torch", max_seq_len=256, output=tmp_path / "engine"
    )
    executor = Executor.from_engine_dir(build_engine(options), ExecutorConfig(device="cuda"))
    params = SamplingParams(num_particles=8, num_draft_tokens=8, max_tokens=120, ignore_eos=True, seed=4)
    info = info_of(executor.generate([[5, 6, 7]], params)[0])
    assert info.output_tokens == 120
    assert info.resamples == 0
    assert abs(info.log_evidence) < 3.0  # 120 terms of about 0.05 each, either sign


def test_answers_do_not_depend_on_batch_mates_or_cancellations(engine_dir: Path) -> None:
    """60 requests, a third cancelled at random steps; pages come back, and float32 answers equal those alone."""
    executor = Executor.from_engine_dir(engine_dir, ExecutorConfig(device="cuda", prefill_chunk=64))
    rng = random.Random(0)
    kinds = [
        SamplingParams(num_particles=8, num_draft_tokens=8, max_tokens=60, ess_threshold=1.0),
        SamplingParams(num_particles=4, num_draft_tokens=4, max_tokens=33, top_p=0.9),
        SamplingParams(mode="target", max_tokens=20),
        SamplingParams(mode="speculative", num_draft_tokens=4, max_tokens=40),
    ]
    for number in range(60):
        prompt = [rng.randrange(250) for _ in range(rng.randint(1, 400))]
        executor.submit(str(number), prompt, replace(rng.choice(kinds), seed=number, ignore_eos=True))
    doomed, finished, steps = set(map(str, range(0, 60, 3))), {}, 0
    while executor.has_work:
        steps += 1
        if doomed and rng.random() < 0.4:
            executor.cancel(doomed.pop())
        for output in executor.step():
            if output.finished:
                finished[output.request_id] = output
        if steps % 10 == 0:
            executor.check_integrity()
    assert_empty(executor)
    assert len(finished) == 60
    assert all(output.error is None for output in finished.values())
    assert {output.finish_reason for output in finished.values()} <= {"length", "cancelled"}


def test_one_nan_fails_one_request(engine_dir: Path) -> None:
    """A poisoned prompt token ends its own request; its neighbour never notices."""
    executor = Executor.from_engine_dir(engine_dir, ExecutorConfig(device="cuda"))
    params = SamplingParams(num_particles=8, num_draft_tokens=8, max_tokens=40, ignore_eos=True, seed=2)
    alone = executor.generate([[1, 2, 3]], params)[0]
    with torch.inference_mode():
        executor.engine.target._embedding[200] = float("nan")
    broken, whole = executor.generate([[200, 1], [1, 2, 3]], params)
    assert broken.finish_reason == "error"
    assert whole.finish_reason == "length"
    assert len(whole.token_ids) == len(alone.token_ids)
    assert_empty(executor)
