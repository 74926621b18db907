"""What smc-build prints about a plan and about its presets.

Example: the target line of llama-1b in bfloat16 ends "1,235,814,400 parameters, 2.47 GB, KV 32,768 bytes per token".
"""

from smc_build.engine_dir import Role
from smc_build.machine import format_bytes
from smc_build.plan import BuildPlan
from smc_build.precision import describe_types
from smc_build.presets import PRESETS, ModelSource
from smc_build.sharding import describe_padding
from smc_build.tensorrt_api import PORTABLE, find
from smc_build.weights import weight_bytes

_GPUS = {PORTABLE: "any GPU it supports"}


def describe(plan: BuildPlan) -> str:
    """Write the plan as the lines a user reads before a build starts."""
    options = plan.options
    lines = [f"Plan for {plan.output}", ""]
    shown: dict[Role, ModelSource | None] = {"target": plan.target, "draft": plan.draft}
    for role, model in shown.items():
        lines.append(f"  {role:<13}{'none: target mode only' if model is None else _describe_model(plan, role, model)}")
    lines += [
        f"  {'limits':<13}N <= {options.particles} particles, K <= {options.draft_tokens} draft tokens, "
        f"{options.groups} requests at once, {plan.max_seq_len} tokens each",
        f"  {'row buckets':<13}{', '.join(map(str, plan.row_buckets))}",
        f"  {'weights':<13}{format_bytes(plan.weight_bytes)} as {describe_types(plan.precisions)}"
        + (" (random, made when loaded)" if options.random_weights else ""),
        *_describe_copy(plan),
        f"  {'compiler':<13}{_describe_compiler(plan)}",
        f"  {'KV pages':<13}{plan.num_pages:,} of {options.page_size} tokens ({format_bytes(plan.page_bytes)} each) fit into "
        f"{format_bytes(plan.memory_bytes)} of free {plan.memory_name}; a request takes at most "
        f"{plan.pages_per_request:,} pages",
    ]
    if options.tp > 1:
        lines.append(
            f"  {'per rank':<13}{format_bytes(plan.rank_weight_bytes)} of weights on each of {options.tp} ranks"
        )
        for role, model in plan.roles:
            ranks = plan.ranks(role)
            text = describe_padding(model.config, ranks) if ranks > 1 else "whole on every rank"
            lines.append(f"  {'':<13}{role}: {text}")
    if plan.num_pages < plan.pages_per_request:
        lines.append(
            f"  {'note':<13}not even one request of {plan.max_seq_len} tokens with {options.particles} particles "
            "fits into "
            "this memory: run it elsewhere, or lower --max-seq-len or --particles"
        )
    return "\n".join(lines)


def preset_list() -> str:
    """Write each preset with its default draft on one line."""
    width = max(map(len, PRESETS))
    return "\n".join(
        f"  {name:<{width}}  {preset.hub_name} + {preset.default_draft or 'a draft that you name'}"
        for name, preset in PRESETS.items()
    )


def _describe_copy(plan: BuildPlan) -> list[str]:
    if plan.whole_pass_bytes == 0:
        return []
    return [f"  {'on the GPU':<13}{format_bytes(plan.whole_pass_bytes)} more for the draft's passes in one launch"]


def _describe_compiler(plan: BuildPlan) -> str:
    api = find(plan.compiler) if plan.compiler != "torch" else None
    if api is None:
        return "torch: regions run as they are, no plans"
    return f"{api.compiler} {api.version}: plans for {_GPUS.get(api.target(), api.target())}"


def _describe_model(plan: BuildPlan, role: Role, model: ModelSource) -> str:
    config, precision = model.config, plan.precisions[role]
    where = model.folder or ("no checkpoint needed" if plan.options.random_weights else "to be fetched from the Hub")
    return (
        f"{model.name}: {config.family}, {config.num_layers} layers, hidden {config.hidden_size}, "
        f"{config.num_parameters:,} parameters, {format_bytes(weight_bytes(config, precision))}, KV "
        f"{config.kv_bytes_per_token(precision.kv):,} bytes per token ({where})"
    )
