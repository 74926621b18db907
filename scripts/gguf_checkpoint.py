"""Turns the SmolLM2 GGUF file into an ordinary Hugging Face checkpoint folder.

Owns the tensor names, the row order of the rotary projections, the number format and the tokenizer of that folder.

Two things in a GGUF file are not as Hugging Face wants them:
  - q and k rows. GGUF rotates neighbouring pairs (0,1), (2,3), ...; Hugging Face rotates row i with row i + 32 of a
    head of 64. Row 2i of a GGUF head is row i of the Hugging Face head, row 2i+1 is row i + 32.
  - the tokenizer. It is stored as tokens, merges and a name ("smollm"): digits are split one by one, then GPT-2's
    byte-level rule applies. "in 1984" becomes ["in", "Ġ", "1", "9", "8", "4"].
Numbers: the file's 4-bit blocks (16 levels per 32 weights) are expanded and written as bfloat16; docs/models.md says
what that costs.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from smc_plugin.errors import CheckpointError

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # token_type of <|im_start|> and its kind


def open_gguf(path: Path) -> Any:
    """Open a GGUF file.

    Args:
        path: the file.
    Returns:
        A gguf.GGUFReader (typed Any: the package is an optional one).
    Raises:
        CheckpointError: the `gguf` package is missing, or the file is not GGUF.
    """
    try:
        from gguf import GGUFReader  # noqa: PLC0415  an optional package, needed here alone
    except ImportError as error:
        raise CheckpointError(
            "reading the model file needs the package gguf, found none: run `pip install gguf`, then again"
        ) from error
    try:
        return GGUFReader(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable GGUF file ({error}): delete it and fetch it again") from error


def field(reader: Any, key: str) -> Any:
    """The value of one metadata key, or a CheckpointError that names the key."""
    entry = reader.fields.get(key)
    if entry is None:
        raise CheckpointError(
            f"the GGUF file lacks the key {key}, a Llama file has it: check that it is SmolLM2-135M-Instruct"
        )
    return entry.contents()


def llama_config(reader: Any) -> dict[str, Any]:
    """config.json of the target.

    Args:
        reader: an open GGUF file of the llama architecture.
    Returns:
        The dictionary to write; `torch_dtype` and `dtype` are bfloat16 as the weights are.
    Raises:
        CheckpointError: the file holds another architecture.
    """
    architecture = field(reader, "general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"the GGUF file has architecture {architecture!r}, expected 'llama': use SmolLM2-135M-Instruct"
        )
    hidden, heads = field(reader, "llama.embedding_length"), field(reader, "llama.attention.head_count")
    theta = float(field(reader, "llama.rope.freq_base"))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field(reader, "llama.vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": field(reader, "llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field(reader, "llama.attention.head_count_kv"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": field(reader, "llama.context_length"),
        "rms_norm_eps": float(f"{field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": not any(tensor.name == "output.weight" for tensor in reader.tensors),
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": field(reader, "tokenizer.ggml.padding_token_id"),
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }


def hugging_face_name(name: str) -> str:
    """`blk.3.attn_q.weight` becomes `model.layers.3.self_attn.q_proj.weight`."""
    fixed = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    if name in fixed:
        return fixed[name]
    if name == "output.weight":
        return "lm_head.weight"
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in LAYER_NAMES:
        raise CheckpointError(
            f"unknown GGUF tensor {name}, expected a plain Llama layer's: this model is not supported"
        )
    return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.weight"


def unpermute_rotary(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of a q or k projection from neighbouring pairs to half-split pairs.

    Args:
        weight: [heads * head_dim, hidden], rows in GGUF order.
        heads: number of heads in this matrix (KV heads for k).
    Returns:
        The same shape, rows in Hugging Face order.
    """
    rows, hidden = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def state_dict(reader: Any, config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """Every weight under its Hugging Face name.

    Args:
        reader: an open GGUF file.
        config: what `llama_config` returned for it.
        dtype: number format of the result.
    Returns:
        name → contiguous tensor; matrices are [out, in].
    """
    from gguf.quants import dequantize  # noqa: PLC0415  open_gguf has already reported a missing package

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    weights: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        kind = tensor.name.split(".")[-2]
        if kind in heads:
            values = unpermute_rotary(values, heads[kind])
        weights[hugging_face_name(tensor.name)] = torch.from_numpy(np.array(values)).to(dtype)
    return weights


def tokenizer_json(reader: Any) -> dict[str, Any]:
    """tokenizer.json: byte-level BPE, digits split one by one, the file's control tokens marked special."""
    if (kind := field(reader, "tokenizer.ggml.pre")) != "smollm":
        raise CheckpointError(f"the GGUF tokenizer is {kind!r}, expected 'smollm': use SmolLM2-135M-Instruct")
    tokens = field(reader, "tokenizer.ggml.tokens")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    control = [i for i, kind in enumerate(field(reader, "tokenizer.ggml.token_type")) if kind == CONTROL_TOKEN]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i in control],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in field(reader, "tokenizer.ggml.merges")],
        },
    }


def tokenizer_config(reader: Any, config: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json, with the chat template; <|im_end|> is what ends an answer."""
    tokens = field(reader, "tokenizer.ggml.tokens")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
        "pad_token": tokens[config["pad_token_id"]],
        "unk_token": tokens[field(reader, "tokenizer.ggml.unknown_token_id")],
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "chat_template": field(reader, "tokenizer.chat_template"),
    }


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented UTF-8 JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_checkpoint(gguf_path: Path, folder: Path) -> None:
    """Convert one GGUF file into a Hugging Face folder.

    Args:
        gguf_path: the SmolLM2 file.
        folder: an existing, empty folder; gets config.json, generation_config.json, model.safetensors, tokenizer.json,
            tokenizer_config.json and special_tokens_map.json.
    Raises:
        CheckpointError: the file is unreadable or is another model.
    """
    reader = open_gguf(gguf_path)
    config = llama_config(reader)
    save_file(state_dict(reader, config), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", ids)
    write_json(folder / "tokenizer.json", tokenizer_json(reader))
    settings = tokenizer_config(reader, config)
    write_json(folder / "tokenizer_config.json", settings)
    specials = ("bos_token", "eos_token", "pad_token", "unk_token")
    write_json(folder / "special_tokens_map.json", {key: settings[key] for key in specials})
