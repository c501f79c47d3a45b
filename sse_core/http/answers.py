"""Turn a request into an answer: page, preflight, reports, POST, refusal, or a stream's opening.

    GET /-/health                  everybody, and by any Host      200, or 503 and why
    OPTIONS, /favicon.ico          everybody                       204; 404
    GET / of a browser             everybody                       the page
    GET /-/status?list             who may publish                 the clients one by one
    GET /-/metrics, /-/status      who may watch                   what is counted
    GET /TOKEN of a browser        who may watch                   the page
    GET                            who may watch                   a stream: an Opening
    POST                           who may publish                 ids

That is the order in which `respond` decides, and so what costs least comes first. A HEAD request
gets the head of what GET would get.

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
from sse_core.engine.clients import Opening, Subscription
from sse_core.engine.frames import Draft
from sse_core.engine.hub import Broadcast
from sse_core.errors import NotRunning, Refusal, Unavailable
from sse_core.http import http1, parameters
from sse_core.http.access import Access, Grant
from sse_core.http.http1 import Request

HTML = "text/html; charset=utf-8"
TEXT = "text/plain; charset=utf-8"
METRICS = "text/plain; version=0.0.4; charset=utf-8"
JSON = "application/json"
NO_STORE = "Cache-Control: no-store"

# The page watches any stream, loads nothing, and stands in no frame. Its address may hold a token,
# of which no server that it watches is told.
PAGE_FIELDS = (
    "Cache-Control: no-cache", "Vary: Accept", "X-Content-Type-Options: nosniff",
    "Referrer-Policy: no-referrer",
    "Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src *; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'")

# Times the usual pause, for a client that finds the server full.
COME_BACK = 10

# Metrics: name, kind, what it is, and its samples. Of each sample: what follows the name on its
# line, and its key among the figures. A figure that is told by a label is one number for each.
FAMILIES: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("sse_clients", "gauge", "Clients that are connected.", {"": "clients"}),
    ("sse_lagging_clients", "gauge", "Clients whose socket would not take all.", {"": "lagging"}),
    ("sse_events_total", "counter", "Events published.", {"": "events"}),
    ("sse_deliveries_total", "counter", "Events sent, over all clients.", {"": "deliveries"}),
    ("sse_sent_bytes_total", "counter", "Bytes sent to clients.", {"": "bytes"}),
    ("sse_gaps_total", "counter", "Gaps that clients were told.", {"": "gaps"}),
    ("sse_drops_total", "counter", "Clients gone, by reason.", {'{reason="LABEL"}': "drops"}),
    ("sse_refused_total", "counter", "Requests refused, by status.",
     {'{status="LABEL"}': "refused"}),
    ("sse_turn_seconds", "summary", "Time of the publisher's turns, without waiting.",
     {"_sum": "turn_seconds", "_count": "turns"}))

Figures = Mapping[str, Any]


class Answers:
    """Answer the requests to one server. Any thread may call any method.

    access        Who may do what.
    hub           Publishes, and says why no event is taken now.
    page          What a browser is shown at `/` and `/TOKEN`, or None.
    stream_type   The Content-Type of a stream.
    figures       Returns what /-/status shows.
    status        Returns the same with the list of clients.
    """

    def __init__(self, access: Access, hub: Broadcast, *, page: bytes | None, stream_type: str,
                 figures: Callable[[], Figures], status: Callable[[], Figures]) -> None:
        self._access = access
        self._hub = hub
        self._page = page
        self._stream_type = stream_type
        self._figures = figures
        self._status = status

    def is_slow(self, request: Request) -> bool:
        """Say whether `respond` may take its time: then it is not for the accept loop."""
        return self._access.takes_time or request.path.startswith("/-/")

    def asks_program(self, request: Request) -> bool:
        """Say whether `respond` asks a program's `authorize`. Raises Refusal."""
        return self._access.takes_time and self._answer_to_all(request) is None

    def respond(self, request: Request) -> bytes | Opening:
        """Return the answer to a request without a body, or what is to be registered.

        Raises Refusal, and whatever a program's `authorize` raises.
        """
        answer = self._answer_to_all(request)
        if answer is not None:
            return answer
        grant = self._access.admit(request, time.time())
        if request.path.startswith("/-/"):
            return self._report(request)
        return self._page_for(request) or self._open(request, grant)

    def _answer_to_all(self, request: Request) -> bytes | None:
        """Return the answer to a request for which nobody is asked who may watch, or None."""
        # Before the Host is looked at: load balancers send any, or none.
        if request.path == "/-/health" and request.method != "OPTIONS":
            return self._health(request)
        self._access.check_host(request)
        if request.method == "OPTIONS":
            return _whole(request, b"", TEXT, self._preflight(request), status=204)
        if request.path == "/favicon.ico":
            raise Refusal(404, "This server has no icon.")
        if request.path == "/-/status" and "list" in request.query:
            self._access.admit_list(request)
            # No page may read it.
            return _whole(request, _json(self._status()), JSON, [NO_STORE])
        return self._page_for(request) if request.path == "/" else None

    def _page_for(self, request: Request) -> bytes | None:
        """Return the page if a browser's address line asks, None if a program does.

        What takes a stream, too, gets that: htmx and Datastar name both types in Accept.
        """
        is_wanted = request.accepts("text/html") and not request.accepts("text/event-stream")
        return _whole(request, self._page, HTML, PAGE_FIELDS) if self._page and is_wanted else None

    def _open(self, request: Request, grant: Grant) -> bytes | Opening:
        """Return a stream's opening; of a HEAD request, its head."""
        asked = Subscription(parameters.channels(request), request.chunked)
        start = parameters.start(request, time.time())
        opening = Opening(self._stream_head(request), asked, *start, grant.until, time.monotonic())
        return opening.head if request.method == "HEAD" else opening

    def _stream_head(self, request: Request) -> bytes:
        """Return the head of a stream: the original's four lines, then those for proxies."""
        framing = "Transfer-Encoding: chunked" if request.chunked else "Connection: close"
        closing = ["Connection: close"] if request.chunked and request.method == "HEAD" else []
        lines = ["HTTP/1.1 200 OK", f"Content-Type: {self._stream_type}", framing,
                 *self._access.cross_origin(request), *closing,
                 "Cache-Control: no-cache, no-transform", "X-Accel-Buffering: no",
                 _date(int(time.time())), "", ""]
        return "\r\n".join(lines).encode()

    def _busy(self, request: Request) -> bytes:
        """Return a stream that ends at once, and tells its client to come back later.

        On any status but 200, an EventSource would give up for good.
        """
        asked = Subscription(frozenset(), request.chunked)
        busy = asked.framed(frames.busy(COME_BACK * max(1.0, self._hub.retry)))
        return self._stream_head(request) + busy + (frames.END if request.chunked else b"")

    def admit_post(self, request: Request) -> Grant:
        """Return where a POST may publish to. Raises Refusal: ask before its body is read."""
        self._access.check_host(request)
        grant = self._access.admit_post(request, time.time(),
                                        body_names=parameters.is_list(request))
        parameters.check_encoding(request)
        return grant

    def post(self, request: Request, body: bytes, grant: Grant) -> bytes:
        """Publish the body of a POST that is admitted, and return the answer.

        Raises Refusal; WouldWait, see Hub.forbid_waiting.
        """
        return self.posted(request, self._hub.publish_all(self.drafts(request, body, grant)))

    def drafts(self, request: Request, body: bytes, grant: Grant) -> list[Draft]:
        """Return the events of a POST that is admitted. Raises Refusal."""
        drafts = parameters.drafts(request, body)
        grant.check(*(draft.channel for draft in drafts))
        return drafts

    def posted(self, request: Request, ids: Sequence[str | None]) -> bytes:
        """Return the answer to a POST whose events have these ids."""
        answer = {"ids": ids} if parameters.is_list(request) else {"id": ids[0]}
        return _whole(request, _json(answer), JSON, self._access.cross_origin(request),
                      keep_alive=request.keeps_alive)

    def refuse(self, refusal: Refusal, request: Request | None) -> bytes:
        """Return the answer that says what was wrong; the request is None if it is unreadable.

        To an EventSource, or a client like it, what is our own fault or shortage is told as `busy`.
        """
        if (request and refusal.status in (500, 503) and request.method == "GET"
                and request.accepts("text/event-stream") and not request.path.startswith("/-/")):
            return self._busy(request)
        fields = [*refusal.fields, *self._access.cross_origin(request)]
        return _whole(request, f"{refusal.text}\n".encode(), TEXT, fields, status=refusal.status)

    def _health(self, request: Request) -> bytes:
        """Return 200 `ok`. Raises Refusal with the reason if events are not taken."""
        trouble = self._hub.trouble()
        if trouble:
            raise Refusal(503, f"{trouble}.")
        return _whole(request, b"ok\n", TEXT, [NO_STORE])

    def _report(self, request: Request) -> bytes:
        """Return the metrics, or the status."""
        fields = [NO_STORE, *self._access.cross_origin(request)]
        if request.path == "/-/metrics":
            return _whole(request, metrics(self._figures()).encode(), METRICS, fields)
        if request.path == "/-/status":
            return _whole(request, _json(self._figures()), JSON, fields)
        raise Refusal(404, "Nothing is here. There are /-/health, /-/metrics and /-/status.")

    def _preflight(self, request: Request) -> list[str]:
        """Return the fields that let a page send what it asks to (WHATWG Fetch, CORS protocol).

        It may send any field: none but those that we read has an effect here, and tracing and
        libraries such as htmx add their own to every request of a page.
        """
        names = request.asked_fields or "Authorization, Cache-Control, Content-Type, Last-Event-ID"
        return [*self._access.cross_origin(request),
                f"Access-Control-Allow-Methods: {', '.join(http1.METHODS)}",
                f"Access-Control-Allow-Headers: {names}", "Vary: Access-Control-Request-Headers",
                "Access-Control-Max-Age: 86400"]


def _whole(request: Request | None, body: bytes, content_type: str, fields: Sequence[str], *,
           status: int = 200, keep_alive: bool = False) -> bytes:
    """Return an answer with a body; to a HEAD request, its head."""
    lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
    # There is no Content-Length with a 204 (RFC 9110 section 8.6).
    if status != 204:
        lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    # The idle time of connections.py.
    lines += ["Connection: keep-alive", "Keep-Alive: timeout=75"] if keep_alive else [
        "Connection: close"]
    head = "\r\n".join([*lines, *fields, _date(int(time.time())), "", ""]).encode()
    return head if request and request.method == "HEAD" else head + body


def refusal_of(error: Exception) -> Refusal:
    """Return how a request is refused, given what was raised while it was served."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, NotRunning):
        return Refusal(503, "The server is stopping.", ["Retry-After: 1"])
    if isinstance(error, Unavailable):
        return Refusal(503, f"{error}. Try again later; it may have been published.",
                       ["Retry-After: 5"])
    return Refusal(500, "The server could not answer this request; its log says why.")


@lru_cache(maxsize=1)
def _date(second: int) -> str:
    """Return the field Date for a second since 1970. It is made once in each second."""
    return f"Date: {formatdate(second, usegmt=True)}"


def _json(value: Figures) -> bytes:
    return json.dumps(value).encode() + b"\n"


def metrics(figures: Figures) -> str:
    """Return the figures in the text format of Prometheus, version 0.0.4."""
    lines: list[str] = []
    for name, kind, text, samples in FAMILIES:
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        for suffix, key in samples.items():
            numbers = figures[key] if "LABEL" in suffix else {"": figures[key]}
            lines += [f"{name}{suffix.replace('LABEL', label)} {number}"
                      for label, number in numbers.items()]
    return "\n".join(lines) + "\n"
