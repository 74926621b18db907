"""One input tensor of a served model: its name, type and shape, and what its values may be.

Owns the reading of tensors into checked Python values. Every model's contract is a table of these fields, and the static
config.pbtxt files say the same (a test compares them).

    Field("top_p", "FP32", low=0.0, high=1.0) reads [[0.9]] as [0.9] (one value for each row of the batch), and refuses
    [[1.5]]: "input top_p must be in [0, 1], got 1.5 in row 0: send a value in that range"
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

MAX_TEXT_BYTES = 4 * 2**20
MAX_WORD_BYTES = 1024
MAX_BATCH_SIZE = 64

_NUMPY_KINDS = {"STRING": "OSU", "BOOL": "b", "FP32": "f", "FP16": "f"}


class InputError(ValueError):
    """A request that cannot be carried out as it stands; the message has what, expected against got, and what to do."""


class UnsupportedError(InputError):
    """A request for something that the contract knows and this project does not serve."""


@dataclass(frozen=True)
class Field:
    """One input.

    Args:
        name: as clients write it.
        dtype: STRING, BOOL, INT32, INT64, UINT64, UINT8, FP32 or FP16.
        dims: without the batch dimension; -1 is any length.
        required: the server refuses a request without it.
        param: the sampling parameter that it sets, if it is simply that.
        low, high: allowed range of numbers, both included.
        max_bytes: of one string.
        neutral: if not empty, the only values that change nothing and are accepted.
        unsupported: if not empty, why the input is refused whenever it is sent.
    """

    name: str
    dtype: str
    dims: tuple[int, ...] = (1,)
    required: bool = False
    param: str = ""
    low: float = -math.inf
    high: float = math.inf
    max_bytes: int = MAX_TEXT_BYTES
    neutral: tuple[Any, ...] = ()
    unsupported: str = ""

    def read(self, array: np.ndarray) -> list[Any]:
        """Check a tensor and turn it into one value a row.

        Args:
            array: [B, *dims].
        Returns:
            B values: a scalar each for dims (1,), else a (nested) list each.
        Raises:
            InputError: the type, the shape or a value is wrong, or the input is not supported.
        """
        if self.unsupported:
            raise UnsupportedError(f"input {self.name} is not supported, got one: {self.unsupported}")
        kinds = _NUMPY_KINDS.get(self.dtype, "iu")
        if array.dtype.kind not in kinds:
            raise InputError(f"input {self.name} must be {self.dtype}, got {array.dtype}: send that type")
        fits = array.ndim == len(self.dims) + 1 and all(
            want in (-1, got)
            for want, got in zip(self.dims, array.shape[1:])  # noqa: B905 (strict= needs the ndim)
        )
        if not fits or array.shape[0] < 1:
            raise InputError(
                f"input {self.name} must have shape [batch, {', '.join(map(str, self.dims))}], got {list(array.shape)}: "
                "reshape it"
            )
        if array.shape[0] > MAX_BATCH_SIZE:
            raise InputError(
                f"input {self.name} has a batch of {array.shape[0]}, expected at most {MAX_BATCH_SIZE}: split the batch"
            )
        rows = self._texts(array) if self.dtype == "STRING" else array.tolist()
        if self.dims == (1,):
            rows = [row[0] for row in rows]
        for index, row in enumerate(rows):
            self._check(row, index)
        return rows

    def _texts(self, array: np.ndarray) -> list[list[str]]:
        def text(value: Any, row: int) -> str:
            data = value if isinstance(value, bytes) else str(value).encode()
            if len(data) > self.max_bytes:
                raise InputError(
                    f"input {self.name} has {len(data)} bytes in row {row}, expected at most {self.max_bytes}: shorten it"
                )
            try:
                return data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"input {self.name} must be UTF-8, got byte {data[error.start]:#04x} at {error.start} in row {row}: "
                    "encode the text as UTF-8"
                ) from None

        return [[text(value, index) for value in row.ravel()] for index, row in enumerate(array)]

    def _check(self, value: Any, row: int) -> None:
        if isinstance(value, list):
            for each in value:
                self._check(each, row)
            return
        if self.neutral:
            if value not in self.neutral:
                allowed = " or ".join(repr(item) for item in self.neutral)
                raise UnsupportedError(
                    f"input {self.name} is not supported beyond {allowed}, got {value!r} in row {row}: leave it out"
                )
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return
        if not math.isfinite(value):
            raise InputError(f"input {self.name} must be finite, got {value} in row {row}: send a number")
        if not self.low <= value <= self.high:
            raise InputError(
                f"input {self.name} must be in [{_number(self.low)}, {_number(self.high)}], got {value} in row {row}: send a "
                "value in that range"
            )


def _number(value: float) -> str:
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:g}"


def read_fields(table: Mapping[str, Field], arrays: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
    """Read every tensor of a request.

    Args:
        table: the model's inputs by name.
        arrays: tensors by name.
    Returns:
        for each name that was sent, one value a row.
    Raises:
        InputError: an unknown or a missing name, a wrong value, or unequal batch sizes.
    """
    for name in arrays:
        if name not in table:
            raise InputError(f"unknown input {name!r}, expected one of {', '.join(sorted(table))}: drop or rename it")
    values = {name: table[name].read(array) for name, array in arrays.items()}
    for name, entry in table.items():
        if entry.required and name not in values:
            raise InputError(f"input {name} is missing, expected {entry.dtype} of shape [batch, 1]: send it")
    sizes = {name: len(rows) for name, rows in values.items()}
    if len(set(sizes.values())) > 1:
        raise InputError(f"all inputs must have one batch size, got {sizes}: send as many rows of each")
    return values
