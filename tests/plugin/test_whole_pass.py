"""Whole passes without a GPU: the order of the weights against torch, when a model suits, and that the kernel compiles.

What the kernel computes is tested in tests/gpu/test_whole_pass.py: Gluon has no interpreter.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from smc_build.precision import Precision
from smc_build.presets import PRESETS
from smc_build.sharding import bind_head, rank_config
from smc_build.weights import weight_shapes
from smc_engines.fused_regions import FusedRegions
from smc_engines.model import PagedModel
from smc_engines.region_choice import shape_of
from smc_plugin.backend import triton_kernels
from smc_plugin.kernels import launch
from smc_plugin.kernels.compile import compile_recorded
from smc_plugin.kernels.launch import Gpu
from smc_plugin.kernels.whole_pass import MAX_CONTEXT, DecoderShape, WholePass
from smc_plugin.kernels.whole_pass.weights import StreamedProduct, Streams, pack, packed_bytes

SMALL = DecoderShape(
    num_layers=2, hidden_size=96, ffn_size=160, num_heads=4, num_kv_heads=2, head_dim=64, rms_eps=1e-5,
    qkv_bias=False, qk_norm=False,
)  # fmt: skip
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
    assert not WholePass.suits(llama, Gpu(shared_bytes=166912))


@dataclasses.dataclass
class SomeRanks:
    """As many ranks as asked for, on no device."""

    size: int
    rank: int = 0

    def share_words(self, count: int) -> Tensor:
        return torch.zeros(self.size, dtype=torch.int64, device="meta")


def record(precision: Precision, batch: int, queries: int, max_context: int, ranks: int = 1) -> list[launch.Recorded]:
    """What a pass of a Llama-1B of two layers launches on an H100; of several ranks, one's part."""
    whole = dataclasses.replace(PRESETS["llama-1b"].config, num_layers=2)
    config = whole if ranks == 1 else rank_config(whole, ranks)
    types = {name: getattr(torch, precision.dtype_of(name)) for name in weight_shapes(config, precision)}
    weights = {
        name: torch.empty(size, dtype=types[name], device="meta")
        for name, size in weight_shapes(config, precision).items()
    }
    if ranks > 1:
        weights = bind_head(weights, config, 0)
    whole_pass = WholePass(shape_of(config), weights, SomeRanks(ranks) if ranks > 1 else None)
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
    plain = Precision.plain("bfloat16")

    def names(batch: int, queries: int, max_context: int) -> list[str]:
        return [one.kernel.__name__ for one in record(plain, batch, queries, max_context)]

    assert names(8, 2, MAX_CONTEXT) == ["_context_kernel", "whole_pass_kernel"]
    for many in ((17, 1, 100), (8, 3, 100), (8, 1, MAX_CONTEXT + 1), (16, 2, 100)):
        assert "whole_pass_kernel" not in names(*many), many


@pytest.mark.parametrize(("batch", "queries", "ranks"), [(8, 1, 1), (8, 2, 1), (8, 1, 2), (8, 2, 4)])
@pytest.mark.parametrize("precision", [Precision.plain("bfloat16"), FP8], ids=["bfloat16", "fp8"])
def test_the_kernel_compiles_for_hopper(precision: Precision, batch: int, queries: int, ranks: int) -> None:
    compiled = compile_recorded(record(precision, batch, queries, MAX_CONTEXT, ranks)[-1])
    assert ("st.relaxed.sys" in compiled.ptx) == (ranks > 1)
    # FP8 pages stop at their largest value, which must not make a number of what is none.
    for bound in ("min", "max"):
        assert (f"{bound}.NaN.f32" in compiled.ptx) == (precision is FP8)
    assert compiled.name == "whole_pass_kernel"
    assert compiled.shared_bytes <= 227 * 1024
    assert compiled.spill_bytes <= 64  # at most a few values that are read once a layer
    # Weights come by bulk copies; a stage is given back only after what was read of it has arrived.
    assert "cp.async.bulk.tensor" in compiled.ptx
    assert "fence.proxy.async" in compiled.ptx
    assert "griddepcontrol.wait" in compiled.ptx
    assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in compiled.ptx
