"""Structured logs: one JSON object a line on standard error, with the request id where there is one.

{"time": "2026-03-01T12:00:00.123Z", "level": "info", "part": "executor", "event": "finished", "id": "smc-71-1", ...}
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from datetime import UTC, datetime
from typing import Any

_LOCK = threading.Lock()


class Log:
    """Writes events of one part of the service."""

    def __init__(self, part: str) -> None:
        self._part = part

    def info(self, event: str, **fields: Any) -> None:
        """Something happened as it should."""
        self._write("info", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Something went wrong."""
        self._write("error", event, fields)

    def _write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        moment = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = json.dumps({"time": moment, "level": level, "part": self._part, "event": event, **fields}, default=str)
        with _LOCK, contextlib.suppress(OSError):  # on a full disk a line is lost, and not the service
            print(line, file=sys.stderr, flush=True)
