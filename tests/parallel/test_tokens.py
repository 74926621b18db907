"""Two and four ranks say what one says, token for token, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smc_build.builder import BuildOptions, build_engine
from tests.parallel.answers import answer
from tests.parallel.conftest import FAMILIES, run_job

SMOLLM2 = Path(".models/smollm2-135m-instruct"), Path(".models/smollm2-draft")
SHARED = {"max_tokens": 12, "ignore_eos": True, "num_particles": 4, "num_draft_tokens": 3, "seed": 11}
ADAPTIVE = {**SHARED, "adapt_draft_tokens": 0.9, "max_tokens": 24}
PARAMS: list[dict[str, Any]] = [
    {**SHARED, "temperature": 1.0},
    {**SHARED, "temperature": 0.8, "ess_threshold": 1.0, "power_alpha": 1.5, "stop": ["zq"]},
    {**SHARED, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "min_tokens": 4, "stop_token_ids": [65, 255]},
    {**SHARED, "truncate_rounds": True, "resampling": "residual", "resample_power": 0.5},
    ADAPTIVE,
    {**SHARED, "temperature": 0},
    {**SHARED, "mode": "target", "top_p": 0.7},
    {**SHARED, "mode": "speculative", "power_alpha": 1.3},
    {**SHARED, "mode": "speculative", "temperature": 0},
]
PROMPTS = [[72, 101, 108, 108, 111]]


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for case, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours["error"] == "None"
        assert ours["tokens"] == theirs["tokens"], case
        assert ours["ancestors"] == theirs["ancestors"], case
        assert ours["log_evidence"] == pytest.approx(theirs["log_evidence"], abs=1e-3), case


@pytest.fixture(scope="module")
def expected(engine_of: Callable[..., Path]) -> dict[str, list[dict[str, Any]]]:
    """What one rank says, by family."""
    return {family: answer(str(engine_of(family, 1)), PROMPTS, PARAMS) or [] for family in FAMILIES}


@pytest.mark.parametrize("tp", [2, 4])
def test_ranks_say_what_one_says(
    tp: int, engine_of: Callable[..., Path], expected: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """All families, draft cut like the target; the last engine has its whole draft on every rank."""
    paths = [engine_of(family, tp) for family in FAMILIES] + [engine_of("llama", tp, 1)]
    engines = [{"path": str(path), "prompts": PROMPTS, "params": PARAMS} for path in paths]
    found = run_job(tp, {"engines": engines}, tmp_path)
    for family, answers in zip([*FAMILIES, "llama"], found, strict=True):
        assert_same(answers, expected[family])
    rounds = [len(answers[PARAMS.index(ADAPTIVE)]["ancestors"]) for answers in found]
    assert max(rounds) > 6  # of four tokens each, had no K been lowered


def test_fp8_ranks_say_what_one_says(
    engine_of: Callable[..., Path], expected: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """A quantized target of float32 activations, token for token; random FP8 weights and pages in bfloat16 just run."""
    quantized = {"dtype": "fp8", "draft_dtype": "float32", "head_dtype": "fp8"}
    paths = [
        engine_of("llama", 2, **quantized),
        engine_of("llama", 2, random_weights=True, dtype="fp8", kv_dtype="fp8"),
    ]
    engines = [{"path": str(path), "prompts": PROMPTS, "params": PARAMS} for path in paths]
    found, random = run_job(2, {"engines": engines}, tmp_path)
    alone = answer(str(engine_of("llama", 1, **quantized)), PROMPTS, PARAMS) or []
    assert_same(found, alone)
    evidence = [[each["log_evidence"] for each in answers] for answers in (alone, expected["llama"])]
    # FP8 is not float32, which a target that was never quantized would have met.
    assert evidence[0] != pytest.approx(evidence[1], abs=0.01)
    assert [(ours["error"], len(ours["tokens"])) for ours in random] == [
        ("None", each["max_tokens"]) for each in PARAMS
    ]


def smollm2(folder: Path, tp: int) -> dict[str, Any]:
    """A job's engine: the demonstration pair over `tp` ranks, one short prompt in all three modes."""
    options = BuildOptions(
        str(SMOLLM2[0]),
        draft=str(SMOLLM2[1]),
        tp=tp,
        dtype="float32",
        compiler="torch",
        particles=2,
        draft_tokens=2,
        max_seq_len=64,
        output=folder / f"tp{tp}",
    )
    few = {**SHARED, "num_particles": 2, "num_draft_tokens": 2, "max_tokens": 7}
    params = [{**few, "mode": mode} for mode in ("smc", "target", "speculative")]
    prompt = [504, 3575, 282, 4649, 314]  # The capital of France is
    return {"path": str(build_engine(options)), "prompts": [prompt], "params": params}


@pytest.fixture(scope="module")
def expected_of_smollm2(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one rank says."""
    if not SMOLLM2[1].is_dir():
        pytest.skip("needs the demonstration pair: make models")
    return answer(**smollm2(tmp_path_factory.mktemp("smollm2"), 1)) or []


@pytest.mark.parametrize("tp", [2, 4])
def test_a_real_pair_of_nine_heads(tp: int, expected_of_smollm2: list[dict[str, Any]], tmp_path: Path) -> None:
    """SmolLM2 has 9 heads and 3 KV heads: 12 and 4 with the zero ones."""
    assert_same(run_job(tp, {"engines": [smollm2(tmp_path, tp)]}, tmp_path)[0], expected_of_smollm2)
