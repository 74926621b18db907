"""A program for every rank of an mpirun: answer the same requests on several engines, one after the other.

    mpirun -n 2 python -m tests.parallel.answers SPEC.json OUT.json

SPEC is {"engines": [{"path": ..., "prompts": [[1, 2]], "params": [{...}]}], "repeats": 1}; rank 0 writes what it got to OUT.
Open files and threads are counted around the later repeats, so that a start that leaves something behind shows.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from smc_engines.config import ExecutorConfig
from smc_engines.engine import Engine
from smc_engines.executor import Executor
from smc_engines.parallel.follower import follow
from smc_engines.sampling_params import SamplingParams
from tests.toy import assert_empty, info_of


def answer(
    path: str,
    prompts: Sequence[Sequence[int]],
    params: Sequence[dict[str, Any]],
    device: str = "cpu",
    spoil_draft_of: int | None = None,
) -> list[dict[str, Any]] | None:
    """What an engine says to each prompt with each of the parameters; None on the ranks that follow.

    Args:
        spoil_draft_of: a rank whose draft is changed in its memory.
    """
    engine = Engine.from_dir(Path(path), ExecutorConfig(device=device, verify=False, num_pages=600))
    if engine.rank == spoil_draft_of and engine.draft is not None:
        engine.draft.weights["lm_head"].neg_()
    if engine.rank > 0:
        follow(engine)
        return None
    with closing(engine):
        executor = Executor(engine)
        each = [(prompt, SamplingParams.from_mapping(values)) for prompt in prompts for values in params]
        outputs = executor.generate([prompt for prompt, _ in each], [values for _, values in each])
        assert_empty(executor)
    return [
        {
            "tokens": list(output.token_ids),
            "ancestors": [list(entry.ancestors) for entry in info_of(output).trace],
            "log_evidence": info_of(output).log_evidence,
            "error": str(output.error),
        }
        for output in outputs
    ]


def held() -> tuple[int, int]:
    """Open files and threads of this process."""
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def main() -> None:
    """Run a rank."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    found, counts = [], []
    for _ in range(spec.get("repeats", 1)):
        found = [answer(**engine) for engine in spec["engines"]]
        counts.append(held())
    half = len(counts) // 2
    assert not half or max(counts[half:]) <= max(counts[:half]), f"files and threads grow: {counts}"
    if found[0] is not None:
        Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
