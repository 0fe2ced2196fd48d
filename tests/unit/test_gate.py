"""No report leaves that breaks a rule or names somebody else: the bytes are read again, whatever wrote them (L9, L11)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import pytest
from pydicom import Dataset

from tests import reports
from tests.reports import EXAMPLES, Example
from worker.errors import PatientConflict, ReportInvalid
from worker.report import gate


@pytest.fixture
def example(tmp_path: Path) -> Example:
    """A report that is in order."""
    return reports.of_radiograph(tmp_path)


def changed(example: Example, change: Callable[[Dataset], object]) -> bytes:
    """Return the report's bytes after `change`."""
    ds, buffer = example.ds, BytesIO()
    change(ds)
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def items(ds: Dataset) -> Iterator[Dataset]:
    for item in ds.get("ContentSequence") or ():
        yield item
        yield from items(item)


def numbers(ds: Dataset) -> Dataset:
    """The measured value of the first number."""
    number = next(item for item in items(ds) if item.ValueType == "NUM")
    return Dataset(number.MeasuredValueSequence[0]) if False else number.MeasuredValueSequence[0]  # type: ignore[no-any-return]
