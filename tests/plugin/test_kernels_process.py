"""Runs the kernel tests under Triton's interpreter, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.plugin.conftest import INTERPRETED_FILES

FOLDER = Path(__file__).parent


def test_kernels_under_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    files = [str(FOLDER / name) for name in INTERPRETED_FILES]
    result = subprocess.run(
        [*command, *files], env=environment, cwd=FOLDER.parents[1], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert "skipped" not in result.stdout
