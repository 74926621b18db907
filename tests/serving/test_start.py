"""What happens to a service that starts: it recovers from what strikes it, and ends at once where it cannot."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from smc_engines.serving.probe import Prober
from smc_engines.serving.process import command_line, end, group_members, killed_members, spawn
from tests.serving.service import Service

END_S = 60


@contextlib.contextmanager
def starting(engine: Path, folder: Path, *options: str) -> Iterator[Service]:
    """A service that starts; it is ended if it still runs."""
    service = Service(engine, folder, *options, wait=False)
    try:
        yield service
    finally:
        service.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            service.process.wait(END_S)
        service.process.kill()
        service.process.wait()


def processes(service: Service) -> dict[int, list[str]]:
    """Command lines of the processes that smc-serve started and that live."""
    main = service.process.pid
    started = Path(f"/proc/{main}/task/{main}/children").read_text().split()
    return {pid: command_line(pid) for group in started for pid in group_members(int(group))}


def find(service: Service, word: str, but: frozenset[int] = frozenset(), limit_s: float = END_S) -> int:
    """The process whose last arguments have the word, once it is there: a stub by the name of its model's file."""
    found: list[int] = []

    def there() -> bool:
        named = [
            pid for pid, line in processes(service).items() if len(line) > 1 and any(word in part for part in line[:3])
        ]
        found.extend(set(named) - but)
        return bool(found)

    service.wait(there, limit_s, f"{word} is there")
    return found[0]


def left(service: Service) -> list[str]:
    """Files and shared memory of an ended service."""
    own = f"smc-serve-{service.process.pid}-*"
    return [str(path) for folder in ("/tmp", "/dev/shm") for path in Path(folder).glob(own)]


def test_a_stub_that_is_killed_while_it_loads(engine: Path, tmp_path: Path) -> None:
    """tritonserver waited for it for ever, or ended as if the model were to blame, and smc-serve with it."""
    with starting(engine, tmp_path) as service:
        os.kill(find(service, "smc/1/model.py"), signal.SIGKILL)
        service.wait_ready()
        assert service.restarts() == ["tritonserver lost a stub to a signal while starting"]
        assert service.works()
        assert service.stop() == 0
        assert left(service) == []


def test_a_part_that_is_silent_each_time_ends_the_start(engine: Path, tmp_path: Path, start_timeout_s: int) -> None:
    with starting(engine, tmp_path, "--start-timeout", str(start_timeout_s)) as service:
        seen: set[int] = set()
        while len(seen) < 3:
            pid = find(service, "executor_process", frozenset(seen), END_S + start_timeout_s)
            os.kill(pid, signal.SIGSTOP)
            seen.add(pid)
        assert service.process.wait(END_S + start_timeout_s) == 1
        assert service.restarts() == [f"executor did not answer within {start_timeout_s} s"] * 2
        last = service.output().splitlines()[-1]
        assert last.startswith(
            f"smc-serve: executor did not answer within {start_timeout_s} s, expected a start with at most 2 restarts: "
        )
        assert [pid for pid in seen if command_line(pid)] == []
        assert left(service) == []


def test_an_executor_that_is_silent_while_it_loads_again(engine: Path, tmp_path: Path, start_timeout_s: int) -> None:
    """Silence counted from when an executor was found: one that never was, after another had died, was waited for for ever."""
    with starting(engine, tmp_path, "--start-timeout", str(start_timeout_s)) as service:
        service.wait_ready()
        first = service.state["processes"]["executor"]
        os.kill(first, signal.SIGKILL)
        os.kill(find(service, "executor_process", frozenset([first])), signal.SIGSTOP)
        service.wait(lambda: len(service.restarts()) == 2, END_S + start_timeout_s, "it is noticed")
        silent = f"executor did not answer within {start_timeout_s} s"
        assert service.restarts() == ["executor ended with status -9", silent]
        service.wait(service.works, END_S, "it works again")


def damaged(engine: Path, folder: Path) -> list[str]:
    """An engine directory whose weights end in another byte, which only the executor reads."""
    shutil.copytree(engine, folder / "damaged")
    with (folder / "damaged/target/weights/rank0.safetensors").open("r+b") as weights:
        weights.seek(-1, os.SEEK_END)
        last = weights.read(1)[0]
        weights.seek(-1, os.SEEK_END)
        weights.write(bytes([last ^ 1]))
    return ["--engine", str(folder / "damaged")]


@pytest.mark.parametrize("error", ["damaged", "memory", "port"])
def test_an_error_of_configuration_is_not_tried_again(engine: Path, tmp_path: Path, error: str) -> None:
    with contextlib.ExitStack() as stack:
        taken = stack.enter_context(socket.socket())
        taken.bind(("127.0.0.1", 0))  # but nobody listens, so that it is tritonserver who finds out
        options, says = {
            "damaged": (damaged(engine, tmp_path), "is damaged: SHA-256"),
            "memory": (["--num-pages", "2000000000"], "does not fit into memory"),
            "port": (["--grpc-port", str(taken.getsockname()[1])], "already in use"),
        }[error]
        service = stack.enter_context(starting(engine, tmp_path, *options))
        assert service.process.wait(END_S) == 1
        part = "tritonserver" if error == "port" else "executor"
        assert service.restarts() == []
        assert says in service.output()
        assert service.output().splitlines()[-1].startswith(f"smc-serve: {part} ended with status 1 while starting")
        assert left(service) == []


def test_what_a_signal_ended_is_told_from_what_ended_by_itself() -> None:
    commands = ["kill -9 $$", "exit 3", "sleep 60"]
    code = f"import subprocess, time\nkept = [subprocess.Popen(['sh', '-c', command]) for command in {commands}]"
    parent = spawn([sys.executable, "-c", f"{code}\ntime.sleep(60)"], os.environ)
    try:
        limit = time.monotonic() + END_S
        while len(killed_members(parent.pid)) < 1 and time.monotonic() < limit:
            time.sleep(0.05)
        (killed,) = killed_members(parent.pid)
        assert killed not in group_members(parent.pid)
    finally:
        end(parent, 0.0)


def test_a_probe_that_timed_out_is_repeated_at_once() -> None:
    """A stopped server was noticed after two rounds of probes that all timed out: 30 s instead of 12."""
    asked: list[str] = []

    def refuses(_timeout_s: float, _started: float) -> str:
        asked.append("refuses")  # at once, as an adapter does while the executor starts
        return "UNAVAILABLE"

    def silent(timeout_s: float, _started: float) -> str:
        asked.append("silent")
        time.sleep(timeout_s)
        return "DEADLINE_EXCEEDED"

    results: list[str] = []
    prober = Prober({"refuses": refuses, "silent": silent}, 0.05, 0.1, lambda name, *_: results.append(name))
    limit = time.monotonic() + END_S
    while len(results) < 6 and time.monotonic() < limit:
        time.sleep(0.01)
    prober.close()
    assert results[:6] == asked[:6] == ["refuses", "silent", "silent"] * 2


def test_a_script_that_is_ended_ends_what_it_serves() -> None:
    """SIGTERM left its smc-serve running."""
    script = Path(__file__).parents[2] / "scripts" / "faults.py"
    process = subprocess.Popen(
        [sys.executable, str(script), "--only", "executor, idle"], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        limit, served = time.monotonic() + END_S, None
        while served is None and time.monotonic() < limit:
            time.sleep(0.05)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            served = next((int(pid) for pid in children if "smc_engines.serve_cli" in command_line(int(pid))), None)
        assert served is not None
        time.sleep(1)  # it starts its parts
        process.terminate()
        assert process.wait(END_S) == 128 + signal.SIGTERM
        assert command_line(served) == []
    finally:
        process.kill()
        process.wait()
