"""Where an answer to the chain task first goes wrong, and what target and draft gave that token.

Owns the reading of an answer: words are free, everything else follows from the prompt. After 47A+25: the answer must go on with
A47+25=72; and a 71 in its place is wrong at the 1. Logits come from the shipped pair in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "scripts"))

from distill.llama import EMBEDDING, Shape, Weights, hidden_states, load_checkpoint, shape_of  # noqa: E402

from smc_engines.eval import chain  # noqa: E402
from smc_engines.eval.tasks import load_task  # noqa: E402

PAIR = REPOSITORY / "models" / "task-pair"
_ROWS = 64
_SPACE = "Ġ"


def first_error_ratios(records: Sequence[Mapping[str, Any]], problem_seed: int = 1) -> list[float]:
    """log p/q of the first wrong token of each answer that has one, at the answers' own temperature.

    Args:
        records: answers of one setting to the chain task, as smc-eval keeps them.
        problem_seed: of the problems.
    """
    items = load_task("chain").items(max(record["item"] for record in records) + 1, problem_seed)
    tokenizer = chain.tokenizer()
    wrong: list[tuple[tuple[int, ...], list[int]]] = []
    for record in records:
        prompt = items[record["item"]].prompt
        assert not isinstance(prompt, str)
        answer = tokenizer.encode(record["text"], add_special_tokens=False).ids
        answer += [chain.IDS[chain.END]] if record["finish"] == "stop" else []
        place = first_error(prompt, answer)
        if place is not None:
            wrong.append((prompt, answer[: place + 1]))
    temperature = records[0]["setting"]["temperature"]
    target, draft = (_last_log_probs(_load(name), wrong, temperature) for name in ("target", "draft"))
    return [p - q for p, q in zip(target, draft, strict=True)]


def first_error(prompt: Sequence[int], answer: Sequence[int]) -> int | None:
    """Which token of an answer is the first that does not follow from the prompt; None where all do."""
    due = _due([chain.VOCABULARY[token] for token in prompt])
    for place, token in enumerate(answer):
        text = chain.VOCABULARY[token]
        if text.startswith(_SPACE) and text != _SPACE + chain.ANSWER:
            continue
        if text != next(due, None):
            return place
    return None


def _due(prompt: Sequence[str]) -> Any:
    """What an answer consists of beside words, token by token."""
    value = int(prompt[1] + prompt[2])
    for start in range(3, len(prompt) - 1, 4):
        label, sign, *digits = prompt[start : start + 4]
        operand, before = int("".join(digits)), value
        value = _step(value, sign, operand)
        yield from (label, *f"{before:02}", sign, *digits, "=", *f"{value:02}", ";")
    yield from (_SPACE + chain.ANSWER, *f"{value:02}", chain.END)


def _step(value: int, sign: str, operand: int) -> int:
    """One operation of the default task, modulo 100."""
    reversed_digits = int(f"{value:02}"[::-1])
    results = {"+": value + operand, "-": value - operand, "*": value * operand, "%": reversed_digits + operand}
    return results[sign] % 100


def _load(name: str) -> tuple[Weights, Shape]:
    weights, config = load_checkpoint(PAIR / name, "cpu", torch.float32)
    return weights, shape_of(config)


def _last_log_probs(
    model: tuple[Weights, Shape], rows: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float
) -> list[float]:
    """Log-probability of the last token of each row given what precedes it."""
    weights, shape = model
    found: list[float] = []
    for start in range(0, len(rows), _ROWS):
        part = [torch.tensor([*prompt, *answer]) for prompt, answer in rows[start : start + _ROWS]]
        tokens: Tensor = torch.nn.utils.rnn.pad_sequence(part, batch_first=True)
        last = torch.tensor([len(row) - 1 for row in part])
        hidden = hidden_states(weights, tokens, shape)[torch.arange(len(part)), last - 1]
        log_probs = torch.log_softmax(hidden @ weights[EMBEDDING].T / temperature, dim=-1)
        found += log_probs.gather(1, tokens.gather(1, last[:, None]))[:, 0].tolist()
    return found
