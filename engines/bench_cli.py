"""smc-bench: modes side by side on one engine, in one run on one machine.

Repeats are interleaved (target, speculative, smc, target, …) so that a machine that slows down slows all modes. Speed is
that of decoding: answer tokens after the first over the time from the first token to the end; the prefill is reported
apart. The floor of a round is the bytes of all weights and KV pages it must read over the copy bandwidth (bytes read plus
bytes written) measured in the same run.

Worked example: a target of 540 MB and a draft of 170 MB, K = 4, copy bandwidth 10 GB/s: (4 * 170 + 540) MB / 10 GB/s =
122 ms for 5 tokens; a round that takes 244 ms is at 0.5 of the floor.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from smc_build.builder import BuildOptions
from smc_build.dtypes import dtype_bytes
from smc_engines.config import ExecutorConfig
from smc_engines.engine import Engine
from smc_engines.executor import Executor
from smc_engines.model import PagedModel
from smc_engines.outputs import RequestOutput
from smc_engines.request import Phase
from smc_engines.sampling_params import SamplingParams
from smc_plugin.errors import ConfigError, SmcError

MODES = ("target", "speculative", "smc")
PACKAGES = ("torch", "triton", "transformers", "numpy")
COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}


@dataclass(frozen=True)
class Sample:
    """One timed batch: decoded tokens a second, milliseconds a round and of the prefill, tokens a round and request.

    The prefill includes the first round, which follows it in the same step.
    """

    tokens_per_s: float
    ms_per_round: float
    prefill_ms: float
    tokens_per_round: float


def build_parser() -> argparse.ArgumentParser:
    """The command line of smc-bench."""
    parser = argparse.ArgumentParser(
        prog="smc-bench", description="Time target, speculative and smc decoding side by side."
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--engine", metavar="DIR", help="engine directory made by smc-build")
    source.add_argument("--preset", metavar="NAME", help="shapes of a preset with its default draft, random weights")
    parser.add_argument("--draft", metavar="NAME", help="another draft for --preset")
    parser.add_argument("--dtype", help="of --preset; default as smc-build chooses")
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
    parser.add_argument("--device", default=ExecutorConfig.device, help="auto, cpu or cuda; default %(default)s")
    parser.add_argument("--threads", type=int, help="torch threads on a CPU")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run smc-bench; returns the exit status."""
    args = build_parser().parse_args(argv)
    try:
        report = run(args)
    except SmcError as error:
        print(f"smc-bench: {error}", file=sys.stderr)
        return 1
    print(table(report["rows"]))
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {args.json}")
    return 0


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure what the command line asks for.

    Returns:
        {"rows": [...], ...}: one row a mode, with medians, spreads and where they were measured.
    Raises:
        SmcError: an option or the engine directory is wrong.
    """
    modes = args.modes.split(",")
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"--modes names {mode!r}, expected some of {', '.join(MODES)}: correct it")
    if args.repeats < 1 or args.batch < 1 or args.output_tokens < 2 or args.prompt_tokens < 1:
        raise ConfigError("--repeats, --batch and --prompt-tokens must be at least 1 and --output-tokens 2: raise them")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    # Every repeat must prefill its prompt, so prefixes are not kept.
    config = ExecutorConfig(device=args.device, max_groups=args.batch, prefix_cache=False)
    executor = Executor(_engine(args, config))
    prompts = _prompts(executor, args)
    copy_tb_per_s = copy_bandwidth(executor.engine.device)
    print(f"{device_name(executor.engine.device)}, copy bandwidth {copy_tb_per_s * 1e3:.1f} GB/s", file=sys.stderr)
    samples: dict[str, list[Sample]] = {mode: [] for mode in modes}
    for repeat in range(-1, args.repeats):
        for mode in modes:
            sample = _time_once(executor, prompts, _params(args, mode, seed=repeat + 1))
            if repeat >= 0:  # the first pass warms up
                samples[mode].append(sample)
                print(f"repeat {repeat + 1}/{args.repeats} {mode}: {sample.tokens_per_s:.1f} tokens/s", file=sys.stderr)
    rows = [_row(executor, args, mode, samples[mode], prompts, copy_tb_per_s) for mode in modes]
    return {"date": date.today().isoformat(), "command": "smc-bench", "rows": rows}


def _engine(args: argparse.Namespace, config: ExecutorConfig) -> Engine:
    if args.engine is not None:
        return Engine.from_dir(Path(args.engine), config)
    options = BuildOptions(
        checkpoint=args.preset,
        draft=args.draft,
        dtype=args.dtype,
        particles=args.particles,
        draft_tokens=args.draft_tokens,
        groups=args.batch,
        max_seq_len=args.prompt_tokens + args.output_tokens,
    )
    return Engine.from_random(options, config)


def _prompts(executor: Executor, args: argparse.Namespace) -> list[list[int]]:
    if args.prompt is None:
        draws = random.Random(0)
        size = executor.engine.limits.vocab_size
        return [[draws.randrange(size) for _ in range(args.prompt_tokens)] for _ in range(args.batch)]
    tokenizer = executor.engine.tokenizer
    if tokenizer is None:
        raise ConfigError("--prompt needs a tokenizer, the engine directory has none: use --prompt-tokens")
    if tokenizer.has_chat_template:
        _, ids = tokenizer.apply_chat_template([{"role": "user", "content": args.prompt}])
    else:
        ids = tokenizer.encode(args.prompt)
    return [ids] * args.batch


def _params(args: argparse.Namespace, mode: str, seed: int) -> SamplingParams:
    return SamplingParams.from_mapping(
        {
            "mode": mode,
            "num_particles": args.particles,
            "num_draft_tokens": args.draft_tokens,
            "temperature": args.temperature,
            "max_tokens": args.output_tokens,
            "ignore_eos": True,
            "seed": seed,
        }
    )


def _time_once(executor: Executor, prompts: list[list[int]], params: SamplingParams) -> Sample:
    """Run one batch to its end; decoding is timed from the step after every request has begun."""
    for index, prompt in enumerate(prompts):
        executor.submit(f"bench-{index}", prompt, params)
    requests = list(executor.scheduler.requests.values())
    started = time.perf_counter()
    while any(request.phase is not Phase.DECODE for request in requests):
        executor.step()
    decoding_from = time.perf_counter()
    before = sum(request.position - len(request.prompt) + 1 for request in requests)
    steps = 0
    done: list[RequestOutput] = []
    while executor.has_work:
        done += [output for output in executor.step() if output.finished]
        steps += 1
    elapsed = time.perf_counter() - decoding_from
    infos = [output.info for output in done if output.info is not None]
    tokens = sum(info.output_tokens for info in infos) - before
    per_round = statistics.mean((info.output_tokens - 1) / max(info.rounds, 1) for info in infos)
    return Sample(tokens / elapsed, 1e3 * elapsed / max(steps, 1), 1e3 * (decoding_from - started), per_round)


def _row(
    executor: Executor,
    args: argparse.Namespace,
    mode: str,
    samples: list[Sample],
    prompts: list[list[int]],
    copy_tb_per_s: float,
) -> dict[str, Any]:
    manifest = executor.engine.manifest
    speeds = [sample.tokens_per_s for sample in samples]
    ms_per_round = statistics.median(sample.ms_per_round for sample in samples)
    context = len(prompts[0]) + args.output_tokens // 2
    floor_ms = floor_bytes(executor, mode, args.particles, args.draft_tokens, args.batch, context) / copy_tb_per_s / 1e9
    return {
        "gpu": device_name(executor.engine.device),
        "num_gpus": 1 if executor.engine.device.type == "cuda" else 0,
        "preset": manifest.name,
        "dtype": manifest.dtype,
        "tp": manifest.tp,
        "mode": mode,
        "num_particles": args.particles if mode == "smc" else 1,
        "num_draft_tokens": 0 if mode == "target" else args.draft_tokens,
        "prompt_tokens": len(prompts[0]),
        "output_tokens": args.output_tokens,
        "batch": args.batch,
        "temperature": args.temperature,
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_min": min(speeds),
        "tokens_per_s_max": max(speeds),
        "tokens_per_round": statistics.mean(sample.tokens_per_round for sample in samples),
        "ms_per_round": ms_per_round,
        "prefill_ms": statistics.median(sample.prefill_ms for sample in samples),
        "repeats": len(samples),
        "floor_ms": floor_ms,
        "floor_fraction": floor_ms / ms_per_round,
        "copy_tb_per_s": copy_tb_per_s,
        "weights": "random" if manifest.weights == "random" else manifest.name,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def copy_bandwidth(device: torch.device) -> float:
    """Measure a large copy on the device: bytes read plus bytes written, in TB/s (median of 7)."""
    source = torch.empty(COPY_BYTES[device.type] // 4, dtype=torch.float32, device=device).normal_()
    destination = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        destination.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * source.nbytes / statistics.median(seconds[1:]) / 1e12


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()} ({len(names)} cores)"


def floor_bytes(executor: Executor, mode: str, n: int, k: int, batch: int, context_tokens: int) -> int:
    """Bytes a round cannot avoid reading: every weight of every pass, and each particle's KV.

    The embedding is a row look-up and not counted, unless it is also the head.
    """
    target, draft = executor.engine.target, executor.engine.draft
    sequences = batch * (n if mode == "smc" else 1)
    total = _pass_bytes(executor, target, sequences, context_tokens)
    if mode != "target" and draft is not None:
        total += k * _pass_bytes(executor, draft, sequences, context_tokens)
    return total


def _pass_bytes(executor: Executor, model: PagedModel, sequences: int, context_tokens: int) -> int:
    config, dtype = model.config, executor.engine.manifest.dtype
    look_up = 0 if config.tied_head else config.vocab_size * config.hidden_size * dtype_bytes(dtype)
    return config.weight_bytes(dtype) - look_up + sequences * context_tokens * config.kv_bytes_per_token(dtype)


def table(rows: list[dict[str, Any]]) -> str:
    """Lay rows out for a terminal."""
    base = next((row["tokens_per_s"] for row in rows if row["mode"] == "target"), None)
    heads = ("mode", "N", "K", "tokens/s", "min", "max", "tok/round", "ms/round", "floor", "x target")
    lines = ["{:12} {:>3} {:>3} {:>9} {:>7} {:>7} {:>9} {:>9} {:>6} {:>8}".format(*heads)]
    for row in rows:
        ratio = f"{row['tokens_per_s'] / base:8.2f}" if base else " " * 8
        lines.append(
            f"{row['mode']:12} {row['num_particles']:3d} {row['num_draft_tokens']:3d} {row['tokens_per_s']:9.1f} "
            f"{row['tokens_per_s_min']:7.1f} {row['tokens_per_s_max']:7.1f} {row['tokens_per_round']:9.2f} "
            f"{row['ms_per_round']:9.1f} {row['floor_fraction']:6.2f} {ratio}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
