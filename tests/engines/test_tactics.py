"""Tactics in the manifest, and who computes a region on a machine without a GPU."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor

from smc_build import cli
from smc_build.builder import BuildOptions, build_engine, random_engine
from smc_build.engine_dir import load_manifest, write_manifest
from smc_build.weights import weight_shapes
from smc_engines import region_choice
from smc_engines.fused_regions import FusedRegions
from smc_engines.model import PagedModel
from smc_engines.region_choice import choose_regions
from smc_engines.regions import SelectedRegions, TorchRegions
from smc_engines.tactics import ModelTactics, RegionTimes, tactics_of
from smc_engines.tuning import Tuner
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
    "model",
    [
        {},
        {"regions": {}},
        {"regions": {"o": 3}, "products": {}},
        {"regions": {}, "products": {"o": {"8": {}}}},
        {"regions": {"block": {"8": {"choice": "nobody", "us": {}}}}, "products": {}},
        {"regions": {"block": {"eight": {"choice": "torch", "us": {}}}}, "products": {}},
    ],
)
def test_other_tactics_are_refused(model: dict) -> None:
    with pytest.raises(EngineDirError, match="run it again"):
        tactics_of({"gpu": "some GPU", "models": {"target": model}}, "target", "some GPU")


@pytest.mark.parametrize("broken", [{"gpu": "some GPU"}, {"models": {}}, {"gpu": "some GPU", "models": {"draft": {}}}])
def test_tactics_without_this_model_are_refused(broken: dict) -> None:
    with pytest.raises(EngineDirError, match="run it again"):
        tactics_of(broken, "target", "some GPU")


def test_inspect_shows_who_was_fastest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", layers=2, seed=0)
    path = build_engine(BuildOptions(str(checkpoint), draft="none", max_seq_len=64, output=tmp_path / "engine"))
    assert cli.main(["--inspect", str(path)]) == 0
    assert "not tuned" in capsys.readouterr().out
    tactics = {"gpu": "some GPU", "models": {"target": FOUND.to_dict()}}
    write_manifest(path, replace(load_manifest(path), tactics=tactics))
    assert cli.main(["--inspect", str(path)]) == 0
    table = capsys.readouterr().out
    assert "on some GPU" in table
    assert "target block    8 rows  fused  (fused 3.0, torch 5.0)" in table


def test_a_build_stands_when_tuning_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: Path, verify: bool) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(cli, "_tune", fails)
    cli._tune_built(tmp_path)
    assert f"out of memory); {tmp_path} runs untuned" in capsys.readouterr().err


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
    few = FusedRegions(entry.config, tensors, FOUND)
    assert few.tactic("o", 8) == FOUND.product("o", 8)
    # A tile of 128 rows, timed for 72, is none for 20.
    many = replace(FOUND, products={"o": {72: Tactic(128, 64, 64, 2, 8, 4, 0)}})
    assert FusedRegions(entry.config, tensors, many).tactic("o", 72).rows == 128
    assert FusedRegions(entry.config, tensors, many).tactic("o", 20).rows == 32
    # Two tiles, timed for 72, are none for 20 rows, nor for more than they hold.
    two = Tactic(64, 64, 64, 2, 4, 4, 0, True, 16)
    tailed = FusedRegions(entry.config, tensors, replace(FOUND, products={"o": {72: two, 100: two}}))
    assert [tailed.tactic("o", rows) == two for rows in (20, 65, 72, 80, 81)] == [False, True, True, True, False]


class Odd(FusedRegions):
    """Heads that are right, right but for rounding, wrong or NaN, by their tactic's splits."""

    OFF: ClassVar = {1: 0.0, 2: 0.01, 3: 0.1, 4: float("nan")}

    def run(self, region: str, layer: int | None, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert region == "head"
        splits = self.tactic("head", activations["hidden"].shape[0]).splits
        return {"logits": torch.ones(8, 64) * (1 + self.OFF[splits])}


class OneWrongMore:
    """A second rank, on which the second candidate is wrong too."""

    def gather_objects(self, value: set[int]) -> list[set[int]]:
        return [value, {1}]


@pytest.mark.parametrize(("ranks", "right"), [(None, [1, 2]), (OneWrongMore(), [1])])
def test_tuning_leaves_out_what_is_wrong_on_any_rank(
    ranks: Any, right: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, _ = random_engine(BuildOptions("llama-1b", draft="none", compiler="torch", max_seq_len=64))
    config = replace(manifest.target.config, num_layers=2, vocab_size=64, hidden_size=64)
    weights = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in weight_shapes(config).items()}
    monkeypatch.setattr(Tuner, "_graph_us", staticmethod(lambda calls: 1.0))
    monkeypatch.setattr("smc_engines.tuning._FLUSH_BYTES", 1024)
    candidates = [Tactic(16, 64, 64, splits, 4, 4) for splits in (1, 2, 3, 4)]
    monkeypatch.setattr("smc_engines.tuning.candidate_tactics", lambda product, gpu: candidates)
    said: list[str] = []
    model = cast("PagedModel", SimpleNamespace(config=config, weights=weights))
    tuner = Tuner(model, {"fused": Odd(config, weights)}, 1, said.append, ranks)
    assert [tactic.splits for tactic in tuner._right_candidates("head", 8)] == right
    assert len([line for line in said if "wrong, and left out" in line]) == 4 - len(right)


class Spy:
    """A runner that says which one it is."""

    def __init__(self, name: str) -> None:
        self.name = name

    def run(self, region: str, layer: int | None, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {self.name: activations["x"]}


@pytest.mark.parametrize("tuned_plans", [False, True])
def test_who_runs_follows_the_tactics(monkeypatch: pytest.MonkeyPatch, tuned_plans: bool) -> None:
    manifest, _ = random_engine(BuildOptions("llama-1b", draft="none", dtype="float32", max_seq_len=64))
    found = FOUND if tuned_plans else replace(FOUND, regions={"block": {8: FOUND.regions["block"][8]}})
    manifest = replace(
        manifest,
        tactics={"gpu": "some GPU", "models": {"target": found.to_dict()}},
        plans={"compiler": "tensorrt-rtx", "version": "1", "gpu": "portable", "files": {"target": {}, "draft": {}}},
    )

    def spies(wanted: set[str], *_: object) -> dict[str, Spy]:
        return {name: Spy(name) for name in {*wanted, "torch"}}

    class OnGpu:
        device = torch.device("cuda")

    monkeypatch.setattr(region_choice, "make_runners", spies)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
    weights = cast("dict[str, Tensor]", {"embed": OnGpu()})
    chosen = choose_regions("auto", manifest, "target", weights, Path("plans"))

    def who(region: str, rows: int) -> str:
        return next(iter(chosen.run(region, 0, {"x": torch.zeros(rows, 1)})))

    otherwise = "plans" if tuned_plans else "fused"  # what was timed and never chosen is not loaded
    assert who("block", 8) == "fused"
    assert who("block", 60) == ("plans" if tuned_plans else "fused")
    assert who("head", 8) == otherwise
    assert who("block", 500) == ("plans" if tuned_plans else "torch")


def test_tuning_without_a_gpu_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["--tune", str(tmp_path)]) == 1
    assert "needs a CUDA GPU" in capsys.readouterr().err
