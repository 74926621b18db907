"""Calling the served models over gRPC: plain Python values in, numpy arrays out.

    with TritonClient("127.0.0.1:8001") as client:
        for response in client.stream("smc", {"text_input": "The capital of France is", "max_tokens": 16, "stream": True}):
            print(text_of(response), end="")

Within the `with` block one gRPC stream serves call after call: opening and closing one takes longer than a whole answer's way
through the server. A stopped iteration cancels its request by ending that stream. Errors have a status of their own.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
from smc_adapter import protocol
from smc_adapter.contracts import CONTRACTS
from tritonclient.utils import InferenceServerException, deserialize_bytes_tensor, triton_to_np_dtype

from smc_engines.serving.grpc_tls import Trust, client_arguments
from smc_plugin.errors import SmcError

_NUMPY = {
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT64": np.uint64,
    "UINT8": np.uint8,
    "FP32": np.float32,
    "FP16": np.float16,
    "BOOL": np.bool_,
}
# A gRPC stream carries an error as a bare message. The server's own way to a status, the header triton_grpc_error, crashes
# it (2.51) when an error comes fast, so this asks the adapter to send code and message as outputs instead.
_ERROR_NAMES = ("error_code", "error_message")
ERROR_OUTPUTS = {"smc_error_outputs": True}
_STATUS = {
    protocol.INVALID_ARG: "INVALID_ARGUMENT",
    protocol.UNSUPPORTED: "UNIMPLEMENTED",
    protocol.DEADLINE: "DEADLINE_EXCEEDED",
}
_Arrived = queue.SimpleQueue[tuple[Any, InferenceServerException | None]]
KEEPALIVE = grpcclient.KeepAliveOptions(keepalive_time_ms=60_000)


class ServingError(SmcError):
    """The server refused or ended a request.

    Args:
        status: gRPC status name, for example UNAVAILABLE.
    """

    def __init__(self, message: str, status: str) -> None:
        super().__init__(message)
        self.status = status


def make_inputs(model: str, values: Mapping[str, Any]) -> list[grpcclient.InferInput]:
    """Turn values into input tensors of one row.

    Args:
        model: a served model; its contract gives the types.
        values: by input name: a scalar, a list, or an array that already has its batch dimension.
    Raises:
        ServingError: a value does not fit the input's type.
    """
    inputs = []
    for name, value in values.items():
        dtype = CONTRACTS[model].inputs[name].dtype
        try:
            array = value if isinstance(value, np.ndarray) else _one_row(dtype, value)
        except (OverflowError, ValueError) as error:  # also text with half of a surrogate pair
            raise ServingError(
                f"input {name} cannot be sent, expected {dtype}, got {value!r:.60} ({error}): change it",
                "INVALID_ARGUMENT",
            ) from None
        tensor = grpcclient.InferInput(name, list(array.shape), "BYTES" if dtype == "STRING" else dtype)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def _one_row(dtype: str, value: Any) -> np.ndarray:
    items = value if isinstance(value, (list, tuple)) else [value]
    if dtype == "STRING":
        return np.array([[item if isinstance(item, bytes) else str(item).encode() for item in items]], object)
    return np.array([items], _NUMPY[dtype])


def to_error(error: InferenceServerException) -> ServingError:
    """The project's error for one of tritonclient."""
    status = str(error.status() or "UNKNOWN").removeprefix("StatusCode.")
    return ServingError(error.message() or status, status)


def to_arrays(result: grpcclient.InferResult) -> dict[str, np.ndarray]:
    """A response's tensors by name.

    Raises:
        ServingError: the response is an error.
    """
    response = result.get_response()
    arrays = {}
    for output, data in zip(response.outputs, response.raw_output_contents, strict=True):  # type: ignore[union-attr]
        is_text = output.datatype == "BYTES"
        flat = deserialize_bytes_tensor(data) if is_text else np.frombuffer(data, triton_to_np_dtype(output.datatype))
        arrays[output.name] = flat.reshape(output.shape)
    if "error_code" in arrays:
        code, message = (str(arrays[name].item().decode()) for name in _ERROR_NAMES)
        raise ServingError(message, _STATUS.get(code) or code)
    return arrays


def is_final(result: grpcclient.InferResult) -> bool:
    """Whether this is the last response of its request."""
    return bool(result.get_response().parameters["triton_final_response"].bool_param)  # type: ignore[union-attr]


def text_of(response: Mapping[str, np.ndarray]) -> str:
    """The first text of a response; empty where it has none."""
    return response["text_output"].ravel()[0].decode() if "text_output" in response else ""


class TritonClient:
    """A connection to a served instance, for one request at a time; leave its context to close it.

    Outside a `with` block every call opens and closes a stream of its own: an open one has a thread, which would keep a
    program from ending.

    Args:
        address: host:port of its gRPC endpoint.
        trust: whom to trust, for an endpoint with TLS.
    """

    def __init__(self, address: str, trust: Trust | None = None) -> None:
        self._client = grpcclient.InferenceServerClient(address, keepalive_options=KEEPALIVE, **client_arguments(trust))
        self._keeps_stream = False
        self._idle: _Arrived | None = None  # what comes on a stream that is open and serves no call

    def __enter__(self) -> TritonClient:
        self._keeps_stream = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._keeps_stream, self._idle = False, None
        self._client.close()

    def _open(self) -> _Arrived:
        """A stream for one call: the one that the last call left, unless it broke meanwhile."""
        arrived, self._idle = self._idle, None
        if arrived is not None:
            if arrived.empty():
                return arrived
            self._cancel()
        opened: _Arrived = queue.SimpleQueue()
        self._client.start_stream(lambda result, error: opened.put((result, error)))
        return opened

    def _cancel(self) -> None:
        """End the stream and its requests.

        tritonclient (2.73) forgets the thread that waits for the stream's next request: it would stay for ever.
        """
        stream = self._client._stream
        self._client.stop_stream(cancel_requests=True)
        if stream is not None:
            stream._request_queue.put(None)

    def stream(
        self,
        model: str,
        values: Mapping[str, Any],
        *,
        request_id: str = "",
        parameters: Mapping[str, Any] | None = None,
        outputs: Sequence[str] = (),
        timeout_s: float | None = None,
        more_s: Callable[[], float] = lambda: 0.0,
    ) -> Generator[dict[str, np.ndarray], None, None]:
        """Run one request.

        Args:
            values: see make_inputs.
            parameters: request parameters, for example {"smc_timeout_ms": 5000}.
            outputs: names of those to get, which makes responses cheaper; empty is all.
            timeout_s: how long to wait for each response; None waits for ever.
            more_s: asked when that time is over: how many seconds more to wait; 0 gives up.
        Yields:
            the responses' tensors, in order. Leaving the iteration cancels the request.
        Raises:
            ServingError: the server refused or ended it, or nothing came in time.
        """
        inputs = make_inputs(model, values)
        arrived, client, ended = self._open(), self._client, False
        try:
            client.async_stream_infer(
                model,
                inputs,
                outputs=[grpcclient.InferRequestedOutput(name) for name in (*outputs, *_ERROR_NAMES)]
                if outputs
                else None,
                request_id=request_id,
                enable_empty_final_response=True,
                parameters={**ERROR_OUTPUTS, **(parameters or {})},
            )
            yield from _responses(arrived, timeout_s, more_s)
            ended = True
        except InferenceServerException as error:
            # A stream that broke while it was opened reports why through the callback.
            reported = None if arrived.empty() else arrived.get()[1]
            raise to_error(reported or error) from None
        finally:
            if not ended:
                self._cancel()
            elif self._keeps_stream:
                self._idle = arrived
            else:
                client.stop_stream()


def _responses(
    arrived: _Arrived, timeout_s: float | None, more_s: Callable[[], float]
) -> Iterator[dict[str, np.ndarray]]:
    while True:
        result, error = _next(arrived, timeout_s, more_s)
        if error is not None:
            raise to_error(error)
        arrays = to_arrays(result)
        if arrays:
            yield arrays
        if is_final(result):
            return


def _next(
    arrived: _Arrived, timeout_s: float | None, more_s: Callable[[], float]
) -> tuple[Any, InferenceServerException | None]:
    wait_s = timeout_s
    while True:
        try:
            return arrived.get(timeout=wait_s)
        except queue.Empty:
            wait_s = more_s()
        if wait_s <= 0:
            raise ServingError(
                f"no response came, expected one within {timeout_s} s: check the server", "DEADLINE_EXCEEDED"
            )
