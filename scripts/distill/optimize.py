"""The training loop of the draft's own layers.

Owns the optimisers, the schedule and the batches. Matrices use Muon (orthogonalised momentum), norms AdamW; weights are
float32, fake-quantized from the first step so that what is trained is what ships.
Example: 25 million tokens in rows of 512 are 48800 rows; a batch of 64 rows is 32768 tokens, so an epoch is 762 steps.
Schedule (share of the steps): 2 % warm-up, constant until `decay_start`, then linearly to zero.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from distill.llama import EMBEDDING, Shape, Weights, decoder_layer, hidden_states
from distill.loss import LossTerms, head_loss, logit_gradient
from distill.muon import StackedMuon

SAVES = (0.3, 0.5, 0.75, 0.9)  # shares of the steps; late ones are worth more, since the learning rate falls


@dataclass(frozen=True)
class Corpus:
    """Rows of one length with what the target says about them: tokens [R, L] int32, weight [R, L] float32 (of predicting
    token t + 1 at t; the last is 0), target_hidden [R, L, H]."""

    tokens: torch.Tensor
    weight: torch.Tensor
    target_hidden: torch.Tensor


@dataclass(frozen=True)
class TrainingPlan:
    """batch_tokens: tokens a step; lr: Muon's, in AdamW units; seconds: budget from which `steps`
    follows when it is 0, compiling included."""

    batch_tokens: int = 16384
    lr: float = 6e-3
    norm_lr: float = 2e-3
    weight_decay: float = 0.05
    seconds: float = 300.0
    steps: int = 0
    decay_start: float = 0.55
    order_two: float = 0.0
    acceptance: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class TrainingReport:
    """What training took: steps, tokens seen, seconds after the compiler's warm-up, and the last mean loss and overlap."""

    steps: int
    tokens: int
    seconds: float
    loss: float
    overlap: float


def learning_rate_factor(step: int, steps: int, decay_start: float) -> float:
    """Trapezoid: warm-up over 2 %, constant, then linear to zero; `step` counts from 0."""
    warm, done = max(1, round(0.02 * steps)), step / max(1, steps)
    if step < warm:
        return (step + 1) / warm
    return 1.0 if done < decay_start else max(0.0, (1.0 - done) / (1.0 - decay_start))


class Batches:
    """Endless seeded batches; corpora alternate in proportion to their tokens."""

    def __init__(self, corpora: list[Corpus], batch_tokens: int, seed: int) -> None:
        self.corpora = corpora
        self.sizes = [max(1, min(len(c.tokens), batch_tokens // c.tokens.shape[1])) for c in corpora]
        self.generator = torch.Generator().manual_seed(seed)
        self.queue: list[tuple[int, torch.Tensor]] = []

    def _refill(self) -> None:
        slices = []
        for index, (corpus, size) in enumerate(zip(self.corpora, self.sizes, strict=True)):
            order = torch.randperm(len(corpus.tokens), generator=self.generator)
            slices += [(index, part) for part in order.split(size) if len(part) == size]
        self.queue = [slices[i] for i in torch.randperm(len(slices), generator=self.generator).tolist()]

    def next(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """tokens [B, L], weight [B * L], target_hidden [B * L, H]."""
        if not self.queue:
            self._refill()
        index, rows = self.queue.pop()
        corpus = self.corpora[index]
        rows = rows.to(corpus.tokens.device)
        return corpus.tokens[rows], corpus.weight[rows].flatten(), corpus.target_hidden[rows].flatten(0, 1)


class Trainer:
    """Trains the layers and final norm in `weights`; the embedding stays frozen.

    Args:
        weights: float32 draft weights, except the embedding, which has the compute dtype. Changed in place.
        shape: the draft's numbers with `bits` and `group` of the fake quantization.
        plan: hyperparameters.
        compiled: compile layer and loss (GPU).
    """

    def __init__(self, weights: Weights, shape: Shape, plan: TrainingPlan, compiled: bool) -> None:
        self.weights, self.shape, self.plan = weights, shape, plan
        self.head = weights[EMBEDDING]
        own = [weight.requires_grad_(True) for name, weight in weights.items() if name != EMBEDDING]
        matrices, vectors = [w for w in own if w.ndim == 2], [w for w in own if w.ndim == 1]
        self.muon = StackedMuon(matrices, plan.lr, plan.weight_decay)
        self.adamw = torch.optim.AdamW(vectors, lr=plan.norm_lr, weight_decay=0.0, betas=(0.9, 0.95))
        self.layer: Callable[..., torch.Tensor] = decoder_layer
        self.slice_gradient: Callable[..., tuple[torch.Tensor, ...]] = logit_gradient
        if compiled:
            self.layer = torch.compile(decoder_layer, dynamic=False)
            self.slice_gradient = torch.compile(logit_gradient, dynamic=False)

    def step(self, batches: Batches, factor: float, terms: LossTerms) -> tuple[torch.Tensor, torch.Tensor, int]:
        """One optimiser step at `factor` of the peak learning rate; returns loss, overlap (scalars on the device), tokens."""
        tokens, weight, target_hidden = batches.next()
        hidden = hidden_states(self.weights, tokens, self.shape, self.layer)
        loss, overlap = head_loss(hidden.flatten(0, 1), target_hidden, weight, self.head, terms, self.slice_gradient)
        loss.backward()
        self.muon.step(factor)
        self.adamw.param_groups[0]["lr"] = self.plan.norm_lr * factor
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        return loss.detach(), overlap.detach(), tokens.numel()

    def run(
        self, corpora: list[Corpus], on_progress: Callable[[str], None], save: Callable[[], None]
    ) -> TrainingReport:
        """Train until the planned steps are done.

        Args:
            corpora: training rows.
            on_progress: gets a line of text about every 25th of the way.
            save: called at each of SAVES, so that a killed run leaves a draft.
        Returns:
            What it took.
        """
        entered = time.monotonic()
        batches = Batches(corpora, self.plan.batch_tokens, self.plan.seed)
        early = LossTerms(acceptance=self.plan.acceptance)
        late = replace(early, order_two=self.plan.order_two)
        lengths = {corpus.tokens.shape[1] for corpus in corpora}
        for terms in dict.fromkeys(
            (early, late)
        ):  # compile every variant at a learning rate of zero, outside the timing
            for _ in range(4 * len(lengths)):
                self.step(batches, 0.0, terms)
        steps = self.plan.steps or self._steps_that_fit(batches, entered, late)
        on_progress(f"training for {steps} steps of {self.plan.batch_tokens} tokens")
        started, seen, recent = time.monotonic(), 0, []
        saves = {round(share * steps) for share in SAVES}
        for step in range(steps):
            terms = late if step >= self.plan.decay_start * steps else early
            factor = learning_rate_factor(step, steps, self.plan.decay_start)
            loss, overlap, tokens = self.step(batches, factor, terms)
            seen, recent = seen + tokens, [*recent[-49:], torch.stack((loss, overlap))]
            if (step + 1) % max(1, steps // 25) == 0:
                loss_value, overlap_value = torch.stack(recent).mean(0).tolist()
                rate = seen / (time.monotonic() - started)
                on_progress(
                    f"step {step + 1}/{steps} loss {loss_value:.4f} overlap {overlap_value:.4f} {rate:.0f} tokens/s"
                )
            if step + 1 in saves:
                save()
        loss_value, overlap_value = torch.stack(recent).mean(0).tolist()
        return TrainingReport(steps, seen, time.monotonic() - started, loss_value, overlap_value)

    def _steps_that_fit(self, batches: Batches, entered: float, terms: LossTerms) -> int:
        """Steps for what is left of the budget, from 16 timed steps at a learning rate of zero."""
        float(self.step(batches, 0.0, terms)[0])
        started = time.monotonic()
        last = [self.step(batches, 0.0, terms)[0] for _ in range(16)][-1]
        float(last)  # waits for the device
        now = time.monotonic()
        return max(1, int((self.plan.seconds - (now - entered)) / ((now - started) / 16)))
