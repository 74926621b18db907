"""Reads a Hugging Face folder and yields canonical weights, one tensor at a time.

Everything that can be wrong is checked from the file headers before the first byte of data is read: missing, unknown
and misshapen tensors are reported by name. Example: `layers.0.qkv` of Llama-3.2-1B joins q_proj [2048, 2048], k_proj
[512, 2048] and v_proj [512, 2048] into [2048, 3072]; at most that one tensor (25 MB in float32) and its parts are in
memory.

A checkpoint that modelopt has quantized (unified Hugging Face layout) holds float8_e4m3fn matrices [out, in], each with a
`weight_scale` and an `input_scale`. Joined matrices keep the scales of their parts, one for each output column, and take
the larger input scale (modelopt gives parts the same one).
"""

import json
import math
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from smc_build.dtypes import FP8, torch_dtype
from smc_build.model_config import ModelConfig, is_modelopt_fp8
from smc_build.precision import Precision, as_precision
from smc_build.weights import weight_shapes
from smc_plugin.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
FP8_FILE = "hf_quant_config.json"  # where modelopt says what it did, beside config.json
MAX_TEXT_BYTES = 64 * 2**20  # of any file but weights; the largest tokenizer.json of known models has half of that
_FLOAT_DTYPES = ("F32", "BF16", "F16", "F64")
_FP8_DTYPE = "F8_E4M3"
# What the checkpoint may hold beyond the weights: caches of constants that older exports stored.
# Scales for FP8 KV pages only say where rounding is finest; pages here hold keys and values as they are.
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.bias$|\.masked_bias$|\.[kv]_scale$")


@dataclass(frozen=True)
class Source:
    """Where a canonical tensor comes from: stored tensors joined along their first axis, then maybe transposed."""

    names: tuple[str, ...]
    transpose: bool


class Checkpoint:
    """An open Hugging Face folder; use it as a context manager.

    Attributes:
        folder: the folder.
        config: what its config.json describes.
        stores_fp8: whether its matrices are FP8.
        head_is_fp8: whether its head is, too.
    """

    def __init__(self, folder: Path) -> None:
        """Open the folder and check every tensor's presence and shape.

        Raises:
            CheckpointError: the folder, its configuration or one of its tensors is not usable.
        """
        self.folder = folder
        self.config = read_config(folder)
        self.stores_fp8 = stores_fp8(folder)
        self._files = ExitStack()
        self._handles: dict[str, Any] = {}
        try:
            for path in weight_files(folder):
                self._open(path)
            head = self._handles.get("lm_head.weight") if self.stores_fp8 else None
            self.head_is_fp8 = head is not None and head.get_slice("lm_head.weight").get_dtype() == _FP8_DTYPE
            self._check()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the files."""
        self._handles.clear()
        self._files.close()

    def tensors(self, dtype: str | torch.dtype | Precision) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (canonical name, tensor in `dtype`) in the order of `weight_shapes`.

        Args:
            dtype: FP8 exactly where the checkpoint has FP8.
        Raises:
            CheckpointError: it is not, or a tensor cannot be read.
        """
        precision = as_precision(dtype)
        self._check_precision(precision)
        for name, source in weight_sources(self.config).items():
            if precision.is_fp8(name):
                yield from self._read_fp8(name, source)
            else:
                yield name, self._read(name, source, torch_dtype(precision.activations))

    def _check_precision(self, precision: Precision) -> None:
        for what, is_fp8, wanted in (
            ("matrices", self.stores_fp8, precision.matrices),
            ("head", self.head_is_fp8, precision.head),
        ):
            if is_fp8 != (wanted == FP8):
                flag = "--dtype" if what == "matrices" else "--head-dtype"
                raise CheckpointError(
                    f"{self.folder} holds {what} in {'FP8' if is_fp8 else '16 or 32 bits'}, expected {wanted}: "
                    + (
                        f"use {flag} fp8"
                        if is_fp8
                        else f"leave out {flag} fp8, or start from an unquantized checkpoint"
                    )
                )

    def _open(self, path: Path) -> None:
        try:
            handle = self._files.enter_context(safe_open(path, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"cannot read {path.name} ({error}), expected a complete safetensors file: fetch it again"
            ) from error
        self._handles.update(dict.fromkeys(handle.keys(), handle))

    def _check(self) -> None:
        expected = stored_shapes(self.config)
        missing = [name for name in expected if name not in self._handles]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise CheckpointError(
                f"tensor {missing[0]}{more} is missing from the checkpoint, expected shape "
                f"{list(expected[missing[0]])}: "
                "fetch the checkpoint again, or correct config.json"
            )
        for name, handle in self._handles.items():
            if name not in expected:
                self._check_extra(name)
                continue
            stored = handle.get_slice(name)
            if tuple(stored.get_shape()) != expected[name]:
                raise CheckpointError(
                    f"tensor {name} has shape {list(stored.get_shape())}, expected {list(expected[name])} from "
                    "config.json: "
                    "fetch the checkpoint again, or correct config.json"
                )
            allowed = (_FP8_DTYPE,) if self._is_fp8(name) else _FLOAT_DTYPES
            if stored.get_dtype() not in allowed:
                raise CheckpointError(
                    f"tensor {name} is stored as {stored.get_dtype()}, expected one of {', '.join(allowed)}: "
                    "use an unquantized checkpoint, or an FP8 one that modelopt exported"
                )
            if self._is_fp8(name):
                for kind in ("weight_scale", "input_scale"):
                    self._scale(name, kind)

    def _is_fp8(self, stored: str) -> bool:
        return self.head_is_fp8 if stored == "lm_head.weight" else self.stores_fp8 and stored.endswith("_proj.weight")

    def _scale(self, stored: str, kind: str) -> torch.Tensor:
        """The scale of a stored FP8 matrix [out, in]: [1], or [out] for a weight_scale of one a column."""
        name = stored.removesuffix("weight") + kind
        if name not in self._handles:
            raise CheckpointError(
                f"tensor {name} is missing from the checkpoint, expected the {kind} of an FP8 matrix: export it again "
                "with modelopt"
            )
        scale = self._handles[name].get_tensor(name).float().flatten()
        columns = self._handles[stored].get_slice(stored).get_shape()[0]
        if scale.numel() not in ((1, columns) if kind == "weight_scale" else (1,)):
            raise CheckpointError(
                f"tensor {name} has {scale.numel()} values, expected one{' or one a column' * (kind == 'weight_scale')}: "
                "export it again with modelopt, FP8 by tensor"
            )
        if not (scale.isfinite() & (scale > 0)).all():
            wrong = scale[~(scale.isfinite() & (scale > 0))][0].item()
            raise CheckpointError(
                f"tensor {name} holds {wrong}, expected a positive finite scale: calibrate again with text that reaches "
                "every layer"
            )
        return scale

    def _check_extra(self, name: str) -> None:
        if self.stores_fp8 and name.endswith(("weight_scale", "input_scale")):
            matrix = name.removesuffix("weight_scale").removesuffix("input_scale") + "weight"
            if matrix in self._handles and self._is_fp8(matrix):
                return
        if _IGNORED.search(name) or (self.config.tied_head and name == "lm_head.weight"):
            return
        raise CheckpointError(
            f"tensor {name} is in the checkpoint, expected none of that name for a {self.config.family} model of "
            f"{self.config.num_layers} layers: leaving it out would change the output, use a matching config.json"
        )

    def _read(self, name: str, source: Source, dtype: torch.dtype) -> torch.Tensor:
        try:
            parts = [self._handles[stored].get_tensor(stored).to(dtype) for stored in source.names]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"cannot read tensor {name} ({error}), expected its data: fetch the checkpoint again"
            ) from error
        if not source.transpose:
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        joined = torch.empty(parts[0].shape[1], sum(part.shape[0] for part in parts), dtype=dtype)
        start = 0
        for part in parts:
            joined[:, start : start + part.shape[0]] = part.t()
            start += part.shape[0]
        return joined

    def _read_fp8(self, name: str, source: Source) -> Iterator[tuple[str, torch.Tensor]]:
        """The FP8 matrix [out, in], its scales [out], and its input scale [1]."""
        try:
            parts = [self._handles[stored].get_tensor(stored) for stored in source.names]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"cannot read tensor {name} ({error}), expected its data: fetch the checkpoint again"
            ) from error
        joined = torch.cat([part.view(torch.uint8) for part in parts])
        wrong = int(((joined & 0x7F) == 0x7F).sum())
        if wrong:
            raise CheckpointError(
                f"tensor {name} of the checkpoint holds {wrong} NaN, expected finite FP8 values: export it again"
            )
        yield name, joined.view(torch.float8_e4m3fn)
        scales = [self._scale(stored, "weight_scale") for stored in source.names]
        columns = [scale.expand(part.shape[0]) for scale, part in zip(scales, parts, strict=True)]
        yield f"{name}_scale", torch.cat(columns)
        inputs = [self._scale(stored, "input_scale") for stored in source.names]
        yield f"{name}_input_scale", torch.stack(inputs).amax(dim=0)


def stores_fp8(folder: Path) -> bool:
    """Whether modelopt has quantized a checkpoint's matrices to FP8, as config.json or the file beside it says."""
    quantized = read_json(safe_file(folder, "config.json")).get("quantization_config")
    if not quantized and (folder / FP8_FILE).exists():
        quantized = read_json(safe_file(folder, FP8_FILE)).get("quantization")
    return bool(quantized) and is_modelopt_fp8(quantized)


def read_config(folder: Path) -> ModelConfig:
    """Read config.json (and the end tokens of generation_config.json) of a checkpoint folder.

    Raises:
        CheckpointError: not a folder, no config.json, broken JSON, or a model that is not supported.
    """
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {folder} is not a folder, expected a Hugging Face folder: correct the path")
    config = read_json(safe_file(folder, "config.json"))
    generation = folder / "generation_config.json"
    return ModelConfig.from_hf(config, read_json(safe_file(folder, generation.name)) if generation.exists() else None)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, is not a JSON object or is too large.
    """
    try:
        values = json.loads(read_small(path).decode())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.name} is missing in {path.parent}, expected a Hugging Face folder: correct the path or fetch "
            "it again"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path.name} ({error}), expected a JSON object: fetch it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path.name} holds a {type(values).__name__}, expected a JSON object: fetch it again")
    return values


def read_small(path: Path) -> bytes:
    """Read a file that is no weights; raises as `check_small`."""
    return check_small(path).read_bytes()


def check_small(path: Path) -> Path:
    """Return the path of a file that is no weights, if it has at most MAX_TEXT_BYTES.

    Raises:
        CheckpointError: it has more, or is no plain file: a pipe would be waited for.
        OSError: it is not there.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path.name} is a folder or a device, expected a plain file: fetch the checkpoint again")
    size = status.st_size
    if size > MAX_TEXT_BYTES:
        raise CheckpointError(
            f"{path.name} has {size} bytes, expected at most {MAX_TEXT_BYTES}: do not use this checkpoint"
        )
    return path


def safe_file(folder: Path, name: str) -> Path:
    """Return folder/name, refusing names and symlinks that lead out of the folder.

    A snapshot inside the Hub's own cache links to ../../blobs; that one place outside is accepted.

    Raises:
        CheckpointError: the name holds a path, or the file is a link that leaves the folder.
    """
    if not isinstance(name, str) or not name or name in (".", "..") or re.search(r"[/\\\0]", name):
        raise CheckpointError(
            f"the checkpoint names the file {name!r}, expected a plain file name: do not use this checkpoint"
        )
    target = (folder / name).resolve()
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parents[1] / "blobs")
    if not any(target.is_relative_to(root) for root in roots):
        raise CheckpointError(
            f"{name} is a link that leaves {folder.name}, expected a file inside it: copy the file into the folder"
        )
    return folder / name


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a checkpoint: those its index names, else model.safetensors.

    Raises:
        CheckpointError: there are none, one is missing, or the weights are pickles.
    """
    index = safe_file(folder, INDEX_FILE)
    names = [SINGLE_FILE]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                f"{INDEX_FILE} has no weight_map, expected tensor names to file names: fetch it again"
            )
        names = list(dict.fromkeys(weight_map.values()))
    paths = [safe_file(folder, name) for name in names]
    for path in paths:
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"weights are in {path.name}, expected .safetensors files: convert them, pickles are not read"
            )
        if not path.is_file():
            pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
            found = f"found {pickles[0]} (a pickle, which can run code)" if pickles else "found none"
            raise CheckpointError(
                f"{path.name} is missing in {folder}, {found}: fetch or convert the safetensors weights"
            )
    return paths


def weight_sources(config: ModelConfig) -> dict[str, Source]:
    """Say from which stored tensors each canonical weight is made, in the order of `weight_shapes`."""
    sources: dict[str, Source] = {}
    for name in weight_shapes(config):
        prefix, _, last = name.rpartition(".")
        stored = f"model.{prefix}." if prefix else "model."
        if name == "lm_head":
            sources[name] = Source(("lm_head.weight",), False)
        else:
            parts, transpose = _STORED[last]
            sources[name] = Source(tuple(stored + part for part in parts), transpose)
    return sources


def stored_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """List every tensor the checkpoint must hold, with its stored shape ([out, in] for matrices)."""
    widths = {
        "q_proj": config.q_size, "k_proj": config.kv_size, "v_proj": config.kv_size,
        "gate_proj": config.ffn_size, "up_proj": config.ffn_size,
    }  # fmt: skip
    canonical, stored = weight_shapes(config), {}
    for name, source in weight_sources(config).items():
        shape = canonical[name]
        for part in source.names:
            width = widths.get(part.split(".")[-2], shape[-1])
            if source.transpose:
                stored[part] = (width, shape[0])
            else:
                stored[part] = (width,) if len(shape) == 1 else shape
    return stored


def largest_tensor_bytes(config: ModelConfig, dtype: str | torch.dtype) -> int:
    """Bytes of the largest canonical tensor, which is what a build must be able to hold a few times."""
    return max(math.prod(shape) for shape in weight_shapes(config).values()) * torch_dtype(dtype).itemsize


_STORED: dict[str, tuple[tuple[str, ...], bool]] = {
    "embed": (("embed_tokens.weight",), False),
    "attn_norm": (("input_layernorm.weight",), False),
    "qkv": (("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"), True),
    "qkv_bias": (("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"), False),
    "q_norm": (("self_attn.q_norm.weight",), False),
    "k_norm": (("self_attn.k_norm.weight",), False),
    "o": (("self_attn.o_proj.weight",), True),
    "mlp_norm": (("post_attention_layernorm.weight",), False),
    "gate_up": (("mlp.gate_proj.weight", "mlp.up_proj.weight"), True),
    "down": (("mlp.down_proj.weight",), True),
    "final_norm": (("norm.weight",), False),
}
