"""Storage commitment as SCU: ask an archive to promise that it keeps documents, and query where no promise comes (PS3.4 Annex J).

::

    delivered ─▶ N-ACTION ─▶ 0x0000 ─▶ … ─▶ N-EVENT-REPORT to our receiver (intake/dataphase.py)
                    │                └─▶ none in time ─▶ C-FIND ─▶ found, or sent again
                    └─▶ no context, or a failure ─▶ C-FIND at once

Not here: the rows, and what follows from each answer (store/commitments.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Final

from pydicom.dataset import Dataset
from pynetdicom.dsutils import encode

from worker.deliver import cstore
from worker.deliver.association import NATIVE, Peer, associate
from worker.domain import Document
from worker.errors import PeerUnavailable
from worker.store import commitments
from worker.store.database import Store

STORAGE_COMMITMENT: Final = "1.2.840.10008.1.20.1"
#: PS3.4 §J.3.1: the one instance of the class, for all requests.
_WELL_KNOWN: Final = "1.2.840.10008.1.20.1.1"
_REQUEST: Final = 1  # PS3.4 Table J.3-1: action type
#: An archive that is away when it should be queried is queried again after so long.
_AGAIN: Final = timedelta(seconds=60)
_BATCH: Final = 16


def request(documents: Sequence[Document], *, transaction_uid: str, peer: Peer) -> str:
    """Ask `peer` to commit to `documents`; returns why it will not, or '' where its report is to be waited for.

    Raises
    ------
    PeerUnavailable
        No association or no answer: it is not known whether the request arrived.
    """
    wanted = Dataset()
    wanted.TransactionUID = transaction_uid
    wanted.ReferencedSOPSequence = []
    for document in documents:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = document.sop_class_uid, document.sop_instance_uid
        wanted.ReferencedSOPSequence.append(item)
    with associate(peer, [(STORAGE_COMMITMENT, (syntax,)) for syntax in NATIVE]) as line:
        context_id = line.context(STORAGE_COMMITMENT, NATIVE)
        if context_id is None:
            return f"{peer.name} does not accept Storage Commitment."
        data = encode(wanted, line.context(STORAGE_COMMITMENT, NATIVE[:1]) != context_id, True) or b""
        status = line.action(STORAGE_COMMITMENT, _WELL_KNOWN, _REQUEST, data=data, context_id=context_id).status
        return f"{peer.name} answers the request for commitment with 0x{status:04X}." if status else ""


def ask(documents: Sequence[Document], *, transaction_uid: str, store: Store, peer: Peer, clock: Callable[[], datetime]) -> None:
    """Ask about documents whose rows are written; whatever goes wrong, the rows are looked at again when their time has come."""
    try:
        reason = request(documents, transaction_uid=transaction_uid, peer=peer)
    except PeerUnavailable:
        return  # the request may have arrived: its report is waited for as if it had
    if reason:
        with store.begin() as conn:
            commitments.turned_down(conn, transaction_uid, reason=reason, now=clock())


def look(*, store: Store, peer: Peer, clock: Callable[[], datetime]) -> None:
    """Query `peer` for what it did not report in time, and say what became of it."""
    with store.read() as conn:
        late = commitments.overdue(conn, destination=peer.name, limit=_BATCH, now=clock())
    for number, (row, document) in enumerate(late):
        try:
            is_found = cstore.find_document(peer, document)
        except PeerUnavailable:
            with store.begin() as conn:
                commitments.postpone(conn, [row for row, _ in late[number:]], until=clock() + _AGAIN)
            return
        with store.begin() as conn:
            change = commitments.looked(conn, row, is_found=is_found, now=clock())
        if change is not None:
            commitments.say(change)
