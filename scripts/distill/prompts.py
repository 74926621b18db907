"""What the target is asked to write about.

Owns the training prompts (templates of materials.py, seeded) and the markup that surrounds them. Five kinds of row:
    template chat 50 %   "<|im_start|>system ... user\\n Explain how a bicycle works. ... assistant\\n" and the target answers
    free chat     25 %   "... <|im_start|>user\\n" and the target writes the question too (role 1), then answers
    other system   7 %   template chat under another system line
    plain seed    10 %   24 to 96 tokens of the Python standard library's source and manual, continued
    plain free     8 %   nothing but <|endoftext|>
The held-out prompts of heldout.json are never among them, and rows where the target thought of one itself count for nothing.
"""

import functools
import json
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer

from distill.generate import Markup, Rows
from distill.materials import ACTIONS, EVERYDAY, SLOTS, SUMS, TASKS, TEMPLATES, TOPICS

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
OTHER_SYSTEMS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a patient teacher who explains with examples.",
    "You are an expert programmer. Reply with code and a short explanation.",
    "You are a cheerful storyteller.",
)
SHARES = ((EVERYDAY, 0.5), (TEMPLATES, 0.25), (TASKS, 0.13), (SUMS, 0.12))
HELD_OUT = Path(__file__).with_name("heldout.json")


@functools.cache
def _split(text: str) -> tuple[str, ...]:
    return tuple(item for line in text.splitlines() for item in line.split("|") if item)


@functools.cache
def held_out_prompts() -> tuple[str, ...]:
    """The prompts that the draft is measured on and never trained on."""
    return tuple(json.loads(HELD_OUT.read_text("utf-8")))


def _draw(rng: random.Random) -> str:
    """One filled template: 50 % everyday questions, 25 % about a topic, 13 % code, 12 % arithmetic."""
    template = rng.choice(_split(rng.choices([text for text, _ in SHARES], [share for _, share in SHARES])[0]))
    values = {name: rng.sample(_split(choices), 2) for name, choices in SLOTS.items()}
    filled = {name: pair[0] for name, pair in values.items()} | {f"{name}2": pair[1] for name, pair in values.items()}
    filled["t"], filled["u"] = rng.sample(_split(TOPICS), 2)
    numbers = {"x": rng.randint(2, 999), "y": rng.randint(2, 99), "year": rng.randint(1400, 2010)}
    return template.format(a=rng.choice(_split(ACTIONS)), **filled, **numbers)


def question(rng: random.Random) -> str:
    """One templated user prompt, never a held-out one; a fifth in small letters without a final mark, as people type."""
    held_out = {text.lower().rstrip(".?!") for text in held_out_prompts()}
    while (text := _draw(rng)).lower().rstrip(".?!") in held_out:
        pass
    return text.lower().rstrip(".?!") if rng.random() < 0.2 else text


def held_out_rows(tokens: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """Rows in which a held-out prompt occurs word for word: the target, asked to play the user, can think of one.

    Args:
        tokens: [R, L] integer.
        tokenizer: the target's.
    Returns:
        [R] bool.
    """
    found = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for prompt in held_out_prompts():
        for phrase in (tokenizer.encode(prompt).ids, tokenizer.encode(f" {prompt}").ids):
            starts = max(0, tokens.shape[1] - len(phrase) + 1)
            same = torch.ones(len(tokens), starts, dtype=torch.bool, device=tokens.device)
            for offset, token in enumerate(phrase):
                same &= tokens[:, offset : offset + starts] == token
            found |= same.any(1)
    return found


def chat_text(prompt: str, system: str | None = SYSTEM) -> str:
    """The chat format up to where the assistant begins; equal to the checkpoint's own template."""
    opening = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{opening}<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def markup(tokenizer: Tokenizer) -> Markup:
    """The chat format as token ids."""
    openings = [tokenizer.encode(f"\n<|im_start|>{who}\n").ids for who in ("assistant", "user")]
    return Markup(tokenizer.token_to_id("<|im_end|>"), (tuple(openings[0]), tuple(openings[1])))


@functools.cache
def seed_texts() -> list[str]:
    """Plain text that every Python has: its library's sources and its manual's topics."""
    from pydoc_data.topics import topics  # noqa: PLC0415  half a megabyte, needed for training alone

    texts = list(topics.values()) if isinstance(topics, dict) else []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="ignore"))
    return [text for text in texts if len(text) > 2000]


def _seed(rng: random.Random, texts: list[str], tokenizer: Tokenizer) -> list[int]:
    """24 to 96 tokens of a random text from the start of a line."""
    text = rng.choice(texts)
    start = text.rfind("\n", 0, rng.randrange(len(text) - 1000) + 1) + 1
    return tokenizer.encode(text[start : start + 1000]).ids[: rng.randint(24, 96)] or [0]


def pad_rows(prompts: list[list[int]], temperatures: list[float], roles: list[int]) -> Rows:
    """Lists of prompts as the tensors that `RowWriter.write` takes."""
    width = max(map(len, prompts))
    padded = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts])
    return Rows(padded, torch.tensor([len(p) for p in prompts]), torch.tensor(temperatures), torch.tensor(roles))


def training_rows(tokenizer: Tokenizer, count: int, seed: int) -> Rows:
    """A batch of row starts.

    Args:
        tokenizer: the target's.
        count: rows.
        seed: equal seeds give equal rows (on one Python version: the plain seeds are its sources).
    Returns:
        Rows whose answers are at temperature 0.7 or 1.0, half each.
    """
    rng, texts = random.Random(seed), seed_texts()
    free_chat = tokenizer.encode(chat_text("")).ids
    end = tokenizer.token_to_id("<|im_end|>")
    free_chat = free_chat[: len(free_chat) - 1 - free_chat[::-1].index(end)]
    makers: list[tuple[float, Callable[[], tuple[list[int], int]]]] = [
        (0.50, lambda: (tokenizer.encode(chat_text(question(rng))).ids, 0)),
        (0.25, lambda: (free_chat, 1)),
        (0.07, lambda: (tokenizer.encode(chat_text(question(rng), rng.choice(OTHER_SYSTEMS))).ids, 0)),
        (0.10, lambda: (_seed(rng, texts, tokenizer), 0)),
        (0.08, lambda: ([tokenizer.token_to_id("<|endoftext|>")], 0)),
    ]
    chosen = rng.choices([maker for _, maker in makers], [share for share, _ in makers], k=count)
    starts = [maker() for maker in chosen]
    return pad_rows([s[0] for s in starts], [rng.choice((0.7, 1.0)) for _ in starts], [s[1] for s in starts])
