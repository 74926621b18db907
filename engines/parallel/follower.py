"""What a rank other than 0 does: receive plans, and carry them out on an engine and an executor of its own."""

from __future__ import annotations

import gc

import torch

from smc_engines.engine import Engine
from smc_engines.executor import Executor
from smc_engines.parallel.lockstep import Call, Leave, Renew, Step


def follow(engine: Engine) -> None:
    """On a rank other than 0: do as rank 0 does until it leaves.

    Raises:
        RankError: the ranks have diverged.
    """
    ranks = engine.ranks
    assert ranks is not None
    executor: Executor | None = None
    while True:
        match ranks.receive_plan():
            case Leave():
                engine.close()
                return
            case Renew():
                executor = None
                _forget(engine)
                executor = Executor(engine)
            case Call(function, args):
                function(engine, *args)
            case Step() as plan:
                assert executor is not None
                executor.follow(plan)


def _forget(engine: Engine) -> None:
    """Give back what a dropped executor held; a round of it may still run."""
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
