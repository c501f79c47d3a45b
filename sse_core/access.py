"""Turn a request into a decision: who may watch, who may publish, which pages may read answers.

No socket, no thread and no clock in here. What is not allowed is a Refusal.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Callable

from sse_core.http1 import Refusal, Request

_ORIGIN = re.compile("null|[a-z][a-z0-9+.-]*://[^/A-Z]+")     # RFC 6454 section 6.2
_BEARER = ["WWW-Authenticate: Bearer"]

Authorize = Callable[[Request], bool]


class Access:
    """The rules for all requests to one server. They never change, so any thread may ask.

    tokens: of those who may watch; none: everybody may. authorize: is asked in their place.
    publish_tokens: of those who may publish by POST; none: nobody may.
    origins: of the pages that may read answers and publish; none: every page may.
    scheme: http or https, by which the server's own page is reached. It may always publish.

    Raises ValueError for an empty token, and for an origin that no browser sends.
    """

    def __init__(self, tokens: Sequence[str], publish_tokens: Sequence[str],
                 authorize: Authorize | None, origins: Sequence[str], scheme: str) -> None:
        if "" in (*tokens, *publish_tokens):
            raise ValueError("a token is empty: anybody would have it")
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"the origin {origin!r} is not one as browsers send it: "
                                 "scheme://host[:port], or null")
        self._tokens = [token.encode() for token in tokens]
        self._publish_tokens = [token.encode() for token in publish_tokens]
        self._authorize = authorize
        self._origins = frozenset(origins)
        self._scheme = scheme

    @property
    def takes_time(self) -> bool:
        """Whether `admit` asks a program, which may take its time."""
        return self._authorize is not None

    def admit(self, request: Request) -> None:
        """Raise Refusal for a request that may not watch, and whatever `authorize` raises."""
        if self._authorize is not None:
            admitted = self._authorize(request)
        else:
            admitted = not self._tokens or request.has_token(self._tokens)
        if not admitted:
            raise Refusal(401, "Name a token: GET /TOKEN, or the header field "
                               "Authorization: Bearer TOKEN.", _BEARER)

    def admit_post(self, request: Request) -> None:
        """Raise Refusal for a POST that may not publish. Ask before its body is read."""
        if not self._may_post_from(request):
            raise Refusal(403, "Pages of this origin may not publish: "
                               "it is not among those of --origin.")
        if not self._publish_tokens:
            raise Refusal(403, "Publishing is not enabled: "
                               "the server was started without --publish-token.")
        if not request.has_token(self._publish_tokens):
            raise Refusal(401, "Name the publish token: POST /TOKEN, or the header field "
                               "Authorization: Bearer TOKEN.", _BEARER)

    def admit_list(self, request: Request) -> None:
        """Raise Refusal for who may not see the clients one by one: only publishers may."""
        if not (self._publish_tokens and request.has_token(self._publish_tokens)):
            raise Refusal(401, "The list of clients is for who has the publish token.", _BEARER)

    def _may_post_from(self, request: Request) -> bool:
        """Say whether pages of the request's origin may publish; what is no page has none."""
        origin = request.known.get("origin")
        own = f"{self._scheme}://{request.known.get('host', '')}"
        return not self._origins or origin is None or origin == own or origin in self._origins

    def cross_origin(self, request: Request | None) -> list[str]:
        """Return the fields that let a page of another origin read the answer.

        WHATWG Fetch section 3.2. The request is None if it could not be read.
        """
        if not self._origins:
            return ["Access-Control-Allow-Origin: *"]
        origin = request.known.get("origin") if request else None
        allowed = [f"Access-Control-Allow-Origin: {origin}"] if origin in self._origins else []
        return [*allowed, "Vary: Origin"]       # caches: the answer depends on who asks
