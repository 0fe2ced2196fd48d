"""What an archive tells us of storage commitment, and what a sender asks: the data sets of PS3.4 §J.3.3 and §J.3.2. Reading only.

Not here: the messages they come in (dataphase.py), what follows from them (store/commitments.py, store/promises.py).
"""

from __future__ import annotations

from io import BytesIO
from typing import Final

from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from worker.domain import CommitmentReport, CommitmentRequest
from worker.intake.header import is_uid

#: PS3.4 §J.3.1: the one instance of the class, for all reports.
WELL_KNOWN_INSTANCE: Final = "1.2.840.10008.1.20.1.1"
#: PS3.4 Table J.3-2: all is committed to; some is not.
EVENT_TYPES: Final = (1, 2)
#: PS3.4 Table J.3-1.
ACTION_TYPE: Final = 1
#: A batch of ours has 16 documents, 150 bytes each; an archive that sends more than this does not answer us.
MAX_REPORT_BYTES: Final = 256 * 1024
#: Of a study of 7000 images a sender asks in two transactions.
MAX_REQUEST_BYTES: Final = 1024 * 1024
_IMPLICIT: Final = "1.2.840.10008.1.2"


def read_report(data: bytes, transfer_syntax_uid: str) -> CommitmentReport:
    """Read the Event Information; an instance that is both committed and failed has failed.

    Raises
    ------
    ValueError
        It cannot be decoded, or names its transaction or an instance by no UID.
    """
    try:
        ds, transaction_uid = _opened(data, transfer_syntax_uid)
        committed = [_instance(item) for item in ds.get("ReferencedSOPSequence") or ()]
        failed = {_instance(item): int(item.get("FailureReason") or 0) for item in ds.get("FailedSOPSequence") or ()}
    except Exception as error:  # pydicom raises whatever hostile bytes make it raise
        raise ValueError("The event information cannot be decoded") from error
    if not (is_uid(transaction_uid) and all(is_uid(uid) for uid in (*committed, *failed))):
        raise ValueError("The event information names something by no UID")
    return CommitmentReport(transaction_uid, frozenset(committed) - failed.keys(), failed)


def read_request(data: bytes, transfer_syntax_uid: str) -> CommitmentRequest:
    """Read the Action Information; an instance that is named twice is asked about once.

    Raises
    ------
    ValueError
        It cannot be decoded, names something by no UID, or names no instance.
    """
    try:
        ds, transaction_uid = _opened(data, transfer_syntax_uid)
        pairs = [(str(item.get("ReferencedSOPClassUID") or ""), _instance(item)) for item in ds.get("ReferencedSOPSequence") or ()]
    except Exception as error:  # pydicom raises whatever hostile bytes make it raise
        raise ValueError("The action information cannot be decoded") from error
    if not (pairs and is_uid(transaction_uid) and all(is_uid(uid) for pair in pairs for uid in pair)):
        raise ValueError("The action information names no instance, or something by no UID")
    return CommitmentRequest(transaction_uid, tuple(dict.fromkeys(pairs)))


def _opened(data: bytes, transfer_syntax_uid: str) -> tuple[Dataset, str]:
    ds = read_dataset(BytesIO(data), transfer_syntax_uid == _IMPLICIT, True)
    return ds, str(ds.get("TransactionUID") or "")


def _instance(item: Dataset) -> str:
    return str(item.get("ReferencedSOPInstanceUID") or "")
