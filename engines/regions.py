"""Who computes a region: the interface that a model runs on, and its torch implementation.

A runner knows the weights of every layer; the caller hands over activations and gets activations back. Example, layer 3
of Llama-3.2-1B with 16 rows: run("block", 3, {"attn": [16, 2048], "residual": [16, 2048]}) returns {"qkv": [16, 3072],
"residual": [16, 2048]}.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from smc_build.model_config import ModelConfig
from smc_build.network import is_repeated, layer_inputs, region_layers, region_specs
from smc_build.precision import Precision
from smc_build.torch_ops import TorchOps

Name = TypeVar("Name", bound=str)


class RegionRunner(Protocol):
    """Computes the regions of one model."""

    def run(self, region: str, layer: int | None, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute one region.

        Args:
            region: one of the model's (see smc_build.network).
            layer: the layer whose attention precedes the region, of those that are run for several; else None.
            activations: the region's inputs without weights, [rows, width] each.
        Returns:
            the region's outputs, [rows, width] each; enqueued on the current stream when they are on a GPU.
        """
        ...

    def sums_ranks(self, region: str, rows: int) -> bool:
        """Whether a region that begins with a sum over the ranks makes it itself: `run` then takes this rank's part of it,
        `partial`, in place of the sum, `reduced`."""
        ...


def bind_weights(config: ModelConfig, weights: Mapping[str, Tensor]) -> dict[tuple[str, int | None], dict[str, Tensor]]:
    """Find the weight inputs of every region and layer.

    Args:
        config: the decoder.
        weights: canonical names (smc_build.weights) to tensors.
    Returns:
        (region, layer) to input name to tensor; layer is None for regions that are run once a pass.
    """
    precision = Precision.of(weights)
    places: list[tuple[str, int | None]] = [("head", None)]
    for region, (first, last) in region_layers(config).items():
        places += [(region, layer) for layer in range(first, last + 1)] if is_repeated(region) else [(region, None)]
    return {
        (region, layer): {
            name: weights[weight] for name, weight in layer_inputs(config, region, layer, precision).items()
        }
        for region, layer in places
    }


class TorchRegions:
    """Computes regions eagerly with torch, on any device and for any number of rows.

    Args:
        config: the decoder's shapes.
        weights: canonical names to tensors, all on one device; matrices may be FP8.
        ops: another torch op set.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], ops: TorchOps | None = None) -> None:
        self._specs = region_specs(config, Precision.of(weights))
        self._bound = bind_weights(config, weights)
        if weights["embed"].device.type == "cpu":
            self._bound = {place: _widened(bound, weights["embed"].dtype) for place, bound in self._bound.items()}
        self._ops = ops or TorchOps()

    def run(self, region: str, layer: int | None, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute one region (see RegionRunner)."""
        return self._specs[region].build(self._ops, {**self._bound[region, layer], **activations})

    def sums_ranks(self, region: str, rows: int) -> bool:
        """Never; see RegionRunner."""
        return False


def _widened(bound: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """FP8 matrices in the activations' type, which holds every FP8 value: a CPU is slow at converting in each product."""
    return {name: tensor.to(dtype) if tensor.dtype == torch.float8_e4m3fn else tensor for name, tensor in bound.items()}


class SelectedRegions(Generic[Name]):
    """Hands each call to the runner that a rule names for its region and number of rows.

    Args:
        runners: by name.
        select: names a runner from a region and a number of rows.
    """

    def __init__(self, runners: Mapping[Name, RegionRunner], select: Callable[[str, int], Name]) -> None:
        self._runners = runners
        self._select = select

    def run(self, region: str, layer: int | None, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute one region (see RegionRunner)."""
        rows = next(iter(activations.values())).shape[0]
        return self._runners[self._select(region, rows)].run(region, layer, activations)

    def sums_ranks(self, region: str, rows: int) -> bool:
        """Whether the selected runner does (see RegionRunner)."""
        return self._runners[self._select(region, rows)].sums_ranks(region, rows)
