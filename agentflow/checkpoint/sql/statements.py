"""What stores the rows of checkpoints, in whichever database."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from agentflow.checkpoint.rows import AnchorRow, CheckpointRow, ThreadChange

MAX_PARAMETERS = 30_000
"""How many a statement may have."""


class Insert(NamedTuple):
    """Into which columns of which table, and what to do about a row that is there."""

    table: str
    columns: tuple[str, ...]
    conflict: str = ""


@cache
def insert_sql(insert: Insert, count: int) -> str:
    """Build the statement that inserts `count` rows."""
    row = f"({', '.join('?' for _ in insert.columns)})"
    rows = ", ".join(row for _ in range(count))
    listed = ", ".join(insert.columns)
    return f"INSERT INTO {insert.table} ({listed}) VALUES {rows} {insert.conflict}"


_UPSERT = "ON CONFLICT (thread, ns, checkpoint_id) DO UPDATE SET " + ", ".join(
    f"{name} = excluded.{name}" for name in CheckpointRow._fields[2:]
)
CHECKPOINTS = Insert("agentflow_checkpoints", CheckpointRow._fields)
REPEATED = Insert("agentflow_checkpoints", CheckpointRow._fields, _UPSERT)
VALUES = Insert("agentflow_values", ("thread", "series", "start", "data"))
WRITES = Insert("agentflow_writes", ("thread", "ns", "checkpoint_id", "seq", "data"))
ANCHORS = Insert(
    "agentflow_anchors", AnchorRow._fields, "ON CONFLICT (thread, ns, checkpoint_id) DO NOTHING"
)


def changes_rows(change: ThreadChange) -> bool:
    """Whether there is more to do than to insert rows."""
    return bool(
        change.repeated
        or change.replaced
        or change.dropped
        or change.anchors
        or change.objects
        or change.released
    )


def padded(count: int) -> int:
    """Round a number of rows up, so that few statements serve all batches.

    The rows that are filled up with NULL belong to no thread, and so are not inserted.
    """
    return 1 << (count - 1).bit_length() if count else 0
