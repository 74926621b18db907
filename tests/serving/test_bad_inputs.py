"""Bad requests: each its own error, with the right status, and the service goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import zmq
from smc_adapter import protocol

from smc_engines.config import ExecutorConfig
from smc_engines.executor import Executor
from smc_engines.serving import triton_client
from smc_engines.serving.service import ExecutorService
from smc_engines.serving.triton_client import ServingError, TritonClient
from tests.serving.service import Service

INVALID, UNSUPPORTED = "INVALID_ARGUMENT", "UNIMPLEMENTED"
# What the server itself refuses before a model sees it comes over a stream as a bare message, without a status.
SERVER = "UNKNOWN"


def raw(array: np.ndarray, datatype: str) -> grpcclient.InferInput:
    """A tensor of any type, whatever the contract says."""
    tensor = grpcclient.InferInput("", list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def text(**values: Any) -> tuple[str, dict[str, Any]]:
    """A request of ensemble."""
    return "ensemble", {"text_input": "hi", "max_tokens": 2, **values}


def ids(**values: Any) -> tuple[str, dict[str, Any]]:
    """A request of tensorrt_llm."""
    return "tensorrt_llm", {"input_ids": [1, 2], "input_lengths": 2, "request_output_len": 2, **values}


def smc(**values: Any) -> tuple[str, dict[str, Any]]:
    """A request of smc."""
    return "smc", {"text_input": "hi", "max_tokens": 2, **values}


def chat(messages: str) -> tuple[str, dict[str, Any]]:
    """A request of smc with messages."""
    return "smc", {"messages": messages, "max_tokens": 2}


CASES: list[tuple[str, tuple[str, dict[str, Any]], str, str]] = [
    ("empty text", text(text_input=""), INVALID, "prompt is empty"),
    ("no tokens wanted", text(max_tokens=0), INVALID, r"max_tokens must be in \[1"),
    ("negative tokens", text(max_tokens=-5), INVALID, "got -5"),
    ("too many tokens", text(max_tokens=100000), INVALID, "together at most 512 fit"),
    ("prompt too long", text(text_input="x" * 600), INVALID, "prompt has 600 tokens"),
    ("prompt of megabytes", text(text_input="x" * (4 * 2**20 + 1)), INVALID, "expected at most 4194304"),
    ("not UTF-8", text(text_input=b"\xff\xfe"), INVALID, "must be UTF-8, got byte 0xff at 0"),
    ("temperature below 0", text(temperature=-1.0), INVALID, "temperature must be in"),
    ("temperature NaN", text(temperature=float("nan")), INVALID, "temperature must be finite"),
    ("temperature infinite", text(temperature=float("inf")), INVALID, "temperature must be finite"),
    ("top_p above 1", text(top_p=1.5), INVALID, r"top_p must be in \[0, 1\], got 1.5"),
    ("top_k below 0", text(top_k=-1), INVALID, "top_k must be in"),
    ("min_p above 1", text(min_p=2.0), INVALID, "min_p must be in"),
    ("min above max", text(min_tokens=5), INVALID, "min_tokens must not exceed max_tokens"),
    ("end_id outside the vocabulary", text(end_id=100000), INVALID, "not in the vocabulary"),
    ("17 stop words", text(stop_words=[f"w{n}" for n in range(17)]), INVALID, "at most 16 stop strings"),
    ("two seeds", text(seed=1, random_seed=2), INVALID, "random_seed and seed mean the same"),
    ("65 sequences", text(num_return_sequences=65), INVALID, r"must be in \[1, 64\]"),
    ("K too large", text(num_draft_tokens=9), INVALID, "built for at most 4"),
    ("beams", text(beam_width=4), UNSUPPORTED, "beam_width is not supported"),
    ("repetition penalty", text(repetition_penalty=1.3), UNSUPPORTED, "repetition_penalty is not supported"),
    ("presence penalty", text(presence_penalty=0.5), UNSUPPORTED, "presence_penalty"),
    ("frequency penalty", text(frequency_penalty=0.5), UNSUPPORTED, "frequency_penalty"),
    ("length penalty", text(length_penalty=2.0), UNSUPPORTED, "length_penalty"),
    ("bad words", text(bad_words=["no"]), UNSUPPORTED, "bad_words"),
    ("LoRA", text(lora_task_id=1), UNSUPPORTED, "LoRA is not served"),
    ("guided decoding", text(guided_decoding_guide_type="json"), UNSUPPORTED, "guided decoding"),
    ("prompt table", text(prompt_vocab_size=4), UNSUPPORTED, "prompt tables"),
    ("image", text(image_url_input="http://x"), UNSUPPORTED, "multimodal"),
    ("context logits", text(return_context_logits=True), UNSUPPORTED, "return_context_logits"),
    ("logit bias", text(embedding_bias_words=["a"]), UNSUPPORTED, "logit biases"),
    ("ids: no ids", ("tensorrt_llm", {"input_lengths": 2, "request_output_len": 2}), INVALID, "input_ids is missing"),
    ("ids: length above the ids", ids(input_lengths=3), INVALID, r"input_lengths must be in \[1, 2\], got 3"),
    ("ids: length 0", ids(input_lengths=0), INVALID, "got 0"),
    ("ids: negative id", ids(input_ids=[1, -7]), INVALID, "input_ids must be in"),
    ("ids: id outside the vocabulary", ids(input_ids=[1, 5000]), INVALID, "5000 is not in the vocabulary"),
    (
        "ids: offsets that fall",
        ids(stop_words_list=np.array([[[4, 5], [2, 1]]], np.int32)),
        INVALID,
        "expected them rising",
    ),
    ("ids: draft tokens of the client", ids(draft_input_ids=[1]), UNSUPPORTED, "own draft model"),
    ("ids: early stopping", ids(early_stopping=True), UNSUPPORTED, "early_stopping"),
    ("ids: stop without an id", ids(stop=True), INVALID, "stop needs the request id"),
    ("smc: no prompt", ("smc", {"max_tokens": 2}), INVALID, "exactly one of text_input"),
    ("smc: two prompts", smc(input_ids=[1]), INVALID, "exactly one of text_input"),
    ("smc: messages that are no JSON", ("smc", {"messages": "hi"}), INVALID, "messages must be JSON"),
    ("smc: messages that are no list", ("smc", {"messages": "{}"}), INVALID, "non-empty JSON list"),
    (
        "smc: messages with half a surrogate pair",
        chat('[{"role": "user", "content": "\\ud800"}]'),
        INVALID,
        "Unicode text",
    ),
    ("smc: messages nested too deeply", chat("[" * 100_000), INVALID, "messages must be JSON"),
    ("smc: content nested too deeply", chat(f'[{{"content": {"[" * 40}{"]" * 40}}}]'), INVALID, "nested too deeply"),
    ("smc: content that is a number", chat('[{"role": "user", "content": NaN}]'), INVALID, "must be an object like"),
    ("smc: a stop word of kilobytes", smc(stop_words=["x" * 5000]), INVALID, "stop_words has 5000 bytes"),
    ("smc: a prompt that cannot fit", smc(text_input="x" * 10**6), INVALID, "has 1000000 characters, expected at most"),
    ("smc: mode that is not UTF-8", smc(mode=b"\xff"), INVALID, "mode must be UTF-8"),
    ("smc: empty token ids", ("smc", {"input_ids": np.zeros((1, 0), np.int32)}), INVALID, "prompt is empty"),
    (
        "smc: messages without a role",
        ("smc", {"messages": '[{"content": 1}]'}),
        INVALID,
        "message 0 must be an object like",
    ),
    ("smc: two names of n", smc(n=2, sampling_param_n=3), INVALID, "inputs n and sampling_param_n mean the same"),
    (
        "smc: two names of the echo",
        smc(exclude_input_in_output=True, sampling_param_exclude_input_from_output=False),
        INVALID,
        "mean the same, expected one: drop one of them",
    ),
    ("smc: unknown mode", smc(mode="fast"), INVALID, "mode must be one of"),
    ("smc: N too large", smc(num_particles=9), INVALID, "built for at most 8"),
    ("smc: N of 0", smc(num_particles=0), INVALID, "num_particles must be in"),
    ("smc: threshold above 1", smc(ess_threshold=1.5), INVALID, "ess_threshold must be in"),
    ("smc: alpha of 0", smc(power_alpha=0.0), INVALID, "power_alpha must be in"),
    ("smc: draft temperature of 0", smc(draft_temperature=0.0), INVALID, "draft_temperature must be in"),
    ("smc: one value under two names", smc(sampling_param_max_tokens=3), INVALID, "mean the same"),
    ("smc: best_of", smc(sampling_param_best_of=3), UNSUPPORTED, "best_of"),
    ("smc: LoRA", smc(lora_name="x"), UNSUPPORTED, "LoRA"),
    ("smc: timeout of 0", smc(timeout_ms=0), INVALID, "timeout_ms must be in"),
    ("smc: shape", smc(temperature=np.zeros((1, 2), np.float32)), SERVER, "temperature"),
    ("smc: batch sizes differ", smc(temperature=np.zeros((2, 1), np.float32)), SERVER, "batch"),
    ("smc: batch of 65", ("smc", {"text_input": np.full((65, 1), b"a", object)}), SERVER, "batch"),
]


@pytest.mark.parametrize(("call", "status", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_request(service: Service, call: tuple[str, dict[str, Any]], status: str, message: str) -> None:
    model, values = call
    executor = service.state["processes"]["executor"]
    with pytest.raises(ServingError, match=message) as caught:
        list(service.stream(model, values))
    assert caught.value.status == status
    assert service.state["processes"]["executor"] == executor


@pytest.mark.parametrize(
    ("name", "array", "datatype"),
    [("made_up", np.zeros((1, 1), np.int32), "INT32"), ("max_tokens", np.zeros((1, 1), np.float32), "FP32")],
    ids=["unknown name", "wrong type"],
)
def test_bad_tensor(
    service: Service, monkeypatch: pytest.MonkeyPatch, name: str, array: np.ndarray, datatype: str
) -> None:
    def inputs(_model: str, _values: object) -> list[grpcclient.InferInput]:
        prompt = triton_client._one_row("STRING", "hi")
        tensors = [raw(prompt, "BYTES"), raw(array, datatype)]
        for tensor, own in zip(tensors, ("text_input", name), strict=True):
            tensor._input.name = own
        return tensors

    monkeypatch.setattr(triton_client, "make_inputs", inputs)
    with pytest.raises(ServingError, match=name) as caught:
        list(TritonClient(service.grpc).stream("smc", {}, timeout_s=20))
    assert caught.value.status == SERVER


def test_refusals_of_adapters_are_counted_and_logged(service: Service) -> None:
    """They never reach the executor's queue, but belong in the same log and metric."""
    before = service.status()["refused"]
    with pytest.raises(ServingError, match="max_tokens must be in"):
        list(service.stream(*smc(max_tokens=0), request_id="refused-in-the-adapter"))
    service.wait(lambda: service.status()["refused"] == before + 1, 10, "it is counted")
    assert '"event": "refused", "tag": "refused-in-the-adapter", "code": "INVALID_ARG"' in service.output()


def test_an_unforeseen_error_is_one_requests_own(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat message with half a surrogate pair once ended the executor, and with it everybody's streams."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router, context.socket(zmq.DEALER) as dealer:
        router.bind("inproc://executor")
        dealer.connect("inproc://executor")
        served = ExecutorService(Executor.from_engine_dir(engine, ExecutorConfig(num_pages=400)), router)
        monkeypatch.setattr(served, "_read", lambda _message: [].pop())
        dealer.send(protocol.encode("submit", id="a", tag="t", prompt={"text": "secret"}, params={}))
        served.turn()
        (answer,) = protocol.decode(dealer.recv())["messages"]
    assert answer["error"]["code"] == protocol.INTERNAL
    assert "got IndexError" in answer["error"]["message"]


def test_bad_parameter(service: Service) -> None:
    with pytest.raises(ServingError, match="smc_timeout_ms must be an integer"):
        list(service.stream("smc", {"text_input": "a", "max_tokens": 2}, parameters={"smc_timeout_ms": "soon"}))


def test_the_service_is_well_after_all_that(service: Service) -> None:
    assert all(service.works(model) for model in ("smc", "ensemble", "tensorrt_llm_bls", "tensorrt_llm"))
    service.idle()
