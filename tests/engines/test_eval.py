"""smc-eval on a toy with letters: what it counts, that it goes on where it stopped, and the statistics behind it."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest

from smc_engines import eval_cli
from smc_engines.eval import report, statistics
from smc_engines.eval.runner import Answers
from smc_engines.eval.settings import Setting, grid, parse_axis
from smc_engines.eval.tasks import SHOTS, Item, Task, load_task
from smc_engines.text import Tokenizer
from smc_plugin.errors import ConfigError, RequestError
from tests.toy import Toy


def letters_task(name: str, config: Path | None = None, shots: int | None = None) -> Task:
    """Right is an answer that begins with the letter asked for; the toy knows three letters and no question."""
    assert (name, config, shots) == ("chain", None, None)
    items = [Item((1, 2), "abc"[index % 3], 4) for index in range(30)]
    return Task("letters", {}, lambda count, seed: items[:count], lambda answer, text: text.startswith(answer))


@pytest.fixture
def command(letters: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    monkeypatch.setattr(eval_cli, "load_task", letters_task)
    monkeypatch.chdir(tmp_path)
    return ["--engine", str(letters.engine_dir), "--n", "2,4", "--k", "2", "--temperature", "1.0", "--seeds", "0,1"]


def test_a_run_goes_on_where_it_stopped_and_says_the_same(command: list[str], tmp_path: Path) -> None:
    """The file of a killed run ends inside a line; resuming must neither lose nor repeat an answer."""
    files = ["--json", "r.json", "--csv", "r.csv", "--png", "r.png", "--html", "r.html"]
    assert eval_cli.main([*command, "--problems", "12", "--answers", "a.jsonl", *files]) == 0
    whole = json.loads(Path("r.json").read_text())
    lines = Path("a.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 4 * 12 * 2
    Path("b.jsonl").write_text("".join(lines[:30]) + lines[30][:20])
    assert eval_cli.main([*command, "--problems", "12", "--answers", "b.jsonl", "--json", "r2.json"]) == 0
    assert len(Path("b.jsonl").read_text().splitlines()) == len(lines)
    again = json.loads(Path("r2.json").read_text())
    timing = {"tokens_per_second", "pareto_tokens_per_second"}
    for one, other in zip(whole["rows"], again["rows"], strict=True):
        for name in one.keys() - timing:
            assert one[name] == (pytest.approx(other[name]) if isinstance(one[name], float) else other[name]), name
    rows = list(csv.DictReader(Path("r.csv").read_text().splitlines()))
    assert [row["label"] for row in rows] == [row["label"] for row in whole["rows"]]
    assert Path("r.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png" in Path("r.html").read_text()


def test_a_time_limit_leaves_a_report_of_what_there_is(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    few = [*command, "--problems", "4", "--answers", "a.jsonl"]
    assert eval_cli.main([*few, "--modes", "target"]) == 0
    assert eval_cli.main([*few, "--time-limit", "0", "--json", "r.json"]) == 0
    assert "24 answers are missing after 0 s" in capsys.readouterr().err
    assert [row["label"] for row in json.loads(Path("r.json").read_text())["rows"]] == ["target T=1"]


def test_the_certificate_auc_is_the_chance_of_a_higher_value() -> None:
    draws = random.Random(1)
    records = [{"right": draws.random() < 0.7, "log_evidence": float(draws.randrange(-5, 1))} for _ in range(60)]
    right = [r["log_evidence"] for r in records if r["right"]]
    wrong = [r["log_evidence"] for r in records if not r["right"]]
    pairs = [(a > b) + 0.5 * (a == b) for a in right for b in wrong]
    assert statistics.certificate_auc(records) == pytest.approx(np.mean(pairs))


def test_one_row_is_repeated_by_its_flags_alone(command: list[str]) -> None:
    assert eval_cli.main([*command, "--problems", "12", "--json", "all.json", "--vary", "draft_temperature=0.9"]) == 0
    row = next(row for row in json.loads(Path("all.json").read_text())["rows"] if "N=4" in row["label"])
    own = ["--engine", command[1], *row["flags"].split(), "--problems", "12", "--seeds", "0,1", "--json", "one.json"]
    assert eval_cli.main(own) == 0
    (alone,) = json.loads(Path("one.json").read_text())["rows"]
    for name in ("label", "accuracy", "tokens", "tokens_per_pass", "log_p_per_token", "different_texts"):
        assert alone[name] == pytest.approx(row[name]), name


def test_rows_count_what_the_answers_say(command: list[str]) -> None:
    assert eval_cli.main([*command, "--problems", "9", "--answers", "a.jsonl", "--json", "r.json"]) == 0
    records = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()[1:]]
    rows = {row["label"]: row for row in json.loads(Path("r.json").read_text())["rows"]}
    own = [r for r in records if Setting.of(r["setting"]).label == "smc N=4 K=2 T=1"]
    row = rows["smc N=4 K=2 T=1"]
    assert row["accuracy"] == pytest.approx(np.mean([r["right"] for r in own]))
    assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    assert row["tokens"] == sum(r["tokens"] for r in own)
    target = rows["target T=1"]
    assert target["tokens_per_pass"] == pytest.approx(1.0)
    assert "accuracy_gain" not in target
    exact = np.mean([r["right"] for r in records if r["setting"]["mode"] == "target"])
    assert row["accuracy_gain"] == pytest.approx(row["accuracy"] - exact)


def test_answers_of_another_run_are_refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Answers(Path("a.jsonl"), {"engine": "other", "task": "letters", "task_settings": {}, "problem_seed": 1})
    assert eval_cli.main([*command, "--answers", "a.jsonl"]) == 1
    assert (
        "a.jsonl holds answers for other engine, models, precision, device, groups, batch ('other'"
        in capsys.readouterr().err
    )
    Path("b.jsonl").write_text("no json\n")
    assert eval_cli.main([*command, "--answers", "b.jsonl"]) == 1
    assert "b.jsonl is no answers file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"a list\nof things to", b"[]\n", b"{}\n[1]\n", b'{}\n{"x": 1}\ncut', b"\xff\xfe\n"]
)
def test_a_file_that_is_not_ours_is_refused_and_left_as_it_is(
    command: list[str], capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    """Its last line was once cut off, as that of a killed run, before anybody looked at what kind of file it is."""
    Path("notes.txt").write_bytes(content)
    assert eval_cli.main([*command, "--answers", "notes.txt"]) == 1
    assert "notes.txt is no answers file" in capsys.readouterr().err
    assert Path("notes.txt").read_bytes() == content


def test_an_answer_may_hold_any_character(tmp_path: Path) -> None:
    """U+2028 and U+0085 end a line for str.splitlines, not in JSON lines; a killed run may leave half a character."""
    path, text = tmp_path / "a.jsonl", "one\u2028two\x85three é"
    record = {"setting": {"mode": "target"}, "seed": 0, "item": 0, "right": True, "text": text}
    answers = Answers(path, {"task": "letters"})
    with answers.writer() as file:
        answers.add([record, record | {"item": 1}], file)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex("é".encode()) + 1])
    again = Answers(path, {"task": "letters"})
    assert again.records == [record]
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:2])


def test_a_setting_is_the_same_however_it_is_written(command: list[str]) -> None:
    """Two orders of one --also were once answered twice, and each pair of equal answers went into the figures."""
    also = [
        *("--modes=", "--also", "num_particles=4,num_draft_tokens=2,exact_below=1"),
        *(
            "--also",
            "exact_below=1.0,num_draft_tokens=2,num_particles=4",
            "--also",
            "exact_below=1,num_particles=4,temperature=1",
        ),
    ]
    assert eval_cli.main([*command[:2], *also, "--problems", "3", "--seeds", "0,0,1", "--answers", "a.jsonl"]) == 0
    records = [json.loads(line) for line in Path("a.jsonl").read_text().splitlines()[1:]]
    ran = [(Setting.of(r["setting"]).label, r["item"], r["seed"]) for r in records]
    assert len(ran) == len(set(ran))
    assert {label for label, _, _ in ran} == {
        "smc N=4 K=2 T=0.7 exact_below=1.0",
        "smc N=4 K=5 T=1 exact_below=1.0",  # K of the engine, written down
    }
    assert Setting.of({"mode": "smc", "stop_token_ids": [3]}) == Setting.of({"stop_token_ids": (3,), "mode": "smc"})


def test_what_decides_the_law_reaches_every_mode_and_is_compared_with_its_own_target(command: list[str]) -> None:
    """--vary top_p once changed SMC's answers alone, which were then compared with those of the uncut target."""
    assert eval_cli.main([*command, "--problems", "6", "--vary", "top_p=0.3,1", "--json", "r.json"]) == 0
    rows = {row["label"]: row for row in json.loads(Path("r.json").read_text())["rows"]}
    assert {"target T=1 top_p=0.3", "speculative K=2 T=1 top_p=0.3", "smc N=4 K=2 T=1 top_p=0.3"} <= rows.keys()
    for top_p in ("0.3", "1.0"):
        target, smc = rows[f"target T=1 top_p={top_p}"], rows[f"smc N=4 K=2 T=1 top_p={top_p}"]
        assert smc["accuracy_gain"] == pytest.approx(smc["accuracy"] - target["accuracy"])
    assert rows["target T=1 top_p=0.3"]["log_p_per_token"] > rows["target T=1 top_p=1.0"]["log_p_per_token"]


BAD = {
    "no seed": (["--seeds", ""], "--seeds expects whole numbers"),
    "a negative seed": (["--seeds", "-1"], "--seeds expects whole numbers"),
    "no setting": (["--modes", ""], "names no setting"),
    "no thread": (["--threads", "0"], "--threads is 0, expected at least 1"),
    "the seed as a parameter": (["--vary", "seed=5"], "use --seeds"),
    "the mode as a parameter": (["--vary", "mode=target"], "use --modes"),
    "no log-probabilities": (["--vary", "logprobs=false"], "log-likelihood is always measured"),
    "what a mode ignores": (
        ["--also", "mode=speculative,exact_below=1"],
        "exact_below, which mode speculative does not look at",
    ),
    "too many particles at last": (["--n", "2,4096"], "num_particles 4096, the engine was built for at most"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_option_is_refused_before_anything_runs(
    command: list[str], capsys: pytest.CaptureFixture[str], case: str
) -> None:
    options, message = BAD[case]
    assert eval_cli.main([*command, "--problems", "2", "--answers", "a.jsonl", *options]) == 1
    assert message in capsys.readouterr().err
    assert not Path("a.jsonl").is_file() or len(Path("a.jsonl").read_text().splitlines()) == 1


def test_no_answer_in_time_is_no_traceback(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", "r.json", "--csv", "r.csv", "--png", "r.png", "--html", "r.html"]
    assert eval_cli.main([*command, "--problems", "2", "--time-limit", "0", *files]) == 0
    assert "no answer yet" in capsys.readouterr().err
    assert not Path("r.json").exists()


def test_the_chain_task_refuses_an_engine_that_cannot_read_it(
    letters: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its prompts are token ids: to another model they are nonsense, and a report of 0 right looked like a finding."""
    assert eval_cli.main(["--engine", str(letters.engine_dir), "--problems", "1", "--modes", "target"]) == 1
    assert "choose --task arithmetic, copying or recall" in capsys.readouterr().err
    task = load_task("chain")
    task.check(Tokenizer.load(Path(__file__).parents[2] / "models" / "task-pair" / "target"), task.items(3, 1))


def test_equal_answers_have_no_interval_of_differences() -> None:
    """Four problems without a difference were once reported as +0.0 ± 0.0."""
    base = {"tokens": 4, "rounds": 2, "seconds": 1.0, "log_p": -1.0, "ess": [], "resamples": 0, "recoveries": 0}
    base |= {"log_evidence": 0.0, "beginning": [1], "text": "a", "seed": 0}
    settings = (
        {"mode": "target", "temperature": 1.0},
        {"mode": "speculative", "num_draft_tokens": 2, "temperature": 1.0},
    )
    records = [base | {"setting": one, "item": item, "right": item < 3} for one in settings for item in range(4)]
    target, speculative = statistics.summarise(records)
    assert (speculative["accuracy_gain"], speculative["accuracy_gain_half_width"]) == (0.0, None)
    assert "+0.0  " in report.table([target, speculative])


def test_one_problem_has_no_interval_of_differences(command: list[str]) -> None:
    assert eval_cli.main([*command, "--problems", "1", "--json", "r.json", "--png", "r.png"]) == 0
    for row in json.loads(Path("r.json").read_text())["rows"]:
        assert "accuracy_gain_half_width" not in row
        assert row["log_p_half_width"] is None


def test_settings_name_each_combination_once_and_refuse_nonsense() -> None:
    axes = {"temperature": [1.0], "num_particles": [2, 4], "num_draft_tokens": [3]}
    labels = [setting.label for setting in grid(["target", "speculative", "smc"], axes)]
    assert labels == ["target T=1", "speculative K=3 T=1", "smc N=2 K=3 T=1", "smc N=4 K=3 T=1"]
    with pytest.raises(ConfigError, match="'fast'"):
        grid(["fast"], axes)
    with pytest.raises(RequestError, match="did you mean 'ess_threshold'"):
        grid(["smc"], {"ess_treshold": [0.5]})
    assert parse_axis("draft-temperature=0.9,1") == ("draft_temperature", [0.9, 1])
    assert Setting.of({"mode": "smc", "num_particles": 2}).key == Setting.of({"num_particles": 2, "mode": "smc"}).key


@pytest.mark.parametrize("name", ["arithmetic", "copying", "recall", "chain"])
def test_tasks_are_named_by_their_seed_and_know_their_answers(name: str) -> None:
    task = load_task(name)
    items = task.items(5, 1)
    assert items == task.items(8, 1)[:5]
    assert items != task.items(5, 2)
    for item in items:
        said = f"so answer{item.answer}" if name == "chain" else f" {item.answer}"
        assert task.right(item.answer, said)
        assert not task.right(item.answer, said + "0")
    with pytest.raises(ConfigError, match="no task 'sums'"):
        load_task("sums")


@pytest.mark.parametrize("name", ["arithmetic", "copying", "recall"])
def test_shots_are_solved_problems_in_front(name: str) -> None:
    (one,), (three,) = load_task(name, shots=0).items(1, 1), load_task(name, shots=2).items(1, 1)
    assert isinstance(three.prompt, str)
    assert three.prompt.startswith(f"{one.prompt} {one.answer}\n")
    assert len(three.prompt.splitlines()) == 3 * len(str(one.prompt).splitlines())
    assert load_task(name, shots=2).settings == {"shots": 2}
    assert load_task(name).items(1, 1) == load_task(name, shots=SHOTS).items(1, 1)


def test_shots_that_no_task_shows_are_refused() -> None:
    with pytest.raises(ConfigError, match="--shots is -1, expected at least 0"):
        load_task("copying", shots=-1)
    with pytest.raises(ConfigError, match="--shots is 2, but the task chain shows no examples"):
        load_task("chain", shots=2)


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Problems of unequal difficulty with three answers each: an interval over answers alone would be too narrow."""
    draws, covered, naive = np.random.default_rng(1), 0, 0
    for _ in range(400):
        chances = draws.beta(1, 0.5, size=60)  # mean 2/3
        shares = (draws.random((60, 3)) < chances[:, None]).mean(axis=1)
        count = statistics.effective_count(list(shares), 180)
        low, high = statistics.wilson(shares.mean() * count, count)
        covered += low <= 2 / 3 <= high
        low, high = statistics.wilson(shares.mean() * 180, 180)
        naive += low <= 2 / 3 <= high
    assert 0.92 <= covered / 400 <= 0.98
    assert naive < covered - 20


def test_mmd_is_zero_on_average_for_equal_laws_and_not_for_others() -> None:
    source = random.Random(3)

    def sample(bias: float) -> dict[int, list[int]]:
        return {seed: [int(source.random() < bias) for _ in range(4)] for seed in range(4)}

    same = [statistics.mmd_squared(sample(0.5), sample(0.5)) for _ in range(500)]
    other = [statistics.mmd_squared(sample(0.5), sample(0.8)) for _ in range(500)]
    mean, half = statistics.mean_and_half_width(same)
    assert abs(mean) < 1.5 * half
    mean, half = statistics.mean_and_half_width(other)
    assert mean > 3 * half
    # P(match) under biases 0.5/0.5, 0.8/0.8 and 0.5/0.8 a place: the kernel is a product over four places
    exact = 0.75**4 + (0.5 + 0.5 * 0.68) ** 4 - 2 * 0.75**4
    assert mean == pytest.approx(exact, abs=2.5 * half)


def test_mmd_is_zero_on_average_where_settings_share_their_random_numbers() -> None:
    """Target and speculative answers of one seed begin alike: compared seed by seed they looked too close."""
    source = random.Random(4)
    values = []
    for _ in range(800):
        first = [source.randrange(8) for _ in range(2)]
        ours, theirs = ({seed: [first[seed], source.randrange(8)] for seed in range(2)} for _ in range(2))
        values.append(statistics.mmd_squared(ours, theirs))
    mean, half = statistics.mean_and_half_width(values)
    assert abs(mean) < 1.5 * half


def test_the_frontier_holds_what_nothing_beats() -> None:
    rows = [
        {"setting": {"mode": "smc", "temperature": 1.0}, "accuracy": accuracy, "cost": cost}
        for accuracy, cost in ((0.9, 1.0), (0.8, 2.0), (0.7, 1.5), (0.8, 1.0), (0.79, 2.01), (0.6, 2.1), (0.9, 1.0))
    ]
    statistics.mark_pareto(rows, "cost")
    assert [row["pareto_cost"] for row in rows] == [True, True, False, False, False, True, True]
