"""How kernels are launched: programmatic dependent launch, arrival counters, and recording instead of launching.

Programmatic dependent launch (PDL): from compute capability 9.0 on, a kernel may start while its predecessor runs. Each
kernel calls `wait_for_inputs` before it touches what the kernel before it wrote, and then `let_next_start`, on every
path. So when a kernel runs whose predecessor is one of these, or was launched without PDL, all programs of the predecessor are
past their wait: everything that was launched two or more kernels earlier is complete, and may be read before the wait (past the
first-level cache, which may hold older values). Kernels of other libraries may let go earlier: read early only what is older
than the last few launches. Both calls compile to nothing when PDL is off.

Arrival counters let the last program of a tile combine the partial results of all: each adds 1, the last one sees
count - 1 and sets it back to 0, so the next launch finds zeros. They belong to a device; launches that use them must
follow one another on one stream.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from smc_plugin.errors import ConfigError
from smc_plugin.kernels.interpreter import correct_interpreter

NUM_COUNTERS = 1 << 16


@dataclass
class Recorded:
    """One launch that was recorded instead of run: the kernel, its arguments by name, and compile options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)


class _Settings:
    pdl = True
    record: list[Recorded] | None = None


def interpreted() -> bool:
    """Whether kernels run under the interpreter on the CPU."""
    return bool(knobs.runtime.interpret)


@contextmanager
def pdl(enabled: bool) -> Iterator[None]:
    """Switch programmatic dependent launch, on by default where the GPU has it, for the launches inside."""
    before, _Settings.pdl = _Settings.pdl, enabled
    try:
        yield
    finally:
        _Settings.pdl = before


def is_recording() -> bool:
    """Whether launches are recorded instead of run."""
    return _Settings.record is not None


@contextmanager
def recording() -> Iterator[list[Recorded]]:
    """Record the launches inside instead of running them; results of the calls are not meaningful.

    Works with tensors on any device, also "meta", so that kernels can be compiled without a GPU.
    """
    before, _Settings.record = _Settings.record, []
    try:
        yield _Settings.record
    finally:
        _Settings.record = before


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@dataclass(frozen=True)
class Gpu:
    """What decides how work is cut: the number of multiprocessors, the shared memory a program may take, in bytes, and the
    compute capability."""

    sm_count: int = 132
    shared_bytes: int = 232448
    capability: tuple[int, int] = (9, 0)


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU behind a device; an H100 for tensors that are on none."""
    if device.type != "cuda":
        return Gpu()
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        properties.multi_processor_count, properties.shared_memory_per_block_optin, (properties.major, properties.minor)
    )


def sm_count(device: torch.device) -> int:
    """Number of multiprocessors, which decides how far work is split."""
    return gpu_of(device).sm_count


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch a kernel whose last constexpr is PDL.

    Args:
        kernel: a function under triton.jit.
        grid: one to three program counts.
        args, meta: the kernel's arguments; num_warps, num_stages and other compile options among meta.
    """
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if _Settings.record is not None:
        names = [name for name in kernel.arg_names if name != "PDL"]
        named = dict(zip(names, args, strict=False))
        named |= {name: value for name, value in meta.items() if name in names}
        options = {name: value for name, value in meta.items() if name not in names}
        _Settings.record.append(Recorded(kernel, {**named, "PDL": True}, {**options, "launch_pdl": True}))
        return
    if interpreted():
        correct_interpreter()
        kernel[grid](*args, **meta, PDL=False)
        return
    if device.type != "cuda":
        raise ConfigError(
            f"a Triton kernel was given tensors on {device}, expected a CUDA device: use smc_plugin.reference there, or "
            "set TRITON_INTERPRET=1 before the first import"
        )
    use_pdl = _Settings.pdl and _capability(device)[0] >= 9
    kernel[grid](*args, **meta, PDL=use_pdl, launch_pdl=use_pdl)


def refuse_first_in_capture(device: torch.device) -> None:
    """What a kernel needs is made, and the kernel loaded, when it first runs: that cannot be captured.

    Raises:
        ConfigError: the current stream is being captured.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ConfigError(
            "a kernel was captured before it ever ran, expected one run before the capture: run the graph's function "
            "once outside the capture"
        )


_COUNTERS: dict[torch.device, Tensor] = {}


def counters(device: torch.device, count: int) -> Tensor:
    """Arrival counters, all zero between launches.

    Args:
        count: how many the launch uses.
    Returns:
        [NUM_COUNTERS] int32, shared by all launches on the device.
    Raises:
        ConfigError: more are needed than there are, or the first use is inside a graph capture.
    """
    if count > NUM_COUNTERS:
        raise ConfigError(
            f"a kernel launch needs {count} arrival counters, there are {NUM_COUNTERS}: run fewer rows at a time"
        )
    if device not in _COUNTERS:
        refuse_first_in_capture(device)
        _COUNTERS[device] = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
    return _COUNTERS[device]


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉ for positive integers."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n, and at least 1."""
    return 1 << max(n - 1, 0).bit_length()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Allow the next kernel to start up to its own wait; call it after `wait_for_inputs`."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Wait until the kernels before this one have finished and their writes can be read."""
    if PDL:
        gdc_wait()


@triton.jit
def is_last_arrival(counter, expected):
    """Whether this program is the last of `expected` that calls this for one counter; resets the counter.

    What the other programs stored before the call can be read after it.
    """
    # Every thread's stores must precede the one release that thread 0 makes for all of them.
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == expected - 1
    tl.debug_barrier()
    if last:
        tl.store(counter, 0)
    return last
