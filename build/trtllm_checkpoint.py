"""Reads a TensorRT-LLM checkpoint (config.json and rank0.safetensors, rank1.safetensors, ...) into canonical weights.

The ranks' parts are joined again, whatever the number of ranks, so an engine may have another. Two names mislead: `mlp.fc` is
the gate projection and `mlp.gate` the up projection. Example: a Llama of 32 heads and 8 KV heads of 128 at tp_size 2 holds
attention.qkv [3072, 4096] a rank, rows 0..2047 the queries, then 512 key and 512 value rows.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from smc_build.checkpoint import read_json, safe_file
from smc_build.dtypes import torch_dtype
from smc_build.model_config import ModelConfig
from smc_build.precision import Precision, as_precision
from smc_build.weights import weight_shapes
from smc_plugin.errors import CheckpointError

_FAMILIES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
# canonical name: stored names, and the axis that ranks share ([out, in] as stored); None is on every rank
_STORED: dict[str, tuple[tuple[str, ...], int | None]] = {
    "attn_norm": (("input_layernorm.weight",), None),
    "qkv": (("attention.qkv.weight",), 0),
    "qkv_bias": (("attention.qkv.bias",), 0),
    "q_norm": (("attention.q_layernorm.weight",), None),
    "k_norm": (("attention.k_layernorm.weight",), None),
    "o": (("attention.dense.weight",), 1),
    "mlp_norm": (("post_layernorm.weight",), None),
    "gate_up": (("mlp.fc.weight", "mlp.gate.weight"), 0),
    "down": (("mlp.proj.weight",), 1),
}
_OUTSIDE = {
    "embed": "transformer.vocab_embedding.weight",
    "final_norm": "transformer.ln_f.weight",
    "lm_head": "lm_head.weight",
}
_MATRICES = ("qkv", "o", "gate_up", "down")
_MAX_RANKS = 1024


def is_trtllm(config: dict[str, Any]) -> bool:
    """Whether a parsed config.json is TensorRT-LLM's: it names an architecture and no model_type."""
    return "architecture" in config and "model_type" not in config


def read_trtllm_config(folder: Path) -> ModelConfig:
    """Read a TensorRT-LLM config.json (and the end tokens of generation_config.json, where somebody put one beside it).

    Raises:
        CheckpointError: an architecture, quantization or mapping that is not supported.
    """
    stored = read_json(safe_file(folder, "config.json"))
    family = _FAMILIES.get(str(stored["architecture"]))
    if family is None:
        raise CheckpointError(
            f"architecture {stored['architecture']!r:.80} is not supported, expected one of {', '.join(_FAMILIES)}: use a "
            "checkpoint of one of these"
        )
    quantization = _part(stored, "quantization").get("quant_algo")
    if quantization:
        raise CheckpointError(
            f"config.json asks for quantization {quantization!r}, expected none: convert the checkpoint without quantization"
        )
    stages = _part(stored, "mapping").get("pp_size", 1)
    if stages != 1:
        raise CheckpointError(
            f"config.json has pp_size {stages!r:.40}, expected 1: convert it with tensor parallelism only"
        )
    generation = folder / "generation_config.json"
    return ModelConfig.from_hf(
        {
            "model_type": family,
            "vocab_size": stored.get("vocab_size"),
            "hidden_size": stored.get("hidden_size"),
            "num_hidden_layers": stored.get("num_hidden_layers"),
            "num_attention_heads": stored.get("num_attention_heads"),
            "num_key_value_heads": stored.get("num_key_value_heads"),
            "head_dim": stored.get("head_size"),
            "intermediate_size": stored.get("intermediate_size"),
            "hidden_act": "silu" if stored.get("hidden_act", "silu") == "swiglu" else stored.get("hidden_act", "silu"),
            "rms_norm_eps": stored.get("norm_epsilon", 1e-5),
            "rope_theta": stored.get("rotary_base", 10000.0),
            "rope_scaling": stored.get("rotary_scaling"),
            "max_position_embeddings": stored.get("max_position_embeddings"),
            "tie_word_embeddings": stored.get("share_embedding_table", stored.get("tie_word_embeddings", False)),
            "eos_token_id": stored.get("eos_token_id"),
            "bos_token_id": stored.get("bos_token_id"),
        },
        read_json(safe_file(folder, generation.name)) if generation.exists() else None,
    )


def trtllm_files(folder: Path) -> list[Path]:
    """The weight files, one a rank, in order of the ranks.

    Raises:
        CheckpointError: their number is not the config's tp_size.
    """
    mapping = _part(read_json(safe_file(folder, "config.json")), "mapping")
    tp = mapping.get("tp_size", mapping.get("world_size", 1))
    if isinstance(tp, bool) or not isinstance(tp, int) or not 1 <= tp <= _MAX_RANKS:
        raise CheckpointError(
            f"config.json has tp_size {tp!r:.40}, expected a whole number from 1 to {_MAX_RANKS}: correct config.json"
        )
    paths = [safe_file(folder, f"rank{rank}.safetensors") for rank in range(tp)]
    for path in paths:
        if not path.is_file():
            raise CheckpointError(
                f"{path.name} is missing in {folder}, expected {tp} of them (tp_size): fetch the checkpoint again"
            )
    return paths


def _part(values: dict[str, Any], key: str) -> dict[str, Any]:
    """An object inside config.json, empty where there is none."""
    part = values.get(key) or {}
    if not isinstance(part, dict):
        raise CheckpointError(f"config.json: {key!r} is {part!r:.40}, expected an object or none: correct config.json")
    return part


class TrtllmCheckpoint:
    """An open TensorRT-LLM checkpoint; the same interface as smc_build.checkpoint.Checkpoint.

    Attributes:
        folder: the folder.
        config: what its config.json describes.
    """

    def __init__(self, folder: Path) -> None:
        """Open the ranks' files; every tensor's shape is checked against config.json.

        Raises:
            CheckpointError: the folder, its configuration or one of its tensors is not usable.
        """
        self.folder, self.config = folder, read_trtllm_config(folder)
        self._parallel_axis = _embedding_axis(read_json(safe_file(folder, "config.json")))
        self._files = ExitStack()
        self._ranks: list[Any] = []
        try:
            for path in trtllm_files(folder):
                self._ranks.append(self._files.enter_context(safe_open(path, framework="pt", device="cpu")))
            self._check()
        except (SafetensorError, OSError) as error:
            self.close()
            raise CheckpointError(
                f"cannot read a file of {folder} ({error}), expected complete safetensors files: fetch it again"
            ) from error
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "TrtllmCheckpoint":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the files."""
        self._ranks.clear()
        self._files.close()

    def tensors(self, dtype: str | torch.dtype | Precision) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (canonical name, tensor in `dtype`, whose matrices are not FP8) in the order of `weight_shapes`."""
        for name in weight_shapes(self.config):
            yield name, self._read(name, torch_dtype(as_precision(dtype).activations))

    def _stored(self, name: str) -> tuple[tuple[str, ...], int | None]:
        if name in _OUTSIDE:
            axis = {"embed": self._parallel_axis, "final_norm": None, "lm_head": 0}[name]
            return (_OUTSIDE[name],), axis
        prefix, _, last = name.rpartition(".")
        names, axis = _STORED[last]
        return tuple(f"transformer.{prefix}.{stored}" for stored in names), axis

    def _check(self) -> None:
        expected = {name for weight in weight_shapes(self.config) for name in self._stored(weight)[0]}
        for rank, handle in enumerate(self._ranks):
            found = set(handle.keys())
            missing, extra = sorted(expected - found), sorted(found - expected - {_OUTSIDE["lm_head"]})
            if missing or extra:
                what = f"tensor {missing[0]} is missing from" if missing else f"tensor {extra[0]} is unexpected in"
                raise CheckpointError(
                    f"{what} rank{rank}.safetensors, expected the {len(expected)} tensors of a {self.config.family} model of "
                    f"{self.config.num_layers} layers: fetch the checkpoint again, or correct config.json"
                )

    def _read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        stored, axis = self._stored(name)
        last = name.rpartition(".")[2]
        parts = [self._join(part, axis, last, dtype) for part in stored]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        joined = joined.t().contiguous() if last in _MATRICES else joined
        expected = weight_shapes(self.config)[name]
        if last in ("embed", "lm_head"):
            joined = joined[: expected[0]]  # TensorRT-LLM pads the vocabulary to divide by its ranks
        if tuple(joined.shape) != expected:
            raise CheckpointError(
                f"the ranks' parts of {stored[0]} join to shape {list(joined.shape)}, expected {list(expected)} from "
                "config.json: fetch the checkpoint again, or correct config.json"
            )
        return joined

    def _join(self, stored: str, axis: int | None, last: str, dtype: torch.dtype) -> torch.Tensor:
        """One stored tensor, its ranks' parts put together."""
        try:
            if axis is None:
                return self._ranks[0].get_tensor(stored).to(dtype)
            parts = [rank.get_tensor(stored).to(dtype) for rank in self._ranks]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"cannot read tensor {stored} ({error}), expected its data: fetch the checkpoint again"
            ) from error
        return self._join_qkv(parts) if last in ("qkv", "qkv_bias") else torch.cat(parts, dim=axis)

    def _join_qkv(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Queries, keys and values of all ranks; a KV head that several ranks hold counts once."""
        config, ranks = self.config, len(parts)
        q = config.q_size // ranks
        kv = max(config.num_kv_heads // ranks, 1) * config.head_dim
        repeats = max(ranks // config.num_kv_heads, 1)
        if any(part.shape[0] != q + 2 * kv for part in parts):
            raise CheckpointError(
                f"attention.qkv has {parts[0].shape[0]} rows a rank, expected {q} + 2 * {kv} for {ranks} ranks: correct "
                "config.json"
            )
        split = [part.split([q, kv, kv]) for part in parts]
        return torch.cat([*(part[0] for part in split), *(part[1] for part in split[::repeats]),
                          *(part[2] for part in split[::repeats])])  # fmt: skip


def _embedding_axis(stored: dict[str, Any]) -> int | None:
    return stored.get("embedding_sharding_dim", 0) if stored.get("use_parallel_embedding") else None
