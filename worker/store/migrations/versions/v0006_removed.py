"""Since when the file of an instance is gone under [retention], and since when all of a study are."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    """Add a column each to studies and instances."""
    op.add_column("study", sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("instance", sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True))
