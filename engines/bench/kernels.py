"""What each kernel of a round is for: its model, its place in the decoder and its group.

Names tell the kind of a kernel; whether it serves the draft or the target, and which product of a layer it is, follows
from the order of launches. Attention is the anchor, one call a layer: with K = 8, a draft of 16 layers and a target of 32
there are 160 calls, the last 32 of them the target's. A model's pass begins after the last sampling kernel before its
first attention. The products between two attention calls of a layer are o, gate and up, down, and the next qkv, in this
order; after the last call it is the head instead of qkv. Where the counts do not fit (fused or unknown kernels), a product
keeps its model and its grid, and has no place.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smc_build.dtypes import dtype_bytes
from smc_build.engine_dir import Role
from smc_build.model_config import ModelConfig
from smc_build.precision import Precision
from smc_engines.bench.trace import Event

# First match wins. cuBLAS's names on Hopper begin with nvjet or sm90_xmma, TensorRT's with __myl or contain gemm.
_KIND_PATTERNS = (
    ("page copy", r"^_copy_kernel"),
    ("whole pass", r"^whole_pass_kernel"),
    ("collective", r"nccl|one_shot|two_shot|all_reduce|symm_mem|^rank_sum"),
    (
        "bookkeeping",
        r"^_(open|ends|commit|inherit|close|take_pages|assign|shared|fork|release|weigh|round_end|summary|ancestors)_kernel",
    ),
    ("sampling", r"^_(partial|combine|filter|fold|join)_kernel|sampl"),
    ("reduce", r"splitk_?reduce|reduce_kernel.*gemm"),
    ("head", r"lm_?head|_head_kernel"),
    ("product", r"_linear_kernel|_gated_kernel|gemm|gemv|gemt|matmul|nvjet|xmma|cutlass|cublas|wgmma|__myl|product"),
    ("context", r"_context_kernel"),
    ("rope", r"_rope_kernel|rotary"),
    ("attention", r"attention|attend|flash|fmha"),
)
_COMPILED = [(kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _KIND_PATTERNS]
_PRODUCT_KINDS = ("product", "reduce", "head")
_ATTENTION_KINDS = ("context", "rope", "attention")
_LAYER_PRODUCTS = ("o", "gate_up", "down", "qkv")
_LAST_PRODUCTS = ("o", "gate_up", "down", "head")

GROUPS = (
    *("draft whole passes", "draft products", "draft head", "draft attention", "draft other"),
    *("target products", "target head", "target attention", "target other"),
    *("products", "head", "attention"),
    *("sampling", "bookkeeping", "page copy", "collective", "other"),
)


@dataclass(frozen=True)
class Shapes:
    """What a round of one kind runs: models, draft passes, and each model's element types."""

    target: ModelConfig
    draft: ModelConfig | None
    draft_passes: int
    precisions: Mapping[Role, Precision]

    @property
    def attention_calls(self) -> int:
        """Attention calls of a round."""
        draft = 0 if self.draft is None else self.draft_passes * self.draft.num_layers
        return draft + self.target.num_layers

    def product_bytes(self, model: str, place: str) -> int | None:
        """Bytes of weights that one product reads; None where its place is not known."""
        config = self.draft if model == "draft" else self.target
        if config is None or not place or not model:
            return None
        shapes = {
            "qkv": (config.hidden_size, config.qkv_size),
            "o": (config.q_size, config.hidden_size),
            "gate_up": (config.hidden_size, 2 * config.ffn_size),
            "down": (config.ffn_size, config.hidden_size),
            "head": (config.hidden_size, config.vocab_size),
        }
        inner, columns = shapes[place]
        precision = self.precisions["draft" if model == "draft" else "target"]
        return inner * columns * dtype_bytes(precision.head if place == "head" else precision.matrices)

    def group_bytes(self, group: str) -> int | None:
        """Bytes of weights that a group of products reads in one round; None for other groups."""
        model, _, what = group.partition(" ")
        config = self.draft if model == "draft" else self.target
        if config is None or model not in ("draft", "target") or what not in ("whole passes", "products", "head"):
            return None
        passes = self.draft_passes if model == "draft" else 1
        places = ("head",) if what == "head" else _LAYER_PRODUCTS
        layers = 1 if what == "head" else config.num_layers
        return passes * layers * sum(self.product_bytes(model, place) or 0 for place in places)


@dataclass(frozen=True)
class Label:
    """What an event is for.

    Args:
        group: one of GROUPS. model: draft, target or "". place: of a product, such as gate_up, or "".
    """

    group: str
    model: str = ""
    place: str = ""


def kind_of(event: Event) -> str:
    """The kind that an event's name tells."""
    return _kind_of_name(event.name) if event.kind == "kernel" else "other"


@functools.cache
def _kind_of_name(name: str) -> str:
    return next((kind for kind, pattern in _COMPILED if pattern.search(name)), "other")


def label_round(events: Sequence[Event], shapes: Shapes) -> list[Label]:
    """Say what each event of a round is for, in order."""
    kinds = [kind_of(event) for event in events]
    calls = [index for index, kind in enumerate(kinds) if kind == "attention"]
    passes = _passes(kinds, calls, shapes)
    labels = [Label(_group("", kind)) for kind in kinds]
    for model, begin, end in passes:
        own = [call for call in calls if begin <= call < end]
        layers = shapes.target.num_layers if model == "target" else shapes.draft.num_layers if shapes.draft else 0
        places = _places(events, kinds, own, begin, end) if len(own) == layers else _heads(kinds, begin, end)
        for index in range(begin, end):
            place = places.get(index, "")
            kind = "head" if place == "head" else kinds[index]
            labels[index] = Label(_group(model, kind), model, place)
    return labels


def _heads(kinds: Sequence[str], begin: int, end: int) -> dict[int, str]:
    """Places of the products beside passes in one launch: of all that a model multiplies, only the head is left to them."""
    if "whole pass" not in kinds[begin:end]:
        return {}
    return {index: "head" for index in range(begin, end) if kinds[index] == "product"}


def _group(model: str, kind: str) -> str:
    if kind in ("sampling", "bookkeeping", "page copy", "collective"):
        return kind
    what = "whole passes" if kind == "whole pass" else "other"
    if kind in _PRODUCT_KINDS:
        what = "head" if kind == "head" else "products"
    elif kind in _ATTENTION_KINDS:
        what = "attention"
    return f"{model} {what}".strip()


def _passes(kinds: Sequence[str], calls: Sequence[int], shapes: Shapes) -> list[tuple[str, int, int]]:
    """The model passes of a round as (model, begin, end); none where the attention calls do not tell them."""
    own, draft_layers = shapes.target.num_layers, shapes.draft.num_layers if shapes.draft is not None else 0
    if len(calls) < own:
        return []
    drafts, target_call = calls[: len(calls) - own], calls[-own]
    opening = next((index for index, kind in enumerate(kinds) if kind != "bookkeeping"), 0)
    target_begin = _begin(kinds, drafts[-1] + 1 if drafts else opening, target_call)
    passes: list[tuple[str, int]] = [("target", target_begin)]
    if drafts and draft_layers and len(drafts) % draft_layers == 0:
        firsts = range(0, len(drafts), draft_layers)
        begins = [_begin(kinds, drafts[first - 1] + 1 if first else opening, drafts[first]) for first in firsts]
        passes = [*(("draft", begin) for begin in begins), *passes]
    elif shapes.draft_passes:
        # The draft's attention does not show: all that lies between the opening and the target is the draft's.
        passes = [("draft", opening), *passes]
    ends = [*(begin for _, begin in passes[1:]), _tail(kinds, calls[-1])]
    return [(model, begin, end) for (model, begin), end in zip(passes, ends, strict=True)]


def _begin(kinds: Sequence[str], low: int, high: int) -> int:
    """Where a pass begins between two attention calls: after what samples or keeps books, else at its context kernel."""
    outer = [index for index in range(low, high) if kinds[index] in ("sampling", "bookkeeping")]
    if outer:
        return outer[-1] + 1
    contexts = [index for index in range(low, high) if kinds[index] == "context"]
    return contexts[-1] if contexts else low


def _tail(kinds: Sequence[str], last_call: int) -> int:
    """Where the last pass ends: at the first kernel after its last attention that samples or keeps books."""
    for index in range(last_call + 1, len(kinds)):
        if kinds[index] in ("sampling", "bookkeeping"):
            return index
    return len(kinds)


def _places(
    events: Sequence[Event], kinds: Sequence[str], calls: Sequence[int], begin: int, end: int
) -> dict[int, str]:
    """Places of a pass's products, by index."""
    found: dict[int, str] = {}
    bounds = [begin, *calls, end]
    for number, (low, high) in enumerate(itertools.pairwise(bounds)):
        products = [index for index in range(low, high) if kinds[index] in ("product", "head")]
        if number == 0:
            names: tuple[str, ...] = ("qkv",)
        else:
            names = _LAST_PRODUCTS if high == end else _LAYER_PRODUCTS
        if len(products) == len(names):
            found |= dict(zip(products, names, strict=True))
        elif high == end and products:
            # The head is by far the largest product, whatever else was split or fused.
            found[max(products, key=lambda index: events[index].us)] = "head"
    return found
