"""Turn a signed token into what it grants: JSON Web Tokens (RFC 7519), verified by PyJWT.

No socket, no thread and no clock in here. What grants nothing is a Refusal.
"""
from __future__ import annotations

import json
import re
from typing import Any

from sse_core.errors import Refusal
from sse_core.http.http1 import Request

COOKIE = "sse_token"        # with a signed token: an EventSource sends no bearer token
MAX_TOKEN = 4096            # characters, as of a cookie; PyJWT takes 0.2 ms to refuse so many
MIN_SECRET = 32             # bytes of a secret for HS256; RFC 7518 section 3.2
MIN_RSA = 2048              # bits of a key for RS256; RFC 7518 section 3.3
LAST_TIME = 10 ** 11        # seconds since 1970; more was meant as milliseconds

# Seconds that the clock of whoever signs a token may be ahead of ours (RFC 7519 section 4.1.5)
LEEWAY = 5

_FORM = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+", re.ASCII)      # RFC 7515 section 7.1
_PUBLIC = ("MII", "MFkwEwYH", "ssh-", "ecdsa-", "{")    # how keys begin that others may know


class Signed:
    """The tokens that are signed with one key. Any thread may ask.

    key: a secret of 32 bytes at least (HS256), or a public key in PEM (RS256, ES256).
    Raises ValueError for any other, and if a package is missing.
    """

    def __init__(self, key: str) -> None:
        try:
            import jwt
            self._algorithm, self._key = _load(key)
        except ImportError:
            raise ValueError("signed tokens need packages: pip install 'pyjwt[crypto]'") from None
        self._decode = jwt.PyJWS().decode       # which looks at no clock
        self._bad = jwt.PyJWTError, ValueError, RecursionError      # what a token can raise

    def grants(self, token: str, claim: str, now: float) -> tuple[tuple[str, ...], float]:
        """Return the channels that a claim of a token grants, and until when. Raises Refusal."""
        claims = self._claims(token)
        until = _time(claims, "exp")
        if until <= now:
            raise _invalid("The token has expired.")
        for name in ("nbf", "iat"):
            if name in claims and _time(claims, name) > now + LEEWAY:
                raise _invalid(f"The token is not valid yet: its claim {name} is in the future. "
                               "Compare the clock of whoever signed it with this server's.")
        if "aud" in claims:     # RFC 7519 section 4.1.3
            raise _invalid("The token is for somebody else: it has the claim aud.")
        if claim not in claims:
            raise Refusal(403, f"The token grants nothing here: it has no claim {claim}.")
        channels = claims[claim]
        if not isinstance(channels, list) or not all(isinstance(each, str) for each in channels):
            raise _invalid(f"The token's claim {claim} is not a list of channels.")
        return tuple(channels), until

    def _claims(self, token: str) -> dict[str, Any]:
        """Return the claims of a token, which the key's own algorithm must have signed."""
        claims = None
        try:
            if len(token) <= MAX_TOKEN and _FORM.fullmatch(token):
                claims = json.loads(self._decode(token, self._key, [self._algorithm]))
        except self._bad:       # its text may quote the token
            pass
        if not isinstance(claims, dict):
            raise _invalid("The token is not known, or not signed with the key of this server.")
        return claims


def find_token(request: Request) -> str | None:
    """Return the bearer token, else a path with two dots, else the cookie, or None.

    The cookie not for a POST: pages of any site can make a browser send one.
    """
    if request.bearer is not None:
        return request.bearer
    if request.path.count(".") == 2:
        return request.path[1:]
    cookies = "" if request.method == "POST" else request.known.get("cookie", "")
    pairs = (each.strip().partition("=") for each in cookies.split(";"))
    return next((value for name, _, value in pairs if name == COOKIE), None)


def _invalid(text: str) -> Refusal:
    return Refusal(401, text, ['WWW-Authenticate: Bearer error="invalid_token"'])   # RFC 6750 3.1


def _time(claims: dict[str, Any], name: str) -> float:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value < LAST_TIME:
        raise _invalid(f"The token's claim {name} is not a number of seconds since 1970.")
    return value


def _load(key: str) -> tuple[str, Any]:
    """Return the algorithm of a key, and the key as PyJWT takes it."""
    if "-----BEGIN" in key:
        return _load_pem(key.encode())
    if len(key.encode()) < MIN_SECRET or key != key.strip() or key.startswith(_PUBLIC):
        raise ValueError(f"the key for signed tokens is neither a secret of {MIN_SECRET} bytes at "
                         "least, without white space around it, nor a public key in PEM")
    return "HS256", key


def _load_pem(pem: bytes) -> tuple[str, Any]:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    try:
        public = load_pem_public_key(pem)
        if isinstance(public, rsa.RSAPublicKey) and public.key_size >= MIN_RSA:
            return "RS256", public
        if isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name == "secp256r1":
            return "ES256", public
    except (ValueError, UnsupportedAlgorithm):      # a private key, too: it does not belong here
        pass
    raise ValueError(f"the PEM for signed tokens is no public key of RSA with {MIN_RSA} bits at "
                     "least, nor of the curve P-256")
