"""From what a user gives to what the executor takes: prompts, chat messages and JSONL lines.

A JSONL line is one request; any sampling parameter may stand beside the prompt and overrides the command line's:
    {"prompt": "Hello", "max_tokens": 8}   {"messages": [{"role": "user", "content": "Hi"}], "id": "a"}
    {"prompt_token_ids": [1, 2, 3], "mode": "target"}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smc_engines.sampling_params import SamplingParams
from smc_engines.text import Tokenizer
from smc_plugin.errors import ConfigError, RequestError

_PROMPT_KEYS = ("prompt", "messages", "prompt_token_ids")


@dataclass(frozen=True)
class PromptBuilder:
    """Turns text or messages into token ids.

    Args:
        tokenizer: the engine's, or None.
        chat: apply the chat template to a plain prompt; None does so when the tokenizer has one.
        system: system message to begin with, or None.
    """

    tokenizer: Tokenizer | None
    chat: bool | None = None
    system: str | None = None

    @property
    def uses_template(self) -> bool:
        """Whether a plain prompt goes through the chat template."""
        available = self.tokenizer is not None and self.tokenizer.has_chat_template
        return available if self.chat is None and self.system is None else self.chat is not False

    def from_text(self, prompt: str) -> list[int]:
        """Tokenize a prompt, as the user's message where the chat template applies.

        Raises:
            RequestError: the prompt is empty, no tokenizer, or a chat template was asked for and there is none.
        """
        if not prompt:
            raise RequestError("the prompt is empty, expected some text: pass some")
        if self.uses_template:
            return self.from_messages([{"role": "user", "content": prompt}])
        return self._need_tokenizer().encode(prompt)

    def from_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Tokenize a chat.

        Raises:
            RequestError: no tokenizer or template, malformed messages, or a second system message.
        """
        tokenizer = self._need_tokenizer()
        if self.system is not None and isinstance(messages, (list, tuple)):
            first = messages[0] if messages else None
            if isinstance(first, Mapping) and first.get("role") == "system":
                raise RequestError("expected one system message, got --system and one in the messages: drop one")
            messages = [{"role": "system", "content": self.system}, *messages]
        return tokenizer.apply_chat_template(messages)[1]

    def from_line(
        self, number: int, line: str, defaults: Mapping[str, Any]
    ) -> tuple[Any, Sequence[int], SamplingParams]:
        """Read one JSONL line.

        Args:
            number: line number from 1, the id of a line that names none.
            line: JSON text.
            defaults: sampling parameters of the command line.
        Returns:
            id, prompt token ids and parameters.
        Raises:
            RequestError: no JSON object, not exactly one prompt, an unknown name or a bad value.
        """
        request = parse_object(line)
        name = request.pop("id", number)
        given = [key for key in _PROMPT_KEYS if key in request]
        if len(given) != 1:
            raise RequestError(
                f"expected exactly one of {', '.join(_PROMPT_KEYS)}, got {' and '.join(given) or 'none'}: correct the line"
            )
        prompt = request.pop(given[0])
        params = SamplingParams.from_mapping({**defaults, **request})
        if given[0] == "messages":
            return name, self.from_messages(prompt), params
        if given[0] == "prompt":
            if not isinstance(prompt, str):
                raise RequestError(f"prompt must be a string, got {prompt!r:.60}: correct the line")
            return name, self.from_text(prompt), params
        if not isinstance(prompt, list):
            raise RequestError(f"prompt_token_ids must be a list of numbers, got {prompt!r:.60}: correct the line")
        return name, prompt, params

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(
                "the engine directory has no tokenizer, got text: pass token ids (--prompt-ids, prompt_token_ids)"
            )
        return self.tokenizer


def parse_object(line: str) -> dict[str, Any]:
    """Parse a line that must hold one JSON object; raises RequestError."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        # Its own "line 1" would be taken for the file's.
        found = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise RequestError(f"the line is not JSON, expected one object, got {found}: correct it") from None
    if not isinstance(value, dict):
        raise RequestError(f"the line holds a {type(value).__name__}, expected a JSON object: correct it")
    return value


def read_messages(path: Path) -> Any:
    """Read a JSON file of chat messages; their shape is checked with the template. Raises ConfigError."""
    text = _read_text("--messages", path, "a JSON list of chat messages")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--messages {path} is not JSON, expected a list, got {error}: correct it") from None


def read_lines(path: Path) -> list[str]:
    """Read a JSONL file's lines, which are not parsed yet. Raises ConfigError."""
    # Not splitlines: it cuts at characters that JSON allows inside a string, such as U+2028.
    return _read_text("--input", path, "a JSONL file, one request a line").split("\n")


def _read_text(option: str, path: Path, expected: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{option} {path} is missing, expected {expected}: correct the path or write it") from None
    except IsADirectoryError:
        raise ConfigError(f"{option} {path} is a folder, expected {expected}: name a file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{option} {path} is not UTF-8, expected text, got {error}: save it as UTF-8") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"{option} {path} cannot be read ({reason}), expected {expected}: check its permissions and the disk"
        ) from None
