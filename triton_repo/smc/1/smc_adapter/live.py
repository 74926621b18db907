"""A request on its way back to the client: what has arrived from the executor and what has been sent.

Outputs wait in a mailbox and are merged while they wait, so that a slow receiver costs at most one answer's memory and
never holds up another request. One thread empties all mailboxes, which keeps the order.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from smc_adapter import protocol
from smc_adapter.answers import Answer
from smc_adapter.contracts import Parsed

FINAL = 1  # the server's flag on a request's last response

# Response senders are not safe to use from several threads, not even those of different requests: the server (2.51)
# crashed within seconds under 32 concurrent streams. Whoever calls one holds this.
_LOCK = threading.Lock()


class Sender:
    """The server's response sender of one request.

    Args:
        sender: the server's.
        error_outputs: the client wants errors as the outputs error_code and error_message.
    """

    def __init__(self, sender: Any, error_outputs: bool) -> None:
        self._sender = sender
        self.error_outputs = error_outputs
        self._ended = False

    def send(self, response: Any, final: bool) -> None:
        """Send a response (None: only the final flag); after the final one nothing is sent any more."""
        with _LOCK:
            if not self._ended:
                self._ended = final
                flags = FINAL if final else 0
                self._sender.send(response, flags=flags) if response is not None else self._sender.send(flags=flags)

    def is_cancelled(self) -> bool:
        """Ask the server whether the client gave the request up.

        Never after the final response: the server has freed the request by then, and being asked would crash it.
        """
        with _LOCK:
            return not self._ended and self._sender.is_cancelled()


class LiveRequest:
    """One client request and its sub-requests.

    Args:
        request_id: the client's.
        sub_ids: the executor's id of each sub-request.
    """

    def __init__(self, request_id: str, sender: Sender, parsed: Parsed, sub_ids: Sequence[str]) -> None:
        self.request_id = request_id
        self.sender = sender
        self.parsed = parsed
        self.sub_ids = list(sub_ids)
        self.answers = [Answer(sub) for sub in parsed.subs]
        self.closed = False
        self.cancelled = False
        self._lock = threading.Lock()
        self._mail: dict[int, dict[str, Any]] = {}

    @property
    def finished(self) -> bool:
        """Whether every answer is complete."""
        return all(answer.finish is not None for answer in self.answers)

    def put(self, index: int, message: dict[str, Any]) -> bool:
        """Leave an output of sub-request `index`; returns whether the mailbox was empty, and its owner must be told."""
        with self._lock:
            empty, waiting = not self._mail, self._mail.get(index)
            self._mail[index] = message if waiting is None else protocol.merge(waiting, message)
        return empty

    def take(self) -> dict[int, dict[str, Any]]:
        """Empty the mailbox."""
        with self._lock:
            mail, self._mail = self._mail, {}
        return mail
