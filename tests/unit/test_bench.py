"""The bench of a result's documents, on a small image: it runs, and its figures are whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import located
from tests.bench import documents
from worker.imaging.decoding import DecoderPool
from worker.regions import Place
from worker.report import forms


def test_bench_the_documents_of_a_radiograph(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each form's seconds and bytes, and highdicom's share, of which a page has hardly any."""
    series = located.film(tmp_path)
    place = Place((96, 80), None, (series.instances[0].sop_instance_uid,), (1,))
    finding = located.finding_at(located.painted_on_film((96, 80), (40, 30), 12), place)
    with DecoderPool(processes=1) as pool:
        result = documents.pictured(located.result_with(series, [finding]), pool)
        for kind in ("gsps", "pdf"):
            documents.measure(kind, "a small film", lambda kind=kind: list(forms.BUILDERS[kind](result)), 1)  # type: ignore[misc]
    gsps, pdf = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert gsps["highdicom"] > pdf["highdicom"] >= 0
    assert gsps["cpu_s"] > 0
    assert pdf["bytes"][0] > gsps["bytes"][0] > 1000
