"""Traces of rounds without a GPU: the launches are real, the times are made up.

A round of meta tensors launches what a GPU would be given, in order; `launch.recording` notes each kernel's name and grid.
Here each gets a time, and the whole is written as the profiler writes a Chrome trace.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from smc_build.precision import Precision
from smc_build.presets import PRESETS
from smc_build.weights import weight_shapes
from smc_engines.bench.points import Case, Point
from smc_engines.engine import Engine
from smc_engines.fused_regions import FusedRegions
from smc_engines.model import PagedModel
from smc_engines.rounds import RoundContext, RoundKind, run_round
from smc_plugin.backend import triton_kernels
from smc_plugin.group_state import GroupState
from smc_plugin.kernels import launch

META = torch.device("meta")
ELEMENTWISE = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, 3>(int)"
COPY_TO_HOST = "Memcpy DtoH (Device -> Pinned)"


def llama_case(mode: Any = "smc") -> Case:
    """The point that the issue's bars are about."""
    return Case(Point(batch=1, particles=8, draft_tokens=8, prompt_tokens=256, output_tokens=512), mode)


def llama_engine() -> Engine:
    """What a summary reads of an engine: llama-8b with llama-1b, in bfloat16."""
    target, draft = (SimpleNamespace(config=PRESETS[name].config) for name in ("llama-8b", "llama-1b"))
    config, models = SimpleNamespace(draft_schedule="deferred"), {"target": target, "draft": draft}
    precisions = dict.fromkeys(models, Precision.plain("bfloat16"))
    return cast(Engine, SimpleNamespace(**models, models=models, precisions=precisions, config=config, page_size=16))


def record_round(case: Case) -> list[str]:
    """Names of the kernels that a round of llama-8b with llama-1b launches, in order."""
    with launch.recording() as log:
        models = [_model(name) for name in ("llama-8b", "llama-1b")]
        state = GroupState.allocate(2, case.num_particles, 800, 50, 32, META)
        kind = RoundKind(case.num_particles, case.num_draft_tokens, speculative=case.mode == "speculative")
        count = torch.zeros(1000, dtype=torch.int32, device=META)
        context = RoundContext(kind, models[0], models[1] if case.num_draft_tokens else None, count, None, 800)
        run_round(context, state, torch.zeros(1, dtype=torch.int64, device=META))
    return [recorded.kernel.__name__ for recorded in log]


def _model(name: str) -> PagedModel:
    config = PRESETS[name].config
    weights = {
        weight: torch.empty(shape, dtype=torch.bfloat16, device=META) for weight, shape in weight_shapes(config).items()
    }
    return PagedModel(config, weights, 1000, 16, FusedRegions(config, weights), triton_kernels())


def write_trace(path: Path, names: list[str], rounds: int, gap_us: float = 10.0, us: Mapping[str, float] = {}) -> Path:
    """Write a Chrome trace of equal rounds.

    Args:
        names: kernels of a round in order.
        gap_us: between rounds; 3 µs of it copy the summary to the host.
        us: times of kernels by name; 5 otherwise. Each kernel starts 1 µs before the last one ends.
    """
    entries: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "args": {"name": "python"}}]
    now = 1000.0
    for number in range(rounds):
        correlation = 100 + 10 * number
        entries.append(_entry("cuda_runtime", "cudaGraphLaunch", now - 50, 4.0, correlation))
        for name in names:
            entries.append(_entry("kernel", name, now, us.get(name, 5.0), correlation, grid=[8, 1, 1]))
            now += us.get(name, 5.0) - 1.0
        end = now + 1.0
        entries.append(_entry("gpu_memcpy", COPY_TO_HOST, end + 4.0, 3.0, correlation + 1))
        now = end + gap_us
    path.write_text(json.dumps({"schemaVersion": 1, "traceEvents": entries[::-1]}))
    return path


def _entry(category: str, name: str, start: float, us: float, correlation: int, **more: Any) -> dict[str, Any]:
    args = {"stream": 7, "correlation": correlation, **more}
    return {"ph": "X", "cat": category, "name": name, "pid": 0, "tid": 7, "ts": start, "dur": us, "args": args}
