"""The workloads by name, in the order of the table."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from benchmarks import growth, speed
from benchmarks.lab import Lab
from benchmarks.results import Result


@dataclass(frozen=True, slots=True)
class Workload:
    """Something to measure."""

    measure: Callable[[Lab], Awaitable[Result]]
    needs_postgres: bool = False


WORKLOADS: Mapping[str, Workload] = {
    "sqlite-alone": Workload(speed.sqlite_alone),
    "postgres-alone": Workload(speed.postgres_alone, needs_postgres=True),
    "concurrent": Workload(speed.concurrent, needs_postgres=True),
    "chat-size": Workload(growth.chat_size),
    "long-chat": Workload(growth.long_chat),
    "fresh-savers": Workload(growth.fresh_savers),
    "static-value": Workload(speed.static_value, needs_postgres=True),
    "load-head": Workload(growth.load_head),
    "sync-api": Workload(speed.sync_api, needs_postgres=True),
}
