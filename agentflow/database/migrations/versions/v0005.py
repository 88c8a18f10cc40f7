"""Effects: their journal, the roots of forks, and runs whose effects are undone."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0003"

RUNS = (
    ("root", sa.Text()),
    ("forked_from", sa.Text()),
    ("effect_shift", sa.Integer()),
    ("saga", sa.Text()),
    ("saga_cause", sa.LargeBinary()),
)


def upgrade() -> None:
    """Add a table, and columns to runs."""
    for name, kind in RUNS:
        op.add_column("agentflow_runs", sa.Column(name, kind, nullable=True))
    auto = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "agentflow_effects",
        sa.Column("seq", auto, primary_key=True, autoincrement=True),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("effect_id", sa.Text(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("key_hash", sa.Text(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("thread_id", sa.Text(), nullable=False),
        sa.Column("graph", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("compensate", sa.Text(), nullable=True),
        sa.Column("ns", sa.Text(), nullable=False),
        sa.Column("task_id", sa.Text(), nullable=False),
        sa.Column("node", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("on_in_doubt", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("token", sa.BigInteger(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("intended_at", sa.BigInteger(), nullable=False),
        sa.Column("timeout", sa.BigInteger(), nullable=True),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.Column("ended_seq", sa.BigInteger(), nullable=True),
        sa.Column("resolved_by", sa.Text(), nullable=True),
        sa.Column("request", sa.LargeBinary(), nullable=False),
        sa.Column("outcome", sa.LargeBinary(), nullable=True),
        sa.Column("comment", sa.LargeBinary(), nullable=True),
        sa.Column("late", sa.LargeBinary(), nullable=True),
        sa.UniqueConstraint("tenant", "effect_id", name="agentflow_effects_id"),
        sa.UniqueConstraint("tenant", "scope", "key_hash", name="agentflow_effects_key"),
    )
    op.create_index("agentflow_effects_run", "agentflow_effects", ["tenant", "run_id", "seq"])
