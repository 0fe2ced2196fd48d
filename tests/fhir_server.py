"""A FHIR R4 server on loopback: searches with pages, reads with ETags, OAuth 2.0, and every fault a real one has shown.

::

    with FhirServer() as server:
        server.load(bundle)                     # as a transaction: references become Type/id
        server.script("GET /fhir/Observation", Reply(503, headers={"Retry-After": "1"}))   # answered once, then as usual

It answers as HAPI does: a searchset per page, `link` next by an opaque URL, versions as weak ETags, `_lastUpdated=gt…`,
`identifier=system|value` by GET and by POST `_search`, an OperationOutcome with every error; a transaction of conditional creates, with
conditional references. It is written from R4 §3.1, not from the client. Not here: other writes, chained searches.
"""

from __future__ import annotations

import base64
import json
import re
import ssl
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final
from urllib.parse import parse_qs, unquote_plus, urlencode, urlsplit

import jwt

from tests.http_peer import handler

Json = dict[str, Any]
TYPES: Final = (
    "Patient", "Observation", "Condition", "DiagnosticReport", "DocumentReference", "MedicationStatement", "MedicationRequest",
    "Medication", "Procedure", "ServiceRequest",
)  # fmt: skip


def outcome(severity: str = "error", code: str = "exception", diagnostics: str = "") -> Json:
    """An OperationOutcome."""
    return {"resourceType": "OperationOutcome", "issue": [{"severity": severity, "code": code, "diagnostics": diagnostics}]}


@dataclass(slots=True)
class Reply:
    """One scripted answer; `endless` streams that many bytes, `drip_s` waits between single bytes until the client goes."""

    status: int = 200
    content: Json | bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    endless: int = 0
    drip_s: float = 0.0
    hangs_up: bool = False


@dataclass(slots=True)
class Asked:
    """One request that came in."""

    line: str
    query: dict[str, str]
    headers: dict[str, str]
    form: dict[str, str]
    body: str = ""


class FhirServer:
    """The server; settings may be changed while it runs."""

    def __init__(self, *, context: ssl.SSLContext | None = None) -> None:
        self.resources: dict[tuple[str, str], Json] = {}
        self.deleted: set[tuple[str, str]] = set()
        self.asked: list[Asked] = []
        self.scripts: dict[str, deque[Reply]] = {}
        self.known_types = set(TYPES)
        self.takes_post = True
        self.max_page = 1000
        self.is_endless = False
        self.next_link = ""
        # OAuth 2.0: which clients there are, and which tokens are good until when (seconds of `time.monotonic`).
        self.secrets: dict[str, str] = {}
        self.public_keys: dict[tuple[str, str], Any] = {}
        self.token_s = 300.0
        self.tokens: dict[str, float] = {}
        self.assertions: list[Json] = []
        self.needs_token = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler(self._serve))
        self._server.daemon_threads = True
        if context:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self.origin = f"{'https' if context else 'http'}://127.0.0.1:{self.port}"
        self.base = f"{self.origin}/fhir"
        self.token_url = f"{self.origin}/token"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> FhirServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # --- what it holds

    def load(self, bundle: Json, *, at: datetime | None = None) -> None:
        """Take a bundle as a transaction does: local references become those of the server."""
        entries = [(entry.get("fullUrl", ""), entry["resource"]) for entry in bundle["entry"]]
        names = {url: f"{resource['resourceType']}/{resource['id']}" for url, resource in entries if url and "id" in resource}
        text = json.dumps([resource for _, resource in entries])
        for url, name in names.items():
            text = text.replace(json.dumps(url), json.dumps(name))
        for resource in json.loads(text):
            self.put(resource, at=at)

    def put(self, resource: Json, *, at: datetime | None = None) -> None:
        """Take a new version of a resource."""
        place = (resource["resourceType"], resource["id"])
        version = int(self.resources[place]["meta"]["versionId"]) + 1 if place in self.resources else 1
        said = (at or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self.resources[place] = resource | {"meta": {**resource.get("meta", {}), "versionId": str(version), "lastUpdated": said}}

    def delete(self, kind: str, name: str) -> None:
        """Delete a resource; what it was called is remembered."""
        del self.resources[kind, name]
        self.deleted.add((kind, name))

    def script(self, line: str, *replies: Reply) -> None:
        """Answer the next requests that begin with `line` ("GET /fhir/Observation") by these, then as usual."""
        self.scripts.setdefault(line, deque()).extend(replies)

    def lines(self, begin: str = "") -> list[str]:
        """The request lines so far, without queries."""
        return [one.line for one in self.asked if one.line.startswith(begin)]

    # --- answering

    def _serve(self, request: BaseHTTPRequestHandler) -> None:
        url = urlsplit(request.path)
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0)).decode()
        query, form = ({name: values[-1] for name, values in parse_qs(text).items()} for text in (url.query, body))
        headers = {name.lower(): value for name, value in request.headers.items()}
        asked = Asked(f"{request.command} {url.path}", query, headers, form, body)
        self.asked.append(asked)
        waiting = next((queue for line, queue in self.scripts.items() if asked.line.startswith(line) and queue), None)
        self._send(request, waiting.popleft() if waiting else self._answer(asked, url.path))

    def _answer(self, asked: Asked, path: str) -> Reply:
        if path == "/token":
            return self._token(asked)
        token = asked.headers.get("authorization", "").removeprefix("Bearer ")
        if self.needs_token and self.tokens.get(token, 0.0) <= time.monotonic():
            return Reply(401, outcome(code="login"), {"WWW-Authenticate": "Bearer"})
        if asked.line == "POST /fhir":
            return self._transact(json.loads(asked.body))
        if asked.line == "GET /fhir/metadata":
            return Reply(200, {"resourceType": "CapabilityStatement", "fhirVersion": "4.0.1"})
        kind, _, rest = path.removeprefix("/fhir/").partition("/")
        if kind not in self.known_types:
            return Reply(404, outcome(code="not-supported"))
        if asked.line.startswith("POST"):
            return self._search(kind, asked.form) if rest == "_search" and self.takes_post else Reply(405, outcome(code="not-supported"))
        return self._read(kind, rest, asked) if rest else self._search(kind, asked.query)

    def _read(self, kind: str, name: str, asked: Asked) -> Reply:
        resource = self.resources.get((kind, name))
        if resource is None:
            return Reply(410 if (kind, name) in self.deleted else 404, outcome(code="not-found"))
        headers = {"ETag": f'W/"{resource["meta"]["versionId"]}"'}
        return Reply(304, headers=headers) if asked.headers.get("if-none-match") == headers["ETag"] else Reply(200, resource, headers)

    def _search(self, kind: str, query: dict[str, str]) -> Reply:
        found = [one for (own, _), one in sorted(self.resources.items()) if own == kind and _matches(one, query)]
        size, offset = min(int(query.get("_count", "20")), self.max_page), int(query.get("_offset", "0"))
        page = found if self.is_endless else found[offset : offset + size]
        entries = [{"fullUrl": f"{self.base}/{kind}/{one['id']}", "resource": one, "search": {"mode": "match"}} for one in page]
        if query.get("_include", "").endswith(":medication"):
            entries += [{"fullUrl": f"{self.base}/{own}/{name}", "resource": one, "search": {"mode": "include"}}
                        for (own, name), one in self.resources.items() if own == "Medication"]  # fmt: skip
        links = [{"relation": "self", "url": f"{self.base}/{kind}"}]
        if self.is_endless or offset + size < len(found):
            link = self.next_link or f"{self.base}/{kind}?{urlencode({**query, '_offset': offset + size})}"
            links.append({"relation": "next", "url": link})
        return Reply(200, {"resourceType": "Bundle", "type": "searchset", "total": len(found), "link": links, "entry": entries})

    def _transact(self, bundle: Json) -> Reply:
        """R4 §3.1.0.11: all or nothing; names of entries and conditional references become the server's own."""
        names: dict[str, str] = {}
        said: list[Json] = []
        new: list[Json] = []
        for entry in bundle["entry"]:
            resource, request = entry["resource"], entry["request"]
            there = self._named(resource["resourceType"], request.get("ifNoneExist", ""))
            if len(there) > 1:
                return Reply(412, outcome(code="multiple-matches"))
            own = there[0]["id"] if there else f"{len(self.resources) + len(new) + 1}"
            names[entry["fullUrl"]] = f"{resource['resourceType']}/{own}"
            said.append({"response": {"status": "200 OK" if there else "201 Created", "location": f"{names[entry['fullUrl']]}/_history/1"}})
            new += [] if there else [resource | {"id": own}]
        text = json.dumps(new)
        for asked in set(re.findall(r'"reference": "([A-Za-z]+[?][^"]+)"', text)):
            kind, query = asked.split("?")
            found = self._named(kind, query)
            if len(found) != 1:
                return Reply(412 if found else 404, outcome(code="multiple-matches" if found else "not-found", diagnostics="ZZNAME"))
            names[asked] = f"{kind}/{found[0]['id']}"
        for url, name in names.items():
            text = text.replace(json.dumps(url), json.dumps(name))
        for resource in json.loads(text):
            self.put(resource)
        return Reply(200, {"resourceType": "Bundle", "type": "transaction-response", "entry": said})

    def _named(self, kind: str, query: str) -> list[Json]:
        wanted = {name: unquote_plus(value) for name, _, value in (part.partition("=") for part in query.split("&"))}
        return [one for (own, _), one in self.resources.items() if own == kind and query and _matches(one, wanted)]

    def _token(self, asked: Asked) -> Reply:
        if not (self._knows_secret(asked) or self._knows_assertion(asked.form)):
            return Reply(401, {"error": "invalid_client", "error_description": "ZZSECRETWORDS"})
        token = f"token-{len(self.tokens) + 1}"
        self.tokens[token] = time.monotonic() + self.token_s
        return Reply(200, {"access_token": token, "token_type": "Bearer", "expires_in": self.token_s, "scope": asked.form["scope"]})

    def _knows_secret(self, asked: Asked) -> bool:
        kind, _, pair = asked.headers.get("authorization", "").partition(" ")
        name, _, secret = base64.b64decode(pair).decode().partition(":") if kind == "Basic" else ("", "", "")
        return bool(name) and self.secrets.get(unquote_plus(name)) == unquote_plus(secret)

    def _knows_assertion(self, form: dict[str, str]) -> bool:
        """Judge an assertion as SMART App Launch 2.2 asks: signature by kid, aud, iss = sub, jti new, exp within five minutes."""
        if form.get("client_assertion_type") != "urn:ietf:params:oauth:client-assertion-type:jwt-bearer":
            return False
        header = jwt.get_unverified_header(form["client_assertion"])
        key = self.public_keys.get((header["kid"], header["alg"]))
        if key is None or header["alg"] not in ("RS384", "ES384"):
            return False
        options: Any = {"require": ["iss", "sub", "aud", "exp", "jti"]}
        claims = jwt.decode(form["client_assertion"], key, algorithms=[header["alg"]], audience=self.token_url, options=options)
        is_new = claims["jti"] not in {one["jti"] for one in self.assertions}
        self.assertions.append(claims)
        return bool(claims["iss"] == claims["sub"] and claims["exp"] <= time.time() + 300 and is_new)

    @staticmethod
    def _send(request: BaseHTTPRequestHandler, reply: Reply) -> None:
        if reply.hangs_up:
            request.close_connection = True
            return
        body = json.dumps(reply.content).encode() if isinstance(reply.content, dict) else reply.content
        request.send_response(reply.status)
        for name, value in ({"Content-Type": "application/fhir+json"} | reply.headers).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(reply.endless or len(body)))
        request.end_headers()
        try:
            for piece in _pieces(reply, body):
                request.wfile.write(piece)
        except OSError:  # the client went: what a limit is for
            request.close_connection = True


def _pieces(reply: Reply, body: bytes) -> Iterator[bytes]:
    if reply.endless:
        yield b'{"resourceType": "Bundle", "type": "searchset", "x": "'
        for _ in range(reply.endless // 2**20):
            yield b"x" * 2**20
        return
    if reply.drip_s:
        for one in body:
            time.sleep(reply.drip_s)
            yield bytes([one])
        return
    yield body


def _matches(resource: Json, query: dict[str, str]) -> bool:
    """Whether a resource fits: identifier by system and value, ignoring case as some servers do; subject; lastUpdated."""
    said = datetime.fromisoformat(resource["meta"]["lastUpdated"])
    since = query.get("_lastUpdated", "")
    if since and said <= datetime.fromisoformat(since.removeprefix("gt")):
        return False
    if "identifier" in query:
        # R4 §3.1.1.3.1: a comma is an "or" and a bar ends the system, unless they are escaped.
        wanted = [re.split(r"(?<!\\)\|", one.lower()) for one in re.split(r"(?<!\\),", query["identifier"])]
        have = [[str(one.get("system")).lower(), str(one.get("value")).lower()] for one in resource.get("identifier", [])]
        return any([re.sub(r"\\(.)", r"\1", part) for part in one] in have for one in wanted)
    return "patient" not in query or resource.get("subject", {}).get("reference") == f"Patient/{query['patient']}"


def date_header(at: datetime) -> str:
    """A time as HTTP writes it."""
    return format_datetime(at, usegmt=True)
