"""What the target is asked to write about.

Owns the training prompts (made from templates, seeded) and the markup that surrounds them. Five kinds of row:
    template chat 40 %   "<|im_start|>system ... user\\n Explain how a bicycle works. ... assistant\\n" and the target answers
    free chat     35 %   "... <|im_start|>user\\n" and the target writes the question too (role 1), then answers
    other system   5 %   template chat under another system line
    plain seed    12 %   24 to 96 tokens of the Python standard library's source and manual, continued
    plain free     8 %   nothing but <|endoftext|>
The held-out prompts of heldout.json are never among them (a test checks it).
"""

import functools
import random
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer

from distill.generate import Markup, Rows

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
OTHER_SYSTEMS = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "You are a patient teacher who explains with examples.",
    "You are an expert programmer. Reply with code and a short explanation.",
    "You are a cheerful storyteller.",
)
TOPICS = """a bicycle|the water cycle|volcanoes|the Roman Empire|photosynthesis|machine learning|jazz music|chess openings
black holes|healthy breakfasts|time management|the French Revolution|vaccines|electric cars|the stock market|meditation
sourdough bread|the ocean floor|dinosaurs|the human heart|public speaking|recycling|solar panels|the Great Wall of China
bees|coffee|gravity|the internet|poetry|basketball|gardening|earthquakes|the immune system|inflation|Shakespeare|DNA
the moon landing|rainforests|yoga|democracy|antibiotics|computer viruses|the Silk Road|painting|sleep|whales|logic
probability|a job interview|learning a language|databases|operating systems|compilers|sorting algorithms|recursion
climate change|the periodic table|electricity|magnets|the speed of light|ancient Egypt|the Renaissance|opera|film editing
photography|hiking|camping|swimming|running a marathon|vegetarian cooking|pasta|cheese|tea ceremonies|pottery|knitting
carpentry|bridges|skyscrapers|trains|airplanes|rockets|satellites|telescopes|microscopes|bacteria|the brain|memory|dreams
emotions|friendship|leadership|teamwork|negotiation|budgeting|taxes|insurance|small businesses|marketing|social media
privacy|encryption|passwords|open source software|video games|robots|drones|3D printing|quantum computers|statistics
geometry|algebra|calculus|prime numbers|fractions|percentages|maps|deserts|rivers|islands|glaciers|hurricanes|the seasons
birds|cats|dogs|horses|elephants|insects|mushrooms|trees|flowers|soil|farming|nutrition|exercise|first aid|the flu
dental care|stress|education|libraries|museums|newspapers|radio|television|theatre|dance|fashion|architecture|furniture
money|trade|law|human rights|philosophy|ethics|religion|mythology|fairy tales|science fiction|travel|Japan|Brazil|India
Kenya|Canada|Australia|Italy|New York|Paris|the Sahara|Mars|Jupiter|comets|atoms|chemical reactions|plastics|glass|steel"""
TEMPLATES = """Explain {t} to a ten-year-old.|What is the most interesting fact about {t}?|Write a short story about {t}.
Write a poem about {t}.|List five things everyone should know about {t}.|How does {t} work?|Why is {t} important?
Give me a brief history of {t}.|What are common misconceptions about {t}?|Summarize {t} in three sentences.
Write a letter to a friend about {t}.|Compare {t} and {u}.|What are the advantages and disadvantages of {t}?
Create a quiz with three questions about {t}.|Write a dialogue between two people discussing {t}.
What would happen if {t} did not exist?|Give tips for a beginner interested in {t}.|Write a product description about {t}.
Describe {t} in simple words.|Write an email to my manager about {t}.|What is the relation between {t} and {u}?
Can you help me understand {t}?|Write an essay introduction about {t}.|Tell me a joke about {t}.
Make a step-by-step plan to learn about {t}.|What questions should I ask an expert on {t}?|Define {t}.
Rewrite this sentence more formally: "I really like {t} and {u}."|Is {t} dangerous?|How has {t} changed over time?
Write a news article about {t}.|Write a tweet about {t}.|Who are famous people connected with {t}?
What tools do I need for {t}?|Brainstorm ten ideas about {t} and {u}.|Translate "I love {t}" into French and Spanish.
Write a Python class that models {t}.|Write a short speech about {t}.|What is {t}?|hi, i want to talk about {t}"""
TASKS = """Write a Python function that {a}.|Write a JavaScript function that {a}.|How do I write a program that {a}?
Explain, with an example in Python, code that {a}.|Write a unit test for a function that {a}."""
ACTIONS = """reverses a string|sorts a list of numbers|counts the words in a file|finds the largest number in a list
checks whether a number is prime|computes the factorial of n|merges two dictionaries|removes duplicates from a list
reads a CSV file|computes the Fibonacci sequence|finds the median|flattens a nested list|checks for palindromes
converts Celsius to Fahrenheit|searches a sorted array|parses a date|downloads a web page|draws a triangle of stars
computes the greatest common divisor|implements a stack|implements a queue|rolls two dice|shuffles a deck of cards
counts vowels|validates an email address|transposes a matrix|adds two matrices|groups words by length|finds anagrams"""
SUMS = """What is {x} + {y}?|What is {x} - {y}?|What is {x} times {y}?|Calculate {x} / {y}.|What is {y}% of {x}?
A shop sells {y} apples a day. How many does it sell in {x} days?|If a train travels {x} km in {y} hours, how fast is it?
Tom has {x} marbles and gives {y} away. How many are left?|Solve for x: {y}x = {x}.|What is the average of {x} and {y}?
I have {x} dollars and each book costs {y} dollars. How many books can I buy?|Round {x}.{y} to the nearest ten."""


def _split(text: str) -> list[str]:
    return [item for line in text.splitlines() for item in line.split("|") if item]


def question(rng: random.Random) -> str:
    """One templated user prompt: 70 % about a topic, 15 % code, 15 % arithmetic."""
    kind = rng.random()
    if kind < 0.7:
        first, second = rng.sample(_split(TOPICS), 2)
        return rng.choice(_split(TEMPLATES)).format(t=first, u=second)
    if kind < 0.85:
        return rng.choice(_split(TASKS)).format(a=rng.choice(_split(ACTIONS)))
    return rng.choice(_split(SUMS)).format(x=rng.randint(2, 999), y=rng.randint(2, 99))


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
        (0.40, lambda: (tokenizer.encode(chat_text(question(rng))).ids, 0)),
        (0.35, lambda: (free_chat, 1)),
        (0.05, lambda: (tokenizer.encode(chat_text(question(rng), rng.choice(OTHER_SYSTEMS))).ids, 0)),
        (0.12, lambda: (_seed(rng, texts, tokenizer), 0)),
        (0.08, lambda: ([tokenizer.token_to_id("<|endoftext|>")], 0)),
    ]
    chosen = rng.choices([maker for _, maker in makers], [share for share, _ in makers], k=count)
    starts = [maker() for maker in chosen]
    return pad_rows([s[0] for s in starts], [rng.choice((0.7, 1.0)) for _ in starts], [s[1] for s in starts])
