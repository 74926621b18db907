"""Measure what serving costs over the executor alone: time to first token, added time a request, throughput.

    python scripts/bench_serving.py --engine engines/smollm2-tp1 [--quick] [--output docs/benchmarks/serving.json]

The same wave of requests (one seed each, so the same tokens) runs on the same engine directory through an executor in a
process of its own and through smc-serve over gRPC. Waves come in pairs, whose order turns every time, and every comparison
is a ratio or a difference within one pair, so that a machine with other work disturbs both sides alike.

    outside_ms of a request = its total as its caller sees it - its total_ms inside the executor (queue to last token)
    added_ms of a pair = median outside_ms over gRPC - median outside_ms alone; 2.4 ms means that client, server, adapter and
        messages took 2.4 ms of a request. added_first_ms is the same for the first piece.
    steady = from the moment the last stream has its first piece until the first stream ends: every stream runs
    throughput_overhead of a pair = 1 - served / alone, of tokens a second while steady; wave_overhead is the same from
        the first submission to the last piece, where served requests also come one by one instead of all at once
    decode_overhead of a pair = the same inside the executor: median time from first to last token, served / alone - 1. What a
        client sees is more where server and clients have not the processor to keep up with the pieces
    executor_cpu_overhead of a pair = processor time a token of the served executor / that of the executor alone - 1, while
        steady: what the messages cost the process that computes, whatever else the machine does
    rest_cpu_ms_per_request, client_cpu_ms_per_request = processor time of tritonserver and its adapters, and of the clients

With --own-core either executor computes on the last core and everything else runs on the others, as where a GPU computes.
With --n 1 every round of every stream settles its tokens and sends a piece: the most that serving can be asked to carry.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from smc_engines.executor import Executor
from smc_engines.sampling_params import SamplingParams
from smc_engines.serving.triton_client import TritonClient

_NUMBERS = itertools.count()
PROMPT = "The capital of France is"
# What a client of streamed text reads. The executor's own times come from its log: each as a tensor would be a cost of the
# measurement.
OUTPUTS = ("text_output", "sequence_length", "finish_reason")


def spread(values: list[float]) -> dict[str, float]:
    """Median, its 95 % confidence interval by ranks, 10th and 90th percentile."""
    ordered = sorted(values)
    last, reach = len(ordered) - 1, 0.98 * len(ordered) ** 0.5
    ranks = {"low95": last / 2 - reach, "high95": last / 2 + reach, "p10": 0.1 * last, "p90": 0.9 * last}
    found = {name: ordered[min(max(round(rank), 0), last)] for name, rank in ranks.items()}
    return {"median": statistics.median(ordered), **found, "count": len(ordered)}


@dataclass(frozen=True)
class Piece:
    """New tokens of a request, when its caller had them, and the executor's processor time then."""

    request: int
    tokens: int
    at_s: float
    cpu_s: float


@dataclass
class Wave:
    """One wave of requests.

    Args:
        seconds: from the first submission to the last piece. rest_cpu_s, client_cpu_s: processor time.
        requests: times of each request in ms.
    """

    seconds: float = 0.0
    rest_cpu_s: float = 0.0
    client_cpu_s: float = 0.0
    requests: list[dict[str, Any]] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """All of them."""
        return sum(piece.tokens for piece in self.pieces)

    def steady(self) -> tuple[float, float]:
        """Seconds and processor seconds of the executor for a token while every stream runs.

        The rate is the sum of the streams' own: pieces of one step come together or one by one, so that a window over all
        of them would cut its first and last step now here, now there.
        """
        streams: dict[int, list[Piece]] = {}
        for piece in sorted(self.pieces, key=lambda piece: piece.at_s):
            streams.setdefault(piece.request, []).append(piece)
        start = max(pieces[0].at_s for pieces in streams.values())
        end = min(pieces[-1].at_s for pieces in streams.values())
        windows = [[piece for piece in pieces if start <= piece.at_s <= end] for pieces in streams.values()]
        if min(map(len, windows)) < 2:
            raise SystemExit("the streams did not run side by side, expected them to: raise --max-tokens, or lower --n")
        rate = sum(sum(p.tokens for p in pieces[1:]) / (pieces[-1].at_s - pieces[0].at_s) for pieces in windows)
        inside = [piece for pieces in windows for piece in pieces]
        first, last = min(inside, key=lambda piece: piece.at_s), max(inside, key=lambda piece: piece.at_s)
        return 1 / rate, (last.cpu_s - first.cpu_s) / (last.at_s - first.at_s) / rate


@dataclass(frozen=True)
class Served:
    """A running smc-serve: its gRPC address, its processes and its log."""

    address: str
    executor: int
    rest: tuple[int, ...]
    log: Path

    def take_off(self, rows: list[dict[str, Any]]) -> None:
        """Add to each request what was spent outside the executor, whose times the log has by the request's tag."""
        limit = time.monotonic() + 10
        while True:
            events = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
            ends = {event["tag"]: event for event in events if event["event"] == "finished"}
            if all(row["tag"] in ends for row in rows):
                break
            if time.monotonic() > limit:
                raise SystemExit("the log does not name every request, expected the executor's times: a bug")
            time.sleep(0.05)
        for row in rows:
            end = ends[row["tag"]]
            row["outside_first_ms"] = row["first_ms"] - end["first_token_ms"]
            row["outside_ms"] = row["total_ms"] - end["total_ms"]
            row["decode_ms"] = end["total_ms"] - end["first_token_ms"]


def pin(pid: int, last: bool) -> None:
    """Keep a process, all threads that it has now, on the last core or off it."""
    *others, own = sorted(os.sched_getaffinity(os.getppid()))
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(ProcessLookupError):  # a thread may have ended
            os.sched_setaffinity(int(task.name), {own} if last else others)


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
    """Processor time of a process so far, by its clock (Linux; /proc counts in steps of 10 ms)."""
    return time.clock_gettime((~pid << 3) | 2)


class Alone:
    """The executor without a server, in a process of its own: in this one what the measurement keeps would slow it."""

    def __init__(self, options: argparse.Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=run_alone, args=(theirs, options))
        self._process.start()
        theirs.close()
        self.facts: dict[str, Any] = self._pipe.recv()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def wave(self, streams: int) -> Wave:
        """All requests at once."""
        self._pipe.send(streams)
        return self._pipe.recv()

    def __enter__(self) -> Alone:
        return self

    def __exit__(self, *error: object) -> None:
        self._pipe.close()  # it reads to the end of the pipe
        self._process.join()


def run_alone(pipe: Connection, options: argparse.Namespace) -> None:
    """In that process: say what the engine is, then run waves."""
    import torch  # noqa: PLC0415 (only here: the measuring process computes nothing)

    torch.set_num_threads(options.threads)
    executor = Executor.from_engine_dir(options.engine)
    engine = executor.engine
    pipe.send({"max_groups": engine.max_groups, "device": str(engine.device), "torch": torch.__version__})
    with suppress(EOFError):
        while True:
            pipe.send(wave_alone(executor, options, pipe.recv()))


def wave_alone(executor: Executor, options: argparse.Namespace, streams: int) -> Wave:
    """All requests at once through the executor in this process."""
    wave, starts = Wave(), {}
    rows: dict[str, dict[str, Any]] = {}
    started = time.perf_counter()
    for number in range(streams):
        starts[f"r{number}"] = time.perf_counter()
        executor.submit(f"r{number}", PROMPT, SamplingParams(**sampling(options, number)))
    while executor.has_work:
        outputs = executor.step()
        now, cpu, new = time.perf_counter(), time.process_time(), dict.fromkeys((o.request_id for o in outputs), 0)
        for output in outputs:
            new[output.request_id] += len(output.new_token_ids)
            elapsed_ms = 1e3 * (now - starts[output.request_id])
            row = rows.setdefault(output.request_id, {"first_ms": elapsed_ms})
            if output.info is not None:
                row["outside_first_ms"] = row["first_ms"] - output.info.first_token_ms
                row["outside_ms"] = elapsed_ms - output.info.total_ms
                row["decode_ms"] = output.info.total_ms - output.info.first_token_ms
        # one piece a step, as serving sends them: a request's first step has its first token and its first round
        wave.pieces += [Piece(int(request_id[1:]), tokens, now, cpu) for request_id, tokens in new.items()]
    wave.seconds = time.perf_counter() - started
    wave.requests = list(rows.values())
    return wave


def wave_served(served: Served, options: argparse.Namespace, clients: list[TritonClient]) -> Wave:
    """All requests at once over gRPC, one client each."""
    wave, lock = Wave(), threading.Lock()

    def run(number: int, client: TritonClient) -> None:
        row, pieces = one_request(client, options, number, served.executor)
        with lock:
            wave.requests.append(row)
            wave.pieces += pieces

    cpu, rest = time.process_time(), sum(map(cpu_s, served.rest))
    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(clients)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wave.seconds = time.perf_counter() - started
    wave.client_cpu_s, wave.rest_cpu_s = time.process_time() - cpu, sum(map(cpu_s, served.rest)) - rest
    return wave


def one_request(
    client: TritonClient, options: argparse.Namespace, number: int, executor: int
) -> tuple[dict[str, Any], list[Piece]]:
    """One streamed request: its tag, its times in ms as the client saw them, and its pieces."""
    values = {**sampling(options, number), "text_input": PROMPT, "stream": True}
    tag = f"bench-{next(_NUMBERS)}"
    began, pieces = time.perf_counter(), []
    for response in client.stream("smc", values, request_id=tag, outputs=OUTPUTS):
        pieces.append(Piece(number, response["sequence_length"].item(), time.perf_counter(), cpu_s(executor)))
    total_ms, first_ms = 1e3 * (time.perf_counter() - began), 1e3 * (pieces[0].at_s - began)
    return {"tag": tag, "first_ms": first_ms, "total_ms": total_ms}, pieces


@contextmanager
def serve(engine: str, threads: int, environment: Mapping[str, str] | None = None) -> Iterator[Served]:
    """smc-serve on free ports."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.json"
        command = [sys.executable, "-m", "smc_engines.serve_cli", "--engine", engine, "--state-file", str(path)]
        command += ["--http-port=0", "--grpc-port=0", "--metrics-port=0", "--status-port=-1", "--probe-interval=60"]
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                env={**os.environ, **(environment or {}), "OMP_NUM_THREADS": str(threads)},
            )
            try:
                while not path.exists():
                    if process.poll() is not None:
                        raise SystemExit(f"smc-serve ended, expected it to serve: {log.read_text()[-2000:]}")
                    time.sleep(0.1)
                state = json.loads(path.read_text())
                rest = (state["processes"]["tritonserver"], *state["stubs"].values())
                yield Served(f"127.0.0.1:{state['grpc']}", state["processes"]["executor"], rest, log)
            finally:
                process.terminate()
                process.wait()


def measure(options: argparse.Namespace, alone: Alone, served: Served, streams: int) -> dict[str, Any]:
    """Pairs of waves with a number of streams."""
    pairs: list[tuple[Wave, Wave]] = []
    with ExitStack() as stack:
        clients = [stack.enter_context(TritonClient(served.address)) for _ in range(streams)]
        sides = [lambda: alone.wave(streams), lambda: wave_served(served, options, clients)]
        for side in sides:
            side()  # warm
        for number in range(options.repeats):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            waves = {index: sides[index]() for index in order}
            if waves[0].tokens != waves[1].tokens:
                raise SystemExit(
                    f"{waves[0].tokens} tokens came alone and {waves[1].tokens} served, expected equal: a bug"
                )
            pairs.append((waves[0], waves[1]))
            print(f"  {streams} streams, pair {number + 1} of {options.repeats}", file=sys.stderr)
    bare, over = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    served.take_off([row for wave in over for row in wave.requests])
    steady = [(a.steady(), b.steady()) for a, b in pairs]

    def middle(name: str) -> list[list[float]]:
        return [[statistics.median(row[name] for row in wave.requests) for wave in pair] for pair in pairs]

    def added(name: str) -> dict[str, float]:
        return spread([after - before for before, after in middle(name)])

    return {
        "executor_tokens_per_s": spread([1 / a[0] for a, _ in steady]),
        "served_tokens_per_s": spread([1 / b[0] for _, b in steady]),
        "throughput_overhead": spread([1 - a[0] / b[0] for a, b in steady]),
        "wave_overhead": spread([1 - a.seconds / b.seconds for a, b in pairs]),
        "decode_overhead": spread([after / before - 1 for before, after in middle("decode_ms")]),
        "executor_cpu_overhead": spread([b[1] / a[1] - 1 for a, b in steady]),
        "executor_cpu_us_per_token": spread([1e6 * b[1] for _, b in steady]),
        "pieces_per_request": statistics.mean(len(wave.pieces) / streams for wave in over),
        "rest_cpu_ms_per_request": spread([1e3 * wave.rest_cpu_s / streams for wave in over]),
        "client_cpu_ms_per_request": spread([1e3 * wave.client_cpu_s / streams for wave in over]),
        "executor_first_ms": spread([row["first_ms"] for wave in bare for row in wave.requests]),
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
    parser.add_argument("--own-core", action="store_true", help="keep everything else off the executor's core (Linux)")
    parser.add_argument("--quick", action="store_true", help="one short pair, to see that it works")
    options = parser.parse_args()
    if options.quick:
        options.repeats, options.max_tokens = 1, 8
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    load = os.getloadavg()[0]
    with Alone(options) as alone, serve(options.engine, options.threads) as served:
        if options.own_core:
            for pid in (os.getpid(), alone.pid, served.executor, *served.rest):
                pin(pid, last=pid in (alone.pid, served.executor))
        result = {f"{count} streams": measure(options, alone, served, count) for count in options.streams}
    report = {
        "engine": Path(options.engine).name,
        **alone.facts,
        "cpus": os.cpu_count(),
        "load_average_before": load,
        "niceness": os.nice(0),
        "python": platform.python_version(),
        **{name: getattr(options, name) for name in ("repeats", "max_tokens", "n", "k", "threads", "own_core")},
        "result": result,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
