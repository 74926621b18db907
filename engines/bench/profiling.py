"""Profile rounds on a GPU: a table of kernels, the groups they form, and the gap between consecutive rounds.

Rounds run as in any other batch; the profiler records them after some have settled. The times are the GPU's own and
include what recording adds, so a profiled round takes longer than a timed one; both are reported.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from smc_engines.bench.floor import kv_tokens
from smc_engines.bench.kernels import GROUPS, Label, Shapes, label_round
from smc_engines.bench.measure import Bench
from smc_engines.bench.points import Case
from smc_engines.bench.trace import Event, advance_us, gaps, load_events, split_rounds
from smc_engines.engine import Engine
from smc_plugin.errors import ConfigError, SmcError

# Steps before recording (captures are long done then), and rounds at either end of a recording that are not counted:
# the first starts on an idle GPU and pays for the profiler's buffers.
_SETTLE = 4
_DROPPED = 3


@dataclass
class _Row:
    """Sums over rounds of the launches that share a model, place, name and grid."""

    label: Label
    name: str
    grid: tuple[int, ...]
    launches: int = 0
    us: float = 0.0
    kernel_us: float = 0.0
    num_bytes: int | None = field(default=None)


def profile(bench: Bench, case: Case, rounds: int, trace: Path | None = None) -> dict[str, Any]:
    """Run a case's batch once more under the profiler.

    Args:
        rounds: to record; the answer must be long enough for them.
        trace: keep the Chrome trace there.
    Returns:
        see `summarise`.
    Raises:
        ConfigError: the engine is not on a GPU, or the answer is too short.
    """
    if not _has_kernels(bench.engine):
        raise ConfigError(
            f"--profile records kernels of a CUDA device, the engine runs on {bench.engine.device.type}: leave it out, or use "
            "--device cuda"
        )
    wanted = _SETTLE + _DROPPED + rounds + 1
    available = (case.point.output_tokens - 1) // (case.num_draft_tokens + 1)
    if available < wanted:
        raise ConfigError(
            f"--profile-rounds {rounds} needs an answer of {wanted} rounds, --output-tokens {case.point.output_tokens} gives "
            f"{available}: raise --output-tokens or lower --profile-rounds"
        )
    requests = bench.start(case, seed=0)
    for _ in range(_SETTLE):
        bench.executor.step()
    torch.cuda.synchronize()
    position = statistics.fmean(request.position for request in requests)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorder:
        for _ in range(_DROPPED + rounds):
            bench.executor.step()
        torch.cuda.synchronize()
    position = (position + statistics.fmean(request.position for request in requests)) / 2
    bench.stop(requests)
    with tempfile.TemporaryDirectory() as folder:
        path = trace or Path(folder) / "trace.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        recorder.export_chrome_trace(str(path))
        events = load_events(path)
    return summarise(events, bench.engine, case, position)


def _has_kernels(engine: Engine) -> bool:
    return engine.device.type == "cuda"


def summarise(events: Sequence[Event], engine: Engine, case: Case, context_tokens: float) -> dict[str, Any]:
    """Turn recorded events into tables, all figures a round.

    Args:
        events: in order of their start; the first rounds are dropped.
        context_tokens: mean length of a context, for the bytes of keys and values.
    Returns:
        round_us (from one round's first kernel to the next's), kernels_us (time in which a kernel moved the round on, no
        microsecond counted twice), kernel_durations_us (their sum, overlaps twice), idle_us (between kernels of a round),
        round_gap_us and its maximum, and the tables `groups` and `kernels`.
    """
    timeline = split_rounds(events)
    if len(timeline.rounds) <= _DROPPED + 1:
        raise SmcError(
            f"the trace holds {len(timeline.rounds)} whole rounds, expected more than {_DROPPED + 1}: raise --profile-rounds"
        )
    between = gaps(timeline)[_DROPPED:]
    counted = timeline.rounds[_DROPPED:]
    starts = [each[0].start_us for each in counted]
    round_us = statistics.median(after - before for before, after in itertools.pairwise(starts))
    shapes = shapes_of(engine, case)
    rows, idle = _rows(counted, shapes)
    kernels_us = sum(row.us for row in rows)
    lengths = [gap.us for gap in between]
    return {
        "mode": case.mode,
        "rounds": len(counted),
        "round_us": round_us,
        "kernels_us": kernels_us,
        "kernel_durations_us": sum(row.kernel_us for row in rows),
        "idle_us": idle,
        "launches": sum(row.launches for row in rows) / len(counted),
        "round_gap_us": statistics.median(lengths),
        "round_gap_max_us": max(lengths),
        "round_gap_count": len(lengths),
        "round_gap_copies_us": statistics.median(gap.copies_us for gap in between),
        "round_gap_note": "from the last kernel of a round to the first of the next, the copy of its summary included",
        "context_tokens": context_tokens,
        "groups": _group_table(rows, len(counted), shapes, kernels_us, _kv_bytes(engine, case, context_tokens)),
        "kernels": [_kernel_entry(row, len(counted), kernels_us) for row in rows],
    }


def shapes_of(engine: Engine, case: Case) -> Shapes:
    """What a round of this case runs."""
    draft = engine.draft.config if engine.draft is not None and case.num_draft_tokens else None
    passes = case.num_draft_tokens + (engine.config.draft_schedule == "legacy") if draft is not None else 0
    return Shapes(engine.target.config, draft, passes, engine.precisions)


def _rows(rounds: Sequence[Sequence[Event]], shapes: Shapes) -> tuple[list[_Row], float]:
    """Sum the rounds up, longest first; `us` and the idle time are means a round."""
    found: dict[tuple[Label, str, tuple[int, ...]], _Row] = {}
    idle = 0.0
    for events in rounds:
        labels = label_round(events, shapes)
        shares, gap = advance_us(events)
        idle += gap / len(rounds)
        for event, label, share in zip(events, labels, shares, strict=True):
            key = (label, event.name, event.grid)
            row = found.setdefault(key, _Row(label, event.name, event.grid))
            row.launches += 1
            row.us += share / len(rounds)
            row.kernel_us += event.us / len(rounds)
    for row in found.values():
        row.num_bytes = shapes.product_bytes(row.label.model, row.label.place)
    return sorted(found.values(), key=lambda row: -row.us), idle


def _kernel_entry(row: _Row, rounds: int, total_us: float) -> dict[str, Any]:
    launches = row.launches / rounds
    num_bytes = None if row.num_bytes is None else row.num_bytes * launches
    return {
        "group": row.label.group,
        "model": row.label.model,
        "place": row.label.place,
        "name": row.name[:200],
        "grid": list(row.grid),
        "launches": launches,
        "us": row.us,
        "kernel_us": row.kernel_us,
        "share": row.us / total_us,
        "bytes": num_bytes,
        "tb_per_s": _rate(num_bytes, row.us),
    }


def _group_table(
    rows: Sequence[_Row], rounds: int, shapes: Shapes, total_us: float, kv_bytes: dict[str, float]
) -> list[dict[str, Any]]:
    by_group: dict[str, list[_Row]] = defaultdict(list)
    for row in rows:
        by_group[row.label.group].append(row)
    table = []
    for group in sorted(by_group, key=GROUPS.index):
        own = by_group[group]
        us, num_bytes = sum(row.us for row in own), shapes.group_bytes(group)
        num_bytes = kv_bytes.get(group) if num_bytes is None else num_bytes
        table.append(
            {
                "group": group,
                "launches": sum(row.launches for row in own) / rounds,
                "us": us,
                "share": us / total_us,
                "bytes": num_bytes,
                "tb_per_s": _rate(num_bytes, us),
            }
        )
    return table


def _kv_bytes(engine: Engine, case: Case, context_tokens: float) -> dict[str, float]:
    """Bytes of keys and values that attention cannot avoid reading in a round, as the floor counts them."""
    shapes, tokens = shapes_of(engine, case), kv_tokens(case, context_tokens, engine.page_size)
    found = {"target attention": tokens * shapes.target.kv_bytes_per_token(shapes.precisions["target"].kv)}
    if shapes.draft is not None:
        found["draft attention"] = (
            tokens * shapes.draft_passes * shapes.draft.kv_bytes_per_token(shapes.precisions["draft"].kv)
        )
    return found


def _rate(num_bytes: float | None, us: float) -> float | None:
    return num_bytes / us / 1e6 if num_bytes and us > 0 else None
