"""HTTP to one FHIR server: every answer is bounded in bytes and time, tried again where that helps, and refused in words where not.

::

    429 · 502 · 503 · 504 · no connection ─▶ again, after Retry-After or a back-off ─▶ PeerUnavailable
    401 ─▶ once more with a new token ─▶ PeerRefused          500, OperationOutcome "transient" ─▶ PeerUnavailable
    3xx, 4xx ─▶ PeerRefused

Why httpx2: the maintained continuation of httpx (BSD-3), streams with limits of our own, follows no redirect unless told.
Not here: what is asked for (fhir_client.py), tokens (fhir_token.py).
A text names statuses and the codes of an OperationOutcome, never a URL, a diagnosis or what a server wrote.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import random
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

import httpx2

from worker.errors import PeerRefused, PeerUnavailable

Json = dict[str, Any]

_AGAIN: Final = frozenset({429, 502, 503, 504})
#: First pause between attempts; each next one is twice as long.
_PAUSE_S: Final = 0.5
# FHIR R4, issue-severity and issue-type: the only words of an OperationOutcome that cannot be a patient's.
_SEVERITIES: Final = ("fatal", "error", "warning", "information")
_CODES: Final = frozenset({
    "invalid", "structure", "required", "value", "invariant", "security", "login", "unknown", "expired", "forbidden", "suppressed",
    "processing", "not-supported", "duplicate", "multiple-matches", "not-found", "deleted", "too-long", "code-invalid", "extension",
    "too-costly", "business-rule", "conflict", "transient", "lock-error", "no-store", "exception", "timeout", "incomplete", "throttled",
    "informational",
})  # fmt: skip
_TRANSIENT: Final = frozenset({"transient", "lock-error", "no-store", "exception", "timeout", "incomplete", "throttled"})

for _name in ("httpx2", "httpcore2"):
    # They log URLs (which name patients) at INFO and headers (which hold tokens) at DEBUG.
    logging.getLogger(_name).setLevel(logging.WARNING)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered: a status, headers and one JSON object (empty where there is no content)."""

    status: int
    headers: httpx2.Headers
    content: Json


@dataclass(slots=True)
class Budget:
    """What one pull may still cost: bytes and seconds."""

    bytes_left: int
    until: float


def origin_of(url: httpx2.URL) -> tuple[str, str, int | None]:
    """Return scheme, host and port; two URLs of the same are one server's (RFC 6454)."""
    return url.scheme, url.host, url.port or {"http": 80, "https": 443}.get(url.scheme)


def checked_url(text: str, name: str) -> httpx2.URL:
    """Read a configured URL: https, or http on this very machine.

    Raises
    ------
    ValueError
        It is neither.
    """
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL:
        raise ValueError(f"{name} is not a URL.") from None
    if url.userinfo:
        raise ValueError(f"{name} holds a user name or password; they belong in client_id and client_secret.")
    if not url.host or not (url.scheme == "https" or (url.scheme == "http" and _is_loopback(url.host))):
        raise ValueError(f"{name} must begin with https://; http:// is for a server on this very machine.")
    return url


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def tls_context(ca: str = "") -> ssl.SSLContext:
    """TLS 1.2 or better, the server's certificate verified against `ca` (a PEM file), else the system's authorities (RFC 9325).

    Raises
    ------
    ValueError
        The file cannot be used.
    """
    try:
        context = ssl.create_default_context(cafile=ca or None)
    except OSError as exc:  # ssl.SSLError is one
        raise ValueError(f"The certificate authorities of the FHIR server cannot be used: {exc.strerror or 'no PEM'}.") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


@dataclass(slots=True)
class Transport:
    """One connection pool with its rules; `clock` gives seconds that never go back."""

    context: ssl.SSLContext
    timeout_s: float
    attempts: int
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    _pool: httpx2.Client = field(init=False)

    def __post_init__(self) -> None:
        # The environment's proxies and .netrc are somebody else's configuration.
        self._pool = httpx2.Client(verify=self.context, timeout=self.timeout_s, follow_redirects=False, trust_env=False)

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()

    def ask(
        self,
        method: str,
        url: httpx2.URL,
        *,
        budget: Budget,
        headers: Mapping[str, str],
        form: Mapping[str, str] | None = None,
        peer: str = "FHIR server",
    ) -> Answer:
        """Ask until there is an answer that another attempt would not change.

        Raises
        ------
        PeerUnavailable
            There was none in the attempts and seconds that there are.
        PeerRefused
            The answer is too large, or not JSON.
        """
        pause_s = _PAUSE_S
        for attempt in range(1, self.attempts + 1):
            wait_s = pause_s * random.uniform(0.5, 1.5)  # noqa: S311 - so that many workers do not come back together
            try:
                answer = self._once(method, url, budget, headers, form, peer)
            except httpx2.RequestError as exc:
                if "CERTIFICATE_VERIFY_FAILED" in str(exc):
                    raise PeerUnavailable(f"The {peer}'s certificate is not trusted: see the certificate authorities configured.") from None
                problem = f"does not answer ({type(exc).__name__})"
            else:
                if answer.status not in _AGAIN:
                    return answer
                problem = f"answers with status {answer.status}{words_of(answer.content)}"
                wait_s = max(wait_s, _retry_after_s(answer.headers))
            if attempt == self.attempts or self.clock() + wait_s >= budget.until:
                break
            self.sleep(wait_s)
            pause_s *= 2
        raise PeerUnavailable(f"The {peer} {problem}, after {attempt} attempts.")

    def _once(
        self, method: str, url: httpx2.URL, budget: Budget, headers: Mapping[str, str], form: Mapping[str, str] | None, peer: str
    ) -> Answer:
        left_s = budget.until - self.clock()
        if left_s <= 0:
            raise PeerUnavailable(f"The {peer} is too slow: the time for one patient is over.")
        timeout = httpx2.Timeout(min(self.timeout_s, left_s))
        with self._pool.stream(method, url, headers=headers, data=form, timeout=timeout) as response:
            body = bytearray()
            for chunk in response.iter_bytes():  # as they come: to wait for a full chunk is to wait for one that drips
                body += chunk
                if len(body) > budget.bytes_left:
                    raise PeerRefused(f"The {peer}'s answer is larger than one patient's record may be: raise the limit, or ask why.")
                if self.clock() > budget.until:
                    raise PeerUnavailable(f"The {peer} is too slow: the time for one patient is over.")
        budget.bytes_left -= len(body)
        return Answer(response.status_code, response.headers, _object(bytes(body), response.status_code, peer))


def _object(body: bytes, status: int, peer: str) -> Json:
    """Read the body; that of an error may be anything."""
    try:
        found = json.loads(body.decode("utf-8-sig")) if body else {}
    except (ValueError, RecursionError):
        found = None
    if isinstance(found, dict):
        return found
    if status == 200:
        raise PeerRefused(f"The {peer}'s answer is not a JSON object.")
    return {}


def _retry_after_s(headers: httpx2.Headers) -> float:
    """Return the seconds that Retry-After asks for (RFC 9110 §10.2.3): a number or a date."""
    text = headers.get("Retry-After", "")
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        at = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, ((at if at.tzinfo else at.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds())


def worst_issue(outcome: Json) -> tuple[str, str]:
    """Return severity and code of the gravest issue of an OperationOutcome; ('', '') where there is none in the words of FHIR."""
    issues = outcome.get("issue") if outcome.get("resourceType") == "OperationOutcome" else None
    pairs = [(one.get("severity"), one.get("code")) for one in issues if isinstance(one, dict)] if isinstance(issues, list) else []
    known = [(severity, code if code in _CODES else "") for severity, code in pairs if severity in _SEVERITIES and isinstance(code, str)]
    return min(known, key=lambda pair: _SEVERITIES.index(pair[0]), default=("", ""))


def words_of(outcome: Json) -> str:
    """Return what an OperationOutcome says, for a sentence; '' where it says nothing."""
    severity, code = worst_issue(outcome)
    return f" and an OperationOutcome of severity {severity}{f', code {code}' if code else ''}" if severity else ""


def check(answer: Answer, *, asked: str) -> None:
    """Raise what an answer that is not a success means.

    Raises
    ------
    PeerRefused, PeerUnavailable
        As drawn at the top.
    """
    severity, code = worst_issue(answer.content)
    is_outcome = severity in ("fatal", "error")
    if answer.status in (200, 304) and not is_outcome:
        return
    said = f"answers {asked} with status {answer.status}{words_of(answer.content)}"
    if answer.status >= 500 or code in _TRANSIENT:
        raise PeerUnavailable(f"The FHIR server {said}.")
    if 300 <= answer.status < 400:
        raise PeerRefused(f"The FHIR server {said}, a redirect, which is not followed: configure where it leads.")
    raise PeerRefused(f"The FHIR server {said}.")
