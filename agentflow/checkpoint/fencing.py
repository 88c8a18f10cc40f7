"""Who may write a thread: the one whose lease holds it, or anybody if none does."""

from __future__ import annotations

from agentflow.checkpoint.rows import Rows, ThreadKey, ThreadState
from agentflow.database.writer import Rejected
from agentflow.errors import FencedError
from agentflow.types import Lease


def fence(thread_id: str, lease: Lease | None, state: ThreadState) -> FencedError | None:
    """Say why a write with this lease may not touch a thread in that state; `None` if it may."""
    if lease is None:
        return FencedError(thread_id, None, state.token) if state.is_leased else None
    if lease.thread_id != thread_id or lease.token != state.token or not state.is_leased:
        return FencedError(thread_id, lease.token, state.token)
    return None


def lock(rows: Rows, thread: ThreadKey) -> ThreadState:
    """Lock a thread and return its state, without heads."""
    return rows.load_states({thread: ()}, lock=True)[thread][0]


def lock_to_write(rows: Rows, thread: ThreadKey, lease: Lease | None) -> ThreadState | Rejected:
    """Lock a thread and return its state, or why a write with this lease may not touch it."""
    state = lock(rows, thread)
    refused = fence(thread[1], lease, state)
    return state if refused is None else Rejected(refused)
