"""The model behind every model.py: requests of Triton Inference Server to the executor, its outputs back as responses.

Owns the live requests of one model. `execute` checks a request, submits it and returns at once (the models are decoupled);
the executor client's thread fills mailboxes and, whenever it has read everything, sends a response; a poller notices
cancelled requests.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from smc_adapter import answers, protocol
from smc_adapter.contracts import CONTRACTS, Parsed
from smc_adapter.executor_client import ExecutorClient
from smc_adapter.fields import InputError, UnsupportedError
from smc_adapter.live import LiveRequest, Sender
from smc_adapter.metrics import ExecutorMetrics, TokenMetrics

ADDRESS_VARIABLE = "SMC_EXECUTOR_ADDRESS"
MIN_POLL_S = 0.05
# The poller asks the server about each request (0.2 ms) and spends at most this share of its time on it.
POLL_SHARE = 0.05
# The server has no code of its own for a deadline. pb_utils gets TritonError only after these modules are imported.
_CODES = {
    protocol.INVALID_ARG: "INVALID_ARG",
    protocol.UNAVAILABLE: "UNAVAILABLE",
    protocol.DEADLINE: "CANCELLED",
    protocol.UNSUPPORTED: "UNSUPPORTED",
}


class SmcModel:
    """What the Python backend calls; a model.py subclasses it as TritonPythonModel."""

    def initialize(self, args: dict[str, str]) -> None:
        """Connect to the executor.

        Args:
            args: from the server; model_name chooses the contract.
        Raises:
            TritonModelException: numpy 2 would corrupt tensors, or the executor's address is not set.
        """
        self._name = args["model_name"]
        if int(np.__version__.split(".")[0]) >= 2:
            raise pb_utils.TritonModelException(
                f"model {self._name} cannot load: the Python backend needs numpy below 2, got {np.__version__}: install "
                '"numpy<2" in the environment of the Python backend'
            )
        address = os.environ.get(ADDRESS_VARIABLE)
        if not address:
            raise pb_utils.TritonModelException(
                f"model {self._name} cannot load: {ADDRESS_VARIABLE} must be the executor's address, got nothing: start the "
                "server with smc-serve, or set it to the address the executor prints"
            )
        self._contract = CONTRACTS[self._name]
        self._page_size = 1
        self._numbers = itertools.count()
        self._live: dict[str, tuple[LiveRequest, int]] = {}
        self._probes: dict[str, Any] = {}
        self._ready: deque[LiveRequest] = deque()
        self._closing = threading.Event()
        self._tokens = TokenMetrics(self._name)
        self._metrics = ExecutorMetrics(self._name)
        self._client = ExecutorClient(address, self._name, self._on_message, self._on_disconnect, self._deliver)
        self._poller = threading.Thread(target=self._poll_cancelled, name="cancellations", daemon=True)
        self._poller.start()

    def execute(self, requests: list[Any]) -> None:
        """Take requests; their responses follow through their senders."""
        for request in requests:
            parameters = json.loads(request.parameters() or "{}")
            outputs = request.requested_output_names()
            # the server drops what the client did not name, and an error must not be dropped
            as_outputs = bool(parameters.get("smc_error_outputs")) and (not outputs or "error_code" in outputs)
            sender = Sender(request.get_response_sender(), as_outputs)
            try:
                self._start(request, parameters, outputs, sender)
            except UnsupportedError as error:
                self._refuse(request, sender, protocol.UNSUPPORTED, str(error))
            except InputError as error:
                self._refuse(request, sender, protocol.INVALID_ARG, str(error))
            except Exception as error:  # one request's trouble must not become that of the others in the batch
                pb_utils.Logger.log_error(f"model {self._name}: cannot start a request: {error!r}")
                message = (
                    f"the adapter failed, expected it to start the request, got {type(error).__name__}: report this"
                )
                self._refuse(request, sender, protocol.INTERNAL, message)

    def finalize(self) -> None:
        """End what is left and close."""
        self._closing.set()
        self._poller.join(timeout=5)
        self._client.close()
        self._on_disconnect()
        while self._deliver():
            pass

    def _start(self, request: Any, parameters: dict[str, Any], outputs: Sequence[str], sender: Sender) -> None:
        if not self._client.connected:
            _fail(sender, protocol.UNAVAILABLE, _GONE)
            return
        if parameters.get("smc_probe"):
            self._probe(sender)
            return
        if request.timeout() > 0:
            parameters.setdefault("smc_timeout_ms", max(request.timeout() // 1000, 1))
        arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        parsed = self._contract.parse(arrays, parameters, outputs)
        if parsed.stop:
            self._stop(request.request_id(), sender)
        else:
            self._submit(request.request_id(), sender, parsed)

    def _refuse(self, request: Any, sender: Sender, code: str, message: str) -> None:
        """Answer with an error, and tell the executor, which counts and logs for all models.

        The message stays out of what is logged: it may quote the prompt.
        """
        _fail(sender, code, message)
        self._client.send(protocol.encode("refused", tag=request.request_id(), code=code))

    def _new_id(self) -> str:
        return f"{self._name}-{os.getpid()}-{next(self._numbers)}"

    def _probe(self, sender: Sender) -> None:
        probe_id = self._new_id()
        self._probes[probe_id] = sender
        self._client.send(protocol.encode("probe", id=probe_id))
        if not self._client.connected and self._probes.pop(probe_id, None) is not None:
            _fail(sender, protocol.UNAVAILABLE, _GONE)

    def _stop(self, request_id: str, sender: Sender) -> None:
        if not request_id:
            raise InputError("stop needs the request id of the request to end, got none: send the same request id")
        for live in {id(live): live for live, _ in list(self._live.values())}.values():
            if live.request_id == request_id:
                self._cancel(live)
        sender.send(None, final=True)

    def _submit(self, request_id: str, sender: Sender, parsed: Parsed) -> None:
        live = LiveRequest(request_id, sender, parsed, [self._new_id() for _ in parsed.subs])
        for index, sub_id in enumerate(live.sub_ids):
            self._live[sub_id] = (live, index)
        for sub_id, sub in zip(live.sub_ids, parsed.subs):  # noqa: B905 (the server's Python may be 3.9)
            self._client.send(
                protocol.encode(
                    "submit",
                    id=sub_id,
                    tag=request_id,
                    prompt=sub.prompt,
                    params=sub.params,
                    stop_sequences=sub.stop_sequences,
                    priority=parsed.priority,
                    timeout_ms=parsed.timeout_ms,
                )
            )
        if not self._client.connected:  # it went away meanwhile; nobody else will answer
            self._fail_live(live)
            self._client.wake()

    def _on_message(self, message: dict[str, Any]) -> None:
        if message["op"] == "output":
            entry = self._live.get(message["id"])
            if entry is None:  # its client has had an error already
                if not message.get("finish"):
                    self._client.send(protocol.encode("cancel", id=message["id"]))
            elif entry[0].put(entry[1], message):
                self._ready.append(entry[0])
        elif message["op"] == "probed":
            sender = self._probes.pop(message["id"], None)
            if sender is not None:
                tensor = pb_utils.Tensor("batch_index", np.zeros((1, 1), np.int32))
                sender.send(pb_utils.InferenceResponse([tensor]), final=True)
        elif message["op"] == "hello":
            self._page_size = message["page_size"]
        elif message["op"] == "stats":
            self._metrics.update(message)

    def _on_disconnect(self) -> None:
        for sender in [self._probes.pop(probe_id) for probe_id in list(self._probes)]:
            _fail(sender, protocol.UNAVAILABLE, _GONE)
        for live, _ in list(self._live.values()):
            self._fail_live(live)

    def _fail_live(self, live: LiveRequest) -> None:
        error = {"code": protocol.UNAVAILABLE, "message": _GONE}
        if live.put(0, {"ids": [], "text": "", "finish": "error", "error": error}):
            self._ready.append(live)

    def _deliver(self) -> bool:
        """Send what waits for one request; returns whether there was one."""
        if not self._ready:
            return False
        live = self._ready.popleft()
        for index, message in live.take().items():
            if live.closed:
                continue
            try:
                self._send(live, index, message)
            except Exception as error:
                pb_utils.Logger.log_error(f"model {self._name}: cannot send a response: {error!r}")
                self._close(live)
        return True

    def _send(self, live: LiveRequest, index: int, message: dict[str, Any]) -> None:
        if message.get("error"):
            self._cancel(live)
            self._close(live)
            live.sender.send(_error(live.sender, message["error"]["code"], message["error"]["message"]), final=True)
            return
        piece = live.answers[index].add(message)
        last = live.finished
        tensors: dict[str, np.ndarray] | None = None
        if live.parsed.stream and (piece.ids or piece.text or piece.answer.finish):
            tensors = answers.streamed(self._contract, live.parsed, piece, self._page_size)
        elif last and not live.parsed.stream:
            tensors = answers.whole(self._contract, live.parsed, live.answers, self._page_size)
        if piece.answer.finish:
            self._live.pop(live.sub_ids[index], None)
        if last:
            self._close(live)
        if tensors is not None:
            response = pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in tensors.items()])
            live.sender.send(response, final=last)
        if piece.answer.finish:  # after the answer: every figure is a message to the server
            self._tokens.observe(piece.answer.info)

    def _cancel(self, live: LiveRequest) -> None:
        live.cancelled = True
        for sub_id, answer in zip(live.sub_ids, live.answers):  # noqa: B905
            if answer.finish is None:
                self._client.send(protocol.encode("cancel", id=sub_id))

    def _close(self, live: LiveRequest) -> None:
        live.closed = True
        for sub_id in live.sub_ids:
            self._live.pop(sub_id, None)

    def _poll_cancelled(self) -> None:
        pause = MIN_POLL_S
        while not self._closing.wait(pause):
            start = time.perf_counter()
            for live in {id(live): live for live, _ in list(self._live.values())}.values():
                if not live.closed and not live.cancelled and live.sender.is_cancelled():
                    self._cancel(live)
            pause = max(MIN_POLL_S, (time.perf_counter() - start) / POLL_SHARE)


_GONE = "the executor is not there, expected it to answer: it is being restarted, try again in a few seconds"


def _error(sender: Sender, code: str, message: str) -> Any:
    """The response that ends a request with an error, as tensors where the client asked for that."""
    if sender.error_outputs:
        values = (("error_code", code), ("error_message", message))
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, np.array([[text.encode()]], object)) for name, text in values]
        )
    error = pb_utils.TritonError(message, getattr(pb_utils.TritonError, _CODES.get(code, "INTERNAL")))
    return pb_utils.InferenceResponse(error=error)


def _fail(sender: Sender, code: str, message: str) -> None:
    with contextlib.suppress(Exception):  # the request may be gone with its client
        sender.send(_error(sender, code, message), final=True)
