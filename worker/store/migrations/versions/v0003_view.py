"""Indexes of the patient record: a view reads what a bundle asks for, however much more is known of the patient."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_IS_OF_SERVER = sa.text("substr(source, 1, 5) = 'FHIR '")
_IS_WITHDRAWN = sa.text("status IN ('D', 'W', 'X')")


def upgrade() -> None:
    """Index facts by key, by code, withdrawals, and those of FHIR servers by the resource they are of."""
    op.drop_index("ix_observation_patient_at", "observation")
    op.create_index("ix_observation_patient_key", "observation", ["patient_pk", "key", "at"])
    op.create_index("ix_observation_patient_code", "observation", ["patient_pk", "code", "at"])
    op.create_index(
        "ix_observation_withdrawn", "observation", ["patient_pk"], sqlite_where=_IS_WITHDRAWN, postgresql_where=_IS_WITHDRAWN
    )
    op.create_index("ix_observation_of_server", "observation", ["key"], sqlite_where=_IS_OF_SERVER, postgresql_where=_IS_OF_SERVER)
