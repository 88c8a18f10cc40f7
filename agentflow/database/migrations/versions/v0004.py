"""Versions of graphs: their fingerprints, the runs that rely on them, and routes.

Nothing is taken away.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add a column and two tables."""
    op.add_column("agentflow_runs", sa.Column("fingerprint", sa.Text(), nullable=True))
    op.create_table(
        "agentflow_fingerprints",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("graph", sa.Text(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("form", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("tenant", "digest"),
    )
    op.create_table(
        "agentflow_routes",
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("graph", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("share", sa.Integer(), nullable=False),
        sa.Column("at", sa.BigInteger(), nullable=False),
        sa.Column("set_by", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("tenant", "graph", "version"),
    )
