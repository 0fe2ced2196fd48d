"""Stages of the line on their own: what breaks beside the answer does not take the answer along."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

from tests.conftest import Captured
from worker.domain import Code, Finding, Job, Lease
from worker.infer import Prepared
from worker.pipeline import Case, Line, explain

AT = datetime(2026, 1, 1, tzinfo=UTC)
JOB = Job(7, "infer", 3, "small", 1, "", None, 1, 0, AT, Lease("me", 1, AT))
FINDING = Finding("ill", Code("ILL", "99TEST", "Ill"), 0.9, 0.5, "positive")


class Speechless:
    """A model that cannot say why."""

    def explain(self, *_given: Any) -> tuple[Finding, ...]:
        raise RuntimeError("JANE DOE")


def test_a_finding_that_cannot_be_explained_stands_and_the_log_says_where_not_what(captured: Captured) -> None:
    line = cast("Line", SimpleNamespace(models={"small": Speechless()}))
    case = explain(line, Case(JOB, findings=(FINDING,), prepared=Prepared({})))
    assert case.error is None
    assert case.findings == (FINDING,)
    assert case.prepared is None
    (said,) = captured.named("explanation.failed")
    assert (said["study"], said["reason"]) == (3, "RuntimeError")
    assert "JANE" not in str(said)
