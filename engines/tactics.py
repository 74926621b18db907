"""What was found fastest: who computes a region at how many rows, and how each product is cut.

A model's tactics are kept in the manifest, as `smc-build --tune` timed them on one kind of GPU:

    {"gpu": "NVIDIA H100 80GB HBM3", "models": {"draft": {
        "regions": {"block": {"8": {"choice": "fused", "us": {"fused": 48.1, "plans": 77.0, "torch": 69.2}}}},
        "products": {"o": {"8": {"rows": 16, "columns": 32, "inner": 128, "splits": 4, ...}}}}}}

A number of rows that was not timed takes the next larger one that was.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from smc_plugin.errors import EngineDirError
from smc_plugin.tactic import Tactic

Runner = Literal["fused", "plans", "torch"]
RUNNERS: tuple[Runner, ...] = get_args(Runner)
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class RegionTimes:
    """Microseconds of one region at one number of rows, by runner, and the runner chosen."""

    choice: Runner
    us: Mapping[str, float]

    def __post_init__(self) -> None:
        if self.choice not in RUNNERS:
            raise ValueError(f"runner {self.choice!r}, expected one of {', '.join(RUNNERS)}")


@dataclass(frozen=True)
class PassTimes:
    """Microseconds of a pass in one launch ("whole") and in one for each step ("steps"), and the faster one."""

    choice: Literal["whole", "steps"]
    us: Mapping[str, float]

    def __post_init__(self) -> None:
        if self.choice not in ("whole", "steps"):
            raise ValueError(f"pass {self.choice!r}, expected whole or steps")


@dataclass(frozen=True)
class ModelTactics:
    """One model's tactics.

    Args:
        regions: region to rows to times.
        products: product to rows to how it is cut.
        whole_pass: one launch against one for each step; None where it was not timed.
    """

    regions: Mapping[str, Mapping[int, RegionTimes]] = field(default_factory=dict)
    products: Mapping[str, Mapping[int, Tactic]] = field(default_factory=dict)
    whole_pass: PassTimes | None = None

    def runner(self, region: str, rows: int) -> Runner | None:
        """Who was fastest; None beyond what was timed."""
        times = at_least(self.regions.get(region, {}), rows)
        return None if times is None else times.choice

    def product(self, product: str, rows: int) -> Tactic | None:
        """How to cut a product; None beyond what was timed."""
        return at_least(self.products.get(product, {}), rows)

    def runners(self) -> set[Runner]:
        """Every runner that is some region's choice."""
        return {times.choice for by_rows in self.regions.values() for times in by_rows.values()}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        values: dict[str, Any] = {
            name: {
                key: {str(rows): dataclasses.asdict(entry) for rows, entry in by_rows.items()}
                for key, by_rows in table.items()
            }
            for name, table in (("regions", self.regions), ("products", self.products))
        }
        return values if self.whole_pass is None else {**values, "whole_pass": dataclasses.asdict(self.whole_pass)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelTactics:
        """Read what `to_dict` wrote; anything else raises KeyError, TypeError, ValueError or AttributeError."""
        timed = values.get("whole_pass")
        return cls(
            _read(values["regions"], RegionTimes),
            _read(values["products"], Tactic),
            None if timed is None else PassTimes(**timed),
        )


def _read(table: Mapping[str, Any], kind: Callable[..., Entry]) -> dict[str, dict[int, Entry]]:
    return {name: {int(rows): kind(**entry) for rows, entry in by_rows.items()} for name, by_rows in table.items()}


def at_least(by_rows: Mapping[int, Entry], rows: int) -> Entry | None:
    """The entry of the smallest key that is at least `rows`."""
    keys = sorted(by_rows)
    place = bisect_left(keys, rows)
    return by_rows[keys[place]] if place < len(keys) else None


def tactics_of(manifest_tactics: Mapping[str, Any], role: str, gpu: str) -> ModelTactics | None:
    """A model's tactics from the manifest, if they were timed on this kind of GPU.

    Raises:
        EngineDirError: the manifest holds something else.
    """
    if not manifest_tactics:
        return None
    try:
        return ModelTactics.from_dict(manifest_tactics["models"][role]) if manifest_tactics["gpu"] == gpu else None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EngineDirError(
            f"the manifest's tactics do not read ({error!r}), expected what smc-build --tune writes: run it again"
        ) from error
