"""Starting the ranks: the same command again, under mpirun.

    smc-run --engine engines/big-tp2 "Hi"   becomes   mpirun -n 2 python -m smc_engines.run_cli --engine engines/big-tp2 "Hi"

Ranks on processors may outnumber cores, and share them: each gets a part of the threads unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from smc_build.engine_dir import load_manifest
from smc_engines.parallel.connect import launched_rank
from smc_plugin.errors import ConfigError, RankError, SmcError

if TYPE_CHECKING:
    from smc_engines.engine import Engine

# For Open MPI 5 (PRTE) and 4; other MPIs pass them by. Containers often have nobody but root.
_ENVIRONMENT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "OMPI_MCA_hwloc_base_binding_policy": "none",
    "OMPI_MCA_mpi_yield_when_idle": "1",
}


def find_mpirun() -> str:
    """The mpirun of this Python's environment, else of the system.

    Raises:
        ConfigError: there is none, or no mpi4py.
    """
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.is_file() else shutil.which("mpirun")
    if found is None or importlib.util.find_spec("mpi4py") is None:
        missing = "mpirun" if found is None else "mpi4py"
        raise ConfigError(f"{missing} is not installed, expected the extra mpi: run pip install 'smc-engine[mpi]'")
    return found


def rank_environment(tp: int) -> dict[str, str]:
    """The environment of an mpirun of `tp` ranks."""
    environment = {**_ENVIRONMENT, **os.environ}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // tp)))
    environment["NCCL_NVLS_ENABLE"] = environment.get("NCCL_NVLS_ENABLE", "0")
    return environment


def rank_command(tp: int, module: str, arguments: Sequence[str]) -> list[str]:
    """The command that runs a module's main on every rank."""
    return [find_mpirun(), "-n", str(tp), sys.executable, "-m", module, *arguments]


def follow_rank_0(load: Callable[[], Engine], program: str) -> int:
    """What a rank other than 0 does instead of the program's own work: load the engine too, and follow.

    Returns:
        the exit status: 0 when rank 0 sent it home; 1 after an error, which rank 0 prints unless it is this rank's own.
    """
    from smc_engines.parallel.follower import follow  # noqa: PLC0415 - which needs all of the run time

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides what an interrupt means
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        engine = load()
        if engine.ranks is None:
            raise ConfigError(
                f"the engine has one rank, this process is number {launched_rank()} of those that a launcher started, expected "
                "one: start the command alone"
            )
    except RankError:
        return 1  # of something all did together: rank 0 says what it was
    except SmcError as error:
        print(f"{program}: rank {launched_rank()}: {error}", file=sys.stderr, flush=True)
        return 1
    try:
        follow(engine)
    except Exception as error:
        if isinstance(error, SmcError):
            print(f"{program}: {error}", file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        # Not the way out that waits for the others: they may wait for this rank.
        os._exit(1)
    return 0


def start_ranks(engine: Path | int, module: str, arguments: Sequence[str]) -> None:
    """Become mpirun, unless there is one rank only or mpirun has started this process already.

    Args:
        engine: an engine directory, or the number of ranks.
        module, arguments: what every rank runs.
    Raises:
        ConfigError: mpirun or mpi4py is missing.
        EngineDirError: there is no engine directory.
    """
    tp = engine if isinstance(engine, int) else load_manifest(engine, verify=False).tp
    if tp == 1 or launched_rank() is not None:
        return
    command = rank_command(tp, module, arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, rank_environment(tp))
