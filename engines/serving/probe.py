"""Whether inference really works: a request through the server, a model's adapter and the executor, and back.

Readiness is not enough: after its stub was killed, a model stays "ready" while its streams hang. A probe travels the whole
way; the idle executor makes a token for it, a busy one answers with its next step, so that a full queue does not look dead.
"""

from __future__ import annotations

import http.client
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from smc_engines.serving.grpc_tls import Trust
from smc_engines.serving.triton_client import ServingError, TritonClient

NO_LISTENER = "nobody listens"
_INPUTS: dict[str, dict[str, Any]] = {
    "smc": {},
    "ensemble": {"text_input": "", "max_tokens": 1},
    "tensorrt_llm_bls": {"text_input": "", "max_tokens": 1},
    "tensorrt_llm": {"input_lengths": 1, "request_output_len": 1},
}


def probe(
    grpc_address: str,
    model: str,
    timeout_s: float,
    more_s: Callable[[], float] = lambda: 0.0,
    trust: Trust | None = None,
) -> str | None:
    """Probe one model.

    Args:
        trust: see TritonClient.
        more_s: see TritonClient.stream.
    Returns:
        None if it works, else what is wrong.
    """
    values = _INPUTS[model] or {"stream": np.ones((1, 1), np.bool_)}
    try:
        with TritonClient(grpc_address, trust) as client:
            # to its end: the server (2.51) loses a file descriptor to one in twenty clients that cancel and hang up at once
            if list(client.stream(model, values, parameters={"smc_probe": True}, timeout_s=timeout_s, more_s=more_s)):
                return None
    except ServingError as error:
        return f"{error.status}: {error}"
    return "no response"


def probe_front(host: str, port: int, secure: bool, timeout_s: float) -> str | None:
    """Probe the OpenAI front, which may be stopped although its process lives.

    Returns:
        None if it answers, else what is wrong: NO_LISTENER while it is being imported.
    """
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    trust: dict[str, Any] = (
        {"context": ssl._create_unverified_context()} if secure else {}
    )  # its certificate names the outside
    connection = kind(host, port, timeout=timeout_s, **trust)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except ConnectionRefusedError:
        return NO_LISTENER
    except (OSError, http.client.HTTPException) as error:
        return repr(error)
    finally:
        connection.close()
    return None if status == 200 else f"status {status}"


class Prober:
    """Runs probes in turn, for ever, in a thread of its own. What did not answer in its time is asked once more at once.

    Args:
        probes: by name, each called with timeout_s and when it began, and giving what is wrong, or None.
        interval_s: pause between two rounds of probes; timeout_s: how long a probe may take.
        on_result: called with (name, what is wrong or None, when the probe began on the monotonic clock).
    """

    def __init__(
        self,
        probes: Mapping[str, Callable[[float, float], str | None]],
        interval_s: float,
        timeout_s: float,
        on_result: Callable[[str, str | None, float], None],
    ) -> None:
        self._probes = dict(probes)
        self._interval_s, self._timeout_s = interval_s, timeout_s
        self._on_result = on_result
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prober", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop; a probe under way is waited for."""
        self._closing.set()
        self._thread.join(self._timeout_s + 5)

    def _run(self) -> None:
        while not self._closing.wait(self._interval_s):
            for name, run in self._probes.items():
                if self._closing.is_set():
                    return
                if self._timed_out(name, run) and not self._closing.is_set():
                    self._timed_out(name, run)

    def _timed_out(self, name: str, run: Callable[[float, float], str | None]) -> bool:
        """Run one probe. An error that comes at once may be of something that starts, so it waits for the next round."""
        started = time.monotonic()
        wrong = run(self._timeout_s, started)
        self._on_result(name, wrong, started)
        return wrong is not None and time.monotonic() - started >= self._timeout_s
