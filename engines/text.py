"""Text in and out: prompts to token ids, token ids to text, all at once or as they settle.

Owns the tokenizer of a checkpoint or engine directory. A folder with tokenizer.json needs only the tokenizers library
(0.2 s to load); any other goes through transformers (seconds). No code that comes with a checkpoint is run.

    "café" in a byte-level vocabulary may be the tokens b"caf", b"\\xc3", b"\\xa9". A Detokenizer that is given them
    one at a time says "caf", "", "é": never half a character.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as BackendTokenizer

from smc_build.checkpoint import read_small, safe_file
from smc_build.tokenizer_files import tokenizer_files
from smc_engines import chat_template
from smc_engines.token_bytes import Vocabulary, read_vocabulary
from smc_plugin.errors import CheckpointError, RequestError

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """One checkpoint's tokenizer, with its chat template and end tokens.

    Args:
        backend: of the tokenizers library.
        config: the contents of tokenizer_config.json.
        template: the Jinja chat template, or None.
        eos_token_ids: the model's own end tokens.
    """

    def __init__(
        self,
        backend: BackendTokenizer,
        config: Mapping[str, Any] | None = None,
        template: str | None = None,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        self._backend = backend
        self._config = dict(config or {})
        self._padded: dict[int, list[bytes]] = {}
        self.template = template
        self.eos_token_ids = eos_token_ids
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        backend.no_padding()
        backend.no_truncation()

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Load the tokenizer files of a folder.

        Args:
            folder: a Hugging Face folder, or the tokenizer folder of an engine directory.
        Returns:
            The tokenizer. Its end tokens come from generation_config.json, config.json and tokenizer_config.json.
        Raises:
            CheckpointError: the folder has no tokenizer, or one that is damaged, too large or outside.
        """
        folder = Path(folder)
        tokenizer_files(folder)  # their sizes and places
        config = _read_json(folder / "tokenizer_config.json")
        for name, token in config.items():
            if name in SPECIAL_TOKENS and token is not None:
                _check_text(folder, name, token.get("content") if isinstance(token, dict) else token)
        template = _read_template(folder, config)
        if (folder / "tokenizer.json").is_file():
            try:
                backend = BackendTokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # the library raises no narrower type
                raise CheckpointError(
                    f"cannot read {folder / 'tokenizer.json'}, expected a tokenizers file, got {error}: fetch it again"
                ) from None
        else:
            backend = _convert(folder)
        return cls(backend, config, template, _eos_token_ids(folder, config, backend))

    @property
    def has_chat_template(self) -> bool:
        """Whether apply_chat_template can work."""
        return self.template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Turn text into token ids.

        Args:
            text: any text; special tokens written out in it become their ids.
            add_special_tokens: add what the tokenizer itself adds, such as a begin token.
        Returns:
            token ids; empty for an empty text without special tokens.
        Raises:
            RequestError: the text holds half a character (a lone surrogate, as JSON can spell it).
        """
        ids = self._ids(text, add_special_tokens)
        begin = self._token_id("bos_token")
        wanted = self._config.get("add_bos_token")
        if add_special_tokens and begin is not None and isinstance(wanted, bool):
            present = ids[:1] == [begin] and not text.startswith(str(self._special_text("bos_token")))
            if wanted and ids[:1] != [begin]:
                ids = [begin, *ids]
            elif not wanted and present:
                ids = ids[1:]
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Turn token ids into text; ids without a token add nothing, bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode([int(number) for number in ids], skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> tuple[str, list[int]]:
        """Turn chat messages into a prompt.

        Args:
            messages: [{"role": "user", "content": "..."}, ...].
            add_generation_prompt: end with the opening of the model's turn.
        Returns:
            The prompt's text and its token ids.
        Raises:
            RequestError: there is no chat template, or the messages do not fit it.
        """
        if self.template is None:
            raise RequestError(
                "messages need a chat template, this tokenizer has none: send a plain prompt, or add "
                "chat_template.jinja to the checkpoint and build again"
            )
        special = {name: text for name in SPECIAL_TOKENS if (text := self._special_text(name)) is not None}
        prompt = chat_template.render(self.template, messages, special, add_generation_prompt=add_generation_prompt)
        # the template wrote the special tokens out
        return prompt, self._ids(prompt, add_special_tokens=False)

    def token_bytes(self, vocab_size: int | None = None) -> list[bytes]:
        """Give the bytes each token id adds to the decoded text.

        Args:
            vocab_size: length of the result, for a model whose vocabulary is padded; None is the tokenizer's own.
        Returns:
            bytes by token id, b"" for special and unused ids. Equal calls return the same list: leave it unchanged.
        Raises:
            CheckpointError: the tokenizer has no fixed bytes a token.
        """
        known = self.vocabulary.token_bytes
        size = len(known) if vocab_size is None else vocab_size
        if size == len(known):
            return known
        if size not in self._padded:
            self._padded[size] = (known + [b""] * (size - len(known)))[:size]
        return self._padded[size]

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The bytes of all tokens, read once (about 0.1 s)."""
        return read_vocabulary(self._backend)

    def _ids(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()  # the library's own error is a TypeError that names no cause
        except UnicodeEncodeError as error:
            raise RequestError(
                f"the text is not valid Unicode, expected whole characters, got {text[error.start]!r} at place "
                f"{error.start}: send UTF-8"
            ) from None
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def _special_text(self, name: str) -> str | None:
        value = self._config.get(name)
        return value.get("content") if isinstance(value, dict) else value

    def _token_id(self, name: str) -> int | None:
        text = self._special_text(name)
        return None if text is None else self._backend.token_to_id(text)


class Detokenizer:
    """Incremental decoding: the joined pieces are what decoding everything at once gives.

    Args:
        tokenizer: whose tokens are pushed. Special tokens add nothing.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        vocabulary = tokenizer.vocabulary
        self._token_bytes = vocabulary.token_bytes
        self._strip_space = vocabulary.strips_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """Take further tokens.

        Args:
            token_ids: the next tokens, in order.
        Returns:
            The text that is certain now; the bytes of an unfinished character wait.
        """
        known = self._token_bytes
        data = b"".join(known[token] for token in token_ids if 0 <= token < len(known))
        return self._strip(self._decoder.decode(data))

    def flush(self) -> str:
        """End the text; an unfinished character becomes U+FFFD."""
        return self._strip(self._decoder.decode(b"", final=True))

    def _strip(self, text: str) -> str:
        if text and self._strip_space:
            self._strip_space = False
            return text.removeprefix(" ")
        return text


def _convert(folder: Path) -> BackendTokenizer:
    """Let transformers make a fast tokenizer from whatever files the folder has."""
    from transformers import AutoTokenizer  # noqa: PLC0415 (takes seconds to import, and few folders need it)

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises many types here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"cannot load a tokenizer from {folder}, expected tokenizer.json, got {reason}: copy the checkpoint's "
            "tokenizer files there"
        ) from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(
            f"the tokenizer of {folder} is {type(loaded).__name__}, expected one with a fast version: save it as "
            "tokenizer.json first"
        )
    return backend


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_small(path).decode())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}, expected JSON, got {error}: fetch the file again") from None
    return value if isinstance(value, dict) else {}


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """The chat template: its own file first, then the configuration, the one named "default" among several."""
    if (folder / "chat_template.jinja").is_file():
        try:
            return read_small(folder / "chat_template.jinja").decode()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"cannot read chat_template.jinja of {folder.name} ({error}), expected UTF-8 text: fetch the file again"
            ) from None
    template = config.get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, dict)]
        named = {str(entry.get("name")): entry.get("template") for entry in entries}
        template = named.get("default", next(iter(named.values()), None))
    if template is not None:
        _check_text(folder, "chat_template", template)
    return template


def _check_text(folder: Path, name: str, value: object) -> None:
    """Refuse what is no text, or text with half a character (a lone surrogate, as JSON can spell it)."""
    if not isinstance(value, str) or value.encode(errors="replace").decode() != value:
        raise CheckpointError(
            f"{name} in tokenizer_config.json of {folder.name} is {value!r:.40}, expected text: fetch the file again"
        )


def _eos_token_ids(folder: Path, config: Mapping[str, Any], backend: BackendTokenizer) -> tuple[int, ...]:
    found: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        value = _read_json(safe_file(folder, name)).get("eos_token_id")
        listed = value if isinstance(value, list) else [value]
        found.update(token for token in listed if isinstance(token, int) and not isinstance(token, bool))
    token = config.get("eos_token")
    number = backend.token_to_id(token["content"] if isinstance(token, dict) else token) if token else None
    return tuple(sorted(found | ({number} if number is not None else set())))
