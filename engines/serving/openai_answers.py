"""Answers of the OpenAI-compatible front: the served model's tensors as the API's objects, whole or in chunks.

The API has no place for SMC's own figures; the last object of a choice carries them under "smc":

    {"log_evidence": -9.35, "log_evidence_sd": 0.8, "final_ess": 1.9, "fell_back": false, "ess_mean": 2.1, "rounds": 4,
     "resamples": 2, "recoveries": 0, "seed": 7}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel

from smc_engines.serving.openai_schema import CompletionRequest

_FINISH = {"stop": "stop", "length": "length"}


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Whole(BaseModel):
    """What both endpoints answer to a request that is not streamed, for /openapi.json."""

    id: str
    created: int
    model: str
    usage: Usage


class Choice(BaseModel):
    """One answer of several; smc has the figures above."""

    index: int
    finish_reason: Literal["stop", "length"] | None
    logprobs: dict[str, Any] | None
    smc: dict[str, Any]


class TextChoice(Choice):
    """A choice of /v1/completions."""

    text: str


class WholeCompletion(Whole):
    """Answer of /v1/completions."""

    object: Literal["text_completion"]
    choices: list[TextChoice]


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"]
    content: str


class ChatChoice(Choice):
    """A choice of /v1/chat/completions."""

    message: AnswerMessage


class WholeChat(Whole):
    """Answer of /v1/chat/completions."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class ErrorDetail(BaseModel):
    """What went wrong: message, kind, and the parameter at fault."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Body of every answer that is not 200."""

    error: ErrorDetail


@dataclass
class Answer:
    """One choice so far.

    Args:
        index: of the choice.
        final: the last piece's tensors.
    """

    index: int
    text: str = ""
    pieces: int = 0
    final: dict[str, Any] = field(default_factory=dict)

    def add(self, tensors: dict[str, Any]) -> str:
        """Take a piece; returns its text."""
        new = tensors["text_output"].decode()
        self.text += new
        self.pieces += 1
        if "finish_reason" in tensors:
            self.final = tensors
        return new

    @property
    def finish_reason(self) -> str | None:
        """stop or length; an answer that was cut short by a shutdown counts as length."""
        return _FINISH.get(self.final["finish_reason"].decode(), "length") if self.final else None

    @property
    def tokens(self) -> list[tuple[str, list[int], float]]:
        """Text, bytes and log-probability of each token, where they were asked for."""
        if "output_tokens" not in self.final:
            return []
        pairs = zip(self.final["output_tokens"], self.final["output_log_probs"], strict=True)
        return [(token.decode(errors="replace"), list(token), float(value)) for token, value in pairs]

    @property
    def smc(self) -> dict[str, Any]:
        """SMC's figures; empty before the end."""
        if not self.final:
            return {}
        ess = [float(value) for value in self.final["ess"]]
        return {
            "log_evidence": float(self.final["log_evidence"]),
            "log_evidence_sd": float(self.final["log_evidence_sd"]),
            "final_ess": float(self.final["final_ess"]),
            "fell_back": bool(self.final["fell_back"]),
            "ess_mean": sum(ess) / len(ess) if ess else 0.0,
            **{name: int(self.final[name]) for name in ("rounds", "resamples", "recoveries", "seed")},
        }


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    """Tokens of a request; a prompt with several choices counts once."""
    prompt = sum(int(a.final["num_input_tokens"]) for a in answers if a.final and a.final["sequence_index"] == 0)
    completion = sum(int(a.final["num_output_tokens"]) for a in answers if a.final)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class Format:
    """How one endpoint writes its answers.

    Args:
        prefix: of response ids. whole_object, chunk_object: the API's names of its objects.
    """

    def __init__(self, prefix: str, whole_object: str, chunk_object: str) -> None:
        self.prefix, self._whole_object, self._chunk_object = prefix, whole_object, chunk_object

    def whole(self, head: dict[str, Any], answers: Sequence[Answer]) -> dict[str, Any]:
        """The one object of a request that is not streamed."""
        choices = [{**self._choice(answer), "index": answer.index, **self._end(answer)} for answer in answers]
        return {**head, "object": self._whole_object, "choices": choices, "usage": usage(answers)}

    def chunks(self, head: dict[str, Any], answer: Answer, new: str) -> Iterator[dict[str, Any]]:
        """The objects of one streamed piece."""
        ended = bool(answer.final)
        end = self._end(answer) if ended else {"finish_reason": None, "logprobs": None}
        choice = {**self._delta(answer, new), "index": answer.index, **end}
        yield {**head, "object": self._chunk_object, "choices": [choice]}

    def usage_chunk(self, head: dict[str, Any], answers: Sequence[Answer]) -> dict[str, Any]:
        """The object that ends a stream with its usage."""
        return {**head, "object": self._chunk_object, "choices": [], "usage": usage(answers)}

    def _end(self, answer: Answer) -> dict[str, Any]:
        logprobs = self._logprobs(answer) if answer.tokens else None
        return {"finish_reason": answer.finish_reason, "logprobs": logprobs, "smc": answer.smc}

    def _choice(self, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, answer: Answer, new: str) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, answer: Answer) -> dict[str, Any]:
        raise NotImplementedError


class _Completion(Format):
    def __init__(self, echoes: Sequence[str], n: int) -> None:
        super().__init__("cmpl", "text_completion", "text_completion")
        self._echoes, self._n = echoes, n

    def _echo(self, answer: Answer) -> str:
        return self._echoes[answer.index // self._n] if self._echoes else ""

    def _choice(self, answer: Answer) -> dict[str, Any]:
        return {"text": self._echo(answer) + answer.text}

    def _delta(self, answer: Answer, new: str) -> dict[str, Any]:
        return {"text": (self._echo(answer) if answer.pieces == 1 else "") + new}

    def _logprobs(self, answer: Answer) -> dict[str, Any]:
        texts = [text for text, _, _ in answer.tokens]
        offsets = [len(self._echo(answer)) + sum(map(len, texts[:count])) for count in range(len(texts))]
        values = [value for _, _, value in answer.tokens]
        return {"tokens": texts, "token_logprobs": values, "top_logprobs": None, "text_offset": offsets}


class _Chat(Format):
    def __init__(self) -> None:
        super().__init__("chatcmpl", "chat.completion", "chat.completion.chunk")

    def _choice(self, answer: Answer) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": answer.text}}

    def _delta(self, answer: Answer, new: str) -> dict[str, Any]:
        return {"delta": {**({"role": "assistant"} if answer.pieces == 1 else {}), "content": new}}

    def _logprobs(self, answer: Answer) -> dict[str, Any]:
        entries = [
            {"token": text, "bytes": data, "logprob": value, "top_logprobs": []} for text, data, value in answer.tokens
        ]
        return {"content": entries}


def completion_format(body: CompletionRequest) -> Format:
    """Objects of /v1/completions."""
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    echoes = [prompt for prompt in prompts if isinstance(prompt, str)] if body.echo else []
    return _Completion(echoes, body.n)


def chat_format() -> Format:
    """Objects of /v1/chat/completions."""
    return _Chat()
