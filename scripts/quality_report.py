"""What a sweep of scripts/sweep_quality.py found, for docs/quality-options.md and quality-measured.md: tables and the drawing.

    python scripts/quality_report.py collect SWEEP_DIR     # writes docs/benchmarks/quality-sweep.json
    python scripts/quality_report.py render                # that JSON into both pages and docs/images/quality-frontier.png

`collect` adds to the sweep's own report what only its answers say: differences to all lossless answers and to the plain
setting, the evidence, what a fallback would do, and where errors come from: each answer's first wrong token, and what target
and draft gave it. `render` replaces what stands between `<!-- NAME -->` and `<!-- end -->` in the pages.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from scripts import sweep_quality  # noqa: E402
from scripts.first_errors import first_error_ratios  # noqa: E402
from smc_engines import eval_cli  # noqa: E402
from smc_engines.eval import plot  # noqa: E402
from smc_engines.eval.report import write_json  # noqa: E402
from smc_engines.eval.settings import Setting  # noqa: E402
from smc_engines.eval.statistics import (  # noqa: E402
    by_item,
    certificate_auc,
    mark_pareto,
    mean_and_half_width,
    summarise,
)
from smc_plugin.errors import ConfigError, SmcError  # noqa: E402

FIGURES = REPOSITORY / "docs" / "benchmarks" / "quality-sweep.json"
PAGES = tuple(REPOSITORY / "docs" / f"quality-{page}.md" for page in ("options", "measured"))
DRAWING = REPOSITORY / "docs" / "images" / "quality-frontier.png"
BASE = {"mode": "smc", "num_particles": 16, "num_draft_tokens": 16}
RATIOS = (-math.inf, 0.0, 3.0, math.inf)  # bounds of log p/q
ERRORS_OF = (
    {"mode": "target"},
    {"mode": "speculative", "num_draft_tokens": 16},
    *({"mode": "smc", "num_particles": n, "num_draft_tokens": k} for n, k in ((4, 8), (16, 12), (32, 12), (64, 12))),
    {"mode": "smc", "num_particles": 32, "num_draft_tokens": 16, "exact_below": 0.2},
)
GIVEN_UP = 0.1  # of the answers, those of the lowest log_evidence
FALLBACK_OF = ((8, 8), (8, 16), (16, 12), (16, 16), (32, 16), (64, 16))
DIGITS = 5
Records = Sequence[dict[str, Any]]


def main(argv: list[str] | None = None) -> int:
    """Collect or render; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(required=True, dest="verb")
    collecting = verbs.add_parser("collect")
    collecting.add_argument("sweep", type=Path, metavar="SWEEP_DIR")
    rendering = verbs.add_parser("render")
    rendering.add_argument("--pages", type=Path, nargs="+", default=PAGES)
    rendering.add_argument("--drawing", type=Path, default=DRAWING)
    for verb in (collecting, rendering):
        verb.add_argument("--figures", type=Path, default=FIGURES)
    args = parser.parse_args(argv)
    try:
        if args.verb == "collect":
            write_json(collect(args.sweep), args.figures)
        else:
            render(json.loads(args.figures.read_text(encoding="utf-8")), args.pages, args.drawing)
    except (SmcError, OSError) as error:
        print(f"quality_report: {error}", file=sys.stderr)
        return 1
    return 0


def collect(folder: Path) -> dict[str, Any]:
    """The report of a sweep with what its answers add.

    Raises:
        OSError: the folder has no report. ConfigError: its answers are those of other problems.
    """
    found = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    records = list(sweep_quality.read_answers(folder, {"problem_seed": found["problem_seed"]}))
    answers: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        answers[Setting.of(record["setting"]).key].append(record)
    found["command"] = re.sub(r"--(output|work) \S+", r"--\1 DIR", found["command"])
    counts = {Setting.of(row["setting"]): row["problems"] for row in found["rows"]}
    found["rows"] = summarise(eval_cli.wanted(records, counts, found["seeds"]))
    found["lossless"], lossless = {}, {}
    for temperature in sorted({Setting.of(row["setting"]).temperature for row in found["rows"]}):
        together = [record for own in answers.values() if is_lossless(own[0]["setting"], temperature) for record in own]
        right = lossless[temperature] = by_item(together, "right")
        found["lossless"][f"{temperature:g}"] = {
            "answers": len(together),
            "accuracy": sum(record["right"] for record in together) / len(together),
            "half_width": mean_and_half_width(list(right.values()))[1],
        }
        base = by_item(answers[_key(BASE, temperature)], "right")
        for row in found["rows"]:
            if Setting.of(row["setting"]).temperature == temperature:
                own = answers[Setting.of(row["setting"]).key]
                row.update(_difference("base", own, base))
                if not is_lossless(own[0]["setting"]):
                    row.update(_difference("lossless", own, right) | _evidence(own))
    for row in found["rows"]:  # the processes slowed each other
        del row["tokens_per_second"], row["pareto_tokens_per_second"]
    mark_pareto(found["rows"], "tokens_per_pass")
    found["fallback"] = [
        _fallback(answers[_key(plain, t)], answers[_key(again, t)], lossless[t])
        for t in (1.0, 0.7)
        for n, k in FALLBACK_OF
        for plain in [{"mode": "smc", "num_particles": n, "num_draft_tokens": k}]
        for again in [{"mode": "speculative", "num_draft_tokens": k}]
        if _key(plain, t) in answers and _key(again, t) in answers
    ]
    with torch.inference_mode():
        found["errors"] = [_errors(answers[_key(values, 1.0)]) for values in ERRORS_OF if _key(values, 1.0) in answers]
    return _rounded(found)


def is_lossless(values: Mapping[str, Any], temperature: float | None = None) -> bool:
    """Whether a setting follows the target's law exactly (at this temperature)."""
    exact = values["mode"] != "smc" or values.get("exact_below", 0) >= 1
    return exact and temperature in (None, values["temperature"])


def _key(values: Mapping[str, Any], temperature: float) -> str:
    return Setting.of({**values, "temperature": temperature}).key


def _difference(name: str, own: Records, reference: Mapping[int, float]) -> dict[str, float]:
    """Paired difference in accuracy over the problems that both answered."""
    ours = by_item(own, "right")
    common = [ours[item] - reference[item] for item in ours if item in reference]
    if not common:
        return {}
    mean, half = mean_and_half_width(common)
    return {f"gain_over_{name}": mean, f"gain_over_{name}_half_width": half}


def _evidence(own: Records) -> dict[str, float]:
    """Mean of exp(log_evidence), which is 1, and of it times wrong, which is the share of the target's wrong answers.

    Intervals are those of problems: a hard one has more wrong answers.
    """
    values = [
        {"item": record["item"], "evidence": z, "evidence_of_wrong": z * (not record["right"])}
        for record in own
        for z in [math.exp(record["log_evidence"])]
    ]
    found = {}
    for name in ("evidence", "evidence_of_wrong"):
        found[name], found[f"{name}_half_width"] = mean_and_half_width(list(by_item(values, name).values()))
    return found


def _fallback(own: Records, again: Records, lossless: Mapping[int, float]) -> dict[str, Any]:
    """What giving up the answers of the lowest log_evidence would change.

    An answer that is given up is replaced by what lossless decoding makes of the same problem: where log_evidence is low,
    problems are harder than most.

    Args:
        again: lossless answers, whose rounds one more costs.
        lossless: share of right ones, by problem.
    """
    worst = sorted(own, key=lambda record: record["log_evidence"])[: round(GIVEN_UP * len(own))]
    rounds, mean = by_item(again, "rounds"), statistics.fmean(record["rounds"] for record in again)
    passes = sum(record["rounds"] for record in own) + sum(rounds.get(record["item"], mean) for record in worst)
    gains = dict.fromkeys(((record["item"], record["seed"]) for record in own), 0.0)
    gains |= {(record["item"], record["seed"]): lossless[record["item"]] - record["right"] for record in worst}
    gain, half = mean_and_half_width(
        list(by_item([{"item": item, "gain": gain} for (item, _), gain in gains.items()], "gain").values())
    )
    before = statistics.fmean(record["right"] for record in own)
    return {
        "label": Setting.of(own[0]["setting"]).label,
        "setting": own[0]["setting"],
        "share": GIVEN_UP,
        "threshold": worst[-1]["log_evidence"],
        "right_before": before,
        "right_given_up": statistics.fmean(record["right"] for record in worst),
        "lossless_there": statistics.fmean(lossless[record["item"]] for record in worst),
        "right_after": before + gain,
        "gain": gain,
        "gain_half_width": half,
        "tokens_per_pass": (sum(record["tokens"] for record in own) - len(own)) / passes,
        "certificate_auc": certificate_auc(own),
    }


def _errors(own: Records) -> dict[str, Any]:
    """Answers with a wrong token, a hundred of all, by log p/q of the first one."""
    ratios = first_error_ratios(own)
    counts = [sum(low < ratio <= high for ratio in ratios) for low, high in pairwise(RATIOS)]
    return {
        "label": Setting.of(own[0]["setting"]).label,
        "answers": len(own),
        "log_ratio_bounds": list(RATIOS[1:-1]),
        "wrong_per_hundred": [100 * count / len(own) for count in counts],
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return round(value, DIGITS) if isinstance(value, float) else value


Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]


def _points(name: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        if not row.get(f"{name}_half_width"):
            return ""
        return f"{100 * row[name]:+.1f} ± {100 * row[f'{name}_half_width']:.1f}".replace("-", "−")

    return cell


def _number(name: str, digits: int) -> Callable[[Row], str]:
    return lambda row: f"{row[name]:.{digits}f}".replace("-", "−")


def _label(row: Row) -> str:
    """Without the temperature, which the head names; options as code."""
    parts = [part for part in row["label"].split(" ") if not part.startswith("T=")]
    return " ".join(f"`{part.removesuffix('=True')}`" if part[0].islower() and "=" in part else part for part in parts)


PLAIN: tuple[Column, ...] = (
    ("right", _number("accuracy", 3)),
    ("against target", _points("accuracy_gain")),
    ("against all lossless", _points("gain_over_lossless")),
    ("tokens a pass", _number("tokens_per_pass", 2)),
)
OPTIONS: tuple[Column, ...] = (
    ("right", _number("accuracy", 3)),
    ("against plain", _points("gain_over_base")),
    ("tokens a pass", _number("tokens_per_pass", 2)),
)


FALLBACK: tuple[Column, ...] = (
    ("log_evidence of the lowest tenth", _number("threshold", 1)),
    ("right there", _number("right_given_up", 2)),
    ("lossless there", _number("lossless_there", 2)),
    ("right in all", _number("right_before", 3)),
    ("right with the fallback", _number("right_after", 3)),
    ("gain", _points("gain")),
    ("tokens a pass", _number("tokens_per_pass", 2)),
)


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines))


def side_by_side(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    """A line a setting, with columns for each temperature, the highest first; a star marks the frontier."""
    temperatures = sorted({row["setting"]["temperature"] for row in rows}, reverse=True)
    lines: dict[str, dict[float, Row]] = defaultdict(dict)
    for row in rows:
        lines[_label(row)][row["setting"]["temperature"]] = row
    heads = ["setting", *(f"{head}, T = {t:g}" for t in temperatures for head, _ in columns)]
    body = []
    for label, own in lines.items():
        cells = []
        for t in temperatures:
            found = [cell(own[t]) if t in own else "" for _, cell in columns]
            if t in own and own[t]["pareto_tokens_per_pass"]:
                found[0] += " *"
            cells += found
        body.append([label, *cells])
    return table(heads, body)


def tables(figures: Mapping[str, Any]) -> dict[str, str]:
    """Every table of the pages, by its name."""

    def order(row: Row) -> tuple[bool, int, int]:
        values = row["setting"]
        return values["mode"] == "smc", values.get("num_draft_tokens", 0), values.get("num_particles", 1)

    plain = sorted((row for row in figures["rows"] if row["setting"].keys() <= {*BASE, "temperature"}), key=order)
    options = [row for row in figures["rows"] if row["setting"].items() >= BASE.items()]
    bounds = [f"e^{bound:g}" if bound else "1" for bound in figures["errors"][0]["log_ratio_bounds"]]
    heads = [f"p/q up to {bounds[0]}", *(f"{a} to {b}" for a, b in pairwise(bounds)), f"above {bounds[-1]}"]
    errors = [
        [_label(row), *(f"{count:.1f}" for count in row["wrong_per_hundred"]), f"{row['answers']}"]
        for row in figures["errors"]
    ]
    return {
        "plain": side_by_side(PLAIN, plain),
        "options": side_by_side(OPTIONS, options),
        "fallback": table(
            ["setting", *(head for head, _ in FALLBACK)],
            [
                [f"{_label(row)}, T = {row['setting']['temperature']:g}", *(cell(row) for _, cell in FALLBACK)]
                for row in figures["fallback"]
            ],
        ),
        "errors": table(["temperature 1", *heads, "answers"], errors),
    }


def render(figures: dict[str, Any], pages: Sequence[Path], drawing: Path) -> None:
    """Write tables and drawing.

    Raises:
        ConfigError: no page or more than one has a place for a table, or the drawing cannot be made.
    """
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    for name, body in tables(figures).items():
        place = re.compile(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        count = sum(len(place.findall(text)) for text in texts.values())
        if count != 1:
            raise ConfigError(
                f"{', '.join(map(str, pages))} have {count} places for the table {name!r}, expected one: add <!-- {name} --> "
                "and <!-- end -->"
            )
        for page, text in texts.items():
            texts[page] = place.sub(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
    for page, text in texts.items():
        page.write_text(text, encoding="utf-8")
    plot.check_available(drawing)
    drawing.parent.mkdir(parents=True, exist_ok=True)
    drawing.write_bytes(plot.frontier_png(figures))


if __name__ == "__main__":
    sys.exit(main())
