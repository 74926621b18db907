"""How good a trained pair is, by sampling: accuracy of each model alone, and how well the draft's odds fit the target's.

Owns a plain sampler without a KV cache: sequences are short. Layers run uncompiled here, since every length is another shape.
"""

from typing import Any

import torch
from distill.llama import decoder_layer

from smc_engines.eval.chain import END, IDS, ChainTask, Problems
from task_pair.learner import TEMPERATURES, Learner


@torch.no_grad()
def answers(learner: Learner, problems: Problems, temperature: float, seed: int) -> torch.Tensor:
    """Let a model answer the prompts of some problems.

    Args:
        learner: the model, its averaged weights.
        problems: whose prompts. temperature: of the sampling. seed: of the random stream.
    Returns:
        [B, L] int64, prompt and answer, END from the answer's end on (or no END at all).
    """
    generator = torch.Generator(learner.device).manual_seed(seed)
    end = IDS[END]
    index = torch.arange(problems.tokens.shape[1], device=problems.tokens.device)
    tokens = torch.where(index < problems.prompt_length[:, None], problems.tokens, end)
    open_rows = torch.ones_like(problems.answer, dtype=torch.bool)
    for place in range(int(problems.prompt_length.min()), tokens.shape[1]):
        logits = learner.logits(learner.average, tokens[:, :place])[:, -1]
        odds = torch.softmax(logits / temperature, -1)
        drawn = torch.multinomial(odds, 1, generator=generator)[:, 0]
        own = (place >= problems.prompt_length) & open_rows
        tokens[:, place] = torch.where(own, drawn, tokens[:, place])
        open_rows &= ~(own & (drawn == end))
        if not bool(open_rows.any()):
            break
    return tokens


def right(tokens: torch.Tensor, problems: Problems) -> torch.Tensor:
    """Which rows end in the right two digits after the word for the answer: [B] bool."""
    end, word = IDS[END], IDS["Ġanswer"]
    inside = torch.arange(tokens.shape[1], device=tokens.device) >= problems.prompt_length[:, None]
    stop = ((tokens == end) & inside).int().argmax(1)
    last = tokens.gather(1, (stop[:, None] + torch.arange(-3, 0, device=tokens.device)).clamp(min=0)).unbind(1)
    zero = IDS["0"]
    value = (last[1] - zero) * 10 + last[2] - zero
    digits = (last[1] >= zero) & (last[1] < zero + 10) & (last[2] >= zero) & (last[2] < zero + 10)
    return (stop > 0) & (last[0] == word) & digits & (value == problems.answer)


@torch.no_grad()
def fit(
    target: Learner, draft: Learner, tokens: torch.Tensor, problems: Problems, temperature: float
) -> dict[str, float]:
    """Acceptance 1 - TV, KL and log(1 + chi square) of the next token, averaged over the target's answers.

    Args:
        tokens: what `answers` of the target returned.
    """
    index = torch.arange(tokens.shape[1], device=tokens.device)
    ended = ((tokens == IDS[END]) & (index >= problems.prompt_length[:, None])).int().cumsum(1)
    inside = (index >= problems.prompt_length[:, None]) & ((ended - (tokens == IDS[END]).int()) <= 0)
    log_p, log_q = (
        torch.log_softmax(model.logits(model.average, tokens)[:, :-1][inside[:, 1:]] / temperature, -1)
        for model in (target, draft)
    )
    p, overlap = log_p.exp(), torch.minimum(log_p, log_q).exp().sum(-1)
    words = tokens[:, 1:][inside[:, 1:]] >= IDS["Ġso"]
    return {
        "acceptance": float(overlap.mean()),
        "acceptance_words": float(overlap[words].mean()),
        "acceptance_other": float(overlap[~words].mean()),
        "kl": float((p * (log_p - log_q)).sum(-1).mean()),
        "log_chi_square": float(torch.logsumexp(2 * log_p - log_q, -1).mean()),
        "entropy": float(-(p * log_p).sum(-1).mean()),
        "tokens_per_answer": float(inside.sum(1).float().mean()),
    }


def measure_pair(target: Learner, draft: Learner, task: ChainTask, count: int, seed: int) -> list[dict[str, Any]]:
    """Sampled accuracy and fit at both temperatures on `count` fresh problems."""
    device = target.device
    target.layer = draft.layer = decoder_layer
    problems = task.draw(count, torch.Generator(device).manual_seed(seed), target.table)
    rows = []
    for temperature in TEMPERATURES:
        by_target = answers(target, problems, temperature, seed + 1)
        by_draft = answers(draft, problems, temperature, seed + 2)
        row = {"temperature": temperature, "problems": count}
        row |= {"target": float(right(by_target, problems).float().mean())}
        row |= {"draft": float(right(by_draft, problems).float().mean())}
        rows.append(row | fit(target, draft, by_target, problems, temperature))
    return rows
