"""Ranks that die, hang, cannot start or disagree: everything ends, soon, with a reason and without orphans."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from smc_engines.parallel.launch import rank_command
from tests.parallel.conftest import environment, is_alive, ranks_of, run_job, wait_until

START_S, END_S = 120, 10  # a rank that is lost ends the job within END_S


@contextmanager
def running(engine: Path, folder: Path, tp: int = 2) -> Iterator[tuple[subprocess.Popen[bytes], dict[int, int], Path]]:
    """smc-run in the middle of a long answer: its process, its ranks, and the file of its messages."""
    out, log = folder / "answer.txt", folder / "messages.txt"
    command = [sys.executable, "-m", "smc_engines.run_cli", "--engine", str(engine), "--n", "1", "--ignore-eos"]
    command += ["--max-tokens", "7900", "--no-verify", "hi"]
    with out.open("wb") as answer, log.open("wb") as messages:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=answer, stderr=messages, env=environment(tp)
        )
    ranks: dict[int, int] = {}
    try:
        wait_until(lambda: out.stat().st_size > 0 or process.poll() is not None, START_S, "the answer begins")
        assert process.poll() is None, log.read_text()
        ranks = ranks_of(process.pid)
        assert sorted(ranks) == list(range(tp))
        yield process, ranks, log
    finally:
        process.kill()
        process.wait()
        wait_until(lambda: not any(map(is_alive, ranks.values())), 5, "no rank outlives its mpirun")


@pytest.mark.parametrize(("rank", "number"), [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_a_lost_rank_ends_the_job(
    rank: int, number: signal.Signals, engine_of: Callable[..., Path], tmp_path: Path
) -> None:
    with running(engine_of("llama", 2), tmp_path) as (process, ranks, log):
        os.kill(ranks[rank], number)
        began = time.monotonic()
        assert process.wait(3 * END_S) != 0
        took = time.monotonic() - began
        messages = log.read_text(errors="replace")
        assert f"rank {rank} " in messages
        assert took < END_S, messages
        wait_until(lambda: not any(map(is_alive, ranks.values())), 5, "no rank is left")


def test_ranks_do_not_outlive_mpirun(engine_of: Callable[..., Path], tmp_path: Path) -> None:
    with running(engine_of("llama", 2), tmp_path) as (process, ranks, _):
        process.kill()
        wait_until(lambda: not any(map(is_alive, ranks.values())), END_S, "ranks die with their mpirun")


def test_a_rank_that_cannot_start_says_why(engine_of: Callable[..., Path], tmp_path: Path) -> None:
    engine = tmp_path / "damaged-tp2"
    shutil.copytree(engine_of("llama", 2), engine)
    with (engine / "target/weights/rank1.safetensors").open("r+b") as file:
        file.write(b"\xff" * 8)
    command = [sys.executable, "-m", "smc_engines.run_cli", "--engine", str(engine), "--no-verify", "--quiet", "hi"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment(2),
        timeout=START_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode != 0
    assert "smc-run: rank 1 failed to load the target: cannot read target/weights/rank1.safetensors" in done.stderr
    assert "Traceback" not in done.stderr


def test_messages_name_the_rank_the_trouble_and_the_remedy(tmp_path: Path) -> None:
    """Out of memory on one rank used to be an exception's bare name, and unlike engine directories were printed whole."""
    out = tmp_path / "messages.json"
    command = rank_command(2, "tests.parallel.messages", [str(out)])
    subprocess.run(command, env=environment(2), capture_output=True, timeout=START_S, check=True)
    assert json.loads(out.read_text()) == [
        "rank 1 failed to load the draft: MemoryError: cannot allocate 38 GB, expected room for its share: free memory "
        "there, or build with more ranks",
        "rank 1 failed to load the draft: KeyError: 'layers.3.qkv\\nsecond line', expected none: report this",
        "rank 1 failed to check its GPU: no FP8 here, expected it: buy one",
        f"rank 1 has an engine directory files a sha256 '{'1' * 64}', expected rank 0's files a sha256 '{'2' * 64}': give "
        "every rank the same engine directory and options",
        "rank 1 has a setting 1, expected rank 0's 0: give every rank the same engine directory and options",
    ]


def test_ranks_that_disagree_say_so(engine_of: Callable[..., Path], tmp_path: Path) -> None:
    """Rank 1's whole draft is changed in its memory: it draws other tokens, and notices at the next plan."""
    engine = {"path": str(engine_of("llama", 2, 1)), "prompts": [[1, 2, 3]], "params": [{"max_tokens": 60, "seed": 1}]}
    with pytest.raises(AssertionError, match=r"rank 1 has tokens and ancestors of digest \w+, expected rank 0's"):
        run_job(2, {"engines": [{**engine, "spoil_draft_of": 1}]}, tmp_path)


def test_twenty_starts_leave_nothing_behind(engine_of: Callable[..., Path], tmp_path: Path) -> None:
    """Files and threads are counted by the ranks themselves."""
    engine = {"path": str(engine_of("llama", 2)), "prompts": [[1]], "params": [{"max_tokens": 2, "seed": 1}]}

    def segments() -> set[Path]:
        """Open MPI's shared memory; other programs have theirs in the same folder."""
        return set(Path("/dev/shm").glob("*segment*"))

    before = segments()
    run_job(2, {"engines": [engine], "repeats": 20}, tmp_path)
    assert segments() - before == set()
