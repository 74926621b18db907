"""What a build is going to do: options resolved against models and machine and checked. Nothing is written.

Example: llama-8b with llama-1b, bfloat16, page size 16: a token takes 128 KiB of target and 32 KiB of draft KV, a page
2.5 MiB; with 8 particles, K = 8 and 4 requests at once the row buckets are 8, 16, 32, 64, 96 (72 rows), 192 (144) and
320 (288).
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from smc_build.checkpoint import largest_tensor_bytes
from smc_build.dtypes import FP8
from smc_build.engine_dir import Role
from smc_build.machine import device_memory, format_bytes, free_disk_bytes, free_memory_bytes, same_disk
from smc_build.model_config import ModelConfig
from smc_build.precision import FP8_OPTION, Precision
from smc_build.precision import resolve as resolve_precisions
from smc_build.presets import CHECKPOINTS_FOLDER, ModelSource, resolve
from smc_build.sharding import rank_config
from smc_build.tensorrt_api import load
from smc_build.weights import weight_bytes
from smc_plugin.errors import CheckpointError, ConfigError, SmcError

NO_DRAFT = "none"
# Part of the free memory that KV pages may take together with the weights; the rest is for activations and the
# allocator.
_USABLE_MEMORY = 0.9
# A build holds one canonical tensor, its stored parts and their converted copies.
_TENSORS_IN_MEMORY = 3
_SMALL_BUCKETS = (8, 16, 32, 48, 64, 96, 112, 128)
_ROLES: tuple[Role, ...] = ("target", "draft")
_LIMITS = {
    **{"particles": (1, 256), "draft_tokens": (0, 64), "groups": (1, 256), "page_size": (1, 256), "tp": (1, 64)},
    "seed": (0, 2**63 - 1),
}


@dataclass(frozen=True)
class BuildOptions:
    """What a user asks of a build; the defaults of the command line are these.

    checkpoint and draft are folders or preset names; tp ranks share the target, and the draft too unless draft_tp is 1, which
    keeps the whole draft on every rank; draft None takes the preset's default and "none" builds without
    one. dtype None is fp8 for a checkpoint that holds FP8 weights, else bfloat16 for presets and where there is a GPU, else
    float32 (CPUs compute it faster). draft_dtype, head_dtype and kv_dtype: see smc_build.precision.resolve. calibration is a
    text file for --dtype fp8; without it the model writes its own.
    particles, draft_tokens and groups are the largest N, K and number of concurrent requests; smaller ones can be
    asked at run time. max_seq_len None is the smaller of 4096 and what both models support. output None is
    engines/<name>-tp<tp>.
    """

    checkpoint: str
    draft: str | None = None
    tp: int = 1
    draft_tp: int | None = None
    dtype: str | None = None
    draft_dtype: str | None = None
    head_dtype: str | None = None
    kv_dtype: str | None = None
    calibration: Path | None = None
    particles: int = 8
    draft_tokens: int = 8
    groups: int = 4
    max_seq_len: int | None = None
    page_size: int = 16
    output: Path | None = None
    name: str | None = None
    random_weights: bool = False
    seed: int = 0
    force: bool = False
    compiler: str = "auto"


DEFAULT_MAX_SEQ_LEN = 4096


@dataclass(frozen=True)
class BuildPlan:
    """Resolved options: every default filled in, every range checked. Sizes are in bytes and tokens."""

    options: BuildOptions
    name: str
    output: Path
    precisions: dict[Role, Precision]
    max_seq_len: int
    target: ModelSource
    draft: ModelSource | None
    row_buckets: tuple[int, ...]
    memory_name: str
    memory_bytes: int
    compiler: str

    @property
    def dtype(self) -> str:
        """Element type of both models' activations."""
        return self.precisions["target"].activations

    @property
    def roles(self) -> list[tuple[Role, ModelSource]]:
        """The target, and the draft when there is one, by role."""
        target: list[tuple[Role, ModelSource]] = [("target", self.target)]
        return target if self.draft is None else [*target, ("draft", self.draft)]

    @property
    def models(self) -> list[ModelSource]:
        """The target, and the draft when there is one."""
        return [model for _, model in self.roles]

    def ranks(self, role: Role) -> int:
        """Ranks that share a model."""
        alone = role == "draft" and self.options.draft_tp == 1
        return 1 if alone else self.options.tp

    @property
    def rank_configs(self) -> dict[Role, ModelConfig]:
        """What one rank computes of the target, and of the draft when there is one."""
        return {role: rank_config(model.config, self.ranks(role)) for role, model in self.roles}

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, as one rank would hold them."""
        return sum(weight_bytes(model.config, self.precisions[role]) for role, model in self.roles)

    @property
    def rank_weight_bytes(self) -> int:
        """Bytes of the weights that each rank holds."""
        return sum(weight_bytes(config, self.precisions[role]) for role, config in self.rank_configs.items())

    @property
    def file_bytes(self) -> int:
        """Bytes of all weight files; random weights have none."""
        if self.options.random_weights:
            return 0
        return sum(
            self.ranks(role) * weight_bytes(config, self.precisions[role]) for role, config in self.rank_configs.items()
        )

    @property
    def page_bytes(self) -> int:
        """Bytes of one KV page on each rank, both models."""
        return self.options.page_size * sum(
            config.kv_bytes_per_token(self.precisions[role].kv) for role, config in self.rank_configs.items()
        )

    @property
    def whole_pass_bytes(self) -> int:
        """Bytes that the draft's matrices take a second time, in the order of passes in one launch; see whole_pass."""
        if self.memory_name != "GPU memory" or self.draft is None:
            return 0
        from smc_engines.region_choice import (  # noqa: PLC0415 - needs triton, which a GPU comes with
            under_mps,
            whole_pass_bytes,
            whole_pass_rows,
        )

        if under_mps():
            return 0
        rows = whole_pass_rows(self.options.particles, self.options.groups)
        return whole_pass_bytes(
            self.rank_configs["draft"], self.precisions["draft"], torch.device("cuda"), rows, self.ranks("draft")
        )

    @property
    def num_pages(self) -> int:
        """KV pages that fit beside a rank's weights into the memory of its device that is free now."""
        taken = self.rank_weight_bytes + self.whole_pass_bytes
        return max(0, int(self.memory_bytes * _USABLE_MEMORY) - taken) // self.page_bytes

    @property
    def pages_per_request(self) -> int:
        """KV pages a request takes at worst: every particle at full length, nothing shared."""
        return self.options.particles * -(-self.max_seq_len // self.options.page_size)


def make_plan(options: BuildOptions) -> BuildPlan:
    """Resolve and check options; reads configurations, writes and fetches nothing.

    Args:
        options: what the user asked.
    Returns:
        the plan.
    Raises:
        ConfigError: an option is unknown or out of range, or the compiler is not installed.
        CheckpointError: a model cannot be used, or draft and target do not fit each other.
    """
    _check_ranges(options)
    target = resolve(options.checkpoint)
    draft = _resolve_draft(options, target)
    if draft is not None and draft.config.vocab_size != target.config.vocab_size:
        raise CheckpointError(
            f"draft {draft.name} has {draft.config.vocab_size} tokens, expected the target's "
            f"{target.config.vocab_size}: "
            "choose a draft with the same vocabulary"
        )
    memory_name, memory_bytes = device_memory()
    if memory_name != "GPU memory":
        memory_bytes //= options.tp  # ranks on processors share one memory
    precisions = _choose_precisions(options, target, draft, memory_name)
    target = with_own_head(target, precisions["target"])
    draft = None if draft is None else with_own_head(draft, precisions["draft"])
    models = [target] if draft is None else [target, draft]
    for model, ranks in zip(models, (options.tp, options.draft_tp or options.tp), strict=False):
        rank_config(model.config, ranks)  # refuses what cannot be shared
    name = options.name or target.name
    api = load(options.compiler, precisions["target"].activations)
    return BuildPlan(
        options=options,
        name=_checked_name(name),
        output=options.output or Path("engines") / f"{name}-tp{options.tp}",
        precisions=precisions,
        max_seq_len=_choose_max_seq_len(options, models),
        target=target,
        draft=draft,
        row_buckets=row_buckets(options.particles, options.draft_tokens, options.groups),
        memory_name=memory_name,
        memory_bytes=memory_bytes,
        compiler="torch" if api is None else api.compiler,
    )


def check_buildable(plan: BuildPlan) -> None:
    """Refuse what this version or this machine cannot build; called after the plan has been shown.

    Raises:
        SmcError: too little memory or disk.
    """
    largest = max(largest_tensor_bytes(model.config, "float32") for model in plan.models)
    needed, free = largest * _TENSORS_IN_MEMORY, free_memory_bytes()
    if needed > free and not plan.options.random_weights:
        raise SmcError(
            f"building needs {format_bytes(needed)} of memory for its largest tensor, {format_bytes(free)} are free: "
            "close other programs or build on a larger machine"
        )
    # Tokenizers and the manifest are megabytes; the weights decide.
    quantized = 0 if plan.options.random_weights else _exported_bytes(plan)
    needed, free = plan.file_bytes + quantized + (64 << 20), free_disk_bytes(plan.output)
    what = str(plan.output)
    fetched = sum(model.config.weight_bytes("bfloat16") for model in plan.models if model.folder is None)
    # Otherwise hours of download would end with a full disk.
    if fetched and not plan.options.random_weights and same_disk(plan.output, CHECKPOINTS_FOLDER):
        needed, what = needed + fetched, f"{plan.output}, with what it is fetched from,"
    if needed > free:
        raise SmcError(
            f"{what} needs {format_bytes(needed)} of disk, {format_bytes(free)} are free: free some, or choose "
            "another disk with --output"
        )


def _exported_bytes(plan: BuildPlan) -> int:
    """Bytes of the FP8 checkpoints that a build writes beside its output, and removes."""
    return sum(
        weight_bytes(model.config, plan.precisions[role])
        for role, model in plan.roles
        if needs_quantizing(model, plan.precisions[role])
    )


def round_rows(role: Role, particles: int, draft_tokens: int, groups: int) -> tuple[int, ...]:
    """Row counts that a model's passes in a round run.

    With G requests the draft runs G*N rows a pass and 2*G*N in the first, the target G*N*(K+1), or G in plain decoding.
    G is a power of two up to `groups`, or `groups` itself.

    Args:
        role: target or draft.
        particles, draft_tokens: N and K.
        groups: largest number of concurrent requests.
    Returns:
        ascending row counts.
    """
    sizes = {1 << exponent for exponent in range(groups.bit_length())} | {groups}
    factors = (1, 2) if role == "draft" else (draft_tokens + 1,)
    rows = {size * particles * factor for size in sizes for factor in factors}
    return tuple(sorted(rows if role == "draft" else rows | sizes))


def row_buckets(particles: int, draft_tokens: int, groups: int) -> tuple[int, ...]:
    """Row counts that regions are compiled for: those of rounds, rounded up to a size that matrix units like.

    Args:
        particles, draft_tokens: largest N and K.
        groups: largest number of concurrent requests.
    Returns:
        ascending row counts.
    """
    roles: tuple[Role, ...] = ("target", "draft")
    rows = {count for role in roles for count in round_rows(role, particles, draft_tokens, groups)}
    return tuple(sorted({_round_rows(count) for count in rows}))


def _check_ranges(options: BuildOptions) -> None:
    for field, (low, high) in _LIMITS.items():
        value = getattr(options, field)
        if not low <= value <= high:
            flag = "--" + field.replace("_", "-")
            raise ConfigError(f"{flag} is {value}, expected {low} to {high}: choose a value in that range")
    if options.page_size & (options.page_size - 1):
        raise ConfigError(f"--page-size is {options.page_size}, expected a power of two: use 16")
    if options.draft_tp not in (None, 1, options.tp):
        raise ConfigError(
            f"--draft-tp is {options.draft_tp}, expected 1 (the whole draft on every rank) or --tp's {options.tp}: choose one"
        )


def _resolve_draft(options: BuildOptions, target: ModelSource) -> ModelSource | None:
    name = options.draft or (target.preset.default_draft if target.preset else None)
    if name is None:
        raise ConfigError(
            f"{options.checkpoint} has no default draft, expected --draft: name a smaller model with the same "
            "tokenizer, or "
            f"use --draft {NO_DRAFT} for an engine that decodes with the target alone"
        )
    return None if name == NO_DRAFT else resolve(name)


def _choose_precisions(
    options: BuildOptions, target: ModelSource, draft: ModelSource | None, memory_name: str
) -> dict[Role, Precision]:
    default = "bfloat16" if target.preset is not None or memory_name == "GPU memory" else "float32"
    dtype = options.dtype or (FP8_OPTION if target.stores_fp8 else default)
    draft_dtype = options.draft_dtype or (FP8_OPTION if draft is not None and draft.stores_fp8 else None)
    if draft is None and draft_dtype is not None:
        raise ConfigError(
            f"--draft-dtype is {draft_dtype}, expected none without a draft: leave it out, or name a --draft"
        )
    found = dict(zip(_ROLES, resolve_precisions(dtype, draft_dtype, options.head_dtype, options.kv_dtype), strict=True))
    for (role, precision), model in zip(found.items(), (target, draft), strict=True):
        if model is not None and model.stores_fp8 and precision.matrices != FP8 and not options.random_weights:
            raise ConfigError(
                f"{model.name} holds FP8 weights, the {role} is to have {precision.matrices} ones, expected fp8: use "
                f"--{'' if role == 'target' else 'draft-'}dtype fp8, or a checkpoint that is not quantized"
            )
    _check_calibration(options, found, target, draft)
    return found if draft is not None else {"target": found["target"]}


def _check_calibration(
    options: BuildOptions, precisions: dict[Role, Precision], target: ModelSource, draft: ModelSource | None
) -> None:
    if options.calibration is None:
        return
    models: dict[Role, ModelSource | None] = {"target": target, "draft": draft}
    calibrated = [
        role for role, model in models.items() if model is not None and needs_quantizing(model, precisions[role])
    ]
    if options.random_weights or not calibrated:
        raise ConfigError(
            f"--calibration is {options.calibration}, expected none where nothing is quantized: add --dtype fp8 or "
            "--draft-dtype fp8 and a checkpoint that is not FP8 yet, or leave it out"
        )
    if not options.calibration.is_file():
        raise ConfigError(f"--calibration {options.calibration} is not a file, expected a text file: correct the path")


def needs_quantizing(model: ModelSource, precision: Precision) -> bool:
    """Whether a checkpoint's matrices must be made FP8."""
    return precision.matrices == FP8 and not model.stores_fp8


def with_own_head(model: ModelSource, precision: Precision) -> ModelSource:
    """The model with a head of its own where that head is FP8 and the embedding, which it may be tied to, is not."""
    if not precision.is_fp8("lm_head"):
        return model
    return dataclasses.replace(model, config=dataclasses.replace(model.config, tied_head=False))


def _choose_max_seq_len(options: BuildOptions, models: list[ModelSource]) -> int:
    supported = min(model.config.max_position for model in models)
    if options.max_seq_len is None:
        return min(supported, DEFAULT_MAX_SEQ_LEN)
    # The shortest useful sequence: one prompt token, then a round of K+1.
    shortest = options.draft_tokens + 2
    if not shortest <= options.max_seq_len <= supported:
        raise ConfigError(
            f"--max-seq-len is {options.max_seq_len}, expected {shortest} (a round with K = {options.draft_tokens}) to "
            f"{supported} (what the models support): choose a value in that range"
        )
    return options.max_seq_len


def _checked_name(name: str) -> str:
    if not name or not all(char.isalnum() or char in "-_." for char in name) or name.startswith("."):
        raise ConfigError(f"--name is {name!r}, expected letters, digits, '-', '_' and '.': choose such a name")
    return name


def _round_rows(rows: int) -> int:
    for bucket in _SMALL_BUCKETS:
        if rows <= bucket:
            return bucket
    step = 64 if rows <= 512 else 256
    return -(-rows // step) * step


def option_defaults() -> dict[str, object]:
    """Default of every optional BuildOptions field, for the command line's help."""
    return {f.name: f.default for f in dataclasses.fields(BuildOptions) if f.default is not dataclasses.MISSING}
