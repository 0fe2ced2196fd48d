"""Alembic's entry: runs in the connection that Store.migrate opened, one transaction for all steps."""

from alembic import context

connection = context.config.attributes["connection"]
# Alembic's own transaction handling is left out: Store.begin() holds the one that counts.
context.configure(connection=connection, transactional_ddl=True, transaction_per_migration=False)
context.run_migrations()
