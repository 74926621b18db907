"""Read a profiler trace: which GPU events belong to which round, and what lies between rounds.

A captured round is one graph launch, and every kernel of a graph launch carries the launch's correlation number: kernels
that share a number are one round. Without captured rounds, one begins at each `_open_kernel`. Example, times in µs:

    round 7    kernels from 1000 to 13000      its summary's copy to the host 13004 to 13007
    round 8    kernels from 13010 to 25010     the gap is 10, of which 3 are the copy
"""

from __future__ import annotations

import gzip
import itertools
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smc_plugin.errors import SmcError

_KINDS = {"kernel": "kernel", "gpu_memcpy": "copy", "gpu_memset": "set"}
_FIRST_KERNEL = "_open_kernel"


@dataclass(frozen=True)
class Event:
    """One thing the GPU did.

    Args:
        kind: kernel, copy or set (of memory).
        start_us, us: when it started and how long it took; kernels that start early (programmatic dependent launch)
            overlap with those before them.
        grid: programs of a kernel, else ().
        correlation: number of the call that launched it.
    """

    name: str
    kind: str
    start_us: float
    us: float
    grid: tuple[int, ...] = ()
    correlation: int = -1

    @property
    def end_us(self) -> float:
        """When it ended."""
        return self.start_us + self.us


@dataclass(frozen=True)
class Timeline:
    """Rounds in order, each with its events in order, and the events outside of rounds."""

    rounds: list[list[Event]]
    outside: list[Event]


@dataclass(frozen=True)
class Gap:
    """Time between the last event of a round and the first of the next, and what copies and kernels took of it."""

    us: float
    copies_us: float


def load_events(path: Path) -> list[Event]:
    """Read the GPU's events from a Chrome trace, plain or gzipped, in order of their start."""
    data = path.read_bytes()
    entries = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)["traceEvents"]
    return sorted((_event(entry) for entry in entries if _is_gpu_event(entry)), key=lambda event: event.start_us)


def _is_gpu_event(entry: dict[str, Any]) -> bool:
    return entry.get("ph") == "X" and entry.get("cat") in _KINDS


def _event(entry: dict[str, Any]) -> Event:
    given = entry.get("args", {})
    return Event(
        entry["name"],
        _KINDS[entry["cat"]],
        float(entry["ts"]),
        float(entry["dur"]),
        tuple(given.get("grid", ())),
        int(given.get("correlation", -1)),
    )


def split_rounds(events: Sequence[Event]) -> Timeline:
    """Find the rounds; those that the trace cut (fewer events than most have) are left out.

    Raises:
        SmcError: there are none.
    """
    counts = Counter(event.correlation for event in events if event.kind == "kernel" and event.correlation >= 0)
    graphs = {number for number, count in counts.items() if count > 1}
    rounds = _by_correlation(events, graphs) if graphs else _by_first_kernel(events)
    if not rounds:
        raise SmcError(
            "the trace holds no round, expected graph launches or kernels named "
            f"{_FIRST_KERNEL}: profile on a CUDA device whose profiler records kernels (CUPTI)"
        )
    usual = statistics.mode(len(each) for each in rounds)
    inside = {id(event) for each in rounds for event in each}
    return Timeline(
        [each for each in rounds if len(each) == usual], [event for event in events if id(event) not in inside]
    )


def _by_correlation(events: Iterable[Event], graphs: set[int]) -> list[list[Event]]:
    found: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        if event.correlation in graphs:
            found[event.correlation].append(event)
    return sorted(found.values(), key=lambda each: each[0].start_us)


def _by_first_kernel(events: Iterable[Event]) -> list[list[Event]]:
    """Copies to the host do not belong to a round: they carry its summary away."""
    rounds: list[list[Event]] = []
    for event in events:
        if event.name.startswith(_FIRST_KERNEL):
            rounds.append([])
        if rounds and "DtoH" not in event.name:
            rounds[-1].append(event)
    return rounds


def gaps(timeline: Timeline) -> list[Gap]:
    """The gap after each round but the last."""
    found = []
    for this, following in itertools.pairwise(timeline.rounds):
        end, start = max(event.end_us for event in this), following[0].start_us
        between = [event for event in timeline.outside if end <= event.start_us < start]
        found.append(Gap(start - end, sum(event.us for event in between)))
    return found


def advance_us(events: Sequence[Event]) -> tuple[list[float], float]:
    """Share out a round's time among its events, each microsecond once.

    An event's share is the time by which its end lies after all earlier ends, so that kernels that started early and
    waited are not counted for their waiting.

    Returns:
        a share an event, and the time in which nothing ran; together they span the round.
    """
    reached, idle, shares = events[0].start_us, 0.0, []
    for event in events:
        idle += max(0.0, event.start_us - reached)
        shares.append(max(0.0, event.end_us - max(reached, event.start_us)))
        reached = max(reached, event.end_us)
    return shares, idle
