"""LangGraph's own conformance suite, on every backend."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from langgraph.checkpoint.conformance import checkpointer_test, validate

from agentflow.checkpoint import Saver, open_checkpointer

BACKENDS = ["memory", "sqlite", pytest.param("postgres", marks=pytest.mark.postgres)]


@pytest.mark.parametrize("backend", BACKENDS)
async def test_every_capability_is_detected_and_passes(
    request: pytest.FixtureRequest, backend: str
) -> None:
    """A capability that is not detected would count as passed."""
    url = request.getfixturevalue(f"{backend}_url") if backend != "memory" else "memory://"
    count = 0

    @checkpointer_test(name="agentflow")
    async def saver() -> AsyncIterator[Saver]:
        nonlocal count
        count += 1
        async with open_checkpointer(url, tenant=f"tenant-{count}") as opened:
            yield opened

    report = await validate(saver)

    assert all(result.detected for result in report.results.values())
    failures = {name: result.failures for name, result in report.results.items() if result.failures}
    assert failures == {}
    assert report.passed_all()
