"""Compile kernels ahead of time, without a GPU.

`launch.recording` notes what a public function would launch; `compile_recorded` compiles one such launch for a compute
capability and reports what it needs. The specialisation is the one a launch would get: integers equal to 1 are
constants, those divisible by 16 and all tensors are known to be (allocations are aligned to 512 bytes).

    >>> with launch.recording() as recorded:
    ...     weights.normalise(torch.zeros(1, 8, dtype=torch.float64, device="meta"))
    >>> compile_recorded(recorded[0]).registers
    30
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from smc_plugin.kernels.launch import Recorded

_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.bool: "*i1",
}
_FACTS = re.compile(r"(REG|STACK|SHARED|LOCAL):(\d+)")


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    Args:
        name: of the function.
        cubin: the machine code.
        ptx: its assembly text.
        registers: per thread.
        spill_bytes: of stack and local memory a thread; 0 is what one wants.
        shared_bytes: of shared memory a program.
        num_warps: of a program.
    """

    name: str
    cubin: bytes
    ptx: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int


def _describe(value: Any) -> tuple[str, bool]:
    """Type of a run-time argument and whether 16 divides it."""
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype], True
    if isinstance(value, float):
        return "fp32", False
    if isinstance(value, TensorDescriptor):
        dtype = _POINTERS[value.base.dtype].removeprefix("*")
        return f"tensordesc<{dtype}{value.block_shape},{value.layout!r}>", False
    return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0


def _for_capability(recorded: Recorded, capability: int) -> Recorded:
    """The launch as that GPU would get it: programmatic dependent launch begins with Hopper."""
    has_pdl = capability >= 90
    arguments = {**recorded.arguments, "PDL": has_pdl}
    return Recorded(recorded.kernel, arguments, {**recorded.options, "launch_pdl": has_pdl})


def source_of(kernel: Any) -> type[ASTSource]:
    """Triton kernels and Gluon ones have different front ends."""
    return GluonASTSource if kernel.is_gluon() else ASTSource


def _source(recorded: Recorded) -> ASTSource:
    kernel = recorded.kernel
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(kernel.params):
        value = recorded.arguments[parameter.name]
        is_general = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not is_general):
            signature[parameter.name] = "constexpr"
            constants[(position,)] = value
            continue
        signature[parameter.name], divisible = _describe(value)
        if divisible and not is_general:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return source_of(kernel)(kernel, signature, constants, attributes)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers, stack, shared and local bytes as cuobjdump reads them from the cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", str(path)], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in _FACTS.findall(text)}


def precompile(recorded: Sequence[Recorded], capability: int = 90, workers: int | None = None) -> int:
    """Compile launches into Triton's cache, several at a time, so that the launches themselves need not.

    Args:
        recorded: from `launch.recording`; equal specialisations are compiled once.
        capability: compute capability times ten.
        workers: processes, one a core by default.
    Returns:
        how many were compiled or found in the cache.
    """
    jobs = {}
    for one in (_for_capability(each, capability) for each in recorded):
        source = _source(one)
        module, name = one.kernel.fn.__module__, one.kernel.fn.__name__
        job = (module, name, source.signature, source.constants, source.attrs, one.options, capability)
        jobs[repr(job)] = job
    workers = max(1, min(workers or os.cpu_count() or 1, len(jobs)))
    if workers == 1:
        return sum(map(_compile_job, jobs.values()))
    # Spawned, not forked: the parent may have a CUDA context, and the children need none.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return sum(pool.map(_compile_job, jobs.values(), chunksize=1))


def _compile_job(job: tuple[str, str, dict, dict, dict, dict, int]) -> int:
    module, name, signature, constants, attributes, options, capability = job
    kernel = getattr(import_module(module), name)
    target = GPUTarget("cuda", capability, 32)
    triton.compile(source_of(kernel)(kernel, signature, constants, attributes), target=target, options=options)
    return 1


def compile_recorded(recorded: Recorded, capability: int = 90) -> Compiled:
    """Compile one recorded launch.

    Args:
        recorded: from `launch.recording`.
        capability: compute capability times ten; 90 is Hopper.
    """
    target, recorded = GPUTarget("cuda", capability, 32), _for_capability(recorded, capability)
    kernel = triton.compile(_source(recorded), target=target, options=recorded.options)
    cubin = kernel.asm["cubin"]
    usage = _resource_usage(cubin)
    return Compiled(
        kernel.metadata.name,
        cubin,
        kernel.asm["ptx"],
        usage.get("REG", 0),
        usage.get("STACK", 0) + usage.get("LOCAL", 0),
        kernel.metadata.shared,
        kernel.metadata.num_warps,
    )
