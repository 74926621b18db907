"""Distils the task pair's draft from lossless answers, by KL or KL + W log(1 + χ²): what docs/quality-measured.md compares.

    python scripts/distil_task_draft.py SWEEP_DIR --output DIR --chi2 1
    smc-build --checkpoint models/task-pair/target --draft DIR --particles 16 --draft-tokens 16 --dtype float32 --output ENGINE
    smc-eval --engine ENGINE --problems 125 --temperature 1.0 --n 8,16 --k 16

SWEEP_DIR holds the answers of scripts/sweep_quality.py. Problems below --held-out are not learned from; the divergences before
and after are averages over the tokens of lossless answers to them, at temperature 1. The shipped draft stays as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "scripts")]

from distill.llama import EMBEDDING, Shape, Weights, hidden_states, load_checkpoint, shape_of  # noqa: E402
from distill.loss import LossTerms, logit_gradient  # noqa: E402

from scripts import sweep_quality  # noqa: E402
from scripts.quality_report import is_lossless  # noqa: E402
from smc_engines.eval import chain  # noqa: E402
from smc_engines.eval.tasks import load_task  # noqa: E402
from smc_plugin.errors import ConfigError, SmcError  # noqa: E402

Row = tuple[list[int], int]  # tokens, of which so many are the prompt
SAY_EVERY = 50


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweep", type=Path, metavar="SWEEP_DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the draft, and report.json")
    parser.add_argument("--chi2", type=float, default=0.0, help="weight of log(1 + χ²); default %(default)s")
    parser.add_argument("--steps", type=int, default=300, help="default %(default)s")
    parser.add_argument("--rows", type=int, default=48, help="answers a step; default %(default)s")
    parser.add_argument("--lr", type=float, default=1e-3, help="of AdamW, falling to 0; default %(default)s")
    parser.add_argument("--held-out", type=int, default=125, help="first problems, measured on; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the order of answers; default %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    options = parser.parse_args(arguments)
    for name in ("steps", "rows", "held_out", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, expected at least 1: raise it")
    return options


def lossless_rows(folder: Path) -> tuple[list[tuple[int, Row]], int]:
    """Lossless answers at temperature 1.

    Returns:
        problem and row of each; the seed of the problems.
    Raises:
        ConfigError: the folder has no such answers.
    """
    seed = json.loads((folder / "report.json").read_text(encoding="utf-8"))["problem_seed"]
    records = [r for r in sweep_quality.read_answers(folder, {"problem_seed": seed}) if is_lossless(r["setting"], 1.0)]
    if not records:
        raise ConfigError(
            f"{folder} has no lossless answers at temperature 1, expected those of sweep_quality.py: name its --output"
        )
    items = load_task("chain").items(max(record["item"] for record in records) + 1, seed)
    tokenizer, rows = chain.tokenizer(), list[tuple[int, Row]]()
    for record in records:
        prompt = [int(token) for token in items[record["item"]].prompt]
        answer = tokenizer.encode(record["text"], add_special_tokens=False).ids
        answer += [chain.IDS[chain.END]] if record["finish"] == "stop" else []
        rows.append((record["item"], (prompt + answer, len(prompt))))
    return rows, seed


def batch(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Tokens [B, L], and where a token's successor belongs to an answer, [B, L - 1] bool."""
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row, _ in rows], batch_first=True)
    index = torch.arange(1, tokens.shape[1])
    first, length = (torch.tensor(values)[:, None] for values in zip(*((n, len(row)) for row, n in rows), strict=True))
    return tokens, (index >= first) & (index < length)


def logits(model: tuple[Weights, Shape], tokens: Tensor, wanted: Tensor) -> Tensor:
    """Of the places that are wanted: [C, V] float32."""
    weights, shape = model
    return hidden_states(weights, tokens, shape)[:, :-1][wanted] @ weights[EMBEDDING].T


@torch.no_grad()
def measure(target: tuple[Weights, Shape], draft: tuple[Weights, Shape], rows: Sequence[Row]) -> dict[str, float]:
    """KL, log(1 + χ²) and acceptance 1 - TV, averaged over the tokens of the answers."""
    found = []
    for start in range(0, len(rows), 64):
        tokens, wanted = batch(rows[start : start + 64])
        log_p, log_q = (torch.log_softmax(logits(model, tokens, wanted), -1) for model in (target, draft))
        kl, chi2 = (log_p.exp() * (log_p - log_q)).sum(-1), torch.logsumexp(2 * log_p - log_q, -1)
        found.append(torch.stack([kl, chi2, torch.minimum(log_p, log_q).exp().sum(-1)]))
    means = torch.cat(found, dim=1).double().mean(dim=1).tolist()
    return dict(zip(("kl", "log_1_plus_chi2", "acceptance"), (round(mean, 4) for mean in means), strict=True))


def train(target: tuple[Weights, Shape], draft: tuple[Weights, Shape], rows: Sequence[Row], options: Any) -> None:
    """Change the draft's weights."""
    terms = LossTerms(kl=((1.0, 1.0),), order_two=options.chi2)
    weights = [weight.requires_grad_(True) for weight in draft[0].values()]
    optimiser = torch.optim.AdamW(weights, lr=options.lr, weight_decay=0.0)
    generator, order = torch.Generator().manual_seed(options.seed), list[int]()
    for step in range(options.steps):
        if len(order) < options.rows:
            order += torch.randperm(len(rows), generator=generator).tolist()
        chosen, order = order[: options.rows], order[options.rows :]
        tokens, wanted = batch([rows[index] for index in chosen])
        with torch.no_grad():
            z = logits(target, tokens, wanted)
        y = logits(draft, tokens, wanted)
        slope, loss, _ = logit_gradient(y.detach(), z, terms)
        y.backward(slope / len(slope))
        optimiser.param_groups[0]["lr"] = options.lr * (1 - step / options.steps)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % SAY_EVERY == 0 or step + 1 == options.steps:
            print(f"step {step + 1} of {options.steps}, loss {float(loss.mean()):.4f}", file=sys.stderr, flush=True)
    for weight in weights:
        weight.requires_grad_(False)


def distil(options: argparse.Namespace) -> dict[str, Any]:
    """Read, train, measure, write; returns the report."""
    rows, seed = lossless_rows(options.sweep)
    measured = [row for item, row in rows if item < options.held_out]
    learned = [row for item, row in rows if item >= options.held_out]
    if not learned or not measured:
        raise ConfigError(
            f"{len(learned)} answers are left to learn from and {len(measured)} to measure on, expected some of each: "
            f"change --held-out {options.held_out}, or sweep more problems"
        )
    models = [load_checkpoint(sweep_quality.PAIR / name, "cpu", torch.float32) for name in ("target", "draft")]
    target, draft = ((weights, shape_of(config)) for weights, config in models)
    report: dict[str, Any] = {
        name: getattr(options, name) for name in ("chi2", "steps", "rows", "lr", "held_out", "seed")
    }
    report |= {"problem_seed": seed, "answers": len(learned), "torch": torch.__version__}
    report["before"] = measure(target, draft, measured)
    train(target, draft, learned, options)
    rounded = {name: weight.to(torch.bfloat16) for name, weight in draft[0].items()}
    report["after"] = measure(target, ({name: w.float() for name, w in rounded.items()}, draft[1]), measured)
    options.output.mkdir(parents=True, exist_ok=True)
    shutil.copy(sweep_quality.PAIR / "draft" / "config.json", options.output)
    save_file(
        {name: w.contiguous() for name, w in rounded.items()}, options.output / "model.safetensors", {"format": "pt"}
    )
    (options.output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def main(arguments: list[str] | None = None) -> int:
    """Distil; returns the exit status."""
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    try:
        report = distil(options)
    except (SmcError, OSError) as error:
        print(f"distil_task_draft: {error}", file=sys.stderr)
        return 1
    print(json.dumps({name: report[name] for name in ("before", "after")}))
    print(f"wrote {options.output}; next:\n  smc-build --checkpoint models/task-pair/target --draft {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
