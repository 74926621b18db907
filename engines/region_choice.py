"""Which runners compute a model's regions on this machine.

    torch   anywhere; the only one on a CPU
    plans   TensorRT plans of the engine directory, up to its largest row bucket
    fused   Triton kernels, up to MAX_FUSED_ROWS; more rows are arithmetic, which torch's library does better

`auto` on a GPU follows the tactics in the manifest where they were timed on this kind of GPU (smc-build --tune). Where not,
and for more rows than were timed, it takes the plans if there are some (and, with tactics, some region chose them), else the
fused kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from smc_build.engine_dir import Manifest, Role
from smc_engines.fused_regions import FusedRegions
from smc_engines.plan_runner import Scratch, load_plan_regions
from smc_engines.regions import RegionRunner, SelectedRegions, TorchRegions
from smc_engines.tactics import ModelTactics, Runner, tactics_of
from smc_plugin.errors import EngineDirError

RegionChoice = Literal["auto", "fused", "plans", "torch"]

MAX_FUSED_ROWS = 128


def choose_regions(
    choice: RegionChoice,
    manifest: Manifest,
    role: Role,
    weights: Mapping[str, Tensor],
    path: Path | None = None,
    scratch: Scratch | None = None,
) -> RegionRunner:
    """Make a model's region runner.

    Args:
        choice: `auto`, or one of the runners.
        manifest: the engine's.
        role: target or draft.
        weights: the model's, on the device that will compute.
        path: the engine directory that holds the plans, or None.
        scratch: what plan runners of one stream share, or None.
    Raises:
        EngineDirError: plans are wanted and there are none, or they do not run here.
        ConfigError: the fused kernels are wanted and triton is missing.
    """
    on_gpu = weights["embed"].device.type == "cuda"
    if choice == "torch" or (choice == "auto" and not on_gpu):
        return TorchRegions(manifest.model(role).rank_config, weights)
    tactics = tactics_of(manifest.tactics, role, torch.cuda.get_device_name()) if on_gpu else None
    has_plans = bool(manifest.plans) and path is not None
    wanted: set[Runner] = set() if tactics is None or choice != "auto" else tactics.runners()
    if choice != "auto":
        otherwise: Runner = choice
    else:
        otherwise = "plans" if has_plans and (tactics is None or "plans" in wanted) else "fused"
    runners = make_runners({*wanted, otherwise}, manifest, role, weights, tactics, path, scratch)

    def select(region: str, rows: int) -> Runner:
        timed = tactics.runner(region, rows) if tactics is not None and choice == "auto" else None
        name = timed or otherwise
        return "torch" if name == "fused" and rows > MAX_FUSED_ROWS else name

    return SelectedRegions(runners, select)


def make_runners(
    wanted: set[Runner],
    manifest: Manifest,
    role: Role,
    weights: Mapping[str, Tensor],
    tactics: ModelTactics | None,
    path: Path | None,
    scratch: Scratch | None,
) -> dict[Runner, RegionRunner]:
    """The wanted runners and torch, by name; see choose_regions."""
    config = manifest.model(role).rank_config
    runners: dict[Runner, RegionRunner] = {"torch": TorchRegions(config, weights)}
    if "fused" in wanted:
        runners["fused"] = FusedRegions(config, weights, tactics)
    if "plans" in wanted:
        plans = None if path is None else load_plan_regions(path, manifest, role, weights, scratch)
        if plans is None:
            raise EngineDirError(
                f"engine {manifest.name} holds no plans, expected some for --regions plans: rebuild with --compiler "
                "tensorrt-rtx or tensorrt, or use --regions fused"
            )
        runners["plans"] = plans
    return runners
