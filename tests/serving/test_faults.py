"""Kill what can be killed: clients get an error in bounded time, service comes back, nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from smc_engines import serve_cli
from smc_engines.serving import tritonserver
from smc_engines.serving.process import command_line
from smc_engines.serving.triton_client import ServingError, TritonClient
from smc_engines.serving.tritonserver import check_python, find_installation
from smc_plugin.errors import ConfigError
from tests.serving.service import STREAMING, Service, minimal, text

openai = pytest.importorskip("openai", reason="needs requirements/serve-test.txt: run make serve-env")

# A client sees its error within a second, and service is back within seconds; slow machines get ten times that.
ERROR_S, BACK_S = 20, 90


@pytest.fixture(scope="module")
def service(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service of our own, to break."""
    running = Service(engine, tmp_path_factory.mktemp("faults"), "--probe-timeout", "5")
    yield running
    state = running.state
    if running.process.poll() is None:
        running.stop()
    assert running.leftovers(state) == []


def start_streams(service: Service, count: int) -> tuple[list[threading.Thread], list[str]]:
    """Long streams that note how they end."""
    ends: list[str] = []

    def run() -> None:
        try:
            list(service.stream("smc", {**STREAMING, "max_tokens": 480, "num_particles": 4}, timeout_s=120))
            ends.append("whole")
        except ServingError as error:
            ends.append(error.status)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    service.wait(lambda: service.status().get("running", 0) >= count, 30, "streams run")
    return threads, ends


@pytest.mark.parametrize("part", ["executor", "tritonserver", "stub", "openai"])
def test_kill(service: Service, part: str) -> None:
    service.wait(service.works, BACK_S, "it works before")
    state = service.state
    threads, ends = start_streams(service, 2)
    os.kill(state["stubs"]["smc"] if part == "stub" else state["processes"][part], signal.SIGKILL)
    killed = time.monotonic()
    for thread in threads:
        thread.join(ERROR_S)
    if part == "openai":
        assert ends == ["whole", "whole"]  # the gRPC door does not depend on it
    else:
        assert ends == ["UNAVAILABLE", "UNAVAILABLE"]
        assert time.monotonic() - killed < ERROR_S
    service.wait(service.works, BACK_S, f"it works again after {part} was killed")
    service.wait(lambda: service.state["processes"] != state["processes"] or part == "stub", BACK_S, "a new process")
    service.wait(lambda: front_answers(service), BACK_S, f"the front answers after {part} was killed")
    service.idle()
    shared = {path.name for path in Path("/dev/shm").glob(f"{state['shm_prefix']}*")}
    assert len(shared) <= len(tritonserver.MODELS)


def front_answers(service: Service) -> bool:
    """Whether the OpenAI front listens; a new process of it takes a moment."""
    with contextlib.suppress(OSError), urllib.request.urlopen(service.url("openai", "/health"), timeout=10) as answer:
        return answer.status == 200
    return False


def test_openai_stream_says_that_the_executor_died(service: Service) -> None:
    service.wait(service.works, BACK_S, "it works before")
    service.wait(lambda: front_answers(service), BACK_S, "the front that a test before killed is back")
    client = openai.OpenAI(base_url=service.url("openai", "/v1"), api_key="none", max_retries=0, timeout=ERROR_S)
    stream = client.completions.create(
        model="tiny", prompt="hello", max_tokens=480, stream=True, extra_body={"num_particles": 1, "ignore_eos": True}
    )
    next(iter(stream))
    os.kill(service.state["processes"]["executor"], signal.SIGKILL)
    with pytest.raises(openai.APIError, match="executor is not there"):
        list(stream)
    service.wait(service.works, BACK_S, "it works again")


def test_a_drain_refuses_what_comes_and_cuts_what_lasts(engine: Path, tmp_path: Path) -> None:
    """An answer that was cut short used to be reported as whole: "length" over HTTP, and nothing at all for the text models."""
    service = Service(engine, tmp_path, "--drain", "1", "--max-groups", "3")
    state, ends = service.state, dict[str, str]()
    long = {"max_tokens": 480, "num_particles": 8, "num_draft_tokens": 1, "ignore_eos": True}

    def note(name: str, ask: Callable[[], object]) -> None:
        try:
            ends[name] = f"whole {ask()!r}"
        except (ServingError, openai.APIError) as error:
            ends[name] = f"{getattr(error, 'status', '')} {error}"

    def over_openai(**options: Any) -> object:
        client = openai.OpenAI(base_url=service.url("openai", "/v1"), api_key="none", max_retries=0, timeout=60)
        body = {name: value for name, value in long.items() if name != "max_tokens"}
        answer = client.completions.create(model="tiny", prompt="hello", max_tokens=480, extra_body=body, **options)
        return list(answer)

    asks: dict[str, Callable[[], object]] = {
        "stream": lambda: list(service.stream("smc", {"text_input": "hello", "stream": True, **long})),
        "text": lambda: list(service.stream("ensemble", {"text_input": "hello", "max_tokens": 480, "min_tokens": 480})),
        "openai stream": lambda: over_openai(stream=True),
        "openai whole, waits": over_openai,
    }
    threads = []
    for count, (name, ask) in enumerate(asks.items(), 1):
        threads.append(threading.Thread(target=note, args=(name, ask)))
        threads[-1].start()
        service.wait(lambda count=count: len(service.status().get("live", ())) == count, 20, f"{name} is there")
    service.process.send_signal(signal.SIGTERM)
    service.wait(lambda: service.status().get("draining", False), 20, "it drains")
    with pytest.raises(ServingError, match="is shutting down, expected it to stay: try again on another instance"):
        list(service.stream("smc", minimal("smc")))
    for thread in threads:
        thread.join(60)
    cut = "the service shut down, expected an end within --drain 1 s, got "
    assert {name: cut in end for name, end in ends.items()} == dict.fromkeys(asks, True), ends
    assert ends["stream"].startswith("UNAVAILABLE ")
    assert "503" in ends["openai whole, waits"]
    assert service.process.wait(60) == 0
    assert service.leftovers(state) == []


def test_sigterm_while_it_starts(engine: Path, tmp_path: Path) -> None:
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics", "status")]
    command = [sys.executable, "-m", "smc_engines.serve_cli", "--engine", str(engine), *ports]
    before = {path.name for path in Path("/dev/shm").iterdir()}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.readline()  # the plan is printed; what it starts is starting
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 0, output.decode()[-2000:]
    mine = {name for name in {path.name for path in Path("/dev/shm").iterdir()} - before if f"-{process.pid}-" in name}
    assert mine == set()


def test_waiting_clients_may_ping() -> None:
    """The server's default ended connections that pinged each minute while their request waited: GOAWAY too_many_pings."""
    ports = tritonserver.Ports("127.0.0.1", 1, 2, 3)
    flags = tritonserver.command(find_installation(None, None), Path("backends"), ports, "prefix")
    (flag,) = [flag for flag in flags if "min-recv-ping-interval-without-data" in flag]
    assert int(flag.partition("=")[2]) < 60_000


def test_a_slow_step_is_no_reason_to_restart_the_server(service: Service) -> None:
    """On a crowded machine, steps once outlasted two probes, and the watchdog ended every stream for it."""
    service.wait(service.works, BACK_S, "it works before")
    state, told = service.state, service.output().count('"event": "probe_slow"')
    os.kill(state["processes"]["executor"], signal.SIGSTOP)  # as good as a step that takes long
    try:
        service.wait(lambda: service.output().count('"event": "probe_slow"') > told, 60, "a probe is late")
        time.sleep(8)  # a probe waits 5 s here, and two that fail would restart the server
    finally:
        os.kill(state["processes"]["executor"], signal.SIGCONT)
    service.wait(service.works, BACK_S, "it works again")
    assert service.state["processes"] == state["processes"]


def test_a_stopped_stub_is_noticed_while_steps_are_slow(service: Service) -> None:
    """Load 17 made steps so slow that no probe saw four reports of the executor: a stopped stub was never noticed."""
    service.wait(service.works, BACK_S, "it works before")
    state = service.state
    executor = state["processes"]["executor"]
    os.kill(state["stubs"]["smc"], signal.SIGSTOP)
    limit = time.monotonic() + BACK_S
    while service.state["processes"]["tritonserver"] == state["processes"]["tritonserver"] and time.monotonic() < limit:
        os.kill(executor, signal.SIGSTOP)  # turns of 2.5 s, of which two begin and end within a probe
        time.sleep(2.5)
        os.kill(executor, signal.SIGCONT)
        time.sleep(0.1)
    assert service.state["processes"]["tritonserver"] != state["processes"]["tritonserver"]
    assert service.state["processes"]["executor"] == executor
    service.wait(service.works, BACK_S, "it works again")


def test_a_stopped_front_is_restarted(service: Service) -> None:
    """Nobody probed the front: while its process lived, its clients would have waited for ever."""
    service.wait(service.works, BACK_S, "it works before")
    pid = service.state["processes"]["openai"]
    os.kill(pid, signal.SIGSTOP)
    service.wait(lambda: service.state["processes"]["openai"] != pid, BACK_S, "a new front")
    client = openai.OpenAI(base_url=service.url("openai", "/v1"), api_key="none", max_retries=9, timeout=ERROR_S)
    assert client.models.list().data[0].id == "tiny"


def test_idle_stub_is_healed_without_a_restart(service: Service) -> None:
    service.wait(lambda: service.works("ensemble"), BACK_S, "it works before")
    service.idle()
    state = service.state
    os.kill(state["stubs"]["tensorrt_llm_bls"], signal.SIGKILL)
    old = (None, state["stubs"]["tensorrt_llm_bls"])
    service.wait(lambda: service.state["stubs"].get("tensorrt_llm_bls") not in old, BACK_S, "a new stub")
    service.wait(lambda: service.works("tensorrt_llm_bls"), BACK_S, "it works again")
    assert service.state["processes"]["tritonserver"] == state["processes"]["tritonserver"]


def test_sigterm_lets_streams_finish(service: Service) -> None:
    values = {**STREAMING, "max_tokens": 300, "seed": 1}
    want = text(list(service.stream("smc", values)))
    state, pieces = service.state, []
    thread = threading.Thread(target=lambda: pieces.extend(service.stream("smc", values)))
    thread.start()
    service.wait(lambda: service.status()["running"] == 1, 20, "the stream runs")
    assert service.stop() == 0, service.output()[-3000:]
    thread.join(30)
    assert text(pieces) == want
    assert service.leftovers(state) == []


def test_a_kept_stream_outlives_the_server_and_holds_up_nothing(engine: Path, tmp_path: Path) -> None:
    """An idle stream once kept tritonserver from ending for all of its exit timeout."""
    service = Service(engine, tmp_path)
    with TritonClient(service.grpc) as client:

        def works() -> bool:
            with contextlib.suppress(ServingError):
                return bool(list(client.stream("smc", minimal("smc"), timeout_s=10)))
            return False

        assert works()
        with pytest.raises(ServingError, match="max_tokens must be in"):
            list(client.stream("smc", {"text_input": "a", "max_tokens": -1}))
        assert works()
        answer = client.stream("smc", {**STREAMING, "max_tokens": 400})
        next(answer)
        answer.close()
        service.idle()
        (response,) = client.stream("smc", minimal("smc"), outputs=["text_output"])
        assert response.keys() == {"text_output"}
        os.kill(service.state["processes"]["tritonserver"], signal.SIGKILL)
        service.wait(works, BACK_S, "the same client works again")
        state, began = service.state, time.monotonic()
        assert service.stop() == 0
        assert time.monotonic() - began < tritonserver.EXIT_TIMEOUT_S
        assert service.leftovers(state) == []


def test_killed_supervisor_takes_everything_with_it(engine: Path, tmp_path: Path) -> None:
    """Folder and shared memory stayed until the next start, and a stopped stub for ever."""
    service = Service(engine, tmp_path)
    state = service.state
    os.kill(state["stubs"]["smc"], signal.SIGSTOP)
    service.process.kill()
    service.process.wait()
    wait_for_nothing(service, state)
    ports = [f"--{name}-port={state[name]}" for name in ("http", "grpc", "metrics", "openai")]
    (tmp_path / "again").mkdir()
    again = Service(engine, tmp_path / "again", *ports)  # as a service manager does
    assert (again.state["grpc"], again.works(), again.stop()) == (state["grpc"], True, 0)


def wait_for_nothing(service: Service, state: dict[str, Any]) -> None:
    """Until an ended service has left nothing, its guardian included."""
    limit = time.monotonic() + BACK_S
    while (left := service.leftovers(state) + guardians(service)) and time.monotonic() < limit:
        time.sleep(0.1)
    assert left == []


def guardians(service: Service) -> list[int]:
    """Guardians of a service."""
    named = {int(path.name): command_line(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    return [pid for pid, line in named.items() if line[-1:] == [f"smc-serve-{service.process.pid}-"]]


def test_a_killed_guardian_is_replaced(engine: Path, tmp_path: Path) -> None:
    service = Service(engine, tmp_path)
    state, (first,) = service.state, guardians(service)
    os.kill(first, signal.SIGKILL)
    service.wait(lambda: first not in guardians(service) != [], BACK_S, "a new guardian")
    service.process.kill()
    service.process.wait()
    wait_for_nothing(service, state)


def test_a_stopped_supervisor_blames_nobody(engine: Path, tmp_path: Path) -> None:
    """Back after longer than --hang-timeout, before its executor where a whole container thaws, it restarted that one."""
    service = Service(engine, tmp_path, "--hang-timeout", "5", "--probe-timeout", "5")
    state = service.state
    executor = state["processes"]["executor"]
    service.process.send_signal(signal.SIGSTOP)
    assert service.works()
    os.kill(executor, signal.SIGSTOP)
    time.sleep(8)
    service.process.send_signal(signal.SIGCONT)
    service.wait(lambda: "was_stopped" in service.output(), BACK_S, "it goes on")
    time.sleep(1)
    os.kill(executor, signal.SIGCONT)
    service.wait(service.works, BACK_S, "a request succeeds")
    time.sleep(3)
    assert (service.restarts(), service.state) == ([], state)
    assert service.stop() == 0


@pytest.mark.parametrize("phase", ["loading", "draining", "unloading"])
def test_a_second_signal_ends_at_once(engine: Path, tmp_path: Path, phase: str) -> None:
    """It ended with status 0 after up to 40 s, and a third left processes."""
    service = Service(engine, tmp_path, wait=phase != "loading")
    streams: list[threading.Thread] = []
    if phase == "draining":
        streams, _ = start_streams(service, 2)
    elif phase == "unloading":
        os.kill(service.state["processes"]["tritonserver"], signal.SIGSTOP)  # it does not end when it is asked
    else:
        service.wait(lambda: '"event"' in service.output() or guardians(service) != [], BACK_S, "parts start")
        time.sleep(1)
        os.kill(service.process.pid, signal.SIGSTOP)  # so that it does not end by the first before the second comes
    service.process.send_signal(signal.SIGTERM)
    if phase == "draining":
        service.wait(lambda: service.status().get("draining", False), 20, "it drains")
    elif phase == "unloading":
        service.wait(lambda: '"name": "openai"' in service.output(), BACK_S, "it ends its parts")
    service.process.send_signal(signal.SIGINT)
    service.process.send_signal(signal.SIGCONT)
    assert service.process.wait(BACK_S) in {128 + signal.SIGINT, 128 + signal.SIGTERM}
    assert "smc-serve: ending at once" in service.output()
    own, limit = f"smc-serve-{service.process.pid}-", time.monotonic() + BACK_S
    places = (tempfile.gettempdir(), "/dev/shm")
    assert [str(path) for folder in places for path in Path(folder).glob(f"{own}*")] == []
    while running_of(own) and time.monotonic() < limit:  # a killed process takes a moment to go
        time.sleep(0.1)
    assert running_of(own) == []
    for stream in streams:
        stream.join(ERROR_S)
    limit = time.monotonic() + BACK_S
    while guardians(service) and time.monotonic() < limit:
        time.sleep(0.05)
    assert guardians(service) == []


def running_of(prefix: str) -> list[int]:
    """Processes of a run, by what its folder's name begins with."""
    found = []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if prefix.encode() in environment.read_bytes():
                found.append(int(environment.parent.name))
    return found


def test_what_a_run_left_that_lost_its_guardian_too_ends_with_the_next_start(engine: Path, tmp_path: Path) -> None:
    """Its folder was removed, a stopped stub stayed, and nobody could tell any more whose it was."""
    service = Service(engine, tmp_path)
    state, (guardian,) = service.state, guardians(service)
    os.kill(state["stubs"]["smc"], signal.SIGSTOP)
    service.process.send_signal(signal.SIGSTOP)  # it would start another guardian
    os.kill(guardian, signal.SIGKILL)
    service.process.kill()
    service.process.wait()
    own = f"smc-serve-{service.process.pid}-"
    assert state["stubs"]["smc"] in running_of(own)
    (tmp_path / "again").mkdir()
    again = Service(engine, tmp_path / "again")
    assert running_of(own) == []
    assert service.leftovers(state) == []
    assert (again.works(), again.stop()) == (True, 0)


def test_a_state_file_that_cannot_be_written_ends_nothing_that_serves(engine: Path, tmp_path: Path) -> None:
    """A full disk there ended smc-serve at the next restart of any part."""
    service = Service(engine, tmp_path)
    executor = service.state["processes"]["executor"]
    (tmp_path / "state.partial").mkdir()
    os.kill(executor, signal.SIGKILL)
    service.wait(lambda: "state_not_written" in service.output(), BACK_S, "it is noticed")
    service.wait(service.works, BACK_S, "a request succeeds")
    (tmp_path / "state.partial").rmdir()
    os.kill(service.state["processes"]["openai"], signal.SIGKILL)
    service.wait(lambda: service.state["processes"]["executor"] != executor, BACK_S, "it is written again")
    assert service.stop() == 0


def test_a_state_file_that_cannot_be_written_at_the_start_is_an_error(engine: Path, tmp_path: Path) -> None:
    (tmp_path / "state.partial").mkdir()
    service = Service(engine, tmp_path, wait=False)
    assert service.process.wait(BACK_S) == 1
    assert (
        service.output()
        .splitlines()[-1]
        .startswith(f"smc-serve: --state-file {tmp_path}/state.json cannot be written (")
    )
    assert running_of(f"smc-serve-{service.process.pid}-") == []


def test_a_closed_terminal_drains(engine: Path, tmp_path: Path) -> None:
    service = Service(engine, tmp_path)
    state = service.state
    threads, answers = start_streams(service, 1)
    service.process.send_signal(signal.SIGHUP)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # these tests run under nohup, and so does what they start
        assert service.works()
        service.process.terminate()
    assert service.process.wait(BACK_S) == 0
    for thread in threads:
        thread.join(BACK_S)
    assert answers
    wait_for_nothing(service, state)


def test_numpy_2_is_refused(tmp_path: Path) -> None:
    fake = tmp_path / "numpy"
    fake.mkdir()
    (fake / "__init__.py").write_text("__version__ = '2.1.0'\n")
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    with pytest.raises(ConfigError, match=r"has numpy 2.1.0, expected numpy below 2 .*: run pip install"):
        check_python(python)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "missing"], "missing"),
        (["--http-port", "9000", "--grpc-port", "9000"], "--grpc-port and --http-port are both 9000"),
        (["--serve-env", "nowhere"], "no Triton Inference Server was found"),
        (["--tritonserver", "/bin/true"], "cannot serve, expected tritonserver with backends/python"),
        (["--http-port", "70000"], "--http-port is 70000, expected 0 to 65535"),
        (["--grpc-port", "-5"], "--grpc-port is -5, expected 0 to 65535"),
        (["--host", "nonsense.invalid"], "--host 'nonsense.invalid' is no address here"),
        (["--host", "192.0.2.1", "--http-port", "0"], "--host 192.0.2.1 cannot be listened on"),
        (["--log-file", "/nonexistent/x"], "--log-file /nonexistent/x cannot be written (No such file or directory)"),
        (["--state-file", "/nonexistent/x"], "--state-file /nonexistent/x cannot be written"),
        (["--probe-timeout", "nan"], "--probe-timeout is nan, expected seconds above 0"),
        (["--probe-interval", "-1"], "--probe-interval is -1, expected seconds above 0"),
        (["--drain", "-5"], "--drain is -5, expected seconds above 0 or 0"),
        (["--max-groups", "0"], "--max-groups is 0, expected at least 1"),
        (["--max-queue", "-3"], "--max-queue is -3, expected at least 1"),
        (["--num-pages", "1"], "--num-pages is 1, expected at least 2"),
        (["--device", "tpu"], "--device is 'tpu', expected one of auto, cpu, cuda"),
        (["--drian", "5"], "unrecognized arguments: --drian 5: did you mean --drain?"),
    ],
)
def test_start_errors_are_one_line(
    engine: Path, capfd: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    before = set(Path(tempfile.gettempdir()).glob(f"smc-serve-{os.getpid()}-*"))
    try:
        status = serve_cli.main(options if "--engine" in options else ["--engine", str(engine), *options])
    except SystemExit as ended:  # the parser's
        status = ended.code
    assert status == 1
    errors = capfd.readouterr().err
    assert message in errors
    assert len(errors.splitlines()) == 1
    assert set(Path(tempfile.gettempdir()).glob(f"smc-serve-{os.getpid()}-*")) == before


def test_an_installation_is_found() -> None:
    installation = find_installation(None, None)
    assert installation.binary.is_file()
