"""Compiles regions into TensorRT plans: one plan for a region and a row bucket.

Rows are static and weights are inputs, so a plan depends on shapes and dtype only: the block plan of 16 rows serves
every layer. I/O tensors carry the region's names; outputs get the suffix "_out", because the residual of a block comes
in and goes out and TensorRT wants distinct names. Example: llama-70b with its 1B draft at 8 buckets is 64 plans of 100
to 400 kB, whatever the 145 GB of weights; `build_plans` yields them one by one.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from smc_build.dtypes import FP8
from smc_build.model_config import ModelConfig
from smc_build.network import ROWS, RegionSpec, TensorSpec, region_layers, region_specs
from smc_build.precision import Precision
from smc_build.tensorrt_api import TensorrtApi
from smc_build.tensorrt_ops import TensorrtOps
from smc_plugin.errors import ConfigError, SmcError
from smc_plugin.tensorrt import add_plugin, register
from smc_plugin.tensorrt_contracts import Contract

if TYPE_CHECKING:
    import tensorrt as trt

OUTPUT_SUFFIX = "_out"
# With weights as inputs a 1-row plan is more than twice as slow as an 8-row one: single rows are padded.
MIN_ROWS = 8
DATA_TYPES = {"float32": "FLOAT", "bfloat16": "BF16", FP8: "FP8"}


@dataclass
class RegionNetwork:
    """A region recorded for one row count, ready to build.

    Attributes:
        network: the recorded layers; `builder` and `ops` (which owns constants) must outlive it.
    """

    builder: "trt.Builder"
    network: "trt.INetworkDefinition"
    ops: TensorrtOps = field(repr=False)


@dataclass(frozen=True)
class Plan:
    """A compiled region.

    Attributes:
        region: its name (see smc_build.network).
        rows: the row bucket.
        data: the serialized engine.
        seconds: what compiling took.
    """

    region: str
    rows: int
    data: bytes
    seconds: float


def output_name(name: str) -> str:
    """Name of a region's output among a plan's I/O tensors."""
    return name + OUTPUT_SUFFIX


def static_shape(spec: TensorSpec, rows: int) -> tuple[int, ...]:
    """Return a tensor's shape with the row axis filled in."""
    return tuple(rows if size == ROWS else int(size) for size in spec.shape)


def plan_file(role: str, region: str, rows: int) -> str:
    """Relative path of a plan in an engine directory."""
    return f"{role}/plans/{region}.{rows}.plan"


def used_regions(config: ModelConfig) -> tuple[str, ...]:
    """Regions a model (or a rank of it) runs; one of a single layer has no block."""
    return (*(region for region, (first, last) in region_layers(config).items() if first <= last), "head")


def plan_table(role: str, config: ModelConfig, buckets: Sequence[int]) -> dict[str, dict[str, str]]:
    """List the plan files of a model for the manifest: region to row bucket (as text) to relative path."""
    return {region: {str(rows): plan_file(role, region, rows) for rows in buckets} for region in used_regions(config)}


def build_network(api: TensorrtApi, spec: RegionSpec, rows: int) -> RegionNetwork:
    """Record a region.

    Args:
        api: the installed TensorRT.
        spec: the region.
        rows: the row bucket.
    Returns:
        the network, its inputs and outputs as the spec has them.
    Raises:
        ConfigError: fewer than MIN_ROWS rows, or a dtype without a TensorRT equivalent.
        SmcError: TensorRT refuses a layer, or an output comes out other than the spec says.
    """
    if rows < MIN_ROWS:
        raise ConfigError(f"row bucket {rows} is slow as a plan, expected {MIN_ROWS} or more: pad to {MIN_ROWS} rows")
    builder = api.check(api.trt.Builder(api.logger), "create a builder")
    network = api.create_network(builder)
    api.forget_errors()
    network.name = f"{spec.name}.{rows}"
    ops = TensorrtOps(api, network)
    tensors = {
        tensor.name: network.add_input(
            tensor.name, _data_type(api, tensor), api.trt.Dims([*static_shape(tensor, rows)])
        )
        for tensor in spec.inputs
    }
    try:
        outputs = spec.build(ops, tensors)
        for tensor in spec.outputs:
            found = outputs[tensor.name]
            found.name = output_name(tensor.name)
            network.mark_output(found)
            _check_output(api, spec, tensor, rows, found)
    except RuntimeError:  # the bindings' way to say that an operation upstream makes no sense; the log has the reason
        api.check(None, f"record region {spec.name} for {rows} rows")
    return RegionNetwork(builder, network, ops)


def build_plan(api: TensorrtApi, spec: RegionSpec, rows: int) -> Plan:
    """Compile a region for one row bucket.

    Raises:
        ConfigError, SmcError: as `build_network`, or the builder finds no implementation.
    """
    started = time.perf_counter()
    recorded = build_network(api, spec, rows)
    config = api.create_config(recorded.builder)
    serialized = recorded.builder.build_serialized_network(recorded.network, config)
    data = bytes(api.check(serialized, f"compile region {spec.name} for {rows} rows"))
    return Plan(spec.name, rows, data, time.perf_counter() - started)


def build_plans(
    api: TensorrtApi, config: ModelConfig, dtype: str | Precision, buckets: Sequence[int]
) -> Iterator[Plan]:
    """Compile every region of a model for every row bucket.

    Args:
        api: the installed TensorRT.
        config: the decoder.
        dtype: element type of weights and activations, or one for each.
        buckets: row counts, each at least MIN_ROWS.
    Returns:
        the plans one by one, regions in network order, buckets in the given order.
    """
    specs = region_specs(config, dtype)
    for region in used_regions(config):
        for rows in buckets:
            yield build_plan(api, specs[region], rows)


def build_plugin_plan(api: TensorrtApi, contract: Contract, sizes: Mapping[str, int], cache_dtype: str = "") -> bytes:
    """Compile one plugin of the SMC step into an engine of its own, where TensorRT can host plugins.

    Args:
        api: the installed TensorRT.
        contract: which plugin.
        sizes: its dimension symbols to sizes, for example {"G": 4, "N": 8, "K": 8}.
        cache_dtype: element type of the KV cache, where the plugin has one.
    Returns:
        the serialized engine.
    Raises:
        ConfigError: this TensorRT cannot host plugins.
        SmcError: the builder finds no implementation.
    """
    register(api.trt)
    builder = api.check(api.trt.Builder(api.logger), "create a builder")
    network = api.create_network(builder)
    api.forget_errors()
    add_plugin(api.trt, network, contract, sizes, cache_dtype)
    serialized = builder.build_serialized_network(network, api.create_config(builder))
    return bytes(api.check(serialized, f"compile plugin {contract.name}"))


def _data_type(api: TensorrtApi, tensor: TensorSpec) -> Any:
    if tensor.dtype not in DATA_TYPES:
        raise ConfigError(
            f"{tensor.name} has dtype {tensor.dtype}, expected one of {', '.join(DATA_TYPES)} in a plan: use "
            "--compiler torch"
        )
    return api.trt.DataType.__members__[DATA_TYPES[tensor.dtype]]


def _check_output(api: TensorrtApi, spec: RegionSpec, tensor: TensorSpec, rows: int, found: "trt.ITensor") -> None:
    expected = (static_shape(tensor, rows), _data_type(api, tensor))
    got = (tuple(found.shape[axis] for axis in range(len(found.shape))), found.dtype)
    if got != expected:
        raise SmcError(
            f"region {spec.name} gives {tensor.name} as {got[1]} {got[0]}, expected {expected[1]} {expected[0]}: "
            "correct the region's description"
        )
