"""Each model's contract, through the real server over gRPC."""

from __future__ import annotations

import json
import queue
import re
import shlex
import subprocess
import threading
import time
import urllib.request
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from smc_engines.executor import Executor
from smc_engines.sampling_params import SamplingParams
from smc_engines.serving.triton_client import ServingError, make_inputs
from tests.serving.service import STREAMING, Service, text

TEXT_MODELS = ("ensemble", "tensorrt_llm_bls")


@pytest.fixture(scope="module")
def expected(service: Service) -> Any:
    """What the executor itself answers, in process."""
    executor = Executor.from_engine_dir(service.engine)

    def answer(prompt: str | list[int], **params: Any) -> Any:
        return executor.generate([prompt], SamplingParams(**params))[0]

    return answer


def test_stream_is_the_executors_own_answer(service: Service, expected: Any) -> None:
    responses = list(service.stream("smc", {**STREAMING, "max_tokens": 40, "seed": 5}))
    want = expected("hello", num_particles=1, num_draft_tokens=2, ignore_eos=True, max_tokens=40, seed=5)
    assert len(responses) > 2
    assert text(responses) == want.text
    assert np.concatenate([r["output_ids"].ravel() for r in responses]).tolist() == list(want.token_ids)
    last = responses[-1]
    assert last["finish_reason"].ravel()[0] == b"length"
    assert last["log_evidence"].item() == pytest.approx(want.info.log_evidence)
    assert last["final_ess"].item() == pytest.approx(want.info.final_ess)
    assert last["rounds"].item() == want.info.rounds
    assert last["ess"].ravel().tolist() == pytest.approx(list(want.info.ess))
    assert all("log_evidence" not in response for response in responses[:-1])


def test_a_fallback_carries_the_certificate_of_what_was_given_up(service: Service, expected: Any) -> None:
    params = {"num_particles": 4, "num_draft_tokens": 3, "max_tokens": 40, "ignore_eos": True, "seed": 8}
    (last,) = service.stream("smc", {"text_input": "hello", **params, "fallback_below": 0.0})
    (plain,) = service.stream("smc", {"text_input": "hello", **params})
    assert last["fell_back"].item()
    assert not plain["fell_back"].item()
    for name in ("log_evidence", "log_evidence_sd", "final_ess"):
        assert last[name].item() == pytest.approx(plain[name].item()), name
    assert plain["log_evidence"].item() < 0
    assert (last["discarded_rounds"].item(), plain["discarded_rounds"].item()) == (plain["rounds"].item(), 0)
    assert expected("hello", **params, fallback_below=0.0).text == text([last])


def test_adaptive_k_reaches_the_executor(service: Service, expected: Any) -> None:
    params = {"num_particles": 4, "num_draft_tokens": 3, "max_tokens": 40, "ignore_eos": True, "seed": 6}
    for fraction in (1.0, 0.0):
        (last,) = service.stream("smc", {"text_input": "hello", **params, "adapt_draft_tokens": fraction})
        want = expected("hello", **params, adapt_draft_tokens=fraction)
        assert text([last]) == want.text
        assert last["rounds"].item() == want.info.rounds
        assert (want.info.rounds > 10) == (fraction > 0)  # ten rounds of four tokens where K stays


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_text_models_echo_the_prompt_unless_excluded(service: Service, expected: Any, model: str) -> None:
    want = expected("abc", max_tokens=6, seed=1).text
    values = {"text_input": "abc", "max_tokens": 6, "seed": 1}
    (echoed,) = service.stream(model, values)
    (bare,) = service.stream(model, {**values, "exclude_input_in_output": True})
    streamed = list(service.stream(model, {**values, "stream": True}))
    assert text([echoed]) == "abc" + want
    assert text([bare]) == want
    assert text(streamed) == want


def test_prefix_reuse_can_be_switched_off_for_a_request(service: Service) -> None:
    def grpc(prompt: str, cache_prompt: bool) -> int:
        """Tokens of the prompt that came from the cache."""
        values = {"text_input": prompt, "max_tokens": 2, "cache_prompt": cache_prompt}
        (answer,) = service.stream("smc", values)
        return answer["num_cached_tokens"].item()

    def openai(prompt: str, cache_prompt: bool) -> None:
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 2, "cache_prompt": cache_prompt}
        request = urllib.request.Request(service.url("openai", "/v1/completions"), json.dumps(body).encode())
        request.add_header("Content-Type", "application/json")
        urllib.request.urlopen(request, timeout=60).close()

    for number, ask in enumerate((grpc, openai)):
        private, public = (f"{number} {word} prompt that is longer than two pages" for word in ("private", "public"))
        ask(private, False)
        assert grpc(private, True) == 0  # it left none
        assert grpc(private, True) > 0
        assert grpc(private, False) == 0  # and takes none
        ask(public, True)
        assert grpc(public, True) > 0


@pytest.mark.parametrize("model", TEXT_MODELS)
def test_text_models_report_what_is_asked(service: Service, model: str) -> None:
    asked = ["return_log_probs", "return_num_input_tokens", "return_num_output_tokens", "return_perf_metrics"]
    values = {"text_input": "abc", "max_tokens": 5, "seed": 1, "end_id": -1}
    (plain,) = service.stream(model, values)
    (full,) = service.stream(model, {**values, **dict.fromkeys(asked, True)})
    assert set(plain) == {"text_output", "batch_index", "sequence_index"}
    assert full["num_input_tokens"].item() == 3
    assert full["num_output_tokens"].item() == 5
    assert full["output_log_probs"].shape == (1, 1, 5)
    assert full["cum_log_probs"].item() == pytest.approx(full["output_log_probs"].sum(), rel=1e-5)
    times = [full[f"{name}_time_ns"].item() for name in ("arrival", "first_scheduled", "first_token", "last_token")]
    assert times == sorted(times)


def test_batches_and_sequences_keep_their_indices(service: Service) -> None:
    values = {
        "text_input": np.array([[b"a"], [b"b"]], object),
        "max_tokens": np.array([[4], [6]], np.int32),
        "num_return_sequences": np.full((2, 1), 2, np.int32),
        "return_num_output_tokens": np.ones((2, 1), np.bool_),
        "end_id": np.full((2, 1), -1, np.int32),
        "seed": np.array([[1], [1]], np.uint64),
    }
    (together,) = service.stream("ensemble", values)
    assert together["text_output"].shape == (2, 2)
    assert together["sequence_index"].tolist() == [[0, 1], [0, 1]]
    assert together["batch_index"].tolist() == [[0], [1]]
    assert together["num_output_tokens"].tolist() == [[4, 4], [6, 6]]
    pieces: dict[tuple[int, int], str] = {}
    for response in service.stream("ensemble", {**values, "stream": np.ones((2, 1), np.bool_)}):
        key = (response["batch_index"].item(), response["sequence_index"].item())
        pieces[key] = pieces.get(key, "") + text([response])
    prompts = ("a", "b")
    got = {key: prompts[key[0]] + piece for key, piece in pieces.items()}
    assert got == {(row, s): together["text_output"][row, s].decode() for row in range(2) for s in range(2)}


def test_ids_model(service: Service, expected: Any) -> None:
    want = list(expected([104, 105], max_tokens=5, seed=9, ignore_eos=True).token_ids)
    values = {"input_ids": [104, 105, 0], "input_lengths": 2, "request_output_len": 5, "seed": 9, "end_id": -1}
    (whole,) = service.stream("tensorrt_llm", values)
    assert whole["output_ids"].tolist() == [[[104, 105, *want]]]
    assert whole["sequence_length"].tolist() == [[7]]
    streamed = list(service.stream("tensorrt_llm", {**values, "streaming": True}))
    assert np.concatenate([r["output_ids"].ravel() for r in streamed]).tolist() == want


def test_end_id_and_stop_words_end_the_answer(service: Service, expected: Any) -> None:
    full = expected("hi", max_tokens=12, seed=3, ignore_eos=True)
    stop = next(token for token in full.token_ids[2:] if token not in full.token_ids[:2])
    cut = full.token_ids.index(stop) + 1
    values = {"input_ids": [104, 105], "input_lengths": 2, "request_output_len": 12, "seed": 3}
    values |= {"exclude_input_in_output": True}
    (by_end_id,) = service.stream("tensorrt_llm", {**values, "end_id": stop})
    words = np.array([[[stop], [1]]], np.int32)
    (by_word,) = service.stream("tensorrt_llm", {**values, "end_id": -1, "stop_words_list": words})
    for response in (by_end_id, by_word):
        assert response["output_ids"].ravel()[-1] == stop
        assert response["output_ids"].size <= cut or cut > 12


def test_stop_string_is_named_and_left_out(service: Service) -> None:
    values = {**STREAMING, "max_tokens": 60, "seed": 2}
    full = text(list(service.stream("smc", values)))
    stop = next(character for character in full[3:] if character not in full[:3] and character != "\ufffd")
    responses = list(service.stream("smc", {**values, "sampling_param_stop": [stop]}))
    assert stop not in text(responses)
    assert responses[-1]["finish_reason"].item() == b"stop"
    assert responses[-1]["stop_reason"].item().decode() == stop


def test_chat_messages_use_the_engines_template(service: Service, expected: Any) -> None:
    messages = json.dumps([{"role": "user", "content": "hi"}])
    (response,) = service.stream("smc", {"messages": messages, "max_tokens": 4, "seed": 1})
    prompt = [256, 258, *b"hi", 259]  # <|bos|><|user|>hi<|assistant|>
    assert response["num_input_tokens"].item() == len(prompt)
    assert text([response]) == expected(prompt, max_tokens=4, seed=1).text


def test_modes_and_particles(service: Service) -> None:
    values = {"text_input": "hello", "max_tokens": 12, "seed": 4, "ignore_eos": True}
    (smc,) = service.stream("smc", {**values, "num_particles": 4, "return_particles": True})
    assert smc["particles"].shape == smc["particle_log_weights"].shape == (1, 1, 4)
    assert "acceptance_rate" not in smc
    assert text([smc]).encode() in smc["particles"].ravel()
    (exact,) = service.stream("smc", {**values, "mode": "speculative"})
    assert 0 <= exact["acceptance_rate"].item() <= 1
    assert exact["total_accepted_draft_tokens"].item() <= exact["total_draft_tokens"].item()
    (target,) = service.stream("smc", {**values, "mode": "target"})
    assert target["rounds"].item() >= 11


def test_a_client_that_leaves_frees_its_pages(service: Service) -> None:
    before = service.status()["cancelled"]
    stream = service.stream("smc", {**STREAMING, "max_tokens": 450})
    next(stream)
    stream.close()
    service.idle()
    assert service.status()["cancelled"] == before + 1


@pytest.mark.parametrize("model", ["smc", "tensorrt_llm"])
def test_stop_request_ends_the_request_with_its_id(service: Service, model: str) -> None:
    if model == "smc":
        values, stop = {**STREAMING, "max_tokens": 450}, {"stop": True}
    else:
        values = {"input_ids": [1], "input_lengths": 1, "request_output_len": 450, "end_id": -1}
        stop = {"input_ids": [0], "input_lengths": 0, "request_output_len": 0, "stop": True}
    got: list[dict[str, np.ndarray]] = []
    thread = threading.Thread(target=lambda: got.extend(service.stream(model, values, request_id=f"stop-{model}")))
    thread.start()
    service.wait(lambda: any(view.get("tag") == f"stop-{model}" for view in service.status()["live"]), 20, "it runs")
    assert list(service.stream(model, stop, request_id=f"stop-{model}")) == []
    thread.join(30)
    assert not thread.is_alive()
    if model == "smc":
        assert got[-1]["finish_reason"].item() == b"cancelled"
    service.idle()


def test_deadline_ends_a_request(service: Service) -> None:
    with pytest.raises(ServingError, match="deadline passed, expected an end within 150 ms") as caught:
        list(service.stream("smc", {**STREAMING, "max_tokens": 480, "timeout_ms": 150}))
    assert caught.value.status == "DEADLINE_EXCEEDED"
    values = {"text_input": "a", "max_tokens": 480, "end_id": -1}
    with pytest.raises(ServingError, match="deadline passed"):
        list(service.stream("ensemble", values, parameters={"smc_timeout_ms": 150}))
    arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with grpcclient.InferenceServerClient(service.grpc) as client:
        client.start_stream(callback=lambda result, error: arrived.put((result, error)))
        client.async_stream_infer(
            "ensemble", make_inputs("ensemble", values), timeout=150_000
        )  # the protocol's own, in µs
        _, error = arrived.get(timeout=30)
        client.stop_stream()
    assert "deadline passed, expected an end within 150 ms" in str(error)
    service.idle()


def test_plain_clients_get_the_message(service: Service) -> None:
    """A client that knows nothing of error outputs gets what the server makes of the adapter's error."""
    values = {"text_input": "hi", "max_tokens": 0}
    with pytest.raises(ServingError, match="max_tokens must be in") as caught:
        list(service.stream("ensemble", values, parameters={"smc_error_outputs": False}))
    assert caught.value.status == "UNKNOWN"


def test_a_tensorrt_llm_clients_own_code(service: Service) -> None:
    """As such clients are written: tritonclient, named outputs, the protocol's own priority and timeout."""
    values = {"text_input": [[b"hello"]], "max_tokens": [[6]], "stream": [[True]], "end_id": [[-1]], "seed": [[3]]}
    values |= {"bad_words": [[b""]], "stop_words": [[b""]], "top_k": [[0]], "top_p": [[0.0]], "temperature": [[1.0]]}
    values |= {"repetition_penalty": [[1.0]], "beam_width": [[1]], "return_log_probs": [[True]]}
    kinds = {
        "text_input": object,
        "stop_words": object,
        "bad_words": object,
        "stream": bool,
        "return_log_probs": bool,
        "seed": np.uint64,
    }
    kinds |= dict.fromkeys(("top_p", "temperature", "repetition_penalty"), np.float32)
    inputs = []
    for name, value in values.items():
        array = np.array(value, kinds.get(name, np.int32))
        tensor = grpcclient.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    outputs = [grpcclient.InferRequestedOutput(name) for name in ("text_output", "cum_log_probs")]
    arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
    pieces = []
    with grpcclient.InferenceServerClient(service.grpc) as client:
        client.start_stream(callback=lambda result, error: arrived.put((result, error)))
        client.async_stream_infer(
            "ensemble",
            inputs,
            outputs=outputs,
            request_id="7",
            priority=1,
            timeout=30_000_000,
            enable_empty_final_response=True,
        )
        while True:
            result, error = arrived.get(timeout=30)
            assert error is None, str(error)
            pieces.append(result)
            if result.get_response().parameters["triton_final_response"].bool_param:
                break
        client.stop_stream()
    assert {piece.get_response().id for piece in pieces} == {"7"}
    assert {output.name for output in pieces[-1].get_response().outputs} == {"text_output", "cum_log_probs"}
    same = {"text_input": "hello", "max_tokens": 6, "stream": True, "end_id": -1, "seed": 3, "temperature": 1.0}
    assert "".join(piece.as_numpy("text_output").item().decode() for piece in pieces) == text(
        list(service.stream("ensemble", same))
    )


def test_unary_calls_are_told_to_stream(service: Service) -> None:
    with (
        grpcclient.InferenceServerClient(service.grpc) as client,
        pytest.raises(InferenceServerException, match="decoupled"),
    ):
        client.infer("ensemble", make_inputs("ensemble", {"text_input": "a", "max_tokens": 2}), client_timeout=20)


def test_the_printed_client_command_streams(service: Service) -> None:
    command = service.output().partition("try it:\n")[2].splitlines()[0]
    done = subprocess.run(shlex.split(command), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\[\d+ tokens in .* rounds, .* resamples, log_evidence .*, (stop|length)\]", done.stdout)


def test_an_error_reaches_a_client_that_named_other_outputs(service: Service) -> None:
    """The server drops outputs that were not named: the error would have come as a response with nothing in it."""
    arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with grpcclient.InferenceServerClient(service.grpc) as client:
        client.start_stream(lambda result, error: arrived.put(error))
        client.async_stream_infer(
            "smc",
            make_inputs("smc", {"text_input": "a", "max_tokens": -1}),
            outputs=[grpcclient.InferRequestedOutput("text_output")],
            parameters={"smc_error_outputs": True},
        )
        assert "max_tokens must be in" in str(arrived.get(timeout=20))


def test_given_up_calls_leave_no_thread(service: Service) -> None:
    """Each left one behind, in the watchdog too, whose probes end that way: smc-serve grew by two threads a second."""
    before = threading.active_count()
    for _ in range(12):
        stream = service.stream("smc", {**STREAMING, "max_tokens": 300})
        next(stream)
        stream.close()
    limit = time.monotonic() + 20
    while threading.active_count() > before + 2 and time.monotonic() < limit:
        time.sleep(0.05)
    assert threading.active_count() <= before + 2
