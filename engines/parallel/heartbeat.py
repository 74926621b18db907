"""Notices ranks that die or hang, so that nobody waits for ever for a collective.

A thread of every rank exchanges a beat with rank 0 over a socket and looks at its own main thread. It ends the process when a
rank's line closes without a goodbye (it died), when one is silent for SILENCE_S (it is stopped), or when a step outlasts
its limit (a collective waits for a rank that will not come). mpirun then ends what is left. Example: kill -STOP on rank 1 of 2
silences it; rank 0 says so and exits with status 1 five seconds later.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection, Listener, wait
from typing import Any

SILENCE_S = 5.0
_BEAT_S = 0.5
_BEAT, _GOODBYE = b"beat", b"goodbye"


@contextmanager
def deadline(rank: int | None, limit_s: float, what: str) -> Iterator[None]:
    """End the process if what is inside takes longer: it waits for ranks, at a time when no heartbeat watches."""
    reason = f"{what} within {limit_s:g} s, expected all of them to: see their messages"
    timer = threading.Timer(limit_s, _end_process, (rank, reason))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _end_process(rank: int | None, reason: str) -> None:
    # Not print: the main thread may hang within it, holding its lock.
    os.write(2, f"rank {rank}: {reason}; this rank ends too\n".encode())
    os._exit(1)


class Heartbeat:
    """One rank's end; starts at once.

    Args:
        rank: this rank.
        size: how many there are.
        exchange: a small value of every rank, in order (see Ranks.gather_objects); called twice.
        one_host: whether all ranks are on this host.
    """

    def __init__(self, rank: int, size: int, exchange: Callable[[Any], list[Any]], one_host: bool) -> None:
        self._rank = rank
        self._limit: tuple[float, float] | None = None
        self._closing = False
        self._lines = _connect(rank, size, exchange, "127.0.0.1" if one_host else socket.gethostname())
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def watch(self, limit_s: float | None) -> None:
        """The main thread works on something that takes limit_s at most from now on; None ends the watch."""
        self._limit = None if limit_s is None else (time.monotonic() + limit_s, limit_s)

    def close(self) -> None:
        """Say goodbye; the others will not miss this rank."""
        self._closing = True
        self._thread.join(2 * _BEAT_S)
        for line in self._lines:
            try:
                line.send_bytes(_GOODBYE)
            except OSError:
                continue
            finally:
                line.close()

    def _run(self) -> None:
        try:
            self._watch_over()
        except Exception as error:  # a watch that has ended must not look like one that sees nothing
            self._end(f"the watch over the ranks failed ({type(error).__name__}: {error}), expected it to go on")

    def _watch_over(self) -> None:
        heard = dict.fromkeys(self._lines, time.monotonic())
        while not self._closing:
            self._send()
            for ready in wait(list(heard), _BEAT_S):
                self._receive(ready, heard)  # type: ignore[arg-type]
            now = time.monotonic()
            for line, when in heard.items():
                if now - when > SILENCE_S:
                    self._end(
                        f"rank {self._lines[line]} has been silent for {SILENCE_S:g} s, expected a beat: it hangs"
                    )
            limit = self._limit
            if limit is not None and now > limit[0]:
                self._end(f"a step has taken more than {limit[1]:g} s, expected the other ranks to join it: one hangs")
            time.sleep(_BEAT_S / 5)  # a rank that answers at once must not make this loop spin

    def _send(self) -> None:
        for line in self._lines:
            try:
                line.send_bytes(_BEAT)
            except OSError:
                continue  # reading it says what is wrong

    def _receive(self, line: Connection, heard: dict[Connection, float]) -> None:
        try:
            message = line.recv_bytes()
        except (EOFError, OSError):
            message = b""
        if message == _BEAT:
            heard[line] = time.monotonic()
        elif message == _GOODBYE:
            del heard[line]
        elif not self._closing:
            self._end(f"rank {self._lines[line]} is gone, expected it to run: see its messages above")

    def _end(self, reason: str) -> None:
        if self._closing:
            return
        _end_process(self._rank, reason)


def _connect(rank: int, size: int, exchange: Callable[[Any], list[Any]], host: str) -> dict[Connection, int]:
    """A line from rank 0 to each other rank: line to the rank at its end."""
    if rank == 0:
        key = secrets.token_bytes(16)
        with Listener((host, 0), backlog=size, authkey=key) as listener:
            exchange((listener.address, key))
            lines = {}
            for _ in range(size - 1):
                line = listener.accept()
                lines[line] = line.recv()
            exchange(None)
            return lines
    address, key = exchange(None)[0]
    line = Client(address, authkey=key)
    line.send(rank)
    exchange(None)
    return {line: 0}
