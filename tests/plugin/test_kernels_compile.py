"""Every kernel compiles for Hopper without a GPU, at the shapes of Llama-8B and Llama-1B, without spilling registers."""

import pytest
import torch
from torch import Tensor

from smc_plugin.group_state import GroupState
from smc_plugin.kernels import (
    attention,
    embedding,
    groups,
    launch,
    matmul,
    pages,
    resample,
    residual_norm,
    sampling,
    shards,
    weights,
)
from smc_plugin.kernels.compile import Compiled, compile_recorded, precompile

FP8, BF16, F32, F64, I32, I64 = (
    torch.float8_e4m3fn,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int32,
    torch.int64,
)
VOCAB = 128256
# name: (hidden, qkv, ffn, head_dim)
MODELS = {"llama-8b": (4096, 6144, 14336, 128), "llama-1b": (2048, 3072, 8192, 64)}
HEADS, KV_HEADS = 32, 8


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """A tensor with a shape and no memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_all(recorded: list[launch.Recorded]) -> list[Compiled]:
    """Compile each recorded launch once and check what holds for all."""
    done = [compile_recorded(one) for one in recorded]
    for one in done:
        assert one.cubin[:4] == b"\x7fELF"
        assert "griddepcontrol.wait" in one.ptx, one.name
        assert one.registers <= 255, one
        assert one.shared_bytes <= 227 * 1024, one
    return done


def test_sampling() -> None:
    def names(rows: int) -> list[Tensor]:
        return [meta(rows, dtype=I64) for _ in range(4)]

    with launch.recording() as recorded:
        sampling.sample(meta(8, VOCAB, dtype=F32), meta(8, dtype=F32), *names(8))
        alpha, rows = meta(8, dtype=F32), meta(8, dtype=I64)
        sampling.sample(meta(72, VOCAB), meta(8, dtype=F32), *names(8), alpha=alpha, rows=rows)
        sampling.score(meta(72, VOCAB, dtype=F32), meta(72, dtype=I64), meta(72, dtype=F32))
        sampling.apply_filters(meta(8, VOCAB, dtype=F32), meta(8, dtype=I64), meta(8, dtype=F32), meta(8, dtype=F32))
    compiled = compile_all(recorded)
    assert all(one.spill_bytes == 0 for one in compiled)
    assert "ld.global.v4" in compiled[0].ptx  # 16-byte loads of the logits


def test_a_rank_of_two() -> None:
    """What tensor parallelism adds: a rank's statistics, what joins them, and the residual after a sum over ranks."""
    names = tuple(meta(8, dtype=I64) for _ in range(4))
    heat, wide = meta(8, dtype=F32), meta(72, VOCAB // 2, dtype=F32)
    with launch.recording() as recorded:
        shards.shard_stats(meta(8, VOCAB // 2, dtype=F32), heat, VOCAB // 2, names)
        shards.shard_stats(wide, heat, VOCAB // 2, names, heat, meta(8, dtype=I64))
        shards.shard_stats(wide, meta(72, dtype=F32), 0, tokens=meta(72, dtype=I64))
        shards.combine(meta(2, 8, shards.NUM_STATS, dtype=F32), heat)
        shards.combine(meta(2, 72, shards.NUM_STATS, dtype=F32), None, meta(72, dtype=I64))
        residual_norm.add_and_norm(meta(72, 8192), meta(72, 8192), meta(8192), 1e-5)
    assert all(one.spill_bytes == 0 for one in compile_all(recorded))


@pytest.mark.parametrize("particles", [8, 64])
def test_weights_and_resampling(particles: int) -> None:
    groups, drafts = 2, 8
    values, terms = meta(groups, particles, dtype=F64), meta(groups, particles, drafts, dtype=F32)
    end, whole = meta(groups, particles, dtype=I64), meta(groups, dtype=I64)
    real, flag = meta(groups, dtype=F64), meta(groups, dtype=torch.bool)
    over = meta(groups, particles, dtype=torch.bool)
    with launch.recording() as recorded:
        weights.accumulate(values, terms.double(), end, over)
        weights.effective_sample_size(values)
        resample.systematic_resample(values, real)
        resample.keep_survivors(end)
        resample.resample_if_needed(values, whole, whole, real, flag, real)
        resample.weigh_and_resample(
            *(values, terms, terms, meta(groups, dtype=F32), end, over, flag, values, whole, whole, real, flag, real)
        )
    assert all(one.spill_bytes == 0 for one in compile_all(recorded))


@pytest.mark.parametrize("particles", [1, 8, 64])
@pytest.mark.parametrize("tables", [False, True])
def test_groups(particles: int, tables: bool) -> None:
    state = GroupState.allocate(3, particles, 800, 50, 32, torch.device("cpu"))
    slots, flag, real = meta(2, dtype=I64), meta(2, dtype=torch.bool), meta(2, dtype=F64)
    terms, more = meta(2, particles, 8, dtype=F32), meta(2, particles, 9, dtype=F32)
    values, whole = meta(2, particles, dtype=F64), meta(2, particles, dtype=I64)
    row = meta(2 * particles, dtype=F32)
    bonus = sampling.Sampled(row.long(), row, row, row)
    table = meta(3, 64, VOCAB, dtype=torch.int8) if tables else None
    with launch.recording() as recorded:
        opened = groups.open_round(state, slots, particles, 8, 16)
        groups.find_ends(state, slots, terms.long(), terms, more, table)
        groups.commit(state, slots, terms.long(), terms, bonus, values, slots, whole, flag, table, 16)
        decided = resample.Resampled(values, real, whole, real, flag)
        groups.close_round(state, slots, decided, opened.block_table, slots, slots, flag, flag[0])
    assert [one.kernel.__name__ for one in recorded] == [
        *("_open_kernel", "_ends_kernel", "_commit_kernel", "_inherit_kernel", "_close_kernel")
    ]
    assert all(one.spill_bytes == 0 for one in compile_all(recorded))


def test_pages() -> None:
    ref_count, table, whole = meta(30000, dtype=I32), meta(1, 8, 600, dtype=I32), meta(1, dtype=I64)
    with launch.recording() as recorded:
        pages.reserve(ref_count, table, whole, whole, 2)
        source, destination = pages.fork(ref_count, table, meta(1, 8, dtype=I64), whole)
        pages.release(ref_count, table, whole)
        pages.copy_pages(meta(32, 2, 3000, 16, KV_HEADS, 128), source, destination)
    assert all(one.spill_bytes == 0 for one in compile_all(recorded))


@pytest.mark.parametrize(("model", "kv_dtype"), [("llama-8b", BF16), ("llama-1b", BF16), ("llama-8b", FP8)])
def test_attention(model: str, kv_dtype: torch.dtype) -> None:
    _, qkv, _, head_dim = MODELS[model]
    cache = meta(2, 3000, 16, KV_HEADS, head_dim, dtype=kv_dtype)
    with launch.recording() as recorded:
        for batch, queries, norm in ((8, 1, True), (8, 2, False), (8, 9, False), (1, 512, False)):
            context = attention.make_context(
                *(meta(batch, dtype=I64), queries, meta(batch, 600, dtype=I32), 16, meta(head_dim // 2, dtype=F32), 784)
            )
            norms = (meta(head_dim), meta(head_dim)) if norm else (None, None)
            attention.attend(meta(batch * queries, qkv), cache, context, HEADS, *norms)
    for launched, one in zip(recorded, compile_all(recorded), strict=True):
        # Reducing a large angle takes 32 bytes of stack; it shows that sine and cosine are the accurate ones.
        assert one.spill_bytes == (32 if one.name == "_context_kernel" else 0), one
        assert "cos.approx" not in one.ptx
        if launched.arguments.get("FUSED"):
            # The first tile of old keys and values is asked for before the wait for the new ones.
            first_read = "ld.global.cg.v4" if kv_dtype == BF16 else "ld.global.cg"
            assert one.ptx.index(first_read) < one.ptx.index("griddepcontrol.wait")
        if kv_dtype == FP8 and one.name == "_attention_kernel":
            assert "e4m3x2" in one.ptx


@pytest.mark.parametrize("rows", [8, 40, 72])
def test_float32_products_fit_shared_memory(rows: int) -> None:
    with launch.recording() as recorded:
        matmul.linear(meta(rows, 2048, dtype=F32), meta(2048, 2048, dtype=F32))
        matmul.gated(meta(rows, 2048, dtype=F32), meta(2048, 16384, dtype=F32))
    compile_all(recorded)


@pytest.mark.parametrize(("capability", "waits"), [(80, False), (90, True)])
def test_older_gpus_get_no_dependent_launch(capability: int, waits: bool) -> None:
    with launch.recording() as recorded:
        matmul.linear(meta(8, 256), meta(256, 128))
    assert ("griddepcontrol" in compile_recorded(recorded[0], capability).ptx) == waits


def test_precompiling_counts_each_specialisation_once() -> None:
    """Numbers of rows do not make machine code of their own; tiles do."""
    with launch.recording() as recorded:
        for rows in (1, 8, 16):
            matmul.linear(meta(rows, 256), meta(256, 128), tactic=matmul.Tactic(16, 64, 64, 1, 4, 3))
        matmul.linear(meta(8, 256), meta(256, 128), tactic=matmul.Tactic(16, 32, 64, 1, 4, 3))
    assert precompile(recorded, 90, workers=1) == 2


def test_look_up() -> None:
    with launch.recording() as recorded:
        embedding.embed(meta(72, dtype=I64), meta(VOCAB, 4096))
        embedding.embed(meta(1, dtype=I64), meta(VOCAB, 1536))
    assert all(one.spill_bytes == 0 for one in compile_all(recorded))


def test_sizes_of_one_compile() -> None:
    """A launch turns integers equal to 1 into constants, which lack a tensor's methods."""
    values, terms, whole = meta(1, 1, dtype=F64), meta(1, 1, 1, dtype=F32), meta(1, dtype=I64)
    end, over = meta(1, 1, dtype=I64), meta(1, 1, dtype=torch.bool)
    real, flag, single = meta(1, dtype=F64), meta(1, dtype=torch.bool), meta(1, dtype=F32)
    with launch.recording() as recorded:
        resample.weigh_and_resample(
            *(values, terms, terms, single, end, over, flag, values, whole, whole, real, flag, real)
        )
        resample.systematic_resample(values, real)
        pages.reserve(meta(100, dtype=I32), meta(1, 1, 9, dtype=I32), whole, whole, 1)
        sampling.sample(meta(1, 700), single, whole, whole, whole, whole, alpha=single)
        context = attention.make_context(whole, 1, meta(1, 9, dtype=I32), 1, meta(16, dtype=F32), 64)
        attention.attend(meta(1, 96, dtype=F32), meta(2, 9, 1, 1, 32, dtype=F32), context, 1)
        matmul.linear(meta(1, 64, dtype=F32), meta(64, 1, dtype=F32))
    compile_all(recorded)


@pytest.mark.parametrize("rows", [8, 72])
@pytest.mark.parametrize("model", MODELS)
def test_products(model: str, rows: int) -> None:
    hidden, qkv, ffn, _ = MODELS[model]
    norm, residual = (meta(hidden), 1e-5), meta(rows, hidden)
    with launch.recording() as recorded:
        _, normed = matmul.linear_and_norm(meta(rows, hidden), meta(hidden, hidden), residual, norm)
        inner = matmul.gated(normed, meta(hidden, 2 * ffn))
        _, normed = matmul.linear_and_norm(inner, meta(ffn, hidden), residual, norm)
        matmul.linear(normed, meta(hidden, qkv))
        matmul.linear(meta(rows, hidden), meta(VOCAB, hidden), transpose_w=True, dtype=F32)
    compiled = compile_all(recorded)
    for one in compiled:
        assert one.spill_bytes == 0, one.name
        if one.name == "_linear_kernel":
            # Weights travel in asynchronous 16-byte copies; the first are asked for before the wait for the inputs.
            assert "cp.async.cg.shared.global" in one.ptx
            assert one.ptx.index("prefetch.global.L2") < one.ptx.index("griddepcontrol.wait")
            assert one.ptx.index("griddepcontrol.wait") < one.ptx.index("cp.async.cg")


@pytest.mark.parametrize("rows", [8, 72])
def test_fp8_products(rows: int) -> None:
    hidden, qkv, ffn, _ = MODELS["llama-8b"]
    norm, residual = (meta(hidden), 1e-5), meta(rows, hidden)

    def fp8(columns: int, inner: int) -> Tensor:
        return meta(columns, inner, dtype=FP8)

    def scale(columns: int) -> Tensor:
        return meta(columns, dtype=F32)

    with launch.recording() as recorded:
        _, normed = matmul.linear_and_norm(
            *(meta(rows, hidden), fp8(hidden, hidden), residual, norm, None, True, scale(hidden))
        )
        inner = matmul.gated(normed, fp8(2 * ffn, hidden), None, True, scale(2 * ffn))
        _, normed = matmul.linear_and_norm(inner, fp8(hidden, ffn), residual, norm, None, True, scale(hidden))
        matmul.linear(normed, fp8(qkv, hidden), transpose_w=True, scale=scale(qkv))
        matmul.linear(meta(rows, hidden), fp8(VOCAB, hidden), None, None, True, F32, None, scale(VOCAB))
    for one in compile_all(recorded):
        assert one.spill_bytes == 0, one.name
        assert "cp.async.cg.shared.global" in one.ptx  # weights travel as bytes, 16 at a time,
        assert "mul.rn.bf16x2" in one.ptx  # become bfloat16 in registers,
        assert "cvt.rn.f16x2.e4m3x2" not in one.ptx  # not by the slow conversion,
        assert "mma" in one.ptx  # and are multiplied by the matrix units


@pytest.mark.parametrize("fp8", [True, False])
def test_rows_in_two_tiles(fp8: bool) -> None:
    """Both tiles are multiplied by Hopper's instructions, from one read of the weights, and nothing spills."""
    hidden, ffn = 4096, 14336
    product = matmul.Product(72, ffn, hidden, True, 1 if fp8 else 2, 2)
    tailed = [tactic for tactic in matmul.candidate_tactics(product, launch.Gpu()) if tactic.tail]
    assert len(tailed) >= 3
    weight = meta(2 * ffn, hidden, dtype=FP8) if fp8 else meta(hidden, 2 * ffn)
    with launch.recording() as recorded:
        for tactic in tailed:
            matmul.gated(meta(72, hidden), weight, tactic, fp8, meta(2 * ffn, dtype=F32) if fp8 else None)
    for tactic, one in zip(tailed, compile_all(recorded), strict=True):
        assert one.spill_bytes == 0, tactic
        steps = tactic.inner // 16 * 2
        counts = [one.ptx.count(f"wgmma.mma_async.sync.aligned.m64n{rows}k16") for rows in (64, 16)]
        assert counts == [steps, steps], tactic
        # Four FP8 weights are two multiplications by 2^120, and each weight is widened once.
        assert one.ptx.count("mul.rn.bf16x2") == (
            tactic.columns * tactic.inner // (32 * tactic.num_warps) if fp8 else 0
        )


@pytest.mark.parametrize(("rows", "gated"), [(8, True), (72, False)])
def test_shared_memory_of_fp8_candidates_is_what_is_reckoned(rows: int, gated: bool) -> None:
    hidden, columns = 4096, 28672
    product = matmul.Product(rows, columns // 2 if gated else columns, hidden, gated, 1, 2)
    candidates = matmul.candidate_tactics(product, launch.Gpu())
    with launch.recording() as recorded:
        for tactic in candidates:
            x, weight, scale = meta(rows, hidden), meta(columns, hidden, dtype=FP8), meta(columns, dtype=F32)
            if gated:
                matmul.gated(x, weight, tactic, True, scale)
            else:
                matmul.linear(x, weight, transpose_w=True, tactic=tactic, scale=scale)
    for tactic, one in zip(candidates, compile_all(recorded), strict=True):
        reckoned = matmul._tile_bytes(product, tactic.height, tactic.columns, tactic.inner, tactic.num_stages)
        assert one.shared_bytes <= reckoned * 8 // 7, tactic
        assert one.spill_bytes == 0, tactic
