"""Shards of weights: the ranks' regions, summed as the ranks would sum them, compute what the whole model computes."""

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smc_build.builder import BuildOptions, build_engine, random_engine
from smc_build.checkpoint import Checkpoint
from smc_build.cli import main
from smc_build.engine_dir import ModelEntry, load_manifest, load_weights, make_weights
from smc_build.model_config import ModelConfig, RopeConfig
from smc_build.network import region_layers, region_specs
from smc_build.precision import Precision
from smc_build.presets import PRESETS
from smc_build.sharding import bind_head, padded_tokens, rank_config, rank_heads, shards
from smc_build.trtllm_checkpoint import TrtllmCheckpoint
from smc_build.weights import weight_shapes
from smc_engines.regions import TorchRegions
from smc_plugin.errors import CheckpointError, ConfigError
from tests.tiny_models import in_fp8, make_checkpoint


def config_of(heads: int, kv_heads: int, **changes) -> ModelConfig:
    plain = ModelConfig(
        *("llama", 260, 32, 2, heads, kv_heads, 8, 40, 1e-5, RopeConfig(1e4), 128), False, False, False, None, ()
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "own"),
    [(32, 8, 2, (16, 4)), (32, 8, 8, (4, 1)), (64, 8, 16, (4, 1)), (9, 3, 2, (6, 2)), (9, 3, 4, (3, 1)), (14, 2, 4, (4, 1)),
     (28, 4, 8, (4, 1)), (9, 3, 8, (2, 1)), (6, 1, 4, (2, 1)), (5, 5, 4, (2, 2))],
)  # fmt: skip
def test_every_head_is_on_one_rank_and_meets_its_own_keys(
    heads: int, kv_heads: int, tp: int, own: tuple[int, int]
) -> None:
    config = config_of(heads, kv_heads)
    rank = rank_config(config, tp)
    assert (rank.num_heads, rank.num_kv_heads) == own
    placed = []
    for number in range(tp):
        held = rank_heads(config, tp, number)
        assert (len(held.query), len(held.kv)) == own
        group = own[0] // own[1]
        for place, head in enumerate(held.query):
            if head is not None:
                assert held.kv[place // group] == head // (heads // kv_heads)
                placed.append(head)
    assert sorted(placed) == list(range(heads))


def test_what_cannot_be_shared_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match="9 attention heads cannot be shared by 16 ranks, expected at least one"):
        rank_config(config_of(9, 3), 16)
    assert rank_config(config_of(9, 3), 1) == config_of(9, 3)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {"heads": 6, "kv_heads": 3, "head_dim": 8}), ("qwen2", {"tied": True}), ("qwen3", {"kv_heads": 1, "ffn": 72})],
)  # fmt: skip
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("fp8", [False, True])
def test_summed_regions_are_the_whole_models(tmp_path: Path, family: str, options: dict, tp: int, fp8: bool) -> None:
    """Attention is left out: heads are cut, so each rank takes its columns of the same attention output."""
    with Checkpoint(make_checkpoint(tmp_path, family, tokenizer=False, **options)) as checkpoint:
        config, whole = checkpoint.config, dict(checkpoint.tensors("float32"))
    whole = in_fp8(whole) if fp8 else whole
    precision = Precision.of(whole)
    own = rank_config(config, tp)
    ranks = []
    for rank in range(tp):
        weights = bind_head(dict(shards(iter(whole.items()), config, tp, rank)), own, rank)
        tied = {"lm_head"} if config.tied_head else set()
        shapes = {name: tuple(tensor.shape) for name, tensor in weights.items() if name not in tied}
        assert shapes == weight_shapes(own, precision)
        ranks.append(TorchRegions(own, weights))
    generator = torch.Generator().manual_seed(5)
    attn, residual = torch.randn(7, config.q_size, generator=generator), torch.randn(7, 64, generator=generator)
    expected = TorchRegions(config, whole).run("block", 0, {"attn": attn, "residual": residual})
    heads = [rank_heads(config, tp, rank).query for rank in range(tp)]
    by_head = {head: part for head, part in enumerate(attn.split(config.head_dim, dim=1))}
    noise = torch.randn(7, config.head_dim, generator=generator)  # what a zero head attends to must not matter
    parts = [torch.cat([noise if head is None else by_head[head] for head in held], dim=1) for held in heads]
    partials = [runner.run("attn_out", 0, {"attn": part})["partial"] for runner, part in zip(ranks, parts, strict=True)]
    out = [runner.run("feed_forward", 0, {"reduced": sum(partials), "residual": residual}) for runner in ranks]
    reduced = sum(each["partial"] for each in out)
    for rank, (runner, each) in enumerate(zip(ranks, out, strict=True)):
        found = runner.run("next_qkv", 0, {"reduced": reduced, "residual": each["residual"]})
        torch.testing.assert_close(found["residual"], expected["residual"], rtol=1e-4, atol=1e-4)
        held = rank_heads(config, tp, rank)
        q, k, v = expected["qkv"].split([config.q_size, config.kv_size, config.kv_size], dim=1)
        columns = []
        for part, index in ((q, held.query), (k, held.kv), (v, held.kv)):
            for head in index:
                zero = torch.zeros(7, config.head_dim)
                columns.append(zero if head is None else part.split(config.head_dim, dim=1)[head])
        torch.testing.assert_close(found["qkv"], torch.cat(columns, dim=1), rtol=1e-4, atol=1e-4)
    hidden = torch.randn(7, 64, generator=generator)
    logits = torch.cat([runner.run("head", None, {"hidden": hidden})["logits"] for runner in ranks], dim=1)
    assert sum(padded_tokens(own, rank) for rank in range(tp)) == own.vocab_size * tp - config.vocab_size
    expected_logits = TorchRegions(config, whole).run("head", None, {"hidden": hidden})["logits"]
    torch.testing.assert_close(logits[:, : config.vocab_size], expected_logits, rtol=1e-4, atol=1e-4)


def test_regions_of_a_rank_end_at_each_sum() -> None:
    own = rank_config(config_of(4, 2), 2)
    specs = region_specs(own, "bfloat16")
    assert list(specs) == ["entry", "attn_out", "feed_forward", "next_qkv", "final", "head"]
    assert [*region_layers(own), "head"] == list(specs)
    assert [tensor.name for tensor in specs["feed_forward"].inputs] == [
        "reduced",
        "residual",
        "mlp_norm",
        "gate_up",
        "down",
    ]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    target = make_checkpoint(tmp_path / "t", layers=2, seed=1, tied=True)
    return target, make_checkpoint(tmp_path / "d", layers=1, seed=2, heads=6, kv_heads=3, head_dim=8)


def options(pair: tuple[Path, Path], output: Path, **changes) -> BuildOptions:
    changes = {"dtype": "float32", **changes}
    return BuildOptions(str(pair[0]), draft=str(pair[1]), compiler="torch", output=output, **changes)


def test_an_engine_of_two_ranks(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = build_engine(options(pair, tmp_path / "e", tp=2))
    manifest = load_manifest(path)
    assert (manifest.tp, manifest.target.tp) == (2, 2)
    for role, rank in itertools.product(("target", "draft"), (0, 1)):
        assert f"{role}/weights/rank{rank}.safetensors" in manifest.files
    halves = [load_weights(path, "target", rank) for rank in (0, 1)]
    assert halves[0]["layers.0.down"].shape == (64, 64)
    assert halves[1]["lm_head"].data_ptr() == halves[1]["embed"][192:].data_ptr()  # 384 padded tokens, two times 192
    assert main(["--inspect", str(path)]) == 0
    assert "on each of 2 ranks: " in capsys.readouterr().out


def test_a_whole_draft_on_every_rank(pair: tuple[Path, Path], tmp_path: Path) -> None:
    path = build_engine(options(pair, tmp_path / "e", tp=4, draft_tp=1))
    manifest = load_manifest(path)
    assert manifest.draft is not None
    assert (manifest.target.tp, manifest.draft.tp) == (4, 1)
    assert "draft/weights/rank1.safetensors" not in manifest.files
    assert torch.equal(load_weights(path, "draft", 3)["lm_head"], load_weights(path, "draft", 0)["lm_head"])
    with pytest.raises(ConfigError, match=r"--draft-tp is 2, expected 1 .* or --tp's 4: choose one"):
        build_engine(options(pair, tmp_path / "f", tp=4, draft_tp=2))


@pytest.mark.parametrize(("types", "axis"), [({"dtype": "float32"}, 0), ({"dtype": "fp8", "head_dtype": "fp8"}, 1)])
def test_random_weights_do_not_depend_on_the_number_of_ranks(
    pair: tuple[Path, Path], tmp_path: Path, types: dict[str, str], axis: int
) -> None:
    path = build_engine(options(pair, tmp_path / "e", tp=2, random_weights=True, **types))
    _, weights = random_engine(options(pair, tmp_path / "f", tp=2, **types))
    _, whole = random_engine(options(pair, tmp_path / "g", **types))
    for role, rank in itertools.product(("target", "draft"), (0, 1)):
        stored, made = load_weights(path, role, rank), weights(role, torch.device("cpu"), rank)
        assert stored.keys() == made.keys()
        assert all(stored[name].dtype == made[name].dtype for name in stored)
        assert all(torch.equal(stored[name].float(), made[name].float()) for name in stored)
        assert all(
            tensor.untyped_storage().nbytes() == tensor.nbytes for name, tensor in made.items() if name != "lm_head"
        )
    down = whole("target", torch.device("cpu"), 0)["layers.0.down"].float()
    parts = [weights("target", torch.device("cpu"), rank)["layers.0.down"].float() for rank in (0, 1)]
    assert torch.equal(torch.cat(parts, dim=axis), down)


def test_llama_70b_over_four_ranks_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    own = rank_config(PRESETS["llama-70b"].config, 4)
    assert (own.num_heads, own.num_kv_heads, own.ffn_size, own.vocab_size) == (16, 2, 7168, 32064)
    # Everything but the embedding, which each rank holds whole, divides by four.
    assert own.num_parameters - 128256 * 8192 == pytest.approx(
        (PRESETS["llama-70b"].config.num_parameters - 128256 * 8192) / 4, rel=1e-4
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_every_rank_of_llama_70b_gets_its_shapes(dtype: str) -> None:
    """Two layers of the real sizes, without memory; all 80 are alike."""
    config = dataclasses.replace(PRESETS["llama-70b"].config, num_layers=2)
    entry = ModelEntry(config, Precision("bfloat16", dtype, "bfloat16", "bfloat16"), "llama-70b", "", tp=4, seed=0)
    wanted = weight_shapes(entry.rank_config, entry.precision)
    for rank in range(4):
        made = make_weights(entry, rank, "meta")
        assert {name: tuple(tensor.shape) for name, tensor in made.items()} == wanted
    assert wanted["layers.1.down"] == ((8192, 7168) if dtype != "bfloat16" else (7168, 8192))


def write_trtllm(folder: Path, source: Path, ranks: int) -> Path:
    """The TensorRT-LLM checkpoint that its convert_checkpoint.py makes of a Hugging Face folder."""
    hf, stored = json.loads((source / "config.json").read_text()), load_file(source / "model.safetensors")
    folder.mkdir()
    architecture = hf["architectures"][0]
    heads, kv_heads, head_dim = hf["num_attention_heads"], hf["num_key_value_heads"], hf["head_dim"]
    config = {
        "architecture": architecture,
        "dtype": "float32",
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "num_hidden_layers": hf["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_size": head_dim,
        "intermediate_size": hf["intermediate_size"],
        "hidden_act": "silu",
        "norm_epsilon": hf["rms_norm_eps"],
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": hf["max_position_embeddings"],
        "rotary_base": hf["rope_theta"],
        "rotary_scaling": None,
        "quantization": {"quant_algo": None},
        "mapping": {"world_size": ranks, "tp_size": ranks, "pp_size": 1},
        "use_parallel_embedding": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    for rank in range(ranks):
        save_file(_rank_tensors(stored, config, rank, ranks), folder / f"rank{rank}.safetensors")
    return folder


def _rank_tensors(stored: dict[str, torch.Tensor], config: dict, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    kv_heads, head_dim = config["num_key_value_heads"], config["head_size"]
    out = {
        "transformer.vocab_embedding.weight": stored["model.embed_tokens.weight"],
        "transformer.ln_f.weight": stored["model.norm.weight"],
    }
    head = stored["lm_head.weight"]
    padded = torch.nn.functional.pad(head, (0, 0, 0, -head.shape[0] % ranks))
    out["lm_head.weight"] = padded.chunk(ranks)[rank]

    def kv(tensor: torch.Tensor) -> torch.Tensor:
        if kv_heads >= ranks:
            return tensor.chunk(ranks)[rank]
        return tensor[rank * kv_heads // ranks * head_dim :][:head_dim]

    for layer in range(config["num_hidden_layers"]):
        hf, own = f"model.layers.{layer}.", f"transformer.layers.{layer}."
        for kind in ("weight", "bias"):
            if f"{hf}self_attn.q_proj.{kind}" in stored:
                q, k, v = (stored[f"{hf}self_attn.{name}_proj.{kind}"] for name in "qkv")
                out[f"{own}attention.qkv.{kind}"] = torch.cat([q.chunk(ranks)[rank], kv(k), kv(v)])
        out[f"{own}attention.dense.weight"] = stored[f"{hf}self_attn.o_proj.weight"].chunk(ranks, dim=1)[rank]
        out[f"{own}mlp.fc.weight"] = stored[f"{hf}mlp.gate_proj.weight"].chunk(ranks)[rank]
        out[f"{own}mlp.gate.weight"] = stored[f"{hf}mlp.up_proj.weight"].chunk(ranks)[rank]
        out[f"{own}mlp.proj.weight"] = stored[f"{hf}mlp.down_proj.weight"].chunk(ranks, dim=1)[rank]
        out[f"{own}input_layernorm.weight"] = stored[f"{hf}input_layernorm.weight"]
        out[f"{own}post_layernorm.weight"] = stored[f"{hf}post_attention_layernorm.weight"]
        for name in "qk":
            if f"{hf}self_attn.{name}_norm.weight" in stored:
                out[f"{own}attention.{name}_layernorm.weight"] = stored[f"{hf}self_attn.{name}_norm.weight"]
    return {name: tensor.clone().contiguous() for name, tensor in out.items()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_tensorrt_llm_checkpoint_gives_the_weights_it_was_made_from(tmp_path: Path, family: str, ranks: int) -> None:
    """Equal weights are equal logits; 4 ranks of 2 KV heads hold each of them twice, and 261 tokens are padded."""
    source = make_checkpoint(tmp_path / "hf", family, tokenizer=False, vocab_size=261)
    with Checkpoint(source) as theirs, TrtllmCheckpoint(write_trtllm(tmp_path / "trtllm", source, ranks)) as ours:
        assert dataclasses.replace(ours.config, bos_id=256, eos_ids=(257,)) == theirs.config
        expected = dict(theirs.tensors("float32"))
        for name, tensor in ours.tensors("float32"):
            assert torch.equal(tensor, expected.pop(name)), name
        assert not expected


def test_an_engine_is_built_from_a_tensorrt_llm_checkpoint(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "hf", "llama", tokenizer=False)
    target = write_trtllm(tmp_path / "trtllm", source, 2)
    path = build_engine(options((target, target), tmp_path / "e", tp=4))
    direct = build_engine(options((source, source), tmp_path / "f", tp=4))
    for rank in range(4):
        ours, theirs = load_weights(path, "target", rank), load_weights(direct, "target", rank)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_tensorrt_llm_checkpoint_is_not_quantized(tmp_path: Path) -> None:
    target = write_trtllm(tmp_path / "trtllm", make_checkpoint(tmp_path / "hf", "llama", tokenizer=False), 1)
    with pytest.raises(
        ConfigError, match=r"TensorRT-LLM checkpoint .*trtllm, expected a Hugging Face folder: start from"
    ):
        build_engine(options((target, target), tmp_path / "e", dtype="fp8"))
    assert not list(tmp_path.glob("e*"))


def test_a_damaged_tensorrt_llm_checkpoint_is_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "hf", "llama", tokenizer=False)
    folder = write_trtllm(tmp_path / "trtllm", source, 2)
    tensors = load_file(folder / "rank1.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "ln_f" not in name}, folder / "rank1.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor transformer.ln_f.weight is missing from rank1.safetensors"):
        TrtllmCheckpoint(folder)
    (folder / "rank1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"rank1.safetensors is missing .* expected 2 of them \(tp_size\)"):
        TrtllmCheckpoint(folder)
