"""Trains a target and a draft for the chain task (engines/eval/chain.py), on which quality can be measured exactly.

    python scripts/train_task_pair.py --output models/task-pair --minutes 4     # one GPU
    smc-build --checkpoint models/task-pair/target --draft models/task-pair/draft --particles 32 --draft-tokens 16 \\
        --output engines/task-pair-tp1
    python scripts/train_task_pair.py --smoke --output DIR                      # tiny models on a CPU, a minute or two
Both learn from endless fresh problems. The target stops as soon as it solves --target-goal of them at temperature 1, the
draft at --draft-goal, so that there is something to gain and to lose between them. Then both answer fresh problems, rounded
to bfloat16 as they ship. Five files: config.json and model.safetensors of each, and the tokenizer beside the target;
the target's config.json also holds the task and what was measured, under "task_pair".
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY / "scripts" / "import_names"), str(REPOSITORY / "scripts")]

from task_pair.learner import Learner, Plan, Size  # noqa: E402
from task_pair.measure import measure_pair  # noqa: E402

from smc_engines.eval.chain import ChainTask, tokenizer  # noqa: E402
from smc_plugin.errors import SmcError  # noqa: E402

TARGET, DRAFT = Size(256, 5, 4, 2, 512), Size(128, 3, 2, 1, 256)
SMOKE_TARGET, SMOKE_DRAFT = Size(64, 2, 2, 1, 128, 32), Size(32, 2, 1, 1, 64, 32)
SMOKE_TASK = ChainTask(steps_min=1, steps_max=2, modulus=5, words_min=1, words_max=2, factor_max=4)


def say(text: str) -> None:
    """Print at once, with the time of day."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line; every field of ChainTask is an option."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folders target and draft go there")
    parser.add_argument("--minutes", type=float, default=4.0, help="for both together; default %(default)s")
    parser.add_argument("--target-goal", type=float, default=0.93, help="chance of a right answer; default %(default)s")
    parser.add_argument("--draft-goal", type=float, default=0.5, help="default %(default)s")
    parser.add_argument("--rows", type=int, default=384, help="problems a step; default %(default)s")
    parser.add_argument("--lr", type=float, default=6e-3, help="of Muon, in AdamW's units; default %(default)s")
    parser.add_argument("--steps", type=int, default=1_000_000, help="at most, of each model; default %(default)s")
    parser.add_argument("--problems", type=int, default=2000, help="answered at the end; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="tiny models, a one-step task, on the CPU")
    for name, value in ChainTask().to_dict().items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="default %(default)s")
    return parser.parse_args(arguments)


def train_pair(options: argparse.Namespace) -> dict[str, Any]:
    """Train, round, measure and write both; returns what goes into the target's config.json."""
    task = ChainTask(**{name: getattr(options, name) for name in ChainTask().to_dict()})
    sizes = (TARGET, DRAFT)
    if options.smoke:
        task, sizes, options.device = SMOKE_TASK, (SMOKE_TARGET, SMOKE_DRAFT), "cpu"
    seconds = (options.minutes * 60 * 0.62, options.minutes * 60 * 0.2)
    goals = (options.target_goal, options.draft_goal)
    report: dict[str, Any] = {"task": task.to_dict(), "seed": options.seed, "torch": torch.__version__}
    report["device"] = torch.cuda.get_device_name() if options.device.startswith("cuda") else options.device
    learners = []
    for name, size, goal, limit in zip(("target", "draft"), sizes, goals, seconds, strict=True):
        learner = Learner(size, task, options.device, options.seed + len(learners), draft=name == "draft")
        say(f"{name}: {learner.parameters:,} parameters, goal {goal}, at most {limit:.0f} s")
        plan = Plan(options.rows, options.lr, goal, limit, options.steps, seed=options.seed + len(learners))
        report[name] = {"parameters": learner.parameters} | learner.train(plan, say)
        learner.round_weights()
        learner.save(options.output / name, {"role": name, "task": task.to_dict()})
        learners.append(learner)
    target, draft = learners
    report["results"] = measure_pair(target, draft, task, options.problems, seed=options.seed + 77)
    for row in report["results"]:
        say(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
    target.save(options.output / "target", report)
    tokenizer().save(str(options.output / "target" / "tokenizer.json"))
    return report


def main(arguments: list[str] | None = None) -> int:
    """Train the pair; returns the exit code."""
    options = parse_arguments(arguments)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # a variant for each model, row count and gradient need
    try:
        report = train_pair(options)
    except (SmcError, OSError) as error:
        print(f"train_task_pair: {error}", file=sys.stderr)
        return 1
    windows = {"target": (0.90, 0.97), "draft": (0.40, 0.70)}
    for row in report["results"]:
        for name, (low, high) in windows.items():
            if not low <= row[name] <= high:
                say(f"{name} alone solves {row[name]:.3f} at temperature {row['temperature']}, outside {low} to {high}")
    say(f"wrote {options.output}; next:")
    print(
        f"  smc-build --checkpoint {options.output}/target --draft {options.output}/draft --output engines/task-pair-tp1"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
