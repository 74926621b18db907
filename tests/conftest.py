"""Fixtures that more than one test file uses. Models are tiny, so one thread is fastest and keeps runs repeatable."""

from pathlib import Path
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadFileScheduling

from tests.toy import Toy, make_toy

torch.set_num_threads(1)
# Their tests look at what processes leave behind on the machine, so that they must not overlap with their like.
_ONE_AT_A_TIME = ("tests/serving/", "tests/parallel/")


class _Scheduling(LoadFileScheduling):
    """A file's tests stay together, and the files of some folders too."""

    def _split_scope(self, nodeid: str) -> str:
        scope = super()._split_scope(nodeid)
        return next((folder for folder in _ONE_AT_A_TIME if scope.startswith(folder)), scope)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """Used where pytest runs with -n (pytest-xdist)."""
    return _Scheduling(config, log)


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
