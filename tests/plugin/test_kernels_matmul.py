"""Skinny matrix products against float64 torch, under the interpreter."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from smc_plugin.kernels import matmul as kernels
from smc_plugin.kernels.launch import Gpu
from smc_plugin.kernels.matmul import Prenormed, Product, Tactic

EPS = 1e-5
TACTICS = {
    "default": None,
    "split": Tactic(16, 32, 32, 3, 4, 3),
    "tall": Tactic(32, 16, 16, 1, 4, 3),
    "wide": Tactic(16, 64, 64, 2, 4, 3),
    "swapped": Tactic(16, 32, 32, 2, 4, 3, 0, True),
    "tailed": Tactic(16, 32, 32, 2, 4, 3, 0, True, 16),
    "tailed, not swapped nor split": Tactic(32, 16, 16, 1, 4, 3, tail=16),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return weight.double() * wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPS)


def assert_near(ours: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    assert ours.isfinite().all()
    assert (ours.double() - expected).abs().max() <= tolerance * expected.abs().max()


def poisoned(x: Tensor) -> Tensor:
    """x inside a larger tensor whose other rows and columns are NaN."""
    wide = torch.full((x.shape[0] + 3, x.shape[1] + 16), float("nan"), dtype=x.dtype)
    wide[: x.shape[0], : x.shape[1]] = x
    return wide[: x.shape[0], : x.shape[1]]


def prenormed(x: Tensor, scale: Tensor, parts: int) -> Prenormed:
    """What a product that made x hands to the next, with the columns in `parts` stretches."""
    squares = torch.stack([part.square().sum(dim=-1) for part in x.chunk(parts, dim=-1)])
    return Prenormed(x * scale, squares, EPS)


@pytest.mark.parametrize("tactic", TACTICS)
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 64, 32), (5, 96, 48), (18, 200, 66)])
def test_linear_with_everything_around_it(tactic: str, rows: int, inner: int, columns: int) -> None:
    x, weight, bias, residual = normal(rows, inner), normal(inner, columns), normal(columns), normal(rows, columns)
    scale = normal(inner)
    ours = kernels.linear(prenormed(x, scale, 4), weight, bias, residual, tactic=TACTICS[tactic])
    assert_near(ours, norm(x, scale) @ weight.double() + bias.double() + residual.double())
    plain = kernels.linear(poisoned(x), weight.t().contiguous(), transpose_w=True, tactic=TACTICS[tactic])
    assert_near(plain, x.double() @ weight.double())


@pytest.mark.parametrize("tactic", TACTICS)
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 64, 32), (5, 96, 48), (18, 200, 66)])
def test_a_norm_between_two_products(tactic: str, rows: int, inner: int, columns: int) -> None:
    x, weight, residual, scale = normal(rows, inner), normal(inner, columns), normal(rows, columns), normal(columns)
    second = normal(columns, 40)
    ours, following = kernels.linear_and_norm(poisoned(x), weight, residual, (scale, EPS), TACTICS[tactic])
    expected = x.double() @ weight.double() + residual.double()
    assert_near(ours, expected)
    assert_near(following.squares.sum(dim=0), expected.square().sum(dim=-1))
    assert_near(kernels.linear(following, second, tactic=TACTICS[tactic]), norm(expected, scale) @ second.double())


@pytest.mark.parametrize("tactic", TACTICS)
def test_gated(tactic: str) -> None:
    x, weight, scale = normal(6, 96), normal(96, 100), normal(96)
    gate, up = (norm(x, scale) @ weight.double()).chunk(2, dim=-1)
    ours = kernels.gated(prenormed(x, scale, 3), weight, tactic=TACTICS[tactic])
    assert_near(ours, functional.silu(gate) * up)
    gate, up = (x.double() @ weight.double()).chunk(2, dim=-1)
    assert_near(kernels.gated(poisoned(x), weight, tactic=TACTICS[tactic]), functional.silu(gate) * up)


def test_half_precision_accumulates_in_float32() -> None:
    x, weight = normal(4, 256).half(), normal(256, 32).half()
    ours = kernels.linear(x, weight, dtype=torch.float32)
    assert ours.dtype == torch.float32
    assert_near(ours, x.double() @ weight.double())
    assert kernels.linear(x, weight).dtype == torch.float16


def test_rms_norm() -> None:
    x, scale = normal(5, 100), normal(100)
    assert_near(kernels.rms_norm(poisoned(x), scale, EPS), norm(x, scale))


def test_rows_do_not_notice_each_other() -> None:
    x, weight, residual, scale = normal(7, 64), normal(64, 64), normal(7, 64), normal(64)
    broken = x.clone()
    broken[3] = float("nan")

    def run(given: Tensor) -> Tensor:
        return kernels.linear(kernels.linear_and_norm(given, weight, residual, (scale, EPS))[1], weight)

    whole, ours = run(x), run(broken)
    rest = [0, 1, 2, 4, 5, 6]
    assert torch.equal(ours[rest], whole[rest])
    assert ours[3].isnan().all()


def test_counters_are_zero_again_after_a_split_product() -> None:
    x, weight = normal(4, 256), normal(256, 64)
    tactic = Tactic(16, 32, 32, 4, 4, 3)
    first = kernels.linear(x, weight, tactic=tactic)
    assert torch.equal(kernels.linear(x, weight, tactic=tactic), first)
    assert not kernels.counters(x.device, 1).any()


def test_a_norm_over_more_parts_than_a_tile_holds() -> None:
    """600 column tiles of the product before, as a wide model has: the sums take several turns."""
    x, weight, scale = normal(3, 600), normal(600, 32), normal(600)
    ours = kernels.linear(prenormed(x, scale, 600), weight)
    assert_near(ours, norm(x, scale) @ weight.double(), 1e-5)


GPUS = {"H100": Gpu(132, 232448), "A100": Gpu(108, 166912), "RTX 4090": Gpu(128, 101376), "small": Gpu(20, 49152)}


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("element_bytes", [1, 2, 4])
@pytest.mark.parametrize(("rows", "columns", "inner"), [(8, 2048, 2048), (72, 4096, 14336), (256, 128256, 4096)])
@pytest.mark.parametrize("gated", [False, True])
def test_candidates_start_with_the_default_and_fit_a_multiprocessor(
    rows: int, columns: int, inner: int, gated: bool, element_bytes: int, gpu: str
) -> None:
    product = Product(rows, columns, inner, gated, element_bytes, max(element_bytes, 2))
    found = kernels.candidate_tactics(product, GPUS[gpu])
    assert found[0] == kernels.default_tactic(product, GPUS[gpu])
    assert len(set(found)) == len(found) >= (6 if gpu == "H100" and element_bytes == 2 and not gated else 1)
    for tactic in found:
        used = kernels._tile_bytes(product, tactic.height, tactic.columns, tactic.inner, tactic.num_stages)
        assert used <= GPUS[gpu].shared_bytes


@pytest.mark.parametrize(
    ("columns", "inner", "tiles", "splits"),
    [(5120, 8192, 128, 3), (2560, 8192, 64, 3), (2560, 8192, 128, 6), (3072, 4096, 128, 5)],
)
def test_some_candidate_keeps_all_multiprocessors_busy(columns: int, inner: int, tiles: int, splits: int) -> None:
    """The qkv of Llama-70B over two and four ranks, of Llama-8B over two: powers of two leave a quarter idle, or take turns."""
    found = kernels.candidate_tactics(Product(72, columns, inner), GPUS["H100"])
    assert (tiles, splits) in {(tactic.columns, tactic.splits) for tactic in found}
    assert 0.9 * 132 <= columns // tiles * splits <= 132


@pytest.mark.parametrize(
    ("rows", "tiles"), [(33, (32, 16)), (36, (32, 16)), (48, (32, 16)), (65, (64, 16)), (72, (64, 16)), (96, (64, 32))]
)
@pytest.mark.parametrize("element_bytes", [1, 2])
def test_rows_that_a_power_of_two_would_pad_have_candidates_in_two_tiles(
    rows: int, tiles: tuple[int, int], element_bytes: int
) -> None:
    product = Product(rows, 6144, 4096, False, element_bytes, 2)
    tailed = [one for one in kernels.candidate_tactics(product, GPUS["H100"]) if one.tail]
    assert {(one.rows, one.tail) for one in tailed} == {tiles}
    assert all(one.swap and one.columns >= 64 and rows <= one.height for one in tailed)


@pytest.mark.parametrize("rows", [1, 8, 16, 32, 49, 64, 97, 128, 129, 200])
def test_other_rows_have_one_tile(rows: int) -> None:
    assert not any(one.tail for one in kernels.candidate_tactics(Product(rows, 6144, 4096), GPUS["H100"]))
    assert not any(one.tail for one in kernels.candidate_tactics(Product(72, 64, 64, False, 4, 4), GPUS["H100"]))


def fp8(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """FP8 weights, one scale a row, and what they stand for in float64."""
    values, scale = normal(*shape, seed=seed), normal(shape[0], seed=9).abs() / 64 + 1e-3
    weight = (values / scale[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return weight, scale, weight.double() * scale[:, None].double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tactic", TACTICS)
@pytest.mark.parametrize(("rows", "inner", "columns"), [(1, 64, 32), (5, 96, 48), (18, 200, 66)])
def test_fp8_weights_with_everything_around_them(
    tactic: str, rows: int, inner: int, columns: int, dtype: torch.dtype
) -> None:
    weight, scale, meant = fp8(columns, inner)
    bias, residual, norm_weight = normal(columns).to(dtype), normal(rows, columns).to(dtype), normal(inner)
    x = normal(rows, inner).to(dtype)
    tolerance, chosen = (2e-6 if dtype == torch.float32 else 1e-3), TACTICS[tactic]
    ours = kernels.linear(poisoned(x), weight, bias, residual, True, tactic=chosen, scale=scale)
    assert ours.dtype == dtype
    assert_near(ours, x.double() @ meant.t() + bias.double() + residual.double(), tolerance)
    other_layout = kernels.linear(x, weight.t().contiguous(), bias, residual, tactic=chosen, scale=scale)
    assert_near(other_layout, ours.double(), tolerance)
    between = kernels.linear(prenormed(x.float(), norm_weight, 4), weight, transpose_w=True, tactic=chosen, scale=scale)
    assert_near(between, norm(x, norm_weight) @ meant.t())


@pytest.mark.parametrize("tactic", TACTICS)
def test_fp8_gated_and_before_a_norm(tactic: str) -> None:
    x, norm_weight, residual = normal(6, 96), normal(48), normal(6, 48)
    weight, scale, meant = fp8(100, 96)
    gate, up = (x.double() @ meant.t()).chunk(2, dim=-1)
    ours = kernels.gated(poisoned(x), weight, TACTICS[tactic], True, scale)
    assert_near(ours, functional.silu(gate) * up)
    weight, scale, meant = fp8(48, 96)
    ours, following = kernels.linear_and_norm(
        x, weight, residual, (norm_weight, EPS), TACTICS[tactic], transpose_w=True, scale=scale
    )
    expected = x.double() @ meant.t() + residual.double()
    assert_near(ours, expected)
    assert_near(following.squares.sum(dim=0), expected.square().sum(dim=-1))


def test_every_fp8_value_is_read_exactly() -> None:
    weight = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(64, 4)
    weight = torch.where(weight.float().isnan(), 0.0, weight.float()).to(torch.float8_e4m3fn).repeat(1, 4)
    ours = kernels.linear(torch.eye(16), weight, transpose_w=True, scale=torch.ones(64))
    assert torch.equal(ours, weight.float().t())
