"""Jobs under a real mpirun, and engines of several ranks."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from smc_build.builder import BuildOptions, build_engine
from smc_engines.parallel.launch import find_mpirun, rank_command, rank_environment
from smc_plugin.errors import ConfigError
from tests.tiny_models import make_checkpoint

JOB_S = 240
MAX_SEQ_LEN = 8000  # answers so long that a test always comes before their end

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"heads": 6, "kv_heads": 3, "hidden": 96, "ffn": 72},  # zero heads, zero ffn columns
    "qwen2": {"tied": True, "heads": 4, "kv_heads": 2},  # biases, rows of the embedding as the head
    "qwen3": {"heads": 4, "kv_heads": 1},  # head norms, one KV head on every rank
}


@pytest.fixture(autouse=True, scope="session")
def mpirun() -> str:
    """mpirun, without which nothing here can run; the Makefile sets it up."""
    try:
        return find_mpirun()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def engine_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds (once) the engine of a family over so many ranks."""
    root, built = tmp_path_factory.mktemp("parallel"), {}

    def build(family: str, tp: int, draft_tp: int | None = None, **types) -> Path:
        key = (family, tp, draft_tp, *types.items())
        if key not in built:
            target, draft = root / f"{family}-target", root / f"{family}-draft"
            if not target.exists():
                shared = {"scale": 1.5, "max_position": MAX_SEQ_LEN, **FAMILIES[family]}
                make_checkpoint(target, family, layers=3, seed=1, **shared)
                make_checkpoint(draft, family, layers=1, seed=2, **shared)
            options = BuildOptions(
                str(target),
                draft=str(draft),
                tp=tp,
                draft_tp=draft_tp,
                compiler="torch",
                particles=4,
                draft_tokens=4,
                max_seq_len=MAX_SEQ_LEN,
                output=root / str(len(built)),
                **{"dtype": "float32", **types},
            )
            built[key] = build_engine(options)
        return built[key]

    return build


def run_job(tp: int, spec: dict[str, Any], folder: Path) -> list[list[dict[str, Any]]]:
    """Run tests.parallel.answers on `tp` ranks; returns what rank 0 got."""
    given, out = folder / "spec.json", folder / "out.json"
    given.write_text(json.dumps(spec))
    command = rank_command(tp, "tests.parallel.answers", [str(given), str(out)])
    done = subprocess.run(command, env=environment(tp), capture_output=True, text=True, timeout=JOB_S, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads(out.read_text())


def environment(tp: int) -> dict[str, str]:
    """Of an mpirun, with one thread a rank."""
    return {**rank_environment(tp), "OMP_NUM_THREADS": "1"}


def ranks_of(mpirun_pid: int) -> dict[int, int]:
    """The live ranks that an mpirun (or what it became) started: rank to process id."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = folder.joinpath("stat").read_text().rpartition(")")[2].split()
            variables = folder.joinpath("environ").read_bytes().split(b"\0")
        except OSError:
            continue
        rank = next((part for part in variables if part.startswith(b"OMPI_COMM_WORLD_RANK=")), None)
        if rank is not None and status[0] != "Z" and int(status[1]) == mpirun_pid:
            found[int(rank.partition(b"=")[2])] = int(folder.name)
    return found


def wait_until(true: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Wait until something holds."""
    limit = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < limit, f"not within {timeout_s} s: {what}"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
