"""The options of smc-run: sampling parameters and executor settings as flags.

Owns the names and help texts only. Every default is that of the dataclass field (SamplingParams, ExecutorConfig): an
option that is not given is not passed on, so it cannot differ.

    parse(["--engine", "engines/tiny-tp1", "--n", "4", "Hello"]).sampling is {"num_particles": 4}
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from smc_build.command_line import CommandParser
from smc_engines.config import DraftSchedule, ExecutorConfig
from smc_engines.region_choice import RegionChoice
from smc_engines.sampling_params import Mode, SamplingParams, Select
from smc_plugin.errors import ConfigError
from smc_plugin.reference.options import Resampling


@dataclass(frozen=True)
class RunOptions:
    """A parsed command line.

    Args:
        engine: engine directory.
        prompt: text, "-" for standard input, or None.
        prompt_ids: prompt as token ids, instead of text.
        messages: JSON file of chat messages, instead of a prompt.
        system: system message to begin with.
        chat: apply the chat template; None does so when the tokenizer has one.
        input, output: JSONL files; output None is standard output.
        explain: print the genealogy; genealogy: draw it to this .svg or .png file.
        json, quiet: print the answer as JSON; print nothing but the answer.
        threads: CPU threads of torch; None leaves its choice.
        sampling: SamplingParams fields that were given.
        executor: settings of the executor.
    """

    engine: Path
    prompt: str | None
    prompt_ids: tuple[int, ...] | None
    messages: Path | None
    system: str | None
    chat: bool | None
    input: Path | None
    output: Path | None
    explain: bool
    genealogy: Path | None
    json: bool
    quiet: bool
    threads: int | None
    sampling: dict[str, Any]
    executor: ExecutorConfig


# flags, SamplingParams field, further arguments of add_argument
_SAMPLING: tuple[tuple[tuple[str, ...], str, dict[str, Any]], ...] = (
    (("--mode",), "mode", {"choices": get_args(Mode), "help": "smc, plain target decoding, or lossless speculative"}),
    (("--n", "--particles"), "num_particles", {"type": int, "help": "particles N"}),
    (("--k", "--draft-tokens"), "num_draft_tokens", {"type": int, "help": "draft tokens K a round"}),
    (("--temperature",), "temperature", {"type": float, "help": "of the target; 0 is greedy"}),
    (("--draft-temperature",), "draft_temperature", {"type": float, "help": "of the draft"}),
    (("--top-k",), "top_k", {"type": int, "help": "keep the k likeliest tokens; 0 keeps all"}),
    (("--top-p",), "top_p", {"type": float, "help": "nucleus mass"}),
    (("--min-p",), "min_p", {"type": float, "help": "least probability relative to the likeliest token"}),
    (("--ess-threshold",), "ess_threshold", {"type": float, "help": "resample below this fraction of N"}),
    (
        ("--adapt-draft-tokens",),
        "adapt_draft_tokens",
        {"type": float, "help": "draft as many tokens, K at most, as should leave the ESS at this fraction of N"},
    ),
    (
        ("--truncate-rounds",),
        "truncate_rounds",
        {"action": "store_true", "help": "end a round at the first token where the ESS gets low"},
    ),
    (("--resampling",), "resampling", {"choices": get_args(Resampling), "help": "how ancestors are drawn"}),
    (("--resample-power",), "resample_power", {"type": float, "help": "resample by this power of the weights"}),
    (
        ("--exact-below",),
        "exact_below",
        {"type": float, "help": "lossless rounds after an ESS below this fraction of N; 1: all are lossless"},
    ),
    (
        ("--fallback",),
        "fallback_below",
        {"type": float, "help": "decode again without loss where log_evidence ends below this, such as -3"},
    ),
    (("--alpha",), "power_alpha", {"type": float, "help": "target the power p^alpha"}),
    (("--seed",), "seed", {"type": int, "help": "of the request's random streams"}),
    (("--max-tokens",), "max_tokens", {"type": int, "help": "tokens to generate at most"}),
    (("--min-tokens",), "min_tokens", {"type": int, "help": "tokens before which no stop token is drawn"}),
    (("--stop",), "stop", {"action": "append", "metavar": "TEXT", "help": "end before this text; may be repeated"}),
    (
        ("--stop-token-id",),
        "stop_token_ids",
        {"action": "append", "type": int, "metavar": "ID", "help": "end at this token; may be repeated"},
    ),
    (("--ignore-eos",), "ignore_eos", {"action": "store_true", "help": "the model's end token does not end"}),
    (("--select",), "select", {"choices": get_args(Select), "help": "how the answer is chosen among the particles"}),
    (("--logprobs",), "logprobs", {"action": "store_true", "help": "report log-probabilities under the target"}),
    (("--return-particles",), "return_particles", {"action": "store_true", "help": "report every particle"}),
)
_UNSET = {
    "num_particles": "the most the engine was built for",
    "num_draft_tokens": "the most the engine was built for",
    "draft_temperature": "the target's",
    "seed": "random",
    "fallback_below": "never",
    "max_groups": "the engine's",
}
_EXECUTOR: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("--device", "device", {"choices": ("auto", "cpu", "cuda"), "help": "where to run"}),
    ("--groups", "max_groups", {"type": int, "help": "requests decoded together"}),
    ("--prefill-chunk", "prefill_chunk", {"type": int, "help": "prompt tokens between two rounds"}),
    ("--kv-memory-fraction", "kv_memory_fraction", {"type": float, "help": "share of the free memory for KV pages"}),
    (
        "--draft-schedule",
        "draft_schedule",
        {"choices": get_args(DraftSchedule), "help": "K draft passes a round, or K + 1"},
    ),
    ("--regions", "regions", {"choices": get_args(RegionChoice), "help": "who computes between attention calls"}),
    ("--verify", "verify", {"action": argparse.BooleanOptionalAction, "help": "check the engine directory's hashes"}),
)


def parse(argv: Sequence[str] | None = None) -> RunOptions:
    """Read the command line.

    Args:
        argv: arguments without the program's name; None takes the process's.
    Returns:
        The options; conflicting ones are refused here, before anything is loaded.
    Raises:
        ConfigError: options that contradict each other.
        SystemExit: argparse's own errors (code 1) and --help (code 0).
    """
    given = vars(_parser().parse_args(argv))
    sampling = {name: given.pop(name) for _, name, _ in _SAMPLING if name in given}
    executor = ExecutorConfig(**{name: given.pop(name) for _, name, _ in _EXECUTOR if name in given})
    options = RunOptions(**given, sampling=sampling, executor=executor)
    _check(options)
    return options


def _check(options: RunOptions) -> None:
    sources = {
        "PROMPT": options.prompt,
        "--prompt-ids": options.prompt_ids,
        "--messages": options.messages,
        "--input": options.input,
    }
    named = [name for name, value in sources.items() if value is not None]
    if len(named) > 1:
        raise ConfigError(f"expected one source of prompts, got {' and '.join(named)}: keep one")
    if options.output is not None and options.input is None:
        raise ConfigError("--output needs --input, got none: name the JSONL file to read")
    if options.input is not None and options.output is not None and options.input.resolve() == options.output.resolve():
        raise ConfigError(f"--input and --output are both {options.input}, expected two files: rename one")
    if options.genealogy is not None and options.input is not None:
        raise ConfigError("--genealogy draws one request, got a file of them: use it with a single prompt")
    if options.chat is False and (options.messages is not None or options.system is not None):
        raise ConfigError("--no-chat excludes --messages and --system, got both: drop one")
    if options.threads is not None and options.threads < 1:
        raise ConfigError(f"--threads must be at least 1, got {options.threads}: raise it")


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="smc-run", description="Generate text with an engine directory that smc-build made.", allow_abbrev=False
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="prompt, or the user's message; - reads it")
    parser.add_argument("--engine", type=Path, required=True, metavar="DIR", help="engine directory")
    parser.add_argument("--prompt-ids", type=_token_ids, metavar="1,2,3", help="the prompt as token ids")
    parser.add_argument("--messages", type=Path, metavar="FILE.json", help="chat messages: a list of role and content")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="apply the chat template (default: when the tokenizer has one)",
    )
    parser.add_argument("--input", type=Path, metavar="FILE.jsonl", help="one request a line, run concurrently")
    parser.add_argument("--output", type=Path, metavar="FILE.jsonl", help="answers, one a line (default: stdout)")
    parser.add_argument("--explain", action="store_true", help="print who was copied from whom")
    parser.add_argument("--genealogy", type=Path, metavar="FILE.svg|.png", help="draw who was copied from whom")
    parser.add_argument("--json", action="store_true", help="print the answer as one JSON object")
    parser.add_argument("--quiet", action="store_true", help="print the answer only")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    group = parser.add_argument_group("sampling")
    for flags, name, extra in _SAMPLING:
        _add(group, flags, name, extra, SamplingParams)
    group = parser.add_argument_group("executor")
    for flag, name, extra in _EXECUTOR:
        _add(group, (flag,), name, extra, ExecutorConfig)
    return parser


def _add(group: Any, flags: tuple[str, ...], name: str, extra: dict[str, Any], owner: type) -> None:
    default = next(field.default for field in dataclasses.fields(owner) if field.name == name)
    shown = _UNSET.get(name, default) if default is None else default
    text = extra["help"] if shown is False or shown == () else f"{extra['help']} (default: {shown})"
    metavar = {} if "type" not in extra else {"metavar": {int: "N", float: "X"}[extra["type"]]}
    group.add_argument(*flags, dest=name, default=argparse.SUPPRESS, **{**metavar, **extra, "help": text})


def _token_ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected token ids such as 1,2,3, got {text!r}") from None
