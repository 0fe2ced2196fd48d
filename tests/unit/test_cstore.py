"""The bytes of an association, and the demo PACS's matching: no socket."""

from __future__ import annotations

from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from pynetdicom.dimse_messages import DIMSEMessage
from pynetdicom.dimse_primitives import C_ECHO, C_FIND, C_STORE
from pynetdicom.dsutils import encode
from pynetdicom.pdu import P_DATA_TF

from worker.deliver import wire
from worker.demo import query

SOP_CLASS = "1.2.840.10008.5.1.4.1.1.88.34"


def as_pynetdicom_reads(pdus: list[bytes]) -> DIMSEMessage:
    """Decode a message with the reference implementation."""
    message = DIMSEMessage()
    for k, encoded in enumerate(pdus):
        pdu = P_DATA_TF()
        pdu.decode(encoded)
        assert message.decode_msg(pdu.to_primitive()) is (k == len(pdus) - 1)
    return message


@given(data=st.binary(min_size=1, max_size=300), max_fragment=st.integers(1, 200), message_id=st.integers(1, 0xFFFF))
def test_a_message_survives_any_fragmentation(data: bytes, max_fragment: int, message_id: int) -> None:
    """A peer may allow PDUs of any size; what it puts together must be what we sent."""
    command = wire.command_set(wire.C_STORE, sop_class_uid=SOP_CLASS, message_id=message_id, sop_instance_uid="1.2.3")
    pdus = list(wire.data_pdus(5, command, data, max_fragment=max_fragment))
    assert all(len(pdu) <= max_fragment + 12 for pdu in pdus)
    request = as_pynetdicom_reads(pdus).message_to_primitive()
    assert isinstance(request, C_STORE)
    assert request.is_valid_request
    assert (request.MessageID, request.AffectedSOPClassUID, request.AffectedSOPInstanceUID) == (message_id, SOP_CLASS, "1.2.3")
    assert request.DataSet is not None
    assert request.DataSet.getvalue() == data
    ours = [wire.fragments(pdu) for pdu in pdus]
    assert b"".join(part for [(control, part)] in ours if not control & 1) == data


@pytest.mark.parametrize(("field", "data", "kind"), [(wire.C_ECHO, b"", C_ECHO), (wire.C_FIND, b"\x08\x00", C_FIND)])
def test_other_requests_are_read_by_pynetdicom(field: int, data: bytes, kind: type) -> None:
    """C-ECHO has no data set and says so; C-FIND has one."""
    command = wire.command_set(field, sop_class_uid="1.2.840.10008.1.1", message_id=7)
    request = as_pynetdicom_reads(list(wire.data_pdus(1, command, data, max_fragment=16000))).message_to_primitive()
    assert isinstance(request, kind)
    assert isinstance(request, (C_ECHO, C_FIND))
    assert request.is_valid_request


def test_a_response_is_taken_apart() -> None:
    """Status and offending elements reach the operator; an error comment, which may name a patient, does not."""
    ds = Dataset()
    ds.CommandField, ds.MessageIDBeingRespondedTo, ds.CommandDataSetType, ds.Status = 0x8001, 7, 0x0101, 0xB000
    ds.OffendingElement, ds.ErrorComment = [0x00100010, 0x00100020], "Test^Peer"
    command = wire.read_command(encode(ds, True, True) or b"")
    assert command == wire.Command(0x8001, 7, 0xB000, False, ("(0010,0010)", "(0010,0020)"))


@given(st.binary(max_size=200))
def test_a_garbage_command_has_no_status_or_a_number(garbage: bytes) -> None:
    """Whatever a peer sends, reading it raises nothing."""
    status = wire.read_command(garbage).status
    assert status is None or 0 <= status <= 0xFFFF


@given(st.binary(max_size=200))
def test_garbage_fragments_raise_one_error_only(garbage: bytes) -> None:
    """Lengths that lie are found, and nothing is read twice."""
    try:
        found = wire.fragments(b"\x04\0\0\0\0\0" + garbage)
    except ValueError:
        return
    assert sum(len(part) + 6 for _, part in found) == len(garbage)


def test_a_file_is_taken_apart_without_touching_its_data_set() -> None:
    """What follows the file meta information is what goes over the line."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientName = SOP_CLASS, "1.2.3", "Test^Peer"
    stream = BytesIO()
    ds.save_as(stream, enforce_file_format=True)
    item = wire.open_file(stream.getvalue())
    assert (item.sop_class_uid, item.sop_instance_uid, item.transfer_syntax_uid) == (SOP_CLASS, "1.2.3", ExplicitVRLittleEndian)
    assert bytes(item.data) == encode(ds, False, True)


def test_a_shortened_acceptance_is_not_an_acceptance() -> None:
    """Or else a peer's broken answer would read as "accepts no context" and discard the report."""
    with pytest.raises(ValueError, match="fixed part"):
        wire.accepted(b"\x02\x00\x00\x00\x00\x04\x00\x01\x00\x00")


def header(study: str, series: str, instance: str, *, modality: str = "CT", name: str = "Phantom^One") -> Dataset:
    """Return one instance's header."""
    ds = Dataset()
    ds.SOPClassUID, ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = SOP_CLASS, study, series, instance
    ds.Modality, ds.PatientName, ds.PatientID, ds.StudyDate, ds.AccessionNumber = modality, name, "P[1]", "20260102", "A1"
    return ds


HELD = [header("1.1", "1.1.1", "1.1.1.1"), header("1.1", "1.1.1", "1.1.1.2"), header("1.1", "1.1.2", "1.1.2.1", modality="SR")]
HELD += [header("1.2", "1.2.1", "1.2.1.1", name="Other^Two")]


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        ({"QueryRetrieveLevel": "STUDY"}, ["1.1", "1.2"]),
        ({"QueryRetrieveLevel": "STUDY", "StudyInstanceUID": ["1.2", "1.3"]}, ["1.2"]),
        ({"QueryRetrieveLevel": "STUDY", "PatientName": "phan*"}, ["1.1"]),
        ({"QueryRetrieveLevel": "STUDY", "PatientID": "P[1]"}, ["1.1", "1.2"]),
        ({"QueryRetrieveLevel": "STUDY", "PatientID": "P1"}, []),
        ({"QueryRetrieveLevel": "STUDY", "StudyDate": "20260101-20260102"}, ["1.1", "1.2"]),
        ({"QueryRetrieveLevel": "STUDY", "StudyDate": "20260103-"}, []),
        ({"QueryRetrieveLevel": "STUDY", "ModalitiesInStudy": "SR"}, ["1.1"]),
        ({"QueryRetrieveLevel": "STUDY", "AccessionNumber": "A?"}, ["1.1", "1.2"]),
        ({"QueryRetrieveLevel": "SERIES", "StudyInstanceUID": "1.1"}, ["1.1.1", "1.1.2"]),
        ({"QueryRetrieveLevel": "IMAGE", "SeriesInstanceUID": "1.1.1", "Modality": "CT"}, ["1.1.1.1", "1.1.1.2"]),
    ],
)
def test_a_query_matches_as_the_standard_says(keys: dict[str, object], found: list[str]) -> None:
    """Universal, list, wildcard, range and single-value matching: PS3.4 §C.2.2.2."""
    identifier = Dataset()
    for keyword, value in keys.items():
        setattr(identifier, keyword, value)
    unique = query.LEVELS[str(keys["QueryRetrieveLevel"])]
    if unique not in identifier:
        setattr(identifier, unique, "")
    assert [str(answer[unique].value) for answer in query.answers(identifier, HELD)] == found


def test_an_answer_counts_what_no_instance_holds() -> None:
    """Number of Study Related Instances is what completeness asks for."""
    identifier = Dataset()
    identifier.QueryRetrieveLevel, identifier.StudyInstanceUID, identifier.StudyDescription = "STUDY", "1.1", ""
    identifier.NumberOfStudyRelatedInstances = identifier.NumberOfStudyRelatedSeries = identifier.ModalitiesInStudy = None
    [answer] = query.answers(identifier, HELD)
    assert (answer.NumberOfStudyRelatedInstances, answer.NumberOfStudyRelatedSeries) == (3, 2)
    assert list(answer.ModalitiesInStudy) == ["CT", "SR"]
    assert answer["StudyDescription"].is_empty


def test_a_level_of_another_model_is_refused() -> None:
    """PATIENT is no level of the Study Root."""
    identifier = Dataset()
    identifier.QueryRetrieveLevel = "PATIENT"
    with pytest.raises(ValueError, match="none of the Study Root"):
        query.answers(identifier, HELD)
