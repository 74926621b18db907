"""Writes a safetensors file one tensor at a time, hashing as it goes.

The library's own writer wants every tensor at once; here the header is laid out from the shapes alone, so a 141 GB
model needs memory for one tensor. Example: {"a": [2, 3] float32} gives an 8-byte length, a header padded to a
multiple of 64 bytes (data stay aligned when mapped) and 24 bytes of data.
"""

import hashlib
import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch

from smc_build.dtypes import SAFETENSORS_NAMES, dtype_bytes, torch_dtype

_ALIGNMENT = 64


@dataclass(frozen=True)
class FileEntry:
    """Size and SHA-256 (hexadecimal) of a file."""

    bytes: int
    sha256: str


class ShardWriter:
    """Streams tensors into one safetensors file; see `open_shard`."""

    def __init__(
        self, file: IO[bytes], shapes: Mapping[str, tuple[int, ...]], dtype: str | Callable[[str], str]
    ) -> None:
        self._file = file
        self._dtypes = {name: dtype if isinstance(dtype, str) else dtype(name) for name in shapes}
        self._digest, self._total = hashlib.sha256(), 0
        self._expected = iter(shapes.items())
        self._put(_header(shapes, self._dtypes))

    def write(self, name: str, tensor: torch.Tensor) -> int:
        """Append a tensor; returns its bytes.

        Raises:
            ValueError: it does not come in the announced order, shape or dtype.
        """
        if next(self._expected, None) != (name, tuple(tensor.shape)) or tensor.dtype != torch_dtype(self._dtypes[name]):
            raise ValueError(f"{name} {list(tensor.shape)} {tensor.dtype} comes out of order or shape")
        data = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
        self._put(data)
        return data.nbytes

    def finish(self) -> FileEntry:
        """Size and hash of the complete file.

        Raises:
            ValueError: an announced tensor never came.
        """
        if (left := next(self._expected, None)) is not None:
            raise ValueError(f"tensor {left[0]} was announced and never came")
        return FileEntry(self._total, self._digest.hexdigest())

    def _put(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._total += len(data) if isinstance(data, bytes) else data.nbytes


@contextmanager
def open_shard(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str | Callable[[str], str]
) -> Iterator[ShardWriter]:
    """Create a safetensors file whose tensors come one by one.

    Args:
        path: the file to create.
        shapes: every tensor's shape, in the order they will come.
        dtype: element type name of all tensors, or says each one's from its name.
    """
    with path.open("wb") as file:
        yield ShardWriter(file, shapes, dtype)


def write_shard(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: str | Callable[[str], str],
    on_written: Callable[[int], object] | None = None,
) -> FileEntry:
    """Stream tensors into a safetensors file.

    Args:
        tensors: (name, tensor) pairs, in the order of `shapes`.
        on_written: told the number of bytes after each tensor.
    Returns:
        size and hash of the file.
    Raises:
        ValueError: a tensor does not come in the announced order, shape or dtype.
    """
    with open_shard(path, shapes, dtype) as writer:
        for name, tensor in tensors:
            written = writer.write(name, tensor)
            if on_written is not None:
                on_written(written)
        return writer.finish()


def hash_file(path: Path) -> FileEntry:
    """Hash a file that exists."""
    with path.open("rb", buffering=0) as file:
        digest = hashlib.file_digest(file, "sha256")
    return FileEntry(path.stat().st_size, digest.hexdigest())


def _header(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]) -> bytes:
    entries, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * dtype_bytes(dtypes[name])
        stored = SAFETENSORS_NAMES[dtypes[name]]
        entries[name] = {"dtype": stored, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
