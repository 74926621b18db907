"""What ranks can do together: the one interface between the executor and MPI or NCCL.

Every rank calls the same methods in the same order. `all_reduce` and `all_gather` are what a forward pass needs, many times
a round; on a GPU they are enqueued on the current stream and can be captured. The rest is for loading and for plans.
Example, two ranks: all_gather of [3] on rank 0 and [5] on rank 1 gives [[3], [5]] on both; all_reduce gives [8].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from smc_plugin.errors import RankError, SmcError

Result = TypeVar("Result")


class Ranks(Protocol):
    """This process among `size` processes."""

    rank: int
    size: int
    shares_memory: bool

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over the ranks, bit for bit the same on each; may overwrite x."""
        ...

    def all_gather(self, x: Tensor) -> Tensor:
        """Stack a tensor of every rank: [...] to [size, ...]."""
        ...

    def share_words(self, count: int, before: Callable[[], None] | None = None) -> Tensor:
        """Where shares_memory holds: 32-bit words, all bits set, on each rank, that kernels of every rank can read and write.

        Args:
            count: of the words of one rank.
            before: what this rank does first, alone, and may fail at.
        Returns:
            [size] int64, the addresses of the ranks' words, on the GPU; the words live as long as the ranks are connected.
        Raises:
            RankError: some rank has no room for them, or failed before. One that has
                room and then does not come ends the others.
        """
        ...

    def gather_objects(self, value: Any) -> list[Any]:
        """A small picklable value of every rank, in order, on every rank."""
        ...

    def send_plan(self, plan: Any) -> None:
        """On rank 0: hand a plan to the others without waiting for them."""
        ...

    def receive_plan(self) -> Any:
        """On the others: wait for the next plan, without keeping a processor busy."""
        ...

    def watch(self, limit_s: float | None) -> None:
        """End the process if this is not called again within limit_s seconds; None ends the watch."""
        ...

    def close(self) -> None:
        """Give back what the interface holds; the last call."""
        ...


def together(ranks: Ranks | None, what: str, function: Callable[[], Result]) -> Result:
    """Do something on every rank that may fail on some: all go on, or all fail with the first failure.

    Args:
        ranks: None for a single process.
        what: names the work in the message.
        function: must not talk to other ranks.
    Raises:
        RankError: it failed on some rank; the message names the rank.
        SmcError: it failed on a single process.
    """
    if ranks is None:
        return function()
    result, failure = None, None
    try:
        result = function()
    except SmcError as error:
        failure = str(error)
    except (MemoryError, torch.OutOfMemoryError) as error:
        failure = f"{_first_line(error)}, expected room for its share: free memory there, or build with more ranks"
    except Exception as error:
        failure = f"{_first_line(error)}, expected none: report this"
    failures = ranks.gather_objects(failure)
    failed = [rank for rank, message in enumerate(failures) if message is not None]
    if failed:
        more = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
        raise RankError(f"rank {failed[0]}{more} failed to {what}: {failures[failed[0]]}")
    return result  # type: ignore[return-value]


def same_on_all(
    ranks: Ranks | None, what: str, value: Result, remedy: str = "give every rank the same engine directory and options"
) -> Result:
    """Check that every rank holds an equal value.

    Args:
        ranks: None for a single process.
        what, remedy: parts of the message, "rank 1 has WHAT VALUE, expected rank 0's VALUE: REMEDY".
    Raises:
        RankError: they differ.
    """
    if ranks is not None:
        values = ranks.gather_objects(value)
        for rank, other in enumerate(values):
            if other != values[0]:
                found, expected = _difference(other, values[0])
                raise RankError(f"rank {rank} has {what} {found}, expected rank 0's {expected}: {remedy}")
    return value


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _difference(one: Any, other: Any) -> tuple[str, str]:
    """Two unlike values as short texts: of dictionaries, such as manifests, the first entry that differs."""
    if isinstance(one, dict) and isinstance(other, dict):
        name = next(name for name in [*one, *other] if one.get(name, "nothing") != other.get(name, "nothing"))
        found, expected = _difference(one.get(name, "nothing"), other.get(name, "nothing"))
        return f"{name} {found}", f"{name} {expected}"
    return f"{one!r:.80}", f"{other!r:.80}"
