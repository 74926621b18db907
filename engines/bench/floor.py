"""The floor of a round: the bytes it cannot avoid reading over the copy bandwidth of the same machine and run.

Bytes: K draft passes and one target pass each read all weights of their model, the head included; the embedding is a
look-up of a few rows and not counted, unless it is also the head. Each pass also reads the keys and values of its
contexts. The full pages of a prompt are shared by the particles of its group and counted once, since one read can serve
them all; what comes after is counted for each particle. With several ranks all of this is one rank's, since they read
at the same time.

Worked example: a target of 540 MB and a draft of 170 MB, K = 4, contexts of no length, copy bandwidth 10 GB/s:
(4 * 170 + 540) MB / 10 GB/s = 122 ms for 5 tokens; a round that takes 244 ms is at 0.5 of the floor.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from smc_build.dtypes import dtype_bytes
from smc_build.engine_dir import Role
from smc_build.weights import weight_bytes
from smc_engines.bench.points import Case
from smc_engines.engine import Engine

_COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
_COPIES = {"cpu": 1, "cuda": 8}


def floor_bytes(engine: Engine, case: Case, context_tokens: float) -> float:
    """Bytes that a round cannot avoid reading.

    Args:
        context_tokens: mean length of a context.
    """
    total = pass_bytes(engine, "target", case, context_tokens)
    if engine.draft is not None:
        total += case.num_draft_tokens * pass_bytes(engine, "draft", case, context_tokens)
    return total


def pass_bytes(engine: Engine, role: Role, case: Case, context_tokens: float) -> float:
    """Bytes that one pass of one model cannot avoid reading."""
    config, precision = engine.models[role].config, engine.precisions[role]
    rows = config.embedding_rows - (config.vocab_size if config.tied_head else 0)
    look_up = rows * config.hidden_size * dtype_bytes(precision.activations)
    kv = kv_tokens(case, context_tokens, engine.page_size) * config.kv_bytes_per_token(precision.kv)
    return weight_bytes(config, precision) - look_up + kv


def kv_tokens(case: Case, context_tokens: float, page_size: int) -> float:
    """Tokens whose keys and values a pass must read: a group's full prompt pages once, the rest for each particle."""
    shared = (case.point.prompt_tokens - 1) // page_size * page_size
    return case.point.batch * (shared + case.num_particles * (context_tokens - shared))


def copy_bandwidth(device: torch.device) -> float:
    """Measure a large copy on the device: bytes read plus bytes written, in TB/s (median of 7)."""
    moved, seconds = _time_copies(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return moved / statistics.median(seconds[1:]) / 1e12


def _time_copies(device: torch.device) -> tuple[int, list[float]]:
    """Bytes that a timed stretch moves, and the seconds of eight."""
    source = torch.empty(_COPY_BYTES[device.type] // 4, dtype=torch.float32, device=device).normal_()
    destination = torch.empty_like(source)
    copies = _COPIES[device.type]

    def copy() -> None:
        for _ in range(copies):
            destination.copy_(source)

    timed = _cuda_seconds if device.type == "cuda" else _cpu_seconds
    return 2 * source.nbytes * copies, [timed(copy) for _ in range(8)]


def _cuda_seconds(run: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _cpu_seconds(run: Callable[[], None]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8").splitlines() if listing.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()} ({len(names)} cores)"
