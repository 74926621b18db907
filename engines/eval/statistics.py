"""From answers to figures: accuracy with its interval, what it costs, and how far a setting is from the target.

Several answers to one problem are not independent, so intervals treat a problem, not an answer, as the unit. Example: 200
problems, 4 answers each, 0.9 right; if all four always agreed, the interval is that of 200 answers, if they were
independent that of 800.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from smc_engines.eval.settings import Setting

Z = 1.959964  # 95 %
_SAME_COST = 0.99  # where an answer ends moves its cost by about 1 %
_MISMATCH = 0.5  # kernel factor of a position where two answers differ


def wilson(successes: float, count: float) -> tuple[float, float]:
    """95 % interval of a share.

    Args:
        successes, count: may be fractional (an effective number of answers).
    Source: Wilson (1927), J. Am. Stat. Assoc. 22.
    """
    share = successes / count
    centre = share + Z * Z / (2 * count)
    half = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    scale = 1 + Z * Z / count
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Mean of independent values and the half width of its 95 % interval (0 for a single one)."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), Z * spread / math.sqrt(len(values))


def effective_count(shares: Sequence[float], answers: int) -> float:
    """How many independent answers say as much as these problems do.

    Args:
        shares: of right answers, one a problem.
        answers: in all.
    """
    share = statistics.fmean(shares)
    variance = statistics.variance(shares) / len(shares) if len(shares) > 1 else 0.0
    if variance == 0 or share in (0.0, 1.0):
        return float(len(shares))
    return min(float(answers), share * (1 - share) / variance)


def summarise(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a setting, in the order in which they first appear; differences are to the target at the same temperature, top-p
    and whatever else decides its law."""
    by_setting: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        by_setting[Setting.of(record["setting"]).key].append(record)
    exact: dict[str, list[dict[str, Any]]] = {}
    for own in by_setting.values():
        setting = Setting.of(own[0]["setting"])
        if setting.mode == "target":
            exact[setting.law] = own
    rows = [_row(own, exact.get(Setting.of(own[0]["setting"]).law)) for own in by_setting.values()]
    mark_pareto(rows, "tokens_per_pass")
    mark_pareto(rows, "tokens_per_second")
    return rows


def _row(own: list[dict[str, Any]], exact: list[dict[str, Any]] | None) -> dict[str, Any]:
    setting = Setting.of(own[0]["setting"])
    shares = by_item(own, "right")
    accuracy = statistics.fmean(shares.values())
    count = effective_count(list(shares.values()), len(own))
    low, high = wilson(accuracy * count, count)
    tokens, rounds = sum(record["tokens"] for record in own), sum(record["rounds"] for record in own)
    likelihood = [record["log_p"] / record["tokens"] for record in own]
    fractions = [ess for record in own for ess in record["ess"]]
    particles = dict(setting.values).get("num_particles", 1) if setting.mode == "smc" else 1
    row = {
        "label": setting.label,
        "setting": dict(setting.values),
        "flags": setting.flags,
        "problems": len(shares),
        "answers": len(own),
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "tokens": tokens,
        "tokens_per_second": tokens / sum(record["seconds"] for record in own),
        # the first token of an answer comes with the prompt
        "tokens_per_pass": (tokens - len(own)) / max(rounds, 1),
        "log_p_per_token": statistics.fmean(likelihood),
        "log_p_half_width": mean_and_half_width(_item_means(own, likelihood))[1] if len(shares) > 1 else None,
        "ess_fraction": statistics.fmean(fractions) / particles if fractions else None,
        "resamples_per_round": sum(record["resamples"] for record in own) / max(rounds, 1),
        "recoveries": sum(record["recoveries"] for record in own),
        "fell_back": statistics.fmean(record.get("fell_back", False) for record in own),
        "certificate_auc": certificate_auc(own),
        "different_texts": diversity(own),
    }
    return row | (_against(own, exact) if exact is not None and exact is not own else {})


def _against(own: list[dict[str, Any]], exact: list[dict[str, Any]]) -> dict[str, Any]:
    """Paired difference in accuracy, and MMD² of the answers' beginnings, over the problems that both have."""
    ours, theirs = by_item(own, "right"), by_item(exact, "right")
    common = [item for item in ours if item in theirs]
    found: dict[str, Any] = {}
    if len(common) > 1:  # a single difference says nothing about its own error
        mean, half = mean_and_half_width([ours[item] - theirs[item] for item in common])
        # where no problem tells them apart, how many more would is not known: 0 would be no interval
        found |= {"accuracy_gain": mean, "accuracy_gain_half_width": half or None}
    begins, others = _beginnings(own), _beginnings(exact)
    squares = [
        mmd_squared(begins[item], others[item]) for item in common if len(begins[item]) > 1 and len(others[item]) > 1
    ]
    if len(squares) > 1:
        mean, half = mean_and_half_width(squares)
        found |= {"mmd_squared": mean, "mmd_squared_half_width": half}
    return found


def by_item(records: Sequence[dict[str, Any]], name: str) -> dict[int, float]:
    """Mean of a field over the answers to each problem."""
    values: dict[int, list[float]] = defaultdict(list)
    for record in records:
        values[record["item"]].append(float(record[name]))
    return {item: statistics.fmean(each) for item, each in values.items()}


def _item_means(records: Sequence[dict[str, Any]], values: Sequence[float]) -> list[float]:
    return list(by_item([{"item": r["item"], "v": v} for r, v in zip(records, values, strict=True)], "v").values())


def _beginnings(records: Sequence[dict[str, Any]]) -> dict[int, dict[int, list[int]]]:
    found: dict[int, dict[int, list[int]]] = defaultdict(dict)
    for record in records:
        found[record["item"]][record["seed"]] = record["beginning"]
    return found


def kernel(one: Sequence[int], other: Sequence[int]) -> float:
    """Similarity of two beginnings: a factor of one half for each place where they differ, padding included."""
    longest = max(len(one), len(other))
    same = sum(a == b for a, b in zip(one, other, strict=False))
    return _MISMATCH ** (longest - same)


def mmd_squared(ours: Mapping[int, Sequence[int]], theirs: Mapping[int, Sequence[int]]) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy between two laws of token sequences; may be negative.

    Settings share their random numbers where they share a seed (the first token of target and speculative answers is the same
    one), so answers are compared across settings with different seeds only: those are independent.

    Args:
        ours, theirs: a sample a seed, at least two each.
    Source: Gretton et al. (2012), "A kernel two-sample test", JMLR 13, Lemma 6, eq. 4 (samples in pairs).
    """
    within = sum(statistics.fmean(kernel(a, b) for a, b in combinations(part.values(), 2)) for part in (ours, theirs))
    across = [kernel(a, b) for one, a in ours.items() for other, b in theirs.items() if one != other]
    return within - 2 * statistics.fmean(across)


def diversity(records: Sequence[dict[str, Any]]) -> float | None:
    """Share of pairs of answers to one problem whose texts differ; None where no problem has two."""
    texts: dict[int, list[str]] = defaultdict(list)
    for record in records:
        texts[record["item"]].append(record["text"])
    pairs = [a != b for own in texts.values() for a, b in combinations(own, 2)]
    return statistics.fmean(pairs) if pairs else None


def certificate_auc(records: Sequence[dict[str, Any]]) -> float | None:
    """How well log_evidence tells right answers from wrong ones.

    Returns:
        the chance that a right answer's is higher than a wrong one's, ties counting half; None where all are alike.
    """
    right = [record["log_evidence"] for record in records if record["right"]]
    wrong = [record["log_evidence"] for record in records if not record["right"]]
    if not right or not wrong or len({*right, *wrong}) == 1:
        return None
    wrong.sort()
    # wrong values below it, and half of those equal to it
    return statistics.fmean(bisect_left(wrong, a) + bisect_right(wrong, a) for a in right) / (2 * len(wrong))


def mark_pareto(rows: list[dict[str, Any]], cost: str) -> None:
    """Add `pareto_<cost>`: no setting of the same temperature (and top-p and so on) is better in both.

    Cheaper by less than 1 % counts as equally cheap: otherwise every setting that is a hair cheaper than one that is more
    accurate would be on the frontier too.
    """
    for row in rows:
        peers = [other for other in rows if _law(other) == _law(row)]
        row[f"pareto_{cost}"] = not any(
            (other["accuracy"] > row["accuracy"] and other[cost] >= _SAME_COST * row[cost])
            or (other["accuracy"] == row["accuracy"] and other[cost] > row[cost])
            for other in peers
        )


def _law(row: dict[str, Any]) -> str:
    return Setting.of(row["setting"]).law
