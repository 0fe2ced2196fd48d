"""Log in at the hospital's own identity provider: OpenID Connect, authorization code with PKCE (RFC 7636).

::

    /login/oidc ─▶ sealed state in a cookie; nonce, verifier follow from it ─▶ provider ─▶ /login/callback?code&state
                                    code + verifier ─▶ token endpoint ─▶ ID token, signed: issuer, audience, nonce, time ─▶ roles of a claim

Nothing is kept of a log-in that is only begun, so that no number of them pushes another's out.
Roles are what the claim says now, at each log-in; without one there is no session. Not here: how a session goes on (site.py).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote_plus, urlencode

import httpx2
import jwt
from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import RedirectResponse

from worker.config import ConfigError, Web
from worker.errors import PeerRefused, PeerUnavailable, WorkerError
from worker.intake.fhir_http import Budget, Transport
from worker.ops import audit
from worker.store import accounts
from worker.web.login import turn, welcome
from worker.web.site import ASite, address_of

router = APIRouter()

#: Between our redirect and the way back.
WAIT_S: Final = 600.0
#: One log-in may cost so much.
_TIMEOUT_S, _BYTES = 10.0, 2**20
#: How long discovery and keys are used; an unknown key asks anew, at most so often.
_FRESH_S, _AGAIN_S = 3600.0, 30.0
#: Asymmetric alone: with "none" or HMAC anybody could sign (RFC 8725 §3.1).
_ALGORITHMS: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA")
_CLOCKS_S: Final = 60
_PEER: Final = "log-in server"
#: So many wait for that server at once, each in a thread that the pages want.
_WAITING: Final = threading.BoundedSemaphore(8)


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Provider:
    """The identity provider; safe for threads."""

    def __init__(self, web: Web) -> None:
        self._web = web
        try:
            context = ssl.create_default_context(cafile=web.oidc_ca or None)
        except OSError as exc:
            raise ConfigError("[web] oidc_ca cannot be used: it is no PEM, or cannot be read.") from exc
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self._http = Transport(context, _TIMEOUT_S, attempts=2)
        self._lock = threading.Lock()
        self._secret = secrets.token_bytes(32)
        self._began_at = time.monotonic()
        #: States with which somebody logged in, and when; who is not logged in adds none.
        self._used: dict[str, float] = {}
        self._known: Mapping[str, Any] = {}
        self._keys: list[jwt.PyJWK] = []
        self._known_at = -_FRESH_S

    @property
    def _back(self) -> str:
        return f"{self._web.url}/login/callback"

    def begin(self) -> tuple[str, str]:
        """Where the browser is to go, and the state it must come back with (WorkerError)."""
        self._discover(_FRESH_S)
        begun = f"{self._age_s():.0f}.{secrets.token_urlsafe(32)}"
        state = f"{begun}.{self._derived('state', begun)}"
        asked = {
            "response_type": "code",
            "client_id": self._web.oidc_client_id,
            "redirect_uri": self._back,
            "scope": "openid profile email",
            "state": state,
            "nonce": self._derived("nonce", state),
            "code_challenge": _base64(hashlib.sha256(self._derived("verifier", state).encode()).digest()),
            "code_challenge_method": "S256",
        }
        endpoint = self._endpoint("authorization_endpoint")
        return f"{endpoint}{'&' if '?' in endpoint else '?'}{urlencode(asked)}", state

    def finish(self, state: str, code: str) -> Mapping[str, Any]:
        """What the provider says of who logged in there (PeerRefused: it is not to be believed; PeerUnavailable)."""
        begun, _, seal = state.rpartition(".")
        is_ours = hmac.compare_digest(seal.encode(), self._derived("state", begun).encode())
        if not is_ours or self._age_s() - float(begun.partition(".")[0]) >= WAIT_S or state in self._used:
            raise PeerRefused("This log-in was begun too long ago, or elsewhere. Begin again.")
        verifier = self._derived("verifier", state)
        form = {"grant_type": "authorization_code", "code": code, "redirect_uri": self._back, "code_verifier": verifier}
        headers = {"Accept": "application/json"}
        if self._web.oidc_client_secret:  # RFC 6749 §2.3.1
            pair = f"{quote_plus(self._web.oidc_client_id)}:{quote_plus(self._web.oidc_client_secret)}"
            headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        else:
            form["client_id"] = self._web.oidc_client_id
        status, answer = self._ask("POST", self._endpoint("token_endpoint"), headers=headers, form=form)
        if status != 200 or not isinstance(answer.get("id_token"), str):
            raise PeerRefused(f"The log-in server gives no ID token: status {status}.")
        claims = self._believed(answer["id_token"], self._derived("nonce", state))
        with self._lock:
            self._used = {one: at for one, at in self._used.items() if self._age_s() - at < WAIT_S} | {state: self._age_s()}
        return claims

    def _age_s(self) -> float:
        """Seconds since this process began to log people in: the host's clocks are nobody's business."""
        return time.monotonic() - self._began_at

    def _derived(self, what: str, text: str) -> str:
        return _base64(hmac.digest(self._secret, f"{what} of {text}".encode(), "sha256"))

    def _believed(self, token: str, nonce: str) -> Mapping[str, Any]:
        """The claims of an ID token that is what it should be (OpenID Connect Core §3.1.3.7)."""
        try:
            claims: Mapping[str, Any] = jwt.decode(
                token,
                self._key(jwt.get_unverified_header(token)),
                algorithms=list(_ALGORITHMS),
                audience=self._web.oidc_client_id,
                issuer=self._web.oidc_issuer,
                leeway=_CLOCKS_S,
                options={"require": ["exp", "iat", "iss", "aud", "sub"]},
            )
        except (jwt.PyJWTError, ValueError, TypeError) as exc:
            raise PeerRefused(f"The log-in server's ID token is not to be believed ({type(exc).__name__}).") from None
        party = claims.get("azp", self._web.oidc_client_id)
        if not hmac.compare_digest(str(claims.get("nonce", "")).encode(), nonce.encode()) or party != self._web.oidc_client_id:
            raise PeerRefused("The log-in server's ID token is of another log-in.")
        return claims

    def _key(self, header: Mapping[str, Any]) -> jwt.PyJWK:
        wanted = header.get("kid")
        for fresh_s in (_FRESH_S, _AGAIN_S):  # a key that is not known may be new
            self._discover(fresh_s)
            found = [key for key in self._keys if wanted in (None, key.key_id)]
            if len(found) == 1:
                return found[0]
        raise jwt.InvalidKeyError("no such key")

    def _discover(self, fresh_s: float) -> None:
        with self._lock:
            if time.monotonic() - self._known_at < fresh_s:
                return
            _, known = self._ask("GET", f"{self._web.oidc_issuer.rstrip('/')}/.well-known/openid-configuration")
            if known.get("issuer") != self._web.oidc_issuer:
                raise PeerRefused("The log-in server calls itself by another issuer than [web] oidc_issuer.")
            _, keys = self._ask("GET", str(known.get("jwks_uri", "")))
            try:
                self._keys = [key for key in jwt.PyJWKSet.from_dict(dict(keys)).keys if key.public_key_use in (None, "sig")]
            except jwt.PyJWTError as exc:
                raise PeerRefused("The log-in server's keys cannot be read.") from exc
            self._known, self._known_at = known, time.monotonic()

    def _endpoint(self, name: str) -> str:
        found = self._known.get(name)
        if not isinstance(found, str):
            raise PeerRefused(f"The log-in server names no {name}.")
        return found

    def _ask(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, form: Mapping[str, str] | None = None
    ) -> tuple[int, Mapping[str, Any]]:
        # As the issuer: what is called must not be read on the way.
        if not url.startswith("https://") and not self._web.oidc_issuer.startswith("http://"):
            raise PeerRefused("The log-in server names an address without TLS.")
        budget = Budget(_BYTES, time.monotonic() + _TIMEOUT_S)
        try:
            answer = self._http.ask(method, httpx2.URL(url), budget=budget, headers=headers or {}, form=form, peer=_PEER)
        except httpx2.InvalidURL:
            raise PeerRefused("The log-in server names an address that is none.") from None
        return answer.status, answer.content


def provider(web: Web) -> Provider | None:
    """The configured one."""
    return Provider(web) if web.oidc_issuer else None


def roles_of(claims: Mapping[str, Any], web: Web) -> set[str]:
    """The roles that the claim's values stand for."""
    said = claims.get(web.oidc_claim, ())
    values = [said] if isinstance(said, str) else said if isinstance(said, list) else []
    return {web.oidc_roles[one] for one in values if isinstance(one, str) and one in web.oidc_roles}


def name_of(claims: Mapping[str, Any]) -> str:
    """What the account is called here."""
    said = next((str(claims[key]) for key in ("preferred_username", "email", "name") if claims.get(key)), "")
    name = re.sub(r"[^a-z0-9._@+-]+", ".", accounts.plain(said)).strip("._@+-")[:60]
    return name or f"user.{hashlib.sha256(str(claims['sub']).encode()).hexdigest()[:12]}"


def _cookie(site: ASite) -> str:
    return f"{site.cookie}-login"


def _provider(request: Request) -> Provider:
    found: Provider | None = request.app.state.provider
    if found is None:
        raise HTTPException(404, "No log-in elsewhere is configured.")
    return found


@router.get("/login/oidc")
def go(request: Request, site: ASite) -> Response:
    """Send the browser to the provider."""
    try:
        with turn(_WAITING):
            url, state = _provider(request).begin()
    except WorkerError as exc:
        raise HTTPException(503, str(exc)) from exc
    answer = RedirectResponse(url, 303)
    # Whoever comes back must be who went: else one could be logged in as somebody else.
    answer.set_cookie(_cookie(site), state, max_age=int(WAIT_S), httponly=True, samesite="lax", secure=site.is_secure, path="/")
    return answer


@router.get("/login/callback")
def come_back(request: Request, site: ASite, state: str = "", code: str = "") -> Response:
    """Take who logged in there."""
    known, whence = _provider(request), audit.Party("unknown", address_of(request), is_ae=False)
    if not code or not state or not hmac.compare_digest(state.encode(), request.cookies.get(_cookie(site), "").encode()):
        audit.turned_away(whence.address, "a log-in elsewhere that was not begun here")
        raise HTTPException(400, "This log-in was not begun here. Begin again.")
    try:
        with turn(_WAITING):
            claims = known.finish(state, code)
    except (PeerRefused, PeerUnavailable) as exc:
        audit.logged(audit.LOGIN, whence, outcome=audit.AGAIN, reason=str(exc))
        raise HTTPException(503 if isinstance(exc, PeerUnavailable) else 403, str(exc)) from exc
    name, roles = name_of(claims), roles_of(claims, site.web)
    subject = json.dumps([site.web.oidc_issuer, str(claims["sub"])])
    if not roles:
        with site.store.begin() as conn:
            accounts.withdraw(conn, subject=subject)
        audit.logged(audit.LOGIN, audit.Party(name, whence.address, is_ae=False), outcome=audit.AGAIN, reason="no role")
        raise HTTPException(403, "You are known there, but have no role here. Ask who runs this installation.")
    with site.store.begin() as conn:
        try:
            account = accounts.external(conn, name, subject=subject, roles=roles, now=site.now())
        except accounts.AccountRefused as exc:
            audit.logged(audit.LOGIN, audit.Party(name, whence.address, is_ae=False), outcome=audit.AGAIN, reason=str(exc))
            raise HTTPException(403, "Your name is that of another account here. Ask who runs this installation.") from exc
        token = accounts.open_session(conn, account.id, now=site.now(), hours=site.web.session_h)
    answer = welcome(request, site, account.name, token)
    answer.delete_cookie(_cookie(site), path="/", httponly=True, secure=site.is_secure, samesite="lax")
    return answer
