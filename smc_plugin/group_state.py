"""Everything a round reads and writes, as tensors on the device.

A request decodes in a slot. Slots hold up to N particles; the last slot is spare: it pads a batch to its bucket and never
changes anything. Lengths belong to the group, since its particles advance together: the frontier token stands at
`position`, its KV not yet written, and `generated` tokens have been drawn, the frontier included.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_STOP_STATES = 64  # of one slot's automaton over stop strings
STOP_MATCH = MAX_STOP_STATES - 1  # the automaton's absorbing state in every slot's table

END_NONE, END_STOP, END_LENGTH = 0, 1, 2


@dataclass
class GroupState:
    """State of S slots of N particles; T tokens of history each, B pages.

    Per slot [S]: slot (its number), position, generated, settled (generated tokens that all live particles share),
    round_number, num_blocks, max_tokens, min_tokens, top_k, seed (int64); temperature, draft_temperature, alpha, top_p,
    min_p (float32); ess_threshold, log_evidence, resample_power, exact_below (float64); active, failed, exact_next (the
    next round is lossless) (bool); stop_ids [S, M] int64, unused -1.
    Per particle [S, N]: log_weights float64; finished bool; length, end_kind, stop_state, frontier, previous int64;
    tokens [S, N, T] int64; log_probs [S, N, T] float32; block_table [S, N, B + 1] int32.
    """

    slot: Tensor
    position: Tensor
    generated: Tensor
    settled: Tensor
    round_number: Tensor
    num_blocks: Tensor
    max_tokens: Tensor
    min_tokens: Tensor
    top_k: Tensor
    seed: Tensor
    temperature: Tensor
    draft_temperature: Tensor
    alpha: Tensor
    top_p: Tensor
    min_p: Tensor
    ess_threshold: Tensor
    log_evidence: Tensor
    resample_power: Tensor
    exact_below: Tensor
    active: Tensor
    failed: Tensor
    exact_next: Tensor
    stop_ids: Tensor
    log_weights: Tensor
    finished: Tensor
    length: Tensor
    end_kind: Tensor
    stop_state: Tensor
    frontier: Tensor
    previous: Tensor
    tokens: Tensor
    log_probs: Tensor
    block_table: Tensor

    @classmethod
    def allocate(
        cls, slots: int, particles: int, history: int, blocks: int, stop_ids: int, device: torch.device
    ) -> GroupState:
        """Allocate an all-idle state of `slots` slots, the spare one included; see the class for the other sizes."""

        def slot(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros((slots, *shape), dtype=dtype, device=device)

        def particle(dtype: torch.dtype, *shape: int) -> Tensor:
            return slot(dtype, particles, *shape)

        i64, f32, f64 = torch.int64, torch.float32, torch.float64
        integers = ("position", "generated", "settled", "round_number", "num_blocks")
        integers += ("max_tokens", "min_tokens", "top_k", "seed")
        reals = ("temperature", "draft_temperature", "alpha", "top_p", "min_p")
        fields = {name: slot(i64) for name in integers} | {name: slot(f32) + 1 for name in reals}
        fields |= {name: slot(f64) for name in ("ess_threshold", "log_evidence", "exact_below")}
        fields |= {"resample_power": slot(f64) + 1}
        fields |= {name: slot(torch.bool) for name in ("active", "failed", "exact_next")}
        fields |= {"stop_ids": slot(i64, stop_ids) - 1}
        fields |= {name: particle(i64) for name in ("length", "end_kind", "stop_state", "frontier", "previous")}
        fields |= {"log_weights": particle(f64), "finished": ~particle(torch.bool)}
        fields |= {"tokens": particle(i64, history), "log_probs": particle(f32, history)}
        fields |= {"block_table": particle(torch.int32, blocks + 1)}
        state = cls(slot=torch.arange(slots, device=device), **fields)
        # A round's first draft pass starts at position - 1, for the spare slot as well.
        state.position[-1] = 1
        return state

    def gather(self, slots: Tensor, num_particles: int) -> GroupState:
        """Copy some slots' rows, particle tensors cut to the first num_particles.

        Args:
            slots: [G] int64.
        """
        rows = {}
        for field in dataclasses.fields(self):
            taken = getattr(self, field.name)[slots]
            rows[field.name] = taken[:, :num_particles] if field.name in PARTICLE_FIELDS else taken
        return GroupState(**rows)

    def scatter(self, slots: Tensor, rows: GroupState) -> None:
        """Write back what `gather` copied and a round changed."""
        for name in CHANGED_FIELDS:
            mine, new = getattr(self, name), getattr(rows, name)
            if name in PARTICLE_FIELDS:
                mine[:, : new.shape[1]].index_copy_(0, slots, new)
            else:
                mine.index_copy_(0, slots, new)


PARTICLE_FIELDS = frozenset(
    (
        *("log_weights", "finished", "length", "end_kind", "stop_state", "frontier", "previous"),
        *("tokens", "log_probs", "block_table"),
    )
)
# What `groups` changes in a round (`exact_next` is written by rounds._resample); the rest are the request's parameters.
CHANGED_FIELDS = (
    *("position", "generated", "settled", "round_number", "num_blocks", "log_evidence", "active", "failed"),
    *sorted(PARTICLE_FIELDS),
)
