"""An open association: messages in, C-ECHO, C-STORE, N-EVENT-REPORT and N-ACTION answered, until it is released or cut.

::

    P-DATA-TF ─▶ PDV ─┬─ command set ─▶ what to do
                      └─ data set ────▶ spool file, as it comes ─▶ fsync, rename ─▶ header ─▶ sink ─▶ status
                                  └───▶ of storage commitment, report or request: memory, bounded ─▶ reports ─▶ status

Fragments go from the socket's buffer straight into the file and its digest; nothing is decoded
but the header, and nothing is kept in memory. The status is sent last of all. One thread, one
message at a time: no asynchronous operations are negotiated (PS3.7 Annex D.3.3.3).

Not here: who may associate (negotiation.py), sockets (wire.py), the table of statuses (scp.py).
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from worker import events
from worker.domain import CommitmentReport, CommitmentRequest, Header, Received
from worker.errors import Reject, Retry
from worker.intake import commitment, dimse, wire
from worker.intake.dimse import Command
from worker.intake.header import InstanceRefused, is_uid, read_header
from worker.intake.negotiation import STORAGE_COMMITMENT, VERIFICATION, Accepted, Context, Peer, pdu
from worker.intake.wire import ProtocolError, Wire
from worker.ops import audit
from worker.ops.log import places
from worker.store.spool import Incoming, Spool, Stored

#: Records a durable file. Raises worker.errors.Retry if it cannot now; then the sender is asked to come again.
Sink = Callable[[Header, Stored, Peer], Received]
#: Takes in what an archive says of storage commitment, or a sender asks; returns why it changes nothing, or ''. Retry: it cannot now.
Reports = Callable[[CommitmentReport | CommitmentRequest, Peer], str]
#: The messages of storage commitment, and how long they may be.
_OF_COMMITMENT: Final = {dimse.N_EVENT_REPORT_RQ: commitment.MAX_REPORT_BYTES, dimse.N_ACTION_RQ: commitment.MAX_REQUEST_BYTES}

#: Ours, and longer than what any PDV header adds.
_PDU_SLACK: Final = 1024
#: PS3.7: the longest command set has a few hundred bytes.
_MAX_COMMAND_BYTES: Final = 64 * 1024
#: Of a data set that has no end, so much may come before the disk's mark is looked at again.
_LOOK_BYTES: Final = 16 * 2**20

OUT_OF_RESOURCES, DOES_NOT_MATCH, OUR_BUG = 0xA700, 0xA900, 0xC211

#: So much of an association is kept in memory for the audit trail.
_MAX_TRANSFERS: Final = 256

_PDV: Final = struct.Struct(">LBB")


@dataclass(slots=True)
class Tally:
    """What one association brought."""

    instances: int = 0
    refused: int = 0
    stored_bytes: int = 0
    #: For the audit trail: a header of the study (None: could not be read), action, outcome and reason → instances by SOP class.
    transfers: dict[tuple[str, str, str, str], tuple[Header | None, Counter[str]]] = field(default_factory=dict)


@dataclass(slots=True)
class _Message:
    """The message being received: its command set, and where its data set goes."""

    context_id: int
    command: Command
    incoming: Incoming | None = None
    refusal: InstanceRefused | None = None
    header: Header | None = None
    #: The data set of an N-EVENT-REPORT or N-ACTION; one that becomes too long is cut off, and refused.
    report: bytearray = field(default_factory=bytearray)


class DataPhase:
    """The life of one accepted association."""

    def __init__(self, line: Wire, accepted: Accepted, *, max_pdu: int, spool: Spool, sink: Sink, reports: Reports | None = None) -> None:
        self.tally = Tally()
        self._wire = line
        self._peer = accepted.peer
        self._contexts = accepted.contexts
        self._peer_max_pdu = accepted.max_length
        self._max_pdu = max_pdu
        self._spool = spool
        self._sink = sink
        self._reports = reports
        self._command = bytearray()
        self._command_context = 0
        self._message: _Message | None = None

    def run(self) -> str:
        """Serve until the peer releases ("released") or aborts ("aborted").

        Raises
        ------
        Closed, Stalled, Stopping, ProtocolError
            Nothing is left of a message that was under way.
        """
        try:
            while True:
                kind, length = self._wire.next_pdu(is_between_messages=self._message is None and not self._command)
                if kind == wire.P_DATA_TF:
                    self._p_data(length)
                elif kind == wire.RELEASE_RQ:
                    self._wire.body(length, _PDU_SLACK)
                    self._wire.send(pdu(wire.RELEASE_RP, bytes(4)))
                    return "released"
                elif kind == wire.ABORT:
                    return "aborted"
                else:
                    reason = wire.UNEXPECTED_PDU if kind in range(1, 8) else wire.UNRECOGNIZED_PDU
                    raise ProtocolError(f"A PDU of type {kind} came in an open association.", reason)
        finally:
            if self._message is not None and self._message.incoming is not None:
                self._message.incoming.abort()
            self._audit()

    # --- PS3.8 §9.3.5: P-DATA-TF ------------------------------------------------------------------

    def _p_data(self, length: int) -> None:
        if length > self._max_pdu + _PDU_SLACK:
            raise ProtocolError(f"A PDU of {length} bytes is longer than the {self._max_pdu} agreed.")
        while length:
            if length < 6:
                raise ProtocolError("A presentation data value has no header.")
            size, context_id, control = _PDV.unpack(self._wire.exactly(6))
            length -= 4 + size
            if size < 2 or length < 0:
                raise ProtocolError("A presentation data value does not fit its PDU.")
            if context_id not in self._contexts:
                raise ProtocolError(f"Context {context_id} was not agreed.", wire.UNEXPECTED_PARAMETER)
            # PS3.8 Annex E.2: bit 0 command, bit 1 last fragment.
            if control & 1:
                self._take_command(context_id, size - 2, is_last=bool(control & 2))
            else:
                self._take_data(context_id, size - 2, is_last=bool(control & 2))

    def _take_command(self, context_id: int, size: int, *, is_last: bool) -> None:
        if self._message is not None or (self._command and context_id != self._command_context):
            raise ProtocolError("A command came before the last message was complete.", wire.UNEXPECTED_PARAMETER)
        if len(self._command) + size > _MAX_COMMAND_BYTES:
            raise ProtocolError(f"A command set is longer than {_MAX_COMMAND_BYTES} bytes.")
        if not self._command:
            self._wire.begin_message()
        self._command_context = context_id
        self._command += self._wire.body(size, _MAX_COMMAND_BYTES)
        if not is_last:
            return
        try:
            command = dimse.decode(bytes(self._command))
        except ValueError as error:
            raise ProtocolError(str(error)) from None
        self._command.clear()
        message = _Message(context_id, command)
        if command.field == dimse.C_STORE_RQ:
            self._open(message, self._contexts[context_id])
        if command.has_data_set:
            self._message = message
        else:
            self._answer(message)

    def _take_data(self, context_id: int, size: int, *, is_last: bool) -> None:
        message = self._message
        if message is None or context_id != message.context_id:
            raise ProtocolError("Data came without a command.", wire.UNEXPECTED_PARAMETER)
        while size:
            piece = self._wire.some(size)
            size -= len(piece)
            if message.incoming is not None:
                self._write(message, message.incoming, piece)
            elif len(message.report) <= _OF_COMMITMENT.get(message.command.field, -1):
                message.report += piece
        if is_last:
            self._message = None
            self._answer(message)

    # --- PS3.7 §9: DIMSE-C ------------------------------------------------------------------------

    def _answer(self, message: _Message) -> None:
        """Do what a complete message asks for."""
        command, comment = message.command, ""
        if command.field == dimse.C_STORE_RQ:
            status, comment = self._store(message)
        elif command.field == dimse.C_ECHO_RQ and self._contexts[message.context_id].sop_class_uid == VERIFICATION:
            status = dimse.SUCCESS
        elif command.field in _OF_COMMITMENT and self._contexts[message.context_id].sop_class_uid == STORAGE_COMMITMENT:
            status, comment = self._take_report(message, bytes(message.report))
        elif command.field == dimse.C_CANCEL_RQ or command.field & dimse.RESPONSE:
            return  # neither has an answer
        else:
            status = dimse.UNRECOGNIZED_OPERATION
        self._send(message.context_id, dimse.encode_response(command, status, comment))

    def _open(self, message: _Message, context: Context) -> None:
        """Open a spool file for a C-STORE, or note why its data set will be read and dropped."""
        command = message.command
        if not (is_uid(command.sop_class_uid) and is_uid(command.sop_instance_uid)):
            message.refusal = InstanceRefused(dimse.INVALID_INSTANCE, "Affected SOP Class or Instance UID is not a UID")
            message.command = Command(command.field, command.message_id, command.has_data_set, "", "")
        elif context.sop_class_uid in (VERIFICATION, STORAGE_COMMITMENT):
            message.refusal = InstanceRefused(dimse.CLASS_NOT_SUPPORTED, "The context is not for storage")
        elif command.sop_class_uid != context.sop_class_uid:
            message.refusal = InstanceRefused(DOES_NOT_MATCH, "The SOP class is not that of the context")
        elif not command.has_data_set:
            message.refusal = InstanceRefused(0xC002, "The request has no data set")
        elif self._spool.is_low:
            message.refusal = _nearly_full()
        else:
            try:
                message.incoming = self._spool.begin(
                    sop_class_uid=command.sop_class_uid,
                    sop_instance_uid=command.sop_instance_uid,
                    transfer_syntax_uid=context.transfer_syntax_uid,
                )
            except OSError as error:
                message.refusal = _out_of_disk(error)

    def _write(self, message: _Message, incoming: Incoming, piece: memoryview) -> None:
        before, refusal = incoming.size_bytes // _LOOK_BYTES, None
        try:
            incoming.write(piece)
            if incoming.size_bytes // _LOOK_BYTES > before and self._spool.is_low:
                refusal = _nearly_full()
        except OSError as error:
            refusal = _out_of_disk(error)
        if refusal is not None:
            incoming.abort()
            message.incoming, message.refusal = None, refusal

    def _store(self, message: _Message) -> tuple[int, str]:
        """Return the status and Error Comment of a C-STORE whose data set is all here."""
        try:
            self._keep(message)
        except InstanceRefused as refusal:
            return self._refused(message, refusal)
        except Retry as error:
            return self._refused(message, InstanceRefused(OUT_OF_RESOURCES, "The database is not available: send again later"), error)
        except OSError as error:
            return self._refused(message, _out_of_disk(error), error)
        except Reject as error:
            return self._refused(message, InstanceRefused(0xC000, "The instance cannot be taken"), error)
        except Exception as error:  # noqa: BLE001  a bug of ours costs this instance, not the association
            return self._refused(message, InstanceRefused(OUR_BUG, "Processing failed"), error)
        self.tally.instances += 1
        return dimse.SUCCESS, ""

    def _keep(self, message: _Message) -> None:
        """Take one whole data set: after this both file and row are durable."""
        command, context = message.command, self._contexts[message.context_id]
        incoming = message.incoming
        if incoming is None:
            raise message.refusal or InstanceRefused(OUR_BUG, "Processing failed")
        with incoming.view() as data:
            header = message.header = read_header(data, context.transfer_syntax_uid, offset=incoming.dataset_offset)
        if header.sop_class_uid != command.sop_class_uid:
            raise InstanceRefused(DOES_NOT_MATCH, "The SOP class of the data set is not that of the request")
        if header.sop_instance_uid != command.sop_instance_uid:
            raise InstanceRefused(DOES_NOT_MATCH, "The SOP instance of the data set is not the request's")
        stored = incoming.commit()
        received = self._sink(header, stored, self._peer)
        if received is Received.CONFLICT:
            self._spool.quarantine(stored, "same SOP Instance UID, other bytes")
            self._count(header, command, "C", audit.AGAIN, "Other bytes came under a known SOP Instance UID: they are in quarantine")
        else:
            self._count(header, command, "R" if received is Received.DUPLICATE else "C", audit.SUCCESS, "")
        self.tally.stored_bytes += stored.size_bytes

    def _refused(self, message: _Message, refusal: InstanceRefused, error: Exception | None = None) -> tuple[int, str]:
        if message.incoming is not None:
            message.incoming.abort()
        self.tally.refused += 1
        facts: dict[str, object] = {}
        if error is not None:
            facts["error"] = type(error).__name__
        if error is not None and refusal.status == OUR_BUG:
            # Where, but not the words of an exception nobody foresaw: they may quote the data set.
            facts["places"] = places(error)
        facts |= {"calling_ae": self._peer.calling_ae, "status": f"0x{refusal.status:04X}", "reason": refusal.comment}
        events.emit("instance.refused", **facts)
        outcome = audit.AGAIN if refusal.status == OUT_OF_RESOURCES else audit.FAILED
        self._count(message.header, message.command, "C", outcome, refusal.comment)
        return refusal.status, refusal.comment

    def _count(self, header: Header | None, command: Command, action: str, outcome: str, reason: str) -> None:
        if len(self.tally.transfers) >= _MAX_TRANSFERS:
            self._audit()
        key = (header.study_instance_uid if header else "", action, outcome, reason)
        self.tally.transfers.setdefault(key, (header, Counter()))[1][command.sop_class_uid] += 1

    def _audit(self) -> None:
        """One audit message for each study, action and outcome of the association so far."""
        source = audit.Party(self._peer.calling_ae, self._peer.address)
        for (uid, action, outcome, reason), (header, classes) in self.tally.transfers.items():
            subject = audit.Subject(uid, header.patient, header.accession_number, classes) if header else None
            audit.transferred(subject, source=source, action=action, outcome=outcome, reason=reason)
        self.tally.transfers.clear()

    # --- PS3.7 §10.1.1, §10.1.4: N-EVENT-REPORT, N-ACTION -----------------------------------------

    def _take_report(self, message: _Message, data: bytes) -> tuple[int, str]:
        """Return the status of an archive's report on storage commitment, or of a sender's request for it."""
        status, reason = self._report(message, data)
        if status != dimse.SUCCESS:
            facts = {"calling_ae": self._peer.calling_ae, "address": self._peer.address}
            events.emit("commitment.turned_away", status=f"0x{status:04X}", reason=reason, **facts)
        return status, reason

    def _report(self, message: _Message, data: bytes) -> tuple[int, str]:
        command = message.command
        if command.sop_class_uid != STORAGE_COMMITMENT or command.sop_instance_uid != commitment.WELL_KNOWN_INSTANCE:
            return dimse.NO_SUCH_INSTANCE, "The message is not of the Storage Commitment instance"
        asks = command.field == dimse.N_ACTION_RQ
        if self._reports is None or command.type_id not in ((commitment.ACTION_TYPE,) if asks else commitment.EVENT_TYPES):
            return dimse.NO_SUCH_ACTION if asks else dimse.NO_SUCH_EVENT, "The type is none of Storage Commitment"
        if len(data) > (limit := _OF_COMMITMENT[command.field]):
            return dimse.RESOURCE_LIMITATION, f"The information is longer than {limit} bytes"
        try:
            read = commitment.read_request if asks else commitment.read_report
            said = read(data, self._contexts[message.context_id].transfer_syntax_uid)
        except ValueError as error:
            return dimse.INVALID_ARGUMENT, str(error)
        try:
            reason = self._reports(said, self._peer)
        except Retry:
            return dimse.RESOURCE_LIMITATION, "The database is not available: come again later"
        return (dimse.INVALID_ARGUMENT, reason) if reason else (dimse.SUCCESS, "")

    def _send(self, context_id: int, command_set: bytes) -> None:
        limit = max(self._peer_max_pdu - 6, 16) if self._peer_max_pdu else len(command_set)
        for start in range(0, len(command_set), limit):
            part = command_set[start : start + limit]
            control = 3 if start + limit >= len(command_set) else 1
            self._wire.send(pdu(wire.P_DATA_TF, _PDV.pack(len(part) + 2, context_id, control) + part))


def _nearly_full() -> InstanceRefused:
    return InstanceRefused(OUT_OF_RESOURCES, "The spool is nearly full: send again later")


def _out_of_disk(error: OSError) -> InstanceRefused:
    return InstanceRefused(OUT_OF_RESOURCES, f"The spool cannot be written (errno {error.errno}): send again later")
