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
# Each of its tests is a process of its own, and as long as a file elsewhere.
_APART = "tests/plugin/test_kernels_process.py"
# What takes longest comes first, so that all workers end at about the same time. By processor time; everything else follows.
_LONGEST_FIRST = (
    *_ONE_AT_A_TIME,
    *(_APART, "tests/plugin/test_kernels_compile.py", "tests/engines/test_laws.py", "tests/scripts/test_task_pair.py"),
    *("tests/engines/test_options.py", "tests/engines/test_isolation.py", "tests/scripts/test_models.py"),
    *("tests/engines/test_rounds.py", "tests/engines/test_fp8.py", "tests/engines/test_bench.py"),
)


class _Scheduling(LoadFileScheduling):
    """A file's tests stay together, and the files of some folders too."""

    def _split_scope(self, nodeid: str) -> str:
        scope = super()._split_scope(nodeid)
        if scope == _APART:
            return nodeid
        return next((folder for folder in _ONE_AT_A_TIME if scope.startswith(folder)), scope)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """Used where pytest runs with -n (pytest-xdist)."""
    config.option.loadscopereorder = False  # it would start what has most tests, which are not the longest ones
    return _Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files by how long they take; tests of one file stay in their order."""

    def rank(item: pytest.Item) -> int:
        starts = [number for number, start in enumerate(_LONGEST_FIRST) if item.nodeid.startswith(start)]
        return starts[0] if starts else len(_LONGEST_FIRST)

    items.sort(key=rank)


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
