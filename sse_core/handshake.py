"""Turn an accepted socket into an answer that is sent, or a client that is registered.

A socket goes one way: accepted, Handshake, Answers, `register`. A request that has wholly arrived
goes that way in the accept loop; any other waits for its peer in a thread of its own. Those are
few, what a peer can make them wait is bounded, and the accept loop waits for none of them: who
comes when there are too many takes the place of one that waits for its peer, whatever it waits in.
"""
from __future__ import annotations

import logging
import math
import select
import socket
import ssl
import threading
import time
from collections import deque
from contextlib import suppress
from itertools import count
from typing import Any, Callable, ContextManager, TypeVar

from sse_core import http1
from sse_core.answers import Answers
from sse_core.body import Body
from sse_core.clients import Opening
from sse_core.http1 import Refusal, Request

HEAD_TIME = 10.0            # seconds for one request to arrive, however it dribbles
LINGER_TIME = 1.0           # seconds for a peer to take an answer, and to read why it was refused
MAX_HANDSHAKES = 256        # unfinished requests that have a thread
MAX_AT_WORK = 192           # of these, in `authorize` or publishing: nothing can cut those
MAX_BODIES = 16 << 20       # bytes of bodies under way in all: 256 of 1 MiB were 282 MiB
MAX_QUEUE = 1024            # that wait for a thread, because all are at work, or in grace
MOMENT = 0.2                # seconds that one waits for its peer in all before it can be cut, and
                            # each time for it to take an answer. With 1 for TLS, a newcomer waited
                            # as long where peers that say nothing come back 1000 times a second
GRACE = 1.0                 # the same for TLS that has begun: its peer may be far away
PIECE = 64 << 10            # bytes received at once

T = TypeVar("T")

logger = logging.getLogger("sse_server")


class Handshakes:
    """The handshakes that have a thread: MAX_HANDSHAKES at most, so a crowd costs no more."""

    def __init__(self, answers: Answers, register: Callable[[socket.socket, Opening, str], bool],
                 context: ssl.SSLContext | None) -> None:
        self._lock = threading.Lock()           # guards the next four
        self._unfinished: dict[Handshake, threading.Thread] = {}    # the oldest first
        self._queue: deque[Handshake] = deque()
        self._held = 0                          # bytes of bodies under way
        self._refused: dict[int, int] = {}      # requests by the status of their refusal
        self._numbers = count(1)                # for names of threads; the accept loop's own
        self.at_work = threading.Semaphore(MAX_AT_WORK)
        self.answers = answers
        self.register = register                # see Broadcast.register
        self.context = context                  # for TLS, or None

    # Called by the accept loop

    def take(self, sock: socket.socket, peer: str) -> None:
        """Register the client of an accepted socket, or begin a thread that looks after it."""
        handshake = Handshake(sock, peer, self)
        if not (handshake.run_at_once() or self._begin(handshake)):
            handshake.close()

    def _begin(self, handshake: Handshake) -> bool:
        """Give it a thread, now or when one is free. Returns False if there are too many."""
        thread = threading.Thread(target=self._run, args=[handshake],   # it may be in a program's
                                  name=f"handshake-{next(self._numbers)}", daemon=True)  # for ever
        with self._lock:
            if len(self._unfinished) >= MAX_HANDSHAKES:
                is_taken = len(self._queue) < MAX_QUEUE
                if is_taken:
                    self._queue.append(handshake)
                self._make_room()
                return is_taken
            self._unfinished[handshake] = thread
        try:
            thread.start()
        except RuntimeError:        # the system gives no more threads
            self._next(handshake)
            return False
        return True

    def _make_room(self) -> None:
        """Cut one if too few are cut for those that queue; its thread takes the next of these.

        That is who was refused or has sent nothing, else the oldest.
        """
        if not self._queue or sum(each.is_cut for each in self._unfinished) >= len(self._queue):
            return
        # All have their grace, but the less, the larger the crowd: no honest one fills the queue
        before = time.monotonic() + GRACE * (len(self._queue) / MAX_QUEUE) ** 2
        waiting = (each for each in self._unfinished if each.safe_until <= before)
        for each in sorted(waiting, key=lambda each: not each.goes_first):
            if each.cut_if_idle(before):
                break

    # Called by a handshake in its thread

    def _run(self, handshake: Handshake | None) -> None:
        while handshake:
            try:
                handshake.run()
            except BaseException:   # of a program's function: it costs this connection alone
                with suppress(BaseException):       # what a logging handler raises, too
                    logger.exception("a fault ended a request")
            handshake = self._next(handshake)

    def _next(self, done: Handshake) -> Handshake | None:
        """Forget one that is done. Returns the next for its thread, or None."""
        with self._lock:
            thread = self._unfinished.pop(done)
            following = self._queue.popleft() if self._queue else None
            if following:
                self._unfinished[following] = thread
            self._make_room()       # more came than could be cut
            return following

    def renewed(self, handshake: Handshake) -> None:
        """Count it as the youngest: a request is done, and its connection kept for the next."""
        with self._lock:
            self._unfinished[handshake] = self._unfinished.pop(handshake)

    def hold(self, length: int, held: int) -> int:
        """Count so many bytes of a body under way in place of those `held`. Raises Refusal."""
        with self._lock:
            self._held += length - held
            if length and self._held > MAX_BODIES:
                self._held -= length - held
                raise Refusal(503, "This server holds too many bodies of requests. Try again "
                                   "later.", ["Retry-After: 1"])
        return length

    def refused(self, status: int) -> None:
        """Count a request that was refused with this status."""
        with self._lock:
            self._refused[status] = self._refused.get(status, 0) + 1

    def grace_ended(self) -> None:
        """Let one that can be cut now make room for who came before."""
        with self._lock:
            self._make_room()

    # Called from any thread

    @property
    def refusals(self) -> dict[str, int]:
        """How many requests were refused, by status in growing order."""
        with self._lock:
            return {str(status): self._refused[status] for status in sorted(self._refused)}

    def abandon(self) -> None:
        """In a forked child: close all sockets, of which the parent has its own."""
        for handshake in [*self._unfinished, *self._queue]:
            handshake.close(threading.Lock())   # a thread that is not here may hold its own

    def cut_all(self) -> None:
        """Cut all, and wait LINGER_TIME at most for their threads; none may begin any more."""
        with self._lock:
            unfinished, queue = dict(self._unfinished), [*self._queue]
            self._queue.clear()
        for handshake in queue:
            handshake.close()
        for handshake in unfinished:
            handshake.cut()
        until = time.monotonic() + LINGER_TIME
        for thread in unfinished.values():
            if thread is not threading.current_thread():        # a program's `authorize` may stop
                thread.join(max(0.0, until - time.monotonic()))


class Handshake:
    """One connection, from accept until it is closed or its socket is registered."""

    def __init__(self, sock: socket.socket, peer: str, others: Handshakes) -> None:
        self._lock = threading.RLock()  # guards the next four: `cut` never meets a client's socket
        self._sock = sock
        self._is_ours = True            # False once it is registered, or closed
        # On the monotonic clock: when it can be cut, which is only while it waits for its peer. Its
        # own thread sets it, and ends a wait under the lock
        self.safe_until = math.inf
        self.is_cut = False             # it will be gone soon
        self.goes_first = True          # if one is to be cut: it sent nothing yet, or was refused
        self._peer = peer
        self._others = others           # among which it is when it has a thread
        self._answers = others.answers
        self._received = b""            # of the request, so far
        self._is_refused = False        # and can be cut, whatever it goes on to send
        self._is_whole = False          # the request: nothing more of it is under way
        self._held = 0                  # bytes of its body that are counted
        self._kept = False              # a request was answered, and the connection kept
        self._grace = MOMENT            # that is left
        self._deadline = time.monotonic() + HEAD_TIME

    # Called from any thread

    def cut(self) -> None:
        """End the connection, unless it is a client's: `run` returns soon."""
        with self._lock:
            self.is_cut = True
            if self._is_ours:
                _shut(self._sock, socket.SHUT_RDWR)

    def cut_if_idle(self, before: float) -> bool:
        """Cut it if it can be cut before then, and nothing has come. Returns whether it did."""
        with self._lock:
            is_idle = self._is_ours and self.safe_until <= before and (
                self._is_refused or not _has_input(self._sock, 0.0))
            if is_idle:
                self.cut()
            return is_idle

    def close(self, lock: ContextManager[Any] | None = None) -> None:
        """Close the socket, unless it is a client's."""
        with lock or self._lock:
            if self._is_ours:
                self._is_ours = False
                self._sock.close()

    # Run by the accept loop

    def run_at_once(self) -> bool:
        """Register or refuse whose request is all there, and never wait. False: call `run`."""
        if self._others.context:
            return False
        request = None
        try:
            self._received = self._sock.recv(http1.MAX_HEAD, socket.MSG_DONTWAIT)
            self.goes_first = not self._received
            request, _ = self._parse()
            if not request or request.method != "GET" or self._answers.is_slow(request):
                return False
            answer = self._answers.respond(request)
            return isinstance(answer, Opening) and self._hand_over(answer)
        except Refusal as refusal:
            if self._is_whole:
                self._refuse(refusal, request)      # some hundred bytes: they fit into its buffer
                self.close()
            return self._is_whole
        except Exception:       # a reset, or a fault of ours: `run` meets it again
            return False

    # Run by either

    def _parse(self, seen: int = 0) -> tuple[Request | None, int]:
        """Return the request if its head is there, and its length. Raises Refusal."""
        self._is_whole = self._received.endswith(b"\r\n\r\n")
        request, length = http1.parse(self._received, seen) or (None, 0)
        self._is_whole = request is not None and request.method != "POST"
        return request, length

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

    def _start_tls(self, context: ssl.SSLContext) -> None:
        if not self._patiently(lambda: _peek(self._sock)):
            raise ConnectionAbortedError("it sent nothing")
        self.goes_first = False
        with self._lock:
            sock = context.wrap_socket(self._sock, server_side=True, do_handshake_on_connect=False)
            self._sock = sock
        self._grace = GRACE
        self._patiently(sock.do_handshake)

    def _patiently(self, receive: Callable[[], T]) -> T:
        """Receive, and wait for that as long as it wants more. Raises socket.timeout."""
        self._sock.settimeout(0.0)
        while time.monotonic() < self._deadline:
            try:
                return receive()
            except (BlockingIOError, ssl.SSLWantReadError):
                self._wait()
        raise socket.timeout("its time was up")

    def _wait(self) -> None:
        """Wait for the peer until the deadline. Raises ConnectionAbortedError if it is cut.

        What has come stays where `cut_if_idle` sees it until it cannot be cut any more.
        """
        began = time.monotonic()
        self.safe_until = began + self._grace
        if self._grace <= 0 or not _has_input(self._sock, min(self._grace, self._deadline - began)):
            self._others.grace_ended()
            _has_input(self._sock, self._deadline - time.monotonic())
        with self._lock:
            self.safe_until = math.inf
            if self.is_cut:
                raise ConnectionAbortedError("it was cut")
        self._grace -= time.monotonic() - began

    def _work(self, work: Callable[[], T]) -> T:
        """Do what waits for no peer, so that a cut would not end it. Raises Refusal."""
        if not self._others.at_work.acquire(blocking=False):
            raise Refusal(503, "This server has too many requests to think about. Try again "
                               "later.", ["Retry-After: 5"])
        try:
            return work()
        except OSError as error:        # of a program's function: the peer has not left
            raise RuntimeError("the request could not be thought about") from error
        finally:
            self._others.at_work.release()

    def _serve(self) -> bool:
        """Deal with one request. Returns whether the connection is kept for the next one."""
        request = None
        try:
            request = self._read_head()
            return request is not None and self._answer(request)
        except Refusal as refusal:
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
            self._answers.admit_post(request)
            try:
                body = self._read_body(request)
                self._send(self._work(lambda: self._answers.post(request, body)))
            finally:
                self._held = self._others.hold(0, self._held)
            return request.keeps_alive
        answer = self._work(lambda: self._answers.respond(request))
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
            request, length = self._parse(seen)
            if request:
                self._received = self._received[length:]
                return request
            seen = len(self._received)
            if not self._receive():
                return None

    def _read_body(self, request: Request) -> bytes:
        """Return the body of a POST. Raises Refusal; ConnectionAbortedError if it is cut short."""
        body = Body(request.body_length)
        rest = body.feed(self._received)
        if rest is None and request.chunked and "expect" in request.known:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        while rest is None:
            self._held = self._others.hold(len(body.data), self._held)
            self._received = b""
            if not self._receive():
                raise ConnectionAbortedError("the body was cut short")
            rest = body.feed(self._received)
        self._received, self._is_whole = rest, True
        return bytes(body.data)

    def _receive(self) -> bool:
        """Add to `_received`; False at the end of the stream. Raises Refusal when time is up."""
        try:
            data = self._patiently(lambda: self._sock.recv(PIECE))
        except socket.timeout:
            if self._kept and not self._received:   # a 408 could pass for the answer to what comes
                return False
            raise Refusal(408, f"The request took longer than {HEAD_TIME:g} seconds.") from None
        self.goes_first = False
        self._received += data
        return bool(data)

    def _send(self, answer: bytes) -> None:
        self.safe_until = time.monotonic() + MOMENT
        self._sock.settimeout(LINGER_TIME)
        self._sock.sendall(answer)
        self.safe_until = math.inf

    def _refuse(self, refusal: Refusal, request: Request | None) -> None:
        """Send a refusal. If the peer may still be sending, give it time to read that.

        To close while input is under way would reset the connection, and lose the answer.
        """
        logger.debug("%s refused: %d %s", self._peer, refusal.status, refusal.text)
        self._others.refused(refusal.status)
        self.goes_first = self._is_refused = True
        try:
            self._send(self._answers.refuse(refusal, request))
            self.safe_until = 0.0
            until = time.monotonic() + LINGER_TIME
            if not self._is_whole:
                _shut(self._sock, socket.SHUT_WR)
                while self._sock.recv(http1.MAX_HEAD) and time.monotonic() < until:
                    pass
        except OSError:         # it does not wait to be told why
            pass


def _peek(sock: socket.socket) -> bytes:
    """Receive a byte, and leave it there; of TLS, too, whose own `recv` cannot."""
    return socket.socket.recv(sock, 1, socket.MSG_PEEK)


def _has_input(sock: socket.socket, seconds: float) -> bool:
    """Wait so long until there is something to be received, or an end or a fault."""
    poll = select.poll()        # MSG_DONTWAIT does wait, if the socket has a timeout
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(max(0, math.ceil(seconds * 1000))))


def _shut(sock: socket.socket, how: int) -> None:
    """Shut down a socket; of TLS, too, for its own `shutdown` forgets its state in mid-use."""
    try:
        socket.socket.shutdown(sock, how)
    except OSError:         # the peer was faster
        pass
