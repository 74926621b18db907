"""Tactics in the manifest, and who computes a region on a machine without a GPU."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from smc_build import cli
from smc_build.builder import BuildOptions, build_engine, random_engine
from smc_build.engine_dir import load_manifest, write_manifest
from smc_build.weights import weight_shapes
from smc_engines.fused_regions import FusedRegions
from smc_engines.region_choice import choose_regions
from smc_engines.regions import SelectedRegions, TorchRegions
from smc_engines.tactics import ModelTactics, RegionTimes, tactics_of
from smc_plugin.errors import EngineDirError
from smc_plugin.tactic import Tactic
from tests.tiny_models import make_checkpoint

FOUND = ModelTactics(
    {"block": {8: RegionTimes("fused", {"fused": 3.0, "torch": 5.0}), 72: RegionTimes("plans", {"plans": 4.0})}},
    {"o": {8: Tactic(16, 64, 128, 2, 4, 6, 128)}},
)


def test_a_number_of_rows_takes_the_next_larger_one_that_was_timed() -> None:
    assert FOUND.runner("block", 1) == "fused"
    assert FOUND.runner("block", 9) == "plans"
    assert FOUND.runner("block", 73) is None
    assert FOUND.runner("head", 8) is None
    assert FOUND.product("o", 8) == Tactic(16, 64, 128, 2, 4, 6, 128)
    assert FOUND.product("o", 16) is None
    assert FOUND.runners() == {"fused", "plans"}


def test_tactics_survive_the_manifest_and_count_on_their_gpu_only(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", layers=2, seed=0)
    path = build_engine(BuildOptions(str(checkpoint), draft="none", max_seq_len=64, output=tmp_path / "engine"))
    tactics = {"gpu": "some GPU", "models": {"target": FOUND.to_dict()}}
    write_manifest(path, replace(load_manifest(path), tactics=tactics))
    found = load_manifest(path).tactics
    assert tactics_of(found, "target", "some GPU") == FOUND
    assert tactics_of(found, "target", "another GPU") is None
    assert [file.name for file in path.iterdir() if "manifest" in file.name] == ["manifest.json"]


@pytest.mark.parametrize(
    "broken", [{}, {"regions": {}}, {"regions": {"o": 3}, "products": {}}, {"products": {"o": {"8": {}}}}]
)
def test_other_tactics_are_refused(broken: dict) -> None:
    with pytest.raises(EngineDirError, match="run it again"):
        ModelTactics.from_dict(broken)


def test_runners_without_a_gpu() -> None:
    manifest, _ = random_engine(BuildOptions("llama-1b", draft="none", dtype="float32", max_seq_len=64))
    entry = replace(
        manifest.target, config=replace(manifest.target.config, num_layers=2, vocab_size=64, hidden_size=64)
    )
    manifest = replace(manifest, target=entry)
    tensors = {name: torch.zeros(shape) for name, shape in weight_shapes(entry.config).items()}
    assert isinstance(choose_regions("auto", manifest, "target", tensors), TorchRegions)
    assert isinstance(choose_regions("fused", manifest, "target", tensors), SelectedRegions)
    with pytest.raises(EngineDirError, match="use --regions fused"):
        choose_regions("plans", manifest, "target", tensors)
    assert FusedRegions(entry.config, tensors).tactic("o", 8).rows == 16


def test_tuning_without_a_gpu_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("tests/gpu/test_tuning.py tunes")
    assert cli.main(["--tune", str(tmp_path)]) == 1
    assert "needs a CUDA GPU" in capsys.readouterr().err
