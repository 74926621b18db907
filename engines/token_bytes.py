"""The exact bytes each token id adds to the decoded text.

Owns the reading of a tokenizer's decoder. Two families cover the models built here:
  byte-level: a token is spelled in an alphabet of 256 printable characters; "Ġthe" is b" the"
  sentencepiece: "▁the" is b" the", "<0x0A>" is b"\\n", and decoding drops the first space of the text
Special tokens and ids without a token add b"".
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as BackendTokenizer

from smc_plugin.errors import CheckpointError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Vocabulary:
    """What incremental decoding needs to know of a tokenizer.

    Args:
        token_bytes: the bytes of each token id.
        strips_first_space: decoding drops one space at the very start.
    """

    token_bytes: list[bytes]
    strips_first_space: bool


def read_vocabulary(backend: BackendTokenizer) -> Vocabulary:
    """Read the bytes of every token.

    Args:
        backend: a tokenizer of the tokenizers library.
    Returns:
        The vocabulary, as long as the largest token id plus one.
    Raises:
        CheckpointError: the tokenizer decodes in a way that has no fixed bytes a token.
    """
    spell, strips_first_space = _spelling(backend)
    vocab = backend.get_vocab(with_added_tokens=True)
    special = {number for number, token in backend.get_added_tokens_decoder().items() if token.special}
    token_bytes = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, number in vocab.items():
        if number not in special:
            token_bytes[number] = spell(token)
    return Vocabulary(token_bytes, strips_first_space)


def _spelling(backend: BackendTokenizer) -> tuple[Callable[[str], bytes], bool]:
    """Find how tokens become bytes, and whether the first space of a text is dropped."""
    # the decoder pickles as the JSON that tokenizer.json holds; parsing the whole file would take far longer
    state: Any = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {"type": "none"}
    steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        alphabet = _byte_alphabet()
        return lambda token: _spell_byte_level(token, alphabet), False
    if kinds == ["Metaspace"]:
        mark = steps[0]["replacement"]
        return lambda token: token.replace(mark, " ").encode(), steps[0]["prepend_scheme"] != "never"
    if set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"} and "Fuse" in kinds:
        replaced = [(step["pattern"].get("String"), step["content"]) for step in steps if step["type"] == "Replace"]
        strips = [(step["content"], step["start"], step["stop"]) for step in steps if step["type"] == "Strip"]
        if replaced == [("▁", " ")] and strips in ([], [(" ", 1, 0)]):
            return (_spell_sentencepiece if "ByteFallback" in kinds else _spell_marked), bool(strips)
    raise CheckpointError(
        f"the tokenizer's decoder is {'+'.join(kinds)}, expected byte-level BPE or sentencepiece with byte fallback: "
        "use a checkpoint with such a tokenizer, or pass token ids and no stop strings"
    )


def _byte_alphabet() -> dict[str, int]:
    """Map the 256 characters of byte-level BPE to bytes: printable Latin-1 is itself, the others follow from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


def _spell_byte_level(token: str, alphabet: dict[str, int]) -> bytes:
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:  # an added token, such as one with a plain space, is spelled as it is
        return token.encode()


def _spell_sentencepiece(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else _spell_marked(token)


def _spell_marked(token: str) -> bytes:
    return token.replace("▁", " ").encode()
