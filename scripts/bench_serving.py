"""Measure what serving costs over the executor alone: time to first token, added time a request, throughput.

    python scripts/bench_serving.py --engine engines/smollm2-tp1 [--quick] [--output docs/benchmarks/serving.json]

The same wave of requests (one seed each, so the same tokens) runs on the same engine directory through an executor in this
process and through smc-serve over gRPC. Waves come in pairs, whose order turns every time, and every comparison is a ratio
or a difference within one pair, so that a machine with other work disturbs both sides alike.

    outside_ms of a request = its total as its caller sees it - its total_ms inside the executor (queue to last token)
    added_ms of a pair = median outside_ms over gRPC - median outside_ms alone; 2.4 ms means that client, server, adapter and
        messages took 2.4 ms of a request. added_first_ms is the same for the first piece.
    throughput_overhead of a pair = 1 - served / alone, of tokens a second from the first submission to the last piece
    executor_cpu_overhead of a pair = processor time a token of the served executor / that of the executor alone - 1: what the
        messages cost the process that computes, whatever else the machine does
    rest_cpu_ms_per_request = processor time of tritonserver and its adapters
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smc_engines.executor import Executor
from smc_engines.sampling_params import SamplingParams
from smc_engines.serving.triton_client import TritonClient

PROMPT = "The capital of France is"
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def spread(values: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    ordered = sorted(values)
    last = len(ordered) - 1
    low, high = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
    return {"median": statistics.median(ordered), "p10": low, "p90": high, "count": len(ordered)}


@dataclass
class Wave:
    """One wave of requests.

    Args:
        seconds: from the first submission to the last piece. executor_cpu_s, rest_cpu_s: processor time.
        requests: times of each request in ms.
    """

    tokens: int = 0
    seconds: float = 0.0
    executor_cpu_s: float = 0.0
    rest_cpu_s: float = 0.0
    requests: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Served:
    """A running smc-serve: its gRPC address and its processes."""

    address: str
    executor: int
    rest: tuple[int, ...]


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


def cpu_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def wave_alone(executor: Executor, options: argparse.Namespace, streams: int) -> Wave:
    """All requests at once through the executor in this process."""
    wave, starts = Wave(), {}
    rows: dict[str, dict[str, float]] = {}
    cpu, started = time.process_time(), time.perf_counter()
    for number in range(streams):
        starts[f"r{number}"] = time.perf_counter()
        executor.submit(f"r{number}", PROMPT, SamplingParams(**sampling(options, number)))
    while executor.has_work:
        for output in executor.step():
            wave.tokens += len(output.new_token_ids)
            elapsed_ms = 1e3 * (time.perf_counter() - starts[output.request_id])
            row = rows.setdefault(output.request_id, {"first_ms": elapsed_ms})
            if output.info is not None:
                row["outside_first_ms"] = row["first_ms"] - output.info.first_token_ms
                row["outside_ms"] = elapsed_ms - output.info.total_ms
    wave.seconds, wave.executor_cpu_s = time.perf_counter() - started, time.process_time() - cpu
    wave.requests = list(rows.values())
    return wave


def wave_served(served: Served, options: argparse.Namespace, clients: list[TritonClient]) -> Wave:
    """All requests at once over gRPC, one client each."""
    wave, lock = Wave(), threading.Lock()

    def run(number: int, client: TritonClient) -> None:
        row, tokens = one_request(client, options, number)
        with lock:
            wave.requests.append(row)
            wave.tokens += tokens

    cpu, rest = cpu_s(served.executor), sum(map(cpu_s, served.rest))
    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wave.seconds = time.perf_counter() - started
    wave.executor_cpu_s, wave.rest_cpu_s = cpu_s(served.executor) - cpu, sum(map(cpu_s, served.rest)) - rest
    return wave


def one_request(client: TritonClient, options: argparse.Namespace, number: int) -> tuple[dict[str, float], int]:
    """One streamed request: its times in ms, as the client and as the executor saw them, and its tokens."""
    values = {**sampling(options, number), "text_input": PROMPT, "stream": True, "return_perf_metrics": True}
    began, first, last = time.perf_counter(), 0.0, {}
    for response in client.stream("smc", values):
        first = first or time.perf_counter()
        last = response
    total_ms, first_ms = 1e3 * (time.perf_counter() - began), 1e3 * (first - began)
    times = {name: last[f"{name}_time_ns"].item() / 1e6 for name in ("arrival", "first_token", "last_token")}
    row = {
        "first_ms": first_ms,
        "outside_first_ms": first_ms - (times["first_token"] - times["arrival"]),
        "outside_ms": total_ms - (times["last_token"] - times["arrival"]),
    }
    return row, last["num_output_tokens"].item()


@contextmanager
def serve(engine: str, threads: int) -> Iterator[Served]:
    """smc-serve on free ports."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.json"
        command = [sys.executable, "-m", "smc_engines.serve_cli", "--engine", engine, "--state-file", str(path)]
        command += ["--http-port=0", "--grpc-port=0", "--metrics-port=0", "--status-port=-1", "--probe-interval=60"]
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": str(threads)}
            )
            try:
                while not path.exists():
                    if process.poll() is not None:
                        raise SystemExit(f"smc-serve ended, expected it to serve: {log.read_text()[-2000:]}")
                    time.sleep(0.1)
                state = json.loads(path.read_text())
                rest = (state["processes"]["tritonserver"], *state["stubs"].values())
                yield Served(f"127.0.0.1:{state['grpc']}", state["processes"]["executor"], rest)
            finally:
                process.terminate()
                process.wait()


def measure(options: argparse.Namespace, executor: Executor, served: Served, streams: int) -> dict[str, Any]:
    """Pairs of waves with a number of streams."""
    clients = [TritonClient(served.address) for _ in range(streams)]
    sides = [lambda: wave_alone(executor, options, streams), lambda: wave_served(served, options, clients)]
    for side in sides:
        side()  # warm
    pairs: list[tuple[Wave, Wave]] = []
    for number in range(options.repeats):
        order = (0, 1) if number % 2 == 0 else (1, 0)
        waves = {index: sides[index]() for index in order}
        if waves[0].tokens != waves[1].tokens:
            raise SystemExit(f"{waves[0].tokens} tokens came alone and {waves[1].tokens} served, expected equal: a bug")
        pairs.append((waves[0], waves[1]))
        print(f"  {streams} streams, pair {number + 1} of {options.repeats}", file=sys.stderr)
    for client in clients:
        with client:
            pass
    alone, over = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    per_token = [b.executor_cpu_s * a.tokens / (b.tokens * a.executor_cpu_s) - 1 for a, b in pairs]

    def added(name: str) -> dict[str, float]:
        middle = [[statistics.median(row[name] for row in wave.requests) for wave in pair] for pair in pairs]
        return spread([served - alone for alone, served in middle])

    return {
        "executor_tokens_per_s": spread([wave.tokens / wave.seconds for wave in alone]),
        "served_tokens_per_s": spread([wave.tokens / wave.seconds for wave in over]),
        "throughput_overhead": spread([1 - a.seconds / b.seconds for a, b in pairs]),
        "executor_cpu_overhead": spread(per_token),
        "rest_cpu_ms_per_request": spread([1e3 * wave.rest_cpu_s / streams for wave in over]),
        "executor_first_ms": spread([row["first_ms"] for wave in alone for row in wave.requests]),
        "served_first_ms": spread([row["first_ms"] for wave in over for row in wave.requests]),
        "added_first_ms": added("outside_first_ms"),
        "added_ms": added("outside_ms"),
    }


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description="Measure the serving path against the executor alone.")
    parser.add_argument("--engine", required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=7, help="pairs of waves for each number of streams")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--n", type=int, default=2)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of either executor")
    parser.add_argument("--quick", action="store_true", help="one short pair, to see that it works")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.max_tokens = 1, 8
    import torch  # noqa: PLC0415 (after the options, which may only print help)

    torch.set_num_threads(options.threads)
    executor = Executor.from_engine_dir(options.engine)
    load = os.getloadavg()[0]
    with serve(options.engine, options.threads) as served:
        result = {f"{count} streams": measure(options, executor, served, count) for count in options.streams}
    report = {
        "engine": Path(options.engine).name,
        "max_groups": executor.engine.max_groups,
        "device": str(executor.engine.device),
        "cpus": os.cpu_count(),
        "load_average_before": load,
        "niceness": os.nice(0),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: getattr(options, name) for name in ("repeats", "max_tokens", "n", "k", "threads")},
        "result": result,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
