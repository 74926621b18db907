"""Runs regions on the fused products of smc_plugin.kernels.matmul.

A block is four launches: o, gate/up, down and the next qkv, each with the residual, norm, activation and bias around it.
For a Llama-8B block at 8 rows these four read 436 MB of weights and little else. On a tensor-parallel rank a sum over the ranks
follows o and down; the sum, residual and norm are then one more, small launch, or two where the sum is a launch of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from smc_build.dtypes import dtype_bytes
from smc_build.model_config import ModelConfig
from smc_build.precision import Precision
from smc_engines.regions import bind_weights
from smc_engines.tactics import ModelTactics
from smc_plugin.backend import triton_kernels
from smc_plugin.tactic import Product, Tactic

if TYPE_CHECKING:
    from smc_engines.parallel.sums import RankSums
    from smc_plugin.kernels.matmul import Prenormed

PRODUCTS = ("o", "gate_up", "down", "qkv", "head")
# Regions that begin with a sum over the ranks, and the norm that follows it.
_NORMS = {"feed_forward": "mlp_norm", "next_qkv": "next_attn_norm", "final": "final_norm"}


def product_of(config: ModelConfig, name: str, rows: int, element_bytes: int, input_bytes: int) -> Product:
    """The sizes of one of the products at a number of rows."""
    hidden, ffn = config.hidden_size, config.ffn_size
    columns, inner = {
        "o": (hidden, config.q_size),
        "gate_up": (ffn, hidden),
        "down": (hidden, ffn),
        "qkv": (config.qkv_size, hidden),
        "head": (config.vocab_size, hidden),
    }[name]
    return Product(rows, columns, inner, name == "gate_up", element_bytes, input_bytes)


class FusedRegions:
    """A `RegionRunner` on Triton kernels; made for a hundred rows or so, right for any number.

    Args:
        config: the decoder's shapes.
        weights: canonical names to tensors, contiguous, all on one device; matrices may be FP8, [columns, inner].
        tactics: how to cut products; what they do not name takes the default.
        sums: makes the sums over ranks, where the model is one rank's part; None leaves them to the caller.
    Raises:
        ConfigError: the triton package is missing.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        tactics: ModelTactics | None = None,
        sums: RankSums | None = None,
    ) -> None:
        triton_kernels()  # names the missing extra
        from smc_plugin.kernels import launch, matmul, residual_norm  # noqa: PLC0415 - importing them needs triton

        self._matmul = matmul
        self._sums = sums if config.is_shard else None
        self._add_and_norm = residual_norm.add_and_norm
        self._eps = config.rms_eps
        self._config = config
        self._gpu = launch.gpu_of(weights["embed"].device)
        self._precision = Precision.of(weights)
        self._bound = bind_weights(config, weights)
        self._tactics = tactics or ModelTactics()
        self._chosen: dict[tuple[str, int], Tactic] = {}

    def product(self, name: str, rows: int) -> Product:
        """The sizes of a product at this number of rows."""
        weights = self._precision.head if name == "head" else self._precision.matrices
        return product_of(self._config, name, rows, dtype_bytes(weights), dtype_bytes(self._precision.activations))

    def choose(self, product: str, rows: int, tactic: Tactic) -> None:
        """Cut a product so from now on, at this number of rows."""
        self._chosen[product, rows] = tactic

    def tactic(self, product: str, rows: int) -> Tactic:
        """How a product is cut at this number of rows."""
        if (product, rows) not in self._chosen:
            sizes = self.product(product, rows)
            default, found = self._matmul.default_tactic(sizes, self._gpu), self._tactics.product(product, rows)
            # A tile made for many more rows would mostly multiply padding.
            fits = found is not None and (found.rows == default.rows or rows <= found.height <= default.rows)
            self._chosen[product, rows] = found if found is not None and fits else default
        return self._chosen[product, rows]

    def sums_ranks(self, region: str, rows: int) -> bool:
        """See RegionRunner."""
        return self._sums is not None and region in _NORMS and self._sums.takes(rows)

    def sum_gain_us(self, region: str, rows: int) -> float:
        """Microseconds that it saves where it makes the sum over the ranks that a region begins with."""
        return self._sums.gain_us(rows) if self._sums is not None and self.sums_ranks(region, rows) else 0.0

    def run(self, region: str, layer: int | None, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute one region (see RegionRunner)."""
        bound, matmul, eps = self._bound[region, layer], self._matmul, self._eps
        if region == "entry":
            x = activations["x"]
            return {"qkv": self._qkv(matmul.rms_norm(x, bound["attn_norm"], eps), x.shape[0], bound, "")}
        if region == "head":
            hidden = activations["hidden"]
            tactic = self.tactic("head", hidden.shape[0])
            logits = matmul.linear(
                hidden, bound["lm_head"], None, None, True, torch.float32, tactic, bound.get("lm_head_scale")
            )
            return {"logits": logits}
        if self._config.is_shard:
            return self._run_piece(region, bound, activations)
        attn, residual = activations["attn"], activations["residual"]
        rows = attn.shape[0]
        fp8 = self._precision.is_fp8("qkv")  # matrices are then [columns, inner]
        residual, normed = matmul.linear_and_norm(
            *(attn, bound["o"], residual, (bound["mlp_norm"], eps), self.tactic("o", rows), fp8, bound.get("o_scale"))
        )
        inner = matmul.gated(normed, bound["gate_up"], self.tactic("gate_up", rows), fp8, bound.get("gate_up_scale"))
        tactic, scale = self.tactic("down", rows), bound.get("down_scale")
        if region == "exit":
            residual = matmul.linear(inner, bound["down"], None, residual, fp8, None, tactic, scale)
            return {"hidden": matmul.rms_norm(residual, bound["final_norm"], eps)}
        norm = bound["next_attn_norm"], eps
        residual, normed = matmul.linear_and_norm(inner, bound["down"], residual, norm, tactic, fp8, scale)
        return {"qkv": self._qkv(normed, rows, bound, "next_"), "residual": residual}

    def _run_piece(
        self, region: str, bound: Mapping[str, Tensor], activations: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """One of the regions between two sums over the ranks."""
        matmul, eps = self._matmul, self._eps
        if region == "attn_out":
            return {"partial": self._partial("o", activations["attn"], bound)}
        norm, residual = bound[_NORMS[region]], activations["residual"]
        if "partial" in activations:
            assert self._sums is not None
            residual, normed = self._sums(activations["partial"], residual, norm, eps)
        else:
            residual, normed = self._add_and_norm(activations["reduced"], residual, norm, eps)
        rows = normed.shape[0]
        if region == "final":
            return {"hidden": normed}
        if region == "next_qkv":
            return {"qkv": self._qkv(normed, rows, bound, "next_"), "residual": residual}
        scale = bound.get("gate_up_scale")
        inner = matmul.gated(normed, bound["gate_up"], self.tactic("gate_up", rows), scale is not None, scale)
        return {"partial": self._partial("down", inner, bound), "residual": residual}

    def _partial(self, name: str, x: Tensor, bound: Mapping[str, Tensor]) -> Tensor:
        """A rank's part of a product that is summed over the ranks."""
        scale, tactic = bound.get(f"{name}_scale"), self.tactic(name, x.shape[0])
        return self._matmul.linear(x, bound[name], None, None, scale is not None, None, tactic, scale)

    def _qkv(self, x: Tensor | Prenormed, rows: int, bound: Mapping[str, Tensor], prefix: str) -> Tensor:
        bias, scale = bound.get(f"{prefix}qkv_bias"), bound.get(f"{prefix}qkv_scale")
        tactic = self.tactic("qkv", rows)
        return self._matmul.linear(x, bound[f"{prefix}qkv"], bias, None, scale is not None, None, tactic, scale)
