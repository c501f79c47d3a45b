"""Turn a signed token into what it grants: JSON Web Tokens (RFC 7519), verified by PyJWT.

    {"exp": 1764003600, "subscribe": ["news", "user-42/*"], "publish": []}

PyJWT verifies the signature and nothing else. The claims are judged here, by a time that is handed
in: so what a token grants is a function of the token, the key and the time. The key decides on the
algorithm, and never the token, which could name one for which what everybody knows is the secret.

No socket, no thread and no clock in here. What grants nothing is an HTTPError.
"""
from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any

from sse_core.errors import HTTPError
from sse_core.http.http1 import Request

# Name of the cookie with a signed token, because an EventSource sends no bearer token.
COOKIE = "sse_token"

# Characters, as of a cookie. PyJWT takes 0.2 ms to refuse so many.
MAX_TOKEN = 4096

# Bytes of a secret for HS256 (RFC 7518 section 3.2).
MIN_SECRET = 32

# Bits of a key for RS256 (RFC 7518 section 3.3).
MIN_RSA = 2048

# Seconds since 1970. A larger number was meant as milliseconds.
LAST_TIME = 10 ** 11

# Seconds that the clock of whoever signs a token may be ahead of ours (RFC 7519 section 4.1.5).
LEEWAY = 5

# Three parts in the alphabet of base64url (RFC 7515 section 7.1).
_FORM = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+", re.ASCII)

# How public keys begin, and JSON Web Keys, in other forms than PEM. As a secret, a key that others
# may know would let everybody in.
_PUBLIC = ("MII", "MFkwEwYH", "ssh-", "ecdsa-", "{")


class Signed:
    """The tokens that are signed with one key. Any thread may ask.

    key: a secret of MIN_SECRET bytes at least (HS256), or a public key in PEM: RSA of MIN_RSA bits
    at least (RS256), or of the curve P-256 (ES256).

    Raises ValueError for any other, without quoting it, and if a package is missing.
    """

    def __init__(self, key: str) -> None:
        try:
            import jwt
            self._algorithm, self._key = _load(key)
        except ImportError:
            raise ValueError("signed tokens need packages: pip install 'pyjwt[crypto]'") from None
        # Verifies a signature, and looks at no clock.
        self._decode = jwt.PyJWS().decode

        # What a token can raise there.
        self._bad = jwt.PyJWTError, ValueError, RecursionError

    def grants(self, token: str, claim: str, now: float) -> tuple[tuple[str, ...], float]:
        """Return the channels that a claim of a token grants, and until when.

        claim: `subscribe` or `publish`. Both times are in seconds since 1970. A channel may end in
        `*`, see Grant. Raises HTTPError, which says what is wrong with the token: 403 if it is
        good, but not for this, and 401 else.
        """
        claims = self._claims(token)
        # Required here, although RFC 7519 does not: a token that leaks must end some day.
        until = _time(claims, "exp")
        if until <= now:
            raise _invalid("The token has expired.")
        for name in ("nbf", "iat"):
            if name in claims and _time(claims, name) > now + LEEWAY:
                raise _invalid(f"The token is not valid yet: its claim {name} is in the future. "
                               "Compare the clock of whoever signed it with this server's.")
        # No audience is configured here, and a recipient that is not named has to refuse the token
        # (RFC 7519 section 4.1.3).
        if "aud" in claims:
            raise _invalid("The token is for somebody else: it has the claim aud.")
        if claim not in claims:
            raise HTTPError(403, f"The token grants nothing here: it has no claim {claim}.")
        channels = claims[claim]
        if not isinstance(channels, list) or not all(isinstance(each, str) for each in channels):
            raise _invalid(f"The token's claim {claim} is not a list of channels.")
        return tuple(channels), until

    def _claims(self, token: str) -> dict[str, Any]:
        """Return the claims of a token, which the key's own algorithm must have signed.

        Raises HTTPError, the same for whatever is wrong, so that nobody learns how near a guess is.
        """
        claims = None
        # The text of what is raised may quote the token, so it goes nowhere.
        with suppress(*self._bad):
            if len(token) <= MAX_TOKEN and _FORM.fullmatch(token):
                claims = json.loads(self._decode(token, self._key, [self._algorithm]))
        if not isinstance(claims, dict):
            raise _invalid("The token is not known, or not signed with the key of this server.")
        return claims


def find_token(request: Request) -> str | None:
    """Return what may be the signed token of a request, or None.

    It is the bearer token, else a path with two dots, else the cookie, which an EventSource can
    send. The cookie does not count for a POST: pages of any site can make a browser send one.
    """
    if request.bearer is not None:
        return request.bearer
    if request.path.count(".") == 2:
        return request.path[1:]
    cookies = "" if request.method == "POST" else request.known.get("cookie", "")
    pairs = (each.strip().partition("=") for each in cookies.split(";"))
    return next((value for name, _, value in pairs if name == COOKIE), None)


def _invalid(text: str) -> HTTPError:
    """Return how a token is refused (RFC 6750 section 3.1)."""
    return HTTPError(401, text, ['WWW-Authenticate: Bearer error="invalid_token"'])


def _time(claims: dict[str, Any], name: str) -> float:
    """Return a claim in seconds since 1970. Raises HTTPError if it is none."""
    value = claims.get(name)
    # True is an int to Python. NaN is not less than anything, so it is refused, too.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value < LAST_TIME:
        raise _invalid(f"The token's claim {name} is not a number of seconds since 1970.")
    return value


def _load(key: str) -> tuple[str, Any]:
    """Return the algorithm of a key, and the key as PyJWT takes it. Raises ValueError; ImportError.
    """
    if "-----BEGIN" not in key:
        if len(key.encode()) < MIN_SECRET or key != key.strip() or key.startswith(_PUBLIC):
            raise ValueError(f"the key for signed tokens is neither a secret of {MIN_SECRET} bytes "
                             "at least, without white space around it, nor a public key in PEM")
        return "HS256", key
    # Here and not above: most servers have no such key, and may not have the package.
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    # A private key raises, too. It does not belong here: whoever reads it could sign.
    with suppress(ValueError, UnsupportedAlgorithm):
        public = load_pem_public_key(key.encode())
        if isinstance(public, rsa.RSAPublicKey) and public.key_size >= MIN_RSA:
            return "RS256", public
        if isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name == "secp256r1":
            return "ES256", public
    raise ValueError(f"the PEM for signed tokens is no public key of RSA with {MIN_RSA} bits at "
                     "least, nor of the curve P-256")
