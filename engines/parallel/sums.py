"""A sum over ranks with the residual and norm that follow it, by whatever was fastest here.

Between a product and the next there are three ways: all_reduce and then a kernel for residual and norm ("steps"), or one kernel
for both that exchanges rows in one shot or in two (smc_plugin.kernels.rank_sum). All are timed once, as CUDA graphs, at a few
numbers of rows; rank 0's clock decides for all. Example: 72 rows go the way that was fastest at 72, 20 rows the one at 32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from smc_engines.parallel.ranks import Ranks

if TYPE_CHECKING:
    from smc_plugin.kernels.rank_sum import RankSum, Way

Choice = Literal["steps", "one_shot", "two_shot"]
TIMED_ROWS = (1, 8, 16, 32, 72, 128)
_EPS = 1e-5


class RankSums:
    """Sums of bfloat16 rows of one width; in steps until `choose` is called.

    Args:
        ranks: all of them.
        fused: the kernels, by their way.

    Attributes:
        timings: rows to microseconds of each way.
        choices: rows to the fastest way, up to that many rows.
    """

    def __init__(self, ranks: Ranks, fused: Mapping[Way, RankSum]) -> None:
        from smc_plugin.kernels.residual_norm import add_and_norm  # noqa: PLC0415 - importing it needs triton

        self._ranks = ranks
        self._fused = fused
        self._add_and_norm = add_and_norm
        self.timings: dict[int, dict[Choice, float]] = {}
        self.choices: dict[int, Choice] = {}

    @property
    def ways(self) -> tuple[Choice, ...]:
        """All that there are."""
        return ("steps", *self._fused)

    def choose(self, timings: Mapping[int, dict[Choice, float]]) -> None:
        """Take the fastest way from now on; the same timings on every rank."""
        self.timings = dict(timings)
        self.choices = {rows: _fastest(times) for rows, times in sorted(timings.items())}

    def choice(self, rows: int) -> Choice:
        """The way that rows go: the fastest at the next number of rows that was timed."""
        for most, way in self.choices.items():
            if rows <= most:
                return way
        return "steps"

    def gain_us(self, rows: int) -> float:
        """Microseconds by which the fastest way was faster than steps."""
        times = next((times for most, times in sorted(self.timings.items()) if rows <= most), None)
        return 0.0 if times is None else times["steps"] - min(times.values())

    def takes(self, rows: int) -> bool:
        """Whether one kernel is the fastest for so many rows."""
        return self.choice(rows) != "steps"

    def __call__(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """y = the ranks' x + residual, and y's RMS norm; see RankSum. May overwrite x."""
        return self.run(self.choice(x.shape[0]), x, residual, weight, eps)

    def run(self, way: Choice, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The same in a given way."""
        if way == "steps":
            return self._add_and_norm(self._ranks.all_reduce(x), residual, weight, eps)
        return self._fused[way](x, residual, weight, eps)


def _fastest(times: dict[Choice, float]) -> Choice:
    return min(times, key=times.__getitem__)


def _time(sums: RankSums, rows: int, width: int, device: torch.device) -> dict[Choice, float]:
    from smc_engines.parallel.nccl import graph_us  # noqa: PLC0415 - needs CUDA

    x, residual = (torch.zeros((rows, width), dtype=torch.bfloat16, device=device) for _ in range(2))
    weight = torch.ones(width, dtype=torch.bfloat16, device=device)
    return {way: graph_us(lambda way=way: sums.run(way, x, residual, weight, _EPS)) for way in sums.ways}


def make_sums(ranks: Ranks | None, width: int, device: torch.device) -> RankSums | None:
    """Sums of rows of this width, each number of rows in the fastest way; every rank calls this together.

    Returns:
        None where the ranks share no memory, or no kernel suits.
    """
    if ranks is None or not ranks.shares_memory:
        return None
    from smc_plugin.kernels.launch import gpu_of  # noqa: PLC0415 - importing it needs triton
    from smc_plugin.kernels.rank_sum import WAYS, RankSum  # noqa: PLC0415

    gpu = gpu_of(device)
    suited: list[Way] = [way for way in WAYS if RankSum.suits(width, ranks.size, way, gpu)]
    if not suited:
        return None
    fused: dict[Way, RankSum] = {way: RankSum(ranks, width, way, device) for way in suited}
    sums = RankSums(ranks, fused)
    timings = {rows: _time(sums, rows, width, device) for rows in TIMED_ROWS}
    sums.choose(ranks.gather_objects(timings)[0])
    return sums
