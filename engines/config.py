"""How an executor runs: memory, batching and device. Defaults live here and nowhere else.

>>> ExecutorConfig(max_groups=2).prefill_chunk
256
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from smc_build import machine
from smc_engines.region_choice import RegionChoice
from smc_plugin.backend import KernelChoice
from smc_plugin.errors import ConfigError

DraftSchedule = Literal["deferred", "legacy"]


@dataclass(frozen=True)
class ExecutorConfig:
    """Run-time settings of one executor.

    Args:
        device: `auto` (cuda where there is one, else cpu), `cpu` or `cuda`.
        max_groups: requests decoded together, the others wait; None takes the engine directory's.
        max_queue: requests that may wait for others to end; one more is refused at once.
        prefill_chunk: prompt tokens processed between two rounds.
        num_pages: KV pages of the pool; None sizes it from kv_memory_fraction.
        kv_memory_fraction: share of the free memory that both models' KV pages may take, in (0, 1].
        draft_schedule: `deferred` feeds the bonus and the last draft token together in the next round (K draft passes);
            `legacy` spends an extra pass (K + 1). Same distribution.
        prefix_cache: keep full prompt pages for later prompts with the same beginning.
        overlap: start the next round before reading the last one's summary; None does so on a GPU only. Same answers.
        kernels: `auto` (Triton's on CUDA, the torch reference elsewhere), `reference` or `triton`; on a CPU Triton's
            kernels need its interpreter (TRITON_INTERPRET=1).
        regions: who computes the stretches between attention calls: `auto` (torch on a CPU; on a GPU what --tune found
            fastest, else the plans if there are some, else the fused kernels), `fused`, `plans` or `torch`.
        verify: check every hash of the engine directory on load.
        step_timeout_s: with several ranks, a step of shapes seen before that takes longer ends the process, since a rank must
            hang; None takes 8 on a GPU and 60 on a CPU.
    """

    device: str = "auto"
    max_groups: int | None = None
    max_queue: int = 256
    prefill_chunk: int = 256
    num_pages: int | None = None
    kv_memory_fraction: float = 0.4
    draft_schedule: DraftSchedule = "deferred"
    prefix_cache: bool = True
    overlap: bool | None = None
    kernels: KernelChoice = "auto"
    regions: RegionChoice = "auto"
    verify: bool = True
    step_timeout_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_groups", "max_queue", "prefill_chunk"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}: raise it")
        if self.num_pages is not None and self.num_pages < 2:
            raise ConfigError(f"num_pages must be at least 2, got {self.num_pages}: raise it or leave it out")
        if not 0 < self.kv_memory_fraction <= 1:
            raise ConfigError(f"kv_memory_fraction must be in (0, 1], got {self.kv_memory_fraction}: choose a fraction")
        if self.step_timeout_s is not None and self.step_timeout_s <= 0:
            raise ConfigError(f"step_timeout_s must be above 0, got {self.step_timeout_s}: raise it or leave it out")
        if self.kernels not in get_args(KernelChoice):
            raise ConfigError(f"kernels must be auto, reference or triton, got {self.kernels!r}: choose one")
        if self.regions not in get_args(RegionChoice):
            raise ConfigError(f"regions must be auto, fused, plans or torch, got {self.regions!r}: choose one")
        if self.draft_schedule not in get_args(DraftSchedule):
            raise ConfigError(f"draft_schedule must be deferred or legacy, got {self.draft_schedule!r}: choose one")

    def torch_device(self) -> torch.device:
        """The device to run on.

        Raises:
            ConfigError: the name is unknown, or cuda is asked for and there is none.
        """
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device must be auto, cpu or cuda, got {self.device!r}: choose one of those")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device cuda was asked for, but torch sees no CUDA GPU: use --device cpu")
        return torch.device(self.device)


def free_memory_bytes(device: torch.device) -> int:
    """Memory that could be allocated now on the device, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return machine.free_memory_bytes()
