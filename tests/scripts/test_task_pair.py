"""The chain task and the pair trained for it: the generator is right, and training teaches it."""

# pyright: reportMissingImports=false
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from smc_build.builder import BuildOptions, build_engine
from smc_engines.config import ExecutorConfig
from smc_engines.eval import chain
from smc_engines.eval.chain import ChainTask
from smc_engines.executor import Executor
from smc_engines.sampling_params import SamplingParams
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


def test_the_shipped_pair_is_small_and_solves_its_task(tmp_path: Path) -> None:
    """Its report says 0.967 at temperature 0.7; fewer than 12 of 16 right would then be a chance of 1 in 100,000."""
    pair = Path(__file__).resolve().parents[2] / "models" / "task-pair"
    assert sum(file.stat().st_size for file in pair.rglob("*")) < 8_000_000
    report = json.loads((pair / "target/config.json").read_text())["task_pair"]
    task, tokenizer = ChainTask.from_dict(report["task"]), chain.tokenizer()
    shipped = Tokenizer.from_file(str(pair / "target/tokenizer.json"))
    assert shipped.get_vocab() == tokenizer.get_vocab()
    engine = build_engine(
        BuildOptions(str(pair / "target"), str(pair / "draft"), groups=16, output=tmp_path / "engine")
    )
    executor = Executor.from_engine_dir(engine, ExecutorConfig(device="cpu", num_pages=400))
    prompts, answers = task.prompts(16, seed=5)
    params = [SamplingParams(mode="target", temperature=0.7, max_tokens=task.max_length, seed=i) for i in range(16)]
    outputs = executor.generate(prompts, params)
    assert sum(chain.score(output.text, answer) for output, answer in zip(outputs, answers, strict=True)) >= 12
