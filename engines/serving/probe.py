"""Whether inference really works: a request through the server, a model's adapter and the executor, and back.

Readiness is not enough: after its stub was killed, a model stays "ready" while its streams hang. A probe travels the whole
way; the idle executor makes a token for it, a busy one answers with its next step, so that a full queue does not look dead.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from smc_engines.serving.triton_client import ServingError, TritonClient

_INPUTS: dict[str, dict[str, Any]] = {
    "smc": {},
    "ensemble": {"text_input": "", "max_tokens": 1},
    "tensorrt_llm_bls": {"text_input": "", "max_tokens": 1},
    "tensorrt_llm": {"input_lengths": 1, "request_output_len": 1},
}


def probe(grpc_address: str, model: str, timeout_s: float) -> str | None:
    """Probe one model.

    Returns:
        None if it works, else what is wrong.
    """
    values = _INPUTS[model] or {"stream": np.ones((1, 1), np.bool_)}
    try:
        with TritonClient(grpc_address) as client:
            for _ in client.stream(model, values, parameters={"smc_probe": True}, timeout_s=timeout_s):
                return None
    except ServingError as error:
        return f"{error.status}: {error}"
    return "no response"


class Prober:
    """Probes every model in turn, for ever, in a thread of its own.

    Args:
        grpc_address: host:port.
        models: their names.
        interval_s: pause between two rounds of probes; timeout_s: how long a probe may take.
        on_result: called with (model, what is wrong or None, when the probe began on the monotonic clock).
    """

    def __init__(
        self,
        grpc_address: str,
        models: tuple[str, ...],
        interval_s: float,
        timeout_s: float,
        on_result: Callable[[str, str | None, float], None],
    ) -> None:
        self._address, self._models = grpc_address, models
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
            for model in self._models:
                if self._closing.is_set():
                    return
                started = time.monotonic()
                self._on_result(model, probe(self._address, model, self._timeout_s), started)
