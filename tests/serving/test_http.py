"""The HTTP endpoint, the metrics and the OpenAI-compatible front, with the clients that people use."""

from __future__ import annotations

import http.client
import json
import re
import socket
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from smc_engines.serving import client as command_line_client
from smc_engines.serving.triton_client import ServingError
from tests.serving.service import Service, minimal

openai = pytest.importorskip("openai", reason="needs requirements/serve-test.txt: run make serve-env")


@pytest.mark.parametrize("model", ["smc", "ensemble", "tensorrt_llm_bls", "tensorrt_llm"])
def test_generate(service: Service, model: str) -> None:
    status, body = service.post(f"/v2/models/{model}/generate", minimal(model))
    assert status == 200
    assert json.loads(body)["text_output" if model != "tensorrt_llm" else "output_ids"]


def test_generate_stream_is_the_whole_answer_in_pieces(service: Service) -> None:
    values = {"text_input": "hello", "max_tokens": 30, "seed": 5, "num_particles": 1, "ignore_eos": True}
    _, whole = service.post("/v2/models/smc/generate", values)
    status, events = service.post("/v2/models/smc/generate_stream", {**values, "stream": True})
    pieces = [json.loads(line[6:]) for line in events.decode().splitlines() if line.startswith("data: ")]
    assert status == 200
    assert len(pieces) > 1
    assert "".join(piece["text_output"] for piece in pieces) == json.loads(whole)["text_output"]


def test_http_errors(service: Service) -> None:
    status, body = service.post("/v2/models/ensemble/generate", {"text_input": "a", "max_tokens": 0})
    assert status == 400
    assert "max_tokens must be in" in json.loads(body)["error"]
    status, body = service.post("/v2/models/smc/generate_stream", {"text_input": "", "max_tokens": 2, "stream": True})
    assert status == 400
    assert b"prompt is empty" in body
    status, _ = service.post("/v2/models/made_up/generate", {})
    assert status == 404
    # the server makes a parameter of a name that it does not know, and such a request got the defaults in silence
    status, body = service.post("/v2/models/smc/generate", {"text_input": "a", "max_token": 2})
    assert status == 400
    assert b"unknown input or parameter 'max_token'" in body
    assert b"did you mean 'max_tokens'?" in body


def test_metrics_follow_the_work(service: Service) -> None:
    def metrics() -> dict[str, float]:
        with urllib.request.urlopen(service.url("metrics", "/metrics"), timeout=20) as answer:
            lines = answer.read().decode().splitlines()
        return {
            name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] not in ("#", ""))
        }

    before = metrics()
    (response,) = service.stream("smc", {"text_input": "hello", "max_tokens": 7, "ignore_eos": True})
    labels = 'model="smc",response_metric_type="total_output_tokens",version="1"'
    tokens, short = f"nv_llm_output_token_len_sum{{{labels}}}", "nv_llm_output_token_len_bucket"
    at_most_10, all_of_them = (f'{short}{{le="{bound}",{labels}}}' for bound in ("10", "+Inf"))
    # figures follow the answer, a message each
    service.wait(lambda: metrics()[at_most_10] > before[at_most_10], 10, "its tokens are counted")
    after = metrics()
    assert after[tokens] == before[tokens] + 7
    assert after[at_most_10] == before[at_most_10] + 1
    assert after[all_of_them] == after[f"nv_llm_output_token_len_count{{{labels}}}"]
    rounds = 'smc_rounds_total{model="smc"}'
    service.wait(lambda: metrics()[rounds] >= before[rounds] + response["rounds"].item(), 10, "rounds are reported")
    free, most = (
        f'nv_trt_llm_kv_cache_block_metrics{{kv_cache_block_type="{kind}",model="tensorrt_llm",version="1"}}'
        for kind in ("free", "max")
    )
    assert 0 < metrics()[free] <= metrics()[most]
    kinds = {re.split("[{]", name)[0] for name in before}
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    table = page.partition("| family | labels |")[2].partition("\n\n")[0]
    families = set(re.findall(r"`((?:nv|smc)_\w+)`", table))
    assert len(families) == 17
    histograms = {name for name in families if name.startswith("nv_llm")}
    parts = {name + part for name in histograms for part in ("_bucket", "_sum", "_count")}
    assert (families - histograms) | parts <= kinds
    for kind, row in re.findall(r"`(\w+_(?:type|metric))` = ([\w, ]+)", table):
        for value in row.strip().split(", "):
            assert any(f'{kind}="{value}"' in name for name in before), (kind, value)


@pytest.fixture(scope="module")
def client(service: Service) -> Any:
    """The openai package's client, without its retries."""
    return openai.OpenAI(base_url=service.url("openai", "/v1"), api_key="none", max_retries=0)


def test_openai_models(client: Any) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'other' is not served"):
        client.models.retrieve("other")


def test_openai_completion_is_the_grpc_answer(service: Service, client: Any) -> None:
    extra = {"num_particles": 3, "ignore_eos": True}
    answer = client.completions.create(
        model="tiny", prompt="hello", max_tokens=8, n=2, seed=5, logprobs=0, echo=True, extra_body=extra
    )
    values = {"text_input": "hello", "max_tokens": 8, "seed": 5, "n": 2, **extra}
    (grpc,) = service.stream("smc", values)
    texts = ["hello" + text.decode() for text in grpc["text_output"].ravel()]
    assert [choice.text for choice in answer.choices] == texts
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 16)
    assert len(answer.choices[0].logprobs.tokens) == len(answer.choices[0].logprobs.token_logprobs) == 8
    assert answer.choices[1].smc["seed"] == 6
    assert answer.choices[0].finish_reason == "length"


def test_openai_chat_streams_what_it_answers_whole(client: Any) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 30, "seed": 1}
    extra = {"num_particles": 1, "ignore_eos": True}
    whole = client.chat.completions.create(**asked, logprobs=True, extra_body=extra)
    stream = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}, extra_body=extra)
    )
    pieces = [chunk.choices[0] for chunk in stream if chunk.choices]
    assert len(pieces) > 2
    assert "".join(piece.delta.content for piece in pieces) == whole.choices[0].message.content
    assert pieces[0].delta.role == "assistant"
    assert pieces[-1].finish_reason == whole.choices[0].finish_reason == "length"
    assert stream[-1].usage == whole.usage
    assert len(whole.choices[0].logprobs.content) == 30


def test_openai_several_prompts_and_token_ids(client: Any) -> None:
    texts = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=4, seed=1)
    ids = client.completions.create(model="tiny", prompt=[[97], [98]], max_tokens=4, seed=1)
    assert [choice.index for choice in texts.choices] == [0, 1]
    assert [choice.text for choice in texts.choices] == [choice.text for choice in ids.choices]


def test_openai_stop(client: Any) -> None:
    asked = {"model": "tiny", "prompt": "hello", "max_tokens": 60, "seed": 2, "extra_body": {"num_particles": 1}}
    full = client.completions.create(**asked).choices[0].text
    stop = next(character for character in full[2:] if character != "\ufffd" and character not in full[:2])
    cut = client.completions.create(**asked, stop=stop).choices[0]
    assert cut.finish_reason == "stop"
    assert stop not in cut.text


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"model": "other"}, 404, "'other' is not served"),
        ({"presence_penalty": 1.0}, 400, "presence_penalty is not served"),
        ({"logit_bias": {"5": 1.0}}, 400, "logit_bias is not served"),
        ({"logprobs": 5}, 400, "logprobs is not served"),
        ({"suffix": "x"}, 400, "suffix is not served"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 100000}, 400, "together at most 512"),
        ({"extra_body": {"num_particle": 2}}, 400, "num_particle"),
        ({"extra_body": {"num_particles": 99}}, 400, "built for at most 8"),
        ({"max_tokens": 480, "extra_body": {"timeout_ms": 100, "ignore_eos": True}}, 504, "deadline passed"),
        ({"stream": True, "max_tokens": 100000}, 400, "together at most 512"),
        # these once left the client waiting for ever, because no tensor could be made of them
        ({"max_tokens": 10**11}, 400, "max_tokens cannot be sent, expected INT32"),
        ({"prompt": [10**11]}, 400, "input_ids cannot be sent, expected INT32"),
        ({"stream": True, "extra_body": {"priority": -(10**11)}}, 400, "priority cannot be sent"),
    ],
)
def test_openai_errors(client: Any, change: dict[str, Any], status: int, message: str) -> None:
    with pytest.raises(openai.APIStatusError, match=message) as caught:
        client.completions.create(**{"model": "tiny", "prompt": "x", "max_tokens": 2, **change})
    assert caught.value.status_code == status


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 2, "max_completion_tokens": 3}, "mean the same, got 2 and 3: drop one of them"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"id": "a", "type": "function"}]}]},
            "messages with tool calls are not served",
        ),
        (
            {"messages": [{"role": "tool", "content": "4", "tool_call_id": "a"}]},
            "messages with tool calls are not served",
        ),
    ],
)
def test_openai_chat_refuses_what_would_be_dropped(client: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(**{"model": "tiny", "messages": [{"role": "user", "content": "x"}], **change})


def test_the_client_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["smc-client", "--grpc", "127.0.0.1:1", "hi"])
    assert command_line_client.main() == 1
    told = capsys.readouterr().err
    assert told == (
        "smc-client: nothing answers at 127.0.0.1:1, expected smc-serve's gRPC port: start it, or correct --grpc\n"
    )
    monkeypatch.delitem(sys.modules, "smc_engines.serving.triton_client")
    monkeypatch.delattr("smc_engines.serving.triton_client")
    monkeypatch.setitem(sys.modules, "tritonclient", None)  # as where the extra is not installed
    monkeypatch.setitem(sys.modules, "tritonclient.grpc", None)
    assert command_line_client.main() == 1
    told = capsys.readouterr().err
    assert "is not installed, expected the extra 'serve': run pip install 'smc-engine[serve]'" in told


def test_openai_client_that_hangs_up_frees_its_pages(service: Service, client: Any) -> None:
    before = service.status()["cancelled"]
    stream = client.completions.create(
        model="tiny", prompt="hello", max_tokens=480, stream=True, extra_body={"num_particles": 1, "ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    service.idle()
    assert service.status()["cancelled"] == before + 1


def test_openai_connections_outlive_the_pools_of_clients(service: Service) -> None:
    """httpx, and so the openai package, keeps an idle connection for 5 s: a server that closes it then may cut a request."""
    connection = http.client.HTTPConnection("127.0.0.1", service.state["openai"], timeout=30)
    for pause_s in (0, 6.5):
        time.sleep(pause_s)
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert (answer.status, answer.read() != b"") == (200, True)
    connection.close()


def test_openai_text_that_is_no_text(service: Service) -> None:
    body = b'{"model": "tiny", "prompt": "\\ud800", "max_tokens": 2}'
    request = urllib.request.Request(
        service.url("openai", "/v1/completions"), body, {"content-type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=20)
    assert caught.value.code == 400
    assert b"text_input cannot be sent" in caught.value.read()


def test_openai_client_that_hangs_up_before_the_first_piece(service: Service) -> None:
    """It waits in the queue behind others, gives up, and must not be served any more."""
    before = service.status()["cancelled"]
    values = {"text_input": "x", "max_tokens": 450, "ignore_eos": True, "stream": True, "n": 16}
    busy = service.stream("smc", values, request_id="busy")
    next(busy)
    address = urllib.parse.urlsplit(service.url("openai", ""))
    body = json.dumps({"model": "tiny", "prompt": "hi", "stream": True, "max_tokens": 400, "priority": 1})
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        connection.sendall(f"{head}\r\n\r\n{body}".encode())
        service.wait(lambda: any("cmpl-" in view.get("tag", "") for view in service.status()["live"]), 20, "it waits")
    service.wait(lambda: service.status()["cancelled"] == before + 1, 20, "it is cancelled")
    busy.close()
    service.idle()


def test_idle_service_makes_no_tokens(service: Service) -> None:
    """The watchdog's own probes once showed as traffic: several tokens a second on an idle machine."""
    service.idle()
    before = service.status()["tokens"]
    time.sleep(2.5)  # several probes
    report = service.status()
    assert (report["tokens"], report["tokens_per_second"]) == (before, 0)


def test_logs_have_request_ids_and_no_prompts(service: Service, client: Any) -> None:
    secret = "tell-nobody-42"
    messages = json.dumps([{"role": "user", "content": secret}])
    list(service.stream("smc", {"messages": messages, "max_tokens": 2}, request_id="logged-1"))
    list(service.stream("ensemble", {"text_input": secret, "max_tokens": 2, "stop_words": [secret]}))
    answer = client.completions.create(model="tiny", prompt=secret, max_tokens=2)
    for values in ({"text_input": secret * 90}, {"messages": secret}, {"messages": f'[{{"role": "{secret}"}}]'}):
        with pytest.raises(ServingError):
            list(service.stream("smc", {**values, "max_tokens": 2}, request_id="logged-2"))
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="x", max_tokens=2, extra_body={secret: 1})
    service.wait(lambda: service.output().count('"logged-2"') == 3, 10, "the refusals are logged")
    assert secret not in service.output()
    events = [json.loads(line) for line in service.output().splitlines() if line.startswith("{")]
    ended = [event["tag"] for event in events if event["event"] == "finished"]
    assert "logged-1" in ended
    assert answer.id in ended
    assert all({"time", "level", "part", "event"} <= event.keys() for event in events)
