"""Measure what serving costs over the executor alone: time to first token, added time a request, throughput.

    python scripts/bench_serving.py --engine engines/smollm2-tp1 [--quick] [--output docs/benchmarks/serving.json]

The same requests (one seed each, so the same tokens) run twice on the same engine directory: through an executor in this
process, and through smc-serve over gRPC. Phases alternate, executor first, so that drift of the machine hits both.

    added_ms of a request = its total over gRPC - its total_ms inside the served executor; 1.4 ms means the server, the adapter
    and the messages took 1.4 ms of it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smc_engines.executor import Executor
from smc_engines.sampling_params import SamplingParams
from smc_engines.serving.triton_client import TritonClient

PROMPT = "The capital of France is"


def spread(values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    low, high = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
    return {"median": statistics.median(ordered), "p10": low, "p90": high, "count": len(ordered)}


def sampling(options: argparse.Namespace, number: int) -> dict[str, Any]:
    """Parameters of one request, by names that both sides share."""
    return {
        "max_tokens": options.max_tokens,
        "num_particles": options.n,
        "num_draft_tokens": options.k,
        "seed": number,
        "ignore_eos": True,
        "cache_prompt": False,
    }


def run_executor(executor: Executor, options: argparse.Namespace, streams: int, total: int) -> float:
    """Tokens per second of the executor alone, `streams` requests at a time."""
    started, submitted, tokens = time.perf_counter(), 0, 0
    while submitted < total or executor.has_work:
        while submitted < total and len(executor.scheduler.requests) < streams:
            executor.submit(f"r{submitted}", PROMPT, SamplingParams(**sampling(options, submitted)))
            submitted += 1
        tokens += sum(len(output.new_token_ids) for output in executor.step())
    return tokens / (time.perf_counter() - started)


def run_served(
    address: str, options: argparse.Namespace, streams: int, total: int
) -> tuple[float, list[dict[str, float]]]:
    """Tokens per second over gRPC with `streams` clients, and the times of each request in ms."""
    numbers, lock = iter(range(total)), threading.Lock()
    rows: list[dict[str, float]] = []
    tokens = [0]

    def client() -> None:
        with TritonClient(address) as connection:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                row, count = one_request(connection, options, number)
                with lock:
                    rows.append(row)
                    tokens[0] += count

    started = time.perf_counter()
    threads = [threading.Thread(target=client) for _ in range(streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tokens[0] / (time.perf_counter() - started), rows


def one_request(connection: TritonClient, options: argparse.Namespace, number: int) -> tuple[dict[str, float], int]:
    """One streamed request: its times in ms, as the client and as the executor saw them, and its tokens."""
    values = {**sampling(options, number), "text_input": PROMPT, "stream": True, "return_perf_metrics": True}
    began, first, last = time.perf_counter(), 0.0, {}
    for response in connection.stream("smc", values):
        first = first or time.perf_counter()
        last = response
    ended = time.perf_counter()
    inside = (last["last_token_time_ns"].item() - last["arrival_time_ns"].item()) / 1e6
    total = 1e3 * (ended - began)
    row = {"first_response_ms": 1e3 * (first - began), "total_ms": total, "added_ms": total - inside}
    return row, last["num_output_tokens"].item()


@contextmanager
def served(engine: str, threads: int) -> Iterator[str]:
    """smc-serve on free ports; gives its gRPC address."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state.json"
        command = [sys.executable, "-m", "smc_engines.serve_cli", "--engine", engine, "--state-file", str(state)]
        command += ["--http-port=0", "--grpc-port=0", "--metrics-port=0", "--status-port=-1", "--probe-interval=60"]
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
            )
            try:
                while not state.exists():
                    if process.poll() is not None:
                        raise SystemExit(f"smc-serve ended, expected it to serve: {log.read_text()[-2000:]}")
                    time.sleep(0.1)
                yield f"127.0.0.1:{json.loads(state.read_text())['grpc']}"
            finally:
                process.terminate()
                process.wait()


def measure(options: argparse.Namespace, executor: Executor, address: str) -> dict[str, Any]:
    """All phases."""
    run_executor(executor, options, 1, 1)
    run_served(address, options, 1, 1)
    result: dict[str, Any] = {}
    for streams in (1, options.streams):
        alone, over, rows = [], [], []
        for _ in range(options.repeats):
            total = streams * options.requests
            alone.append(run_executor(executor, options, streams, total))
            speed, times = run_served(address, options, streams, total)
            over.append(speed)
            rows += times
        ratio = [1 - b / a for a, b in zip(alone, over, strict=True)]
        result[f"{streams} streams"] = {
            "executor_tokens_per_s": spread(alone),
            "served_tokens_per_s": spread(over),
            "throughput_overhead": spread(ratio),
            **{name: spread([row[name] for row in rows]) for name in rows[0]},
        }
    return result


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description="Measure the serving path against the executor alone.")
    parser.add_argument("--engine", required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--requests", type=int, default=4, help="requests a stream and repeat")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of either executor")
    parser.add_argument("--quick", action="store_true", help="one short repeat, to see that it works")
    options = parser.parse_args()
    if options.quick:
        options.requests, options.repeats, options.max_tokens = 1, 1, 16
    import torch  # noqa: PLC0415 (after the options, which may only print help)

    torch.set_num_threads(options.threads)
    executor = Executor.from_engine_dir(options.engine)
    with served(options.engine, options.threads) as address:
        result = measure(options, executor, address)
    setting = {
        name: getattr(options, name) for name in ("streams", "requests", "repeats", "max_tokens", "n", "k", "threads")
    }
    report = {
        "engine": Path(options.engine).name,
        "max_groups": executor.engine.max_groups,
        "device": str(executor.engine.device),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **setting,
        "result": result,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
