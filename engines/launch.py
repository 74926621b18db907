"""Start rounds and hand their summaries over: eagerly on a CPU, as captured CUDA graphs on a GPU.

A round depends on device state only, so the host can start the next one before it has read the last. `Launcher.launch`
returns at once with a `Flight`; `Flight.land` waits for that round's summary, not for later ones.

Graphs are captured once per (kind of round, batch bucket, context bucket). A batch of 3 runs in the bucket of 4, padded with
the spare slot; attention is cut into fewer programs for contexts of up to 1024 tokens than for longer ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from smc_engines.rounds import RoundContext, RoundKind, RoundSummary, run_round
from smc_plugin.group_state import GroupState

_WARM_UP_ROUNDS = 3
_CONTEXTS = (1024, 4096, 16384)  # tokens


@dataclass(frozen=True)
class Flight:
    """A started round: its packed summary on the host and the event after which it may be read."""

    kind: RoundKind
    packed: Tensor
    landed: torch.cuda.Event | None

    def land(self) -> RoundSummary:
        """Wait for the summary; its first rows are those of the batch."""
        if self.landed is not None:
            self.landed.synchronize()
        return RoundSummary.unpack(self.packed, self.kind.num_particles)


class Launcher:
    """Starts rounds on one device.

    Args:
        state: all slots; the last one is spare.
        device: where the state lives.
    """

    def __init__(self, state: GroupState, device: torch.device) -> None:
        self._state = state
        self._device = device
        self._graphs: dict[tuple[RoundKind, int, int], _CapturedRound] = {}

    def shape(self, context: RoundContext, num_groups: int) -> tuple[RoundKind, int, int]:
        """What a round is captured for: its kind, the groups of its bucket and the longest context of its bucket."""
        bucket = min(1 << (num_groups - 1).bit_length(), max(self._state.slot.shape[0] - 1, 1))
        # A captured round is replayed when contexts have grown, so it must see the longest of its bucket.
        longest = (self._state.block_table.shape[-1] - 1) * context.target.page_size
        longest = min([tokens for tokens in _CONTEXTS if context.max_context <= tokens < longest], default=longest)
        return context.kind, bucket, longest

    def forget(self) -> None:
        """Drop every captured round; NCCL does not end while a graph still holds collectives of it."""
        self._graphs.clear()

    def launch(self, context: RoundContext, slots: Sequence[int]) -> Flight:
        """Start a round for some slots."""
        if self._device.type != "cuda":
            packed = run_round(context, self._state, torch.tensor(slots, device=self._device))
            return Flight(context.kind, packed, None)
        spare = self._state.slot.shape[0] - 1
        key = self.shape(context, len(slots))
        _, bucket, longest = key
        padded = [*slots, *[spare] * (bucket - len(slots))]
        if key not in self._graphs:
            context = replace(context, max_context=longest)
            self._graphs[key] = _CapturedRound(context, self._state, bucket, spare)
        return self._graphs[key].replay(padded)


class _CapturedRound:
    """One captured round with its input and two alternating host buffers for its summary."""

    def __init__(self, context: RoundContext, state: GroupState, bucket: int, spare: int) -> None:
        self._kind = context.kind
        self._slots = torch.full((bucket,), spare, device=state.slot.device)
        self._graph, self._packed = capture(lambda: run_round(context, state, self._slots))
        self._host = [torch.empty_like(self._packed, device="cpu").pin_memory() for _ in range(2)]
        self._slots_host = [torch.empty(bucket, dtype=torch.int64).pin_memory() for _ in range(2)]
        self._turn = 0
        self._last: list[int] = []

    def replay(self, slots: list[int]) -> Flight:
        self._turn ^= 1
        if slots != self._last:
            self._slots_host[self._turn].copy_(torch.tensor(slots))
            self._slots.copy_(self._slots_host[self._turn], non_blocking=True)
            self._last = slots
        self._graph.replay()
        host = self._host[self._turn]
        host.copy_(self._packed, non_blocking=True)
        landed = torch.cuda.Event()
        landed.record()
        return Flight(self._kind, host, landed)


def capture(function: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Capture a function of device state as a CUDA graph; it runs a few times before, on idle input."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP_ROUNDS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Threads of NCCL look at their events meanwhile, which must not end the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = function()
    return graph, output
