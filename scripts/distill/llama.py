"""A Llama forward pass as plain functions over a dictionary of weights (Hugging Face names).

Owns the model's mathematics for distillation. Weights are arguments, so one compiled `decoder_layer` serves all 30 target
layers and, with gradients and fake quantization, the draft's. Activations have the dtype of the embedding; master weights
may be float32 and are rounded at use.
Example: SmolLM2 at 64 rows of 512 tokens: hidden states [64, 512, 576], 9 query heads share 3 KV heads, head_dim 64.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from draft_layers import fake_quantize
from safetensors.torch import load_file
from torch.nn import functional

Weights = dict[str, torch.Tensor]
EMBEDDING, FINAL_NORM = "model.embed_tokens.weight", "model.norm.weight"
LAYER_PARTS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@dataclass(frozen=True)
class Shape:
    """The numbers of a Llama config that the mathematics needs; `bits` = 0 means no fake quantization."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    theta: float
    bits: int = 0
    group: int = 0


def shape_of(config: dict[str, Any]) -> Shape:
    """Shape of a config.json dictionary (Llama, default rotary embedding)."""
    rope = config.get("rope_parameters") or {}
    heads = config["num_attention_heads"]
    return Shape(
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        eps=config["rms_norm_eps"],
        theta=float(rope.get("rope_theta") or config["rope_theta"]),
    )


def load_checkpoint(folder: Path, device: str, dtype: torch.dtype) -> tuple[Weights, dict[str, Any]]:
    """Read a Hugging Face folder with tied embeddings.

    Args:
        folder: holds config.json and model.safetensors.
        device, dtype: where and as what the weights go.
    Returns:
        weights and the config dictionary.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "model.safetensors", device=device)
    return {name: weight.to(dtype) for name, weight in weights.items()}, config


def layer_weights(weights: Weights, layer: int) -> tuple[torch.Tensor, ...]:
    """The nine tensors of one layer in the order of LAYER_PARTS."""
    return tuple(weights[f"model.layers.{layer}.{part}.weight"] for part in LAYER_PARTS)


def rope_tables(shape: Shape, length: int, device: str | torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each [length, head_dim] float32, halves repeated as Hugging Face has them."""
    half = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32) / shape.head_dim
    angles = torch.arange(length, device=device, dtype=torch.float32)[:, None] * shape.theta**-half
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMS norm in float32, returned in the dtype of `x`."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding on the last axis; cos and sin broadcast against `x`."""
    first, second = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat((-second, first), -1) * sin).to(x.dtype)


def decoder_layer(
    x: torch.Tensor, weights: tuple[torch.Tensor, ...], cos: torch.Tensor, sin: torch.Tensor, shape: Shape
) -> torch.Tensor:
    """One decoder layer over whole rows.

    Args:
        x: [B, T, H] residual stream.
        weights: what `layer_weights` returns; matrices are fake-quantized when shape.bits is set.
        cos, sin: [T, head_dim].
        shape: the model's numbers.
    Returns:
        [B, T, H].
    """
    norm_1, q, k, v, o, norm_2, gate, up, down = weights

    def linear(y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        weight = fake_quantize(weight, shape.bits, shape.group) if shape.bits else weight
        return functional.linear(y, weight.to(y.dtype))

    def heads(y: torch.Tensor) -> torch.Tensor:
        return y.view(*y.shape[:2], -1, shape.head_dim).transpose(1, 2)

    y = rms_norm(x, norm_1, shape.eps)
    query, key, value = (
        rotate(heads(linear(y, q)), cos, sin),
        rotate(heads(linear(y, k)), cos, sin),
        heads(linear(y, v)),
    )
    mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    x = x + linear(mixed.transpose(1, 2).flatten(2), o)
    y = rms_norm(x, norm_2, shape.eps)
    return x + linear(functional.silu(linear(y, gate)) * linear(y, up), down)


def hidden_states(
    weights: Weights, tokens: torch.Tensor, shape: Shape, layer: Callable[..., torch.Tensor] = decoder_layer
) -> torch.Tensor:
    """Final hidden states, which the tied head turns into logits.

    Args:
        weights: the model's, embedding included.
        tokens: [B, T] integer, right-padded (causality makes padding harmless to what precedes it).
        shape: the model's numbers.
        layer: `decoder_layer` or its compiled form.
    Returns:
        [B, T, H] in the embedding's dtype.
    """
    x = functional.embedding(tokens, weights[EMBEDDING])
    cos, sin = rope_tables(shape, tokens.shape[1], tokens.device)
    for index in range(shape.layers):
        x = layer(x, layer_weights(weights, index), cos, sin, shape)
    return rms_norm(x, weights[FINAL_NORM], shape.eps)
