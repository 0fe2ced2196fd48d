"""Tables of who may use the page and what a radiologist said of a finding. Facts, no queries: see accounts.py and reviews.py.

::

    account ──< session        review >── finding

A review keeps its author's name, not a row of `account`: it is kept with the result when the account is gone.
"""

from __future__ import annotations

from typing import Final

import sqlalchemy as sa

from worker.store.columns import UtcDateTime, id_column, is_one_of, metadata, reference, text, where

#: As `finding.verdict`.
VERDICTS: Final = ("positive", "negative", "uncertain")

account = sa.Table(
    "account",
    metadata,
    id_column(),
    sa.Column("name", sa.Text, nullable=False, unique=True),
    # "scrypt$n$r$p$salt$key"; '' for who logs in elsewhere.
    text("password"),
    # Issuer and subject of who logs in there (OpenID Connect Core §2); '' for local users.
    text("subject"),
    # Of domain.ROLES, with a space between.
    sa.Column("roles", sa.Text, nullable=False),
    sa.Column("failures", sa.Integer, nullable=False, server_default="0"),
    sa.Column("locked_until", UtcDateTime, nullable=True),
    sa.Column("created_at", UtcDateTime, nullable=False),
    sa.Index("uq_account_subject", "subject", unique=True, **where("subject <> ''")),
)

#: A browser that is logged in. The token is in its cookie alone; here is its sha256, so that who reads the database is nobody.
session = sa.Table(
    "session",
    metadata,
    id_column(),
    sa.Column("token_sha256", sa.Text, nullable=False, unique=True),
    reference("account_id", "account.id"),
    sa.Column("seen_at", UtcDateTime, nullable=False),
    sa.Column("expires_at", UtcDateTime, nullable=False),
    sa.Index("ix_session_account_id", "account_id"),
)

#: Of several the last counts; none is changed.
review = sa.Table(
    "review",
    metadata,
    id_column(),
    reference("finding_id", "finding.id"),
    sa.Column("author", sa.Text, nullable=False),
    # What the radiologist says; the finding's own is agreement.
    sa.Column("verdict", sa.Text, nullable=False),
    text("note"),
    sa.Column("at", UtcDateTime, nullable=False),
    sa.CheckConstraint(is_one_of("verdict", VERDICTS), name="verdict"),
    sa.Index("ix_review_finding_id", "finding_id"),
)
