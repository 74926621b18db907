"""Random tensors on the GPU, graph capture, and comparisons in which NaN fails."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
DEVICE = "cuda"


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Standard normal values, the same for the same shape and seed."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=DEVICE, dtype=torch.float32).to(dtype)


def relative_error(ours: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected magnitude; inf where ours is not finite."""
    difference = (ours.double() - expected.double()).abs().max()
    error = float(difference / expected.double().abs().max())
    return error if error == error else float("inf")  # noqa: PLR0124 - NaN


def captured(run: Callable[[], Result], poison: Callable[[Result], object]) -> Result:
    """Run once, capture, poison the outputs, replay twice.

    Args:
        run: launches kernels and returns their outputs.
        poison: overwrites the outputs, so that only the replay can have written the right ones.
    """
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    poison(result)
    graph.replay()
    graph.replay()
    torch.cuda.synchronize()
    return result
