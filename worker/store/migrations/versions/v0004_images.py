"""What instances say of their images, for the rules that choose series; of those received before, nothing is known."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Add two columns to the instances."""
    op.add_column("instance", sa.Column("frames", sa.Integer(), server_default="0", nullable=False))
    op.add_column("instance", sa.Column("facts", sa.Text(), server_default="", nullable=False))
