"""Model names that need no path: their published shapes, Hub names and default drafts, and how a name becomes a folder.

A preset is looked for in ./checkpoints/<preset> and ./checkpoints/<Hub name without owner>, then fetched from the
Hub. Example: "llama-70b" is meta-llama/Llama-3.1-70B-Instruct with the draft "llama-1b"; its shapes come from here,
so the plan can be printed, and random weights built, before anything is fetched.
"""

from dataclasses import dataclass
from pathlib import Path

from smc_build.checkpoint import stores_fp8
from smc_build.closest import suggest
from smc_build.formats import read_config
from smc_build.machine import format_bytes, free_disk_bytes
from smc_build.model_config import ModelConfig, RopeConfig, RopeScaling
from smc_plugin.errors import CheckpointError, ConfigError

CHECKPOINTS_FOLDER = Path("checkpoints")
_FETCHED_FILES = ["*.safetensors", "*.json"]
_TOKENIZER_FILES = ["tokenizer.model", "merges.txt", "*.jinja"]


@dataclass(frozen=True)
class Preset:
    """A published model: its Hub name, its shapes and the preset that drafts for it by default."""

    hub_name: str
    config: ModelConfig
    default_draft: str | None


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from: a folder, or (folder is None) a preset that has not been fetched.

    stores_fp8 says that the folder holds FP8 weights already, as modelopt exports them.
    """

    name: str
    config: ModelConfig
    folder: Path | None
    preset: Preset | None
    stores_fp8: bool = False


def _llama(
    hidden: int, layers: int, heads: int, head_dim: int, ffn: int, rope_factor: float, tied: bool
) -> ModelConfig:
    return ModelConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=head_dim,
        ffn_size=ffn,
        rms_eps=1e-5,
        rope=RopeConfig(500000.0, RopeScaling(rope_factor, 1.0, 4.0, 8192)),
        max_position=131072,
        qkv_bias=False,
        qk_norm=False,
        tied_head=tied,
        bos_id=128000,
        eos_ids=(128001, 128008, 128009),
    )


def _qwen3(hidden: int, layers: int, heads: int, ffn: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        family="qwen3",
        vocab_size=151936,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=128,
        ffn_size=ffn,
        rms_eps=1e-6,
        rope=RopeConfig(1000000.0),
        max_position=40960,
        qkv_bias=False,
        qk_norm=True,
        tied_head=tied,
        bos_id=151643,
        eos_ids=(151645, 151643),
    )


def _qwen25(vocab: int, hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        family="qwen2",
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hidden // heads,
        ffn_size=ffn,
        rms_eps=1e-6,
        rope=RopeConfig(1000000.0),
        max_position=32768,
        qkv_bias=True,
        qk_norm=False,
        tied_head=tied,
        bos_id=151643,
        eos_ids=(151645, 151643),
    )


# Qwen2.5 pads its vocabulary to 152064 from 7B up and to 151936 below, so only models of one group can draft for
# each other.
PRESETS: dict[str, Preset] = {
    "llama-70b": Preset(
        "meta-llama/Llama-3.1-70B-Instruct", _llama(8192, 80, 64, 128, 28672, 8.0, tied=False), "llama-1b"
    ),
    "llama-8b": Preset(
        "meta-llama/Llama-3.1-8B-Instruct", _llama(4096, 32, 32, 128, 14336, 8.0, tied=False), "llama-1b"
    ),
    "llama-3b": Preset(
        "meta-llama/Llama-3.2-3B-Instruct", _llama(3072, 28, 24, 128, 8192, 32.0, tied=True), "llama-1b"
    ),
    "llama-1b": Preset("meta-llama/Llama-3.2-1B-Instruct", _llama(2048, 16, 32, 64, 8192, 32.0, tied=True), None),
    "qwen3-32b": Preset("Qwen/Qwen3-32B", _qwen3(5120, 64, 64, 25600, tied=False), "qwen3-0.6b"),
    "qwen3-14b": Preset("Qwen/Qwen3-14B", _qwen3(5120, 40, 40, 17408, tied=False), "qwen3-0.6b"),
    "qwen3-8b": Preset("Qwen/Qwen3-8B", _qwen3(4096, 36, 32, 12288, tied=False), "qwen3-0.6b"),
    "qwen3-4b": Preset("Qwen/Qwen3-4B", _qwen3(2560, 36, 32, 9728, tied=True), "qwen3-0.6b"),
    "qwen3-0.6b": Preset("Qwen/Qwen3-0.6B", _qwen3(1024, 28, 16, 3072, tied=True), None),
    "qwen2.5-72b": Preset(
        "Qwen/Qwen2.5-72B-Instruct", _qwen25(152064, 8192, 80, 64, 8, 29568, tied=False), "qwen2.5-7b"
    ),
    "qwen2.5-7b": Preset("Qwen/Qwen2.5-7B-Instruct", _qwen25(152064, 3584, 28, 28, 4, 18944, tied=False), None),
    "qwen2.5-3b": Preset(
        "Qwen/Qwen2.5-3B-Instruct", _qwen25(151936, 2048, 36, 16, 2, 11008, tied=True), "qwen2.5-0.5b"
    ),
    "qwen2.5-0.5b": Preset("Qwen/Qwen2.5-0.5B-Instruct", _qwen25(151936, 896, 24, 14, 2, 4864, tied=True), None),
}


def resolve(name: str) -> ModelSource:
    """Find what a --checkpoint or --draft value means, without fetching.

    Args:
        name: a folder, or a preset's name. A folder of that name wins.
    Returns:
        the source; its folder is None for a preset that is not on disk.
    Raises:
        ConfigError: neither a folder nor a preset.
        CheckpointError: the folder's configuration cannot be used.
    """
    path = Path(name)
    preset = PRESETS.get(name)
    if path.is_dir() and name:
        return ModelSource(path.resolve().name, read_config(path), path, None, stores_fp8(path))
    if preset is None:
        raise ConfigError(
            f"{name!r} is neither a folder nor a preset, expected a Hugging Face folder or one of "
            f"{', '.join(PRESETS)}: "
            + suggest(name, PRESETS, fallback="correct the path, or download the model into a folder first")
        )
    for folder in (CHECKPOINTS_FOLDER / name, CHECKPOINTS_FOLDER / preset.hub_name.split("/")[1]):
        if folder.is_dir():
            return ModelSource(name, read_config(folder), folder, preset, stores_fp8(folder))
    return ModelSource(name, preset.config, None, preset)


def fetch(source: ModelSource) -> ModelSource:
    """Download a preset's safetensors, JSON and tokenizer files into ./checkpoints/; a folder passes through.

    Raises:
        CheckpointError: too little disk, no network, no access, or the download failed.
    """
    if source.folder is not None or source.preset is None:
        return source
    # Imported here: only this function needs the network client, and importing it takes a second.
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import GatedRepoError  # noqa: PLC0415

    hub_name = source.preset.hub_name
    folder = CHECKPOINTS_FOLDER / hub_name.split("/")[1]
    # Downloading into a hidden name first keeps a broken download from being taken for a checkpoint; it can be resumed.
    partial = CHECKPOINTS_FOLDER / f".{folder.name}.partial"
    needed, free = source.config.weight_bytes("bfloat16"), free_disk_bytes(folder)
    if needed > free:
        raise CheckpointError(
            f"fetching {hub_name} needs {format_bytes(needed)} of disk in {CHECKPOINTS_FOLDER}, "
            f"{format_bytes(free)} are free: free "
            "some, or make "
            f"{CHECKPOINTS_FOLDER} a link to another disk"
        )
    try:
        snapshot_download(hub_name, local_dir=partial, allow_patterns=_FETCHED_FILES + _TOKENIZER_FILES)
    except GatedRepoError as error:
        raise CheckpointError(
            f"cannot fetch {hub_name}: it is gated, expected an account that has accepted its licence: accept it "
            "on its Hub "
            f"page and run `hf auth login`, or put the files into {folder}"
        ) from error
    except Exception as error:
        raise CheckpointError(
            f"cannot fetch {hub_name} from the Hub ({type(error).__name__}), expected a network connection: put "
            "the files "
            f"into {folder}, or use --random-weights for speed work"
        ) from error
    partial.rename(folder)
    return ModelSource(source.name, read_config(folder), folder, source.preset, stores_fp8(folder))
