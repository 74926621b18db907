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
from smc_plugin.errors import ConfigError
from smc_plugin.kernels.compile import precompile
from smc_plugin.kernels.launch import Gpu, gpu_of, recording
from smc_plugin.kernels.whole_pass import MAX_CONTEXT, WholePass
from smc_plugin.kernels.whole_pass.run import shared_bytes, stages_that_fit
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
UNSHARED = dataclasses.replace(LLAMA, num_heads=16, num_kv_heads=16, hidden_size=1024, ffn_size=3072)
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
        gpu: what to cut the pass for; None takes the GPU as it is.
    """

    def __init__(
        self,
        config: ModelConfig,
        precision: Precision,
        queries: int,
        lengths: list[int],
        ranks: Ranks | None = None,
        gpu: Gpu | None = None,
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
            ranks=ranks, whole_pass=WholePass(shape_of(config), weights, ranks, gpu),
        )  # fmt: skip
        assert self.model.whole_pass is not None
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
        longest = int(self.start.max()) - 1 + self.tokens.shape[1]
        assert not in_one_launch or self.whole.takes(self.tokens.shape[0], self.tokens.shape[1], longest)
        hidden = self.model.forward(self.tokens, self.start, self.table, longest, offset=-1)
        return hidden, self.model.cache.clone()


def assert_agrees(one: Pass, precision: Precision) -> None:
    """A pass in one launch gives what its steps give, and writes the same pages."""
    (found, found_pages), (expected, expected_pages) = one.run(True), one.run(False)
    assert relative_error(found, expected) < 0.04
    written = (found_pages.view(torch.uint8) != one.before.view(torch.uint8)).any()
    assert written
    # What a pass does not write stays as it was; what it writes is the same but for rounding.
    untouched = expected_pages.view(torch.uint8) == one.before.view(torch.uint8)
    assert (found_pages.view(torch.uint8) != one.before.view(torch.uint8))[untouched].float().mean() < 1e-3
    assert relative_error(found_pages.float(), expected_pages.float()) < (0.1 if precision is FP8 else 0.04)


@pytest.mark.parametrize(("batch", "queries"), [(8, 1), (8, 2), (1, 1), (3, 2), (16, 1)])
@pytest.mark.parametrize("precision", [BF16, FP8], ids=["bfloat16", "fp8"])
@pytest.mark.parametrize("config", [LLAMA, QWEN2, QWEN3], ids=["llama", "qwen2", "qwen3"])
def test_it_agrees_with_a_pass_in_steps(config: ModelConfig, precision: Precision, batch: int, queries: int) -> None:
    assert_agrees(Pass(config, precision, queries, RAGGED[:batch]), precision)


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("config", [LLAMA, QWEN2, QWEN3], ids=["llama", "qwen2", "qwen3"])
def test_every_number_of_sequences(config: ModelConfig, queries: int) -> None:
    passes = [Pass(config, BF16, queries, RAGGED[:batch]) for batch in range(1, 16 // queries + 1)]
    with recording() as recorded:
        for one in passes:
            one.run(True)
    capability = torch.cuda.get_device_capability()
    precompile(recorded, 10 * capability[0] + capability[1])  # on all cores: a kernel for every number of rows
    for one in passes:
        assert_agrees(one, BF16)


@pytest.mark.parametrize("context", [1, 127, 128, 129, 1023, 1024])
@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("config", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_contexts_up_to_the_longest(config: ModelConfig, queries: int, context: int) -> None:
    """Tokens that attention sees, new ones included; shorter sequences beside one of them."""
    before = max(context - queries, 0)
    assert before + queries <= MAX_CONTEXT
    assert_agrees(Pass(config, BF16, queries, [before, 0, before // 2]), BF16)


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("precision", [BF16, FP8], ids=["bfloat16", "fp8"])
def test_heads_that_share_nothing(precision: Precision, queries: int) -> None:
    """As many KV heads as query heads; of 8 sequences 128 programs have a task."""
    assert shape_of(UNSHARED).group == 1
    assert_agrees(Pass(UNSHARED, precision, queries, RAGGED[:8]), precision)


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("stages", [4, 5, 8, 12])
def test_a_ring_of_fewer_stages(stages: int, queries: int) -> None:
    """As GPUs with less shared memory have it: bit for bit what the largest ring gives."""
    whole, shape = gpu_of(torch.device(DEVICE, 0)), shape_of(LLAMA)
    room = shared_bytes(shape, 8, queries, whole.sm_count, stages)
    gpu = dataclasses.replace(whole, shared_bytes=room)
    assert stages_that_fit(shape, 8, queries, gpu) == stages
    found, pages = Pass(LLAMA, BF16, queries, RAGGED[:8], gpu=gpu).run(True)
    expected, expected_pages = Pass(LLAMA, BF16, queries, RAGGED[:8]).run(True)
    assert torch.equal(found, expected)
    assert torch.equal(pages, expected_pages)


@pytest.mark.parametrize("programs", [114, 78, 16])
def test_fewer_programs(programs: int) -> None:
    """As on a GPU with fewer multiprocessors, or a part of one."""
    whole = gpu_of(torch.device(DEVICE, 0))
    assert_agrees(Pass(LLAMA, BF16, 1, RAGGED[:2], gpu=dataclasses.replace(whole, sm_count=programs)), BF16)


def test_a_first_pass_inside_a_capture_is_refused() -> None:
    one = Pass(LLAMA, BF16, 1, RAGGED[:8])
    one.whole.prepare([8])
    one.run(False)  # all but the pass itself has run
    longest = max(RAGGED[:8]) + 1
    table, start = one.table, one.start

    def run() -> Tensor:
        with torch.inference_mode():
            return one.model.forward(one.tokens, start, table, longest, offset=-1)

    one.model.whole_pass = one.whole
    graph = torch.cuda.CUDAGraph()
    refusal = "captured before it ever ran, expected one run before the capture: run"
    with pytest.raises(ConfigError, match=refusal), torch.cuda.graph(graph):
        run()
    # Nothing is left of the attempt: a pass outside, and then a capture, give what the steps give.
    expected, _ = one.run(False)
    found, _ = one.run(True)
    assert relative_error(found, expected) < 0.04
    one.model.whole_pass = one.whole
    replayed = captured(run, lambda output: output.fill_(float("nan")))
    assert torch.equal(replayed, found)


def test_memory_is_what_was_counted() -> None:
    """But for torch's rounding: to 512 bytes, and of large tensors up to 2 MiB."""
    weights, gpu = random_weights(QWEN3, FP8), gpu_of(torch.device(DEVICE, 0))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    whole = WholePass(shape_of(QWEN3), weights)
    whole.prepare((1, 8, 16))
    taken = torch.cuda.memory_allocated() - before
    counted = WholePass.extra_bytes(shape_of(QWEN3), 1, gpu, (1, 8, 16))
    assert counted == whole.held_bytes
    assert counted <= taken <= counted + 20 * 512 + 4 * (2 << 20)


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
