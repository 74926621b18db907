"""Write what was found: JSON, CSV, a table on the terminal, and one HTML page that needs nothing else."""

from __future__ import annotations

import base64
import csv
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smc_engines.eval import plot

COLUMNS = (
    *(
        "label",
        "accuracy",
        "accuracy_low",
        "accuracy_high",
        "accuracy_gain",
        "accuracy_gain_half_width",
        "tokens_per_pass",
    ),
    *("tokens_per_second", "log_p_per_token", "log_p_half_width", "mmd_squared", "mmd_squared_half_width"),
    *(
        "different_texts",
        "ess_fraction",
        "resamples_per_round",
        "recoveries",
        "fell_back",
        "certificate_auc",
        "problems",
        "answers",
        "tokens",
    ),
    *("pareto_tokens_per_pass", "pareto_tokens_per_second", "flags"),
)
_DIGITS = 4


def write_json(report: dict[str, Any], path: Path) -> None:
    """The whole report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_csv(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One line a setting."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        writer.writerows(rows)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Text for a terminal; a star marks the frontier of accuracy against tokens a target pass."""
    width = max((len(row["label"]) for row in rows), default=0)
    lines = [f"  {'setting':{width}}  accuracy (95 %)        against target   tok/pass  tok/s  log p    ESS/N"]
    for row in rows:
        gain = ""
        if "accuracy_gain" in row:
            half = row["accuracy_gain_half_width"]
            gain = f"{100 * row['accuracy_gain']:+.1f}" + (f" ± {100 * half:.1f}" if half else "")
        ess = (
            f"{row['ess_fraction']:.2f}" if row["ess_fraction"] is not None and row["setting"]["mode"] == "smc" else ""
        )
        lines.append(
            f"{'*' if row['pareto_tokens_per_pass'] else ' '} {row['label']:{width}}  {row['accuracy']:.3f} "
            f"({row['accuracy_low']:.3f} to {row['accuracy_high']:.3f})  {gain:14}  {row['tokens_per_pass']:8.2f} "
            f"{row['tokens_per_second']:6.0f}  {row['log_p_per_token']:+.3f}  {ess}"
        )
    return "\n".join(lines)


def write_html(report: dict[str, Any], path: Path) -> None:
    """The drawing, the table and the command of every row in one file."""
    picture = base64.b64encode(plot.png(report)).decode()
    head = "".join(f"<th>{html.escape(name.replace('_', ' '))}</th>" for name in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(row.get(name)))}</td>" for name in COLUMNS) + "</tr>"
        for row in report["rows"]
    )
    text = (
        f"<!doctype html><meta charset=utf-8><title>smc-eval: {html.escape(report['task'])}</title>"
        "<style>body{font:14px sans-serif;margin:2em}table{border-collapse:collapse;font-size:12px}"
        "td,th{border:1px solid #ccc;padding:2px 6px;text-align:right}img{max-width:100%}</style>"
        f"<h1>{html.escape(report['task'])} on {html.escape(report['engine'])}</h1>"
        f"<p><code>{html.escape(report['command'])}</code></p><p>{html.escape(_machine(report))}</p>"
        f'<img alt="accuracy against cost" src="data:image/png;base64,{picture}">'
        f"<table><tr>{head}</tr>{body}</table>"
        "<p>Run one row again: the command above with its settings replaced by the row's flags.</p>"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.{_DIGITS}g}" if isinstance(value, float) else str(value)


def _machine(report: dict[str, Any]) -> str:
    return (
        f"{report['problems']} problems (seed {report['problem_seed']}), seeds {report['seeds']}, {report['device']}, "
        f"torch {report['torch']}, {report['date']}"
    )
