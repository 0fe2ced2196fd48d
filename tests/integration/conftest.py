"""Receivers that stop with their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.receivers import Receiver, receiving

Start = Callable[..., Receiver]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start receivers that stop with the test."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(receiving(tmp_path / "spool", **options))


@pytest.fixture
def receiver(start: Start) -> Receiver:
    """A receiver with short deadlines."""
    return start()
