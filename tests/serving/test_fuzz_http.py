"""The OpenAI front over HTTP, fuzzed from its own schema: a small share of what scripts/fuzz_http.py does at length."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("schemathesis", reason="needs requirements/serve-test.txt: run make serve-env")
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import fuzz_http

from tests.serving.service import Service


def test_whatever_is_asked_the_answer_fits_the_schema(service: Service) -> None:
    restarts = service.output().count("restart")
    report = fuzz_http.fuzz(service.url("openai", ""), "tiny", cases=180, seed=3)
    assert report["findings"] == []
    for path in ("/v1/completions", "/v1/chat/completions"):
        assert set(report["statuses"][f"POST {path} invalid"]) <= {"400", "404"}
        served = report["statuses"][f"POST {path} served"]
        assert served["200"] > sum(served.values()) / 2  # else it tests little but refusals
    service.idle()
    assert service.output().count("restart") == restarts


def test_the_fuzzer_notices_a_wrong_answer(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that must be refused are sent as sound ones: their answers, of status 200, are findings."""

    def soothe(body: Any, model: str) -> None:
        if isinstance(body, dict):
            body.clear()
            body.update({"model": model, "prompt": "hi", "max_tokens": 1})

    monkeypatch.setattr(fuzz_http, "tame", soothe)
    monkeypatch.setattr(fuzz_http, "KINDS", {kind: fuzz_http.KINDS[kind] for kind in ("valid", "invalid")})
    report = fuzz_http.fuzz(service.url("openai", ""), "tiny", cases=40, seed=3)
    assert any("POST /v1/completions invalid" in finding for finding in report["findings"])


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"prompt": ["a", [1]]}, "prompt is invalid, expected one of str, list[str], list[int], list[list[int]], got"),
        ({"stop": 3}, "stop is invalid, expected one of str, list[str], got"),
        ({"n": 65}, "n is invalid, input should be less than or equal to 64, got 65"),
        ({"priority": False}, "priority is invalid, input should be a valid integer, got False"),
        ({"n": "2"}, "n is invalid, input should be a valid integer, got '2'"),
    ],
)
def test_a_value_of_no_type_of_several_is_told_all_of_them(service: Service, odd: dict[str, Any], message: str) -> None:
    """A list of a text and a list was told "prompt.str is invalid, input should be a valid string"."""
    body = json.dumps({"model": "tiny", "prompt": "a", **odd}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(service.url("openai", "/v1/completions"), body, headers)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    error = json.load(caught.value)["error"]
    assert error["message"].startswith(message)
    assert error["param"] == next(iter(odd))
