"""Which format a checkpoint folder has, and how it is read: Hugging Face's or TensorRT-LLM's.

Both give a `ModelConfig` and the same canonical weights, one at a time; nobody else needs to know.
"""

from pathlib import Path

from smc_build import checkpoint
from smc_build.checkpoint import Checkpoint, read_json, safe_file
from smc_build.model_config import ModelConfig
from smc_build.trtllm_checkpoint import TrtllmCheckpoint, is_trtllm, read_trtllm_config, trtllm_files

OpenCheckpoint = Checkpoint | TrtllmCheckpoint


def read_config(folder: Path) -> ModelConfig:
    """Read what a checkpoint folder's config.json describes; raises CheckpointError."""
    return read_trtllm_config(folder) if _is_trtllm(folder) else checkpoint.read_config(folder)


def open_checkpoint(folder: Path) -> OpenCheckpoint:
    """Open a checkpoint folder and check its tensors; raises CheckpointError."""
    return TrtllmCheckpoint(folder) if _is_trtllm(folder) else Checkpoint(folder)


def weight_files(folder: Path) -> list[Path]:
    """List a checkpoint folder's safetensors files; raises CheckpointError."""
    return trtllm_files(folder) if _is_trtllm(folder) else checkpoint.weight_files(folder)


def _is_trtllm(folder: Path) -> bool:
    # a folder that is none, or has no config.json, is Hugging Face's to complain about
    return (folder / "config.json").is_file() and is_trtllm(read_json(safe_file(folder, "config.json")))
