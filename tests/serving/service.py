"""A real smc-serve for the tests: started as users start it, on free ports, with a tiny engine."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np

from smc_engines.serving.process import command_line, group_members
from smc_engines.serving.triton_client import ServingError, TritonClient, text_of

START_S = 120


class Service:
    """One running smc-serve.

    Args:
        engine: engine directory.
        folder: for its state file and log.
        options: further command-line options.
        wait: until it is ready.
    """

    def __init__(self, engine: Path, folder: Path, *options: str, wait: bool = True) -> None:
        self.engine, self.log = engine, folder / "serve.log"
        self._state_file = folder / "state.json"
        ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics", "openai", "status")]
        command = [sys.executable, "-m", "smc_engines.serve_cli", "--engine", str(engine), *ports]
        command += ["--state-file", str(self._state_file), "--probe-interval", "0.5", *options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True
            )
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until it answers."""
        self.wait(lambda: "try it:" in self.output(), START_S, "smc-serve is ready")

    @property
    def state(self) -> dict[str, Any]:
        """Ports and process ids, as the state file has them now."""
        return json.loads(self._state_file.read_text())

    def output(self) -> str:
        """Everything it printed and logged."""
        return self.log.read_text(errors="replace")

    def wait(self, true: Callable[[], bool], timeout_s: float, what: str) -> None:
        """Wait until something holds; fails with the log's end if it never does."""
        limit = time.monotonic() + timeout_s
        while not true():
            if time.monotonic() > limit or self.process.poll() not in (None, 0):
                raise AssertionError(f"not within {timeout_s} s: {what}\n{self.output()[-4000:]}")
            time.sleep(0.05)

    def events(self, name: str) -> list[dict[str, Any]]:
        """What it logged of one kind so far; a client can have its answer before the line about it is there."""
        lines = self.output().split("\n")[:-1]  # the last is empty, or still being written
        return [json.loads(line) for line in lines if f'"event": "{name}"' in line]

    def restarts(self) -> list[str]:
        """What it started again so far, and why."""
        return [f"{event['name']} {event['reason']}" for event in self.events("restart")]

    def url(self, port: str, path: str) -> str:
        """Address of a page on one of the ports."""
        number = self._status_port() if port == "status" else self.state[port]
        return f"http://127.0.0.1:{number}{path}"

    def _status_port(self) -> int:
        line = next(line for line in self.output().splitlines() if "status page" in line)
        return int(line.rstrip("/").rpartition(":")[2])

    @property
    def grpc(self) -> str:
        """host:port of the gRPC endpoint."""
        return f"127.0.0.1:{self.state['grpc']}"

    def stream(
        self, model: str, values: dict[str, Any], **options: Any
    ) -> Generator[dict[str, np.ndarray], None, None]:
        """Run one request; see TritonClient.stream."""
        return TritonClient(self.grpc).stream(model, values, **{"timeout_s": 60, **options})

    def status(self) -> dict[str, Any]:
        """The detailed report; empty (503) for the moment after a new executor's start in which the page knows none."""
        try:
            with urllib.request.urlopen(self.url("status", "/status.json"), timeout=20) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != 503:
                raise
            return {}

    def post(self, path: str, body: Any) -> tuple[int, bytes]:
        """POST JSON to the HTTP endpoint."""
        request = urllib.request.Request(self.url("http", path), json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def works(self, model: str = "smc") -> bool:
        """Whether a request succeeds now."""
        with contextlib.suppress(ServingError):
            return bool(list(self.stream(model, minimal(model), timeout_s=10)))
        return False

    def idle(self) -> None:
        """Wait until no request is live, then check that no page is held."""
        self.wait(lambda: self.status().get("live") == [], 30, "all requests have ended")
        report = self.status()
        assert report["pages_promised"] == 0
        assert report["pages_used"] == report["pages_cached"]

    def stop(self) -> int:
        """SIGTERM, as an operator would; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)

    def leftovers(self, state: dict[str, Any]) -> list[str]:
        """Processes, shared memory and files of an ended service."""
        groups = [*state["processes"].values()]
        live = [str(pid) for group in groups for pid in group_members(group)]
        live += [str(pid) for pid in state["stubs"].values() if command_line(pid)]
        shared = [path.name for path in Path("/dev/shm").glob(f"{state['shm_prefix']}*")]
        return live + shared + ([state["folder"]] if Path(state["folder"]).exists() else [])


def minimal(model: str) -> dict[str, Any]:
    """The smallest request of a model."""
    if model == "tensorrt_llm":
        return {"input_ids": [104, 105], "input_lengths": 2, "request_output_len": 3}
    return {"text_input": "hi", "max_tokens": 3}


def text(responses: list[dict[str, np.ndarray]]) -> str:
    """The joined text of a stream."""
    return "".join(text_of(response) for response in responses)


def generous_start_s(engine: Path, folder: Path) -> int:
    """A --start-timeout that healthy parts meet on this machine: three times what a whole start takes now, at least 8 s."""
    began = time.monotonic()
    service = Service(engine, folder)
    took_s = time.monotonic() - began
    assert service.stop() == 0, service.output()[-4000:]
    return max(8, math.ceil(3 * took_s))


# A request that settles after every round, so that it streams: with one particle all of them always agree.
STREAMING = {"text_input": "hello", "stream": True, "num_particles": 1, "num_draft_tokens": 2, "ignore_eos": True}
