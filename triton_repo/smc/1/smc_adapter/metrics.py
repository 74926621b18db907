"""Metrics of the contract, on the server's own metrics endpoint.

The executor sends its figures once a second. The model `tensorrt_llm` publishes them as the nv_trt_llm_* families, with the
names and labels that dashboards and gateways for the TensorRT-LLM backend look for; `smc` publishes the smc_* families, which
are ours. Every model counts the tokens of its own requests (nv_llm_*).

    smc_ess_mean{model="smc"} 3.2            mean effective sample size of the last rounds
    nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="used",model="tensorrt_llm",version="1"} 118
"""

from __future__ import annotations

import math
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
        {
            "max": "pages_total",
            "used": "pages_used",
            "free": "pages_free",
            "fraction": "pages_fraction",
            "tokens_per": "page_size",
        },
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


# Upper bounds of the token histograms, those of the TensorRT-LLM backend.
_BUCKETS = (10, 50, 100, 500, 1000)


class ExecutorMetrics:
    """The executor's report as metric families.

    Args:
        model: tensorrt_llm and smc each publish their families, other models none.
    """

    def __init__(self, model: str) -> None:
        self._families = []
        self._gauges = []
        self._counters: list[tuple[str, Any]] = []
        self._last: dict[str, float] = {}
        self._started = None
        for name, label, values in _LABELLED if model == "tensorrt_llm" else ():
            family = self._family(name, f"executor state by {label}", pb_utils.MetricFamily.GAUGE)
            for value, key in values.items():
                self._gauges.append((key, family.Metric(labels={"model": model, "version": "1", label: value})))
        for name, (key, text) in _GAUGES.items() if model == "smc" else ():
            self._gauges.append(
                (key, self._family(name, text, pb_utils.MetricFamily.GAUGE).Metric(labels={"model": model}))
            )
        for name, (key, text) in _COUNTERS.items() if model == "smc" else ():
            self._counters.append(
                (key, self._family(name, text, pb_utils.MetricFamily.COUNTER).Metric(labels={"model": model}))
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
    """Input and output tokens of one model's requests, as histograms.

    The Python backend of the wheel's server has no histograms, so that their series are counters with a histogram's names and
    labels; queries cannot tell.

    Args:
        model: its name.
    """

    def __init__(self, model: str) -> None:
        self._families = []
        self._metrics: dict[str, Any] = {}
        for key, name, kind in (
            ("prompt_tokens", "nv_llm_input_token_len", "total_input_tokens"),
            ("output_tokens", "nv_llm_output_token_len", "total_output_tokens"),
        ):
            labels = {"model": model, "response_metric_type": kind, "version": "1"}
            for suffix, text in (("sum", "tokens"), ("count", "requests")):
                self._metrics[f"{key}_{suffix}"] = self._family(f"{name}_{suffix}", text).Metric(labels=labels)
            family = self._family(f"{name}_bucket", "requests by length")
            for bound in (*_BUCKETS, math.inf):
                limit = "+Inf" if bound == math.inf else str(bound)
                self._metrics[f"{key}_{bound}"] = family.Metric(labels={**labels, "le": limit})

    def _family(self, name: str, text: str) -> Any:
        description = f"{text} of finished requests"
        family = pb_utils.MetricFamily(name=name, description=description, kind=pb_utils.MetricFamily.COUNTER)
        self._families.append(family)
        return family

    def observe(self, info: Mapping[str, Any]) -> None:
        """Count a finished request."""
        for key in ("prompt_tokens", "output_tokens"):
            if key in info:
                self._metrics[f"{key}_sum"].increment(float(info[key]))
                self._metrics[f"{key}_count"].increment(1.0)
                for bound in (*_BUCKETS, math.inf):
                    if info[key] <= bound:
                        self._metrics[f"{key}_{bound}"].increment(1.0)
