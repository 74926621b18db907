"""Fuzz the OpenAI front over real HTTP, from its own schema: python scripts/fuzz_http.py --cases 1000

schemathesis (requirements/serve-test.txt) makes requests that fit /openapi.json (valid), that do not (invalid), and that fit
what the engine allows too (served). Each goes to a served tiny engine. A finding is an answer that the schema does not
describe, a refused request that is not an error object, an accepted request that does not fit the schema, a status of 500 or
more (but 504 for the request's own deadline), an answer that says "report this", or none within a minute. Findings are printed
with the body that was sent; then the exit status is 1.

    POST /v1/completions invalid         400: 333        e.g. {"model": "tiny", "prompt": "a", "n": 65}
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hypothesis
import schemathesis
from schemathesis.specs.openapi import checks
from served import end_by_sigterm, serve, tiny_engine

ANSWER_S = 60.0
MOST_EVENTS = 100_000  # of a stream; schemathesis hangs up after 100 otherwise, and the stream looks cut
MOST_TOKENS, MOST_CHOICES, MOST_PARTICLES, MOST_DRAFTED, VOCABULARY = 6, 3, 4, 3, 256
SMALL = {
    "max_tokens": MOST_TOKENS,
    "max_completion_tokens": MOST_TOKENS,
    "n": MOST_CHOICES,
    "num_particles": MOST_PARTICLES,
    "num_draft_tokens": MOST_DRAFTED,
}
# What "served" requests keep of the values that the schema allows: all but what this engine must refuse.
SERVED = {
    *("model", "prompt", "messages", "n", "seed", "stop", "stream", "stream_options", "echo", "user", "metadata"),
    *("mode", "max_tokens", "max_completion_tokens", "num_particles", "num_draft_tokens", "truncate_rounds"),
    *("resampling", "select", "ignore_eos", "cache_prompt", "temperature", "top_p", "ess_threshold", "priority"),
    *("top_k", "min_p", "resample_power", "draft_temperature", "power_alpha", "timeout_ms"),
}
SHARES = {"ess_threshold", "min_p", "resample_power", "power_alpha", "draft_temperature"}
KINDS = {
    "valid": schemathesis.GenerationMode.POSITIVE,
    "invalid": schemathesis.GenerationMode.NEGATIVE,
    "served": schemathesis.GenerationMode.POSITIVE,
}
# Methods that the schema leaves out and values that it allows and this engine refuses are none of these checks' business.
CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.response_headers_conformance,
    checks.negative_data_rejection,
]


class WrongAnswerError(AssertionError):
    """An answer that no request may get."""


def tame(body: Any, model: str) -> None:
    """Let a request reach the executor and end soon: the served model's name, and few tokens, in place."""
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        body["model"] = model
    for name, most in SMALL.items():
        value = body.get(name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value % 1:
            continue
        if value > most and (name != "n" or value <= 64):
            body[name] = 1 + value % most
    if "messages" in body:
        body.setdefault("max_tokens", MOST_TOKENS)


def narrow(body: dict[str, Any]) -> None:
    """Change what the schema allows into what this engine serves, in place: most of these requests get tokens."""
    for name in body.keys() - SERVED:
        del body[name]
    for name in SHARES & body.keys():
        if body[name] is not None:
            body[name] = 0.05 + abs(body[name]) % 0.9
    for name in ("num_particles", "num_draft_tokens"):
        if body.get(name) is not None:
            body[name] = max(body[name], 1)
    for name, most in (("top_k", 300), ("priority", 3), ("timeout_ms", 60_000)):
        if body.get(name) is not None:
            body[name] = 1 + body[name] % most
    if "prompt" in body:
        body["prompt"] = _in_vocabulary(body["prompt"]) or "hi"
        body["echo"] = bool(body.get("echo")) and isinstance(body["prompt"], str)
    if "messages" in body:
        texts = [(message["role"][:20], str(message.get("content"))[:100]) for message in body["messages"][:2]]
        body["messages"] = [{"role": role, "content": content} for role, content in texts]
    if isinstance(body.get("stop"), list):
        body["stop"] = [word for word in body["stop"] if word][:4]


def _in_vocabulary(prompt: Any) -> Any:
    if isinstance(prompt, list):
        return [_in_vocabulary(part) or "hi" if not isinstance(part, int) else part % VOCABULARY for part in prompt][:8]
    return prompt[:200]


def check(case: Any, response: Any) -> None:
    """Everything that an answer must be.

    Raises:
        WrongAnswerError, or schemathesis' own failures.
    """
    own_deadline = isinstance(case.body, dict) and case.body.get("timeout_ms") is not None
    if response.status_code >= 500 and not (own_deadline and response.status_code == 504):
        raise WrongAnswerError(f"status {response.status_code}: {response.text[:300]}")
    if "report this" in response.text:
        raise WrongAnswerError(f"an error that nobody thought of: {response.text[:300]}")
    if "text/event-stream" in response.headers.get("content-type", [""])[0]:
        last = response.text.rstrip().rpartition("data: ")[2]
        if last != "[DONE]" and "error" not in json.loads(last):
            raise WrongAnswerError(f"a stream ended with {last[:300]}")
        return
    case.validate_response(response, checks=CHECKS)


def fuzz(address: str, model: str, cases: int, seed: int) -> dict[str, Any]:
    """Ask every endpoint with requests that fit the schema, that do not, and that fit the engine too.

    Args:
        address: http://host:port of the front. cases: of all endpoints together.
    Returns:
        the report: cases and statuses by endpoint and kind, and findings.
    """
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    schema.config.max_stream_events = MOST_EVENTS
    operations = [result.ok() for result in schema.get_all_operations()]
    posts = sum(operation.method == "post" for operation in operations)
    rows, findings, began = {}, [], time.monotonic()
    for operation in operations:
        kinds, each = (KINDS, cases // (len(KINDS) * posts)) if operation.method == "post" else (("valid",), 20)
        for kind in kinds:
            statuses, found = _fuzz_one(operation, kind, model, max(each, 1), seed)
            rows[f"{operation.label} {kind}"] = dict(sorted(statuses.items()))
            findings += found
    total = sum(sum(row.values()) for row in rows.values())
    seconds = round(time.monotonic() - began, 1)
    return {"cases": total, "findings": findings, "statuses": rows, "seconds": seconds, "seed": seed}


def _fuzz_one(operation: Any, kind: str, model: str, cases: int, seed: int) -> tuple[Counter[str], list[str]]:
    statuses: Counter[str] = Counter()
    findings: list[str] = []

    @hypothesis.seed(f"{seed} {kind}")
    @hypothesis.settings(
        max_examples=cases, deadline=None, database=None, suppress_health_check=[*hypothesis.HealthCheck]
    )
    @hypothesis.given(operation.as_strategy(generation_mode=KINDS[kind]))
    def ask(case: Any) -> None:
        tame(case.body, model)
        if kind == "served":
            narrow(case.body)
        try:
            response = case.call(timeout=ANSWER_S)
            statuses[str(response.status_code)] += 1
            check(case, response)
        except (Exception, BaseExceptionGroup) as error:  # whatever it is, it is what this script looks for
            about = f"{operation.label} {kind}: {type(error).__name__}: {str(error)[:1500]}"
            findings.append(f"{about}\n    sent {case.body!r:.1500}")

    ask()
    return statuses, findings


def main() -> int:
    """Serve a tiny engine, ask, print a table, write JSON."""
    parser = argparse.ArgumentParser(description="Fuzz the OpenAI front over HTTP.")
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    end_by_sigterm()
    with tempfile.TemporaryDirectory() as folder:
        engine = tiny_engine(Path(folder) / "model")
        with serve(engine) as service:
            report = fuzz(service.url("openai"), service.model, options.cases, options.seed)
            service.wait(service.idle, ANSWER_S, "no page is held")
            if "Traceback" in service.log:
                report["findings"].append(service.log[service.log.index("Traceback") :][:3000])
            report |= {"restarts": "restart" in service.log, "schemathesis": version("schemathesis")}
    for name, statuses in report["statuses"].items():
        print(f"{name:<36}", "  ".join(f"{status}: {count}" for status, count in statuses.items()))
    print(*report["findings"], sep="\n")
    print(f"{report['cases']} cases in {report['seconds']} s, {len(report['findings'])} findings")
    if options.output is not None:
        options.output.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if report["findings"] or report["restarts"] else 0


if __name__ == "__main__":
    sys.exit(main())
