"""Toy model pairs whose answers can all be enumerated, and what an engine must make of them.

A toy has a vocabulary of 4 to 6 tokens and answers of 3 or 4, so every answer's probability is a product of a few rows of
logits. Those come from transformers in float64, and filters, weights and laws are computed here from their definitions in
numpy: nothing of the engine's own arithmetic is used. With prompt (1, 2), end token 0 and max_tokens 2 over 3 tokens the
answers are (0,), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1) and (2, 2).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from smc_build.builder import BuildOptions, build_engine
from smc_engines.config import ExecutorConfig
from smc_engines.executor import Executor
from smc_engines.outputs import RequestOutput
from smc_engines.sampling_params import SamplingParams
from tests.tiny_models import make_checkpoint

Answer = tuple[int, ...]
Law = dict[Answer, float]
PROMPT = (1, 2)
LETTERS = "abc"


class Tree:
    """A model's logits after every possible prefix of an answer.

    Args:
        folder: a checkpoint.
        prompt: token ids.
        depth: tokens of the longest answer.
    """

    def __init__(self, folder: Path, prompt: Sequence[int], depth: int) -> None:
        from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow to import, needed here only

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        self.vocab_size = int(model.config.vocab_size)
        digits = torch.arange(self.vocab_size ** (depth - 1))[:, None]
        powers = self.vocab_size ** torch.arange(depth - 2, -1, -1)
        prefixes = digits // powers % self.vocab_size
        with torch.no_grad():
            logits = model(torch.cat([torch.tensor([prompt]).expand(len(prefixes), -1), prefixes], dim=1)).logits
        self._logits = logits[:, len(prompt) - 1 :].numpy()
        self._model, self._prompt = model, torch.tensor([prompt])

    def logits(self, prefix: Answer) -> NDArray[np.float64]:
        """Logits [V] of the token after the prompt and `prefix`."""
        row = sum(token * self.vocab_size ** (self._logits.shape[1] - 2 - place) for place, token in enumerate(prefix))
        return self._logits[row, len(prefix)]

    def along(self, answers: Sequence[Answer]) -> NDArray[np.float64]:
        """Logits [B, T, V] of every token of B answers of T tokens, which may be longer than the tree is deep."""
        tokens = torch.cat([self._prompt.expand(len(answers), -1), torch.tensor(answers)], dim=1)
        with torch.no_grad():
            return self._model(tokens).logits[:, self._prompt.shape[1] - 1 : -1].numpy()


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithm of the softmax; -inf stays -inf."""
    top = logits.max()
    return logits - top - np.log(np.exp(logits - top).sum())


def filtered(scaled: NDArray[np.float64], params: SamplingParams) -> NDArray[np.float64]:
    """Top-k, then top-p, then min-p, token by token as the words say it."""
    kept = sorted((t for t in range(len(scaled)) if scaled[t] > -math.inf), key=lambda t: (-scaled[t], t))
    top_k = 1 if params.temperature == 0 else params.top_k
    if top_k:
        kept = kept[:top_k]
    masses = np.exp(scaled[kept] - scaled[kept].max())
    masses /= masses.sum()
    nucleus, mass = [], 0.0
    for token, share in zip(kept, masses, strict=True):
        if not nucleus or mass < params.top_p or params.top_p == 1:
            nucleus.append(token)
        mass += share
    best = scaled[nucleus[0]]
    kept = [t for t in nucleus if scaled[t] - best >= math.log(params.min_p or 1e-300)]
    out = np.full_like(scaled, -math.inf)
    out[kept] = scaled[kept]
    return out


@dataclass(frozen=True)
class Toy:
    """An engine directory and the exact logits of its two models after `prompt`."""

    engine_dir: Path
    target: Tree
    draft: Tree
    eos: int | None
    prompt: Answer = PROMPT

    def executor(self, **config) -> Executor:
        """Load the engine directory."""
        return Executor.from_engine_dir(self.engine_dir, ExecutorConfig(**{"device": "cpu", **config}))

    def stop_ids(self, params: SamplingParams) -> set[int]:
        """Tokens that end an answer."""
        own = set() if params.ignore_eos or self.eos is None else {self.eos}
        return own | set(params.stop_token_ids)

    def scaled_p(self, prefix: Answer, params: SamplingParams) -> NDArray[np.float64]:
        """The target's logits over its temperature, filters applied."""
        return self._shape(self.target.logits(prefix) / (params.temperature or 1.0), len(prefix), params)

    def log_p(self, prefix: Answer, params: SamplingParams) -> NDArray[np.float64]:
        """log p [V]."""
        return log_softmax(self.scaled_p(prefix, params))

    def log_p_tilde(self, prefix: Answer, params: SamplingParams) -> NDArray[np.float64]:
        """log p~ [V], the normalised power."""
        return log_softmax(params.power_alpha * self.scaled_p(prefix, params))

    def log_q(self, prefix: Answer, params: SamplingParams) -> NDArray[np.float64]:
        """log q [V]."""
        temperature = params.draft_temperature or params.temperature or 1.0
        return log_softmax(self._shape(self.draft.logits(prefix) / temperature, len(prefix), params))

    def log_zeta(self, prefix: Answer, params: SamplingParams) -> float:
        """log ζ, from its definition as the total of p^α."""
        return math.log(np.exp(params.power_alpha * self.log_p(prefix, params)).sum())

    def _shape(self, scaled: NDArray[np.float64], index: int, params: SamplingParams) -> NDArray[np.float64]:
        scaled = scaled.copy()
        if index < params.min_tokens:
            scaled[sorted(self.stop_ids(params))] = -math.inf
        return filtered(scaled, params)

    def answers(self, params: SamplingParams, step: Callable[[Answer], NDArray[np.float64]]) -> Law:
        """Every answer with the product of exp(step) along it; answers of product 0 are left out."""
        law: Law = {}
        stops = self.stop_ids(params)

        def extend(prefix: Answer, log_product: float) -> None:
            for token, log_factor in enumerate(step(prefix)):
                if log_factor == -math.inf:
                    continue
                answer = (*prefix, token)
                if token in stops or len(answer) == params.max_tokens:
                    law[answer] = math.exp(log_product + log_factor)
                else:
                    extend(answer, log_product + log_factor)

        extend((), 0.0)
        return law

    def law(self, params: SamplingParams) -> Law:
        """The sequence target p^α, unnormalised; its total is what exp(log_evidence) estimates."""
        return self.answers(params, lambda prefix: params.power_alpha * self.log_p(prefix, params))

    def normalised_law(self, params: SamplingParams) -> Law:
        """p~ token by token: what target and speculative mode draw from."""
        return self.answers(params, lambda prefix: self.log_p_tilde(prefix, params))

    def proposal_law(self, params: SamplingParams) -> Law:
        """What one particle says when nothing is corrected: x0 and each bonus from p~, the others from q."""
        period = (params.num_draft_tokens or 0) + 1

        def step(prefix: Answer) -> NDArray[np.float64]:
            return (self.log_q if len(prefix) % period else self.log_p_tilde)(prefix, params)

        return self.answers(params, step)

    def log_weight(self, answer: Answer, params: SamplingParams, start: int = 0) -> float:
        """What a particle's tokens from `start` on add to its log weight when no round was recovered."""
        period = (params.num_draft_tokens or 0) + 1
        total = 0.0
        for index in range(start, len(answer)):
            prefix, token = answer[:index], answer[index]
            if index % period:
                total += params.power_alpha * self.log_p(prefix, params)[token] - self.log_q(prefix, params)[token]
            else:
                total += self.log_zeta(prefix, params)
        return total


def perturb(source: Path, folder: Path, amount: float, seed: int) -> Path:
    """Copy a checkpoint, mixing noise of the same size into its matrices; amount 0 changes nothing, 1 everything."""
    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        noise = torch.randn(tensor.shape, generator=generator) * tensor.std()
        if tensor.ndim == 2:
            tensors[name] = tensor * math.sqrt(1 - amount**2) + amount * noise
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_letters_tokenizer(folder: Path) -> None:
    """Give a checkpoint of 6 tokens a byte-level tokenizer: 0 is the end token, then a, b, c and the two bytes of é."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers  # noqa: PLC0415

    vocab = {text: number for number, text in enumerate(["<end>", *LETTERS, "Ã", "©"])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))


def build(folder: Path, target: Path, draft: Path | None, **options) -> Path:
    """Build an engine directory with small pages."""
    defaults = {"dtype": "float32", "particles": 16, "draft_tokens": 5, "groups": 64, "max_seq_len": 16, "page_size": 4}
    draft_name = "none" if draft is None else str(draft)
    return build_engine(BuildOptions(str(target), draft=draft_name, output=folder, **{**defaults, **options}))


def make_toy(
    folder: Path,
    *,
    noise: float = 0.4,
    vocab_size: int = 5,
    depth: int = 4,
    seed: int = 3,
    scale: float = 0.8,
    letters: bool = False,
    head_dim: int | None = None,
    **options,
) -> Toy:
    """Build a toy pair: a two-layer Llama and a draft that differs from it by `noise`.

    Args:
        scale: spread of the logits, about.
        letters: six tokens with a byte-level tokenizer (see write_letters_tokenizer).
        head_dim: 8 when None.
    """
    target = make_checkpoint(
        folder / "target",
        vocab_size=vocab_size,
        hidden=16,
        heads=2,
        kv_heads=1,
        head_dim=head_dim,
        ffn=24,
        max_position=128,
        tokenizer=False,
        eos_id=0,
        seed=seed,
        scale=scale,
    )
    if letters:
        write_letters_tokenizer(target)
    draft = perturb(target, folder / "draft", noise, seed + 1)
    engine_dir = build(folder / "engine", target, draft, **options)
    return Toy(engine_dir, Tree(target, PROMPT, depth), Tree(draft, PROMPT, depth), 0)


def sample(executor: Executor, prompt: Sequence[int], params: SamplingParams, count: int, seed: int = 0) -> list:
    """Outputs of `count` requests that differ in their seed alone; nothing may be left behind."""
    each = [replace(params, seed=seed + number, return_particles=True) for number in range(count)]
    outputs = executor.generate([tuple(prompt)] * count, each)
    assert_empty(executor)
    return outputs


def assert_empty(executor: Executor) -> None:
    """No request, and no page but those of cached prefixes, is left."""
    executor.check_integrity()
    assert (executor.stats.running, executor.stats.waiting, executor.stats.pages_promised) == (0, 0, 0)
    assert executor.pool.used_pages() == executor.stats.pages_cached


def info_of(output: RequestOutput):
    """The figures of a finished request."""
    assert output.info is not None
    return output.info


def particle_law(outputs: Iterable[RequestOutput], answers: Sequence[Answer]) -> NDArray[np.float64]:
    """Probability of each answer given a request's particles: [requests, answers]."""
    column = {answer: index for index, answer in enumerate(answers)}
    rows = []
    for output in outputs:
        particles = info_of(output).particles
        log_weights = np.array([particle.log_weight for particle in particles])
        weights = np.exp(log_weights - log_weights.max())
        row = np.zeros(len(answers))
        for particle, weight in zip(particles, weights / weights.sum(), strict=True):
            if weight > 0:
                row[column[particle.token_ids]] += weight
        rows.append(row)
    return np.stack(rows)


def merge_rare(law: Law, least: float) -> list[list[Answer]]:
    """Group answers so that each group but perhaps the last has at least mass `least` (of the law's total)."""
    total = sum(law.values())
    common = [[answer] for answer, mass in law.items() if mass >= least * total]
    rare = [answer for answer, mass in law.items() if mass < least * total]
    return [*common, rare] if rare else common


def assert_means(samples: NDArray[np.float64], expected: Sequence[float], sigmas: float = 4.5) -> None:
    """Each column's mean lies within `sigmas` standard errors of what it estimates."""
    error = samples.std(axis=0, ddof=1) / math.sqrt(len(samples))
    z = (samples.mean(axis=0) - np.asarray(expected)) / np.maximum(error, 1e-7)
    assert np.abs(z).max() < sigmas, f"means {samples.mean(axis=0)}, expected {expected}, z {z.round(1)}"


def assert_drawn_from(answers: Sequence[Answer], law: Law, sigmas: float = 4.5) -> None:
    """Chi-square of counts against a law, its tail probability as a normal deviate (Wilson & Hilferty, 1931)."""
    total = sum(law.values())
    groups = merge_rare(law, max(0.005, 8 / len(answers)))
    assert set(answers) <= set(law), f"impossible answers: {set(answers) - set(law)}"
    expected = np.array([sum(law[answer] for answer in group) / total for group in groups]) * len(answers)
    counts = np.array([sum(answers.count(answer) for answer in group) for group in groups])
    chi_square, freedom = float(((counts - expected) ** 2 / expected).sum()), len(groups) - 1
    deviate = ((chi_square / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
    assert deviate < sigmas, f"chi-square {chi_square:.1f} for {freedom} degrees of freedom"
