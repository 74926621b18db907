"""Builds an engine directory: plan, check, fetch, write, rename.

Nothing is written beside the output until every check has passed. The directory is assembled in
`.<output name>.building-<host>-<pid>` and renamed at the end, its manifest being the last file: a killed build leaves
at most such a hidden folder, which the next build of the same output removes. Example:
build_engine(BuildOptions("llama-70b", random_weights=True)) writes engines/llama-70b-tp1/: plans, and a seed for the weights.
"""

import hashlib
import json
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch

from smc_build.atomic_dir import assembled, check_output, remove_leftovers
from smc_build.engine_dir import (
    TOKENIZER_FOLDER,
    Manifest,
    ModelEntry,
    Role,
    make_weights,
    weight_file,
    write_manifest,
)
from smc_build.formats import OpenCheckpoint, open_checkpoint, weight_files
from smc_build.plan import BuildOptions, BuildPlan, check_buildable, make_plan, needs_quantizing, with_own_head
from smc_build.plans import build_plans, plan_file, plan_table
from smc_build.presets import ModelSource, fetch
from smc_build.quantize import Calibration, quantize
from smc_build.shard_file import FileEntry, hash_file, open_shard
from smc_build.sharding import bind_head, shard
from smc_build.tensorrt_api import find
from smc_build.tokenizer_files import check_fits_vocabulary, check_same_tokenizer, copy_tokenizer
from smc_build.trtllm_checkpoint import TrtllmCheckpoint
from smc_build.weights import weight_bytes, weight_shapes
from smc_plugin.errors import CheckpointError, ConfigError

__all__ = ["BuildOptions", "Progress", "Quiet", "WeightSource", "build_engine", "random_engine"]

QUANTIZED_FOLDER = ".fp8"  # inside a build's temporary folder
# a model's weights of one rank, on a device
WeightSource = Callable[[Role, torch.device, int], dict[str, torch.Tensor]]


class Progress(Protocol):
    """What a build reports while it works."""

    def plan(self, plan: BuildPlan) -> None:
        """The plan is resolved; nothing has been checked against the machine or written yet."""
        ...

    def compiled(self, label: str, num_plans: int, num_bytes: int, seconds: float) -> None:
        """A model's regions are compiled into plans of so many bytes."""
        ...

    def quantizing(self, label: str) -> None:
        """A model's weights are being quantized to FP8, which takes a while."""
        ...

    def start(self, label: str, total_bytes: int) -> None:
        """A model's weights begin."""
        ...

    def advance(self, num_bytes: int) -> None:
        """So many more bytes of them are written."""
        ...

    def finish(self) -> None:
        """They are complete, or the build has failed."""
        ...


class Quiet:
    """Reports nothing."""

    def plan(self, plan: BuildPlan) -> None:
        """Ignore the plan."""

    def compiled(self, label: str, num_plans: int, num_bytes: int, seconds: float) -> None:
        """Ignore the plans."""

    def quantizing(self, label: str) -> None:
        """Ignore the wait."""

    def start(self, label: str, total_bytes: int) -> None:
        """Ignore the start."""

    def advance(self, num_bytes: int) -> None:
        """Ignore the step."""

    def finish(self) -> None:
        """Ignore the end."""


def build_engine(options: BuildOptions, progress: Progress | None = None) -> Path:
    """Build an engine directory.

    Args:
        options: what to build.
        progress: is told the plan first, then the bytes written.
    Returns:
        the engine directory.
    Raises:
        ConfigError: an option cannot be met, or the output would overwrite something.
        CheckpointError: a model is missing, damaged or does not fit the other.
        SmcError: too little memory or disk.
    """
    progress = progress or Quiet()
    plan = make_plan(options)
    progress.plan(plan)
    check_buildable(plan)
    remove_leftovers(plan.output)
    check_output(plan.output, options.force)
    if not options.random_weights:
        plan = _fetch(plan)
    _check_tokenizers(plan)
    calibration = Calibration.read(options.calibration, plan.target.folder)
    with (
        _open_checkpoints(plan) as checkpoints,
        assembled(plan.output, options.force) as folder,
        _quantized(plan, checkpoints, folder / QUANTIZED_FOLDER, calibration, progress),
    ):
        _write_engine(plan, checkpoints, folder, progress)
    return plan.output


def random_engine(options: BuildOptions) -> tuple[Manifest, WeightSource]:
    """Describe an engine of random weights without writing it: what a speed measurement needs.

    Args:
        options: what would be built; random_weights is implied.
    Returns:
        the manifest, which names no files, and a function that makes a rank's canonical weights of a model on a device,
        as `load_weights` does for an engine directory.
    """
    plan = make_plan(replace(options, random_weights=True))
    entries = {role: _entry(plan, role, model, _source_hash(model, plan.options, role)) for role, model in plan.roles}

    def weights(role: Role, device: torch.device, rank: int) -> dict[str, torch.Tensor]:
        entry = entries[role]
        return bind_head(make_weights(entry, rank, device), entry.rank_config, rank)

    return _manifest(plan, entries["target"], entries.get("draft"), {}), weights


def _fetch(plan: BuildPlan) -> BuildPlan:
    fetched = {role: with_own_head(fetch(model), plan.precisions[role]) for role, model in plan.roles}
    for role, model in plan.roles:
        if fetched[role].config != model.config and model.preset is not None:
            _check_same_shapes(model, fetched[role])
    return BuildPlan(**{**vars(plan), **fetched})


def _check_same_shapes(planned: ModelSource, fetched: ModelSource) -> None:
    if weight_shapes(planned.config) != weight_shapes(fetched.config):
        raise CheckpointError(
            f"{fetched.folder} is not {planned.name}: its config.json gives {fetched.config.num_parameters} "
            "parameters, "
            f"expected {planned.config.num_parameters}: remove the folder or name it by its path"
        )


def _check_tokenizers(plan: BuildPlan) -> None:
    for model in plan.models:
        if model.folder is not None:
            check_fits_vocabulary(model.folder, model.config.vocab_size)
    if plan.draft is not None and plan.target.folder is not None and plan.draft.folder is not None:
        check_same_tokenizer(plan.target.folder, plan.draft.folder)


@contextmanager
def _open_checkpoints(plan: BuildPlan) -> Iterator[dict[Role, OpenCheckpoint]]:
    """Open every checkpoint, which checks all tensors' names and shapes, before anything is written."""
    opened: dict[Role, OpenCheckpoint] = {}
    try:
        if not plan.options.random_weights:
            for role, model in plan.roles:
                assert model.folder is not None
                opened[role] = open_checkpoint(model.folder)
        yield opened
    finally:
        for checkpoint in opened.values():
            checkpoint.close()


@contextmanager
def _quantized(
    plan: BuildPlan, checkpoints: dict[Role, OpenCheckpoint], folder: Path, calibration: Calibration, progress: Progress
) -> Iterator[None]:
    """Put FP8 checkpoints, made for the time of a build, in the place of those that are to be quantized."""
    for role, model in plan.roles:
        if role not in checkpoints or not needs_quantizing(model, plan.precisions[role]):
            continue
        if isinstance(checkpoints[role], TrtllmCheckpoint):
            raise ConfigError(
                f"--dtype fp8 is to quantize the TensorRT-LLM checkpoint {checkpoints[role].folder}, expected a Hugging Face "
                "folder: start from the one it was converted from, or build it with --dtype bfloat16"
            )
        progress.quantizing(f"{role} {model.name}")
        quantize(checkpoints[role].folder, folder / role, plan.precisions[role], calibration)
        checkpoints.pop(role).close()
        checkpoints[role] = open_checkpoint(folder / role)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_engine(plan: BuildPlan, checkpoints: dict[Role, OpenCheckpoint], folder: Path, progress: Progress) -> None:
    files: dict[str, FileEntry] = {}
    entries: dict[str, ModelEntry | None] = {"target": None, "draft": None}
    # Hashing the sources reads every file once more; it runs beside the writing, in a thread of its own.
    with ThreadPoolExecutor(max_workers=1) as pool:
        hashes = {role: pool.submit(_source_hash, model, plan.options, role) for role, model in plan.roles}
        for role, model in plan.roles:
            files.update(_write_model(plan, role, model, checkpoints.get(role), folder, progress))
        for role, model in plan.roles:
            entries[role] = _entry(plan, role, model, hashes[role].result())
    if plan.target.folder is not None:
        for copy in copy_tokenizer(plan.target.folder, folder / TOKENIZER_FOLDER):
            files[f"{TOKENIZER_FOLDER}/{copy.name}"] = hash_file(copy)
    write_manifest(folder, _manifest(plan, entries["target"], entries["draft"], files))


def _write_model(
    plan: BuildPlan, role: Role, model: ModelSource, checkpoint: OpenCheckpoint | None, folder: Path, progress: Progress
) -> dict[str, FileEntry]:
    config_file = folder / role / "config.json"
    config_file.parent.mkdir()
    config_file.write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")
    plans = _write_plans(plan, role, model, folder, progress)
    weights = {} if checkpoint is None else _write_weights(plan, role, model, checkpoint, folder, progress)
    return {**weights, f"{role}/{config_file.name}": hash_file(config_file), **plans}


def _write_weights(
    plan: BuildPlan, role: Role, model: ModelSource, checkpoint: OpenCheckpoint, folder: Path, progress: Progress
) -> dict[str, FileEntry]:
    """Cut each tensor for all ranks, one tensor at a time. Random weights are not written: loading makes them."""
    precision, ranks, own = plan.precisions[role], plan.ranks(role), plan.rank_configs[role]
    names = [weight_file(role, rank) for rank in range(ranks)]
    (folder / names[0]).parent.mkdir()
    progress.start(f"{role} {model.name}", ranks * weight_bytes(own, precision))
    try:
        with ExitStack() as files:
            shapes = weight_shapes(own, precision)
            writers = [files.enter_context(open_shard(folder / name, shapes, precision.dtype_of)) for name in names]
            for weight, tensor in checkpoint.tensors(precision):
                for rank, writer in enumerate(writers):
                    progress.advance(writer.write(weight, shard(weight, tensor, model.config, ranks, rank)))
            return {name: writer.finish() for name, writer in zip(names, writers, strict=True)}
    finally:
        progress.finish()


def _write_plans(
    plan: BuildPlan, role: Role, model: ModelSource, folder: Path, progress: Progress
) -> dict[str, FileEntry]:
    """Compile first: it takes seconds, and what cannot be compiled should fail before the weights are written."""
    api = None if plan.compiler == "torch" else find(plan.compiler)
    if api is None:
        return {}
    started, files = time.perf_counter(), {}
    for compiled in build_plans(api, plan.rank_configs[role], plan.precisions[role], plan.row_buckets):
        name = plan_file(role, compiled.region, compiled.rows)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(compiled.data)
        files[name] = hash_file(folder / name)
    num_bytes = sum(entry.bytes for entry in files.values())
    progress.compiled(f"{role} {model.name}", len(files), num_bytes, time.perf_counter() - started)
    return files


def _plan_manifest(plan: BuildPlan) -> dict[str, Any]:
    """Say what the plans need at run time, and where they are: role to region to row bucket to path."""
    api = None if plan.compiler == "torch" else find(plan.compiler)
    if api is None:
        return {}
    tables = {role: plan_table(role, config, plan.row_buckets) for role, config in plan.rank_configs.items()}
    return {"compiler": api.compiler, "version": api.version, "gpu": api.target(), "files": tables}


def _manifest(
    plan: BuildPlan, target: ModelEntry | None, draft: ModelEntry | None, files: dict[str, FileEntry]
) -> Manifest:
    assert target is not None
    options = plan.options
    return Manifest(
        name=plan.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        dtype=plan.dtype,
        tp=options.tp,
        max_particles=options.particles,
        max_draft_tokens=options.draft_tokens,
        max_groups=options.groups,
        max_seq_len=plan.max_seq_len,
        page_size=options.page_size,
        weights="random" if options.random_weights else "checkpoint",
        target=target,
        draft=draft,
        row_buckets=plan.row_buckets,
        compiler=plan.compiler,
        plans=_plan_manifest(plan),
        versions={
            "smc-engine": metadata.version("smc-engine"),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "safetensors": safetensors.__version__,
        },
        files=files,
    )


def _seed(options: BuildOptions, role: Role) -> int:
    """Target and draft must differ even when their shapes are equal."""
    return options.seed * 2 + (role == "draft")


def _entry(plan: BuildPlan, role: Role, model: ModelSource, source_sha256: str) -> ModelEntry:
    seed = _seed(plan.options, role) if plan.options.random_weights else None
    return ModelEntry(model.config, plan.precisions[role], _source_name(model), source_sha256, plan.ranks(role), seed)


def _source_name(model: ModelSource) -> str:
    return model.preset.hub_name if model.preset is not None else model.name


def _source_hash(model: ModelSource, options: BuildOptions, role: Role) -> str:
    """Hash the names and hashes of config.json and the weight files, or seed and config of random weights."""
    digest = hashlib.sha256()
    if options.random_weights or model.folder is None:
        digest.update(json.dumps([options.seed, role, model.config.to_dict()], sort_keys=True).encode())
        return digest.hexdigest()
    for path in [model.folder / "config.json", *weight_files(model.folder)]:
        digest.update(f"{path.name} {hash_file(path).sha256}\n".encode())
    return digest.hexdigest()
