"""Trains the draft of the demonstration pair: a few of the target's own layers, taught to imitate the whole target.

    python scripts/fetch_models.py --no-draft
    python scripts/train_draft.py --minutes 10     # one GPU; writes models/smollm2-draft and docs/benchmarks/draft.json
    python scripts/train_draft.py --minutes 10 --resume models/smollm2-draft        # goes on from the shipped layers
    python scripts/train_draft.py --smoke          # the same steps on a CPU with a tiny random target, in half a minute
Four stages: the target writes chats and text (distill/generate.py), its final hidden states are kept as it writes, the draft's
layers learn its whole next-token distribution from them (distill/optimize.py, distill/loss.py), and acceptance, KL and
ESS are measured on answers to held-out prompts (distill/measure.py): shipped layers, untrained ones, unrounded ones.
"""

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "scripts")]

from distill.generate import Markup, RowWriter  # noqa: E402
from distill.llama import (  # noqa: E402
    EMBEDDING,
    FINAL_NORM,
    LAYER_PARTS,
    Weights,
    decoder_layer,
    hidden_states,
    load_checkpoint,
    shape_of,
)
from distill.measure import Model, ess_after_round, first_answers, overlap_and_kl  # noqa: E402
from distill.optimize import Corpus, Trainer, TrainingPlan, TrainingReport  # noqa: E402
from distill.prompts import (  # noqa: E402
    chat_text,
    held_out_prompts,
    held_out_rows,
    markup,
    pad_rows,
    training_rows,
)
from distill.tiny import write_tiny_target  # noqa: E402
from draft_layers import read_layers, write_layers  # noqa: E402

from smc_plugin.errors import CheckpointError, ConfigError, SmcError  # noqa: E402

SAVING_SECONDS, MEASURING_SECONDS = 12.0, 60.0  # kept back from --minutes: five savings, stage 4
SPARE_BYTES = 8e9  # of GPU memory, left free while hidden states are kept there
KIND_WEIGHTS = (0.0, 0.3, 1.0)  # fed tokens teach nothing, user turns a little, answers are what drafts are for


@dataclass(frozen=True)
class Sizes:
    """How much text: rows a batch and (row length, share of the tokens); held-out prompts, answers to each, their length,
    and the contexts that ESS is averaged over."""

    rows: int = 4096
    lengths: tuple[tuple[int, float], ...] = ((384, 1.0),)
    prompts: int = 1000
    samples: int = 4
    answer_length: int = 320
    contexts: int = 256


SMOKE_SIZES = Sizes(8, ((192, 0.8), (208, 0.2)), prompts=12, samples=1, answer_length=176, contexts=12)


@dataclass(frozen=True)
class Session:
    """What every stage needs: the target, its tokenizer and markup, where and how to compute."""

    target: Model
    config: dict[str, Any]
    tokenizer: Tokenizer
    markup: Markup
    device: str
    compiled: bool


def say(text: str) -> None:
    """Print at once, with the time of day."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def open_session(folder: Path, device: str) -> Session:
    """Load the target: bfloat16 and compiled on a GPU, float32 and eager on a CPU."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} holds no checkpoint, expected the target: run scripts/fetch_models.py --no-draft"
        )
    compiled = device.startswith("cuda")
    weights, config = load_checkpoint(folder, device, torch.bfloat16 if compiled else torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Session(Model(weights, shape_of(config)), config, tokenizer, markup(tokenizer), device, compiled)


def write_text(
    session: Session, sizes: Sizes, tokens: float, seed: int, seconds: float = float("inf")
) -> list[dict[str, torch.Tensor]]:
    """Stage 1: the target writes about `tokens` tokens.

    Args:
        session: the target.
        sizes: rows and lengths.
        tokens: total to write.
        seed: of prompts and sampling.
        seconds: no batch begins after so much time, whatever is missing then.
    Returns:
        {"tokens": [R, L] int32, "kinds": [R, L] uint8, "hidden": [R, L, H]} for each batch of rows; tokens and kinds on the
        CPU, the final hidden states (1152 bytes a token for SmolLM2) on the GPU as long as they fit beside the writer's
        cache.
    """
    written, entered = [], time.monotonic()
    for length, share in sizes.lengths:
        started, rows = time.monotonic(), max(1, sizes.rows * sizes.lengths[0][0] // length)
        shape, weights = session.target.shape, session.target.weights
        writer = RowWriter(weights, shape, rows, length, session.markup, session.compiled)
        seeds = [seed * 1_000_003 + length * 101 + b for b in range(max(1, round(tokens * share / (rows * length))))]
        count = 0
        with ThreadPoolExecutor(1) as pool:  # prompts are made while the GPU writes
            following = pool.submit(training_rows, session.tokenizer, rows, seeds[0])
            for batch, part_seed in enumerate(seeds):
                start = following.result()
                if batch + 1 < len(seeds):
                    following = pool.submit(training_rows, session.tokenizer, rows, seeds[batch + 1])
                torch.manual_seed(part_seed)
                new, kinds = writer.write(start)
                written.append({"tokens": new.cpu(), "kinds": kinds.cpu(), "hidden": kept(writer.hidden)})
                count += new.numel()
                spent = time.monotonic() - started
                if batch % 5 == 0 or batch + 1 == len(seeds):
                    say(f"wrote {count} tokens in rows of {length}: {spent:.1f} s, {count / spent:.0f} tokens/s")
                if time.monotonic() - entered > seconds:
                    say(f"stopped writing after {batch + 1} of {len(seeds)} batches")
                    break
        del writer
        if session.compiled:
            torch.cuda.empty_cache()
    return written


def kept(hidden: torch.Tensor) -> torch.Tensor:
    """A copy of what the writer will overwrite: on its own device, or on the CPU once GPU memory runs short."""
    if hidden.device.type == "cuda" and torch.cuda.mem_get_info(hidden.device)[0] < hidden.nbytes + SPARE_BYTES:
        return hidden.cpu()
    return hidden.clone()


@torch.no_grad()
def prepare(session: Session, written: list[dict[str, torch.Tensor]]) -> list[Corpus]:
    """Stage 2: what is learned from each token; computes the target's hidden states where --data brought none. Takes
    `written` apart, so that no hidden states are held twice."""
    layer = torch.compile(decoder_layer, dynamic=False) if session.compiled else decoder_layer
    table, corpora = torch.tensor(KIND_WEIGHTS, device=session.device), []
    for part in written:
        tokens = part["tokens"].to(session.device)
        weight = torch.zeros(tokens.shape, device=session.device)
        weight[:, :-1] = table[part["kinds"].to(session.device)[:, 1:].long()]
        weight[held_out_rows(tokens, session.tokenizer)] = 0.0
        if "hidden" in part:
            corpora.append(Corpus(tokens, weight, part.pop("hidden").to(session.device)))
            continue
        size = max(1, 65536 // tokens.shape[1])
        width = session.target.weights[EMBEDDING].shape[1]
        states = torch.empty(*tokens.shape, width, device=session.device, dtype=session.target.weights[EMBEDDING].dtype)
        for start in range(0, len(tokens), size):
            piece = tokens[start : start + size]
            states[start : start + size] = hidden_states(session.target.weights, piece, session.target.shape, layer)
        corpora.append(Corpus(tokens, weight, states))
    return corpora


def initial_draft(session: Session, chosen: list[int]) -> tuple[Weights, dict[str, Any]]:
    """The target's layers `chosen`, final norm and embedding as float32 copies (embedding as it is), and the config."""
    depth = session.target.shape.layers
    if not chosen or min(chosen) < 0 or max(chosen) >= depth:
        raise ConfigError(f"--init names layers {chosen}, the target has 0 to {depth - 1}: choose among those")
    source = session.target.weights
    weights = {EMBEDDING: source[EMBEDDING], FINAL_NORM: source[FINAL_NORM].float().clone()}
    for new, old in enumerate(chosen):
        for part in LAYER_PARTS:
            weights[f"model.layers.{new}.{part}.weight"] = source[f"model.layers.{old}.{part}.weight"].float().clone()
    return weights, session.config | {"num_hidden_layers": len(chosen)}


def resumed_draft(session: Session, folder: Path, grow: list[int]) -> tuple[Weights, dict[str, Any]]:
    """The shipped layers of `folder` as float32 weights with the target's embedding, and their config.

    `grow` names target layers to insert in the middle. Their two output matrices begin at zero, so that they change
    nothing until they have learned something.
    """
    weights, config = read_layers(folder)
    fresh, depth = initial_draft(session, grow)[0] if grow else {}, config["num_hidden_layers"]
    origin = [(weights, layer) for layer in range(depth)]
    origin[depth // 2 : depth // 2] = [(fresh, layer) for layer in range(len(grow))]
    grown = {EMBEDDING: session.target.weights[EMBEDDING], FINAL_NORM: weights[FINAL_NORM].to(session.device)}
    for new, (source, old) in enumerate(origin):
        for part in LAYER_PARTS:
            weight = source[f"model.layers.{old}.{part}.weight"].to(session.device)
            silent = source is fresh and part in ("self_attn.o_proj", "mlp.down_proj")
            grown[f"model.layers.{new}.{part}.weight"] = torch.zeros_like(weight) if silent else weight
    return grown, config | {"num_hidden_layers": len(origin)}


def starting_draft(session: Session, options: argparse.Namespace) -> tuple[Weights, dict[str, Any]]:
    """The weights that training begins with; they have as many layers as --init, the baseline of the report."""
    if options.resume is None:
        return initial_draft(session, options.init)
    weights, config = resumed_draft(session, options.resume, options.grow)
    if (layers := config["num_hidden_layers"]) != len(options.init):
        raise ConfigError(
            f"{options.resume} with --grow has {layers} layers, --init names {len(options.init)}: name as many there"
        )
    return weights, config


def hold_out(session: Session, sizes: Sizes, seed: int) -> dict[float, tuple[torch.Tensor, torch.Tensor]]:
    """The target's answers to the held-out prompts.

    Returns:
        temperature → (tokens [R, L], answer mask [R, L] bool), for 0.7 and 1.0.
    """
    prompts = [session.tokenizer.encode(chat_text(text)).ids for text in held_out_prompts()[: sizes.prompts]]
    prompts = [prompt for prompt in prompts for _ in range(sizes.samples)]
    shape, weights = session.target.shape, session.target.weights
    writer = RowWriter(weights, shape, len(prompts), sizes.answer_length, session.markup, session.compiled)
    answers = {}
    for temperature in (0.7, 1.0):
        torch.manual_seed(seed * 7919 + round(temperature * 10))
        rows = pad_rows(prompts, [temperature] * len(prompts), [0] * len(prompts))
        tokens, kinds = writer.write(rows)
        answers[temperature] = tokens, first_answers(tokens, kinds, session.markup.end)
    return answers


def measure(
    session: Session, draft: Model, answers: dict[float, tuple[torch.Tensor, torch.Tensor]], contexts: int
) -> dict[str, dict[str, float]]:
    """Stage 4 for one draft: {"0.7": {"acceptance", "kl", "positions", "ess_n8_k4", "ess_n8_k8"}, "1.0": ...}."""
    figures = {}
    for temperature, (tokens, wanted) in answers.items():
        result = overlap_and_kl(draft, session.target, tokens, wanted, temperature)
        end = session.markup.end
        result |= ess_after_round(draft, session.target, tokens, wanted, temperature, end, contexts)
        figures[str(temperature)] = {name: round(value, 4) for name, value in result.items()}
    return figures


def in_compute_dtype(session: Session, weights: Weights) -> Weights:
    """The weights as a run time holds them: every tensor in the target's dtype and place, the target's embedding."""
    embedding = session.target.weights[EMBEDDING]
    moved = {name: weight.detach().to(embedding.device, embedding.dtype) for name, weight in weights.items()}
    return moved | {EMBEDDING: embedding}


def print_table(results: dict[str, dict[str, dict[str, float]]]) -> None:
    """The figures, one line for each draft and temperature."""
    print(f"{'draft':<24}{'T':>5}{'acceptance':>12}{'KL':>9}{'ESS/N K=4':>11}{'K=8':>8}{'positions':>11}")
    for name, figures in results.items():
        for temperature, row in figures.items():
            line = f"{name:<24}{temperature:>5}{row['acceptance']:>12.4f}{row['kl']:>9.4f}"
            print(f"{line}{row['ess_n8_k4']:>11.4f}{row['ess_n8_k8']:>8.4f}{row['positions']:>11.0f}", flush=True)


def train(session: Session, options: argparse.Namespace, sizes: Sizes, plan: TrainingPlan) -> dict[str, Any]:
    """All stages; writes the shipped layers, and the report once before measuring too.

    Returns:
        The report that main writes as JSON.
    """
    started = time.monotonic()
    weights, config = starting_draft(session, options)
    shape = replace(shape_of(config), bits=options.bits, group=options.group)
    corpora = prepare(session, load_or_write(session, options, sizes))
    unique = sum(corpus.tokens.numel() for corpus in corpora)
    unused = sum(int((corpus.weight.sum(1) == 0).sum()) for corpus in corpora)
    say(f"prepared {unique} tokens, {unused} rows unused; {time.monotonic() - started:.0f} s so far")
    own = {name: weight for name, weight in weights.items() if name != EMBEDDING}
    options.output.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        write_layers(options.output, own, config, options.bits, options.group)

    reserve = SAVING_SECONDS + (MEASURING_SECONDS if options.stage == "all" else 0.0)
    left = 60 * options.minutes - (time.monotonic() - started) - reserve
    report = Trainer(weights, shape, replace(plan, seconds=left), session.compiled).run(corpora, say, save)
    save()
    corpora.clear()
    described = describe(session, options, plan, report, unique, time.monotonic() - started)
    write_report(options, described)
    if options.stage == "all":
        described["results"] = compare(session, options, sizes, weights)
        described["total_minutes"] = round((time.monotonic() - started) / 60, 2)
    return described


def write_report(options: argparse.Namespace, report: dict[str, Any]) -> None:
    """Write the JSON."""
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def compare(
    session: Session, options: argparse.Namespace, sizes: Sizes, trained: Weights | None
) -> dict[str, dict[str, dict[str, float]]]:
    """Stage 4: the shipped draft, the untrained layers and, when at hand, the trained weights before rounding."""
    answers, results = hold_out(session, sizes, 0), {}  # the same answers, whatever text --seed trained on
    initial, config = initial_draft(session, options.init)
    shape, shipped = shape_of(config), read_layers(options.output)[0]
    candidates = {"trained, as shipped": shipped, "untrained": initial}
    if trained is not None:
        candidates["trained, not rounded"] = trained
    for name, weights in candidates.items():
        draft = Model(in_compute_dtype(session, weights), shape)
        results[name] = measure(session, draft, answers, sizes.contexts)
        print_table({name: results[name]})
    return results


def load_or_write(session: Session, options: argparse.Namespace, sizes: Sizes) -> list[dict[str, torch.Tensor]]:
    """Stage 1, or its result from --data when that file exists (cut to --tokens)."""
    if options.data is None or not options.data.exists():
        written = write_text(session, sizes, options.tokens, options.seed, 60 * options.write_minutes)
        if options.data is not None:
            torch.save([{name: part[name] for name in ("tokens", "kinds")} for part in written], options.data)
    else:
        written = torch.load(options.data, weights_only=True)
    total = sum(part["tokens"].numel() for part in written)
    keep = min(1.0, options.tokens / total)
    return [{name: t[: max(1, round(keep * len(t)))] for name, t in part.items()} for part in written]


def device_name(session: Session) -> str:
    """The GPU's name, or CPU."""
    return torch.cuda.get_device_name() if session.compiled else "CPU"


def describe(
    session: Session,
    options: argparse.Namespace,
    plan: TrainingPlan,
    report: TrainingReport,
    unique: int,
    seconds: float,
) -> dict[str, Any]:
    """Everything a reader needs to judge the figures, and to run the training again."""
    return {
        "device": device_name(session),
        "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        "seed": options.seed,
        "init_layers": options.init,
        "resumed": options.resume is not None,
        "grown_layers": options.grow,
        "bits": options.bits,
        "group": options.group,
        "shipped_bytes": sum(path.stat().st_size for path in options.output.iterdir()),
        "unique_tokens": unique,
        "row_length": options.row_length,
        "plan": asdict(plan),
        "training": asdict(report) | {"tokens_per_second": round(report.tokens / max(report.seconds, 1e-9))},
        "total_minutes": round(seconds / 60, 2),
        "held_out_prompts": len(held_out_prompts()),
        "results": {},
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the draft of the demonstration pair by distillation.")
    parser.add_argument("--target", type=Path, default=Path(".models/smollm2-135m-instruct"), help="target checkpoint")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "models" / "smollm2-draft", help="shipped layers")
    parser.add_argument("--report", type=Path, default=REPOSITORY / "docs" / "benchmarks" / "draft.json")
    parser.add_argument("--data", type=Path, help="keep the written text in this file, or reuse it")
    parser.add_argument("--tokens", type=float, default=8.4e6, help="unique tokens the target writes")
    parser.add_argument("--write-minutes", type=float, default=float("inf"), help="write no longer than this")
    parser.add_argument("--rows", type=int, default=4096, help="rows written at once")
    parser.add_argument("--row-length", type=int, default=384, help="tokens of a written row, prompt included")
    parser.add_argument(
        "--init", default="0,1,2,27,28,29", help="target layers to start from, one for each draft layer"
    )
    parser.add_argument("--resume", type=Path, help="start from the shipped layers in this folder instead of --init")
    parser.add_argument("--grow", default="", help="target layers to insert in the middle of the resumed ones")
    parser.add_argument("--bits", type=int, default=5, choices=range(2, 9), help="bits of a shipped weight")
    parser.add_argument("--group", type=int, default=64, help="inputs that share a scale; 0: a whole row")
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument(
        *("--order-two", "--chi2"),
        type=float,
        default=0.0,
        help="weight of log(1 + χ²) of p and q while decaying: what the variance of SMC's weights depends on",
    )
    parser.add_argument("--acceptance", type=float, default=0.5, help="share of -log acceptance in place of KL")
    parser.add_argument("--decay-start", type=float, default=0.55, help="share of the steps at a constant rate")
    parser.add_argument("--minutes", type=float, default=10.0, help="time for everything, from which the steps follow")
    parser.add_argument("--steps", type=int, default=0, help="exact number of steps instead of --minutes")
    parser.add_argument("--batch-tokens", type=int, default=16384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--stage",
        choices=("all", "train", "measure"),
        default="all",
        help="train: write the layers and measure nothing; measure: fill in the report's results for the layers there",
    )
    parser.add_argument("--samples", type=int, default=4, help="answers to each held-out prompt and temperature")
    parser.add_argument("--answer-length", type=int, default=320, help="tokens of a held-out row, prompt included")
    parser.add_argument("--contexts", type=int, default=256, help="contexts that ESS is averaged over")
    parser.add_argument("--smoke", action="store_true", help="tiny random target on the CPU, 150 steps")
    options = parser.parse_args(arguments)
    options.init = [int(layer) for layer in options.init.split(",")]
    options.grow = [int(layer) for layer in options.grow.split(",") if layer]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Train and report; returns the exit code."""
    options = parse_arguments(arguments)
    torch.set_float32_matmul_precision("high")
    torch._dynamo.config.recompile_limit = 64  # one variant for each row length, model and gradient need
    sizes = Sizes(
        rows=options.rows,
        lengths=((options.row_length, 1.0),),
        samples=options.samples,
        contexts=options.contexts,
        answer_length=options.answer_length,
    )
    plan = TrainingPlan(
        batch_tokens=options.batch_tokens,
        lr=options.lr,
        steps=options.steps,
        order_two=options.order_two,
        acceptance=options.acceptance,
        decay_start=options.decay_start,
        seed=options.seed,
    )
    try:
        with tempfile.TemporaryDirectory(prefix="tiny-target-") as scratch:
            if options.smoke:
                write_tiny_target(Path(scratch), options.seed)
                options.group = 16
                options.target, options.device, options.init, options.tokens = Path(scratch), "cpu", [0, 5], 8_000
                sizes = SMOKE_SIZES
                plan = replace(plan, steps=options.steps or 150, batch_tokens=2048, lr=4e-3)
                torch.set_num_threads(1)  # matrices of 48 rows: handing work to threads costs more than the work
            session = open_session(options.target, options.device)
            if options.stage == "measure":
                report = json.loads(options.report.read_text(encoding="utf-8"))
                options.init = report["init_layers"]
                where = {
                    "measured_on": device_name(session),
                    "samples": sizes.samples,
                    "contexts": sizes.contexts,
                    "answer_length": sizes.answer_length,
                }
                report |= where | {"results": compare(session, options, sizes, None)}
            else:
                report = train(session, options, sizes, plan)
        write_report(options, report)
    except (SmcError, OSError) as error:
        print(f"train_draft: {error}", file=sys.stderr)
        return 1
    say(f"wrote {options.output} ({report['shipped_bytes']} bytes) and {options.report}; next:")
    print("  python scripts/fetch_models.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
