"""Runs settings over problems and keeps every answer, so that a run can be interrupted and go on.

Owns the answers file: JSON lines, the first says what was run, each further one is one answer of one setting, seed and
problem. What is there already is not run again; what was run with other models or problems is refused.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from smc_engines.eval.settings import Setting
from smc_engines.eval.tasks import Item, Task
from smc_engines.executor import Executor
from smc_engines.outputs import RequestOutput
from smc_engines.sampling_params import SamplingParams
from smc_plugin.errors import ConfigError, SmcError

_REQUIRED = {"setting", "seed", "item", "right"}
BEGINNING = 16  # tokens of an answer that distances between laws look at


@dataclass(frozen=True)
class Work:
    """What to run: problems, seeds and settings.

    Args:
        settings: and how many of the problems each is given, the first ones.
        head: what the answers file says first; a file with another one is refused.
        batch: requests given to the executor together, which also is what is lost by an interruption.
        timed: on a GPU, let kernels compile and rounds be captured on some answers that are not counted.
    """

    task: Task
    items: Sequence[Item]
    settings: Mapping[Setting, int]
    seeds: Sequence[int]
    head: dict[str, Any]
    batch: int
    timed: bool = True


class Answers:
    """The answers file.

    Args:
        path: created with its folder; None keeps answers in memory only.
    """

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        self.path, self.records = path, []
        self._known: set[tuple[str, int, int]] = set()
        if path is None:
            return
        if path.is_file() and path.stat().st_size:
            self._read(path, head)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(head) + "\n", encoding="utf-8")

    def _read(self, path: Path, head: dict[str, Any]) -> None:
        try:
            # bytes: a text may hold other line ends than this one, and what was cut off may be half a character
            *lines, rest = path.read_bytes().split(b"\n")
            first, *records = [json.loads(line) for line in lines]
            if not isinstance(first, dict) or not all(record.keys() >= _REQUIRED for record in records):
                raise ValueError("lines of something else")
        except (ValueError, AttributeError) as error:
            raise ConfigError(
                f"{path} is no answers file, expected JSON lines of smc-eval, got {error}: name another file"
            ) from None
        different = [name for name in head if first.get(name) != head[name]]
        if different:
            raise ConfigError(
                f"{path} holds answers for other {', '.join(different)} ({first.get(different[0])!r}, now "
                f"{head[different[0]]!r}): name another file"
            )
        if rest:  # it was being written when the run ended; only now is it sure that the file is ours
            os.truncate(path, path.stat().st_size - len(rest))
        for record in records:
            self._take(record)

    def _take(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self._known.add((Setting.of(record["setting"]).key, record["seed"], record["item"]))

    def missing(self, setting: Setting, seeds: Sequence[int], count: int) -> list[tuple[int, int]]:
        """(seed, item) pairs that have no answer yet, item by item."""
        key = setting.key
        pairs = [(seed, item) for item in range(count) for seed in seeds]
        return [pair for pair in pairs if (key, *pair) not in self._known]

    @contextmanager
    def writer(self) -> Iterator[TextIO | None]:
        """The file open for appending, if there is one."""
        if self.path is None:
            yield None
            return
        with self.path.open("a", encoding="utf-8") as file:
            yield file

    def add(self, records: Sequence[dict[str, Any]], file: TextIO | None) -> None:
        """Keep answers, on disk before anything else runs."""
        for record in records:
            self._take(record)
            if file is not None:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        if file is not None:
            file.flush()


def run(executor: Executor, work: Work, answers: Answers, deadline: float = math.inf, quiet: bool = False) -> int:
    """Answer what is missing, with a progress bar on standard error.

    Args:
        deadline: of time.monotonic; no batch starts after it.
        quiet: without the bar.
    Returns:
        how many answers are still missing.
    Raises:
        SmcError: a setting does not fit the engine (nothing has been run then), or a request failed.
    """
    todo = {setting: answers.missing(setting, work.seeds, count) for setting, count in work.settings.items()}
    _check(executor, work, todo)
    left = sum(len(pairs) for pairs in todo.values())
    with answers.writer() as file, tqdm(total=left, unit="answer", smoothing=0.05, disable=quiet) as bar:
        for setting, pairs in todo.items():
            bar.set_description(setting.label)
            if pairs and work.timed and executor.engine.device.type == "cuda" and time.monotonic() < deadline:
                _answer(executor, work, setting, pairs[: executor.engine.max_groups])
            for start in range(0, len(pairs), work.batch):
                if time.monotonic() >= deadline:
                    return left
                part = pairs[start : start + work.batch]
                answers.add(_answer(executor, work, setting, part), file)
                bar.update(len(part))
                left -= len(part)
    return left


def _check(executor: Executor, work: Work, todo: Mapping[Setting, Sequence[tuple[int, int]]]) -> None:
    """Refuse what does not fit the engine before hours are spent on what does."""
    tokenizer, prompts = executor.engine.tokenizer, list[Sequence[int]]()
    for item in work.items:
        if not isinstance(item.prompt, str):
            prompts.append(item.prompt)
        elif tokenizer is not None:
            prompts.append(tokenizer.encode(item.prompt))
        else:
            raise ConfigError(
                f"the task {work.task.name} asks in text, the engine has no tokenizer: build it from a checkpoint that has one"
            )
    for setting, pairs in todo.items():
        if pairs:
            seed, longest = max(pairs, key=lambda pair: len(prompts[pair[1]]))
            executor.engine.plan(prompts[longest], _params(setting, work.items[longest], seed, longest))


def _answer(executor: Executor, work: Work, setting: Setting, pairs: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    params = [_params(setting, work.items[item], seed, item) for seed, item in pairs]
    prompts = [work.items[item].prompt for _, item in pairs]
    started = time.perf_counter()
    outputs = executor.generate(prompts, params)
    seconds = (time.perf_counter() - started) / len(pairs)
    return [
        {"setting": dict(setting.values), "seed": seed, "item": item}
        | _record(output, work.task.right(work.items[item].answer, output.text), seconds)
        for (seed, item), output in zip(pairs, outputs, strict=True)
    ]


def _params(setting: Setting, item: Item, seed: int, index: int) -> SamplingParams:
    own = {"max_tokens": item.max_tokens, "stop": item.stop, "seed": seed * 1_000_003 + index, "logprobs": True}
    return SamplingParams.from_mapping({**own, **dict(setting.values)})


def _record(output: RequestOutput, right: bool, seconds: float) -> dict[str, Any]:
    info = output.info
    if output.error is not None or info is None:
        raise output.error or SmcError(f"request {output.request_id} ended without figures: report this as a bug")
    return {
        "right": right,
        "tokens": info.output_tokens,
        "rounds": info.rounds + info.discarded_rounds,
        "resamples": info.resamples,
        "recoveries": info.recoveries,
        "accepted": info.accepted_tokens,
        "log_evidence": info.log_evidence,
        "fell_back": info.fell_back,
        "ess": list(info.ess),
        "log_p": sum(info.token_logprobs),
        "finish": output.finish_reason,
        "beginning": list(output.token_ids[:BEGINNING]),
        "text": output.text,
        "seconds": seconds,
    }
