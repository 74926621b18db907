"""smc-bench through its main(), on tiny engines on the CPU."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from smc_build.builder import BuildOptions, build_engine
from smc_engines import bench_cli
from smc_engines.bench.floor import floor_bytes, kv_tokens
from smc_engines.bench.measure import Bench
from smc_engines.bench.points import Case, Point, parse_modes, parse_numbers, sweep_points, swept_by
from smc_engines.config import ExecutorConfig
from smc_engines.engine import Engine
from smc_plugin.errors import ConfigError
from tests.engines.recorded_rounds import llama_case, llama_engine
from tests.tiny_models import make_checkpoint

REQUIRED = {
    *("gpu", "num_gpus", "preset", "dtype", "tp", "mode", "num_particles", "num_draft_tokens", "prompt_tokens"),
    *(
        "output_tokens",
        "batch",
        "tokens_per_s",
        "ms_per_round",
        "floor_fraction",
        "copy_tb_per_s",
        "weights",
        "versions",
    ),
}
SMALL = ["--threads", "1", "--n", "3", "--k", "2", "--prompt-tokens", "20", "--output-tokens", "13", "--repeats", "2"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints target and draft."""
    folder = tmp_path_factory.mktemp("bench")
    make_checkpoint(folder / "target", seed=1)
    make_checkpoint(folder / "draft", layers=1, seed=2)
    return folder


@pytest.fixture(autouse=True)
def quick_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bandwidth of a small copy will do."""
    monkeypatch.setattr("smc_engines.bench.floor._COPY_BYTES", {"cpu": 2**20})


def run(models: Path, *arguments: Any) -> tuple[int, dict[str, Any]]:
    """Run smc-bench with random weights; returns the exit status and the report."""
    path = models / "report.json"
    path.unlink(missing_ok=True)
    source = ["--preset", str(models / "target"), "--draft", str(models / "draft"), "--json", str(path)]
    code = bench_cli.main([*source, *SMALL, *map(str, arguments)])
    return code, json.loads(path.read_text()) if path.exists() else {}


def test_a_run_has_modes_sweeps_resampling_and_a_picture(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = models / "bench.png"
    sweeps = [
        "--sweep-batch",
        "1,2",
        "--sweep-n",
        "2,3",
        "--sweep-prompt-tokens",
        "20,40",
        "--sweep-modes",
        "smc,target",
    ]
    code, report = run(models, *sweeps, "--worst-case-resampling", "--png", png, "--sweep-repeats", 1)
    assert code == 0
    rows = report["rows"]
    assert all(set(row) >= REQUIRED for row in rows)
    found = [(row["mode"], row["point"], row["resampling"]) for row in rows]
    assert found == [
        *(("target", "base", "default"), ("speculative", "base", "default"), ("smc", "base", "default")),
        *(("smc", "base", "never"), ("smc", "base", "every")),
        *(("smc", "batch=2", "default"), ("target", "batch=2", "default")),
        ("smc", "particles=2", "default"),  # the target has no particles
        *(("smc", "prompt_tokens=40", "default"), ("target", "prompt_tokens=40", "default")),
    ]
    by_name = dict(zip(found, rows, strict=True))
    smc = by_name["smc", "base", "default"]
    assert (smc["preset"], smc["weights"], smc["repeats"], smc["rounds"]) == ("target", "random", 2, 3)
    # On a CPU the first round is over when timing starts.
    assert smc["tokens_per_round"] == 3.0
    assert by_name["smc", "batch=2", "default"]["tokens_per_round"] == 3.0
    assert by_name["target", "base", "default"]["rounds"] == 11
    assert all(0 < row["floor_fraction"] < 1 for row in rows)
    assert all(row["tokens_per_s_min"] <= row["tokens_per_s"] <= row["tokens_per_s_max"] for row in rows)
    # The last of the four rounds ends the particles, and those do not resample.
    assert by_name["smc", "base", "never"]["resampled_fraction"] == 0
    assert by_name["smc", "base", "every"]["resampled_fraction"] == 0.75
    assert report["resampling"]["cost"] == pytest.approx(
        by_name["smc", "base", "every"]["ms_per_round"] / by_name["smc", "base", "never"]["ms_per_round"] - 1
    )
    assert report["failed"] == []
    assert png.read_bytes()[:4] == b"\x89PNG"
    text = capsys.readouterr()
    assert "smc/target" in text.out
    assert "of the floor" in text.out
    assert "versions python" in text.err


def test_a_point_that_fails_does_not_lose_the_others(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out at N = 4 costs that point only, and its requests do not stay behind."""
    start = Bench.start

    def fails(self: Bench, case: Case, seed: int) -> Any:
        requests = start(self, case, seed)
        if case.num_particles == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return requests

    monkeypatch.setattr(Bench, "start", fails)
    code, report = run(models, "--sweep-n", "4,5", "--modes", "smc")
    assert code == 0
    assert [row["point"] for row in report["rows"]] == ["base", "particles=5"]
    failed = report["failed"][0]
    assert failed["point"] == "particles=4"
    assert failed["error"] == "OutOfMemoryError: CUDA out of memory"
    assert failed["num_particles"] == 4


def test_a_mode_that_fails_does_not_lose_the_others(models: Path, tmp_path: Path) -> None:
    """An engine directory without a draft; its limits also refuse a point."""
    target = str(models / "target")
    build_engine(
        BuildOptions(target, draft="none", dtype="float32", compiler="torch", max_seq_len=64, output=tmp_path / "e")
    )
    arguments = ["--engine", str(tmp_path / "e"), *SMALL, "--sweep-prompt-tokens", "60", "--sweep-modes", "target"]
    assert bench_cli.main([*arguments, "--json", str(tmp_path / "r.json")]) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert [(row["mode"], row["weights"]) for row in report["rows"]] == [("target", "target")]
    assert [row["error"].split(":")[0] for row in report["failed"]] == ["RequestError"] * 3


def test_a_run_that_is_cut_off_keeps_its_repeats(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = Bench.start

    def interrupted(self: Bench, case: Case, seed: int) -> Any:
        if seed == 2 and case.mode == "smc":
            raise KeyboardInterrupt
        return start(self, case, seed)

    monkeypatch.setattr(Bench, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(models)
    rows = json.loads((models / "report.json").read_text())["rows"]
    assert [(row["mode"], row["repeats"]) for row in rows] == [("target", 1), ("speculative", 1), ("smc", 1)]


def test_timed_rounds_can_be_capped(models: Path) -> None:
    """With random weights speculative decoding is timed for as many rounds as smc would take, but at least 32."""
    _, report = run(models, "--max-rounds", 3)
    assert [row["rounds"] for row in report["rows"]] == [3, 3, 3]
    _, report = run(models, "--output-tokens", 200, "--modes", "speculative")
    assert report["rows"][0]["rounds"] == 67


def test_contexts_are_those_of_the_timed_rounds(models: Path) -> None:
    _, report = run(models, "--modes", "target", "--output-tokens", 21)
    # The first round is over when timing starts: 2 to 21 tokens generated, the frontier at position 20 + g - 1.
    assert report["rows"][0]["context_tokens"] == 20 - 1 + (2 + 21) / 2


def test_a_batch_that_cannot_run_together_is_refused(models: Path) -> None:
    options = BuildOptions(str(models / "target"), draft=str(models / "draft"), dtype="float32", max_seq_len=64)
    bench = Bench(Engine.from_random(options, ExecutorConfig(device="cpu", num_pages=12, max_groups=2)), 0.7)
    point = Point(2, 3, 2, 20, 13)
    with pytest.raises(ConfigError, match="the batch may need 14 KV pages, the pool has 11"):
        bench.start(Case(point, "smc"), 0)
    with pytest.raises(ConfigError, match="the batch is 3, the engine runs at most 2 requests at once"):
        bench.start(Case(dataclasses.replace(point, batch=3), "target"), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modes", "target,smcc"], "--modes names 'smcc', expected some of target, speculative, smc: correct it"),
        (["--sweep-n", "4,x"], "--sweep-n is '4,x', expected positive numbers such as 1,2,4: correct it"),
        (["--repeats", "0"], "--repeats is 0, expected at least 1: raise it"),
        (
            ["--profile", "--device", "cpu"],
            "--profile and --trace record kernels of a CUDA device, this run uses the CPU",
        ),
        (["--prompt", "hello"], "--prompt needs a tokenizer, --preset has none"),
    ],
)
def test_wrong_options_are_refused(
    models: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, _ = run(models, *arguments)
    assert code == 1
    assert message in capsys.readouterr().err


def earlier_report(models: Path) -> dict[str, Any]:
    """A CPU cannot tune, so the report gets some tactics here."""
    _, found = run(models, "--modes", "target")
    product = {"rows": 16, "columns": 64, "inner": 128, "splits": 3, "num_warps": 4, "num_stages": 6}
    own = {"regions": {}, "products": {"o": {"8": {**product, "prefetch": 128, "swap": False}}}}
    found["tactics"] = {"gpu": found["identity"]["gpu"], "models": {"target": own, "draft": own}}
    return found


@pytest.mark.parametrize("old", [False, True])
def test_tactics_of_an_earlier_run(models: Path, old: bool) -> None:
    """Reports from before `identity` have it in their rows."""
    earlier, path = earlier_report(models), models / "earlier.json"
    assert earlier["identity"].items() <= earlier["rows"][0].items()
    if old:
        del earlier["identity"], earlier["rows"][0]["draft_tp"]
    path.write_text(json.dumps(earlier))
    code, report = run(models, "--modes", "target,smc", "--tactics", path)
    assert code == 0
    assert report["tactics"] == earlier["tactics"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.update(tactics={}), "has tactics of no model, expected draft, target: name the --json"),
        (lambda found: found["tactics"]["models"].pop("draft"), "has tactics of target, expected draft, target"),
        (lambda found: found["tactics"].update(gpu="another GPU"), "has those of gpu another GPU, this run has gpu "),
        (lambda found: found["identity"].update(tp=2, draft_tp=1), "has those of tp 2, this run has tp 1"),
        (lambda found: found["identity"].update(draft_tp=2), "has those of draft_tp 2, this run has draft_tp 1"),
        (
            lambda found: found["tactics"]["models"]["target"]["regions"].update(
                block={"8": {"choice": "plans", "us": {}}}
            ),
            "leaves regions to TensorRT plans, an engine in memory has none",
        ),
        (
            lambda found: found["tactics"]["models"]["target"]["products"]["o"]["8"].update(splits="x"),
            "splits of a tactic is 'x', expected a whole number from 1",
        ),
    ],
)
def test_tactics_of_something_else_are_refused(
    models: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any]], object], message: str
) -> None:
    earlier, path = earlier_report(models), models / "other.json"
    change(earlier)
    path.write_text(json.dumps(earlier))
    capsys.readouterr()
    assert run(models, "--tactics", path)[0] == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", [None, "no JSON", "[]", '{"tactics": {}, "rows": []}', '{"tactics": {}, "identity": "x"}']
)
def test_tactics_that_do_not_read_are_refused(
    models: Path, capsys: pytest.CaptureFixture[str], text: str | None
) -> None:
    path = models / "broken.json"
    path.unlink(missing_ok=True)
    if text is not None:
        path.write_text(text)
    assert run(models, "--tactics", path)[0] == 1
    assert "expected the --json of a run with --tune: name such a file, or use --tune" in capsys.readouterr().err


def test_tactics_are_not_for_engine_directories() -> None:
    args = bench_cli.build_parser().parse_args(["--engine", "engines/any", "--tactics", "any.json"])
    with pytest.raises(ConfigError, match="has its own: leave it out, or run smc-build --tune engines/any"):
        bench_cli.run(args)


def test_a_missing_matplotlib_names_the_extra(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _ = run(models, "--png", models / "x.png")
    assert code == 1
    assert "pip install 'smc-engine[eval]'" in capsys.readouterr().err


def test_floor_of_the_bars() -> None:
    """8 passes of 2.47 GB and one of 15.01 GB: the target's embedding is a look-up, the tied draft's is its head."""
    engine, case = llama_engine(), llama_case()
    weights = floor_bytes(engine, case, 0) - 240 * (1 - 8) * (8 * 32768 + 131072)
    assert weights == pytest.approx(8 * 2.4716e9 + 15.0096e9, rel=1e-4)
    # 255 // 16 pages of 16 tokens are shared, 260 tokens follow for each of 8 particles.
    assert kv_tokens(case, 500, 16) == 240 + 8 * 260
    assert kv_tokens(llama_case("target"), 500, 16) == 500
    both = dataclasses.replace(case, point=dataclasses.replace(case.point, batch=2))
    assert kv_tokens(both, 500, 16) == 2 * (240 + 8 * 260)


def test_sweeps_go_around_the_base() -> None:
    base = Point(1, 8, 8, 256, 512)
    points = sweep_points(base, {"batch": (1, 4), "draft_tokens": (4, 8)})
    assert [(point.label, point.batch, point.draft_tokens) for point in points] == [
        ("batch=4", 4, 8),
        ("draft_tokens=4", 1, 4),
    ]
    assert [swept_by(points[1], mode) for mode in ("target", "speculative", "smc")] == [False, True, True]
    assert parse_numbers(" 4, 8,4", "--sweep-k") == (4, 8)
    assert parse_modes("smc,target", "--modes") == ("smc", "target")
