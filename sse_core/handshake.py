"""Turn an accepted socket into an answer that is sent, or a client that is registered.

A socket goes one way: accepted, Handshake, Answers, `register`. A request that has wholly arrived
goes that way in the accept loop; any other waits for its peer in a thread of its own. Those are
few, and what a peer can make them wait is bounded.
"""
from __future__ import annotations

import logging
import math
import socket
import ssl
import threading
import time
from itertools import count
from typing import Callable

from sse_core import http1
from sse_core.answers import Answers, Opening
from sse_core.body import Body
from sse_core.http1 import Refusal, Request

HEAD_TIME = 10.0            # seconds for one request to arrive, however it dribbles
LINGER_TIME = 1.0           # seconds for a refused client to read why before it is cut
MAX_HANDSHAKES = 256        # unfinished requests; the oldest makes room for the next
GRACE = 1.0                 # seconds that a TLS handshake has before it can be the one to make room
ROOM_CHECK = 0.1            # seconds between two looks for one that can make room
PIECE = 64 << 10            # bytes received at once

Register = Callable[[socket.socket, Opening, str], bool]

logger = logging.getLogger("sse_server")


class Handshakes:
    """The handshakes that have a thread: MAX_HANDSHAKES at most, so a crowd costs no more.

    answers: to their requests. context: for TLS, or None. stopping: set before `cut_all` is called.
    register: takes a non-blocking socket, an Opening and the peer's name; False if it does not.
    """

    def __init__(self, answers: Answers, register: Register, context: ssl.SSLContext | None,
                 stopping: threading.Event) -> None:
        self._ended = threading.Condition()     # one has ended; guards the next two
        self._unfinished: dict[Handshake, threading.Thread] = {}    # the oldest first
        self._refused: dict[int, int] = {}      # requests by the status of their refusal
        self._numbers = count(1)                # for names of threads; the accept loop's own
        self.answers = answers
        self.register = register
        self.context = context
        self._stopping = stopping

    # Called by the accept loop

    def take(self, sock: socket.socket, peer: str) -> None:
        """Register the client of an accepted socket, or begin a thread that looks after it."""
        handshake = Handshake(sock, peer, self)
        if not handshake.run_at_once():
            self._begin(handshake)

    def _begin(self, handshake: Handshake) -> None:
        thread = threading.Thread(target=handshake.run, name=f"handshake-{next(self._numbers)}",
                                  daemon=True)      # it may be in a program's `authorize` for ever
        with self._ended:
            while not (self._has_room() or self._stopping.is_set()):
                self._ended.wait(ROOM_CHECK)
            self._unfinished[handshake] = thread
            try:
                thread.start()
            except RuntimeError:        # the system gives no more threads
                del self._unfinished[handshake]
                handshake.close()

    def _has_room(self) -> bool:
        """Make room if there is none, by a cut. Requires holding the lock.

        Returns False if none can be cut: all work, or have not waited for their peer as long as
        a round of TLS takes on a busy machine.
        """
        if len(self._unfinished) < MAX_HANDSHAKES:
            return True
        before = time.monotonic() - (GRACE if self.context else 0.0)
        oldest = next((each for each in self._unfinished if each.waits_since(before)), None)
        if oldest is not None:
            self._unfinished[oldest] = self._unfinished.pop(oldest)     # last until its thread ends
            oldest.cut()
        return oldest is not None

    # Called by a handshake in its thread

    def renewed(self, handshake: Handshake) -> None:
        """Count it as the youngest: a request is done, and its connection kept for the next."""
        with self._ended:
            self._unfinished[handshake] = self._unfinished.pop(handshake)

    def done(self, handshake: Handshake) -> None:
        """Forget it: its thread ends."""
        with self._ended:
            self._unfinished.pop(handshake, None)
            self._ended.notify()

    def refused(self, status: int) -> None:
        """Count a request that was refused with this status."""
        with self._ended:
            self._refused[status] = self._refused.get(status, 0) + 1

    # Called from any thread

    @property
    def refusals(self) -> dict[str, int]:
        """How many requests were refused, by status in growing order."""
        with self._ended:
            return {str(status): self._refused[status] for status in sorted(self._refused)}

    def abandon(self) -> None:
        """In a forked child: close all sockets, of which the parent has its own."""
        for handshake in self._unfinished:
            handshake.abandon()

    def cut_all(self) -> None:
        """Cut all, and wait LINGER_TIME at most for their threads; none may begin any more."""
        with self._ended:
            unfinished = dict(self._unfinished)
        for handshake in unfinished:
            handshake.cut()
        until = time.monotonic() + LINGER_TIME
        for thread in unfinished.values():
            if thread is not threading.current_thread():        # a program's `authorize` may stop
                thread.join(max(0.0, until - time.monotonic()))


class Handshake:
    """One connection, from accept until it is closed or its socket is registered.

    `run_at_once` is for the accept loop and never waits. If it returns False, `run` goes on in a
    thread, and waits HEAD_TIME at most for each request. `cut` may be called from any thread.
    """

    def __init__(self, sock: socket.socket, peer: str, others: Handshakes) -> None:
        self._lock = threading.Lock()   # guards the next two: `cut` never meets a client's socket
        self._sock = sock
        self._is_ours = True            # False once it is registered, or closed
        self._peer = peer
        self._others = others           # among which it is when it has a thread
        self._answers = others.answers
        self._received = b""            # of the request, so far
        self._kept = False              # a request was answered, and the connection kept
        self._deadline = time.monotonic() + HEAD_TIME
        self._waiting_since = math.inf  # for its peer; inf while it does not wait, or was cut

    # Called from any thread

    def waits_since(self, before: float) -> bool:
        """Say whether it has waited for its peer since then: such a one can be cut."""
        return self._waiting_since <= before

    def cut(self) -> None:
        """End the connection, unless it is a client's: `run` returns soon."""
        self._waiting_since = math.inf
        with self._lock:
            if self._is_ours:
                _shut(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket, unless it is a client's."""
        with self._lock:
            if self._is_ours:
                self._is_ours = False
                self._sock.close()

    def abandon(self) -> None:
        """In a forked child: close the socket, of which the parent has its own."""
        if self._is_ours:
            self._sock.close()

    # Run by the accept loop

    def run_at_once(self) -> bool:
        """Register the client if its request for a stream is all there. False: call `run`."""
        if self._others.context:
            return False
        self._sock.setblocking(False)
        try:
            self._received = self._sock.recv(http1.MAX_HEAD)
            parsed = http1.parse(self._received)
            if not parsed or parsed[0].method != "GET" or self._answers.is_slow(parsed[0]):
                return False
            answer = self._answers.respond(parsed[0])
            return isinstance(answer, Opening) and self._hand_over(answer)
        except Exception:       # a refusal, a reset, a fault of ours: `run` meets it again
            return False

    # Run by either

    def _hand_over(self, opening: Opening) -> bool:
        """Register the client. Returns False, and keeps the socket, if there is no room for it."""
        with self._lock:
            self._sock.setblocking(False)
            taken = self._others.register(self._sock, opening, self._peer)
            self._is_ours = not taken
        return taken

    # Run by its thread

    def run(self) -> None:
        """Answer a request, and more if the connection is kept; or register the client."""
        try:
            if self._others.context:
                self._start_tls(self._others.context)
            while self._serve():
                self._kept = True
                self._deadline = time.monotonic() + HEAD_TIME
                self._others.renewed(self)
        except OSError as error:
            logger.debug("%s left during its request: %s", self._peer, error)
        finally:
            self.close()
            self._others.done(self)

    def _start_tls(self, context: ssl.SSLContext) -> None:
        with self._lock:
            sock = context.wrap_socket(self._sock, server_side=True, do_handshake_on_connect=False)
            self._sock = sock
        sock.settimeout(HEAD_TIME)
        self._waiting_since = time.monotonic()
        sock.do_handshake()
        self._waiting_since = math.inf

    def _serve(self) -> bool:
        """Deal with one request. Returns whether the connection is kept for the next one."""
        request = None
        try:
            request = self._read_head()
            return request is not None and self._answer(request)
        except Refusal as refusal:
            logger.debug("%s refused: %d %s", self._peer, refusal.status, refusal.text)
            self._refuse(refusal, request)
        except OSError:
            raise
        except Exception:       # a fault, ours or of `authorize`: it costs this connection alone
            logger.exception("%s: the request could not be answered", self._peer)
            self._refuse(Refusal(500, "The server could not answer this request; its log says "
                                      "why."), request)
        return False

    def _answer(self, request: Request) -> bool:
        """Answer a request, or register the client. Returns whether the connection is kept."""
        if request.method == "POST":
            self._send(self._answers.post(request, self._read_body))
            return request.keeps_alive
        answer = self._answers.respond(request)
        if isinstance(answer, Opening):
            if self._hand_over(answer):
                return False
            answer = self._answers.turn_away(request, answer)
        self._send(answer)
        return False

    def _read_head(self) -> Request | None:
        """Return the request, None if the peer closes before it is whole. Raises Refusal."""
        seen = 0
        while True:
            parsed = http1.parse(self._received, seen)
            if parsed:
                self._received = self._received[parsed[1]:]
                return parsed[0]
            seen = len(self._received)
            if not self._receive():
                return None

    def _read_body(self, request: Request) -> bytes:
        """Return the body of a POST.

        Raises Refusal for one that cannot be, ConnectionAbortedError for one that is cut short.
        """
        body = Body(request.body_length)
        rest = body.feed(self._received)
        if rest is None and request.chunked and "expect" in request.known:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        while rest is None:
            self._received = b""
            if not self._receive():
                raise ConnectionAbortedError("the body was cut short")
            rest = body.feed(self._received)
        self._received = rest
        return bytes(body.data)

    def _receive(self) -> bool:
        """Add more of the request to `_received`. Returns False at the end of the stream.

        Raises Refusal when the time of the request is up.
        """
        left = self._deadline - time.monotonic()
        try:
            if left <= 0:
                raise socket.timeout
            self._sock.settimeout(left)
            self._waiting_since = time.monotonic()
            data = self._sock.recv(PIECE)
            self._waiting_since = math.inf
        except socket.timeout:
            if self._kept and not self._received:   # a 408 could pass for the answer to what comes
                return False
            raise Refusal(408, f"The request took longer than {HEAD_TIME:g} seconds.") from None
        self._received += data
        return bool(data)

    def _send(self, answer: bytes) -> None:
        self._sock.settimeout(LINGER_TIME)
        self._sock.sendall(answer)

    def _refuse(self, refusal: Refusal, request: Request | None) -> None:
        """Send a refusal, and give the peer time to read it.

        To close while it still sends would reset the connection, and lose the answer.
        """
        self._others.refused(refusal.status)
        try:
            self._send(self._answers.refuse(refusal, request))
            _shut(self._sock, socket.SHUT_WR)
            until = time.monotonic() + LINGER_TIME
            while self._sock.recv(http1.MAX_HEAD) and time.monotonic() < until:
                pass
        except OSError:         # it does not wait to be told why
            pass


def _shut(sock: socket.socket, how: int) -> None:
    """Shut down a socket; of TLS, too, for its own `shutdown` forgets its state in mid-use."""
    try:
        socket.socket.shutdown(sock, how)
    except OSError:         # the peer was faster
        pass
