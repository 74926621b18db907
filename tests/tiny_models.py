"""Tiny seeded checkpoints in the Hugging Face layout, for every test that needs a model.

Example: make_checkpoint(tmp_path / "target", "qwen3", layers=3, seed=1) writes config.json, model.safetensors and a
byte-level tokenizer of 260 tokens (ids 0..255 are the bytes, 256 <|bos|>, 257 <|eos|>, 258 <|user|>, 259
<|assistant|>) and returns the folder.
"""

import json
import math
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from smc_build.precision import QUANTIZABLE

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>")
BOS_ID, EOS_ID = 256, 257
BYTE_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def in_fp8(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Canonical weights with their matrices in FP8, and the head where it is a weight of its own; each column has its scale."""
    out = {}
    for name, tensor in weights.items():
        last = name.rpartition(".")[2]
        if last not in QUANTIZABLE:
            out[name] = tensor
            continue
        wide = tensor if last == "lm_head" else tensor.t()
        scale = wide.abs().amax(dim=1) / 448
        out[name] = (wide / scale[:, None]).to(torch.float8_e4m3fn).contiguous()
        out |= {f"{name}_scale": scale, f"{name}_input_scale": torch.tensor([0.01])}
    return out


def make_checkpoint(
    folder: Path,
    family: str = "llama",
    *,
    vocab_size: int = BYTE_VOCAB_SIZE,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    ffn: int = 128,
    tied: bool = False,
    seed: int = 0,
    scale: float = 1.0,
    max_position: int = 512,
    rope_scaling: dict[str, Any] | None = None,
    dtype: str = "float32",
    sharded: bool = False,
    eos_id: int | Literal["auto"] | None = "auto",
    tokenizer: bool = True,
) -> Path:
    """Write a random checkpoint.

    Args:
        folder: created, with its parents.
        family: llama, qwen2 or qwen3.
        vocab_size: 260 or more gets a byte-level tokenizer, less a word-level one with the words t0, t1, ...
        hidden: hidden size.
        layers: number of layers.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: hidden / heads when None.
        ffn: width of the feed-forward part.
        tied: whether the head shares the embedding.
        seed: of the weights.
        scale: matrices are drawn with standard deviation scale / sqrt(inputs); logits get about this spread.
        max_position: longest sequence, in tokens.
        rope_scaling: for example LLAMA3_SCALING.
        dtype: float32, bfloat16 or float16.
        sharded: three files and an index instead of one.
        eos_id: "auto" is 257 for the byte-level tokenizer and 0 for a smaller vocabulary; None means no end token.
        tokenizer: whether to write tokenizer files.
    Returns:
        the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    bytes_tokenizer = vocab_size >= BYTE_VOCAB_SIZE
    if eos_id == "auto":
        eos_id = EOS_ID if bytes_tokenizer else 0
    head_dim = head_dim or hidden // heads
    config = {
        "architectures": [
            {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]
        ],
        "model_type": family,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": ffn,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": rope_scaling,
        "max_position_embeddings": max_position,
        "tie_word_embeddings": tied,
        "bos_token_id": BOS_ID if bytes_tokenizer else None,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    tensors = _random_tensors(family, config, seed, scale, _DTYPES[dtype])
    _save(folder, tensors, 3 if sharded else 1)
    if tokenizer:
        _write_tokenizer(folder, vocab_size, eos_id)
    return folder


def _random_tensors(
    family: str, config: dict[str, Any], seed: int, scale: float, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, head_dim, vocab_size = config["hidden_size"], config["head_dim"], config["vocab_size"]
    out: dict[str, torch.Tensor] = {}

    def matrix(name: str, rows: int, columns: int, std: float = scale) -> None:
        out[f"{name}.weight"] = (torch.randn(rows, columns, generator=generator) * std / math.sqrt(columns)).to(dtype)

    def norm(name: str, size: int) -> None:
        out[f"{name}.weight"] = (torch.rand(size, generator=generator) + 0.5).to(dtype)

    matrix("model.embed_tokens", vocab_size, hidden, scale if config["tie_word_embeddings"] else math.sqrt(hidden))
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        heads["v_proj"] = heads["k_proj"]
        for projection, count in heads.items():
            matrix(f"{prefix}.self_attn.{projection}", count * head_dim, hidden)
            if family == "qwen2":
                bias = torch.randn(count * head_dim, generator=generator) * 0.5
                out[f"{prefix}.self_attn.{projection}.bias"] = bias.to(dtype)
        if family == "qwen3":
            norm(f"{prefix}.self_attn.q_norm", head_dim)
            norm(f"{prefix}.self_attn.k_norm", head_dim)
        matrix(f"{prefix}.self_attn.o_proj", hidden, heads["q_proj"] * head_dim)
        norm(f"{prefix}.input_layernorm", hidden)
        norm(f"{prefix}.post_attention_layernorm", hidden)
        matrix(f"{prefix}.mlp.gate_proj", config["intermediate_size"], hidden)
        matrix(f"{prefix}.mlp.up_proj", config["intermediate_size"], hidden)
        matrix(f"{prefix}.mlp.down_proj", hidden, config["intermediate_size"])
    norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        matrix("lm_head", vocab_size, hidden)
    return out


def _save(folder: Path, tensors: dict[str, torch.Tensor], num_files: int) -> None:
    metadata = {"format": "pt"}
    if num_files == 1:
        save_file(tensors, folder / "model.safetensors", metadata)
        return
    weight_map: dict[str, str] = {}
    names = list(tensors)
    for index in range(num_files):
        file_name = f"model-{index + 1:05}-of-{num_files:05}.safetensors"
        part = {name: tensors[name] for name in names[index::num_files]}
        save_file(part, folder / file_name, metadata)
        weight_map.update(dict.fromkeys(part, file_name))
    total_size = sum(tensor.nbytes for tensor in tensors.values())
    index_json = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2))


def _write_tokenizer(folder: Path, vocab_size: int, eos_id: int | None) -> None:
    if vocab_size >= BYTE_VOCAB_SIZE:
        tokenizer, special = _byte_tokenizer(), {"bos_token": SPECIAL_TOKENS[0]}
        eos = SPECIAL_TOKENS[1]
    else:
        vocab = {f"t{index}": index for index in range(vocab_size)}
        tokenizer, special = Tokenizer(models.WordLevel(vocab, unk_token="t0")), {}
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
        eos = f"t{eos_id}"
    if eos_id is not None:
        special["eos_token"] = eos
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHAT_TEMPLATE, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _byte_tokenizer() -> Tokenizer:
    """One token per byte, its id the byte's value."""
    # The byte-level alphabet shows printable bytes as themselves and the others as the characters from U+0100 on,
    # in order.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden_bytes = [byte for byte in range(256) if byte not in printable]
    vocab = {chr(byte): byte for byte in printable}
    vocab.update({chr(256 + index): byte for index, byte in enumerate(hidden_bytes)})
    tokenizer = Tokenizer(models.BPE(vocab, []))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = byte_level  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer
