"""scripts/sweep_quality.py: who answers what, and a small sweep on the shipped pair that is stopped and goes on."""

import gzip
import json
from pathlib import Path

import pytest

from scripts import sweep_quality
from smc_engines.eval.settings import Setting
from smc_plugin.errors import ConfigError


def test_every_setting_goes_to_one_process_and_temperatures_stay_together() -> None:
    settings = sweep_quality.planned(None)
    shares = sweep_quality.divide(settings, 8)
    assert sorted(setting.key for share in shares for setting in share) == sorted(setting.key for setting in settings)
    work = [sum(share.values()) for share in shares]
    assert max(work) < 2 * min(work)
    for share in shares:
        for setting in share:
            other = dict(setting.values) | {"temperature": 1.7 - setting.temperature}
            known = any(dict(mate.values) == pytest.approx(other) for mate in settings)
            assert known == any(dict(mate.values) == pytest.approx(other) for mate in share), setting.label
    assert max(settings.values()) == 2000
    assert max(sweep_quality.planned(7).values()) == 7
    assert {"mode": "target", "temperature": 0.7} in [dict(setting.values) for setting in settings]


def test_a_sweep_goes_on_from_its_own_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--output", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--device", "cpu", "--groups", "4"]
    command += ["--dtype", "float32", "--workers", "2", "--problems", "1"]
    assert sweep_quality.main([*command, "--only", "N=4 K=4 T=1"]) == 0
    assert sweep_quality.main([*command, "--only", "N=4 K=16"]) == 0
    seen = [file.name for file in sorted((tmp_path / "out").iterdir())]
    assert seen == [*(f"answers-{part}.jsonl.gz" for part in range(4)), "report.csv", "report.json"]
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["label"] for row in found["rows"]] == ["smc N=4 K=16 T=1", "smc N=4 K=16 T=0.7"]
    assert found["failed"] == []
    records = list(sweep_quality.read_answers(tmp_path / "out", {"problem_seed": 1}))
    labels = sorted(Setting.of(record["setting"]).label for record in records)
    assert labels == 2 * ["smc N=4 K=16 T=0.7"] + 2 * ["smc N=4 K=16 T=1"] + 2 * ["smc N=4 K=4 T=1"]
    # What is known is not answered again, and no time is left for anything else.
    assert sweep_quality.main([*command, "--only", "N=4", "--time-limit", "0"]) == 0
    assert "6 answers in" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="other problem_seed"):
        list(sweep_quality.read_answers(tmp_path / "out", {"problem_seed": 2}))


def test_a_setting_that_fails_is_named_and_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a time limit: the run ends although one setting never gets its answers."""
    broken = Setting((("mode", "smc"), ("temperature", 1.0), ("num_particles", 128), ("num_draft_tokens", 4)))
    fine = Setting((("mode", "target"), ("temperature", 1.0)))
    monkeypatch.setattr(sweep_quality, "planned", lambda problems, only: {broken: 1, fine: 1})
    command = ["--output", str(tmp_path), "--device", "cpu", "--groups", "2", "--workers", "1", "--dtype", "float32"]
    assert sweep_quality.main(command) == 1
    found = json.loads((tmp_path / "report.json").read_text())
    assert [row["label"] for row in found["rows"]] == ["target T=1"]
    (failed,) = found["failed"]
    assert failed.startswith("smc N=128 K=4 T=1: ")
    assert "num_particles 128" in failed
    lines = [line for path in tmp_path.glob("answers-*.gz") for line in gzip.decompress(path.read_bytes()).splitlines()]
    assert len(lines) == sweep_quality.PARTS + len(sweep_quality.SEEDS)
