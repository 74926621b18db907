"""Runs regions as TensorRT plans on a GPU.

The runner owns one execution context for each (region, row bucket). Contexts share one scratch allocation, since regions
run one after the other on one stream; kernels that TensorRT-RTX compiles on first use go to a runtime cache on disk.
A call picks the smallest bucket that holds its rows, pads, binds the layer's weights by address and enqueues on the
current stream, so that it can be captured in a CUDA graph. Example: 72 rows with buckets (8, 64, 96) run as 96; the
last 24 rows hold anything, no row depends on another, and [:72] is returned. More than 96 rows run with torch.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from smc_build.dtypes import torch_dtype
from smc_build.engine_dir import Manifest, Role, read_file
from smc_build.model_config import ModelConfig
from smc_build.network import RegionSpec, TensorSpec, is_repeated, region_specs
from smc_build.plans import DATA_TYPES, output_name, static_shape
from smc_build.precision import Precision
from smc_build.tensorrt_api import TensorrtApi, find
from smc_engines.regions import RegionRunner, TorchRegions, bind_weights
from smc_plugin.errors import EngineDirError, SmcError

if TYPE_CHECKING:
    import tensorrt as trt

CACHE_FOLDER = "runtime_cache"
# TensorRT wants the addresses of I/O tensors and scratch aligned so.
ALIGNMENT_BYTES = 256

_log = logging.getLogger("smc_engines.plans")


class Scratch:
    """Device memory that execution contexts share; contexts that use it must never run at the same time.

    It grows when a context needs more than it has, which moves it: create every context before capturing a graph.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._contexts: list[Any] = []

    @property
    def num_bytes(self) -> int:
        """Bytes allocated."""
        return 0 if self._buffer is None else self._buffer.numel()

    def attach(self, context: Any, num_bytes: int) -> None:
        """Give a context its scratch memory; call between runs, not while one is enqueued."""
        self._contexts.append(context)
        if self._buffer is None or num_bytes > self.num_bytes:
            self._buffer = torch.empty(max(num_bytes, ALIGNMENT_BYTES), dtype=torch.uint8, device="cuda")
            moved = self._contexts
        else:
            moved = [context]
        for each in moved:
            each.set_device_memory(self._buffer.data_ptr(), self.num_bytes)


class PlanRegions:
    """A `RegionRunner` over TensorRT plans.

    Args:
        api: the TensorRT that built the plans.
        config: the decoder's shapes.
        weights: canonical names to tensors on the GPU, contiguous.
        plans: (region, rows, serialized plan) triples.
        scratch: shared with other runners of the same stream; None makes a new one.
        cache_file: where compiled kernels are kept between runs; None keeps them in memory only.
        large: who runs more rows than the largest bucket; None takes torch.
    Raises:
        EngineDirError: a plan cannot be loaded here or has other inputs and outputs than its region.
        SmcError: TensorRT refuses to create a context.
    """

    def __init__(
        self,
        api: TensorrtApi,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        plans: Iterable[tuple[str, int, bytes]],
        scratch: Scratch | None = None,
        cache_file: Path | None = None,
        large: RegionRunner | None = None,
    ) -> None:
        self._api = api
        self._dtype = weights["embed"].dtype
        self._specs: dict[str, RegionSpec] = dict(region_specs(config, Precision.of(weights)))
        self._bound = {
            place: {name: _address(name, tensor) for name, tensor in bound.items()}
            for place, bound in bind_weights(config, weights).items()
        }
        self._weights = weights  # keeps the addresses alive
        self._large = large or TorchRegions(config, weights)
        self.scratch = scratch or Scratch()
        self._runtime = api.check(api.trt.Runtime(api.logger), "create a runtime")
        self._cache: Any = None
        self._cache_file = cache_file if api.has_runtime_cache else None
        self._contexts: dict[tuple[str, int], Any] = {}
        self._alive: list[Any] = []
        for region, rows, data in plans:
            self._load(region, rows, data)
        self._buckets = {
            region: sorted(rows for name, rows in self._contexts if name == region) for region in self._specs
        }

    def _load(self, region: str, rows: int, data: bytes) -> None:
        self._api.forget_errors()
        engine = self._runtime.deserialize_cuda_engine(data)
        if engine is None:
            raise EngineDirError(
                f"the plan of {region} for {rows} rows does not load ({self._api.first_error or 'no reason given'}), "
                f"expected one of {self._api.compiler} {self._api.version} for this GPU: rebuild the engine directory "
                "with smc-build"
            )
        _check_io(self._specs[region], rows, engine)
        if self._cache is None and self._api.has_runtime_cache:
            self._cache = self._api.create_runtime_cache(engine, _read_or_none(self._cache_file))
        config = self._api.create_runtime_config(engine, self._cache)
        context = self._api.check(engine.create_execution_context(config), "create an execution context")
        self._alive += [engine, config]
        self.scratch.attach(context, engine.device_memory_size_v2)
        self._contexts[region, rows] = context

    @property
    def buckets(self) -> dict[str, list[int]]:
        """Row buckets of each region, ascending."""
        return self._buckets

    def run(self, region: str, layer: int | None, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute one region (see RegionRunner)."""
        rows = next(iter(activations.values())).shape[0]
        buckets = self._buckets[region]
        place = bisect_left(buckets, rows)
        if place == len(buckets):
            return self._large.run(region, layer, activations)
        bucket = buckets[place]
        padded = {name: _pad(tensor, bucket) for name, tensor in activations.items()}
        outputs = self.allocate_outputs(region, bucket)
        self.execute(region, layer, bucket, padded, outputs)
        return {name: tensor[:rows] for name, tensor in outputs.items()}

    def sums_ranks(self, region: str, rows: int) -> bool:
        """Never; see RegionRunner."""
        return False

    def allocate_outputs(self, region: str, bucket: int) -> dict[str, Tensor]:
        """Allocate a region's outputs for one bucket, on the GPU, with whatever the memory holds."""
        return {
            spec.name: torch.empty(static_shape(spec, bucket), dtype=torch_dtype(spec.dtype), device="cuda")
            for spec in self._specs[region].outputs
        }

    def execute(
        self,
        region: str,
        layer: int | None,
        bucket: int,
        activations: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
    ) -> None:
        """Enqueue one plan on the current stream.

        Args:
            region, layer: as in `run`.
            bucket: one of the region's row buckets.
            activations: memory for `bucket` rows behind each, contiguous, aligned to ALIGNMENT_BYTES.
            outputs: [bucket, width] each; written completely.
        Raises:
            SmcError: TensorRT refuses.
        """
        context = self._contexts[region, bucket]
        for name, address in self._bound[region, layer].items():
            context.set_tensor_address(name, address)
        for name, tensor in activations.items():
            context.set_tensor_address(name, _address(name, tensor))
        for name, tensor in outputs.items():
            context.set_tensor_address(output_name(name), _address(name, tensor))
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            self._api.check(None, f"run region {region} with {bucket} rows")

    def warm_up(self) -> None:
        """Run every plan once, which compiles its kernels, and save them; do this before capturing a graph."""
        for region, bucket in self._contexts:
            layer = 0 if is_repeated(region) else None
            inputs = [spec for spec in self._specs[region].inputs if spec.name not in self._bound[region, layer]]
            zeros = {
                spec.name: torch.zeros(static_shape(spec, bucket), dtype=self._dtype, device="cuda") for spec in inputs
            }
            self.execute(region, layer, bucket, zeros, self.allocate_outputs(region, bucket))
        torch.cuda.synchronize()
        if self._cache_file is not None and self._cache is not None:
            _write_if_changed(self._cache_file, bytes(self._cache.serialize()))


def load_plan_regions(
    path: Path, manifest: Manifest, role: Role, weights: Mapping[str, Tensor], scratch: Scratch | None = None
) -> PlanRegions | None:
    """Load a model's plans from an engine directory.

    Args:
        path: the engine directory.
        manifest: its manifest.
        role: target or draft.
        weights: the model's weights on the GPU.
        scratch: share one between target and draft.
    Returns:
        the runner, warmed up; None when the directory holds no plans (it was built with --compiler torch).
    Raises:
        EngineDirError: the TensorRT that built the plans is not here, or this GPU cannot run them.
    """
    if not manifest.plans:
        return None
    compiler, version = manifest.plans["compiler"], manifest.plans["version"]
    api = find(compiler)
    if api is None or api.version != version:
        raise EngineDirError(
            f"{path} holds plans of {compiler} {version}, {'none' if api is None else api.version} is installed: "
            f"install that version (pip install 'smc-engine[{compiler}]'), or rebuild with smc-build"
        )
    api.check_gpu(manifest.plans["gpu"])
    files = manifest.plans["files"][role]
    plans = ((region, int(rows), read_file(path, name)) for region in files for rows, name in files[region].items())
    runner = PlanRegions(
        api, manifest.model(role).rank_config, weights, plans, scratch, cache_file(path, role, version)
    )
    runner.warm_up()
    return runner


def cache_file(path: Path, role: str, version: str) -> Path:
    """Runtime cache of an engine directory for the current GPU: kernels fit one GPU model and one version."""
    name = "".join(char if char.isalnum() else "-" for char in torch.cuda.get_device_name().lower())
    return path / CACHE_FOLDER / f"{role}.{name}.{version}.bin"


def _check_io(spec: RegionSpec, rows: int, engine: trt.ICudaEngine) -> None:
    expected = {tensor.name: _signature(tensor, rows) for tensor in spec.inputs}
    expected |= {output_name(tensor.name): _signature(tensor, rows) for tensor in spec.outputs}
    names: Sequence[str] = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {name: (_sizes(engine.get_tensor_shape(name)), engine.get_tensor_dtype(name).name) for name in names}
    if found != expected:
        different = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise EngineDirError(
            f"the plan of {spec.name} for {rows} rows has other inputs or outputs than the region ({different[0]}: "
            f"{found.get(different[0])}, expected {expected.get(different[0])}): rebuild the engine directory with "
            "smc-build"
        )


def _signature(tensor: TensorSpec, rows: int) -> tuple[tuple[int, ...], str]:
    return static_shape(tensor, rows), DATA_TYPES[tensor.dtype]


def _sizes(dims: trt.Dims) -> tuple[int, ...]:
    return tuple(dims[axis] for axis in range(len(dims)))


def _pad(tensor: Tensor, bucket: int) -> Tensor:
    """Make `bucket` rows readable behind a tensor: as it is where its storage goes on that far, else a copy.

    The rows beyond its own hold anything. An output of a smaller call is a view of its bucket, so residuals chain
    from layer to layer without a copy.
    """
    width = tensor.shape[1]
    room = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
    if (
        tensor.is_contiguous()
        and tensor.data_ptr() % ALIGNMENT_BYTES == 0
        and room >= bucket * width * tensor.element_size()
    ):
        return tensor
    padded = torch.empty((bucket, width), dtype=tensor.dtype, device=tensor.device)
    padded[: tensor.shape[0]].copy_(tensor)
    return padded


def _address(name: str, tensor: Tensor) -> int:
    address = tensor.data_ptr()
    if not tensor.is_contiguous() or address % ALIGNMENT_BYTES:
        raise SmcError(
            f"{name} is not a contiguous tensor at a multiple of {ALIGNMENT_BYTES} bytes, as a plan expects: pass "
            "a fresh copy (clone)"
        )
    return address


def _read_or_none(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError:
        return None


def _write_if_changed(path: Path, data: bytes) -> None:
    """Save the cache; a read-only engine directory only costs the compilation on every start."""
    if _read_or_none(path) == data:
        return
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        _log.info("the runtime cache was not saved (%s): kernels are compiled again on the next start", error)
