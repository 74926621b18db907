"""lm-eval-harness runs a local task on an engine directory through the model `smc`."""

# pyright: reportMissingImports=false
import json
from pathlib import Path

import pytest

from smc_engines.sampling_params import SamplingParams
from smc_plugin.errors import ConfigError
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
    """The right answers of the task are what the executor says with the same seeds, but for one made wrong."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    from lm_eval.tasks import TaskManager  # noqa: PLC0415

    from smc_engines.eval.harness import SmcModel  # noqa: PLC0415

    questions = ["ab", "ba", "bb", "aa"]
    given = {"num_particles": 3, "num_draft_tokens": 2}
    params = [
        SamplingParams(temperature=1.0, stop=("c",), max_tokens=6, seed=seed, num_particles=3, num_draft_tokens=2)
        for seed in range(4)
    ]
    texts = [output.text for output in letters.executor().generate(questions, params)]
    lines = [{"question": q, "answer": text} for q, text in zip(questions, texts, strict=True)]
    lines[2]["answer"] += "x"
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "letters.yaml").write_text(TASK.format(file=tmp_path / "data.jsonl"))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    model = SmcModel(engine=str(letters.engine_dir), device="cpu", **given)
    found = lm_eval.simple_evaluate(model, tasks=["letters"], task_manager=manager, bootstrap_iters=0)
    assert found is not None
    assert found["results"]["letters"]["exact_match,none"] == pytest.approx(0.75)


def test_what_the_engine_cannot_do_is_refused(letters: Toy) -> None:
    from smc_engines.eval.harness import SmcModel  # noqa: PLC0415

    with pytest.raises(ConfigError, match="--model_args names particles"):
        SmcModel(engine=str(letters.engine_dir), device="cpu", particles=3)
    model = SmcModel(engine=str(letters.engine_dir), device="cpu")
    with pytest.raises(ConfigError, match="expected one that generates"):
        model.loglikelihood([])
