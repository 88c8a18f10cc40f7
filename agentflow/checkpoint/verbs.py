"""Changes of a thread as a whole, each in one transaction and under the thread's lock."""

from __future__ import annotations

from agentflow.checkpoint.planning import fence
from agentflow.checkpoint.rows import Rows, ThreadKey, ThreadState
from agentflow.database.writer import Rejected
from agentflow.types import Lease


def lock(rows: Rows, thread: ThreadKey) -> ThreadState:
    """Lock a thread and return its state, without heads."""
    return rows.load_states({thread: ()}, lock=True)[thread][0]


def acquire_thread(rows: Rows, thread: ThreadKey, lease: Lease) -> int:
    """Take a thread for a lease: from now on only its token may write.

    Returns:
        The thread's token: the lease's own if it was taken, a higher one if not.
    """
    state = lock(rows, thread)
    if lease.token >= state.token:
        rows.set_lease(state, token=lease.token, is_leased=True)
    return max(lease.token, state.token)


def release_thread(rows: Rows, thread: ThreadKey, lease: Lease) -> None:
    """Give a thread back, if it is still held under the lease's token."""
    state = lock(rows, thread)
    if state.token == lease.token:
        rows.set_lease(state, token=state.token, is_leased=False)


def delete_thread(rows: Rows, thread: ThreadKey, lease: Lease | None) -> Rejected | None:
    """Delete a thread's checkpoints and writes; its fencing token stays."""
    state = lock(rows, thread)
    refused = fence(thread[1], lease, state)
    if refused is not None:
        return Rejected(refused)
    rows.delete(state)
    return None
