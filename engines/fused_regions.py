"""Runs regions on the fused products of smc_plugin.kernels.matmul.

A block is four launches: o, gate/up, down and the next qkv, each with the residual, norm, activation and bias around it.
Each also asks for the weights that come next, qkv for the o after its attention, so that the memory does not idle between
launches. For a Llama-8B block at 8 rows these four read 436 MB of weights and little else.
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
from smc_plugin.tactic import Tactic

if TYPE_CHECKING:
    from smc_plugin.kernels.matmul import Prenormed, Upcoming

PRODUCTS = ("o", "gate_up", "down", "qkv", "head")


def product_sizes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Columns of the result and inner dimension of each product."""
    hidden, ffn = config.hidden_size, config.ffn_size
    return {
        "o": (hidden, config.q_size),
        "gate_up": (ffn, hidden),
        "down": (hidden, ffn),
        "qkv": (config.qkv_size, hidden),
        "head": (config.vocab_size, hidden),
    }


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
        from smc_plugin.kernels import launch, matmul  # noqa: PLC0415 - importing them needs triton

        self._matmul = matmul
        self._eps = config.rms_eps
        self._sizes = product_sizes(config)
        self._sms = launch.sm_count(weights["embed"].device)
        self._last_block = config.num_layers - 2
        self._bound = bind_weights(config, weights)
        self._tactics = tactics or ModelTactics()
        self._chosen: dict[tuple[str, int], Tactic] = {}

    def choose(self, product: str, rows: int, tactic: Tactic) -> None:
        """Cut a product so from now on, at this number of rows."""
        self._chosen[product, rows] = tactic

    def tactic(self, product: str, rows: int) -> Tactic:
        """How a product is cut at this number of rows."""
        if (product, rows) not in self._chosen:
            found = self._tactics.product(product, rows)
            is_gated = product == "gate_up"
            default = self._matmul.default_tactic(rows, *self._sizes[product], is_gated, self._sms)
            self._chosen[product, rows] = found or default
        return self._chosen[product, rows]

    def run(self, region: str, layer: int | None, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute one region (see RegionRunner)."""
        bound, matmul, eps = self._bound[region, layer], self._matmul, self._eps
        if region == "entry":
            x = activations["x"]
            normed = matmul.rms_norm(x, bound["attn_norm"], eps)
            return {"qkv": self._qkv(normed, x.shape[0], bound, "", following_layer=0)}
        if region == "head":
            hidden = activations["hidden"]
            tactic = self.tactic("head", hidden.shape[0])
            logits = matmul.linear(hidden, bound["lm_head"], transpose_w=True, dtype=torch.float32, tactic=tactic)
            return {"logits": logits}
        attn, residual = activations["attn"], activations["residual"]
        rows = attn.shape[0]
        residual, normed = matmul.linear_and_norm(
            *(attn, bound["o"], residual, (bound["mlp_norm"], eps), self.tactic("o", rows)),
            self._upcoming("gate_up", rows, bound["gate_up"]),
        )
        tactic, following = self.tactic("gate_up", rows), self._upcoming("down", rows, bound["down"])
        inner = matmul.gated(normed, bound["gate_up"], tactic, following)
        tactic = self.tactic("down", rows)
        if region == "exit":
            residual = matmul.linear(inner, bound["down"], residual=residual, tactic=tactic)
            return {"hidden": matmul.rms_norm(residual, bound["final_norm"], eps)}
        following = self._upcoming("qkv", rows, bound["next_qkv"])
        norm = bound["next_attn_norm"], eps
        residual, normed = matmul.linear_and_norm(inner, bound["down"], residual, norm, tactic, following)
        assert layer is not None
        return {"qkv": self._qkv(normed, rows, bound, "next_", layer + 1), "residual": residual}

    def _qkv(
        self, x: Tensor | Prenormed, rows: int, bound: Mapping[str, Tensor], prefix: str, following_layer: int
    ) -> Tensor:
        is_block = following_layer <= self._last_block
        after = self._bound["block" if is_block else "exit", following_layer if is_block else None]
        return self._matmul.linear(
            x,
            bound[f"{prefix}qkv"],
            bound.get(f"{prefix}qkv_bias"),
            tactic=self.tactic("qkv", rows),
            following=self._upcoming("o", rows, after["o"]),
        )

    def _upcoming(self, product: str, rows: int, weight: Tensor) -> Upcoming | None:
        return self._matmul.upcoming(weight, self.tactic(product, rows))
