"""The metrics for Prometheus: every counter, gauge and histogram (the home of prometheus-client).

With several workers the values are in files of one folder, one set for each process, and the worker that is scraped adds them
up (prometheus-client's multiprocess mode); the files of a worker that has ended are merged into one.
"""

import asyncio
import fcntl
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from gateway.audit.record import Record
from gateway.core.errors import (
    BudgetSpent,
    ConflictingKeys,
    LimitReached,
    MissingKey,
    QueueFull,
    QueueTimeout,
    TooManyFailures,
    WrongKey,
)
from gateway.fleet.attempt import CANNOT

CONTENT_TYPE = CONTENT_TYPE_LATEST
# Read by prometheus-client when it is imported.
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
LOCK, DEAD = "lock", "dead"
OTHER = "other"
ATTEMPTS, AGAIN_S = 5, 0.02
# Shorter times are not those of a queue.
SHORTEST_S = 1e-6
# Parts of a second.
FRACTION = 2**20
LIMITED = frozenset(f"refused:{kind.code}" for kind in (LimitReached, BudgetSpent))
UNKNOWN_CALLERS = frozenset(f"refused:{kind.code}" for kind in (MissingKey, WrongKey, ConflictingKeys, TooManyFailures))
QUEUE_REFUSALS = {f"refused:{kind.code}": kind.code for kind in (QueueFull, QueueTimeout)}
COUNTED_REFUSALS = LIMITED | UNKNOWN_CALLERS | QUEUE_REFUSALS.keys()
# Seconds: whole answers of large models take minutes, the gateway adds milliseconds.
LONG = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 900)
ERRORS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2, 4, 8)
SHORT = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)


class Children(NamedTuple):
    """The metrics of one combination of labels, looked up once."""

    requests: Any
    prompt: Any
    completion: Any
    cached: Any
    duration: Any
    first_byte: Any
    overhead: Any


class Metrics:
    def __init__(self, folder: Path | None = None) -> None:
        # The creation time of a counter is of no use: the first scrape shows it.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._folder = folder
        self._registry = CollectorRegistry()
        self._children: dict[tuple[str, str, str, str], Children] = {}
        self._uncounted_seconds: defaultdict[tuple[str, str, str], float] = defaultdict(float)
        self._uncounted_choices: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._collecting: asyncio.Lock = asyncio.Lock()
        self._declare_requests()
        self._declare_backends()
        self._declare_loads()
        self._declare_fleet()
        self._declare_costs()
        self._declare_stores()
        self._declare_process()

    def _counter(self, name: str, words: str, *labels: str) -> Counter:
        return Counter(name, words, labels, registry=self._registry)

    def _gauge(self, name: str, words: str, *labels: str, of_all: Any) -> Gauge:
        return Gauge(name, words, labels, registry=self._registry, multiprocess_mode=of_all)

    def _histogram(self, name: str, words: str, *labels: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, words, labels, registry=self._registry, buckets=buckets)

    def _declare_requests(self) -> None:
        self.requests = self._counter(
            "gateway_requests", "Finished requests, excluding operators' read requests", "dialect", "route", "model", "outcome"
        )
        self.tokens = self._counter("gateway_tokens", "Tokens, as counted or estimated for the audit", "kind", "model")
        self.translated = self._counter(
            "gateway_translated_requests", "Requests that were translated for a backend, to its path `to`", "dialect", "to"
        )
        self.cached = self._counter("gateway_cached_tokens", "Prompt tokens that backends reported as cached", "model")
        self.duration = self._histogram(
            "gateway_request_duration_seconds", "From the head of a request to the end of its answer", "dialect", buckets=LONG
        )
        self.first_byte = self._histogram(
            "gateway_time_to_first_byte_seconds",
            "From the head of a request to the first byte of its answer",
            "dialect",
            buckets=LONG,
        )
        self.overhead = self._histogram(
            "gateway_overhead_seconds",
            "Time that the gateway added until the first byte, excluding time in the queue",
            "dialect",
            buckets=SHORT,
        )
        self.queue = self._histogram("gateway_queue_wait_seconds", "Time spent waiting for a slot of the key", buckets=LONG)
        self.refused = self._counter("gateway_limit_refusals", "Requests refused by a limit", "limit")
        self.auth_failures = self._counter("gateway_auth_failures", "Requests with a wrong key, or with none")
        self.in_flight = self._gauge(
            "gateway_requests_in_flight", "Requests in progress, excluding the admin API", of_all="livesum"
        )
        self.waiting = self._gauge("gateway_requests_waiting", "Requests that wait for a slot of their key", of_all="livesum")

    def _declare_backends(self) -> None:
        self.attempts = self._counter("gateway_backend_attempts", "Calls sent to a backend", "backend")
        self.failures = self._counter("gateway_backend_failures", "Calls that a backend failed", "backend", "reason")
        self.backend_in_flight = self._gauge(
            "gateway_backend_requests_in_flight", "Calls in progress at a backend", "backend", of_all="livesum"
        )
        self.backend_up = self._gauge(
            "gateway_backend_up",
            "1 if a backend answered the last poll for its models",
            "backend",
            of_all="livemostrecent",
        )
        self.seconds = self._counter(
            "gateway_backend_seconds",
            "Seconds of backends: loading, reading prompts and generating as reported, else for how long slots were held",
            "backend",
            "model",
            "part",
        )
        self.breaker = self._gauge(
            "gateway_backend_breaker_state", "0 closed, 1 trying again, 2 open", "backend", of_all="livemax"
        )

    def _declare_loads(self) -> None:
        def gauge(name: str, words: str, *more: str) -> Gauge:
            return self._gauge(f"gateway_backend_{name}", words, "backend", *more, of_all="livemostrecent")

        self.slots = gauge("slots", "How many calls a backend answers at the same time with a model", "model", "source")
        self.loaded_models = gauge("loaded_models", "Models that a backend has loaded on demand")
        self.vram_used = gauge("vram_used_bytes", "VRAM of the models that a backend has loaded")
        self.vram_seen = gauge("vram_seen_bytes", "The most VRAM that a backend was seen to use")
        self.loads_seen = gauge("loads_seen", "Loads of models that were seen, whoever caused them")
        self.evictions_seen = gauge("evictions_seen", "Models that were seen to go before their time")

    def _declare_fleet(self) -> None:
        def gauge(name: str, words: str, *labels: str) -> Gauge:
            return self._gauge(name, words, *labels, of_all="livemostrecent")

        self.queue_calls = gauge("gateway_fleet_queue_calls", "Calls that wait for a backend, of all processes", "model")
        self.queue_tokens = gauge("gateway_fleet_queue_tokens", "Tokens of their prompts", "model")
        self.queue_oldest = gauge("gateway_fleet_queue_oldest_seconds", "How long the first of them has waited", "model")
        self.slots_in_use = gauge(
            "gateway_backend_slots_in_use", "Slots of a backend that are in use, by all processes", "backend", "model"
        )
        self.fleet_wait = self._histogram(
            "gateway_fleet_wait_seconds", "Time spent waiting for a slot of a backend, of calls that waited", buckets=LONG
        )
        self.choices = self._counter(
            "gateway_fleet_choices", "Calls by the backend that was chosen last, and why", "backend", "because"
        )
        self.queue_refusals = self._counter(
            "gateway_fleet_queue_refusals", "Calls refused by the queue: it was full, or took too long", "model", "reason"
        )
        self.estimate_error = self._histogram(
            "gateway_fleet_estimate_error_ratio",
            "By which part of it the estimated time to the first byte of a stream differed from the real one",
            buckets=ERRORS,
        )
        self.estimated_seconds = self._counter(
            "gateway_fleet_estimated_seconds", "The estimated and the real times of these streams, added up", "kind"
        )

    def _declare_costs(self) -> None:
        by_model = "backend", "model"
        self.load_s = self._gauge(
            "gateway_backend_load_seconds", "Learned: to load a model", *by_model, of_all="livemostrecent"
        )
        self.prefill_tps = self._gauge(
            "gateway_backend_prefill_tokens_per_second",
            "Learned: tokens of a prompt that were not cached",
            *by_model,
            of_all="livemostrecent",
        )
        self.decode_tps = self._gauge(
            "gateway_backend_decode_tokens_per_second", "Learned: tokens of an answer", *by_model, of_all="livemostrecent"
        )
        self.call_s = self._gauge(
            "gateway_backend_call_seconds", "Learned: a call without loading its model", *by_model, of_all="livemostrecent"
        )

    def _declare_stores(self) -> None:
        self.store_calls = self._counter("gateway_store_calls", "Commands and queries sent to a store", "store")
        self.store_errors = self._counter("gateway_store_errors", "Commands and queries that failed", "store")
        self.store_up = self._gauge("gateway_store_up", "1 if a store is reachable", "store", of_all="livemin")
        self.degraded = self._gauge(
            "gateway_limits_degraded", "1 while processes admit their share of each limit without Redis", of_all="livemax"
        )
        self.held = self._gauge("gateway_audit_rows_held", "Audit rows that wait in processes for a store", of_all="livesum")
        self.backlog = self._gauge(
            "gateway_audit_rows_waiting", "Audit rows that wait in Redis for PostgreSQL", of_all="livemostrecent"
        )
        self.written = self._counter("gateway_audit_rows_written", "Audit rows written to PostgreSQL")
        self.dropped = self._counter("gateway_audit_rows_dropped", "Audit rows lost while both stores were unreachable")

    def _declare_process(self) -> None:
        self.lag = self._histogram("gateway_event_loop_lag_seconds", "How late a timer fires", buckets=SHORT)
        self.draining = self._gauge("gateway_draining", "Processes that accept no new requests", of_all="livesum")

    def families(self) -> list[Metric]:
        """All metrics with their help texts, in the order of declaration."""
        return list(self._registry.collect())

    def ended(self, record: Record) -> None:
        """Counts one request with its outcome."""
        model = record.canonical or (OTHER if record.model else "")
        labels = (record.dialect, record.route, model, record.outcome)
        children = self._children.get(labels) or self._remembered(labels)
        children.requests.inc()
        children.duration.observe(time.monotonic() - record.began)
        if record.spent_prompt:
            children.prompt.inc(record.spent_prompt)
        if record.spent_completion:
            children.completion.inc(record.spent_completion)
        if record.spent_cached:
            children.cached.inc(record.spent_cached)
        if record.translated_to:
            self.translated.labels(record.dialect, record.translated_to).inc()
        if record.first_byte_at is not None:
            children.first_byte.observe(record.first_byte_at - record.began)
            children.overhead.observe(record.overhead_s)
        if record.queue_ms:
            self._count_waits(record)
        if record.backend or record.attempts or record.backend_s:
            self._count_attempts(record)
            self._count_seconds(record, model)
        if record.estimated_s is not None:
            self._count_estimate(record, record.estimated_s)
        if record.outcome in COUNTED_REFUSALS:
            self._count_refusal(record, model)

    def _remembered(self, labels: tuple[str, str, str, str]) -> Children:
        dialect, _, model, _ = labels
        children = self._children[labels] = Children(
            self.requests.labels(*labels),
            self.tokens.labels("prompt", model),
            self.tokens.labels("completion", model),
            self.cached.labels(model),
            self.duration.labels(dialect),
            self.first_byte.labels(dialect),
            self.overhead.labels(dialect),
        )
        return children

    def _count_waits(self, record: Record) -> None:
        of_key_s = record.queue_ms / 1000 - record.fleet_wait_s
        if record.fleet_wait_s:
            self.fleet_wait.observe(record.fleet_wait_s)
        if of_key_s > SHORTEST_S:
            self.queue.observe(of_key_s)

    def _count_refusal(self, record: Record, model: str) -> None:
        if record.outcome in LIMITED:
            self.refused.labels(record.detail or OTHER).inc()
        elif record.outcome in QUEUE_REFUSALS:
            self.queue_refusals.labels(model, QUEUE_REFUSALS[record.outcome]).inc()
        else:
            self.auth_failures.inc()

    def _count_estimate(self, record: Record, estimated_s: float) -> None:
        """From when the call asked for a slot of a backend; only a stream begins with its first token."""
        if not record.stream or record.first_byte_at is None:
            return
        of_key_s = record.queue_ms / 1000 - record.fleet_wait_s
        real_s = record.first_byte_at - record.began - record.reading_s - of_key_s
        if real_s > SHORTEST_S:
            self.estimate_error.observe(abs(estimated_s - real_s) / real_s)
            self.estimated_seconds.labels("estimated").inc(estimated_s)
            self.estimated_seconds.labels("real").inc(real_s)

    def _count_attempts(self, record: Record) -> None:
        if record.backend:
            self.attempts.labels(record.backend).inc()
        for attempt in record.attempts:
            self.attempts.labels(attempt.backend).inc()
            if attempt.fault != CANNOT:
                self.failures.labels(attempt.backend, attempt.fault).inc()

    def _count_seconds(self, record: Record, model: str) -> None:
        """The parts of all backends add up to what the audit has of the request."""
        usage, backend, seconds = record.usage, record.slot_backend, self._uncounted_seconds
        if record.chosen_because:
            self._uncounted_choices[backend, record.chosen_because] += 1
        if record.seconds_from == "reported":
            seconds[backend, model, "load"] += usage.load_s or 0.0
            seconds[backend, model, "prefill"] += usage.prefill_s or 0.0
            seconds[backend, model, "decode"] += usage.decode_s or 0.0
        elif record.slot_s:
            seconds[backend, model, "slot"] += record.slot_s
        for attempt in record.attempts:
            seconds[attempt.backend, model, "slot"] += attempt.occupied_s

    def count_sums(self) -> None:
        """Counts what was summed up since the last time, because counting takes long for each request."""
        for labels, seconds in self._uncounted_seconds.items():
            if seconds:
                # Sums of such fractions are exact in any order: a counter must not shrink when files are merged.
                self.seconds.labels(*labels).inc(round(seconds * FRACTION) / FRACTION)
        self._uncounted_seconds.clear()
        for labels_of_choice, count in self._uncounted_choices.items():
            self.choices.labels(*labels_of_choice).inc(count)
        self._uncounted_choices.clear()

    async def exposition(self) -> bytes:
        """The text for Prometheus, of all workers; made in a thread, because adding up many files takes time."""
        self.count_sums()
        async with self._collecting:
            return await asyncio.to_thread(self._collected)

    def _collected(self) -> bytes:
        if self._folder is None:
            return generate_latest(self._registry)
        for _ in range(ATTEMPTS - 1):
            # A starting worker creates its files in steps, and an empty file cannot be read yet.
            with suppress(OSError, ValueError, struct.error):
                return _of_all(self._folder)
            time.sleep(AGAIN_S)
        return _of_all(self._folder)


def _of_all(folder: Path) -> bytes:
    registry = CollectorRegistry()
    with locked(folder, fcntl.LOCK_SH):
        MultiProcessCollector(registry, path=str(folder))  # type: ignore[no-untyped-call]
        return generate_latest(registry)


@contextmanager
def locked(folder: Path, how: int) -> Iterator[None]:
    """Prevents adding up the files while two of them contain the same counts."""
    with (folder / LOCK).open("ab") as file:
        fcntl.flock(file, how)
        yield


def merge_ended(folder: Path, pid: int) -> None:
    """Removes the gauges of a worker that has ended, and adds its counts to those of earlier workers."""
    with locked(folder, fcntl.LOCK_EX), suppress(OSError):
        mark_process_dead(pid, path=str(folder))  # type: ignore[no-untyped-call]
        for kind in ("counter", "histogram"):
            file = folder / f"{kind}_{pid}.db"
            if file.exists():
                _merge(file, folder / f"{kind}_{DEAD}.db")
                file.unlink()


def _merge(file: Path, into: Path) -> None:
    sums = MmapedDict(str(into))  # type: ignore[no-untyped-call]
    try:
        known = {key: value for key, value, *_ in sums.read_all_values()}  # type: ignore[no-untyped-call]
        for key, value, *_ in MmapedDict.read_all_values_from_file(str(file)):  # type: ignore[no-untyped-call]
            sums.write_value(key, known.get(key, 0.0) + value, 0.0)  # type: ignore[no-untyped-call]
    finally:
        sums.close()  # type: ignore[no-untyped-call]
