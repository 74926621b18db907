"""Makes an FP8 checkpoint of a 16-bit one with nvidia-modelopt: what `smc-build --dtype fp8` does before it reads weights.

Matrices get one static scale each, what they multiply gets one that is measured on calibration text. The text is a file,
or the model writes it: 16 passages of 128 tokens at temperature 1, each begun with another random token, so that no data set
is needed and a model without a tokenizer will do. The result is the unified Hugging Face layout, which
smc_build.checkpoint reads as it reads one from elsewhere. Example: SmolLM2-135M takes a minute on two CPU cores.

The whole model is in memory meanwhile, on the GPU where it fits.
"""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from smc_build.checkpoint import Checkpoint, safe_file
from smc_build.dtypes import torch_dtype
from smc_build.machine import format_bytes, free_memory_bytes
from smc_build.precision import Precision
from smc_plugin.errors import CheckpointError, ConfigError, SmcError

PASSAGES, PASSAGE_TOKENS = 16, 128
LEAST_PASSAGES, LEAST_TOKENS = 8, 512
_LONGEST = 2048  # tokens of one passage of a file
_ROOM = 1.3  # memory for a model and what quantizing it needs, in model sizes
_PER_TENSOR, _HEAD = {"num_bits": (4, 3), "axis": None}, "*lm_head*"


@dataclass(frozen=True)
class Calibration:
    """Passages of token ids, [1, tokens] int64 each; no file means that the model is to write them."""

    passages: tuple[torch.Tensor, ...] | None

    @classmethod
    def read(cls, path: Path | None, tokenizer_folder: Path | None) -> "Calibration":
        """Tokenize a text file, a passage a line.

        Args:
            path: UTF-8 text, or None.
            tokenizer_folder: has the tokenizer.json.
        Raises:
            ConfigError: the file cannot be read, is too short, or there is no tokenizer.
        """
        if path is None:
            return cls(None)
        if tokenizer_folder is None or not (tokenizer_folder / "tokenizer.json").exists():
            raise ConfigError(
                f"--calibration {path} needs the model's tokenizer, found no tokenizer.json beside its weights: add it, or "
                "leave --calibration out"
            )
        try:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read --calibration {path} ({error}), expected UTF-8 text: correct it") from error
        tokenizer = Tokenizer.from_file(str(safe_file(tokenizer_folder, "tokenizer.json")))
        tokenizer.no_truncation()
        passages = [tokenizer.encode(line).ids[:_LONGEST] for line in lines]
        total = sum(map(len, passages))
        if len(passages) < LEAST_PASSAGES or total < LEAST_TOKENS:
            raise ConfigError(
                f"--calibration {path} has {len(passages)} lines and {total} tokens, expected at least {LEAST_PASSAGES} "
                f"lines and {LEAST_TOKENS} tokens: add text like what the model will read, or leave --calibration out"
            )
        return cls(tuple(torch.tensor([ids]) for ids in passages))


def quantize(source: Path, output: Path, precision: Precision, calibration: Calibration) -> None:
    """Write an FP8 checkpoint.

    Args:
        source: a Hugging Face folder whose weights have been checked.
        output: the folder to write.
        precision: of the model; its head says whether the head is quantized too.
        calibration: what the scales of activations are measured on.
    Raises:
        ConfigError: the extra fp8 is missing.
        CheckpointError: modelopt cannot quantize the model.
        SmcError: too little memory.
    """
    mtq, export = _modelopt()
    model = _load(source, precision)
    if precision.is_fp8("lm_head"):
        _untie(model)
    passages = calibration.passages or tuple(_written(model))
    silent = io.StringIO()  # modelopt prints what it replaces
    with contextlib.redirect_stdout(silent), torch.no_grad():
        try:
            mtq.quantize(model, _config(mtq, precision), lambda each: _run(each, passages))
            export(model, export_dir=output)
        except (RuntimeError, ValueError, AssertionError) as error:
            raise CheckpointError(
                f"modelopt cannot quantize {source} ({error}), expected finite activations in every layer: check that the "
                "model works in bfloat16, or build it with --dtype bfloat16"
            ) from error


def _modelopt() -> tuple[Any, Any]:
    try:
        import modelopt.torch.quantization as mtq  # noqa: PLC0415 - an extra, and slow to import
        from modelopt.torch.export import export_hf_checkpoint  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"--dtype fp8 of a checkpoint that is not FP8 yet needs modelopt ({error}), expected the extra fp8: "
            "pip install 'smc-engine[fp8]'"
        ) from error
    return mtq, export_hf_checkpoint


def _config(mtq: Any, precision: Precision) -> dict[str, Any]:
    """modelopt's FP8 recipe, with the head where it is wanted."""
    default = mtq.FP8_DEFAULT_CFG
    rules = list(default["quant_cfg"])
    if precision.is_fp8("lm_head"):
        rules += [
            {"quantizer_name": f"{_HEAD}{kind}_quantizer", "cfg": _PER_TENSOR, "enable": True}
            for kind in ("weight", "input")
        ]
    return {**default, "quant_cfg": rules}


def _load(source: Path, precision: Precision) -> Any:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - seconds to import

    with Checkpoint(source) as checkpoint:
        config = checkpoint.config
    needed = int(config.weight_bytes(precision.activations) * _ROOM)
    on_gpu = torch.cuda.is_available() and needed < torch.cuda.mem_get_info()[0]
    dtype = torch_dtype(precision.activations) if on_gpu else torch.float32  # CPUs compute it faster
    needed = int(config.weight_bytes(dtype) * _ROOM)
    if needed > free_memory_bytes():
        raise SmcError(
            f"quantizing {source} needs {format_bytes(needed)} of memory, {format_bytes(free_memory_bytes())} are free: "
            "use a larger machine, or a checkpoint that is FP8 already"
        )
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, use_safetensors=True, trust_remote_code=False
    ).eval()
    return model.to("cuda") if on_gpu else model


def _untie(model: Any) -> None:
    """A head of its own: the embedding, which looks rows up, is not quantized."""
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())


def _run(model: Any, passages: tuple[torch.Tensor, ...]) -> None:
    for passage in passages:
        model(passage.to(model.device), use_cache=False)


@torch.no_grad()
def _written(model: Any) -> Iterator[torch.Tensor]:
    """Passages that the model writes itself, the same every time."""
    generator = torch.Generator(model.device).manual_seed(0)
    vocab_size, length = model.config.vocab_size, min(PASSAGE_TOKENS, model.config.max_position_embeddings)
    first = torch.randint(vocab_size, (PASSAGES, 1), generator=generator, device=model.device)
    tokens, cache = [first], None
    for _ in range(length - 1):
        out = model(tokens[-1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        likely = out.logits[:, -1].float().softmax(dim=-1)
        if not likely.isfinite().all():
            raise CheckpointError(
                "the model gives NaN while it writes calibration text, expected finite logits: check it"
            )
        tokens.append(torch.multinomial(likely, 1, generator=generator))
    yield from torch.cat(tokens, dim=1).split(1)
