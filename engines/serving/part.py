"""A part of a served engine: a process that is started, perhaps again, and a count of its starts."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from subprocess import Popen

CRASH_LIMIT, CRASH_WINDOW_S = 5, 60.0


@dataclass
class Part:
    """A supervised process.

    Args:
        start: starts it.
        starts: when it was started, on the monotonic clock.
        answered: whether it has answered since.
    """

    name: str
    start: Callable[[], Popen[bytes]]
    process: Popen[bytes] | None = None
    starts: deque[float] = field(default_factory=lambda: deque(maxlen=CRASH_LIMIT + 1))
    answered: bool = False

    def launch(self) -> Popen[bytes]:
        """Start it (again)."""
        self.starts.append(time.monotonic())
        self.answered = False
        self.process = self.start()
        return self.process

    @property
    def crashing(self) -> bool:
        """Whether it, having ended, was started too often of late."""
        return len(self.starts) > CRASH_LIMIT and time.monotonic() - self.starts[0] < CRASH_WINDOW_S
