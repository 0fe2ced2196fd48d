"""Tables, their constraints and indexes, for SQLite and PostgreSQL alike. Facts, no queries.

::

    patient ──< observation >── message (what was said, when, by whom)
    patient ──< demographics        patient ──< merge >── patient        patient ──< imaging_order
    study ──< series ──< instance
    study ──< job >── document     finding >── document     commitment >── job
    study ──< event                 review >── finding; account ──< session (people.py)

A study names its patient by (issuer, patient ID), not by a row: images may come before the record.
"""

from __future__ import annotations

from typing import Any, Final

import sqlalchemy as sa
from sqlalchemy.engine import Row

from worker.store.columns import UtcDateTime, id_column, is_one_of, metadata, reference, text, where
from worker.store.people import account, review, session

__all__ = ["account", "metadata", "review", "session"]  # the others are made here

#: Must be the head of migrations/; a test compares them.
REVISION: Final = "0008"

#: Drawn in HOUSE §5 and worker/README.md: available → leased → completed | discarded | cancelled.
JOB_STATES: Final = ("available", "leased", "completed", "discarded", "cancelled")
UNFINISHED, GIVEN_UP = JOB_STATES[:2], JOB_STATES[3:]
STUDY_STATES: Final = ("receiving", "complete")
#: Of a document at an archive that was asked to commit: see store/commitments.py.
COMMITMENT_STATES: Final = ("asked", "committed", "refused", "found", "unproven")

#: HL7 table 0085: statuses that take back what was said under the same key; and facts of a FHIR server, which the source names.
#: Word for word as the indexes say it, or SQLite does not use them.
IS_WITHDRAWN: Final = "status IN ('D', 'W', 'X')"
IS_OF_SERVER: Final = "substr(source, 1, 5) = 'FHIR '"

#: A row of any query, for signatures.
AnyRow = Row[*tuple[Any, ...]]

patient = sa.Table(
    "patient",
    metadata,
    id_column(),
    text("issuer"),
    text("patient_id"),
    sa.UniqueConstraint("issuer", "patient_id"),
    sa.CheckConstraint("issuer <> '' AND patient_id <> ''", name="key"),
    # An ID alone names nobody; asked only to see that two issuers know it.
    sa.Index("ix_patient_patient_id", "patient_id"),
)

#: What was said of a patient, message by message; of each part the last said that is not empty stands.
demographics = sa.Table(
    "demographics",
    metadata,
    id_column(),
    reference("patient_pk", "patient.id"),
    text("name"),
    text("birth_date"),
    text("sex"),
    text("source"),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("received_at", UtcDateTime, nullable=False),
    reference("message_id", "message.id", nullable=True),
    sa.Index("ix_demographics_patient_pk", "patient_pk"),
    sa.Index("ix_demographics_message_id", "message_id"),
)

#: `retired` and `survivor` are one person, until it is undone. Facts stay with the key they came under.
merge = sa.Table(
    "merge",
    metadata,
    id_column(),
    reference("survivor_pk", "patient.id"),
    reference("retired_pk", "patient.id"),
    text("source"),
    sa.Column("said_at", UtcDateTime, nullable=True),
    sa.Column("received_at", UtcDateTime, nullable=False),
    reference("message_id", "message.id", nullable=True),
    sa.Column("undone_at", UtcDateTime, nullable=True),
    text("undone_because"),
    sa.CheckConstraint("survivor_pk <> retired_pk", name="two"),
    sa.Index("ix_merge_survivor_pk", "survivor_pk"),
    sa.Index("ix_merge_retired_pk", "retired_pk"),
    sa.Index("ix_merge_message_id", "message_id"),
    sa.Index(
        "uq_merge_standing",
        "survivor_pk",
        "retired_pk",
        unique=True,
        **where("undone_at IS NULL"),
    ),
)

imaging_order = sa.Table(
    "imaging_order",
    metadata,
    id_column(),
    reference("patient_pk", "patient.id"),
    text("accession_number"),
    text("placer"),
    text("filler"),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("is_cancelled", sa.Boolean, nullable=False, server_default=sa.text("false")),
    text("source"),
    sa.Column("said_at", UtcDateTime, nullable=True),
    sa.Column("received_at", UtcDateTime, nullable=False),
    reference("message_id", "message.id", nullable=True),
    sa.Index("ix_imaging_order_patient_accession", "patient_pk", "accession_number"),
    sa.Index("ix_imaging_order_message_id", "message_id"),
)

observation = sa.Table(
    "observation",
    metadata,
    id_column(),
    reference("patient_pk", "patient.id"),
    text("code"),
    text("scheme"),
    text("meaning"),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.Column("value", sa.Double, nullable=True),
    text("comparator"),
    text("unit"),
    text("text"),
    text("status", default="F"),
    text("key"),
    text("source"),
    sa.Column("kind", sa.Text, nullable=False, server_default="number"),
    sa.Column("high", sa.Double, nullable=True),
    text("coded_value"),
    text("coded_scheme"),
    text("coded_meaning"),
    # When it was said: of two finals under one key the later said stands, in whatever order they came.
    sa.Column("said_at", UtcDateTime, nullable=True),
    # JSON: name, birth date and sex that came with it, in a message about something else; '' for none.
    text("told"),
    sa.Column("received_at", UtcDateTime, nullable=False),
    reference("message_id", "message.id", nullable=True),
    sa.CheckConstraint(is_one_of("kind", ("number", "text", "coded", "range", "ratio")), name="kind"),
    # Each fact of a message is looked up under its key, and what stands under the keys that a view takes.
    sa.Index("ix_observation_patient_key", "patient_pk", "key", "at"),
    # What a bundle asks for, of its time: a patient may have a hundred thousand facts.
    sa.Index("ix_observation_patient_code", "patient_pk", "code", "at"),
    # A withdrawn panel withdraws its components, whatever their codes are.
    sa.Index("ix_observation_withdrawn", "patient_pk", **where(IS_WITHDRAWN)),
    # A server's resource that comes with another patient was moved; names in files and HL7 are not unique.
    sa.Index("ix_observation_of_server", "key", **where(IS_OF_SERVER)),
    sa.Index("ix_observation_message_id", "message_id"),
    # What is past its time is asked for by when it came.
    sa.Index("ix_observation_received_at", "received_at"),
)

message = sa.Table(
    "message",
    metadata,
    id_column(),
    text("sender"),
    text("control_id"),
    text("sent_at"),
    # Some senders count control IDs anew each second: another text is another message.
    text("sha256"),
    text("trigger"),
    sa.Column("result", sa.Text, nullable=False),
    text("reason"),
    sa.Column("raw", sa.LargeBinary, nullable=True),
    sa.Column("received_at", UtcDateTime, nullable=False),
    sa.CheckConstraint(is_one_of("result", ("applied", "ignored", "refused")), name="result"),
    sa.Index(
        "uq_message_accepted",
        "sender",
        "control_id",
        "sent_at",
        "sha256",
        unique=True,
        **where("result <> 'refused'"),
    ),
    sa.Index("ix_message_sender", "sender", "received_at"),
    sa.Index("ix_message_received_at", "received_at"),
)

study = sa.Table(
    "study",
    metadata,
    id_column(),
    sa.Column("study_instance_uid", sa.Text, nullable=False, unique=True),
    text("issuer"),
    text("patient_id"),
    text("patient_name"),
    text("birth_date"),
    text("sex"),
    text("accession_number"),
    text("description"),
    sa.Column("study_at", UtcDateTime, nullable=True),
    sa.Column("state", sa.Text, nullable=False, server_default="receiving"),
    sa.Column("version", sa.Integer, nullable=False, server_default="0"),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("last_received_at", UtcDateTime, nullable=False),
    sa.Column("quiet_until", UtcDateTime, nullable=False),
    sa.Column("completed_at", UtcDateTime, nullable=True),
    sa.Column("expected_instances", sa.Integer, nullable=True),
    sa.Column("asked_at", UtcDateTime, nullable=True),
    text("calling_ae"),
    text("address"),
    text("hold"),
    # The record of its patient changed, whatever its state was: reports may have to be made anew.
    sa.Column("record_changed_at", UtcDateTime, nullable=True),
    # All its files went under [retention], and none came since.
    sa.Column("removed_at", UtcDateTime, nullable=True),
    sa.CheckConstraint(is_one_of("state", STUDY_STATES), name="state"),
    sa.Index("ix_study_receiving", "quiet_until", **where("state = 'receiving'")),
    sa.Index("ix_study_patient", "issuer", "patient_id"),
    # The worklist (worklist.py): its order, what is searched for, and the few that stand apart.
    sa.Index("ix_study_last_received_at", "last_received_at", "id"),
    sa.Index("ix_study_accession_number", "accession_number"),
    sa.Index("ix_study_patient_id", "patient_id"),
    sa.Index("ix_study_held", "id", **where("hold <> ''")),
    sa.Index("ix_study_record_changed", "record_changed_at", **where("record_changed_at IS NOT NULL")),
)

series = sa.Table(
    "series",
    metadata,
    id_column(),
    reference("study_id", "study.id"),
    sa.Column("series_instance_uid", sa.Text, nullable=False),
    text("modality"),
    text("body_part"),
    text("description"),
    text("orientation"),
    sa.Column("slice_mm", sa.Double, nullable=False, server_default="0"),
    sa.UniqueConstraint("study_id", "series_instance_uid"),
)

instance = sa.Table(
    "instance",
    metadata,
    id_column(),
    reference("series_id", "series.id"),
    sa.Column("sop_instance_uid", sa.Text, nullable=False, unique=True),
    sa.Column("sop_class_uid", sa.Text, nullable=False),
    sa.Column("transfer_syntax_uid", sa.Text, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    text("view"),
    # 0: it came before this was kept.
    sa.Column("frames", sa.Integer, nullable=False, server_default="0"),
    # JSON of domain.ImageFacts without what is not known; only ever read whole, by the rules that choose series. '': nothing is known.
    text("facts"),
    sa.Column("received_at", UtcDateTime, nullable=False),
    # Its file went under [retention]; the row stays, so that a resend is known. The file may outlive the mark, never the other way.
    sa.Column("removed_at", UtcDateTime, nullable=True),
    sa.Index("ix_instance_series_id", "series_id"),
    sa.Index("ix_instance_path", "path"),
)

document = sa.Table(
    "document",
    metadata,
    id_column(),
    reference("study_id", "study.id"),
    sa.Column("sop_instance_uid", sa.Text, nullable=False, unique=True),
    sa.Column("sop_class_uid", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    text("bundle"),
    sa.Column("input_version", sa.Integer, nullable=False),
    text("input_sha256"),
    # Of the record's part of the input alone, to see a change of the record. NULL: made before it was kept, cannot be compared.
    sa.Column("record_sha256", sa.Text, nullable=True),
    text("predecessor_uid"),
    text("failure"),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("data", sa.LargeBinary, nullable=False),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Index("ix_document_study_id", "study_id"),
)

finding = sa.Table(
    "finding",
    metadata,
    id_column(),
    reference("document_id", "document.id"),
    text("name"),
    text("code"),
    text("scheme"),
    text("meaning"),
    sa.Column("probability", sa.Double, nullable=False),
    sa.Column("threshold", sa.Double, nullable=False),
    sa.Column("verdict", sa.Text, nullable=False),
    sa.Column("shapley", sa.JSON, nullable=False),
    sa.Column("attributions", sa.JSON, nullable=False),
    sa.Column("is_atypical", sa.Boolean, nullable=False, server_default=sa.text("false")),
    # The arrays of domain.Saliency as a compressed .npz, without pickle.
    sa.Column("saliency", sa.LargeBinary, nullable=True),
    sa.CheckConstraint("probability BETWEEN 0 AND 1", name="probability"),
    sa.CheckConstraint(is_one_of("verdict", ("positive", "negative", "uncertain")), name="verdict"),
    sa.Index("ix_finding_document_id", "document_id"),
)

job = sa.Table(
    "job",
    metadata,
    id_column(),
    sa.Column("kind", sa.Text, nullable=False),
    reference("study_id", "study.id"),
    text("bundle"),
    sa.Column("input_version", sa.Integer, nullable=False, server_default="0"),
    reference("document_id", "document.id", nullable=True),
    text("destination"),
    # One job for one piece of work: enqueueing twice is a no-op.
    sa.Column("unique_key", sa.Text, nullable=False, unique=True),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("state", sa.Text, nullable=False, server_default="available"),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
    # NULL: no limit. A report is delivered however long its PACS is down.
    sa.Column("max_attempts", sa.Integer, nullable=True),
    sa.Column("not_before", UtcDateTime, nullable=False),
    sa.Column("is_snoozed", sa.Boolean, nullable=False, server_default=sa.text("false")),
    text("lease_owner"),
    sa.Column("lease_generation", sa.Integer, nullable=False, server_default="0"),
    sa.Column("lease_expires_at", UtcDateTime, nullable=True),
    text("reason"),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Column("started_at", UtcDateTime, nullable=True),
    sa.Column("finished_at", UtcDateTime, nullable=True),
    sa.CheckConstraint(is_one_of("kind", ("infer", "deliver")), name="kind"),
    sa.CheckConstraint(is_one_of("state", JOB_STATES), name="state"),
    sa.CheckConstraint("(state = 'leased') = (lease_expires_at IS NOT NULL)", name="lease"),
    sa.Index(
        "ix_job_available",
        "kind",
        "priority",
        "not_before",
        "id",
        **where("state = 'available'"),
    ),
    sa.Index("ix_job_leased", "lease_expires_at", **where("state = 'leased'")),
    sa.Index("ix_job_study_id", "study_id"),
    # Dead letters, and what was done since a time: few of many.
    sa.Index("ix_job_given_up", "study_id", **where("state IN ('discarded', 'cancelled')")),
    sa.Index("ix_job_finished_at", "finished_at"),
)

commitment = sa.Table(
    "commitment",
    metadata,
    id_column(),
    # The delivery, and with it document and destination; of several rows the last counts.
    reference("job_id", "job.id"),
    sa.Column("transaction_uid", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False, server_default="asked"),
    sa.Column("asked_at", UtcDateTime, nullable=False),
    # Without an answer by then, a query must do.
    sa.Column("look_at", UtcDateTime, nullable=False),
    sa.Column("answered_at", UtcDateTime, nullable=True),
    text("reason"),
    sa.UniqueConstraint("transaction_uid", "job_id"),
    sa.CheckConstraint(is_one_of("state", COMMITMENT_STATES), name="state"),
    sa.Index("ix_commitment_job_id", "job_id"),
    sa.Index("ix_commitment_asked", "look_at", **where("state = 'asked'")),
)

#: A report on storage commitment that we owe a sender; the row goes when it took it.
promise = sa.Table(
    "promise",
    metadata,
    id_column(),
    sa.Column("calling_ae", sa.Text, nullable=False),
    text("address"),
    sa.Column("transaction_uid", sa.Text, nullable=False),
    # [SOP class UID, SOP instance UID] of each that was asked about.
    sa.Column("wanted", sa.JSON, nullable=False),
    sa.Column("asked_at", UtcDateTime, nullable=False),
    sa.Column("attempt", sa.Integer, nullable=False, server_default="0"),
    sa.Column("not_before", UtcDateTime, nullable=False),
    sa.UniqueConstraint("calling_ae", "transaction_uid"),
)

event = sa.Table(
    "event",
    metadata,
    id_column(),
    sa.Column("at", UtcDateTime, nullable=False),
    reference("study_id", "study.id", nullable=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("facts", sa.JSON, nullable=False),
    sa.Index("ix_event_study_id", "study_id", "id"),
)
