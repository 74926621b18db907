"""A plain decoder made of the regions and full attention: what the composition of regions must compute.

It is the shortest complete caller of `region_specs`: rope, q/k norms and attention over one sequence, without pages.
"""

import torch
import torch.nn.functional as F

from smc_build.model_config import ModelConfig
from smc_build.network import layer_inputs, region_specs
from smc_build.torch_ops import TorchOps


def full_logits(config: ModelConfig, weights: dict[str, torch.Tensor], token_ids: torch.Tensor) -> torch.Tensor:
    """Logits of every position of one sequence.

    Args:
        config: the decoder.
        weights: canonical weights.
        token_ids: [rows] int64.
    Returns:
        [rows, vocab_size] float32.
    """
    ops, dtype = TorchOps(), weights["embed"].dtype
    specs = region_specs(config, dtype)
    last = config.num_layers - 1

    def run(region: str, layer: int, **activations: torch.Tensor) -> dict[str, torch.Tensor]:
        bound = {name: weights[weight] for name, weight in layer_inputs(config, region, layer).items()}
        inputs = {**activations, **bound}
        assert list(inputs) == [spec.name for spec in specs[region].inputs]
        return specs[region].build(ops, inputs)

    residual = weights["embed"][token_ids]
    qkv = run("entry", 0, x=residual)["qkv"]
    for layer in range(last):
        out = run("block", layer, attn=_attention(config, weights, layer, qkv), residual=residual)
        qkv, residual = out["qkv"], out["residual"]
    hidden = run("exit", last, attn=_attention(config, weights, last, qkv), residual=residual)["hidden"]
    return run("head", last, hidden=hidden)["logits"]


def _attention(config: ModelConfig, weights: dict[str, torch.Tensor], layer: int, qkv: torch.Tensor) -> torch.Tensor:
    parts = qkv.split([config.q_size, config.kv_size, config.kv_size], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, config.head_dim)).transpose(0, 1) for part in parts)
    if config.qk_norm:
        q = TorchOps().rms_norm(q, weights[f"layers.{layer}.q_norm"], config.rms_eps)
        k = TorchOps().rms_norm(k, weights[f"layers.{layer}.k_norm"], config.rms_eps)
    q, k = _rope(config, q), _rope(config, k)
    out = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
    return out.transpose(0, 1).flatten(1)


def _rope(config: ModelConfig, x: torch.Tensor) -> torch.Tensor:
    angles = torch.arange(x.shape[1]).float()[:, None] * config.inv_freq()[None]
    cos, sin = angles.cos().repeat(1, 2).to(x.dtype), angles.sin().repeat(1, 2).to(x.dtype)
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin
