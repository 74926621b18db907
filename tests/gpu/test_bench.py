"""smc-bench on a GPU: captured rounds under the profiler, tables whose parts add up, and the gap between rounds."""

import json
from pathlib import Path

import pytest
import torch

from smc_engines import bench_cli
from tests.tiny_models import make_checkpoint


def test_profile_finds_rounds_products_and_gaps(tmp_path: Path) -> None:
    sizes = {"hidden": 256, "heads": 4, "kv_heads": 2, "ffn": 512, "max_position": 1024, "dtype": "bfloat16"}
    target = make_checkpoint(tmp_path / "target", layers=3, seed=1, **sizes)
    draft = make_checkpoint(tmp_path / "draft", layers=2, seed=2, **sizes)
    arguments = ["--preset", str(target), "--draft", str(draft), "--dtype", "bfloat16", "--n", "4", "--k", "3"]
    arguments += ["--prompt-tokens", "40", "--output-tokens", "150", "--repeats", "2", "--sweep-batch", "3"]
    arguments += ["--worst-case-resampling", "--profile", "smc,target", "--trace", str(tmp_path / "trace.json.gz")]
    path = tmp_path / "report.json"
    assert bench_cli.main([*arguments, "--device", "cuda", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert report["failed"] == []
    assert len(report["rows"]) == 6
    assert report["resampling"]["resampled_fraction"] > 0.9
    smc, plain = report["profiles"]
    for profile in (smc, plain):
        parts = profile["kernels_us"] + profile["idle_us"] + profile["round_gap_us"]
        assert profile["round_us"] == pytest.approx(parts, rel=0.1)
        assert profile["round_gap_count"] >= 20
        assert profile["round_gap_copies_us"] > 0
    launches = {row["group"]: row["launches"] for row in smc["groups"]}
    assert launches["draft head"] == 3
    assert launches["target head"] == 1
    assert launches["sampling"] == 2 * (3 + 2)
    # Pages of both models are copied, and both models attend once a layer and prepare each pass; on Hopper a draft pass
    # attends inside its one launch.
    assert launches["page copy"] == 2
    assert launches["target attention"] >= 3 + 1
    whole_passes = launches.get("draft whole passes", 0)
    assert whole_passes == (3 if torch.cuda.get_device_capability() >= (9, 0) else 0)
    assert launches["draft attention"] >= 3 * (1 if whole_passes else 2 + 1)
    assert "draft products" not in {row["group"] for row in plain["groups"]}
    assert (tmp_path / "smc-trace.json.gz").exists()
