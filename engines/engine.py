"""A loaded engine directory: weights, tokenizer and what a request may ask of it."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smc_build.builder import BuildOptions, WeightSource, random_engine
from smc_build.dtypes import torch_dtype
from smc_build.engine_dir import Manifest, ModelEntry, Role, load_manifest, load_weights, tokenizer_path
from smc_build.model_config import ModelConfig
from smc_build.precision import Precision
from smc_build.weights import weight_bytes
from smc_engines.config import ExecutorConfig, free_memory_bytes
from smc_engines.kv_cache import total_blocks, worst_case_pages
from smc_engines.model import PagedModel
from smc_engines.parallel import lockstep
from smc_engines.parallel.connect import connect
from smc_engines.parallel.ranks import Ranks, same_on_all, together
from smc_engines.plan_runner import Scratch
from smc_engines.region_choice import (
    choose_regions,
    choose_sums,
    choose_whole_pass,
    takes_whole_passes,
    under_mps,
    whole_pass_bytes,
    whole_pass_rows,
)
from smc_engines.rounds import RoundKind
from smc_engines.sampling_params import COLDEST, MAX_EOS_IDS, SamplingParams
from smc_engines.text import Tokenizer
from smc_plugin.backend import kernels_for
from smc_plugin.errors import EngineDirError, RequestError

FP8_CAPABILITY = (8, 9)


def _choices(params: SamplingParams, n: int, k: int) -> dict[str, Any]:
    """Fields of RoundKind that say how a round verifies and resamples; what has no effect is left at its default, so that
    requests run together where they can."""
    if params.mode != "smc" or (params.exact_below >= 1 and k > 0):
        return {"speculative": params.mode != "target"}
    return {
        "mixed": params.exact_below > 0 and n > 1 and k > 0,
        "truncated": params.truncate_rounds and params.ess_threshold > 0 and n > 1 and k > 0,
        "resampling": "systematic" if n == 1 else params.resampling,
        "tempered": params.resample_power < 1 and n > 1,
    }


@dataclass(frozen=True)
class Limits:
    """Bounds on requests, from the manifest."""

    max_particles: int
    max_draft_tokens: int
    max_seq_len: int
    vocab_size: int
    has_draft: bool
    num_ranks: int

    @classmethod
    def of(cls, manifest: Manifest) -> Limits:
        """The bounds that an engine's manifest sets."""
        has_draft = manifest.draft is not None
        return cls(
            manifest.max_particles,
            manifest.max_draft_tokens if has_draft else 0,
            manifest.max_seq_len,
            manifest.target.config.vocab_size,
            has_draft,
            manifest.tp,
        )

    def drafting(self, params: SamplingParams) -> tuple[int, int]:
        """N and K of a request; needs no loaded engine.

        Raises:
            RequestError: the engine was not built for them.
        """
        n = params.num_particles if params.num_particles is not None else self.max_particles
        k = params.num_draft_tokens if params.num_draft_tokens is not None else self.max_draft_tokens
        n, k = (n if params.mode == "smc" else 1), (0 if params.mode == "target" else k)
        if n > self.max_particles:
            raise RequestError(
                f"the request asks num_particles {n}, the engine was built for at most {self.max_particles}: lower it, "
                f"or rebuild with --particles {n}"
            )
        if params.mode != "target" and not self.has_draft and k > 0:
            raise RequestError(
                f"mode {params.mode} needs a draft, the engine was built with --draft none: use mode target, or rebuild "
                "with a draft"
            )
        if k > self.max_draft_tokens:
            raise RequestError(
                f"the request asks num_draft_tokens {k}, the engine was built for at most {self.max_draft_tokens}: "
                f"lower it, or rebuild with --draft-tokens {k}"
            )
        if params.mode == "speculative" and k == 0:
            raise RequestError(
                "mode speculative needs num_draft_tokens of at least 1, got 0: raise it, or use mode target"
            )
        if self.num_ranks > 1 and params.exact_below > 0 and n > 1:
            # Its verification looks at whole rows of probabilities, which no rank has.
            raise RequestError(
                f"exact_below is {params.exact_below:g}, an engine of {self.num_ranks} ranks verifies one sequence only: "
                "drop it, or use mode speculative, or an engine of one rank"
            )
        return n, k


@dataclass(frozen=True)
class Plan:
    """A request's parameters with every default resolved against the engine.

    Args:
        kind: the kind of round it takes part in.
        num_pages: its worst case.
        seed: signed 64-bit.
        stop_ids: token ids that end it.
        temperature, draft_temperature, top_k: after greedy (temperature 0) became top_k 1.
    """

    params: SamplingParams
    kind: RoundKind
    num_pages: int
    seed: int
    stop_ids: tuple[int, ...]
    temperature: float
    draft_temperature: float
    top_k: int

    @property
    def adapts(self) -> bool:
        """Whether K follows from the past rounds (see adapt.py); a single particle's ESS says nothing."""
        asked = self.params.adapt_draft_tokens > 0 and not self.kind.speculative
        return asked and min(self.kind.num_particles, self.kind.num_draft_tokens) > 1

    @property
    def uses_draft(self) -> bool:
        """Whether the draft model runs for this request."""
        return self.kind.num_draft_tokens > 0


def check_fp8_gpu(name: str, capability: tuple[int, int]) -> None:
    """Refuse a GPU whose instructions do not know FP8.

    Raises:
        EngineDirError: its compute capability is below 8.9.
    """
    if capability < FP8_CAPABILITY:
        raise EngineDirError(
            f"the engine has FP8 weights or KV pages, {name} has compute capability {capability[0]}.{capability[1]}, "
            "expected 8.9 or more: use such a GPU, or rebuild with --dtype bfloat16 and without --kv-dtype"
        )


class Engine:
    """Target, draft (or None), tokenizer (or None) and limits.

    Args:
        manifest: what the models are and what requests may ask.
        weights: gives a model's canonical weights on a device.
        tokenizer: None serves token ids only.
        path: the engine directory, which may hold plans; None for an engine made in memory.
        ranks: the other ranks, connected; None where the engine has one rank.
    """

    def __init__(
        self,
        manifest: Manifest,
        weights: WeightSource,
        tokenizer: Tokenizer | None,
        config: ExecutorConfig,
        path: Path | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.manifest = manifest
        self.ranks = ranks
        self._at_close: list[weakref.WeakMethod] = []
        self.path = path or Path(manifest.name)
        self.plan_folder = path if manifest.plans else None
        self.config = config
        self.device = config.torch_device()
        self.tokenizer = tokenizer
        target = manifest.target.rank_config
        draft = manifest.draft.rank_config if manifest.draft is not None else None
        self.eos_ids = target.eos_ids
        if len(self.eos_ids) > MAX_EOS_IDS:
            raise EngineDirError(
                f"engine {manifest.name}: the target names {len(self.eos_ids)} end tokens, expected at most {MAX_EOS_IDS}: "
                "shorten eos_token_id in the checkpoint and rebuild"
            )
        self.limits = Limits.of(manifest)
        self.max_groups = config.max_groups or manifest.max_groups
        self.page_size = manifest.page_size
        together(ranks, "check its GPU", self._check_fp8)
        self._agree_on_gpu()
        self.sums = choose_sums(config.regions, manifest, self.device, config.kernels, ranks)
        self.num_pages = self._agree_on_pages()

        kernels = kernels_for(self.device, config.kernels)
        self.scratch = Scratch()  # plans of target and draft run one after the other

        def model(role: Role, model_config: ModelConfig) -> PagedModel:
            own = weights(role, self.device, self.rank)
            sums = self.sums.get(model_config.hidden_size)
            regions = choose_regions(config.regions, manifest, role, own, path, self.scratch, sums)
            kv_dtype = torch_dtype(self.precisions[role].kv)
            whole_pass = choose_whole_pass(config.regions, manifest, role, own, config.kernels, ranks)
            return PagedModel(
                model_config, own, self.num_pages, self.page_size, regions, kernels, kv_dtype, ranks, whole_pass
            )

        self.target = together(ranks, "load the target", lambda: model("target", target))
        self.draft = None
        if draft is not None:
            self.draft = together(ranks, "load the draft", lambda: model("draft", draft))
            self._prepare_whole_passes(self.draft)

    @classmethod
    def from_dir(cls, path: Path, config: ExecutorConfig, untuned: bool = False) -> Engine:
        """Load an engine directory; one of several ranks by each of the processes that mpirun started.

        Args:
            path: of the directory.
            config: how to run it.
            untuned: leave aside what earlier tuning found, so that everything is there to be timed.
        Raises:
            EngineDirError: it is missing, damaged or does not fit this machine.
            ConfigError: it has several ranks and this process is not one of as many.
            RankError: another rank could not load it.
        """
        ranks = connect(load_manifest(path, verify=False).tp, config)
        # One rank hashes the files for all of them.
        verify = config.verify and (ranks is None or ranks.rank == 0)
        manifest = together(ranks, "read the engine directory", lambda: load_manifest(path, verify=verify))
        same_on_all(ranks, "an engine directory", manifest.to_dict())
        if untuned:
            manifest = replace(manifest, tactics={})
        folder = tokenizer_path(path)

        def weights(role: Role, device: torch.device, rank: int) -> dict[str, Tensor]:
            return load_weights(path, role, rank, device)

        return cls(manifest, weights, Tokenizer.load(folder) if folder is not None else None, config, path, ranks)

    @classmethod
    def from_random(
        cls, options: BuildOptions, config: ExecutorConfig, tactics: Mapping[str, Any] | None = None
    ) -> Engine:
        """Make an engine of a preset's shapes with seeded random weights, straight on the device and without files.

        The weights are those that `smc-build --random-weights` writes for the same options. For speed only.

        Args:
            options: what to build.
            config: how to run it.
            tactics: what tuning such an engine found, as a manifest holds them.
        """
        ranks = connect(options.tp, config)
        manifest, weights = random_engine(options)
        manifest = replace(manifest, tactics=dict(tactics or {}))
        same_on_all(ranks, "tactics", manifest.tactics, "give every rank the same report")
        return cls(manifest, weights, None, config, ranks=ranks)

    @property
    def rank(self) -> int:
        """This process's rank, 0 for the only one."""
        return 0 if self.ranks is None else self.ranks.rank

    def close(self) -> None:
        """Let the other ranks go; an engine of one rank has nothing to do. Call it last; no executor may step afterwards."""
        if self.ranks is not None:
            for reference in self._at_close:
                release = reference()
                if release is not None:
                    release()
            lockstep.leave(self.ranks)
            self.ranks = None

    def at_close(self, release: Callable[[], None]) -> None:
        """Call a method of something that lives on this engine before the ranks part, if it is still there then."""
        self._at_close.append(weakref.WeakMethod(release))

    @property
    def models(self) -> dict[Role, PagedModel]:
        """The models by role; there may be no draft."""
        models: dict[Role, PagedModel] = {"target": self.target}
        if self.draft is not None:
            models["draft"] = self.draft
        return models

    def max_blocks(self) -> int:
        """Blocks of the longest block table, with room for the round that an ended request may idle through."""
        limits = self.limits
        return total_blocks(1, limits.max_seq_len, 2 * limits.max_draft_tokens, self.page_size)

    @property
    def precisions(self) -> dict[Role, Precision]:
        """The models' element types by role."""
        entries: dict[Role, ModelEntry | None] = {"target": self.manifest.target, "draft": self.manifest.draft}
        return {role: entry.precision for role, entry in entries.items() if entry is not None}

    def _agree_on_gpu(self) -> None:
        """Kernels are chosen by GPU, and those that exchange values must be the same on all ranks."""
        if self.device.type != "cuda":
            return
        gpu = torch.cuda.get_device_properties(self.device)
        own = {"name": gpu.name, "multiprocessors": gpu.multi_processor_count, "MPS": under_mps()}
        same_on_all(self.ranks, "a GPU with", own, "run the ranks on equal GPUs, with MPS for all of them or for none")

    def _check_fp8(self) -> None:
        if self.device.type == "cuda" and any(precision.uses_fp8 for precision in self.precisions.values()):
            check_fp8_gpu(torch.cuda.get_device_name(self.device), torch.cuda.get_device_capability(self.device))

    def _whole_pass_rows(self) -> tuple[int, ...]:
        return whole_pass_rows(self.manifest.max_particles, self.max_groups)

    def _prepare_whole_passes(self, draft: PagedModel) -> None:
        """What must be done before the first pass in one launch; where it fails on one rank, it does on all."""
        whole_pass = draft.whole_pass
        if whole_pass is None:
            return
        rows = self._whole_pass_rows()
        if draft.config.is_shard:
            whole_pass.prepare(rows)  # in which the ranks share memory
        else:
            together(self.ranks, "make room for passes in one launch", lambda: whole_pass.prepare(rows))

    def _agree_on_pages(self) -> int:
        """The size that every rank has room for."""
        own = together(self.ranks, "size its page pool", self._size_pool)
        return own if self.ranks is None else min(self.ranks.gather_objects(own))

    def _size_pool(self) -> int:
        if self.config.num_pages is not None:
            return self.config.num_pages
        limits = self.limits
        configs = {role: self.manifest.model(role).rank_config for role in self.precisions}
        taken = sum(weight_bytes(configs[role], precision) for role, precision in self.precisions.items())
        for role, precision in self.precisions.items():
            options = self.config.regions, self.manifest, role, self.device, self.config.kernels, self.ranks
            if takes_whole_passes(*options):
                num_ranks = self.manifest.tp if configs[role].is_shard else 1
                taken += whole_pass_bytes(configs[role], precision, self.device, self._whole_pass_rows(), num_ranks)
        page_bytes = self.page_size * sum(
            configs[role].kv_bytes_per_token(precision.kv) for role, precision in self.precisions.items()
        )
        # Ranks on processors share one memory, and all of them ask before any takes its part.
        sharing = self.manifest.tp if self.device.type == "cpu" else 1
        free = free_memory_bytes(self.device) // sharing - taken
        fits = int(free * self.config.kv_memory_fraction) // page_bytes
        wanted = self.max_groups * worst_case_pages(
            1, limits.max_seq_len, limits.max_particles, limits.max_draft_tokens, self.page_size
        )
        one = worst_case_pages(1, limits.max_seq_len, 1, 0, self.page_size)
        if fits < one:
            raise EngineDirError(
                f"engine {self.manifest.name}: {max(free, 0) / 2**30:.1f} GiB are free beside the weights, "
                f"expected room for {one} KV pages of "
                f"{page_bytes / 2**20:.2f} MiB in {self.config.kv_memory_fraction:.0%} of it: free memory, or rebuild "
                "with a smaller --max-seq-len"
            )
        return min(fits, wanted) + 1

    def plan(self, prompt: Sequence[int], params: SamplingParams) -> Plan:
        """Resolve a request's parameters.

        Raises:
            RequestError: the request does not fit the engine; the message says what would.
        """
        n, k = self._check(prompt, params)
        greedy = params.temperature < COLDEST
        temperature = 1.0 if greedy else params.temperature
        top_k = 1 if greedy else params.top_k
        kind = RoundKind(
            num_particles=n,
            num_draft_tokens=k,
            **_choices(params, n, k),
            filtered=top_k > 0 or params.top_p < 1 or params.min_p > 0 or params.min_tokens > 0,
            stop_strings=bool(params.stop),
            draft_schedule=self.config.draft_schedule,
        )
        seed = params.seed if params.seed is not None else secrets.randbits(64)
        eos = () if params.ignore_eos else self.eos_ids
        return Plan(
            params,
            kind,
            worst_case_pages(len(prompt), params.max_tokens, n, k, self.page_size),
            seed - 2**64 if seed >= 2**63 else seed,
            tuple(dict.fromkeys(eos + params.stop_token_ids)),
            temperature,
            temperature if greedy or params.draft_temperature is None else max(params.draft_temperature, COLDEST),
            top_k,
        )

    def _check(self, prompt: Sequence[int], params: SamplingParams) -> tuple[int, int]:
        """Refuse what does not fit the engine; returns N and K."""
        limits = self.limits
        if not prompt:
            raise RequestError("the prompt is empty, expected at least one token: pass some text")
        for token in prompt:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < limits.vocab_size:
                raise RequestError(
                    f"prompt token {token!r} is not in the vocabulary, expected 0 to {limits.vocab_size - 1}: "
                    "tokenize with the engine's own tokenizer"
                )
        n, k = limits.drafting(params)
        if len(prompt) + params.max_tokens > limits.max_seq_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {params.max_tokens}, together at most "
                f"{limits.max_seq_len} fit: shorten the prompt, lower max_tokens, or rebuild with --max-seq-len "
                f"{len(prompt) + params.max_tokens}"
            )
        if params.stop and self.tokenizer is None:
            raise RequestError(
                "stop strings need a tokenizer, the engine directory has none: use stop_token_ids, or rebuild from a "
                "checkpoint with a tokenizer"
            )
        for token in params.stop_token_ids:
            if token >= limits.vocab_size:
                raise RequestError(
                    f"stop token id {token} is not in the vocabulary, expected 0 to {limits.vocab_size - 1}: drop it"
                )
        pages = worst_case_pages(len(prompt), params.max_tokens, n, k, self.page_size)
        if pages > self.num_pages - 1:
            raise RequestError(
                f"the request may need {pages} KV pages, the pool has {self.num_pages - 1}: lower max_tokens or "
                "num_particles, or give the executor more memory"
            )
        return n, k
