"""What the archives were asked to promise of our documents, and what they said."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the table of storage commitment."""
    big = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "commitment",
        sa.Column("id", big, autoincrement=True, nullable=False),
        sa.Column("job_id", big, nullable=False),
        sa.Column("transaction_uid", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), server_default="asked", nullable=False),
        sa.Column("asked_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("look_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("answered_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("reason", sa.Text(), server_default="", nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name="fk_commitment_job_id"),
        sa.CheckConstraint("state IN ('asked', 'committed', 'refused', 'found', 'unproven')", name="ck_commitment_state"),
        sa.UniqueConstraint("transaction_uid", "job_id", name="uq_commitment_transaction_uid_job_id"),
        sa.PrimaryKeyConstraint("id", name="pk_commitment"),
    )
    op.create_index("ix_commitment_job_id", "commitment", ["job_id"])
    waits = sa.text("state = 'asked'")
    op.create_index("ix_commitment_asked", "commitment", ["look_at"], sqlite_where=waits, postgresql_where=waits)
