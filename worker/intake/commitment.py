"""What an archive tells us of storage commitment: an N-EVENT-REPORT's data set (PS3.4 §J.3.3). Reading only.

Not here: the message it comes in (dataphase.py), what follows from it (store/commitments.py).
"""

from __future__ import annotations

from io import BytesIO
from typing import Final

from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from worker.domain import CommitmentReport
from worker.intake.header import is_uid

#: PS3.4 §J.3.1: the one instance of the class, for all reports.
WELL_KNOWN_INSTANCE: Final = "1.2.840.10008.1.20.1.1"
#: PS3.4 Table J.3-2: all is committed to; some is not.
EVENT_TYPES: Final = (1, 2)
#: A batch of ours has 16 documents, 150 bytes each; an archive that sends more than this does not answer us.
MAX_BYTES: Final = 256 * 1024
_IMPLICIT: Final = "1.2.840.10008.1.2"


def read_report(data: bytes, transfer_syntax_uid: str) -> CommitmentReport:
    """Read the Event Information; an instance that is both committed and failed has failed.

    Raises
    ------
    ValueError
        It cannot be decoded, or names its transaction or an instance by no UID.
    """
    try:
        ds = read_dataset(BytesIO(data), transfer_syntax_uid == _IMPLICIT, True)
        transaction_uid = str(ds.get("TransactionUID") or "")
        committed = [_instance(item) for item in ds.get("ReferencedSOPSequence") or ()]
        failed = {_instance(item): int(item.get("FailureReason") or 0) for item in ds.get("FailedSOPSequence") or ()}
    except Exception as error:  # pydicom raises whatever hostile bytes make it raise
        raise ValueError("The event information cannot be decoded") from error
    if not (is_uid(transaction_uid) and all(is_uid(uid) for uid in (*committed, *failed))):
        raise ValueError("The event information names something by no UID")
    return CommitmentReport(transaction_uid, frozenset(committed) - failed.keys(), failed)


def _instance(item: Dataset) -> str:
    return str(item.get("ReferencedSOPInstanceUID") or "")
