"""Load a served engine with perf_analyzer, the load generator of Triton Inference Server, as an outside client.

    pip install --no-deps perf-analyzer==2.60.0          # its binary needs glibc 2.38 (Debian 13, Ubuntu 24.04)
    python scripts/perf_serving.py --engine engines/smollm2-tp1 --output docs/benchmarks/serving-perf-analyzer.json

Starts smc-serve, streams from the model `ensemble` with the inputs of a TensorRT-LLM client at each concurrency, and sums up
what perf_analyzer exported: a request sent at 0 ms whose pieces came at 90, 130 and 150 ms has its first response after 90 ms
and 40 and 20 ms between responses.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_serving import serve, spread

PROMPTS = (
    "The capital of France is",
    "Three rivers of Europe are",
    "The sky is blue because",
    "A short story about a lighthouse keeper:",
)
LIMIT_S = 600


def inputs(max_tokens: int) -> dict[str, Any]:
    """perf_analyzer's input file: what a TensorRT-LLM client sends."""
    rows = [
        {"text_input": [prompt], "max_tokens": [max_tokens], "stream": [True], "end_id": [-1], "seed": [number]}
        for number, prompt in enumerate(PROMPTS)
    ]
    return {"data": rows}


def load(
    command: list[str], address: str, folder: Path, options: argparse.Namespace, concurrency: int
) -> dict[str, Any]:
    """One run of perf_analyzer, summed up."""
    export, data = folder / f"profile-{concurrency}.json", folder / "inputs.json"
    data.write_text(json.dumps(inputs(options.max_tokens)))
    count = options.requests * concurrency
    arguments = ["-m", "ensemble", "-i", "grpc", "-u", address, "--streaming", "--async", "--shape", "max_tokens:1"]
    arguments += ["--shape", "text_input:1", "--input-data", str(data), "--concurrency-range", str(concurrency)]
    arguments += ["--request-count", str(count), "--profile-export-file", str(export), "--service-kind", "triton"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode != 0 or not export.exists():
        raise SystemExit(
            f"{command[-1]} ended with status {done.returncode}, expected its export: {(done.stdout + done.stderr)[-1500:]}"
        )
    requests = [r for experiment in json.loads(export.read_text())["experiments"] for r in experiment["requests"]]
    return summary(requests)


def summary(requests: list[dict[str, Any]]) -> dict[str, Any]:
    """Latencies in ms and requests a second, from the timestamps (ns) that perf_analyzer exports."""
    firsts, totals, gaps = [], [], []
    for request in requests:
        sent, came = request["timestamp"], request["response_timestamps"]
        firsts.append((came[0] - sent) / 1e6)
        totals.append((came[-1] - sent) / 1e6)
        gaps += [(later - earlier) / 1e6 for earlier, later in itertools.pairwise(came)]
    begin, end = min(r["timestamp"] for r in requests), max(r["response_timestamps"][-1] for r in requests)
    return {
        "requests": len(requests),
        "requests_per_s": len(requests) / (end - begin) * 1e9,
        "responses_per_request": statistics.mean(len(request["response_timestamps"]) for request in requests),
        "first_response_ms": spread(firsts),
        "between_responses_ms": spread(gaps) if gaps else None,
        "request_ms": spread(totals),
    }


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description="Load a served engine with perf_analyzer.")
    parser.add_argument("--engine", required=True)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--perf-analyzer", default="perf_analyzer", help="its command (default perf_analyzer)")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--requests", type=int, default=8, help="for each unit of concurrency")
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1, help="torch threads of the executor")
    options = parser.parse_args()
    command = shlex.split(options.perf_analyzer)
    try:
        asked = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        version = (asked.stdout + asked.stderr).strip()  # it says so on standard error
    except (OSError, subprocess.CalledProcessError) as error:
        print(
            f"perf_serving: {options.perf_analyzer} does not start, expected perf_analyzer, got {error}: install "
            "perf-analyzer==2.60.0 (with glibc 2.38), or pass --perf-analyzer",
            file=sys.stderr,
        )
        raise SystemExit(1) from None
    with serve(options.engine, options.threads) as served, tempfile.TemporaryDirectory() as folder:
        result = {
            f"concurrency {concurrency}": load(command, served.address, Path(folder), options, concurrency)
            for concurrency in options.concurrency
        }
    report = {
        "engine": Path(options.engine).name,
        "perf_analyzer": version.removeprefix("Perf Analyzer Version "),
        "cpus": os.cpu_count(),
        "load_average_after": os.getloadavg()[0],
        "max_tokens": options.max_tokens,
        "threads": options.threads,
        "result": result,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
