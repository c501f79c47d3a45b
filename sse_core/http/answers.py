"""Turn a request into an answer: page, preflight, reports, POST, refusal, or a stream's opening.

No socket and no thread in here: bytes go back to the caller, and so does what is to be registered.
"""
from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from functools import lru_cache
from typing import Any, Callable

from sse_core.engine import frames
from sse_core.engine.clients import Opening, Subscription
from sse_core.engine.frames import Draft
from sse_core.errors import NotRunning, Refusal, Unavailable, WouldWait
from sse_core.http import http1, parameters
from sse_core.http.access import Access, Grant
from sse_core.http.http1 import Request

HTML = "text/html; charset=utf-8"
# The page watches any stream, loads nothing, and stands in no frame. Its address may hold a token,
# of which no server that it watches is told
PAGE_FIELDS = (
    "Cache-Control: no-cache", "Vary: Accept", "X-Content-Type-Options: nosniff",
    "Referrer-Policy: no-referrer",
    "Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src *; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'")
TEXT = "text/plain; charset=utf-8"
METRICS = "text/plain; version=0.0.4; charset=utf-8"
JSON = "application/json"
COME_BACK = 10              # times the usual pause, for a client that finds the server full

FAMILIES = (                # of metrics: name, kind, what it is, and its key among the figures
    ("sse_clients", "gauge", "Clients that are connected.", "clients"),
    ("sse_lagging_clients", "gauge", "Clients whose socket would not take all.", "lagging"),
    ("sse_events_total", "counter", "Events published.", "events"),
    ("sse_deliveries_total", "counter", "Events sent, over all clients.", "deliveries"),
    ("sse_sent_bytes_total", "counter", "Bytes sent to clients.", "bytes"),
    ("sse_gaps_total", "counter", "Gaps that clients were told.", "gaps"),
    ("sse_drops_total", "counter", "Clients gone, by reason.", "drops"),
    ("sse_refused_total", "counter", "Requests refused, by status.", "refused"),
    ("sse_turn_seconds", "summary", "Time of the publisher's turns, without waiting.",
     "turn_seconds"))
LABELS = {"drops": "reason", "refused": "status"}

Figures = Mapping[str, Any]


class Answers:
    """Answer the requests to one server. Any thread may call any method.

    access: who may do what. page: what a browser is shown at `/` and `/TOKEN`, or None.
    retry: seconds of a client's usual pause before it reconnects. stream_type: the Content-Type of
    a stream.
    publish_all: see Hub. figures: returns what /-/status shows. status: the same with the
    list of clients. trouble: returns why no event is taken now, or None.
    """

    def __init__(self, access: Access, *, page: bytes | None, retry: float, stream_type: str,
                 publish_all: Callable[[Sequence[Draft]], Sequence[str | None]],
                 figures: Callable[[], Figures], status: Callable[[], Figures],
                 trouble: Callable[[], str | None]) -> None:
        self._access = access
        self._page = page
        self._retry = retry
        self._stream_type = stream_type
        self._publish_all = publish_all
        self._figures = figures
        self._status = status
        self._trouble = trouble

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
        if request.path == "/-/health" and request.method != "OPTIONS":
            # Before the Host is looked at: load balancers send any, or none
            return self._health(request)
        self._access.check_host(request)
        if request.method == "OPTIONS":
            return _whole(request, b"", TEXT, self._preflight(request), status=204)
        if request.path == "/favicon.ico":
            raise Refusal(404, "This server has no icon.")
        page = self._page_for(request) if request.path == "/" else None
        if page:
            return page
        if request.path == "/-/status" and "list" in request.query:
            self._access.admit_list(request)
            return _whole(request, _json(self._status()), JSON, ["Cache-Control: no-store"])
        return None

    def _page_for(self, request: Request) -> bytes | None:
        """Return the page if a browser's address line asks, None if a program does.

        What takes a stream, too, gets that: htmx and Datastar name both types in Accept.
        """
        is_wanted = request.accepts("text/html") and not request.accepts("text/event-stream")
        return _whole(request, self._page, HTML, PAGE_FIELDS) if self._page and is_wanted else None

    def _open(self, request: Request, grant: Grant) -> bytes | Opening:
        """Return a stream's opening; of a HEAD request, its head."""
        ends_at = math.inf if grant.until is None else grant.until
        asked = Subscription(parameters.channels(request), request.chunked)
        start = parameters.start(request, time.time())
        opening = Opening(self._stream_head(request), asked, *start, ends_at,
                          time.monotonic())
        return opening.head if request.method == "HEAD" else opening

    def _stream_head(self, request: Request) -> bytes:
        """Return the head of a stream: the original's four lines, then those for proxies."""
        framing = "Transfer-Encoding: chunked" if request.chunked else "Connection: close"
        closing = ["Connection: close"] if request.chunked and request.method == "HEAD" else []
        lines = ["HTTP/1.1 200 OK", f"Content-Type: {self._stream_type}", framing,
                 *self._access.cross_origin(request), *closing,
                 "Cache-Control: no-cache, no-transform", "X-Accel-Buffering: no", _date(), "", ""]
        return "\r\n".join(lines).encode()

    def _busy(self, request: Request) -> bytes:
        """Return a stream that ends at once, and tells its client to come back later.

        On any status but 200, an EventSource would give up for good.
        """
        asked = Subscription(frozenset(), request.chunked)
        busy = asked.framed(frames.busy(COME_BACK * max(1.0, self._retry)))
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
        drafts = self.drafts(request, body, grant)
        with refusing():
            ids = self._publish_all(drafts)
        return self.posted(request, ids)

    def drafts(self, request: Request, body: bytes, grant: Grant) -> list[Draft]:
        """Return the events of a POST that is admitted. Raises Refusal."""
        drafts = parameters.drafts(request, body)
        for draft in drafts:
            grant.check(draft.channel)
        return drafts

    def posted(self, request: Request, ids: Sequence[str | None]) -> bytes:
        """Return the answer to a POST whose events have these ids."""
        answer = {"ids": ids} if parameters.is_list(request) else {"id": ids[0]}
        return _whole(request, _json(answer), JSON, self._access.cross_origin(request),
                      keep_alive=request.keeps_alive)

    def refuse(self, refusal: Refusal, request: Request | None) -> bytes:
        """Return the answer that says what was wrong; the request is None if it is unreadable.

        To a client that wants a stream, what is our own fault or shortage is told as `busy`.
        """
        if request and refusal.status in (500, 503) and _wants_stream(request):
            return self._busy(request)
        fields = [*refusal.fields, *self._access.cross_origin(request)]
        return _whole(request, f"{refusal.text}\n".encode(), TEXT, fields, status=refusal.status)

    def _health(self, request: Request) -> bytes:
        """Return 200 `ok`. Raises Refusal with the reason if events are not taken."""
        trouble = self._trouble()
        if trouble:
            raise Refusal(503, f"{trouble}.")
        return _whole(request, b"ok\n", TEXT, ["Cache-Control: no-store"])

    def _report(self, request: Request) -> bytes:
        """Return the metrics, or the status."""
        fields = ["Cache-Control: no-store", *self._access.cross_origin(request)]
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
    is_head = request is not None and request.method == "HEAD"
    head = http1.head(status, content_type, len(body), [*fields, _date()], keep_alive)
    return head if is_head else head + body


@contextmanager
def refusing() -> Iterator[None]:
    """Raise Refusal in place of what publishing raises; but WouldWait goes on."""
    try:
        yield
    except WouldWait:
        raise
    except Unavailable as error:
        raise Refusal(503, f"{error}. Try again later; it may have been published.",
                      ["Retry-After: 5"]) from None
    except NotRunning:
        raise Refusal(503, "The server is stopping.", ["Retry-After: 1"]) from None


def _wants_stream(request: Request) -> bool:
    """Say whether a request is an EventSource's, or that of a client like it."""
    return (request.method == "GET" and request.accepts("text/event-stream")
            and not request.path.startswith("/-/"))


def _date() -> str:
    return _date_at(int(time.time()))


@lru_cache(maxsize=1)
def _date_at(second: int) -> str:
    return f"Date: {formatdate(second, usegmt=True)}"


def _json(value: Figures) -> bytes:
    return json.dumps(value).encode() + b"\n"


def metrics(figures: Figures) -> str:
    """Return the figures in the text format of Prometheus, version 0.0.4."""
    lines: list[str] = []
    for name, kind, text, key in FAMILIES:
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{suffix} {value}" for suffix, value in _samples(figures, key).items()]
    return "\n".join(lines) + "\n"


def _samples(figures: Figures, key: str) -> dict[str, Any]:
    """Return what one figure gives: what follows the name on its line, and the value."""
    if key in LABELS:
        return {f'{{{LABELS[key]}="{each}"}}': number for each, number in figures[key].items()}
    if key == "turn_seconds":
        return {"_sum": figures[key], "_count": figures["turns"]}
    return {"": figures[key]}
