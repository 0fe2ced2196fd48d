"""People are told of a critical finding over real sockets: a webhook that knows who speaks, an e-mail that says only which study."""

from __future__ import annotations

import base64
import email
import email.policy
import hashlib
import hmac
import json
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests import reports
from tests.integration.test_commitment import Site
from tests.integration.test_cstore import expect_error
from tests.pki import Authority, served
from tests.recipients import Hook, MailServer
from worker import doctor_peers
from worker.config import Config, ConfigError, Destination
from worker.config_checks import check
from worker.deliver import notice as door
from worker.deliver.association import Peer
from worker.deliver.cstore import Outcome
from worker.domain import Document, Patient, PatientKey
from worker.errors import PeerRefused, PeerUnavailable, PeerUnreachable, WorkerError
from worker.peers import peer_of
from worker.report import notice
from worker.store.database import Store

LOGIN = base64.b64encode(b"\0user\0hush").decode()


@pytest.fixture
def told(tmp_path: Path) -> Document:
    """The notice of a critical finding of a patient with a name."""
    source = reports.radiograph(tmp_path)
    study = replace(reports.study_of(source), patient=Patient(PatientKey("FACTORY", "F-0001"), "ZZNAME^ZZGIVEN", "19350131", "M"))
    [one] = notice.build(reports.result([source], study=study, findings=[replace(reports.FINDINGS[0], is_critical=True)]))
    return one


def send_one(one: Document, to: Peer) -> Outcome:
    """Send it."""
    [found] = door.send([one], peer=to)
    return found


# --- webhook


@pytest.mark.parametrize(("secret", "key"), [("hush", b"hush"), ("whsec_" + base64.b64encode(b"\1key\2").decode(), b"\1key\2")])
def test_a_webhook_is_called_with_the_notice_signed_and_under_an_id_that_stays(told: Document, secret: str, key: bytes) -> None:
    with Hook() as hook:
        for _ in range(2):
            assert send_one(told, hook.peer(secret=secret)).error is None
    (headers, body), (again, _) = hook.received
    assert body == told.data
    own_id, sent_at = headers["webhook-id"], headers["webhook-timestamp"]
    digest = hmac.new(key, f"{own_id}.{sent_at}.".encode() + body, hashlib.sha256).digest()
    assert headers["webhook-signature"] == f"v1,{base64.b64encode(digest).decode()}"
    assert headers["content-type"] == "application/json"
    assert own_id == headers["idempotency-key"] == again["webhook-id"] == json.loads(body)["id"]
    assert abs(int(sent_at) - time.time()) < 60


def test_without_a_secret_nothing_is_signed(told: Document) -> None:
    with Hook() as hook:
        assert send_one(told, hook.peer()).error is None
    assert "webhook-signature" not in hook.received[0][0]


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (200, None),
        (202, None),
        (400, PeerRefused),
        (410, PeerRefused),
        (404, PeerUnreachable),
        (301, PeerUnreachable),
        (408, PeerUnavailable),
        (500, PeerUnavailable),
        (503, PeerUnreachable),
        (429, PeerUnreachable),
    ],
)
def test_the_status_of_a_webhook_decides(told: Document, status: int, error: type[WorkerError] | None) -> None:
    with Hook(statuses=[status]) as hook:
        assert type(send_one(told, hook.peer()).error) is (error or type(None))


def test_answers_that_are_no_success_hold_up_no_other_notice(told: Document) -> None:
    with Hook(statuses=[500, 500, 500]) as hook:
        outcomes = door.send([told] * 4, peer=hook.peer())
    assert [type(one.error) for one in outcomes] == [*[PeerUnavailable] * 3, type(None)]


def test_by_tls_a_webhook_is_told_nothing_before_it_has_shown_who_it_is(told: Document, tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    shown = ours.issue("hook")
    context = served(shown)
    with Hook(tls=context) as hook:
        settings = Destination(name="hook", webhook_url=hook.url, webhook_secret="hush", tls_ca=str(ours.certificate), timeout_s=5.0)
        to = peer_of(settings, own_ae_title="US")
        assert "hush" not in repr(settings) + repr(to)
        assert send_one(told, to).error is None
        assert "authorization" not in hook.received[0][0]
        stranger = peer_of(replace(settings, tls_ca=""), own_ae_title="US")
        expect_error(send_one(told, stranger), PeerUnreachable, "certificate is refused")
    assert len(hook.received) == 1


# --- e-mail


def test_an_email_says_which_study_and_nothing_of_patient_or_finding(told: Document) -> None:
    with MailServer() as server:
        for _ in range(2):
            assert send_one(told, server.peer()).error is None
    first, again = (email.message_from_bytes(raw, policy=email.policy.default) for raw in server.mails)
    words = [b"ZZ", b"F-0001", b"1935", b"neumonia", b"73.21", b"1.2.826"]
    assert [word for word in words if word in server.mails[0]] == []
    assert "Accession number: A-0002" in first.get_content()
    assert "For research use only" in first.get_content()
    assert (first["Subject"], first["To"]) == ("Synoptic: a study needs attention", "a@h.example, b@h.example")
    assert first["Message-ID"] == again["Message-ID"] == f"<{json.loads(told.data)['id']}@h.example>"
    assert (first["Auto-Submitted"], str(first["Date"])) == ("auto-generated", "Sat, 21 Nov 2026 02:02:03 +0100")


def test_a_study_without_an_accession_number_is_named_by_its_uid_on_one_line(told: Document) -> None:
    said = json.loads(told.data)
    said["data"]["accession_number"] = ""
    with MailServer() as server:
        assert send_one(replace(told, data=json.dumps(said).encode()), server.peer()).error is None
        said["data"]["accession_number"] = "A\r\n.\r\nBcc: evil@h.example"
        assert send_one(replace(told, data=json.dumps(said).encode()), server.peer()).error is None
    content = email.message_from_bytes(server.mails[0], policy=email.policy.default).get_content()
    assert f"Study Instance UID: {said['data']['study_instance_uid']}" in content.splitlines()
    assert b"Accession number: A . Bcc: evil@h.example\r\n" in server.mails[1]
    assert server.verbs.count("RCPT") == 4


@pytest.mark.parametrize(
    ("replies", "error", "words"),
    [
        ({"": "554 no service"}, PeerUnreachable, "refuses greeting or log-in with 554"),
        ({"EHLO": "500 what", "HELO": "500 what"}, PeerUnreachable, "refuses greeting or log-in with 500"),
        ({"MAIL": "451 later"}, PeerUnavailable, "refuses the mail with 451"),
        ({"MAIL": "550 never ZZNAME"}, PeerRefused, "refuses the mail with 550"),
        ({"RCPT": "550 no such user ZZNAME"}, PeerRefused, "refuses the mail with 550"),
        ({"RCPT": "450 busy"}, PeerUnavailable, "refuses the mail with 450"),
        ({"DATA": "554 no"}, PeerRefused, "refuses the mail with 554"),
        ({"mail": "452 full"}, PeerUnavailable, "refuses the mail with 452"),
        ({"mail": "550 spam"}, PeerRefused, "refuses the mail with 550"),
        ({"mail": ""}, PeerUnavailable, "broke off the mail"),
        ({"DATA": ""}, PeerUnavailable, "broke off the mail"),
        ({"MAIL": "what is this"}, PeerUnavailable, "refuses the mail with -1"),
    ],
)
def test_what_is_no_acceptance_of_a_mail_says_why_and_whether_it_is_tried_again(
    told: Document, replies: dict[str, str], error: type[WorkerError], words: str
) -> None:
    with MailServer(replies=replies) as server:
        outcome = send_one(told, server.peer())
    assert type(outcome.error) is error, outcome.error
    assert words in str(outcome.error)
    assert "ZZNAME" not in str(outcome.error)


def test_a_mail_that_was_taken_is_delivered_whatever_the_goodbye_is(told: Document) -> None:
    with MailServer(replies={"QUIT": ""}) as server:
        assert send_one(told, server.peer()).error is None


def test_one_recipient_that_is_refused_is_a_warning(told: Document) -> None:
    with MailServer(refuses=["b@h.example"]) as server:
        outcome = send_one(told, server.peer())
    assert (outcome.error, outcome.warning) == (None, "1 of 2 recipients were refused")


def test_a_deaf_mail_server_is_left_in_time(told: Document) -> None:
    server = MailServer()
    server.serve = lambda one: one.recv(1) and None  # type: ignore[method-assign, assignment]
    with server:
        began = time.monotonic()
        outcomes = door.send([told] * 3, peer=server.peer(timeout_s=0.3))
        assert time.monotonic() - began < 3
    assert [isinstance(one.error, PeerUnavailable) for one in outcomes] == [True] * 3
    assert server.connections == 2


def test_mail_goes_by_starttls_and_logs_in_only_there(told: Document, tmp_path: Path) -> None:
    ours = Authority(tmp_path)
    shown = ours.issue("mail", hosts=("mail.example",))
    context = served(shown)
    with MailServer(tls=context, login=LOGIN) as server:
        settings = Destination(name="mail", mail_to=("a@h.example",), mail_from="s@h.example", smtp_host="127.0.0.1", smtp_port=server.port,
                               smtp_secret="user:hush", tls=True, tls_ca=str(ours.certificate), tls_server_name="mail.example",
                               timeout_s=5.0)  # fmt: skip
        to = peer_of(settings, own_ae_title="US")
        assert "hush" not in repr(settings) + repr(to)
        assert send_one(told, to).error is None
        assert server.verbs[:4] == ["EHLO", "STARTTLS", "EHLO", "AUTH"]
        expect_error(send_one(told, replace(to, secret="user:wrong")), PeerUnreachable, "log-in with 535")
        stranger = peer_of(replace(settings, tls_ca=""), own_ae_title="US")
        expect_error(send_one(told, stranger), PeerUnavailable, "certificate is refused")
        server.tls = None
        expect_error(send_one(told, to), PeerUnreachable, "does not offer what is configured")
    assert len(server.mails) == 1
    assert server.verbs.count("AUTH") == 2, "nobody logs in where it is not encrypted"


# --- the job, the line and the configuration


def test_a_notice_that_was_sent_and_not_answered_is_sent_again_under_the_same_id(told: Document, store: Store, tmp_path: Path) -> None:
    site = Site(store, tmp_path)
    site.add(1, told)
    with Hook(statuses=[500]) as hook:
        site.deliver(hook.peer(), wait_s=None)
        assert site.jobs()[0] == ("available", "pacs answers the webhook with HTTP status 500.")
        site.now += timedelta(hours=1)
        site.deliver(hook.peer(), wait_s=None)
        assert site.jobs()[0][0] == "completed"
    assert len({headers["webhook-id"] for headers, _ in hook.received}) == 1


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"smtp_host": "mail.h.example"}, "mail_to needs tls = true"),
        ({"smtp_host": "127.0.0.1", "smtp_secret": "token"}, "smtp_secret is user:password"),
        ({}, "mail_to needs mail_from and smtp_host"),
    ],
)
def test_half_a_mail_configuration_is_refused(keys: dict[str, Any], words: str) -> None:
    one = Destination(name="mail", mail_to=("a@h.example",), mail_from="s@h.example", **keys)
    with pytest.raises(ConfigError, match=words):
        check(Config(destinations=(one,)))


def test_doctor_greets_the_mail_server_and_connects_to_the_webhook(told: Document) -> None:
    with MailServer() as server, Hook() as hook:
        mail = Destination(name="mail", mail_to=("a@h.example",), mail_from="s@h.example", smtp_host="127.0.0.1", smtp_port=server.port)
        config = Config(destinations=(mail, Destination(name="hook", webhook_url=hook.url)))
        found = {what: is_well for what, _, is_well in doctor_peers._peers(config)}
    assert found == {"mail mail": True, "webhook hook": True, "senders": False}
    assert (server.mails, hook.received) == ([], [])
