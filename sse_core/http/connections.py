"""Turn accepted sockets into answers that are sent, or clients that are registered.

A connection is an accepted socket that is no client (yet). One thread owns all of them, and so
nothing here needs a lock: only the owner of a socket touches it. It waits for every peer at once,
in a selector, and for none of them alone.

    accept loop --+--> client        a plain GET that has wholly arrived
                  |
                  v   take
            +------------------------------- thread `connections` ---+
            |  TLS --> head --> body --> job --> answer --> linger   |--> closed
            |           ^                 |        |                 |
            |           +----- idle <-----|--------+                 |--> client (of the publisher)
            +-----------------------------|--------------------------+
                                          v
                                  threads `request-N` (pool.py), or `store`

What a connection does is a generator. It yields what it waits for, and goes on when that is there:

    READABLE    Its peer has sent something, or closed.
    WRITABLE    Its socket takes more bytes.
    TURN        All others that are ready have had their turn. So nobody owns the thread by sending
                many requests at once.
    a Future    Another thread has done what may block: a program's `authorize`, or publishing.
    a StreamRequest
                It asks to become a client. If it does, the code is closed. If there is no place, it
                goes on in the next turn; a moment later (PAUSE) if there is a store, whose events
                may be on their way.

It has one deadline, which is raised as TimeUp where it waits, before any input that is there. A job
has none once a thread has begun it: then there is nothing to take back.

The generator neither closes its socket nor registers it in the selector. Its owner does both, so
that each way in which the generator can end is the same. The first wait for a socket registers it.
The socket is taken out of the selector before it is closed or handed to the publisher, and when it
becomes readable during a job.

When there are too many connections, one more evicts one: the one that has been idle or lingering
longest, else the one whose request began first, once it had its time of grace.
"""
from __future__ import annotations

import logging
import math
import selectors
import socket
import ssl
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Callable, TypeVar, Union

from sse_core.engine.clients import StreamRequest
from sse_core.engine.frames import Event
from sse_core.engine.wakeup import WakeUp
from sse_core.errors import HTTPError, NotRunning, Unavailable, WouldWait
from sse_core.http import http1, parameters
from sse_core.http.answers import Answers, http_error_of
from sse_core.http.body import Body
from sse_core.http.http1 import Request
from sse_core.http.pool import Pool

# Seconds for one request to arrive, however it dribbles; and for its answer to be taken.
REQUEST_TIME = 10.0

# Seconds that a kept connection may be idle: longer than proxies keep theirs (nginx and AWS 60), so
# that it is the proxy that closes, and not we just when it sends the next request.
IDLE_TIME = 75.0

# Seconds for a peer to read why it was refused, while it is still sending.
LINGER_TIME = 1.0

# Seconds that a job waits for a thread.
PLACE_TIME = 10.0

MAX_CONNECTIONS = 2048

# Accepted sockets that wait to be taken over.
MAX_NEWCOMERS = 1024

# Seconds for a request before it can be evicted, as long as no more newcomers wait for that. So
# 3,000 honest clients that come at once all get in.
GRACE_TIME, GRACE_NEWCOMERS = 1.0, 960

# Connections that are evicted at once when the system gives no descriptor to accept with.
MAKES_ROOM = 32

# Seconds that a client waits until what it had before it came has come back from a store.
STORE_TIME = 1.0

# Of each kind of job: `authorize`, and publishing.
MAX_THREADS = 64

# Bytes of all bodies that are under way.
MAX_BODIES = 16 << 20

# Bytes received at once: more than a TLS record has (RFC 8446 section 5.1), so that OpenSSL never
# holds any of which no selector knows.
PIECE = 64 << 10

# Bytes of an event that is published without a thread: it takes less than a millisecond.
SMALL_BODY = 16 << 10

# Seconds between two looks for deadlines that have passed, at least. A look takes some 0.1 ms.
LOOK_INTERVAL = 0.05

READABLE, WRITABLE, TURN, PAUSE = selectors.EVENT_READ, selectors.EVENT_WRITE, 0, -1

# What a socket is watched for when the selector does not have it.
UNWATCHED = 0

Wait = Union[int, "Future[Any]", StreamRequest]
T = TypeVar("T")
Code = Generator[Wait, None, T]
Register = Callable[[socket.socket, StreamRequest, str], bool]
Submit = Callable[[Sequence[Event]], "Future[list[str]]"]

logger = logging.getLogger("sse_server")


class TimeUp(Exception):
    """The deadline of a connection has passed.

    Not a TimeoutError: since Python 3.10 that is also what a socket whose peer is gone raises.
    """


class Connections:
    """The connections of one server, and the loop of the thread that owns them.

    register: see Hub.register. submit: see StoreHub.submit_all; None if there is no store.
    context: gives the newest one for TLS, for each handshake; None: no TLS.
    """

    def __init__(self, answers: Answers, register: Register,
                 submit: Submit | None, context: Callable[[], ssl.SSLContext] | None
                 ) -> None:
        self.answers = answers
        self.submit = submit
        self.context = context
        self.authorizing = Pool(MAX_THREADS)
        self.publishing = Pool(MAX_THREADS)
        self._register = register

        # What other threads hand over, before they wake the owner: the accept loop, and those that
        # have done a job. Only the owner takes it out.
        self._newcomers: deque[tuple[socket.socket, str, bytes]] = deque()
        self._done: deque[tuple[Connection, Future[Any]]] = deque()

        self._wakeup = WakeUp()
        self._is_stopping = False

        # Whether the accept loop needs descriptors.
        self._is_short = False

        # How many requests were refused, by status. Any thread may copy it.
        self._refused: dict[int, int] = {}

        # All below belongs to the thread. A connection is in one of these two dicts, of which the
        # first is evicted first, and in each the one that has been there longest.
        self._idle: dict[Connection, None] = {}
        self._busy: dict[Connection, None] = {}

        # Connections that go on in the next turn.
        self._in_turn: list[Connection] = []

        # When to look for deadlines that have passed, on time.monotonic. No deadline is
        # earlier than this.
        self._look_at = math.inf

        # Bytes of bodies that are under way.
        self._held = 0

        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wakeup.open(), READABLE)

    # Called by the accept loop

    def take(self, sock: socket.socket, peer: str) -> None:
        """Take an accepted socket, and never wait."""
        sock.setblocking(False)
        received = b"" if self.context else self._serve_at_once(sock, peer)
        if received is None:
            return
        if len(self._newcomers) >= MAX_NEWCOMERS:
            sock.close()
            return
        self._newcomers.append((sock, peer, received))
        self._wakeup.wake()

    def make_room(self) -> None:
        """Have some connections evicted: there is no descriptor for one more."""
        self._is_short = True
        self._wakeup.wake()

    def _serve_at_once(self, sock: socket.socket, peer: str) -> bytes | None:
        """Register who asks for a stream with a GET that has wholly arrived.

        Returns None if that is done, else what was received. To go through the other thread would
        cost 0.4 times as much again.
        """
        received = b""
        # Nothing has arrived, a refusal, a reset, or a fault of ours: the other thread meets it.
        with suppress(Exception):
            received = sock.recv(http1.MAX_HEAD)
            request, _ = http1.parse(received) or (None, 0)
            if request and request.method == "GET" and not self.answers.is_slow(request):
                answer = self.answers.respond(request)
                if isinstance(answer, StreamRequest) and self._register(sock, answer, peer):
                    return None
        return received

    # Called from any thread

    @property
    def refusals(self) -> dict[str, int]:
        """How many requests were refused, by status in growing order."""
        return {str(status): number for status, number in sorted(self._refused.copy().items())}

    def stop(self) -> None:
        """Have the thread close all connections and end. Join it then."""
        self._is_stopping = True
        self._wakeup.wake()

    def join_jobs(self, until: float) -> None:
        """Begin no job any more, and join the threads of those that end until then."""
        for pool in (self.authorizing, self.publishing):
            pool.stop(until)

    # Run by the thread

    def run(self) -> None:
        """Serve connections until `stop`."""
        try:
            while not self._is_stopping:
                self._serve_ready()
        finally:
            self.close()

    def _serve_ready(self) -> None:
        """Wait until there is something to do, and do one turn of it."""
        now = time.monotonic()
        timeout = 0.0 if self._in_turn else max(0.0, self._look_at - now)
        ready = self._selector.select(None if timeout == math.inf else timeout)
        now = time.monotonic()
        in_turn, self._in_turn = self._in_turn, []
        for key, _ in ready:
            if key.data is None:
                self._wakeup.clear()
            elif isinstance(key.data.wait, Future):
                # Nobody reads this before the job is done.
                self._watch(key.data, UNWATCHED)
            elif key.data.wait in (READABLE, WRITABLE):
                self._step(key.data, key.data.wait, now)
                # A turn of 2,000 handshakes takes a second: too many would wait by its end.
                self._take_newcomers(now)
        for connection in in_turn:
            self._step(connection, TURN, now)
        for _ in range(len(self._done)):
            self._step(*self._done.popleft(), now)
        if now >= self._look_at:
            self._look_for_deadlines(now)
        if self._is_short:
            self._is_short = False
            for connection in [*self._idle, *self._busy][:MAKES_ROOM]:
                self._end(connection)
        self._take_newcomers(now)

    def _take_newcomers(self, now: float) -> None:
        """Begin with those that wait, as far as there is room or somebody can be evicted."""
        for _ in range(len(self._newcomers)):
            if len(self._idle) + len(self._busy) >= MAX_CONNECTIONS and not self._evict(now):
                self._look_at = min(self._look_at, now + LOOK_INTERVAL)
                break
            connection = Connection(*self._newcomers.popleft(), self)
            self._busy[connection] = None
            self._step(connection, TURN, now)

    def _evict(self, now: float) -> bool:
        """Close a connection to make room, if there is one that can be evicted now."""
        first = next(iter(self._idle or self._busy))
        is_due = self._idle or first.began <= now - GRACE_TIME
        if is_due or len(self._newcomers) > GRACE_NEWCOMERS:
            self._end(first)
            return True
        return False

    def _look_for_deadlines(self, now: float) -> None:
        for connection in [*self._idle, *self._busy]:
            if connection.deadline > now and connection.wait != PAUSE:
                continue
            if isinstance(connection.wait, Future):
                # If no thread has begun it, this takes it back. Else it has no deadline any more.
                connection.deadline = math.inf
                connection.wait.cancel()
            else:
                self._step(connection, connection.wait, now)
        first = min((now if each.wait == PAUSE else each.deadline
                     for each in [*self._idle, *self._busy]), default=math.inf)
        self._look_at = max(now + LOOK_INTERVAL, first)

    def _step(self, connection: Connection, wait: Wait | None, now: float) -> None:
        """Run a connection's code up to its next wait, or to its end, if it still waits for this.

        It does not if it was evicted, or has gone on for another reason in the same turn.
        """
        if wait != connection.wait:
            return
        is_late = connection.deadline <= now and not isinstance(wait, Future)
        try:
            code = connection.code
            wait = code.throw(TimeUp("its time was up")) if is_late else next(code)
            self._wait_for(connection, wait)
            self._look_at = min(self._look_at, connection.deadline)
        except StopIteration:
            self._end(connection)
        except Exception as error:
            self._end(connection)
            # What a logging handler raises costs nobody else, either.
            with suppress(Exception):
                if isinstance(error, (OSError, TimeUp)):
                    logger.debug("%s left during its request: %s", connection.peer, error)
                else:
                    logger.exception("%s: a fault ended a connection", connection.peer)

    def _wait_for(self, connection: Connection, wait: Wait) -> None:
        connection.wait = wait
        if isinstance(wait, Future):
            wait.add_done_callback(partial(self._job_done, connection))
        elif isinstance(wait, StreamRequest):
            self._hand_over(connection, wait)
        elif wait == TURN:
            self._in_turn.append(connection)
        elif wait == PAUSE:
            self._look_at = min(self._look_at, time.monotonic() + LOOK_INTERVAL)
        else:
            self._watch(connection, wait)

    def _job_done(self, connection: Connection, job: Future[Any]) -> None:
        """Have a connection go on. Called by whichever thread did its job, or took it back."""
        self._done.append((connection, job))
        self._wakeup.wake()

    def _hand_over(self, connection: Connection, stream_request: StreamRequest) -> None:
        """Make a connection a client, or have it go on a turn later."""
        self._watch(connection, UNWATCHED)
        if self._register(connection.sock, stream_request, connection.peer):
            self._forget(connection)
        else:
            self._wait_for(connection, PAUSE if self.submit else TURN)

    def _watch(self, connection: Connection, events: int) -> None:
        """Watch a socket for these events; UNWATCHED: stop watching it."""
        if events == connection.watched_for:
            return
        if not events:
            self._selector.unregister(connection.descriptor)
        elif connection.watched_for:
            self._selector.modify(connection.descriptor, events, connection)
        else:
            self._selector.register(connection.descriptor, events, connection)
        connection.watched_for = events

    def _forget(self, connection: Connection) -> None:
        """End the code of a connection whose socket is somebody else's from now on, or nobody's."""
        connection.wait = None
        self._idle.pop(connection, None)
        self._busy.pop(connection, None)
        connection.code.close()

    def _end(self, connection: Connection) -> None:
        """Close a connection, whatever it is doing."""
        if isinstance(connection.wait, Future):
            connection.wait.cancel()
        self._watch(connection, UNWATCHED)
        self._forget(connection)
        connection.sock.close()

    def close(self) -> None:
        """Close all. The thread does it at its end, or whoever stops a server that never ran."""
        for connection in [*self._idle, *self._busy]:
            self._end(connection)
        while self._newcomers:
            self._newcomers.popleft()[0].close()
        self._selector.close()
        self._wakeup.close()

    # Called by the code of a connection

    def begin_request(self, connection: Connection) -> None:
        """Count a connection that was idle as the one whose request has begun last."""
        del self._idle[connection]
        self._busy[connection] = None

    def end_request(self, connection: Connection) -> None:
        """Count a connection among those that nobody would miss."""
        self._busy.pop(connection, None)
        self._idle[connection] = None

    def hold(self, length: int, held: int) -> int:
        """Count so many bytes of a body in place of those `held`. Raises HTTPError."""
        total = self._held + length - held
        if length > held and total > MAX_BODIES:
            raise HTTPError(503, "This server holds too many bodies of requests. Try again later.",
                            ["Retry-After: 1"])
        self._held = total
        return length

    def refused(self, http_error: HTTPError, peer: str) -> None:
        """Count and log a refusal."""
        self._refused[http_error.status] = self._refused.get(http_error.status, 0) + 1
        logger.debug("%s refused: %d %s", peer, http_error.status, http_error.text)


class Connection:
    """One accepted socket, and the code that serves it."""

    def __init__(self, sock: socket.socket, peer: str, received: bytes,
                 others: Connections) -> None:
        # The owner's: what is watched does not change when TLS makes the socket another object.
        self.sock = sock
        self.peer = peer
        self.descriptor = sock.fileno()
        self.watched_for = UNWATCHED

        # What it waits for. None: it is a connection no more.
        self.wait: Wait | None = TURN
        self.code: Code[None] = self._run()

        # When its request began, and when TimeUp is raised, on time.monotonic.
        self.began = time.monotonic()
        self.deadline = self.began + REQUEST_TIME

        # All below is the code's.
        self._others = others
        self._answers = others.answers

        # What has arrived of a request, or already of the next one.
        self._received = received

        # A request was answered, and nothing of the next one has been read.
        self._is_idle = False

        # Nothing more of the request is under way.
        self._is_whole = False

        # Bytes of its body that are counted.
        self._held = 0

    def _run(self) -> Code[None]:
        if self._others.context:
            yield from self._start_tls(self._others.context)
        while (yield from self._serve()):
            self._others.end_request(self)
            self._is_idle, self.deadline = True, time.monotonic() + IDLE_TIME
            if self._received:
                self._begin()
                yield TURN
        yield from self._linger()

    def _start_tls(self, context: Callable[[], ssl.SSLContext]) -> Code[None]:
        # A peer that sends nothing costs no object of OpenSSL.
        yield READABLE
        if not self.sock.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError("it sent nothing")
        self.sock = tls = context().wrap_socket(self.sock, server_side=True,
                                                do_handshake_on_connect=False)
        while True:
            try:
                tls.do_handshake()
                return
            except ssl.SSLWantReadError:
                yield READABLE
            except ssl.SSLWantWriteError:
                yield WRITABLE

    def _serve(self) -> Code[bool]:
        """Serve one request. Returns whether the connection is kept for the next one."""
        request = None
        try:
            request = yield from self._read_head()
            return request is not None and (yield from self._answer(request))
        except (OSError, TimeUp):
            raise
        except Exception as error:
            http_error = http_error_of(error)
            if http_error.status == 500:
                # A fault, ours or of `authorize`: it costs this connection alone.
                logger.exception("%s: the request could not be answered", self.peer)
            yield from self._refuse(http_error, request)
        finally:
            self._held = self._others.hold(0, self._held)
        return False

    def _answer(self, request: Request) -> Code[bool]:
        if request.method == "POST":
            yield from self._send_answer((yield from self._publish(request)))
            return request.keeps_alive
        respond = partial(self._answers.respond, request)
        if self._answers.asks_program(request):
            answer = yield from self._work(self._others.authorizing, respond)
        else:
            answer = respond()
        if isinstance(answer, StreamRequest):
            until = time.monotonic() + (STORE_TIME if self._others.submit else 0.0)
            yield answer
            while time.monotonic() < until:
                yield answer
            raise HTTPError(503, "This server has as many clients as it can take, or is not ready "
                                 "yet: /-/health says so. Try again later.", ["Retry-After: 10"])
        yield from self._send_answer(answer)
        return False

    def _publish(self, request: Request) -> Code[bytes]:
        """Read the body of a POST, publish its events, and return the answer."""
        grant = self._answers.admit_post(request)
        body = yield from self._read_body(request)
        publish = partial(self._answers.post, request, body, grant)
        if len(body) > SMALL_BODY or parameters.is_list(request):
            return (yield from self._work(self._others.publishing, publish))
        if self._others.submit:
            # The thread of a store publishes it.
            job = self._others.submit(parameters.events(request, body, grant))
            yield from self._wait(job)
            return self._answers.posted(request, job.result())
        try:
            return publish()
        except WouldWait:
            return (yield from self._work(self._others.publishing, publish))

    def _work(self, pool: Pool, call: Callable[[], T]) -> Code[T]:
        """Have a thread do what may block.

        Raises HTTPError, NotRunning or Unavailable; RuntimeError if the call fails.
        """
        job = pool.submit(call)
        yield from self._wait(job)
        error = job.exception()
        if error is None:
            return job.result()
        if isinstance(error, (HTTPError, NotRunning, Unavailable)):
            raise error
        # An OSError, too: it is not the peer that has left.
        raise RuntimeError("the request could not be worked on") from error

    def _wait(self, job: Future[Any]) -> Code[None]:
        """Wait until a job is done. Raises HTTPError if nobody has begun it in time."""
        self.deadline = time.monotonic() + PLACE_TIME
        yield job
        if job.cancelled():
            raise HTTPError(503, "This server is too busy. Try again later.", ["Retry-After: 5"])

    def _read_head(self) -> Code[Request | None]:
        """Return the request; None if the peer closes before it is whole. Raises HTTPError."""
        seen = 0
        while True:
            # Whatever is wrong with a head, nothing more of the request follows its end.
            self._is_whole = self._received.endswith(b"\r\n\r\n")
            request, length = http1.parse(self._received, seen) or (None, 0)
            if request:
                self._is_whole = request.method != "POST"
                self._received = self._received[length:]
                return request
            seen = len(self._received)
            if not (yield from self._receive()):
                return None

    def _read_body(self, request: Request) -> Code[bytes]:
        """Return the body of a POST.

        Raises HTTPError; ConnectionAbortedError if it is cut short.
        """
        body = Body(request.body_length)
        rest = body.feed(self._received)
        if rest is None and request.chunked and "expect" in request.known:
            yield from self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        while rest is None:
            self._held = self._others.hold(len(body.data), self._held)
            self._received = b""
            if not (yield from self._receive()):
                raise ConnectionAbortedError("the body was cut short")
            rest = body.feed(self._received)
        self._received, self._is_whole = rest, True
        self._held = self._others.hold(len(body.data), self._held)
        return bytes(body.data)

    def _receive(self) -> Code[bool]:
        """Add to what was received; False at the end of the stream.

        Raises HTTPError when time is up.
        """
        data = None
        try:
            while data is None:
                yield READABLE
                # Of a TLS record, only a part may be there.
                with suppress(BlockingIOError):
                    data = self.sock.recv(PIECE)
        except TimeUp:
            # A 408 could pass for the answer to the request that comes just now.
            if self._is_idle:
                return False
            raise HTTPError(
                408, f"The request took longer than {REQUEST_TIME:g} seconds.") from None
        if self._is_idle:
            self._begin()
        self._received += data
        return bool(data)

    def _begin(self) -> None:
        """Begin with the next request of a kept connection."""
        self._others.begin_request(self)
        self._is_idle, self.began = False, time.monotonic()
        self.deadline = self.began + REQUEST_TIME

    def _send_answer(self, answer: bytes) -> Code[None]:
        self.deadline = time.monotonic() + REQUEST_TIME
        yield from self._send(answer)

    def _send(self, data: bytes) -> Code[None]:
        rest = memoryview(data)
        while rest:
            with suppress(BlockingIOError):
                rest = rest[self.sock.send(rest):]
            if rest:
                yield WRITABLE

    def _refuse(self, http_error: HTTPError, request: Request | None) -> Code[None]:
        self._others.refused(http_error, self.peer)
        yield from self._send_answer(self._answers.refuse(http_error, request))

    def _linger(self) -> Code[None]:
        """End what we send, and give a peer that may still be sending the time to read it.

        To close while input is under way would reset the connection, and could lose the answer.
        """
        with suppress(OSError, TimeUp):
            # Over TLS with close_notify (RFC 9112 section 9.8).
            self.sock.shutdown(socket.SHUT_WR)
            if self._is_whole:
                return
            self._others.end_request(self)
            self.deadline = time.monotonic() + LINGER_TIME
            while True:
                yield READABLE
                # As plain bytes: nobody reads them.
                if not socket.socket.recv(self.sock, PIECE):
                    return
