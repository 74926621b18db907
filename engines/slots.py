"""Slots: where admitted requests keep their device state and their stop-string tables."""

from __future__ import annotations

import torch
from torch import Tensor

from smc_engines.engine import Engine
from smc_engines.request import Request
from smc_engines.sampling_params import MAX_EOS_IDS, MAX_STOP_TOKEN_IDS
from smc_plugin.group_state import MAX_STOP_STATES, STOP_MATCH, GroupState


class Slots:
    """The group state of an executor and what fills it."""

    def __init__(self, engine: Engine) -> None:
        limits = engine.limits
        self._vocab_size = limits.vocab_size
        self._device = engine.device
        # The last round may draft K tokens past the last one wanted, and an ended request may idle through one more.
        history = limits.max_seq_len + 2 * limits.max_draft_tokens + 1
        self.state = GroupState.allocate(
            engine.max_groups + 1,
            limits.max_particles,
            history,
            engine.max_blocks(),
            MAX_EOS_IDS + MAX_STOP_TOKEN_IDS,
            engine.device,
        )
        # Made when the first request with stop strings comes: 64 states times the vocabulary, a byte each, a slot.
        self._stop_tables: Tensor | None = None

    def load(self, request: Request) -> None:
        """Write a request's parameters to its slot."""
        state, slot, plan, params = self.state, request.slot, request.plan, request.plan.params
        values = {
            "max_tokens": params.max_tokens,
            "min_tokens": params.min_tokens,
            "top_k": plan.top_k,
            "seed": plan.seed,
            "temperature": plan.temperature,
            "draft_temperature": plan.draft_temperature,
            "alpha": params.power_alpha,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "ess_threshold": params.ess_threshold,
            "resample_power": params.resample_power,
            "exact_below": params.exact_below,
            "exact_next": False,
        }
        for name, value in values.items():
            getattr(state, name)[slot] = value
        state.stop_ids[slot] = -1
        state.stop_ids[slot, : len(plan.stop_ids)] = torch.tensor(plan.stop_ids, dtype=torch.int64)
        request.position = len(request.prompt)
        if request.automaton is not None:
            self._load_stop_table(slot, torch.from_numpy(request.automaton.table.copy()), request.automaton.match)

    def _load_stop_table(self, slot: int, table: Tensor, match: int) -> None:
        if self._stop_tables is None:
            shape = (self.state.position.shape[0], MAX_STOP_STATES, self._vocab_size)
            self._stop_tables = torch.zeros(shape, dtype=torch.int8, device=self._device)
        self._stop_tables[slot, : match + 1] = torch.where(table == match, STOP_MATCH, table).to(torch.int8)
        self._stop_tables[slot, STOP_MATCH] = STOP_MATCH

    @property
    def stop_tables(self) -> Tensor | None:
        """Every slot's table: [S, MAX_STOP_STATES, V] int8, or None before the first request with stop strings."""
        return self._stop_tables

    def unload(self, slot: int) -> None:
        """Make a slot idle."""
        self.state.active[slot] = False
        self.state.finished[slot] = True
        if self._stop_tables is not None:
            self._stop_tables[slot] = 0
