"""Views of instances. The patient record: demographics with history, merges that can be undone, orders, kinds of values, source messages."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def _id() -> sa.Column:
    return sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False)


def _text(name: str) -> sa.Column:
    return sa.Column(name, sa.Text(), server_default="", nullable=False)


def _time(name: str, *, nullable: bool = False) -> sa.Column:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _ref(name: str, target: str, *, table: str, nullable: bool = False) -> list[sa.schema.SchemaItem]:
    return [
        sa.Column(name, sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=nullable),
        sa.ForeignKeyConstraint([name], [target], name=f"fk_{table}_{name}"),
    ]


def upgrade() -> None:
    """Add what the record needs; what was known of each patient becomes the first line of its history."""
    op.create_table(
        "demographics",
        _id(),
        *_ref("patient_pk", "patient.id", table="demographics"),
        _text("name"),
        _text("birth_date"),
        _text("sex"),
        _text("source"),
        _time("at"),
        _time("received_at"),
        *_ref("message_id", "message.id", table="demographics", nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_demographics"),
    )
    op.create_index("ix_demographics_patient_pk", "demographics", ["patient_pk"])
    op.create_index("ix_demographics_message_id", "demographics", ["message_id"])
    op.execute(
        "INSERT INTO demographics (patient_pk, name, birth_date, sex, source, at, received_at) "
        "SELECT id, name, birth_date, sex, source, updated_at, updated_at FROM patient"
    )
    # Not in a batch: SQLite would make the table anew, and drop the old one from under its facts.
    for column in ("name", "birth_date", "sex", "source", "updated_at"):
        op.drop_column("patient", column)
    op.create_index("ix_patient_patient_id", "patient", ["patient_id"])
    op.create_table(
        "merge",
        _id(),
        *_ref("survivor_pk", "patient.id", table="merge"),
        *_ref("retired_pk", "patient.id", table="merge"),
        _text("source"),
        _time("said_at", nullable=True),
        _time("received_at"),
        *_ref("message_id", "message.id", table="merge", nullable=True),
        _time("undone_at", nullable=True),
        _text("undone_because"),
        sa.CheckConstraint("survivor_pk <> retired_pk", name="ck_merge_two"),
        sa.PrimaryKeyConstraint("id", name="pk_merge"),
    )
    op.create_index("ix_merge_survivor_pk", "merge", ["survivor_pk"])
    op.create_index("ix_merge_retired_pk", "merge", ["retired_pk"])
    op.create_index("ix_merge_message_id", "merge", ["message_id"])
    op.create_index(
        "uq_merge_standing",
        "merge",
        ["survivor_pk", "retired_pk"],
        unique=True,
        sqlite_where=sa.text("undone_at IS NULL"),
        postgresql_where=sa.text("undone_at IS NULL"),
    )
    op.create_table(
        "imaging_order",
        _id(),
        *_ref("patient_pk", "patient.id", table="imaging_order"),
        _text("accession_number"),
        _text("placer"),
        _text("filler"),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("is_cancelled", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        _text("source"),
        _time("said_at", nullable=True),
        _time("received_at"),
        *_ref("message_id", "message.id", table="imaging_order", nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_imaging_order"),
    )
    op.create_index("ix_imaging_order_patient_accession", "imaging_order", ["patient_pk", "accession_number"])
    op.create_index("ix_imaging_order_message_id", "imaging_order", ["message_id"])
    with op.batch_alter_table("observation") as observation:
        observation.add_column(sa.Column("kind", sa.Text(), server_default="number", nullable=False))
        observation.add_column(sa.Column("high", sa.Double(), nullable=True))
        for column in ("coded_value", "coded_scheme", "coded_meaning"):
            observation.add_column(_text(column))
        observation.add_column(_time("said_at", nullable=True))
        observation.add_column(_text("told"))
        observation.add_column(sa.Column("message_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True))
        observation.create_foreign_key("fk_observation_message_id", "message", ["message_id"], ["id"])
        observation.create_check_constraint("ck_observation_kind", "kind IN ('number', 'text', 'coded', 'range', 'ratio')")
    # The first release knew numbers and texts, and did not say which.
    op.execute("UPDATE observation SET kind = 'text' WHERE value IS NULL AND text <> ''")
    op.drop_index("ix_observation_patient_at", "observation")
    op.create_index("ix_observation_patient_at", "observation", ["patient_pk", "at", "key"])
    op.create_index("ix_observation_message_id", "observation", ["message_id"])
    op.create_index("ix_observation_received_at", "observation", ["received_at"])
    op.create_index("ix_message_received_at", "message", ["received_at"])
    op.add_column("instance", _text("view"))
    op.create_index("ix_message_sender", "message", ["sender", "received_at"])
    op.add_column("study", _time("record_changed_at", nullable=True))
    op.create_index(
        "ix_study_record_changed",
        "study",
        ["record_changed_at"],
        sqlite_where=sa.text("record_changed_at IS NOT NULL"),
        postgresql_where=sa.text("record_changed_at IS NOT NULL"),
    )
    # NULL for what the first release made: nobody knows what it was made from.
    op.add_column("document", sa.Column("record_sha256", sa.Text(), nullable=True))
