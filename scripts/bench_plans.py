"""Times compiled regions beside eager torch and bare cuBLAS products on the GPU present.

    python scripts/bench_plans.py --presets llama-8b llama-1b --rows 8 16 96 128 --output plans.json

Everything runs inside CUDA graphs that call a region twice, on two layers where it has them, so that no weight is in the
L2 cache when it is needed. Prints and writes, per region and row bucket: median ms, and TB/s of the weights read. "torch"
is eager torch captured in a graph, "cublas" its matrix products alone.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from smc_build.model_config import ModelConfig
from smc_build.network import layer_inputs, region_specs
from smc_build.plans import build_plan
from smc_build.presets import PRESETS
from smc_build.tensorrt_api import TensorrtApi, find
from smc_build.weights import weight_shapes
from smc_engines.plan_runner import PlanRegions
from smc_engines.regions import RegionRunner, TorchRegions

REGIONS = ("block", "exit", "head")
_WARM_UP, _REPEATS, _REPLAYS = 3, 7, 10
_CALLS = 2


def main() -> int:
    """Run the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(description="Time TensorRT plans of decoder regions beside torch and cuBLAS.")
    parser.add_argument("--presets", nargs="+", default=["llama-8b", "llama-1b"], choices=sorted(PRESETS))
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 16, 32, 64, 96, 112, 128])
    parser.add_argument("--output", type=Path, default=Path("plans.json"))
    arguments = parser.parse_args()
    api = find("tensorrt-rtx") or find("tensorrt")
    if not torch.cuda.is_available() or api is None:
        print(
            "bench_plans: no GPU or no TensorRT found, expected both: install the extra tensorrt-rtx", file=sys.stderr
        )
        return 1
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, api.compiler: api.version},
        "copy_tb_per_s": measure_copy(),
        "rows": [],
        "setup": [],
    }
    print(f"{report['gpu']}, {report['versions']}, copy {report['copy_tb_per_s']:.2f} TB/s (read + written)")
    print(f"{'preset':<10} {'region':<6} {'rows':>4} | {'plan ms':>8} {'TB/s':>5} | {'torch ms':>8} | {'cublas ms':>9}")
    for preset in arguments.presets:
        bench_preset(api, preset, arguments.rows, report)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {arguments.output}")
    return 0


def bench_preset(api: TensorrtApi, preset: str, rows: list[int], report: dict[str, Any]) -> None:
    """Append one preset's rows to the report and print them."""
    # Three layers give two blocks with different weights, as many as a graph calls.
    config = dataclasses.replace(PRESETS[preset].config, num_layers=3)
    weights = {
        name: torch.randn(shape, device="cuda", dtype=torch.bfloat16).mul_(0.02)
        for name, shape in weight_shapes(config).items()
    }
    started = time.perf_counter()
    specs = region_specs(config, "bfloat16")
    plans = [(region, count, build_plan(api, specs[region], count).data) for region in REGIONS for count in rows]
    built = time.perf_counter()
    runner = PlanRegions(api, config, weights, plans)
    runner.warm_up()
    warm = time.perf_counter()
    setup = {"preset": preset, "plans": len(plans), "build_s": built - started, "load_and_jit_s": warm - built}
    setup["scratch_mb"] = runner.scratch.num_bytes / 1e6
    report["setup"].append(setup)
    torch_runner = TorchRegions(config, weights)
    for region in REGIONS:
        names = set(layer_inputs(config, region, 0 if region == "block" else None).values())
        num_bytes = sum(weights[name].nbytes for name in names)
        for count in rows:
            given = make_activations(config, region, count)
            plan, torch_ms = (median_ms(region_call(each, region, given)) for each in (runner, torch_runner))
            cublas = median_ms(products_call(config, weights, region, count))
            row = {"preset": preset, "region": region, "rows": count, "weight_bytes": num_bytes, "plan_ms": plan}
            row |= {"torch_ms": torch_ms, "cublas_ms": cublas, "plan_tb_per_s": num_bytes / plan / 1e9}
            report["rows"].append(row)
            print(
                f"{preset:<10} {region:<6} {count:>4} | {plan:8.4f} {row['plan_tb_per_s']:5.2f} | {torch_ms:8.4f} | "
                f"{cublas:9.4f}",
                flush=True,
            )
    print(f"{preset}: {len(plans)} plans built in {setup['build_s']:.1f} s, loaded in {setup['load_and_jit_s']:.1f} s")


def make_activations(config: ModelConfig, region: str, rows: int) -> dict[str, torch.Tensor]:
    """Random activations of a region."""
    bound = layer_inputs(config, region, 0 if region == "block" else None)
    inputs = [spec for spec in region_specs(config, "bfloat16")[region].inputs if spec.name not in bound]
    return {spec.name: torch.randn((rows, int(spec.shape[1])), device="cuda").bfloat16() for spec in inputs}


def region_call(runner: RegionRunner, region: str, given: dict[str, torch.Tensor]) -> Callable[[], None]:
    """A function that runs a region _CALLS times, on different layers where there are several."""

    def call() -> None:
        for index in range(_CALLS):
            runner.run(region, index if region == "block" else None, given)

    return call


def products_call(config: ModelConfig, weights: dict[str, torch.Tensor], region: str, rows: int) -> Callable[[], None]:
    """A function that runs only the matrix products of a region, _CALLS times."""
    matrices: list[list[torch.Tensor]] = []
    for index in range(_CALLS):
        bound = layer_inputs(config, region, index if region == "block" else None)
        found = [weights[name] for name in bound.values() if weights[name].dim() == 2]
        matrices.append([matrix.t() if region == "head" else matrix for matrix in found])
    inputs = [torch.randn((rows, matrix.shape[0]), device="cuda").bfloat16() for matrix in matrices[0]]

    def call() -> None:
        for layer in matrices:
            for x, matrix in zip(inputs, layer, strict=True):
                torch.mm(x, matrix)

    return call


def median_ms(call: Callable[[], None]) -> float:
    """Median milliseconds of one of the _CALLS regions in a captured call."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    times = []
    for _ in range(_REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(_REPLAYS):
            graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / (_REPLAYS * _CALLS))
    return statistics.median(times)


def measure_copy() -> float:
    """Copy bandwidth in TB/s, bytes read plus bytes written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def call() -> None:
        for _ in range(_CALLS):
            target.copy_(source)

    milliseconds = median_ms(call)
    return 2 * source.nbytes / milliseconds / 1e9


if __name__ == "__main__":
    sys.exit(main())
