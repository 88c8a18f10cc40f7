"""Runs the migrations on the connection that `migrate` hands over."""

from alembic import context

from agentflow.database.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=context.config.attributes["version_table"],
    transactional_ddl=False,  # the caller holds the transaction
)
context.run_migrations()
