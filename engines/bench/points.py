"""What to measure: a base point, sweeps around it one setting at a time, and the modes at each.

With the base G = 1, N = 8, K = 8, prompt 256 and `--sweep-n 4,8,16`, the points are the base, "particles=4" and
"particles=16": the base is itself the sweep's middle and is not measured twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from smc_engines.sampling_params import Mode
from smc_plugin.errors import ConfigError

MODES: tuple[Mode, ...] = ("target", "speculative", "smc")
Resampling = Literal["default", "never", "every"]

# The settings that can be swept, and the values that --sweep takes.
SWEEPS: dict[str, tuple[int, ...]] = {
    "batch": (1, 2, 4, 8, 16),
    "particles": (4, 8, 16),
    "draft_tokens": (4, 8, 12, 16),
    "prompt_tokens": (256, 1024, 4096, 8192),
}
_USES: dict[str, tuple[Mode, ...]] = {
    "batch": MODES,
    "particles": ("smc",),
    "draft_tokens": ("speculative", "smc"),
    "prompt_tokens": MODES,
}


@dataclass(frozen=True)
class Point:
    """One setting of everything that fixes a round's shapes.

    Args:
        label: "base", or the setting that differs from it, such as "batch=4".
    """

    batch: int
    particles: int
    draft_tokens: int
    prompt_tokens: int
    output_tokens: int
    label: str = "base"


@dataclass(frozen=True)
class Case:
    """One timed thing: a mode at a point.

    Args:
        resampling: `default` leaves θ alone; `never` sets it to 0; `every` sets it to 2, which no ESS/N reaches, so that
            every round resamples (at θ = 1 a group of exactly equal weights would not: the ESS must be below θ N).
        max_rounds: end the timed batch after so many rounds; None runs to the end of the answers.
    """

    point: Point
    mode: Mode
    resampling: Resampling = "default"
    max_rounds: int | None = None

    @property
    def num_particles(self) -> int:
        """N of this mode."""
        return self.point.particles if self.mode == "smc" else 1

    @property
    def num_draft_tokens(self) -> int:
        """K of this mode."""
        return 0 if self.mode == "target" else self.point.draft_tokens

    @property
    def name(self) -> str:
        """How progress lines call it."""
        parts = [self.mode, self.point.label]
        return " ".join(parts if self.resampling == "default" else [*parts, f"resampling {self.resampling}"])


def sweep_points(base: Point, sweeps: Mapping[str, Sequence[int]]) -> list[Point]:
    """Points around the base that differ from it in one setting, in order of the settings."""
    return [
        replace(base, label=f"{setting}={value}", **{setting: value})
        for setting, values in sweeps.items()
        for value in values
        if value != getattr(base, setting)
    ]


def swept_by(point: Point, mode: Mode) -> bool:
    """Whether the setting in which a point differs means anything to a mode."""
    return mode in _USES.get(point.label.partition("=")[0], MODES)


def parse_modes(text: str, flag: str) -> tuple[Mode, ...]:
    """Read a comma-separated list of modes.

    Raises:
        ConfigError: one of them is unknown.
    """
    known: dict[str, Mode] = {mode: mode for mode in MODES}
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in known:
            raise ConfigError(f"{flag} names {word!r}, expected some of {', '.join(MODES)}: correct it")
    return tuple(dict.fromkeys(known[word] for word in words))


def parse_numbers(text: str, flag: str) -> tuple[int, ...]:
    """Read a comma-separated list of positive integers.

    Raises:
        ConfigError: one of them is not.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(f"{flag} is {text!r}, expected positive numbers such as 1,2,4: correct it")
    return tuple(dict.fromkeys(int(word) for word in words))
