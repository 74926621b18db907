"""Metrics of the contract, on the server's own metrics endpoint.

The model `smc` publishes the executor's figures (it sends them once a second); every model counts its own tokens. Names
and labels of the nv_* families are those dashboards for the TensorRT-LLM backend expect; the smc_* families are ours.

    smc_ess_mean{model="smc"} 3.2            mean effective sample size of the rounds since the last report
    nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="smc",version="1"} 118
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton_python_backend_utils as pb_utils

# pb_utils gets MetricFamily only after a model's modules are imported, so it is looked up when used.
# family, label, {label value: key of the executor's report}
_LABELLED = (
    (
        "nv_trt_llm_request_metrics",
        "request_type",
        {
            "active": "running",
            "max": "max_groups",
            "scheduled": "decoding",
            "context": "prefilling",
            "waiting": "waiting",
        },
    ),
    (
        "nv_trt_llm_kv_cache_block_metrics",
        "kv_cache_block_type",
        {"max": "pages_total", "used": "pages_used", "free": "pages_free", "tokens_per": "page_size"},
    ),
    (
        "nv_trt_llm_inflight_batcher_metrics",
        "inflight_batcher_specific_metric",
        {"generation_requests": "decoding", "context_requests": "prefilling", "scheduled_requests": "running"},
    ),
)
_GAUGES = {
    "smc_tokens_per_second": ("tokens_per_second", "answer tokens handed out a second, over the last report"),
    "smc_ess_mean": ("ess_mean", "mean effective sample size of the last report's rounds"),
    "smc_pages_cached": ("pages_cached", "KV pages held by the prefix cache"),
    "smc_clients": ("num_clients", "adapters connected to the executor"),
}
_COUNTERS = {
    "smc_rounds_total": ("rounds", "rounds run"),
    "smc_resamples_total": ("resamples", "rounds that resampled"),
    "smc_recoveries_total": ("recoveries", "rounds that ended early because all particles were dead"),
    "smc_settled_tokens_total": ("tokens", "answer tokens settled and handed out"),
    "smc_requests_total": ("requests", "requests accepted"),
    "smc_requests_refused_total": ("refused", "requests refused: invalid, queue full or draining"),
    "smc_requests_cancelled_total": ("cancelled", "requests cancelled"),
    "smc_requests_failed_total": ("failed", "requests ended by an error or a deadline"),
}


class ExecutorMetrics:
    """The executor's report as metric families."""

    def __init__(self) -> None:
        self._families = []
        self._gauges = []
        self._counters: list[tuple[str, Any]] = []
        self._last: dict[str, float] = {}
        self._started = None
        for name, label, values in _LABELLED:
            family = self._family(name, f"executor state by {label}", pb_utils.MetricFamily.GAUGE)
            for value, key in values.items():
                labels = {"model": "smc", "version": "1", label: value}
                self._gauges.append((key, family.Metric(labels=labels)))
        for name, (key, text) in _GAUGES.items():
            self._gauges.append(
                (key, self._family(name, text, pb_utils.MetricFamily.GAUGE).Metric(labels={"model": "smc"}))
            )
        for name, (key, text) in _COUNTERS.items():
            self._counters.append(
                (key, self._family(name, text, pb_utils.MetricFamily.COUNTER).Metric(labels={"model": "smc"}))
            )

    def _family(self, name: str, text: str, kind: Any) -> Any:
        family = pb_utils.MetricFamily(name=name, description=text, kind=kind)
        self._families.append(family)
        return family

    def update(self, stats: Mapping[str, Any]) -> None:
        """Publish one report of the executor."""
        for key, metric in self._gauges:
            metric.set(float(stats[key]))
        if stats["started"] != self._started:  # a new executor counts from zero
            self._started, self._last = stats["started"], {}
        for key, metric in self._counters:
            metric.increment(float(stats[key]) - self._last.get(key, 0.0))
            self._last[key] = float(stats[key])


class TokenMetrics:
    """Input and output tokens of one model's requests.

    Args:
        model: its name.
    """

    def __init__(self, model: str) -> None:
        self._families = []
        self._metrics: dict[str, Any] = {}
        for key, name in (("prompt_tokens", "nv_llm_input_token_len"), ("output_tokens", "nv_llm_output_token_len")):
            for suffix, text in (("sum", "tokens"), ("count", "requests")):
                family = pb_utils.MetricFamily(
                    name=f"{name}_{suffix}",
                    description=f"{text} of finished requests",
                    kind=pb_utils.MetricFamily.COUNTER,
                )
                self._families.append(family)
                self._metrics[f"{key}_{suffix}"] = family.Metric(labels={"model": model, "version": "1"})

    def observe(self, info: Mapping[str, Any]) -> None:
        """Count a finished request."""
        for key in ("prompt_tokens", "output_tokens"):
            if key in info:
                self._metrics[f"{key}_sum"].increment(float(info[key]))
                self._metrics[f"{key}_count"].increment(1.0)
