"""Stop strings: found on device state, inside a round, and trimmed from the text afterwards.

Owns the automaton that reads token ids and says where a stop string completes. It is an Aho-Corasick automaton over
UTF-8 bytes whose transitions are then composed along the bytes of each token, so a round needs one table lookup a
token and each particle ends exactly at the token that completes a stop string, wherever it straddles tokens or rounds.

    >>> automaton = StopAutomaton.compile(("ab",), [b"a", b"b", b"xa", b"abc"])
    >>> automaton.table.tolist()      # states: 0 nothing yet, 1 "a" seen, 2 match (absorbing)
    [[1, 0, 1, 2], [1, 2, 1, 2], [2, 2, 2, 2]]
    >>> automaton.advance(0, [2, 1])  # "xa" then "b": the stop string straddles two tokens
    2
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from smc_plugin.errors import RequestError
from smc_plugin.group_state import MAX_STOP_STATES

_CACHE_ENTRIES = 16  # a table of 64 states over 128,256 tokens is 16 MB
_CACHE_VOCABULARIES = 4


@dataclass(frozen=True, eq=False)
class StopAutomaton:
    """Transitions over tokens; state 0 is the start and the last state is the match.

    Args:
        table: int16 [num_states, vocab_size]; table[s, t] is the state after the bytes of token t from state s.
            Read-only, since equal requests share it.
    """

    table: npt.NDArray[np.int16]

    @property
    def num_states(self) -> int:
        """Number of states, the match included."""
        return self.table.shape[0]

    @property
    def match(self) -> int:
        """The absorbing state: a stop string has completed."""
        return self.num_states - 1

    def advance(self, state: int, token_ids: Iterable[int]) -> int:
        """Return the state after `token_ids` from `state`, on the host; a round does the same lookups on the device."""
        for token in token_ids:
            state = int(self.table[state, token])
        return state

    @classmethod
    def compile(cls, stop: tuple[str, ...], token_bytes: list[bytes]) -> StopAutomaton:
        """Build the automaton of `stop` over a vocabulary, or take it from the cache.

        Args:
            stop: non-empty stop strings; any of them ends the answer.
            token_bytes: the bytes of each token id, as `Tokenizer.token_bytes()` gives them. The list must not change:
                the cache recognises it by identity.
        Returns:
            The automaton; with no stop string it has two states and never leaves state 0.
        Raises:
            RequestError: the strings need more than MAX_STOP_STATES states.
        Source: Aho & Corasick (1975), doi:10.1145/360825.360855.
        """
        return _CACHE.get(tuple(sorted(set(stop))), token_bytes)


def trim(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """Cut `text` before the stop string that completes first.

    Args:
        text: decoded text.
        stop: stop strings.
    Returns:
        The text before it and True, or the whole text and False. When two complete at the same character, the longer
        one is cut, as it began first.
    """
    found = [(start + len(word), start) for word in stop if (start := text.find(word)) >= 0]
    return (text[: min(found)[1]], True) if found else (text, False)


def holdback(text: str, stop: Sequence[str]) -> int:
    """Count the characters at the end of `text` that may still begin a stop string.

    Args:
        text: decoded text without a complete stop string.
        stop: stop strings.
    Returns:
        Length of the longest ending that begins a stop string; streaming must not emit it yet.
    """
    longest = max((len(word) - 1 for word in stop), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        ending = text[-length:]
        if any(len(word) > length and word.startswith(ending) for word in stop):
            return length
    return 0


def _byte_table(stop: tuple[str, ...]) -> npt.NDArray[np.int16]:
    """Aho-Corasick transitions [num_states, 256]; states are the prefixes that hold no complete stop string."""
    words = [word.encode("utf-8", "surrogatepass") for word in stop]
    # a string that contains another one completes later than it, and so never decides
    words = [word for word in words if not any(other != word and other in word for other in words)]
    prefixes = {b"": 0}
    for word in words:
        for length in range(1, len(word)):
            prefixes.setdefault(word[:length], len(prefixes))
    match = len(prefixes)
    if match + 1 > MAX_STOP_STATES:
        raise RequestError(
            f"the stop strings need {match + 1} automaton states, at most {MAX_STOP_STATES} are possible "
            "(about one a byte): pass fewer or shorter stop strings"
        )
    full = set(words)
    children: dict[bytes, list[bytes]] = {}
    for node in sorted({*prefixes, *full} - {b""}):
        children.setdefault(node[:-1], []).append(node)
    table = np.zeros((match + 1, 256), dtype=np.int16)
    table[match] = match
    fallback = {b"": 0}  # the state of the longest proper suffix that is a prefix too
    for prefix in sorted(prefixes, key=len):
        row = table[prefixes[prefix]]
        row[:] = table[fallback[prefix]]
        for child in children.get(prefix, ()):
            fallback[child] = int(row[child[-1]]) if prefix else 0
            row[child[-1]] = match if child in full else prefixes[child]
    return table


class _Columns:
    """A vocabulary's bytes, column by column, so that all tokens advance together."""

    def __init__(self, token_bytes: list[bytes]) -> None:
        lengths = np.fromiter(map(len, token_bytes), dtype=np.int64, count=len(token_bytes))
        self.order = np.argsort(-lengths, kind="stable")  # the tokens still running are then a shrinking front
        self.offsets = np.concatenate(([0], np.cumsum(lengths)))[self.order]
        self.flat = np.frombuffer(b"".join(token_bytes), dtype=np.uint8)
        longest = int(lengths.max(initial=0))
        self.running = [
            int(count) for count in len(token_bytes) - np.searchsorted(np.sort(lengths), range(1, longest + 1))
        ]

    def compose(self, table: npt.NDArray[np.int16]) -> npt.NDArray[np.int16]:
        """Compose byte transitions [S, 256] into token transitions [S, vocab_size]."""
        num_states, vocab_size = table.shape[0], len(self.order)
        states = np.repeat(np.arange(num_states, dtype=np.int16)[:, None], vocab_size, axis=1)
        columns = [self.flat[self.offsets[:count] + position] for position, count in enumerate(self.running)]
        steps = table.astype(np.int32).ravel()
        for row in states[: num_states - 1]:  # a row at a time stays in the processor's cache
            for count, column in zip(self.running, columns, strict=True):
                row[:count] = steps[(row[:count].astype(np.int32) << 8) + column]
        result = np.empty_like(states)
        result[:, self.order] = states
        return result


class _Cache:
    """The automata and vocabularies used last."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._automata: OrderedDict[tuple[tuple[str, ...], int], StopAutomaton] = OrderedDict()
        # holding the list keeps its id from being given to another one
        self._vocabularies: OrderedDict[int, tuple[list[bytes], _Columns]] = OrderedDict()

    def get(self, stop: tuple[str, ...], token_bytes: list[bytes]) -> StopAutomaton:
        """Return the automaton of `stop`, building it when it is not kept."""
        key = (stop, id(token_bytes))
        with self._lock:
            found = self._automata.get(key)
            if found is None:
                byte_table = _byte_table(stop)
                table = self._columns(token_bytes).compose(byte_table)
                table.flags.writeable = False
                found = self._automata[key] = StopAutomaton(table)
            self._automata.move_to_end(key)
            while len(self._automata) > _CACHE_ENTRIES:
                self._automata.popitem(last=False)
            return found

    def _columns(self, token_bytes: list[bytes]) -> _Columns:
        key = id(token_bytes)
        if key not in self._vocabularies:
            self._vocabularies[key] = (token_bytes, _Columns(token_bytes))
            while len(self._vocabularies) > _CACHE_VOCABULARIES:
                dropped, _ = self._vocabularies.popitem(last=False)
                for stale in [entry for entry in self._automata if entry[1] == dropped]:
                    del self._automata[stale]
        return self._vocabularies[key][1]


_CACHE = _Cache()
