"""Who runs next: a bounded queue, slots, and batches of one kind.

Requests start in order of (priority, arrival). The first that does not fit holds back those behind it, so that a large
request is never starved by small ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from smc_engines.request import Phase, Request
from smc_engines.rounds import RoundKind
from smc_plugin.errors import QueueFullError, RequestError


class Scheduler:
    """The queue and the running requests.

    Args:
        max_groups: slots.
        max_queue: requests at most that wait for another to end; those that come to free slots are not counted.
    """

    def __init__(self, max_groups: int, max_queue: int) -> None:
        self._max_queue = max_queue
        self._waiting: list[tuple[int, int, Request]] = []
        self._free_slots = list(range(max_groups))
        self.requests: dict[str, Request] = {}

    @property
    def num_waiting(self) -> int:
        """Requests not yet admitted."""
        return len(self._waiting)

    @property
    def running(self) -> list[Request]:
        """Requests that hold a slot, in order of admission."""
        return [request for request in self.requests.values() if request.phase is not Phase.WAITING]

    def enqueue(self, request: Request, again: bool = False) -> None:
        """Accept a request.

        Args:
            again: it has been accepted before and is not refused now.
        Raises:
            RequestError: its id is in use.
            QueueFullError: too many wait already.
        """
        if request.request_id in self.requests:
            raise RequestError(f"request id {request.request_id!r} is in use, expected a new one: choose another")
        held_up = len(self._waiting) - len(self._free_slots)
        if held_up >= self._max_queue and not again:
            raise QueueFullError(
                f"the queue is full, {held_up} requests wait and at most {self._max_queue} may: try again later"
            )
        self.requests[request.request_id] = request
        heapq.heappush(self._waiting, (request.priority, request.arrival, request))

    def admit(self, fits: Callable[[Request], bool]) -> list[Request]:
        """Move waiting requests to slots, in order, while they fit.

        Args:
            fits: promises a request's pages, or answers False.
        """
        admitted = []
        while self._waiting and self._free_slots and fits(self._waiting[0][2]):
            request = heapq.heappop(self._waiting)[2]
            request.slot = self._free_slots.pop(0)
            request.phase = Phase.PREFILL
            admitted.append(request)
        return admitted

    def remove(self, request: Request) -> None:
        """Forget a request and free its slot."""
        del self.requests[request.request_id]
        if request.phase is Phase.WAITING:
            self._waiting = [entry for entry in self._waiting if entry[2] is not request]
            heapq.heapify(self._waiting)
        else:
            self._free_slots.append(request.slot)

    def prefilling(self) -> list[Request]:
        """Requests whose prompt is not done, in order of admission."""
        return [request for request in self.running if request.phase is Phase.PREFILL]

    def rounds(self) -> dict[RoundKind, list[Request]]:
        """Decoding requests, by the kind of round they need."""
        batches: dict[RoundKind, list[Request]] = {}
        for request in self.running:
            if request.phase is Phase.DECODE:
                batches.setdefault(request.kind, []).append(request)
        return batches
