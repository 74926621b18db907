"""lm-eval-harness runs a local task on an engine directory through the model `smc`."""

# pyright: reportMissingImports=false
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smc_engines.outputs import RequestOutput
from smc_engines.sampling_params import SamplingParams
from smc_engines.text import Tokenizer
from smc_plugin.errors import ConfigError, RequestError
from tests.toy import Toy

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra harness")

TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["c"]
  max_gen_toks: 6
  do_sample: true
  temperature: 1.0
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


def test_the_harness_scores_what_the_executor_answers(
    letters: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right answers of the task are what the executor says with the same seeds, but for one made wrong.

    By the documented command: the harness names the device cuda:0 where nobody names one, which was refused everywhere.
    """
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    from smc_engines.eval import harness  # noqa: PLC0415

    questions = ["ab", "ba", "bb", "aa"]
    params = [
        SamplingParams(temperature=1.0, stop=("c",), max_tokens=6, seed=seed, num_particles=3, num_draft_tokens=2)
        for seed in range(4)
    ]
    texts = [output.text for output in letters.executor().generate(questions, params)]
    lines = [{"question": q, "answer": text} for q, text in zip(questions, texts, strict=True)]
    lines[2]["answer"] += "x"
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "letters.yaml").write_text(TASK.format(file=tmp_path / "data.jsonl"))
    command = ["harness", "run", "--model", "smc", "--tasks", "letters", "--include_path", str(tmp_path)]
    command += ["--model_args", f"engine={letters.engine_dir},num_particles=3,num_draft_tokens=2"]
    monkeypatch.setattr("sys.argv", [*command, "--output_path", str(tmp_path / "out")])
    harness.cli_evaluate()
    (found,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(found.read_text())["results"]["letters"]["exact_match,none"] == pytest.approx(0.75)


def test_a_prompt_begins_once_however_it_was_written() -> None:
    """A chat template writes the begin token out, and the tokenizer of many checkpoints puts one before every text."""
    from smc_engines.eval.harness import prompt_ids  # noqa: PLC0415

    tokenizer = Tokenizer.load(Path(__file__).parents[2] / "models" / "task-pair" / "target")
    ids = tokenizer.encode("47A+25:")
    assert ids[0] == 0
    assert prompt_ids(tokenizer, "47A+25:") == ids
    assert tokenizer.encode("<|begin|>47A+25:")[:2] == [0, 0]
    assert prompt_ids(tokenizer, "<|begin|>47A+25:") == ids


def test_a_begun_message_stays_open(letters: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks such as humaneval_instruct begin the model's own message, which the template would close."""
    from smc_engines.eval.harness import SmcModel  # noqa: PLC0415

    model = SmcModel(engine=str(letters.engine_dir), device="cpu")
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}[/]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    monkeypatch.setattr(model._executor.engine.tokenizer, "template", template)
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "ab c\n"}]
    assert model.apply_chat_template(chat, add_generation_prompt=False) == "[user]ab[/][assistant]ab c"
    assert model.apply_chat_template(chat[:1]) == "[user]ab[/][assistant]"


def test_a_request_that_fails_is_not_a_wrong_answer(letters: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.instance import Instance  # noqa: PLC0415

    from smc_engines.eval.harness import SmcModel  # noqa: PLC0415

    model = SmcModel(engine=str(letters.engine_dir), device="cpu")
    generate = model._executor.generate

    def failing(*given: Any) -> list[RequestOutput]:
        return [replace(output, error=RequestError("no finite logit")) for output in generate(*given)]

    monkeypatch.setattr(model._executor, "generate", failing)
    request = Instance("generate_until", {}, ("ab", {"until": ["c"], "max_gen_toks": 4}), 0)
    with pytest.raises(RequestError, match="no finite logit"):
        model.generate_until([request])


def test_what_the_engine_cannot_do_is_refused(letters: Toy) -> None:
    from smc_engines.eval.harness import SmcModel  # noqa: PLC0415

    with pytest.raises(ConfigError, match="--model_args names particles"):
        SmcModel(engine=str(letters.engine_dir), device="cpu", particles=3)
    model = SmcModel(engine=str(letters.engine_dir), device="cpu")
    with pytest.raises(ConfigError, match="expected one that generates"):
        model.loglikelihood([])
