"""Starts the processes of a served engine, watches them, restarts what dies and ends them in order.

    smc-serve ── executor process          (ZeroMQ, ipc)
              ├─ tritonserver ── 4 stubs   (the adapters; gRPC, HTTP, metrics)
              ├─ OpenAI front              (only with --openai-port)
              └─ guardian                  (clears up when smc-serve is gone)

While it starts, start.py looks after the parts. What happens when one dies later: the executor is started again at once
(adapters fail its requests and reconnect by themselves); so are tritonserver and the front. A dead stub is invisible to
tritonserver: its model is unloaded and loaded again, and if requests were in flight in it, whose streams would hang for
ever, tritonserver is restarted.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import os
import queue
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException

from smc_build.engine_dir import load_manifest
from smc_engines.parallel.launch import rank_command, rank_environment
from smc_engines.serving import guardian, tritonserver
from smc_engines.serving.control import ControlLine
from smc_engines.serving.grpc_tls import Trust, certified_name, client_arguments
from smc_engines.serving.logs import Log
from smc_engines.serving.part import CRASH_LIMIT, CRASH_WINDOW_S, Part
from smc_engines.serving.probe import NO_LISTENER, Prober, probe, probe_front
from smc_engines.serving.process import command_line, end, group_members, kill_group, spawn
from smc_engines.serving.start import SERVER_START_S, TURNS_OF_A_PROBE, Start
from smc_engines.serving.tritonserver import MODELS, Installation, Ports
from smc_plugin.errors import ConfigError, SmcError

FRONT = "openai"
RUNTIME_PREFIX = "smc-serve-"
TICK_S = 0.1
LOST_CLIENT_WAIT_S = 3.0
DRAIN_MARGIN_S = 15.0
STALL_S = 5.0  # unloading one model takes a second or two where other work is going on
LATE_PROBE_S = 1.0
READY_S = 2.0
STOPPED_S = 2.0  # no tick takes as long unless somebody stopped this process
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class ServeOptions:
    """How to serve; defaults live here and the command line reads them.

    Args:
        engine: engine directory.
        host: address that every port listens on.
        openai_port, status_port: 0 is any free port, None leaves the part out.
        grpc_cert, grpc_key: PEM files for TLS of the gRPC port. grpc_ca: who signed it, where it did not sign itself.
        openai_api_key_file: with keys that the OpenAI front asks for. openai_cert, openai_key: PEM files for its TLS.
        max_queue: requests that may wait for others to end; one more is refused at once.
        drain_s: how long running streams may go on after SIGTERM.
        start_timeout_s: longest time until a part that starts answers. hang_timeout_s: longest silence of an executor.
        probe_interval_s, probe_timeout_s: of the watchdog.
    """

    engine: str
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    openai_port: int | None = None
    status_port: int | None = 8003
    grpc_cert: str | None = None
    grpc_key: str | None = None
    grpc_ca: str | None = None
    openai_api_key_file: str | None = None
    openai_cert: str | None = None
    openai_key: str | None = None
    max_queue: int = 256
    max_groups: int | None = None
    num_pages: int | None = None
    device: str = "auto"
    tritonserver: str | None = None
    serve_env: str | None = None
    drain_s: float = 30.0
    start_timeout_s: float = 600.0
    hang_timeout_s: float = 120.0
    probe_interval_s: float = 2.0
    probe_timeout_s: float = 20.0
    show_text: bool = False
    verify: bool = True
    state_file: str | None = None
    log_file: str | None = None

    def __post_init__(self) -> None:
        least = {"max_queue": 1, "max_groups": 1, "num_pages": 2}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{_flag(name)} is {value}, expected at least {low}: raise it")
        for name in ("http_port", "grpc_port", "metrics_port", "openai_port", "status_port"):
            value, low = getattr(self, name), -1 if name == "status_port" else 0
            if value is not None and not low <= value < 2**16:
                raise ConfigError(f"{_flag(name)} is {value}, expected {low} to 65535: choose another")
        for name in ("start_timeout_s", "hang_timeout_s", "probe_interval_s", "probe_timeout_s", "drain_s"):
            value, flag = getattr(self, name), _flag(name.removesuffix("_s"))
            if not 0 <= value < math.inf or (value == 0 and name != "drain_s"):
                raise ConfigError(
                    f"{flag} is {value:g}, expected seconds above 0{' or 0' * (name == 'drain_s')}: correct it"
                )
        if self.device not in DEVICES:
            raise ConfigError(f"--device is {self.device!r}, expected one of {', '.join(DEVICES)}: choose one")

    @property
    def trust(self) -> Trust | None:
        """What clients of the gRPC port need on this machine."""
        if self.grpc_cert is None:
            return None
        return Trust(self.grpc_ca or self.grpc_cert, certified_name(self.grpc_cert))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def executor_command(options: ServeOptions, address: str, tp: int = 1) -> list[str]:
    """The command that starts the executor; with several ranks it is an mpirun."""
    module = "smc_engines.serving.executor_process"
    command = [sys.executable, "-m", module] if tp == 1 else rank_command(tp, module, [])
    command += ["--engine", options.engine, "--address", address, "--device", options.device]
    command += ["--max-queue", str(options.max_queue), "--drain-seconds", str(options.drain_s)]
    for name in ("max_groups", "num_pages"):
        if getattr(options, name) is not None:
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--show-text"] if options.show_text else []
    command += [] if options.verify else ["--no-verify"]
    return command


def _appended(path: str | None) -> io.FileIO | None:
    """The log file, open.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        return io.FileIO(path, "a") if path else None
    except OSError as error:
        raise ConfigError(
            f"--log-file {path} cannot be written ({error.strerror}), expected a file: correct it"
        ) from None


class Supervisor:
    """Runs one served engine. Everything but the watchdog's probes happens in the caller's (main) thread."""

    def __init__(
        self, options: ServeOptions, installation: Installation, ports: Ports, openai_port: int | None
    ) -> None:
        self.options, self.ports, self.openai_port = options, ports, openai_port
        self._installation, self._trust = installation, options.trust
        self._log = Log("supervisor")
        self._tp = load_manifest(Path(options.engine), verify=False).tp
        remove_leftovers()
        self._output = _appended(options.log_file)
        self.folder = Path(tempfile.mkdtemp(prefix=f"{RUNTIME_PREFIX}{os.getpid()}-"))
        self._shm_prefix = f"{RUNTIME_PREFIX}{os.getpid()}-"
        self._guardian = guardian.start(self.folder, self._shm_prefix)
        self._address = f"ipc://{self.folder}/executor"
        self._backends = tritonserver.prepare_backends(installation, self.folder)
        self.executor = Part("executor", self._start_executor)
        self.server = Part("tritonserver", self._start_server)
        self.front = Part(FRONT, self._start_front)
        self.control = ControlLine(self._address)
        self._stubs: dict[str, int] = {}
        self._results: queue.SimpleQueue[tuple[str, str | None, float]] = queue.SimpleQueue()
        self._prober: Prober | None = None
        self._failures: dict[str, int] = {}
        self._settled_at = self._connected_at = 0.0
        self.stopping = self.ready = False

    @property
    def grpc_address(self) -> str:
        """host:port of the gRPC endpoint."""
        return f"{self.ports.host}:{self.ports.grpc}"

    @property
    def parts(self) -> list[Part]:
        """What is supervised."""
        return [self.executor, self.server] + ([self.front] if self.openai_port is not None else [])

    def start(self) -> None:
        """Start everything and wait until each model answers a real inference, and the OpenAI front a request.

        Raises:
            SmcError: a part ended by itself, or was started again as often as may be.
        """
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # children inherit it: a connection is a descriptor
        for part in self.parts:
            part.launch()
        start = Start(self, self.options.start_timeout_s, self.options.hang_timeout_s)
        while not self.stopping and not start.look():
            self._pause()
        if self.stopping:
            return
        self._find_stubs()
        self._write_state()
        self.ready = True
        self._prober = Prober(
            self._probes(),
            self.options.probe_interval_s,
            self.options.probe_timeout_s,
            lambda *result: self._results.put(result),
        )

    def answers(self, part: Part) -> bool:
        """Whether a part that starts is there: an executor or a front that answers, a server that has loaded its models."""
        if part is self.executor:
            return self.control.connected
        if part is self.front:
            return self._probe_front(READY_S) is None
        with contextlib.closing(self._connect()) as client, contextlib.suppress(InferenceServerException):
            return bool(client.is_server_ready(client_timeout=READY_S))
        return False

    def probe_model(self, model: str, timeout_s: float) -> str | None:
        """See probe."""
        return probe(self.grpc_address, model, timeout_s, trust=self._trust)

    def replace(self, part: Part) -> None:
        """Kill what is left of a part and start it again."""
        if part.process is not None:
            kill_group(part.process)
        if part is self.server:
            self._remove_shared_memory()
        part.launch()

    def _probe_front(self, timeout_s: float) -> str | None:
        return probe_front(self.ports.host, self.openai_port or 0, self.options.openai_cert is not None, timeout_s)

    def _probes(self) -> dict[str, Callable[[float, float], str | None]]:
        def of_model(model: str, timeout_s: float, started: float) -> str | None:
            return probe(self.grpc_address, model, timeout_s, lambda: self._late_probe_s(model, started), self._trust)

        def of_front(timeout_s: float, _started: float) -> str | None:
            return self._probe_front(timeout_s)

        probes: dict[str, Callable[[float, float], str | None]] = {
            model: functools.partial(of_model, model) for model in MODELS
        }
        return probes | ({FRONT: of_front} if self.openai_port is not None else {})

    def _late_probe_s(self, model: str, started: float) -> float:
        """How much longer to wait for a probe whose time is over, in seconds.

        A busy executor answers after its step. Steps that outlast a probe are no fault of the server's, so the probe waits
        until the executor has taken turns enough to answer it. That ends: an executor that takes none has hang_timeout_s.
        """
        if self.stopping or not self.control.connected or self.control.turns_since(started) >= TURNS_OF_A_PROBE:
            return 0.0
        if time.monotonic() < started + self.options.probe_timeout_s + LATE_PROBE_S:  # say it once
            self._log.info("probe_slow", model=model, silence_s=round(self.control.silence_s, 1))
        return LATE_PROBE_S

    def watch(self) -> None:
        """Look after everything until `stopping` is set.

        Raises:
            SmcError: a part keeps dying.
        """
        while not self.stopping:
            self.check()
            self._pause()

    def _pause(self) -> None:
        """Sleep for a tick. What was not heard while this process itself was stopped is nobody's fault."""
        if self._guardian.poll() is not None:
            self._log.error("restart", name="guardian", reason=f"ended with status {self._guardian.returncode}")
            with contextlib.suppress(OSError):  # no room for a process: at the next tick
                self._guardian = guardian.start(self.folder, self._shm_prefix)
        began = time.monotonic()
        time.sleep(TICK_S)
        now = time.monotonic()
        if now - began > STOPPED_S:
            self._log.info("was_stopped", seconds=round(now - began, 1))
            self.control.excuse_silence()
            self._settled_at = now
            for part in self.parts:
                part.starts[-1] = now

    def check(self) -> None:
        """One look at every part."""
        for part in self.parts:
            if part.process is not None and part.process.poll() is not None:
                self._restart(part, f"ended with status {part.process.returncode}")
        if self.control.silence_s > self.options.hang_timeout_s:
            self._restart(self.executor, f"said nothing for {self.control.silence_s:.0f} s")
        if self._absence_s() > self.options.start_timeout_s:
            self._restart(self.executor, f"did not answer within {self.options.start_timeout_s:g} s")
        for model, pid in self._stubs.items():
            if not _is_stub(command_line(pid)):
                self._heal_stub(model, pid)
                break
        if not self.control.connected:
            self._settled_at = time.monotonic()
        self._read_probes()

    def _absence_s(self) -> float:
        """For how many seconds an executor that was started (again) has not been there."""
        now = time.monotonic()
        if self.control.connected:
            self._connected_at = now
        return now - max(self._connected_at, self.executor.starts[-1])

    def _read_probes(self) -> None:
        while not self._results.empty():
            model, wrong, started = self._results.get()
            part = self.front if model == FRONT else self.server
            if part is self.front and self._front_starts(wrong):
                continue
            if wrong is None or started < self._settled_at:  # a probe says nothing about what was restarted since
                self._failures[model] = 0
                continue
            self._failures[model] = self._failures.get(model, 0) + 1
            self._log.error("probe_failed", model=model, reason=wrong, times=self._failures[model])
            if self._failures[model] >= 2:
                self._failures.clear()
                self._restart(part, f"{model} answers no probe")

    def _front_starts(self, wrong: str | None) -> bool:
        """Whether the front has yet to answer its first probe; nobody answers while it is being imported."""
        self.front.answered = self.front.answered or wrong is None
        young = time.monotonic() < self.front.starts[-1] + SERVER_START_S
        return wrong == NO_LISTENER and not self.front.answered and young

    def _restart(self, part: Part, reason: str) -> None:
        self._log.error("restart", name=part.name, reason=reason)
        if part.crashing:
            raise SmcError(
                f"{part.name} ended {CRASH_LIMIT + 1} times within {CRASH_WINDOW_S:g} s, expected it to serve: see its messages"
            )
        try:
            self.replace(part)
        except OSError as error:  # no room for a process: the next look finds it dead and tries again
            self._log.error("not_started", name=part.name, reason=str(error))
            return
        if part is self.server:
            self._wait_for_server()
        self._settled_at = time.monotonic()
        self._write_state()

    def _heal_stub(self, model: str, pid: int) -> None:
        """A stub died: load its model again, and end the streams that it left hanging."""
        self._log.error("stub_died", model=model, pid=pid)
        lost = self._requests_lost_with(pid)
        if lost == 0 and self._reload(model):
            self._find_stubs()
            self._settled_at = time.monotonic()
            self._log.info("model_reloaded", model=model)
            self._write_state()
        else:
            self._restart(self.server, f"the stub of {model} died with {lost} requests in flight")

    def _requests_lost_with(self, pid: int) -> int:
        """Requests that a dead stub had in the executor; 1 when it cannot be known."""
        limit = time.monotonic() + LOST_CLIENT_WAIT_S
        while time.monotonic() < limit and self.control.connected:
            report = self.control.ask(0.5) or {}
            if str(pid) in report.get("lost_clients", {}):
                return report["lost_clients"][str(pid)]
            time.sleep(TICK_S)
        return 1

    def _reload(self, model: str) -> bool:
        try:
            with contextlib.closing(self._connect()) as client:
                client.unload_model(model, client_timeout=SERVER_START_S)
                client.load_model(model, client_timeout=SERVER_START_S)
        except InferenceServerException as error:
            self._log.error("reload_failed", model=model, reason=str(error))
            return False
        self._remove_shared_memory()
        return True

    def _wait_for_server(self) -> None:
        """Until a restarted server has loaded its models; it may also die meanwhile, which the next look sees."""
        limit, server = time.monotonic() + SERVER_START_S, self.server
        while time.monotonic() < limit and server.process is not None and server.process.poll() is None:
            if self.answers(server):
                break
            time.sleep(TICK_S)
        self._find_stubs()

    def _connect(self) -> grpcclient.InferenceServerClient:
        return grpcclient.InferenceServerClient(self.grpc_address, **client_arguments(self._trust))

    def _find_stubs(self) -> dict[str, int]:
        """Process ids of the stubs, by model."""
        self._stubs = {}
        if self.server.process is not None:
            for pid in group_members(self.server.process.pid):
                arguments = command_line(pid)
                if _is_stub(arguments):
                    self._stubs[Path(arguments[1]).parents[1].name] = pid
        return self._stubs

    def _remove_shared_memory(self) -> None:
        """Unlink regions that a dead stub or server left; those in use are mapped and named by a live stub."""
        used = {argument for pid in self._find_stubs().values() for argument in command_line(pid)}
        for region in Path("/dev/shm").glob(f"{self._shm_prefix}*"):
            if region.name not in used:
                region.unlink(missing_ok=True)

    def _start_executor(self) -> Popen[bytes]:
        environment = os.environ if self._tp == 1 else rank_environment(self._tp)
        return self._spawn(executor_command(self.options, self._address, self._tp), environment)

    def _start_server(self) -> Popen[bytes]:
        cert, key = self.options.grpc_cert, self.options.grpc_key
        tls = (cert, key) if cert is not None and key is not None else None
        command = tritonserver.command(self._installation, self._backends, self.ports, self._shm_prefix, tls)
        return self._spawn(command, self._installation.environment(self._address))

    def _start_front(self) -> Popen[bytes]:
        command = [sys.executable, "-m", "smc_engines.serving.openai_front", "--grpc", self.grpc_address]
        command += ["--host", self.ports.host, "--port", str(self.openai_port)]
        if self._trust is not None:
            command += ["--grpc-ca", self._trust.ca, "--grpc-name", self._trust.name or ""]
        command += ["--model-name", Path(self.options.engine).resolve().name]
        for name in ("api_key_file", "cert", "key"):
            if (value := getattr(self.options, f"openai_{name}")) is not None:
                command += [f"--{name.replace('_', '-')}", value]
        return self._spawn(command, os.environ)

    def _spawn(self, command: Sequence[str], env: Mapping[str, str]) -> Popen[bytes]:
        return spawn(command, {**env, guardian.RUN: str(self.folder)}, self._output)

    def _write_state(self) -> None:
        """Where everything is, for scripts: written whole or not at all; later a full disk is no reason to end.

        Raises:
            SmcError: it cannot be written before anything is ready.
        """
        if self.options.state_file is None:
            return
        state = {
            **vars(self.ports),
            "openai": self.openai_port,
            "folder": str(self.folder),
            "shm_prefix": self._shm_prefix,
            "address": self._address,
            "processes": {part.name: part.process.pid for part in self.parts if part.process is not None},
            "stubs": self._stubs,
        }
        path = Path(self.options.state_file)
        partial = path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(state, indent=2))
            partial.replace(path)
        except OSError as error:
            if not self.ready:  # whoever asked for it waits for it
                raise SmcError(
                    f"--state-file {path} cannot be written ({error.strerror}), expected a disk with room: correct the path"
                ) from None
            self._log.error("state_not_written", path=str(path), reason=str(error.strerror))

    def drain(self) -> None:
        """End in order: no new requests, streams finish, then the front, the server and the executor go."""
        if not self.ready:
            return
        self._log.info("draining", seconds=self.options.drain_s)
        if self._prober is not None:
            self._prober.close()
        executor = self.executor.process
        if executor is not None and executor.poll() is None:
            if self._tp == 1:
                executor.terminate()
            else:
                self.control.drain()  # mpirun would pass a signal on to every rank and not wait
            with contextlib.suppress(Exception):
                executor.wait(self.options.drain_s + DRAIN_MARGIN_S)

    def _unload(self, server: Popen[bytes]) -> None:
        """Ask the server to end, and wait while its stubs go one by one.

        A client's idle gRPC stream keeps the last model that it called loaded and the server alive for all of its exit
        timeout. Every answer has been read by now, so nothing is lost by not waiting for such a stream.
        """
        server.terminate()
        now = time.monotonic()
        limit, stalled, stubs = now + tritonserver.EXIT_TIMEOUT_S + 5.0, now + STALL_S, group_members(server.pid)
        while server.poll() is None and time.monotonic() < min(limit, stalled):
            time.sleep(TICK_S)
            before, stubs = stubs, group_members(server.pid)
            if stubs != before:
                stalled = time.monotonic() + STALL_S

    def close(self) -> None:
        """End every process and remove what they left; at once where there was no service yet."""
        for part, timeout_s in ((self.front, 10.0), (self.server, 0.0), (self.executor, 5.0)):
            if part.process is not None:
                if part is self.server and self.ready:
                    self._unload(part.process)
                status = end(part.process, timeout_s if self.ready else 0.0)
                self._log.info("ended", name=part.name, status=status)
        self.control.close()
        self.clear()
        guardian.dismiss(self._guardian)
        if self._output is not None:
            self._output.close()

    def clear(self) -> None:
        """Kill what is left of the run at once, and remove its files. Safe in a signal handler."""
        guardian.clear(self.folder, self._shm_prefix)


def _is_stub(arguments: Sequence[str]) -> bool:
    return len(arguments) > 1 and arguments[0].endswith("triton_python_backend_stub")


def remove_leftovers() -> None:
    """End and remove what supervisors left that were killed together with their guardian."""
    for parent in (Path(tempfile.gettempdir()), Path("/dev/shm")):
        for path in parent.glob(f"{RUNTIME_PREFIX}*"):
            owner = path.name.removeprefix(RUNTIME_PREFIX).split("-")[0]
            # one of this number is from before, where a container's processes are numbered anew
            if not owner.isdecimal() or (owner != str(os.getpid()) and Path(f"/proc/{owner}").exists()):
                continue
            if path.is_dir():
                guardian.clear(path, f"{RUNTIME_PREFIX}{owner}-")
            else:
                with contextlib.suppress(OSError):  # another user's
                    path.unlink(missing_ok=True)


def check_ports(ports: Mapping[str, int | None]) -> None:
    """Refuse ports that are given twice.

    Raises:
        ConfigError: two parts would listen on one port.
    """
    seen: dict[int, str] = {}
    for name, port in ports.items():
        if port in seen and port:
            raise ConfigError(f"{name} and {seen[port]} are both {port}, expected different ports: change one")
        if port:
            seen[port] = name
