"""What the TensorRT plugins take, give and do, without any TensorRT: names, dimensions, types, in-place outputs.

SmcWeighResample ends a round (ALGORITHM steps 3 to 7): increments, bonus, ESS, ancestors. SmcKvPageCopy copies KV pages
in place. On a GPU they launch the Triton kernels, on a CPU they call the plain references. TensorRT has no float64:
such tensors travel as INT64 with the same bits. Example: with G = 1, N = 2, K = 1, log weights 0, log_p - log_q of
(log 3, 0) and threshold 0.9, the weights are (3/4, 1/4) and the ESS is 1.6 < 1.8, so log_evidence grows by log 2 and
the log weights become 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from smc_plugin.reference import pages, random, resample, weights

CACHE_DTYPES = ("float32", "bfloat16", "float16")
ANY_CACHE_DTYPE = "cache"


@dataclass(frozen=True)
class PluginTensor:
    """One input or output.

    Args:
        name: for messages and networks.
        dims: symbols; G requests, N particles, K draft tokens, and the cache's six.
        dtype: a torch name, or ANY_CACHE_DTYPE for one of CACHE_DTYPES.
    """

    name: str
    dims: tuple[str, ...]
    dtype: str


@dataclass(frozen=True, eq=False)
class Contract:
    """A plugin: inputs, outputs, which output overwrites which input, and what it computes.

    Args:
        name: the plugin's registered name.
        aliased: output index to the index of the input that it updates in place.
        compute: called with torch tensors; writes the outputs (an aliased one may already be its input).
        version: changes when inputs, outputs or meaning change.
    """

    name: str
    inputs: tuple[PluginTensor, ...]
    outputs: tuple[PluginTensor, ...]
    aliased: dict[int, int]
    compute: Callable[[Sequence[Tensor], Sequence[Tensor]], None] = field(repr=False)
    version: int = 1

    def sizes(self, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """Bind the dimension symbols to input shapes.

        Raises:
            ValueError: wrong rank, or a symbol with two sizes.
        """
        bound: dict[str, int] = {}
        for tensor, shape in zip(self.inputs, shapes, strict=True):
            for symbol, size in zip(tensor.dims, shape, strict=True):
                if bound.setdefault(symbol, size) != size:
                    raise ValueError(
                        f"{self.name}: {tensor.name} has {symbol} = {size}, expected {bound[symbol]} as in the inputs "
                        "before it: pass tensors of one batch"
                    )
        return bound


def _kernels(module: str, tensor: Tensor) -> Any:
    """The Triton kernels for GPU tensors, else None."""
    if tensor.device.type != "cuda":
        return None
    # Imported late: without the gpu extra only the references are there.
    from smc_plugin.kernels import pages as page_kernels  # noqa: PLC0415
    from smc_plugin.kernels import resample as resample_kernels  # noqa: PLC0415

    return {"pages": page_kernels, "resample": resample_kernels}[module]


def _weigh_and_resample(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    kernels = _kernels("resample", inputs[0])
    if kernels is None:
        results = _reference_round_end(*inputs)
    else:
        done = kernels.weigh_and_resample(*inputs)
        results = (
            *(done.log_weights, done.log_evidence, done.ancestors, done.ess),
            *(done.resampled, done.committed, done.recovered),
        )
    for output, result in zip(outputs, results, strict=True):
        output.copy_(result)


def _reference_round_end(
    log_weights: Tensor,
    log_p: Tensor,
    log_q: Tensor,
    alpha: Tensor,
    end: Tensor,
    finished: Tensor,
    failed: Tensor,
    bonus_log_zeta: Tensor,
    seed: Tensor,
    round_number: Tensor,
    ess_threshold: Tensor,
    eligible: Tensor,
    log_evidence: Tensor,
) -> tuple[Tensor, ...]:
    """Compose the references as a round does; outputs in the contract's order."""
    increments = (alpha[:, None, None] * log_p - log_q).to(torch.float64)
    increments = torch.where(failed[:, None, None], 0.0, increments)
    weighed = weights.accumulate(log_weights, increments, end, finished)
    takes_bonus = ~finished & (end > weighed.committed[:, None]) & ~failed[:, None]
    after = weighed.log_weights + torch.where(takes_bonus, bonus_log_zeta, 0.0)
    num_particles = log_weights.shape[1]
    ess = weights.effective_sample_size(after)
    resampled = eligible & (ess < ess_threshold * num_particles) & (num_particles > 1)
    zero = torch.zeros_like(seed)
    u = random.uniform(seed, round_number, zero, zero + random.PURPOSE_RESAMPLE)
    index = torch.arange(num_particles, device=seed.device).expand_as(after)
    ancestors = torch.where(resampled[:, None], resample.systematic_resample(after, u), index)
    evidence = torch.where(resampled, log_evidence + weights.log_mean_exp(after), log_evidence)
    new_weights = torch.where(resampled[:, None], 0.0, after)
    return new_weights, evidence, ancestors, ess, resampled, weighed.committed, weighed.recovered


def _copy_pages(inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    cache, source, destination = inputs
    if outputs[0].data_ptr() != cache.data_ptr():
        outputs[0].copy_(cache)
    (_kernels("pages", cache) or pages).copy_pages(outputs[0], source, destination)


_GROUP, _PARTICLE, _DRAFT = ("G",), ("G", "N"), ("G", "N", "K")
_CACHE = ("layers", "two", "pages", "page_size", "kv_heads", "head_dim")

WEIGH_RESAMPLE = Contract(
    name="SmcWeighResample",
    inputs=(
        PluginTensor("log_weights", _PARTICLE, "float64"),
        PluginTensor("log_p", _DRAFT, "float32"),
        PluginTensor("log_q", _DRAFT, "float32"),
        PluginTensor("alpha", _GROUP, "float32"),
        PluginTensor("end", _PARTICLE, "int64"),
        PluginTensor("finished", _PARTICLE, "bool"),
        PluginTensor("failed", _GROUP, "bool"),
        PluginTensor("bonus_log_zeta", _PARTICLE, "float64"),
        PluginTensor("seed", _GROUP, "int64"),
        PluginTensor("round_number", _GROUP, "int64"),
        PluginTensor("ess_threshold", _GROUP, "float64"),
        PluginTensor("eligible", _GROUP, "bool"),
        PluginTensor("log_evidence", _GROUP, "float64"),
    ),
    outputs=(
        PluginTensor("new_log_weights", _PARTICLE, "float64"),
        PluginTensor("new_log_evidence", _GROUP, "float64"),
        PluginTensor("ancestors", _PARTICLE, "int64"),
        PluginTensor("ess", _GROUP, "float64"),
        PluginTensor("resampled", _GROUP, "bool"),
        PluginTensor("committed", _GROUP, "int64"),
        PluginTensor("recovered", _GROUP, "bool"),
    ),
    aliased={0: 0, 1: 12},
    compute=_weigh_and_resample,
)

KV_PAGE_COPY = Contract(
    name="SmcKvPageCopy",
    inputs=(
        PluginTensor("cache", _CACHE, ANY_CACHE_DTYPE),
        PluginTensor("source", _PARTICLE, "int32"),
        PluginTensor("destination", _PARTICLE, "int32"),
    ),
    outputs=(PluginTensor("new_cache", _CACHE, ANY_CACHE_DTYPE),),
    aliased={0: 0},
    compute=_copy_pages,
)

CONTRACTS = (WEIGH_RESAMPLE, KV_PAGE_COPY)
