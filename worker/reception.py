"""The role that receives, built from Config: StorageScp → spool → studies.add_instance, in n processes on one listening socket.

Imports are late on purpose: what adds an instance elsewhere loads no receiver, and no receiver loads torch.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Final

from worker import events
from worker.config import Config
from worker.domain import CommitmentReport, CommitmentRequest, Header, Received
from worker.errors import DecoderDied
from worker.peers import peer_to_report
from worker.record_feeds import clock, identified
from worker.roles import say_unloadable, started
from worker.store import commitments, promises, studies
from worker.store.database import Connection, Store
from worker.store.group import GroupCommit
from worker.store.spool import Spool, Stored
from worker.tls import server_context

if TYPE_CHECKING:
    from worker.intake.negotiation import Peer as Caller

#: Seconds that transfers under way have to finish after SIGTERM.
RECEIVE_GRACE_S: Final = 10.0
#: No image is older; a date of before it is a device's idea of "unknown".
FIRST_XRAY: Final = 1895


def study_time(header: Header, zone: tzinfo) -> datetime | None:
    """When a study was made: its date and time in its own offset, else the site's zone; None without a date that can be."""
    text = header.study_date + (header.study_time.split(".")[0] + "000000")[:6]
    with contextlib.suppress(ValueError, OverflowError):  # 0001-01-01 east of Greenwich is before the calendar
        naive = datetime.strptime(text, "%Y%m%d%H%M%S")  # noqa: DTZ007  the zone is put on in the next line
        if naive.year < FIRST_XRAY:
            return None
        return naive.replace(tzinfo=_offset(header.timezone_offset) or zone).astimezone(UTC)
    return None


def _offset(text: str) -> tzinfo | None:
    """PS3.3 §C.12.1.1.8: ±HHMM."""
    if len(text) != 5 or text[0] not in "+-" or not text[1:].isdecimal():
        return None
    delta = timedelta(hours=int(text[1:3]), minutes=int(text[3:5]))
    return timezone(-delta if text[0] == "-" else delta)


def add_instance(conn: Connection, config: Config, header: Header, stored: Stored, *, calling_ae: str, address: str) -> Received:
    """Commit 1: the row of a file that is durable already."""
    return studies.add_instance(
        conn,
        identified(header, config),
        # Below the spool, not absolute: a spool that was moved or restored elsewhere is still ours.
        path=Path(stored.path.parent.name) / stored.path.name,
        sha256=stored.sha256,
        size_bytes=stored.size_bytes,
        calling_ae=calling_ae,
        address=address,
        study_at=study_time(header, config.zone),
        quiet_s=config.assembly.quiet_by_modality.get(header.modality, config.assembly.quiet_s),
        now=clock(),
    )


def receive(config: Config, store: Store, listener: socket.socket, stop: threading.Event) -> None:
    """Serve C-ECHO, C-STORE and reports on storage commitment on a listening socket until told to stop; what is under way is finished."""
    from worker.imaging.codecs import decodable_transfer_syntaxes
    from worker.intake.negotiation import Policy
    from worker.intake.scp import Limits, StorageScp

    settings = config.receive
    spool = Spool(config.spool, low_water_bytes=settings.low_water_mb * 2**20)
    policy = Policy(
        ae_title=settings.ae_title,
        calling={sender.ae_title: sender.addresses for sender in config.senders},
        max_pdu=settings.max_pdu_bytes,
        accepts_unknown=settings.accept_unknown_sop_classes,
        takes_commitments=any(destination.commitment for destination in config.destinations),
        tls_names={sender.ae_title: sender.tls_names for sender in config.senders},
        commits_to=[sender.ae_title for sender in config.senders if sender.commitment_port],
        transfer_syntaxes=decodable_transfer_syntaxes(_loadable_codecs()),
    )
    limits = Limits(
        max_pdu=settings.max_pdu_bytes,
        associations=settings.max_associations,
        per_address=settings.max_per_address,
        pdu_s=settings.pdu_deadline_s,
        idle_s=settings.idle_s,
    )

    def add(conn: Connection, item: tuple[Header, Stored, Caller]) -> Received:
        header, stored, sender = item
        return add_instance(conn, config, header, stored, calling_ae=sender.calling_ae, address=sender.address)

    def report(said: CommitmentReport | CommitmentRequest, caller: Caller) -> str:
        if isinstance(said, CommitmentRequest):
            return take_request(config, store, said, caller)
        return take_report(config, store, said, caller)

    commit = GroupCommit(store.begin, add, order=lambda item: item[0].study_instance_uid)

    def sink(header: Header, stored: Stored, sender: Caller) -> Received:
        return commit((header, stored, sender))

    scp = StorageScp(
        listener,
        policy=policy,
        spool=spool,
        sink=sink,
        limits=limits,
        ssl_context=server_context(config.receive, section="receive"),
        reports=report,
    )
    scp.start()
    started("receive", port=scp.address[1])
    stop.wait()
    scp.stop(RECEIVE_GRACE_S)


def take_report(config: Config, store: Store, said: CommitmentReport, archive: Caller) -> str:
    """Take in what an archive says of storage commitment; returns why it changes nothing, or ''."""
    asked = [peer.name for peer in config.destinations if peer.commitment and peer.ae_title == archive.calling_ae]
    with store.begin() as conn:
        changes = commitments.report(conn, said, destinations=asked, now=clock())
    if changes is None:
        return "The transaction was not asked of this AE title"
    for change in changes:
        commitments.say(change)
    return ""


def take_request(config: Config, store: Store, asked: CommitmentRequest, sender: Caller) -> str:
    """Note what a sender asks us to commit to, for a sweep to look at and report; returns why not, or ''."""
    if peer_to_report(config, sender.calling_ae, sender.address) is None:
        return "This AE title may not ask for commitment"
    with store.begin() as conn:
        is_noted = promises.ask(conn, asked, calling_ae=sender.calling_ae, address=sender.address, now=clock())
    return "" if is_noted else "The transaction UID was used for other instances"


def _loadable_codecs() -> Mapping[str, str] | None:
    """Return the versions of the decoders; None if they cannot be asked, for images must be received all the same."""
    from worker.imaging.decoding import codec_versions

    try:
        versions = codec_versions()
    except DecoderDied as exc:
        events.emit("codec.missing", reason=f"It is not known which decoders can be loaded. {exc}")
        return None
    say_unloadable(versions)
    return versions
