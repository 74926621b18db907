"""Time the FP8 products of a decoder on a GPU: two weight layouts, cuBLASLt, and bfloat16 beside them.

    python scripts/bench_fp8.py --tune 9 --output docs/benchmarks/fp8-products.json

For each product of Llama-8B and Llama-1B at 8 and 72 rows, weights rotating so that they come from memory:

    fused [N, K]   the fused kernel, FP8 weights in the engine's layout, the best of its tactics
    fused [K, N]   the same with the weights transposed
    scaled_mm      torch._scaled_mm (cuBLASLt): FP8 activations too, one scale each, nothing fused
    bfloat16       the fused kernel on bfloat16 weights [K, N]
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import triton
from bench_kernels import BF16, DEVICE, MODELS, Bench, Shape, copies_of, normal, time_us
from torch import Tensor

from smc_plugin.kernels import launch, matmul
from smc_plugin.tactic import Tactic

FP8 = torch.float8_e4m3fn


def bench_product(bench: Bench, name: str, shape: Shape, rows: int) -> None:
    """One product in every variant."""
    h, f = shape.hidden, shape.ffn
    inner, width = {"qkv": (h, shape.qkv), "o": (h, h), "gate_up": (h, 2 * f), "down": (f, h)}[name]
    gated, x = name == "gate_up", normal(rows, inner)
    scale, one = torch.rand(width, device=DEVICE) / 448, torch.ones((), device=DEVICE)
    copies = copies_of(inner * width)
    wide = [normal(inner, width) * 8 for _ in range(copies)]
    across = [weight.to(FP8) for weight in wide]
    along = [weight.t().contiguous() for weight in across]
    small = x.to(FP8)

    def fused(weights: list[Tensor], transpose_w: bool, column_scale: Tensor | None) -> Callable[[int, Tactic], object]:
        if gated:
            return lambda i, t: matmul.gated(x, weights[i], t, transpose_w, column_scale)
        return lambda i, t: matmul.linear(x, weights[i], None, None, transpose_w, None, t, column_scale)

    for variant, call, element_bytes in (
        ("fused [N, K]", fused(along, True, scale), 1),
        ("fused [K, N]", fused(across, False, scale), 1),
        ("bfloat16", fused(wide, False, None), 2),
    ):
        product = matmul.Product(rows, width // 2 if gated else width, inner, gated, element_bytes, 2)
        candidates = itertools.islice(matmul.candidate_tactics(product, launch.gpu_of(x.device)), 1 + bench.tune)
        timed = [(time_us(lambda i, c=call, t=t: c(i, t), copies)[0], t) for t in candidates]
        best = min(timed, key=lambda pair: pair[0])[1]
        num_bytes, label = inner * width * element_bytes, f"{shape.name} rows={rows}"
        bench.add(f"{name}/{variant}", label, num_bytes, lambda i, c=call, t=best: c(i, t), None, copies, best)
    bench.add(
        f"{name}/scaled_mm",
        f"{shape.name} rows={rows}",
        inner * width,
        lambda i: torch.ops.aten._scaled_mm(small, along[i].t(), one, one, None, None, BF16),
        None,
        copies,
    )


def main() -> int:
    """Time everything and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("bench_fp8.json"), help="JSON file to write")
    parser.add_argument("--tune", type=int, default=9, metavar="N", help="further tactics to time; default %(default)s")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_fp8 needs a CUDA GPU, found none: run it on a GPU machine", file=sys.stderr)
        return 1
    torch.manual_seed(0)
    bench = Bench(arguments.tune)
    for shape, rows, name in itertools.product(MODELS, (8, 72), ("qkv", "o", "gate_up", "down")):
        bench_product(bench, name, shape, rows)
        torch.cuda.empty_cache()
    report = {
        "gpu": torch.cuda.get_device_name(),
        "command": f"python scripts/bench_fp8.py --tune {arguments.tune}",
        "copy_tb_per_s": round(bench.copy_tb_per_s, 3),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__},
        "rows": [asdict(row) for row in bench.rows],
    }
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
