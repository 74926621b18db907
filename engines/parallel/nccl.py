"""Ranks on GPUs: NCCL, and one-shot or two-shot exchanges over peer-to-peer memory for messages that they are faster for.

In a one-shot all-reduce every GPU reads the others' values and adds them in the order of the ranks: one kernel and one hop. In
a two-shot one each GPU adds a share of the values only and then reads the other sums: two hops, but fewer bytes. Both need
symmetric memory (torch.distributed._symmetric_memory, no multicast), which some machines do not allow between processes; then
NCCL does everything. All are timed when the ranks start, as CUDA graphs, since that is how a round runs. Plans and everything
else the host says go over MPI.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import TCPStore

from smc_engines.parallel.heartbeat import deadline
from smc_engines.parallel.mpi import MpiRanks
from smc_engines.parallel.ranks import together
from smc_plugin.kernels.timing import graph_times_us

_LARGEST_ONE_SHOT = 4 << 20
_TIMED_BYTES = (16 << 10, 64 << 10, 256 << 10, 512 << 10, 1 << 20, 2 << 20, _LARGEST_ONE_SHOT)
_CALLS, _REPLAYS = 20, 7
_LEAVE_S = 30.0
_SHARE_S = 8.0  # that ranks may lag behind one another once all have the memory

_log = logging.getLogger("smc_engines.parallel")


class NcclRanks:
    """The ranks of an MPI world, one current GPU each (see Ranks).

    Attributes:
        one_shot_bytes: messages up to this size take the one-shot exchange; 0 where it is not there or not fastest.
        two_shot_bytes: larger ones up to this size take the two-shot exchange.
        timings: bytes to microseconds of an all-reduce, {"nccl": ..., "one_shot": ..., "two_shot": ...}.
    """

    def __init__(self, mpi: MpiRanks) -> None:
        self._mpi = mpi
        self.rank, self.size = mpi.rank, mpi.size
        self._device = torch.device("cuda", torch.cuda.current_device())
        host, port = self._open_store()
        store = self._store if mpi.rank == 0 else TCPStore(host, port, mpi.size, is_master=False)
        dist.init_process_group("nccl", store=store, rank=mpi.rank, world_size=mpi.size, device_id=self._device)
        self._buffers: dict[torch.dtype, Tensor] = {}
        self._slots: dict[int, Tensor] = {}
        self._turn = 0  # which half of a buffer the last two-shot sum took
        self.one_shot_bytes = self.two_shot_bytes = 0
        self.timings: dict[int, dict[str, float]] = {}
        dist.all_reduce(torch.zeros(1, device=self._device))
        self._shared: list[Tensor] = []
        self.shares_memory = self._share_buffers()
        if self.shares_memory:
            self._time()

    def _open_store(self) -> tuple[str, int]:
        """Rank 0 opens the store through which NCCL's id travels; everybody learns where it is."""
        host = "127.0.0.1" if self._mpi.one_host else self._mpi.host
        self._store = TCPStore(host, 0, self.size, is_master=True, wait_for_workers=False) if self.rank == 0 else None
        return self._mpi.gather_objects((host, self._store.port if self._store is not None else 0))[0]

    def _share_buffers(self) -> bool:
        """Map every rank's buffers into every other's; False where this machine does not allow it."""
        failure = None
        try:
            for dtype in (torch.bfloat16, torch.float32):
                self._buffers[dtype] = self._reachable(2 * _LARGEST_ONE_SHOT // dtype.itemsize, dtype)
                self._addresses(self._buffers[dtype])
        except Exception as error:  # whatever it is, NCCL is there
            failure = f"{type(error).__name__}: {error}"
        failures = [text for text in self._mpi.gather_objects(failure) if text is not None]
        if failures:
            _log.warning("no peer-to-peer memory between the ranks (%s): NCCL does all collectives", failures[0])
            self._buffers.clear()
        return not failures

    def _reachable(self, count: int, dtype: torch.dtype) -> Tensor:
        """Memory of this rank's that all will reach."""
        import torch.distributed._symmetric_memory as symmetric  # noqa: PLC0415 - private: may be missing or move

        return symmetric.empty(count, dtype=dtype, device=self._device)

    def _addresses(self, own: Tensor) -> list[int]:
        """Where such memory of every rank is found from here; all ranks ask at the same time."""
        import torch.distributed._symmetric_memory as symmetric  # noqa: PLC0415 - private: may be missing or move

        handle = symmetric.rendezvous(own, dist.group.WORLD)  # type: ignore[arg-type]
        return [handle.get_buffer(rank, [own.numel()], own.dtype).data_ptr() for rank in range(self.size)]

    def share_words(self, count: int, before: Callable[[], None] | None = None) -> Tensor:
        """See Ranks."""

        def take() -> Tensor:
            if before is not None:
                before()
            return self._reachable(count, torch.int32)

        own = together(self, "take memory that all ranks reach", take)
        own.fill_(-1)
        self._shared.append(own)
        with deadline(self.rank, _SHARE_S, "not all ranks shared their memory"):
            addresses = self._addresses(own)
            torch.cuda.synchronize()
            self.gather_objects(None)  # nobody writes into words that are not set yet
        return torch.tensor(addresses, dtype=torch.int64, device=self._device)

    def _time(self) -> None:
        """Find the largest message that the one-shot exchange is faster for; rank 0's clock decides for all."""
        for size in _TIMED_BYTES:
            x = torch.zeros(size // 2, dtype=torch.bfloat16, device=self._device)
            self.timings[size] = {
                "nccl": graph_us(lambda x=x: self._nccl_all_reduce(x)),
                "one_shot": graph_us(lambda x=x: self._one_shot(x)),
                "two_shot": graph_us(lambda x=x: self._two_shot(x)),
            }
        self.timings = self._mpi.gather_objects(self.timings)[0]

        def largest(name: str) -> int:
            return max((size for size, us in self.timings.items() if us[name] == min(us.values())), default=0)

        self.one_shot_bytes, self.two_shot_bytes = largest("one_shot"), largest("two_shot")

    def all_reduce(self, x: Tensor) -> Tensor:
        """See Ranks."""
        if self._takes_one_shot(x.dtype, x.nbytes):
            return self._one_shot(x)
        if x.dtype in self._buffers and x.nbytes <= self.two_shot_bytes and x.nbytes % (16 * self.size) == 0:
            return self._two_shot(x)
        return self._nccl_all_reduce(x)

    def _takes_one_shot(self, dtype: torch.dtype, num_bytes: int) -> bool:
        return dtype in self._buffers and num_bytes <= self.one_shot_bytes and num_bytes % 16 == 0

    def _one_shot(self, x: Tensor) -> Tensor:
        buffer = self._buffers[x.dtype][: x.numel()].view(x.shape)
        group = dist.group.WORLD.group_name  # type: ignore[union-attr]
        return torch.ops.symm_mem.one_shot_all_reduce_copy(buffer, x.contiguous(), "sum", group)

    def _two_shot(self, x: Tensor) -> Tensor:
        """Each GPU adds its share of the values and hands it to the others; the result is gone with the next call but one."""
        self._turn ^= 1
        half = self._buffers[x.dtype][self._turn * (_LARGEST_ONE_SHOT // x.itemsize) :]
        buffer = half[: x.numel()].view(x.shape)
        buffer.copy_(x)
        group = dist.group.WORLD.group_name  # type: ignore[union-attr]
        return torch.ops.symm_mem.two_shot_all_reduce_(buffer, "sum", group)

    def _nccl_all_reduce(self, x: Tensor) -> Tensor:
        dist.all_reduce(x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """See Ranks. A small one is a one-shot sum of slots that are zero but for the rank's own."""
        shape = (self.size, *x.shape)
        padded = -(-x.numel() // 4) * 4
        if x.dtype != torch.float32 or not self._takes_one_shot(x.dtype, self.size * padded * 4):
            out = torch.empty(shape, dtype=x.dtype, device=x.device)
            dist.all_gather_into_tensor(out.view(-1), x.contiguous().view(-1))
            return out
        if padded not in self._slots:  # made before the first capture, and never written but in one place
            self._slots[padded] = torch.zeros((self.size, padded), device=x.device)
        slots = self._slots[padded]
        slots[self.rank, : x.numel()] = x.reshape(-1)
        return self._one_shot(slots)[:, : x.numel()].reshape(shape)

    def gather_objects(self, value: Any) -> list[Any]:
        """See Ranks."""
        return self._mpi.gather_objects(value)

    def send_plan(self, plan: Any) -> None:
        """See Ranks."""
        self._mpi.send_plan(plan)

    def receive_plan(self) -> Any:
        """See Ranks."""
        return self._mpi.receive_plan()

    def watch(self, limit_s: float | None) -> None:
        """See Ranks."""
        self._mpi.watch(limit_s)

    def close(self) -> None:
        """See Ranks."""
        with deadline(self.rank, _LEAVE_S, "not all ranks ended their work on the GPU"):
            torch.cuda.synchronize()
            self.gather_objects(None)  # NCCL's ends must not go while another rank still uses them
            self._buffers.clear()
            self._shared.clear()
            dist.destroy_process_group()
        self._mpi.close()


def graph_us(call: Callable[[], object]) -> float:
    """Median microseconds of a call among many in a CUDA graph; every rank must time the same at the same time."""
    return statistics.median(graph_times_us([call] * _CALLS, _REPLAYS)) / _CALLS
