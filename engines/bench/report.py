"""What smc-bench says: rows, the report around them, and both as text.

A row holds one mode at one point: medians and spread over the repeats, and the floor that its rounds had. The report is
written after every repeat, so that a run that is cut off keeps what it has.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from smc_build.engine_dir import Manifest, ModelEntry, Role
from smc_build.model_config import ModelConfig
from smc_build.precision import describe_types
from smc_engines.bench.floor import device_name, floor_bytes
from smc_engines.bench.measure import Sample
from smc_engines.bench.points import Case
from smc_engines.engine import Engine
from smc_engines.report import engine_lines
from smc_engines.tactics import ModelTactics, tactics_of
from smc_plugin.errors import ConfigError

_PACKAGES = ("torch", "triton", "transformers", "numpy")
_SHOWN_KERNELS = 24
_NAME_WIDTH = 44


def identity(manifest: Manifest, device: torch.device) -> dict[str, Any]:
    """What tactics belong to: the GPU, the models, their types and how they are cut."""
    draft = manifest.draft
    entries: dict[Role, ModelEntry | None] = {"target": manifest.target, "draft": draft}
    return {
        "gpu": device_name(device),
        "preset": manifest.name,
        "draft": draft.source if draft is not None else None,
        "dtype": describe_types({role: entry.precision for role, entry in entries.items() if entry is not None}),
        "tp": manifest.tp,
        "draft_tp": draft.tp if draft is not None else None,
    }


def read_tactics(path: Path, manifest: Manifest, device: torch.device) -> dict[str, Any]:
    """The tactics of an earlier report of the same models on the same kind of device.

    Raises:
        ConfigError: the report cannot be read, has no tactics, or they belong to something else.
    """
    own = identity(manifest, device)
    try:
        found = json.loads(path.read_text())
        tactics = found["tactics"]
        told = dict(found.get("identity") or _identity_of(found["rows"][0]))
        models = {role: ModelTactics.from_dict(values) for role, values in tactics["models"].items()} if tactics else {}
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--tactics {path} does not read ({error!r}), expected the --json of a run with --tune: name such a file, "
            "or use --tune"
        ) from error
    wanted = {"target"} if manifest.draft is None else {"target", "draft"}
    if set(models) != wanted:
        raise ConfigError(
            f"--tactics {path} has tactics of {', '.join(sorted(models)) or 'no model'}, expected {', '.join(sorted(wanted))}: "
            "name the --json of a run with --tune, or use --tune"
        )
    told = {**told, "gpu": tactics.get("gpu")}
    differing = [name for name in own if told.get(name) != own[name]]
    if differing:
        theirs, ours = (", ".join(f"{name} {each.get(name)}" for name in differing) for each in (told, own))
        raise ConfigError(
            f"--tactics {path} has those of {theirs}, this run has {ours}, expected the same: find them anew with --tune"
        )
    if any("plans" in model.runners() for model in models.values()):
        raise ConfigError(
            f"--tactics {path} leaves regions to TensorRT plans, an engine in memory has none: expected the --json of a run "
            "with --preset and --tune: name one, or use --tune"
        )
    return tactics


def _identity_of(row: dict[str, Any]) -> dict[str, Any]:
    """Of a report from before it had one of its own."""
    return {"draft_tp": row["tp"] if row["draft"] is not None else None, **row}


def describe(engine: Engine, case: Case, copy_tb_per_s: float) -> dict[str, Any]:
    """What a row says before anything is measured: where, what and how many."""
    manifest = engine.manifest
    return {
        **identity(manifest, engine.device),
        "num_gpus": manifest.tp if engine.device.type == "cuda" else 0,
        "mode": case.mode,
        "num_particles": case.num_particles,
        "num_draft_tokens": case.num_draft_tokens,
        "prompt_tokens": case.point.prompt_tokens,
        "output_tokens": case.point.output_tokens,
        "batch": case.point.batch,
        "point": case.point.label,
        "resampling": case.resampling,
        "copy_tb_per_s": copy_tb_per_s,
        "weights": "random" if manifest.weights == "random" else manifest.name,
        "kernels": engine.target.kernels.name,
        "regions": engine.config.regions,
        "tuned": tactics_of(engine.manifest.tactics, "target", device_name(engine.device)) is not None,
        "max_seq_len": engine.limits.max_seq_len,
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }


def make_row(
    engine: Engine,
    case: Case,
    samples: Sequence[Sample],
    temperature: float,
    copy_tb_per_s: float,
    collectives_us: float = 0.0,
) -> dict[str, Any]:
    """One row of the report; collectives_us is what a round's collectives take alone (see bench.collectives)."""
    speeds = [sample.tokens_per_s for sample in samples]
    times = [sample.ms_per_round for sample in samples]
    context = statistics.fmean(sample.context_tokens for sample in samples)
    num_bytes = floor_bytes(engine, case, context)
    floor_ms = num_bytes / copy_tb_per_s / 1e9
    tokens_per_round = statistics.fmean(sample.tokens_per_round for sample in samples)
    return {
        **describe(engine, case, copy_tb_per_s),
        "temperature": temperature,
        "tokens_per_s": statistics.median(speeds),
        "tokens_per_s_min": min(speeds),
        "tokens_per_s_max": max(speeds),
        "tokens_per_round": tokens_per_round,
        "ms_per_round": statistics.median(times),
        "ms_per_round_min": min(times),
        "ms_per_round_max": max(times),
        "prefill_ms": statistics.median(sample.prefill_ms for sample in samples),
        "repeats": len(samples),
        "rounds": samples[0].rounds,
        "context_tokens": context,
        "resampled_fraction": statistics.fmean(sample.resampled for sample in samples),
        "copied_per_round": statistics.fmean(sample.copied for sample in samples),
        "floor_bytes": num_bytes,
        "floor_ms": floor_ms,
        "floor_fraction": floor_ms / statistics.median(times),
        "collectives_us": collectives_us,
        "collectives_share": collectives_us / 1e3 / statistics.median(times),
        "floor_tokens_per_s": 1e3 * case.point.batch * tokens_per_round / floor_ms,
    }


def failed_row(engine: Engine, case: Case, copy_tb_per_s: float, error: BaseException | None) -> dict[str, Any]:
    """What is known of a case that could not be measured."""
    return {**describe(engine, case, copy_tb_per_s), "error": f"{type(error).__name__}: {error}"}


def versions() -> dict[str, str]:
    """Python, CUDA where there is one, and the packages that decide about speed."""
    found = {"python": platform.python_version()}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def write_json(report: dict[str, Any], path: Path) -> None:
    """Write a report in one piece: whoever reads meanwhile sees the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def header(engine: Engine, copy_tb_per_s: float) -> list[str]:
    """Where and on what a run measures."""
    lines = [*engine_lines(engine), f"target   {_shapes(engine.target.config)}"]
    if engine.draft is not None:
        lines.append(f"draft    {_shapes(engine.draft.config)}")
    lines.append(f"versions {', '.join(f'{name} {number}' for name, number in versions().items())}")
    return [*lines, f"copy     {copy_tb_per_s * 1e3:,.1f} GB/s read and written on {device_name(engine.device)}"]


def _shapes(config: ModelConfig) -> str:
    tied = ", tied head" if config.tied_head else ""
    return (
        f"{config.num_layers} layers, hidden {config.hidden_size}, {config.num_heads} heads and {config.num_kv_heads} KV heads "
        f"of {config.head_dim}, ffn {config.ffn_size}, {config.vocab_size} tokens{tied}"
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Lay rows out for a terminal."""
    base = next((row["tokens_per_s"] for row in rows if row["mode"] == "target" and row["point"] == "base"), None)
    width = max([len(row["point"]) for row in rows] + [5])
    heads = ("mode", "point", "N", "K", "tokens/s", "min", "max", "tok/round", "ms/round", "floor", "x target")
    lines = ["{:12} {:{width}} {:>3} {:>3} {:>9} {:>8} {:>8} {:>9} {:>9} {:>6} {:>8}".format(*heads, width=width)]
    for row in rows:
        mode = row["mode"] if row["resampling"] == "default" else f"{row['mode']}, {row['resampling']}"
        ratio = f"{row['tokens_per_s'] / base:8.2f}" if base else " " * 8
        lines.append(
            f"{mode:12} {row['point']:{width}} {row['num_particles']:3d} {row['num_draft_tokens']:3d} "
            f"{row['tokens_per_s']:9.1f} {row['tokens_per_s_min']:8.1f} {row['tokens_per_s_max']:8.1f} "
            f"{row['tokens_per_round']:9.2f} {row['ms_per_round']:9.3f} {row['floor_fraction']:6.2f} {ratio}"
        )
    return "\n".join(lines)


def resampling_summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """What resampling costs: the rounds of `every` against those of `never`; None where they were not measured."""
    ms = {row["resampling"]: row for row in rows if row["mode"] == "smc" and row["point"] == "base"}
    if "every" not in ms or "never" not in ms:
        return None
    every, never, usual = ms["every"], ms["never"], ms.get("default")
    return {
        "never_ms": never["ms_per_round"],
        "every_ms": every["ms_per_round"],
        "default_ms": usual["ms_per_round"] if usual else None,
        "cost": every["ms_per_round"] / never["ms_per_round"] - 1,
        "resampled_fraction": every["resampled_fraction"],
        "copied_per_round": every["copied_per_round"],
    }


def summary_lines(report: dict[str, Any]) -> list[str]:
    """The figures that a run is about, one a line."""
    rows = {(row["mode"], row["point"], row["resampling"]): row for row in report["rows"]}
    lines = []
    for mode in ("target", "speculative", "smc"):
        row = rows.get((mode, "base", "default"))
        if row is not None:
            lines.append(
                f"{mode:12} {row['floor_fraction']:.1%} of the floor: {row['ms_per_round']:.3f} ms a round, "
                f"{row['floor_ms']:.3f} ms to read {row['floor_bytes'] / 1e9:.2f} GB"
                + (f" on each of {row['tp']} ranks" if row["tp"] > 1 else "")
            )
            if row["tp"] > 1:
                lines.append(
                    f"{'':12} {row['collectives_share']:.1%} of it in collectives ({row['collectives_us']:.0f} us)"
                )
    base, target = rows.get(("smc", "base", "default")), rows.get(("target", "base", "default"))
    if base and target:
        lines.append(f"smc/target   {base['tokens_per_s'] / target['tokens_per_s']:.2f}")
    cost = report.get("resampling")
    if cost:
        lines.append(
            f"resampling   every round costs {cost['cost']:+.2%} of a round that never does: {cost['every_ms']:.3f} against "
            f"{cost['never_ms']:.3f} ms ({cost['copied_per_round']:.1f} particles copied a round)"
        )
    for row in report["rows"]:
        if base and row["mode"] == "smc" and row["point"].startswith("prompt_tokens="):
            share = row["tokens_per_s"] / base["tokens_per_s"]
            lines.append(
                f"prompt       {row['prompt_tokens']} tokens keep {share:.1%} of the speed at {base['prompt_tokens']}"
            )
    lines += [f"failed       {row['mode']} {row['point']}: {row['error']}" for row in report["failed"]]
    return lines


def profile_text(profile: dict[str, Any], ms_per_round: float | None) -> str:
    """Lay a profile out for a terminal: the gap, the groups, and the kernels that take most."""
    beside = "" if ms_per_round is None else f" ({ms_per_round * 1e3:.0f} us without the profiler)"
    lines = [
        f"one round of mode {profile['mode']}, mean of {profile['rounds']}: {profile['round_us']:.1f} us{beside} = kernels "
        f"{profile['kernels_us']:.1f} + idle between them {profile['idle_us']:.1f} + gap to the next; "
        f"{profile['launches']:.0f} launches, their durations add up to {profile['kernel_durations_us']:.1f} us",
        f"gap between consecutive rounds: median {profile['round_gap_us']:.1f} us, at most {profile['round_gap_max_us']:.1f} "
        f"({profile['round_gap_count']} gaps), {profile['round_gap_note']} ({profile['round_gap_copies_us']:.1f} us of it)",
        "",
        f"{'group':18} {'launches':>8} {'us':>9} {'share':>6} {'MB':>9} {'TB/s':>6}",
    ]
    lines += [f"{row['group']:18} {_cells(row)}" for row in profile["groups"]]
    lines += ["", f"{'group':18} {'of':8} {'kernel':{_NAME_WIDTH}} {'grid':>12} {_HEADS}"]
    for row in profile["kernels"][:_SHOWN_KERNELS]:
        grid, of = "x".join(str(size) for size in row["grid"]), row["place"] or row["model"]
        lines.append(f"{row['group']:18} {of:8} {short_name(row['name']):{_NAME_WIDTH}} {grid:>12} {_cells(row)}")
    rest = profile["kernels"][_SHOWN_KERNELS:]
    if rest:
        lines.append(f"and {len(rest)} more kernels, {sum(row['us'] for row in rest):.1f} us together")
    return "\n".join(lines)


_HEADS = f"{'launches':>8} {'us':>9} {'share':>6} {'MB':>9} {'TB/s':>6}"


def _cells(row: dict[str, Any]) -> str:
    size = "" if row["bytes"] is None else f"{row['bytes'] / 1e6:,.0f}"
    rate = "" if row["tb_per_s"] is None else f"{row['tb_per_s']:.2f}"
    return f"{row['launches']:8.0f} {row['us']:9.1f} {row['share']:6.1%} {size:>9} {rate:>6}"


def short_name(name: str) -> str:
    """A kernel's name without its return type, parameters and all but the beginning of its template arguments."""
    plain = name.removeprefix("void ").split("(", 1)[0]
    return plain if len(plain) <= _NAME_WIDTH else plain[: _NAME_WIDTH - 1] + "…"
