"""Ranks on processors: MPI, its waits polite.

Ranks may outnumber cores, so a wait gives its time slice away instead of spinning, and one for a plan, which may take minutes
to come, sleeps. A sum is a gather and an addition in the order of the ranks: the same bits everywhere, and never a
question of which algorithm MPI chose.
"""

from __future__ import annotations

import os
import pickle
import socket
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from smc_engines.parallel.heartbeat import Heartbeat, deadline
from smc_plugin.errors import RankError

_PLAN_TAG = 7
_LEAVE_S = 8.0
_YIELDS = 20  # then the wait sleeps: who sleeps is woken sooner than who yields when other programs are busy
_SHORT_NAP_S, _NAP_S = 0.00005, 0.0005
_SPIN_S = 0.002  # plans usually follow one another at once
_SHORT_BYTES = 2048  # what MPIs send without waiting for the receiver


class MpiRanks:
    """The ranks of MPI.COMM_WORLD (see Ranks)."""

    shares_memory = False

    def __init__(self) -> None:
        from mpi4py import MPI  # noqa: PLC0415 - importing it starts MPI, which only a rank should do

        self._mpi = MPI
        self._world = MPI.COMM_WORLD.Dup()
        self.rank: int = self._world.Get_rank()
        self.size: int = self._world.Get_size()
        self._sent: list[Any] = []
        self._heartbeat: Heartbeat | None = None
        self.host = socket.gethostname()
        self.one_host = len(set(self.gather_objects(self.host))) == 1

    def start_heartbeat(self) -> None:
        """Watch over the ranks from now on; every rank calls it once."""
        self._heartbeat = Heartbeat(self.rank, self.size, self.gather_objects, self.one_host)

    def watch(self, limit_s: float | None) -> None:
        """See Ranks."""
        if self._heartbeat is not None:
            self._heartbeat.watch(limit_s)

    @property
    def local_rank(self) -> int:
        """This rank's number among those of its host."""
        host = self._world.Split_type(self._mpi.COMM_TYPE_SHARED)
        try:
            return host.Get_rank()
        finally:
            host.Free()

    def share_words(self, count: int, before: Callable[[], None] | None = None) -> Tensor:
        """See Ranks."""
        raise RankError("ranks on a CPU were asked to share memory, expected GPUs only: report this")

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Ranks; sums are made in float32 at least and rounded once."""
        parts = self.all_gather(x)
        wide = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
        total = parts[0].to(wide)
        for part in parts[1:]:
            total = total + part.to(wide)
        return total.to(x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        """See Ranks."""
        out = torch.empty((self.size, *x.shape), dtype=x.dtype)
        if x.numel():
            request, polls = self._world.Iallgather(_bytes(x.contiguous()), _bytes(out)), 0
            while not request.Test():
                polls += 1
                os.sched_yield() if polls < _YIELDS else time.sleep(_SHORT_NAP_S)
        return out

    def gather_objects(self, value: Any) -> list[Any]:
        """See Ranks."""
        own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = self.all_gather(torch.tensor([own.numel()]))[:, 0].tolist()
        padded = torch.zeros(max(sizes), dtype=torch.uint8)
        padded[: own.numel()] = own
        rows = self.all_gather(padded)
        return [pickle.loads(rows[rank, :size].numpy().tobytes()) for rank, size in enumerate(sizes)]

    def send_plan(self, plan: Any) -> None:
        """See Ranks."""
        data = pickle.dumps(plan)
        self._sent += [self._world.Isend([data, self._mpi.BYTE], dest, _PLAN_TAG) for dest in range(1, self.size)]
        # A short message is on its way; the rest of a long one moves only inside calls of MPI, and ranks on GPUs make none
        # in a step.
        while self._pending() and len(data) > _SHORT_BYTES:
            time.sleep(_SHORT_NAP_S)

    def _pending(self) -> bool:
        """Whether plans are still being sent."""
        self._sent = [request for request in self._sent if not request.Test()]
        return bool(self._sent)

    def receive_plan(self) -> Any:
        """See Ranks."""
        status, began = self._mpi.Status(), time.monotonic()
        while not self._world.Iprobe(0, _PLAN_TAG, status):
            if time.monotonic() - began < _SPIN_S:
                os.sched_yield()
            else:
                time.sleep(_NAP_S)
        data = bytearray(status.Get_count(self._mpi.BYTE))
        self._world.Recv([data, self._mpi.BYTE], 0, _PLAN_TAG)
        return pickle.loads(bytes(data))

    def close(self) -> None:
        """See Ranks."""
        with deadline(self.rank, _LEAVE_S, "not all ranks left"):
            while self._pending():
                time.sleep(_SHORT_NAP_S)
            self.gather_objects(None)
            if self._heartbeat is not None:
                self._heartbeat.close()
            self._world.Free()


def _bytes(x: Tensor) -> Any:
    """A contiguous CPU tensor's memory, whatever its dtype."""
    return x.view(-1).view(torch.uint8).numpy()
