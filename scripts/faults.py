"""Break a served engine in every way that can be arranged, and measure what clients see: python scripts/faults.py

Rows are (fault, part, phase). For each: what requests in flight got and after how many seconds, how long until a request
succeeds again without a person, or how smc-serve ended, and whether a process, shared memory or file was left. A row fails when
a client waits longer than LIMIT_S, service does not come back, an answer is wrong, or something is left; then the exit
status is 1.

    kill executor while streaming   clients UNAVAILABLE after 0.1 s   service back after 5.2 s
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
from served import Served, children, end_by_sigterm, ranks_of, serve, tiny_engine

from smc_build.builder import BuildOptions, build_engine
from smc_engines.serve_cli import free_port
from smc_engines.serving.process import command_line, group_members
from smc_engines.serving.triton_client import ServingError, TritonClient

LIMIT_S = 90.0
# the watchdog's times, shorter than its defaults so that a table takes minutes; they bound every row of a stopped process
WATCH = (
    "--probe-interval",
    "0.5",
    "--probe-timeout",
    "6",
    "--hang-timeout",
    "6",
    "--start-timeout",
    "20",
    "--drain",
    "6",
)
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
PARTS = ("executor", "tritonserver", "stub", "openai")
RANKS = ("rank 0", "rank 1")
STREAM = {
    "text_input": "hello",
    "stream": True,
    "num_particles": 1,
    "num_draft_tokens": 2,
    "ignore_eos": True,
    "seed": 1,
}
LONG, SHORT = 900, 4
SELF = "smc-serve"
PORTS = ("http", "grpc", "metrics", "openai", "status")
STOPPED_S = 14.0  # longer than each of the watchdog's times but one
LEFT_S = 5.0  # a rank notices within this time that its mpirun is gone
PROMPT = "hello " * 160  # of a request that is still in its prefill when it is struck
COMMANDS = {
    "executor": "executor_process",
    "tritonserver": "bin/tritonserver",
    "stub": "python_backend_stub",
    "openai": "openai_front",
}
Row = dict[str, Any]


class FaultError(AssertionError):
    """A row did not go as it must."""


def ended_well(status: int) -> int:
    """The exit status of a smc-serve that was told to end."""
    if status != 0:
        raise FaultError(f"smc-serve ended with status {status}, expected 0")
    return status


def free_ports() -> list[int]:
    """As many different ports as PORTS."""
    found: set[int] = set()
    while len(found) < len(PORTS):
        found.add(free_port("127.0.0.1"))
    return list(found)


def over_openai(service: Served, tokens: int) -> str:
    """A streamed completion of the front; returns its raw events."""
    body = {
        "model": service.model,
        "prompt": "hello",
        "max_tokens": tokens,
        "num_particles": 1,
        "stream": True,
        "ignore_eos": True,
    }
    url = f"{service.url('openai')}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=LIMIT_S) as answer:
        text = "".join(answer.iter_text())
    if answer.status_code != 200 or '"error"' in text or not text.rstrip().endswith("[DONE]"):
        raise ServingError(text[-200:], f"HTTP {answer.status_code} with an error")
    return text


def over_grpc(service: Served, tokens: int, **other: Any) -> list[int]:
    """A streamed answer of model smc; returns its tokens."""
    with TritonClient(f"127.0.0.1:{service.state['grpc']}") as client:
        values = {**STREAM, "max_tokens": tokens, **other}
        answer = client.stream("smc", values, timeout_s=3.0 if tokens == SHORT else LIMIT_S)
        return [int(token) for response in answer for token in response["output_ids"].ravel()]


def in_flight(service: Served, part: str, count: int = 2) -> tuple[list[threading.Thread], list[tuple[str, float]]]:
    """Long streams through the part; their ends and when they came."""
    ask = over_openai if part == "openai" else over_grpc
    threads, ends = clients(lambda: ask(service, LONG), count)
    service.wait(lambda: service.status().get("running", 0) >= count, LIMIT_S, "streams run")
    return threads, ends


def in_prefill(service: Served) -> tuple[list[threading.Thread], list[tuple[str, float]]]:
    """Requests with long prompts, of which some have not begun to answer."""

    def prefilling() -> bool:
        return any(request["phase"] == "prefill" for request in service.status().get("live", ()))

    threads, ends = clients(lambda: long_prompt(service), 16)
    service.wait(prefilling, LIMIT_S, "a prompt is being read")
    return threads, ends


def long_prompt(service: Served) -> list[int]:
    """A request whose prompt takes many times the memory of its answer."""
    return over_grpc(service, 1, text_input=PROMPT, cache_prompt=False)


def clients(ask: Callable[[], object], count: int) -> tuple[list[threading.Thread], list[tuple[str, float]]]:
    """Threads that ask; how each ended and when."""
    ends: list[tuple[str, float]] = []

    def run() -> None:
        try:
            ask()
            end = "whole"
        except ServingError as error:
            end = error.status
        except httpx.HTTPError as error:
            end = type(error).__name__
        ends.append((end, time.monotonic()))

    threads = [threading.Thread(target=run, daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, ends


def strike(service: Served, part: str, fault: str) -> float:
    """Send the signal; returns when."""
    pids = service.pids
    os.kill(pids["stub smc"] if part == "stub" else pids[part], SIGNALS[fault])
    return time.monotonic()


def running_service(service: Served, fault: str, part: str, phase: str, want: list[int]) -> Row:
    """A fault of a service that is idle or streams; it must come back by itself."""
    # the state file names new processes only when they are ready
    service.wait(lambda: all(map(command_line, service.pids.values())) and service.works(), LIMIT_S, "it works before")
    threads, ends = [], []
    if phase == "streaming":
        threads, ends = in_flight(service, part)
    elif phase == "prefill":
        threads, ends = in_prefill(service)
    logged = len(service.log)
    struck = strike(service, part, fault)
    for thread in threads:
        thread.join(LIMIT_S)
        if thread.is_alive():
            raise FaultError(f"a client still waits after {LIMIT_S:g} s")

    def works() -> bool:
        with contextlib.suppress(ServingError, httpx.HTTPError, OSError):
            if part == "openai":
                return bool(over_openai(service, SHORT))
            got = over_grpc(service, SHORT)
            if got != want:
                raise FaultError(f"the answer was {got} after the fault, expected {want}")
            return True
        return False

    service.wait(works, LIMIT_S, "a request succeeds again")
    back = time.monotonic() - struck
    service.wait(service.idle, LIMIT_S, "no page is held")
    seen = sorted({end for end, _ in ends})
    row: Row = {"clients": seen, "back_s": round(back, 2), "restarts": restarts(service.log[logged:])}
    if ends:
        row["error_s"] = round(max(at for _, at in ends) - struck, 2)
    return row


def restarts(log: str) -> list[str]:
    """What smc-serve restarted, and why, by a piece of its log."""
    events = [json.loads(line) for line in log.splitlines() if '"event": "restart"' in line]
    return [f"{event['name']} {event['reason']}" for event in events]


def child(service: Served, part: str) -> int | None:
    """The process of a part while it starts, before the state file names it."""
    groups = children(service.process.pid)
    if part in RANKS:
        return next((found[part] for group in groups if part in (found := ranks_of(group))), None)
    for pid in [member for group in groups for member in group_members(group)]:
        arguments = command_line(pid)
        passing = (
            arguments[0:1] == ["sh"] or len(arguments) == 1
        )  # the server tries its stub before it starts one of a model
        if not passing and any(COMMANDS[part] in argument for argument in arguments):
            return pid
    return None


def awaited_child(service: Served, part: str) -> int:
    """The same, as soon as it is there."""
    limit = time.monotonic() + LIMIT_S
    while (pid := child(service, part)) is None:
        if time.monotonic() > limit or service.process.poll() is not None:
            raise FaultError(f"{part} was not there after {LIMIT_S:g} s, or smc-serve ended: {service.log[-1500:]}")
        time.sleep(0.01)
    return pid


def while_loading(engine: Path, fault: str, part: str) -> Row:
    """A fault before the service is ready: it must come up all the same, and leave nothing when it is told to end."""
    with serve(engine, *WATCH, wait=False) as service:
        os.kill(awaited_child(service, part), SIGNALS[fault])
        struck = time.monotonic()
        while "try it:" not in service.log:
            if service.process.poll() is not None:
                raise FaultError(f"smc-serve ended with status {service.process.returncode}: {service.log[-1500:]}")
            if time.monotonic() - struck > LIMIT_S:
                raise FaultError(f"smc-serve still starts after {LIMIT_S:g} s")
            time.sleep(0.02)
        back = time.monotonic() - struck
        if not restarts(service.log):
            raise FaultError(f"{part} was not struck while it loaded")
        if part == "openai":
            over_openai(service, SHORT)
        return {
            "clients": [],
            "back_s": round(back, 2),
            "restarts": restarts(service.log),
            "tokens": len(over_grpc(service, SHORT)),
            "ended": ended_well(service.stop()),
            "left": left_by(service),
        }


def left_by(service: Served) -> list[str]:
    """What an ended service still leaves after LEFT_S: processes, its folder and regions, all named after its process id."""
    own, limit = f"smc-serve-{service.process.pid}-", time.monotonic() + LEFT_S

    def of_it(process: Path) -> bool:
        with contextlib.suppress(OSError):
            return any(own.encode() in (process / name).read_bytes() for name in ("cmdline", "environ"))
        return False

    def found() -> list[str]:
        live = [f"process {process.name}" for process in Path("/proc").glob("[0-9]*") if of_it(process)]
        places = (Path(tempfile.gettempdir()), Path("/dev/shm"))
        return live + [str(path) for place in places for path in place.glob(f"{own}*")]

    while (left := found()) and time.monotonic() < limit:
        time.sleep(0.1)
    return left


def while_draining(engine: Path, fault: str, part: str) -> Row:
    """A fault after SIGTERM, with streams under way: smc-serve must end in bounded time and leave nothing."""
    with serve(engine, *WATCH) as service:
        threads, ends = in_flight(service, part)
        state = service.state
        service.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        struck = strike(service, part, fault)
        try:
            status = ended_well(service.process.wait(LIMIT_S))
        except subprocess.TimeoutExpired:
            raise FaultError(f"smc-serve still drains after {LIMIT_S:g} s") from None
        ended = time.monotonic() - struck
        for thread in threads:
            thread.join(LIMIT_S)
            if thread.is_alive():
                raise FaultError(f"a client still waits {LIMIT_S:g} s after the end")
        left = left_by(service) or service.leftovers(state)
        return {"status": status, "ended_s": round(ended, 2), "clients": sorted({end for end, _ in ends}), "left": left}


def supervisor_struck(engine: Path, fault: str, phase: str) -> Row:
    """A fault of smc-serve itself: a stopped one goes on as before, a killed one is started again on the same ports.

    That next start is a service manager's; it comes as soon as nothing is left of the one before.
    """
    ports = [f"--{name}-port={port}" for name, port in zip(PORTS, free_ports(), strict=True)]
    with serve(engine, *WATCH, *ports, wait=phase != "loading") as service:
        threads, ends = [], []
        want = [] if phase == "loading" else over_grpc(service, SHORT)
        if phase == "loading":
            awaited_child(service, "stub")
        elif phase == "prefill":
            threads, ends = in_prefill(service)
        elif phase != "idle":
            threads, ends = in_flight(service, "executor")
        if phase == "draining":
            service.process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        service.process.send_signal(SIGNALS[fault])
        struck = time.monotonic()
        if fault == "stop":
            return stopped_supervisor(service, phase, threads, ends)
        left = left_by(service)
        with serve(engine, *WATCH, *ports) as again:
            tokens = len(over_grpc(again, SHORT)) if over_openai(again, SHORT) else 0
            if want and over_grpc(again, SHORT) != want:
                raise FaultError(f"the answer was another one after the fault, expected {want}")
            back = time.monotonic() - struck
            seen, error = ended_clients(threads, ends)
            row: Row = {
                "clients": seen,
                "back_s": round(back, 2),
                "tokens": tokens,
                "ended": ended_well(again.stop()),
                "left": left,
            }
        return row | ({"error_s": round(error - struck, 2)} if threads else {})


def stopped_supervisor(
    service: Served, phase: str, threads: list[threading.Thread], ends: list[tuple[str, float]]
) -> Row:
    """What a smc-serve does that was stopped and goes on; its parts serve meanwhile."""
    before = {} if phase == "loading" else service.state
    time.sleep(STOPPED_S)
    serves = phase in ("loading", "draining") or len(over_grpc(service, SHORT)) == SHORT
    service.process.send_signal(signal.SIGCONT)
    went_on = time.monotonic()
    if phase == "loading":
        service.wait(lambda: "try it:" in service.log, LIMIT_S, "it starts")
    elif phase != "draining":
        service.wait(lambda: "was_stopped" in service.log, LIMIT_S, "it goes on")
        time.sleep(LEFT_S)  # it probes everything
    seen, _ = ended_clients(threads, ends)
    if not serves or (phase != "loading" and (restarts(service.log) or service.state != before)):
        raise FaultError(f"parts that were well did not serve or were started again: {restarts(service.log)}")
    if phase == "loading":
        over_grpc(service, SHORT)
    status = ended_well(service.process.wait(LIMIT_S) if phase == "draining" else service.stop())
    row: Row = {"clients": seen, "status": status, "restarts": restarts(service.log), "left": left_by(service)}
    return row | ({"ended_s": round(time.monotonic() - went_on, 2)} if phase == "draining" else {})


def ended_clients(threads: list[threading.Thread], ends: list[tuple[str, float]]) -> tuple[list[str], float]:
    """How clients ended, and when the last one did."""
    for thread in threads:
        thread.join(LIMIT_S)
        if thread.is_alive():
            raise FaultError(f"a client still waits after {LIMIT_S:g} s")
    return sorted({end for end, _ in ends}), max((at for _, at in ends), default=0.0)


def spoil(engine: Path, folder: Path, damage: Callable[[Path], object]) -> Path:
    """A damaged copy of an engine directory."""
    copy = folder / f"damaged-{len(list(folder.iterdir()))}"
    shutil.copytree(engine, copy)
    damage(copy)
    return copy


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def refused(command: list[str], words: str) -> Row:
    """A command that must end with status 1 and one line that has the words."""
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    said = done.stderr.strip().splitlines()
    if done.returncode != 1 or "Traceback" in done.stderr or words not in done.stderr:
        raise FaultError(f"status {done.returncode}, expected 1 and {words!r}, got {done.stderr[-600:]}")
    line = next(line for line in said if words in line)
    return {"status": 1, "ended_s": round(time.monotonic() - began, 2), "says": [line]}


def limited(limit: str, command: list[str]) -> list[str]:
    """A command under a limit of the shell's ulimit."""
    return ["bash", "-c", f'ulimit {limit}; exec "$@"', "limited", *command]


def files(engine: Path, folder: Path) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Faults of files, memory and ports at the start."""
    executor = [
        sys.executable,
        "-m",
        "smc_engines.serving.executor_process",
        "--address",
        f"ipc://{folder}/address",
        "--engine",
    ]
    front = [sys.executable, "-m", "smc_engines.serve_cli", "--engine"]
    weights = Path("target/weights/rank0.safetensors")
    damages: dict[str, tuple[Callable[[Path], object], str]] = {
        "a flipped bit in the weights": (lambda copy: flip(copy / weights), "is damaged: SHA-256"),
        "a flipped bit in the tokenizer": (lambda copy: flip(copy / "tokenizer/tokenizer.json"), "is damaged: SHA-256"),
        "truncated weights": (lambda copy: os.truncate(copy / weights, 1000), "has 1000 bytes, expected"),
        "missing weights": (lambda copy: (copy / weights).unlink(), "is missing or no plain file, expected"),
        "unreadable weights": (_make_unreadable(weights), "is missing or no plain file, expected"),
        "a truncated manifest": (lambda copy: os.truncate(copy / "manifest.json", 100), "cannot read manifest.json"),
        "weights that are a link out of the directory": (
            _make_link(weights),
            "expected a file inside the engine directory",
        ),
    }
    yield "a flipped bit in a plan", lambda: flipped_plan(engine, folder, executor)
    for name, (damage, words) in damages.items():
        yield name, lambda damage=damage, words=words: refused([*executor, str(spoil(engine, folder, damage))], words)
    yield (
        "too little memory",
        lambda: refused(
            limited("-v 1300000", [*executor, str(engine), "--num-pages", "300000"]), "does not fit into memory"
        ),
    )

    def port_in_use() -> Row:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            return refused([*front, str(engine), "--grpc-port", str(taken.getsockname()[1])], "is in use on 127.0.0.1")

    yield "a port in use", port_in_use

    def disk_full_at_build() -> Row:
        target = engine.parent / "target"
        build = [
            sys.executable,
            "-m",
            "smc_build.cli",
            "--checkpoint",
            str(target),
            "--draft",
            "none",
            "--output",
            f"{folder}/full",
        ]
        row = refused(limited("-f 200", build), "smc-build")
        if (folder / "full").exists():
            raise FaultError("a partial engine directory was left")
        return row

    yield "disk full while building", disk_full_at_build

    def disk_full_for_logs() -> Row:
        with serve(engine, *WATCH, "--log-file", "/dev/full") as service:
            over_grpc(service, SHORT)
            return {"clients": ["whole"], "status": ended_well(service.stop())}

    yield "disk full for logs", disk_full_for_logs
    yield "the executor gets no more memory, long prompts", lambda: memory_ends(engine)
    yield "the clock jumps by three days, streaming", lambda: clock_jumps(engine, folder)


def memory_ends(engine: Path) -> Row:
    """No byte of memory more than the executor has: what it asks for next is refused, in the middle of requests."""
    env = {"MALLOC_MMAP_THRESHOLD_": "8192"}  # so that tensors are asked for anew, and not made of what was freed
    with serve(engine, *WATCH, env=env) as service:
        want, pid = over_grpc(service, SHORT), service.pids["executor"]
        used = int(Path(f"/proc/{pid}/statm").read_text().split()[5]) * resource.getpagesize()
        resource.prlimit(pid, resource.RLIMIT_DATA, (used, used))
        struck = time.monotonic()
        threads, ends = clients(lambda: long_prompt(service), 16)
        for thread in threads:
            thread.join(LIMIT_S)
        if "whole" in {end for end, _ in ends} or len(ends) < len(threads):
            raise FaultError(f"answers without memory, or none: {ends}")
        error_s = max(at for _, at in ends) - struck

        def works() -> bool:
            with contextlib.suppress(ServingError):
                return over_grpc(service, SHORT) == want
            return False

        service.wait(works, LIMIT_S, "a request succeeds again")
        back_s = time.monotonic() - struck
        seen = sorted({end for end, _ in ends})
        return {
            "clients": seen,
            "error_s": round(error_s, 2),
            "back_s": round(back_s, 2),
            "ended": ended_well(service.stop()),
        }


def flipped_plan(engine: Path, folder: Path, executor: list[str]) -> Row:
    """An engine with plans of the real TensorRT-RTX builder, one of them damaged."""
    model = engine.parent
    options = BuildOptions(str(model / "target"), draft=str(model / "draft"), output=folder / "plans", dtype="bfloat16")
    build_engine(dataclasses.replace(options, compiler="tensorrt-rtx", particles=2, draft_tokens=2, groups=1))
    flip(next((folder / "plans").glob("target/plans/*.plan")))
    return refused([*executor, str(folder / "plans")], "is damaged: SHA-256")


def clock_jumps(engine: Path, folder: Path) -> Row:
    """The time of day jumps ahead and back while streams run, for every process: nobody may notice."""
    library, shift = folder / "clock_jump.so", folder / "shift"
    source = Path(__file__).with_name("clock_jump.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    shift.write_text("0")
    env = {"LD_PRELOAD": str(library), "CLOCK_JUMP": str(shift)}
    with serve(engine, *WATCH, env=env) as service:
        want, logged = over_grpc(service, SHORT), service.log.count("restart")
        threads, ends = in_flight(service, "executor")
        for days in (3, -3, 0):
            shift.write_text(str(days * 86400))
            time.sleep(1)
            if over_grpc(service, SHORT) != want:
                raise FaultError(f"another answer {days} days off")
        for thread in threads:
            thread.join(LIMIT_S)
        seen = sorted({end for end, _ in ends})
        dates = set(re.findall(r'"time": "(\d+-\d+-\d+)T', service.log))
        if seen != ["whole"] or service.log.count("restart") != logged or len(dates) != 3:
            raise FaultError(f"streams ended {seen}, log of {sorted(dates)}: {service.log[-800:]}")
        return {"clients": seen, "status": ended_well(service.stop())}


def _make_unreadable(weights: Path) -> Callable[[Path], object]:
    def damage(copy: Path) -> None:
        (copy / weights).unlink()
        (copy / weights).mkdir()  # a mode would not stop root

    return damage


def _make_link(weights: Path) -> Callable[[Path], object]:
    def damage(copy: Path) -> None:
        outside = copy.parent / f"{copy.name}-outside"
        shutil.move(copy / weights, outside)
        (copy / weights).symlink_to(outside)

    return damage


def attempt(name: str, work: Callable[[], Row]) -> Row:
    """Run one row; what went wrong becomes part of it."""
    try:
        row = work()
        problem = f"left {row['left']}" if row.get("left") else ""
    except (FaultError, OSError, ServingError, httpx.HTTPError, subprocess.TimeoutExpired) as error:
        row, problem = {}, f"{type(error).__name__}: {str(error)[-1500:]}"
    row = {"fault": name, **row, **({"problem": problem} if problem else {})}
    print(json.dumps(row), flush=True)
    return row


def rows(engine: Path, folder: Path, wanted: str) -> Generator[Row]:
    """Every row whose name contains the wanted text, run."""

    for name, work in files(engine, folder):
        if wanted in name:
            yield attempt(name, work)
    cases = [(fault, "executor", "prefill") for fault in SIGNALS]
    cases += [(fault, part, phase) for phase in ("streaming", "idle") for fault in SIGNALS for part in PARTS]
    yield from lasting_rows(engine, cases, wanted)
    yield from ending_rows(engine, PARTS, wanted)
    for phase, fault in itertools.product(("prefill", "streaming", "idle", "loading", "draining"), SIGNALS):
        if wanted in (name := f"{fault} {SELF}, {phase}"):
            yield attempt(name, functools.partial(supervisor_struck, engine, fault, phase))
    yield from rank_rows(folder / "ranks", wanted)


def rank_rows(folder: Path, wanted: str) -> Iterator[Row]:
    """The ranks of an executor that is spread over two; a service for each phase, or it were restarted too often."""
    phases = ("prefill", "streaming", "idle")
    cases = list(itertools.product(SIGNALS, RANKS, (*phases, "loading", "draining")))
    own = {f"kill {SELF} with ranks, {phase}": phase for phase in ("streaming", "loading")}
    if not any(wanted in name for name in (*("{} {}, {}".format(*case) for case in cases), *own)):
        return
    engine = tiny_engine(folder, ranks=len(RANKS))
    for name, phase in own.items():
        if wanted in name:
            yield attempt(name, functools.partial(supervisor_struck, engine, "kill", phase))
    for phase in phases:
        yield from lasting_rows(engine, [case for case in cases if case[2] == phase], wanted)
    yield from ending_rows(engine, RANKS, wanted)


def ending_rows(engine: Path, parts: tuple[str, ...], wanted: str) -> Iterator[Row]:
    """Faults of a service that starts or drains: it ends with each."""
    works = {"loading": while_loading, "draining": while_draining}
    for part, fault, phase in itertools.product(parts, SIGNALS, works):
        if wanted in (name := f"{fault} {part}, {phase}"):
            yield attempt(name, functools.partial(works[phase], engine, fault, part))


def lasting_rows(engine: Path, cases: Sequence[tuple[str, str, str]], wanted: str) -> Iterator[Row]:
    """Faults that one and the same service must survive, one after the other: (fault, part, phase)."""
    cases = [case for case in cases if wanted in "{} {}, {}".format(*case)]
    if not cases:
        return
    with serve(engine, *WATCH) as service:
        want = over_grpc(service, SHORT)
        for case in cases:
            yield attempt("{} {}, {}".format(*case), functools.partial(running_service, service, *case, want))


def main() -> int:
    """Run the rows, print them, write JSON."""
    parser = argparse.ArgumentParser(description="Faults of a served engine, and what clients see.")
    parser.add_argument("--only", default="", help="rows whose name contains this, for example 'executor, streaming'")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the tables of what --output wrote")
    options = parser.parse_args()
    if options.table is not None:
        print(markdown(read(options.table)))
        return 0
    end_by_sigterm()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = tiny_engine(folder / "model")
        (folder / "work").mkdir()
        table: list[Row] = []
        with contextlib.closing(rows(engine, folder / "work", options.only)) as done:
            for row in done:
                table.append(row)
                write(options.output, table)
    failed = [row["fault"] for row in table if "problem" in row]
    print(markdown(table))
    print(f"{len(table)} rows, {len(failed)} failed: {failed}")
    return 1 if failed else 0


def markdown(table: list[Row]) -> str:
    """The rows as docs/reliability.md shows them: faults of a service, then those that a start refuses."""
    survived, refusals = [], []
    for row in table:
        clients = ", ".join(row.get("clients", ())) + (f" after {row['error_s']:.2f} s" if "error_s" in row else "")
        if "problem" in row:
            outcome = "FAILED"
        elif "back_s" in row:
            outcome = f"back after {row['back_s']:.1f} s"
        else:
            outcome = (
                f"ended with status {row['status']} after {row['ended_s']:.1f} s" if "ended_s" in row else "goes on"
            )
        if "says" in row:
            refusals.append(f"| {row['fault']} | `{row['says'][0][:128]}` |")
        else:
            survived.append(f"| {row['fault']} | {clients or 'none'} | {outcome} |")
    tables = {
        "| fault | clients in flight | service |\n| --- | --- | --- |": survived,
        "| at the start | what happens (status 1) |\n| --- | --- |": refusals,
    }
    return "\n\n".join("\n".join([head, *lines]) for head, lines in tables.items() if lines)


def read(path: Path) -> list[Row]:
    """The rows of a file that --output wrote."""
    try:
        return json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"faults.py: {path} has no rows ({error!r}), expected a file that --output wrote: correct the path")


def write(output: Path | None, table: list[Row]) -> None:
    """The rows so far, as JSON."""
    report = {
        "watchdog": list(WATCH),
        "limit_s": LIMIT_S,
        "rows": table,
        "failed": sum("problem" in row for row in table),
    }
    report |= {"python": platform.python_version(), "cpus": os.cpu_count(), "load_average": os.getloadavg()[0]}
    if output is not None:
        output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
