"""Tokenizer and detokenizer: exact bytes, whole characters, chat templates."""

import itertools
import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as BackendTokenizer

from smc_engines.text import Detokenizer, Tokenizer
from smc_engines.token_bytes import _byte_alphabet
from smc_plugin.errors import CheckpointError, RequestError

SPECIAL = ("<s>", "</s>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def byte_level_backend() -> BackendTokenizer:
    """A byte-level BPE of 256 bytes, a few merges, two special tokens and one added token that is plain text."""
    characters = {byte: character for character, byte in _byte_alphabet().items()}
    merges = [("Ġ", "a"), ("Ã", "©"), ("Ġa", "Ã©"), ("ð", "Ł")]
    words = [characters[byte] for byte in range(256)] + ["".join(merge) for merge in merges]
    vocab = {word: number for number, word in enumerate(words)}
    backend = BackendTokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    backend.add_tokens([AddedToken("two words", special=False)])
    return backend


def sentencepiece_backend() -> BackendTokenizer:
    """A BPE with byte fallback and the underline mark."""
    words = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a", "b", "▁a", "▁ab"]
    vocab = {word: number for number, word in enumerate(words)}
    merges = [("▁", "a"), ("▁a", "b")]
    backend = BackendTokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    return backend


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    return Tokenizer(byte_level_backend(), {"bos_token": "<s>"}, TEMPLATE)


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    return Tokenizer(sentencepiece_backend())


def write_folder(folder, tokenizer_config=None, **files):
    byte_level_backend().save(str(folder / "tokenizer.json"))
    for name, value in {"tokenizer_config": tokenizer_config or {}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def pushed(tokenizer, ids, cuts):
    """The pieces of an incremental decoding of `ids`, cut before the positions `cuts`."""
    detokenizer = Detokenizer(tokenizer)
    bounds = sorted({0, len(ids), *(cut for cut in cuts if cut <= len(ids))})
    pieces = [detokenizer.push(ids[start:end]) for start, end in itertools.pairwise(bounds)]
    return [*pieces, detokenizer.flush()]


@given(text=st.text(max_size=40))
def test_byte_level_text_survives_the_round_trip(byte_level, text):
    ids = byte_level.encode(text, add_special_tokens=False)
    if not any(word in text for word in SPECIAL):
        assert byte_level.decode(ids) == text
        assert b"".join(byte_level.token_bytes()[token] for token in ids) == text.encode()


@given(ids=st.lists(st.integers(0, 264), max_size=24), cuts=st.lists(st.integers(0, 24), max_size=8))
def test_pieces_join_to_the_whole_for_any_tokens(byte_level, ids, cuts):
    assert "".join(pushed(byte_level, ids, cuts)) == byte_level.decode(ids)


@given(text=st.text(alphabet="aé€😀 ", max_size=20))
def test_no_piece_of_valid_text_holds_half_a_character(byte_level, text):
    ids = list(text.encode())
    pieces = pushed(byte_level, ids, range(len(ids)))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(text=st.text(alphabet="ab é€😀", max_size=20), cuts=st.lists(st.integers(0, 24), max_size=8))
def test_sentencepiece_pieces_join_to_the_whole(sentencepiece, text, cuts):
    ids = sentencepiece.encode(text)
    assert sentencepiece.decode(ids) == text
    assert "".join(pushed(sentencepiece, ids, cuts)) == text


def test_unfinished_character_waits_and_the_end_replaces_it(byte_level):
    detokenizer = Detokenizer(byte_level)
    assert [detokenizer.push([token]) for token in b"x\xe2\x82"] == ["x", "", ""]
    assert detokenizer.flush() == "\ufffd"


def test_special_unused_and_padded_ids_add_no_bytes(byte_level, sentencepiece):
    known = byte_level.token_bytes()
    assert [known[byte] for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    assert known[256:263] == [b" a", "é".encode(), " aé".encode(), b"\xf0\x9f", b"", b"", b"two words"]
    assert byte_level.vocab_size == 263
    padded = byte_level.token_bytes(300)
    assert padded[:263] == known
    assert padded[263:] == [b""] * 37
    assert byte_level.token_bytes(300) is padded
    assert sentencepiece.token_bytes()[0x0A] == b"\n"
    assert sentencepiece.token_bytes()[260] == b" ab"


def test_decoder_without_fixed_bytes_is_refused():
    backend = byte_level_backend()
    backend.decoder = decoders.WordPiece()
    with pytest.raises(CheckpointError, match="decoder is WordPiece, expected byte-level BPE"):
        Tokenizer(backend).token_bytes()


def test_special_tokens_are_skipped_only_when_asked(byte_level):
    ids = [*b"hi", 261]
    assert byte_level.decode(ids) == "hi"
    assert byte_level.decode(ids, skip_special_tokens=False) == "hi</s>"


def test_chat_template_gives_text_and_ids(byte_level):
    text, ids = byte_level.apply_chat_template([{"role": "user", "content": "é"}])
    assert text == "<s>[user]é[assistant]"
    assert ids == [260, *b"[user]", 257, *b"[assistant]"]
    assert (
        byte_level.apply_chat_template([{"role": "user", "content": "é"}], add_generation_prompt=False)[0]
        == "<s>[user]é"
    )


def test_chat_template_errors_are_request_errors(byte_level, sentencepiece):
    with pytest.raises(RequestError, match="this tokenizer has none"):
        sentencepiece.apply_chat_template([{"role": "user", "content": "x"}])
    with pytest.raises(RequestError, match="no tools"):
        byte_level.apply_chat_template([{"role": "tool", "content": "x"}])
    with pytest.raises(RequestError, match="message 1 must be an object"):
        byte_level.apply_chat_template([{"role": "user", "content": "x"}, {"role": "user"}])
    with pytest.raises(RequestError, match="non-empty list"):
        byte_level.apply_chat_template([])


def test_chat_template_cannot_reach_out_of_its_sandbox(byte_level):
    tokenizer = Tokenizer(byte_level_backend(), template="{{ messages.__class__.__mro__ }}")
    with pytest.raises(RequestError, match="unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_a_template_that_is_no_text_is_a_checkpoint_error(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"{{ messages }}\xff")
    with pytest.raises(CheckpointError, match=r"cannot read chat_template\.jinja .*, expected UTF-8 text: fetch"):
        Tokenizer.load(tmp_path)


def test_end_tokens_are_not_read_from_outside(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_folder(folder)
    (tmp_path / "outside.json").write_text('{"eos_token_id": 7}')
    (folder / "generation_config.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        Tokenizer.load(folder)


def test_broken_template_is_a_checkpoint_error():
    tokenizer = Tokenizer(byte_level_backend(), template="{% if %}")
    with pytest.raises(CheckpointError, match="does not parse"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_generation_blocks_are_only_their_body():
    tokenizer = Tokenizer(
        byte_level_backend(), template="{% generation %}{{ messages[0].content }}{% endgeneration %}!"
    )
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}])[0] == "x!"


def test_folder_gives_end_tokens_and_template(tmp_path):
    config = {"eos_token": {"content": "</s>"}, "chat_template": [{"name": "default", "template": "T"}]}
    folder = write_folder(tmp_path, config, generation_config={"eos_token_id": [7, 9]}, config={"eos_token_id": 8})
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.eos_token_ids == (7, 8, 9, 261)
    assert tokenizer.template == "T"
    (folder / "chat_template.jinja").write_text("from its own file")
    assert Tokenizer.load(folder).template == "from its own file"


@pytest.mark.parametrize(("wanted", "expected"), [(True, [260, 97]), (False, [97]), (None, [97])])
def test_begin_token_follows_the_configuration(tmp_path, wanted, expected):
    tokenizer = Tokenizer.load(write_folder(tmp_path, {"bos_token": "<s>", "add_bos_token": wanted}))
    assert tokenizer.encode("a") == expected
    assert tokenizer.encode("a", add_special_tokens=False) == [97]


def test_damaged_and_missing_files_say_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"cannot read .*tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("fast", [True, False])
def test_code_beside_a_tokenizer_is_not_run(tmp_path, fast):
    config = {"tokenizer_class": "Odd", "auto_map": {"AutoTokenizer": ["odd.Odd", "odd.Odd"]}}
    model = {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd", "AutoTokenizer": ["odd.Odd", "odd.Odd"]}}
    folder = write_folder(tmp_path, config, config=model)
    (folder / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    if fast:
        assert Tokenizer.load(folder).encode("a") == [97]
    else:
        (folder / "tokenizer.json").unlink()
        with pytest.raises(CheckpointError, match=r"expected tokenizer\.json, got .*custom code"):
            Tokenizer.load(folder)
    assert not (tmp_path / "ran").exists()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(texts=st.lists(st.text(max_size=20), min_size=1, max_size=3))
def test_equals_transformers(tmp_path_factory, texts):
    """Encoding, decoding and the chat template agree with transformers on the same folder."""
    mine, theirs = _transformers_pair(tmp_path_factory)
    for text in texts:
        assert mine.encode(text) == theirs.encode(text)
        assert mine.decode(mine.encode(text)) == theirs.decode(theirs.encode(text), skip_special_tokens=True)
    messages = [{"role": "user", "content": text} for text in texts]
    assert mine.apply_chat_template(messages)[0] == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def _transformers_pair(factory, cache={}):  # noqa: B006 (one pair for all examples)
    if not cache:
        from transformers import AutoTokenizer  # noqa: PLC0415 (only this test pays for the import)

        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "chat_template": TEMPLATE,
            "clean_up_tokenization_spaces": False,
        }
        folder = write_folder(factory.mktemp("pair"), config)
        cache["pair"] = Tokenizer.load(folder), AutoTokenizer.from_pretrained(str(folder))
    return cache["pair"]


def test_loading_needs_no_transformers(tmp_path):
    """Import time counts for a command line: transformers alone takes seconds."""
    folder = write_folder(tmp_path)
    code = (
        "import sys; from smc_engines.text import Tokenizer; "
        f"print(Tokenizer.load({str(folder)!r}).encode('hi')); assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(list(b"hi"))
