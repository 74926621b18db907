"""Draw a report: accuracy against what it costs, the Pareto frontier, and likelihood under the target.

python -m smc_engines.eval.plot report.json drawing.png      # from the JSON of a run elsewhere
"""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smc_engines.eval.settings import Setting
from smc_plugin.errors import ConfigError

_COLOURS = {"target": "#7a8594", "speculative": "#d08a2e", "smc": "#2b6cb0"}
_BLUES = ("#9ecae1", "#6baed6", "#4292c6", "#2171b5", "#08306b")  # N = 4 and fewer, 8, 16, 32, more
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_COSTS = (("tokens_per_pass", "tokens a target pass"), ("tokens_per_second", "tokens/s"))


def check_available(path: Path) -> None:
    """Refuse a drawing early, before anything is run for it.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError:
        raise ConfigError(
            f"{path} needs matplotlib, which is not installed: pip install 'smc-engine[eval]', or leave the option out"
        ) from None


def draw(report: dict[str, Any], path: Path) -> None:
    """Write a report as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(report))


def png(report: dict[str, Any]) -> bytes:
    """A line of panels for each temperature."""
    rows = report["rows"]
    temperatures = sorted({Setting.of(row["setting"]).temperature for row in rows})
    module = importlib.import_module("matplotlib.figure")
    figure = module.Figure(figsize=(14, 4.2 * len(temperatures) + 0.7), layout="constrained")
    grid = figure.subplots(len(temperatures), 3, squeeze=False)
    for line, temperature in zip(grid, temperatures, strict=True):
        own = [row for row in rows if Setting.of(row["setting"]).temperature == temperature]
        for axis, (cost, name) in zip(line, _COSTS, strict=False):
            _accuracy(axis, own, cost, f"{name}, temperature {temperature:g}")
        _likelihood(line[2], own)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(
        f"{report['task']} on {report['engine']}: {report['problems']} problems, seeds {report['seeds']}", fontsize=10
    )
    return _bytes(figure, 130)


def frontier_png(report: dict[str, Any]) -> bytes:
    """Accuracy against tokens a target pass, a panel for each temperature; the frontier's settings carry their names.

    For a report of many settings: colour says the mode, a darker blue more particles, a hollow mark an option.
    """
    temperatures = sorted({Setting.of(row["setting"]).temperature for row in report["rows"]}, reverse=True)
    module = importlib.import_module("matplotlib.figure")
    figure = module.Figure(figsize=(13, 5.6), layout="constrained")
    for axis, temperature in zip(figure.subplots(1, len(temperatures), squeeze=False)[0], temperatures, strict=True):
        own = [row for row in report["rows"] if Setting.of(row["setting"]).temperature == temperature]
        for row in own:
            spread = [[row["accuracy"] - row["accuracy_low"]], [row["accuracy_high"] - row["accuracy"]]]
            axis.errorbar(row["tokens_per_pass"], row["accuracy"], yerr=spread, **_mark(row))
        frontier = sorted((row for row in own if row["pareto_tokens_per_pass"]), key=lambda row: row["tokens_per_pass"])
        axis.plot(*zip(*((r["tokens_per_pass"], r["accuracy"]) for r in frontier), strict=True), "k-", lw=0.8, zorder=0)
        for line, row in enumerate(frontier):
            axis.annotate(
                _without_temperature(row["label"]).replace("=True", ""),
                *((row["tokens_per_pass"], row["accuracy"]), (row["tokens_per_pass"], 1.005 + 0.012 * line)),
                ha="left" if row["tokens_per_pass"] < max(r["tokens_per_pass"] for r in own) / 2 else "right",
                **{"fontsize": 8, "arrowprops": {"arrowstyle": "-", "lw": 0.4}},
            )
        for row in own:
            if row["setting"]["mode"] == "target":
                axis.axhspan(row["accuracy_low"], row["accuracy_high"], color=_COLOURS["target"], alpha=0.15, lw=0)
        axis.set(xlabel="tokens a target pass", ylabel="right (95 % interval)", title=f"temperature {temperature:g}")
        axis.set_ylim(top=1.01 + 0.012 * len(frontier))
        axis.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=9, fontsize=8)
    return _bytes(figure, 90)


def _mark(row: dict[str, Any]) -> dict[str, Any]:
    setting = row["setting"]
    mode, particles = setting["mode"], setting.get("num_particles", 1)
    options = setting.keys() - {"mode", "temperature", "num_particles", "num_draft_tokens"}
    colour, label = _COLOURS[mode], mode
    if mode == "smc":
        depth = min(max(particles.bit_length() - 3, 0), len(_BLUES) - 1)
        colour, label = _BLUES[depth], f"smc N={particles}{' with an option' if options else ''}"
    return {
        **{"color": colour, "label": label, "marker": _MARKERS[0 if mode != "smc" else particles.bit_length() % 8]},
        **{"markerfacecolor": "white" if options else colour, "linestyle": "none", "elinewidth": 0.6},
        **{"capsize": 2, "markersize": 6},
    }


def _without_temperature(label: str) -> str:
    return " ".join(part for part in label.split(" ") if not part.startswith("T="))


def _bytes(figure: Any, dpi: int) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, facecolor="white", format="png")
    return buffer.getvalue()


def _accuracy(axis: Any, rows: Sequence[dict[str, Any]], cost: str, name: str) -> None:
    for row in rows:
        low, high = row["accuracy"] - row["accuracy_low"], row["accuracy_high"] - row["accuracy"]
        axis.errorbar(
            row[cost], row["accuracy"], yerr=[[max(low, 0)], [max(high, 0)]], **_style(row), capsize=2, markersize=6
        )
    frontier = sorted((row for row in rows if row[f"pareto_{cost}"]), key=lambda row: row[cost])
    axis.plot([r[cost] for r in frontier], [r["accuracy"] for r in frontier], color="black", linewidth=0.8, zorder=0)
    exact = [row for row in rows if row["setting"]["mode"] == "target"]
    for row in exact:
        axis.axhspan(row["accuracy"] - 0.01, row["accuracy"], color=_COLOURS["target"], alpha=0.2, linewidth=0)
    axis.set_xlabel(name)
    axis.set_ylabel("accuracy (95 % interval)")
    axis.grid(alpha=0.3)


def _likelihood(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        axis.errorbar(
            row["tokens_per_pass"],
            row["log_p_per_token"],
            yerr=row["log_p_half_width"] or 0,
            **_style(row, label=False),
            capsize=2,
        )
    axis.set_xlabel("tokens a target pass")
    axis.set_ylabel("log p per token under the target")
    axis.grid(alpha=0.3)


def _style(row: dict[str, Any], label: bool = True) -> dict[str, Any]:
    """Colour by mode, marker by N, label without the temperature that the panel names."""
    mode, particles = row["setting"]["mode"], row["setting"].get("num_particles", 1)
    marker = _MARKERS[max(particles.bit_length() - 1, 0) % len(_MARKERS)] if mode == "smc" else "o"
    return {"color": _COLOURS[mode], "marker": marker, "label": _without_temperature(row["label"]) if label else None}


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
