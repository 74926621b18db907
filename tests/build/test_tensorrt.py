"""Regions recorded and compiled by the real TensorRT-RTX builder, which needs no GPU."""

import dataclasses
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from smc_build import tensorrt_api
from smc_build.checkpoint import Checkpoint
from smc_build.cli import main
from smc_build.dtypes import torch_dtype
from smc_build.engine_dir import load_manifest
from smc_build.model_config import ModelConfig
from smc_build.network import RegionSpec, TensorSpec, region_specs
from smc_build.plan import row_buckets
from smc_build.plans import build_network, build_plan, build_plans, static_shape, used_regions
from smc_build.precision import resolve
from smc_build.presets import PRESETS
from smc_build.sharding import rank_config
from smc_build.tensorrt_api import TensorrtApi, find, load
from smc_build.torch_ops import Fp8InputOps, TorchOps
from smc_plugin.errors import ConfigError, EngineDirError, SmcError
from tests.build.network_interpreter import interpret
from tests.tiny_models import make_checkpoint

FAMILIES = {"llama": {}, "qwen2": {"tied": True}, "qwen3": {"head_dim": 24, "kv_heads": 1}}
REGIONS = ("entry", "block", "exit", "head")


@pytest.fixture(scope="module")
def api() -> TensorrtApi:
    found = find("tensorrt-rtx")
    if found is None:
        pytest.skip("needs the extra tensorrt-rtx")
    return found


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    out = {}
    for family, options in FAMILIES.items():
        folder = make_checkpoint(tmp_path_factory.mktemp("models") / family, family, tokenizer=False, **options)
        with Checkpoint(folder) as checkpoint:
            out[family] = checkpoint.config
    return out


def random_inputs(spec: RegionSpec, rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for tensor in spec.inputs:
        shape = static_shape(tensor, rows)
        values = torch.randn(shape, generator=generator)
        is_weight = tensor.shape[0] != "rows" and len(shape) == 2
        inputs[tensor.name] = (values / shape[0] ** 0.5 if is_weight else values).to(torch_dtype(tensor.dtype))
    return inputs


def random_fp8_inputs(spec: RegionSpec, rows: int) -> dict[str, torch.Tensor]:
    """The same with FP8 matrices and scales that make sense; nothing changes where there are none."""
    inputs = random_inputs(spec, rows)
    for tensor in spec.inputs:
        if tensor.name.endswith("_input_scale"):
            inputs[tensor.name] = torch.tensor([0.011])
        elif tensor.name.endswith("_scale"):
            inputs[tensor.name] = inputs[tensor.name].abs() / 100 + 0.003
        elif tensor.dtype == "float8_e4m3fn":
            inputs[tensor.name] = (inputs[tensor.name].float() * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
    return inputs


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_region_compiles_with_the_spec_as_its_interface(
    api: TensorrtApi, configs: dict[str, ModelConfig], family: str, region: str, dtype: str
) -> None:
    spec = region_specs(configs[family], dtype)[region]
    recorded = build_network(api, spec, 16)
    network = recorded.network
    found: list[Any] = [network.get_input(index) for index in range(network.num_inputs)]
    found += [network.get_output(index) for index in range(network.num_outputs)]
    names = {"bfloat16": "BF16", "float32": "FLOAT"}
    expected = [(tensor.name, static_shape(tensor, 16), names[tensor.dtype]) for tensor in spec.inputs]
    expected += [(tensor.name + "_out", static_shape(tensor, 16), names[tensor.dtype]) for tensor in spec.outputs]
    assert [(tensor.name, tuple(tensor.shape), tensor.dtype.name) for tensor in found] == expected
    assert ("qkv_bias" in str(expected)) == (family == "qwen2" and region in ("entry", "block"))
    plan = build_plan(api, spec, 16)
    assert (plan.region, plan.rows) == (region, 16)
    # Shapes are static and weights are inputs: the plan holds kernels, not a byte of a weight.
    assert all(name.encode() in plan.data for name, _, _ in expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8"])
@pytest.mark.parametrize("region", ["attn_out", "feed_forward", "next_qkv", "final", "head"])
def test_a_ranks_regions_compile_and_mean_what_torch_computes(
    api: TensorrtApi, configs: dict[str, ModelConfig], region: str, dtype: str
) -> None:
    own = rank_config(configs["qwen2"], 2)
    spec = region_specs(own, resolve(dtype, None, None, None)[0])[region]
    recorded, inputs = build_network(api, spec, 16), random_fp8_inputs(spec, 16)
    ours = interpret(api.trt, recorded.network, recorded.ops.constants, inputs)
    for name, tensor in spec.build(Fp8InputOps(), inputs).items():
        scale = tensor.float().abs().max()
        assert (ours[f"{name}_out"].float() - tensor.float()).abs().max() < (4e-2 if dtype == "fp8" else 2e-2) * scale
    plan = build_plan(api, spec, 16)
    assert all(tensor.name.encode() in plan.data for tensor in (*spec.inputs, *spec.outputs))


def test_an_engine_of_two_ranks_holds_one_set_of_plans(api: TensorrtApi, tmp_path: Path) -> None:
    """Every rank has the same shapes, so all of them run the same plans."""
    model = make_checkpoint(tmp_path / "t", "llama", tokenizer=False)
    command = ["--checkpoint", str(model), "--draft", str(model), "--tp", "2", "--draft-tp", "1", "--dtype", "bfloat16"]
    command += ["--particles", "2", "--draft-tokens", "1", "--groups", "1", "--compiler", "tensorrt-rtx", "--no-tune"]
    assert main([*command, "--output", str(tmp_path / "e")]) == 0
    files = load_manifest(tmp_path / "e").plans["files"]
    assert list(files["target"]) == ["entry", "attn_out", "feed_forward", "next_qkv", "final", "head"]
    assert list(files["draft"]) == ["entry", "block", "exit", "head"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_recorded_network_means_what_torch_computes(
    api: TensorrtApi, configs: dict[str, ModelConfig], family: str, region: str, dtype: str, tolerance: float
) -> None:
    spec = region_specs(configs[family], dtype)[region]
    recorded, inputs = build_network(api, spec, 16), random_inputs(spec, 16)
    ours = interpret(api.trt, recorded.network, recorded.ops.constants, inputs)
    theirs = spec.build(TorchOps(), inputs)
    for name, tensor in theirs.items():
        assert ours[f"{name}_out"].dtype == tensor.dtype
        scale = tensor.float().abs().max()
        assert (ours[f"{name}_out"].float() - tensor.float()).abs().max() < tolerance * scale


@pytest.mark.parametrize("head_dtype", ["bfloat16", "fp8"])
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_fp8_regions_compile_and_mean_what_torch_computes(
    api: TensorrtApi, configs: dict[str, ModelConfig], family: str, region: str, head_dtype: str
) -> None:
    precision = resolve("fp8", None, head_dtype, None)[0]
    config = dataclasses.replace(configs[family], tied_head=False)
    spec = region_specs(config, precision)[region]
    inputs = random_fp8_inputs(spec, 16)
    recorded = build_network(api, spec, 16)
    kinds = [recorded.network.get_layer(index).type for index in range(recorded.network.num_layers)]
    products = sum(tensor.dtype == "float8_e4m3fn" for tensor in spec.inputs)
    assert products == (head_dtype == "fp8" if region == "head" else {"entry": 1, "block": 4, "exit": 3}[region])
    assert kinds.count(api.trt.LayerType.QUANTIZE) == products
    ours = interpret(api.trt, recorded.network, recorded.ops.constants, inputs)
    for name, tensor in spec.build(Fp8InputOps(), inputs).items():
        scale = tensor.float().abs().max()
        assert (ours[f"{name}_out"].float() - tensor.float()).abs().max() < 4e-2 * scale
    plan = build_plan(api, spec, 16)
    assert all(tensor.name.encode() in plan.data for tensor in spec.inputs)


def test_a_plan_is_a_function_of_the_shapes(api: TensorrtApi, configs: dict[str, ModelConfig]) -> None:
    spec = region_specs(configs["llama"], "bfloat16")["block"]
    once, again, other = (build_plan(api, spec, rows).data for rows in (16, 16, 32))
    assert once == again
    assert once != other


def test_llama_70b_compiles_in_under_a_minute(api: TensorrtApi) -> None:
    config, started = PRESETS["llama-70b"].config, time.perf_counter()
    plans = list(build_plans(api, config, "bfloat16", row_buckets(8, 8, 4)))
    assert len(plans) == 4 * 7
    assert sum(len(plan.data) for plan in plans) < 20e6
    assert time.perf_counter() - started < 60


def test_a_single_layer_has_no_block(configs: dict[str, ModelConfig]) -> None:
    one = ModelConfig.from_dict({**configs["llama"].to_dict(), "num_layers": 1})
    assert used_regions(one) == ("entry", "exit", "head")
    assert used_regions(configs["llama"]) == REGIONS


def test_single_rows_are_refused(api: TensorrtApi, configs: dict[str, ModelConfig]) -> None:
    with pytest.raises(ConfigError, match="row bucket 1 is slow as a plan, expected 8 or more"):
        build_network(api, region_specs(configs["llama"], "bfloat16")["head"], 1)


def test_what_tensorrt_says_is_in_the_error(api: TensorrtApi) -> None:
    wrong = RegionSpec(
        "head",
        (TensorSpec("hidden", ("rows", 64), "bfloat16"), TensorSpec("lm_head", (260, 32), "bfloat16")),
        (TensorSpec("logits", ("rows", 260), "bfloat16"),),
        lambda ops, t: {"logits": ops.matmul(t["hidden"], t["lm_head"], transpose_w=True)},
    )
    with pytest.raises(SmcError, match=r"(?s)could not record region head .*dimension"):
        build_network(api, wrong, 16)


def test_an_output_of_another_type_is_refused(api: TensorrtApi) -> None:
    wrong = RegionSpec(
        "head",
        (TensorSpec("hidden", ("rows", 64), "bfloat16"), TensorSpec("lm_head", (260, 64), "bfloat16")),
        (TensorSpec("logits", ("rows", 260), "float32"),),
        lambda ops, t: {"logits": ops.matmul(t["hidden"], t["lm_head"], transpose_w=True)},
    )
    with pytest.raises(SmcError, match=r"gives logits as DataType.BF16 .*, expected DataType.FLOAT"):
        build_network(api, wrong, 16)


def test_load_resolves_the_compiler(api: TensorrtApi) -> None:
    assert load("auto", "bfloat16") is api
    assert load("tensorrt-rtx", "float32") is api
    assert load("auto", "float32") is None
    assert load("torch", "bfloat16") is None
    with pytest.raises(ConfigError, match="did you mean 'tensorrt'"):
        load("tensort", "bfloat16")


def fake(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    """Pretend that only these TensorRT modules are installed."""
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, modules.get(name))
    tensorrt_api.find.cache_clear()
    monkeypatch.setattr(tensorrt_api, "find", tensorrt_api.find.__wrapped__)


@pytest.mark.parametrize("compiler", ["tensorrt", "tensorrt-rtx"])
def test_a_compiler_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, compiler: str) -> None:
    fake(monkeypatch)
    with pytest.raises(ConfigError, match=rf"not installed.*pip install 'smc-engine\[{compiler}\]'"):
        load(compiler, "bfloat16")
    assert load("auto", "bfloat16") is None


def test_type_stubs_are_not_an_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    """tensorrt-stubs installs a folder `tensorrt` with nothing to run; importing it succeeds."""
    fake(monkeypatch, tensorrt=ModuleType("tensorrt"))
    with pytest.raises(ConfigError, match="it is not installed"):
        load("tensorrt", "bfloat16")


def test_an_old_version_is_refused(monkeypatch: pytest.MonkeyPatch, api: TensorrtApi) -> None:
    fake(monkeypatch, tensorrt=SimpleNamespace(Builder=object, ILogger=api.trt.ILogger, __version__="10.13.3"))
    with pytest.raises(ConfigError, match=r"version 10.13.3 is installed, expected 10.14 or later"):
        load("tensorrt", "bfloat16")


def test_full_tensorrt_builds_on_gpu_machines_only(monkeypatch: pytest.MonkeyPatch, api: TensorrtApi) -> None:
    fake(monkeypatch, tensorrt=SimpleNamespace(Builder=object, ILogger=api.trt.ILogger, __version__="11.1.0"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="its builder needs a GPU"):
        load("tensorrt", "bfloat16")


def test_gpus_that_plans_do_not_run_on(monkeypatch: pytest.MonkeyPatch, api: TensorrtApi) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineDirError, match="torch sees none"):
        api.check_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    api.check_gpu()
    with pytest.raises(EngineDirError, match="built for sm_89, this GPU is sm_90"):
        api.check_gpu("sm_89")
    monkeypatch.setattr(api, "version", "1.7.1.116")
    with pytest.raises(EngineDirError, match=r"refuses Hopper GPUs.*tensorrt-rtx-cu13-libs==1.6.1.120"):
        api.check_gpu()


def test_smc_build_writes_plans_and_says_so(
    api: TensorrtApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(tmp_path / "t", "qwen2", layers=2)
    make_checkpoint(tmp_path / "d", "qwen2", layers=1)
    monkeypatch.chdir(tmp_path)
    options = ["--checkpoint", "t", "--draft", "d", "--groups", "1", "--particles", "4", "--draft-tokens", "2"]
    assert main([*options, "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert f"tensorrt-rtx {api.version}: plans for any GPU it supports" in out
    assert "target t: 8 plans compiled in " in out
    assert "draft d: 6 plans compiled in " in out
    manifest = load_manifest("engines/t-tp1")
    assert manifest.compiler == "tensorrt-rtx"
    assert {key: manifest.plans[key] for key in ("compiler", "version", "gpu")} == {
        "compiler": "tensorrt-rtx", "version": api.version, "gpu": "portable",
    }  # fmt: skip
    listed = [name for role in manifest.plans["files"].values() for region in role.values() for name in region.values()]
    assert sorted(listed) == sorted(name for name in manifest.files if name.endswith(".plan"))
    assert len(listed) == 14
    assert manifest.plans["files"]["target"]["block"] == {
        "8": "target/plans/block.8.plan", "16": "target/plans/block.16.plan",
    }  # fmt: skip
    assert main(["--inspect", "engines/t-tp1"]) == 0
    assert f"14 plans of tensorrt-rtx {api.version} (GPU: portable)" in capsys.readouterr().out


def test_torch_engines_have_no_plans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoint(tmp_path / "t", layers=1)
    monkeypatch.chdir(tmp_path)
    assert main(["--checkpoint", "t", "--draft", "none", "--dtype", "bfloat16", "--compiler", "torch"]) == 0
    assert "compiler     torch: regions run as they are, no plans" in capsys.readouterr().out
    manifest = load_manifest("engines/t-tp1")
    assert (manifest.compiler, manifest.plans) == ("torch", {})
    assert not any(name.endswith(".plan") for name in manifest.files)
