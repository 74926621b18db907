"""What FP8 costs in accuracy: one target in bfloat16 and in several FP8 forms, on the same text; then SMC with FP8 models.

    python scripts/fp8_accuracy.py --target .models/smollm2-135m-instruct --draft .models/smollm2-draft \
        --json docs/benchmarks/fp8-accuracy.json

The text is the Python manual that comes with the interpreter (pydoc's topics), which calibration never sees. For each form:
perplexity, KL(bfloat16 || form) of the next token, and the cosine between residual streams after each layer. The forms

    weights        as an engine holds them: a scale for each projection, kept for each output column; activations bfloat16
    requantized    q, k, v and gate, up brought to the larger scale of the joined matrix
    by column      quantized anew with a scale for each output column
    activations    the engine's weights, and what they multiply rounded to FP8, as a TensorRT plan does
    KV pages       the engine's weights and FP8 KV pages

SMC: held-out prompts are answered by engines with FP8 nowhere, in the draft, and in both models; the figure is the mean
log-probability of an answer token under the bfloat16 target.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pydoc_data.topics
import random
import shlex
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smc_build.builder import build_engine
from smc_build.engine_dir import load_manifest, load_weights
from smc_build.model_config import ModelConfig
from smc_build.plan import BuildOptions
from smc_build.torch_ops import FP8_MAX, Fp8InputOps
from smc_engines.config import ExecutorConfig
from smc_engines.engine import Engine
from smc_engines.executor import Executor
from smc_engines.model import PagedModel
from smc_engines.regions import TorchRegions
from smc_engines.sampling_params import SamplingParams
from smc_engines.text import Tokenizer
from smc_plugin.errors import SmcError

PROMPTS = Path(__file__).parent / "distill" / "heldout.json"
PAGE = 16
BATCH = 4
FP8 = torch.float8_e4m3fn
ENGINES = {"bfloat16": ("bfloat16", "bfloat16"), "FP8 draft": ("bfloat16", "fp8"), "FP8": ("fp8", "fp8")}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", required=True, metavar="DIR")
    parser.add_argument("--draft", required=True, metavar="DIR")
    parser.add_argument("--passages", type=int, default=24, help="of text; default %(default)s")
    parser.add_argument("--tokens", type=int, default=256, help="of a passage; default %(default)s")
    parser.add_argument(
        "--prompts", type=int, default=32, help="answered with SMC, 0 leaves it out; default %(default)s"
    )
    parser.add_argument("--max-tokens", type=int, default=48, help="of an answer; default %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


class Recorder(TorchRegions):
    """Torch regions that keep the residual stream after each layer."""

    residuals: list[Tensor]

    def run(self, region: str, layer: int | None, activations: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute one region (see RegionRunner)."""
        out = super().run(region, layer, activations)
        if region == "entry":
            self.residuals = []
        self.residuals += [out[name] for name in ("residual", "hidden") if name in out]
        return out


class Form:
    """One form of the target: logits and residual streams of passages."""

    def __init__(
        self, config: ModelConfig, weights: dict[str, Tensor], tokens: int, ops: Any = None, kv_dtype: Any = None
    ) -> None:
        self.regions = Recorder(config, weights, ops)
        columns = -(-tokens // PAGE)
        self.table = torch.arange(1, BATCH * columns + 1, dtype=torch.int32).view(BATCH, columns)
        self.model = PagedModel(config, weights, BATCH * columns + 1, PAGE, self.regions, kv_dtype=kv_dtype)

    def run(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[B, T] tokens to log-probabilities [B, T, V] and residual streams [B * T, hidden], one a layer."""
        rows = tokens.shape[0]
        start = torch.zeros(rows, dtype=torch.int64)
        hidden = self.model.forward(tokens, start, self.table[:rows], tokens.shape[1])
        residuals = self.regions.residuals
        return self.model.logits(hidden).log_softmax(dim=-1), residuals


@dataclass
class Sums:
    """What one form has added up over the text."""

    loss: float = 0.0
    divergence: float = 0.0
    cosines: list[list[float]] = field(default_factory=list)


def held_out_text(tokenizer: Tokenizer, passages: int, tokens: int) -> Tensor:
    """[passages, tokens] of the Python manual, from places drawn with a fixed seed."""
    ids = tokenizer.encode("\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics)))
    starts = random.Random(0).sample(range(len(ids) - tokens), passages)
    return torch.tensor([list(ids[start : start + tokens]) for start in starts])


def to_larger_scale(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Joined matrices with one scale, the larger of their parts."""
    out = dict(weights)
    for name in (name for name in weights if name.endswith((".qkv", ".gate_up"))):
        weight, scale = weights[name], weights[f"{name}_scale"]
        out[f"{name}_scale"] = largest = torch.full_like(scale, scale.max().item())
        out[name] = (weight.float() * scale[:, None] / largest[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return out


def by_column(weights: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices quantized anew, the largest value of each output column becoming FP8's largest."""
    out = dict(weights)
    for name, weight in weights.items():
        if weight.dtype == FP8:
            wide = plain[name].float().t()
            scale = wide.abs().amax(dim=1).clamp(min=1e-12) / FP8_MAX
            out[f"{name}_scale"], out[name] = scale, (wide / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return out


def weight_error(weights: Mapping[str, Tensor], plain: Mapping[str, Tensor], suffix: str) -> float:
    """Relative root mean square error of all matrices of a kind."""
    wrong = whole = 0.0
    for name, weight in weights.items():
        if name.endswith(suffix):
            wide = plain[name].float().t()
            wrong += (weight.float() * weights[f"{name}_scale"][:, None] - wide).square().sum().item()
            whole += wide.square().sum().item()
    return math.sqrt(wrong / whole)


def compare_forms(folders: Mapping[str, Path], text: Tensor) -> list[dict[str, Any]]:
    """Run every form over the text."""
    manifest = load_manifest(folders["FP8"], verify=False)
    config, tokens = manifest.target.config, text.shape[1]
    plain, stored = (load_weights(folders[name], "target") for name in ("bfloat16", "FP8"))
    variants = {"weights": stored, "requantized": to_larger_scale(stored), "by column": by_column(stored, plain)}
    errors = {
        name: {suffix: weight_error(weights, plain, f".{suffix}") for suffix in ("qkv", "o", "gate_up", "down")}
        for name, weights in variants.items()
    }
    base = Form(config, plain, tokens)
    forms = {name: Form(config, weights, tokens) for name, weights in variants.items()}
    forms["activations"] = Form(config, stored, tokens, Fp8InputOps())
    forms["KV pages"] = Form(config, stored, tokens, kv_dtype=FP8)
    sums = {name: Sums() for name in ("bfloat16", *forms)}
    for index, batch in enumerate(text.split(BATCH)):
        expected, residuals = base.run(batch)
        for name, total in sums.items():
            found, streams = (expected, residuals) if name == "bfloat16" else forms[name].run(batch)
            add(total, batch, (expected, residuals), (found, streams))
        print(f"text {(index + 1) * BATCH} of {len(text)}", file=sys.stderr, flush=True)
    count = text.shape[0] * (tokens - 1)
    rows = []
    for name, each in sums.items():
        cosines = [statistics.fmean(layer) for layer in zip(*each.cosines, strict=True)]
        perplexity = math.exp(each.loss / count)
        rows.append(
            {
                "form": name,
                "perplexity": perplexity,
                "perplexity_ratio": perplexity / math.exp(sums["bfloat16"].loss / count),
                "kl_nats": each.divergence / count,
                "cosine_by_layer": cosines,
                "least_cosine": min(cosines),
                "weight_errors": errors.get(name),
            }
        )
    return rows


def add(sums: Sums, tokens: Tensor, expected: tuple[Tensor, list[Tensor]], found: tuple[Tensor, list[Tensor]]) -> None:
    """Add one batch: loss of the next token, divergence from the expected law, cosines of residual streams."""
    log_p, log_q = expected[0][:, :-1], found[0][:, :-1]
    sums.loss -= log_q.gather(2, tokens[:, 1:, None]).sum(dtype=torch.float64).item()
    sums.divergence += (log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64).item()
    pairs = zip(expected[1], found[1], strict=True)
    sums.cosines.append([torch.cosine_similarity(a.float(), b.float(), dim=1).mean().item() for a, b in pairs])


def compare_answers(folders: Mapping[str, Path], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Answer the held-out prompts with each engine, and let the bfloat16 target say how likely it finds the answers."""
    texts = json.loads(PROMPTS.read_text(encoding="utf-8"))[: args.prompts]
    judge = Engine.from_dir(folders["bfloat16"], ExecutorConfig(device="cpu", verify=False, max_groups=1))
    assert judge.tokenizer is not None
    prompts = [judge.tokenizer.apply_chat_template([{"role": "user", "content": text}])[1] for text in texts]
    rows = []
    for name, folder in folders.items():
        executor = Executor.from_engine_dir(str(folder), ExecutorConfig(device="cpu", verify=False, max_groups=8))
        each = [
            SamplingParams(num_particles=4, num_draft_tokens=4, max_tokens=args.max_tokens, temperature=0.7, seed=seed)
            for seed in range(len(prompts))
        ]
        outputs = executor.generate(prompts, each)
        means = [
            answer_likelihood(judge, prompt, output.token_ids, 0.7)
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        infos = [output.info for output in outputs if output.info is not None]
        rows.append(
            {
                "engine": name,
                "prompts": len(prompts),
                "mean_log_likelihood_per_token": statistics.fmean(means),
                "half_width_95": 1.96 * statistics.stdev(means) / math.sqrt(len(means)),
                "mean_ess_fraction": statistics.fmean(statistics.fmean(info.ess) / 4 for info in infos if info.ess),
                "resamples_per_round": sum(info.resamples for info in infos) / sum(info.rounds for info in infos),
            }
        )
        print(f"answers of {name}", file=sys.stderr, flush=True)
    return rows


def answer_likelihood(engine: Engine, prompt: Sequence[int], answer: Sequence[int], temperature: float) -> float:
    """Mean log-probability of an answer's tokens under the engine's target."""
    tokens = torch.tensor([[*prompt, *answer]])
    table = torch.arange(1, tokens.shape[1] // PAGE + 2, dtype=torch.int32)[None]
    hidden = engine.target.forward(tokens, torch.zeros(1, dtype=torch.int64), table, tokens.shape[1])
    first = len(prompt) - 1
    log_p = (engine.target.logits(hidden[:, first:-1]) / temperature).log_softmax(dim=-1)
    return log_p.gather(2, tokens[:, first + 1 :, None]).mean().item()


def main(argv: list[str] | None = None) -> int:
    """Build the engines, compare, print and write."""
    args = build_parser().parse_args(argv)
    report: dict[str, Any] = {"date": date.today().isoformat(), "target": Path(args.target).name}
    report |= {"draft": Path(args.draft).name, "passages": args.passages, "tokens": args.tokens}
    report["command"] = "python scripts/fp8_accuracy.py " + shlex.join(sys.argv[1:] if argv is None else argv)
    report |= {"prompts": args.prompts, "max_tokens": args.max_tokens, "cores": os.cpu_count()}
    report["versions"] = {name: version(name) for name in ("torch", "transformers", "nvidia-modelopt")}
    try:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            folders = {}
            for name, (target, draft) in ENGINES.items():
                options = BuildOptions(
                    args.target, args.draft, dtype=target, draft_dtype=draft, compiler="torch", max_seq_len=512,
                    output=Path(folder) / name.replace(" ", "-"), name="accuracy",
                )  # fmt: skip
                folders[name] = build_engine(options)
            tokenizer = Tokenizer.load(folders["FP8"] / "tokenizer")
            report["forms"] = compare_forms(folders, held_out_text(tokenizer, args.passages, args.tokens))
            report["answers"] = []
            write(report, args.json)  # the answers take as long again
            report["answers"] = compare_answers(folders, args) if args.prompts else []
    except SmcError as error:
        print(f"fp8_accuracy: {error}", file=sys.stderr)
        return 1
    print_report(report)
    write(report, args.json)
    return 0


def write(report: Mapping[str, Any], path: Path | None) -> None:
    """Save what there is so far."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {path}")


def print_report(report: Mapping[str, Any]) -> None:
    """The two tables."""
    print(f"{'form':12} {'perplexity':>10} {'ratio':>7} {'KL (nats)':>10} {'least cosine':>12}")
    for row in report["forms"]:
        figures = f"{row['perplexity']:10.3f} {row['perplexity_ratio']:7.4f} {row['kl_nats']:10.6f}"
        print(f"{row['form']:12} {figures} {row['least_cosine']:12.6f}")
    for row in report["answers"]:
        interval = f"{row['mean_log_likelihood_per_token']:.3f} ± {row['half_width_95']:.3f}"
        print(f"{row['engine']:12} log p per token {interval}, ESS/N {row['mean_ess_fraction']:.2f}")


if __name__ == "__main__":
    sys.exit(main())
