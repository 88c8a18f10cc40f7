"""What statements are made of, in whichever database."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any, NamedTuple

from agentflow.checkpoint.rows import (
    AnchorRow,
    CheckpointRow,
    ObjectRow,
    ThreadChange,
    ValueRow,
    WritesRow,
)
from agentflow.database.session import Session

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

DROP_VALUE = "DELETE FROM agentflow_values WHERE thread = ? AND series = ? AND start = ?"
TABLES: dict[type, tuple[str, tuple[str, ...]]] = {
    CheckpointRow: ("agentflow_checkpoints", ("ns", "seq")),
    ValueRow: ("agentflow_values", ("series", "start")),
    WritesRow: ("agentflow_writes", ("ns", "checkpoint_id", "seq")),
    AnchorRow: ("agentflow_anchors", ("ns", "checkpoint_id")),
    ObjectRow: ("agentflow_objects", ("series", "start", "object")),
}
"""Kind of row to its table, and the columns that a row is known by within its thread."""


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


def fetch_for(
    session: Session,
    places: Sequence[tuple[Any, ...]],
    columns: tuple[str, ...],
    sql: str,
    *more: Any,
) -> list[tuple[Any, ...]]:
    """Run a query for some places, not more of them at once than a statement may name.

    Args:
        session: Where it runs.
        places: Become the table `w`.
        columns: Of that table, each with its type.
        sql: The query, with `{given}` for that table.
        more: Parameters behind those.
    """
    size = MAX_PARAMETERS // len(columns)
    found: list[tuple[Any, ...]] = []
    for begin in range(0, len(places), size):
        some = places[begin : begin + size]
        found += session.fetch(
            sql.replace("{given}", given_table(columns, len(some), session.dialect)),
            [*(value for place in some for value in place), *more],
        )
    return found


@cache
def extreme(
    dialect: str, table: str, alias: str, where: str, column: str, *, is_last: bool = True
) -> str:
    """Return the right side of a join with one row: that with the highest, or lowest, number.

    PostgreSQL is told how to find it: without statistics of the table, it would take an index that
    leads to all rows of a thread, and look for the number of each.

    Args:
        dialect: SQLAlchemy's name of the database.
        table: Where the rows are.
        alias: What the row is called in the query.
        where: Which rows it is one of, with `{}` before the names of the table's columns.
        column: Has the number.
        is_last: Whether it is the highest.
    """
    inner = where.replace("{}", "e")
    if dialect == "sqlite":
        aggregate = "max" if is_last else "min"
        return (
            f"{table} {alias} ON {where.replace('{}', alias)} "
            f"AND {alias}.{column} = (SELECT {aggregate}(e.{column}) FROM {table} e "
            f"WHERE {inner})"
        )
    order = f"e.{column} {'DESC' if is_last else 'ASC'}"
    return (
        f"LATERAL (SELECT * FROM {table} e WHERE {inner} ORDER BY {order} LIMIT 1) {alias} ON TRUE"
    )


@lru_cache(maxsize=500)
def given_table(columns: tuple[str, ...], count: int, dialect: str) -> str:
    """Return a table `w` with `count` rows of parameters."""
    names = [column.split()[0] for column in columns]
    types = [column.split()[1] for column in columns]
    if dialect == "sqlite":
        row = f"({', '.join('?' for _ in columns)})"
        rows = ", ".join(row for _ in range(count))
        selected = ", ".join(f"column{i + 1} AS {name}" for i, name in enumerate(names))
        return f"(SELECT {selected} FROM (VALUES {rows})) w"
    row = f"({', '.join(f'CAST(? AS {kind})' for kind in types)})"
    return f"(VALUES {', '.join(row for _ in range(count))}) w({', '.join(names)})"
