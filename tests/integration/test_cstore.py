"""Delivery over real sockets: every row of the status table, peers that misbehave, Orthanc and DCMTK."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    SecondaryCaptureImageStorage,
    generate_uid,
)

from tests import peers
from worker.deliver import cstore
from worker.deliver.association import Peer
from worker.deliver.wire import open_file
from worker.domain import Document
from worker.errors import NotReadBack, PatientConflict, PeerRefused, PeerUnavailable, PeerUnreachable, WorkerError

STUDY = generate_uid()


def make_document(*, sop_class_uid: str = peers.COMPREHENSIVE_3D_SR, study: str = STUDY, text: str = "Größe") -> Document:
    """Return a small object of its own; ``text`` is there to see that not a byte of it changes."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID, ds.SOPInstanceUID = sop_class_uid, generate_uid()
    ds.StudyInstanceUID, ds.SeriesInstanceUID = study, generate_uid()
    ds.PatientID, ds.PatientName, ds.Modality, ds.TextValue = "TEST1", "Test^Peer", "SR", text
    stream = BytesIO()
    ds.save_as(stream, enforce_file_format=True)
    return Document(str(ds.SOPInstanceUID), sop_class_uid, "sr", stream.getvalue())


def send_one(peer: Peer) -> cstore.Outcome:
    """Send one new document."""
    [outcome] = cstore.send([make_document()], peer=peer)
    return outcome


def expect_error(outcome: cstore.Outcome, kind: type[WorkerError], words: str) -> None:
    """Check the verdict and that the sentence says why."""
    assert type(outcome.error) is kind
    assert words in str(outcome.error)
    assert outcome.sop_instance_uid not in str(outcome.error)
    assert not outcome.delivered


def test_documents_travel_in_order_over_one_association_as_the_bytes_they_are() -> None:
    """Nothing re-encodes what was validated: the report in the PACS is the report we checked."""
    documents = [make_document(text=f"part {k}" * 5000) for k in range(3)]
    with peers.ScriptedPacs() as pacs:
        outcomes = cstore.send(documents, peer=pacs.peer)
        assert [o.sop_instance_uid for o in outcomes] == [d.sop_instance_uid for d in documents]
        assert all(o.delivered and o.status == 0 and not o.warning for o in outcomes)
        assert pacs.received == [bytes(open_file(d.data).data) for d in documents]
        assert pacs.associations == 1


def test_nothing_to_send_opens_no_association() -> None:
    """An empty batch must not knock at the PACS's door."""
    with peers.ScriptedPacs() as pacs:
        assert cstore.send([], peer=pacs.peer) == []
        assert pacs.associations == 0


@pytest.mark.requirement("L3")
@pytest.mark.parametrize("status", [0xB000, 0xB006, 0xB007, 0x0107])
def test_a_warning_is_recorded_and_the_object_counts_as_delivered(status: int) -> None:
    """PS3.4 Table B.2-1: Bxxx means stored, with coercion; somebody may want to know."""
    with peers.ScriptedPacs(steps=[status]) as pacs:
        outcome = send_one(pacs.peer)
    assert outcome.delivered
    assert outcome.status == status
    assert f"0x{status:04X}" in outcome.warning


@pytest.mark.requirement("L3")
@pytest.mark.parametrize("status", [0xA700, 0xA702, 0x0110, 0x9999, 0xFE00])
def test_a_status_that_may_pass_is_tried_again_later(status: int) -> None:
    """Out of resources passes; a status nobody defined must not lose a report either."""
    with peers.ScriptedPacs(steps=[status]) as pacs:
        outcome = send_one(pacs.peer)
    expect_error(outcome, PeerUnavailable, f"0x{status:04X}")
    assert outcome.status == status


@pytest.mark.requirement("L3")
@pytest.mark.parametrize("status", [0xA900, 0xA9FF, 0xC000, 0xCFFF, 0x0117, 0x0122, 0x0124])
def test_a_status_that_sending_again_cannot_change_is_not_tried_again(status: int) -> None:
    """A blind retry of a refused object fills the PACS's log and helps nobody."""
    with peers.ScriptedPacs(steps=[status]) as pacs:
        outcome = send_one(pacs.peer)
    expect_error(outcome, PeerRefused, f"0x{status:04X}")


@pytest.mark.requirement("L5")
def test_a_duplicate_counts_as_delivered_only_when_a_query_finds_it() -> None:
    """Resent after a crash between response and commit, the object is there: one object, no error."""
    document = make_document()
    with peers.ScriptedPacs(steps=[0, 0x0111, 0x0111]) as pacs:
        assert cstore.send([document], peer=pacs.peer)[0].delivered
        again = cstore.send([document], peer=pacs.peer)[0]
        other = send_one(pacs.peer)
        assert len(pacs.kept) == 1
    assert again.delivered
    assert again.status == 0x0111
    assert "0x0111" in again.warning
    expect_error(other, NotReadBack, "does not find")


@pytest.mark.requirement("L4")
def test_success_without_the_object_is_found_out() -> None:
    """0x0000 does not prove that the PACS kept anything: Orthanc's filters and `storescp --ignore` do this."""
    with peers.ScriptedPacs(steps=["discard"]) as pacs:
        expect_error(send_one(pacs.peer), NotReadBack, "does not find the object")


@pytest.mark.requirement("L15")
@pytest.mark.parametrize(
    ("finding", "kind", "words"),
    [
        ("other", NotReadBack, "does not find"),
        ("failing", NotReadBack, "0xA700"),
        ("failing for studies", NotReadBack, "does not say whose study it filed the object in; the query ended with 0xA700"),
        ("unsupported", NotReadBack, "does not accept C-FIND"),
        ("endless", PeerUnavailable, "more than 64 answers"),
        ("silence", PeerUnavailable, "within 0.5 s"),
    ],
)
def test_a_query_that_proves_nothing_does_not_count_as_delivered(finding: peers.Finding, kind: type[WorkerError], words: str) -> None:
    """A PACS that lies, fails or never ends its answers is bounded, and the report goes again."""
    # A busy machine may need long for 65 answers: only silence is to run out of time.
    with peers.ScriptedPacs(finding=finding, timeout_s=0.5 if finding == "silence" else 30.0) as pacs:
        expect_error(send_one(pacs.peer), kind, words)


def test_without_read_back_success_is_enough() -> None:
    """Archives without C-FIND exist; the site decides to trust them."""
    with peers.ScriptedPacs(steps=["discard"], finding="unsupported") as pacs:
        assert send_one(replace(pacs.peer, read_back=False)).delivered


@pytest.mark.requirement("L6")
def test_a_study_filed_under_another_patient_is_noticed() -> None:
    """A PACS that coerces the patient ID may have put the report into the wrong record."""
    with peers.ScriptedPacs(patient_id="SOMEBODY") as pacs:
        outcome = send_one(pacs.peer)
    expect_error(outcome, PatientConflict, "another patient ID")
    assert "SOMEBODY" not in str(outcome.error)
    assert "TEST1" not in str(outcome.error)


@pytest.mark.requirement("L7")
def test_a_class_the_peer_does_not_take_is_refused_and_the_next_document_still_goes() -> None:
    """No loop over a class the PACS will never accept, and no victim beside it."""
    odd, good = make_document(sop_class_uid=CTImageStorage), make_document()
    with peers.ScriptedPacs() as pacs:
        outcomes = cstore.send([odd, good], peer=pacs.peer)
    expect_error(outcomes[0], PeerRefused, "no presentation context for CT Image Storage")
    assert outcomes[1].delivered


def test_a_peer_that_takes_implicit_vr_only_gets_the_same_values() -> None:
    """PS3.5 §10.1: every AE takes Implicit VR Little Endian, and some take nothing else."""
    document = make_document()
    with peers.ScriptedPacs(syntaxes=[ImplicitVRLittleEndian]) as pacs:
        [outcome] = cstore.send([document], peer=pacs.peer)
        assert outcome.delivered
        assert "Implicit VR" in outcome.warning
        assert pacs.kept[document.sop_instance_uid] == dcmread(BytesIO(document.data))


@pytest.mark.parametrize("syntax", [RLELossless, ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_a_compressed_image_is_decompressed_for_a_peer_that_takes_it_no_other_way(syntax: UID) -> None:
    """Lossless, so it stays the same object; whoever takes RLE gets a fifth of the bytes, as they are."""
    document, pixels = make_document(sop_class_uid=SecondaryCaptureImageStorage), np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)
    ds = dcmread(BytesIO(document.data))
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PlanarConfiguration, ds.PhotometricInterpretation = 8, 6, 3, 0, "RGB"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.PixelData = 8, 8, 7, 0, pixels.tobytes()
    ds.compress(RLELossless, generate_instance_uid=False)
    stream = BytesIO()
    ds.save_as(stream, enforce_file_format=True)
    with peers.ScriptedPacs(syntaxes=[syntax], sop_classes=[SecondaryCaptureImageStorage]) as pacs:
        [outcome] = cstore.send([replace(document, data=stream.getvalue())], peer=pacs.peer)
        assert outcome.delivered
        assert outcome.warning == ("" if syntax == RLELossless else f"sent in {syntax.name}")
        kept = pacs.kept[document.sop_instance_uid]
    if syntax == RLELossless:
        assert pacs.received == [bytes(open_file(stream.getvalue()).data)]
    else:
        assert kept.PixelData == pixels.tobytes()


@pytest.mark.requirement("L2")
@pytest.mark.parametrize("step", ["abort", "silence"])
def test_no_response_and_no_object_is_tried_again_later(step: peers.Step) -> None:
    """An abort or silence says nothing of the object: the query does."""
    with peers.ScriptedPacs(steps=[step], timeout_s=0.5) as pacs:
        outcome = send_one(pacs.peer)
        assert pacs.associations == 2
    expect_error(outcome, PeerUnavailable, "aborted" if step == "abort" else "within 0.5 s")
    assert outcome.status == cstore.NO_RESPONSE


@pytest.mark.requirement("L2")
@pytest.mark.parametrize("step", ["keep, abort", "keep, silence"])
def test_no_response_but_the_object_is_there_counts_as_delivered(step: peers.Step) -> None:
    """The response was lost, not the report: sending it again would only be noise."""
    with peers.ScriptedPacs(steps=[step], timeout_s=0.5) as pacs:
        outcome = send_one(pacs.peer)
    assert outcome.delivered
    assert "a query found" in outcome.warning


def test_an_abort_costs_its_own_document_and_not_the_next() -> None:
    """One object that upsets the PACS must not hold up the others."""
    with peers.ScriptedPacs(steps=[0, "abort", 0]) as pacs:
        outcomes = cstore.send([make_document() for _ in range(3)], peer=pacs.peer)
        assert pacs.associations == 2
    assert [o.delivered for o in outcomes] == [True, False, True]


def test_a_peer_that_keeps_aborting_is_left_alone() -> None:
    """Two lost associations are enough; the rest of the batch waits for its next attempt."""
    with peers.ScriptedPacs(steps=["abort"] * 9) as pacs:
        outcomes = cstore.send([make_document() for _ in range(9)], peer=pacs.peer)
        assert len(pacs.received) == 2
    assert all(isinstance(o.error, PeerUnavailable) for o in outcomes)


REJECTIONS = [
    (b"\x01\x01\x07", "permanently: Called AE title not recognised"),
    (b"\x01\x01\x03", "permanently: Calling AE title not recognised"),
    (b"\x02\x03\x02", "for now: Local limit exceeded"),
    (b"\x07\x07\x07", "not DICOM"),
]


@pytest.mark.requirement("L2")
@pytest.mark.parametrize(("reason", "words"), REJECTIONS)
def test_a_rejected_association_says_why_and_is_tried_again(reason: bytes, words: str) -> None:
    """Permanent or not: an AE title that is wrong for an hour must not lose a report."""

    def reject(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"\x03\x00\x00\x00\x00\x04\x00" + reason)

    with peers.raw_peer(reject) as peer:
        expect_error(send_one(peer), PeerUnreachable, words)
        with pytest.raises(PeerUnreachable, match=words.split(":")[0]):
            cstore.echo(peer)


def half_a_pdu(connection: socket.socket) -> None:
    """Answer the association request with less than the header promises, and wait."""
    connection.sendall(b"\x02\x00\x00\x00\x10\x00\x00\x01")


def a_huge_pdu(connection: socket.socket) -> None:
    """Promise 4 GB."""
    connection.sendall(b"\x02\x00\xff\xff\xff\xff" + b"\0" * 100_000)


def another_protocol(connection: socket.socket) -> None:
    """Be a web server."""
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def nothing_within(connection: socket.socket) -> None:
    """Accept with no content at all."""
    connection.sendall(b"\x02\x00\x00\x00\x00\x04\x00\x01\x00\x00")


def garbage_for_a_response(connection: socket.socket) -> None:
    """Accept properly, then stream what no lengths fit."""
    peers.accept_association(connection)
    for _ in range(1000):
        connection.sendall(b"\x04\x00\x00\x00\x00\x08" + b"\xff" * 8)


def an_endless_response(connection: socket.socket) -> None:
    """Accept properly, then stream a command set without end: 100 MB if one listens."""
    peers.accept_association(connection)
    for _ in range(1600):
        connection.sendall(b"\x04\x00\x00\x01\x00\x00" + b"\x00\x00\xff\xfc\x01\x01" + b"\0" * 0xFFFA)


def the_answer_to_something_else(connection: socket.socket) -> None:
    """Accept properly, then answer message 99."""
    peers.accept_association(connection)
    command = b"".join(
        b"\0\0" + number.to_bytes(2, "little") + b"\x02\0\0\0" + value.to_bytes(2, "little")
        for number, value in ((0x0100, 0x8001), (0x0120, 99), (0x0800, 0x0101), (0x0900, 0))
    )
    body = (len(command) + 2).to_bytes(4) + b"\x01\x03" + command
    connection.sendall(b"\x04\x00" + len(body).to_bytes(4) + body)


def a_release(connection: socket.socket) -> None:
    """Accept properly, then ask for release instead of answering."""
    peers.accept_association(connection)
    connection.sendall(b"\x05\x00\x00\x00\x00\x04\x00\x00\x00\x00")


HOSTILE = [
    (lambda _: None, PeerUnreachable, "within 0.5 s"),
    (half_a_pdu, PeerUnreachable, "within 0.5 s"),
    (a_huge_pdu, PeerUnreachable, "PDU of 4294967295 bytes"),
    (another_protocol, PeerUnreachable, "not DICOM"),
    (nothing_within, PeerUnreachable, "not DICOM"),
    (lambda connection: connection.close(), PeerUnreachable, ""),
    (peers.accept_association, PeerUnavailable, "within 0.5 s"),
    (garbage_for_a_response, PeerUnavailable, "lengths do not fit"),
    (an_endless_response, PeerUnavailable, "more than 1048576 bytes"),
    (the_answer_to_something_else, PeerUnavailable, "does not answer the request"),
    (a_release, PeerUnavailable, "released the association"),
]


@pytest.mark.requirement("L15")
@pytest.mark.parametrize(("script", "kind", "words"), HOSTILE)
def test_a_peer_that_does_not_speak_dicom_is_bounded(script: Callable[[socket.socket], None], kind: type[WorkerError], words: str) -> None:
    """A delivery role that hangs delivers nothing; on the second of these pynetdicom's requestor hangs for ever."""
    with peers.raw_peer(script) as peer:
        expect_error(send_one(peer), kind, words)


@pytest.mark.requirement("L1")
def test_a_port_where_nobody_listens_says_so() -> None:
    """A PACS that is down for a day is the plainest case of all."""
    peer = Peer("the absent PACS", "NOBODY", "127.0.0.1", peers.free_port(), "WORKER")
    outcomes = cstore.send([make_document(), make_document()], peer=peer)
    for outcome in outcomes:
        expect_error(outcome, PeerUnreachable, f"the absent PACS cannot be reached at 127.0.0.1:{peer.port}: Connection refused")


def test_a_peer_is_asked_how_many_instances_a_study_has() -> None:
    """Completeness asks the sender: a number, or None where there is no plain answer."""
    with peers.ScriptedPacs() as pacs:
        cstore.send([make_document(), make_document(), make_document(study=generate_uid())], peer=pacs.peer)
        assert cstore.count_instances(pacs.peer, study_instance_uid=STUDY) == 2
        assert cstore.count_instances(pacs.peer, study_instance_uid=generate_uid()) is None
    with peers.ScriptedPacs(finding="endless") as pacs, pytest.raises(PeerUnavailable, match="more than 64"):
        cstore.count_instances(pacs.peer, study_instance_uid=STUDY)


@pytest.mark.parametrize("finding", ["unsupported", "failing", "other"])
def test_a_peer_that_cannot_count_is_no_obstacle(finding: peers.Finding) -> None:
    """None sends completeness back to its quiet period."""
    with peers.ScriptedPacs(finding=finding) as pacs:
        assert cstore.count_instances(pacs.peer, study_instance_uid=STUDY) is None


def test_a_peer_is_asked_for_one_instance() -> None:
    """Yes, no, and cannot say are three answers."""
    document = make_document()
    series = str(dcmread(BytesIO(document.data)).SeriesInstanceUID)
    ours = {"study_instance_uid": STUDY, "series_instance_uid": series, "sop_instance_uid": document.sop_instance_uid}
    with peers.ScriptedPacs() as pacs:
        assert cstore.find_instance(pacs.peer, **ours) is False
        cstore.send([document], peer=pacs.peer)
        assert cstore.find_instance(pacs.peer, **ours) is True
        assert cstore.find_instance(pacs.peer, **{**ours, "series_instance_uid": generate_uid()}) is False
    with peers.ScriptedPacs(finding="unsupported") as pacs:
        assert cstore.find_instance(pacs.peer, **ours) is None


def test_an_echo_takes_a_measured_time() -> None:
    """What `doctor` prints for each peer."""
    with peers.ScriptedPacs() as pacs:
        assert 0 < cstore.echo(pacs.peer) < pacs.timeout_s


@pytest.fixture(scope="module")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[peers.Orthanc]:
    """Return a running Orthanc for this module."""
    with peers.orthanc(tmp_path_factory.mktemp("orthanc")) as server:
        yield server


def report() -> Document:
    """Return the shared sample report: a Comprehensive 3D SR that all validators pass."""
    data = peers.require_shared("tools/sr_air.dcm").read_bytes()
    return Document(open_file(data).sop_instance_uid, peers.COMPREHENSIVE_3D_SR, "sr", data)


@pytest.mark.peer
def test_orthanc_has_the_report_once_however_often_it_is_sent(orthanc: peers.Orthanc) -> None:
    """Delivered means found by another door too, QIDO-RS, and with the data set we sent."""
    document = report()
    first, second = (cstore.send([document], peer=orthanc.peer())[0] for _ in range(2))
    assert first.delivered
    assert second.delivered
    [found] = orthanc.qidos(Modality="SR")
    assert found["00080018"]["Value"] == [document.sop_instance_uid]
    [stored] = orthanc.instances()
    assert open_file(orthanc.file(stored)).data == open_file(document.data).data
    study = found["0020000D"]["Value"][0]
    assert cstore.count_instances(orthanc.peer(), study_instance_uid=study) == 1


@pytest.mark.peer
def test_orthanc_tells_a_stranger_and_a_wrong_title(orthanc: peers.Orthanc) -> None:
    """The two mistakes of every installation, each in words."""
    expect_error(send_one(orthanc.peer("STRANGER")), PeerUnavailable, "aborted the association")
    expect_error(send_one(replace(orthanc.peer(), ae_title="WRONG")), PeerUnreachable, "Called AE title not recognised")


@pytest.mark.requirement("L4")
@pytest.mark.peer
def test_orthanc_that_filters_the_report_away_is_found_out(tmp_path: Path) -> None:
    """Orthanc answers Success for what its Lua filter drops."""
    with peers.orthanc(tmp_path, lua="function ReceivedInstanceFilter(dicom, origin, info) return false end") as server:
        expect_error(send_one(server.peer()), NotReadBack, "does not find the object")
        assert server.instances() == []


@pytest.mark.peer
def test_storescp_gets_the_data_set_as_it_is(tmp_path: Path) -> None:
    """DCMTK writes what came over the line: the same elements, byte for byte."""
    document = report()
    with peers.storescp(tmp_path, "--bit-preserving") as peer:
        assert cstore.send([document], peer=peer)[0].delivered
    [path] = [p for p in tmp_path.iterdir() if document.sop_instance_uid in p.name]
    assert open_file(path.read_bytes()).data == open_file(document.data).data


@pytest.mark.requirement("L2")
@pytest.mark.peer
@pytest.mark.parametrize(
    ("option", "words"),
    [("--refuse", "rejects the association"), ("--abort-after", "aborted"), ("--abort-during", "aborted")],
)
def test_storescp_that_fails_on_purpose_is_tried_again(tmp_path: Path, option: str, words: str) -> None:
    """The same verdicts with a peer that is not of our making."""
    with peers.storescp(tmp_path, option) as peer:
        outcome = cstore.send([report()], peer=peer)[0]
    assert isinstance(outcome.error, PeerUnavailable)
    assert outcome.status == cstore.NO_RESPONSE


@pytest.mark.peer
def test_storescp_that_ignores_the_object_is_trusted_only_if_told_to(tmp_path: Path) -> None:
    """`--ignore` answers Success and stores nothing; it has no C-FIND to ask."""
    with peers.storescp(tmp_path, "--ignore") as peer:
        assert cstore.send([report()], peer=peer)[0].delivered
        expect_error(cstore.send([report()], peer=replace(peer, read_back=True))[0], NotReadBack, "does not accept C-FIND")
