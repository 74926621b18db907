"""Load a served engine for minutes and check every answer: make soak, or python scripts/soak.py [--engine DIR] [--seconds 600]

1 to 128 clients at once ask through every door (gRPC, HTTP generate_stream, the OpenAI front), streaming or not,
from one token to the longest answer; some give up midway, set a deadline, read slowly or send nonsense. Rules:

    a whole answer equals, token for token, what the same request gave on the undisturbed service
    a request that is given up or overdue gave a beginning of it; nonsense gives the right kind of error, never a hang
    when all is quiet again no page is promised, and memory, file descriptors, threads and /dev/shm are as they were

The exit status is 1 when a rule was broken. The figures compare two quiet moments: after a first wave of all clients, and at
the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from served import Served, end_by_sigterm, serve, tiny_engine

from smc_build.engine_dir import load_manifest
from smc_engines.serving.triton_client import ServingError, TritonClient, text_of

PROMPTS = ("The capital of France is", "hello", "Once upon a time there was a king who", "1 2 3 4 5 6 7", "x")
CROWDS = (1, 8, 32, 128)
LONGEST_S = 300.0  # for any one request; beyond it counts as a hang
SHARES = {"whole": 0.69, "gives up": 0.10, "deadline": 0.06, "slow": 0.05, "nonsense": 0.10}
# Slack of a quiet moment against another: thread pools of the server grow by a few at will.
MORE_FDS, MORE_THREADS, MORE_MEMORY = 24, 16, 1.15
SMALL_BYTES = 48 * 2**20

Body = dict[str, Any]
Door = Callable[["Doors", Body], Iterator[str]]


@dataclass(frozen=True)
class Case:
    """A request and the text that it gives when nothing disturbs it."""

    body: Body
    text: str


class Doors:
    """The ways into the service, for one client thread."""

    def __init__(self, service: Served) -> None:
        self.state, self.model = service.state, service.model
        self._open = contextlib.ExitStack()
        self.grpc = self._open.enter_context(TritonClient(f"127.0.0.1:{self.state['grpc']}"))
        self.http = httpx.Client(timeout=LONGEST_S)

    def close(self) -> None:
        """Hang up."""
        self._open.close()
        self.http.close()

    def grpc_text(self, body: Body) -> Iterator[str]:
        """Model smc over gRPC."""
        for response in self.grpc.stream("smc", body, timeout_s=LONGEST_S):
            yield text_of(response)

    def generate(self, body: Body) -> Iterator[str]:
        """HTTP generate_stream."""
        url = f"http://127.0.0.1:{self.state['http']}/v2/models/smc/generate_stream"
        with self.http.stream("POST", url, json=body) as answer:
            if answer.status_code != 200:
                raise ServingError(answer.read().decode(), str(answer.status_code))
            for event in _events(answer):
                if "error" in event:
                    raise ServingError(event["error"], "UNKNOWN")
                yield event.get("text_output", "")

    def openai(self, body: Body) -> Iterator[str]:
        """The OpenAI front."""
        url = f"http://127.0.0.1:{self.state['openai']}/v1/completions"
        asked = {**body, "prompt": body["text_input"], "model": self.model}
        del asked["text_input"]
        if not body["stream"]:
            answer = self.http.post(url, json=asked)
            _check_status(answer)
            yield answer.json()["choices"][0]["text"]
            return
        with self.http.stream("POST", url, json=asked) as answer:
            if answer.status_code != 200:
                answer.read()
                _check_status(answer)
            for event in _events(answer):
                if "error" in event:
                    raise ServingError(event["error"]["message"], "UNKNOWN")
                yield "".join(choice["text"] for choice in event["choices"])


def _check_status(answer: httpx.Response) -> None:
    if answer.status_code != 200:
        raise ServingError(answer.json()["error"]["message"], str(answer.status_code))


def _events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


DOORS: dict[str, Door] = {"gRPC": Doors.grpc_text, "HTTP": Doors.generate, "OpenAI": Doors.openai}
# (door, what is wrong, words of the message): each must be refused, whatever else goes on
NONSENSE: tuple[tuple[str, Body, str], ...] = (
    ("gRPC", {"max_tokens": 0}, "max_tokens"),
    ("gRPC", {"num_particles": 4096}, "num_particles"),
    ("gRPC", {"text_input": ""}, "prompt is empty"),
    ("gRPC", {"top_p": 2.0}, "top_p"),
    ("gRPC", {"input_ids": [1]}, "exactly one"),
    ("HTTP", {"max_tokens": "many"}, "Unable to parse"),
    ("HTTP", {"no_such_input": 1}, "no_such_input"),
    ("HTTP", {"text_input": "y" * 100_000}, "characters|tokens"),
    ("OpenAI", {"max_tokens": 10**6}, "together at most"),
    ("OpenAI", {"temperature": "hot"}, "temperature"),
    ("OpenAI", {"no_such_parameter": 1}, "no_such_parameter"),
    ("OpenAI", {"logit_bias": {"1": 5}}, "logit_bias"),
)


@dataclass
class Tally:
    """What happened, by kind of request, and what must not have."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, kind: str, problem: str = "") -> None:
        """Count one request."""
        with self.lock:
            self.counts[kind] += 1
            if problem:
                self.problems.append(f"{kind}: {problem}")


def catalogue(service: Served, longest: int) -> list[Case]:
    """Requests of every size, with what each gives on a service that does nothing else."""
    chance, cases, doors = random.Random(0), [], Doors(service)
    for number in range(24):
        most = (1, 2, 16, 48, longest)[number % 5]
        body: Body = {
            "text_input": chance.choice(PROMPTS),
            "max_tokens": most,
            "seed": number,
            "num_particles": chance.choice((1, 2, 4)),
            "num_draft_tokens": chance.choice((0, 2, 4)),
            "ignore_eos": chance.random() < 0.5,
        }
        if number % 6 == 5:
            body["stop"] = ["e"]
        grpc = {**body, "stop_words": body["stop"]} if "stop" in body else dict(body)
        grpc.pop("stop", None)
        text = "".join(doors.grpc_text({**grpc, "stream": False}))
        cases.append(Case(body, text))
    doors.close()
    return cases


def one_request(doors: Doors, cases: list[Case], chance: random.Random, tally: Tally) -> None:
    """One request of a random kind, and whether it kept the rules."""
    kind = chance.choices(list(SHARES), list(SHARES.values()))[0]
    if kind == "nonsense":
        _nonsense(doors, chance, tally)
        return
    case, name = chance.choice(cases), chance.choice(list(DOORS))
    body: Body = {**case.body, "stream": kind != "whole" or chance.random() < 0.6}
    if name != "OpenAI" and "stop" in body:
        body["stop_words"] = body.pop("stop")
    if kind == "deadline":
        body["timeout_ms"] = chance.choice((1, 50, 500))
    began, pieces, problem = time.monotonic(), [], ""
    answer = DOORS[name](doors, body)
    try:
        for piece in answer:
            pieces.append(piece)
            if kind == "gives up" and chance.random() < 0.5:
                break
            if kind == "slow":
                time.sleep(0.02)
        ended = kind != "gives up"
    except ServingError as error:
        ended = False
        if kind != "deadline" or "deadline" not in str(error):
            problem = f"{name} refused {body}: {error}"
    except (httpx.HTTPError, ValueError, KeyError) as error:
        ended, problem = False, f"{name} broke on {body}: {error!r}"
    finally:
        answer.close()  # type: ignore[attr-defined]
    text = "".join(pieces)
    if (ended and text != case.text) or not case.text.startswith(text):
        problem = f"{name} gave {text!r:.200}, expected {case.text!r:.200} for {body}"
    if time.monotonic() - began > LONGEST_S:
        problem = f"{name} took {time.monotonic() - began:.0f} s for {body}"
    tally.note(kind, problem)


def _nonsense(doors: Doors, chance: random.Random, tally: Tally) -> None:
    name, wrong, words = chance.choice(NONSENSE)
    body = {"text_input": "hi", "max_tokens": 2, "stream": chance.random() < 0.5, **wrong}
    try:
        text = "".join(DOORS[name](doors, body))
        problem = f"{name} accepted {wrong} and gave {text!r}"
    except ServingError as error:
        problem = (
            "" if any(word in str(error) for word in words.split("|")) else f"{name} said {error} to {wrong!r:.80}"
        )
    except (httpx.HTTPError, ValueError, KeyError) as error:
        problem = f"{name} broke on {wrong!r:.80}: {error!r}"
    tally.note("nonsense", problem)


def crowd(service: Served, cases: list[Case], clients: int, seconds: float, tally: Tally) -> None:
    """A number of clients at once for some time."""
    end = time.monotonic() + seconds

    def run(number: int) -> None:
        chance, doors = random.Random(f"{clients} {number}"), Doors(service)
        while time.monotonic() < end:
            one_request(doors, cases, chance, tally)
        doors.close()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + 2 * LONGEST_S)
        if thread.is_alive():
            tally.note("hang", f"a client of {clients} never came back")


def sample(service: Served) -> dict[str, dict[str, int]]:
    """Memory (bytes), file descriptors and threads of every process, and what lies in /dev/shm."""
    figures = {}
    for name, pid in service.pids.items():
        proc = Path(f"/proc/{pid}")
        memory = int((proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        threads = len(list((proc / "task").iterdir()))
        figures[name] = {"memory": memory, "fds": len(list((proc / "fd").iterdir())), "threads": threads}
    regions = [region.stat().st_size for region in Path("/dev/shm").glob(f"{service.state['shm_prefix']}*")]
    figures["/dev/shm"] = {"memory": sum(regions), "fds": len(regions), "threads": 0}
    return figures


def growth(before: dict[str, dict[str, int]], after: dict[str, dict[str, int]]) -> list[str]:
    """What grew beyond its slack between two quiet moments."""
    found = []
    for name, old in before.items():
        new = after.get(name)
        if new is None:
            found.append(f"{name} is gone")
            continue
        limits = {
            "memory": max(old["memory"] * MORE_MEMORY, old["memory"] + SMALL_BYTES),
            "fds": old["fds"] + MORE_FDS,
            "threads": old["threads"] + MORE_THREADS,
        }
        found += [f"{name}: {key} grew from {old[key]} to {new[key]}" for key in limits if new[key] > limits[key]]
    return found


def soak(service: Served, seconds: float, crowds: tuple[int, ...]) -> dict[str, Any]:
    """Everything; returns the report."""
    engine = load_manifest(service.engine, verify=False)
    longest = min(400, engine.max_seq_len - 100)
    cases, tally, warm = catalogue(service, longest), Tally(), Tally()
    crowd(service, cases, max(crowds), max(seconds / 10, 5), warm)
    service.wait(service.idle, LONGEST_S, "all requests have ended")
    pids, before = service.pids, sample(service)
    rows = []
    for clients in crowds:
        counted, began = sum(tally.counts.values()), time.monotonic()
        crowd(service, cases, clients, seconds / len(crowds), tally)
        rows.append({
            "clients": clients,
            "requests": sum(tally.counts.values()) - counted,
            "seconds": round(time.monotonic() - began, 1),
        })  # fmt: skip
    service.wait(service.idle, LONGEST_S, "all requests have ended")
    time.sleep(2.0)  # connections that clients closed go
    after, report = sample(service), service.status()
    problems = warm.problems + tally.problems + growth(before, after)
    if report["pages_used"] != report["pages_cached"]:
        problems.append(f"{report['pages_used']} pages are used, expected the {report['pages_cached']} cached ones")
    if service.pids != pids:
        problems.append("a process was restarted")
    return {
        "engine": engine.name,
        "seconds": seconds,
        "crowds": rows,
        "requests": dict(tally.counts),
        "violations": len(problems),
        "problems": problems[:20],
        "before": before,
        "after": after,
        "pages": {name: report[name] for name in ("pages_total", "pages_used", "pages_cached", "pages_promised")},
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
    }


def table(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{row['clients']:>4} clients  {row['requests']:>6} requests in {row['seconds']} s" for row in report["crowds"]
    ]
    lines += [f"{kind:<12}{count:>6}" for kind, count in report["requests"].items()]
    lines.append(f"{'':<26}{'memory MiB':>16}{'descriptors':>14}{'threads':>12}")
    for name, old in report["before"].items():
        new = report["after"].get(name, {"memory": 0, "fds": 0, "threads": 0})
        memory = f"{old['memory'] / 2**20:.0f} -> {new['memory'] / 2**20:.0f}"
        others = (f"{old[key]} -> {new[key]}" for key in ("fds", "threads"))
        lines.append(f"{name:<26}{memory:>16}{next(others):>14}{next(others):>12}")
    lines += [f"violation: {problem}" for problem in report["problems"]]
    return "\n".join([*lines, f"{report['violations']} violations"])


def main() -> int:
    """Serve, load, check; exit status 1 on any violation."""
    parser = argparse.ArgumentParser(description="Load a served engine and check every answer.")
    parser.add_argument("--engine", type=Path, help="a tiny random one is built unless given")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, nargs="+", default=list(CROWDS))
    parser.add_argument("--output", type=Path, help="write the report there as JSON")
    options = parser.parse_args()
    end_by_sigterm()
    with contextlib.ExitStack() as stack:
        engine = options.engine
        if engine is None:
            engine = tiny_engine(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model")
        service = stack.enter_context(serve(engine, "--max-queue", "1024"))
        report = soak(service, options.seconds, tuple(options.clients))
        state = service.state
        status = service.stop()
        left = service.leftovers(state)
    if status or left:
        report["problems"].append(f"smc-serve ended with status {status} and left {left}")
        report["violations"] += 1
    print(table(report))
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if report["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
