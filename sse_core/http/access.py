"""Turn a request into a decision: who may subscribe and publish, and which pages may read answers.

A request is asked, in this order:

    its Host       Is it one of ours? Else 421: some other name was made to lead here.
    its Origin     Of a POST: may pages of this origin publish? Else 403.
    its token      Is it known? Else 401. A plain one is for every channel. A signed one names its
                   channels (signed.py). Who may subscribe, a program can decide in place of both.
    its channels   Are they granted? Else 403.

The result is a Grant. Which pages may read the answer is another question, and a browser's to
decide: `cross_origin` tells it.

No socket, no thread and no clock in here: `now` is handed in. What is not allowed is an HTTPError.
"""
from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Iterable, Sequence
from typing import Callable, NamedTuple
from urllib.parse import urlsplit

from sse_core.errors import HTTPError
from sse_core.http import signed
from sse_core.http.http1 import HOST, Request

# A name without a final dot. Parts end at a dot, which they cannot hold, so this is linear.
_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")

# Hosts that lead a browser to its own machine, and nowhere else.
_LOOPBACK = re.compile(r"localhost|::1|127(\.[0-9]+){3}")

# Ports that an Origin leaves out, because the scheme says them.
_DEFAULT_PORTS = {"http": 80, "https": 443}

# A program's own rule: whether a request may subscribe, or to which channels.
Authorize = Callable[[Request], "bool | Iterable[str]"]


class Grant(NamedTuple):
    """The channels that a request may subscribe to, or publish to."""

    # Names. One that ends in `*`, as `user-42/*`, is for all that begin so.
    channels: tuple[str, ...]

    # Seconds since 1970. inf: for ever.
    until: float = math.inf

    def check(self, *channels: str | None) -> None:
        """Raise HTTPError for a channel that is not granted.

        None stands for an event without a channel. It goes to everyone, so only `*` grants it.
        """
        for channel in channels:
            if channel is None and "*" not in self.channels:
                raise HTTPError(403, "You may not publish to everyone: add a channel, "
                                     "?channel=NAME.")
            if channel is not None and not any(
                    channel == each or each.endswith("*") and channel.startswith(each[:-1])
                    for each in self.channels):
                raise HTTPError(403, f"You may not use the channel {channel[:100]!r}.")


# Of a plain token, and of everybody where no token is asked for.
EVERYTHING = Grant(("*",))


class Access:
    """The rules for all requests to one server. They never change, so any thread may ask.

    Options as of SSEServer. scheme, host: http or https, and where it listens.

    Raises ValueError for what would let in anybody or nobody, TypeError for a str in place of a
    list: each of its characters would be a token.
    """

    def __init__(self, tokens: Sequence[str], publish_tokens: Sequence[str],
                 authorize: Authorize | None, origins: Sequence[str], scheme: str, *,
                 host: str = "", allowed_hosts: Sequence[str] = (),
                 jwt_key: str | None = None) -> None:
        # Plain tokens, in UTF-8. Without any of the first, and without a key, everybody may
        # subscribe. Without any of the second, and without a key, nobody may publish.
        self._tokens = _plain(tokens, "tokens")
        self._publish_tokens = _plain(publish_tokens, "publish_tokens")
        self._authorize = authorize

        # Whether `admit` asks a program, which may take any time. A signature takes 0.1 ms.
        self.takes_time = authorize is not None
        self._signed = None if jwt_key is None else signed.Signed(jwt_key)

        # In the form of `_host`. Empty: requests may be for any host.
        self._allowed_hosts = set(map(_check_allowed_host, _texts(allowed_hosts, "allowed_hosts")))

        # Pages of these may read and publish. Empty: pages of every origin may.
        self._origins = frozenset(map(_check_origin, _texts(origins, "origins")))

        # Hosts by which pages of the server itself are found. Whoever runs it has named them, so no
        # stranger can have made one of them lead here.
        own = (host, *(origin.partition("://")[2] for origin in self._origins))
        self._own_hosts = {_host(each) for each in own} - {""}
        self._scheme = scheme

    def check_host(self, request: Request) -> None:
        """Raise HTTPError for a Host that is not allowed. Call it first, for every request.

        A page of another site can have its own name lead here (DNS rebinding). To a browser, this
        server is of that page's origin then, so the page may read everything.
        """
        if self._allowed_hosts and _host(request.known.get("host", "")) not in self._allowed_hosts:
            raise HTTPError(421, "This Host is not served here: use one that --allowed-host names.")

    def admit(self, request: Request, now: float) -> Grant:
        """Return what a request may subscribe to. Events without a channel go to all admitted.

        now: seconds since 1970. Raises HTTPError, also for a channel that is asked for and not
        granted; what `authorize` raises; TypeError for what it may not return.
        """
        grant = EVERYTHING
        if self._authorize is not None:
            answer = self._authorize(request)
            if answer is False or answer is None:
                raise _refused("token", request)
            if answer is not True:
                grant = Grant(_texts(answer, "authorize returned no bool"))
        elif self._tokens or self._signed:
            grant = self._grant(request, self._tokens, "subscribe", now)
        grant.check(*request.query.get("channel", ()))
        return grant

    def admit_post(self, request: Request, now: float, *, body_names: bool = False) -> Grant:
        """Return where a POST may publish to. Call it before the body is read. Raises HTTPError.

        now: seconds since 1970. A POST that names no channel is for everyone, which needs `*`.
        body_names: the lines of the body name the channels. Then the caller has to `check` that of
        each event, and only what the query names is checked here.
        """
        if not self._may_post_from(request):
            raise HTTPError(403, "Pages of this origin may not publish, unless --origin names it.")
        if not (self._publish_tokens or self._signed):
            raise HTTPError(403, "Publishing is not enabled: no --publish-token was given.")
        grant = self._grant(request, self._publish_tokens, "publish", now)
        grant.check(*request.query.get("channel", () if body_names else (None,)))
        return grant

    def admit_list(self, request: Request) -> None:
        """Raise HTTPError unless a request may see the clients one by one: only publishers may.

        A signed token does not count: it is for some channels, and the list has all clients.
        """
        if not self._publish_tokens:
            raise HTTPError(403, "The list of clients needs a --publish-token, and none was given.")
        if not request.has_token(self._publish_tokens):
            raise _refused("publish token", request)

    def _grant(self, request: Request, tokens: list[bytes], claim: str, now: float) -> Grant:
        """Return what the token of a request grants. Raises HTTPError if it grants nothing.

        tokens: the plain ones that count. claim: the one of a signed token that counts.
        """
        if request.has_token(tokens):
            return EVERYTHING
        if self._signed and (token := signed.find_token(request)):
            return Grant(*self._signed.grants(token, claim, now))
        raise _refused("publish token" if claim == "publish" else "token", request)

    def _may_post_from(self, request: Request) -> bool:
        """Return whether pages of the request's origin may publish.

        The server's own page may, too: its origin is the scheme and the Host of the request. But
        the same is true of a page that has made its name lead here, so the Host must be one that no
        stranger can have done that with.
        """
        origin, field = request.known.get("origin"), request.known.get("host", "")
        # Only browsers send an Origin. A program needs its token, and no more.
        if not self._origins or origin is None or origin in self._origins:
            return True
        host = _host(field)
        is_ours = host in self._own_hosts or _LOOPBACK.fullmatch(host) is not None
        return is_ours and origin == f"{self._scheme}://{field}"

    def cross_origin(self, request: Request | None) -> list[str]:
        """Return the fields that let a page of another origin read the answer.

        WHATWG Fetch, CORS protocol. request: None if it could not be read.
        """
        if not self._origins:
            return ["Access-Control-Allow-Origin: *"]
        origin = request.known.get("origin") if request else None
        allowed = [f"Access-Control-Allow-Origin: {origin}"] if origin in self._origins else []
        # Cookies are for origins that are named, and not for null: any page can make that its
        # origin, with a sandboxed frame.
        if allowed and origin != "null":
            allowed.append("Access-Control-Allow-Credentials: true")
        # The answer differs by origin, so a cache must not give it to another one.
        return [*allowed, "Vary: Origin"]


def _texts(values: object, what: str) -> tuple[str, ...]:
    """Return the strings of an iterable. Raises TypeError if it is none, or is itself a str.

    what: where it comes from. Values are not quoted: they may be secrets.
    """
    if isinstance(values, Iterable) and not isinstance(values, str):
        texts = tuple(values)
        if all(isinstance(each, str) for each in texts):
            return texts
    raise TypeError(f"{what}: a list of strings is due here")


def _plain(tokens: Sequence[str], what: str) -> list[bytes]:
    """Return tokens in UTF-8. Raises ValueError for one that anybody has, or that nobody can send.

    White space around a token is stripped from the field that brings it.
    """
    texts = _texts(tokens, what)
    if any(not token or token != token.strip() for token in texts):
        raise ValueError(f"{what}: one is empty, or has white space around it")
    return [token.encode() for token in texts]


def _refused(what: str, request: Request) -> HTTPError:
    """Return how a request is refused that has no token, or a wrong one.

    what: which token it needs. Without any, the challenge names no error (RFC 6750 section 3.1).
    """
    # Every path may be a token, but for those of the server's own, and one that is empty.
    in_path = "" if request.path.startswith("/-/") else request.path.strip("/")
    is_given = request.bearer or in_path
    problem = f"This {what} is not known to the server" if is_given else f"A {what} is missing"
    error = ' error="invalid_token"' if is_given else ""
    return HTTPError(401, f"{problem}. Put a valid one in the path, /TOKEN, or in the header field "
                          "Authorization: Bearer TOKEN.", [f"WWW-Authenticate: Bearer{error}"])


def _host(text: str) -> str:
    """Return the host in a field Host, in lower case, without port, brackets and final dot.

    The final dot of a name makes no other host of it (RFC 3986 section 3.2.2). An option may hold
    an address without brackets. Returns an empty text if there is no host.
    """
    match = HOST.fullmatch(text) or HOST.fullmatch(f"[{text}]")
    return match[1].lower().strip("[]").removesuffix(".") if match else ""


def _check_origin(text: str) -> str:
    """Return an origin if browsers send it like this (WHATWG HTML, origins).

    Any other could never match. Raises ValueError, which says what to write instead.
    """
    try:
        url = urlsplit(text.strip())
        host = _host_as_sent(url.scheme and url.hostname or "")
        port = "" if url.port in (None, _DEFAULT_PORTS.get(url.scheme)) else f":{url.port}"
        as_sent = f"{url.scheme}://{host}{port}"
    except ValueError:
        as_sent = ("a single one like https://example.org, with letters outside ASCII as xn--, or "
                   "null; or leave it out, to let pages of every origin read")
    # `null` is what pages without an origin of their own send, such as files.
    if text not in (as_sent, "null"):
        # A password before the @ belongs on no screen and in no log.
        raise ValueError(f"no browser sends the origin {text.rpartition('@')[2]!r}: "
                         f"write {as_sent}")
    return text


def _check_allowed_host(text: str) -> str:
    """Return an allowed host as `_host` does. Raises ValueError, which says what to write."""
    try:
        url = urlsplit(text if "//" in text else f"//{text}")
        host = _host_as_sent(_host(text) or url.hostname or "").strip("[]")
    except ValueError:
        host = ("one like example.org, with letters outside ASCII as xn--, or leave it out, to "
                "answer for every one,")
    if text.lower().removesuffix(".") not in (host, f"[{host}]"):
        raise ValueError("an allowed host is a name or an address and nothing else: "
                         f"write {host} in place of {text.rpartition('@')[2]!r}")
    return host


def _host_as_sent(host: str) -> str:
    """Return a host as browsers send it, an IPv6 address in brackets (WHATWG URL, host parsing).

    Raises ValueError if it is none, or if its form in ASCII cannot be told.
    """
    host = host.lower().removesuffix(".")
    if ":" in host:
        # In its shortest form. The number loses what browsers leave out, such as the zone of
        # `fe80::1%eth0`.
        return f"[{ipaddress.IPv6Address(int(ipaddress.IPv6Address(host)))}]"
    name = host.encode("idna").decode()
    # Python's codec knows IDNA 2003, which makes `fass` of `faß`. To browsers that is another name.
    is_the_same = host.isascii() or name.encode().decode("idna") == host
    if not (is_the_same and _NAME.fullmatch(name)):
        raise ValueError(f"{host!r} is no host")
    return name
