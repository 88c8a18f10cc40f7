"""Every OpenTelemetry name that agentflow uses, and the spans it makes.

Only the OpenTelemetry API is imported: without an SDK all of this costs next to nothing. Span names
never hold ids, attributes never hold payloads. A segment is one attempt of a run, from claim to
park or end, and a trace of its own: a run that waits for days is several traces, joined by links,
and no span stays open while it waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.outputs import LLMResult
from opentelemetry import context, propagate, trace
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode

from agentflow.types import ClaimedRun

SPAN_SEGMENT = "invoke_workflow"
SPAN_NODE = "agentflow.node"
SPAN_CHECKPOINT = "agentflow.checkpoint.put"
SPAN_DECIDE = "agentflow.approval.decide"

GEN_AI_OPERATION = "gen_ai.operation.name"
GEN_AI_WORKFLOW = "gen_ai.workflow.name"
GEN_AI_CONVERSATION = "gen_ai.conversation.id"
GEN_AI_INPUT_TOKENS = "gen_ai.usage.input_tokens"
GEN_AI_OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
ERROR_TYPE = "error.type"
RUN_ID = "agentflow.run.id"
RUN_STATUS = "agentflow.run.status"
RUN_RESUMED = "agentflow.run.resumed"
SEGMENT_INDEX = "agentflow.segment.index"
SEGMENT_TRIGGER = "agentflow.segment.trigger"
NODE = "agentflow.node"
STEP = "agentflow.step"
THREAD_ID = "agentflow.thread.id"
CHECKPOINT_ID = "agentflow.checkpoint.id"
CHECKPOINT_NS = "agentflow.checkpoint.ns"
CHECKPOINT_BYTES = "agentflow.checkpoint.bytes"
ATTEMPT = "agentflow.attempt"
WORKER_ID = "agentflow.worker.id"
LEASE_TOKEN = "agentflow.lease.token"  # noqa: S105 -- a fencing token is a number, not a secret
APPROVAL_ID = "agentflow.approval.id"
APPROVAL_OUTCOME = "agentflow.approval.outcome"
APPROVAL_WAIT = "agentflow.approval.wait_s"
LINK_TYPE = "agentflow.link.type"
EVENT_BUDGET = "agentflow.budget.warning"
BUDGET_SCOPE = "agentflow.budget.scope"
BUDGET_LIMIT = "agentflow.budget.limit"
BUDGET_SHARE = "agentflow.budget.share"

_USED = {"input_tokens": GEN_AI_INPUT_TOKENS, "output_tokens": GEN_AI_OUTPUT_TOKENS}
"""What LangChain calls it, and what OpenTelemetry does."""


def _tracer() -> trace.Tracer:
    return trace.get_tracer("agentflow")


def traceparent() -> str | None:
    """Return the current span as a W3C `traceparent`, to be stored with a run."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent")


@contextmanager
def segment_span(claimed: ClaimedRun) -> Iterator[Span]:
    """Open the span of one attempt, as a new trace linked to the one that led to it."""
    run, lease = claimed.run, claimed.lease
    links = []
    if claimed.traceparent:
        origin = propagate.extract({"traceparent": claimed.traceparent})
        origin_span = trace.get_current_span(origin).get_span_context()
        kind = "submitted_by" if claimed.reason == "start" else "resumed_from"
        links = [Link(origin_span, {LINK_TYPE: kind})]
    attributes: dict[str, Any] = {
        GEN_AI_OPERATION: SPAN_SEGMENT,
        GEN_AI_WORKFLOW: run.graph,
        GEN_AI_CONVERSATION: run.thread_id,
        RUN_ID: run.id,
        RUN_RESUMED: claimed.reason != "start",
        SEGMENT_INDEX: run.claims,
        SEGMENT_TRIGGER: claimed.reason,
        ATTEMPT: run.attempt,
        WORKER_ID: lease.worker,
        LEASE_TOKEN: lease.token,
    }
    with _tracer().start_as_current_span(
        f"{SPAN_SEGMENT} {run.graph}",
        context=context.Context(),
        kind=SpanKind.INTERNAL,
        attributes=attributes,
        links=links,
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        yield span


def note_budget(scope: str, limit: str, share: float) -> None:
    """Note on the current span that a budget is nearly used up."""
    trace.get_current_span().add_event(
        EVENT_BUDGET, {BUDGET_SCOPE: scope, BUDGET_LIMIT: limit, BUDGET_SHARE: share}
    )


def fail_span(span: Span, error_type: str) -> None:
    """Mark a span as failed by the type of its error; messages may hold payloads."""
    span.set_attribute(ERROR_TYPE, error_type)
    span.set_status(Status(StatusCode.ERROR, error_type))


def start_checkpoint_span(
    *, thread_id: str, ns: str, checkpoint_id: str, step: int | None
) -> Span | None:
    """Start the span of one checkpoint write; the saver ends it when the write is durable.

    `None` without an SDK: this runs with every step of every graph.
    """
    if not is_traced():
        return None
    attributes: dict[str, Any] = {
        THREAD_ID: thread_id,
        CHECKPOINT_NS: ns,
        CHECKPOINT_ID: checkpoint_id,
    }
    if step is not None:
        attributes[STEP] = step
    return _tracer().start_span(SPAN_CHECKPOINT, attributes=attributes)


@contextmanager
def decide_span(approval_id: str) -> Iterator[Span]:
    """Open the span of one decision on an approval."""
    with _tracer().start_as_current_span(
        SPAN_DECIDE,
        attributes={APPROVAL_ID: approval_id},
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        try:
            yield span
        except Exception as error:
            fail_span(span, type(error).__name__)
            raise


def is_traced() -> bool:
    """Whether there is an SDK that does something with spans."""
    # Not `isinstance`, which goes the long way through an abstract class, with every step.
    return type(trace.get_tracer_provider()) is not trace.ProxyTracerProvider


def node_of(
    tags: Sequence[str] | None, metadata: Mapping[str, Any] | None, name: str | None
) -> str | None:
    """Return the name of the node, if what LangChain calls a chain is one and not a part of one."""
    node = (metadata or {}).get("langgraph_node")
    is_node = name == node and any(tag.startswith("graph:step:") for tag in tags or ())
    return node if is_node else None


@dataclass(slots=True)
class _Node:
    """A call of a node, as long as it lasts."""

    span: Span
    ns: str
    used: Counter[str] = field(default_factory=Counter)


class NodeSpans(BaseCallbackHandler):
    """Makes one span for each node call, from LangChain's callbacks."""

    run_inline = True
    """Called in the node's own task, before the node runs, so that the times are the node's."""

    def __init__(self, run_id: str, parent: Span) -> None:
        """Make node spans children of `parent`, the segment."""
        self._run_id = run_id
        self._context = trace.set_span_in_context(parent, context.Context())
        self._nodes: dict[UUID, _Node] = {}
        self._models: dict[UUID, _Node] = {}
        """The nodes of calls of models that have not ended."""

    def on_chain_start(
        self,
        serialized: dict[str, Any],
        inputs: dict[str, Any],
        *,
        run_id: UUID,
        parent_run_id: UUID | None = None,
        tags: list[str] | None = None,
        metadata: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Start a span if the chain is a node and not a part of one."""
        del serialized, inputs, parent_run_id
        meta = metadata or {}
        node = node_of(tags, metadata, kwargs.get("name"))
        if node is None:
            return
        ns = meta.get("langgraph_checkpoint_ns", "")
        span = _tracer().start_span(
            SPAN_NODE,
            context=self._context,
            attributes={
                RUN_ID: self._run_id,
                NODE: node,
                STEP: meta.get("langgraph_step", 0),
                CHECKPOINT_NS: ns,
            },
        )
        self._nodes[run_id] = _Node(span, ns)

    def on_chat_model_start(
        self, *args: Any, run_id: UUID, metadata: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Note in which node a model is called."""
        del args, kwargs
        ns = (metadata or {}).get("langgraph_checkpoint_ns", "")
        for node in list(self._nodes.values()):  # nodes in threads come and go meanwhile
            if node.ns == ns:
                self._models[run_id] = node

    def on_llm_end(self, response: LLMResult, *, run_id: UUID, **kwargs: Any) -> None:
        """Add what a call of a model has used to the span of its node."""
        del kwargs
        if (node := self._models.pop(run_id, None)) is None:
            return
        for choices in response.generations:
            for choice in choices:
                used = getattr(getattr(choice, "message", None), "usage_metadata", None) or {}
                node.used.update({name: used.get(name, 0) for name in _USED})
        for name, attribute in _USED.items():
            node.span.set_attribute(attribute, node.used[name])

    def on_llm_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """Forget a call that has failed."""
        del error, kwargs
        self._models.pop(run_id, None)

    def on_chain_end(self, outputs: Any, *, run_id: UUID, **kwargs: Any) -> None:
        """End the node's span."""
        del outputs, kwargs
        if (node := self._nodes.pop(run_id, None)) is not None:
            node.span.end()

    def on_chain_error(self, error: BaseException, *, run_id: UUID, **kwargs: Any) -> None:
        """End the node's span as failed; an interrupt is not a failure."""
        del kwargs
        if (node := self._nodes.pop(run_id, None)) is not None:
            if isinstance(error, Exception) and type(error).__name__ != "GraphInterrupt":
                fail_span(node.span, type(error).__name__)
            node.span.end()
