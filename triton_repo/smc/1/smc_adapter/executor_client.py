"""The adapter's line to the executor: one ZeroMQ DEALER socket, read by a thread of its own, which also acts on what it read.

Commands are sent by whoever has one, under a lock, because a hand-over to another thread would cost a request more than the
sending does. A ZeroMQ socket may go from thread to thread like that; only its file descriptor needs care, which tells of news
once and not for as long as there are some.

The operating system says at once when the executor is gone (the socket's monitor reports the disconnection), so requests
in flight fail within milliseconds and new ones are refused until the executor is back; the socket reconnects by itself.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import zmq
from zmq.utils.monitor import parse_monitor_message

from smc_adapter import protocol

RECONNECT_MS = 50


class ExecutorClient:
    """Sends commands, hands on messages.

    Args:
        address: of the executor's ROUTER socket, for example ipc:///tmp/smc-1/executor.
        model: the model's name, so that the executor can tell its clients apart.
        on_message: called in the client's thread with every message.
        on_disconnect: called in the client's thread when the executor is gone.
        on_quiet: called in the client's thread when nothing is left to read, for a piece of other work; returns whether there
            was one. Reading goes before it, and no other thread has to be woken for it.
    """

    def __init__(
        self,
        address: str,
        model: str,
        on_message: Callable[[dict[str, Any]], None],
        on_disconnect: Callable[[], None],
        on_quiet: Callable[[], bool] = lambda: False,
    ) -> None:
        self._on_message, self._on_disconnect, self._on_quiet = on_message, on_disconnect, on_quiet
        self._hello = protocol.encode("hello", model=model, pid=os.getpid())
        self._lock = threading.Lock()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._closing = False
        self.connected = False
        self.connected_at = 0.0  # on the monotonic clock
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.DEALER)
        # IMMEDIATE: nothing is queued for an executor that is not there; a later one must not get old commands.
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.IMMEDIATE, 1),
            (zmq.RECONNECT_IVL, RECONNECT_MS),
            (zmq.SNDHWM, 0),
            (zmq.RCVHWM, 0),
        ):
            self._socket.setsockopt(option, value)
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._socket.connect(address)
        self._thread = threading.Thread(target=self._run, name="executor-client", daemon=True)
        self._thread.start()

    def send(self, frame: bytes) -> None:
        """Send a command; any thread may call this. Without an executor it is dropped: on_disconnect answers its request."""
        with self._lock:
            with contextlib.suppress(zmq.Again):
                self._socket.send(frame, zmq.NOBLOCK)
            unread = self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN  # sending may have taken the reader's signal
        if unread:
            self.wake()

    def close(self) -> None:
        """Stop the thread and close the sockets."""
        self._closing = True
        self.wake()
        self._thread.join(timeout=5)

    def wake(self) -> None:
        """Make the client's thread look for something to read or to do; any thread may call this."""
        with contextlib.suppress(BlockingIOError):
            self._wake_in.send(b"!")

    def _run(self) -> None:
        poller = zmq.Poller()
        for readable in (self._socket.getsockopt(zmq.FD), self._monitor, self._wake_out):
            poller.register(readable, zmq.POLLIN)
        while not self._closing:
            readable = dict(poller.poll())
            if self._wake_out.fileno() in readable:
                self._wake_out.recv(4096)
            if self._monitor in readable:
                self._read_monitor()
            self._receive()
            while self._on_quiet() and not self._closing:
                self._receive()
        with self._lock:
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._socket.close(0)
        self._context.term()

    def _read_monitor(self) -> None:
        while self._monitor.poll(0):
            event = parse_monitor_message(self._monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.send(self._hello)
                self.connected_at = time.monotonic()
                self.connected = True
            elif self.connected:
                self.connected = False
                self._receive()
                self._on_disconnect()

    def _receive(self) -> None:
        while True:
            try:
                with self._lock:
                    frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            for message in protocol.decode(frame)["messages"]:
                self._on_message(message)
                if message["op"] == "goodbye":  # everything before it was read: the executor may leave
                    self.send(protocol.encode("goodbye"))
