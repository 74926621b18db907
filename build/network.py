"""The decoder, written once, as regions over an op set.

A region is a stretch of the network between two attention calls. Weights are region inputs, so one region serves
every layer:

    entry:  attn_norm, qkv                                                        residual -> qkv
    block:  o, add, mlp_norm, gate/up, silu*mul, down, add, next norm, next qkv   attention, residual -> qkv, residual
    exit:   the same up to the second add, then the final norm                    attention, residual -> hidden
    head:   lm_head                                                               hidden -> logits

A model of L layers runs entry(0), attention(0), block(0), attention(1), ..., block(L-2), attention(L-1), exit, head.
On a tensor-parallel rank a region also ends at each sum over the ranks, so block and exit fall into pieces (S is the sum):

    attn_out:     o                                                               attention -> partial
    feed_forward: add, mlp_norm, gate/up, silu*mul, down                          S(partial), residual -> partial, residual
    next_qkv:     add, next norm, next qkv                                        S(partial), residual -> qkv, residual
    final:        add, final norm                                                 S(partial), residual -> hidden

Rope, the q/k norms of Qwen3 and attention belong to the caller: they read and write KV pages. Example: Llama-3.2-1B
at 16 rows maps x [16, 2048] to qkv [16, 3072]; 15 block calls bind the same spec to other weights (`layer_inputs`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from smc_build.model_config import ModelConfig
from smc_build.precision import SCALES, Precision, as_precision
from smc_build.weights import head_weight, layer_shapes, weight_shapes
from smc_plugin.errors import ConfigError

RegionName = Literal["entry", "block", "exit", "head", "attn_out", "feed_forward", "next_qkv", "final"]
ROWS = "rows"


class Ops(Protocol):
    """What a back end must be able to do; a tensor is whatever the back end uses for one.

    Every op is free of data-dependent control flow, so that a back end may record a network instead of computing.
    Collectives join as further methods; regions that do not call them are unaffected.
    """

    def matmul(self, x: Any, w: Any, bias: Any = None, transpose_w: bool = False) -> Any:
        """x [rows, in] @ w [in, out] (or w [out, in] with transpose_w), plus bias [out]."""
        ...

    def fp8_matmul(self, x: Any, w: Any, scale: Any, input_scale: Any, bias: Any = None) -> Any:
        """x [rows, in] @ FP8 w [out, in], transposed, times scale [out] float32, plus bias [out].

        Args:
            input_scale: [1] float32; a back end that rounds x to FP8 rounds x / input_scale.
        """
        ...

    def rms_norm(self, x: Any, w: Any, eps: float) -> Any:
        """Divide each row by the root of its mean square plus eps, in float32, and scale by w."""
        ...

    def silu_mul(self, gate_up: Any) -> Any:
        """silu(first half of the columns) * second half: [rows, 2f] to [rows, f]."""
        ...

    def add(self, a: Any, b: Any) -> Any:
        """Elementwise sum of two tensors of one shape."""
        ...

    def to_float32(self, x: Any) -> Any:
        """Convert to float32."""
        ...


@dataclass(frozen=True)
class TensorSpec:
    """A region's input or output: the row axis, which varies, is the string "rows"; dtype is a name."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str


@dataclass(frozen=True)
class RegionSpec:
    """One region: its inputs (activations first, then weights), outputs, and the function that composes it from ops."""

    name: RegionName
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    build: Callable[[Ops, dict[str, Any]], dict[str, Any]]


def region_specs(config: ModelConfig, dtype: str | torch.dtype | Precision) -> dict[str, RegionSpec]:
    """Describe the regions of a decoder, or of one rank of it.

    Args:
        config: the decoder; or a rank's, whose regions end at each sum over the ranks.
        dtype: element type of weights, activations and partial sums, or one for each; logits are float32.
    Returns:
        names to specs, in the order in which a model runs them: entry, block, exit, head; or entry, attn_out, feed_forward,
        next_qkv, final, head.
    """
    precision, eps = as_precision(dtype), config.rms_eps
    name = precision.activations
    shapes = {**layer_shapes(config, precision), **weight_shapes(config, precision)}

    def rows(tensor: str, width: int, as_dtype: str = name) -> TensorSpec:
        return TensorSpec(tensor, (ROWS, width), as_dtype)

    def weights(*names: str, prefix: str = "") -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(prefix + weight, shapes[weight], precision.dtype_of(weight))
            for weight in with_scales(names, precision)
        )

    attention_in = ("attn_norm", "qkv", "qkv_bias") if config.qkv_bias else ("attn_norm", "qkv")
    x, residual = rows("x", config.hidden_size), rows("residual", config.hidden_size)
    attn, qkv, hidden = rows("attn", config.q_size), rows("qkv", config.qkv_size), rows("hidden", config.hidden_size)
    mlp = weights("o", "mlp_norm", "gate_up", "down")
    final_norm = TensorSpec("final_norm", (config.hidden_size,), name)
    lm_head = (
        weights("lm_head")
        if not config.tied_head
        else (TensorSpec("lm_head", (config.vocab_size, config.hidden_size), name),)
    )
    logits = rows("logits", config.vocab_size, "float32")
    entry = RegionSpec("entry", (x, *weights(*attention_in)), (qkv,), lambda ops, t: _entry(ops, t, eps))
    head = RegionSpec("head", (hidden, *lm_head), (logits,), _head)
    if config.is_shard:
        partial, reduced = rows("partial", config.hidden_size), rows("reduced", config.hidden_size)
        regions = (
            entry,
            RegionSpec("attn_out", (attn, *weights("o")), (partial,), _attn_out),
            RegionSpec(
                "feed_forward",
                (reduced, residual, *weights("mlp_norm", "gate_up", "down")),
                (partial, residual),
                lambda ops, t: _feed_forward(ops, t, eps),
            ),
            RegionSpec(
                "next_qkv",
                (reduced, residual, *weights(*attention_in, prefix="next_")),
                (qkv, residual),
                lambda ops, t: _next_qkv(ops, t, eps),
            ),
            RegionSpec("final", (reduced, residual, final_norm), (hidden,), lambda ops, t: _final(ops, t, eps)),
            head,
        )
        return {region.name: region for region in regions}
    regions = (
        entry,
        RegionSpec(
            "block",
            (attn, residual, *mlp, *weights(*attention_in, prefix="next_")),
            (qkv, residual),
            lambda ops, t: _block(ops, t, eps),
        ),
        RegionSpec("exit", (attn, residual, *mlp, final_norm), (hidden,), lambda ops, t: _exit(ops, t, eps)),
        head,
    )
    return {region.name: region for region in regions}


def with_scales(names: Sequence[str], precision: Precision) -> Iterator[str]:
    """The weights, each FP8 one followed by its scales."""
    for name in names:
        yield name
        if precision.is_fp8(name):
            yield from (name + suffix for suffix in SCALES)


def layer_inputs(
    config: ModelConfig, region: str, layer: int | None = None, precision: Precision | None = None
) -> dict[str, str]:
    """Say which canonical weight each weight input of a region takes.

    Args:
        config: the decoder, or a rank's.
        region: "entry" (layer 0), "block" (layers 0 to L-2), "exit" (layer L-1) or "head"; of a rank "attn_out" and
            "feed_forward" (all layers), "next_qkv" (layers 0 to L-2) and "final" (layer L-1).
        layer: the layer whose attention precedes the region; needed where there are several.
        precision: says which matrices are FP8 and so have scales; None means none.
    Returns:
        region input name to weight name.
    Raises:
        ConfigError: the region is unknown or the layer has no such region.
    """

    def scaled(*names: str) -> Iterator[str]:
        return iter(names) if precision is None else with_scales(names, precision)

    attention_in = list(scaled("attn_norm", "qkv", *(("qkv_bias",) if config.qkv_bias else ())))
    if region == "head":
        return {"lm_head": head_weight(config)} if config.tied_head else {name: name for name in scaled("lm_head")}
    allowed = region_layers(config).get(region)
    if allowed is None:
        names = [*region_layers(config), "head"]
        raise ConfigError(f"region {region!r} does not exist, expected one of {', '.join(names)}: correct the name")
    index = allowed[0] if layer is None and not is_repeated(region) else layer
    if index is None or not allowed[0] <= index <= allowed[1]:
        raise ConfigError(
            f"region {region!r} does not exist at layer {layer}, expected a layer from {allowed[0]} to "
            f"{allowed[1]}: correct the layer"
        )
    if region == "entry":
        return {weight: f"layers.{index}.{weight}" for weight in attention_in}
    own = {"attn_out": ("o",), "feed_forward": ("mlp_norm", "gate_up", "down"), "next_qkv": (), "final": ()}
    names = own.get(region, ("o", "mlp_norm", "gate_up", "down"))
    bound = {weight: f"layers.{index}.{weight}" for weight in scaled(*names)}
    if region in ("exit", "final"):
        bound["final_norm"] = "final_norm"
    if region in ("block", "next_qkv"):
        bound |= {f"next_{weight}": f"layers.{index + 1}.{weight}" for weight in attention_in}
    return bound


def region_layers(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """First and last layer of each region that belongs to layers, in order; a range is empty in a model of one layer."""
    last = config.num_layers - 1
    if config.is_shard:
        return {
            "entry": (0, 0),
            "attn_out": (0, last),
            "feed_forward": (0, last),
            "next_qkv": (0, last - 1),
            "final": (last, last),
        }
    return {"entry": (0, 0), "block": (0, last - 1), "exit": (last, last)}


def is_repeated(region: str) -> bool:
    """Whether a region is run for several layers, so that a layer must be named."""
    return region not in ("entry", "exit", "final", "head")


def _product(ops: Ops, t: dict[str, Any], weight: str, x: Any, bias: Any = None) -> Any:
    """x times a weight, which has scales when it is FP8."""
    if f"{weight}_scale" in t:
        return ops.fp8_matmul(x, t[weight], t[f"{weight}_scale"], t[f"{weight}_input_scale"], bias)
    return ops.matmul(x, t[weight], bias)


def _entry(ops: Ops, t: dict[str, Any], eps: float) -> dict[str, Any]:
    normed = ops.rms_norm(t["x"], t["attn_norm"], eps)
    return {"qkv": _product(ops, t, "qkv", normed, t.get("qkv_bias"))}


def _attn_out(ops: Ops, t: dict[str, Any]) -> dict[str, Any]:
    return {"partial": _product(ops, t, "o", t["attn"])}


def _feed_forward(ops: Ops, t: dict[str, Any], eps: float) -> dict[str, Any]:
    residual = ops.add(t["residual"], t["reduced"])
    gate_up = _product(ops, t, "gate_up", ops.rms_norm(residual, t["mlp_norm"], eps))
    return {"partial": _product(ops, t, "down", ops.silu_mul(gate_up)), "residual": residual}


def _next_qkv(ops: Ops, t: dict[str, Any], eps: float) -> dict[str, Any]:
    residual = ops.add(t["residual"], t["reduced"])
    normed = ops.rms_norm(residual, t["next_attn_norm"], eps)
    return {"qkv": _product(ops, t, "next_qkv", normed, t.get("next_qkv_bias")), "residual": residual}


def _final(ops: Ops, t: dict[str, Any], eps: float) -> dict[str, Any]:
    return {"hidden": ops.rms_norm(ops.add(t["residual"], t["reduced"]), t["final_norm"], eps)}


def _after_feed_forward(ops: Ops, t: dict[str, Any], eps: float) -> dict[str, Any]:
    """What the last piece of a block or exit takes: with one rank, a partial sum is the sum."""
    out = _feed_forward(ops, {**t, "reduced": _attn_out(ops, t)["partial"]}, eps)
    return {**t, "reduced": out["partial"], "residual": out["residual"]}


def _block(ops: Ops, t: dict[str, Any], eps: float) -> dict[str, Any]:
    return _next_qkv(ops, _after_feed_forward(ops, t, eps), eps)


def _exit(ops: Ops, t: dict[str, Any], eps: float) -> dict[str, Any]:
    return _final(ops, _after_feed_forward(ops, t, eps), eps)


def _head(ops: Ops, t: dict[str, Any]) -> dict[str, Any]:
    if "lm_head_scale" in t:
        return {"logits": ops.to_float32(_product(ops, t, "lm_head", t["hidden"]))}
    return {"logits": ops.to_float32(ops.matmul(t["hidden"], t["lm_head"], transpose_w=True))}
