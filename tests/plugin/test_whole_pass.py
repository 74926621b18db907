"""Whole passes without a GPU: the order of the weights against torch, when a model suits, and that the kernel compiles.

What the kernel computes is tested in tests/gpu/test_whole_pass.py: Gluon has no interpreter.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from smc_build.model_config import ModelConfig
from smc_build.precision import Precision
from smc_build.presets import PRESETS
from smc_build.sharding import bind_head, rank_config
from smc_build.weights import weight_shapes
from smc_engines.fused_regions import FusedRegions
from smc_engines.model import PagedModel
from smc_engines.region_choice import shape_of, whole_pass_bytes, whole_pass_rows
from smc_engines.regions import RegionRunner, TorchRegions
from smc_engines.tactics import ModelTactics, RegionTimes, Runner
from smc_engines.tuning import Tuner
from smc_plugin.backend import triton_kernels
from smc_plugin.errors import RankError
from smc_plugin.kernels import launch
from smc_plugin.kernels.compile import compile_recorded
from smc_plugin.kernels.launch import Gpu
from smc_plugin.kernels.whole_pass import MAX_CONTEXT, DecoderShape, WholePass
from smc_plugin.kernels.whole_pass.run import shared_bytes, stages_that_fit
from smc_plugin.kernels.whole_pass.weights import StreamedProduct, Streams, pack, packed_bytes

SMALL = DecoderShape(
    num_layers=2, hidden_size=96, ffn_size=160, num_heads=4, num_kv_heads=2, head_dim=64, rms_eps=1e-5,
    qkv_bias=False, qk_norm=False,
)  # fmt: skip
# Two layers of models of every family, and of one whose programs have as many query heads as can be.
LLAMA = dataclasses.replace(PRESETS["llama-1b"].config, num_layers=2)
QWEN2 = dataclasses.replace(
    LLAMA, num_heads=16, num_kv_heads=2, head_dim=128, qkv_bias=True, hidden_size=1536, ffn_size=4864
)
QWEN3 = dataclasses.replace(
    LLAMA, num_heads=16, num_kv_heads=8, head_dim=128, qk_norm=True, hidden_size=1024, ffn_size=3072
)
UNSHARED = dataclasses.replace(LLAMA, num_heads=8, num_kv_heads=8, hidden_size=512, ffn_size=1024)
WIDE = dataclasses.replace(LLAMA, num_heads=64, num_kv_heads=8, head_dim=128, hidden_size=1024, ffn_size=3072)
BF16 = Precision.plain("bfloat16")
FP8 = Precision("bfloat16", "float8_e4m3fn", "bfloat16", "float8_e4m3fn")


def matrices(shape: DecoderShape, dtype: torch.dtype) -> dict[str, Tensor]:
    """Small whole numbers, which FP8 holds exactly; [inner, columns], or [columns, inner] in FP8."""
    generator = torch.Generator().manual_seed(0)
    sizes = {
        "qkv": (shape.hidden_size, shape.qkv_size),
        "o": (shape.q_size, shape.hidden_size),
        "gate_up": (shape.hidden_size, 2 * shape.ffn_size),
        "down": (shape.ffn_size, shape.hidden_size),
    }
    found = {}
    for layer in range(shape.num_layers):
        for name, size in sizes.items():
            matrix = torch.randint(-8, 9, size, generator=generator).to(dtype)
            found[f"layers.{layer}.{name}"] = matrix.T.contiguous() if dtype.itemsize == 1 else matrix
    return found


def unpacked(stages: Tensor, product: StreamedProduct) -> Tensor:
    """A unit's columns [halves * 8, inner] from its stages [chunks, elements], read as the kernel reads them.

    Warp w multiplies inner elements w * width to (w + 1) * width of a stage; of a step of 32 (or 64) elements, quarter q
    of a column holds elements 8 * q to 8 * q + 7 of each half.
    """
    width = product.depth // 8
    vectors = 2 if stages.element_size() == 1 else 1
    tiles = stages.view(product.chunks, product.halves, 8, width // (32 * vectors), 8, 4, vectors, 8)
    columns = torch.zeros(product.halves, 8, product.chunks * product.depth)
    for chunk, half, warp, step, column, quarter, vector in torch.cartesian_prod(
        *[torch.arange(size) for size in tiles.shape[:-1]]
    ).tolist():
        first = chunk * product.depth + warp * width + (step * vectors + vector) * 32 + quarter * 8
        values = tiles[chunk, half, warp, step, column, quarter, vector].float()
        columns[half, column, first : first + 8] = values
    return columns.view(-1, product.chunks * product.depth)[:, : product.inner]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("programs", [3, 7])
def test_streams_hold_every_column_in_the_order_of_the_kernel(dtype: torch.dtype, programs: int) -> None:
    weights = matrices(SMALL, dtype)
    streams = Streams.of(SMALL, programs, dtype.itemsize)
    packed = pack(SMALL, weights, programs)
    assert packed.nbytes == packed_bytes(SMALL, dtype.itemsize, programs)
    for program in range(programs):
        at = 0
        for layer in range(SMALL.num_layers):
            for name, product in streams.products.items():
                matrix = weights[f"layers.{layer}.{name}"].float()
                columns = matrix if dtype.itemsize == 1 else matrix.T
                for unit in range(program, product.units, programs):
                    first = unit * 8
                    wanted = [columns[first : first + 8], columns[SMALL.ffn_size + first : SMALL.ffn_size + first + 8]]
                    if name != "gate_up":
                        first, count = unit * 8 * product.halves, 8 * product.halves
                        wanted = [columns[first : first + count]]
                    found = unpacked(packed[at : at + product.chunks, program], product)
                    assert torch.equal(found, torch.cat(wanted)), (program, layer, name, unit)
                    at += product.chunks
        assert (
            at == sum(streams.units_of(product, program) * product.chunks for product in streams.products.values()) * 2
        )
        assert not packed[at:, program].float().any()


def test_models_that_suit() -> None:
    llama = shape_of(PRESETS["llama-1b"].config)
    assert WholePass.suits(llama, Gpu())
    for unsuited in ({"head_dim": 32}, {"num_heads": 48}, {"hidden_size": 2064}, {"ffn_size": 8200}):
        assert not WholePass.suits(dataclasses.replace(llama, **unsuited), Gpu()), unsuited
    assert not WholePass.suits(llama, Gpu(capability=(8, 9)))
    # A ring of 4 stages is the smallest; a consumer GPU has room for one.
    assert WholePass.suits(llama, Gpu(shared_bytes=101376))
    assert not WholePass.suits(llama, Gpu(shared_bytes=shared_bytes(llama, 1, 1, 132, 4) - 1))


def test_the_ring_is_as_large_as_shared_memory_allows() -> None:
    llama = shape_of(PRESETS["llama-1b"].config)
    assert stages_that_fit(llama, 8, 1, Gpu()) == 13
    for stages in range(4, 13):
        room = shared_bytes(llama, 8, 2, 132, stages)
        assert stages_that_fit(llama, 8, 2, Gpu(shared_bytes=room)) == stages
        assert stages_that_fit(llama, 8, 2, Gpu(shared_bytes=room - 1)) == (stages - 1 if stages > 4 else 0)
    # Many query heads of a KV head in one program leave less room: 8 of 128 columns are 32 kB of sums over the warps.
    assert stages_that_fit(shape_of(WIDE), 16, 1, Gpu()) == 11
    small = Gpu(shared_bytes=101376)
    whole_pass = WholePass(shape_of(WIDE), meta_weights(WIDE, BF16), gpu=small)
    assert whole_pass.takes(1, 1, 100)
    assert not whole_pass.takes(16, 1, 100)


@dataclasses.dataclass
class SomeRanks:
    """As many ranks as asked for, on no device."""

    size: int
    rank: int = 0
    shared: list[int] = dataclasses.field(default_factory=list)

    def share_words(self, count: int, before: Callable[[], None] | None = None) -> Tensor:
        if before is not None:
            before()
        self.shared.append(count)
        return torch.zeros(self.size, dtype=torch.int64, device="meta")


def meta_weights(config: ModelConfig, precision: Precision) -> dict[str, Tensor]:
    """Weights that have shapes only."""
    return {
        name: torch.empty(size, dtype=getattr(torch, precision.dtype_of(name)), device="meta")
        for name, size in weight_shapes(config, precision).items()
    }


def record(
    precision: Precision,
    batch: int,
    queries: int,
    max_context: int,
    ranks: int = 1,
    config: ModelConfig = LLAMA,
    gpu: Gpu | None = None,
) -> list[launch.Recorded]:
    """What a pass of a model launches on a GPU, by default an H100; of several ranks, one's part."""
    config = config if ranks == 1 else rank_config(config, ranks)
    weights = meta_weights(config, precision)
    if ranks > 1:
        weights = bind_head(weights, config, 0)
    whole_pass = WholePass(shape_of(config), weights, SomeRanks(ranks) if ranks > 1 else None, gpu)
    model = PagedModel(
        config, weights, 512, 16, FusedRegions(config, weights), triton_kernels(),
        kv_dtype=getattr(torch, precision.kv), whole_pass=whole_pass,
    )  # fmt: skip
    tokens = torch.zeros((batch, queries), dtype=torch.int64, device="meta")
    start = torch.zeros(batch, dtype=torch.int64, device="meta")
    table = torch.zeros((batch, 64), dtype=torch.int32, device="meta")
    with launch.recording() as recorded:
        hidden = model.forward(tokens, start, table, max_context, offset=3)
    assert hidden.shape == (batch, queries, config.hidden_size)
    return recorded


def test_few_rows_and_short_contexts_are_one_launch() -> None:
    def names(batch: int, queries: int, max_context: int) -> list[str]:
        return [one.kernel.__name__ for one in record(BF16, batch, queries, max_context)]

    assert names(8, 2, MAX_CONTEXT) == ["_context_kernel", "whole_pass_kernel"]
    for many in ((17, 1, 100), (8, 3, 100), (8, 1, MAX_CONTEXT + 1), (16, 2, 100)):
        assert "whole_pass_kernel" not in names(*many), many


@pytest.mark.parametrize(("batch", "queries", "ranks"), [(8, 1, 1), (8, 2, 1), (8, 1, 2), (8, 2, 4)])
@pytest.mark.parametrize("precision", [BF16, FP8], ids=["bfloat16", "fp8"])
def test_the_kernel_compiles_for_hopper(precision: Precision, batch: int, queries: int, ranks: int) -> None:
    recorded = record(precision, batch, queries, MAX_CONTEXT, ranks)[-1]
    compiled = compile_recorded(recorded)
    assert ("st.relaxed.sys" in compiled.ptx) == (ranks > 1)
    # The fence before the last sums covers what all threads of a program have unset, so their barrier precedes it.
    assert (
        re.search(r"bar\.sync[^\n]*\n(\s*(\.loc|//)[^\n]*\n|\$[^\n]*\n)*\s*fence\.acq_rel\.sys", compiled.ptx)
        is not None
    ) == (ranks > 1)
    # FP8 pages stop at their largest value, which must not make a number of what is none.
    for bound in ("min", "max"):
        assert (f"{bound}.NaN.f32" in compiled.ptx) == (precision is FP8)
    assert compiled.name == "whole_pass_kernel"
    assert compiled.shared_bytes <= 227 * 1024
    assert recorded.arguments["STAGES"] == 13
    assert compiled.spill_bytes <= 64  # at most a few values that are read once a layer
    # Weights come by bulk copies; a stage is given back only after what was read of it has arrived.
    assert "cp.async.bulk.tensor" in compiled.ptx
    assert "fence.proxy.async" in compiled.ptx
    assert "griddepcontrol.wait" in compiled.ptx
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in compiled.ptx


@pytest.mark.parametrize(
    ("config", "precision", "batch", "queries", "ranks", "gpu"),
    [
        (LLAMA, BF16, 1, 1, 1, Gpu()),
        (LLAMA, FP8, 8, 2, 1, Gpu(114, 101376)),
        (QWEN2, FP8, 16, 1, 1, Gpu(shared_bytes=166912)),
        (QWEN3, BF16, 8, 2, 1, Gpu()),
        (UNSHARED, BF16, 8, 1, 1, Gpu(shared_bytes=120000)),
        (WIDE, BF16, 16, 1, 1, Gpu()),
        (LLAMA, BF16, 16, 1, 2, Gpu()),
    ],
    ids=["llama", "fewer-stages", "qwen2", "qwen3", "unshared", "wide", "ranks"],
)
def test_shared_memory_is_what_the_compiler_takes(
    config: ModelConfig, precision: Precision, batch: int, queries: int, ranks: int, gpu: Gpu
) -> None:
    """Computed, so that a ring can be as large as fits; one that is too large fails at the launch."""
    recorded = record(precision, batch, queries, 100, ranks, config, gpu)[-1]
    compiled = compile_recorded(recorded)
    stages = recorded.arguments["STAGES"]
    shape = shape_of(config if ranks == 1 else rank_config(config, ranks))
    assert compiled.shared_bytes == shared_bytes(shape, batch, queries, gpu.sm_count, stages)
    assert compiled.shared_bytes <= gpu.shared_bytes
    assert stages == 13 or compiled.shared_bytes + 16384 + 16 > gpu.shared_bytes - 8


def test_all_contexts_take_one_kernel() -> None:
    def constants(max_context: int) -> dict[str, object]:
        found = record(BF16, 8, 1, max_context)[-1]
        return {one.name: found.arguments[one.name] for one in found.kernel.params if one.is_constexpr}

    assert constants(1) == constants(129) == constants(MAX_CONTEXT)


@pytest.mark.parametrize("precision", [BF16, FP8], ids=["bfloat16", "fp8"])
@pytest.mark.parametrize("config", [LLAMA, QWEN2, QWEN3], ids=["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_memory_is_counted_before_it_is_taken(config: ModelConfig, precision: Precision, num_ranks: int) -> None:
    """The page pool gets what is left, so the count must be exact."""
    rows = (1, 2, 8, 16)
    config = config if num_ranks == 1 else rank_config(config, num_ranks)
    ranks = SomeRanks(num_ranks) if num_ranks > 1 else None
    whole_pass = WholePass(shape_of(config), meta_weights(config, precision), ranks)
    assert whole_pass.held_bytes == whole_pass_bytes(config, precision, torch.device("cpu"))
    whole_pass.prepare(rows)
    assert whole_pass.held_bytes == whole_pass_bytes(config, precision, torch.device("cpu"), rows, num_ranks)
    # Everything that it holds, found without its help.
    held = [*vars(whole_pass).values(), *whole_pass._values.values()]
    tensors = [one for each in held for one in (each if isinstance(each, list | tuple) else [each])]
    own = {id(one): one.nbytes for one in tensors if isinstance(one, Tensor) and one is not whole_pass._embedding}
    inboxes = 4 * sum(ranks.shared) if ranks is not None else 0
    assert whole_pass.held_bytes == sum(own.values()) + inboxes


def test_ranks_prepare_together_and_in_one_order() -> None:
    """Sharing memory is a step of all ranks: once for all row counts of an engine, and once for each unusual one."""
    config = rank_config(LLAMA, 2)
    weights = bind_head(meta_weights(config, BF16), config, 0)
    ranks = SomeRanks(2)
    whole_pass = WholePass(shape_of(config), weights, ranks)
    whole_pass.prepare([16, 8, 1, 8])
    words = 2 * config.num_layers * 2 * config.hidden_size * 2  # a row: sides, layers, products, columns, parts
    assert ranks.shared == [(1 + 8 + 16) * words]
    whole_pass.prepare([8, 16])
    assert len(ranks.shared) == 1
    whole_pass.prepare([5])
    assert ranks.shared[1:] == [5 * words]


def test_a_rank_without_room_fails_inside_the_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It took its own memory before, and the others then waited for it for ever."""
    config = rank_config(LLAMA, 2)
    ranks = SomeRanks(2)
    whole_pass = WholePass(shape_of(config), bind_head(meta_weights(config, BF16), config, 0), ranks)
    failed: list[str] = []

    def full(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def share_words(count: int, before: Callable[[], None] | None = None) -> Tensor:
        assert before is not None
        with pytest.raises(torch.OutOfMemoryError):
            before()
        failed.append("told the others")
        raise RankError("rank 1 failed")

    monkeypatch.setattr(torch, "full", full)
    monkeypatch.setattr(ranks, "share_words", share_words)
    with pytest.raises(RankError):
        whole_pass.prepare([5])
    assert failed == ["told the others"]
    assert whole_pass.held_bytes > 0
    monkeypatch.undo()
    whole_pass.prepare([5])  # once there is room
    assert len(ranks.shared) == 1


def test_inboxes_lie_behind_one_another() -> None:
    class Addresses(SomeRanks):
        def share_words(self, count: int, before: Callable[[], None] | None = None) -> Tensor:
            super().share_words(count, before)
            return torch.tensor([1 << 20, 1 << 30])

    config = rank_config(LLAMA, 2)
    whole_pass = WholePass(shape_of(config), bind_head(meta_weights(config, BF16), config, 0), Addresses(2))
    whole_pass.prepare([2, 1])
    step = 4 * 2 * config.num_layers * 2 * config.hidden_size * 2
    assert whole_pass._inboxes[1].tolist() == [1 << 20, 1 << 30]
    assert whole_pass._inboxes[2].tolist() == [(1 << 20) + step, (1 << 30) + step]


def test_row_counts_that_are_prepared() -> None:
    assert whole_pass_rows(8, 4) == (1, 2, 4, 8, 16)
    assert whole_pass_rows(5, 1) == (1, 2, 5, 10)
    assert whole_pass_rows(32, 1) == (1, 2)


@pytest.mark.parametrize(
    ("rows", "particles", "expected"),
    [
        ((1, 2, 4, 8, 16), 8, 8),
        ((8, 16), 8, 8),
        ((8, 16, 32), 8, 8),
        ((16, 32), 8, 16),
        ((4, 8, 16, 32), 32, 16),
        ((5, 10), 5, 5),
    ],
)
def test_tuning_compares_the_pass_that_rounds_run_most(
    rows: tuple[int, ...], particles: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token a sequence, N sequences; and its steps each by whoever was fastest."""
    weights = meta_weights(LLAMA, BF16)
    whole_pass, fused = WholePass(shape_of(LLAMA), weights), FusedRegions(LLAMA, weights)
    runners: dict[Runner, RegionRunner] = {"fused": fused, "torch": TorchRegions(LLAMA, weights)}
    model = PagedModel(LLAMA, weights, 512, 16, fused, triton_kernels(), whole_pass=whole_pass)
    graphs: list[list[launch.Recorded]] = []

    def run(calls: Sequence[Callable[[], object]]) -> float:
        with launch.recording() as recorded:
            for call in calls:
                call()
        graphs.append(recorded)
        return float(len(recorded))

    monkeypatch.setattr(Tuner, "_graph_us", staticmethod(run))
    tuner = Tuner(model, runners, 1, lambda _: None)
    # Blocks were fastest on torch, which records nothing; the rest on the fused kernels.
    timed = {count: RegionTimes("torch", {"torch": 1.0}) for count in rows}
    times = tuner._compare_passes(rows, particles, ModelTactics({"block": timed}))
    assert times is not None
    assert model.whole_pass is whole_pass
    whole, steps = graphs[-2:]
    launched = [one for one in whole if one.kernel.__name__ == "whole_pass_kernel"]
    assert [(one.arguments["ROWS"], one.arguments["QUERIES"]) for one in launched] == [(expected, 1)] * 4
    names = [one.kernel.__name__ for one in steps]
    assert "whole_pass_kernel" not in names
    assert names.count("_linear_kernel") == 4 * 4  # qkv of the first layer; o, gate/up and down of the last
    assert times.us == {"whole": len(whole) / 4, "steps": len(steps) / 4}
    assert times.choice == "whole"
