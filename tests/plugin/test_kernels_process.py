"""Runs the kernel tests under Triton's interpreter, in processes of their own."""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.plugin.conftest import INTERPRETED_FILES

FOLDER = Path(__file__).parent


def run_files(names: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    files = [str(FOLDER / name) for name in names]
    return subprocess.run(
        [*command, *files], env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True, check=False
    )


def test_kernels_under_the_interpreter() -> None:
    """In two processes at once: it is by far the longest test."""
    halves = INTERPRETED_FILES[::2], INTERPRETED_FILES[1::2]
    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(run_files, halves):
            assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
            assert "skipped" not in result.stdout
