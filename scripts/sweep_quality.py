"""The sweep behind docs/quality.md: modes, N, K, temperature and options on the task pair, most answers where it counts.

    python scripts/sweep_quality.py --output sweep --time-limit 200                     # one GPU
    python scripts/sweep_quality.py --output sweep --problems 4 --groups 8 --workers 2  # a small one, on a CPU as well

Builds the engine, answers, and writes to the output folder: answers-*.jsonl.gz, report.json and report.csv. Run again with the
same folder it goes on: answers that are there are not given again.

A model this small leaves a GPU idle: what costs time is the host, which prefills, publishes and scores a request at a time.
So several processes share the GPU, each with its own settings, and seconds are not comparable between settings (the
report's tokens_per_second mean nothing; smc-eval alone measures those). Settings take turns of some problems each, so that a
time limit leaves all of them with about as many answers; those that decide go on longest. A setting that fails is named in
the report, and the others go on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shlex
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from smc_build.builder import BuildOptions, build_engine
from smc_build.engine_dir import load_manifest
from smc_engines import eval_cli
from smc_engines.config import ExecutorConfig
from smc_engines.eval import report
from smc_engines.eval.runner import Answers, Work, run
from smc_engines.eval.settings import Setting
from smc_engines.eval.statistics import summarise
from smc_engines.eval.tasks import load_task
from smc_engines.executor import Executor
from smc_plugin.errors import SmcError

PAIR = Path(__file__).resolve().parent.parent / "models" / "task-pair"
TASK, PROBLEM_SEED, SEEDS = "chain", 1, (0, 1)
MAX_PARTICLES, MAX_DRAFT_TOKENS, MAX_SEQ_LEN = 64, 16, 192  # prompts have up to 28 tokens, answers up to 158
TURN = 125  # problems that a setting is given at once
PARTS = 4  # files that the answers come in
LOOK_S = 20

TEMPERATURES = "--temperature 1.0,0.7"
BASE = "num_particles=16,num_draft_tokens=16"
OPTIONS = (
    *("truncate_rounds=true", "truncate_rounds=true,ess_threshold=0.25"),
    *("adapt_draft_tokens=0.3", "adapt_draft_tokens=0.5"),
    *("resampling=stratified", "resampling=residual", "resample_power=0.5", "resample_power=0.75"),
    *("ess_threshold=0.25", "ess_threshold=0.75", "ess_threshold=1.0"),
    *("exact_below=0.1", "exact_below=0.2", "exact_below=0.5", "exact_below=1.0"),
)
MANY = tuple(f"num_particles={n},num_draft_tokens={k}" for n in (16, 32, 64) for k in (12, 16))
DECIDING = (
    *("mode=target", "mode=speculative,num_draft_tokens=16", "mode=speculative,num_draft_tokens=12", *MANY),
    *(f"num_particles=32,num_draft_tokens=16,{option}" for option in ("truncate_rounds=true", "exact_below=0.2")),
)
SMALL_LOSSLESS = (
    "num_particles=4,num_draft_tokens=8,exact_below=1.0",
    "num_particles=8,num_draft_tokens=8,exact_below=0.2",
)
# problems of a full sweep, and the settings in the words of smc-eval
STAGES = (
    (250, f"--n 4,8,16,32 --k 4,8,12,16 {TEMPERATURES}"),
    (250, ("--modes=", TEMPERATURES, *(f"--also {setting}" for setting in (*SMALL_LOSSLESS, *MANY)))),
    (250, ("--modes=", TEMPERATURES, *(f"--also {BASE},{option}" for option in OPTIONS))),
    (2000, ("--modes=", "--temperature 1.0", *(f"--also {setting}" for setting in DECIDING))),
)


@dataclass(frozen=True)
class Share:
    """What one process does.

    Args:
        settings: and how many problems each is given.
        answers: its own file.
        head: see Work.
        deadline: seconds since the epoch, the same in all processes.
    """

    engine: Path
    settings: dict[Setting, int]
    answers: Path
    head: dict[str, Any]
    groups: int
    device: str
    threads: int
    deadline: float


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--engine", type=Path, metavar="DIR", help="built there if missing; default OUTPUT/work/engine")
    parser.add_argument("--work", type=Path, metavar="DIR", help="files of the run itself; default OUTPUT/work")
    parser.add_argument("--dtype", default="bfloat16", help="of the engine; default %(default)s")
    parser.add_argument("--problems", type=int, help="at most so many a setting, instead of those of the full sweep")
    parser.add_argument("--only", default="", metavar="TEXT", help="settings whose label has all of these words")
    parser.add_argument("--workers", type=int, default=8, help="processes that share the device; default %(default)s")
    parser.add_argument("--groups", type=int, default=32, help="requests decoded together by each; default %(default)s")
    parser.add_argument("--time-limit", type=float, default=1e9, metavar="SECONDS", help="no batch starts after that")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda; default %(default)s")
    parser.add_argument("--list", action="store_true", help="print the settings and their problems, and end")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the sweep; returns the exit status."""
    given = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(given)
    try:
        return sweep(args, f"python scripts/sweep_quality.py {shlex.join(given)}")
    except (SmcError, OSError) as error:
        print(f"sweep_quality: {error}", file=sys.stderr)
        return 1


def planned(problems: int | None, only: str = "") -> dict[Setting, int]:
    """Every setting of the stages and how many problems it is given, the most that a stage wants."""
    found: dict[Setting, int] = {}
    for count, words in STAGES:
        flags = words if isinstance(words, str) else " ".join(words)
        args = eval_cli.build_parser().parse_args(["--engine", "", *flags.split()])
        for setting in eval_cli.parse_settings(args):
            if all(word in setting.label.split() for word in only.split()):
                found[setting] = max(found.get(setting, 0), count)
    return {setting: min(count, problems or count) for setting, count in found.items()}


def divide(settings: dict[Setting, int], workers: int) -> list[dict[Setting, int]]:
    """Settings for each process: one that differs in temperature only shares the rounds that are captured, so it goes along.

    The longest work goes first to whoever has least (Graham, 1969).
    """
    families: dict[str, dict[Setting, int]] = defaultdict(dict)
    for setting, count in settings.items():
        rest = {name: value for name, value in setting.values if name != "temperature"}
        families[json.dumps(rest, sort_keys=True)][setting] = count

    def cost(family: dict[Setting, int]) -> float:
        return sum(count * _answer_ms(setting) for setting, count in family.items())

    shares: list[dict[Setting, int]] = [{} for _ in range(max(1, min(workers, len(families))))]
    for family in sorted(families.values(), key=cost, reverse=True):
        min(shares, key=cost).update(family)
    return shares


def _answer_ms(setting: Setting) -> float:
    """A guess at what an answer costs, in milliseconds: the host's part of a request, of a round, and lossless trials."""
    values = dict(setting.values)
    k = 0 if setting.mode == "target" else values["num_draft_tokens"]
    rounds = 97 / (1 + k / (3 if setting.mode == "speculative" else 1))
    trials = values.get("num_particles", 1) * k if values.get("exact_below") else 0
    return 8 + rounds * (0.08 + trials / 1000)


def sweep(args: argparse.Namespace, command: str) -> int:
    """Build, answer in several processes, and report."""
    started = time.time()
    settings = planned(args.problems, args.only)
    if args.list:
        for setting, count in settings.items():
            print(f"{count:6} problems  {setting.label}")
        print(f"{len(settings)} settings, {len(SEEDS) * sum(settings.values())} answers")
        return 0
    work = args.work or args.output / "work"
    for folder in (args.output, work):
        folder.mkdir(parents=True, exist_ok=True)
    engine = args.engine or work / "engine"
    if not (engine / "manifest.json").is_file():
        build_engine(_build_options(engine, args.dtype, args.groups))
    task = load_task(TASK)
    head = {"engine": f"task-pair {args.dtype}", "task": task.name, "task_settings": task.settings}
    manifest = load_manifest(engine, verify=False)
    head |= {"problem_seed": PROBLEM_SEED}
    head |= {"models": [model.source_sha256 for model in (manifest.target, manifest.draft) if model is not None]}
    known = list(read_answers(args.output, head))
    shares = [
        Share(
            *(engine, own, work / f"worker-{number}.jsonl", head, args.groups, args.device),
            max(1, torch.get_num_threads() // args.workers),
            started + args.time_limit,
        )
        for number, own in enumerate(divide(settings, args.workers))
    ]
    for share in shares:
        _hand_over(share, known)
    failed = _run_all(shares, len(SEEDS) * sum(settings.values()))
    records = list(_merged(known, shares))
    write_answers(args.output, head, records)
    found = head | {"command": command, "problems": max(settings.values()), "seeds": list(SEEDS)}
    found |= {"date": date.today().isoformat(), "device": _device_name(args.device), "torch": torch.__version__}
    found |= {"dtype": args.dtype, "workers": len(shares), "groups": args.groups}
    found |= {"seconds": round(time.time() - started, 1), "failed": failed}
    found["rows"] = summarise(eval_cli.wanted(records, settings, SEEDS))
    report.write_json(found, args.output / "report.json")
    report.write_csv(found["rows"], args.output / "report.csv")
    print(report.table(found["rows"]))
    print(f"{len(records)} answers in {args.output}, {time.time() - started:.0f} s, {len(failed)} settings failed")
    return 1 if failed else 0


def _build_options(output: Path, dtype: str, groups: int) -> BuildOptions:
    return BuildOptions(
        str(PAIR / "target"),
        draft=str(PAIR / "draft"),
        dtype=dtype,
        compiler="torch",
        particles=MAX_PARTICLES,
        draft_tokens=MAX_DRAFT_TOKENS,
        groups=groups,
        max_seq_len=MAX_SEQ_LEN,
        output=output,
    )


def _device_name(device: str) -> str:
    return eval_cli.device_name(ExecutorConfig(device=device).torch_device())


def read_answers(folder: Path, head: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The answers of a sweep before, in the files that `write_answers` wrote.

    Raises:
        ConfigError: they are answers to other problems.
    """
    for path in sorted(folder.glob("answers-*.jsonl.gz")):
        plain = folder / path.stem
        plain.write_bytes(gzip.decompress(path.read_bytes()))
        try:
            yield from Answers(plain, head).records
        finally:
            plain.unlink()


def write_answers(folder: Path, head: dict[str, Any], records: Sequence[dict[str, Any]]) -> None:
    """All answers in a few files of about one size, each of them an answers file of smc-eval, compressed."""
    for part in range(PARTS):
        lines = [json.dumps(record, ensure_ascii=False) for record in (head, *records[part::PARTS])]
        (folder / f"answers-{part}.jsonl.gz").write_bytes(gzip.compress("\n".join([*lines, ""]).encode()))


def _hand_over(share: Share, known: Sequence[dict[str, Any]]) -> None:
    """Start a process's file with the answers to its settings that are known."""
    share.answers.unlink(missing_ok=True)
    answers, keys = Answers(share.answers, share.head), {setting.key for setting in share.settings}
    with answers.writer() as file:
        answers.add([record for record in known if Setting.of(record["setting"]).key in keys], file)


def _merged(known: Sequence[dict[str, Any]], shares: Sequence[Share]) -> Iterator[dict[str, Any]]:
    """Answers of the processes, and those known before that no process had in its settings."""
    keys = {setting.key for share in shares for setting in share.settings}
    yield from (record for record in known if Setting.of(record["setting"]).key not in keys)
    for share in shares:
        yield from (_short(record) for record in Answers(share.answers, share.head).records)


def _short(record: dict[str, Any]) -> dict[str, Any]:
    """Six digits are enough of any figure, three of an ESS."""
    short = {name: round(value, 6) if isinstance(value, float) else value for name, value in record.items()}
    return short | {"ess": [round(value, 3) for value in record["ess"]]}


def _run_all(shares: Sequence[Share], total: int) -> list[str]:
    """Run every share in a process of its own; returns what failed, a line each."""
    context = get_context("spawn")
    failures = context.Queue()
    processes: list[BaseProcess] = [
        context.Process(target=answer_share, args=(share, failures), daemon=True) for share in shares
    ]
    for process in processes:
        process.start()
    started, failed = time.time(), []
    while any(process.is_alive() for process in processes):
        for process in processes:
            process.join(LOOK_S / len(processes))
        while not failures.empty():
            failed.append(failures.get())
            print(failed[-1], file=sys.stderr, flush=True)
        done = sum(share.answers.read_bytes().count(b"\n") - 1 for share in shares)
        print(f"{time.time() - started:5.0f} s  {done} of {total} answers", file=sys.stderr, flush=True)
    while not failures.empty():
        failed.append(failures.get())
    failed += [f"process {n} ended with {p.exitcode}" for n, p in enumerate(processes) if p.exitcode]
    return failed


def answer_share(share: Share, failures: Any) -> None:
    """What a process does: its settings in turns, until all is answered or the time is over."""
    torch.set_num_threads(share.threads)
    executor = Executor.from_engine_dir(share.engine, ExecutorConfig(device=share.device, max_groups=share.groups))
    task, most = load_task(TASK), max(share.settings.values())
    items, answers = task.items(most, PROBLEM_SEED), Answers(share.answers, share.head)
    deadline, broken = time.monotonic() + share.deadline - time.time(), set[Setting]()
    for upto in range(TURN, most + TURN, TURN):
        for setting, count in share.settings.items():
            if setting in broken or (count <= upto - TURN):
                continue
            work = Work(task, items, {setting: min(upto, count)}, SEEDS, share.head, len(SEEDS) * TURN, timed=False)
            try:
                run(executor, work, answers, deadline, quiet=True)
            except Exception:  # it is reported, and the other settings go on
                broken.add(setting)
                failures.put(f"{setting.label}: {traceback.format_exc(limit=-4)}")


if __name__ == "__main__":
    sys.exit(main())
