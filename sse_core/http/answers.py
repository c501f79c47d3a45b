"""Turn a request into an answer: page, preflight, reports, POST, error, or a stream request.

    request                      who may send it          answer
    GET /-/health                everybody, to any Host   200, or 503 and the reason
    OPTIONS; /favicon.ico        everybody                204; 404
    GET /-/status?list           publishers               the clients one by one
    GET / from a browser         everybody                the page
    GET /-/metrics, /-/status    subscribers              what is counted
    GET /TOKEN from a browser    subscribers              the page
    GET of anything else         subscribers              a StreamRequest, to become a client
    POST                         publishers               the ids of what was published

`respond` decides in this order. So a program's `authorize`, which may take its time, is asked only
for the answers that need it. A HEAD request gets the head of what GET would get.

No socket and no thread in here: bytes go back to the caller, and so does what is to be registered.
"""
from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Callable

from sse_core.engine import frames
from sse_core.engine.clients import StreamRequest, Subscription
from sse_core.engine.hub import Hub
from sse_core.errors import HTTPError, NotRunning, Unavailable
from sse_core.http import http1, parameters
from sse_core.http.access import Access, Grant
from sse_core.http.http1 import Request

HTML = "text/html; charset=utf-8"
TEXT = "text/plain; charset=utf-8"
METRICS = "text/plain; version=0.0.4; charset=utf-8"
JSON = "application/json"

# For reports, which are old a second later.
NO_STORE = "Cache-Control: no-store"

# The page shows any stream, also of other servers. It loads nothing and can stand in no frame. Its
# address may hold a token, so the page tells its address to no server. `Vary`, because the same
# address is a stream to other clients.
PAGE_FIELDS = (
    "Cache-Control: no-cache", "Vary: Accept", "X-Content-Type-Options: nosniff",
    "Referrer-Policy: no-referrer",
    "Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src *; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'")

# A client that finds the server full should wait this many times the usual pause. Otherwise all of
# them would be back every few seconds.
COME_BACK = 10

# Metrics: name, kind, what it is, and its samples. Of each sample: what follows the name on its
# line, and its key among the stats. A number that is told by a label is one number for each.
FAMILIES: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("sse_clients", "gauge", "Clients that are connected.", {"": "clients"}),
    ("sse_lagging_clients", "gauge", "Clients whose socket would not take all.", {"": "lagging"}),
    ("sse_events_total", "counter", "Events published.", {"": "events"}),
    ("sse_deliveries_total", "counter", "Events sent, over all clients.", {"": "deliveries"}),
    ("sse_sent_bytes_total", "counter", "Bytes sent to clients.", {"": "bytes"}),
    ("sse_gaps_total", "counter", "Gaps that clients were told.", {"": "gaps"}),
    ("sse_drops_total", "counter", "Clients gone, by reason.", {'{reason="%s"}': "drops"}),
    ("sse_refused_total", "counter", "Requests refused, by status.", {'{status="%s"}': "refused"}),
    ("sse_turn_seconds", "summary", "Time of the publisher's turns, without waiting.",
     {"_sum": "turn_seconds", "_count": "turns"}))

# What is counted, by name: numbers, and mappings of labels to numbers.
Stats = Mapping[str, Any]


class Answers:
    """Answer the requests to one server. Any thread may call any method.

    access        Who may do what.
    hub           Publishes, and says why no event is taken now.
    page          What a browser is shown at `/` and `/TOKEN`, or None.
    stream_type   The Content-Type of a stream.
    stats         Returns what /-/status shows.
    status        Returns the same with the list of clients.
    """

    def __init__(self, access: Access, hub: Hub, *, page: bytes | None, stream_type: str,
                 stats: Callable[[], Stats], status: Callable[[], Stats]) -> None:
        # None of these changes, so that any thread may use them.
        self._access = access
        self._hub = hub
        self._page = page
        self._stream_type = stream_type
        self._stats = stats
        self._status = status

    def is_slow(self, request: Request) -> bool:
        """Return whether `respond` may take its time: then it is not for the accept loop.

        A program may take any time. A report takes longer the more clients there are.
        """
        return self._access.takes_time or request.path.startswith("/-/")

    def asks_program(self, request: Request) -> bool:
        """Return whether `respond` asks a program's `authorize` and may block. Raises HTTPError."""
        return self._access.takes_time and self._answer_to_all(request) is None

    def respond(self, request: Request) -> bytes | StreamRequest:
        """Return the answer to a request without a body, or what is to be registered.

        Raises HTTPError, for `refuse` to answer, and whatever a program's `authorize` raises.
        """
        answer = self._answer_to_all(request)
        if answer is not None:
            return answer
        grant = self._access.admit(request, time.time())
        if request.path.startswith("/-/"):
            return self._report(request)
        return self._page_for(request) or self._open(request, grant)

    def _answer_to_all(self, request: Request) -> bytes | None:
        """Return the answer to a request that needs no right to subscribe; None to any other.

        Raises HTTPError, as for a Host that is not allowed, or a list that is for publishers only.
        """
        # Before the Host is looked at: load balancers send any, or none.
        if request.path == "/-/health" and request.method != "OPTIONS":
            trouble = self._hub.trouble()
            if trouble:
                raise HTTPError(503, f"{trouble}.")
            return _whole(request, b"ok\n", TEXT, [NO_STORE])
        self._access.check_host(request)
        if request.method == "OPTIONS":
            return _whole(request, b"", TEXT, self._preflight(request), status=204)
        # Browsers ask for it by themselves, at whatever server they have open.
        if request.path == "/favicon.ico":
            raise HTTPError(404, "This server has no icon.")
        if request.path == "/-/status" and "list" in request.query:
            self._access.admit_list(request)
            # Without the fields of cross_origin: no page may read it.
            return _whole(request, _json(self._status()), JSON, [NO_STORE])
        return self._page_for(request) if request.path == "/" else None

    def _page_for(self, request: Request) -> bytes | None:
        """Return the page to a browser's address line, and None to a program.

        What accepts a stream, too, gets that: htmx and Datastar name both types in Accept.
        """
        is_wanted = request.accepts("text/html") and not request.accepts("text/event-stream")
        return _whole(request, self._page, HTML, PAGE_FIELDS) if self._page and is_wanted else None

    def _open(self, request: Request, grant: Grant) -> bytes | StreamRequest:
        """Return a stream request; of a HEAD request, only the head of the stream.

        Raises HTTPError for parameters that mean nothing.
        """
        asked = Subscription(parameters.channels(request), request.chunked)
        start = parameters.start(request, time.time())
        # The time is for a store that has not read up to the client's id yet.
        stream_request = StreamRequest(self._stream_head(request), asked, *start, grant.until,
                                       time.monotonic())
        return stream_request.head if request.method == "HEAD" else stream_request

    def _stream_head(self, request: Request) -> bytes:
        """Return the head of a stream: the four lines of the original, and then those for proxies.

        A proxy must not keep the stream, compress it (which holds events back), or buffer it, which
        nginx is told by X-Accel-Buffering.
        """
        # A stream without chunks ends with the connection, and so does the answer to HEAD.
        framing = "Transfer-Encoding: chunked" if request.chunked else "Connection: close"
        closing = ["Connection: close"] if request.chunked and request.method == "HEAD" else []
        lines = ["HTTP/1.1 200 OK", f"Content-Type: {self._stream_type}", framing,
                 *self._access.cross_origin(request), *closing,
                 "Cache-Control: no-cache, no-transform", "X-Accel-Buffering: no",
                 _date(int(time.time())), "", ""]
        return "\r\n".join(lines).encode()

    def _busy(self, request: Request) -> bytes:
        """Return a stream that ends at once, and tells its client to come back later.

        On any status but 200, an EventSource would give up for good (WHATWG HTML section 9.2.3).
        """
        asked = Subscription(frozenset(), request.chunked)
        # Clients of a server that usually asks for no pause should make one now.
        busy = asked.framed(frames.busy(COME_BACK * max(1.0, self._hub.retry)))
        return self._stream_head(request) + busy + (frames.END if request.chunked else b"")

    def admit_post(self, request: Request) -> Grant:
        """Return where a POST may publish to.

        Call it before the body is read, so that a client need not send what will be refused. Raises
        HTTPError.
        """
        self._access.check_host(request)
        # The lines of a list name their channels themselves.
        grant = self._access.admit_post(request, time.time(),
                                        body_names=parameters.is_list(request))
        parameters.check_encoding(request)
        return grant

    def post(self, request: Request, body: bytes, grant: Grant) -> bytes:
        """Publish the body of a POST that is admitted, and return the answer.

        Raises HTTPError; NotRunning, and Unavailable, if nothing can be published now; of the
        latter, WouldWait in a thread that may not wait.
        """
        ids = self._hub.publish_all(parameters.events(request, body, grant))
        return self.posted(request, ids)

    def posted(self, request: Request, ids: Sequence[str | None]) -> bytes:
        """Return the answer to a POST whose events have these ids."""
        # A list gets a list, also if it has one line, or none.
        answer = {"ids": ids} if parameters.is_list(request) else {"id": ids[0]}
        return _whole(request, _json(answer), JSON, self._access.cross_origin(request),
                      keep_alive=request.keeps_alive)

    def refuse(self, http_error: HTTPError, request: Request | None) -> bytes:
        """Return the answer that says what was wrong.

        request: None if it could not be read. An EventSource, or a client like it, is told `busy`
        where the server is at fault, or short of something.
        """
        # Of a request that could not be read, nobody knows what it accepts. Reports are no streams.
        if (request and http_error.status in (500, 503) and request.method == "GET"
                and request.accepts("text/event-stream") and not request.path.startswith("/-/")):
            return self._busy(request)
        fields = [*http_error.fields, *self._access.cross_origin(request)]
        body = f"{http_error.text}\n".encode()
        return _whole(request, body, TEXT, fields, status=http_error.status)

    def _report(self, request: Request) -> bytes:
        """Return the metrics, or the status."""
        fields = [NO_STORE, *self._access.cross_origin(request)]
        if request.path == "/-/metrics":
            return _whole(request, metrics(self._stats()).encode(), METRICS, fields)
        if request.path == "/-/status":
            return _whole(request, _json(self._stats()), JSON, fields)
        raise HTTPError(404, "Nothing is here. There are /-/health, /-/metrics and /-/status.")

    def _preflight(self, request: Request) -> list[str]:
        """Return the fields that let a page send what it asks to (WHATWG Fetch, CORS protocol).

        It may send any field: none but those that we read has an effect here, and tracing and
        libraries such as htmx add their own to every request of a page.
        """
        names = request.asked_fields or "Authorization, Cache-Control, Content-Type, Last-Event-ID"
        # A day is the most that any browser keeps this (Firefox; Chromium two hours).
        return [*self._access.cross_origin(request),
                f"Access-Control-Allow-Methods: {', '.join(http1.METHODS)}",
                f"Access-Control-Allow-Headers: {names}", "Vary: Access-Control-Request-Headers",
                "Access-Control-Max-Age: 86400"]


def _whole(request: Request | None, body: bytes, content_type: str, fields: Sequence[str], *,
           status: int = 200, keep_alive: bool = False) -> bytes:
    """Return an answer with a body; to a HEAD request, its head.

    fields: header fields, as `Name: value`. keep_alive: the client may send another request.
    """
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    # There is no Content-Length with a 204 (RFC 9110 section 8.6).
    if status != 204:
        lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    # As long as connections.py lets a connection be idle.
    lines += ["Connection: keep-alive", "Keep-Alive: timeout=75"] if keep_alive else [
        "Connection: close"]
    head = "\r\n".join([*lines, *fields, _date(int(time.time())), "", ""]).encode()
    return head if request and request.method == "HEAD" else head + body


def http_error_of(error: Exception) -> HTTPError:
    """Return how a request is refused, given what was raised while it was served.

    503 is for what passes by itself. Anything that is not known is a fault, of the server or of a
    program's `authorize`: 500. The caller has to log that.
    """
    if isinstance(error, HTTPError):
        return error
    if isinstance(error, NotRunning):
        return HTTPError(503, "The server is stopping.", ["Retry-After: 1"])
    if isinstance(error, Unavailable):
        return HTTPError(503, f"{error}. Try again later; it may have been published.",
                         ["Retry-After: 5"])
    # Its text could tell a stranger about the inside of the program.
    return HTTPError(500, "The server could not answer this request; its log says why.")


@lru_cache(maxsize=1)
def _date(second: int) -> str:
    """Return the field Date for a second since 1970. To make it takes 2 us, so it is kept."""
    return f"Date: {formatdate(second, usegmt=True)}"


def _json(value: Stats) -> bytes:
    """Return a value as a line of JSON."""
    return json.dumps(value).encode() + b"\n"


def metrics(stats: Stats) -> str:
    """Return the stats in the text format of Prometheus, version 0.0.4.

    A family of metrics is two lines that describe it, and a line for each of its samples.
    """
    lines: list[str] = []
    for name, kind, text, samples in FAMILIES:
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        for suffix, key in samples.items():
            # A figure without labels is one sample.
            numbers = stats[key] if "%s" in suffix else {"": stats[key]}
            lines += [f"{name}{suffix.replace('%s', label)} {number}"
                      for label, number in numbers.items()]
    return "\n".join(lines) + "\n"
