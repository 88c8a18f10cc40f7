"""The spans that this test process makes, kept in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import cast

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


class Spans:
    """What was recorded, by name."""

    def __init__(self, exporter: InMemorySpanExporter) -> None:
        self._exporter = exporter

    def all(self) -> list[ReadableSpan]:
        """List the ended spans, in the order in which they ended."""
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        """List the ended spans whose name starts with `name`."""
        return [span for span in self.all() if span.name.startswith(name)]


@cache
def _exporter() -> InMemorySpanExporter:
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        # One for the whole process: OpenTelemetry takes no second one.
        provider = TracerProvider()
        trace.set_tracer_provider(provider)
    exporter = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter


@contextmanager
def recorded() -> Iterator[Spans]:
    """Record the spans of the block."""
    _exporter().clear()
    yield Spans(_exporter())
    _exporter().clear()


def facts(span: ReadableSpan) -> dict[str, object]:
    """Return a span's attributes."""
    return cast("dict[str, object]", dict(span.attributes or {}))
