"""Names of the element types an engine can have, and what they mean to torch and to safetensors.

Configurations and manifests carry names ("bfloat16"); tensors carry torch dtypes. Example: dtype_bytes("bfloat16") is
2, torch_dtype("float32") is torch.float32 and SAFETENSORS_NAMES["bfloat16"] is "BF16".
"""

import torch

from smc_build.closest import suggest
from smc_plugin.errors import ConfigError

_TORCH_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
ENGINE_DTYPES: tuple[str, ...] = tuple(_TORCH_DTYPES)
SAFETENSORS_NAMES: dict[str, str] = {"float32": "F32", "bfloat16": "BF16"}


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype for a name; a torch dtype passes through.

    Raises:
        ConfigError: the name is not one of ENGINE_DTYPES.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _TORCH_DTYPES:
        raise ConfigError(
            f"dtype {dtype!r} is not supported, expected one of {', '.join(ENGINE_DTYPES)}: "
            + suggest(dtype, ENGINE_DTYPES, fallback="choose one of them")
        )
    return _TORCH_DTYPES[dtype]


def dtype_name(dtype: str | torch.dtype) -> str:
    """Return the name ("float32", "bfloat16") of a dtype given either way."""
    return str(torch_dtype(dtype)).removeprefix("torch.")


def dtype_bytes(dtype: str | torch.dtype) -> int:
    """Return the bytes one element takes."""
    return torch_dtype(dtype).itemsize
