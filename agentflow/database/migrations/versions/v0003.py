"""Recovery: isolation, pauses, deadlines, rollbacks, workers and epochs; indexes for many runs.

Nothing is taken away but two indexes that no query uses any more.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

RUNS = (
    ("instance", sa.Text()),
    ("claimed_at", sa.BigInteger()),
    ("losses", sa.Integer()),
    ("has_loss_counted", sa.Boolean()),
    ("is_isolated", sa.Boolean()),
    ("pardoned", sa.Integer()),
    ("resume_from", sa.Text()),
    ("paused_at", sa.BigInteger()),
    ("is_paused_by_failure", sa.Boolean()),
    ("start_deadline_at", sa.BigInteger()),
    ("deadline_at", sa.BigInteger()),
    ("timeout", sa.BigInteger()),
    ("rollback", sa.Text()),
    ("cancellation", sa.LargeBinary()),
    ("retry", sa.LargeBinary()),
)
LETTERS = (
    ("thread_id", sa.Text()),
    ("graph", sa.Text()),
    ("version", sa.Text()),
    ("reason", sa.Text()),
    ("step", sa.Integer()),
)
INDEXES = (
    (
        "due",
        ("tenant", "queue", sa.text("priority DESC"), "seq"),
        "status = 'queued' AND paused_at IS NULL",
    ),
    (
        "start_deadline",
        ("tenant", "start_deadline_at"),
        "status = 'queued' AND start_deadline_at IS NOT NULL",
    ),
    (
        "deadline",
        ("tenant", "deadline_at"),
        "status IN ('queued', 'waiting') AND deadline_at IS NOT NULL",
    ),
    ("lease", ("tenant", "lease_expires_at"), "status = 'running'"),
    ("instance", ("instance",), "status = 'running'"),
    ("rollback", ("tenant", "thread_id"), "rollback = 'pending'"),
)


def upgrade() -> None:
    """Add columns, tables and indexes, and say in dead letters whose they are."""
    for name, kind in RUNS:
        op.add_column("agentflow_runs", sa.Column(name, kind, nullable=True))
    for name, kind in LETTERS:
        op.add_column("agentflow_dead_letters", sa.Column(name, kind, nullable=True))
    op.drop_index("agentflow_runs_claim", "agentflow_runs")
    op.drop_index("agentflow_runs_expiry", "agentflow_runs")
    for name, columns, condition in INDEXES:
        where = sa.text(condition)
        op.create_index(
            f"agentflow_runs_{name}",
            "agentflow_runs",
            list(columns),
            sqlite_where=where,
            postgresql_where=where,
        )
    op.create_index(
        "agentflow_dead_letters_at", "agentflow_dead_letters", ["tenant", "at", "run_id"]
    )
    _create_tables()
    _name_owners()


def _name_owners() -> None:
    columns = ("thread_id", "graph", "version", "step")
    letters = sa.table("agentflow_dead_letters", *map(sa.column, ("tenant", "run_id", *columns)))
    runs = sa.table("agentflow_runs", *map(sa.column, ("tenant", "run_id", *columns)))
    is_own = sa.and_(runs.c.tenant == letters.c.tenant, runs.c.run_id == letters.c.run_id)
    found = {n: sa.select(runs.c[n]).where(is_own).scalar_subquery() for n in columns}
    op.execute(sa.update(letters).values(found))


def _create_tables() -> None:
    op.create_table(
        "agentflow_pauses",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("paused_by", sa.Text(), nullable=True),
        sa.Column("reason", sa.LargeBinary(), nullable=True),
        sa.PrimaryKeyConstraint("tenant", "scope", "name"),
    )
    op.create_table(
        "agentflow_workers",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("instance", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("report", sa.Text(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("beat_at", sa.BigInteger(), nullable=False),
        sa.Column("lost", sa.Integer(), nullable=True),
        sa.Column("lost_at", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("tenant", "instance"),
    )
    op.create_table(
        "agentflow_logs",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("event_seq", sa.BigInteger(), nullable=False),
        sa.Column("event_hash", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("tenant"),
    )
    op.create_table(
        "agentflow_epochs",
        sa.Column("epoch", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("epoch"),
    )
