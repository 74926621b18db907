"""Lets the target write the training text: thousands of rows at once, one CUDA graph a step.

Owns the row state machine and the static KV cache. Every row stands at the same position. Up to its prompt's length a row
is fed its prompt (so there is no separate prefill); after that it samples. When a row writes <|im_end|>, the markup that
opens the other side's turn is fed, and the model plays that side: a user turn at temperature 1, an answer at the row's own.
Example, role after the prompt "assistant": ... answer <|im_end|> [\\n<|im_start|>user\\n] question <|im_end|>
[\\n<|im_start|>assistant\\n] answer ...   where the bracketed tokens are fed (kind 0), question is kind 1, answers kind 2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from distill.llama import EMBEDDING, FINAL_NORM, Shape, Weights, layer_weights, rms_norm, rope_tables, rotate

FED, USER, ANSWER = 0, 1, 2
SPAN_STEP = 64  # the cache is read up to the next multiple of this: one graph for each


@dataclass(frozen=True)
class Markup:
    """Token ids of the chat format: the end of a turn, and what opens an answer (role 0) or a user turn (role 1)."""

    end: int
    openings: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Rows:
    """What each row starts with.

    prompt: [R, P] int64, right-padded with 0; length: [R] int64, at least 1; temperature: [R] float32 of answers;
    role: [R] int64, who writes after the prompt (0 the assistant or plain text, 1 the user).
    """

    prompt: torch.Tensor
    length: torch.Tensor
    temperature: torch.Tensor
    role: torch.Tensor


def _project(
    x: torch.Tensor, norm: torch.Tensor, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, shape: Shape
):
    """Norm, q/k/v and rotation of one token a row: q [R, KV, group, D], k and v [R, KV, 1, D]."""
    q_size, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    mixed = functional.linear(rms_norm(x, norm, shape.eps), qkv)
    q, k, v = mixed.split((q_size, kv_size, kv_size), -1)
    grouped = [part.view(x.shape[0], shape.kv_heads, -1, shape.head_dim) for part in (q, k, v)]
    return rotate(grouped[0], cos, sin), rotate(grouped[1], cos, sin), grouped[2]


def _finish(x: torch.Tensor, mixed: torch.Tensor, weights: tuple[torch.Tensor, ...], shape: Shape) -> torch.Tensor:
    """Output projection, residual and feed-forward of one layer, [R, H]."""
    o, norm, gate_up, down = weights
    x = x + functional.linear(mixed.flatten(1), o)
    gate, up = functional.linear(rms_norm(x, norm, shape.eps), gate_up).chunk(2, -1)
    return x + functional.linear(functional.silu(gate) * up, down)


def _pick(logits: torch.Tensor, noise: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Sample from softmax(logits / temperature): argmax of logits/T - log(exponential noise) (the Gumbel trick)."""
    return (logits.float() / temperature[:, None] - noise.log()).argmax(-1)


class RowWriter:
    """Writes `length` tokens into each of `rows` rows with one model.

    Args:
        weights, shape: the model, on the device to use.
        rows, length: fixed sizes of every batch.
        markup: the chat format.
        compiled: compile the dense parts and capture CUDA graphs (needs a GPU).
    """

    def __init__(self, weights: Weights, shape: Shape, rows: int, length: int, markup: Markup, compiled: bool) -> None:
        self.shape, self.rows, self.length, self.markup = shape, rows, length, markup
        self.embedding, self.norm = weights[EMBEDDING], weights[FINAL_NORM]
        self.device, dtype = self.embedding.device, self.embedding.dtype
        self.layers = []
        for index in range(shape.layers):
            n1, q, k, v, o, n2, gate, up, down = layer_weights(weights, index)
            self.layers.append((n1, torch.cat((q, k, v)), (o, n2, torch.cat((gate, up)), down)))
        size = (shape.layers, rows, shape.kv_heads, length, shape.head_dim)
        self.keys = torch.zeros(size, device=self.device, dtype=dtype)
        self.values = torch.zeros(size, device=self.device, dtype=dtype)
        self.cos, self.sin = rope_tables(shape, length, self.device)
        self.hidden = torch.zeros(rows, length, self.embedding.shape[1], device=self.device, dtype=dtype)
        self.noise = torch.empty(rows, self.embedding.shape[0], device=self.device)
        self.compiled = compiled
        wrap: Callable[[Any], Any] = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self.project, self.finish, self.pick = wrap(_project), wrap(_finish), wrap(_pick)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._make_state()

    def _make_state(self) -> None:
        """Allocate what a step reads and writes; graphs keep these addresses."""

        def zeros(*size: int) -> torch.Tensor:
            return torch.zeros(size, device=self.device, dtype=torch.int64)

        rows, openings = self.rows, self.markup.openings
        self.tokens, self.kinds = zeros(rows, self.length), zeros(rows, self.length)
        self.prompt, self.prompt_len = zeros(rows, self.length), zeros(rows)
        self.current, self.role, self.fed = zeros(rows), zeros(rows), zeros(rows)
        self.position, self.temperature = zeros(1), torch.ones(rows, device=self.device)
        self.slots = torch.arange(self.length, device=self.device)
        width = max(map(len, openings))
        padded = [[*opening, *[0] * (width - len(opening))] for opening in openings]
        self.opening = torch.tensor(padded, device=self.device)
        self.opening_len = torch.tensor([len(opening) for opening in openings], device=self.device)

    def _start(self, rows: Rows) -> None:
        width = min(rows.prompt.shape[1], self.length)
        for state in (self.tokens, self.kinds, self.prompt, self.position):
            state.zero_()
        self.prompt[:, :width].copy_(rows.prompt[:, :width])
        self.prompt_len.copy_(rows.length)
        self.temperature.copy_(rows.temperature)
        self.role.copy_(rows.role)
        self.fed.fill_(self.opening.shape[1])  # nothing left to feed after the prompt
        self.current.copy_(self.prompt[:, 0])
        self.tokens[:, 0].copy_(self.current)

    def _step(self, span: int) -> None:
        """Read the token at `position`, write the one at `position` + 1; only the first `span` cache slots are read."""
        x = self.embedding[self.current]
        cos, sin = self.cos[self.position], self.sin[self.position]
        mask = torch.zeros(span, device=self.device, dtype=x.dtype)
        mask = mask.masked_fill(self.slots[:span] > self.position, float("-inf"))
        group = self.shape.heads // self.shape.kv_heads
        mask = mask.expand(self.rows, self.shape.kv_heads, group, span)
        for index, (norm, qkv, rest) in enumerate(self.layers):
            q, k, v = self.project(x, norm, qkv, cos, sin, self.shape)
            keys, values = self.keys[index], self.values[index]
            keys.index_copy_(2, self.position, k)
            values.index_copy_(2, self.position, v)
            mixed = functional.scaled_dot_product_attention(q, keys[:, :, :span], values[:, :, :span], attn_mask=mask)
            x = self.finish(x, mixed, rest, self.shape)
        final = rms_norm(x, self.norm, self.shape.eps)
        self.hidden.index_copy_(1, self.position, final[:, None])
        logits = final @ self.embedding.T
        answering = torch.where(self.role == 1, 1.0, self.temperature)
        self._advance(self.pick(logits, self.noise.exponential_(), answering))

    def _advance(self, sampled: torch.Tensor) -> None:
        """Choose fed or sampled token per row, record it, and turn the conversation over at an end of turn."""
        following = self.position + 1
        in_prompt = following < self.prompt_len
        in_opening = ~in_prompt & (self.fed < self.opening_len[self.role])
        from_prompt = self.prompt.index_select(1, following.clamp(max=self.length - 1))[:, 0]
        from_opening = self.opening[self.role, self.fed.clamp(max=self.opening.shape[1] - 1)]
        is_fed = in_prompt | in_opening
        token = torch.where(in_prompt, from_prompt, torch.where(in_opening, from_opening, sampled))
        kind = torch.where(is_fed, FED, torch.where(self.role == 1, USER, ANSWER))
        ended = ~is_fed & (sampled == self.markup.end)
        self.fed.copy_(torch.where(ended, 0, self.fed + in_opening.long()))
        self.role.copy_(torch.where(ended, 1 - self.role, self.role))
        self.tokens.index_copy_(1, following, token[:, None])
        self.kinds.index_copy_(1, following, kind[:, None])
        self.current.copy_(token)
        self.position.copy_(following)

    def _capture(self, rows: Rows) -> None:
        """Capture one graph for each span, after warm steps that compile the dense parts."""
        self._start(rows)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._step(min(SPAN_STEP, self.length))
        torch.cuda.current_stream().wait_stream(stream)
        pool = torch.cuda.graph_pool_handle()
        for span in {min(start + SPAN_STEP, self.length) for start in range(0, self.length, SPAN_STEP)}:
            self.graphs[span] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[span], pool=pool):
                self._step(span)

    @torch.no_grad()
    def write(self, rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
        """Run all steps.

        Args:
            rows: as many rows as the writer was made for.
        Returns:
            tokens [R, length] int32 and kinds [R, length] uint8 (FED, USER or ANSWER), on the device. Randomness comes
            from torch's default generator of the device. `hidden` [R, length, H] then holds the final hidden state of
            every token but the last, until the next call.
        """
        if self.compiled and not self.graphs:
            self._capture(rows)
        self._start(rows)
        for position in range(self.length - 1):
            span = min((position // SPAN_STEP + 1) * SPAN_STEP, self.length)
            if self.compiled:
                self.graphs[span].replay()
            else:
                self._step(span)
        return self.tokens.to(torch.int32), self.kinds.to(torch.uint8)
