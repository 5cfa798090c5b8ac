"""What is counted and measured, in Prometheus' form. Units are seconds and bytes, as its conventions ask."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from voicegate import card, logs
from voicegate.engine import Capabilities, Engine, Info, Options, Rank, Segment, Source, Status

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_FACTORS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 5, 10)
# Events of the log that are counted, and what they are called there.
_ENGINE_EVENTS = {
    "engine_started": "start",
    "engine_ended": "end",
    "engine_stuck": "stuck",
    "model_unloaded": "unload",
    "model_load_failed": "load_failure",
}


@dataclass(frozen=True)
class Gpu:
    """A card's memory in bytes."""

    name: str
    total: int
    used: int
    free: int


def read_gpu(index: int) -> Gpu | None:
    found = card.read(index)
    if found is None:
        return None
    mib = card.MIB
    return Gpu(found.name, found.total_mib * mib, found.used_mib * mib, found.free_mib * mib)


GpuReader = Callable[[], Gpu | None]  # None: not known now
# What `peace.counted` gives: decisions by step, evictions and repairs by model.
TurnsReader = Callable[[], Mapping[str, Mapping[str, int]]]
_TURNS = {
    "decisions": ("step", "Decisions about the card's memory before the model was loaded"),
    "evictions": ("model", "Models that Ollama was asked to let go"),
    "repairs": ("model", "Models of Ollama that were loaded again without layers on the CPU"),
}


class Metrics:
    """One per server. Other parts make their own counters in `registry`, or count events of the log."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self.requests = self.counter("requests", "Requests answered", "method", "route", "status")
        self.request_seconds = self.histogram(
            "request_duration_seconds", "From a request's first byte to the answer's last", _SECONDS, "route"
        )
        self.by_key = self.counter("key_requests", "Requests by the name of their API key", "key")
        self.errors = self.counter("errors", "Requests that failed, by the error's code", "code")
        self.wait_seconds = self.histogram(
            "queue_wait_seconds", "Waiting before the engine takes a request", _SECONDS
        )
        self.transcription_seconds = self.histogram(
            "transcription_seconds", "The engine's work on one request", _SECONDS
        )
        self.real_time_factor = self.histogram(
            "real_time_factor", "The engine's seconds for one second of audio", _FACTORS
        )
        self.audio_seconds = self.counter("audio_seconds", "Audio transcribed, in seconds")
        self.engine_events = self.counter(
            "engine_events", "Starts and ends of the engine's process, unloads, failures to load", "event"
        )
        for name, label in _ENGINE_EVENTS.items():
            self.count_event(name, self.engine_events.labels(label))

    def gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        """`voicegate_NAME`, asked for whenever the metrics are."""
        Gauge(f"voicegate_{name}", help, registry=self.registry).set_function(read)

    def counter(self, name: str, help: str, *labels: str) -> Counter:
        """`voicegate_NAME_total`."""
        return Counter(f"voicegate_{name}", help, labels, registry=self.registry)

    def histogram(self, name: str, help: str, buckets: Iterable[float], *labels: str) -> Histogram:
        return Histogram(f"voicegate_{name}", help, labels, buckets=tuple(buckets), registry=self.registry)

    def count_event(self, name: str, counter: Counter) -> None:
        """From now on `counter` counts the events `name` of the log."""

        def observe(event: str, fields: Mapping[str, Any]) -> None:
            if event == name:
                counter.inc()

        logs.observers.append(observe)

    def watch(self, engine: Engine, gpu: GpuReader | None, turns: TurnsReader | None = None) -> None:
        """Read the engine's state and the card's memory whenever somebody asks for the metrics."""
        self.registry.register(_State(engine, gpu, turns))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _State(Collector):
    def __init__(self, engine: Engine, gpu: GpuReader | None, turns: TurnsReader | None) -> None:
        self._engine = engine
        self._gpu = gpu
        self._turns = turns

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterable[Metric]:
        status = self._engine.status()
        for name, help, value in (
            ("queue_waiting", "Requests that wait", status.waiting),
            ("queue_running", "Requests that the engine works on", status.running),
            ("queue_limit", "Requests that may wait", status.queue_limit),
            ("model_loaded", "1 while the model is in memory", int(status.state == "loaded")),
        ):
            yield GaugeMetricFamily(f"voicegate_{name}", help, value=value)
        for kind, counts in (self._turns() if self._turns else {}).items():
            label, help = _TURNS[kind]
            counted = CounterMetricFamily(f"voicegate_vram_{kind}", help, labels=(label,))
            for named, count in counts.items():
                counted.add_metric((named,), count)
            yield counted
        gpu = self._gpu() if self._gpu else None
        if gpu is not None:
            family = GaugeMetricFamily(
                "voicegate_gpu_memory_bytes", "Memory of the card", labels=("gpu", "kind")
            )
            for kind, size in (("total", gpu.total), ("used", gpu.used), ("free", gpu.free)):
                family.add_metric((gpu.name, kind), size)
            yield family


class _Timed:
    """A source that knows when the engine took it: then the waiting is over."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.taken: float | None = None

    def descriptor(self) -> int:
        if self.taken is None:
            self.taken = time.monotonic()
        return self._source.descriptor()


class MeasuredEngine:
    """An engine, and how long it takes."""

    def __init__(self, engine: Engine, metrics: Metrics) -> None:
        self._engine = engine
        self._metrics = metrics

    async def start(self) -> None:
        await self._engine.start()

    async def stop(self) -> None:
        await self._engine.stop()

    def status(self) -> Status:
        return self._engine.status()

    def capabilities(self) -> Capabilities | None:
        return self._engine.capabilities()

    def check_room(self) -> None:
        self._engine.check_room()

    async def transcribe(
        self, source: Source, options: Options, rank: Rank = Rank.INTERACTIVE, client: str = ""
    ) -> AsyncGenerator[Info | Segment, None]:
        asked = time.monotonic()
        timed = _Timed(source)
        info: Info | None = None
        async with aclosing(self._engine.transcribe(timed, options, rank, client)) as items:
            async for item in items:
                if isinstance(item, Info):
                    info = item
                yield item
        # Only what was done to its end: half a transcription has no speed.
        # And a draft is audio that comes again.
        if info is None or timed.taken is None or options.draft:
            return
        seconds = time.monotonic() - timed.taken
        self._metrics.wait_seconds.observe(timed.taken - asked)
        self._metrics.transcription_seconds.observe(seconds)
        self._metrics.audio_seconds.inc(info.duration)
        if info.duration > 0:
            self._metrics.real_time_factor.observe(seconds / info.duration)
