"""A server's health, and its metrics in Prometheus' text format."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client.registry import Collector

from .. import __version__, device
from ..experts.pool.stats import Counters
from ..serving.batches import n_waiting
from ..serving.owner import plan_of
from .record import Record

__all__ = ["CONTENT_TYPE", "Now", "expose", "health"]


@dataclass(frozen=True)
class Now:
    """A server's figures at one moment.

    ``experts`` are the streamer's counts, or None if experts are parameters.
    """

    record: Record
    experts: Counters | None
    n_slots: int
    n_experts: int
    expert_bytes: int
    budget_bytes: int | None
    process_bytes: int
    active_bytes: int
    peak_bytes: int
    n_queued: int
    n_prompts: int
    prompt_bytes: int
    most_prompt_bytes: int | None
    is_healthy: bool

    @classmethod
    def of(cls, generator: Any) -> Now:
        """Collect a server's figures without waiting for running requests."""
        model, kept = generator.model_provider.model, generator.prompt_cache
        streamer, plan = getattr(model, "streamer", None), plan_of(model)
        return cls(
            record=generator.record,
            experts=None if streamer is None else streamer.stats.total,
            n_slots=0 if streamer is None else streamer.n_slots,
            n_experts=0 if streamer is None else len(streamer.experts),
            expert_bytes=0 if streamer is None else streamer.memory_bytes,
            budget_bytes=None if plan is None else plan.budget_bytes,
            process_bytes=device.process_bytes() or 0,
            active_bytes=mx.get_active_memory(),
            peak_bytes=mx.get_peak_memory(),
            n_queued=generator.requests.qsize() + n_waiting(),
            n_prompts=len(kept),
            prompt_bytes=kept.nbytes,
            most_prompt_bytes=generator.cli_args.prompt_cache_bytes,
            is_healthy=generator.is_healthy,
        )


def health(generator: Any) -> tuple[int, bytes]:
    """Return the server's health in the form of mlx-lm's server."""
    healthy = generator.is_healthy
    status = {"status": "ok" if healthy else "unavailable"}
    return 200 if healthy else 503, json.dumps(status).encode()


def expose(generator: Any) -> tuple[int, bytes]:
    """Return all metrics in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Metrics(generator))
    return 200, generate_latest(registry)


class _Metrics(Collector):
    def __init__(self, generator: Any):
        self._generator = generator

    def collect(self) -> Iterator[Metric]:
        now = Now.of(self._generator)
        about = {"version": __version__, "model": self._generator.served_names[0]}
        yield InfoMetricFamily("moeflux", "Version and served model", about)
        yield from _of_requests(now)
        yield from _of_memory(now)
        if now.experts is not None:
            yield from _of_experts(now, now.experts)


def _of_requests(now: Now) -> Iterator[Metric]:
    record = now.record
    requests = CounterMetricFamily(
        "moeflux_requests", "Finished requests for text by status", labels=["status"]
    )
    for status, n in record.ended().items():
        requests.add_metric([str(status)], n)
    yield requests
    tokens = CounterMetricFamily(
        "moeflux_tokens",
        "Tokens of prompts, of kept prompts, and generated",
        labels=["of"],
    )
    tokens.add_metric(["prompt"], record.prompt_tokens)
    tokens.add_metric(["kept_prompt"], record.cached_tokens)
    tokens.add_metric(["generation"], record.generated_tokens)
    yield tokens
    yield _gauge("requests_open", "Requests in progress", record.n_open)
    yield _gauge("queue_length", "Requests that have not started", now.n_queued)


def _of_memory(now: Now) -> Iterator[Metric]:
    gauges = {
        "mlx_active_bytes": ("Memory of MLX's arrays", now.active_bytes),
        "mlx_peak_bytes": ("Peak memory of MLX's arrays", now.peak_bytes),
        "process_bytes": ("Memory of the process", now.process_bytes),
        "memory_budget_bytes": ("Memory budget of the process", now.budget_bytes),
        "prompt_cache_bytes": ("Memory of kept prompts", now.prompt_bytes),
        "prompt_cache_limit_bytes": (
            "Bound of the memory of kept prompts",
            now.most_prompt_bytes,
        ),
        "prompt_cache_prompts": ("Number of kept prompts", now.n_prompts),
    }
    for name, (text, value) in gauges.items():
        if value is not None:
            yield _gauge(name, text, value)


def _of_experts(now: Now, experts: Counters) -> Iterator[Metric]:
    counters = {
        "hits": ("Requested experts that were in memory", experts.hits),
        "misses": ("Requested experts that were not in memory", experts.misses),
        "read_ahead": ("Experts read before they were requested", experts.read_ahead),
        "read_bytes": ("Bytes of experts read", experts.read_bytes),
        "read_seconds": ("Reading time, summed over threads", experts.read_seconds),
        "wait_seconds": (
            "Time that computation waited for experts",
            experts.wait_seconds,
        ),
        "second_tries": (
            "Reads that were repeated after a failure",
            experts.second_tries,
        ),
    }
    for name, (text, value) in counters.items():
        yield CounterMetricFamily(f"moeflux_expert_{name}", text, value)
    yield _gauge("expert_slots", "Experts that fit into memory", now.n_slots)
    yield _gauge("experts", "Experts of all layers", now.n_experts)
    yield _gauge("expert_memory_bytes", "Memory for experts", now.expert_bytes)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"moeflux_{name}", text, value)
