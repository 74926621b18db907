"""How the ranks' executors stay together: rank 0 is told what to do, the others are told the same, step by step.

A step is a function of the executor's state and of what came in since the last one, so rank 0 only sends what came in (a
prompt's token ids, a cancellation); scheduling, pages and rounds then go the same way everywhere. Each plan carries a digest of
the tokens and ancestors that rank 0 has seen so far: a rank that has seen others says so and ends, before it could
wait for a collective that nobody else enters. The plan of an idle step is about 100 bytes.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from smc_engines.config import ExecutorConfig
from smc_engines.parallel.ranks import Ranks
from smc_engines.sampling_params import SamplingParams
from smc_plugin.errors import RankError

_STEP_TIMEOUT_S = {"cpu": 60.0, "cuda": 8.0}
_PATIENCE_S = 900.0  # shapes that were not seen before may have kernels to compile and graphs to capture
_ESS_COLUMN = 8  # of a packed summary: a real number, which need not be the same to the last bit


@dataclass(frozen=True)
class Submit:
    """A request came in."""

    request_id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int


@dataclass(frozen=True)
class Cancel:
    """A request is to end."""

    request_id: str


@dataclass(frozen=True)
class Drop:
    """All requests end now."""


@dataclass(frozen=True)
class Adapt:
    """A request drafts so many tokens a round from now on."""

    request_id: str
    draft_tokens: int


@dataclass(frozen=True)
class ForceResampling:
    """Running requests resample every round from now on."""


News = Submit | Cancel | Drop | Adapt | ForceResampling


@dataclass(frozen=True)
class Step:
    """Step once after this news; digest is of all that rank 0 has seen before."""

    news: tuple[News, ...]
    digest: int


@dataclass(frozen=True)
class Renew:
    """Make a new executor on the engine."""


@dataclass(frozen=True)
class Call:
    """Call a module's function with the engine and some arguments; it may use the ranks' collectives."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


@dataclass(frozen=True)
class Leave:
    """There will be no more plans."""


class Lockstep:
    """One executor's part in the agreement; of a single process, nothing happens.

    Args:
        ranks: the others, or None.
        device_type: decides the default of config.step_timeout_s.
    """

    def __init__(self, ranks: Ranks | None, config: ExecutorConfig, device_type: str) -> None:
        self._ranks = ranks
        self._leads = ranks is not None and ranks.rank == 0
        self._timeout_s = config.step_timeout_s or _STEP_TIMEOUT_S.get(device_type, 60.0)
        self._news: list[News] = []
        self._digest = 0
        self._known: set[Hashable] = set()
        if self._leads and ranks is not None:
            ranks.send_plan(Renew())

    @property
    def decides(self) -> bool:
        """Whether this rank may decide by a real number, which need not be the same to the last bit on another."""
        return self._ranks is None or self._leads

    def note(self, news: News) -> None:
        """Remember what the others must hear before the next step."""
        if self._leads:
            self._news.append(news)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step: rank 0 sends the plan first, and every rank watches its own progress."""
        if self._ranks is None:
            yield
            return
        if self._leads:
            self._ranks.send_plan(Step(tuple(self._news), self._digest))
            self._news.clear()
        self._ranks.watch(self._timeout_s)
        try:
            yield
        finally:
            self._ranks.watch(None)

    def expect(self, shape: Hashable) -> None:
        """Be patient with what this step runs if it was not run before."""
        if self._ranks is not None and shape not in self._known:
            self._known.add(shape)
            self._ranks.watch(_PATIENCE_S)

    def witness(self, packed: Tensor) -> None:
        """Take a summary that the host has read into the digest."""
        if self._ranks is not None:
            for part in (packed[:, :_ESS_COLUMN], packed[:, _ESS_COLUMN + 1 :]):
                self._digest = zlib.crc32(part.contiguous().numpy().tobytes(), self._digest)

    def check(self, plan: Step) -> None:
        """Compare with rank 0.

        Raises:
            RankError: the ranks have diverged.
        """
        if plan.digest != self._digest:
            rank = 0 if self._ranks is None else self._ranks.rank
            raise RankError(
                f"rank {rank} has tokens and ancestors of digest {self._digest:08x}, expected rank 0's {plan.digest:08x}: the "
                "ranks' GPUs or libraries compute differently; use equal ones, and report this if they are"
            )


def announce(ranks: Ranks | None, function: Callable[..., Any], *args: Any) -> None:
    """On rank 0, between steps: the others call this function with their engine and these arguments; so must the caller."""
    if ranks is not None and ranks.rank == 0:
        ranks.send_plan(Call(function, args))


def silent(_line: str) -> None:
    """Say nothing: what a rank that follows does with lines of progress."""


def leave(ranks: Ranks) -> None:
    """End the agreement in good order: rank 0 sends the others home."""
    if ranks.rank == 0:
        ranks.send_plan(Leave())
    ranks.close()
