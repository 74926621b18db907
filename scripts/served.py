"""A real smc-serve for scripts: started as users start it, on free ports, and ended with everything it started.

with serve("engines/smollm2-tp1") as service:
    list(service.stream("smc", {"text_input": "Hi", "max_tokens": 4}))
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from distill.tiny import write_tiny_target

from smc_build.builder import BuildOptions, build_engine
from smc_engines.serving.process import command_line, group_members
from smc_engines.serving.triton_client import ServingError, TritonClient

START_S = 600
NO_EXECUTOR = 503
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


def tiny_engine(folder: Path, ranks: int = 1) -> Path:
    """Build an engine of two tiny random models with a byte-level tokenizer in a new folder: no download, some seconds."""
    for name, seed in (("target", 0), ("draft", 1)):
        (folder / name).mkdir(parents=True)
        write_tiny_target(folder / name, seed)
        (folder / name / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    options = BuildOptions(
        str(folder / "target"),
        draft=str(folder / "draft"),
        output=folder / "tiny",
        particles=8,
        draft_tokens=4,
        groups=16,
        tp=ranks,
    )
    build_engine(dataclasses.replace(options, dtype="float32"))
    return folder / "tiny"


class Served:
    """A running smc-serve.

    Args:
        process: smc-serve. folder: with its state file and log. engine: engine directory.
    """

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, engine: Path) -> None:
        self.process, self.engine, self._folder = process, engine, folder

    @property
    def state(self) -> dict[str, Any]:
        """Ports and process ids as they are now."""
        return json.loads((self._folder / "state.json").read_text())

    @property
    def model(self) -> str:
        """The engine's name, as the OpenAI front lists it."""
        return self.engine.resolve().name

    @property
    def log(self) -> str:
        """Everything printed and logged so far."""
        return (self._folder / "log").read_text(errors="replace")

    @property
    def pids(self) -> dict[str, int]:
        """Process ids by part; the stubs as stub MODEL, the ranks of an executor that has several as rank NUMBER."""
        state = self.state
        stubs = {f"stub {model}": pid for model, pid in state["stubs"].items()}
        ranks = ranks_of(state["processes"]["executor"])
        return {"smc-serve": self.process.pid, **state["processes"], **stubs, **ranks}

    def url(self, port: str) -> str:
        """http address of one of the ports."""
        if port != "status":
            return f"http://127.0.0.1:{self.state[port]}"
        return next(line for line in self.log.splitlines() if "status page" in line).split()[-1].rstrip("/")

    def stream(
        self, model: str, values: dict[str, Any], **options: Any
    ) -> Generator[dict[str, np.ndarray], None, None]:
        """One request over gRPC; see TritonClient.stream."""
        return TritonClient(f"127.0.0.1:{self.state['grpc']}").stream(model, values, **{"timeout_s": 120, **options})

    def works(self) -> bool:
        """Whether a request succeeds now."""
        with contextlib.suppress(ServingError):
            return bool(list(self.stream("smc", {"text_input": "hi", "max_tokens": 1}, timeout_s=10)))
        return False

    def status(self) -> dict[str, Any]:
        """The detailed report; empty while there is no executor."""
        try:
            with urllib.request.urlopen(f"{self.url('status')}/status.json", timeout=20) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != NO_EXECUTOR:
                raise
            return {}

    def wait(self, true: Callable[[], bool], timeout_s: float, what: str) -> float:
        """Wait until something holds; returns after how many seconds.

        Raises:
            TimeoutError: it never did, or smc-serve ended.
        """
        began = time.monotonic()
        while not true():
            if time.monotonic() - began > timeout_s or self.process.poll() is not None:
                raise TimeoutError(f"not within {timeout_s:g} s: {what}\n{self.log[-2000:]}")
            time.sleep(0.02)
        return time.monotonic() - began

    def idle(self) -> bool:
        """Whether no request is live and no page is promised."""
        report = self.status()
        return report.get("live") == [] and report["pages_promised"] == 0

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)

    def leftovers(self, state: dict[str, Any]) -> list[str]:
        """Processes, shared memory and files that an ended service left."""
        live = [str(pid) for group in state["processes"].values() for pid in group_members(group)]
        live += [str(pid) for pid in state["stubs"].values() if command_line(pid)]
        shared = [path.name for path in Path("/dev/shm").glob(f"{state['shm_prefix']}*")]
        return live + shared + ([state["folder"]] if Path(state["folder"]).exists() else [])


def ranks_of(mpirun: int) -> dict[str, int]:
    """Process ids of the live ranks that an mpirun started, as rank NUMBER; none of an executor that is no mpirun."""
    found = {}
    for pid in children(mpirun):
        with contextlib.suppress(OSError):
            for variable in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                name, _, value = variable.partition(b"=")
                if name == b"OMPI_COMM_WORLD_RANK":
                    found[f"rank {value.decode()}"] = pid
    return dict(sorted(found.items()))


def children(pid: int) -> list[int]:
    """Processes that a process started and that still run; no zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if int(parent) == pid and state != "Z":
                found.append(int(stat.parent.name))
    return found


@contextlib.contextmanager
def serve(
    engine: Path | str, *options: str, wait: bool = True, env: Mapping[str, str] | None = None
) -> Iterator[Served]:
    """Run smc-serve while the block runs.

    Args:
        options: further ones of its command line.
        wait: until it is ready.
        env: variables beside this process's.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ports = [f"--{port}-port=0" for port in ("http", "grpc", "metrics", "openai", "status")]
        command = [sys.executable, "-m", "smc_engines.serve_cli", "--engine", str(engine), *ports]
        command += ["--state-file", str(folder / "state.json"), *options]
        variables = {"OMP_NUM_THREADS": "1", **os.environ, **(env or {})}
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=variables, start_new_session=True)
        served = Served(process, folder, Path(engine))
        try:
            if wait:
                served.wait(lambda: "try it:" in served.log, START_S, "smc-serve is ready")
            yield served
        finally:
            try:
                if process.poll() is None:
                    process.terminate()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(120)
            finally:  # also when a second Ctrl-C ends the wait
                process.kill()
                process.wait()


def end_by_sigterm() -> None:
    """Let SIGTERM unwind this process as Ctrl-C does, so that what it serves ends too."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
