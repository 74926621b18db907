"""Chat messages to the text a chat model was trained on.

Owns the rendering of a checkpoint's Jinja chat template. The template comes with the checkpoint and is therefore run in
a sandbox, with the few helpers that templates on the Hub rely on.

    render("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", [{"role": "user", "content": "Hi"}], {})
    is "<user>Hi"
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

from smc_plugin.errors import CheckpointError, RequestError


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool = True,
) -> str:
    """Render messages with a chat template.

    Args:
        template: Jinja source.
        messages: each with at least `role` and `content`.
        variables: further names the template may use, such as bos_token.
        add_generation_prompt: end with the opening of the model's turn.
    Returns:
        The prompt; special tokens are part of it.
    Raises:
        RequestError: the messages are malformed, or the template refuses them.
        CheckpointError: the template itself is broken.
    """
    check_messages(messages)
    try:
        compiled = _compile(template)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(
            f"the chat template does not parse, expected Jinja, got {error}: correct the checkpoint's template, or "
            "send a plain prompt"
        ) from None
    try:
        return compiled.render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
    except Exception as error:  # the template is a program of somebody else's, and may raise anything
        raise RequestError(
            f"the chat template refuses the messages, expected what the model was trained on, got {error}: change the "
            "roles or their order, or send a plain prompt"
        ) from None


def check_messages(messages: object) -> None:
    """Raise RequestError unless `messages` is a non-empty list of {"role": str, "content": ...}."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError(f"messages must be a non-empty list, got {messages!r:.80}: pass at least one message")
    for number, message in enumerate(messages):
        if (
            not isinstance(message, Mapping)
            or not isinstance(message.get("role"), str)
            or not isinstance(message.get("content"), (str, list))
        ):
            raise RequestError(
                f'message {number} must be an object like {{"role": "user", "content": "..."}}, got {message!r:.80}: '
                "correct it"
            )


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _to_json(value: object, indent: int | None = None) -> str:
    # Jinja's own filter escapes for HTML, which a prompt must not
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


class _GenerationBlock(jinja2.ext.Extension):
    """{% generation %} marks the model's turns for training; when rendering a prompt it is only its body."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
