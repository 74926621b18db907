"""scripts/quality_report.py: the page is what the figures say, and first errors are where they are."""

import gzip
import json
from pathlib import Path

import pytest

from scripts import distil_task_draft, quality_report, sweep_quality
from scripts.first_errors import first_error, first_error_ratios
from smc_build.builder import BuildOptions, build_engine
from smc_build.engine_dir import load_manifest
from smc_engines.eval import chain
from smc_plugin.errors import ConfigError


def tokens(text: str) -> list[int]:
    return chain.tokenizer().encode(text, add_special_tokens=False).ids


def test_the_pages_hold_the_tables_of_their_figures(tmp_path: Path) -> None:
    copies = [tmp_path / page.name for page in quality_report.PAGES]
    for page, copy in zip(quality_report.PAGES, copies, strict=True):
        copy.write_bytes(page.read_bytes())
    command = ["render", "--drawing", str(tmp_path / "drawing.png"), "--pages", *map(str, copies)]
    assert quality_report.main(command) == 0
    for page, copy in zip(quality_report.PAGES, copies, strict=True):
        assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
    assert (tmp_path / "drawing.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_without_a_place_is_refused(tmp_path: Path) -> None:
    page = tmp_path / "quality.md"
    page.write_text("<!-- plain -->\n<!-- end -->\n")
    figures = json.loads(quality_report.FIGURES.read_text(encoding="utf-8"))
    with pytest.raises(ConfigError, match="0 places for the table 'options'"):
        quality_report.render(figures, [page], tmp_path / "drawing.png")
    assert page.read_text() == "<!-- plain -->\n<!-- end -->\n"


def test_the_first_token_that_does_not_follow_is_found() -> None:
    prompt = [chain.IDS[chain.BEGIN], *tokens("47A+25B%30:")]
    end = chain.IDS[chain.END]
    right = [*tokens(" so now takeA47+25=72; then weB72%30=57; answer57"), end]
    assert first_error(prompt, right) is None
    for text, place in (
        ("A47+25=71", 8),  # a figure
        ("A47-25", 3),  # a sign
        (" so so soB", 3),  # a label too early
        ("A47+25=72;B72%30=57; answer75", 21),  # the last figures, after right steps
    ):
        assert first_error(prompt, [*tokens(text), end]) == place, text
    assert first_error(prompt, [*tokens("A47+25=72;B72%30=57; answer57"), *tokens(" so"), end]) is None
    assert first_error(prompt, tokens("A47+25=72;B72%30=57; answer57")) is None  # cut before its end


def answer(
    item: int, seed: int, right: bool, log_evidence: float, tokens: int = 11, rounds: int = 1
) -> dict[str, object]:
    setting = {"mode": "smc", "temperature": 1.0, "num_particles": 8, "num_draft_tokens": 8}
    figures = {"right": right, "log_evidence": log_evidence, "tokens": tokens, "rounds": rounds}
    return {"setting": setting, "item": item, "seed": seed, **figures}


def test_a_fallback_is_worth_what_lossless_answers_to_the_same_problem_are() -> None:
    """The lowest evidence is that of long, hard problems: taking all problems' share of right answers there flattered it."""
    own = [answer(item, seed, right=True, log_evidence=-1.0) for item in range(1, 10) for seed in (0, 1)]
    own += [answer(0, 0, right=False, log_evidence=-9.0), answer(0, 1, right=False, log_evidence=-8.0)]
    lossless = dict.fromkeys(range(10), 1.0) | {0: 0.25}
    again = [answer(item, 0, right=True, log_evidence=0.0, rounds=8 if item == 0 else 2) for item in range(10)]
    found = quality_report._fallback(own, again, lossless)
    assert found["threshold"] == -8.0
    assert (found["right_before"], found["right_given_up"], found["lossless_there"]) == (0.9, 0.0, 0.25)
    assert found["right_after"] == pytest.approx(0.9 + 0.025)
    assert found["gain"] == pytest.approx(0.025)
    assert found["gain_half_width"] == pytest.approx(1.959964 * 0.025)  # one problem of ten gains a quarter
    assert found["tokens_per_pass"] == pytest.approx(20 * 10 / (20 + 2 * 8))


def test_the_evidence_of_wrong_answers_has_the_interval_of_problems() -> None:
    """Ten answers to one problem that are all wrong are one finding, not ten."""
    own = [answer(item, seed, right=item > 0, log_evidence=0.0) for item in range(4) for seed in range(10)]
    found = quality_report._evidence(own)
    assert (found["evidence"], found["evidence_half_width"]) == (1.0, 0.0)
    assert found["evidence_of_wrong"] == pytest.approx(0.25)
    assert found["evidence_of_wrong_half_width"] == pytest.approx(1.959964 * 0.25)


def test_a_small_sweep_is_collected_and_a_draft_learns_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two settings of the shipped pair; one answer is spoilt, so that there is an error to look at."""
    command = ["--output", str(tmp_path), "--work", str(tmp_path / "work"), "--device", "cpu", "--groups", "4"]
    command += ["--dtype", "float32", "--workers", "1", "--problems", "2"]
    assert sweep_quality.main([*command, "--only", "N=4 K=8 T=1"]) == 0
    assert sweep_quality.main([*command, "--only", "target T=1"]) == 0
    records = list(sweep_quality.read_answers(tmp_path, {"problem_seed": 1}))
    spoilt = next(record for record in records if record["setting"]["mode"] == "target" and record["right"])
    spoilt["text"] = spoilt["text"].replace("=", "-", 1)
    (ratio,) = first_error_ratios([spoilt])
    assert -30 < ratio < 30
    head = json.loads(gzip.decompress((tmp_path / "answers-0.jsonl.gz").read_bytes()).splitlines()[0])
    sweep_quality.write_answers(tmp_path, head, records)
    figures = quality_report.collect(tmp_path)
    assert [row["label"] for row in figures["rows"]] == ["target T=1"]
    assert figures["lossless"]["1"]["answers"] == 8  # the target, and N = 4 with exact_below = 1
    assert "tokens_per_second" not in figures["rows"][0]
    assert str(tmp_path) not in json.dumps(figures)
    (target, smc) = figures["errors"]
    assert (target["label"], smc["label"]) == ("target T=1", "smc N=4 K=8 T=1")
    assert sum(target["wrong_per_hundred"]) >= 25
    options = ["--output", str(tmp_path / "draft"), "--steps", "3", "--rows", "2", "--held-out", "1", "--chi2", "1"]
    assert distil_task_draft.main([str(tmp_path), *options, "--threads", "1"]) == 0
    learned = json.loads((tmp_path / "draft" / "report.json").read_text())
    assert learned["before"]["acceptance"] == pytest.approx(0.86, abs=0.1)
    assert learned["after"]["log_1_plus_chi2"] < learned["before"]["log_1_plus_chi2"]
    assert load_manifest(_engine(tmp_path / "draft", tmp_path / "engine"), verify=True).draft is not None
    options[options.index("--held-out") + 1] = "2"
    assert distil_task_draft.main([str(tmp_path), *options, "--threads", "1"]) == 1
    assert "0 answers are left to learn from" in capsys.readouterr().err


def _engine(draft: Path, output: Path) -> Path:
    target = str(sweep_quality.PAIR / "target")
    build_engine(BuildOptions(target, draft=str(draft), output=output, dtype="float32", particles=2, draft_tokens=2))
    return output
