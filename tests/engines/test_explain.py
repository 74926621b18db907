"""The genealogy against lines of descent that are carried forward, and its three drawings."""

import sys
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smc_engines.explain import Genealogy, genealogy_png, genealogy_svg, genealogy_text, write_genealogy
from smc_engines.outputs import RequestInfo, RoundInfo
from smc_plugin.errors import ConfigError

SVG = "{http://www.w3.org/2000/svg}"


def info_of(ancestors, selected=0, ess=None, recovered=()):
    """Figures of a request whose rounds had these ancestors."""
    rounds = tuple(
        RoundInfo(
            ess=ess[number] if ess else 1.0,
            resampled=tuple(row) != tuple(range(len(row))),
            ancestors=tuple(row),
            settled=5 * number,
            context_len=10 + 5 * number,
            recovered=number in recovered,
        )
        for number, row in enumerate(ancestors)
    )
    return RequestInfo(
        prompt_tokens=3,
        cached_tokens=0,
        output_tokens=5 * len(rounds),
        rounds=len(rounds),
        resamples=sum(entry.resampled for entry in rounds),
        recoveries=len(recovered),
        accepted_tokens=0,
        log_evidence=-1.5,
        ess=tuple(entry.ess for entry in rounds),
        trace=rounds,
        seed=1,
        selected=selected,
    )


@st.composite
def histories(draw):
    """Random ancestors of up to 6 particles over up to 8 rounds, and the selected particle."""
    n = draw(st.integers(1, 6))
    lane = st.integers(0, n - 1)
    return draw(st.lists(st.lists(lane, min_size=n, max_size=n), max_size=8)), draw(lane)


@given(histories())
def test_lineage_is_the_line_of_descent_carried_forward(history):
    rows, selected = history
    n = len(rows[0]) if rows else selected + 1
    lines = [[lane] for lane in range(n)]
    for row in rows:
        lines = [[*lines[ancestor], lane] for lane, ancestor in enumerate(row)]
    assert Genealogy.of(info_of(rows, selected)).lineage == tuple(lines[selected])


@given(histories())
def test_every_particle_is_continued_or_killed(history):
    rows, selected = history
    tree = Genealogy.of(info_of(rows, selected))
    for number, row in enumerate(rows):
        assert sorted({*row, *tree.killed(number)}) == list(range(tree.num_particles))
        assert not set(row) & set(tree.killed(number))
        rebuilt = list(range(tree.num_particles))
        for ancestor, lanes in tree.copies(number).items():
            for lane in lanes:
                rebuilt[lane] = ancestor
        assert rebuilt == row


def test_text_is_the_drawing_of_the_module_docstring():
    text = genealogy_text(info_of([(0, 1), (0, 0)], selected=1, ess=[1.9, 1.05]))
    assert text.splitlines() == [
        "2 particles, 2 rounds, 1 resample, 0 recoveries; the answer is particle 1",
        "round    ESS             settled   0   1   copied",
        "    1   1.90 █████████▌        0  [│]  │",
        "    2   1.05 █████▎            5   │  [0]  0→1",
    ]


def test_text_names_recovered_rounds_and_leaves_lanes_out_when_too_many():
    text = genealogy_text(info_of([[39, *range(1, 40)]], ess=[40.0], recovered=(0,)))
    assert text.splitlines()[-1] == "    1  40.00 ██████████        0   39→0 (recovered)"


def test_without_rounds_the_text_is_one_line():
    assert genealogy_text(info_of([])) == "1 particle, 0 rounds, 0 resamples, 0 recoveries; the answer is particle 0"


@given(histories())
def test_svg_shows_every_line_once(history):
    rows, selected = history
    root = ElementTree.fromstring(genealogy_svg(info_of(rows, selected, ess=[1.0] * len(rows))))
    drawn = [path.get("class") for path in root.iter(f"{SVG}path")]
    tree = Genealogy.of(info_of(rows, selected))
    # an answer's lane is drawn before and after the fork of each round; all others twice too, but for the crosses
    assert drawn.count("answer") == 2 * len(rows)
    assert drawn.count("killed") == sum(len(tree.killed(number)) for number in range(len(rows)))
    assert len(drawn) == sum(2 * len(row) + len(tree.killed(number)) for number, row in enumerate(rows))
    bars = [bar for bar in root.iter(f"{SVG}rect") if bar.get("class")]
    assert len(bars) == len(rows)


def test_svg_stays_inside_its_frame_and_escapes_the_title():
    rows = [[max(0, lane - 1) for lane in range(16)] for _ in range(200)]
    text = genealogy_svg(info_of(rows, 15, ess=[16.0] * 200), title="<prompt> & more")
    root = ElementTree.fromstring(text)
    assert root.findtext(f"{SVG}title") == "<prompt> & more"
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for label in root.iter(f"{SVG}text"):
        assert 0 <= float(label.attrib["x"]) <= width
        assert 0 <= float(label.attrib["y"]) <= height
    for path in root.iter(f"{SVG}path"):
        numbers = path.attrib["d"].replace("M", " ").replace("H", " ").replace("C", " ").replace("l", " ").split()
        assert 0 <= float(numbers[0]) <= width
        assert 0 <= float(numbers[1]) <= height


def test_png_is_written(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "tree.png"
    write_genealogy(info_of([(0, 1, 2), (2, 2, 2)], selected=1, ess=[3.0, 1.0]), path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_png_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"smc-engine\[eval\]"):
        genealogy_png(info_of([(0, 1)]), tmp_path / "tree.png")
    assert not (tmp_path / "tree.png").exists()


def test_other_endings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"ending in \.svg or \.png, got '\.pdf'"):
        write_genealogy(info_of([(0, 1)]), tmp_path / "tree.pdf")
