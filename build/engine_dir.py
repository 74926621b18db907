"""The engine directory: its layout, its manifest, and what is checked when one is loaded.

    manifest.json      format version, model configs, limits, buckets, sizes and hashes of every other file
    target/, draft/    config.json, weights/rank<r>.safetensors (random weights have a seed in the manifest instead) and
                       plans/<region>.<rows>.plan, when there are plans (draft/ only when there is a draft)
    tokenizer/         tokenizer files as the checkpoint had them

`load_manifest(path)` always checks the format version, that every listed file is there, that its size is right and that the
directory holds no link (its own path may be one); with verify=True, the default, it also hashes every file, so a flipped bit
is caught (about 1 s per GB and core; several files are hashed at a time). verify=False skips only the hashes. `load_weights`
checks names, shapes and dtype and maps the file.
"""

import dataclasses
import errno
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from smc_build.dtypes import SAFETENSORS_NAMES, torch_dtype
from smc_build.model_config import ModelConfig
from smc_build.precision import Precision
from smc_build.shard_file import FileEntry
from smc_build.sharding import bind_head, rank_config, shards
from smc_build.weights import random_weights, weight_shapes
from smc_plugin.errors import EngineDirError

FORMAT_VERSION = 2
MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES = 16 * 2**20
TOKENIZER_FOLDER = "tokenizer"
Role = Literal["target", "draft"]
_REBUILD = "rebuild the engine directory with smc-build"


@dataclass(frozen=True)
class ModelEntry:
    """One model of an engine.

    Args:
        config: the whole model.
        precision: its element types.
        source: the name it was built from. source_sha256: over the files it was built from.
        tp: ranks that share it: the engine's, or 1 where each rank holds all of it.
        seed: of random weights, which are made when they are loaded; None where they are in files.
    """

    config: ModelConfig
    precision: Precision
    source: str
    source_sha256: str
    tp: int = 1
    seed: int | None = None

    @property
    def rank_config(self) -> ModelConfig:
        """What one rank computes of it."""
        return rank_config(self.config, self.tp)


@dataclass(frozen=True)
class Manifest:
    """Everything a run time must know about an engine directory besides the tensors.

    dtype is the activations' (of both models); tp is the number of ranks; max_particles, max_draft_tokens and max_groups
    bound what requests may ask (N, K, requests at once); max_seq_len and page_size count tokens; row_buckets are the row
    counts that regions are prepared for. plans is empty with the torch back end, else it holds compiler, version, gpu and
    files (role to region to rows to path). tactics stays empty until regions are timed. files maps relative paths to sizes
    and hashes.
    """

    name: str
    created: str
    dtype: str
    tp: int
    max_particles: int
    max_draft_tokens: int
    max_groups: int
    max_seq_len: int
    page_size: int
    weights: Literal["random", "checkpoint"]
    target: ModelEntry
    draft: ModelEntry | None
    row_buckets: tuple[int, ...]
    compiler: str = "torch"
    plans: dict[str, Any] = field(default_factory=dict)
    tactics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            _check(
                name, getattr(self, name), _is_whole(getattr(self, name), low, high), f"a whole number, {low} to {high}"
            )
        for bucket in self.row_buckets:
            _check("row_buckets", bucket, _is_whole(bucket, 1, 2**20), "positive whole numbers")
        for name in ("name", "created", "dtype", "compiler"):
            _check(name, getattr(self, name), isinstance(getattr(self, name), str), "text")
        for name in ("plans", "tactics", "versions"):
            _check(name, getattr(self, name), isinstance(getattr(self, name), dict), "an object")
        if self.plans:
            roles = ("target",) if self.draft is None else ("target", "draft")
            expected = "compiler, version, gpu, and files by role, region and rows that the manifest lists"
            _check("plans", self.plans, _are_plans(self.plans, roles, self.files), expected)
        _check("dtype", self.dtype, self.dtype in SAFETENSORS_NAMES, f"one of {', '.join(SAFETENSORS_NAMES)}")
        for role, model in (("target", self.target), ("draft", self.draft)):
            if model is not None:
                _check_model(role, model, self.tp)
        for name, entry in self.files.items():
            _check(
                f"files {name!r}",
                entry,
                _is_whole(entry.bytes, 0, 2**63) and isinstance(entry.sha256, str),
                "a size and a hash",
            )

    def model(self, role: Role) -> ModelEntry:
        """Return the entry of a role.

        Raises:
            EngineDirError: the engine has no draft.
        """
        entry = self.target if role == "target" else self.draft
        if entry is None:
            raise EngineDirError(
                f"engine {self.name} was built without a draft, expected one for this mode: use --mode target or "
                "rebuild"
            )
        return entry

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        values["row_buckets"] = list(self.row_buckets)
        for role, entry in (("target", self.target), ("draft", self.draft)):
            if entry is not None:
                values[role]["config"] = entry.config.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Manifest":
        """Rebuild a manifest from `to_dict`.

        Raises:
            EngineDirError: another format version, or a field is missing or unknown.
        """
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise EngineDirError(
                f"{MANIFEST_FILE} has format version {version!r}, expected {FORMAT_VERSION}: {_REBUILD}"
            )
        try:
            return cls(
                **{
                    **values,
                    "target": _model_entry(values["target"]),
                    "draft": None if values["draft"] is None else _model_entry(values["draft"]),
                    "row_buckets": tuple(values["row_buckets"]),
                    "files": {name: FileEntry(**entry) for name, entry in values["files"].items()},
                }
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise EngineDirError(
                f"{MANIFEST_FILE} does not read as format {FORMAT_VERSION} ({error}), expected its fields: {_REBUILD}"
            ) from error


_RANGES = {
    "tp": (1, 1024),
    "max_particles": (1, 4096),
    "max_draft_tokens": (0, 1024),
    "max_groups": (1, 65536),
    "max_seq_len": (1, 2**24),
    "page_size": (1, 4096),
}


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _check(name: str, value: object, good: bool, expected: str) -> None:
    if not good:
        raise EngineDirError(f"{MANIFEST_FILE}: {name} is {value!r:.60}, expected {expected}: {_REBUILD}")


def _check_model(role: str, entry: ModelEntry, tp: int) -> None:
    _check(f"{role} tp", entry.tp, _is_whole(entry.tp, 1, tp) and entry.tp in (1, tp), f"1 or the engine's {tp}")
    _check(f"{role} seed", entry.seed, entry.seed is None or _is_whole(entry.seed, 0, 2**65), "a whole number or null")
    for name, value in (("source", entry.source), ("source_sha256", entry.source_sha256)):
        _check(f"{role} {name}", value, isinstance(value, str), "text")
    for name, value in vars(entry.precision).items():
        known = isinstance(value, str) and value in SAFETENSORS_NAMES
        _check(f"{role} precision {name}", value, known, f"one of {', '.join(SAFETENSORS_NAMES)}")


def _are_plans(plans: dict[str, Any], roles: Sequence[str], files: Mapping[str, FileEntry]) -> bool:
    """Whether `plans` says all that a run time needs, and names only files whose place and hash are checked."""
    by_role = plans.get("files")
    if not isinstance(by_role, dict) or not all(isinstance(by_role.get(role), dict) for role in roles):
        return False
    tables = [table for regions in by_role.values() if isinstance(regions, dict) for table in regions.values()]
    return (
        all(isinstance(plans.get(name), str) for name in ("compiler", "version", "gpu"))
        and all(isinstance(regions, dict) for regions in by_role.values())
        and all(isinstance(table, dict) for table in tables)
        and all(
            str(rows).isdecimal() and isinstance(name, str) and name in files
            for table in tables
            for rows, name in table.items()
        )
    )


def _model_entry(values: dict[str, Any]) -> ModelEntry:
    config, precision = ModelConfig.from_dict(values["config"]), Precision(**values["precision"])
    return ModelEntry(**{**values, "config": config, "precision": precision})


def is_engine_dir(path: Path) -> bool:
    """Whether a folder holds a manifest, sound or not."""
    return (path / MANIFEST_FILE).is_file()


def weight_file(role: Role, rank: int) -> str:
    """Relative path of a rank's weight shard."""
    return f"{role}/weights/rank{rank}.safetensors"


def load_manifest(path: Path | str, verify: bool = True) -> Manifest:
    """Read and check an engine directory.

    Args:
        path: the engine directory.
        verify: also hash every file (see the module's text for what is always checked).
    Returns:
        the manifest.
    Raises:
        EngineDirError: not an engine directory, another format, a link in it, or a missing, resized or altered file.
    """
    path = Path(path)
    if not is_engine_dir(path):
        raise EngineDirError(
            f"{path} is not an engine directory, expected a {MANIFEST_FILE} in it: correct the path or run smc-build"
        )
    _refuse_links(path)
    with _open(path, MANIFEST_FILE) as file:
        text = file.read(MAX_MANIFEST_BYTES + 1)
    if len(text) > MAX_MANIFEST_BYTES:
        raise EngineDirError(
            f"{MANIFEST_FILE} has more than {MAX_MANIFEST_BYTES} bytes, expected at most that: do not use this directory"
        )
    try:
        values = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise EngineDirError(f"cannot read {MANIFEST_FILE} ({error}), expected JSON: {_REBUILD}") from error
    if not isinstance(values, dict):
        raise EngineDirError(f"{MANIFEST_FILE} holds a {type(values).__name__}, expected a JSON object: {_REBUILD}")
    manifest = Manifest.from_dict(values)
    for name, entry in manifest.files.items():
        _check_file(path, name, entry)
    if verify:
        _check_hashes(path, manifest.files)
    return manifest


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write manifest.json, whole or not at all; the last file of a build, because its presence makes an engine directory."""
    temporary = path / f".{MANIFEST_FILE}.{os.getpid()}"
    temporary.write_text(json.dumps(manifest.to_dict(), indent=2) + "\n", encoding="utf-8")
    temporary.replace(path / MANIFEST_FILE)


def load_weights(
    path: Path | str,
    role: Role,
    rank: int = 0,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
) -> dict[str, torch.Tensor]:
    """Load one model's canonical weights, or make them where they are random.

    Args:
        path: the engine directory.
        role: "target" or "draft".
        rank: the tensor-parallel rank, from 0.
        device: where the tensors go; on the CPU they are mapped, not read.
        dtype: converts the activations' type when it differs from the engine's; FP8 matrices and scales stay.
    Returns:
        canonical name to tensor, shaped as `weight_shapes` says of the rank's config; a rank of a tied model also gets
        lm_head, its rows of the embedding.
    Raises:
        EngineDirError: no such model or rank, or the file does not hold the expected tensors.
    """
    path = Path(path)
    manifest = load_manifest(path, verify=False)
    entry = manifest.model(role)
    name = weight_file(role, rank if entry.tp > 1 else 0)
    if (entry.seed is None and name not in manifest.files) or not 0 <= rank < manifest.tp:
        raise EngineDirError(
            f"{name} is not in the engine directory, expected ranks 0 to {manifest.tp - 1}: correct the rank or rebuild"
        )
    stored = _stored_weights(path, name, entry, device) if entry.seed is None else make_weights(entry, rank, device)
    wanted = torch_dtype(dtype or manifest.dtype)
    out = {
        key: tensor if key.endswith("_scale") or entry.precision.is_fp8(key) else tensor.to(wanted)
        for key, tensor in stored.items()
    }
    return bind_head(out, entry.rank_config, rank)


def make_weights(entry: ModelEntry, rank: int, device: str | torch.device) -> dict[str, torch.Tensor]:
    """Make a rank's part of a model of random weights, cut from the tensors of one rank, one at a time.

    So the weights do not depend on the number of ranks. See `random_weights`.
    """
    assert entry.seed is not None
    whole = random_weights(entry.config, entry.precision, entry.seed, device)
    return dict(shards(whole, entry.config, entry.tp, rank))


def _stored_weights(path: Path, name: str, entry: ModelEntry, device: str | torch.device) -> dict[str, torch.Tensor]:
    shapes, out = weight_shapes(entry.rank_config, entry.precision), {}
    try:
        with safe_open(path / name, framework="pt", device=str(device)) as file:
            for key in file.keys():  # noqa: SIM118 - the handle is not iterable
                out[key] = file.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise EngineDirError(f"cannot read {name} ({error}), expected a safetensors file: {_REBUILD}") from error
    for key, tensor in out.items():
        if entry.precision.is_fp8(key) and tensor.dtype != torch.float8_e4m3fn:
            raise EngineDirError(f"{name}: tensor {key} is {tensor.dtype}, expected float8_e4m3fn: {_REBUILD}")
    found = {key: tuple(tensor.shape) for key, tensor in out.items()}
    for key in [*shapes, *found]:
        if found.get(key) != shapes.get(key):
            raise EngineDirError(
                f"{name}: tensor {key} has shape {found.get(key)}, expected {shapes.get(key)}: {_REBUILD}"
            )
    return out


def read_file(path: Path, name: str) -> bytes:
    """Read a file of an engine directory whose manifest was loaded.

    Args:
        path: the engine directory.
        name: relative path, one that the manifest lists.
    Raises:
        EngineDirError: it is a link, or cannot be read.
    """
    with _open(path, name) as file:
        return file.read()


def tokenizer_path(path: Path | str) -> Path | None:
    """Return the folder with the tokenizer files, or None for an engine built without a tokenizer."""
    folder = Path(path) / TOKENIZER_FOLDER
    return folder if folder.is_dir() else None


def _check_file(path: Path, name: str, entry: FileEntry) -> None:
    relative = PurePosixPath(name)
    if relative.is_absolute() or ".." in relative.parts or not (path / name).resolve().is_relative_to(path.resolve()):
        raise EngineDirError(
            f"{MANIFEST_FILE} lists {name!r}, expected a file inside the engine directory: do not use this directory"
        )
    if not (path / name).is_file():
        raise EngineDirError(
            f"{name} is missing or no plain file, expected {entry.bytes} bytes: copy the engine directory again or rebuild it"
        )
    size = (path / name).stat().st_size
    if size != entry.bytes:
        raise EngineDirError(
            f"{name} has {size} bytes, expected {entry.bytes}: copy the engine directory again or rebuild it"
        )


def _check_hashes(path: Path, files: dict[str, FileEntry]) -> None:
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(lambda name: _hash(path, name), files)
    for (name, entry), found in zip(files.items(), hashes, strict=True):
        if found != entry.sha256:
            raise EngineDirError(
                f"{name} is damaged: SHA-256 {found[:12]}..., expected {entry.sha256[:12]}...: copy the engine "
                "directory again or rebuild it"
            )


def _hash(path: Path, name: str) -> str:
    with _open(path, name) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_links(path: Path) -> None:
    """Links in a directory that is not trusted can show files of the machine, or change after they were checked."""
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            if (Path(folder) / name).is_symlink():
                raise _is_link((Path(folder) / name).relative_to(path))


def _open(path: Path, name: str) -> io.BufferedReader:
    """Open a file of an engine directory; one that became a link after `_refuse_links` is refused too."""
    try:
        return open(path / name, "rb", opener=lambda file, flags: os.open(file, flags | os.O_NOFOLLOW))
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _is_link(name) from None
        raise EngineDirError(
            f"cannot read {name} ({error}), expected a file: copy the engine directory again"
        ) from error


def _is_link(name: Path | str) -> EngineDirError:
    return EngineDirError(
        f"{name} is a link, expected a file inside the engine directory: put a copy in its place (cp -rL copies an engine "
        "directory without its links)"
    )
