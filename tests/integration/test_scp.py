"""The receiver and honest peers, over real sockets: DCMTK's and pynetdicom's senders; who may come in."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID
from pynetdicom import AE
from pynetdicom.pdu import A_ASSOCIATE_AC, A_ASSOCIATE_RJ

from tests import peers
from tests.integration.conftest import Start
from tests.receivers import Receiver
from tests.scu import BIG_ENDIAN, CT, DEFLATED, EXPLICIT, IMPLICIT, MR, P_DATA, VERIFICATION, command_set, encoded, pdu, pdv, slice_of
from worker.intake.scp import Limits

JPEG_2000, MPEG2 = "1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.100"


def saved(folder: Path, *instances: Dataset) -> list[str]:
    """Write instances as files; returns their paths."""
    paths = []
    for index, ds in enumerate(instances):
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = UID(EXPLICIT)
        path = folder / f"{index}.dcm"
        ds.save_as(path, enforce_file_format=True)
        paths.append(str(path))
    return paths


# --- honest peers -----------------------------------------------------------------------------------


@pytest.mark.peer
def test_dcmtk_verifies_and_stores_what_it_sent(receiver: Receiver, tmp_path: Path) -> None:
    host, port = receiver.scp.address
    instances = [slice_of(rows=256) for _ in range(5)]
    assert peers.dcmtk("echoscu", "-aet", "SENDER", "-aec", "SYNOPTIC", host, str(port)).returncode == 0
    done = peers.dcmtk("storescu", "-R", "-aet", "SENDER", "-aec", "SYNOPTIC", host, str(port), *saved(tmp_path, *instances))
    assert done.returncode == 0, done.stdout
    assert receiver.heard.next("association.closed")["end"] == "released"
    facts = receiver.heard.next("association.closed")
    assert (facts["instances"], facts["refused"], facts["end"], facts["calling_ae"]) == (5, 0, "released", "SENDER")
    for ds in instances:
        assert pydicom.dcmread(receiver.store.rows[ds.SOPInstanceUID].stored.path) == ds


@pytest.mark.parametrize("max_pdu", [4096, 16382, 131072])
def test_pynetdicom_stores_over_contexts_of_its_choice(start: Start, max_pdu: int) -> None:
    receiver = start(limits=Limits(max_pdu=max_pdu))
    ae = AE("SENDER")
    ae.add_requested_context(CT, [DEFLATED, JPEG_2000, IMPLICIT])
    ae.add_requested_context(VERIFICATION)
    ae.add_requested_context(MR, [EXPLICIT])
    assoc = ae.associate(*receiver.scp.address, ae_title="SYNOPTIC")
    accepted = {str(context.abstract_syntax): str(context.transfer_syntax[0]) for context in assoc.accepted_contexts}
    assert accepted == {CT: JPEG_2000, VERIFICATION: IMPLICIT, MR: EXPLICIT}
    ds = slice_of(rows=300, SOPClassUID=MR)
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = UID(EXPLICIT)
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = UID(MR), ds.SOPInstanceUID
    assert assoc.send_c_store(ds).Status == 0x0000
    assert assoc.send_c_echo().Status == 0x0000
    assoc.release()
    assert pydicom.dcmread(receiver.store.rows[ds.SOPInstanceUID].stored.path) == ds


def test_any_cutting_into_fragments_and_packets_gives_the_same_file(receiver: Receiver) -> None:
    ds = slice_of(rows=100)
    data = encoded(ds)
    command = command_set(1, has_data_set=True, sop_instance=ds.SOPInstanceUID)
    sizes = [1, 7, 4096, 9999]
    for size in sizes:
        values = [pdv(1, 1, command[:3]), pdv(1, 3, command[3:]), pdv(1, 0, b"")]
        values += [pdv(1, 2 if at + size >= len(data) else 0, data[at : at + size]) for at in range(0, len(data), size)]
        # Several values in a PDU, a command and data in one, and packets cut anywhere.
        stream = b"".join(pdu(P_DATA, b"".join(values[at : at + 5])) for at in range(0, len(values), 5))
        with receiver.scu() as scu:
            scu.associate()
            for at in range(0, len(stream), 1337):
                scu.sock.sendall(stream[at : at + 1337])
            assert scu.status() == 0x0000
            assert scu.release()
    assert len(receiver.store.answers) == len(sizes)
    assert len(receiver.files()) == 1


@pytest.mark.requirement("R16")
def test_two_studies_interleaved_on_one_association_are_told_apart(receiver: Receiver) -> None:
    with receiver.scu() as scu:
        scu.associate()
        for study in ["1.2.1", "1.2.2"] * 3:
            assert scu.store(slice_of(study)) == 0x0000
    studies = [kept.header.study_instance_uid for kept in receiver.store.rows.values()]
    assert (studies.count("1.2.1"), studies.count("1.2.2")) == (3, 3)


@pytest.mark.requirement("R13")
def test_private_sop_classes_are_taken_when_configured(start: Start) -> None:
    for accepts, result in ((True, 0), (False, 3)):
        with start(accepts_unknown=accepts).scu() as scu:
            scu.associate([("1.2.826.0.1.3680043.9.9999.1", [EXPLICIT]), ("1.2.840.10008.5.1.4.1.2.2.1", [EXPLICIT])])
            assert scu.contexts[1][0] == result
            assert scu.contexts[3][0] == 3, "a query is never storage"


# --- who may associate ------------------------------------------------------------------------------


@pytest.mark.requirement("R6")
@pytest.mark.parametrize(
    ("called", "calling", "allowed", "codes"),
    [
        ("OTHER", "SENDER", {"SENDER": ["127.0.0.1"]}, (1, 1, 7)),
        ("SYNOPTIC", "STRANGER", {"SENDER": ["127.0.0.1"]}, (1, 1, 3)),
        ("SYNOPTIC", "SENDER", {"SENDER": ["10.0.0.0/8"]}, (1, 1, 3)),
        ("SYNOPTIC", "SENDER", {"SENDER": []}, (1, 1, 3)),
        ("SYNOPTIC", "SENDER", {"OTHER": ["127.0.0.1"]}, (1, 1, 3)),
    ],
)
def test_strangers_are_rejected(
    start: Start, called: str, calling: str, allowed: dict[str, list[str]], codes: tuple[int, int, int]
) -> None:
    receiver = start(calling=allowed)
    with receiver.scu() as scu:
        answer = scu.associate(called=called, calling=calling)
        assert isinstance(answer, A_ASSOCIATE_RJ)
        assert (answer.result, answer.source, answer.reason_diagnostic) == codes
        assert scu.read_pdu() == (0, b"")
    facts = receiver.heard.next("association.rejected")
    assert (facts["calling_ae"], facts["called_ae"], facts["address"]) == (calling, called, "127.0.0.1")


def test_networks_and_any_title_can_be_allowed(start: Start) -> None:
    with start(calling={"*": ["127.0.0.0/8"]}).scu() as scu:
        assert isinstance(scu.associate(calling="WHOEVER"), A_ASSOCIATE_AC)


@pytest.mark.requirement("R12")
def test_deflated_big_endian_and_undecodable_syntaxes_are_refused(receiver: Receiver) -> None:
    with receiver.scu() as scu:
        scu.associate(
            [(CT, [DEFLATED]), (CT, [BIG_ENDIAN]), (CT, [MPEG2]), (CT, ["1.2.3.4"]), (CT, [BIG_ENDIAN, EXPLICIT]), ("1.2.3", [EXPLICIT])]
        )
        results = [result for result, _ in scu.contexts.values()]
        assert results == [4, 4, 4, 4, 0, 3]
        assert scu.contexts[9][1] == EXPLICIT


@pytest.mark.requirement("R5")
def test_associations_beyond_the_limit_are_rejected_transient_and_the_place_comes_back(start: Start) -> None:
    receiver = start(limits=Limits(associations=3))
    with ExitStack() as stack:
        scus = [stack.enter_context(receiver.scu()) for _ in range(20)]
        with ThreadPoolExecutor(20) as pool:
            answers = list(pool.map(lambda scu: scu.associate(), scus))
        rejected = [answer for answer in answers if isinstance(answer, A_ASSOCIATE_RJ)]
        assert len(rejected) == 17
        assert {(answer.result, answer.source, answer.reason_diagnostic) for answer in rejected} == {(2, 3, 2)}
        accepted = [scu for scu, answer in zip(scus, answers, strict=True) if isinstance(answer, A_ASSOCIATE_AC)]
        assert all(scu.store(slice_of()) == 0 for scu in accepted)
        assert accepted[0].release()
        receiver.heard.next("association.closed")
        with receiver.scu() as late:
            late.associate()
            assert late.store(slice_of()) == 0
