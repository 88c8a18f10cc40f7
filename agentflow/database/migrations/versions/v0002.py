"""Smaller checkpoints: threads by number, values apart from checkpoints, writes as a log.

Values of revision 0001 were sealed one by one and held by the checkpoint that changed them. They
become values of their own. Everything is sealed anew, bound to its place, and each checkpoint gets
a hash that covers that of its parent.
"""

import hashlib
import struct
from collections.abc import Iterator
from typing import Any

import ormsgpack
import sqlalchemy as sa
from alembic import op

from agentflow.errors import HashMismatchError

revision = "0002"
down_revision = "0001"

# SQLite numbers rows by itself only where the primary key is a plain INTEGER.
NUMBERED = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
PAGE = 500
WHOLE = -1  # a part that is a value of its own


def upgrade() -> None:
    """Make the new tables, fill them, and drop the old ones."""
    for table in ("threads", "checkpoints", "writes"):
        op.rename_table(f"agentflow_{table}", f"agentflow_{table}_0001")
    op.drop_index("agentflow_checkpoints_run", "agentflow_checkpoints_0001")
    _create()
    _leave_compressed()
    connection = op.get_bind()
    connection.execute(
        sa.text(
            "INSERT INTO agentflow_threads (tenant, thread_id, token, is_leased, seq) "
            "SELECT tenant, thread_id, token, is_leased, seq FROM agentflow_threads_0001"
        )
    )
    threads = connection.execute(
        sa.text("SELECT id, tenant, thread_id, seq FROM agentflow_threads ORDER BY id")
    ).all()
    for number, tenant, thread_id, seq in threads:
        _Thread(connection, number, tenant, thread_id, seq).convert()
    for table in ("heads", "writes_0001", "checkpoints_0001", "threads_0001"):
        op.drop_table(f"agentflow_{table}")


def _create() -> None:
    op.create_table(
        "agentflow_threads",
        sa.Column("id", NUMBERED, autoincrement=True, nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("thread_id", sa.Text(), nullable=False),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("is_leased", sa.Boolean(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="agentflow_threads_number"),
        sa.UniqueConstraint("tenant", "thread_id", name="agentflow_threads_id"),
    )
    op.create_table(
        "agentflow_checkpoints",
        sa.Column("thread", sa.BigInteger(), nullable=False),
        sa.Column("ns", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("checkpoint_id", sa.Text(), nullable=False),
        sa.Column("parent_id", sa.Text(), nullable=True),
        sa.Column("attempt", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=True),
        sa.Column("step", sa.Integer(), nullable=True),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.Column("parent_writes", sa.LargeBinary(), nullable=True),
        sa.Column("base", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("thread", "ns", "seq", name="agentflow_checkpoints_number"),
        sa.UniqueConstraint("thread", "ns", "checkpoint_id", name="agentflow_checkpoints_id"),
    )
    op.create_index("agentflow_checkpoints_run", "agentflow_checkpoints", ["run_id"])
    op.create_table(
        "agentflow_values",
        sa.Column("thread", sa.BigInteger(), nullable=False),
        sa.Column("series", sa.BigInteger(), nullable=False),
        sa.Column("start", sa.BigInteger(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("thread", "series", "start"),
    )
    op.create_table(
        "agentflow_writes",
        sa.Column("thread", sa.BigInteger(), nullable=False),
        sa.Column("ns", sa.Text(), nullable=False),
        sa.Column("checkpoint_id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint(
            "thread", "ns", "checkpoint_id", "seq", name="agentflow_writes_number"
        ),
    )
    op.create_table(
        "agentflow_anchors",
        sa.Column("thread", sa.BigInteger(), nullable=False),
        sa.Column("ns", sa.Text(), nullable=False),
        sa.Column("checkpoint_id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("thread", "ns", "checkpoint_id"),
    )
    op.create_table(
        "agentflow_objects",
        sa.Column("thread", sa.BigInteger(), nullable=False),
        sa.Column("series", sa.BigInteger(), nullable=False),
        sa.Column("start", sa.BigInteger(), nullable=False),
        sa.Column("object", sa.Text(), nullable=False),
        sa.Column("unneeded_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("thread", "series", "start", "object"),
    )
    op.create_index("agentflow_objects_object", "agentflow_objects", ["object"])
    op.create_table(
        "agentflow_object_space",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )


def _leave_compressed() -> None:
    """Tell PostgreSQL not to compress again what comes compressed."""
    if op.get_bind().dialect.name != "postgresql":
        return
    for table, columns in (
        ("checkpoints", ("data", "parent_writes", "base")),
        ("values", ("data",)),
        ("writes", ("data",)),
    ):
        for column in columns:
            op.execute(f"ALTER TABLE agentflow_{table} ALTER {column} SET STORAGE EXTERNAL")


class _Thread:
    """Converts the rows of one thread, a page at a time."""

    def __init__(
        self, connection: sa.Connection, number: int, tenant: str, thread_id: str, seq: int
    ) -> None:
        self.connection = connection
        self.number = number
        self.key = {"tenant": tenant, "thread_id": thread_id}
        self.seq = seq
        # Namespace, checkpoint and channel to where the value is now.
        self.places: dict[tuple[str, str, str], Any] = {}
        self.hashes: dict[tuple[str, str], bytes] = {}
        self.names = [tenant, thread_id]

    def convert(self) -> None:
        for row in self._rows("checkpoints", "seq"):
            self._convert_checkpoint(row)
        calls: dict[tuple[str, str, str, str], list[Any]] = {}
        for row in self._rows("writes", "ns, checkpoint_id, task_id, idx"):
            call = (row.ns, row.checkpoint_id, row.task_id, row.task_path)
            calls.setdefault(call, []).append([row.idx, row.channel, self._unseal(row.value, row)])
        for (ns, checkpoint_id, task_id, task_path), items in calls.items():
            seq = self.next()
            body = ormsgpack.packb([[task_id, task_path, items]])
            data = _seal(body, ["writes", *self.names, ns, checkpoint_id, seq])
            self.insert("writes", ns=ns, checkpoint_id=checkpoint_id, seq=seq, data=data)
        self.connection.execute(
            sa.text("UPDATE agentflow_threads SET seq = :seq WHERE id = :id"),
            {"seq": self.seq, "id": self.number},
        )

    def _rows(self, table: str, order: str) -> Iterator[Any]:
        query = sa.text(
            f"SELECT * FROM agentflow_{table}_0001 WHERE tenant = :tenant "  # noqa: S608 -- constants
            f"AND thread_id = :thread_id ORDER BY {order} LIMIT {PAGE} OFFSET :offset"
        )
        offset = 0
        while page := self.connection.execute(query, {**self.key, "offset": offset}).all():
            yield from page
            offset += len(page)

    def _convert_checkpoint(self, row: Any) -> None:
        channels = {}
        for channel, held in ormsgpack.unpackb(self._unseal(row.channels, row)).items():
            here = (row.ns, row.checkpoint_id, channel)
            if isinstance(held, bytes):
                series = self.next()
                body = self._unseal(held, row)
                sealed = _seal(body, ["value", *self.names, series, 0])
                self.insert("values", series=series, start=0, data=sealed)
                self.places[here] = [hashlib.sha256(body).digest(), series, WHOLE, False]
            else:
                self.places[here] = self.places[row.ns, held, channel]
            channels[channel] = self.places[here]
        # The body and the metadata stay as they were serialized.
        head = b"\x92" + self._unseal(row.body, row) + self._unseal(row.metadata, row)
        parent = self.hashes.get((row.ns, row.parent_id))
        columns = {
            "checkpoint_id": row.checkpoint_id,
            "parent_id": row.parent_id,
            "attempt": row.attempt,
            "run_id": row.run_id,
            "step": row.step,
        }
        place = [*self.names, row.ns]
        values = [[channel, held[0]] for channel, held in sorted(channels.items())]
        covered = ormsgpack.packb([*place, *columns.values(), parent, head, values])
        own = self.hashes[row.ns, row.checkpoint_id] = hashlib.sha256(covered).digest()
        context = ["checkpoint", *place, row.seq, *columns.values(), own, False, False]
        data = _seal(ormsgpack.packb([head, channels, [], parent]), context)
        self.insert("checkpoints", ns=row.ns, seq=row.seq, **columns, data=data, hash=own)

    def _unseal(self, data: bytes, row: Any) -> bytes:
        """Take a value out of its envelope; a damaged one stops the migration."""
        header, body = data[: _HEADER.size], data[_PREFIX:]
        if hashlib.sha256(header + body).digest() != data[_HEADER.size : _PREFIX]:
            tenant, thread_id = self.names
            raise HashMismatchError(
                f"checkpoint {row.checkpoint_id!r} of thread {thread_id!r}"
                + (f", namespace {row.ns!r}" if row.ns else "")
                + (f" of tenant {tenant!r}" if tenant else "")
            )
        return body

    def next(self) -> int:
        self.seq += 1
        return self.seq

    def insert(self, table: str, **columns: Any) -> None:
        names = ["thread", *columns]
        self.connection.execute(
            sa.text(
                f"INSERT INTO agentflow_{table} ({', '.join(names)}) "  # noqa: S608 -- constants
                f"VALUES ({', '.join(f':{name}' for name in names)})"
            ),
            {"thread": self.number, **columns},
        )


_HEADER = struct.Struct(">BBBBQ")
_PREFIX = _HEADER.size + 32


def _seal(body: bytes, context: list[Any]) -> bytes:
    """Put a value into an envelope of the codec's version 2."""
    header = _HEADER.pack(2, 0, 1, 0, len(body))
    bound = ormsgpack.packb(context)
    digest = hashlib.sha256(header + len(bound).to_bytes(8, "big") + bound + body).digest()
    return header + digest + body


def downgrade() -> None:
    """Go back by restoring the backup."""
    raise NotImplementedError("restore the backup that was made before the migration")
