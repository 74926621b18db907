"""Which element type each part of a model has.

Activations, norms, biases and the embedding are bfloat16 or float32. The matrices of the layers, the head and the KV pages
are of the same type, or FP8 (float8_e4m3fn, largest value 448). An FP8 matrix W [columns, inner] has one scale for each
output column and one for what it multiplies:

    y = (x @ Wᵀ) * scale                                        FP8 weights only
    y = (round(x / input_scale) @ Wᵀ) * (input_scale * scale)   FP8 activations too

Example: resolve("fp8", "bfloat16", None, None) is a target with FP8 matrices and a draft without, both of bfloat16
activations, heads and KV pages.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from smc_build.closest import suggest
from smc_build.dtypes import ENGINE_DTYPES, FP8, dtype_name
from smc_plugin.errors import ConfigError

FP8_OPTION = "fp8"
OPTION_DTYPES = (*ENGINE_DTYPES, FP8_OPTION)
QUANTIZABLE = ("qkv", "o", "gate_up", "down", "lm_head")
SCALES = ("_scale", "_input_scale")  # what an FP8 matrix's name is followed by


@dataclass(frozen=True)
class Precision:
    """Element type names of one model.

    Args:
        activations: also of norms, biases and the embedding.
        matrices: of qkv, o, gate_up and down.
        head: of lm_head; an FP8 head is a weight of its own, also where the checkpoint ties it to the embedding.
        kv: of KV pages.
    """

    activations: str
    matrices: str
    head: str
    kv: str

    @classmethod
    def plain(cls, dtype: str | torch.dtype) -> "Precision":
        """One type for everything."""
        return cls(*[dtype_name(dtype)] * 4)

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor]) -> "Precision":
        """What a model's weights are (canonical names to tensors); the pages' type is not known from them."""
        activations = dtype_name(weights["embed"].dtype)
        head = dtype_name(weights["lm_head"].dtype) if "lm_head" in weights else activations
        return cls(activations, dtype_name(weights["layers.0.qkv"].dtype), head, activations)

    @property
    def uses_fp8(self) -> bool:
        """Whether anything is FP8."""
        return FP8 in (self.matrices, self.head, self.kv)

    def is_fp8(self, weight: str) -> bool:
        """Whether a canonical weight is an FP8 matrix."""
        last = weight.rpartition(".")[2]
        return last in QUANTIZABLE and (self.head if last == "lm_head" else self.matrices) == FP8

    def dtype_of(self, weight: str) -> str:
        """Element type of a canonical weight, scales included."""
        if weight.endswith("_scale"):
            return "float32"
        return FP8 if self.is_fp8(weight) else self.activations

    def __str__(self) -> str:
        """What a person reads: "bfloat16", or "fp8 (head bfloat16, KV fp8)"."""
        if not self.uses_fp8:
            return self.activations
        shown = {name: FP8_OPTION if value == FP8 else value for name, value in vars(self).items()}
        return f"{shown['matrices']} (head {shown['head']}, KV {shown['kv']})"


def as_precision(dtype: "str | torch.dtype | Precision") -> Precision:
    """A dtype means that type for everything."""
    return dtype if isinstance(dtype, Precision) else Precision.plain(dtype)


def describe_types(precisions: Mapping[Any, Precision]) -> str:
    """What a person reads of an engine's element types: of one model where both are alike."""
    shown = {role: str(precision) for role, precision in precisions.items()}
    if len(set(shown.values())) == 1:
        return next(iter(shown.values()))
    return ", ".join(f"{role} {text}" for role, text in shown.items())


def resolve(
    dtype: str, draft_dtype: str | None, head_dtype: str | None, kv_dtype: str | None
) -> tuple[Precision, Precision]:
    """Turn options into the precisions of target and draft.

    Args:
        dtype, draft_dtype: float32, bfloat16 or fp8; the draft's is the target's by default.
        head_dtype: of the models whose matrices are FP8; their activations' by default.
        kv_dtype: of both models' KV pages; the activations' by default.
    Returns:
        (target, draft).
    Raises:
        ConfigError: a name is unknown, or the types do not go together.
    """
    given = {"--dtype": dtype, "--draft-dtype": draft_dtype, "--head-dtype": head_dtype, "--kv-dtype": kv_dtype}
    for flag, value in given.items():
        if value is not None and value not in OPTION_DTYPES:
            raise ConfigError(
                f"{flag} is {value!r}, expected one of {', '.join(OPTION_DTYPES)}: "
                + suggest(value, OPTION_DTYPES, fallback="choose one of them")
            )
    draft_dtype = draft_dtype or dtype
    plain = dict.fromkeys(value for value in (dtype, draft_dtype) if value != FP8_OPTION)
    if len(plain) > 1:
        raise ConfigError(
            f"--dtype is {dtype} and --draft-dtype is {draft_dtype}, expected one type of activations: use the same, or "
            "fp8 for one of them"
        )
    activations = next(iter(plain), "bfloat16")
    for flag, value in (("--head-dtype", head_dtype), ("--kv-dtype", kv_dtype)):
        if value not in (None, FP8_OPTION, activations):
            raise ConfigError(f"{flag} is {value}, expected {activations} or fp8, as the activations are: leave it out")
    if head_dtype == FP8_OPTION and FP8_OPTION not in (dtype, draft_dtype):
        raise ConfigError("--head-dtype is fp8, expected a model with FP8 matrices: add --dtype fp8, or leave it out")

    def precision(matrices: str) -> Precision:
        head = head_dtype if matrices == FP8_OPTION and head_dtype else activations
        return Precision(activations, *(_stored(name) for name in (matrices, head, kv_dtype or activations)))

    return precision(dtype), precision(draft_dtype)


def _stored(option: str) -> str:
    return FP8 if option == FP8_OPTION else option
