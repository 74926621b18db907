"""Which implementation of the kernels serves a device.

Both have the same functions with the same meaning: `smc_plugin.reference` in plain torch, which runs anywhere, and
`smc_plugin.kernels` in OpenAI Triton, for CUDA. A round is written once against this:

    kernels = kernels_for(torch.device("cuda"))
    drawn = kernels.sampling.sample(logits, temperature, seed, step, lane, purpose)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Literal

import torch

KernelChoice = Literal["auto", "reference", "triton"]
_MODULES = ("attention", "embedding", "groups", "pages", "resample", "sampling", "shards", "weights")


@dataclass(frozen=True)
class Kernels:
    """One implementation's modules; name is "reference" or "triton"."""

    name: str
    attention: ModuleType
    embedding: ModuleType
    groups: ModuleType
    pages: ModuleType
    resample: ModuleType
    sampling: ModuleType
    shards: ModuleType
    weights: ModuleType


def kernels_for(device: torch.device, choice: KernelChoice = "auto") -> Kernels:
    """The kernels for a device.

    Args:
        choice: `auto` takes Triton's on CUDA and the torch reference elsewhere.
    Raises:
        ConfigError: Triton's kernels are wanted and the triton package is missing.
    """
    is_triton = choice == "triton" or (choice == "auto" and device.type == "cuda")
    return triton_kernels() if is_triton else reference_kernels()


@cache
def reference_kernels() -> Kernels:
    """The torch reference."""
    return _load("reference", "smc_plugin.reference")


@cache
def triton_kernels() -> Kernels:
    """The Triton kernels; on CPU tensors they run under the interpreter (TRITON_INTERPRET=1) only.

    Raises:
        ConfigError: the triton package is missing; the message names the extra.
    """
    return _load("triton", "smc_plugin.kernels")


def _load(name: str, package: str) -> Kernels:
    return Kernels(name, **{module: import_module(f"{package}.{module}") for module in _MODULES})
