"""Lists what is in a database, as plain data that can be kept in a file and compared.

Read through the public API only, and shown in the same text under every version of Python,
LangGraph and LangChain. It neither resumes anything nor judges what it finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from datetime import datetime
from enum import Enum
from typing import Any

from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import CheckpointTuple
from langgraph.types import Interrupt, Send
from pydantic import BaseModel

from agentflow import AgentFlow
from agentflow.checkpoint import Saver, open_checkpointer
from agentflow.types import Approval, AuditEvent, Run


def show(value: Any) -> str:
    """Return a value as text: like `repr`, but with all types and in a fixed order."""
    name = type(value).__name__
    if (parts := _parts(value)) is not None:
        return f"{name}({', '.join(f'{part}={show(item)}' for part, item in parts.items())})"
    if isinstance(value, Enum):
        return f"{name}.{value.name}"
    if isinstance(value, datetime):
        return f"{name}({value.isoformat()})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{show(key)}: {show(item)}' for key, item in value.items())}}}"
    if isinstance(value, (set, frozenset)):
        return f"{name}{{{', '.join(sorted(map(show, value)))}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(show, value))}]"
    if isinstance(value, tuple):
        comma = "," if len(value) == 1 else ""
        return f"{'' if name == 'tuple' else name}({', '.join(map(show, value))}{comma})"
    return repr(value)


def _parts(value: Any) -> dict[str, Any] | None:
    """Return what an object is made of; of a library's class only what will always be there."""
    if isinstance(value, BaseMessage):
        parts = {"content": value.content, "id": value.id}
        names = ("name", "tool_calls", "tool_call_id")
        return parts | {name: part for name in names if (part := getattr(value, name, None))}
    if isinstance(value, Interrupt):
        return {"value": value.value, "id": value.id}
    if isinstance(value, Send):
        return {"node": value.node, "arg": value.arg}
    if isinstance(value, BaseModel):
        return {**dict(value), **(value.__pydantic_private__ or {})}
    if is_dataclass(value):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    return None


async def list_database(url: str, *, tenants: Sequence[str]) -> dict[str, Any]:
    """List all checkpoints, runs and approvals of some tenants."""
    listing: dict[str, Any] = {}
    for tenant in tenants:
        async with open_checkpointer(url, tenant=tenant) as saver:
            found = [item async for item in saver.alist(None)]
            names = sorted({item.config["configurable"]["thread_id"] for item in found})
            threads = {name: await list_thread(saver, name) for name in names}
        async with AgentFlow(url, tenant=tenant) as app:
            runs = {run.id: await list_run(app, run) for run in (await app.list_runs()).items}
            approvals = (await app.approvals.list(status=None)).items
        listing[tenant] = {
            "threads": threads,
            "runs": runs,
            "approvals": [show_approval(each) for each in approvals],
        }
    return listing


async def list_thread(saver: Saver, thread_id: str) -> dict[str, Any]:
    """List the checkpoints of a thread, newest first, and the head of each namespace."""
    config: RunnableConfig = {"configurable": {"thread_id": thread_id}}
    checkpoints = [show_checkpoint(item) async for item in saver.alist(config)]
    heads = {}
    for ns in sorted({each["ns"] for each in checkpoints}):
        head = await saver.aget_tuple(
            {"configurable": {"thread_id": thread_id, "checkpoint_ns": ns}}
        )
        heads[ns] = head.checkpoint["id"] if head else None
    return {"heads": heads, "checkpoints": checkpoints}


def show_checkpoint(item: CheckpointTuple) -> dict[str, Any]:
    """Return all that a checkpoint holds."""
    checkpoint, parent = item.checkpoint, item.parent_config
    writes = item.pending_writes or ()
    more = [name for name in item.metadata if name not in {"step", "source"}]
    return {
        "ns": item.config["configurable"]["checkpoint_ns"],
        "id": checkpoint["id"],
        "parent": parent["configurable"]["checkpoint_id"] if parent else None,
        "step": item.metadata.get("step"),
        "source": item.metadata.get("source"),
        "ts": checkpoint["ts"],
        "metadata": {name: show(item.metadata.get(name)) for name in more},
        "values": {name: show(value) for name, value in checkpoint["channel_values"].items()},
        "versions": checkpoint["channel_versions"],
        "versions_seen": checkpoint["versions_seen"],
        "updated_channels": checkpoint["updated_channels"],
        "writes": [[task, channel, show(value)] for task, channel, value in writes],
    }


async def list_run(app: AgentFlow, run: Run) -> dict[str, Any]:
    """Return a run with its audit events."""
    error = run.error
    return {
        "status": run.status.value,
        "thread": run.thread_id,
        "graph": f"{run.graph}@{run.version}",
        "queue": run.queue,
        "priority": run.priority,
        "attempt": run.attempt,
        "claims": run.claims,
        "step": run.step,
        "checkpoint": run.checkpoint_id,
        "input": show(run.input),
        "output": show(run.output),
        "error": error and [error.type, error.message, error.node, error.attempt],
        "dead_letter": run.dead_letter,
        "metadata": show(run.metadata),
        "config": show(run.config),
        "times": show([run.created_at, run.available_at, run.started_at, run.ended_at]),
        "by": run.submitted_by,
        "events": [_show_event(event) for event in await app.list_events(run.id, limit=1000)],
    }


def _show_event(event: AuditEvent) -> dict[str, Any]:
    return {
        "seq": event.seq,
        "type": event.type,
        "at": event.at.isoformat(),
        "data": show(event.data),
        "prev_hash": event.prev_hash,
        "hash": event.hash,
    }


def show_approval(approval: Approval) -> dict[str, Any]:
    """Return an approval, with what was asked and answered."""
    request, decision = approval.request, approval.decision
    return {
        "id": approval.id,
        "run": approval.run_id,
        "thread": approval.thread_id,
        "status": approval.status.value,
        "version": approval.version,
        "ns": approval.ns,
        "task": approval.task_id,
        "interrupt": approval.interrupt_id,
        "checkpoint": approval.checkpoint_id,
        "answers_recorded": approval.answers_recorded,
        "title": request.title,
        "proposal": show(request.proposal),
        "proposal_hash": approval.proposal_hash,
        "allowed": list(request.allowed),
        "decision": decision and [decision.type, show(decision.value)],
        "by": approval.decided_by,
        "comment": approval.comment,
        "times": show([approval.created_at, approval.decided_at]),
    }
