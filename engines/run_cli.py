"""The command smc-run: a prompt, a chat or a file of requests to text.

    smc-run --engine engines/smollm2-tp1 --n 4 --k 4 "Why is the sky blue?"

The answer goes to standard output as it settles; the plan before it and the figures after it go to standard error, so
`smc-run ... > answer.txt` keeps the answer alone. Exit codes: 0; 1 for an error of the user's, printed as one line, or
any failed line of a file; 130 when interrupted (the first Ctrl-C ends the requests cleanly, a second one at once).
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch
from tqdm import tqdm

from smc_build.engine_dir import load_manifest
from smc_engines.engine import Engine, Limits
from smc_engines.executor import Executor
from smc_engines.explain import genealogy_text, write_genealogy
from smc_engines.outputs import RequestOutput
from smc_engines.parallel.connect import launched_rank
from smc_engines.parallel.launch import follow_rank_0, start_ranks
from smc_engines.report import engine_lines, request_lines, summary_lines, to_json
from smc_engines.run_batch import Batch
from smc_engines.run_options import RunOptions, parse
from smc_engines.run_prompt import PromptBuilder, read_lines, read_messages
from smc_engines.sampling_params import SamplingParams
from smc_plugin.errors import ConfigError, SmcError

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run smc-run.

    Args:
        argv: arguments without the program's name; None takes the process's.
    Returns:
        The exit code.
    """
    try:
        options = parse(argv)
        _check(options)
        start_ranks(options.engine, "smc_engines.run_cli", sys.argv[1:] if argv is None else argv)
        return _follow(options) if launched_rank() else _run(options)
    except SmcError as error:
        print(f"smc-run: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # the reader has gone; what is still buffered must not fail again when the process ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"smc-run: {error}: check the path, the disk and the permissions", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsmc-run: interrupted", file=sys.stderr)
        return INTERRUPTED


def _follow(options: RunOptions) -> int:
    """On a rank other than 0."""
    return follow_rank_0(lambda: Engine.from_dir(options.engine, options.executor), "smc-run")


def _run(options: RunOptions) -> int:
    prompt = _read_standard_input() if _wants_standard_input(options) else options.prompt
    lines = None if options.input is None else read_lines(options.input)
    messages = None if options.messages is None else read_messages(options.messages)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    say = _Narrator(options.quiet)
    say(f"loading  {options.engine}")
    started = time.perf_counter()
    executor = Executor.from_engine_dir(options.engine, options.executor)
    with contextlib.closing(executor.engine):
        return _answer(options, executor, prompt, lines, messages, say, started)


def _answer(
    options: RunOptions,
    executor: Executor,
    prompt: str | None,
    lines: list[str] | None,
    messages: Any,
    say: _Narrator,
    started: float,
) -> int:
    """Answer the prompt or the file's lines on a loaded engine."""
    say(*engine_lines(executor.engine))
    prompts = PromptBuilder(executor.engine.tokenizer, options.chat, options.system)
    if lines is not None:
        return _run_file(options, executor, prompts, lines, say)
    if options.prompt_ids is not None:
        ids, chat = list(options.prompt_ids), False
    elif options.messages is not None:
        ids, chat = prompts.from_messages(messages), True
    else:
        ids, chat = prompts.from_text(prompt or ""), prompts.uses_template
    params = SamplingParams.from_mapping(options.sampling)
    executor.submit("prompt", ids, params)
    say(*request_lines(executor.engine, params, len(ids), chat))
    say(f"ready    in {time.perf_counter() - started:.1f} s", "")
    return _run_prompt(options, executor, params, say)


def _run_prompt(options: RunOptions, executor: Executor, params: SamplingParams, say: _Narrator) -> int:
    """Stream one request and report on it."""
    last: RequestOutput | None = None
    with _interrupts() as interrupted:
        while executor.has_work:
            if interrupted.is_set():
                executor.cancel("prompt")
            for output in executor.step():
                last = output
                if not options.json:
                    print(output.new_text, end="", flush=True)
    assert last is not None  # a submitted request always has a last output
    if options.json:
        print(_json_text(to_json(last, trace=options.explain)))
    else:
        print(flush=True)
        if executor.engine.tokenizer is None:
            print(",".join(map(str, last.token_ids)))
    if last.error is not None:
        raise last.error
    say("", *summary_lines(last, params))
    if last.info is not None and options.explain:
        print(f"\n{genealogy_text(last.info)}", file=sys.stderr)
    if last.info is not None and options.genealogy is not None:
        write_genealogy(last.info, options.genealogy)
        say(f"wrote {options.genealogy}")
    return INTERRUPTED if last.finish_reason == "cancelled" else 0


def _run_file(options: RunOptions, executor: Executor, prompts: PromptBuilder, lines: list[str], say: _Narrator) -> int:
    """Run a JSONL file."""
    started = time.perf_counter()
    with _interrupts() as interrupted, _open_output(options.output) as file:
        batch = Batch(executor, prompts, options.sampling, options.explain, interrupted.is_set)
        total = sum(bool(line.strip()) for line in lines)
        for result in tqdm(batch.run(lines), total=total, unit="request", file=sys.stderr, disable=options.quiet):
            print(_json_text(result), file=file, flush=True)
    figures, seconds = batch.figures, time.perf_counter() - started
    missing = total - figures.finished - figures.failed
    say(
        "",
        f"{figures.finished} of {total} requests finished, {figures.failed} failed, {missing} cancelled; "
        f"{figures.tokens} tokens in {seconds:.2f} s, {figures.tokens / seconds:.1f} tokens/s",
        *([f"wrote {options.output}"] if options.output is not None else []),
    )
    if interrupted.is_set():
        return INTERRUPTED
    return 1 if figures.failed else 0


def _json_text(value: dict[str, Any]) -> str:
    """One line of JSON, readable where UTF-8 can hold it; a line's id may be half a character."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isascii() or _is_utf_8(text) else json.dumps(value)


def _is_utf_8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Narrator:
    """Prints lines to standard error, or nothing when told to be quiet."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet

    def __call__(self, *lines: str) -> None:
        if not self._quiet:
            print(*lines, sep="\n", file=sys.stderr, flush=True)


def _wants_standard_input(options: RunOptions) -> bool:
    if options.prompt == "-":
        return True
    if any(value is not None for value in (options.prompt, options.prompt_ids, options.messages, options.input)):
        return False
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError("nothing to answer, expected a prompt: pass PROMPT, --messages or --input (--help)")
    return True


def _read_standard_input() -> str:
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8, expected text, got {error}: pass UTF-8") from None


def _check(options: RunOptions) -> None:
    """Refuse, before seconds of loading, what could only fail after them."""
    params = SamplingParams.from_mapping(options.sampling)
    _check_files(options)
    Limits.of(load_manifest(options.engine, verify=False)).drafting(params)


def _check_files(options: RunOptions) -> None:
    path = options.genealogy
    if path is not None and path.suffix not in (".svg", ".png"):
        raise ConfigError(f"--genealogy expects a name ending in .svg or .png, got {path}: rename it")
    if path is not None and path.suffix == ".png" and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            f"--genealogy {path} needs matplotlib, which is not installed: pip install 'smc-engine[eval]', or ask for .svg"
        )
    for name, file in (("--genealogy", path), ("--output", options.output)):
        if file is not None and not file.resolve().parent.is_dir():
            raise ConfigError(f"{name} {file}: expected an existing folder, got {file.parent}: create it first")
        if file is not None and file.is_dir():
            raise ConfigError(f"{name} {file} is a folder, expected a file to write: add a file's name")


@contextlib.contextmanager
def _open_output(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    with path.open("w", encoding="utf-8") as file:
        yield file


@contextlib.contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag, so that a step is never left half done; a second one interrupts."""
    seen = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def note(number: int, frame: FrameType | None) -> None:
        if seen.is_set():
            raise KeyboardInterrupt
        seen.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    sys.exit(main())
