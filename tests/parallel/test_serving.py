"""smc-serve with two ranks: it serves, survives the loss of a rank, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from smc_engines.serving.triton_client import ServingError
from tests.parallel.conftest import is_alive, ranks_of, wait_until
from tests.serving.service import STREAMING, Service

pytest.importorskip("openai", reason="needs requirements/serve-test.txt: run make serve-env")


def test_a_lost_rank_is_an_error_and_a_restart(engine_of: Callable[..., Path], tmp_path: Path) -> None:
    service = Service(engine_of("llama", 2), tmp_path)
    state = service.state
    ranks = ranks_of(state["processes"]["executor"])
    ends: list[str] = []

    def stream() -> None:
        try:
            list(service.stream("smc", {**STREAMING, "max_tokens": 7900}, timeout_s=120))
            ends.append("whole")
        except ServingError as error:
            ends.append(error.status)

    try:
        assert service.works()
        thread = threading.Thread(target=stream)
        thread.start()
        service.wait(lambda: service.status().get("running", 0) >= 1, 30, "a stream runs")
        os.kill(ranks[1], signal.SIGKILL)
        killed = time.monotonic()
        thread.join(30)
        assert ends == ["UNAVAILABLE"]
        assert time.monotonic() - killed < 10
        service.wait(service.works, 90, "it serves again")
        again = ranks_of(service.state["processes"]["executor"])
        assert sorted(again) == [0, 1]
        state = service.state
        assert service.stop() == 0
        wait_until(
            lambda: not any(is_alive(pid) for pid in [*ranks.values(), *again.values()]), 5, "all ranks are gone"
        )
        assert service.leftovers(state) == []
    finally:
        if service.process.poll() is None:
            service.process.kill()
