"""Runs the kernel tests under Triton's interpreter, in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.plugin.conftest import INTERPRETED_FILES

FOLDER = Path(__file__).parent
EXECUTOR = "test_kernels_executor.py"
# Parts of like length, for tests that run in several processes at once.
PARTS = {
    "deferred rounds": (EXECUTOR, "-k", "deferred"),
    "options": (EXECUTOR, "-k", "options"),
    "other rounds": (EXECUTOR, "-k", "not deferred and not options"),
    "kernels": tuple(name for name in INTERPRETED_FILES if name != EXECUTOR),
}


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", PARTS)
def test_under_the_interpreter(part: str) -> None:
    result = run(PARTS[part])
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout


def run(arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", *arguments]
    return subprocess.run(command, env=environment, cwd=FOLDER, capture_output=True, text=True, check=False)
