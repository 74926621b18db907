"""What kernels that exchange values between ranks need of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Peers(Protocol):
    """Ranks that can share memory; see smc_engines.parallel.ranks.Ranks."""

    rank: int
    size: int

    def share_words(self, count: int, before: Callable[[], None] | None = None) -> Tensor:
        """See Ranks."""
        ...
