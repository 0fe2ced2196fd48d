"""Tables, their constraints and indexes, for SQLite and PostgreSQL alike. Facts, no queries.

::

    patient ──< observation >── message (what was said, when, by whom)
    patient ──< demographics        patient ──< merge >── patient        patient ──< imaging_order
    study ──< series ──< instance
    study ──< job >── document     finding >── document
    study ──< event

A study names its patient by (issuer, patient ID), not by a row: images may come before the record.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Dialect, Row

#: Must be the head of migrations/; a test compares them.
REVISION: Final = "0003"

#: Drawn in HOUSE §5 and worker/README.md: available → leased → completed | discarded | cancelled.
JOB_STATES: Final = ("available", "leased", "completed", "discarded", "cancelled")
STUDY_STATES: Final = ("receiving", "complete")

#: HL7 table 0085: statuses that take back what was said under the same key; and facts of a FHIR server, which the source names.
#: Word for word as the indexes say it, or SQLite does not use them.
IS_WITHDRAWN: Final = "status IN ('D', 'W', 'X')"
IS_OF_SERVER: Final = "substr(source, 1, 5) = 'FHIR '"

#: A row of any query, for signatures.
AnyRow = Row[*tuple[Any, ...]]

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)


class UtcDateTime(sa.types.TypeDecorator[datetime]):
    """An aware UTC datetime in both databases; a naive one never enters the store."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse naive times; SQLite keeps them as UTC text, which sorts."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("A naive datetime may not enter the store.")
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, _dialect: Dialect) -> datetime | None:
        """Give back an aware UTC time."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _id() -> sa.Column[int]:
    big = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    return sa.Column("id", big, primary_key=True, autoincrement=True)


def _text(name: str, *, default: str = "") -> sa.Column[str]:
    return sa.Column(name, sa.Text, nullable=False, default=default, server_default=default)


def _ref(name: str, target: str, *, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.ForeignKey(target), nullable=nullable)


def _where(condition: str) -> dict[str, Any]:
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def _in(column: str, states: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(state) for state in states)})"


patient = sa.Table(
    "patient",
    metadata,
    _id(),
    _text("issuer"),
    _text("patient_id"),
    sa.UniqueConstraint("issuer", "patient_id"),
    sa.CheckConstraint("issuer <> '' AND patient_id <> ''", name="key"),
    # An ID alone names nobody; asked only to see that two issuers know it.
    sa.Index("ix_patient_patient_id", "patient_id"),
)

#: What was said of a patient, message by message; of each part the last said that is not empty stands.
demographics = sa.Table(
    "demographics",
    metadata,
    _id(),
    _ref("patient_pk", "patient.id"),
    _text("name"),
    _text("birth_date"),
    _text("sex"),
    _text("source"),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("received_at", UtcDateTime, nullable=False),
    _ref("message_id", "message.id", nullable=True),
    sa.Index("ix_demographics_patient_pk", "patient_pk"),
    sa.Index("ix_demographics_message_id", "message_id"),
)

#: `retired` and `survivor` are one person, until it is undone. Facts stay with the key they came under.
merge = sa.Table(
    "merge",
    metadata,
    _id(),
    _ref("survivor_pk", "patient.id"),
    _ref("retired_pk", "patient.id"),
    _text("source"),
    sa.Column("said_at", UtcDateTime, nullable=True),
    sa.Column("received_at", UtcDateTime, nullable=False),
    _ref("message_id", "message.id", nullable=True),
    sa.Column("undone_at", UtcDateTime, nullable=True),
    _text("undone_because"),
    sa.CheckConstraint("survivor_pk <> retired_pk", name="two"),
    sa.Index("ix_merge_survivor_pk", "survivor_pk"),
    sa.Index("ix_merge_retired_pk", "retired_pk"),
    sa.Index("ix_merge_message_id", "message_id"),
    sa.Index(
        "uq_merge_standing",
        "survivor_pk",
        "retired_pk",
        unique=True,
        **_where("undone_at IS NULL"),
    ),
)

imaging_order = sa.Table(
    "imaging_order",
    metadata,
    _id(),
    _ref("patient_pk", "patient.id"),
    _text("accession_number"),
    _text("placer"),
    _text("filler"),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("is_cancelled", sa.Boolean, nullable=False, server_default=sa.text("false")),
    _text("source"),
    sa.Column("said_at", UtcDateTime, nullable=True),
    sa.Column("received_at", UtcDateTime, nullable=False),
    _ref("message_id", "message.id", nullable=True),
    sa.Index("ix_imaging_order_patient_accession", "patient_pk", "accession_number"),
    sa.Index("ix_imaging_order_message_id", "message_id"),
)

observation = sa.Table(
    "observation",
    metadata,
    _id(),
    _ref("patient_pk", "patient.id"),
    _text("code"),
    _text("scheme"),
    _text("meaning"),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("value", sa.Double, nullable=True),
    _text("comparator"),
    _text("unit"),
    _text("text"),
    _text("status", default="F"),
    _text("key"),
    _text("source"),
    sa.Column("kind", sa.Text, nullable=False, server_default="number"),
    sa.Column("high", sa.Double, nullable=True),
    _text("coded_value"),
    _text("coded_scheme"),
    _text("coded_meaning"),
    # When it was said: of two finals under one key the later said stands, in whatever order they came.
    sa.Column("said_at", UtcDateTime, nullable=True),
    # JSON: name, birth date and sex that came with it, in a message about something else; '' for none.
    _text("told"),
    sa.Column("received_at", UtcDateTime, nullable=False),
    _ref("message_id", "message.id", nullable=True),
    sa.CheckConstraint(_in("kind", ("number", "text", "coded", "range", "ratio")), name="kind"),
    # Each fact of a message is looked up under its key, and what stands under the keys that a view takes.
    sa.Index("ix_observation_patient_key", "patient_pk", "key", "at"),
    # What a bundle asks for, of its time: a patient may have a hundred thousand facts.
    sa.Index("ix_observation_patient_code", "patient_pk", "code", "at"),
    # A withdrawn panel withdraws its components, whatever their codes are.
    sa.Index("ix_observation_withdrawn", "patient_pk", **_where(IS_WITHDRAWN)),
    # A server's resource that comes with another patient was moved; names in files and HL7 are not unique.
    sa.Index("ix_observation_of_server", "key", **_where(IS_OF_SERVER)),
    sa.Index("ix_observation_message_id", "message_id"),
    # What is past its time is asked for by when it came.
    sa.Index("ix_observation_received_at", "received_at"),
)

message = sa.Table(
    "message",
    metadata,
    _id(),
    _text("sender"),
    _text("control_id"),
    _text("sent_at"),
    # Some senders count control IDs anew each second: another text is another message.
    _text("sha256"),
    _text("trigger"),
    sa.Column("result", sa.Text, nullable=False),
    _text("reason"),
    sa.Column("raw", sa.LargeBinary, nullable=True),
    sa.Column("received_at", UtcDateTime, nullable=False),
    sa.CheckConstraint(_in("result", ("applied", "ignored", "refused")), name="result"),
    sa.Index(
        "uq_message_accepted",
        "sender",
        "control_id",
        "sent_at",
        "sha256",
        unique=True,
        **_where("result <> 'refused'"),
    ),
    sa.Index("ix_message_sender", "sender", "received_at"),
    sa.Index("ix_message_received_at", "received_at"),
)

study = sa.Table(
    "study",
    metadata,
    _id(),
    sa.Column("study_instance_uid", sa.Text, nullable=False, unique=True),
    _text("issuer"),
    _text("patient_id"),
    _text("patient_name"),
    _text("birth_date"),
    _text("sex"),
    _text("accession_number"),
    _text("description"),
    sa.Column("study_at", UtcDateTime, nullable=True),
    sa.Column("state", sa.Text, nullable=False, server_default="receiving"),
    sa.Column("version", sa.Integer, nullable=False, server_default="0"),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("last_received_at", UtcDateTime, nullable=False),
    sa.Column("quiet_until", UtcDateTime, nullable=False),
    sa.Column("completed_at", UtcDateTime, nullable=True),
    sa.Column("expected_instances", sa.Integer, nullable=True),
    sa.Column("asked_at", UtcDateTime, nullable=True),
    _text("calling_ae"),
    _text("address"),
    _text("hold"),
    # The record of its patient changed, whatever its state was: reports may have to be made anew.
    sa.Column("record_changed_at", UtcDateTime, nullable=True),
    sa.CheckConstraint(_in("state", STUDY_STATES), name="state"),
    sa.Index("ix_study_receiving", "quiet_until", **_where("state = 'receiving'")),
    sa.Index("ix_study_patient", "issuer", "patient_id"),
    sa.Index("ix_study_record_changed", "record_changed_at", **_where("record_changed_at IS NOT NULL")),
)

series = sa.Table(
    "series",
    metadata,
    _id(),
    _ref("study_id", "study.id"),
    sa.Column("series_instance_uid", sa.Text, nullable=False),
    _text("modality"),
    _text("body_part"),
    _text("description"),
    _text("orientation"),
    sa.Column("slice_mm", sa.Double, nullable=False, server_default="0"),
    sa.UniqueConstraint("study_id", "series_instance_uid"),
)

instance = sa.Table(
    "instance",
    metadata,
    _id(),
    _ref("series_id", "series.id"),
    sa.Column("sop_instance_uid", sa.Text, nullable=False, unique=True),
    sa.Column("sop_class_uid", sa.Text, nullable=False),
    sa.Column("transfer_syntax_uid", sa.Text, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    _text("view"),
    sa.Column("received_at", UtcDateTime, nullable=False),
    sa.Index("ix_instance_series_id", "series_id"),
    sa.Index("ix_instance_path", "path"),
)

document = sa.Table(
    "document",
    metadata,
    _id(),
    _ref("study_id", "study.id"),
    sa.Column("sop_instance_uid", sa.Text, nullable=False, unique=True),
    sa.Column("sop_class_uid", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    _text("bundle"),
    sa.Column("input_version", sa.Integer, nullable=False),
    _text("input_sha256"),
    # Of the record's part of the input alone, to see a change of the record. NULL: made before it was kept, cannot be compared.
    sa.Column("record_sha256", sa.Text, nullable=True),
    _text("predecessor_uid"),
    _text("failure"),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Index("ix_document_study_id", "study_id"),
)

finding = sa.Table(
    "finding",
    metadata,
    _id(),
    _ref("document_id", "document.id"),
    _text("name"),
    _text("code"),
    _text("scheme"),
    _text("meaning"),
    sa.Column("probability", sa.Double, nullable=False),
    sa.Column("threshold", sa.Double, nullable=False),
    sa.Column("verdict", sa.Text, nullable=False),
    sa.Column("shapley", sa.JSON, nullable=False),
    sa.Column("attributions", sa.JSON, nullable=False),
    sa.Column("is_atypical", sa.Boolean, nullable=False, server_default=sa.text("false")),
    # The arrays of domain.Saliency as a compressed .npz, without pickle.
    sa.Column("saliency", sa.LargeBinary, nullable=True),
    sa.CheckConstraint("probability BETWEEN 0 AND 1", name="probability"),
    sa.CheckConstraint(_in("verdict", ("positive", "negative", "uncertain")), name="verdict"),
    sa.Index("ix_finding_document_id", "document_id"),
)

job = sa.Table(
    "job",
    metadata,
    _id(),
    sa.Column("kind", sa.Text, nullable=False),
    _ref("study_id", "study.id"),
    _text("bundle"),
    sa.Column("input_version", sa.Integer, nullable=False, server_default="0"),
    _ref("document_id", "document.id", nullable=True),
    _text("destination"),
    # One job for one piece of work: enqueueing twice is a no-op.
    sa.Column("unique_key", sa.Text, nullable=False, unique=True),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False, server_default="available"),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
    # NULL: no limit. A report is delivered however long its PACS is down.
    sa.Column("max_attempts", sa.Integer, nullable=True),
    sa.Column("not_before", UtcDateTime, nullable=False),
    sa.Column("is_snoozed", sa.Boolean, nullable=False, server_default=sa.text("false")),
    _text("lease_owner"),
    sa.Column("lease_generation", sa.Integer, nullable=False, server_default="0"),
    sa.Column("lease_expires_at", UtcDateTime, nullable=True),
    _text("reason"),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("started_at", UtcDateTime, nullable=True),
    sa.Column("finished_at", UtcDateTime, nullable=True),
    sa.CheckConstraint(_in("kind", ("infer", "deliver")), name="kind"),
    sa.CheckConstraint(_in("state", JOB_STATES), name="state"),
    sa.CheckConstraint("(state = 'leased') = (lease_expires_at IS NOT NULL)", name="lease"),
    sa.Index(
        "ix_job_available",
        "kind",
        "priority",
        "not_before",
        "id",
        **_where("state = 'available'"),
    ),
    sa.Index("ix_job_leased", "lease_expires_at", **_where("state = 'leased'")),
    sa.Index("ix_job_study_id", "study_id"),
)

event = sa.Table(
    "event",
    metadata,
    _id(),
    sa.Column("at", UtcDateTime, nullable=False),
    _ref("study_id", "study.id", nullable=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("facts", sa.JSON, nullable=False),
    sa.Index("ix_event_study_id", "study_id", "id"),
)
