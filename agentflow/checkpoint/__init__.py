"""Durable checkpointers for LangGraph: `graph.compile(checkpointer=open_checkpointer(url))`."""

from __future__ import annotations

from agentflow.checkpoint.archive import Archived
from agentflow.checkpoint.base import Saver
from agentflow.checkpoint.policy import Save
from agentflow.checkpoint.retention import Retention, SweepReport, SweptThread
from agentflow.codec import Codec, Redact
from agentflow.config import load_settings
from agentflow.database import Database
from agentflow.keys import KeyRing
from agentflow.objects import OFFLOAD_FROM, open_tier
from agentflow.serializer import AllowList

__all__ = [
    "Archived",
    "Retention",
    "Save",
    "Saver",
    "SweepReport",
    "SweptThread",
    "open_checkpointer",
]


def open_checkpointer(
    url: str,
    *,
    keys: KeyRing | None = None,
    allow: AllowList = "imported",
    compress: bool = True,
    save: Save = "every_step",
    verify_deltas: bool = False,
    tenant: str = "",
    redact: Redact | None = None,
    offload: str | None = None,
    offload_from: int = OFFLOAD_FROM,
    retention: Retention | None = None,
) -> Saver:
    """Open a checkpointer on the database at `url`.

    It is usable at once: it connects with the first call, creates its tables in an empty database,
    and closes with `with`, `async with`, `close()` or `aclose()`.

    Args:
        url: `memory://`, `sqlite:///file` or `postgresql://user@host/database`.
        keys: Encrypts everything that is stored; without it the environment's `AGENTFLOW_KEYS`, if
            there is one.
        allow: Which classes of your own may be stored: `"imported"`, those whose modules are
            imported when they are loaded; or exactly the given ones, as classes or as
            `"module:Name"`.
        compress: Whether values are compressed.
        save: When the state of a running graph is stored: after `"every_step"`; before and after
            the nodes with the given names; or on `"exit"`. It is always stored when a node
            interrupts or fails and when the graph ends, but not at a breakpoint, after an error
            that is no node's, nor when a call is cancelled or its stream left: await
            `saver.flush(thread_id)` then. A crash runs again what came after the last stored state;
            see `Save`. Graphs with a `DeltaChannel` need every step.
        verify_deltas: A list that grows is stored by what was added. An element that was edited in
            place is noticed among the last eight at once, and elsewhere when the list has doubled;
            with this, everywhere at once, at the cost of comparing the whole list each time.
        tenant: Keeps the threads of different tenants in one database apart.
        redact: Called with a place, such as `channel:messages` or `metadata`, and the value that is
            about to be stored there; what it returns is stored instead. That is also what the graph
            gets when it is resumed, so it has to be of the same kind. The value itself is the
            graph's own, and must not be changed.
        offload: Where values that are too large for rows are kept: `file:///folder`, a folder that
            is there; without it the environment's `AGENTFLOW_OFFLOAD`, if there is one. Whoever
            reads such values needs it too.
        offload_from: How many bytes, as stored, make a value too large.
        retention: What `sweep` keeps, unless it is told otherwise; nothing is swept by itself.

    Raises:
        UnsupportedUrlError: A URL's scheme is unknown.
        MissingDriverError: The database's driver, or `cryptography` for keys, is not installed.
        InvalidInputError: `save` is not one of the above, or `offload` is malformed.
        ObjectStoreError: The folder of `offload` is not there.

    Example:
        ```python
        with open_checkpointer("sqlite:///agents.db") as checkpointer:
            graph = builder.compile(checkpointer=checkpointer)
            graph.invoke({"question": "…"}, {"configurable": {"thread_id": "1"}})
        ```
    """
    settings = load_settings()
    database = Database(url, settings)
    codec = Codec(
        allow=allow,
        compress=compress,
        keys=keys or settings.keys,
        redact=redact,
        tier=open_tier(offload or settings.offload, offload_from=offload_from),
    )
    return Saver(
        database,
        codec=codec,
        tenant=tenant,
        owns_database=True,
        verify_deltas=verify_deltas,
        save=save,
        retention=retention,
    )
