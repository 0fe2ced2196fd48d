"""One patient's record from a FHIR R4 server, on demand: the same mapping as a file's, by search.

::

    POST Patient/_search identifier=system|value ── 0 ▶ []   1 ▶ on   more ▶ PatientAmbiguous: never guessed
    GET  Patient/<id>                               If-None-Match: its ETag of last time
    GET  Observation?patient=<id>&_lastUpdated=gt…  each type of RESOURCES, page by page, of the same origin only
    Assembly ─▶ RecordUpdate                        committed(key): what is asked for next time begins here

The identifier is posted, so that it is in no access log; a server that takes no POST is asked by GET.
Not here: HTTP's rules (fhir_http.py), tokens (fhir_token.py), rows. Attachments' urls and references are not followed.
A search does not show what was deleted: after a pull of everything, `gone` asks for what it did not bring, by name.
One client is used by one thread at a time.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta, tzinfo
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final

import httpx2

from worker.domain import PatientKey, RecordUpdate
from worker.errors import PatientAmbiguous, PeerRefused, PeerUnavailable, RecordError
from worker.intake.fhir import Assembly
from worker.intake.fhir_elements import SCHEMES, Elements, Json, object_of, objects_of, raw_of, text_of
from worker.intake.fhir_http import Answer, Budget, Transport, check, checked_url, origin_of, tls_context, words_of, worst_issue
from worker.intake.fhir_token import Tokens, read_key

#: What is asked for of a patient.
RESOURCES: Final = (
    "Observation",
    "Condition",
    "DiagnosticReport",
    "DocumentReference",
    "MedicationStatement",
    "MedicationRequest",
    "Procedure",
    "ServiceRequest",
)
#: A medication may be a resource of its own (R4 §3.1.1.5.5, _include).
_INCLUDES: Final = {name: f"{name}:medication" for name in ("MedicationStatement", "MedicationRequest")}
_ID: Final = re.compile(r"[A-Za-z0-9.-]{1,64}")  # FHIR R4 §2.24.0.1, id
_ACCEPT: Final = "application/fhir+json"
#: How far back a later pull overlaps: a server may list a resource later than it was stamped. Facts known are not added again.
_OVERLAP: Final = timedelta(minutes=5)
#: How many resources of one patient are asked for by name in one pull.
MAX_READS: Final = 50
#: How many patients are remembered between pulls; one that is not is pulled whole.
_REMEMBERED: Final = 4096
_TOKEN_BYTES: Final = 2**20
_NO_SEARCH_BY_POST: Final = frozenset({404, 405, 415, 501})


@dataclass(frozen=True, slots=True)
class _Known:
    """What a pull learned that the next one need not ask again."""

    patient_id: str
    etag: str
    patient: Json
    asked_at: datetime | None
    whole_at: float = 0.0


class Client:
    """A FHIR R4 server, asked for one patient at a time.

    Parameters
    ----------
    base_url
        `https://host/path`; http for a server on this very machine only.
    zone, issuers, schemes
        As in `fhir.parse`, so that facts pulled and imported are the same.
    source
        Of the facts; "FHIR" and the server's host where it is left out, so that no two servers' IDs are one.
    token_url, client_id, client_secret, key_file, key_id, scope
        OAuth 2.0 client credentials, by secret or by private key (a JWK, or PEM with `key_id`); without `token_url` none.
    ca
        PEM file of the authorities that are trusted; else the system's.
    timeout_s, deadline_s
        Of one read of the network; of a whole pull.
    max_pages, max_bytes
        Of one search; of a whole pull.
    whole_every_s
        How often a patient is pulled whole again, in seconds: only then it is seen what the server has no more.
    attempts
        At most, of each request.
    refused
        Called with a sentence for each resource that cannot be understood, which is then left out; without it the pull fails.

    Raises
    ------
    ValueError
        A URL, a file or their combination cannot be right.
    """

    def __init__(
        self,
        base_url: str,
        *,
        zone: tzinfo,
        issuers: Mapping[str, str],
        schemes: Mapping[str, str] | None = None,
        source: str = "",
        token_url: str = "",
        client_id: str = "",
        client_secret: str = "",
        key_file: str = "",
        key_id: str = "",
        scope: str = "system/*.read",
        ca: str = "",
        timeout_s: float = 10.0,
        deadline_s: float = 60.0,
        page_size: int = 200,
        max_pages: int = 100,
        max_bytes: int = 64 * 2**20,
        whole_every_s: float = 86400.0,
        attempts: int = 4,
        resources: Sequence[str] = RESOURCES,
        refused: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        # With its slash, so that a relative URL is below it.
        self._base = checked_url(f"{base_url.rstrip('/')}/", "The URL of the FHIR server")
        if token_url and (not client_id or bool(client_secret) == bool(key_file)):
            raise ValueError("A token needs client_id and either client_secret or key_file.")
        token_at = checked_url(token_url, "The URL of the token server") if token_url else self._base
        key = read_key(Path(key_file), key_id=key_id) if token_url and key_file else None
        self.source: Final = source or f"FHIR {self._base.host}"
        self._elements = (zone, issuers, {**SCHEMES, **(schemes or {})}, self.source)
        self._deadline_s, self._max_bytes = deadline_s, max_bytes
        self._page_size, self._max_pages, self._whole_every_s = page_size, max_pages, whole_every_s
        self._brought: set[str] | None = None
        self._resources, self._refused, self._clock = tuple(resources), refused, clock
        self._http = Transport(tls_context(ca), timeout_s, attempts, clock, sleep)
        self._budget = Budget(0, 0.0)

        def post(headers: Mapping[str, str], form: Mapping[str, str]) -> tuple[int, Json]:
            budget = Budget(_TOKEN_BYTES, self._budget.until)
            said = {"Accept": "application/json", **headers}
            answer = self._http.ask("POST", token_at, budget=budget, headers=said, form=form, peer="token server")
            if answer.status >= 500:
                raise PeerUnavailable(f"The token server answers with status {answer.status}.")
            return answer.status, answer.content

        self._tokens = Tokens(post, token_url, client_id, client_secret, key, scope, clock)
        self._known: OrderedDict[PatientKey, _Known] = OrderedDict()
        self._pulled: OrderedDict[PatientKey, _Known] = OrderedDict()
        self._posts_searches = True

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def pull(self, key: PatientKey, *, issuer_system: str) -> list[RecordUpdate]:
        """Ask for all that the server knows of one patient; after `committed`, for what is new since.

        Parameters
        ----------
        issuer_system
            Identifier.system under which the server keeps the patient IDs of `key.issuer`.

        Returns
        -------
        list[RecordUpdate]
            Empty where the server does not know the patient.

        Raises
        ------
        PatientAmbiguous
            More than one patient has this identifier.
        RecordError
            The patient found does not have it, or a resource cannot be understood and `refused` was not given.
        PeerUnavailable
            There is no answer now.
        PeerRefused
            The answer is one that asking again does not change.
        """
        self._budget = Budget(self._max_bytes, self._clock() + self._deadline_s)
        self._pulled.pop(key, None)
        self._brought = None
        patient_id = self._find(issuer_system, key.patient_id)
        if patient_id is None:
            return []
        known = self._known.get(key)
        if known and known.patient_id != patient_id:
            known = None  # the identifier is another patient's now
        if known and self._clock() - known.whole_at >= self._whole_every_s:
            known = None
        now_known = replace(self._read(patient_id, known), whole_at=known.whole_at if known else self._clock())
        patient = now_known.patient
        if not _has(patient, issuer_system, key.patient_id):
            raise RecordError("The FHIR server found a patient by an identifier that the patient does not have.")
        assembly = Assembly(Elements(*self._elements))
        name = f"Patient/{patient_id}"
        assembly.introduce(patient, str(self._base.join(name)), key=key)
        for linked in self._linked(patient):
            self._take(assembly.introduce, linked, str(self._base.join(f"Patient/{linked.get('id')}")))
        brought: set[str] = set()
        for kind in self._resources:
            brought |= self._pull_type(assembly, kind, patient_id, known)
        updates = assembly.updates()
        self._brought = None if known and known.asked_at else brought
        _remember(self._pulled, key, now_known)
        return updates

    def committed(self, key: PatientKey) -> None:
        """The last pull of `key` is in the store: the next one asks only for what is new. Without this call each one asks for all."""
        if pulled := self._pulled.pop(key, None):
            _remember(self._known, key, pulled)

    def gone(self, names: Iterable[str]) -> set[str]:
        """Of these resources ("Observation/17") those which the server says it has deleted: 410, R4 §3.1.0.7.1.

        None, unless the last pull was one of everything. Asked by name is only what that did not bring, at most `MAX_READS`: what is
        hidden, or missing from a page by mistake, is not deleted.

        Raises
        ------
        PeerUnavailable
            There is no answer now, or the pull has lasted too long already.
        """
        if self._brought is None:
            return set()
        asked = sorted(name for name in set(names) - self._brought if _ID.fullmatch(name.partition("/")[2]))[:MAX_READS]
        return {name for name in asked if self._ask("GET", self._base.join(name)).status == 410}

    # --- steps of a pull

    def _find(self, system: str, value: str) -> str | None:
        """Return the logical ID of the one patient with this identifier; None where there is none."""
        asked = {"identifier": f"{_escaped(system)}|{_escaped(value)}", "_count": "10"}
        found = {
            text_of(resource, "id")
            for entry in self._search("Patient", asked, by_post=True)
            for resource in (object_of(entry, "resource"),)
            if resource.get("resourceType") == "Patient" and text_of(object_of(entry, "search"), "mode") in ("", "match")
        }
        if len(found) > 1:
            raise PatientAmbiguous(f"{len(found)} patients of the FHIR server have the identifier asked for; exactly one is needed.")
        if found and not _ID.fullmatch(next(iter(found))):
            raise RecordError("Patient.id is not an id.")
        return next(iter(found), None)

    def _read(self, patient_id: str, known: _Known | None) -> _Known:
        """Read the patient, unless it is still the one known.

        The time is that of this answer, before all searches: what comes up between two of them is asked for next time.
        """
        headers = {"If-None-Match": known.etag} if known and known.etag else {}
        answer = self._ask("GET", self._base.join(f"Patient/{patient_id}"), headers=headers)
        check(answer, asked="a read of Patient")
        if answer.status == 304 and known:
            return replace(known, asked_at=_date(answer))
        if answer.content.get("resourceType") != "Patient" or answer.content.get("id") != patient_id:
            raise PeerRefused("The FHIR server answers a read of Patient with another resource.")
        return _Known(patient_id, answer.headers.get("ETag", ""), answer.content, _date(answer))

    def _linked(self, patient: Json) -> Iterator[Json]:
        """Read the patients that this one replaces or is replaced by: a merge needs both keys."""
        links = [one for one in objects_of(patient, "link") if text_of(one, "type") in ("replaced-by", "replaces")]
        for link in links[:20]:
            kind, _, name = text_of(object_of(link, "other"), "reference").partition("/")
            if kind == "Patient" and _ID.fullmatch(name):
                answer = self._ask("GET", self._base.join(f"Patient/{name}"))
                if answer.status not in (404, 410):
                    check(answer, asked="a read of Patient")
                    if answer.content.get("resourceType") == "Patient" and answer.content.get("id") == name:
                        yield answer.content

    def _pull_type(self, assembly: Assembly, kind: str, patient_id: str, known: _Known | None) -> set[str]:
        """Take all resources of one type, or what is new of them; return their names, of those too that cannot be understood."""
        asked = {"patient": patient_id, "_count": str(self._page_size)}
        if kind in _INCLUDES:
            asked["_include"] = _INCLUDES[kind]
        if known and known.asked_at:
            asked["_lastUpdated"] = f"gt{(known.asked_at - _OVERLAP).strftime('%Y-%m-%dT%H:%M:%SZ')}"
        found = [(object_of(entry, "resource"), text_of(entry, "fullUrl")) for entry in self._search(kind, asked)]
        for resource, url in found:
            if resource.get("resourceType") == "Medication":
                self._take(assembly.introduce, resource, url)
        for resource, url in found:
            if resource.get("resourceType") == kind:
                self._take(assembly.add, resource, url)
        return {f"{kind}/{text_of(resource, 'id')}" for resource, _ in found if resource.get("resourceType") == kind}

    def _take(self, take: Callable[[Json, str], None], resource: Json, url: str) -> None:
        try:
            take(resource, url)
        except RecordError as exc:
            if self._refused is None:
                raise
            self._refused(str(exc))

    # --- requests

    def _search(self, kind: str, asked: Mapping[str, str], *, by_post: bool = False) -> Iterator[Json]:
        """Give each entry of each page of a search."""
        answer = self._first_page(kind, asked, by_post=by_post)
        if answer.status == 404 and kind != "Patient":  # a type that the server does not know
            return
        url, seen = self._base.join(kind), set[str]()
        for _ in range(self._max_pages):
            check(answer, asked=f"a search of {kind}")
            if answer.content.get("resourceType") != "Bundle" or answer.content.get("type") != "searchset":
                raise PeerRefused(f"The FHIR server answers a search of {kind} with no searchset.")
            for entry in objects_of(answer.content, "entry"):
                if worst_issue(resource := object_of(entry, "resource"))[0] in ("fatal", "error"):
                    raise PeerRefused(f"The FHIR server answers a search of {kind} in part only{words_of(resource)}.")
                yield entry
            following = self._following(answer.content, url)
            if following is None:
                return
            if str(following) in seen:
                raise PeerRefused(f"The pages of a search of {kind} go round in a circle.")
            seen.add(str(following))
            url = following
            answer = self._ask("GET", url)
        raise PeerRefused(f"A search of {kind} has more than {self._max_pages} pages.")

    def _first_page(self, kind: str, asked: Mapping[str, str], *, by_post: bool) -> Answer:
        if by_post and self._posts_searches:
            answer = self._ask("POST", self._base.join(f"{kind}/_search"), form=asked)
            if answer.status not in _NO_SEARCH_BY_POST:
                return answer
            self._posts_searches = False
        return self._ask("GET", self._base.join(kind).copy_merge_params(dict(asked)))

    def _following(self, bundle: Json, url: httpx2.URL) -> httpx2.URL | None:
        """Return the next page's URL, which must be of the server that was configured: a token goes nowhere else."""
        link = next((one for one in objects_of(bundle, "link") if one.get("relation") == "next"), None)
        if link is None:
            return None
        try:
            following = url.join(raw_of(link, "url"))
        except httpx2.InvalidURL:
            raise PeerRefused("Bundle.link of the next page is not a URL.") from None
        if origin_of(following) != origin_of(self._base) or following.userinfo:
            raise PeerRefused("Bundle.link of the next page leads to another server, which is not followed.")
        return following

    def _ask(
        self, method: str, url: httpx2.URL, *, headers: Mapping[str, str] | None = None, form: Mapping[str, str] | None = None
    ) -> Answer:
        """Ask with a token; once more with a new one where it is not accepted."""
        for is_last in (False, True):
            said: dict[str, Any] = {"Accept": _ACCEPT, **(headers or {}), **self._tokens.header()}
            answer = self._http.ask(method, url, budget=self._budget, headers=said, form=form)
            if answer.status != 401 or is_last or not self._tokens.forget():
                break
        return answer


def _escaped(text: str) -> str:
    """Escape what separates the parts of a search parameter (R4 §3.1.1.3.1)."""
    return re.sub(r"([\\$,|])", r"\\\1", text)


def _has(patient: Json, system: str, value: str) -> bool:
    """Whether a patient has exactly this identifier, now: a search may ignore case, blanks or leading zeros."""
    current = (one for one in objects_of(patient, "identifier") if one.get("use") != "old")
    return any(one.get("system") == system and text_of(one, "value") == value for one in current)


def _remember(known: OrderedDict[PatientKey, _Known], key: PatientKey, one: _Known) -> None:
    known[key] = one
    known.move_to_end(key)
    if len(known) > _REMEMBERED:
        known.popitem(last=False)


def _date(answer: Answer) -> datetime | None:
    """Return when an answer was made, by the server's clock (RFC 9110 §6.6.1); None where it does not say."""
    try:
        return parsedate_to_datetime(answer.headers.get("Date", "")).astimezone(UTC)
    except (ValueError, OverflowError):
        return None
