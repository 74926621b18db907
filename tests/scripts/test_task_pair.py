"""The chain task and the pair trained for it: the generator is right, and training teaches it."""

# pyright: reportMissingImports=false
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from smc_build.builder import BuildOptions, build_engine
from smc_engines.eval import chain
from smc_engines.eval.chain import ChainTask
from smc_plugin.errors import ConfigError

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
import train_task_pair


def plain(value: int, sign: str, operand: int) -> int:
    turned = int(f"{value:02}"[::-1])
    return {"+": value + operand, "-": value - operand, "*": value * operand, "%": turned + operand}[sign] % 100


def test_every_line_of_an_answer_is_right_and_the_text_survives_the_tokenizer() -> None:
    task, tokenizer = ChainTask(), chain.tokenizer()
    problems = task.draw(50, torch.Generator().manual_seed(3))
    for row, prompt_length, length, answer in zip(
        problems.tokens.tolist(), problems.prompt_length.tolist(), problems.length.tolist(), problems.answer.tolist(),
        strict=True,
    ):  # fmt: skip
        prompt, text = tokenizer.decode(row[:prompt_length]), tokenizer.decode(row[prompt_length:length])
        assert tokenizer.encode(prompt).ids == row[:prompt_length]
        lines = re.findall(r"([A-H])(\d\d)([-+*%])(\d\d)=(\d\d);", text)
        assert [line[0] + line[2] + line[3] for line in lines] == re.findall(r"[A-H][-+*%]\d\d", prompt)
        value = int(prompt[:2])
        for _, before, sign, operand, after in lines:
            assert int(before) == value
            value = plain(value, sign, int(operand))
            assert int(after) == value
        assert value == answer
        assert chain.score(text, answer)
        assert not chain.score(text, (answer + 1) % 100)
        assert row[length - 1] == chain.IDS[chain.END]


def test_a_seed_names_the_problems_and_difficulty_is_checked() -> None:
    task = ChainTask(steps_min=2, steps_max=3)
    assert task.prompts(5, seed=1) == task.prompts(5, seed=1)
    assert task.prompts(5, seed=1) != task.prompts(5, seed=2)
    assert ChainTask.from_dict(task.to_dict()) == task
    with pytest.raises(ConfigError, match=r"steps_max is 9, expected 1 to 8"):
        ChainTask(steps_max=9)
    with pytest.raises(ConfigError, match="unknown colour"):
        ChainTask.from_dict({"colour": 1})


def test_the_draft_learns_another_style_but_the_same_arithmetic() -> None:
    task, device = ChainTask(), torch.device("cpu")
    tables = [task.style_table(device, draft).diff(dim=-1, prepend=torch.zeros(32, 32, 1)) for draft in (False, True)]
    overlap = torch.minimum(*tables).sum(-1).mean()
    assert 0.6 < float(overlap) < 0.8
    same = ChainTask(draft_style=1.0)
    assert torch.equal(same.style_table(device), same.style_table(device, draft=True))


def test_smoke_run_learns_the_task_and_writes_a_pair_that_builds(tmp_path: Path) -> None:
    """Untrained models solve nothing; these tiny ones must solve most problems, the larger one more of them."""
    options = ["--smoke", "--output", str(tmp_path / "pair"), "--steps", "450", "--minutes", "30", "--rows", "64"]
    assert train_task_pair.main([*options, "--problems", "200"]) == 0
    files = sorted(
        str(file.relative_to(tmp_path / "pair")) for file in (tmp_path / "pair").rglob("*") if file.is_file()
    )
    assert files == [
        "draft/config.json", "draft/model.safetensors",
        "target/config.json", "target/model.safetensors", "target/tokenizer.json",
    ]  # fmt: skip
    report = json.loads((tmp_path / "pair/target/config.json").read_text())["task_pair"]
    for row in report["results"]:
        assert row["target"] > 0.8
        assert 0.3 < row["draft"] < row["target"]
        assert 0.5 < row["acceptance_words"] < row["acceptance_other"] < 1
    built = build_engine(
        BuildOptions(str(tmp_path / "pair/target"), str(tmp_path / "pair/draft"), output=tmp_path / "engine")
    )
    assert built.is_dir()
