"""The Triton kernels on a GPU at the shapes of Llama-8B and Llama-1B, against float64 or the torch reference."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from smc_plugin.kernels import attention, launch, matmul, pages, resample, sampling, weights
from smc_plugin.reference import attention as attention_reference
from smc_plugin.reference import pages as pages_reference
from smc_plugin.reference import random
from smc_plugin.reference import resample as resample_reference
from smc_plugin.reference import sampling as sampling_reference
from smc_plugin.reference import weights as weights_reference
from tests.gpu.helpers import DEVICE, captured, normal, relative_error

VOCAB = 128256
EPS = 1e-5
F32, F64, I32, I64 = torch.float32, torch.float64, torch.int32, torch.int64


def names(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index = torch.arange(rows, device=DEVICE)
    return (index + 7) * 0x12345678ABCDEF, index * 3 + 2**31, index % 8, index * 8 + 1


def races(values: Tensor, name: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """The exponential race in float64 on the reference's words."""
    return values.double() - random.exponential(*name, values.shape[-1]).double().log()


def assert_wins(tokens: Tensor, race: Tensor) -> None:
    """Each token wins its race, up to the rounding of float32."""
    best = race.amax(dim=-1)
    assert ((best - race.gather(1, tokens[:, None])[:, 0]) <= 1e-5 * best.abs().clamp(min=1)).all()


@pytest.mark.parametrize("rows", [1, 8, 72])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_sample(rows: int, dtype: torch.dtype) -> None:
    logits = normal(rows, VOCAB, dtype=dtype) * 3
    temperature = torch.linspace(0.3, 1.5, rows, device=DEVICE)
    alpha = torch.linspace(1, 3, rows, device=DEVICE)

    def poison(drawn: sampling.Sampled) -> None:
        drawn.tokens.fill_(-1)
        for values in (drawn.log_prob, drawn.lse, drawn.log_zeta):
            values.fill_(float("nan"))

    drawn = captured(lambda: sampling.sample(logits, temperature, *names(rows), alpha=alpha), poison)
    scaled = logits.double() / temperature.double()[:, None]
    assert_wins(drawn.tokens, races(scaled * alpha[:, None].double(), names(rows)))
    lse = scaled.logsumexp(dim=-1)
    torch.testing.assert_close(drawn.lse.double(), lse, rtol=1e-5, atol=1e-5)
    chosen = scaled.gather(1, drawn.tokens[:, None])[:, 0] - lse
    torch.testing.assert_close(drawn.log_prob.double(), chosen, rtol=1e-5, atol=3e-5)
    zeta = (scaled * alpha[:, None].double()).logsumexp(dim=-1) - alpha.double() * lse
    torch.testing.assert_close(drawn.log_zeta.double(), zeta, rtol=1e-4, atol=1e-4)


def test_draws_follow_the_distribution() -> None:
    logits = normal(1, 50, dtype=F32).expand(40000, -1)
    index = torch.arange(40000, device=DEVICE)
    tokens = sampling.draw(logits, index, torch.zeros_like(index), index * 0, index * 0 + 1)
    expected = logits[0].softmax(dim=-1) * 40000
    seen = torch.bincount(tokens, minlength=50)
    chi_square = float(((seen - expected).square() / expected).sum())
    assert chi_square < 85.4  # 49 degrees of freedom, one in a thousand


@pytest.mark.parametrize("rows", [8, 72])
def test_filters(rows: int) -> None:
    scaled = normal(rows, VOCAB, dtype=F32) * 4
    scaled[::2] = scaled[::2].bfloat16().float()  # ties
    index = torch.arange(rows, device=DEVICE)
    top_k = torch.tensor([0, 1, 50, 1000], device=DEVICE)[index % 4]
    top_p = torch.tensor([0.9, 1.0, 0.5, 0.95, 0.999], device=DEVICE)[index % 5]
    min_p = torch.tensor([0.0, 0.02, 0.0], device=DEVICE)[index % 3]
    ours = captured(lambda: sampling.apply_filters(scaled, top_k, top_p, min_p), lambda out: out.fill_(7.0))
    expected = sampling_reference.apply_filters(scaled, top_k, top_p, min_p)
    differs = (ours != expected).sum(dim=-1)
    # Masses are float32: a cut may move by one token where a sum of thousands meets top_p to 1e-6.
    assert differs.max() <= 1
    assert (differs > 0).sum() <= rows // 8


@pytest.mark.parametrize(("groups", "particles"), [(1, 8), (16, 16), (3, 64), (2, 5)])
def test_round_end_equals_the_reference_on_a_cpu(groups: int, particles: int) -> None:
    drafts = 8
    generator = torch.Generator().manual_seed(groups)
    shape = (groups, particles, drafts)
    start = torch.randn((groups, particles), generator=generator, dtype=F64)
    start[0, 0] = -float("inf")
    log_p, log_q = (-torch.rand(shape, generator=generator) * 4 for _ in range(2))
    alpha = torch.rand(groups, generator=generator) + 0.5
    end = torch.randint(1, drafts + 2, (groups, particles), generator=generator)
    finished = torch.rand((groups, particles), generator=generator) < 0.2
    no, zero = torch.zeros(groups, dtype=torch.bool), torch.zeros(groups, dtype=F64)
    seed, step = torch.arange(groups) + 11, torch.arange(groups) + 5
    given = (
        start,
        log_p,
        log_q,
        alpha,
        end,
        finished,
        no,
        zero[:, None].expand_as(start),
        seed,
        step,
        zero + 1.0,
        ~no,
        zero,
    )
    on_gpu = tuple(one.to(DEVICE) for one in given)
    ours = captured(lambda: resample.weigh_and_resample(*on_gpu), lambda out: out.ancestors.fill_(-1))

    increments = (alpha[:, None, None] * log_p - log_q).to(F64)
    weighed = weights_reference.accumulate(start, increments, end, finished)
    u = random.uniform(seed, step, seed * 0, seed * 0 + random.PURPOSE_RESAMPLE)
    expected = resample_reference.systematic_resample(weighed.log_weights, u)
    assert ours.resampled.all()
    assert torch.equal(ours.ancestors.cpu(), expected)
    ess = weights_reference.effective_sample_size(weighed.log_weights)
    torch.testing.assert_close(ours.ess.cpu(), ess, rtol=1e-12, atol=0)
    evidence = weights_reference.log_mean_exp(weighed.log_weights)
    torch.testing.assert_close(ours.log_evidence.cpu(), evidence, rtol=1e-12, atol=1e-12)
    alone = weights.weigh(*on_gpu[:7])
    assert torch.equal(alone.log_weights.cpu(), weighed.log_weights)
    assert torch.equal(resample.systematic_resample(alone.log_weights, u.to(DEVICE)).cpu(), expected)


def test_pages_reserve_fork_copy_release() -> None:
    generator = torch.Generator().manual_seed(0)
    ref_count = (torch.rand(30000, generator=generator) < 0.999).to(I32)
    ref_count[0] = 1
    table = torch.zeros((3, 8, 40), dtype=I32)
    held = torch.zeros(3, dtype=I64)
    theirs = (ref_count.clone(), table.clone())
    ours = (ref_count.to(DEVICE), table.to(DEVICE))
    needed = torch.tensor([1, 0, 1])
    assert not pages.reserve(*ours, held.to(DEVICE), needed.to(DEVICE), 2)
    pages_reference.reserve(*theirs, held, needed, 2)
    assert torch.equal(ours[0].cpu(), theirs[0])
    assert torch.equal(ours[1].cpu(), theirs[1])
    ancestors = torch.arange(8).repeat(3, 1)
    ancestors[0, 1:5] = 0
    shared = torch.zeros(3, dtype=I64)
    moves = pages.fork(*ours, ancestors.to(DEVICE), shared.to(DEVICE))
    expected = pages_reference.fork(*theirs, ancestors, shared)
    assert all(torch.equal(mine.cpu(), other) for mine, other in zip(moves, expected, strict=True))
    source, destination = torch.tensor([[0, 5, 9]], dtype=I32), torch.tensor([[0, 77, 3]], dtype=I32)
    cache = normal(4, 2, 100, 16, 8, 128)
    copied = cache.clone()
    pages.copy_pages(copied, source.to(DEVICE), destination.to(DEVICE))
    pages_reference.copy_pages(cache, source.to(DEVICE), destination.to(DEVICE))
    assert torch.equal(copied, cache)
    pages.release(*ours, needed.to(DEVICE))
    pages_reference.release(*theirs, needed)
    assert torch.equal(ours[0].cpu(), theirs[0])
    assert not ours[1].any()


def exact_attention(qkv: Tensor, cache: Tensor, start: Tensor, table: Tensor, queries: int, inv_freq: Tensor) -> Tensor:
    """The reference in float64, whose rope and softmax round nothing to bfloat16."""
    context = attention_reference.make_context(start, queries, table, 16, inv_freq, int(start.max()) + queries)
    cache = cache.double()
    rows = attention_reference.rope_and_write(qkv.double(), cache, context, 32)
    return attention_reference.paged_attention(rows, cache, context)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("groups", "size", "queries"), [(1, 8, 1), (1, 8, 2), (1, 8, 9), (3, 4, 9), (4, 16, 1)])
def test_attention_reads_shared_pages_once(head_dim: int, groups: int, size: int, queries: int) -> None:
    """Groups that share 0, a few and many pages; counters left at zero."""
    kv_heads, own, batch = 8, 60, groups * size
    held = torch.tensor([130, 3, 40])[torch.arange(groups) % 3].to(DEVICE)
    columns = 130 + own // 16 + 3
    table = torch.arange(1, batch * columns + 1, device=DEVICE, dtype=I32).view(groups, size, columns)
    shared = torch.arange(columns, device=DEVICE) < held[:, None, None]
    table = torch.where(shared, table[:, :1], table).view(batch, columns)
    start = (held * 16 + own).repeat_interleave(size)
    cache = normal(2, batch * columns + 1, 16, kv_heads, head_dim)
    qkv = normal(batch * queries, (32 + 2 * kv_heads) * head_dim)
    inv_freq = 500000.0 ** -(torch.arange(head_dim // 2, device=DEVICE) / (head_dim // 2))
    expected = exact_attention(qkv, cache.clone(), start, table, queries, inv_freq)

    def run() -> Tensor:
        context = attention.make_context(start, queries, table, 16, inv_freq, 3000, shared=held)
        return attention.attend(qkv, cache, context, 32)

    assert relative_error(captured(run, lambda out: out.fill_(float("nan"))), expected) < 1e-2
    assert not launch.counters(qkv.device, 1).any()
    assert torch.equal(pages_reference.count_shared(table.view(groups, size, -1)), held)
    assert torch.equal(pages.count_shared(table.view(groups, size, -1)), held)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("batch", "queries"), [(1, 1), (8, 1), (8, 2), (8, 9), (64, 9), (2, 300)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, F32])
def test_attention(head_dim: int, batch: int, queries: int, dtype: torch.dtype) -> None:
    longest, kv_heads = 1500, 8
    columns = (longest + queries) // 16 + 2
    generator = torch.Generator().manual_seed(batch)
    start = torch.randint(0, longest, (batch,), generator=generator).to(DEVICE)
    num_pages = batch * columns + 1
    table = (torch.randperm(num_pages - 1, generator=generator) + 1).view(batch, columns).to(DEVICE, I32)
    cache = normal(2, num_pages, 16, kv_heads, head_dim, dtype=dtype)
    position = torch.arange(columns * 16, device=DEVICE)
    place = table.long().repeat_interleave(16, dim=1) * 16 + position % 16
    unwritten = place[position >= start[:, None]]
    cache.view(2, -1, kv_heads, head_dim)[:, unwritten] = float("nan")
    qkv = normal(batch * queries, (32 + 2 * kv_heads) * head_dim, dtype=dtype)
    inv_freq = 500000.0 ** -(torch.arange(head_dim // 2, device=DEVICE) / (head_dim // 2))
    expected = exact_attention(qkv, cache.clone(), start, table, queries, inv_freq)

    def run() -> tuple[Tensor, Tensor]:
        context = attention.make_context(start, queries, table, 16, inv_freq, longest + queries)
        fused = attention.attend(qkv, cache, context, 32)
        rows = attention.rope_and_write(qkv, cache, context, 32)
        return fused, attention.paged_attention(rows, cache, context)

    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-5
    for ours in captured(run, lambda outs: [out.fill_(float("nan")) for out in outs]):
        assert relative_error(ours, expected) < tolerance


PRODUCTS = {  # hidden, qkv, ffn
    "8b": (4096, 6144, 14336),
    "1b": (2048, 3072, 8192),
}


def exact_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.double()
    return weight.double() * wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + EPS)


@pytest.mark.parametrize("model", PRODUCTS)
@pytest.mark.parametrize("rows", [1, 8, 16, 40, 72, 200])
def test_products(model: str, rows: int) -> None:
    hidden, qkv, ffn = PRODUCTS[model]
    x, residual, scale = normal(rows, hidden), normal(rows, hidden), normal(hidden)
    w_o, w_qkv, w_down = (normal(*shape) * 0.02 for shape in ((hidden, hidden), (hidden, qkv), (ffn, hidden)))
    w_gate_up, bias = normal(hidden, 2 * ffn) * 0.02, normal(qkv)

    def run() -> tuple[Tensor, ...]:
        middle, normed = matmul.linear_and_norm(x, w_o, residual, (scale, EPS))
        inner = matmul.gated(normed, w_gate_up)
        last, normed = matmul.linear_and_norm(inner, w_down, middle, (scale, EPS))
        return middle, inner, last, matmul.linear(normed, w_qkv, bias)

    found = captured(run, lambda outs: [out.fill_(float("nan")) for out in outs])
    middle, inner, last, out = found
    assert relative_error(middle, x.double() @ w_o.double() + residual.double()) < 1e-2
    gate, up = (exact_norm(middle, scale) @ w_gate_up.double()).chunk(2, dim=-1)
    assert relative_error(inner, functional.silu(gate) * up) < 1e-2
    assert relative_error(last, inner.double() @ w_down.double() + middle.double()) < 1e-2
    assert relative_error(out, exact_norm(last, scale) @ w_qkv.double() + bias.double()) < 1e-2
    assert not launch.counters(x.device, 1).any()


@pytest.mark.parametrize("rows", [8, 72])
def test_head(rows: int) -> None:
    x, weight = normal(rows, 2048), normal(VOCAB, 2048)
    ours = matmul.linear(x, weight, transpose_w=True, dtype=F32)
    expected = x.float() @ weight.float().t()
    assert relative_error(ours, expected) < 1e-4


@pytest.mark.parametrize("rows", [8, 36, 72])
def test_every_candidate_tactic_agrees(rows: int) -> None:
    """Those that put rows into two tiles among them."""
    x, weight = normal(rows, 2048), normal(2048, 2048)
    expected = x.double() @ weight.double()
    candidates = matmul.candidate_tactics(matmul.Product(rows, 2048, 2048), launch.gpu_of(x.device))
    tailed = [tactic for tactic in candidates if tactic.tail]
    assert bool(tailed) == (rows > 8)
    for tactic in [*candidates[:12], *tailed]:
        assert relative_error(matmul.linear(x, weight, tactic=tactic), expected) < 1e-2, tactic


def test_dependent_launch_changes_nothing() -> None:
    """A chain of products over many replays: a kernel that read before its predecessor had written would differ."""
    x, weight = normal(8, 2048), normal(2048, 2048) * 0.022

    def run() -> Tensor:
        rows = x
        for _ in range(20):
            rows = matmul.linear(rows, weight, residual=x)
        return rows

    with launch.pdl(False):
        expected = captured(run, lambda out: out.fill_(float("nan"))).clone()
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours = run()
    for _ in range(50):
        ours.fill_(float("nan"))
        graph.replay()
        assert torch.equal(ours, expected)
