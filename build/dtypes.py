"""Names of the element types an engine can have, and what they mean to torch and to safetensors.

Activations are one of ENGINE_DTYPES; matrices and KV pages may be FP8 (smc_build.precision). Configurations and manifests
carry names ("bfloat16"); tensors carry torch dtypes. Example: dtype_bytes("bfloat16") is 2, torch_dtype("float32") is
torch.float32 and SAFETENSORS_NAMES["bfloat16"] is "BF16".
"""

import torch

from smc_build.closest import suggest
from smc_plugin.errors import ConfigError

FP8 = "float8_e4m3fn"
ENGINE_DTYPES: tuple[str, ...] = ("float32", "bfloat16")
_TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in (*ENGINE_DTYPES, FP8)}
SAFETENSORS_NAMES: dict[str, str] = {"float32": "F32", "bfloat16": "BF16", FP8: "F8_E4M3"}


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype for a name; a torch dtype passes through.

    Raises:
        ConfigError: the name is neither one of ENGINE_DTYPES nor FP8.
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
