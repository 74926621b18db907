"""What waits to be sent to each adapter: at most one merged output a request.

An adapter that does not read makes its own messages wait and be merged; it holds up nobody else, and its memory is bounded
by the answers it asked for.

    the outputs "Hel" and "lo" of one request wait as one output "Hello"; two reports wait as the later one
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import zmq
from smc_adapter import protocol


class Outbox:
    """Messages for the clients of a ROUTER socket, by the client's identity."""

    def __init__(self, socket: zmq.Socket) -> None:
        self._socket = socket
        self._waiting: dict[bytes, dict[str, dict[str, Any]]] = {}

    @property
    def empty(self) -> bool:
        """Whether everything was sent."""
        return not any(self._waiting.values())

    def put(self, identity: bytes, message: dict[str, Any]) -> None:
        """Queue a message with its `op`; outputs of one request are merged, other messages replace an equal one."""
        queue = self._waiting.setdefault(identity, {})
        key = f"{message['op']} {message.get('id', 'live' in message)}"
        earlier = queue.get(key)
        queue[key] = protocol.merge(earlier, message) if earlier and message["op"] == "output" else message

    def drop(self, identity: bytes) -> None:
        """Forget a client."""
        self._waiting.pop(identity, None)

    def flush(self) -> Iterator[bytes]:
        """Send what can be sent without waiting; yields the identity of each client that is gone."""
        for identity, queue in list(self._waiting.items()):
            if not queue:
                continue
            try:
                frame = protocol.encode("batch", messages=list(queue.values()))
                self._socket.send_multipart([identity, frame], zmq.NOBLOCK)
                queue.clear()
            except zmq.Again:
                continue  # this client does not read; its messages wait
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                self.drop(identity)
                yield identity
