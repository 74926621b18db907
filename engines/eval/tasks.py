"""Tasks whose answers are right or wrong: made from a seed, scored by exact match.

    chain        the chain task of a trained pair (see chain.py): some steps worked out in words
    arithmetic   few-shot sums, "12 + 7 = 19"
    copying      few-shot, repeat some words
    recall       few-shot, look up one of several names' numbers

The last three are plain text for any language model; nothing is downloaded.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from smc_engines.eval import chain
from smc_engines.eval.chain import ChainTask
from smc_engines.text import Tokenizer
from smc_plugin.errors import ConfigError


@dataclass(frozen=True)
class Item:
    """One problem: a prompt (text or token ids), its answer, and where the model's answer ends."""

    prompt: str | tuple[int, ...]
    answer: str
    max_tokens: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A kind of problems.

    Args:
        name: of the task.
        settings: what decides the problems beside count and seed, as JSON values.
        items: (count, seed) to problems; the first of a longer list are the shorter list.
        right: (answer, model's text) to whether it is right.
        check: (the engine's tokenizer, problems) refuses an engine that cannot read them.
    """

    name: str
    settings: dict[str, object]
    items: Callable[[int, int], list[Item]]
    right: Callable[[str, str], bool]
    check: Callable[[Tokenizer | None, Sequence[Item]], None] = lambda tokenizer, items: None


WORDS = (
    *("apple", "river", "window", "garden", "paper", "stone", "summer", "yellow", "horse", "bread", "music", "silver"),
    *(
        "table",
        "winter",
        "green",
        "bottle",
        "forest",
        "orange",
        "letter",
        "engine",
        "flower",
        "market",
        "cloud",
        "blue",
    ),
)
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo")
SHOTS = 6


def load_task(name: str, config: Path | None = None, shots: int | None = None) -> Task:
    """Make a task.

    Args:
        name: see the module's text.
        config: the config.json of a pair that scripts/train_task_pair.py trained, for `chain`; None takes the defaults.
        shots: solved examples before each problem, for the others; None takes SHOTS.
    Raises:
        ConfigError: there is no such task, the file names none, or an option that is another task's.
    """
    if name == "chain":
        if shots is not None:
            raise ConfigError(f"--shots is {shots}, but the task chain shows no examples: leave it out")
        return _chain_task(_read_chain(config))
    if config is not None:
        raise ConfigError(f"--task-config describes the task chain, got --task {name}: leave it out")
    if name not in _FEW_SHOT:
        known = ", ".join(["chain", *_FEW_SHOT])
        raise ConfigError(f"there is no task {name!r}, expected one of {known}: choose one")
    shots = SHOTS if shots is None else shots
    if shots < 0:
        raise ConfigError(f"--shots is {shots}, expected at least 0: raise it")
    make, max_tokens = _FEW_SHOT[name]

    def items(count: int, seed: int) -> list[Item]:
        return [_few_shot(make, random.Random(f"{name} {seed} {index}"), shots, max_tokens) for index in range(count)]

    return Task(name, {"shots": shots}, items, lambda answer, text: " ".join(text.split()) == answer)


def _read_chain(config: Path | None) -> ChainTask:
    if config is None:
        return ChainTask()
    try:
        found = json.loads(config.read_text(encoding="utf-8")).get("task_pair", {}).get("task")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read --task-config {config}: {error}: name a pair's target/config.json") from None
    if found is None:
        raise ConfigError(f"{config} holds no chain task, expected task_pair.task: name a pair's target/config.json")
    return ChainTask.from_dict(found)


def _chain_task(task: ChainTask) -> Task:
    def items(count: int, seed: int) -> list[Item]:
        # drawn one by one, so that more items leave the first ones as they are
        found = []
        for index in range(count):
            prompts, answers = task.prompts(1, seed * 1_000_003 + index)
            found.append(Item(tuple(prompts[0]), f"{answers[0]:02}", task.max_length))
        return found

    return Task("chain", task.to_dict(), items, lambda answer, text: chain.score(text, int(answer)), _reads_chain)


def _reads_chain(tokenizer: Tokenizer | None, items: Sequence[Item]) -> None:
    """Prompts are token ids of a vocabulary of their own: to another model they would be nonsense, and every answer wrong."""
    (begin, *rest), vocabulary = items[0].prompt, chain.VOCABULARY
    text = "".join(vocabulary[int(token)] for token in rest)
    if tokenizer is None or tokenizer.encode(text) != [begin, *rest]:
        raise ConfigError(
            "the task chain is written in the vocabulary of a pair that scripts/train_task_pair.py trained, the engine has "
            "another one: choose --task arithmetic, copying or recall, or an engine of such a pair"
        )


def _few_shot(
    make: Callable[[random.Random], tuple[str, str]], source: random.Random, shots: int, max_tokens: int
) -> Item:
    *solved, (question, answer) = [make(source) for _ in range(shots + 1)]
    shown = "".join(f"{question} {answer}\n" for question, answer in solved)
    return Item(shown + question, answer, max_tokens, ("\n",))


def _sum(source: random.Random) -> tuple[str, str]:
    first, second = source.randint(1, 20), source.randint(1, 20)
    return f"{first} + {second} =", str(first + second)


def _copy(source: random.Random) -> tuple[str, str]:
    text = " ".join(source.sample(WORDS, 5))
    return f"Words: {text}\nAgain:", text


def _recall(source: random.Random) -> tuple[str, str]:
    names = source.sample(NAMES, 4)
    numbers = [source.randint(100, 999) for _ in names]
    facts = " ".join(f"{name} has {number}." for name, number in zip(names, numbers, strict=True))
    asked = source.randrange(len(names))
    return f"{facts}\n{names[asked]} has", str(numbers[asked])


_FEW_SHOT: dict[str, tuple[Callable[[random.Random], tuple[str, str]], int]] = {
    "arithmetic": (_sum, 8),
    "copying": (_copy, 24),
    "recall": (_recall, 8),
}
TASKS = ("chain", *_FEW_SHOT)
