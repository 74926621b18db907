"""Which settings are compared: the product of some lists, named so that each can be run again alone.

grid(["target", "smc"], {"temperature": [1.0], "num_particles": [4, 8], "num_draft_tokens": [8]}) has three settings;
the last one's label is "smc N=8 K=8 T=1" and its flags are --modes smc --temperature 1.0 --n 8 --k 8.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from smc_engines.sampling_params import Mode, SamplingParams
from smc_plugin.errors import ConfigError

MODES: tuple[str, ...] = get_args(Mode)
FLAGS = {"temperature": "--temperature", "num_particles": "--n", "num_draft_tokens": "--k", "ess_threshold": "--theta"}
_SHORT = {"temperature": "T", "num_particles": "N", "num_draft_tokens": "K", "ess_threshold": "θ"}
_FIELDS = {field.name: field for field in dataclasses.fields(SamplingParams)}
_ORDER = {name: place for place, name in enumerate(dict.fromkeys(("mode", *FLAGS, *_FIELDS)))}
_OF_THE_ITEM = ("max_tokens", "stop")  # unless a setting says otherwise
# what decides the law of lossless answers: settings are compared with the target and with each other where all of it is equal
LAW = (
    *("temperature", "power_alpha", "top_k", "top_p", "min_p", "min_tokens", "stop_token_ids", "ignore_eos"),
    *_OF_THE_ITEM,
)
# what a mode does not look at would only make equal settings look different
_HEEDED = {"target": LAW, "speculative": (*LAW, "num_draft_tokens", "draft_temperature")}
_OWN = {
    "mode": "--modes",
    "seed": "--seeds",
    "logprobs": "neither, log-likelihood is always measured",
}


@dataclass(frozen=True)
class Setting:
    """Sampling parameters that differ from the defaults, in one order and of one type each, so that equal ones are equal."""

    values: tuple[tuple[str, Any], ...]

    def __post_init__(self) -> None:
        ordered = sorted(dict(self.values).items(), key=lambda pair: _ORDER.get(pair[0], len(_ORDER)))
        object.__setattr__(self, "values", tuple((name, _one_type(name, value)) for name, value in ordered))

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Setting:
        """From names and values, as a stored record has them."""
        return cls(tuple(values.items()))

    @property
    def mode(self) -> str:
        """smc, target or speculative."""
        return dict(self.values)["mode"]

    @property
    def temperature(self) -> float:
        """Of the target."""
        return float(dict(self.values).get("temperature", SamplingParams.temperature))

    @property
    def key(self) -> str:
        """The same text for the same setting, whatever the order of its values."""
        return json.dumps(dict(self.values), sort_keys=True)

    @property
    def law(self) -> str:
        """The same text for settings whose lossless answers have one law."""
        values = dict(self.values)
        default = {name: None if name in _OF_THE_ITEM else _FIELDS[name].default for name in LAW}
        return json.dumps({name: values.get(name, default[name]) for name in LAW})

    @property
    def label(self) -> str:
        """Short text for tables and plots."""
        order = ("num_particles", "num_draft_tokens", "ess_threshold", "temperature")
        values = {name: value for name, value in self.values if name != "mode"}
        shown = [f"{_SHORT[name]}={values[name]:g}" for name in order if name in values]
        return " ".join(
            [self.mode, *shown, *(f"{name}={value}" for name, value in values.items() if name not in order)]
        )

    @property
    def flags(self) -> str:
        """The options of smc-eval that name this setting alone."""
        parts = []
        for name, value in self.values:
            if name == "mode":
                parts += ["--modes", value]
            elif name in FLAGS:
                parts += [FLAGS[name], f"{value}"]
            else:
                parts += ["--vary", f"{name}={json.dumps(value) if not isinstance(value, str) else value}"]
        return shlex.join(parts)


def grid(modes: Sequence[str], axes: Mapping[str, Sequence[Any]]) -> list[Setting]:
    """Every combination, each mode with the axes that it heeds.

    Args:
        modes: of SamplingParams.
        axes: SamplingParams fields and the values to combine; empty lists are left out.
    Raises:
        ConfigError: an unknown mode, or a field that smc-eval sets itself; RequestError: an unknown field or bad value.
    """
    for name in axes:
        if name in _OWN:
            raise ConfigError(f"{name} is no parameter to vary, smc-eval sets it itself: use {_OWN[name]}")
    found: dict[Setting, None] = {}
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"--modes expects some of {', '.join(MODES)}, got {mode!r}: correct it")
        names = [name for name, values in axes.items() if values and name in _HEEDED.get(mode, axes)]
        for combination in itertools.product(*(axes[name] for name in names)):
            setting = Setting((("mode", mode), *zip(names, combination, strict=True)))
            SamplingParams.from_mapping(dict(setting.values))
            found[setting] = None
    return list(found)


def single(values: Mapping[str, Any], temperatures: Sequence[float]) -> list[Setting]:
    """The one setting of --also, at each temperature unless it names its own.

    Raises:
        ConfigError: its mode does not look at what it names, or see grid; RequestError: see grid.
    """
    mode = values.get("mode", "smc")
    own = {name: value for name, value in values.items() if name != "mode"}
    ignored = [name for name in own if name in _FIELDS and name not in _HEEDED.get(mode, own)]
    if ignored:
        raise ConfigError(f"--also names {', '.join(ignored)}, which mode {mode} does not look at: leave it out")
    return grid([mode], {"temperature": temperatures, **{name: [value] for name, value in own.items()}})


def parse_numbers(option: str, text: str, kind: type = int) -> list[Any]:
    """A comma-separated list of numbers.

    Raises:
        ConfigError: something else.
    """
    try:
        return [kind(part) for part in text.split(",") if part]
    except ValueError:
        raise ConfigError(f"{option} expects numbers such as 4,8, got {text!r}: correct it") from None


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """NAME=VALUE,VALUE; values are JSON where they can be, else text.

    Raises:
        ConfigError: there is no name or no value.
    """
    name, _, values = text.partition("=")
    if not name or not values:
        raise ConfigError(f"expected NAME=VALUE, got {text!r}: name a sampling parameter and its values")
    return name.replace("-", "_"), [_json_or_text(value) for value in values.split(",")]


def parse_setting(text: str) -> dict[str, Any]:
    """NAME=VALUE,NAME=VALUE of --also.

    Raises:
        ConfigError: a part has no name or no value.
    """
    found = {}
    for part in text.split(","):
        name, values = parse_axis(part)
        found[name] = values[0]
    return found


def _one_type(name: str, value: Any) -> Any:
    """1 and 1.0 are one temperature; a list cannot be a key."""
    if isinstance(value, list):
        return tuple(value)
    real = name in _FIELDS and "float" in str(_FIELDS[name].type)
    return float(value) if real and isinstance(value, int) and not isinstance(value, bool) else value


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
