"""The workloads by name, in the order of the table."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from benchmarks import (
    effects,
    fingerprints,
    growth,
    hashing,
    retention,
    runtime,
    speed,
    verification,
)
from benchmarks.lab import Lab
from benchmarks.results import Result


@dataclass(frozen=True, slots=True)
class Workload:
    """Something to measure."""

    measure: Callable[[Lab], Awaitable[Result]]
    needs_postgres: bool = False
    is_long: bool = False
    """Whether it is measured only if it is asked for by name."""


WORKLOADS: Mapping[str, Workload] = {
    "sqlite-alone": Workload(speed.sqlite_alone),
    "postgres-alone": Workload(speed.postgres_alone, needs_postgres=True),
    "concurrent": Workload(speed.concurrent, needs_postgres=True),
    "chat-size": Workload(growth.chat_size),
    "long-chat": Workload(growth.long_chat),
    "fresh-savers": Workload(growth.fresh_savers),
    "static-value": Workload(speed.static_value, needs_postgres=True),
    "load-head": Workload(growth.load_head),
    "prune": Workload(retention.prune),
    "prune-million": Workload(retention.prune_million, is_long=True),
    "hashing": Workload(hashing.hashing, needs_postgres=True),
    "encryption": Workload(speed.encryption, needs_postgres=True),
    "sync-api": Workload(speed.sync_api, needs_postgres=True),
    "verify": Workload(verification.verify),
    "fingerprint": Workload(fingerprints.fingerprint),
    "runtime-steps": Workload(runtime.steps, needs_postgres=True),
    "runtime-latency": Workload(runtime.latency, needs_postgres=True),
    "runtime-expiry": Workload(runtime.expiry, needs_postgres=True),
    "runtime-claims": Workload(runtime.claims, needs_postgres=True),
    "runtime-idle": Workload(runtime.idle, needs_postgres=True),
    "effects": Workload(effects.speed, needs_postgres=True),
    "effects-recorded": Workload(effects.recorded),
}
