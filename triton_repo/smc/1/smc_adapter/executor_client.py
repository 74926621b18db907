"""The adapter's line to the executor: one thread, one ZeroMQ DEALER socket.

The operating system says at once when the executor is gone (the socket's monitor reports the disconnection), so requests
in flight fail within milliseconds and new ones are refused until the executor is back; the socket reconnects by itself.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
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
    """

    def __init__(
        self,
        address: str,
        model: str,
        on_message: Callable[[dict[str, Any]], None],
        on_disconnect: Callable[[], None],
    ) -> None:
        self._on_message, self._on_disconnect = on_message, on_disconnect
        self._hello = protocol.encode("hello", model=model, pid=os.getpid())
        self._commands: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        self._wake_out.setblocking(False)
        self._closing = False
        self.connected = False
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
        """Queue a command; any thread may call this."""
        self._commands.put(frame)
        with contextlib.suppress(BlockingIOError):
            self._wake_in.send(b"!")

    def close(self) -> None:
        """Stop the thread and close the sockets."""
        self._closing = True
        self.send(b"")
        self._thread.join(timeout=5)

    def _run(self) -> None:
        poller = zmq.Poller()
        for readable in (self._socket, self._monitor, self._wake_out):
            poller.register(readable, zmq.POLLIN)
        while not self._closing:
            poller.poll()
            self._read_monitor()
            self._receive()
            self._send_commands()
        self._socket.disable_monitor()
        self._monitor.close(0)
        self._socket.close(0)
        self._context.term()

    def _read_monitor(self) -> None:
        while self._monitor.poll(0):
            event = parse_monitor_message(self._monitor.recv_multipart())["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.connected = True
                self._transmit(self._hello)
            elif self.connected:
                self.connected = False
                self._receive()
                self._on_disconnect()

    def _receive(self) -> None:
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            message = protocol.decode(frame)
            self._on_message(message)
            if message["op"] == "goodbye":  # everything before it was read: the executor may leave
                self._transmit(protocol.encode("goodbye"))

    def _send_commands(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_out.recv(4096)
        while True:
            try:
                frame = self._commands.get_nowait()
            except queue.Empty:
                return
            if frame:
                self._transmit(frame)

    def _transmit(self, frame: bytes) -> None:
        # A command that cannot be sent belongs to an executor that is gone; on_disconnect answers its request.
        with contextlib.suppress(zmq.Again):
            self._socket.send(frame, zmq.NOBLOCK)
