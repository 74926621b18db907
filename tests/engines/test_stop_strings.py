"""Stop strings: the automaton over tokens against a plain search of the bytes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smc_engines import stop_strings
from smc_engines.stop_strings import StopAutomaton, holdback, trim
from smc_plugin.errors import RequestError
from smc_plugin.group_state import MAX_STOP_STATES

# two letters make overlaps frequent; the others have two, three and four bytes
TEXT = st.text(alphabet="abé€😀", min_size=1, max_size=4)
STOPS = st.lists(TEXT, min_size=0, max_size=4).map(tuple)
PIECES = st.lists(
    st.one_of(st.text(alphabet="abé€", max_size=4).map(str.encode), st.binary(max_size=3)), min_size=1, max_size=12
)


@given(stop=STOPS, pieces=PIECES, data=st.data())
def test_match_is_entered_at_the_token_that_completes_a_stop_string(stop, pieces, data):
    tokens = data.draw(st.lists(st.integers(0, len(pieces) - 1), max_size=20))
    automaton = StopAutomaton.compile(stop, pieces)
    state, said = 0, b""
    for token in tokens:
        state, said = automaton.advance(state, [token]), said + pieces[token]
        assert (state == automaton.match) == any(word.encode() in said for word in stop)


@given(stop=STOPS, pieces=PIECES)
def test_match_absorbs_and_states_stay_in_range(stop, pieces):
    table = StopAutomaton.compile(stop, pieces).table
    assert table.dtype == np.int16
    assert table.shape[1] == len(pieces)
    assert (table[-1] == table.shape[0] - 1).all()
    assert table.min() >= 0
    assert table.max() < table.shape[0]


def test_stop_string_straddles_tokens_and_characters():
    pieces = ["é".encode()[:1], "é".encode()[1:], b"x", b"", "aéb".encode()]
    automaton = StopAutomaton.compile(("é",), pieces)
    assert automaton.advance(0, [0, 3, 1]) == automaton.match
    assert automaton.advance(0, [0, 2, 1]) != automaton.match
    assert automaton.advance(0, [4]) == automaton.match


def test_without_stop_strings_nothing_ever_matches():
    automaton = StopAutomaton.compile((), [b"a", b"", b"\xff"])
    assert automaton.num_states == 2
    assert (automaton.table[0] == 0).all()


def test_equal_requests_share_a_read_only_table_and_other_vocabularies_do_not():
    first, second = [b"a", b"b"], [b"b", b"a"]
    one = StopAutomaton.compile(("ab", "c"), first)
    assert StopAutomaton.compile(("c", "ab", "ab"), first) is one
    assert not np.array_equal(StopAutomaton.compile(("ab", "c"), second).table, one.table)
    with pytest.raises(ValueError, match="read-only"):
        one.table[0, 0] = 1


def test_cache_forgets_the_vocabularies_used_longest_ago():
    for number in range(3 * stop_strings._CACHE_VOCABULARIES):
        pieces = [b"a" * (number % 3 + 1), b"b"]
        automaton = StopAutomaton.compile(("aab",), pieces)
        assert (automaton.advance(0, [0, 1]) == automaton.match) == (number % 3 >= 1)
    assert len(stop_strings._CACHE._vocabularies) == stop_strings._CACHE_VOCABULARIES
    kept = set(stop_strings._CACHE._vocabularies)
    assert {vocabulary for _, vocabulary in stop_strings._CACHE._automata} <= kept


def test_too_many_states_is_refused_with_the_numbers():
    fits = "x" * (MAX_STOP_STATES - 1)
    assert StopAutomaton.compile((fits,), [b"x"]).num_states == MAX_STOP_STATES
    with pytest.raises(RequestError, match=f"need {MAX_STOP_STATES + 1} automaton states, at most {MAX_STOP_STATES}"):
        StopAutomaton.compile((fits + "x",), [b"x"])


@given(
    text=st.text(alphabet="ab", max_size=12), stop=st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)
)
def test_trim_cuts_before_the_string_that_completes_first(text, stop):
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(word) for word in stop)]
    if not ends:
        assert trim(text, stop) == (text, False)
        return
    longest = max(len(word) for word in stop if text[: ends[0]].endswith(word))
    assert trim(text, stop) == (text[: ends[0] - longest], True)


@given(text=st.text(alphabet="ab", max_size=8), more=st.text(alphabet="ab", max_size=8), stop=STOPS)
def test_streaming_with_holdback_never_emits_a_part_of_a_stop_string(text, more, stop):
    whole, _ = trim(text + more, stop)
    if trim(text, stop)[1]:
        return
    emitted = text[: len(text) - holdback(text, stop)]
    assert whole.startswith(emitted)


def test_holdback_is_the_longest_possible_beginning():
    assert holdback("say <|en", ("<|end|>",)) == 4
    assert holdback("say <|x", ("<|end|>",)) == 0
    assert holdback("aa", ("aab", "b")) == 2
    assert holdback("text", ()) == 0
