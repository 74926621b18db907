"""Under load no request's text turns up in another's answer, or anywhere but there.

The engine's models repeat what they read: attention is the mean over the context, and the likeliest token is the one that
the context holds most of. Each request's prompt is one letter of its own, so an answer with another letter has read another's
pages.
"""

from __future__ import annotations

import contextlib
import json
import string
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smc_build.builder import BuildOptions, build_engine
from tests.serving.service import Service, text
from tests.tiny_models import make_checkpoint

openai = pytest.importorskip("openai", reason="needs requirements/serve-test.txt: run make serve-env")

LETTERS = string.ascii_letters[6:]  # ids have long runs of a to f now and then
LENGTH = 24  # of a canary, in letters; the answer has as many
PAGES = (
    *(("metrics", "/metrics"), ("status", "/"), ("status", "/status.json")),
    *(("openai", "/health"), ("openai", "/v1/models"), ("openai", "/openapi.json")),
)


def make_repeating(folder: Path, seed: int) -> Path:
    """A checkpoint of one layer whose next token is, by e^30 to 1, what its context holds most of."""
    file = make_checkpoint(folder, seed=seed, layers=1, kv_heads=4) / "model.safetensors"
    tensors = load_file(file)
    layer = "model.layers.0"
    hidden = tensors["model.embed_tokens.weight"].shape[1]
    embed = torch.nn.functional.normalize(tensors["model.embed_tokens.weight"], dim=1)
    tensors["model.embed_tokens.weight"], tensors["lm_head.weight"] = embed, 8 * embed
    for name in tensors:
        if name.endswith("norm.weight"):
            tensors[name] = torch.ones(hidden)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
        tensors[f"{layer}.{name}.weight"].zero_()
    tensors[f"{layer}.self_attn.v_proj.weight"] = torch.eye(hidden)
    tensors[f"{layer}.self_attn.o_proj.weight"] = torch.eye(hidden)
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def repeating(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine directory of two models that repeat; `engine` knows whether the server is installed."""
    root = tmp_path_factory.mktemp("repeating")
    target, draft = (make_repeating(root / name, seed) for seed, name in enumerate(("target", "draft")))
    options = BuildOptions(
        str(target), draft=str(draft), output=root / engine.name, particles=8, draft_tokens=4, groups=8, dtype="float32"
    )
    return build_engine(options)


def ask(service: Service, letter: str) -> str:
    """The answer to a prompt of one letter, which way in depends on the letter."""
    canary, number = letter * LENGTH, LETTERS.index(letter)
    common = {"max_tokens": LENGTH, "ignore_eos": True, "seed": number, "temperature": 1.0}
    client = openai.OpenAI(base_url=service.url("openai", "/v1"), api_key="none", max_retries=0)
    match number % 5:
        case 0:
            values = {"text_input": canary, "max_tokens": LENGTH, "exclude_input_in_output": True, "end_id": -1}
            return text(list(service.stream("ensemble", values)))
        case 1:
            _, body = service.post("/v2/models/smc/generate", {"text_input": canary, **common})
            return json.loads(body)["text_output"]
        case 2:
            answer = client.completions.create(
                model="tiny", prompt=canary, max_tokens=LENGTH, extra_body={"ignore_eos": True}
            )
            return answer.choices[0].text
        case 3:
            messages = [{"role": "user", "content": canary}]
            pieces = client.chat.completions.create(
                model="tiny", messages=messages, max_tokens=LENGTH, stream=True, extra_body={"ignore_eos": True}
            )
            return "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        case _:
            return text(list(service.stream("smc", {"text_input": canary, "stream": True, **common})))


def page(service: Service, port: str, path: str) -> str:
    with (
        contextlib.suppress(urllib.error.HTTPError),
        urllib.request.urlopen(service.url(port, path), timeout=20) as answer,
    ):
        return answer.read().decode()
    return ""  # no report yet


def shown_while(service: Service, letters: str) -> tuple[dict[str, str], dict[str, str]]:
    """Ask with every letter at once; returns the answers, and what each page showed meanwhile and just after."""
    shown: dict[str, str] = {path: "" for _, path in PAGES}
    ended = threading.Event()

    def look() -> None:
        last = False
        while not last:
            last = ended.is_set()
            for port, path in PAGES:
                shown[path] += page(service, port, path)

    with ThreadPoolExecutor(len(letters) + 1) as pool:
        looking = pool.submit(look)
        try:
            answers = dict(zip(letters, pool.map(lambda letter: ask(service, letter), letters), strict=True))
        finally:
            ended.set()
        looking.result()
    return answers, shown


@pytest.fixture(scope="module", params=[(), ("--show-text",)], ids=["default", "show-text"])
def served(
    repeating: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, bool]]:
    """A service of that engine, and whether its status page may show texts."""
    service = Service(repeating, tmp_path_factory.mktemp("canary"), *request.param)
    yield service, bool(request.param)
    assert service.stop() == 0


def test_no_text_leaves_its_own_answer(served: tuple[Service, bool]) -> None:
    service, may_show = served
    found: set[str] = set()
    for _ in range(2):  # again on pages that held the others' letters
        answers, shown = shown_while(service, LETTERS)
        for letter, answer in answers.items():
            assert answer == letter * LENGTH, f"{letter} asked"
        leaks = [(path, letter) for path, text in shown.items() for letter in answers if letter * 4 in text]
        found |= {path for path, _ in leaks}
        assert len(shown["/status.json"]) > 1000
        assert all(shown.values())
    service.idle()
    assert found == ({"/status.json"} if may_show else set())
    log = service.output()
    assert log.count('"event": "finished"') >= 2 * len(LETTERS)
    assert [letter for letter in LETTERS if letter * 4 in log] == []
