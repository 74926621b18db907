"""What launches the kernel, and when it can."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from smc_plugin.errors import ConfigError
from smc_plugin.kernels.launch import Gpu, launch, next_power_of_2
from smc_plugin.kernels.peers import Peers
from smc_plugin.kernels.rank_sum.kernel import SIDES, rank_sum_norm_kernel

MAX_ROWS = 128
_MAX_THREADS = 512
_MAX_VECTORS = 16  # of 16 bytes that a thread waits for at once

Way = Literal["one_shot", "two_shot"]
WAYS: tuple[Way, ...] = ("one_shot", "two_shot")


def _turns(width: int, ranks: int, way: Way) -> int | None:
    """Vectors of eight columns that a thread has of a row; None where a row does not suit."""
    if width % 8:
        return None
    vectors = width // 8
    for turns in (ranks,) if way == "two_shot" else (1, 2, 4, 8):
        waits = turns * (1 if way == "two_shot" else ranks)
        if vectors % turns == 0 and vectors // turns <= _MAX_THREADS and waits <= _MAX_VECTORS:
            return turns
    return None


class RankSum:
    """The sum over ranks of [rows, width] bfloat16, the residual stream and its norm, as one launch.

    Args:
        ranks: all of them; every rank makes this at the same time, and makes the same calls in the same order, on one stream.
        width: columns; `suits` said yes.
        way: how values travel.
        device: a GPU.
    """

    def __init__(self, ranks: Peers, width: int, way: Way, device: torch.device) -> None:
        turns = _turns(width, ranks.size, way)
        assert turns is not None
        self._rank, self._num_ranks, self._width, self._turns = ranks.rank, ranks.size, width, turns
        self._two_shot = way == "two_shot"
        share = width // 8 // turns
        self._num_warps = max(1, next_power_of_2(share) // 32)
        self._calls = torch.zeros(MAX_ROWS, dtype=torch.int32, device=device)
        rows_of_side = 2 if self._two_shot else ranks.size
        self._inboxes = ranks.share_words(MAX_ROWS * SIDES.value * rows_of_side * width // 2)

    @staticmethod
    def suits(width: int, ranks: int, way: Way, gpu: Gpu) -> bool:
        """Whether rows of so many columns can be summed in this way over so many ranks on this GPU."""
        return _turns(width, ranks, way) is not None and gpu.capability >= (9, 0) and gpu.sm_count >= MAX_ROWS

    def __call__(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """y = the ranks' x + residual, and y's RMS norm; the same bits on every rank.

        Args:
            x, residual: [rows, width] bfloat16, at most MAX_ROWS rows.
            weight: [width]; eps: of the norm.
        Returns:
            y and norm(y), [rows, width] bfloat16.
        Raises:
            ConfigError: rows are too many, or of another width or type; the other ranks would wait.
        """
        rows = x.shape[0]
        if rows > MAX_ROWS or x.shape[1] != self._width or x.shape != residual.shape or x.dtype != torch.bfloat16:
            raise ConfigError(
                f"a sum over ranks was given {x.dtype} {tuple(x.shape)}, expected bfloat16 and at most {MAX_ROWS} rows of "
                f"{self._width}: report this"
            )
        x, residual = x.contiguous(), residual.contiguous()
        out, normed = (torch.empty_like(residual) for _ in range(2))
        launch(
            rank_sum_norm_kernel,
            (rows,),
            *(x, residual, weight, out, normed, self._inboxes, self._calls, self._rank, eps),
            WIDTH=self._width,
            RANKS=self._num_ranks,
            TURNS=self._turns,
            TWO_SHOT=self._two_shot,
            num_warps=self._num_warps,
        )
        return out, normed
