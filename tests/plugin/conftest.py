"""Kernel tests need Triton's interpreter, which must be chosen before triton is imported: they run in a child process.

`test_kernels_process.py` starts that child; a run without TRITON_INTERPRET=1 does not collect the files below.
"""

import os
from pathlib import Path

INTERPRETED_FILES = (
    *("test_kernels_sampling.py", "test_kernels_weights.py", "test_kernels_pages.py", "test_kernels_attention.py"),
    *("test_kernels_executor.py", "test_kernels_shards.py", "test_kernels_matmul.py", "test_kernels_embedding.py"),
)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave the interpreter's tests to the child process, and everything else in this folder out of it."""
    if collection_path.parent != Path(__file__).parent or not collection_path.name.startswith("test_"):
        return None
    return (collection_path.name in INTERPRETED_FILES) != INTERPRETED or None
