"""Compare what two checkouts add to a request: python scripts/compare_serving.py --engine DIR --other CHECKOUT

Both serve the same engine directory side by side on this machine, each from its own code (client, adapters, executor), and
take turns, a request each, the first of a pair drawn by lot. So whatever else the machine does falls on both alike. One
start of a checkout can be 5 % slower than the next start of the same one (measured), so both start anew --starts times:

    added_ms = a request's total as its caller sees it - its total_ms inside the executor (see bench_serving.py)
    ratio = of the means of both sides, each without its slowest tenth; over all starts its median and the 95 % interval of
        that by ranks (up to six starts: their whole range)
    cpu_ms = processor time of client, server and adapters for a request

--other . compares this checkout with itself: how much two equal sides differ. The two sides must make the same tokens. The
other checkout needs no environment of its own; the checks of inputs that a client makes are this one's.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from bench_serving import PROMPT, Served, cpu_s, sampling, serve, spread

CLIENT = "engines/serving/triton_client.py"
# of a response, as a client of streamed text reads it
OUTPUTS = ("text_output", "sequence_length", "finish_reason")
FIGURES = {"added_ms": "outside_ms", "cpu_ms": "cpu_ms"}  # and the key of a request's row
HERE = Path(__file__).parents[1]
WARM = 20  # requests of each start that count for nothing


def client_of(checkout: Path, address: str) -> Any:
    """The TritonClient of a checkout, connected."""
    spec = importlib.util.spec_from_file_location(f"client_{abs(hash(checkout))}", checkout / CLIENT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TritonClient(address)


class Side:
    """One checkout's service and client."""

    def __init__(self, checkout: Path, options: argparse.Namespace, stack: ExitStack) -> None:
        path = os.pathsep.join([str(checkout / "scripts" / "import_names"), os.environ.get("PYTHONPATH", "")])
        self.served: Served = stack.enter_context(serve(options.engine, 1, {"PYTHONPATH": path}))
        self.client = stack.enter_context(client_of(checkout, self.served.address))
        self.options = options
        self.rows: list[dict[str, Any]] = []

    def cpu(self) -> float:
        """Processor seconds so far of this side's server and adapters, and of this process."""
        return sum(map(cpu_s, self.served.rest)) + time.process_time()

    def ask(self, number: int) -> None:
        """One request."""
        values = {**sampling(self.options, number), "text_input": PROMPT, "stream": True}
        tag, cpu, began = f"compare-{number}", self.cpu(), time.perf_counter()
        pieces = list(self.client.stream("smc", values, request_id=tag, outputs=OUTPUTS))
        total_ms = 1e3 * (time.perf_counter() - began)
        tokens = sum(piece["sequence_length"].item() for piece in pieces)
        row = {"tag": tag, "first_ms": total_ms, "total_ms": total_ms, "tokens": tokens}
        time.sleep(self.options.pause_ms / 1e3)  # what comes after the answer is its price too
        self.rows.append({**row, "cpu_ms": 1e3 * (self.cpu() - cpu)})


def trimmed(values: Sequence[float]) -> float:
    """Mean without the largest tenth: a machine with other work stops a request now and then."""
    return float(np.sort(values)[: max(int(0.9 * len(values)), 1)].mean())


def one_start(options: argparse.Namespace, draw: random.Random) -> dict[str, tuple[float, float]]:
    """Each figure's mean of this side and of the other, from one start of both."""
    with ExitStack() as stack:
        checkouts = [HERE, options.other.resolve()]
        sides = {index: Side(checkouts[index], options, stack) for index in draw.sample((0, 1), 2)}
        for number in range(WARM + options.pairs):
            for index in draw.sample((0, 1), 2):
                sides[index].ask(number)
        for side in sides.values():
            side.served.take_off(side.rows)
    rows = [sides[index].rows[WARM:] for index in (0, 1)]
    if [row["tokens"] for row in rows[0]] != [row["tokens"] for row in rows[1]]:
        raise SystemExit("the two checkouts made unlike tokens, expected the same: compare versions of one algorithm")
    this, other = ({name: trimmed([row[key] for row in side]) for name, key in FIGURES.items()} for side in rows)
    return {name: (this[name], other[name]) for name in FIGURES}


def main() -> None:
    """Measure, print and write JSON."""
    parser = argparse.ArgumentParser(description="Compare what two checkouts add to a request.")
    parser.add_argument("--engine", required=True)
    parser.add_argument("--other", type=Path, required=True, help="a folder with another version of this repository")
    parser.add_argument("--pairs", type=int, default=60, help="of requests in each start")
    parser.add_argument("--starts", type=int, default=8, help="of both services")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--n", type=int, default=1)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--pause-ms", type=float, default=5.0, help="after each request")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    load, draw = os.getloadavg()[0], random.Random(0)
    starts = [one_start(options, draw) for _ in range(options.starts)]
    figures = {}
    for name in FIGURES:
        this, other = zip(*(start[name] for start in starts), strict=True)
        ratios = [a / b for a, b in zip(this, other, strict=True)]
        figures[name] = {"this": spread(list(this)), "other": spread(list(other)), "ratio": spread(ratios)}
    names = ("starts", "pairs", "max_tokens", "n", "k", "pause_ms")
    settings = {name: getattr(options, name) for name in names}
    report = {"engine": Path(options.engine).name, "load_average_before": load, **settings, "result": figures}
    text = json.dumps(report, indent=2)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
