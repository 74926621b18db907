"""A pass in one launch against the same pass in steps, on models of every family, and in rounds."""

import dataclasses

import pytest
import torch
from torch import Tensor

from smc_build.dtypes import torch_dtype
from smc_build.model_config import ModelConfig
from smc_build.precision import Precision
from smc_build.presets import PRESETS
from smc_build.sharding import bind_head, rank_config, shard
from smc_build.weights import weight_shapes
from smc_engines.fused_regions import FusedRegions
from smc_engines.model import PagedModel
from smc_engines.parallel.ranks import Ranks
from smc_engines.region_choice import shape_of
from smc_plugin.kernels.launch import gpu_of
from smc_plugin.kernels.whole_pass import WholePass
from tests.gpu.helpers import DEVICE, captured, relative_error

BF16 = Precision.plain("bfloat16")
FP8 = Precision("bfloat16", "float8_e4m3fn", "bfloat16", "float8_e4m3fn")
LLAMA = dataclasses.replace(PRESETS["llama-1b"].config, num_layers=3, vocab_size=1000)
QWEN2 = dataclasses.replace(
    LLAMA, num_heads=16, num_kv_heads=2, head_dim=128, qkv_bias=True, hidden_size=1536, ffn_size=4864
)
QWEN3 = dataclasses.replace(
    LLAMA, num_heads=16, num_kv_heads=8, head_dim=128, qk_norm=True, hidden_size=1024, ffn_size=3072
)
RAGGED = [300, 17, 0, 129, 128, 5, 640, 301, 1, 2, 900, 256, 127, 700, 64, 33]


@pytest.fixture(autouse=True)
def hopper() -> None:
    """Whole passes need Hopper's bulk copies."""
    if not WholePass.suits(shape_of(LLAMA), gpu_of(torch.device(DEVICE, 0))):
        pytest.skip("no Hopper GPU")


def random_weights(config: ModelConfig, precision: Precision) -> dict[str, Tensor]:
    """Weights that keep activations near 1; norms, biases and scales are not all alike."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device=DEVICE)

    found = {}
    for name, size in weight_shapes(config, precision).items():
        dtype = torch_dtype(precision.dtype_of(name))
        if name.endswith("norm"):
            values = 1 + 0.1 * normal(*size)
        elif name.endswith("scale"):
            values = 0.001 + 0.0002 * normal(*size).abs()
        else:
            values = (20 * normal(*size)).clamp(-448, 448) if dtype.itemsize == 1 else 0.02 * normal(*size)
        found[name] = values.to(dtype)
    return found


class Pass:
    """One pass of a model over pages in random order.

    Args:
        lengths: tokens that each sequence has in the pages.
        ranks: who shares the model; None for a whole one.
    """

    def __init__(
        self, config: ModelConfig, precision: Precision, queries: int, lengths: list[int], ranks: Ranks | None = None
    ) -> None:
        weights = random_weights(config, precision)
        if ranks is not None:
            weights = {name: shard(name, w, config, ranks.size, ranks.rank).clone() for name, w in weights.items()}
            config = rank_config(config, ranks.size)
            weights = bind_head(weights, config, ranks.rank)
        blocks = [-(-(length + queries) // 16) for length in lengths]
        kv_dtype = torch_dtype(precision.kv)
        self.model = PagedModel(
            config, weights, 1 + sum(blocks), 16, FusedRegions(config, weights), kv_dtype=kv_dtype,
            ranks=ranks, whole_pass=WholePass(shape_of(config), weights, ranks),
        )  # fmt: skip
        self.whole = self.model.whole_pass
        generator = torch.Generator(DEVICE).manual_seed(1)
        cache = torch.randn(self.model.cache.shape, generator=generator, device=DEVICE)
        self.model.cache.copy_(cache.to(kv_dtype))
        self.table = torch.zeros((len(lengths), max(blocks)), dtype=torch.int32, device=DEVICE)
        pages = iter((torch.randperm(sum(blocks), generator=generator, device=DEVICE) + 1).tolist())
        for row, count in enumerate(blocks):
            self.table[row, :count] = torch.tensor([next(pages) for _ in range(count)], dtype=torch.int32)
        self.start = torch.tensor(lengths, device=DEVICE) + 1
        self.tokens = torch.randint(
            config.vocab_size, (len(lengths), queries), generator=generator, device=DEVICE
        )  # fmt: skip
        self.before = self.model.cache.clone()

    @torch.inference_mode()
    def run(self, in_one_launch: bool) -> tuple[Tensor, Tensor]:
        """Hidden rows, and the pages after the pass."""
        self.model.whole_pass = self.whole if in_one_launch else None
        self.model.cache.copy_(self.before)
        longest = int(self.start.max()) + self.tokens.shape[1]
        hidden = self.model.forward(self.tokens, self.start, self.table, longest, offset=-1)
        return hidden, self.model.cache.clone()


@pytest.mark.parametrize(("batch", "queries"), [(8, 1), (8, 2), (1, 1), (3, 2), (16, 1)])
@pytest.mark.parametrize("precision", [BF16, FP8], ids=["bfloat16", "fp8"])
@pytest.mark.parametrize("config", [LLAMA, QWEN2, QWEN3], ids=["llama", "qwen2", "qwen3"])
def test_it_agrees_with_a_pass_in_steps(config: ModelConfig, precision: Precision, batch: int, queries: int) -> None:
    one = Pass(config, precision, queries, RAGGED[:batch])
    (found, found_pages), (expected, expected_pages) = one.run(True), one.run(False)
    assert relative_error(found, expected) < 0.04
    pages, wanted = found_pages.float(), expected_pages.float()
    written = (found_pages.view(torch.uint8) != one.before.view(torch.uint8)).any()
    assert written
    # What a pass does not write stays as it was; what it writes is the same but for rounding.
    untouched = expected_pages.view(torch.uint8) == one.before.view(torch.uint8)
    assert (found_pages.view(torch.uint8) != one.before.view(torch.uint8))[untouched].float().mean() < 1e-3
    assert relative_error(pages, wanted) < (0.1 if precision is FP8 else 0.04)


@pytest.mark.parametrize("queries", [1, 2])
def test_results_do_not_depend_on_timing(queries: int) -> None:
    one = Pass(LLAMA, BF16, queries, RAGGED[:8])
    hidden, pages = one.run(True)
    for _ in range(200):
        again, pages_again = one.run(True)
        assert torch.equal(again, hidden)
        assert torch.equal(pages_again, pages)


def test_sequences_do_not_see_one_another() -> None:
    one = Pass(LLAMA, BF16, 1, RAGGED[:8])
    hidden, _ = one.run(True)
    one.tokens[3] = (one.tokens[3] + 1) % 1000
    one.before[:, :, one.table[3, 0].long()] = 5.0
    changed, _ = one.run(True)
    same = [row for row in range(8) if torch.equal(changed[row], hidden[row])]
    assert same == [0, 1, 2, 4, 5, 6, 7]


def test_nan_stays_in_its_sequence() -> None:
    """A value that is not a number must not be taken for one that is not there yet."""
    one = Pass(LLAMA, BF16, 1, RAGGED[:8])
    hidden, _ = one.run(True)
    one.before[:, :, one.table[0, 0].long()] = float("nan")
    changed, _ = one.run(True)
    assert changed[0].isnan().all()
    assert torch.equal(changed[1:], hidden[1:])


@pytest.mark.parametrize("in_one_launch", [True, False])
def test_nan_stays_in_fp8_pages(in_one_launch: bool) -> None:
    """FP8 pages hold no infinity, and a bound on values must not make a number of what is none."""
    one = Pass(LLAMA, FP8, 2, RAGGED[:8])
    one.tokens[one.tokens == 7] = 8
    hidden, _ = one.run(in_one_launch)
    one.tokens[0] = 7
    one.model.weights["embed"][7] = float("nan")
    changed, pages = one.run(in_one_launch)
    assert changed[0].isnan().all()
    assert torch.equal(changed[1:], hidden[1:])
    for position in range(RAGGED[0], RAGGED[0] + 2):
        page = int(one.table[0, position // 16])
        assert pages[:, :, page, position % 16].float().isnan().all()


def test_it_can_be_captured_and_replayed_beside_another_number_of_rows() -> None:
    first, second = Pass(LLAMA, BF16, 2, RAGGED[:8]), Pass(LLAMA, BF16, 1, RAGGED[:8])
    expected = [one.run(True)[0] for one in (first, second)]
    longest = max(RAGGED) + 3

    def run() -> list[Tensor]:
        with torch.inference_mode():
            return [
                one.model.forward(one.tokens, one.start, one.table, longest, offset=-1) for one in (first, second) * 3
            ]

    for one in (first, second):
        one.model.whole_pass = one.whole
    found = captured(run, lambda outputs: [output.fill_(float("nan")) for output in outputs])
    for place, output in enumerate(found):
        assert torch.equal(output, expected[place % 2])
