"""Notices of critical findings, to people: a signed webhook, or an e-mail that says only which study to open.

======================  ======================================================================================
what the peer answers   what becomes of the notice
======================  ======================================================================================
webhook: 2xx            delivered; others as web.py says
mail: 250               delivered; that some recipients were refused is a warning
mail: 4xx, silence      PeerUnavailable: again later, under the same Message-ID
mail: 5xx               PeerRefused; of log-in, greeting and STARTTLS PeerUnreachable, for those are the configuration's
======================  ======================================================================================

The webhook follows Standard Webhooks 1.0.0: an ID that is the same when it is sent again, the time it was sent, and HMAC-SHA256 over
both and the body, so that a receiver knows who speaks, and what it has heard before. Mail goes by STARTTLS (RFC 3207), on port 465 by
TLS at once.
Not here: what a notice says (report/notice.py), HTTP (web.py), jobs (send.py).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import smtplib
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from email.message import EmailMessage
from email.policy import SMTP as SMTP_POLICY
from email.utils import format_datetime
from functools import partial
from typing import Any, Final

from worker.deliver import web
from worker.deliver.association import Peer, connect
from worker.deliver.cstore import Outcome
from worker.domain import Document
from worker.errors import PeerRefused, PeerUnavailable, PeerUnreachable, WorkerError, cause_of

Json = dict[str, Any]

#: RFC 5321 §4.2.1, §4.2.3: it is ready; from here on it is no use to try again.
_READY, _PERMANENT = 220, 500
#: RFC 8314 §3.3: TLS from the first byte.
_SUBMISSIONS: Final = 465
_SUBJECT: Final = "Synoptic: a study needs attention"
_TEXT: Final = """\
A result of Synoptic needs attention now.

{what}: {number}

Please open the study in the PACS. This message says neither whose it is nor what was found.
{statement}
"""


def send(documents: Sequence[Document], *, peer: Peer) -> list[Outcome]:
    """Tell of `documents` in order, by webhook or by e-mail; one outcome each, in order, as of `cstore.send`."""
    return web.each(documents, partial(_mail if peer.door == "mail" else _post, peer=peer))


# --- webhook


def _post(document: Document, *, peer: Peer) -> Outcome:
    uid, sent_at = document.sop_instance_uid, str(int(time.time()))
    own_id = str(json.loads(document.data)["id"])
    headers = {"Content-Type": "application/json", "webhook-id": own_id, "webhook-timestamp": sent_at, "Idempotency-Key": own_id}
    if peer.secret:
        headers["webhook-signature"] = _signature(peer.secret, own_id, sent_at, document.data)
    try:
        status, _ = web.exchange(peer, "POST", peer.url, body=document.data, headers=headers)
    except WorkerError as error:
        return Outcome(uid, error=error)
    what = f"{peer.name} answers the webhook with HTTP status {status}"
    return Outcome(uid, 0, error=None if status // 100 == 2 else web.refusal(status, what))


def _signature(secret: str, own_id: str, sent_at: str, body: bytes) -> str:
    """HMAC-SHA256 by the secret, or by the key that ``whsec_`` and Base64 write."""
    key = base64.b64decode(secret.removeprefix("whsec_")) if secret.startswith("whsec_") else secret.encode()
    digest = hmac.digest(key, f"{own_id}.{sent_at}.".encode() + body, hashlib.sha256)
    return f"v1,{base64.b64encode(digest).decode()}"


# --- e-mail


class _Smtp(smtplib.SMTP):
    """smtplib on a socket of `connect`, which has our deadlines, TLS rules and sentences."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        super().__init__(local_hostname=socket.gethostname(), timeout=peer.timeout_s)
        self._host = peer.tls_server_name or peer.host

    def _get_socket(self, _host: str, _port: int, _timeout: float) -> socket.socket:
        return connect(self._peer if self._peer.port == _SUBMISSIONS else replace(self._peer, tls=None))


def ask(peer: Peer) -> float:
    """Return the seconds until the mail server has greeted, encrypted and taken the log-in.

    Raises
    ------
    PeerUnavailable
        With the reason in words.
    """
    started = time.perf_counter()
    with _session(peer):
        return time.perf_counter() - started


def _mail(document: Document, *, peer: Peer) -> Outcome:
    uid = document.sop_instance_uid
    try:
        with _session(peer) as line:
            refused = line.send_message(_message(json.loads(document.data), peer=peer))
    except WorkerError as error:
        return Outcome(uid, error=error)
    return Outcome(uid, 0, f"{len(refused)} of {len(peer.mail_to)} recipients were refused" if refused else "")


def _message(notice: Json, *, peer: Peer) -> EmailMessage:
    data = notice["data"]
    what, number = "Accession number", data["accession_number"]
    if not number:
        what, number = "Study Instance UID", data["study_instance_uid"]
    message = EmailMessage(policy=SMTP_POLICY)
    message["From"], message["To"], message["Subject"] = peer.mail_from, ", ".join(peer.mail_to), _SUBJECT
    message["Date"] = format_datetime(datetime.fromisoformat(notice["timestamp"]))
    message["Message-ID"] = f"<{notice['id']}@{peer.mail_from.rpartition('@')[2] or 'synoptic.invalid'}>"
    message["Auto-Submitted"], message["Importance"] = "auto-generated", "high"
    message.set_content(_TEXT.format(what=what, number=" ".join(number.split()), statement=data["statement"]))
    return message


@contextlib.contextmanager
def _session(peer: Peer) -> Iterator[smtplib.SMTP]:
    """A mail server that is ready to take mail; what goes wrong within is raised as what it means.

    Raises
    ------
    PeerUnreachable
        It was not reached, does not encrypt, or refuses the log-in.
    PeerUnavailable
        It broke off, or says 4xx.
    PeerRefused
        It says 5xx of a message.
    """
    line = _Smtp(peer)
    try:
        with web.bounded(lambda: line.sock, peer.timeout_s):
            code, said = line.connect(peer.host, peer.port)
            if code != _READY:
                raise smtplib.SMTPConnectError(code, said)
            if peer.tls is not None and peer.port != _SUBMISSIONS:
                line.starttls(context=peer.tls())
            if peer.secret:
                line.login(*peer.secret.split(":", 1))
            yield line
            with contextlib.suppress(smtplib.SMTPException, OSError):  # a goodbye that fails changes no answer already given
                line.quit()
    except (smtplib.SMTPException, OSError, ValueError) as error:
        raise _meaning(error, peer=peer) from error
    finally:
        line.close()


def _meaning(error: Exception, *, peer: Peer) -> WorkerError:
    """What an error of smtplib stands for; its text may repeat an address, and is not repeated."""
    if isinstance(error, smtplib.SMTPNotSupportedError):
        return PeerUnreachable(f"{peer.name} does not offer what is configured: STARTTLS or log-in.")
    if isinstance(error, (smtplib.SMTPConnectError, smtplib.SMTPHeloError, smtplib.SMTPAuthenticationError)):
        return PeerUnreachable(f"{peer.name} refuses greeting or log-in with {error.smtp_code}.")
    codes: list[int] = []
    if isinstance(error, smtplib.SMTPRecipientsRefused):  # each of them, or some were told
        codes = sorted({code for code, _ in error.recipients.values()})
    elif isinstance(error, smtplib.SMTPResponseException):
        codes = [error.smtp_code]
    if codes:
        what = f"{peer.name} refuses the mail with {', '.join(map(str, codes))}."
        return PeerRefused(what) if min(codes) >= _PERMANENT else PeerUnavailable(what)
    # Every error of smtplib is an OSError; of those without a code nothing is known but that it broke off.
    if isinstance(error, OSError) and not isinstance(error, smtplib.SMTPException):
        return PeerUnavailable(f"{peer.name} gives no answer by SMTP: {cause_of(error)}.")
    return PeerUnavailable(f"{peer.name} broke off the mail.")
