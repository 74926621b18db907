"""smc-bench: modes side by side on one engine, in one run on one machine.

    smc-bench --engine engines/smollm2-tp1 --n 4 --k 4
    smc-bench --preset llama-8b --n 8 --k 8 --prompt-tokens 256 --output-tokens 512 --sweep --worst-case-resampling --profile

Repeats are interleaved (target, speculative, smc, target, …) so that a machine that slows down slows all modes. The engine
is made once, with limits that cover every point; each point gets a new executor on it. How times and floors are defined:
smc_engines.bench.measure and smc_engines.bench.floor.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, get_args

import torch

from smc_build.builder import BuildOptions, random_engine
from smc_build.command_line import CommandParser
from smc_build.engine_dir import Role
from smc_engines.bench import collectives, plot, profiling, report
from smc_engines.bench.floor import copy_bandwidth
from smc_engines.bench.measure import Bench, CaseFailedError, Sample, repeat
from smc_engines.bench.points import MODES, SWEEPS, Case, Point, parse_modes, parse_numbers, sweep_points, swept_by
from smc_engines.config import ExecutorConfig
from smc_engines.engine import Engine
from smc_engines.parallel import lockstep
from smc_engines.parallel.connect import launched_rank
from smc_engines.parallel.launch import follow_rank_0, start_ranks
from smc_engines.region_choice import RegionChoice
from smc_engines.sampling_params import Mode, SamplingParams
from smc_plugin.errors import ConfigError, SmcError

_SWEEP_FLAGS = {"batch": "batch", "particles": "n", "draft_tokens": "k", "prompt_tokens": "prompt-tokens"}
# With random weights nearly every draft token is rejected, so an answer would take as many rounds as it has tokens.
_LEAST_SPECULATIVE_ROUNDS = 32


@dataclass(frozen=True)
class Plan:
    """What a run measures, in order: the base's cases together, then those of each point, then profiles."""

    base: list[Case]
    points: list[list[Case]]
    profiled: list[Case]

    @property
    def all_points(self) -> list[Point]:
        """Every point."""
        return [case.point for case in [*self.base, *(case for cases in self.points for case in cases), *self.profiled]]


def build_parser() -> argparse.ArgumentParser:
    """The command line of smc-bench."""
    parser = CommandParser(prog="smc-bench", description="Time target, speculative and smc decoding side by side.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--engine", metavar="DIR", help="engine directory made by smc-build")
    source.add_argument("--preset", metavar="NAME", help="shapes of a preset or folder with its draft, random weights")
    parser.add_argument("--draft", metavar="NAME", help="another draft for --preset")
    parser.add_argument("--dtype", help="of --preset; default as smc-build chooses")
    for name, what in (("draft", "the draft's matrices"), ("head", "heads beside FP8 matrices"), ("kv", "KV pages")):
        parser.add_argument(f"--{name}-dtype", help=f"of {what}, with --preset; as in smc-build")
    parser.add_argument("--tp", type=int, default=1, help="ranks of --preset; default %(default)s")
    parser.add_argument("--draft-tp", type=int, help="1 keeps the whole draft of --preset on every rank")
    parser.add_argument("--modes", default=",".join(MODES), help="comma-separated; default %(default)s")
    parser.add_argument("--n", "--particles", dest="particles", type=int, default=4, help="default %(default)s")
    parser.add_argument("--k", "--draft-tokens", dest="draft_tokens", type=int, default=4, help="default %(default)s")
    parser.add_argument("--prompt", help="text; default: random token ids")
    parser.add_argument(
        "--prompt-tokens", type=int, default=64, help="random token ids of the prompt; default %(default)s"
    )
    parser.add_argument("--output-tokens", type=int, default=128, help="default %(default)s")
    parser.add_argument("--batch", type=int, default=1, help="requests at once; default %(default)s")
    parser.add_argument("--temperature", type=float, default=SamplingParams.temperature, help="default %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="timed repeats of each mode; default %(default)s")
    parser.add_argument("--max-rounds", type=int, metavar="R", help="end every timed batch after so many rounds")
    parser.add_argument("--device", default=ExecutorConfig.device, help="auto, cpu or cuda; default %(default)s")
    parser.add_argument("--threads", type=int, help="torch threads on a CPU")
    parser.add_argument(
        "--regions", choices=get_args(RegionChoice), default=ExecutorConfig.regions, help="default %(default)s"
    )
    tactics = parser.add_mutually_exclusive_group()
    tactics.add_argument(
        "--tune", action="store_true", help="first find the fastest tactics at the base point's numbers of rows"
    )
    tactics.add_argument(
        "--tactics",
        type=Path,
        metavar="REPORT",
        help="take those that an earlier run of --preset found, from its --json",
    )
    _add_sweep_options(parser)
    parser.add_argument(
        "--worst-case-resampling", action="store_true", help="also time smc resampling never and every round"
    )
    parser.add_argument(
        "--profile", nargs="?", const="smc", metavar="MODES", help="kernels of one round, on a GPU; default smc"
    )
    parser.add_argument("--profile-rounds", type=int, default=24, help="rounds to record; default %(default)s")
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="keep the profiler's Chrome trace (.json or .json.gz)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, after every repeat")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw it; needs the extra eval")
    return parser


def _add_sweep_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sweep", action="store_true", help="sweep all four settings below, one at a time")
    for setting, flag in _SWEEP_FLAGS.items():
        values = ",".join(str(value) for value in SWEEPS[setting])
        parser.add_argument(
            *(f"--sweep-{flag}",),
            dest=f"sweep_{setting}",
            nargs="?",
            const=values,
            metavar="LIST",
            help=f"points that differ in --{flag} only; without a list {values}",
        )
    parser.add_argument("--sweep-modes", default="smc", help="modes to time at the points; default %(default)s")
    parser.add_argument("--sweep-repeats", type=int, help="timed repeats of each point; default as --repeats")


def main(argv: list[str] | None = None) -> int:
    """Run smc-bench; returns the exit status."""
    given = sys.argv[1:] if argv is None else argv
    args = build_parser().parse_args(given)
    started = time.perf_counter()
    try:
        start_ranks(args.tp if args.engine is None else Path(args.engine), "smc_engines.bench_cli", given)
        if launched_rank():
            return follow_rank_0(lambda: _load(args)[0], "smc-bench")
        found = run(args, f"smc-bench {shlex.join(given)}")
    except SmcError as error:
        print(f"smc-bench: {error}", file=sys.stderr)
        return 1
    print(f"took {time.perf_counter() - started:.0f} s", file=sys.stderr)
    for path in (args.json, args.png):
        if path is not None:
            print(f"wrote {path}")
    return 0 if found["rows"] else 1


def run(args: argparse.Namespace, command: str = "smc-bench") -> dict[str, Any]:
    """Measure what the command line asks for, and print it as it comes.

    Returns:
        the report: {"rows": [...], "failed": [...], "resampling": ..., "profiles": [...], ...}.
    Raises:
        SmcError: an option or the engine directory is wrong.
    """
    _check(args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    started = time.perf_counter()
    engine, text = _load(args)
    with contextlib.closing(engine):
        return _measure(args, command, engine, text, started)


def _measure(
    args: argparse.Namespace, command: str, engine: Engine, text: list[int] | None, started: float
) -> dict[str, Any]:
    """What `run` does once it has an engine, made since `started`."""
    plan = _plan(args, engine.manifest.weights == "random", None if text is None else len(text))
    _say(f"made the engine in {time.perf_counter() - started:.1f} s")
    tactics = _tune(engine, plan) if args.tune else engine.manifest.tactics
    bench = Bench(engine, args.temperature, text)
    copy_tb_per_s = copy_bandwidth(engine.device)
    for line in report.header(engine, copy_tb_per_s):
        _say(line)
    found = {
        "date": date.today().isoformat(),
        "command": command,
        "copy_tb_per_s": copy_tb_per_s,
        "identity": report.identity(engine.manifest, engine.device),
        "tactics": tactics,
        "rows": [],
        "failed": [],
        "resampling": None,
        "profiles": [],
    }
    session = _Session(args, bench, copy_tb_per_s, found)
    session.save_json()  # what tuning found is there whatever happens next
    session.measure(plan.base, args.repeats)
    for cases in plan.points:
        bench.renew()
        session.measure(cases, args.sweep_repeats or args.repeats)
    if found["rows"]:
        print(report.table(found["rows"]))
    for case in plan.profiled:
        session.profile(case, several=len(plan.profiled) > 1)
    print("\n".join(report.summary_lines(found)))
    return found


class _Session:
    """Adds what was measured to the report and saves it after every step."""

    def __init__(self, args: argparse.Namespace, bench: Bench, copy_tb_per_s: float, found: dict[str, Any]) -> None:
        self._args, self._bench, self._copy, self._found = args, bench, copy_tb_per_s, found

    def measure(self, cases: Sequence[Case], repeats: int) -> None:
        """Time a point's cases; one that cannot be measured is reported, and the others start again without it."""
        before, left = list(self._found["rows"]), list(cases)
        collectives_us: dict[Case, float] = {}

        def keep(samples: dict[Case, list[Sample]]) -> None:
            for case in samples:
                if case not in collectives_us:
                    collectives_us[case] = collectives.round_us(engine, case)
            self._found["rows"] = before + [
                report.make_row(engine, case, own, self._args.temperature, self._copy, collectives_us[case])
                for case, own in samples.items()
            ]
            self.save_json()

        while left:
            engine = self._bench.engine
            try:
                repeat(self._bench, left, repeats, _say, keep)
            except CaseFailedError as failure:
                self._found["rows"] = before
                left.remove(failure.case)
                self._fail(failure.case, failure.__cause__)
                continue
            self._save()
            return

    def profile(self, case: Case, several: bool) -> None:
        """Profile a case, print its tables and put the gap into its row."""
        trace = self._args.trace
        if trace is not None and several:
            trace = trace.with_name(f"{case.mode}-{trace.name}")
        _say(f"profiling {case.name}")
        try:
            self._bench.renew()
            made = profiling.profile(self._bench, case, self._args.profile_rounds, trace)
        except Exception as error:
            self._fail(case, error)
            return
        self._found["profiles"].append(made)
        rows = [row for row in self._found["rows"] if row["point"] == "base" and row["resampling"] == "default"]
        row = next((row for row in rows if row["mode"] == case.mode), None)
        if row is not None:
            row["round_gap_us"] = made["round_gap_us"]
        self._save()
        print(report.profile_text(made, row["ms_per_round"] if row is not None else None))

    def _fail(self, case: Case, error: BaseException | None) -> None:
        """Whatever a case died of (memory, a kernel that does not fit), what was measured before it stands."""
        row = report.failed_row(self._bench.engine, case, self._copy, error)
        self._found["failed"].append(row)
        _say(f"failed {case.name}: {row['error']}")
        if error is not None:
            error.__traceback__ = None  # it keeps the tensors of its frames alive
        self._save()
        self._bench.renew()

    def save_json(self) -> None:
        """Write the report as it is now, if it is wanted."""
        self._found["resampling"] = report.resampling_summary(self._found["rows"])
        if self._args.json is not None:
            report.write_json(self._found, self._args.json)

    def _save(self) -> None:
        self.save_json()
        if self._args.png is not None and self._found["rows"]:
            plot.draw(self._found, self._args.png)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _check(args: argparse.Namespace) -> None:
    least = {"repeats": 1, "batch": 1, "particles": 1, "draft_tokens": 1, "prompt_tokens": 1, "output_tokens": 2}
    least |= {"max_rounds": 1, "sweep_repeats": 1, "profile_rounds": 2}
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} is {value}, expected at least {low}: raise it")
    if args.tactics is not None and args.engine is not None:
        raise ConfigError(
            f"--tactics {args.tactics} was given beside --engine, an engine directory has its own: leave it out, or run "
            f"smc-build --tune {args.engine}"
        )
    if args.png is not None:
        plot.check_available(args.png)
    if (args.profile or args.trace) and ExecutorConfig(device=args.device).torch_device().type != "cuda":
        raise ConfigError(
            "--profile and --trace record kernels of a CUDA device, this run uses the CPU: leave them out, or use a GPU"
        )


def _plan(args: argparse.Namespace, random_weights: bool, text_tokens: int | None = None) -> Plan:
    base = Point(args.batch, args.particles, args.draft_tokens, args.prompt_tokens, args.output_tokens)
    if text_tokens is not None:
        base = replace(base, prompt_tokens=text_tokens)

    def case(point: Point, mode: Mode) -> Case:
        rounds = args.max_rounds
        if rounds is None and mode == "speculative" and random_weights:
            rounds = max(_LEAST_SPECULATIVE_ROUNDS, -(-(point.output_tokens - 1) // (point.draft_tokens + 1)))
        return Case(point, mode, max_rounds=rounds)

    cases = [case(base, mode) for mode in parse_modes(args.modes, "--modes")]
    if args.worst_case_resampling:
        cases += [Case(base, "smc", "never", args.max_rounds), Case(base, "smc", "every", args.max_rounds)]
    modes = parse_modes(args.sweep_modes, "--sweep-modes")
    points = [
        [case(point, mode) for mode in modes if swept_by(point, mode)] for point in sweep_points(base, _sweeps(args))
    ]
    profiled = [case(base, mode) for mode in parse_modes(args.profile or "smc", "--profile")]
    return Plan(cases, [each for each in points if each], profiled if args.profile or args.trace else [])


def _sweeps(args: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    found = {}
    for setting, flag in _SWEEP_FLAGS.items():
        text = getattr(args, f"sweep_{setting}")
        if text is not None:
            found[setting] = parse_numbers(text, f"--sweep-{flag}")
        elif args.sweep:
            found[setting] = SWEEPS[setting]
    return found


def _load(args: argparse.Namespace) -> tuple[Engine, list[int] | None]:
    """Load or make the engine with limits that cover every point, and encode the prompt."""
    points = _plan(args, random_weights=True).all_points
    together = max([point.batch * point.prompt_tokens for point in points if point.batch > 1], default=0)
    config = ExecutorConfig(
        device=args.device,
        regions=args.regions,
        max_groups=max(point.batch for point in points),
        # A batch must begin together, and every repeat must prefill its prompt.
        prefill_chunk=max(ExecutorConfig.prefill_chunk, together),
        prefix_cache=False,
    )
    if args.engine is not None:
        engine = Engine.from_dir(Path(args.engine), config, untuned=args.tune)
        return engine, None if args.prompt is None else _encode(engine, args.prompt)
    if args.prompt is not None:
        raise ConfigError("--prompt needs a tokenizer, --preset has none: use --prompt-tokens, or an engine directory")
    options = BuildOptions(
        checkpoint=args.preset,
        draft=args.draft,
        tp=args.tp,
        draft_tp=args.draft_tp,
        dtype=args.dtype,
        draft_dtype=args.draft_dtype,
        head_dtype=args.head_dtype,
        kv_dtype=args.kv_dtype,
        compiler="torch",  # an engine in memory has no plans
        particles=max(point.particles for point in points),
        draft_tokens=max(point.draft_tokens for point in points),
        groups=max(point.batch for point in points),
        max_seq_len=max(point.prompt_tokens + point.output_tokens for point in points),
    )
    tactics = None
    if args.tactics is not None:
        tactics = report.read_tactics(args.tactics, random_engine(options)[0], config.torch_device())
    return Engine.from_random(options, config, tactics), None


def _tune(engine: Engine, plan: Plan) -> dict[str, Any]:
    """Let the engine find its tactics for the numbers of rows that the base point's passes have."""
    from smc_engines.tuning import tune_engine  # noqa: PLC0415 - importing it needs triton

    started = time.perf_counter()
    rows: dict[Role, set[int]] = {"target": set(), "draft": set()}
    for case in plan.base:
        sequences = case.point.batch * case.num_particles
        rows["target"].add(sequences * (case.num_draft_tokens + 1))
        rows["draft"] |= {sequences, 2 * sequences} if case.num_draft_tokens else set()
    wanted: dict[Role, list[int]] = {role: sorted(counts) for role, counts in rows.items()}
    lockstep.announce(engine.ranks, tune_engine, wanted, lockstep.silent)
    tactics = tune_engine(engine, wanted, _say)
    _say(f"tuned in {time.perf_counter() - started:.1f} s")
    return tactics


def _encode(engine: Engine, prompt: str) -> list[int]:
    tokenizer = engine.tokenizer
    if tokenizer is None:
        raise ConfigError("--prompt needs a tokenizer, the engine directory has none: use --prompt-tokens")
    if tokenizer.has_chat_template:
        return list(tokenizer.apply_chat_template([{"role": "user", "content": prompt}])[1])
    return list(tokenizer.encode(prompt))


if __name__ == "__main__":
    sys.exit(main())
