"""smc-eval: how good the answers of each setting are, beside what they cost.

    smc-eval --engine engines/task-pair-tp1 --task chain --n 4,8,16 --k 4,8 --temperature 1.0 --problems 200 --seeds 0,1 \\
        --answers answers.jsonl --json report.json --png report.png

Runs every mode and setting over the same problems, scores by exact match, and prints accuracy with its 95 % interval, the
paired difference to the target, tokens a target pass, tokens/s and log-likelihood under the target. Run it again with the
same --answers and it goes on where it was interrupted, or adds what is new.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from smc_build.command_line import CommandParser
from smc_engines.config import ExecutorConfig
from smc_engines.engine import Limits
from smc_engines.eval import plot, report
from smc_engines.eval.runner import Answers, Work, run
from smc_engines.eval.settings import MODES, Setting, grid, parse_axis, parse_numbers, parse_setting, single
from smc_engines.eval.statistics import summarise
from smc_engines.eval.tasks import SHOTS, TASKS, load_task
from smc_engines.executor import Executor
from smc_engines.sampling_params import SamplingParams
from smc_plugin.errors import ConfigError, SmcError


def build_parser() -> argparse.ArgumentParser:
    """The command line of smc-eval."""
    parser = CommandParser(prog="smc-eval", description="Measure the quality of settings beside their cost.")
    parser.add_argument("--engine", required=True, metavar="DIR", help="engine directory made by smc-build")
    parser.add_argument("--task", choices=TASKS, default="chain", help="default %(default)s")
    parser.add_argument(
        "--task-config", type=Path, metavar="FILE", help="target/config.json of the pair whose chain task this is"
    )
    parser.add_argument(
        *("--shots",), type=int, metavar="N", help=f"solved examples in front of a few-shot problem; default {SHOTS}"
    )
    parser.add_argument("--problems", type=int, default=100, help="default %(default)s")
    parser.add_argument("--problem-seed", type=int, default=1, help="which problems; default %(default)s")
    parser.add_argument("--seeds", default="0", help="answers to each problem, one a seed; default %(default)s")
    parser.add_argument("--modes", default=",".join(MODES), help="default %(default)s")
    parser.add_argument("--n", default="8", help="values of N; default %(default)s")
    parser.add_argument("--k", default="4", help="values of K; default %(default)s")
    parser.add_argument("--theta", default="", help=f"values of θ; default {SamplingParams.ess_threshold}")
    parser.add_argument(
        "--temperature", default=str(SamplingParams.temperature), help="values of the temperature; default %(default)s"
    )
    parser.add_argument(
        *("--vary",),
        action="append",
        default=[],
        metavar="NAME=VALUES",
        help="another sampling parameter, for the modes that look at it",
    )
    parser.add_argument(
        *("--also",),
        action="append",
        default=[],
        metavar="NAME=VALUE,...",
        help="one more setting, such as num_particles=4,num_draft_tokens=8,exact_below=1; mode smc unless it says otherwise",
    )
    parser.add_argument("--batch", type=int, default=64, help="requests handed over together; default %(default)s")
    parser.add_argument("--groups", type=int, default=16, help="requests decoded together; default %(default)s")
    parser.add_argument(
        "--time-limit", type=float, metavar="SECONDS", help="start no batch after that; report what is there"
    )
    parser.add_argument("--device", default=ExecutorConfig.device, help="auto, cpu or cuda; default %(default)s")
    parser.add_argument("--threads", type=int, help="torch threads on a CPU")
    parser.add_argument(
        "--answers", type=Path, metavar="FILE", help="keep all answers there (JSON lines), and go on from it"
    )
    for suffix, what in (
        ("json", "the figures"),
        ("csv", "the rows"),
        ("png", "a drawing"),
        ("html", "one page of it all"),
    ):
        parser.add_argument(f"--{suffix}", type=Path, metavar="FILE", help=f"write {what} there")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run smc-eval; returns the exit status."""
    given = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(given)
    try:
        evaluate(args, f"smc-eval {shlex.join(given)}")
    except (SmcError, OSError) as error:
        print(f"smc-eval: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsmc-eval: interrupted; with --answers the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def evaluate(args: argparse.Namespace, command: str = "smc-eval") -> dict[str, Any]:
    """Run what the command line asks for, print the table and write the files.

    Returns:
        the report.
    Raises:
        SmcError: an option is wrong, the engine cannot be loaded or a request failed.
    """
    for path in (args.png, args.html):
        if path is not None:
            plot.check_available(path)
    if min(args.problems, args.batch, args.groups) < 1:
        raise ConfigError(
            f"--problems, --batch and --groups are {args.problems}, {args.batch} and {args.groups}, expected at least 1: raise "
            "them"
        )
    settings, seeds = parse_settings(args), parse_seeds(args.seeds)
    task = load_task(args.task, args.task_config, args.shots)
    if args.threads is not None and args.threads < 1:
        raise ConfigError(f"--threads is {args.threads}, expected at least 1: raise it, or leave it out")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    executor = Executor.from_engine_dir(args.engine, ExecutorConfig(device=args.device, max_groups=args.groups))
    items = task.items(args.problems, args.problem_seed)
    head = {"engine": executor.engine.manifest.name, "task": task.name, "task_settings": task.settings}
    task.check(executor.engine.tokenizer, items)
    settings = with_engine_defaults(settings, executor.engine.limits)
    head["problem_seed"] = args.problem_seed
    head |= {"models": [], "precision": []}
    for model in (executor.engine.manifest.target, executor.engine.manifest.draft):
        if model is not None:
            head["models"].append(model.source_sha256 or f"random, seed {model.seed}")
            head["precision"].append(asdict(model.precision))
    # tokens/s of other machines and batches do not belong into one report
    head |= {"device": device_name(executor.engine.device), "groups": args.groups, "batch": args.batch}
    print(
        f"{len(settings)} settings, {len(items)} problems, {len(seeds)} seeds on {executor.engine.device}",
        file=sys.stderr,
    )
    answers = Answers(args.answers, head)
    deadline = math.inf if args.time_limit is None else time.monotonic() + args.time_limit
    left = run(
        executor, Work(task, items, dict.fromkeys(settings, len(items)), seeds, head, args.batch), answers, deadline
    )
    if left:
        print(
            f"{left} answers are missing after {args.time_limit:g} s; with --answers the same command goes on",
            file=sys.stderr,
        )
    found = head | {"command": command, "problems": len(items), "seeds": seeds}
    found |= {"date": date.today().isoformat(), "torch": torch.__version__}
    found["rows"] = summarise(wanted(answers.records, dict.fromkeys(settings, len(items)), seeds))
    _write(found, args)
    return found


def parse_settings(args: argparse.Namespace) -> list[Setting]:
    """The settings that a command line names, in its order, each once.

    Raises:
        ConfigError: an option that cannot be read; RequestError: a parameter that does not exist or is out of range.
    """
    axes: dict[str, list[Any]] = {
        "temperature": parse_numbers("--temperature", args.temperature, float),
        "num_particles": parse_numbers("--n", args.n),
        "num_draft_tokens": parse_numbers("--k", args.k),
        "ess_threshold": parse_numbers("--theta", args.theta, float),
    }
    for text in args.vary:
        name, values = parse_axis(text)
        if name in axes:
            raise ConfigError(f"--vary {name} has an option of its own, see --help: use that")
        axes[name] = values
    settings = grid([mode for mode in args.modes.split(",") if mode], axes)
    for text in args.also:
        settings += single(parse_setting(text), axes["temperature"])
    if not settings:
        raise ConfigError("the command names no setting, expected some --modes or --also: name at least one")
    return list(dict.fromkeys(settings))


def parse_seeds(text: str) -> list[int]:
    """The numbers of --seeds, each once.

    Raises:
        ConfigError: there is none, or one that is too large or negative.
    """
    seeds = list(dict.fromkeys(parse_numbers("--seeds", text)))
    if not seeds or not all(0 <= seed < 2**32 for seed in seeds):
        raise ConfigError(f"--seeds expects whole numbers from 0 to 2^32 - 1 such as 0,1, got {text!r}: correct it")
    return seeds


def with_engine_defaults(settings: Sequence[Setting], limits: Limits) -> list[Setting]:
    """Write down the N and K that the engine would choose: an engine of other limits would choose others."""

    def complete(setting: Setting) -> Setting:
        chosen = {"num_draft_tokens": limits.max_draft_tokens} if setting.mode != "target" else {}
        chosen |= {"num_particles": limits.max_particles} if setting.mode == "smc" else {}
        return Setting.of(chosen | {name: value for name, value in setting.values if value is not None})

    return list(dict.fromkeys(complete(setting) for setting in settings))


def wanted(
    records: Sequence[dict[str, Any]], settings: Mapping[Setting, int], seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """The answers to the first so many problems of each setting, in the order of the settings; there may be more."""
    order = {setting.key: (place, count) for place, (setting, count) in enumerate(settings.items())}

    def rank(record: dict[str, Any]) -> tuple[int, int]:
        return order.get(Setting.of(record["setting"]).key, (0, 0))

    ranked = [(*rank(record), record) for record in records]
    chosen = [(place, record) for place, count, record in ranked if record["item"] < count and record["seed"] in seeds]
    return [record for _, record in sorted(chosen, key=lambda pair: pair[0])]


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU with the number of torch's threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def _write(found: dict[str, Any], args: argparse.Namespace) -> None:
    if not found["rows"]:
        print("there is no answer yet, so no report is written: give it more time", file=sys.stderr)
        return
    print(report.table(found["rows"]))
    if args.json is not None:
        report.write_json(found, args.json)
    if args.csv is not None:
        report.write_csv(found["rows"], args.csv)
    if args.png is not None:
        plot.draw(found, args.png)
    if args.html is not None:
        report.write_html(found, args.html)
    for path in (args.answers, args.json, args.csv, args.png, args.html):
        if path is not None:
            print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
