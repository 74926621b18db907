"""The adapters' shared code, without a server: contracts, messages, outputs."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from smc_adapter import protocol

from smc_engines.serving import REPOSITORY
from smc_engines.serving.outbox import Outbox

contracts = pytest.importorskip("smc_adapter.contracts")
from smc_adapter.answers import Answer, streamed, whole  # noqa: E402
from smc_adapter.fields import InputError  # noqa: E402


@pytest.mark.parametrize("model", sorted(contracts.CONTRACTS))
def test_config_files_say_what_the_contract_says(model: str) -> None:
    assert (REPOSITORY / model / "config.pbtxt").read_text() == contracts.config_pbtxt(model)


def test_every_refusal_says_what_to_do() -> None:
    for contract in contracts.CONTRACTS.values():
        for entry in contract.inputs.values():
            if entry.unsupported:
                shape = tuple(1 if size < 0 else size for size in entry.dims)
                with pytest.raises(InputError, match=r"not supported, got .*: .*(leave|send|merge|use)"):
                    entry.read(np.zeros((1, *shape)))


def test_rows_and_sequences_become_sub_requests_with_their_own_seeds() -> None:
    arrays = {
        "text_input": np.array([[b"a"], [b"b"]], object),
        "max_tokens": np.array([[1], [2]], np.int32),
        "seed": np.array([[7], [2**64 - 1]], np.uint64),
        "num_return_sequences": np.array([[2], [2]], np.int32),
    }
    subs = contracts.CONTRACTS["ensemble"].parse(arrays, {}).subs
    assert [(s.batch_index, s.sequence_index, s.prompt["text"], s.params["max_tokens"]) for s in subs] == [
        (0, 0, "a", 1),
        (0, 1, "a", 1),
        (1, 0, "b", 2),
        (1, 1, "b", 2),
    ]
    assert [s.params["seed"] for s in subs] == [7, 8, 2**64 - 1, 0]


def test_stop_word_lists_are_split_at_their_offsets() -> None:
    arrays = {
        "input_ids": np.array([[5, 6, 0]], np.int32),
        "input_lengths": np.array([[2]], np.int32),
        "request_output_len": np.array([[4]], np.int32),
        "stop_words_list": np.array([[[9, 3, 4], [1, 3, -1]]], np.int32),
        "end_id": np.array([[2]], np.int32),
    }
    (sub,) = contracts.CONTRACTS["tensorrt_llm"].parse(arrays, {}).subs
    assert sub.prompt == {"ids": [5, 6]}
    assert sub.params["stop_token_ids"] == [2, 9]
    assert sub.params["ignore_eos"] is True
    assert sub.stop_sequences == [[3, 4]]


def test_answers_are_padded_and_echo_the_prompt() -> None:
    arrays = {
        "input_ids": np.array([[5, 6], [7, 0]], np.int32),
        "input_lengths": np.array([[2], [1]], np.int32),
        "request_output_len": np.array([[4], [4]], np.int32),
        "pad_id": np.array([[99], [99]], np.int32),
    }
    contract = contracts.CONTRACTS["tensorrt_llm"]
    parsed = contract.parse(arrays, {})
    answers = [Answer(sub) for sub in parsed.subs]
    for answer, ids in zip(answers, ([1, 2, 3], [4]), strict=True):
        piece = answer.add({"ids": ids, "text": "", "finish": "length"})
        assert streamed(contract, parsed, piece, 16)["output_ids"].tolist() == [[ids]]
    tensors = whole(contract, parsed, answers, 16)
    assert tensors["output_ids"].tolist() == [[[5, 6, 1, 2, 3]], [[7, 4, 99, 99, 99]]]
    assert tensors["sequence_length"].tolist() == [[5], [2]]


def test_a_dead_particles_weight_stays_finite() -> None:
    contract = contracts.CONTRACTS["smc"]
    arrays = {"text_input": np.array([[b"a"]], object), "return_particles": np.array([[True]])}
    parsed = contract.parse(arrays, {})
    answer = Answer(parsed.subs[0])
    particles = [{"text": "x", "log_weight": float("-inf")}, {"text": "y", "log_weight": -1.5}]
    answer.add({"ids": [1], "text": "y", "finish": "stop", "info": {"particles": particles}})
    weights = whole(contract, parsed, [answer], 16)["particle_log_weights"]
    assert np.isfinite(weights).all()
    assert weights[0, 0, 1] == -1.5


def test_messages_of_another_version_are_refused_with_a_remedy() -> None:
    frame = protocol.encode("cancel", id="a").replace(b'"v":2', b'"v":1')
    with pytest.raises(protocol.ProtocolError, match=re.escape("expected protocol version 2, got 1: serve")):
        protocol.decode(frame)


def test_a_client_that_does_not_read_costs_one_merged_output_a_request() -> None:
    class Full:
        def send_multipart(self, *_: object) -> None:
            import zmq  # noqa: PLC0415

            raise zmq.Again

    outbox = Outbox(Full())  # type: ignore[arg-type]
    for number in range(1000):
        outbox.put(b"client", {"op": "output", "id": "r", "ids": [number], "text": "x"})
        assert list(outbox.flush()) == []
    (message,) = outbox._waiting[b"client"].values()
    assert message["ids"] == list(range(1000))
    assert message["text"] == "x" * 1000


def test_the_contract_page_lists_every_input_and_output() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    names = {name for contract in contracts.CONTRACTS.values() for name in contract.inputs}
    outputs = {output.name for contract in contracts.CONTRACTS.values() for output in contract.outputs}
    plain = {name.removeprefix("sampling_param_") for name in names}
    missing = [name for name in plain | outputs if f"`{name}`" not in page and f"`sampling_param_{name}`" not in page]
    assert missing == []
