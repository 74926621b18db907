"""Times every kernel inside a CUDA graph at the shapes of Llama-8B and Llama-1B, and writes JSON.

    python scripts/bench_kernels.py --output kernels.json            about a minute on an H100
    python scripts/bench_kernels.py --output kernels.json --tune 8   also times 8 tactics a matrix product

A time is the median over replays of a graph of many calls, divided by the calls: launch gaps count as they would in a
round. Calls rotate over copies of their large operands, 256 MB together, so that the L2 cache cannot serve them.
bytes counts what must move at least; copy_fraction is bytes per second over the copy bandwidth measured in the same run.
torch_us is the plain torch way to the same result, captured and timed the same way.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from torch.nn import functional

from smc_plugin.kernels import attention, launch, matmul, pages, resample, sampling
from smc_plugin.kernels.matmul import Tactic
from smc_plugin.kernels.timing import graph_times_us
from smc_plugin.reference import sampling as sampling_reference

DEVICE = "cuda"
ROTATED_BYTES = 256 << 20
VOCAB = 128256
EPS = 1e-5
BF16, F32, F64, I32, I64 = torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64


@dataclass(frozen=True)
class Shape:
    """What the kernels see of a decoder."""

    name: str
    hidden: int
    qkv: int
    ffn: int
    layers: int
    heads: int = 32
    kv_heads: int = 8

    @property
    def head_dim(self) -> int:
        return self.qkv // (self.heads + 2 * self.kv_heads)


MODELS = (Shape("llama-8b", 4096, 6144, 14336, 32), Shape("llama-1b", 2048, 3072, 8192, 16))


@dataclass
class Row:
    """One measurement."""

    kernel: str
    shape: str
    us: float
    spread_us: float
    bytes: int
    tb_per_s: float
    copy_fraction: float
    torch_us: float | None = None
    tactic: dict | None = None


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=BF16 if dtype == BF16 else F32).to(dtype)


def time_us(call: Callable[[int], object], copies: int = 1) -> tuple[float, float]:
    """Median and spread (highest less lowest) of a call's time in microseconds.

    Args:
        call: runs the kernel on copy number i of its operands.
        copies: how many there are.
    """
    calls = copies * max(1, 24 // copies)
    times = graph_times_us([lambda index=index: call(index % copies) for index in range(calls)], replays=7)
    return statistics.median(times) / calls, (max(times) - min(times)) / calls


class Bench:
    """Collects rows against the copy bandwidth of this run."""

    def __init__(self, tune: int) -> None:
        self.tune = tune
        self.rows: list[Row] = []
        source, target = (torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE) for _ in range(2))
        us, _ = time_us(lambda _: target.copy_(source))
        self.copy_tb_per_s = 2 * source.numel() / us / 1e6
        print(f"copy bandwidth {self.copy_tb_per_s:.2f} TB/s", flush=True)

    def add(
        self,
        kernel: str,
        shape: str,
        num_bytes: int,
        call: Callable[[int], object],
        plain: Callable[[int], object] | None = None,
        copies: int = 1,
        tactic: Tactic | None = None,
    ) -> Row:
        """Time a call, and the plain torch call where there is one."""
        us, spread = time_us(call, copies)
        torch_us = None if plain is None else round(time_us(plain, copies)[0], 2)
        rate = num_bytes / us / 1e6
        fraction = rate / self.copy_tb_per_s
        described = None if tactic is None else asdict(tactic)
        row = Row(
            *(kernel, shape, round(us, 2), round(spread, 2), num_bytes, round(rate, 3), round(fraction, 3)),
            *(torch_us, described),
        )
        beside = "" if torch_us is None else f"  torch {torch_us:8.2f} us"
        print(f"{kernel:28} {shape:30} {us:8.2f} us  {rate:5.2f} TB/s  {fraction:6.1%}{beside}", flush=True)
        self.rows.append(row)
        return row


def copies_of(num_bytes: int) -> int:
    return max(2, min(64, -(-ROTATED_BYTES // num_bytes)))


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, EPS)


def plain_gated(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    gate, up = (plain_norm(x, scale) @ weight).chunk(2, dim=-1)
    return functional.silu(gate) * up


def bench_product(bench: Bench, name: str, shape: Shape, rows: int) -> None:
    """One of a layer's four products, or the head, with its fused neighbours."""
    h, f = shape.hidden, shape.ffn
    inner, width = {"qkv": (h, shape.qkv), "o": (h, h), "gate_up": (h, 2 * f), "down": (f, h), "head": (h, VOCAB)}[name]
    num_bytes = inner * width * 2
    copies = copies_of(num_bytes)
    x, scale, residual = normal(rows, inner), normal(inner), normal(rows, h)
    weights = [normal(*((width, inner) if name == "head" else (inner, width))) * 0.02 for _ in range(copies)]
    gated = name == "gate_up"
    normed = matmul.Prenormed(x * scale, x.float().square().view(rows, -1, 32).sum(dim=-1).t().contiguous(), EPS)
    norm = (normal(h), EPS)
    calls: dict[str, Callable[[int, Tactic | None], object]] = {
        "qkv": lambda i, t: matmul.linear(normed, weights[i], tactic=t),
        "o": lambda i, t: matmul.linear_and_norm(x, weights[i], residual, norm, t),
        "gate_up": lambda i, t: matmul.gated(normed, weights[i], t),
        "down": lambda i, t: matmul.linear_and_norm(x, weights[i], residual, norm, t),
        "head": lambda i, t: matmul.linear(x, weights[i], transpose_w=True, dtype=F32, tactic=t),
    }
    plain: dict[str, Callable[[int], object]] = {
        "qkv": lambda i: plain_norm(x, scale) @ weights[i],
        "o": lambda i: residual + x @ weights[i],
        "gate_up": lambda i: plain_gated(x, scale, weights[i]),
        "down": lambda i: residual + x @ weights[i],
        "head": lambda i: functional.linear(x, weights[i]).float(),
    }
    call, gpu = calls[name], launch.gpu_of(x.device)
    columns = width // 2 if gated else width
    label = f"{shape.name} rows={rows}"
    product = matmul.Product(rows, columns, inner, gated)
    default = matmul.default_tactic(product, gpu)
    bench.add(f"product/{name}", label, num_bytes, lambda i: call(i, None), plain[name], copies, default)
    candidates = matmul.candidate_tactics(product, gpu)[1:]
    step = max(1, len(candidates) // max(1, bench.tune))
    timed = []
    for tactic in itertools.islice(candidates, 0, step * bench.tune, step):
        timed.append((time_us(lambda i, t=tactic: call(i, t), copies)[0], tactic))
    if timed:
        best = min(timed, key=lambda pair: pair[0])[1]
        bench.add(f"product/{name}/tuned", label, num_bytes, lambda i: call(i, best), None, copies, best)


def bench_attention(bench: Bench, shape: Shape, batch: int, queries: int, context_len: int, shared: bool) -> None:
    """One layer's attention, rope and KV write included; `shared`: all sequences have the same pages but the last."""
    page_size, kv_heads, head_dim = 16, shape.kv_heads, shape.head_dim
    columns = (context_len + queries) // page_size + 1
    own = torch.arange(1, batch * columns + 1, device=DEVICE, dtype=I32).view(batch, columns)
    table = own.clone()
    if shared:
        table[:, : columns - 2] = own[:1, : columns - 2]
    token_bytes = 2 * kv_heads * head_dim * 2
    num_bytes = token_bytes * context_len * (1 if shared else batch)
    copies = copies_of(num_bytes)
    caches = [normal(2, batch * columns + 1, page_size, kv_heads, head_dim) for _ in range(copies)]
    qkv = normal(batch * queries, shape.qkv)
    start = torch.full((batch,), context_len, device=DEVICE, dtype=I64)
    inv_freq = 500000.0 ** -(torch.arange(head_dim // 2, device=DEVICE) / (head_dim // 2))
    context = attention.make_context(start, queries, table, page_size, inv_freq, context_len + queries)
    label = f"{shape.name} B={batch} Q={queries} T={context_len}{' shared' if shared else ''}"
    bench.add(
        "attend", label, num_bytes, lambda i: attention.attend(qkv, caches[i], context, shape.heads), copies=copies
    )


def bench_sampling(bench: Bench) -> None:
    for rows in (8, 72):
        copies = copies_of(rows * VOCAB * 4)
        logits = [normal(rows, VOCAB, dtype=F32) for _ in range(copies)]
        name = [torch.arange(rows, device=DEVICE) for _ in range(4)]
        heat = torch.full((rows,), 0.7, device=DEVICE)
        tokens = torch.arange(rows, device=DEVICE)

        def plain(i: int, logits=logits, heat=heat, name=name) -> object:
            scaled = sampling_reference.scale(logits[i], heat)
            return sampling_reference.log_prob(scaled, sampling_reference.draw(scaled, *name))

        label, num_bytes = f"rows={rows} float32", rows * VOCAB * 4
        bench.add("sample", label, num_bytes, lambda i: sampling.sample(logits[i], heat, *name), plain, copies)  # noqa: B023
        bench.add("score", label, num_bytes, lambda i: sampling.score(logits[i], tokens, heat), None, copies)  # noqa: B023
        top_k, top_p, min_p = tokens * 0 + 50, heat * 0 + 0.9, heat * 0
        bench.add(
            *("apply_filters k=50 p=0.9", label, 2 * num_bytes),
            lambda i: sampling.apply_filters(logits[i], top_k, top_p, min_p),  # noqa: B023
            lambda i: sampling_reference.apply_filters(logits[i], top_k, top_p, min_p),  # noqa: B023
            copies,
        )


def bench_round_end(bench: Bench) -> None:
    for groups, particles in ((1, 8), (16, 8), (1, 64)):
        drafts = 8
        values = normal(groups, particles, dtype=F64)
        terms = normal(groups, particles, drafts, dtype=F32)
        whole, real = torch.ones(groups, device=DEVICE, dtype=I64), torch.ones(groups, device=DEVICE, dtype=F64)
        flag = torch.ones(groups, device=DEVICE, dtype=torch.bool)
        end = torch.full((groups, particles), drafts + 1, device=DEVICE)
        given = (values, terms, -terms, real.float(), end, end < 0, ~flag, values, whole, whole, real, flag, real)
        label = f"G={groups} N={particles} K={drafts}"
        bench.add("weigh_and_resample", label, terms.numel() * 8, lambda _: resample.weigh_and_resample(*given))  # noqa: B023


def bench_pages(bench: Bench) -> None:
    ref_count = torch.ones(30000, device=DEVICE, dtype=I32)
    ref_count[20000:] = 0
    table = torch.zeros((1, 8, 512), device=DEVICE, dtype=I32)
    held = torch.full((1,), 100, device=DEVICE, dtype=I64)
    # Each call takes 8 pages for good; there are 10000.
    bench.add("reserve", "P=30000, 20000 taken", 80000, lambda _: pages.reserve(ref_count, table, held, held + 1, 2))
    ancestors = torch.zeros((1, 8), device=DEVICE, dtype=I64)
    bench.add("fork", "N=8, 100 shared pages", 8 * 100 * 8, lambda _: pages.fork(ref_count, table, ancestors, held))
    for shape in MODELS:
        cache = normal(shape.layers, 2, 100, 16, shape.kv_heads, shape.head_dim)
        source = torch.zeros(8, device=DEVICE, dtype=I32)
        destination = torch.arange(1, 9, device=DEVICE, dtype=I32)
        moved = 7 * 2 * cache[:, :, 0].numel() * 2
        move = torch.where(destination > 1, destination + 20, 0), torch.where(destination > 1, destination, 0)
        pair = (move[0].to(I32), move[1].to(I32))
        bench.add("copy_pages", f"{shape.name} 7 of 8 move", moved, lambda _: pages.copy_pages(cache, *pair))  # noqa: B023
        bench.add("copy_pages", f"{shape.name} none moves", 0, lambda _: pages.copy_pages(cache, source, source))  # noqa: B023


def run_all(bench: Bench) -> None:
    """Every kernel: products first, they decide most."""
    for shape in MODELS:
        for rows in (8, 16, 72):
            for name in ("qkv", "o", "gate_up", "down", "head"):
                bench_product(bench, name, shape, rows)
                torch.cuda.empty_cache()
    for shape in MODELS:
        for batch, queries, context_len, shared in (
            *((1, 1, 512, False), (8, 1, 512, True), (8, 2, 512, True), (8, 9, 512, True)),
            *((8, 1, 4096, True), (8, 9, 4096, True), (8, 9, 4096, False)),
        ):
            bench_attention(bench, shape, batch, queries, context_len, shared)
            torch.cuda.empty_cache()
    bench_sampling(bench)
    bench_round_end(bench)
    bench_pages(bench)


def main() -> int:
    parser = argparse.ArgumentParser(description="Time the Triton kernels on a GPU and write JSON.")
    parser.add_argument("--output", type=Path, default=Path("bench_kernels.json"), help="JSON file to write")
    parser.add_argument("--tune", type=int, default=0, metavar="N", help="time N further tactics for each product")
    parser.add_argument("--no-pdl", action="store_true", help="switch programmatic dependent launch off")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_kernels needs a CUDA GPU, found none: run it on a GPU machine", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    with launch.pdl(not arguments.no_pdl):
        bench = Bench(arguments.tune)
        run_all(bench)
    report = {
        "gpu": torch.cuda.get_device_name(),
        "copy_tb_per_s": round(bench.copy_tb_per_s, 3),
        "pdl": not arguments.no_pdl,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "rows": [asdict(row) for row in bench.rows],
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
