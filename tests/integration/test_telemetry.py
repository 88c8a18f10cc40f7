"""The spans of runs, and that no payload gets into spans, logs or messages."""

from __future__ import annotations

import logging
import traceback
from collections.abc import AsyncIterator, Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import StatusCode

from agentflow import AgentFlow, RetryPolicy, request_approval
from agentflow.checkpoint import open_checkpointer
from agentflow.errors import (
    AgentflowError,
    AlreadyResolvedError,
    FencedError,
    InvalidDecisionError,
    InvalidInputError,
    RunFailedError,
    SerializationError,
)
from tests.conformance.runs import claim, create, open_store
from tests.integration.graphs import State, asks, chain, logs
from tests.integration.spans import Spans, facts, recorded

AT_ONCE = RetryPolicy(initial_interval=0, jitter=False, max_attempts=2)


@pytest.fixture
def spans() -> Iterator[Spans]:
    """The spans that the test makes."""
    with recorded() as kept:
        yield kept


@pytest.fixture
async def app(database_url: str) -> AsyncIterator[AgentFlow]:
    """An app on an empty database."""
    async with AgentFlow(database_url) as opened:
        yield opened


def trace_id(span: ReadableSpan) -> int:
    """Return the trace that a span belongs to."""
    assert span.context is not None
    return int(span.context.trace_id)


async def test_segment_names_run_thread_step_and_checkpoint(app: AgentFlow, spans: Spans) -> None:
    app.register(chain(("a", logs("a")), ("b", logs("b"))), name="g")
    async with app.worker(name="w1"):
        handle = await app.submit("g", {}, thread_id="t")
        await handle.result(timeout=30)
    (segment,) = spans.named("invoke_workflow")
    run = await handle.run()
    assert segment.name == "invoke_workflow g"
    assert facts(segment) == {
        "gen_ai.operation.name": "invoke_workflow",
        "gen_ai.workflow.name": "g",
        "gen_ai.conversation.id": "t",
        "agentflow.run.id": handle.id,
        "agentflow.run.resumed": False,
        "agentflow.run.status": "succeeded",
        "agentflow.segment.index": 1,
        "agentflow.segment.trigger": "start",
        "agentflow.attempt": 1,
        "agentflow.worker.id": "w1",
        "agentflow.lease.token": 1,
        "agentflow.step": 2,
        "agentflow.checkpoint.id": run.checkpoint_id,
    }
    assert segment.status.status_code is not StatusCode.ERROR


async def test_nodes_and_checkpoints_belong_to_the_segment(app: AgentFlow, spans: Spans) -> None:
    app.register(chain(("a", logs("a")), ("b", logs("b"))), name="g")
    await app.submit("g", {}, run_id="r")
    await app.drive("r")
    (segment,) = spans.named("invoke_workflow")
    nodes = spans.named("agentflow.node")
    assert [(facts(n)["agentflow.node"], facts(n)["agentflow.step"]) for n in nodes] == [
        ("a", 1),
        ("b", 2),
    ]
    for node in nodes:
        assert node.parent is not None
        assert segment.context is not None
        assert node.parent.span_id == segment.context.span_id
        assert facts(node)["agentflow.run.id"] == "r"
    puts = spans.named("agentflow.checkpoint.put")
    assert sorted(int(str(facts(put)["agentflow.step"])) for put in puts) == [-1, 0, 1, 2]
    for put in puts:
        assert trace_id(put) == trace_id(segment)
        assert facts(put)["agentflow.thread.id"] == "r"
        assert int(str(facts(put)["agentflow.checkpoint.bytes"])) > 0
    final = (await app.get_run("r")).checkpoint_id
    assert final in {facts(put)["agentflow.checkpoint.id"] for put in puts}


async def test_resumed_segment_is_a_new_trace_linked_to_the_previous_one(
    app: AgentFlow, spans: Spans
) -> None:
    app.register(chain(("ask", asks("ok?"))), name="g")
    with trace.get_tracer("test").start_as_current_span("request") as request:
        handle = await app.submit("g", {}, run_id="r")
    await app.drive("r")
    (approval,) = await handle.approvals()
    await app.approvals.decide(approval.id, "approve", by="ada")
    await app.drive("r")
    first, second = spans.named("invoke_workflow")
    assert len({trace_id(first), trace_id(second), request.get_span_context().trace_id}) == 3
    assert first.parent is None
    assert second.parent is None
    assert [facts(s)["agentflow.run.status"] for s in (first, second)] == ["waiting", "succeeded"]
    assert [facts(s)["agentflow.run.resumed"] for s in (first, second)] == [False, True]
    assert facts(second)["agentflow.segment.trigger"] == "approval"
    for segment, origin, kind in (
        (first, request.get_span_context(), "submitted_by"),
        (second, first.context, "resumed_from"),
    ):
        (link,) = segment.links
        assert origin is not None
        assert (link.context.trace_id, link.context.span_id) == (origin.trace_id, origin.span_id)
        assert dict(link.attributes or {}) == {"agentflow.link.type": kind}


async def test_question_is_not_shown_as_a_failure_of_its_node(app: AgentFlow, spans: Spans) -> None:
    app.register(chain(("ask", asks("ok?"))), name="g")
    await app.submit("g", {}, run_id="r")
    await app.drive("r")
    (node,) = spans.named("agentflow.node")
    assert node.status.status_code is not StatusCode.ERROR


async def test_decision_has_a_span(app: AgentFlow, spans: Spans) -> None:
    app.register(chain(("ask", asks("ok?"))), name="g")
    handle = await app.submit("g", {}, run_id="r")
    await app.drive("r")
    (approval,) = await handle.approvals()
    await app.approvals.decide(approval.id, "reject", by="ada")
    with pytest.raises(AlreadyResolvedError):
        await app.approvals.decide(approval.id, "approve", by="bob")
    won, lost = spans.named("agentflow.approval.decide")
    assert facts(won)["agentflow.approval.id"] == approval.id
    assert facts(won)["agentflow.approval.outcome"] == "reject"
    assert float(str(facts(won)["agentflow.approval.wait_s"])) >= 0
    assert won.status.status_code is not StatusCode.ERROR
    assert lost.status.status_code is StatusCode.ERROR
    assert facts(lost)["error.type"] == "AlreadyResolvedError"
    assert "agentflow.approval.outcome" not in facts(lost)


async def test_failed_node_and_its_segment_have_error_status(app: AgentFlow, spans: Spans) -> None:
    def fails(state: State) -> State:
        raise ConnectionError("canary")

    app.register(chain(("a", fails)), name="g", retry=AT_ONCE)
    await app.submit("g", {}, run_id="r")
    await app.drive("r")
    segments = spans.named("invoke_workflow")
    assert [facts(s)["agentflow.run.status"] for s in segments] == ["queued", "failed"]
    assert [facts(s)["agentflow.segment.trigger"] for s in segments] == ["start", "retry"]
    assert [facts(s)["agentflow.attempt"] for s in segments] == [1, 2]
    for span in [*segments, *spans.named("agentflow.node")]:
        assert span.status.status_code is StatusCode.ERROR
        assert facts(span)["error.type"] == "ConnectionError"


async def test_refused_checkpoint_has_error_status(database_url: str, spans: Spans) -> None:
    store = open_store(database_url)
    async with open_checkpointer(database_url) as saver:
        await create(store, "r")
        await saver.acquire(await claim(store, "r"))
        graph = chain(("a", logs("a"))).compile(checkpointer=saver)
        with pytest.raises(FencedError):
            await graph.ainvoke({}, {"configurable": {"thread_id": "r"}}, durability="sync")
    await store.close()
    put = spans.named("agentflow.checkpoint.put")[0]
    assert put.status.status_code is StatusCode.ERROR
    assert facts(put)["error.type"] == "FencedError"


CANARY = "canary-7f3a9c"


def everything(span: ReadableSpan) -> str:
    """Return all that a span says."""
    parts = [span.name, span.status.description, facts(span), span.resource.attributes]
    for event in span.events:
        parts += [event.name, dict(event.attributes or {})]
    for link in span.links:
        parts.append(dict(link.attributes or {}))
    return repr(parts)


def everything_logged(record: logging.LogRecord) -> str:
    """Return all that a log record says, its extra fields and traceback included."""
    error = "".join(traceback.format_exception(*record.exc_info)) if record.exc_info else ""
    return f"{record.getMessage()} {record.__dict__!r} {error}"


async def test_payloads_are_in_no_span_log_record_or_message(
    app: AgentFlow, spans: Spans, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    caplog.set_level(logging.DEBUG, "agentflow")
    told: list[AgentflowError] = []

    def propose(state: State) -> State:
        result = request_approval({"account": CANARY, "key": state["value"]}, title="Pay")
        return {"value": {"answer": result.value, "message": result.message}}

    def fails(state: State) -> State:
        raise ConnectionError(CANARY)

    app.register(chain(("ask", propose), ("fails", fails)), name="g", retry=AT_ONCE)
    for bad in ({"value": object(), "log": [CANARY]}, CANARY, {"log": CANARY + "!"}):
        try:
            await app.submit("g", bad)
        except (InvalidInputError, SerializationError) as refused_input:
            told.append(refused_input)
    handle = await app.submit("g", {"value": CANARY}, run_id="r", metadata={"m": CANARY})
    async with app.worker():
        await handle.wait(until="parked", timeout=30)
        (approval,) = await handle.approvals()
        for wrong in ({"type": "respond", "value": CANARY}, {"type": CANARY}, CANARY):
            with pytest.raises(InvalidDecisionError) as refused:
                await app.approvals.decide(approval.id, wrong, by="ada")
            told.append(refused.value)
        decision = {"type": "edit", "value": {"account": CANARY}, "message": CANARY}
        await app.approvals.decide(approval.id, decision, by="ada", comment=CANARY)
        with pytest.raises(AlreadyResolvedError) as late:
            await app.approvals.decide(approval.id, decision, by="bob")
        with pytest.raises(RunFailedError) as failed:
            await handle.result(timeout=30)
    told += [late.value, failed.value]
    run = await handle.run()
    assert run.error is not None
    assert CANARY in run.error.message, "the record has it, behind the codec"
    for span in spans.all():
        assert CANARY not in everything(span)
    for record in caplog.records:
        assert CANARY not in everything_logged(record)
    for event in await app.list_events("r"):
        assert CANARY not in repr(event)
    for error in told:
        shown = "".join(traceback.format_exception(error))
        # The lines of this test's own source are in the traceback; its value is not.
        assert CANARY not in shown, shown
    assert len(told) == 7
