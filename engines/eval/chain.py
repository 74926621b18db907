"""The chain task: some steps of arithmetic and digit reversal on two-digit numbers, worked out in words.

Owns the generator, the vocabulary and the scoring; models for it are trained by scripts/train_task_pair.py. One problem of
two steps and one of its right answers, token by token (words carry their space):
    47A+25B%30:   so now take A47+25=72; then we B72%30=57; answer57
`A+25` adds 25, `-` subtracts, `*` multiplies, `%` reverses the two digits and then adds; everything is modulo 100. Each step
is introduced by a phrase whose words follow a fixed random second-order Markov chain: like a language's style they have many
right continuations, of which target and draft may have learned different odds. Only the digits after `answer` count.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor

from smc_plugin.errors import ConfigError

BEGIN, END, UNKNOWN = "<|begin|>", "<|end|>", "<|unknown|>"
DIGITS, OPERATIONS, LABELS = tuple("0123456789"), tuple("+-*%"), tuple("ABCDEFGH")
WORDS = (
    *("so", "now", "take", "then", "we", "put", "first", "next", "just", "and", "get", "let", "us", "go", "on", "from"),
    *(
        "here",
        "with",
        "that",
        "this",
        "it",
        "by",
        "see",
        "work",
        "out",
        "one",
        "find",
        "at",
        "last",
        "do",
        "some",
        "more",
    ),
)
ANSWER = "answer"
VOCABULARY = (BEGIN, END, UNKNOWN, *DIGITS, *OPERATIONS, ":", "=", ";", *LABELS, *("Ġ" + w for w in (*WORDS, ANSWER)))
VOCAB_SIZE = 64
IDS = {token: index for index, token in enumerate(VOCABULARY)}
_FIRST_WORD, _FIRST_DIGIT, _FIRST_LABEL = IDS["Ġ" + WORDS[0]], IDS["0"], IDS["A"]
_FIRST_OPERATION = IDS["+"]


@dataclass(frozen=True)
class Problems:
    """Problems with one right answer each.

    Args:
        tokens: [B, L] int64, prompt and answer, END from the answer's end on.
        prompt_length, length: [B] int64, tokens of the prompt; tokens up to the first END inclusive.
        checked: [B, L] bool, tokens that follow from what precedes them (not words, nor where a phrase ends).
        answer: [B] int64, the last value.
    """

    tokens: Tensor
    prompt_length: Tensor
    length: Tensor
    checked: Tensor
    answer: Tensor


@dataclass(frozen=True)
class ChainTask:
    """How hard the problems are.

    Args:
        steps_min, steps_max: operations, at most 8.
        modulus: of all arithmetic, at most 100.
        factor_max: largest factor of a multiplication, from 2 to 99.
        words_min, words_max: words of a phrase.
        sharpness: spread of the logits that depend on the last word.
        style: spread of the logits that depend on the last two words.
        draft_style: correlation of the latter between the text a target learns and the text its draft learns, as models of
            different training data differ; 1 is the same text.
        style_seed: of those tables.
    """

    steps_min: int = 4
    steps_max: int = 6
    modulus: int = 100
    factor_max: int = 9
    words_min: int = 7
    words_max: int = 11
    sharpness: float = 1.5
    style: float = 1.0
    draft_style: float = 0.6
    style_seed: int = 0

    def __post_init__(self) -> None:
        ranges = (
            ("steps_min", self.steps_min, 1, self.steps_max),
            ("steps_max", self.steps_max, 1, len(LABELS)),
            ("words_min", self.words_min, 0, self.words_max),
            ("modulus", self.modulus, 2, 100),
            ("factor_max", self.factor_max, 2, 99),
            ("draft_style", self.draft_style, 0, 1),
        )
        for name, value, least, most in ranges:
            if not least <= value <= most:
                raise ConfigError(f"chain task: {name} is {value}, expected {least} to {most}: correct it")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ChainTask:
        """Rebuild a task from `to_dict`; unknown keys are refused."""
        unknown = values.keys() - cls.__dataclass_fields__.keys()
        if unknown:
            raise ConfigError(
                f"chain task: unknown {', '.join(sorted(unknown))}, expected {', '.join(cls.__dataclass_fields__)}: "
                "use the version that trained the pair"
            )
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @property
    def max_length(self) -> int:
        """Tokens of the longest problem with its answer."""
        return 4 + 4 * self.steps_max + self.steps_max * (self.words_max + 10) + 4

    def style_table(self, device: torch.device, draft: bool = False) -> Tensor:
        """Cumulative odds of the next word after two words, in the target's text or the draft's.

        Returns:
            [W, W, W] float32, the last entry of a row 1.
        """
        generator, words = torch.Generator().manual_seed(self.style_seed), len(WORDS)
        last = torch.randn(1, words, words, generator=generator)
        pair, other = torch.randn(2, words, words, words, generator=generator)
        if draft:
            pair = self.draft_style * pair + (1 - self.draft_style**2) ** 0.5 * other
        table = torch.softmax(self.sharpness * last + self.style * pair, -1).cumsum(-1)
        table[..., -1] = 1.0
        return table.to(device)

    def draw(self, count: int, generator: torch.Generator, table: Tensor | None = None) -> Problems:
        """Draw problems with one right answer each.

        Args:
            count: B.
            generator: decides everything, and where it is computed.
            table: what `style_table` returns, to draw often.
        """
        device, steps = generator.device, self.steps_max

        def integers(high: int, *shape: int) -> Tensor:
            return torch.randint(high, (count, *shape), generator=generator, device=device)

        operation, operand = integers(len(OPERATIONS), steps), integers(self.modulus, steps)
        operand = torch.where(operation == 2, 2 + operand % (self.factor_max - 1), operand)
        values = [integers(self.modulus)]
        for step in range(steps):
            values.append(apply(values[-1], operation[:, step], operand[:, step], self.modulus))
        value = torch.stack(values, 1)
        used = self.steps_min + integers(self.steps_max - self.steps_min + 1)
        phrase = self.words_min + integers(self.words_max - self.words_min + 1, steps)
        live = torch.arange(steps, device=device) < used[:, None]
        table = self.style_table(device) if table is None else table
        words = _phrases(table, torch.arange(self.words_max, device=device) < phrase[..., None], generator)
        answer = value.gather(1, used[:, None])[:, 0]
        return _assemble(value, operation, operand, words, live, answer)

    def prompts(self, count: int, seed: int) -> tuple[list[list[int]], list[int]]:
        """Prompts as token ids and their answers; the same seed gives the same ones on every machine."""
        problems = self.draw(count, torch.Generator().manual_seed(seed))
        rows = zip(problems.tokens.tolist(), problems.prompt_length.tolist(), strict=True)
        return [row[:length] for row, length in rows], problems.answer.tolist()


def apply(value: Tensor, operation: Tensor, operand: Tensor, modulus: int) -> Tensor:
    """One step: [B] each; operations in the order of OPERATIONS."""
    turned = value % 10 * 10 + value // 10
    results = torch.stack([value + operand, value - operand, value * operand, turned + operand])
    return results.gather(0, operation[None])[0] % modulus


def score(text: str, answer: int) -> bool:
    """Whether an answer's text ends in the right two digits after the word `answer`."""
    found = re.search(rf"{ANSWER}(\d\d)$", text.strip())
    return found is not None and int(found[1]) == answer


def tokenizer() -> Tokenizer:
    """One token a digit, sign, label or word; BEGIN is put before a prompt."""
    built = Tokenizer(models.WordLevel(dict(IDS), unk_token=UNKNOWN))
    split = pre_tokenizers.Split(Regex(r" ?[a-z]+|[^a-z]"), behavior="isolated")
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    built.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_of])  # type: ignore[assignment]
    built.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    built.add_special_tokens([AddedToken(token, special=True) for token in (BEGIN, END, UNKNOWN)])
    built.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, IDS[BEGIN])]
    )
    return built


def _phrases(table: Tensor, kept: Tensor, generator: torch.Generator) -> Tensor:
    """Words of all phrases, -1 where a phrase is shorter; the chain goes on from one phrase to the next.

    Args:
        table: [W, W, W] cumulative odds. kept: [B, S, F] bool.
    Returns:
        [B, S, F] int64.
    """
    flat = kept.flatten(1)
    uniforms = torch.rand(flat.shape[::-1], generator=generator, device=generator.device)[..., None]
    before = last = torch.zeros_like(flat[:, 0], dtype=torch.int64)
    out = []
    for index in range(flat.shape[1]):
        word = torch.searchsorted(table[before, last], uniforms[index], right=True)[:, 0]
        here = flat[:, index]
        out.append(torch.where(here, word, -1))
        before, last = torch.where(here, last, before), torch.where(here, word, last)
    return torch.stack(out, 1).view(kept.shape)


def _assemble(
    value: Tensor, operation: Tensor, operand: Tensor, words: Tensor, live: Tensor, answer: Tensor
) -> Problems:
    """Lay the tokens of every part side by side, then close the gaps of parts that are not there."""
    count, steps = operation.shape

    def digits(number: Tensor) -> Tensor:
        return torch.stack([number // 10, number % 10], -1) + _FIRST_DIGIT

    def fixed(token: str) -> Tensor:
        return live.new_full((count, 1), IDS[token], dtype=torch.int64)

    label = (torch.arange(steps, device=live.device) + _FIRST_LABEL).expand(count, -1)[..., None]
    sign, step_of = (operation + _FIRST_OPERATION)[..., None], fixed("=")[:, None].expand(-1, steps, -1)
    asked = torch.cat([label, sign, digits(operand)], -1)
    equal, stop = step_of, torch.full_like(step_of, IDS[";"])
    line = [label, digits(value[:, :-1]), sign, digits(operand), equal, digits(value[:, 1:]), stop]
    worked = torch.cat([words + _FIRST_WORD, *line], -1)
    there = torch.cat([words >= 0, torch.ones_like(worked[..., words.shape[-1] :], dtype=torch.bool)], -1)
    # the label ends a phrase whose length is free, so it does not follow from what precedes it
    sure = torch.zeros_like(there)
    sure[..., words.shape[-1] + 1 :] = True

    prompt = torch.cat([fixed(BEGIN), digits(value[:, 0]), asked.flatten(1), fixed(":")], 1)
    prompt_live = live.new_ones(prompt.shape)
    prompt_live[:, 3:-1] = live[..., None].expand(-1, -1, 4).flatten(1)
    final = torch.cat([fixed("Ġ" + ANSWER), digits(answer), fixed(END)], 1)
    tokens = torch.cat([prompt, worked.flatten(1), final], 1)
    keep = torch.cat([prompt_live, (there & live[..., None]).flatten(1), live.new_ones(final.shape)], 1)
    checked = torch.cat([torch.zeros_like(prompt_live), sure.flatten(1), live.new_ones(final.shape)], 1)
    order = (~keep).to(torch.int8).argsort(dim=1, stable=True)
    length = keep.sum(1)
    inside = torch.arange(tokens.shape[1], device=live.device) < length[:, None]
    tokens = torch.where(inside, tokens.gather(1, order), IDS[END])
    return Problems(tokens, prompt_live.sum(1), length, checked.gather(1, order) & inside, answer)
