"""Who may use the page, what a radiologist said of a finding, and indexes for the worklist."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    """Add accounts, sessions and reviews, and what the worklist and the metrics look up."""
    big = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "account",
        sa.Column("id", big, autoincrement=True, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("password", sa.Text(), server_default="", nullable=False),
        sa.Column("subject", sa.Text(), server_default="", nullable=False),
        sa.Column("roles", sa.Text(), nullable=False),
        sa.Column("failures", sa.Integer(), server_default="0", nullable=False),
        sa.Column("locked_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.UniqueConstraint("name", name="uq_account_name"),
        sa.PrimaryKeyConstraint("id", name="pk_account"),
    )
    is_elsewhere = sa.text("subject <> ''")
    op.create_index("uq_account_subject", "account", ["subject"], unique=True, sqlite_where=is_elsewhere, postgresql_where=is_elsewhere)
    op.create_table(
        "session",
        sa.Column("id", big, autoincrement=True, nullable=False),
        sa.Column("token_sha256", sa.Text(), nullable=False),
        sa.Column("account_id", big, nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name="fk_session_account_id"),
        sa.UniqueConstraint("token_sha256", name="uq_session_token_sha256"),
        sa.PrimaryKeyConstraint("id", name="pk_session"),
    )
    op.create_index("ix_session_account_id", "session", ["account_id"])
    op.create_table(
        "review",
        sa.Column("id", big, autoincrement=True, nullable=False),
        sa.Column("finding_id", big, nullable=False),
        sa.Column("author", sa.Text(), nullable=False),
        sa.Column("verdict", sa.Text(), nullable=False),
        sa.Column("note", sa.Text(), server_default="", nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("verdict IN ('positive', 'negative', 'uncertain')", name=op.f("ck_review_verdict")),
        sa.ForeignKeyConstraint(["finding_id"], ["finding.id"], name="fk_review_finding_id"),
        sa.PrimaryKeyConstraint("id", name="pk_review"),
    )
    op.create_index("ix_review_finding_id", "review", ["finding_id"])
    op.create_index("ix_study_last_received_at", "study", ["last_received_at", "id"])
    op.create_index("ix_study_accession_number", "study", ["accession_number"])
    op.create_index("ix_study_patient_id", "study", ["patient_id"])
    is_held, is_given_up = sa.text("hold <> ''"), sa.text("state IN ('discarded', 'cancelled')")
    op.create_index("ix_study_held", "study", ["id"], sqlite_where=is_held, postgresql_where=is_held)
    op.create_index("ix_job_given_up", "job", ["study_id"], sqlite_where=is_given_up, postgresql_where=is_given_up)
    op.create_index("ix_job_finished_at", "job", ["finished_at"])
