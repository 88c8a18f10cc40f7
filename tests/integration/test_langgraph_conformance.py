"""LangGraph's own conformance suite, on every backend that is built so far."""

from __future__ import annotations

from collections.abc import AsyncIterator

from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.conformance.capabilities import Capability

from agentflow.checkpoint import Saver, open_checkpointer

BUILT = {
    Capability.PUT,
    Capability.PUT_WRITES,
    Capability.GET_TUPLE,
    Capability.LIST,
    Capability.DELETE_THREAD,
}


async def test_every_capability_that_is_built_passes(database_url: str) -> None:
    """Each capability is detected and passes; one that is not built is not claimed either."""
    count = 0

    @checkpointer_test(name="agentflow")
    async def saver() -> AsyncIterator[Saver]:
        nonlocal count
        count += 1
        async with open_checkpointer(database_url, tenant=f"tenant-{count}") as opened:
            yield opened

    report = await validate(saver)

    detected = {name for name, result in report.results.items() if result.detected}
    assert detected == {capability.value for capability in BUILT}
    failures = {name: result.failures for name, result in report.results.items() if result.failures}
    assert failures == {}
    assert report.passed_all_base()
