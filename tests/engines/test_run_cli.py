"""smc-run through its main(), on a tiny engine that smc-build made."""

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
from typing import Any

import pytest

from smc_build import cli as build_cli
from smc_engines import run_cli
from smc_engines.config import ExecutorConfig
from smc_engines.executor import Executor
from smc_engines.outputs import Particle, RequestInfo, RequestOutput, RoundInfo
from smc_engines.report import summary_lines, to_json
from smc_engines.run_batch import Batch
from smc_engines.run_options import parse
from smc_engines.run_prompt import PromptBuilder
from smc_engines.sampling_params import SamplingParams
from smc_plugin.errors import ConfigError, RequestError
from tests.tiny_models import make_checkpoint

PARAMS: dict[str, Any] = {"num_particles": 3, "num_draft_tokens": 2, "seed": 7, "max_tokens": 20}
FLAGS = ["--n", "3", "--k", "2", "--seed", "7", "--max-tokens", "20"]


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    target = make_checkpoint(folder / "target", seed=1, max_position=4096)
    draft = make_checkpoint(folder / "draft", layers=1, seed=2, max_position=4096)
    arguments = ["--checkpoint", str(target), "--draft", str(draft), "--output", str(folder / "engine")]
    assert build_cli.main([*arguments, "--max-seq-len", "2048"]) == 0
    return folder / "engine"


@pytest.fixture
def executor(engine_dir):
    return Executor.from_engine_dir(engine_dir)


def run(engine_dir, capsys, *arguments):
    """Run smc-run; returns exit code, standard output and standard error."""
    capsys.readouterr()
    code = run_cli.main(["--engine", str(engine_dir), *map(str, arguments)])
    return code, *capsys.readouterr()


def test_options_not_given_leave_every_default_alone():
    options = parse(["--engine", "e", "x"])
    assert options.sampling == {}
    assert options.executor == ExecutorConfig()


def test_every_sampling_parameter_has_an_option():
    arguments = "--mode target --n 2 --k 3 --ess-threshold 0.25 --temperature 0.5 --draft-temperature 0.6 --alpha 2"
    arguments += " --top-k 4 --top-p 0.9 --min-p 0.1 --seed 9 --max-tokens 11 --min-tokens 1 --stop a --stop b"
    arguments += (
        " --stop-token-id 5 --ignore-eos --select argmax --return-particles --logprobs --adapt-draft-tokens 0.5"
    )
    arguments += " --truncate-rounds --resampling residual --resample-power 0.5 --exact-below 0.5 --fallback -3"
    sampling = parse(["--engine", "e", *arguments.split()]).sampling
    # falling back is for mode smc only, which is the default
    assert sampling.pop("fallback_below") == SamplingParams(fallback_below=-3.0).fallback_below
    params = SamplingParams.from_mapping(sampling)
    assert {*sampling, "cache_prompt", "fallback_below"} == {field.name for field in dataclasses.fields(SamplingParams)}
    assert all(getattr(params, name) != getattr(SamplingParams(), name) for name in sampling)
    assert params.stop == ("a", "b")
    assert parse(["--engine", "e", "--particles", "2", "--draft-tokens", "3"]).sampling == {
        "num_particles": 2,
        "num_draft_tokens": 3,
    }


def test_streams_the_executors_answer_and_sums_it_up(engine_dir, executor, capsys):
    ids = executor.engine.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])[1]
    expected = executor.generate([ids], SamplingParams(**PARAMS))[0]
    code, out, err = run(engine_dir, capsys, *FLAGS, "hi")
    assert code == 0
    assert out == expected.text + "\n"
    assert f"{len(ids)} tokens after the chat template" in err
    assert "N = 3, K = 2, θ = 0.5" in err
    assert f"{expected.info.rounds} rounds" in err
    assert f"{expected.info.resamples} resamples" in err
    assert f"log_evidence {expected.info.log_evidence:.2f}" in err
    assert "seed 7" in err
    assert re.search(r"20 tokens in [\d.]+ s, [\d.]+ tokens/s, first after \d+ ms; finished by length", err)


def test_pieces_are_written_as_they_settle(engine_dir, executor, monkeypatch):
    """A terminal sees text before the end: more than one write, joined they are the answer."""
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *a, **k: pieces.append("".join(a)) if "file" not in k else None)
    run_cli.main(["--engine", str(engine_dir), "--mode", "target", "--seed", "3", "--max-tokens", "30", "hi"])
    ids = executor.engine.tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])[1]
    expected = executor.generate([ids], SamplingParams(mode="target", seed=3, max_tokens=30))[0]
    assert "".join(pieces) == expected.text
    assert sum(bool(piece) for piece in pieces) > 10


def test_quiet_leaves_standard_error_empty(engine_dir, capsys):
    code, out, err = run(engine_dir, capsys, *FLAGS, "--quiet", "hi")
    assert (code, err) == (0, "")
    assert out


@pytest.mark.parametrize("mode", ["smc", "target", "speculative"])
def test_json_is_one_object_with_what_was_asked_for(engine_dir, capsys, mode):
    arguments = [*FLAGS, "--mode", mode, "--json", "--explain", "--logprobs", "--return-particles", "hi"]
    code, out, err = run(engine_dir, capsys, *arguments)
    answer = json.loads(out)
    particles = answer["info"]["particles"]
    assert code == 0
    assert len(particles) == (3 if mode == "smc" else 1)
    assert particles[answer["info"]["selected"]]["token_ids"] == answer["token_ids"]
    assert len(answer["info"]["token_logprobs"]) == len(answer["token_ids"]) == 20
    assert len(answer["info"]["trace"]) == answer["info"]["rounds"]
    assert f"the answer is particle {answer['info']['selected']}" in err
    assert ("draft tokens accepted" in err) == (mode == "speculative")


def test_stop_string_ends_the_text_before_it(engine_dir, capsys):
    flags = ["--n", "1", "--k", "3", "--seed", "5", "--max-tokens", "40", "--quiet", "--no-chat", "hi"]
    _, whole, _ = run(engine_dir, capsys, *flags)
    stop = re.search(r"[!-~]{2}", whole)
    assert stop is not None
    _, out, _ = run(engine_dir, capsys, "--stop", stop[0], *flags)
    assert out == whole[: stop.start()] + "\n"


def test_prompt_sources_agree(engine_dir, capsys, tmp_path, monkeypatch):
    messages = tmp_path / "messages.json"
    messages.write_text(json.dumps([{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]))
    flags = [*FLAGS, "--quiet", "--json"]
    _, by_file, _ = run(engine_dir, capsys, *flags, "--messages", messages)
    _, by_system, _ = run(engine_dir, capsys, *flags, "--system", "s", "hi")
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    _, by_standard_input, _ = run(engine_dir, capsys, *flags, "--system", "s", "-")
    texts = [json.loads(text)["text"] for text in (by_file, by_system, by_standard_input)]
    assert texts[0] == texts[1] == texts[2]
    _, plain, _ = run(engine_dir, capsys, *flags, "--no-chat", "hi")
    _, by_ids, _ = run(engine_dir, capsys, *flags, "--prompt-ids", "104,105")
    assert json.loads(plain)["token_ids"] == json.loads(by_ids)["token_ids"]


def test_genealogy_is_drawn(engine_dir, capsys, tmp_path):
    code, _, err = run(engine_dir, capsys, *FLAGS, "--explain", "--genealogy", tmp_path / "tree.svg", "hi")
    assert code == 0
    assert (tmp_path / "tree.svg").read_text().startswith("<svg")
    assert "the answer is particle" in err


def test_file_gives_a_line_a_request_in_order(engine_dir, executor, capsys, tmp_path):
    lines = [
        '{"prompt_token_ids": [104, 105], "id": "first", "max_tokens": 12}',
        "not JSON",
        "",
        '{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}',
        '{"prompt": "x", "tempratur": 1, "id": "typo"}',
        '{"prompt": "x", "messages": []}',
        '{"prompt_token_ids": [999999]}',
        '{"prompt_token_ids": [1], "mode": "target", "seed": 2}',
        '{"prompt": "half a character: \\ud800"}',
        '{"prompt": ""}',
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines))
    code, out, err = run(engine_dir, capsys, *FLAGS, "--input", source, "--output", target)
    results = [json.loads(line) for line in target.read_text().splitlines()]
    assert (code, out) == (1, "")
    assert [result["id"] for result in results] == ["first", 2, 4, "typo", 6, 7, 8, 9, 10]
    assert [result["line"] for result in results] == [1, 2, 4, 5, 6, 7, 8, 9, 10]
    errors = [False, True, False, True, True, True, False, True, True]
    assert ["error" in result for result in results] == errors
    assert "did you mean 'temperature'" in results[3]["error"]
    assert "3 of 9 requests finished, 6 failed, 0 cancelled" in err
    expected = executor.generate([[104, 105]], SamplingParams(**{**PARAMS, "max_tokens": 12}))[0]
    assert results[0]["token_ids"] == list(expected.token_ids)
    assert len(results[2]["token_ids"]) == 1


def test_file_without_output_prints_and_exits_0(engine_dir, capsys, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    code, out, err = run(engine_dir, capsys, *FLAGS, "--quiet", "--input", tmp_path / "in.jsonl")
    assert (code, err) == (0, "")
    assert [json.loads(line)["finish_reason"] for line in out.splitlines()] == ["length", "length"]


def test_file_longer_than_the_queue_is_finished(engine_dir):
    executor = Executor.from_engine_dir(engine_dir, ExecutorConfig(max_queue=1, max_groups=2))
    lines = [json.dumps({"prompt": f"p{n}", "max_tokens": 1 + n % 5, "ignore_eos": True}) for n in range(9)]
    batch = Batch(executor, PromptBuilder(executor.engine.tokenizer), {"num_particles": 2, "num_draft_tokens": 2})
    results = list(batch.run(lines))
    assert [len(result["token_ids"]) for result in results] == [1 + n % 5 for n in range(9)]
    assert (batch.figures.finished, batch.figures.failed) == (9, 0)
    executor.check_integrity()


def test_interrupted_file_keeps_what_is_there(engine_dir):
    executor = Executor.from_engine_dir(engine_dir, ExecutorConfig(max_groups=2))
    lines = [json.dumps({"prompt": "p", "max_tokens": 2 if n == 0 else 900, "seed": n}) for n in range(4)]
    steps = iter(range(100))
    batch = Batch(
        executor, PromptBuilder(executor.engine.tokenizer), {"mode": "target"}, interrupted=lambda: next(steps) > 20
    )
    results = list(batch.run(lines))
    assert [result["finish_reason"] for result in results] == ["length", "cancelled", "cancelled", "cancelled"]
    assert not executor.has_work
    executor.check_integrity()


def test_ctrl_c_prints_what_is_there_and_exits_130(engine_dir):
    command = [sys.executable, "-m", "smc_engines.run_cli", "--engine", str(engine_dir), "--mode", "target"]
    command += ["--max-tokens", "2000", "--ignore-eos", "--threads", "1", "hi"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == run_cli.INTERRUPTED
    assert first
    assert out.endswith(b"\n")
    assert b"finished by cancelled" in err
    assert b"Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", "99", "x"], "at most 8: lower it, or rebuild with --particles 99"),
        (["--temperature", "-1", "x"], "temperature must be in"),
        (["--stop", "", "x"], "non-empty strings"),
        (["--no-chat", ""], "the prompt is empty"),
        ([""], "the prompt is empty"),
        (["--max-tokens", "0", "x"], "max_tokens must be in"),
        (["--max-tokens", "4000", "x"], "together at most 2048 fit"),
        (["--prompt-ids", "1,2", "x"], "one source of prompts, got PROMPT and --prompt-ids"),
        (["--output", "x.jsonl", "x"], "--output needs --input"),
        (["--input", "nowhere.jsonl"], "--input nowhere.jsonl is missing, expected a JSONL file, one request a line: "),
        (["--input", "."], "--input . is a folder, expected a JSONL file, one request a line: name a file"),
        (["--input", "x" * 300], "cannot be read (File name too long), expected a JSONL file, one request a line: "),
        (["--input", __file__, "--output", "/"], "--output / is a folder, expected a file to write: "),
        (["--messages", "nowhere.json"], "--messages nowhere.json is missing, expected a JSON list of chat messages: "),
        (["--messages", __file__], "is not JSON, expected a list, got "),
        (["--genealogy", "tree.pdf", "x"], "ending in .svg or .png"),
        (["--genealogy", "nowhere/tree.svg", "x"], "expected an existing folder"),
        (["--no-chat", "--system", "s", "x"], "excludes"),
        (["--threads", "0", "x"], "--threads must be at least 1"),
        (["--device", "cuda", "x"], "torch sees no CUDA GPU"),
    ],
)
def test_user_errors_are_one_line_and_exit_1(engine_dir, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, out, err = run(engine_dir, capsys, *arguments)
    assert (code, out) == (1, "")
    last = err.splitlines()[-1]
    assert last.startswith("smc-run: ")
    assert message in last
    assert "Traceback" not in err


def test_an_input_that_is_not_utf_8_is_refused(engine_dir, capsys, tmp_path):
    (tmp_path / "in.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    code, out, err = run(engine_dir, capsys, "--input", tmp_path / "in.jsonl")
    assert (code, out) == (1, "")
    assert "in.jsonl is not UTF-8, expected text, got 'utf-8' codec can't decode byte 0xe9" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--n", "9", "x"],
        ["--k", "9", "x"],
        ["--mode", "speculative", "--k", "0", "x"],
        ["--n", "9", "--input", __file__],
        ["--input", "nowhere.jsonl"],
        ["--messages", "nowhere.json"],
    ],
)
def test_what_cannot_run_is_refused_before_the_engine_is_loaded(engine_dir, executor, capsys, monkeypatch, arguments):
    monkeypatch.setattr(Executor, "from_engine_dir", lambda *_: pytest.fail("the engine was loaded"))
    code, out, err = run(engine_dir, capsys, *arguments)
    assert (code, out, err.count("\n")) == (1, "", 1)
    if arguments[-1] == "x":
        with pytest.raises(RequestError) as caught:
            executor.submit("a", [1], SamplingParams.from_mapping(parse(["--engine", "e", *arguments]).sampling))
        assert err == f"smc-run: {caught.value}\n"


def test_odd_lines_of_a_file_fail_or_pass_alone(engine_dir, capsys, tmp_path):
    """A line separator inside a string, JSON too deep for the parser and half a character each ended the whole run."""
    lines = ['{"prompt": "a\u2028b"}', "[" * 100_000, '{"prompt": "a", "id": "\\ud800"}', '{"prompt": "a", }']
    (tmp_path / "in.jsonl").write_text("\r\n".join(lines), encoding="utf-8")
    code, out, _ = run(engine_dir, capsys, *FLAGS, "--max-tokens", "2", "--input", tmp_path / "in.jsonl")
    results = [json.loads(line) for line in out.split("\n")[:-1]]
    assert (code, [result["id"] for result in results]) == (1, [1, 2, "\ud800", 4])
    assert ["error" in result for result in results] == [False, True, False, True]
    assert results[1]["error"].startswith("the line is not JSON, expected one object, got maximum recursion depth")
    assert results[3]["error"].endswith("at column 17: correct it")


def test_missing_engine_and_unknown_option_exit_1(capsys, tmp_path):
    assert run_cli.main(["--engine", str(tmp_path), "x"]) == 1
    assert "is not an engine directory" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        parse(["--engine", "e", "--particls", "3"])
    assert caught.value.code == 1
    assert "did you mean --particles?" in capsys.readouterr().err


def test_nothing_to_answer_is_an_error(engine_dir, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert run(engine_dir, capsys)[0] == 1
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="expected two files"):
        parse(["--engine", "e", "--input", "a.jsonl", "--output", "a.jsonl"])


def test_prompts_need_what_they_ask_for():
    without = PromptBuilder(None)
    assert not without.uses_template
    with pytest.raises(RequestError, match="no tokenizer, got text"):
        without.from_text("x")
    assert without.from_line(3, '{"prompt_token_ids": [1, 2]}', {"seed": 4})[:2] == (3, [1, 2])


def test_second_system_message_is_refused(executor):
    prompts = PromptBuilder(executor.engine.tokenizer, system="s")
    with pytest.raises(RequestError, match="expected one system message"):
        prompts.from_messages([{"role": "system", "content": "t"}, {"role": "user", "content": "x"}])


def test_figures_of_a_finished_request():
    """The example of the report's docstring; a dead particle's weight has no JSON number."""
    info = RequestInfo(
        prompt_tokens=3,
        cached_tokens=0,
        output_tokens=33,
        rounds=8,
        resamples=3,
        recoveries=0,
        accepted_tokens=0,
        log_evidence=-2.31,
        ess=(),
        trace=(),
        seed=1,
        selected=0,
        particles=(Particle((1,), 0.0, "stop", "a"), Particle((2,), float("-inf"), None, "b")),
        queue_ms=500.0,
        first_token_ms=710.0,
        total_ms=2500.0,
    )
    output = RequestOutput("r", (), "", (1,), "a", "stop", info=info)
    lines = summary_lines(output, SamplingParams())
    assert lines[0] == "33 tokens in 2.00 s, 16.5 tokens/s, first after 710 ms; finished by stop"
    assert lines[1].startswith("8 rounds, 4.0 tokens a round, 3 resamples, mean ESS/N nan, log_evidence -2.31, 0 reco")
    assert lines[2:] == ["particle 0: weight 1.000, stop, 'a'", "particle 1: weight 0.000, unfinished, 'b'"]
    late = RoundInfo(1.0, False, (0, 1), 33, 3 + 154, False)
    longer = dataclasses.replace(output, info=dataclasses.replace(info, trace=(late,)))
    assert (
        "4.0 tokens a round, other particles went on to 154 tokens, 3 resamples"
        in summary_lines(longer, SamplingParams())[1]
    )
    written = to_json(output)
    assert json.loads(json.dumps(written, allow_nan=False))["info"]["particles"][1]["log_weight"] is None
    assert "trace" not in written["info"]


def test_waiting_threads_give_their_processor_up():
    """smc-run on a busy machine was four times slower than it had to be: its idle threads kept the cores."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = "import sys, os, smc_engines; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"

    def policy(**changed: str) -> str:
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, env={**environment, **changed}, capture_output=True, text=True, check=True
        ).stdout

    assert policy() == "passive False\n"
    assert policy(OMP_WAIT_POLICY="active") == "active False\n"
