"""Peers that stop with their test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fhir_records import connecting
from tests.fhir_server import FhirServer
from tests.receivers import Receiver, receiving
from worker.intake.fhir_client import Client

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


@pytest.fixture
def server() -> Iterator[FhirServer]:
    """A FHIR server that does as it is told."""
    with FhirServer() as running:
        yield running


@pytest.fixture
def connect(server: FhirServer) -> Iterator[Callable[..., Client]]:
    """Makes clients of it, closed at the end."""
    with connecting(server) as make:
        yield make
