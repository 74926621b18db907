"""Requests of the OpenAI-compatible front: what is honoured, what is refused, and the served model's inputs.

What the API knows and this project does not serve is accepted only at the value that changes nothing (presence_penalty 0),
and refused otherwise: a request never gets less than it asked for in silence. The project's own parameters
(num_particles, mode, ...) are accepted beside the API's; the openai package sends them with extra_body.

    {"model": "m", "prompt": "Hi", "max_tokens": 4, "stop": "."} asks model smc for text_input "Hi", max_tokens 4 and
    stop_words ["."]
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

DEFAULT_COMPLETION_TOKENS = 16


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]  # JSON knows one kind of number: 8.0 is as whole as 8


class FrontError(Exception):
    """A request that the front itself refuses.

    Args:
        message: what failed, expected against got, what to do.
        status: HTTP status; param: the parameter at fault.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.message, self.status, self.param = message, status, param


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="allow", strict=True)
    include_usage: bool = False


class _Request(BaseModel):
    """What both endpoints share. Types are strict, as the schema says them: false is no number, "4" neither."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: Whole | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    n: Whole = Field(1, ge=1, le=64)
    seed: Whole | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # for the provider's own records; nothing here depends on them
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # known to the API, served only at these values
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # the project's own
    mode: Literal["smc", "target", "speculative"] | None = None
    num_particles: Whole | None = None
    num_draft_tokens: Whole | None = None
    ess_threshold: float | None = None
    adapt_draft_tokens: float | None = None
    truncate_rounds: bool | None = None
    resampling: Literal["systematic", "stratified", "residual"] | None = None
    resample_power: float | None = None
    exact_below: float | None = None
    fallback_below: float | None = None
    draft_temperature: float | None = None
    power_alpha: float | None = None
    select: Literal["sample", "argmax"] | None = None
    top_k: Whole | None = None
    min_p: float | None = None
    min_tokens: Whole | None = None
    ignore_eos: bool | None = None
    cache_prompt: bool | None = None
    priority: Whole | None = None
    timeout_ms: Whole | None = None

    def check(self) -> None:
        """Refuse what is not served.

        Raises:
            FrontError: the message names the parameter.
        """
        for name, neutral in self.neutral().items():
            value = getattr(self, name)
            if value not in (None, *neutral):
                raise FrontError(f"{name} is not served, expected it left out, got {value!r}: drop it", param=name)

    def neutral(self) -> dict[str, tuple[Any, ...]]:
        """Parameters that are not served, with the values that change nothing."""
        return {"presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},)}

    def inputs(self) -> dict[str, Any]:
        """The served model's inputs, without the prompt."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _PASSED}
        values["stop_words"] = [self.stop] if isinstance(self.stop, str) else self.stop
        values["seed"] = None if self.seed is None else self.seed % 2**64
        values = {name: value for name, value in values.items() if value not in (None, [])}
        return {**values, "stream": self.stream, "n": self.n, "return_log_probs": self.wants_logprobs}

    @property
    def wants_logprobs(self) -> bool:
        """Whether the log-probabilities of the chosen tokens are asked for."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage


_PASSED = (
    "max_tokens",
    "temperature",
    "top_p",
    "mode",
    "num_particles",
    "num_draft_tokens",
    "ess_threshold",
    "adapt_draft_tokens",
    "truncate_rounds",
    "resampling",
    "resample_power",
    "exact_below",
    "fallback_below",
    "draft_temperature",
    "power_alpha",
    "select",
    "top_k",
    "min_p",
    "min_tokens",
    "ignore_eos",
    "cache_prompt",
    "priority",
    "timeout_ms",
)


class CompletionRequest(_Request):
    """Body of /v1/completions."""

    prompt: str | list[str] | list[Whole] | list[list[Whole]]
    echo: bool = False
    logprobs: Whole | None = None
    best_of: Whole | None = None
    suffix: str | None = None

    def neutral(self) -> dict[str, tuple[Any, ...]]:
        """See _Request; alternatives to the chosen token are not known, so logprobs must be 0."""
        return {**super().neutral(), "best_of": (1, self.n), "suffix": ("",), "logprobs": (0,)}

    @property
    def wants_logprobs(self) -> bool:
        """logprobs=0 asks for the chosen tokens'."""
        return self.logprobs is not None

    def inputs(self) -> dict[str, Any]:
        """See _Request; the API's own default length is 16 tokens."""
        return {"max_tokens": DEFAULT_COMPLETION_TOKENS, **super().inputs()}

    def prompts(self) -> list[dict[str, Any]]:
        """Each prompt as an input of the served model."""
        given = self.prompt
        if isinstance(given, str):
            given = [given]
        elif given and isinstance(given[0], int):
            given = [given]  # type: ignore[list-item]
        if not given:
            raise FrontError("prompt is empty, expected at least one: send some text", param="prompt")
        if self.echo and not all(isinstance(prompt, str) for prompt in given):
            raise FrontError("echo is served for text prompts, got token ids: drop echo", param="echo")
        return [{"text_input": prompt} if isinstance(prompt, str) else {"input_ids": prompt} for prompt in given]


class Message(BaseModel):
    """One chat message; content in parts must be text."""

    model_config = ConfigDict(extra="allow")
    role: str
    content: str | list[dict[str, Any]] | None = None

    @property
    def calls_tools(self) -> bool:
        """Whether it asks for a tool or is a tool's answer; no chat template here is told of either."""
        extra = self.model_extra or {}
        return any(extra.get(name) for name in ("tool_calls", "function_call", "tool_call_id"))

    def plain(self) -> dict[str, str]:
        """Role and text."""
        if not isinstance(self.content, list):
            return {"role": self.role, "content": self.content or ""}
        if any(part.get("type") != "text" or not isinstance(part.get("text", ""), str) for part in self.content):
            raise FrontError("message content must be text, got another part: send text only", param="messages")
        return {"role": self.role, "content": "".join(part.get("text", "") for part in self.content)}


class ChatRequest(_Request):
    """Body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: Whole | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Whole | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    modalities: list[str] | None = None
    service_tier: str | None = None
    store: bool | None = None

    def neutral(self) -> dict[str, tuple[Any, ...]]:
        """See _Request."""
        return {
            **super().neutral(),
            "tools": ([],),
            "tool_choice": ("none", "auto"),
            "parallel_tool_calls": (True, False),
            "response_format": ({"type": "text"},),
            "top_logprobs": (0,),
            "modalities": (["text"],),
            "service_tier": ("auto", "default"),
            "store": (False,),
        }

    @property
    def wants_logprobs(self) -> bool:
        """logprobs=true asks for the chosen tokens'."""
        return bool(self.logprobs)

    def inputs(self) -> dict[str, Any]:
        """See _Request."""
        values = super().inputs()
        if self.max_completion_tokens is not None:
            values["max_tokens"] = self.max_completion_tokens
        return values

    def check(self) -> None:
        """See _Request; two unlike limits would leave one of them unheard."""
        super().check()
        if self.max_completion_tokens is not None and self.max_tokens not in (None, self.max_completion_tokens):
            raise FrontError(
                f"max_tokens and max_completion_tokens mean the same, got {self.max_tokens} and "
                f"{self.max_completion_tokens}: drop one of them",
                param="max_completion_tokens",
            )
        if any(message.calls_tools for message in self.messages):
            raise FrontError("messages with tool calls are not served, expected text: leave them out", param="messages")

    def prompts(self) -> list[dict[str, Any]]:
        """The conversation; the executor applies the engine's chat template."""
        return [{"messages": json.dumps([message.plain() for message in self.messages])}]
