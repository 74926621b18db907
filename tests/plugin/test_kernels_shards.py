"""The kernels of a tensor-parallel rank against their references, under the interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from smc_build.model_config import ModelConfig, RopeConfig
from smc_build.sharding import rank_config
from smc_build.weights import weight_shapes
from smc_engines.fused_regions import FusedRegions
from smc_engines.parallel.sums import RankSums
from smc_engines.regions import TorchRegions
from smc_plugin.kernels import residual_norm
from smc_plugin.kernels import shards as kernels
from smc_plugin.reference import residual_norm as reference_norm
from smc_plugin.reference import shards
from tests.plugin.test_kernels_sampling import INF, logits, names, padded
from tests.tiny_models import in_fp8

WIDTH = 1204  # two tiles, the last one ragged
CONFIG = ModelConfig(
    *("qwen2", 300, 64, 3, 6, 3, 16, 96, 1e-5, RopeConfig(1e4), 128), True, False, True, None, ()
)  # fmt: skip


@pytest.mark.parametrize("rank", [0, 1])
def test_statistics_are_the_references(rank: int) -> None:
    values = padded(logits(6, WIDTH, seed=rank))
    values[2, 50:] = -INF
    temperature = torch.tensor([0.7, 1.0, 2.0, 0.05, 1.3, 1.0])
    alpha = torch.tensor([1.0, 4.0, 0.5, 1.0, 2.0, 1.0])
    rows = torch.tensor([3, 0, 2, 2, 5, 1])
    tokens = torch.tensor([-1, 0, WIDTH - 1, WIDTH, 2 * WIDTH - 1, 700])
    cases: tuple[dict[str, Any], ...] = (
        {"names": names(6)},
        {"names": names(6), "alpha": alpha, "rows": rows},
        {"tokens": tokens},
        {"tokens": tokens, "alpha": alpha},
    )
    for options in cases:
        for heat in (temperature, None):
            ours = kernels.shard_stats(values, heat, rank * WIDTH, **options)
            theirs = shards.shard_stats(values, heat, rank * WIDTH, **options)
            columns = [shards.TOP, shards.TOTAL, shards.POWERED_TOP, shards.POWERED_TOTAL, shards.CHOSEN]
            torch.testing.assert_close(ours[:, columns], theirs[:, columns], rtol=1e-5, atol=1e-6)
            if "names" in options:
                assert torch.equal(ours[:, shards.TOKEN], theirs[:, shards.TOKEN])
                torch.testing.assert_close(ours[:, shards.RACE], theirs[:, shards.RACE], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 3])
def test_combining_is_the_references(ranks: int) -> None:
    alpha = torch.tensor([1.0, 4.0, 0.5])
    tokens = torch.tensor([-1, 3, WIDTH + 5])
    drawn = torch.stack(
        [shards.shard_stats(logits(3, WIDTH, rank), None, rank * WIDTH, names(3), alpha) for rank in range(ranks)]
    )
    drawn[1, 2, [shards.TOP, shards.RACE]] = -INF
    scored = torch.stack(
        [shards.shard_stats(logits(3, WIDTH, rank), None, rank * WIDTH, tokens=tokens) for rank in range(ranks)]
    )
    for stats, power, given in ((drawn, alpha, None), (drawn, None, None), (scored, None, tokens)):
        ours, theirs = kernels.combine(stats, power, given), shards.combine(stats, power, given)
        assert torch.equal(ours.tokens, theirs.tokens)
        for name in ("log_prob", "lse", "log_zeta"):
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-5)


def test_a_nan_reaches_the_sum() -> None:
    values = logits(2, WIDTH)
    values[1, 9] = float("nan")
    stats = kernels.shard_stats(values, None, WIDTH, names(2))[None]
    found = kernels.combine(torch.cat([stats, kernels.shard_stats(logits(2, WIDTH), None, 0, names(2))[None]]))
    assert found.lse.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_add_and_norm_is_the_reference(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = (padded(torch.randn((5, 200), generator=generator).to(dtype)) for _ in range(2))
    weight = torch.rand(200, generator=generator).to(dtype)
    ours, theirs = (module.add_and_norm(x, residual, weight, 1e-5) for module in (residual_norm, reference_norm))
    assert torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1])


class Doubling:
    """Two ranks with equal parts."""

    rank, size, shares_memory = 0, 2, True

    def all_reduce(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("region", ["feed_forward", "next_qkv", "final"])
def test_a_piece_sums_the_ranks_itself(region: str) -> None:
    """It gives what the piece gives of the sum; where the sum is not its own, it says so."""
    config = rank_config(CONFIG, 2)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(shape, generator=generator) / shape[0] ** 0.5 for name, shape in weight_shapes(config).items()
    }
    weights["lm_head"] = weights["embed"][: config.vocab_size].contiguous()
    ranks: Any = Doubling()

    def fused(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return reference_norm.add_and_norm(2 * x, residual, weight, eps)

    kernel: Any = fused
    sums = RankSums(ranks, {"one_shot": kernel})
    sums.choose({16: {"steps": 2.0, "one_shot": 1.0}, 64: {"steps": 1.0, "one_shot": 2.0}})
    runner = FusedRegions(config, weights, sums=sums)
    assert runner.sums_ranks(region, 9)
    assert not runner.sums_ranks(region, 20)
    assert not runner.sums_ranks("attn_out", 9)
    assert not FusedRegions(config, weights).sums_ranks(region, 9)
    partial, residual = torch.randn((2, 9, 64), generator=generator)
    layer = None if region == "final" else 1
    ours = runner.run(region, layer, {"partial": partial, "residual": residual})
    theirs = TorchRegions(config, weights).run(region, layer, {"reduced": 2 * partial, "residual": residual})
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("region", ["entry", "attn_out", "feed_forward", "next_qkv", "final", "head"])
def test_fused_pieces_say_what_torch_says(region: str, fp8: bool) -> None:
    config = rank_config(CONFIG, 2)
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: torch.randn(shape, generator=generator) / shape[0] ** 0.5 for name, shape in weight_shapes(config).items()
    }
    weights = in_fp8(weights) if fp8 else weights
    weights["lm_head"] = weights["embed"][: config.vocab_size].contiguous()
    widths = {"x": 64, "attn": config.q_size, "reduced": 64, "residual": 64, "hidden": 64}
    taken = {"entry": ("x",), "attn_out": ("attn",), "head": ("hidden",)}.get(region, ("reduced", "residual"))
    given: dict[str, Tensor] = {name: torch.randn((9, widths[name]), generator=generator) for name in taken}
    layer = 1 if region in ("attn_out", "feed_forward", "next_qkv") else None
    ours, theirs = (runner(config, weights).run(region, layer, given) for runner in (FusedRegions, TorchRegions))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=1e-5)
