"""The supervisor's own line to the executor: its report every second, details on request, and the order to drain."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

from smc_adapter import protocol
from smc_adapter.executor_client import ExecutorClient

MODEL = "supervisor"
MAX_REPORTS = 16


class ControlLine:
    """Keeps the executor's latest report.

    Args:
        address: the executor's.
    """

    def __init__(self, address: str) -> None:
        self._changed = threading.Condition()
        self._report: dict[str, Any] = {}
        self._detailed: dict[str, Any] = {}
        self._heard_at = time.monotonic()
        self._turns: deque[tuple[float, int]] = deque(maxlen=MAX_REPORTS)
        self._answers = {False: 0, True: 0}
        self._client = ExecutorClient(address, MODEL, self._on_message, self._on_disconnect)

    @property
    def connected(self) -> bool:
        """Whether an executor is there."""
        return self._client.connected

    @property
    def silence_s(self) -> float:
        """Seconds since the executor last said something or, if it has not yet, was found; 0 while there is none."""
        if not self._client.connected:
            return 0.0
        return time.monotonic() - max(self._heard_at, self._client.connected_at)

    def excuse_silence(self) -> None:
        """Count silence from now on: this process itself was not listening."""
        with self._changed:
            self._heard_at = time.monotonic()

    def turns_since(self, moment: float) -> int:
        """Turns that the executor has surely begun and ended since a moment of the monotonic clock.

        They are counted from the first report after it, so that none of them began earlier.
        """
        with self._changed:
            turns = [turn for heard, turn in self._turns if heard > moment]
            return turns[-1] - turns[0] if turns else 0

    @property
    def report(self) -> dict[str, Any]:
        """The latest report; empty before the first."""
        with self._changed:
            return self._report

    def ask(self, timeout_s: float, detail: bool = False) -> dict[str, Any] | None:
        """Ask for a report now.

        Args:
            detail: with every live request.
        Returns:
            the report, or None if none came in time.
        """
        with self._changed:
            before = self._answers[detail]
            self._client.send(protocol.encode("stats", detail=detail))
            came = self._changed.wait_for(lambda: self._answers[detail] > before, timeout_s)
            return (self._detailed if detail else self._report) if came else None

    def drain(self) -> None:
        """Order the executor to finish what runs and leave."""
        self._client.send(protocol.encode("drain"))

    def close(self) -> None:
        """Hang up."""
        self._client.close()

    def _on_message(self, message: dict[str, Any]) -> None:
        with self._changed:
            self._heard_at = time.monotonic()
            if message["op"] == "stats":
                if not self._turns or self._turns[-1][1] != message["turns"]:  # several may be asked for in one turn
                    self._turns.append((self._heard_at, message["turns"]))
                detail = "live" in message
                if detail:
                    self._detailed = message
                else:
                    self._report = message
                self._answers[detail] += 1
                self._changed.notify_all()

    def _on_disconnect(self) -> None:
        with self._changed:
            self._heard_at = time.monotonic()
            self._report = {}
            self._turns.clear()
            self._changed.notify_all()
