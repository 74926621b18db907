"""Runs regions on the fused products of smc_plugin.kernels.matmul.

A block is four launches: o, gate/up, down and the next qkv, each with the residual, norm, activation and bias around it.
For a Llama-8B block at 8 rows these four read 436 MB of weights and little else. On a tensor-parallel rank a sum over the ranks
follows o and down; residual and norm are then one more, small launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smc_build.model_config import ModelConfig
from smc_engines.regions import bind_weights
from smc_engines.tactics import ModelTactics
from smc_plugin.backend import triton_kernels
from smc_plugin.tactic import Product, Tactic

if TYPE_CHECKING:
    from smc_plugin.kernels.matmul import Prenormed

PRODUCTS = ("o", "gate_up", "down", "qkv", "head")


def product_of(config: ModelConfig, name: str, rows: int, element_bytes: int) -> Product:
    """The sizes of one of the products at a number of rows."""
    hidden, ffn = config.hidden_size, config.ffn_size
    columns, inner = {
        "o": (hidden, config.q_size),
        "gate_up": (ffn, hidden),
        "down": (hidden, ffn),
        "qkv": (config.qkv_size, hidden),
        "head": (config.vocab_size, hidden),
    }[name]
    return Product(rows, columns, inner, name == "gate_up", element_bytes)


class FusedRegions:
    """A `RegionRunner` on Triton kernels; made for a hundred rows or so, right for any number.

    Args:
        config: the decoder's shapes.
        weights: canonical names to tensors, contiguous, all on one device and of one dtype.
        tactics: how to cut products; what they do not name takes the default.
    Raises:
        ConfigError: the triton package is missing.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor], tactics: ModelTactics | None = None) -> None:
        triton_kernels()  # names the missing extra
        from smc_plugin.kernels import launch, matmul, residual_norm  # noqa: PLC0415 - importing them needs triton

        self._matmul = matmul
        self._add_and_norm = residual_norm.add_and_norm
        self._eps = config.rms_eps
        self._config = config
        self._gpu = launch.gpu_of(weights["embed"].device)
        self._element_bytes = weights["embed"].element_size()
        self._bound = bind_weights(config, weights)
        self._tactics = tactics or ModelTactics()
        self._chosen: dict[tuple[str, int], Tactic] = {}

    def choose(self, product: str, rows: int, tactic: Tactic) -> None:
        """Cut a product so from now on, at this number of rows."""
        self._chosen[product, rows] = tactic

    def tactic(self, product: str, rows: int) -> Tactic:
        """How a product is cut at this number of rows."""
        if (product, rows) not in self._chosen:
            sizes = product_of(self._config, product, rows, self._element_bytes)
            default, found = self._matmul.default_tactic(sizes, self._gpu), self._tactics.product(product, rows)
            # A tile made for many more rows would mostly multiply padding.
            fits = found is not None and found.rows == default.rows
            self._chosen[product, rows] = found if found is not None and fits else default
        return self._chosen[product, rows]

    def run(self, region: str, layer: int | None, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute one region (see RegionRunner)."""
        bound, matmul, eps = self._bound[region, layer], self._matmul, self._eps
        if region == "entry":
            x = activations["x"]
            return {"qkv": self._qkv(matmul.rms_norm(x, bound["attn_norm"], eps), x.shape[0], bound, "")}
        if region == "head":
            hidden = activations["hidden"]
            tactic = self.tactic("head", hidden.shape[0])
            logits = matmul.linear(hidden, bound["lm_head"], transpose_w=True, dtype=torch.float32, tactic=tactic)
            return {"logits": logits}
        if self._config.is_shard:
            return self._run_piece(region, bound, activations)
        attn, residual = activations["attn"], activations["residual"]
        rows = attn.shape[0]
        residual, normed = matmul.linear_and_norm(
            attn, bound["o"], residual, (bound["mlp_norm"], eps), self.tactic("o", rows)
        )
        inner = matmul.gated(normed, bound["gate_up"], self.tactic("gate_up", rows))
        tactic = self.tactic("down", rows)
        if region == "exit":
            residual = matmul.linear(inner, bound["down"], residual=residual, tactic=tactic)
            return {"hidden": matmul.rms_norm(residual, bound["final_norm"], eps)}
        norm = bound["next_attn_norm"], eps
        residual, normed = matmul.linear_and_norm(inner, bound["down"], residual, norm, tactic)
        return {"qkv": self._qkv(normed, rows, bound, "next_"), "residual": residual}

    def _run_piece(
        self, region: str, bound: Mapping[str, Tensor], activations: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """One of the regions between two sums over the ranks."""
        matmul, eps = self._matmul, self._eps
        if region == "attn_out":
            attn = activations["attn"]
            return {"partial": matmul.linear(attn, bound["o"], tactic=self.tactic("o", attn.shape[0]))}
        norm = {"feed_forward": "mlp_norm", "next_qkv": "next_attn_norm", "final": "final_norm"}[region]
        residual, normed = self._add_and_norm(activations["reduced"], activations["residual"], bound[norm], eps)
        rows = normed.shape[0]
        if region == "final":
            return {"hidden": normed}
        if region == "next_qkv":
            return {"qkv": self._qkv(normed, rows, bound, "next_"), "residual": residual}
        inner = matmul.gated(normed, bound["gate_up"], self.tactic("gate_up", rows))
        return {"partial": matmul.linear(inner, bound["down"], tactic=self.tactic("down", rows)), "residual": residual}

    def _qkv(self, x: Tensor | Prenormed, rows: int, bound: Mapping[str, Tensor], prefix: str) -> Tensor:
        bias = bound.get(f"{prefix}qkv_bias")
        return self._matmul.linear(x, bound[f"{prefix}qkv"], bias, tactic=self.tactic("qkv", rows))
