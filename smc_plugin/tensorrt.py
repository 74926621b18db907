"""The SMC step as TensorRT plugins: IPluginV3 wrappers around the contracts, and their creators.

`register(trt)` makes the creators known to TensorRT's registry under the namespace "smc"; a network (of a TensorRT whose
INetworkDefinition has add_plugin_v3) then takes them through `add_plugin`. enqueue() sees raw addresses and a stream, wraps
them as torch tensors without copying, and runs the contract's kernels on that stream. Example: SmcKvPageCopy on a cache
[16, 2, 100, 16, 8, 64] has one output of that shape that is the cache itself, updated in place.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smc_plugin.errors import ConfigError
from smc_plugin.tensorrt_contracts import ANY_CACHE_DTYPE, CACHE_DTYPES, CONTRACTS, Contract

NAMESPACE = "smc"
_VERSION_FIELD = "contract_version"
# TensorRT has no float64; those tensors travel as INT64 with the same bits.
_DATA_TYPES = {
    "float64": "INT64",
    "int64": "INT64",
    "int32": "INT32",
    "float32": "FLOAT",
    "float16": "HALF",
    "bfloat16": "BF16",
    "bool": "BOOL",
}


class _Memory:
    """Device memory at an address, as torch's zero-copy protocol wants it described."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (num_bytes,),
            "typestr": "|u1",
            "version": 3,
        }


def tensor_at(address: int, shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    """View memory that somebody else owns as a tensor.

    Args:
        address: on the device.
        shape: sizes, row-major without gaps.
        dtype: element type.
        device: "cuda" or "cpu".
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if device == "cuda":
        flat = torch.as_tensor(_Memory(address, num_bytes), device=device)
    else:
        flat = torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)
    return flat.view(dtype).view(tuple(shape))


@cache
def plugin_class(trt: Any, contract: Contract) -> type:
    """Make the IPluginV3 class of a contract; instances take no arguments.

    Args:
        trt: the TensorRT module whose classes it derives from.
        contract: one of CONTRACTS.
    """
    build_base = getattr(trt, "IPluginV3OneBuildV2", trt.IPluginV3OneBuild)
    cache_types = [_data_type(trt, name) for name in CACHE_DTYPES]

    class Plugin(trt.IPluginV3, trt.IPluginV3OneCore, build_base, trt.IPluginV3OneRuntime):
        def __init__(self) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, build_base, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.plugin_name, self.plugin_namespace = contract.name, NAMESPACE
            self.plugin_version = str(contract.version)
            self.num_outputs = len(contract.outputs)
            self.timing_cache_id, self.metadata_string = "", ""
            self.format_combination_limit = len(CACHE_DTYPES)

        def get_capability_interface(self, type: Any) -> Any:
            return self

        def clone(self) -> Plugin:
            return Plugin()

        def attach_to_context(self, resource_context: Any) -> Plugin:
            return self.clone()

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection([_version_field(trt, contract)])

        def get_output_data_types(self, input_types: Sequence[Any]) -> list[Any]:
            return [
                input_types[contract.aliased[index]]
                if tensor.dtype == ANY_CACHE_DTYPE
                else _data_type(trt, tensor.dtype)
                for index, tensor in enumerate(contract.outputs)
            ]

        def get_output_shapes(self, inputs: Sequence[Any], shape_inputs: Sequence[Any], builder: Any) -> list[Any]:
            known = {
                symbol: dims[axis]
                for tensor, dims in zip(contract.inputs, inputs, strict=True)
                for axis, symbol in enumerate(tensor.dims)
            }
            outputs = []
            for tensor in contract.outputs:
                dims = trt.DimsExprs(len(tensor.dims))
                for axis, symbol in enumerate(tensor.dims):
                    dims[axis] = known[symbol]
                outputs.append(dims)
            return outputs

        def supports_format_combination(self, pos: int, in_out: Sequence[Any], num_inputs: int) -> bool:
            found, tensor = in_out[pos].desc, (*contract.inputs, *contract.outputs)[pos]
            if found.format != trt.TensorFormat.LINEAR:
                return False
            if tensor.dtype != ANY_CACHE_DTYPE:
                return found.type == _data_type(trt, tensor.dtype)
            if pos < num_inputs:
                return found.type in cache_types
            return found.type == in_out[contract.aliased[pos - num_inputs]].desc.type

        def get_aliased_input(self, output_index: int) -> int:
            return contract.aliased.get(output_index, -1)

        def configure_plugin(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            pass

        def on_shape_change(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
            contract.sizes([_sizes(each.dims) for each in inputs])

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            pass

        def get_workspace_size(self, inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
            return 0

        def enqueue(
            self,
            input_desc: Sequence[Any],
            output_desc: Sequence[Any],
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            on_stream = torch.cuda.stream(torch.cuda.ExternalStream(stream)) if device == "cuda" else _nothing()
            with on_stream:
                taken = _wrap(trt, contract.inputs, input_desc, inputs, device)
                given = _wrap(trt, contract.outputs, output_desc, outputs, device)
                contract.compute(taken, given)

    Plugin.__name__ = Plugin.__qualname__ = contract.name
    return Plugin


@cache
def creator_class(trt: Any, contract: Contract) -> type:
    """Make the IPluginCreatorV3One class of a contract."""

    class Creator(trt.IPluginCreatorV3One):
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace = contract.name, NAMESPACE
            self.plugin_version = str(contract.version)
            self.field_names = trt.PluginFieldCollection([_version_field(trt, contract)])

        def create_plugin(self, name: str, field_collection: Any, phase: Any) -> Any:
            for each in field_collection:
                if each.name == _VERSION_FIELD and int(np.asarray(each.data).reshape(-1)[0]) != contract.version:
                    raise ConfigError(
                        f"the engine holds {contract.name} of contract version {int(each.data[0])}, expected "
                        f"{contract.version}: rebuild the engine"
                    )
            return plugin_class(trt, contract)()

    Creator.__name__ = Creator.__qualname__ = f"{contract.name}Creator"
    return Creator


_registered: dict[tuple[int, str], Any] = {}


def register(trt: Any) -> dict[str, Any]:
    """Register the creators with TensorRT's plugin registry; a second call changes nothing.

    Args:
        trt: the TensorRT module.
    Returns:
        plugin name to creator.
    Raises:
        ConfigError: the registry refuses one, because another library took its name.
    """
    registry = trt.get_plugin_registry()
    for contract in CONTRACTS:
        key = (id(trt), contract.name)
        if key in _registered:
            continue
        creator = creator_class(trt, contract)()
        if not registry.register_creator(creator, NAMESPACE):
            raise ConfigError(
                f"TensorRT's registry refuses {NAMESPACE}::{contract.name} version {contract.version}, expected the name "
                "to be free: load only one copy of this package"
            )
        _registered[key] = creator  # the registry keeps no reference of its own
    return {contract.name: _registered[id(trt), contract.name] for contract in CONTRACTS}


def add_plugin(trt: Any, network: Any, contract: Contract, sizes: Mapping[str, int], cache_dtype: str = "") -> Any:
    """Record a network that is one plugin: its inputs, the layer, its outputs.

    Args:
        trt: the TensorRT module.
        network: an INetworkDefinition with add_plugin_v3.
        contract: which plugin.
        sizes: dimension symbols to sizes.
        cache_dtype: element type of the KV cache, where the plugin has one.
    Returns:
        the plugin layer.
    Raises:
        ConfigError: this TensorRT cannot host plugins.
    """
    if not hasattr(network, "add_plugin_v3"):
        raise ConfigError(
            f"this TensorRT cannot host {contract.name} (no add_plugin_v3), expected full TensorRT: launch the kernels of "
            "smc_plugin.kernels instead"
        )
    inputs = [
        network.add_input(
            tensor.name,
            _data_type(trt, cache_dtype if tensor.dtype == ANY_CACHE_DTYPE else tensor.dtype),
            trt.Dims([sizes[symbol] for symbol in tensor.dims]),
        )
        for tensor in contract.inputs
    ]
    layer = network.add_plugin_v3(inputs, [], plugin_class(trt, contract)())
    for index, tensor in enumerate(contract.outputs):
        layer.get_output(index).name = tensor.name
        network.mark_output(layer.get_output(index))
    return layer


def _wrap(trt: Any, specs: Sequence[Any], descs: Sequence[Any], addresses: Sequence[int], device: str) -> list[Tensor]:
    names = {_data_type(trt, name): name for name in CACHE_DTYPES}
    return [
        tensor_at(
            address,
            _sizes(desc.dims),
            getattr(torch, names[desc.type] if spec.dtype == ANY_CACHE_DTYPE else spec.dtype),
            device,
        )
        for spec, desc, address in zip(specs, descs, addresses, strict=True)
    ]


def _sizes(dims: Any) -> tuple[int, ...]:
    return tuple(dims[axis] for axis in range(len(dims)))


def _data_type(trt: Any, dtype: str) -> Any:
    return trt.DataType.__members__[_DATA_TYPES[dtype]]


def _version_field(trt: Any, contract: Contract) -> Any:
    value = np.array([contract.version], dtype=np.int32)
    return trt.PluginField(_VERSION_FIELD, value, trt.PluginFieldType.INT32)


def _nothing() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()
