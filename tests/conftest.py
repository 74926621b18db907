"""Fixtures that more than one test file uses. Models are tiny, so one thread is fastest and keeps runs repeatable."""

from pathlib import Path

import pytest
import torch

from tests.toy import Toy, make_toy

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Five tokens, answers of at most four, a draft that differs."""
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """Six tokens with a byte-level tokenizer (the end token, a, b, c and the two bytes of é), answers of up to 24."""
    return make_toy(tmp_path_factory.mktemp("letters"), vocab_size=6, letters=True, max_seq_len=64)


@pytest.fixture(scope="session")
def clash(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A draft that knows nothing of its target: greedy answers differ at almost every token."""
    return make_toy(tmp_path_factory.mktemp("clash"), noise=1.0, scale=1.2, seed=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder."""
    return tmp_path
