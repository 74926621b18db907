"""Answers to tensors: what the executor said, in the shapes a model's contract promises.

One streamed piece has shape [1, 1]; an answer that is not streamed has [batch, sequences]. Ragged rows are padded: token
ids with pad_id, log-probabilities and ESS with 0, strings with "". A dead particle's log weight, minus infinity, is sent
as the lowest float64, because JSON (the HTTP endpoint) has no infinity.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from smc_adapter.contracts import Contract, Parsed, SubRequest

LOWEST = float(np.finfo(np.float64).min)


@dataclass
class Answer:
    """One sub-request's answer so far.

    Args:
        ids, text: everything so far.
        finish: the finish reason, None while it runs.
        info: the executor's figures, set with the last output.
    """

    sub: SubRequest
    arrival_ns: int = field(default_factory=time.time_ns)
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    info: dict[str, Any] = field(default_factory=dict)

    def add(self, message: dict[str, Any]) -> Piece:
        """Take an output of the executor; returns what is new."""
        self.ids += message["ids"]
        self.text += message["text"]
        self.finish = message.get("finish")
        self.info = message.get("info") or {}
        return Piece(self, message["ids"], message["text"])


@dataclass(frozen=True)
class Piece:
    """Part of an answer that goes out together, or all of it."""

    answer: Answer
    ids: list[int]
    text: str


def streamed(contract: Contract, parsed: Parsed, piece: Piece, page_size: int) -> dict[str, np.ndarray]:
    """Tensors of one streamed response.

    Args:
        page_size: tokens of a KV page, for the number of reused blocks.
    """
    return _tensors(contract, parsed, [[piece]], page_size)


def whole(contract: Contract, parsed: Parsed, answers: Sequence[Answer], page_size: int) -> dict[str, np.ndarray]:
    """Tensors of the one response of a request that is not streamed."""
    pieces = [Piece(answer, _echoed(parsed, answer, answer.ids), answer.text) for answer in answers]
    if parsed.echo_prompt and contract.answer == "text_output":
        pieces = [Piece(piece.answer, piece.ids, piece.answer.sub.echo + piece.text) for piece in pieces]
    if contract.answer == "text_output":
        pieces = [Piece(piece.answer, piece.answer.ids, piece.text) for piece in pieces]
    width = parsed.num_sequences
    rows = [pieces[start : start + width] for start in range(0, len(pieces), width)]
    return _tensors(contract, parsed, rows, page_size)


def _echoed(parsed: Parsed, answer: Answer, ids: list[int]) -> list[int]:
    return [*answer.sub.echo, *ids] if parsed.echo_prompt and isinstance(answer.sub.echo, list) else ids


def _tensors(contract: Contract, parsed: Parsed, rows: list[list[Piece]], page_size: int) -> dict[str, np.ndarray]:
    """What the client asked for and the contract promises: every tensor has its price on the way to the client."""
    names = parsed.outputs or {output.name for output in contract.outputs}
    tensors = {}
    if "batch_index" in names:
        tensors["batch_index"] = np.array([[row[0].answer.sub.batch_index] for row in rows], np.int32)
    if "sequence_index" in names:
        tensors["sequence_index"] = np.array(
            [[piece.answer.sub.sequence_index for piece in row] for row in rows], np.int32
        )
    if "text_output" in names:
        tensors["text_output"] = np.array([[piece.text.encode() for piece in row] for row in rows], object)
    if "output_ids" in names:
        tensors["output_ids"] = _ragged(rows, lambda piece: piece.ids, np.int32, parsed.pad_id)
    if "sequence_length" in names:
        tensors["sequence_length"] = np.array([[len(piece.ids) for piece in row] for row in rows], np.int32)
    if all(piece.answer.finish is not None for row in rows for piece in row):
        for name in parsed.wants & names:
            if (tensor := _figure(name, rows, page_size)) is not None:
                tensors[name] = tensor
    return tensors


def _ragged(rows: list[list[Piece]], read: Callable[[Piece], Sequence[Any]], dtype: Any, fill: Any) -> np.ndarray:
    values = [[list(read(piece)) for piece in row] for row in rows]
    width = max((len(value) for row in values for value in row), default=0)
    padded = [[value + [fill] * (width - len(value)) for value in row] for row in values]
    return np.array(padded, dtype).reshape(len(rows), len(rows[0]), width)


def _each(rows: list[list[Piece]], read: Callable[[Answer], Any], dtype: Any) -> np.ndarray:
    return np.array([[read(piece.answer) for piece in row] for row in rows], dtype)


def _info(name: str) -> Callable[[Answer], Any]:
    return lambda answer: answer.info.get(name, 0)


def _moment(name: str) -> Callable[[Answer], int]:
    return lambda answer: answer.arrival_ns + int(1e6 * answer.info.get(name, 0.0))


_FIGURES: dict[str, tuple[Callable[[Answer], Any], Any]] = {
    "finish_reason": (lambda answer: (answer.finish or "").encode(), object),
    "stop_reason": (lambda answer: str(answer.info.get("stop_reason", "")).encode(), object),
    "cum_log_probs": (lambda answer: sum(answer.info.get("token_logprobs", ())), np.float32),
    "cumulative_logprob": (lambda answer: sum(answer.info.get("token_logprobs", ())), np.float32),
    "num_output_tokens": (_info("output_tokens"), np.int32),
    "num_cached_tokens": (_info("cached_tokens"), np.int32),
    "log_evidence": (_info("log_evidence"), np.float64),
    "log_evidence_sd": (_info("log_evidence_sd"), np.float64),
    "final_ess": (_info("final_ess"), np.float64),
    "fell_back": (_info("fell_back"), np.bool_),
    "discarded_rounds": (_info("discarded_rounds"), np.int32),
    "rounds": (_info("rounds"), np.int32),
    "resamples": (_info("resamples"), np.int32),
    "recoveries": (_info("recoveries"), np.int32),
    "seed": (_info("seed"), np.uint64),
    "arrival_time_ns": (lambda answer: answer.arrival_ns, np.int64),
    "first_scheduled_time_ns": (_moment("queue_ms"), np.int64),
    "first_token_time_ns": (_moment("first_token_ms"), np.int64),
    "last_token_time_ns": (_moment("total_ms"), np.int64),
}
_FIRST_OF_ROW = ("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns")


_RAGGED: dict[str, tuple[Callable[[Piece], Sequence[Any]], Any, Any]] = {
    "output_log_probs": (lambda piece: piece.answer.info.get("token_logprobs", ()), np.float32, 0.0),
    "output_tokens": (
        lambda piece: [bytes.fromhex(token) for token in piece.answer.info.get("token_bytes", ())],
        object,
        b"",
    ),
    "ess": (lambda piece: piece.answer.info.get("ess", ()), np.float32, 0.0),
    "particles": (lambda piece: [particle["text"].encode() for particle in _particles(piece)], object, b""),
    "particle_log_weights": (
        lambda piece: [max(particle["log_weight"], LOWEST) for particle in _particles(piece)],
        np.float64,
        LOWEST,
    ),
}


def _figure(name: str, rows: list[list[Piece]], page_size: int) -> np.ndarray | None:
    """One optional output, or None where it has no meaning."""
    firsts = [row[:1] for row in rows]
    if name == "num_input_tokens":
        tensor = _each(firsts, _info("prompt_tokens"), np.int32)
    elif name in _FIGURES:
        tensor = _each(firsts if name in _FIRST_OF_ROW else rows, *_FIGURES[name])
    elif name == "kv_cache_reused_blocks":
        tensor = _each(rows, lambda answer: answer.info.get("cached_tokens", 0) // page_size, np.int32)
    elif name in _RAGGED:
        tensor = _ragged(rows, *_RAGGED[name])
    else:
        tensor = _acceptance(name, rows)
    return tensor


def _particles(piece: Piece) -> list[dict[str, Any]]:
    return piece.answer.info.get("particles", [])


def _acceptance(name: str, rows: list[list[Piece]]) -> np.ndarray | None:
    """Acceptance has a meaning only where draft tokens can be rejected: in mode speculative."""
    if any(piece.answer.info.get("mode") != "speculative" for row in rows for piece in row):
        return None
    drafted = _each(rows, lambda answer: answer.info["rounds"] * answer.info["num_draft_tokens"], np.int32)
    accepted = _each(rows, _info("accepted_tokens"), np.int32)
    if name == "total_draft_tokens":
        return drafted
    return accepted if name == "total_accepted_draft_tokens" else (accepted / np.maximum(drafted, 1)).astype(np.float32)
