"""A tiny random target for `train_draft.py --smoke`: the same folder layout and chat markup, 259 tokens, no download.

Its weights are drawn wide, so that its next-token distribution is far from uniform and a draft has something to learn.
"""

from pathlib import Path

import torch
from gguf_checkpoint import write_json
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HIDDEN, FFN, HEADS, KV_HEADS, LAYERS = 48, 96, 3, 1, 6


def byte_tokenizer() -> Tokenizer:
    """One token a byte, after the three special ones (ids 0, 1, 2)."""
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    return tokenizer


def write_tiny_target(folder: Path, seed: int = 0) -> None:
    """Write config.json, model.safetensors and tokenizer.json of a random Llama into an existing folder."""
    generator, tokenizer = torch.Generator().manual_seed(seed), byte_tokenizer()
    vocab, kv = tokenizer.get_vocab_size(), HIDDEN // HEADS * KV_HEADS
    sizes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN), "self_attn.v_proj": (kv, HIDDEN)}
    sizes |= {"self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN)}
    sizes |= {"mlp.down_proj": (HIDDEN, FFN)}
    state = {"model.embed_tokens.weight": torch.randn(vocab, HIDDEN, generator=generator) * 0.25}
    state["model.norm.weight"] = torch.ones(HIDDEN)
    for layer in range(LAYERS):
        for name, size in sizes.items():
            weight = torch.randn(size, generator=generator) * 0.7 * size[1] ** -0.5
            state[f"model.layers.{layer}.{name}.weight"] = weight
        for name in ("input_layernorm", "post_attention_layernorm"):
            state[f"model.layers.{layer}.{name}.weight"] = torch.ones(HIDDEN)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab, "hidden_size": HIDDEN}
    config |= {"intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config |= {"num_key_value_heads": KV_HEADS, "head_dim": HIDDEN // HEADS, "rms_norm_eps": 1e-5, "rope_theta": 1e4}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "tie_word_embeddings": True}
    config |= {"hidden_act": "silu", "max_position_embeddings": 1024, "bos_token_id": 1, "eos_token_id": 2}
    write_json(folder / "config.json", config | {"torch_dtype": "float32", "dtype": "float32"})
