"""Which runners compute a model's regions on this machine.

    torch   anywhere; the only one on a CPU
    plans   TensorRT plans of the engine directory, up to its largest row bucket
    fused   Triton kernels, up to MAX_FUSED_ROWS; more rows are arithmetic, which torch's library does better

The draft's passes of few rows can also be one launch each, regions and attention together (smc_plugin.kernels.whole_pass).

`auto` on a GPU follows the tactics in the manifest where they were timed on this kind of GPU (smc-build --tune). Where not,
and for more rows than were timed, it takes the plans if there are some (and, with tactics, some region chose them), else the
fused kernels. With `auto` the draft takes whole passes in one launch where the model and the GPU suit and --tune found nothing
faster; the others never do.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from smc_build.dtypes import dtype_bytes
from smc_build.engine_dir import Manifest, Role
from smc_build.model_config import ModelConfig
from smc_build.plan import round_rows
from smc_build.precision import Precision
from smc_engines.fused_regions import FusedRegions
from smc_engines.parallel.ranks import Ranks
from smc_engines.parallel.sums import RankSums, make_sums
from smc_engines.plan_runner import Scratch, load_plan_regions
from smc_engines.regions import RegionRunner, SelectedRegions, TorchRegions
from smc_engines.tactics import ModelTactics, Runner, tactics_of
from smc_plugin.errors import EngineDirError

if TYPE_CHECKING:
    from smc_plugin.kernels.whole_pass import DecoderShape, WholePass

RegionChoice = Literal["auto", "fused", "plans", "torch"]

MAX_FUSED_ROWS = 128


def choose_regions(
    choice: RegionChoice,
    manifest: Manifest,
    role: Role,
    weights: Mapping[str, Tensor],
    path: Path | None = None,
    scratch: Scratch | None = None,
    sums: RankSums | None = None,
) -> RegionRunner:
    """Make a model's region runner.

    Args:
        choice: `auto`, or one of the runners.
        manifest: the engine's.
        role: target or draft.
        weights: the model's, on the device that will compute.
        path: the engine directory that holds the plans, or None.
        scratch: what plan runners of one stream share, or None.
        sums: makes the fused runner's sums over ranks, or None.
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
    runners = make_runners({*wanted, otherwise}, manifest, role, weights, tactics, path, scratch, sums)

    def select(region: str, rows: int) -> Runner:
        timed = tactics.runner(region, rows) if tactics is not None and choice == "auto" else None
        name = timed or otherwise
        return "torch" if name == "fused" and rows > MAX_FUSED_ROWS else name

    return SelectedRegions(runners, select)


def choose_sums(
    choice: RegionChoice, manifest: Manifest, device: torch.device, kernels: str = "auto", ranks: Ranks | None = None
) -> dict[int, RankSums]:
    """Who sums over the ranks for the fused runners of an engine, by the width of rows; every rank calls this together.

    Args:
        choice, manifest: see choose_regions.
        kernels: the executor's choice of kernels.
        ranks: None where the engine has one rank.
    """
    made = {width: make_sums(ranks, width, device) for width in summed_widths(choice, manifest, kernels)}
    return {width: sums for width, sums in made.items() if sums is not None}


def summed_widths(choice: RegionChoice, manifest: Manifest, kernels: str = "auto") -> list[int]:
    """Widths of the rows that an engine's fused runners sum over the ranks, where a kernel may do so; see choose_sums."""
    if choice not in ("auto", "fused") or kernels == "reference" or under_mps():
        return []
    entries = [entry for entry in (manifest.target, manifest.draft) if entry is not None]
    shards = [entry for entry in entries if entry.rank_config.is_shard and entry.precision.activations == "bfloat16"]
    return list(dict.fromkeys(entry.rank_config.hidden_size for entry in shards))


def takes_whole_passes(
    choice: RegionChoice,
    manifest: Manifest,
    role: Role,
    device: torch.device,
    kernels: str = "auto",
    ranks: Ranks | None = None,
) -> bool:
    """Whether a model's passes of few rows are one launch each on this device; see choose_whole_pass."""
    entry = manifest.model(role)
    if choice != "auto" or role != "draft" or device.type != "cuda" or kernels == "reference":
        return False
    if entry.rank_config.is_shard and (ranks is None or not ranks.shares_memory):
        return False
    if whole_pass_bytes(entry.rank_config, entry.precision, device) == 0 or under_mps():
        return False
    tactics = tactics_of(manifest.tactics, role, torch.cuda.get_device_name(device))
    return tactics is None or tactics.whole_pass is None or tactics.whole_pass.choice == "whole"


def choose_whole_pass(
    choice: RegionChoice,
    manifest: Manifest,
    role: Role,
    weights: Mapping[str, Tensor],
    kernels: str = "auto",
    ranks: Ranks | None = None,
) -> WholePass | None:
    """Who computes a model's passes of few rows in one launch, or None.

    Args:
        choice, manifest, role, weights: see choose_regions.
        kernels: the executor's choice of kernels.
        ranks: those that share the model; None where this process has all of it.
    """
    if not takes_whole_passes(choice, manifest, role, weights["embed"].device, kernels, ranks):
        return None
    from smc_plugin.kernels.whole_pass import WholePass  # noqa: PLC0415 - importing it needs triton

    config = manifest.model(role).rank_config
    return WholePass(shape_of(config), weights, ranks if config.is_shard else None)


def whole_pass_rows(particles: int, groups: int) -> tuple[int, ...]:
    """Row counts of draft passes that an engine prepares one launch for: rounds of N = particles and of one, up to MAX_ROWS.

    One and two are also what the last tokens of a prompt may come to. Other N work too, prepared when they first run.
    """
    from smc_plugin.kernels.whole_pass import MAX_ROWS  # noqa: PLC0415 - importing it needs triton

    rows = {count for n in (1, particles) for count in round_rows("draft", n, 0, groups)}
    return tuple(sorted(count for count in rows if count <= MAX_ROWS))


def under_mps() -> bool:
    """Whether CUDA's multi-process service runs here: others may then hold multiprocessors that a kernel waits for."""
    folder = os.environ.get("CUDA_MPS_PIPE_DIRECTORY") or "/tmp/nvidia-mps"
    return (Path(folder) / "control").exists()


def whole_pass_bytes(
    config: ModelConfig, precision: Precision, device: torch.device, rows: Iterable[int] = (), num_ranks: int = 1
) -> int:
    """Memory that whole passes of a model would take on this GPU beside its weights; 0 where they cannot be had.

    Args:
        config: of one rank's part.
        precision: of the model.
        device: the GPU.
        rows: row counts that are prepared for; see whole_pass_rows.
        num_ranks: that share the model.
    """
    from smc_plugin.kernels.launch import gpu_of  # noqa: PLC0415 - importing it needs triton
    from smc_plugin.kernels.whole_pass import WholePass  # noqa: PLC0415

    shape, gpu = shape_of(config), gpu_of(device)
    if precision.activations != "bfloat16" or not WholePass.suits(shape, gpu):
        return 0
    return WholePass.extra_bytes(shape, dtype_bytes(precision.matrices), gpu, rows, num_ranks)


def shape_of(config: ModelConfig) -> DecoderShape:
    """What whole passes know of a decoder."""
    from smc_plugin.kernels.whole_pass import DecoderShape  # noqa: PLC0415 - importing it needs triton

    return DecoderShape(**{field.name: getattr(config, field.name) for field in dataclasses.fields(DecoderShape)})


def make_runners(
    wanted: set[Runner],
    manifest: Manifest,
    role: Role,
    weights: Mapping[str, Tensor],
    tactics: ModelTactics | None,
    path: Path | None,
    scratch: Scratch | None,
    sums: RankSums | None = None,
) -> dict[Runner, RegionRunner]:
    """The wanted runners and torch, by name; see choose_regions."""
    config = manifest.model(role).rank_config
    runners: dict[Runner, RegionRunner] = {"torch": TorchRegions(config, weights)}
    if "fused" in wanted:
        runners["fused"] = FusedRegions(config, weights, tactics, sums)
    if "plans" in wanted:
        plans = None if path is None else load_plan_regions(path, manifest, role, weights, scratch)
        if plans is None:
            raise EngineDirError(
                f"engine {manifest.name} holds no plans, expected some for --regions plans: rebuild with --compiler "
                "tensorrt-rtx or tensorrt, or use --regions fused"
            )
        runners["plans"] = plans
    return runners
