"""Fuzz everything that comes from outside: checkpoints, engine directories, requests. python scripts/fuzz.py --cases 100000

Each target (see fuzz_targets.py) runs in a process of its own under a coverage-guided fuzzer (atheris: pip install -r
requirements/fuzz.txt). A case is one input. A finding is an exception that is not one of the project's own errors, a crash, a
hang of 20 s or more than 4 GB of memory; it ends its target, is printed with the input, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Percent of the cases that each target gets: fewer where a case loads a file or runs an executor's steps.
SHARES = {
    "config": 15,
    "checkpoint": 8,
    "manifest": 8,
    "engine_weights": 8,
    "tokenizer": 8,
    "parameters": 12,
    "contract": 12,
    "message": 8,
    "service": 6,
    "openai": 15,
}
TARGETS = tuple(SHARES)
COUNT_EVERY = 100
HANG_S, MEMORY_MB = 20, 4096


def run_one(name: str, outcomes: Path, options: list[str]) -> None:
    """Fuzz one target in this process, and write its outcomes now and then; the fuzzer ends the process."""
    atheris = importlib.import_module("atheris")  # only the fuzzer's own processes need it
    packages = ["smc_build", "smc_engines", "smc_adapter", "smc_plugin.errors"]
    with atheris.instrument_imports(include=packages):
        import fuzz_targets  # noqa: PLC0415 (instrumented as it is imported)
    targets = fuzz_targets.make_targets()
    target, calls = targets.all[name], itertools.count(1)

    def counted(data: bytes) -> None:
        target(data)
        if next(calls) % COUNT_EVERY == 0:
            outcomes.write_text(json.dumps(targets.outcomes))

    atheris.Setup([sys.argv[0], *options], counted)
    atheris.Fuzz()


def fuzz(name: str, cases: int, seed: int) -> dict[str, Any]:
    """Fuzz one target in a child process; returns cases run, seconds, and the finding if there was one.

    `accepted` counts the inputs that nothing refused, `places` where the others were refused: a target with one place does not
    get past its first check.
    """
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder, found = Path(name_of_folder), Path(name_of_folder) / "found"
        found.mkdir()
        flags = [f"-runs={cases}", f"-seed={seed}", f"-timeout={HANG_S}", f"-rss_limit_mb={MEMORY_MB}", "-max_len=256"]
        flags += [f"-artifact_prefix={found}/", "-len_control=20"]
        began, child = (
            time.monotonic(),
            [sys.executable, __file__, "--one", name, "--outcomes", str(folder / "outcomes")],
        )
        done = subprocess.run([*child, "--", *flags], capture_output=True, text=True, check=False)
        inputs = [path.read_bytes() for path in found.iterdir()]
        counts = folder / "outcomes"
        outcomes = json.loads(counts.read_text()) if counts.is_file() else {}
    counted = re.findall(r"#(\d+)\s", done.stderr)
    report: dict[str, Any] = {"cases": max(map(int, counted), default=0), "seconds": round(time.monotonic() - began, 1)}
    covered = re.findall(r"cov: (\d+)", done.stderr)
    report["covered"] = int(covered[-1]) if covered else 0
    report["accepted"], report["places"] = outcomes.pop("accepted", 0), len(outcomes)
    report["outcomes"] = dict(sorted(outcomes.items(), key=lambda item: -item[1])[:20])
    if done.returncode:
        report["finding"] = {"input": [data.hex() for data in inputs], "said": (done.stdout + done.stderr)[-3000:]}
    return report


def main() -> int:
    """Fuzz every target, print a table, write JSON."""
    parser = argparse.ArgumentParser(description="Fuzz what comes from outside.")
    parser.add_argument("--cases", type=int, default=100_000, help="of all targets together")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("--outcomes", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        run_one(options.one, options.outcomes, options.rest)
    whole, result = sum(SHARES[name] for name in options.targets), {}
    for name in options.targets:
        row = result[name] = fuzz(name, -(-options.cases * SHARES[name] // whole), options.seed)
        found = row.get("finding")
        depth = f"{row['accepted']:>8} accepted, refused at {row['places']:>3} places"
        print(
            f"{name:<16}{row['cases']:>8} cases {row['seconds']:>8} s {depth}  {'FINDING' if found else 'none'}",
            flush=True,
        )
        if found:
            print(found["said"], found["input"])
    findings = sum("finding" in row for row in result.values())
    report = {
        "cases": sum(row["cases"] for row in result.values()),
        "findings": findings,
        "targets": result,
        "seed": options.seed,
        "atheris": version("atheris"),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }
    print(f"{report['cases']} cases, {findings} findings")
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
