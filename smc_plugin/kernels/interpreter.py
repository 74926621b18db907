"""Makes Triton's interpreter compute what a GPU computes; nothing here acts unless TRITON_INTERPRET is set.

Loop bounds: the interpreter keeps scalars as arrays of shape [1] and turns loop bounds into integers with int(array), which
numpy 2.4 and later refuses for anything but shape []: `for tile in range(n)` fails with "only 0-dimensional arrays can be
converted". The wrapper takes the one item instead.

Rounding to FP8: where rounding up reaches the next power of two, the interpreter loses the carry (0.4999 becomes 0.25
instead of 0.5). The wrapper lets torch round.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_patch_tensor_class = interpreter._patch_lang_tensor
_convert = interpreter._convert_float


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _patch_tensor_class(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _convert_float(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
    if target == tl.float8e4nv and source == tl.float32:
        rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.float8_e4m3fn)
        return rounded.view(torch.uint8).numpy()
    return _convert(values, source, target, rounding)


def correct_interpreter() -> None:
    """Install the wrappers; calling it again changes nothing."""
    interpreter._patch_lang_tensor = _patch_lang_tensor
    interpreter._convert_float = _convert_float
