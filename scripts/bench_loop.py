"""Measure what the executor's loop spends beside its steps, without a server: python scripts/bench_loop.py --engine DIR

A client in the same process asks for streams at N = 1, where every round sends a piece of every stream, and reads nothing
meanwhile. What counts is the processor time of the loop's thread, which other work on the machine disturbs least:

    beside_ms = thread time of a turn - thread time of its step; share = beside_ms / (beside_ms + step_ms)

To compare two versions, run them in turn, several times each.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import zmq

from smc_engines.executor import Executor
from smc_engines.serving.service import ExecutorService, protocol

PROMPT = "The capital of France is"


class Clocked(Executor):
    """An executor that knows the thread time of its steps."""

    step_s = 0.0

    def step(self) -> list:
        """One step, on the clock."""
        began = time.thread_time()
        try:
            return super().step()
        finally:
            self.step_s += time.thread_time() - began


def measure(
    executor: Clocked, service: ExecutorService, client: zmq.Socket, streams: int, turns: int
) -> tuple[float, float]:
    """Milliseconds of thread time a turn: (beside the step, of the step), while all streams run."""
    params = {"max_tokens": 5 * (turns + 8), "num_particles": 1, "num_draft_tokens": 4, "ignore_eos": True}
    for number in range(streams):
        submit = {"id": f"r{number}", "tag": "", "prompt": {"text": PROMPT}, "params": {**params, "seed": number}}
        client.send(protocol.encode("submit", **submit))
    while len(executor.scheduler.running) < streams:
        service.turn()
    service.turn()
    executor.step_s, began = 0.0, time.thread_time()
    for _ in range(turns):
        service.turn()
    whole, step = time.thread_time() - began, executor.step_s
    if len(executor.scheduler.running) != streams:
        raise SystemExit("a stream ended early, expected all to run: lower --turns")
    for number in range(streams):
        client.send(protocol.encode("cancel", id=f"r{number}"))
    while executor.has_work:
        service.turn()
    while client.poll(0):
        client.recv()
    return 1e3 * (whole - step) / turns, 1e3 * step / turns


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description="Thread time of the executor's loop beside its steps.")
    parser.add_argument("--engine", required=True)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    executor = Clocked.from_engine_dir(options.engine)
    assert isinstance(executor, Clocked)
    with tempfile.TemporaryDirectory() as folder, zmq.Context() as context:
        context.linger = 0
        router, client = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        with router, client:
            router.bind(f"ipc://{folder}/executor")
            client.connect(f"ipc://{folder}/executor")
            service = ExecutorService(executor, router)
            client.send(protocol.encode("hello", model="smc", pid=os.getpid()))
            rows = [measure(executor, service, client, options.streams, options.turns) for _ in range(options.repeats)]
    beside, step = (statistics.median(column) for column in zip(*rows, strict=True))
    report = {"engine": Path(options.engine).name}
    report |= {name: getattr(options, name) for name in ("streams", "turns", "repeats")}
    report |= {"beside_ms": round(beside, 4), "step_ms": round(step, 3), "share": round(beside / (beside + step), 5)}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
