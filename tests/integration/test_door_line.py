"""From images to the RIS, the EHR and people: one analysis of the phantom in every form, a critical finding before all others."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import hl7
import pytest
import sqlalchemy as sa
from rich.console import Console

from tests import atna
from tests.fhir_r4 import validated
from tests.fhir_server import FhirServer
from tests.phantom_line import PHANTOM, PhantomLine, phantom_line
from tests.recipients import Hook, ris
from worker import pipeline, view
from worker.deliver.association import Peer
from worker.deliver.send import deliver
from worker.demo.phantom import ISSUER
from worker.domain import ROUTINE, STAT
from worker.imaging.decoding import DecoderPool
from worker.infer import Model
from worker.ops import audit
from worker.store import ledger, queue, schema

KINDS = {"ris": ("oru",), "ehr": ("fhir",), "people": ("notice",), "pacs": ("sr",)}
SYSTEM = "urn:oid:1.2.40.0.34"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[PhantomLine]:
    """An installation without a daemon, whose bundle calls its first finding critical."""
    bundle = shutil.copytree(PHANTOM, tmp_path / "phantom")
    toml = bundle / "bundle.toml"
    toml.write_text(
        toml.read_text("utf-8").replace('name = "suspicious_nodule"\n', 'name = "suspicious_nodule"\ncritical = true\n'), "utf-8"
    )
    with DecoderPool(processes=1) as pool:
        pool.warm()
        with phantom_line(tmp_path / "site", pool, bundles=(bundle,)) as made:
            yield made


def queued(site: PhantomLine) -> dict[int, dict[str, int]]:
    """Study → the priority of its delivery to each destination."""
    wanted = sa.select(schema.job.c.study_id, schema.job.c.destination, schema.job.c.priority).where(schema.job.c.kind == "deliver")
    found: dict[int, dict[str, int]] = {}
    with site.store.read() as conn:
        for study_id, destination, priority in conn.execute(wanted):
            found.setdefault(study_id, {})[destination] = priority
    return found


def send(site: PhantomLine, peer: Peer) -> list[bool]:
    """Deliver all that waits for one destination; whether each was taken."""
    with site.store.begin() as conn:
        jobs = queue.lease(conn, "deliver", owner="me", limit=16, lease_s=60, now=site.now, destination=peer.name)
    return [one.delivered for one in deliver(jobs, store=site.store, peer=peer, clock=lambda: site.now)]


def test_a_result_reaches_ris_ehr_and_people_and_a_critical_one_goes_first(site: PhantomLine, tmp_path: Path) -> None:
    site.receive(1, 0)  # the second has the critical finding
    model = Model(site.bundles[0])
    line = replace(site.line(model), destinations=KINDS)
    cases = pipeline.process(line, site.lease())
    alarming = {case.job.study_id for case in cases if any(finding.is_alarming for finding in case.findings)}
    assert len(alarming) == 1
    for study_id, by_destination in queued(site).items():
        others = {"ris": ROUTINE, "ehr": ROUTINE, "pacs": ROUTINE}
        first = dict.fromkeys(KINDS, STAT)
        assert by_destination == (first if study_id in alarming else others)
    audit.begin(tmp_path / "audit", ae_title="SYNOPTIC", limit_bytes=2**20)
    with ris() as his, FhirServer() as ehr, Hook() as hook:
        for case in cases:
            assert case.study is not None
            key = case.study.patient.key
            ehr.put({"resourceType": "Patient", "id": key.patient_id, "identifier": [{"system": SYSTEM, "value": key.patient_id}]})
        assert send(site, replace(his.peer(), name="ris")) == [True] * 2
        to = Peer("ehr", "", "127.0.0.1", ehr.port, "", url=ehr.base, door="fhir", systems={ISSUER: SYSTEM})
        assert send(site, to) == [True] * 2
        assert send(site, replace(hook.peer(), name="people")) == [True]
    audit.end()
    # What a person is shown, and what the ledger says, knows the other forms.
    text = io.StringIO()
    view.show(Console(width=200, file=text), site.store, cases[1].job.study_id, with_report=True)
    assert [kind for kind in ("oru", "fhir", "notice", "report") if f"\n{kind} " not in text.getvalue()] == []
    with site.store.begin() as conn:
        conn.execute(sa.update(schema.job).where(schema.job.c.destination == "pacs").values(state="completed"))
    with site.store.read() as conn:
        assert [row.account for row in conn.execute(sa.select(ledger.standing()))] == ["delivered"] * 2
    messages = [hl7.parse(message.decode()) for message in his.received]
    patients = [str(message.segment("PID")(3)) for message in messages]
    firsts = [case.study.patient.key.patient_id for case in cases if case.study and case.job.study_id in alarming]
    assert {one.split("^")[0] for one in patients[:1]} == set(firsts), "the critical one was sent before the other"
    assert {one.split("^")[3] for one in patients} == {ISSUER}
    for resource in ehr.resources.values():
        if resource["resourceType"] != "Patient":
            validated(resource)
    found = [one for one in ehr.resources.values() if one["resourceType"] == "DiagnosticReport"]
    assert sorted(one["subject"]["reference"].split("/")[1] for one in found) == sorted(one.split("^")[0] for one in patients)
    assert [json.loads(body)["data"]["findings"][0]["name"] for _, body in hook.received] == ["suspicious_nodule"]
    trail = atna.trail(tmp_path / "audit", "110104")
    assert [atna.outcome(one) for one in trail] == [audit.SUCCESS] * 5, "each transfer is in the audit trail"
    assert {uid for one in trail for uid in atna.objects(one)} >= {case.study.study_instance_uid for case in cases if case.study}
