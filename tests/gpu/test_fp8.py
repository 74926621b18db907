"""FP8 weights and KV pages on a GPU: products, attention, regions, plans, tuning and whole rounds."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from smc_build import cli
from smc_build.builder import BuildOptions, build_engine
from smc_build.dtypes import torch_dtype
from smc_build.network import layer_inputs, region_specs
from smc_build.plans import build_plan, used_regions
from smc_build.precision import resolve
from smc_build.tensorrt_api import find
from smc_build.torch_ops import Fp8InputOps, TorchOps
from smc_build.weights import random_weights
from smc_engines.config import ExecutorConfig
from smc_engines.engine import Engine
from smc_engines.executor import Executor
from smc_engines.fused_regions import FusedRegions
from smc_engines.plan_runner import PlanRegions
from smc_engines.regions import TorchRegions
from smc_engines.sampling_params import SamplingParams
from smc_plugin.kernels import attention, launch, matmul, pages
from smc_plugin.reference import attention as attention_reference
from tests.gpu.helpers import DEVICE, captured, normal, relative_error
from tests.gpu.test_plans import small_config
from tests.tiny_models import make_checkpoint
from tests.toy import assert_empty

FP8, F32 = torch.float8_e4m3fn, torch.float32
PRECISION, WITH_HEAD = (resolve("fp8", None, head, None)[0] for head in (None, "fp8"))


def fp8_matrix(columns: int, inner: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """An FP8 matrix [columns, inner], its scales, and what they stand for in float64."""
    values = normal(columns, inner, dtype=F32, seed=seed) * inner**-0.5
    scale = values.abs().amax(dim=1) / 448 * torch.linspace(0.5, 2, columns, device=DEVICE)
    weight = (values / scale[:, None]).clamp(-448, 448).to(FP8)
    return weight, scale, weight.double() * scale[:, None].double()


@pytest.mark.parametrize("pdl", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32])
def test_every_fp8_value_is_read_exactly(dtype: torch.dtype, pdl: bool) -> None:
    """With dependent launch bfloat16 takes the integer instructions, without it Triton's conversion."""
    values = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    values = torch.where(values.isnan(), 0.0, values)
    weight = values.repeat(4).view(16, 64).t().contiguous().to(FP8).to(DEVICE)  # [64 columns, 16 inner]
    with launch.pdl(pdl):
        ours = matmul.linear(torch.eye(16, device=DEVICE, dtype=dtype), weight, None, None, True, F32, None,
                             torch.ones(64, device=DEVICE))  # fmt: skip
    assert torch.equal(ours, weight.float().t())


@pytest.mark.parametrize("rows", [1, 8, 16, 72])
@pytest.mark.parametrize(("inner", "columns"), [(4096, 6144), (2048, 2048), (14336, 4096), (8192, 2048)])
def test_products(rows: int, inner: int, columns: int) -> None:
    weight, scale, meant = fp8_matrix(columns, inner)
    x, residual = normal(rows, inner), normal(rows, columns)
    ours = captured(
        lambda: matmul.linear(x, weight, None, residual, True, None, None, scale), lambda out: out.fill_(math.nan)
    )
    assert relative_error(ours, x.double() @ meant.t() + residual.double()) < 1e-2


@pytest.mark.parametrize("rows", [8, 72])
@pytest.mark.parametrize("gated", [False, True])
def test_every_candidate_tactic_computes_the_same(rows: int, gated: bool) -> None:
    weight, scale, meant = fp8_matrix(2 * 1536, 2048)
    x = normal(rows, 2048)
    product = x.double() @ meant.t()
    gate, up = product.chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up if gated else product
    sizes = matmul.Product(rows, 1536 if gated else 3072, 2048, gated, 1, 2)
    candidates = matmul.candidate_tactics(sizes, launch.gpu_of(x.device))
    assert len(candidates) > 3
    for tactic in candidates:
        if gated:
            ours = matmul.gated(x, weight, tactic, True, scale)
        else:
            ours = matmul.linear(x, weight, None, None, True, None, tactic, scale)
        assert relative_error(ours, expected) < 1e-2, tactic


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("queries", [1, 2, 9, 128])
def test_attention_over_fp8_pages(queries: int, head_dim: int) -> None:
    heads, kv_heads, page, batch = 32, 8, 16, 4
    starts = torch.tensor([0, 5, 300, 700], device=DEVICE)
    columns = (700 + queries) // page + 2
    table = torch.randperm(batch * columns, device=DEVICE).add(1).view(batch, columns).to(torch.int32)
    cache = normal(2, batch * columns + 1, page, kv_heads, head_dim).to(FP8)
    inv_freq = 10000.0 ** -(torch.arange(head_dim // 2, device=DEVICE) / (head_dim // 2))
    qkv = normal(batch * queries, (heads + 2 * kv_heads) * head_dim)
    qkv[:, -8:] *= 1000  # values beyond 448
    theirs, ours = cache.clone(), cache.clone()
    shared = starts, queries, table, page, inv_freq, 700 + queries
    expected = attention_reference.attend(qkv, theirs, attention_reference.make_context(*shared), heads)
    found = attention.attend(qkv, ours, attention.make_context(*shared), heads)
    assert relative_error(found, expected) < 2e-2
    same = ours.view(torch.uint8) == theirs.view(torch.uint8)
    assert same.float().mean() > 0.995  # a value on the edge between two may fall to either side
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.13, atol=0.01)
    assert ours.float().abs().max() == 448


def test_fp8_pages_are_copied() -> None:
    cache = normal(3, 2, 9, 16, 8, 64).to(FP8)
    before = cache.clone()
    index = torch.tensor([[3, 0], [7, 0]], dtype=torch.int32, device=DEVICE)
    pages.copy_pages(cache, index, index + torch.tensor([[1, 0], [1, 0]], dtype=torch.int32, device=DEVICE))
    moved, before = cache.view(torch.uint8), before.view(torch.uint8)
    assert torch.equal(moved[:, :, 4], before[:, :, 3])
    assert torch.equal(moved[:, :, 8], before[:, :, 7])
    assert torch.equal(moved[:, :, [1, 2, 3, 5, 6, 7]], before[:, :, [1, 2, 3, 5, 6, 7]])


def activations(config, region: str, rows: int) -> dict[str, Tensor]:
    bound = layer_inputs(config, region, 0 if region == "block" else None, PRECISION)
    return {
        spec.name: normal(rows, int(spec.shape[1]))
        for spec in region_specs(config, PRECISION)[region].inputs
        if spec.name not in bound
    }


def expected(config, weights, ops, region: str, layer: int | None, given: dict[str, Tensor]) -> dict[str, Tensor]:
    return TorchRegions(config, weights, ops).run(region, layer, given)


@pytest.mark.parametrize("precision", [PRECISION, WITH_HEAD])
@pytest.mark.parametrize("rows", [1, 8, 27, 72, 128])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_fused_regions_agree_with_dequantized_weights(family: str, rows: int, precision) -> None:
    config = small_config(family)
    if precision == WITH_HEAD:
        config = type(config).from_dict({**config.to_dict(), "tied_head": False})
    weights = dict(random_weights(config, precision, 0, DEVICE))
    runner = FusedRegions(config, weights)
    for region, layer in (("entry", None), ("block", 0), ("block", 1), ("exit", None), ("head", None)):
        given = activations(config, region, rows)
        found = runner.run(region, layer, given)
        for name, tensor in expected(config, weights, TorchOps(), region, layer, given).items():
            assert relative_error(found[name], tensor) < 2e-2, (region, name)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_plans_agree_with_rounded_inputs(family: str) -> None:
    api = find("tensorrt-rtx") or find("tensorrt")
    if api is None:
        pytest.fail("a GPU machine runs these tests with the extra tensorrt-rtx (or tensorrt) installed")
    config = small_config(family)
    weights = dict(random_weights(config, PRECISION, 0, DEVICE))
    specs = region_specs(config, PRECISION)
    plans = [(region, 16, build_plan(api, specs[region], 16).data) for region in used_regions(config)]
    runner = PlanRegions(api, config, weights, plans)
    runner.warm_up()
    for region in used_regions(config):
        layer = 1 if region == "block" else None
        given = activations(config, region, 13)
        found = runner.run(region, layer, given)
        for name, tensor in expected(config, weights, Fp8InputOps(), region, layer, given).items():
            assert relative_error(found[name], tensor) < 5e-2, (region, name)


def test_a_tuned_fp8_engine_answers_as_the_torch_regions_do(tmp_path: Path) -> None:
    sizes = {"hidden": 256, "heads": 4, "kv_heads": 2, "ffn": 512, "dtype": "bfloat16"}
    checkpoint = make_checkpoint(tmp_path / "model", layers=3, seed=1, **sizes)
    options = BuildOptions(
        str(checkpoint), draft=str(checkpoint), dtype="fp8", particles=4, draft_tokens=2, groups=1, max_seq_len=128,
        random_weights=True, output=tmp_path / "engine",
    )  # fmt: skip
    path = build_engine(options)
    assert cli.main(["--tune", str(path)]) == 0
    tokens = torch.randint(260, (4, 3), device=DEVICE)
    table = torch.arange(1, 5, device=DEVICE, dtype=torch.int32).view(4, 1)
    logits = []
    for regions in ("torch", "fused"):
        model = Engine.from_dir(path, ExecutorConfig(device="cuda", regions=regions)).target
        hidden = model.forward(tokens, torch.zeros(4, dtype=torch.int64, device=DEVICE), table, 3)
        logits.append(model.logits(hidden))
    assert relative_error(logits[1], logits[0]) < 5e-2


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_mode_runs_in_fp8(tmp_path: Path, family: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", family, hidden=256, heads=4, kv_heads=2, ffn=512, layers=2)
    options = BuildOptions(
        str(checkpoint), str(checkpoint), dtype="fp8", head_dtype="fp8", kv_dtype="fp8", max_seq_len=128,
        compiler="torch",
    )  # fmt: skip
    executor = Executor(Engine.from_random(options, ExecutorConfig(device="cuda")))
    assert executor.engine.target.cache.dtype == torch_dtype("float8_e4m3fn")
    prompts = [(1, 2, 3)] * 3
    each = [
        SamplingParams(mode=mode, num_particles=4, num_draft_tokens=3, max_tokens=40, seed=3, ignore_eos=True)
        for mode in ("smc", "target", "speculative")
    ]
    outputs = executor.generate(prompts, each)
    assert [len(output.token_ids) for output in outputs] == [40, 40, 40]
    assert_empty(executor)
