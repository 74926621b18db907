"""How a process becomes one of several ranks: under mpirun, with NCCL where the ranks have GPUs."""

from __future__ import annotations

import ctypes
import os
import signal
from typing import TYPE_CHECKING

import torch

from smc_engines.parallel.heartbeat import deadline
from smc_plugin.errors import ConfigError, RankError

if TYPE_CHECKING:
    from smc_engines.config import ExecutorConfig
    from smc_engines.parallel.ranks import Ranks

# Open MPI, then MPICH and those that are built on it.
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_PR_SET_PDEATHSIG = 1
_START_S = 120.0  # for all ranks to start Python and MPI; from then on they watch over each other


def launched_rank() -> int | None:
    """This process's rank if an mpirun started it, else None."""
    return _first_number(_RANK_VARIABLES)


def _first_number(names: tuple[str, ...]) -> int | None:
    found = [os.environ[name] for name in names if os.environ.get(name, "").isdigit()]
    return int(found[0]) if found else None


def connect(tp: int, config: ExecutorConfig) -> Ranks | None:
    """Join the other ranks of an engine.

    Args:
        tp: the engine's ranks.
    Returns:
        None where tp is 1.
    Raises:
        ConfigError: this process is not one of `tp` that mpirun started, or mpi4py is missing.
        RankError: another rank cannot use its device.
    """
    size = _first_number(_SIZE_VARIABLES)
    if tp == 1:
        return None
    if launched_rank() is None or size != tp:
        found = "a single process" if launched_rank() is None else f"one of {size} that mpirun started"
        raise ConfigError(
            f"the engine has {tp} ranks, this process is {found}: use smc-run, smc-bench or smc-serve, which start the "
            "ranks"
        )
    try:
        from smc_engines.parallel.mpi import MpiRanks  # noqa: PLC0415

        with deadline(launched_rank(), _START_S, "not all ranks started"):
            mpi = MpiRanks()
            mpi.start_heartbeat()
    except (ImportError, RuntimeError) as error:
        raise ConfigError(
            f"mpi4py does not start MPI ({error}), expected the extra mpi: pip install 'smc-engine[mpi]'"
        ) from error
    # mpirun may be killed with no time to end its ranks.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    devices = mpi.gather_objects(_device_or_reason(config, mpi.local_rank))
    for rank, (kind, reason) in enumerate(devices):
        if kind is None:
            raise RankError(f"rank {rank} cannot start: {reason}")
        if kind != devices[0][0]:
            raise RankError(f"rank {rank} runs on {kind}, expected rank 0's {devices[0][0]}: choose one with --device")
    if devices[0][0] == "cpu":
        return mpi
    from smc_engines.parallel.nccl import NcclRanks  # noqa: PLC0415 - needs CUDA

    return NcclRanks(mpi)


def _device_or_reason(config: ExecutorConfig, local_rank: int) -> tuple[str | None, str]:
    """The type of this rank's device, made current; or None and why there is none."""
    try:
        device = config.torch_device()
    except ConfigError as error:
        return None, str(error)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if local_rank >= count:
            return (
                None,
                f"its host has {count} GPUs, expected one for each of its ranks: use a smaller --tp, or --device cpu",
            )
        torch.cuda.set_device(local_rank)
    return device.type, ""
