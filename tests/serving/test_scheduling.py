"""Under load: a bounded queue, priorities, slow readers, and 64 clients at once."""

from __future__ import annotations

import collections
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient

from smc_engines.serving.triton_client import ServingError, make_inputs
from tests.serving.service import STREAMING, Service, text


@pytest.fixture(scope="module")
def narrow(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service that runs one request at a time and lets three wait."""
    running = Service(engine, tmp_path_factory.mktemp("narrow"), "--max-groups", "1", "--max-queue", "3")
    yield running
    assert running.stop() == 0


def in_thread(
    service: Service, values: dict[str, Any], request_id: str, done: list[str], model: str = "smc", **parameters: int
) -> threading.Thread:
    def run() -> None:
        list(service.stream(model, values, request_id=request_id, parameters=parameters))
        done.append(request_id)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def over_http(service: Service, values: dict[str, Any]) -> socket.socket:
    """A connection that has sent a request to generate_stream and reads nothing."""
    body = json.dumps(values)
    connection = socket.create_connection(("127.0.0.1", service.state["http"]))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    head = f"POST /v2/models/smc/generate_stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall((head + body).encode())
    return connection


def test_queue_refuses_at_once_and_priorities_go_first(narrow: Service) -> None:
    done: list[str] = []
    running = in_thread(narrow, {**STREAMING, "max_tokens": 480, "num_particles": 8}, "long", done)
    narrow.wait(lambda: narrow.status()["running"] == 1, 20, "the first request runs")
    waiting = []
    for priority in (0, -1):
        values = {**STREAMING, "max_tokens": 2, "priority": priority}
        waiting.append(in_thread(narrow, values, f"priority {priority}", done))
        narrow.wait(lambda: narrow.status()["waiting"] == len(waiting), 20, "it waits")
    values = {"text_input": "a", "max_tokens": 2}
    waiting.append(in_thread(narrow, values, "priority -2", done, "ensemble", smc_priority=-2))
    narrow.wait(lambda: narrow.status()["waiting"] == 3, 20, "it waits")
    with pytest.raises(ServingError, match="the queue is full, 3 requests wait and at most 3 may") as caught:
        list(narrow.stream("smc", {"text_input": "a", "max_tokens": 1}))
    assert caught.value.status == "UNAVAILABLE"
    assert done == []
    for thread in (running, *waiting):
        thread.join(60)
    # as the executor ended them: client threads wake in any order, and perhaps before its log has the last line
    tags = {"long", "priority -2", "priority -1", "priority 0"}

    def ended() -> list[str]:
        return [event["tag"] for event in narrow.events("finished") if event["tag"] in tags]

    narrow.wait(lambda: len(ended()) == len(tags), 20, "all four are logged")
    assert ended() == ["long", "priority -2", "priority -1", "priority 0"]
    narrow.idle()


def test_what_waits_can_be_overdue_or_given_up(narrow: Service) -> None:
    """Neither waits for its turn, and both leave their place in the queue."""
    done: list[str] = []
    values = {**STREAMING, "max_tokens": 480, "num_particles": 8, "num_draft_tokens": 1}
    longer = [in_thread(narrow, values, f"long {number}", done) for number in range(2)]
    narrow.wait(lambda: narrow.status()["waiting"] == 1, 20, "one runs, one waits")
    before = narrow.status()["cancelled"]
    with grpcclient.InferenceServerClient(narrow.grpc) as client:
        client.start_stream(callback=lambda result, error: None)
        client.async_stream_infer("smc", make_inputs("smc", {**STREAMING, "max_tokens": 2}))
        narrow.wait(lambda: narrow.status()["waiting"] == 2, 20, "it waits")
        client.stop_stream(cancel_requests=True)
    narrow.wait(lambda: narrow.status()["cancelled"] == before + 1, 20, "it left")
    with pytest.raises(ServingError, match="deadline passed, expected an end within 100 ms, got 0 tokens") as caught:
        list(narrow.stream("smc", {**STREAMING, "max_tokens": 2, "timeout_ms": 100, "priority": 1}))
    assert caught.value.status == "DEADLINE_EXCEEDED"
    assert len(done) < 2  # neither was its turn
    for thread in longer:
        thread.join(60)
    narrow.idle()


def test_slow_reader_holds_up_nobody(service: Service) -> None:
    """A client that takes its pieces slowly gets them all; gRPC holds them meanwhile (the next test fills its pipe)."""
    values = {**STREAMING, "max_tokens": 400, "seed": 1}
    want = text(list(service.stream("smc", values)))
    slow = service.stream("smc", values)
    pieces = [next(slow)]
    others = [list(service.stream("smc", {"text_input": "quick", "max_tokens": 8})) for _ in range(3)]
    assert all(len(responses) == 1 for responses in others)
    for response in slow:
        pieces.append(response)
        time.sleep(0.01)
    assert text(pieces) == want
    service.idle()


def test_reader_that_never_reads_holds_up_nobody(service: Service) -> None:
    """A stalled HTTP client: its pieces pile up in the server, everybody else is served, and hanging up cancels it."""
    before = service.status()["cancelled"]
    values = {**STREAMING, "max_tokens": 480, "num_particles": 8, "num_draft_tokens": 1}  # lasts for seconds
    stalled = [over_http(service, values) for _ in range(4)]
    service.wait(lambda: service.status()["running"] == 4, 20, "they run")
    for _ in range(3):
        assert len(list(service.stream("smc", {"text_input": "quick", "max_tokens": 8}))) == 1
    for connection in stalled:
        connection.close()
    service.idle()
    assert service.status()["cancelled"] == before + 4


def test_many_streaming_clients(service: Service) -> None:
    """64 clients for 20 s, a tenth of the requests given up midway: no error, no answer out of order, no page lost."""
    answers: dict[int, str] = {}
    for seed in range(4):
        answers[seed] = text(list(service.stream("smc", {**STREAMING, "max_tokens": 24, "seed": seed})))
    counts: collections.Counter[str] = collections.Counter()
    problems: list[str] = []
    end = time.monotonic() + 20

    def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            seed, gives_up = draw.randrange(4), draw.random() < 0.1
            pieces: list[dict[str, np.ndarray]] = []
            try:
                for response in service.stream(
                    "smc", {**STREAMING, "max_tokens": 24, "seed": seed}, request_id=f"c{number}"
                ):
                    pieces.append(response)
                    if gives_up:
                        break
            except ServingError as error:
                problems.append(f"{error.status}: {error}")
                return
            counts["given up" if gives_up else "whole"] += 1
            if not gives_up and text(pieces) != answers[seed]:
                problems.append(f"seed {seed}: got {text(pieces)!r}, expected {answers[seed]!r}")

    threads = [threading.Thread(target=client, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert problems == []
    assert counts["whole"] >= 64
    assert counts["given up"] >= 1
    service.idle()
