"""Draw a report: tokens/s by mode beside the floor, and a small panel for each sweep and for the parts of a round."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smc_plugin.errors import ConfigError

_COLOURS = {"target": "#7a8594", "speculative": "#d08a2e", "smc": "#2b6cb0"}
_FLOOR = "#b03a48"
_FIELDS = {
    "batch": ("batch", "requests at once (G)"),
    "particles": ("num_particles", "particles (N)"),
    "draft_tokens": ("num_draft_tokens", "draft tokens (K)"),
    "prompt_tokens": ("prompt_tokens", "prompt tokens"),
}
_LOGARITHMIC = ("batch", "prompt_tokens")


def check_available(path: Path) -> None:
    """Refuse a PNG early, before anything is measured for it.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if _find("matplotlib.figure") is None:
        raise ConfigError(
            f"--png {path} needs matplotlib, which is not installed: pip install 'smc-engine[eval]', or leave --png out"
        )


def _find(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a report as PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    check_available(path)
    rows = report["rows"]
    base = [row for row in rows if row["point"] == "base" and row["resampling"] == "default"]
    sweeps = [name for name in _FIELDS if any(row["point"].startswith(f"{name}=") for row in rows)]
    profiles = report.get("profiles", [])
    panels = 1 + len(sweeps) + len(profiles)
    columns = min(panels, 3)
    lines = -(-panels // columns)
    figure = _find("matplotlib.figure").Figure(
        figsize=(max(4.6 * columns, 6.5), 3.5 * lines + 0.9), layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    _draw_modes(axes[0], base)
    for axis, name in zip(axes[1:], sweeps, strict=False):
        _draw_sweep(axis, rows, base, name)
    for axis, profile in zip(axes[1 + len(sweeps) :], profiles, strict=False):
        _draw_profile(axis, profile)
    for axis in axes[panels:]:
        axis.set_visible(False)
    figure.suptitle(_title(base or rows), fontsize=10, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, facecolor="white")


def _title(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "nothing was measured"
    row = rows[-1]
    weights = "random weights" if row["weights"] == "random" else "real weights"
    draft = f" + {row['draft']}" if row["draft"] else ""
    return (
        f"{row['preset']}{draft}, {row['dtype']}, {weights}\n"
        f"{row['gpu']}, copy bandwidth {row['copy_tb_per_s']:.3g} TB/s\n"
        f"base point: N = {row['num_particles']}, K = {row['num_draft_tokens']}, {row['batch']} at once, prompt "
        f"{row['prompt_tokens']}, output {row['output_tokens']} tokens"
    )


def _draw_modes(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    """Bars with the spread of the repeats; the line above each bar is what its floor would give."""
    top = _top(rows)
    for place, row in enumerate(rows):
        speed, floor = row["tokens_per_s"], row["floor_tokens_per_s"]
        spread = [[speed - row["tokens_per_s_min"]], [row["tokens_per_s_max"] - speed]]
        axis.bar(place, speed, width=0.6, color=_COLOURS[row["mode"]], yerr=spread, capsize=3, ecolor="#333333")
        axis.hlines(floor, place - 0.38, place + 0.38, color=_FLOOR, linewidth=1.6, label=None if place else "floor")
        above = max(floor if floor <= top else 0, row["tokens_per_s_max"]) + 0.02 * top
        text = f"{speed:,.4g}\n{row['floor_fraction']:.0%} of floor"
        axis.annotate(text, (place, above), ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(rows)), [row["mode"] for row in rows])
    axis.set_ylim(0, 1.25 * top)
    _finish(axis, "modes, base point", "", "tokens/s")


def _top(rows: Sequence[dict[str, Any]]) -> float:
    """The largest value to show: a floor far above every speed (on a CPU) is left outside."""
    speeds = max([row["tokens_per_s_max"] for row in rows], default=1.0)
    return min(max([row["floor_tokens_per_s"] for row in rows] + [speeds]), 4 * speeds)


def _draw_sweep(axis: Any, rows: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], name: str) -> None:
    """One setting against tokens/s, a line a mode; its floor is dashed, the figures are fractions of it."""
    field, label = _FIELDS[name]
    swept = [row for row in rows if row["point"].startswith(f"{name}=")]
    modes = list(dict.fromkeys(row["mode"] for row in swept))
    shown = [row for row in [*base, *swept] if row["mode"] in modes]
    top = _top(shown)
    for mode in modes:
        own = sorted((row for row in shown if row["mode"] == mode), key=lambda row: row[field])
        colour, floor_colour = _COLOURS[mode], _FLOOR if len(modes) == 1 else _COLOURS[mode]
        x, y = [row[field] for row in own], [row["tokens_per_s"] for row in own]
        low = [row["tokens_per_s"] - row["tokens_per_s_min"] for row in own]
        high = [row["tokens_per_s_max"] - row["tokens_per_s"] for row in own]
        axis.errorbar(x, y, yerr=[low, high], color=colour, marker="o", markersize=4, capsize=2, label=mode)
        floor = [row["floor_tokens_per_s"] for row in own]
        axis.plot(x, floor, color=floor_colour, linestyle="--", linewidth=1.2, label=f"floor of {mode}")
        for row in own:
            text, at = f"{row['floor_fraction']:.0%}", (row[field], row["tokens_per_s"])
            if row["tokens_per_s"] > 0.1 * top:  # there is no room below
                axis.annotate(text, at, (0, -13), textcoords="offset points", ha="center", fontsize=7, color=colour)
    if name in _LOGARITHMIC:
        axis.set_xscale("log", base=2)
    ticks = sorted({row[field] for row in shown})
    axis.set_xticks(ticks, [str(value) for value in ticks])
    axis.minorticks_off()
    axis.margins(x=0.1)
    axis.set_ylim(0, 1.2 * top)
    _finish(axis, f"by {label}", label, "tokens/s")


def _draw_profile(axis: Any, profile: dict[str, Any]) -> None:
    """Where a round's time goes, by group; a bar that reads weights or keys says how fast."""
    groups = [row for row in profile["groups"] if row["share"] >= 0.002]
    names = [row["group"] for row in groups] + ["idle", "gap"]
    times = [row["us"] for row in groups] + [profile["idle_us"], profile["round_gap_us"]]
    colours = [_COLOURS["smc"] if row["bytes"] else _COLOURS["target"] for row in groups] + ["#c9ced6"] * 2
    axis.barh(range(len(names)), times, color=colours, height=0.7)
    rates = [row["tb_per_s"] for row in groups] + [None, None]
    for place, (time, rate) in enumerate(zip(times, rates, strict=True)):
        text = f" {time:,.0f} us" + (f", {rate:.2f} TB/s" if rate else "")
        axis.annotate(text, (time, place), va="center", fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.5 * max(times))
    _finish(axis, f"one round of {profile['mode']}, profiled", "us; blue: reads weights, keys or values", "")
    axis.grid(visible=False)


def _finish(axis: Any, title: str, x_label: str, y_label: str) -> None:
    axis.set_title(title, fontsize=9, loc="left", fontweight="bold")
    axis.set_xlabel(x_label, fontsize=8)
    axis.set_ylabel(y_label, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(axis="y", color="#e3e6ea", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    if handles:
        axis.legend(handles, labels, fontsize=7, frameon=False, loc="upper left", ncols=2)
