"""The command smc-build.

    smc-build --checkpoint checkpoints/big --draft checkpoints/small      build engines/big-tp1/
    smc-build --checkpoint llama-8b --random-weights                      a preset's shapes, for speed work
    smc-build --tune engines/big-tp1                                      on its GPU: find who computes what fastest
    smc-build --inspect engines/big-tp1                                   verify and describe an engine directory

It prints the plan, shows progress on standard error and ends with time, path and the next command, or what keeps that from
running on this machine. Errors are one line, exit 1.
"""

import argparse
import contextlib
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from smc_build.builder import build_engine
from smc_build.command_line import CommandParser
from smc_build.engine_dir import Manifest, load_manifest, tokenizer_path, write_manifest
from smc_build.machine import format_bytes
from smc_build.plan import DEFAULT_MAX_SEQ_LEN, BuildOptions, BuildPlan, option_defaults
from smc_build.plan_text import describe, preset_list
from smc_build.precision import OPTION_DTYPES
from smc_build.sharding import describe_padding
from smc_build.tensorrt_api import COMPILERS
from smc_build.weights import weight_bytes
from smc_plugin.errors import ConfigError, SmcError

# Below this, smc-run's default answer length and a prompt may not fit together.
_ROOMY = 512


class Terminal:
    """Progress on a terminal: the plan on standard output, bars on standard error."""

    def __init__(self) -> None:
        self.shown: BuildPlan | None = None
        self._bar: tqdm | None = None

    def plan(self, plan: BuildPlan) -> None:
        """Print the plan."""
        self.shown = plan
        print(describe(plan), end="\n\n", flush=True)

    def compiled(self, label: str, num_plans: int, num_bytes: int, seconds: float) -> None:
        """Print what was compiled."""
        print(f"  {label}: {num_plans} plans compiled in {seconds:.1f} s, {format_bytes(num_bytes)}", flush=True)

    def quantizing(self, label: str) -> None:
        """Say why nothing moves."""
        print(f"  {label}: quantizing to FP8 (the whole model is loaded and run on calibration text)", flush=True)

    def start(self, label: str, total_bytes: int) -> None:
        """Open a bar."""
        self._bar = tqdm(total=total_bytes, desc=f"  {label}", unit="B", unit_scale=True, file=sys.stderr)

    def advance(self, num_bytes: int) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(num_bytes)

    def finish(self) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def main(argv: list[str] | None = None) -> int:
    """Run smc-build.

    Args:
        argv: arguments without the program's name; None takes the process's.
    Returns:
        the exit code: 0, 1 for an error that is printed, 130 when interrupted.
    """
    arguments = vars(_parser().parse_args(argv))
    inspect, tune, may_tune = arguments.pop("inspect"), arguments.pop("tune"), not arguments.pop("no_tune")
    try:
        if inspect is not None:
            _inspect(inspect)
        elif tune is not None:
            _tune(tune)
        else:
            _build(arguments, may_tune)
    except SmcError as error:
        print(f"smc-build: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"smc-build: {error}: check the disk and the permissions of the output folder", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("smc-build: interrupted; an engine directory is written whole or not at all", file=sys.stderr)
        return 130
    return 0


def _build(arguments: dict[str, object], may_tune: bool) -> None:
    if arguments["checkpoint"] is None:
        raise ConfigError("nothing to build, expected --checkpoint: name a folder or a preset (--help lists them)")
    started, terminal = time.perf_counter(), Terminal()
    path = build_engine(BuildOptions(**arguments), terminal)  # type: ignore[arg-type]
    seconds, plan = time.perf_counter() - started, terminal.shown
    assert plan is not None  # a build shows its plan first
    prompt = '"Why is the sky blue?"' if tokenizer_path(path) is not None else "--prompt-ids 1,2,3"
    if plan.max_seq_len < _ROOMY:
        prompt += f" --max-tokens {plan.max_seq_len // 2}"
    obstacle = obstacle_here(plan)
    print(f"Built {path} in {seconds:.1f} s. {obstacle or 'Next:'}\n\n    smc-run --engine {path} {prompt}", flush=True)
    if may_tune and torch.cuda.is_available():
        if plan.options.tp > 1:
            print(f"To find the fastest tactics, with a GPU for every rank:\n\n    smc-build --tune {path}", flush=True)
        elif obstacle is None:
            _tune_built(path)


def obstacle_here(plan: BuildPlan) -> str | None:
    """Why the engine does not run on this machine, and what to do before the command that comes next; None where it does."""
    ranks, shortest = plan.options.tp, -(-plan.max_seq_len // plan.options.page_size)
    if plan.num_pages < shortest:
        each = f"each of its {ranks} ranks needs" if ranks > 1 else "it needs"
        share = " for each" if ranks > 1 else ""
        return (
            f"It does not fit this machine: {each} {format_bytes(plan.rank_weight_bytes + plan.whole_pass_bytes)} for "
            f"weights and {format_bytes(shortest * plan.page_bytes)} for the KV pages of one sequence, "
            f"{format_bytes(plan.memory_bytes)} of {plan.memory_name} are free{share}: copy the directory to a larger machine, "
            "and there:"
        )
    if ranks == 1:
        return None
    if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
        return (
            f"It does not run on this machine: GPUs here are {torch.cuda.device_count()}, expected one for each of its "
            f"{ranks} ranks: copy the directory to a machine that has them, and there:"
        )
    # It belongs to the run time, which nothing else here needs.
    from smc_engines.parallel.launch import find_mpirun  # noqa: PLC0415

    try:
        find_mpirun()
    except ConfigError as error:
        return f"It does not run here yet: {error}, and then:"
    return None


def _tune_built(path: Path) -> None:
    """Tune what was just built; the engine is whole without it, so nothing that goes wrong here fails the build."""
    print()
    try:
        _tune(path, verify=False)
    except Exception as error:  # out of memory, a kernel that does not compile: whatever it is, the build stands
        print(
            f"smc-build: tuning failed ({type(error).__name__}: {error}); {path} runs untuned: smc-build --tune {path} "
            "tries again",
            file=sys.stderr,
        )


def _tune(path: Path, verify: bool = True) -> None:
    """Time the engine's regions on this machine's GPU and record the fastest in its manifest."""
    # Tuning runs the engine, so it belongs to the run time, which nothing else here needs.
    from smc_engines.config import ExecutorConfig  # noqa: PLC0415
    from smc_engines.engine import Engine  # noqa: PLC0415
    from smc_engines.parallel import lockstep  # noqa: PLC0415
    from smc_engines.parallel.connect import launched_rank  # noqa: PLC0415
    from smc_engines.parallel.launch import follow_rank_0, start_ranks  # noqa: PLC0415

    if not torch.cuda.is_available():
        raise ConfigError(f"--tune {path} needs a CUDA GPU, torch sees none here: run it on the GPU machine")
    from smc_engines.tuning import tune_engine  # noqa: PLC0415 - importing it needs triton

    started = time.perf_counter()
    start_ranks(path, "smc_build.cli", ["--tune", str(path)])
    config = ExecutorConfig(device="cuda", verify=False)
    if launched_rank():
        if follow_rank_0(lambda: Engine.from_dir(path, config, untuned=True), "smc-build"):
            raise SmcError(
                f"rank {launched_rank()} could not tune, expected it to follow rank 0: see the messages above"
            )
        return
    manifest = load_manifest(path, verify=verify)
    print(f"tuning {path} on {torch.cuda.get_device_name()}", flush=True)
    with contextlib.closing(Engine.from_dir(path, config, untuned=True)) as engine:
        lockstep.announce(engine.ranks, tune_engine, None, lockstep.silent)
        tactics = tune_engine(engine, say=lambda line: print(f"  {line}", flush=True))
    write_manifest(path, replace(manifest, tactics=tactics))
    print(f"tuned in {time.perf_counter() - started:.1f} s; smc-build --inspect {path} shows the result", flush=True)


def _inspect(path: Path) -> None:
    manifest = load_manifest(path)
    print(_describe_manifest(path, manifest))


def _describe_manifest(path: Path, manifest: Manifest) -> str:
    lines = [
        f"{path}: engine {manifest.name}, format {manifest.format_version}, built {manifest.created}",
        f"  {manifest.dtype}, tp {manifest.tp}, {manifest.weights} weights, compiler {manifest.compiler}",
        f"  N <= {manifest.max_particles}, K <= {manifest.max_draft_tokens}, {manifest.max_groups} requests at once, "
        f"{manifest.max_seq_len} tokens each, pages of {manifest.page_size}",
        f"  row buckets {', '.join(map(str, manifest.row_buckets))}",
    ]
    for role, entry in (("target", manifest.target), ("draft", manifest.draft)):
        if entry is None:
            lines.append(f"  {role}: none")
            continue
        config = entry.config
        lines.append(
            f"  {role}: {entry.source}, {config.family}, {config.num_layers} layers, {config.num_parameters:,} "
            "parameters, "
            f"{format_bytes(weight_bytes(config, entry.precision))} as {entry.precision}, KV "
            f"{config.kv_bytes_per_token(entry.precision.kv):,} bytes "
            f"per token, source {entry.source_sha256[:12]}"
        )
        if manifest.tp > 1:
            own = entry.rank_config
            text = describe_padding(config, entry.tp) if entry.tp > 1 else "whole"
            lines.append(
                f"    on each of {manifest.tp} ranks: {format_bytes(weight_bytes(own, entry.precision))}, KV "
                f"{own.kv_bytes_per_token(entry.precision.kv):,} bytes per token; {text}"
            )
    total = sum(entry.bytes for entry in manifest.files.values())
    plans = [name for name in manifest.files if name.endswith(".plan")]
    if plans:
        lines.append(
            f"  {len(plans)} plans of {manifest.plans['compiler']} {manifest.plans['version']} "
            f"(GPU: {manifest.plans['gpu']}), {format_bytes(sum(manifest.files[name].bytes for name in plans))}"
        )
    lines += _tactics_table(manifest.tactics)
    lines.append(f"  versions {', '.join(f'{name} {version}' for name, version in manifest.versions.items())}")
    lines.append(f"  {len(manifest.files)} files, {format_bytes(total)}, all sizes and hashes right")
    return "\n".join(lines)


def _tactics_table(tactics: dict[str, Any]) -> list[str]:
    """Who computes each region at how many rows, and how long each candidate took."""
    if not tactics:
        return ["  not tuned: smc-build --tune times plans and fused kernels on the GPU machine"]
    lines = [f"  fastest runner and microseconds of each on {tactics['gpu']}:"]
    for role, model in tactics["models"].items():
        for region, by_rows in model["regions"].items():
            for rows, times in by_rows.items():
                shown = ", ".join(f"{name} {us:.1f}" for name, us in times["us"].items())
                lines.append(f"    {role:6} {region:5} {rows:>4} rows  {times['choice']:5}  ({shown})")
        if "whole_pass" in model:
            times = model["whole_pass"]
            shown = ", ".join(f"{name} {us:.1f}" for name, us in times["us"].items())
            lines.append(f"    {role:6} a pass in one launch or in steps: {times['choice']}  ({shown})")
    return lines


def _parser() -> argparse.ArgumentParser:
    defaults = option_defaults()
    parser = CommandParser(
        prog="smc-build",
        description="Turn a target and a draft checkpoint into an engine directory.",
        epilog=f"presets:\n{preset_list()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(flag: str, kind: type, text: str) -> None:
        name = flag[2:].replace("-", "_")
        metavar = {int: "N", Path: "DIR"}.get(kind, name.upper())
        parser.add_argument(flag, type=kind, default=defaults.get(name), metavar=metavar, help=text)

    add("--checkpoint", str, "target: a Hugging Face folder or a preset")
    add("--draft", str, "draft: a folder, a preset, or 'none' (default: the preset's)")
    add("--tp", int, f"tensor-parallel ranks (default {defaults['tp']})")
    add("--draft-tp", int, "1 keeps the whole draft on every rank (default: --tp)")
    add("--dtype", str, f"{', '.join(OPTION_DTYPES)} (default: bfloat16 for presets and with a GPU, else float32)")
    add("--draft-dtype", str, "of the draft's matrices, where they differ (default: as --dtype)")
    add("--head-dtype", str, "of the head beside FP8 matrices; fp8 or the activations' type (the default)")
    add("--kv-dtype", str, "of KV pages; fp8 or the activations' type (the default)")
    add("--calibration", Path, "text, a passage a line, for --dtype fp8 (default: the model writes its own)")
    add("--particles", int, f"largest number of particles N (default {defaults['particles']})")
    add("--draft-tokens", int, f"largest number of draft tokens K (default {defaults['draft_tokens']})")
    add("--groups", int, f"requests at once (default {defaults['groups']})")
    add("--max-seq-len", int, f"longest prompt + answer (default: {DEFAULT_MAX_SEQ_LEN} or what the models support)")
    add("--page-size", int, f"tokens per KV page, a power of two (default {defaults['page_size']})")
    add("--output", Path, "engine directory to write (default engines/<name>-tp<N>)")
    add("--name", str, "name of the engine (default: the target's)")
    add("--seed", int, f"seed of --random-weights (default {defaults['seed']})")
    add(
        "--compiler",
        str,
        f"{', '.join(COMPILERS)} (default {defaults['compiler']}: the first of these that can compile here; torch for "
        "float32)",
    )
    parser.add_argument(
        "--random-weights", action="store_true", help="seeded random weights in the checkpoint's shapes"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing engine directory")
    parser.add_argument(
        "--tune",
        type=Path,
        metavar="ENGINE_DIR",
        help="time plans and fused kernels on this machine's GPU and record the fastest; a build on a GPU machine does so",
    )
    parser.add_argument("--no-tune", action="store_true", help="build without timing anything")
    parser.add_argument("--inspect", type=Path, metavar="ENGINE_DIR", help="verify and describe an engine directory")
    return parser


if __name__ == "__main__":
    sys.exit(main())
