"""What unit tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from worker.decoding import DecoderPool


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    """Two warm children, as in service."""
    with DecoderPool(processes=2) as made:
        made.warm()
        yield made
