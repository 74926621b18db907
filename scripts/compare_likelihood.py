"""How likely the target finds its own answers and those of SMC, side by side.

    python scripts/compare_likelihood.py --engine engines/smollm2-tp1 --prompts 50 --json docs/benchmarks/likelihood.json

Each held-out prompt is answered once per setting with its own seed. The figure is the mean log-probability per answer
token under the target at the request's temperature: for exact samples it estimates minus the entropy per token. Answers
by the draft alone (N = 1) score what the target thinks of the draft; larger N should move towards the target's row.
The interval is 1.96 standard errors over prompts.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from smc_engines.config import ExecutorConfig
from smc_engines.executor import Executor
from smc_engines.outputs import RequestOutput
from smc_engines.sampling_params import SamplingParams
from smc_plugin.errors import ConfigError, SmcError

PROMPTS = Path(__file__).parent / "distill" / "heldout.json"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", required=True, metavar="DIR")
    parser.add_argument("--prompts", type=int, default=50, help="held-out prompts to answer; default %(default)s")
    parser.add_argument("--particles", default="1,4,8,16", help="values of N; default %(default)s")
    parser.add_argument("--k", "--draft-tokens", dest="draft_tokens", type=int, default=4, help="default %(default)s")
    parser.add_argument("--temperature", type=float, default=SamplingParams.temperature, help="default %(default)s")
    parser.add_argument("--max-tokens", type=int, default=64, help="default %(default)s")
    parser.add_argument("--groups", type=int, default=8, help="requests at once; default %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def settings(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Modes and particle counts to compare, exact ones first."""
    try:
        smc = [{"mode": "smc", "num_particles": int(n)} for n in args.particles.split(",")]
    except ValueError:
        raise ConfigError(f"--particles expects numbers such as 1,4,8, got {args.particles!r}: correct it") from None
    return [{"mode": "target"}, {"mode": "speculative"}, *smc]


def row(name: dict[str, Any], outputs: list[RequestOutput], seconds: float) -> dict[str, Any]:
    """Summarise one setting's answers."""
    infos = [output.info for output in outputs if output.info is not None]
    means = [statistics.fmean(info.token_logprobs) for info in infos]
    tokens = sum(info.output_tokens for info in infos)
    spread = statistics.stdev(means) if len(means) > 1 else 0.0
    rounds = sum(info.rounds for info in infos)
    fractions = [statistics.fmean(info.ess) / name.get("num_particles", 1) for info in infos if info.ess]
    return {
        "mode": name["mode"],
        "num_particles": name.get("num_particles", 1),
        "prompts": len(infos),
        "tokens": tokens,
        "mean_log_likelihood_per_token": statistics.fmean(means),
        "half_width_95": 1.96 * spread / len(means) ** 0.5,
        "tokens_per_round": (tokens - len(infos)) / max(rounds, 1),
        "resamples_per_round": sum(info.resamples for info in infos) / max(rounds, 1),
        "mean_ess_fraction": statistics.fmean(fractions) if fractions else None,
        "recoveries": sum(info.recoveries for info in infos),
        "seconds": seconds,
    }


def main(argv: list[str] | None = None) -> int:
    """Answer the prompts in every setting and print the table."""
    args = build_parser().parse_args(argv)
    try:
        executor = Executor.from_engine_dir(args.engine, ExecutorConfig(max_groups=args.groups))
        rows = compare(executor, args)
    except SmcError as error:
        print(f"compare_likelihood: {error}", file=sys.stderr)
        return 1
    print(f"{'mode':12} {'N':>3} {'log p per token':>16} {'±95%':>6} {'tok/round':>9} {'ESS/N':>6} {'resampled':>9}")
    for entry in rows:
        print(
            f"{entry['mode']:12} {entry['num_particles']:3d} {entry['mean_log_likelihood_per_token']:16.3f} "
            f"{entry['half_width_95']:6.3f} {entry['tokens_per_round']:9.2f} {entry['mean_ess_fraction'] or math.nan:6.2f} "
            f"{entry['resamples_per_round']:9.2f}"
        )
    if args.json is not None:
        report = {"engine": executor.engine.manifest.name, "draft_tokens": args.draft_tokens, "rows": rows}
        report["command"] = f"compare_likelihood.py --prompts {args.prompts} --groups {args.groups}"
        report |= {"temperature": args.temperature, "max_tokens": args.max_tokens, "torch": torch.__version__}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {args.json}")
    return 0


def compare(executor: Executor, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every setting over the prompts."""
    tokenizer = executor.engine.tokenizer
    if tokenizer is None or not tokenizer.has_chat_template:
        raise SmcError("the engine has no chat template, expected a chat model: build from one")
    texts = json.loads(PROMPTS.read_text(encoding="utf-8"))[: args.prompts]
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": text}])[1] for text in texts]
    rows = []
    for setting in tqdm(settings(args), desc="settings"):
        each = [
            SamplingParams.from_mapping(
                {
                    **setting,
                    "num_draft_tokens": args.draft_tokens,
                    "temperature": args.temperature,
                    "max_tokens": args.max_tokens,
                    "logprobs": True,
                    "seed": seed,
                }
            )
            for seed in range(len(prompts))
        ]
        started = time.perf_counter()
        rows.append(row(setting, executor.generate(prompts, each), time.perf_counter() - started))
    return rows


if __name__ == "__main__":
    sys.exit(main())
