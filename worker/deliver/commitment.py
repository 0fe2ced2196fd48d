"""Storage commitment as SCU: ask an archive to promise that it keeps documents, and query where no promise comes (PS3.4 Annex J).

::

    delivered ─▶ N-ACTION ─▶ 0x0000 ─▶ … ─▶ N-EVENT-REPORT to our receiver (intake/dataphase.py)
                    │                └─▶ none in time ─▶ C-FIND ─▶ found, or sent again
                    └─▶ no context, or a failure ─▶ C-FIND at once

And as SCP: what senders asked our receiver is looked at and reported to them, until they take it.

Not here: the rows, and what follows from each answer (store/commitments.py, store/promises.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from pydicom.dataset import Dataset
from pynetdicom.dsutils import encode

from worker import events
from worker.deliver import cstore, wire
from worker.deliver.association import NATIVE, Association, Peer, associate
from worker.domain import Document
from worker.errors import PeerUnavailable
from worker.store import commitments, promises
from worker.store.database import Store
from worker.store.schema import AnyRow

STORAGE_COMMITMENT: Final = "1.2.840.10008.1.20.1"
#: PS3.4 §J.3.1: the one instance of the class, for all requests.
_WELL_KNOWN: Final = "1.2.840.10008.1.20.1.1"
_REQUEST: Final = 1  # PS3.4 Table J.3-1: action type
_ALL_KEPT, _SOME_FAILED = 1, 2  # PS3.4 Table J.3-2: event types
_PROPOSALS: Final = [(STORAGE_COMMITMENT, (syntax,)) for syntax in NATIVE]
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
    wanted.ReferencedSOPSequence = [_item(document.sop_class_uid, document.sop_instance_uid) for document in documents]
    with associate(peer, _PROPOSALS) as line:
        if line.context(STORAGE_COMMITMENT, NATIVE) is None:
            return f"{peer.name} does not accept Storage Commitment."
        status = _say(line, wire.N_ACTION, _REQUEST, wanted)
        return f"{peer.name} answers the request for commitment with 0x{status:04X}." if status else ""


def _say(line: Association, field: int, type_id: int, said: Dataset) -> int:
    context_id = line.context(STORAGE_COMMITMENT, NATIVE) or 0
    data = encode(said, line.context(STORAGE_COMMITMENT, NATIVE[:1]) != context_id, True) or b""
    return line.normalized(field, STORAGE_COMMITMENT, _WELL_KNOWN, type_id, data=data, context_id=context_id).status


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


def report_all(*, store: Store, instances: Path, peer_of: Callable[[str, str], Peer | None], clock: Callable[[], datetime]) -> None:
    """Tell senders what we commit to of what they asked; who does not take it is told later.

    Parameters
    ----------
    peer_of
        Whom to call, by the AE title and address that asked; None where nobody by that title may ask.
    """
    with store.read() as conn:
        rows = promises.due(conn, limit=_BATCH, now=clock())
    away: dict[str, str] = {}
    for row in rows:
        peer = peer_of(row.calling_ae, row.address)
        reason = away.get(row.calling_ae) or _report(row, peer, store=store, instances=instances, clock=clock)
        if not reason:
            continue
        away[row.calling_ae] = reason
        with store.begin() as conn:
            is_over = promises.postpone(conn, row, now=clock())
        if is_over or not row.attempt:
            events.emit("commitment.unreported", calling_ae=row.calling_ae, attempt=row.attempt + 1, is_final=is_over, reason=reason)


def _report(row: AnyRow, peer: Peer | None, *, store: Store, instances: Path, clock: Callable[[], datetime]) -> str:
    """Report one transaction over an association of its own; returns why the sender does not take it, or ''."""
    if peer is None:
        return "The configuration has no commitment_port for this sender any more."
    try:
        with associate(peer, _PROPOSALS, scp_of=[STORAGE_COMMITMENT]) as line:
            if line.context(STORAGE_COMMITMENT, NATIVE) is None:
                return f"{peer.name} does not accept Storage Commitment."
            found = promises.standing(store, row, instances)  # only now: files are read for those who listen
            said = Dataset()
            said.TransactionUID = row.transaction_uid
            kept = [_item(one.sop_class_uid, one.sop_instance_uid) for one in found if not one.reason]
            failed = [_item(one.sop_class_uid, one.sop_instance_uid, one.reason) for one in found if one.reason]
            if kept:
                said.ReferencedSOPSequence = kept
            if failed:
                said.FailedSOPSequence = failed
            status = _say(line, wire.N_EVENT_REPORT, _SOME_FAILED if failed else _ALL_KEPT, said)
    except PeerUnavailable as error:
        return str(error)
    if status:
        return f"{peer.name} answers the report on commitment with 0x{status:04X}."
    with store.begin() as conn:
        promises.reported(conn, row, found, now=clock())
    events.emit("commitment.promised", calling_ae=row.calling_ae, instances=len(kept), failed=len(failed))
    return ""


def _item(sop_class_uid: str, sop_instance_uid: str, reason: int = 0) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class_uid, sop_instance_uid
    if reason:
        item.FailureReason = reason
    return item
