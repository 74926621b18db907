"""How one model is cut over tensor-parallel ranks: shapes of a rank, and its part of each canonical weight.

qkv, gate/up and the head are cut by columns, with their biases and FP8 scales; o and down by rows; everything else is on every
rank, the scales of o and down too, since each part of a sum is scaled before it is added. What does not divide is padded with
zeros, which change no sum: attention heads, ffn columns, vocabulary rows. Fewer KV heads than ranks are repeated. Every rank
has the same shapes. Example, SmolLM2 (9 heads, 3 KV heads of 64, ffn 1536, 49152 tokens) over 4 ranks: 12 heads
and 4 KV heads, 3 and 1 a rank, of which the last rank's are zero; ffn 384 and 12288 tokens a rank.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from smc_build.model_config import ModelConfig
from smc_plugin.errors import ConfigError

# A rank's share of ffn columns and of the vocabulary is a multiple of these: whole lines of memory, whole tiles.
FFN_MULTIPLE, VOCABULARY_MULTIPLE = 16, 64


@dataclass(frozen=True)
class RankConfig(ModelConfig):
    """What one of `tp` ranks computes of a decoder: the sizes are the rank's own.

    Args:
        tp: ranks that share the model.
        full: the whole decoder.
    """

    tp: int
    full: ModelConfig

    @property
    def is_shard(self) -> bool:
        """Whether a rank's products are parts of sums: yes."""
        return True

    @property
    def embedding_rows(self) -> int:
        """Rows of the embedding, which is on every rank: the whole vocabulary, padded."""
        return self.vocab_size * self.tp


@dataclass(frozen=True)
class Heads:
    """Which heads a rank computes.

    Args:
        query: the full model's query heads, in the rank's order; None is a zero head.
        kv: likewise its key and value heads.
    """

    query: tuple[int | None, ...]
    kv: tuple[int | None, ...]


def rank_config(config: ModelConfig, tp: int) -> ModelConfig:
    """Shapes of one rank; the config itself when tp is 1.

    Raises:
        ConfigError: there are more ranks than something that each needs a part of.
    """
    if tp == 1:
        return config
    for count, what in ((config.num_heads, "attention heads"), (config.ffn_size, "ffn columns")):
        if tp > count:
            raise ConfigError(
                f"{count} {what} cannot be shared by {tp} ranks, expected at least one for each: use --tp {count} or less "
                "(--draft-tp 1 keeps the whole draft on every rank)"
            )
    kv_slots, group = _slots(config, tp)
    own = {
        "num_heads": kv_slots * group // tp,
        "num_kv_heads": max(kv_slots // tp, 1),
        "ffn_size": _share(config.ffn_size, tp, FFN_MULTIPLE),
        "vocab_size": _share(config.vocab_size, tp, VOCABULARY_MULTIPLE),
    }
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return RankConfig(**{**values, **own}, tp=tp, full=config)


def rank_heads(config: ModelConfig, tp: int, rank: int) -> Heads:
    """Which heads of a full config a rank computes."""
    kv_slots, group = _slots(config, tp)
    real = config.num_heads // config.num_kv_heads

    def query_of(kv: int, place: int) -> int | None:
        return kv * real + place if kv < config.num_kv_heads and place < real else None

    def kv_of(slot: int) -> int | None:
        return slot if slot < config.num_kv_heads else None

    repeats = max(tp // kv_slots, 1)
    if repeats > 1:
        slot, part, own = rank // repeats, rank % repeats, group // repeats
        return Heads(tuple(query_of(slot, part * own + place) for place in range(own)), (kv_of(slot),))
    own_slots = range(rank * kv_slots // tp, (rank + 1) * kv_slots // tp)
    return Heads(
        tuple(query_of(slot, place) for slot in own_slots for place in range(group)), tuple(map(kv_of, own_slots))
    )


def _slots(config: ModelConfig, tp: int) -> tuple[int, int]:
    """KV heads over all ranks before they are repeated, and query heads of each, zero heads included."""
    group = config.num_heads // config.num_kv_heads
    if config.num_kv_heads >= tp:
        return math.ceil(config.num_kv_heads / tp) * tp, group
    kv_slots = next(count for count in range(config.num_kv_heads, tp + 1) if tp % count == 0)
    repeats = tp // kv_slots
    return kv_slots, math.ceil(group / repeats) * repeats


def _share(count: int, tp: int, multiple: int) -> int:
    """A rank's share: exact where it divides, else rounded up to a multiple."""
    return count // tp if count % (tp * multiple) == 0 else math.ceil(count / (tp * multiple)) * multiple


def describe_padding(config: ModelConfig, tp: int) -> str:
    """Say what a rank holds and what was added, for the printed plan."""
    own = rank_config(config, tp)
    repeats = max(tp // _slots(config, tp)[0], 1)
    text = f"{own.num_heads} of {config.num_heads} heads, {own.num_kv_heads} of {config.num_kv_heads} KV heads"
    text += f", ffn {own.ffn_size} of {config.ffn_size}, {own.vocab_size} of {config.vocab_size} tokens"
    added = {
        "zero heads": own.num_heads * tp - config.num_heads,
        "zero KV heads": own.num_kv_heads * tp // repeats - config.num_kv_heads,
        "zero ffn columns": own.ffn_size * tp - config.ffn_size,
        "padded tokens": own.vocab_size * tp - config.vocab_size,
    }
    parts = [f"{count} {what} added" for what, count in added.items() if count]
    if repeats > 1:
        parts.append(f"each KV head on {repeats} ranks")
    return f"{text}; {', '.join(parts)}" if parts else text


def shard(name: str, tensor: torch.Tensor, config: ModelConfig, tp: int, rank: int) -> torch.Tensor:
    """Cut a rank's part out of one canonical weight.

    Args:
        name: canonical name.
        tensor: the whole weight of a full `config`; the matrix of a layer is [inner, columns], or FP8 and [columns, inner].
    Returns:
        the part, shaped as weight_shapes of rank_config(config, tp) says; a view where that is possible.
    """
    if tp == 1:
        return tensor
    own, last = rank_config(config, tp), name.rpartition(".")[2]
    columns, inner = (0, 1) if tensor.dtype == torch.float8_e4m3fn else (-1, 0)
    # where a rank's share is a stretch of one axis: axis, first entry, entries
    stretches = {
        "embed": (0, 0, own.embedding_rows),
        "lm_head": (0, rank * own.vocab_size, own.vocab_size),
        "lm_head_scale": (0, rank * own.vocab_size, own.vocab_size),
        "down": (inner, rank * own.ffn_size, own.ffn_size),
    }
    if last in stretches:
        return _padded(tensor, *stretches[last])
    if last in ("gate_up", "gate_up_scale"):
        halves = tensor.split(config.ffn_size, dim=columns)
        return torch.cat([_padded(half, columns, rank * own.ffn_size, own.ffn_size) for half in halves], dim=columns)
    heads = rank_heads(config, tp, rank)
    if last in ("qkv", "qkv_bias", "qkv_scale"):
        parts = tensor.split((config.q_size, config.kv_size, config.kv_size), dim=columns)
        held = zip(parts, (heads.query, heads.kv, heads.kv), strict=True)
        return torch.cat([_take_heads(part, columns, index, config.head_dim) for part, index in held], dim=columns)
    return _take_heads(tensor, inner, heads.query, config.head_dim) if last == "o" else tensor


def shards(
    tensors: Iterator[tuple[str, torch.Tensor]], config: ModelConfig, tp: int, rank: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Cut a rank's part out of each weight of a stream, copied, so that no whole tensor stays alive behind a view."""
    for name, tensor in tensors:
        part = shard(name, tensor, config, tp, rank)
        yield name, part.clone() if part.untyped_storage().nbytes() > part.nbytes else part


def padded_tokens(config: ModelConfig, rank: int) -> int:
    """Columns of a rank's logits that stand for no token; they are its last ones."""
    if not isinstance(config, RankConfig):
        return 0
    end = (rank + 1) * config.vocab_size
    return min(max(end - config.full.vocab_size, 0), config.vocab_size)


def bind_head(weights: dict[str, torch.Tensor], config: ModelConfig, rank: int) -> dict[str, torch.Tensor]:
    """Give a rank of a tied model its part of the head: rows of the embedding, which it holds whole."""
    if config.is_shard and config.tied_head:
        start = rank * config.vocab_size
        weights["lm_head"] = weights["embed"][start : start + config.vocab_size]
    return weights


def _take_heads(tensor: torch.Tensor, axis: int, heads: Sequence[int | None], head_dim: int) -> torch.Tensor:
    """Join heads along an axis; zeros stand for None."""
    parts = []
    for head in heads:
        start = 0 if head is None else head * head_dim
        part = tensor.narrow(axis, start, head_dim)
        parts.append(torch.zeros_like(part) if head is None else part)
    return torch.cat(parts, dim=axis)


def _padded(tensor: torch.Tensor, axis: int, start: int, count: int) -> torch.Tensor:
    """`count` entries from `start` on along an axis, zeros beyond the end."""
    size = tensor.shape[axis]
    start = min(start, size)
    have = min(count, size - start)
    part = tensor.narrow(axis, start, have)
    if have == count:
        return part
    shape = list(part.shape)
    shape[axis] = count - have
    return torch.cat([part, part.new_zeros(shape)], dim=axis)
