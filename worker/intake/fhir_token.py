"""OAuth 2.0 client credentials for a FHIR server: by a secret (RFC 6749 §2.3.1) or by a signed assertion (SMART backend services).

::

    secret ──── Authorization: Basic ─┐
    key file ── private_key_jwt ──────┴─▶ token endpoint ─▶ access token, kept until it expires

The assertion is a JWT (RFC 7523) signed with RS384 or ES384, as SMART App Launch 2.2 "Client Authentication: Asymmetric" asks.
Not here: how the request travels (fhir_client.py). No secret, key or token is in any text.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote_plus

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from worker.errors import PeerRefused

# SMART App Launch 2.2: exp is no more than five minutes ahead; a minute less bears with a server's clock that is behind.
_ASSERTION_S: Final = 240
#: Renewed before it expires, so that it does not do so on the way.
_MARGIN_S: Final = 30.0
#: RFC 6749 §5.1 only recommends expires_in; SMART's tokens live five minutes.
_DEFAULT_S: Final = 300.0
# RFC 6749 §5.2.
_ERRORS: Final = frozenset(
    {"invalid_request", "invalid_client", "invalid_grant", "unauthorized_client", "unsupported_grant_type", "invalid_scope"}
)

#: Posts a form with headers: (headers, form) → status and JSON object.
Post = Callable[[Mapping[str, str], Mapping[str, str]], tuple[int, Mapping[str, Any]]]


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A private key, how it signs, and the name under which the server knows its public half."""

    private: RSAPrivateKey | EllipticCurvePrivateKey
    algorithm: str
    key_id: str


def read_key(path: Path, *, key_id: str = "") -> SigningKey:
    """Read a private key: a JWK (RFC 7517), or PEM without a passphrase.

    Parameters
    ----------
    key_id
        `kid` of a key that does not name its own; else its thumbprint (RFC 7638).

    Raises
    ------
    ValueError
        It cannot be read, or is neither RSA nor on the curve P-384.
    """
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise ValueError(f"The private key of the FHIR client cannot be read: {exc.strerror}.") from None
    try:
        jwk = json.loads(data) if data.lstrip().startswith(b"{") else {}
        private: object = _from_jwk(jwk) if jwk else load_pem_private_key(data, None)
    except (ValueError, TypeError, KeyError, jwt.PyJWTError):
        raise ValueError("The private key of the FHIR client is neither a JWK nor PEM without a passphrase.") from None
    if isinstance(private, RSAPrivateKey):
        public = RSAAlgorithm.to_jwk(private.public_key(), as_dict=True)
        return SigningKey(private, "RS384", jwk.get("kid") or key_id or _thumbprint(public, ("e", "kty", "n")))
    if isinstance(private, EllipticCurvePrivateKey) and private.curve.name == "secp384r1":
        public = ECAlgorithm.to_jwk(private.public_key(), as_dict=True)
        return SigningKey(private, "ES384", jwk.get("kid") or key_id or _thumbprint(public, ("crv", "kty", "x", "y")))
    raise ValueError("The private key of the FHIR client is neither an RSA key nor one on the curve P-384.")


def _from_jwk(jwk: Mapping[str, Any]) -> object:
    return RSAAlgorithm.from_jwk(dict(jwk)) if jwk["kty"] == "RSA" else ECAlgorithm.from_jwk(dict(jwk))


def _thumbprint(jwk: Mapping[str, Any], members: tuple[str, ...]) -> str:
    canonical = json.dumps({name: jwk[name] for name in members}, separators=(",", ":"), sort_keys=True)
    return base64.urlsafe_b64encode(hashlib.sha256(canonical.encode()).digest()).rstrip(b"=").decode()


@dataclass(slots=True)
class Tokens:
    """The access token of one client: asked for when there is none, kept until it expires.

    ``clock`` gives seconds that never go back. With neither secret nor key no token is asked for.
    """

    post: Post
    url: str
    client_id: str
    secret: str
    key: SigningKey | None
    scope: str
    clock: Callable[[], float] = time.monotonic
    _token: str = ""
    _until: float = 0.0

    def header(self) -> dict[str, str]:
        """Return the Authorization header; none where no token is wanted.

        Raises
        ------
        PeerRefused
            The server does not give a token to this client.
        """
        if not self.url:
            return {}
        if not self._token or self.clock() >= self._until:
            self._ask()
        return {"Authorization": f"Bearer {self._token}"}

    def forget(self) -> bool:
        """Drop a token that was not accepted; whether there can be another one."""
        self._token = ""
        return bool(self.url)

    def _ask(self) -> None:
        asked_at = self.clock()
        form = {"grant_type": "client_credentials", "scope": self.scope}
        headers: dict[str, str] = {}
        if self.key:
            # RFC 7523 §2.2.
            form["client_assertion_type"] = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
            form["client_assertion"] = self.assertion(self.key)
        else:
            pair = f"{quote_plus(self.client_id)}:{quote_plus(self.secret)}"
            headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        status, answer = self.post(headers, form)
        token, kind = answer.get("access_token"), answer.get("token_type")
        if status != 200:
            error = answer.get("error")
            why = f", {error}" if isinstance(error, str) and error in _ERRORS else ""
            raise PeerRefused(f"The token server gives no token (status {status}{why}): see client_id, secret or key, and scope.")
        if not isinstance(token, str) or not token.isascii() or not token.isprintable() or str(kind).lower() != "bearer":
            raise PeerRefused("The token server's answer holds no bearer token.")
        lasts = answer.get("expires_in", _DEFAULT_S)
        lasts_s = float(lasts) if isinstance(lasts, int | float) and not isinstance(lasts, bool) else _DEFAULT_S
        # At least used once: a token that lasts less than the margin is still one.
        self._token, self._until = token, asked_at + max(lasts_s - _MARGIN_S, lasts_s / 2)

    def assertion(self, key: SigningKey) -> str:
        """Return a new assertion of who we are; each has an ID of its own and is used once."""
        now = int(time.time())
        claims = {
            "iss": self.client_id,
            "sub": self.client_id,
            "aud": self.url,
            "jti": str(uuid.uuid4()),
            "iat": now,
            "exp": now + _ASSERTION_S,
        }
        return jwt.encode(claims, key.private, algorithm=key.algorithm, headers={"kid": key.key_id})
