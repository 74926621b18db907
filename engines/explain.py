"""The particle genealogy of a finished request: who was copied from whom, and which line became the answer.

Reads RequestInfo.trace and nothing else. Particle i of round r continues particle ancestors[i]; a particle that nobody
continues ends there. Following `ancestors` backwards from the selected particle gives the lineage of the answer:

    2 particles, selected 1, ancestors (0, 1) then (0, 0): the answer ran in lane 0, 0 and, copied, 1.
    As text, with the answer's lane in brackets and a copy named by whom it copies:
        round    ESS             settled   0   1   copied
            1   1.90 █████████▌        0  [│]  │
            2   1.05 █████▎            5   │  [0]  0→1
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from smc_engines.outputs import RequestInfo, RoundInfo
from smc_plugin.errors import ConfigError, RequestError

_WIDEST_TEXT = 32  # particles drawn as lanes in a terminal
_BAR_CELLS = 10
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_STYLE = """
text { font: 11px system-ui, sans-serif; fill: #444 } .title { font-size: 14px; fill: #111 }
path { fill: none; stroke: #b4b9c2; stroke-width: 1.4 } .copy { stroke: #e0a030 }
.answer { stroke: #1f5fbf; stroke-width: 3 } .killed { stroke: #c0392b }
.bar { fill: #9bb8de } .resampled { fill: #e0a030 }
"""


@dataclass(frozen=True)
class Genealogy:
    """The family tree of one request.

    Args:
        num_particles: N lanes.
        rounds: one RoundInfo a round.
        lineage: the answer's lane at the start of each round, and after the last; one more entry than rounds.
    """

    num_particles: int
    rounds: tuple[RoundInfo, ...]
    lineage: tuple[int, ...]

    @classmethod
    def of(cls, info: RequestInfo) -> Genealogy:
        """Trace the answer's lineage.

        Args:
            info: figures of a finished request.
        Returns:
            The genealogy; with no round it is the single lane of the answer.
        Raises:
            RequestError: rounds disagree on the number of particles.
        """
        sizes = {len(entry.ancestors) for entry in info.trace}
        if len(sizes) > 1:
            raise RequestError(
                f"cannot draw the genealogy: expected one number of particles, got {sorted(sizes)}: report the request"
            )
        lanes = [info.selected]
        for entry in reversed(info.trace):
            lanes.append(entry.ancestors[lanes[-1]])
        return cls(sizes.pop() if sizes else info.selected + 1, info.trace, tuple(reversed(lanes)))

    def copies(self, number: int) -> dict[int, list[int]]:
        """Who was copied in round `number`: {ancestor: lanes it overwrote}."""
        found: dict[int, list[int]] = {}
        for lane, ancestor in enumerate(self.rounds[number].ancestors):
            if ancestor != lane:
                found.setdefault(ancestor, []).append(lane)
        return found

    def killed(self, number: int) -> list[int]:
        """The particles of round `number` that nobody continues."""
        survivors = set(self.rounds[number].ancestors)
        return [lane for lane in range(self.num_particles) if lane not in survivors]


def genealogy_text(info: RequestInfo) -> str:
    """Draw the genealogy for a terminal.

    Args:
        info: figures of a finished request.
    Returns:
        Lines without a final newline: one a round with its ESS, the settled tokens, a cell a particle and the copies.
    """
    tree = Genealogy.of(info)
    head = (
        f"{_count(tree.num_particles, 'particle')}, {_count(len(tree.rounds), 'round')}, "
        f"{_count(info.resamples, 'resample')}, {_count(info.recoveries, 'recovery')}; "
        f"the answer is particle {info.selected}"
    )
    if not tree.rounds:
        return head
    width = len(str(tree.num_particles - 1)) + 2
    drawn = tree.num_particles if tree.num_particles <= _WIDEST_TEXT else 0
    titles = "".join(f"{lane:^{width + 1}}" for lane in range(drawn))
    lines = [head, f"round    ESS {'':{_BAR_CELLS}}  settled  {titles} copied"]
    for number, entry in enumerate(tree.rounds):
        cells = "".join(_cell(tree, number, lane, width) for lane in range(drawn))
        copies = " ".join(
            f"{ancestor}→{','.join(map(str, lanes))}" for ancestor, lanes in sorted(tree.copies(number).items())
        )
        note = " (recovered)" if entry.recovered else ""
        bar = _bar(entry.ess / tree.num_particles)
        lines.append(f"{number + 1:5d} {entry.ess:6.2f} {bar}  {entry.settled:7d}  {cells} {copies}{note}".rstrip())
    return "\n".join(lines)


def genealogy_svg(info: RequestInfo, title: str = "Particle genealogy") -> str:
    """Draw the genealogy as an SVG document.

    Args:
        info: figures of a finished request.
        title: heading of the drawing.
    Returns:
        SVG text: rounds from left to right, a lane a particle, copies as branches, ended lines crossed out, the answer's
        lineage thick, and a bar of ESS below each round.
    """
    tree = Genealogy.of(info)
    frame = _Frame.fit(tree)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {frame.width:g} {frame.height:g}" '
        f'width="{frame.width:g}" height="{frame.height:g}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<rect width="{frame.width:g}" height="{frame.height:g}" fill="white"/>',
        f'<text class="title" x="{frame.left:g}" y="20">{escape(title)}</text>',
        f'<text x="{frame.left:g}" y="36">{escape(_caption(info))}</text>',
    ]
    every = max(1, round(12 / frame.lane))
    parts += [
        f'<text x="{frame.left - 8:g}" y="{frame.y(lane) + 4:g}" text-anchor="end">{lane}</text>'
        for lane in range(0, tree.num_particles, every)
    ]
    branches = [branch for number in range(len(tree.rounds)) for branch in _branches(tree, number, frame)]
    # the answer is drawn last, over the others (the sort is stable)
    parts += sorted(branches, key=lambda text: 'class="answer"' in text)
    for number in range(len(tree.rounds)):
        parts += _ess_bar(tree, number, frame)
    parts.append(f'<text x="{frame.left - 8:g}" y="{frame.bars + 12:g}" text-anchor="end">ESS</text></svg>')
    return "\n".join(parts) + "\n"


def genealogy_png(info: RequestInfo, path: Path, title: str = "Particle genealogy") -> None:
    """Draw the genealogy as a PNG file.

    Args:
        info: figures of a finished request.
        path: file to write.
        title: heading of the drawing.
    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        figure_module: Any = importlib.import_module("matplotlib.figure")
    except ImportError:
        raise ConfigError(
            "a PNG needs matplotlib, which is not installed: install the extra with pip install 'smc-engine[eval]', or "
            "ask for a .svg file"
        ) from None
    tree = Genealogy.of(info)
    figure = figure_module.Figure(figsize=(min(16, 3 + 0.35 * len(tree.rounds)), 2.5 + 0.25 * tree.num_particles))
    lanes, bars = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for number, entry in enumerate(tree.rounds):
        start, fork, end = number, number + 0.55, number + 1
        for lane in range(tree.num_particles):
            lanes.plot((start, fork), (lane, lane), **_line(tree.lineage[number] == lane, False))
            ancestor = entry.ancestors[lane]
            lanes.plot((fork, end), (ancestor, lane), **_line(tree.lineage[number + 1] == lane, ancestor != lane))
        dead = tree.killed(number)
        lanes.plot([fork] * len(dead), dead, "x", color="#c0392b", markersize=5, zorder=4)
        bars.bar(number + 0.5, entry.ess, color="#e0a030" if entry.resampled else "#9bb8de")
    lanes.set(title=f"{title}\n{_caption(info)}", ylabel="particle")
    lanes.invert_yaxis()
    bars.set(xlabel="round", ylabel="ESS", ylim=(0, tree.num_particles))
    figure.savefig(path, dpi=150, bbox_inches="tight")


def write_genealogy(info: RequestInfo, path: Path, title: str = "Particle genealogy") -> None:
    """Write the genealogy to a file; the ending .svg or .png decides which. Raises ConfigError for another ending."""
    if path.suffix == ".svg":
        path.write_text(genealogy_svg(info, title), encoding="utf-8")
    elif path.suffix == ".png":
        genealogy_png(info, path, title)
    else:
        raise ConfigError(
            f"cannot draw the genealogy to {path}: expected a name ending in .svg or .png, got {path.suffix!r}: "
            "rename it"
        )


@dataclass(frozen=True)
class _Frame:
    """Where things stand in the drawing, in pixels."""

    width: float
    height: float
    left: float
    top: float
    lane: float
    step: float
    bars: float
    bar_height: float = 48

    @classmethod
    def fit(cls, tree: Genealogy) -> _Frame:
        rounds, left, top = max(1, len(tree.rounds)), 48.0, 60.0
        lane = max(5.0, min(22.0, 440 / tree.num_particles))
        step = max(10.0, min(44.0, 1320 / rounds))
        bars = top + lane * tree.num_particles + 8
        return cls(max(420.0, left + step * rounds + 24), bars + 48 + 36, left, top, lane, step, bars)

    def x(self, time: float) -> float:
        return round(self.left + self.step * time, 1)

    def y(self, lane: int) -> float:
        return round(self.top + self.lane * lane, 1)


def _branches(tree: Genealogy, number: int, frame: _Frame) -> list[str]:
    """The SVG paths of one round: every lane up to the fork, then from each ancestor to its heirs."""
    start, fork, end = frame.x(number), frame.x(number + 0.55), frame.x(number + 1)
    here, after = tree.lineage[number], tree.lineage[number + 1]
    paths = []
    for lane, ancestor in enumerate(tree.rounds[number].ancestors):
        y, from_y, bend = frame.y(lane), frame.y(ancestor), (fork + end) / 2
        paths.append(f'<path class="{"answer" if lane == here else "lane"}" d="M{start} {y}H{fork}"/>')
        name = "answer" if lane == after else "lane" if lane == ancestor else "copy"
        paths.append(f'<path class="{name}" d="M{fork} {from_y}C{bend:g} {from_y} {bend:g} {y} {end} {y}"/>')
    for lane in tree.killed(number):
        y = frame.y(lane)
        paths.append(f'<path class="killed" d="M{fork - 3:g} {y - 3:g}l6 6m0 -6l-6 6"/>')
    return paths


def _ess_bar(tree: Genealogy, number: int, frame: _Frame) -> list[str]:
    """The ESS bar of one round, with its number and the settled tokens below where there is room."""
    entry = tree.rounds[number]
    height = frame.bar_height * entry.ess / tree.num_particles
    base, x = frame.bars + frame.bar_height, frame.x(number)
    tip = f"round {number + 1}: ESS {entry.ess:.2f} of {tree.num_particles}, {entry.settled} tokens settled"
    parts = [
        f'<rect class="{"resampled" if entry.resampled else "bar"}" x="{x + 2:g}" y="{base - height:.1f}" '
        f'width="{frame.step - 4:g}" height="{height:.1f}"><title>{tip}</title></rect>'
    ]
    if number % max(1, round(36 / frame.step)) == 0:
        middle = x + frame.step / 2
        parts.append(f'<text x="{middle:g}" y="{base + 13:g}" text-anchor="middle">{number + 1}</text>')
        parts.append(f'<text x="{middle:g}" y="{base + 27:g}" text-anchor="middle">({entry.settled})</text>')
    return parts


def _caption(info: RequestInfo) -> str:
    return (
        f"answer: particle {info.selected}, {info.output_tokens} tokens; {_count(info.rounds, 'round')}, "
        f"{_count(info.resamples, 'resample')}; below: ESS, round (tokens settled)"
    )


def _line(answer: bool, copy: bool) -> dict[str, Any]:
    color = "#1f5fbf" if answer else "#e0a030" if copy else "#b4b9c2"
    return {"color": color, "linewidth": 2.5 if answer else 1, "zorder": 3 if answer else 2}


def _cell(tree: Genealogy, number: int, lane: int, width: int) -> str:
    ancestor = tree.rounds[number].ancestors[lane]
    mark = "│" if ancestor == lane else str(ancestor)
    answer = tree.lineage[number + 1] == lane
    return f"{f'[{mark}]' if answer else mark:^{width + 1}}"


def _bar(fraction: float) -> str:
    eighths = round(8 * _BAR_CELLS * min(1.0, max(0.0, fraction)))
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(_BAR_CELLS)


def _count(number: int, noun: str) -> str:
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{number} {noun if number == 1 else plural}"
