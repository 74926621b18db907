"""The executor on the Triton kernels, under the interpreter, against the executor on the torch reference."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import pytest

from smc_engines.config import DraftSchedule
from smc_engines.outputs import RequestOutput
from smc_engines.region_choice import RegionChoice
from smc_engines.sampling_params import SamplingParams
from smc_plugin.backend import KernelChoice
from tests.toy import Toy, assert_empty, info_of, make_toy

BASE = SamplingParams(num_particles=3, num_draft_tokens=2, max_tokens=7, temperature=1.0, return_particles=True, seed=5)
CASES = {
    "smc": BASE,
    "resample every round": replace(
        BASE, num_particles=4, num_draft_tokens=3, ess_threshold=1.0, ignore_eos=True, max_tokens=16
    ),
    "power and temperatures": replace(BASE, power_alpha=1.6, temperature=0.8, draft_temperature=1.2),
    "filters": replace(BASE, top_k=3, top_p=0.9, min_p=0.05, min_tokens=2),
    "stop strings": replace(BASE, stop=("ab", "cc"), ignore_eos=True),
    "one particle": replace(BASE, num_particles=1, num_draft_tokens=4),
    "no draft": replace(BASE, num_draft_tokens=0),
    "target": replace(BASE, mode="target", logprobs=True),
    "speculative": replace(BASE, mode="speculative", num_draft_tokens=3),
    "greedy": replace(BASE, temperature=0.0),
}
# Everything beside plain SMC that a round can be made of; on a GPU it runs as torch operations inside the captured round.
OPTION_CASES = {
    "early ends": replace(
        BASE, truncate_rounds=True, ess_threshold=0.9, num_draft_tokens=3, ignore_eos=True, max_tokens=12
    ),
    "stratified": replace(BASE, resampling="stratified", ess_threshold=1.0, ignore_eos=True),
    "residual": replace(BASE, resampling="residual", ess_threshold=1.0, ignore_eos=True, num_particles=4),
    "half the weights": replace(BASE, resample_power=0.5, ess_threshold=1.0, ignore_eos=True, max_tokens=12),
    "adapts K": replace(BASE, adapt_draft_tokens=0.98, num_draft_tokens=3, ignore_eos=True, max_tokens=16),
    "always lossless": replace(BASE, exact_below=1.0, num_draft_tokens=3, ignore_eos=True, max_tokens=12),
    "lossless, filtered, sharpened": replace(BASE, exact_below=1.0, top_k=3, top_p=0.9, power_alpha=1.5),
    "sometimes lossless": replace(BASE, exact_below=0.9, num_draft_tokens=3, ignore_eos=True, max_tokens=12),
    "sometimes lossless, stop strings": replace(BASE, exact_below=0.9, stop=("ab",), ignore_eos=True, max_tokens=12),
    "falls back": replace(BASE, fallback_below=-1e-3, ess_threshold=1.0, max_tokens=12, ignore_eos=True),
    "all at once": replace(
        BASE,
        **{"truncate_rounds": True, "ess_threshold": 0.9, "resampling": "residual", "resample_power": 0.7},
        **{"exact_below": 0.8, "num_draft_tokens": 3, "num_particles": 4, "ignore_eos": True, "max_tokens": 14},
    ),
}
ALL_CASES = CASES | OPTION_CASES
FP8_CASES = ("smc", "resample every round", "speculative")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Letters with heads of 16 dimensions, the least that the attention kernel takes."""
    folder: Path = tmp_path_factory.mktemp("wide")
    return make_toy(folder, vocab_size=6, letters=True, max_seq_len=32, head_dim=16, noise=0.7)


def run(
    toy: Toy, kernels: KernelChoice, regions: RegionChoice, schedule: DraftSchedule, names: Collection[str] = CASES
) -> list[RequestOutput]:
    """The cases at once, so that groups share rounds and pages."""
    executor = toy.executor(kernels=kernels, regions=regions, draft_schedule=schedule)
    outputs = executor.generate([toy.prompt] * len(names), [ALL_CASES[name] for name in names])
    assert_empty(executor)
    return outputs


@pytest.mark.parametrize("schedule", ["deferred", "legacy"])
def test_answers_are_those_of_the_reference(wide: Toy, schedule: DraftSchedule) -> None:
    expected, found = run(wide, "reference", "torch", schedule), run(wide, "triton", "fused", schedule)
    assert_same_answers(found, expected)


def test_options_are_those_of_the_reference(wide: Toy) -> None:
    expected = run(wide, "reference", "torch", "deferred", OPTION_CASES)
    found = run(wide, "triton", "fused", "deferred", OPTION_CASES)
    assert_same_answers(found, expected, OPTION_CASES)
    assert_every_option_acted(dict(zip(OPTION_CASES, found, strict=True)))


def test_fp8_answers_are_those_of_the_reference(tmp_path: Path) -> None:
    """A draft of FP8 matrices and head in the fused products; FP8 keys could round to either side of an edge."""
    toy = make_toy(
        tmp_path,
        vocab_size=6,
        letters=True,
        max_seq_len=32,
        head_dim=16,
        noise=0.7,
        draft_dtype="fp8",
        head_dtype="fp8",
    )
    expected = run(toy, "reference", "torch", "deferred", FP8_CASES)
    assert_same_answers(run(toy, "triton", "fused", "deferred", FP8_CASES), expected, FP8_CASES, least_resamples=1)


def assert_same_answers(
    found: list[RequestOutput], expected: list[RequestOutput], names: Collection[str] = CASES, least_resamples: int = 3
) -> None:
    resamples = 0
    for case, ours, theirs in zip(names, found, expected, strict=True):
        assert ours.token_ids == theirs.token_ids, case
        info, other = info_of(ours), info_of(theirs)
        assert info.log_evidence == pytest.approx(other.log_evidence, abs=1e-4), case
        assert [one.token_ids for one in info.particles] == [one.token_ids for one in other.particles], case
        weights = [one.log_weight for one in other.particles]
        assert [one.log_weight for one in info.particles] == pytest.approx(weights, abs=1e-4), case
        assert [step.ancestors for step in info.trace] == [step.ancestors for step in other.trace], case
        resamples += info.resamples
    assert resamples >= least_resamples


def assert_every_option_acted(outputs: dict[str, RequestOutput]) -> None:
    """A case whose option never came into play would show nothing."""
    infos = {name: info_of(output) for name, output in outputs.items()}
    assert infos["early ends"].rounds > 3  # 12 tokens, up to 4 a round
    assert infos["adapts K"].rounds > 4  # 16 tokens, 4 a round if all were alike
    for name in ("stratified", "residual", "half the weights"):
        assert infos[name].resamples > 0, name
    for name in ("sometimes lossless", "all at once"):
        # a lossless round leaves the weights as they are and gives everybody one ancestor
        lossless = [not step.resampled and len(set(step.ancestors)) == 1 for step in infos[name].trace]
        assert any(lossless), name
        assert not all(lossless), name
    assert all(len(set(step.ancestors)) == 1 for step in infos["always lossless"].trace)
    assert infos["falls back"].fell_back
