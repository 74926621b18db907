"""The supervisor's line to the executor, against a bare socket, and its count of starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

zmq = pytest.importorskip("zmq", reason="needs requirements/serve.txt: run make serve-env")

from smc_engines.serving import supervisor  # noqa: E402
from smc_engines.serving.control import ControlLine  # noqa: E402

LOADING_S = 0.6


def wait(true: Callable[[], bool]) -> None:
    """Wait until something holds."""
    limit = time.monotonic() + 20
    while not true():
        assert time.monotonic() < limit


def test_the_time_without_an_executor_is_no_silence_of_the_next_one(tmp_path: Path) -> None:
    """An executor that had loaded for longer than --hang-timeout was killed if its first report came after the next look."""
    address = f"ipc://{tmp_path}/executor"
    with zmq.Context() as context:
        control = ControlLine(address)
        for _ in range(2):
            executor = context.socket(zmq.ROUTER)
            executor.bind(address)
            wait(lambda: control.connected)
            assert control.silence_s < LOADING_S
            wait(lambda: control.silence_s > LOADING_S)  # one that says nothing is noticed
            executor.close(0)
            wait(lambda: not control.connected)
            assert control.silence_s == 0
            time.sleep(LOADING_S)
        control.close()


def test_a_part_that_crashed_often_may_end_once_much_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Six starts within a minute made the next end fatal, were it a week later."""
    now = [0.0]
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: now[0])
    part = supervisor.Part("executor", lambda: None)  # type: ignore[arg-type,return-value]
    for start_s in (0.0, 10.0, 20.0, 30.0, 40.0, 50.0):
        now[0] = start_s
        assert not part.crashing
        part.launch()
    now[0] = 59.0
    assert part.crashing
    now[0] = 61.0
    assert not part.crashing
