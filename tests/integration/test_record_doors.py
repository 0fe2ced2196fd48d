"""One record through two doors: 188 real studies are given the same by HL7 v2 and by FHIR, and nothing of after the study by either."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from pathlib import Path

from models.bundle import Bundle
from tests.installation import BUNDLES
from worker.config import Config, Records, Site
from worker.domain import Observation, Study
from worker.importing import files, import_files
from worker.inputs import select_inputs
from worker.store import records, studies
from worker.store.database import Store
from worker.store.spool import Spool


def filled(folder: Path, *sources: Path) -> Store:
    config = Config(site=Site(data=folder, timezone="+01:00"), records=Records(schemes={"urn:mhh:lab": "L"}))
    store = Store(config.database_url)
    store.migrate()
    tally = import_files(list(files(sources)), config=config, store=store, spool=Spool(config.spool, low_water_bytes=0))
    assert not tally.reasons, tally.reasons
    return store


def said(fact: Observation) -> tuple[object, ...]:
    return (fact.code.value, fact.code.scheme, fact.at, fact.value, fact.comparator, fact.unit, fact.text, fact.status)


def test_hl7_and_fhir_give_every_study_the_same_view_and_nothing_of_after_it(shared: Path, tmp_path: Path) -> None:
    data = shared / "data" / "cxr-severity"
    by_hl7 = filled(tmp_path / "hl7", data / "dicom", data / "hl7")
    by_fhir = filled(tmp_path / "fhir", data / "fhir")
    spec = Bundle.read(BUNDLES / "cxr-severity")
    seen = values = later = 0
    with by_hl7.read() as one, by_fhir.read() as other:
        for uid in studies.uids(one):
            study: Study = studies.find(one, uid)[0][1]
            views = [records.view(conn, study.patient.key, as_of=study.study_at) for conn in (one, other)]
            assert views[0] is not None
            assert views[1] is not None
            facts = [Counter(map(said, view.observations)) for view in views if view]
            assert facts[0] == facts[1]
            inputs = [select_inputs(study, view, spec) for view in views]
            given = [[(v.name, v.value, v.comparator, v.unit, v.at) for v in found.values] for found in inputs]
            assert given[0] == given[1]
            assert inputs[0].missing == inputs[1].missing
            assert inputs[0].missing_causes == inputs[1].missing_causes
            assert all(fact.at <= study.study_at for view in views if view for fact in view.observations)
            whole = records.view(one, study.patient.key, as_of=study.study_at + timedelta(days=3650))
            assert whole is not None
            later += sum(fact.at > study.study_at for fact in whole.observations)
            seen, values = seen + 1, values + len(given[0])
    assert seen == 188
    assert values > 500
    assert later > 500, "there are draws of after the studies to be left out"
