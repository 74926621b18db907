"""Times a sum over ranks with its residual and norm, NCCL and a kernel against one kernel for all; checks them first.

    python scripts/bench_sums.py --tp 4 --output sums.json        starts four ranks by itself; under a minute

A time is the median over replays of a graph of 64 calls, divided by the calls. The ways: NCCL's all-reduce, then residual and
norm ("nccl"); the same with torch's exchanges over peer-to-peer memory; one kernel that exchanges in one shot or in two
("one_shot", "two_shot"). Before a shape is timed, each way's result is compared with the sum in float64 and with
those of the other ranks, which must have the same bits; where one is off, the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smc_engines.config import ExecutorConfig
from smc_engines.parallel.connect import connect, launched_rank
from smc_engines.parallel.launch import find_mpirun, rank_environment
from smc_engines.parallel.nccl import NcclRanks
from smc_plugin.kernels.launch import gpu_of
from smc_plugin.kernels.rank_sum import WAYS, RankSum
from smc_plugin.kernels.residual_norm import add_and_norm
from smc_plugin.kernels.timing import graph_times_us

SHAPES = [(rows, width) for width in (4096, 8192) for rows in (1, 9, 16, 72, 128)]
CALLS, REPLAYS = 64, 15
EPS = 1e-5
TOLERANCE = 2e-2

Way = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def make_ways(ranks: NcclRanks, width: int) -> dict[str, Way]:
    """Every way to sum rows of this width: a rank's part, residual and norm weight to the stream and its norm."""
    device = torch.device("cuda", torch.cuda.current_device())
    reductions: dict[str, Callable[[Tensor], Tensor]] = {"nccl": ranks._nccl_all_reduce}
    if ranks.shares_memory:
        reductions |= {"torch_one_shot": ranks._one_shot, "torch_two_shot": ranks._two_shot}
    ways: dict[str, Way] = {
        name: lambda x, residual, weight, reduce=reduce: add_and_norm(reduce(x), residual, weight, EPS)
        for name, reduce in reductions.items()
    }
    for way in WAYS:
        if ranks.shares_memory and RankSum.suits(width, ranks.size, way, gpu_of(device)):
            fused = RankSum(ranks, width, way, device)
            ways[way] = lambda x, residual, weight, fused=fused: fused(x, residual, weight, EPS)
    return ways


def part(rank: int, rows: int, width: int) -> Tensor:
    """What one rank adds."""
    generator = torch.Generator("cuda").manual_seed(rank)
    return torch.randn((rows, width), generator=generator, device="cuda").bfloat16()


def error(ranks: NcclRanks, way: Way, rows: int, width: int) -> float:
    """Largest difference from the float64 stream and norm, over their largest value; inf where ranks differ in a bit."""
    residual, weight = part(100, rows, width), part(101, 1, width)[0]
    stream = residual.double() + sum(part(rank, rows, width).double() for rank in range(ranks.size))
    norm = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + EPS) * weight.double()
    y, normed = way(part(ranks.rank, rows, width), residual, weight)
    bits = torch.stack([y, normed]).view(torch.int16).cpu().numpy().tobytes()
    if len(set(ranks.gather_objects(bits))) > 1:
        return float("inf")
    return max(
        float((ours.double() - theirs).abs().max() / theirs.abs().max())
        for ours, theirs in ((y, stream), (normed, norm))
    )


def measure(ranks: NcclRanks, way: Way, rows: int, width: int) -> dict[str, float]:
    """Microseconds of a call: median, least and most over replays."""
    x, residual, weight = torch.zeros(rows, width).cuda().bfloat16(), part(100, rows, width), part(101, 1, width)[0]
    times = [us / CALLS for us in graph_times_us([lambda: way(x, residual, weight)] * CALLS, REPLAYS)]
    ranks.gather_objects(None)
    return {"us": statistics.median(times), "least_us": min(times), "most_us": max(times)}


def run(ranks: NcclRanks) -> list[dict[str, Any]]:
    """All shapes and ways."""
    results, ways = [], {width: make_ways(ranks, width) for width in {width for _, width in SHAPES}}
    for rows, width in SHAPES:
        row: dict[str, Any] = {"rows": rows, "width": width}
        for name, way in ways[width].items():
            row[name] = {"error": error(ranks, way, rows, width), **measure(ranks, way, rows, width)}
        results.append(row)
        if ranks.rank == 0:
            cells = (f"{name} {row[name]['us']:6.2f} ({row[name]['error']:.0e})" for name in ways[width])
            print(f"{rows:4} x {width:5}  " + "  ".join(cells), flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tp", type=int, default=2, help="ranks, one GPU each (default 2)")
    parser.add_argument("--output", type=Path, help="where JSON goes")
    args = parser.parse_args()
    if launched_rank() is None:
        command = [find_mpirun(), "-n", str(args.tp), sys.executable, __file__, *sys.argv[1:]]
        os.execve(command[0], command, rank_environment(args.tp))
    ranks = connect(args.tp, ExecutorConfig(device="cuda"))
    assert isinstance(ranks, NcclRanks)
    if ranks.rank == 0:
        print(f"{ranks.size} x {torch.cuda.get_device_name()}: microseconds a sum with residual and norm (error)")
    with torch.inference_mode():
        results = run(ranks)
    if ranks.rank == 0 and args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        about = {"gpu": torch.cuda.get_device_name(), "ranks": ranks.size, "torch": torch.__version__, "calls": CALLS}
        args.output.write_text(json.dumps({**about, "shared_memory": ranks.shares_memory, "sums": results}, indent=1))
        print(f"written to {args.output}")
    ranks.close()
    wrong = [(row["rows"], row["width"], way) for row in results for way in row if _error(row[way]) > TOLERANCE]
    if wrong and ranks.rank == 0:
        print(f"wrong sums: {wrong}, expected errors up to {TOLERANCE} and equal bits: see above", file=sys.stderr)
    return int(bool(wrong))


def _error(timed: Any) -> float:
    """Of one way in a row of results; its other entries are numbers."""
    return timed["error"] if isinstance(timed, dict) else 0.0


if __name__ == "__main__":
    sys.exit(main())
