"""What senders asked us to commit to, until they were told."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    """Add the table of reports on storage commitment that we owe."""
    big = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "promise",
        sa.Column("id", big, autoincrement=True, nullable=False),
        sa.Column("calling_ae", sa.Text(), nullable=False),
        sa.Column("address", sa.Text(), server_default="", nullable=False),
        sa.Column("transaction_uid", sa.Text(), nullable=False),
        sa.Column("wanted", sa.JSON(), nullable=False),
        sa.Column("asked_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("attempt", sa.Integer(), server_default="0", nullable=False),
        sa.Column("not_before", sa.DateTime(timezone=True), nullable=False),
        sa.UniqueConstraint("calling_ae", "transaction_uid", name="uq_promise_calling_ae_transaction_uid"),
        sa.PrimaryKeyConstraint("id", name="pk_promise"),
    )
