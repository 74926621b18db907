"""Regions on the fused kernels against float64, and tuning an engine directory from the command line."""

import contextlib
import copy
import dataclasses
import math
from pathlib import Path

import pytest
import torch

from smc_build import cli
from smc_build.builder import BuildOptions, build_engine
from smc_build.engine_dir import load_manifest, write_manifest
from smc_engines.config import ExecutorConfig
from smc_engines.engine import Engine
from smc_engines.executor import Executor
from smc_engines.fused_regions import FusedRegions
from smc_engines.region_choice import shape_of
from smc_engines.sampling_params import SamplingParams
from smc_engines.tactics import tactics_of
from smc_plugin.kernels.launch import gpu_of
from smc_plugin.kernels.whole_pass import WholePass
from tests.gpu.test_plans import activations, exact, random_weights, small_config
from tests.tiny_models import make_checkpoint


@pytest.mark.parametrize("rows", [1, 8, 27, 72, 128])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_fused_regions_agree_with_float64(family: str, rows: int) -> None:
    config = small_config(family)
    weights = random_weights(config, "bfloat16")
    runner = FusedRegions(config, weights)
    for region, layer in (("entry", None), ("block", 0), ("block", 1), ("exit", None), ("head", None)):
        given = activations(config, region, "bfloat16", rows)
        found = runner.run(region, layer, given)
        for name, tensor in exact(config, weights, region, layer, given).items():
            error = (found[name].double() - tensor.double()).abs().max() / tensor.double().abs().max()
            assert float(error) < 1e-2, (region, name)
            assert not math.isnan(float(error)), (region, name)


def test_a_tuned_engine_directory_runs_what_was_fastest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was recorded is what is loaded, and tuning again times again what the first time did not choose."""
    sizes = {"hidden": 256, "heads": 4, "kv_heads": 2, "ffn": 512, "dtype": "bfloat16"}
    checkpoint = make_checkpoint(tmp_path / "model", layers=3, seed=1, **sizes)
    options = BuildOptions(
        str(checkpoint), draft=str(checkpoint), dtype="bfloat16", particles=4, draft_tokens=2, groups=1, max_seq_len=128,
        output=tmp_path / "engine",
    )  # fmt: skip
    path = build_engine(options)
    has_plans = bool(load_manifest(path).plans)
    assert cli.main(["--tune", str(path)]) == 0
    capsys.readouterr()
    assert cli.main(["--inspect", str(path)]) == 0
    table = capsys.readouterr().out
    assert "target block   12 rows" in table
    tactics = tactics_of(load_manifest(path).tactics, "draft", torch.cuda.get_device_name())
    assert tactics is not None
    assert set(tactics.regions["block"]) == {1, 2, 4, 8}
    timed = tactics.regions["block"][8]
    assert set(timed.us) == {"torch", "fused", *(["plans"] if has_plans else [])}
    suits = WholePass.suits(shape_of(load_manifest(path).model("draft").config), gpu_of(torch.device("cuda", 0)))
    assert (tactics.whole_pass is not None) == suits
    for choice in ("steps", "whole") if suits else ():
        manifest = load_manifest(path)
        tactics_then = copy.deepcopy(manifest.tactics)
        tactics_then["models"]["draft"]["whole_pass"]["choice"] = choice
        write_manifest(path, dataclasses.replace(manifest, tactics=tactics_then))
        with contextlib.closing(Engine.from_dir(path, ExecutorConfig(device="cuda"))) as engine:
            assert engine.draft is not None
            assert (engine.draft.whole_pass is not None) == (choice == "whole")
            assert engine.target.whole_pass is None
        assert cli.main(["--tune", str(path)]) == 0
        again = tactics_of(load_manifest(path).tactics, "draft", torch.cuda.get_device_name())
        assert again is not None
        assert again.whole_pass is not None
        assert set(again.whole_pass.us) == {"whole", "steps"}
        us = again.whole_pass.us
        assert again.whole_pass.choice == ("whole" if us["whole"] < us["steps"] else "steps")
    executor = Executor.from_engine_dir(path, ExecutorConfig(device="cuda"))
    params = SamplingParams(num_particles=4, num_draft_tokens=2, max_tokens=20, ignore_eos=True, seed=3)
    output = executor.generate([[1, 2, 3]], params)[0]
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 20
