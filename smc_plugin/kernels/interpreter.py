"""Makes Triton's interpreter work with numpy 2.4 and later.

The interpreter keeps scalars as arrays of shape [1] and turns loop bounds into integers with int(array), which numpy now
refuses for anything but shape []: `for tile in range(n)` fails with "only 0-dimensional arrays can be converted". The
wrapper below takes the one item instead. It touches nothing unless TRITON_INTERPRET is set.
"""

from typing import Any

from triton.runtime import interpreter

_patch_tensor_class = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor: Any, scope: Any) -> None:
    _patch_tensor_class(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def allow_scalar_loop_bounds() -> None:
    """Install the wrapper; calling it again changes nothing."""
    interpreter._patch_lang_tensor = _patch_lang_tensor
