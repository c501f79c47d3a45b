"""Turn connections into registered clients: the command line, the accept loop, the handshake; start and stop.

    python sse_server.py --port 6500        streams the clock; Enter stops it
    curl -N http://127.0.0.1:6500/token     watches it

Threads: `accept` accepts, and answers on the spot what has wholly arrived; a short-lived `handshake-N` looks after any
other request; `publisher` (publisher.py) owns every registered socket; `source` (sources.py) makes events; main waits.

Who owns what:

    attribute           guarded by          changed by                      read by
    _handshakes         _handshakes_lock    accept loop, handshakes, stop   the same
    _refused            _handshakes_lock    handshakes                      any thread
    _stopping           itself              stop                            all
    _started, _stopped  _lifecycle          start, stop                     the same; publish
    _accept_failed_at   -                   accept loop                     accept loop
    every Handshake     -                   accept loop, then its thread    only `cut` is for others
"""
import argparse
import errno
import json
import logging
import math
import os
import re
import select
import signal
import socket
import socketserver
import ssl
import sys
import sysconfig
import threading
import time
from itertools import count
from pathlib import Path
from typing import Callable, Dict, List, NoReturn, Optional, Sequence, Tuple, Union

from sse_core import frames
from sse_core import http1
from sse_core import sources
from sse_core.http1 import Refusal, Request
from sse_core.redis_stream import FIRST_PAUSE, REDIS_TIMEOUT, RedisStream
from publisher import Publisher
from sse_core.broadcast import Broadcast, NotRunning, Unavailable

HEAD_TIME = 10.0            # seconds for one request to arrive, however it dribbles
LINGER_TIME = 1.0           # seconds for a refused client to read why before its connection is cut
MAX_HANDSHAKES = 256        # unfinished requests; the oldest makes room for the next
GRACE = 1.0                 # seconds that a TLS handshake has before it can be the one that makes room
BACKLOG = 1024              # connections the kernel holds ready for accept
SEND_BUFFER = 64 << 10      # bytes of kernel memory for each client; else it takes 4 MiB for a stalled one
ACCEPT_PAUSE = 0.1          # seconds to wait when the process is out of descriptors
RECOVERED = 10.0            # seconds without a failure after which the next one is worth a warning again
RECORD = 16 << 10           # bytes of data in a TLS record, at most (RFC 8446 section 5.1)
CLEAR_LINE = "\r\x1b[K"     # of a terminal
PROGRAM = Path(sys.argv[0]).name or "sse_server.py"
PAGE_FOLDERS = (Path(__file__).parent, *(     # in a checkout; else where installing puts it, for all or for one user
    Path(data, "share", "sse-server") for data in (sysconfig.get_path("data"), sysconfig.get_path("data", f"{os.name}_user"))))
PAGE = next((page for page in (folder / "index.html" for folder in PAGE_FOLDERS) if page.exists()), None)
_ORIGIN = re.compile("null|[a-z][a-z0-9+.-]*://[^/A-Z]+")     # RFC 6454 section 6.2
HTML = "text/html; charset=utf-8"

log = logging.getLogger("sse_server")


class SSEServer(socketserver.ThreadingTCPServer):
    """Serve one stream of events to every client that asks for it.

    host, port: where to listen, from the constructor on (OSError if that cannot be); port 0 picks a free one.
    history: events kept for clients that come back; 0: no ids, the wire of the original.
    heartbeat: seconds of silence after which a client is sent a comment; 0: never.
    retry: seconds a client should wait before it reconnects, told with +-50 % jitter.
    max_clients: how many clients there can be at a time.
    patience: seconds in which a slow client must take 16 KiB each, to be waited for by `publish(..., wait=True)`.
    tokens: who may watch, by `/TOKEN` or `Authorization: Bearer TOKEN`; none: everybody.
    publish_tokens: who may POST events, in the same way; none: nobody.
    authorize: a function of the `http1.Request` that says who may watch, in place of `tokens`. It is called in a
        handshake thread, so it may take its time, of which others lose nothing; if it raises, the answer is a 500.

    origins: of the pages that may read answers and publish, as `https://example.org`; none: every page may.
    cert, key: PEM files (the key may be in the first) for TLS; OSError or ssl.SSLError if they cannot be used.

    redis, stream: redis://HOST:PORT/DB and the key of a stream there, that takes the place of this server's own events:
        what is published on any server goes to it, and comes back to the clients of all. Needs the package `redis`.

    Use it as a context manager, or call `start` and `stop`. All methods may be called from any thread. Raises
    ValueError for an option that cannot be.
    """
    allow_reuse_address = True
    request_queue_size = BACKLOG

    def __init__(self, host: str = "127.0.0.1", port: int = 6500, *, history: int = 1024, heartbeat: float = 15.0,
                 retry: float = 3.0, max_clients: int = 10000, patience: float = 5.0, tokens: Sequence[str] = (),
                 publish_tokens: Sequence[str] = (), authorize: Optional[Callable[[Request], bool]] = None,
                 origins: Sequence[str] = (), cert: Optional[str] = None, key: Optional[str] = None,
                 redis: Optional[str] = None, stream: str = "sse") -> None:
        self._handshakes_lock = threading.Condition()       # notified when a handshake ends
        self._handshakes: Dict["Handshake", threading.Thread] = {}      # the oldest first
        self._refused: Dict[int, int] = {}      # requests by the status with which they were refused
        self._lifecycle = threading.RLock()
        self._started = False
        self._stopped = False
        self._stopping = threading.Event()
        self._numbers = count(1)
        self._accept_failed_at = -math.inf
        self._page = PAGE.read_bytes() if PAGE else None
        self._retry = retry
        if "" in (*tokens, *publish_tokens):
            raise ValueError("a token is empty: anybody would have it")
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"the origin {origin!r} is not one as browsers send it: scheme://host[:port], or null")
        self._tokens = [token.encode() for token in tokens]
        self._publish_tokens = [token.encode() for token in publish_tokens]
        self._authorize = authorize
        self._origins = frozenset(origins)
        self.tls = tls_context(cert, key) if cert else None
        self._stream = RedisStream(redis, stream, history) if redis else None
        if ":" in host:
            self.address_family = socket.AF_INET6
        self.on_fault: Callable[[], None] = lambda: None    # called when a fault in one of its threads ends the server
        self._broadcast = Broadcast(history=history, retry=retry, max_clients=max_clients, patience=patience,
                                    shared=self._stream is not None, on_fault=lambda: self.on_fault())
        self._publisher = Publisher(self._broadcast, heartbeat)
        try:
            super().__init__((host, port), Handshake)
        except BaseException:
            self._publisher.join()
            raise
        self._acceptor = self._thread("accept", self.serve_forever)
        self._follower = self._thread("source", self._follow) if self._stream else None

    def _thread(self, name: str, target: Callable[[], None]) -> threading.Thread:
        return threading.Thread(target=self._broadcast.run, args=(target,), name=name)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self.server_address[1]

    @property
    def url(self) -> str:
        """Where a client on this machine finds it."""
        host = self.server_address[0]
        return f"http{'s' if self.tls else ''}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def clients(self) -> int:
        """How many clients are registered."""
        return len(self._broadcast)

    def start(self) -> "SSEServer":
        """Start the threads. Does nothing if they run; raises NotRunning after `stop`: then make a new server."""
        with self._lifecycle:
            if self._stopped:
                raise NotRunning("the server was stopped; make a new one")
            if not self._started:
                if self._stream:
                    self._stream.load(self._broadcast, time.time())
                self._publisher.start()
                self._started = True
                log.info("listening on %s", self.url)
                self._acceptor.start()
                if self._follower:
                    self._follower.start()
        return self

    def stop(self) -> None:
        """Stop within 3 seconds: clients get what is in the log, their streams end, threads and sockets are gone.

        Does nothing the second time; returns when the server has stopped, whoever stops it. Raises RuntimeError, from its
        cause, if a fault in one of the server's threads had ended it before.
        """
        self._stopping.set()
        with self._lifecycle:
            if self._stopped:
                return
            self._stopped = True
            clients = self.clients
            if self._acceptor.is_alive():
                self._connect_to_self()
                self._acceptor.join()
            self._cut_handshakes()
            self._broadcast.stop()
            if self._started:       # not before: a handler that publishes must not find the server running
                log.info("stopping with %d clients", clients)
            self._publisher.join()
            self.server_close()
            if self._follower and self._follower.is_alive():
                self._follower.join(REDIS_TIMEOUT)
            if self._started:
                log.info("stopped")
            if self._broadcast.fault:
                raise RuntimeError("a fault has ended the server") from self._broadcast.fault

    shutdown = stop     # what socketserver calls it

    def publish(self, data: str, event: Optional[str] = None, channel: Optional[str] = None, wait: bool = False
                ) -> Optional[str]:
        """Publish an event and return its id, or None with `history=0`; it is on its way then, not yet received.

        data: text of at most 1 MiB. event: its name. channel: only for clients that asked for it; None: for everyone.
        wait: hold back for clients that are slow, see `patience`. Raises ValueError for what no event can hold,
        NotRunning before `start` and after `stop`, Unavailable if Redis does not take it (without `wait`, which waits
        for Redis too; an event whose answer was lost may then be published twice).
        """
        if not self._started:
            raise NotRunning("the server has not been started")
        if self._stream:
            return self._publish_to_stream(data, event, channel, wait)
        return self._broadcast.publish(data, event, channel, wait)

    def _publish_to_stream(self, data: str, event: Optional[str], channel: Optional[str], wait: bool) -> str:
        """Add an event to the Redis stream; if the source can wait, as long as Redis is away."""
        frames.check_event(event, channel)
        frames.encode(data)
        while True:
            self._broadcast.check_running()
            try:
                return self._stream.publish(data, event, channel)
            except Unavailable:
                if not wait:
                    raise
                self._stopping.wait(FIRST_PAUSE)

    def _follow(self) -> None:
        self._stream.follow(self._broadcast, self._stopping)

    def drain(self) -> None:
        """Wait until all clients have every event; those that do not keep the pace (`patience`) are not waited for."""
        self._broadcast.drain()

    def __enter__(self) -> "SSEServer":
        try:
            return self.start()
        except RuntimeError:        # the system gives no more threads
            self.stop()
            raise

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    def _connect_to_self(self) -> None:
        """Unblock accept, which then sees the stop flag."""
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(self.server_address[0], self.server_address[0])
        try:
            socket.create_connection((host, self.port), timeout=1.0).close()
        except OSError:         # no descriptor is left, or the backlog is full: this works on Linux without either
            self.socket.shutdown(socket.SHUT_RDWR)

    def _cut_handshakes(self) -> None:
        with self._handshakes_lock:
            unfinished = list(self._handshakes.items())
        for handshake, _ in unfinished:
            handshake.cut()
        until = time.monotonic() + LINGER_TIME
        for _, thread in unfinished:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))

    # Called in the constructor, by socketserver

    def server_activate(self) -> None:
        """Listen. What is set on a listening socket holds for the accepted ones, and so costs nothing for each."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().server_activate()

    # Run by the accept loop

    def serve_forever(self, poll_interval: float = 0) -> None:
        """Accept until the stop flag is set; `stop` connects to unblock it, so there is nothing to poll."""
        while not self._stopping.is_set():
            try:
                sock, address = self.get_request()
            except OSError as error:
                self._accept_failed(error)
                continue
            self.process_request(sock, address)

    def _accept_failed(self, error: OSError) -> None:
        """Pause when there is nothing to accept with: the connections wait in the backlog meanwhile."""
        if error.errno == errno.ECONNABORTED or self._stopping.is_set():
            return
        last, self._accept_failed_at = self._accept_failed_at, time.monotonic()
        if self._accept_failed_at - last > RECOVERED:
            log.warning("cannot accept (%s); trying again until it works", error.strerror)
        self._stopping.wait(ACCEPT_PAUSE)

    def process_request(self, sock: socket.socket, address: Sequence) -> None:
        """Answer a request that has wholly arrived; leave any other to a handshake thread."""
        handshake = Handshake(self, sock, "%s:%d" % address[:2])
        if self._stopping.is_set():
            sock.close()
        elif not handshake.run_at_once():
            self._start_handshake(handshake)

    def _start_handshake(self, handshake: "Handshake") -> None:
        thread = threading.Thread(target=handshake.run, name=f"handshake-{next(self._numbers)}", daemon=True)
        with self._handshakes_lock:
            while len(self._handshakes) >= MAX_HANDSHAKES and not self._cut_oldest() and not self._stopping.is_set():
                self._handshakes_lock.wait(ACCEPT_PAUSE)
            self._handshakes[handshake] = thread
            try:
                thread.start()
            except RuntimeError:        # the system gives no more threads
                del self._handshakes[handshake]
                handshake.close()

    def _cut_oldest(self) -> bool:
        """Make room by cutting the oldest request that waits for its peer. Requires holding _handshakes_lock.

        Returns False if there is none: all work, or did not have the time that a round of TLS takes on a busy machine.
        """
        before = time.monotonic() - (GRACE if self.tls else 0.0)
        oldest = next((handshake for handshake in self._handshakes if handshake.waits_since(before)), None)
        if oldest is not None:
            self._handshakes[oldest] = self._handshakes.pop(oldest)     # it goes to the end until its thread ends
            oldest.cut()
        return oldest is not None

    # Called by handshakes, in the accept loop or in a thread of theirs

    def handshake_renewed(self, handshake: "Handshake") -> None:
        """Count a handshake as the youngest: one request is done, and its connection is kept for the next."""
        with self._handshakes_lock:
            self._handshakes[handshake] = self._handshakes.pop(handshake)

    def handshake_done(self, handshake: "Handshake") -> None:
        """Forget a handshake whose thread ends."""
        with self._handshakes_lock:
            self._handshakes.pop(handshake, None)
            self._handshakes_lock.notify()

    def is_slow(self, request: Request) -> bool:
        """Whether a request for the stream can take long to look at: then it is not for the accept loop."""
        return self._authorize is not None or request.path.startswith("/-/")

    def respond(self, request: Request) -> Tuple[bytes, bool]:
        """Return the answer to a request without a body, and whether it is the head of a stream to be registered."""
        if request.method == "OPTIONS":
            return http1.answer(204, fields=self._preflight(request)), False
        head_only = request.method == "HEAD"
        if request.path == "/favicon.ico":
            raise Refusal(404, "There is no icon here.")
        if self._page and request.path == "/" and request.accepts("text/html"):
            return http1.answer(200, self._page, content_type=HTML, head_only=head_only), False
        self._admit(request)
        if request.path in ("/-/metrics", "/-/status"):
            return self._report(request), False
        self._channels(request)
        return self._stream_head(request), not head_only

    def _report(self, request: Request) -> bytes:
        """Return the metrics, or the status."""
        fields = ["Cache-Control: no-store", *self._cross_origin(request)]
        if request.path == "/-/metrics":
            body, content_type = metrics(self.figures()), "text/plain; version=0.0.4; charset=utf-8"
        else:
            body, content_type = json.dumps(self.status()) + "\n", "application/json"
        return http1.answer(200, body.encode(), fields, content_type=content_type, head_only=request.method == "HEAD")

    def status(self) -> dict:
        """Return what `/-/status` shows. Times are seconds, `since` is since the epoch; at most 1000 clients are named."""
        return {**self.figures(), "list": self._broadcast.describe_clients()}

    def figures(self) -> dict:
        """Return the figures of `status`, without the list of clients. `turn_seconds` are those of all `turns`."""
        return {**self._publisher.figures(), "refused": {str(status): count for status, count in self._refused.copy().items()}}

    def _admit(self, request: Request) -> None:
        """Raise Refusal for a request that may not watch."""
        if self._authorize is not None:
            admitted = self._authorize(request)
        else:
            admitted = not self._tokens or request.has_token(self._tokens)
        if not admitted:
            raise Refusal(401, "Name a token: GET /TOKEN, or the header field Authorization: Bearer TOKEN.",
                          ["WWW-Authenticate: Bearer"])

    def admit_post(self, request: Request) -> None:
        """Raise Refusal for a POST that may not publish; to be asked before its body is read."""
        if self._origins and not self._is_own_origin(request) and request.fields.get("origin") not in (None, *self._origins):
            raise Refusal(403, "Pages of this origin may not publish: it is not among those of --origin.")
        if not self._publish_tokens:
            raise Refusal(403, "Publishing is not enabled: the server was started without --publish-token.")
        if not request.has_token(self._publish_tokens):
            raise Refusal(401, "Name the publish token: POST /TOKEN, or the header field Authorization: Bearer TOKEN.",
                          ["WWW-Authenticate: Bearer"])

    def post(self, request: Request, body: bytes, keep_alive: bool) -> bytes:
        """Publish the body of a POST and return the answer."""
        try:
            id = self.publish(body.decode(), request.parameter("event"), request.parameter("channel"))
        except UnicodeDecodeError:
            raise Refusal(400, "The body is not UTF-8.") from None
        except ValueError as error:
            raise Refusal(400, f"This is no event: {error}.") from None
        except NotRunning:
            raise Refusal(503, "The server is stopping.", ["Retry-After: 1"]) from None
        except Unavailable as error:
            raise Refusal(503, f"{error}. Try again later; it may have been published.", ["Retry-After: 5"]) from None
        return http1.answer(200, json.dumps({"id": id}).encode() + b"\n", self._cross_origin(request),
                            content_type="application/json", keep_alive=keep_alive)

    @staticmethod
    def _channels(request: Request) -> List[str]:
        """Return the channels that a client asks for. Raises Refusal."""
        channels = request.query.get("channel", [])
        try:
            for channel in channels:
                frames.check_channel(channel)
        except ValueError as error:
            raise Refusal(400, f"This channel cannot be: {error}.") from None
        return channels

    def register(self, sock: socket.socket, request: Request, head: bytes, peer: str) -> bool:
        """Hand a socket over to the publisher. Returns False, and the socket stays the caller's, if it takes no more."""
        sock.setblocking(False)
        return self._broadcast.register(sock, head, peer=peer, chunked=request.chunked,
                                        channels=self._channels(request), last_id=request.last_id)

    def turn_away(self, request: Request, head: bytes) -> bytes:
        """Return the answer to a client that cannot be registered. Raises Refusal for one that is no EventSource."""
        if not request.accepts("text/event-stream"):
            raise Refusal(503, "This server takes no more clients now. Try again later.", ["Retry-After: 10"])
        retry = frames.greeting(10 * max(1.0, self._retry), None)      # EventSource would give up for good on a 503
        return head + (retry + frames.END if request.chunked else frames.unchunk(retry))

    def _is_own_origin(self, request: Request) -> bool:
        """Say whether the request comes from a page that this server itself sent."""
        return request.fields.get("origin", "") == f"http{'s' if self.tls else ''}://{request.fields.get('host', '')}"

    def refuse(self, refusal: Refusal, request: Optional[Request]) -> bytes:
        """Return the answer that tells a client what was wrong; the request is None if it could not be read."""
        with self._handshakes_lock:
            self._refused[refusal.status] = self._refused.get(refusal.status, 0) + 1
        fields = [*refusal.fields, *self._cross_origin(request)]
        head_only = request is not None and request.method == "HEAD"
        return http1.answer(refusal.status, f"{refusal.text}\n".encode(), fields, head_only=head_only)

    def _stream_head(self, request: Request) -> bytes:
        """Return the head of a stream: the original's four lines in their order, then those for proxies."""
        lines = ["HTTP/1.1 200 OK", "Content-Type: text/event-stream",
                 "Transfer-Encoding: chunked" if request.chunked else "Connection: close", *self._cross_origin(request),
                 "Cache-Control: no-cache, no-transform", "X-Accel-Buffering: no", "", ""]
        return "\r\n".join(lines).encode()

    def _cross_origin(self, request: Optional[Request]) -> List[str]:
        """Return the fields that let a page of another origin read the answer (WHATWG Fetch section 3.2)."""
        if not self._origins:
            return ["Access-Control-Allow-Origin: *"]
        origin = request.fields.get("origin") if request else None
        return [f"Access-Control-Allow-Origin: {origin}", "Vary: Origin"] if origin in self._origins else ["Vary: Origin"]

    def _preflight(self, request: Request) -> List[str]:
        return [*self._cross_origin(request), f"Access-Control-Allow-Methods: {', '.join(http1.METHODS)}",
                "Access-Control-Allow-Headers: Authorization, Cache-Control, Content-Type, Last-Event-ID",
                "Access-Control-Max-Age: 86400"]


class Handshake:
    """One connection, from accept until it is answered or its socket is handed to the publisher.

    `run_at_once` is for the accept loop and never waits. If it returns False, `run` goes on in a thread and waits for
    the peer, for HEAD_TIME in all. `cut` may be called from any thread, and makes `run` return.
    """

    def __init__(self, server: SSEServer, sock: socket.socket, peer: str) -> None:
        self._lock = threading.Lock()       # guards _sock, so that `cut` never meets one that the publisher owns
        self._sock: Optional[socket.socket] = sock      # None once it is handed over or closed
        self._server = server
        self._peer = peer
        self._received = b""                # of the request, so far
        self._kept = False                  # an answer was sent, and the connection kept for the next request
        self._deadline = time.monotonic() + HEAD_TIME
        self._waiting_since = math.inf      # when it began to wait for the peer; inf while it does not, or was cut

    def waits_since(self, before: float) -> bool:
        """Say whether it has waited for its peer since then: such a one can be cut."""
        return self._waiting_since <= before

    def cut(self) -> None:
        """Make room: end the connection if it is still in the handshake."""
        self._waiting_since = math.inf
        with self._lock:
            if self._sock is not None:
                _shut(self._sock, socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            if self._sock is not None:
                self._sock.close()
                self._sock = None

    # Run by the accept loop

    def run_at_once(self) -> bool:
        """Register the client if its request for the stream is all there. Else return False: `run` is to go on."""
        if self._server.tls:
            return False
        self._sock.setblocking(False)
        try:
            self._received = self._sock.recv(http1.MAX_HEAD)
            parsed = http1.parse(self._received)
            if parsed is None or parsed[0].method != "GET" or self._server.is_slow(parsed[0]):
                return False
            head, is_stream = self._server.respond(parsed[0])
            return is_stream and self._hand_over(parsed[0], head)
        except Exception:       # a refusal, a reset, a fault of ours: `run` meets it again, and deals with it
            return False

    def _hand_over(self, request: Request, head: bytes) -> bool:
        with self._lock:
            taken = self._server.register(self._sock, request, head, self._peer)
            if taken:
                self._sock = None
        return taken

    # Run by a thread of its own

    def run(self) -> None:
        """Answer a request, and further ones if the connection is kept; or hand the socket over."""
        try:
            if self._server.tls:
                self._start_tls(self._server.tls)
            while self._serve():
                self._kept = True
                self._deadline = time.monotonic() + HEAD_TIME
                self._server.handshake_renewed(self)
        except OSError as error:
            log.debug("%s left during its request: %s", self._peer, error)
        finally:
            self.close()
            self._server.handshake_done(self)

    def _start_tls(self, context: ssl.SSLContext) -> None:
        with self._lock:
            self._sock = context.wrap_socket(self._sock, server_side=True, do_handshake_on_connect=False)
        self._sock.settimeout(HEAD_TIME)
        self._waiting_since = time.monotonic()
        self._sock.do_handshake()
        self._waiting_since = math.inf

    def _serve(self) -> bool:
        """Deal with one request. Returns whether the connection is kept for the next one."""
        request = None
        try:
            request = self._read_head()
            return request is not None and self._answer(request)
        except Refusal as refusal:
            log.debug("%s refused: %d %s", self._peer, refusal.status, refusal.text)
            self._refuse(refusal, request)
        except OSError:
            raise
        except Exception:       # of a program's `authorize`, or a fault of ours: it costs this connection alone
            log.exception("%s: the request could not be answered", self._peer)
            self._refuse(Refusal(500, "The server could not answer this request; its log says why."), request)
        return False

    def _answer(self, request: Request) -> bool:
        if request.method == "POST":
            return self._answer_post(request)
        answer, is_stream = self._server.respond(request)
        if is_stream:
            if self._hand_over(request, answer):
                return False
            answer = self._server.turn_away(request, answer)
        self._send(answer)
        return False

    def _answer_post(self, request: Request) -> bool:
        self._server.admit_post(request)
        body = self._read_body(request)
        keep_alive = request.keeps_alive
        self._send(self._server.post(request, body, keep_alive))
        return keep_alive

    def _refuse(self, refusal: Refusal, request: Optional[Request]) -> None:
        try:
            self._send(self._server.refuse(refusal, request))
            self._linger()
        except OSError:         # it does not wait to be told why
            pass

    def _read_head(self) -> Optional[Request]:
        """Return the request, None if the client closes before it is whole. Raises Refusal."""
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
        """Return the body of a POST. Raises Refusal, also for one that cannot be or is cut short."""
        length = request.body_length
        if request.chunked and request.fields.get("expect", "").lower() == "100-continue" and len(self._received) < length:
            self._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        parts, missing = [self._received], length - len(self._received)
        while missing > 0:
            self._received = b""
            if not self._receive():
                raise ConnectionAbortedError("the body was cut short")
            parts.append(self._received)
            missing -= len(self._received)
        whole = b"".join(parts)
        self._received = whole[length:]
        return whole[:length]

    def _receive(self) -> bool:
        """Receive more of the request, within what is left of its time. Returns False at the end of the stream."""
        left = self._deadline - time.monotonic()
        try:
            if left <= 0:
                raise socket.timeout
            self._sock.settimeout(left)
            self._waiting_since = time.monotonic()
            data = self._sock.recv(65536)
            self._waiting_since = math.inf
        except socket.timeout:
            if self._kept and not self._received:       # a 408 could pass for the answer to what comes just now
                return False
            raise Refusal(408, f"The request took longer than {HEAD_TIME:g} seconds.") from None
        self._received += data
        return bool(data)

    def _send(self, answer: bytes) -> None:
        self._sock.settimeout(LINGER_TIME)
        self._sock.sendall(answer)

    def _linger(self) -> None:
        """Let a refused client read why: closing while it still sends would reset the connection and the answer."""
        _shut(self._sock, socket.SHUT_WR)
        until = time.monotonic() + LINGER_TIME
        while self._sock.recv(http1.MAX_HEAD) and time.monotonic() < until:
            pass


def _shut(sock: socket.socket, how: int) -> None:
    try:
        socket.socket.shutdown(sock, how)       # of a TLS socket too: its own would forget its state in mid-use
    except OSError:         # the peer was faster
        pass


def metrics(figures: dict) -> str:
    """Return the figures in the text format of Prometheus, version 0.0.4."""
    lines: List[str] = []

    def add(name: str, kind: str, text: str, *samples: Tuple[str, float]) -> None:
        lines.extend((f"# HELP {name} {text}", f"# TYPE {name} {kind}"))
        lines.extend(f"{name}{suffix} {value}" for suffix, value in samples)
    add("sse_clients", "gauge", "Clients that are connected.", ("", figures["clients"]))
    add("sse_lagging_clients", "gauge", "Clients whose socket would not take all.", ("", figures["lagging"]))
    add("sse_events_total", "counter", "Events published.", ("", figures["events"]))
    add("sse_deliveries_total", "counter", "Events sent, over all clients.", ("", figures["deliveries"]))
    add("sse_sent_bytes_total", "counter", "Bytes sent to clients.", ("", figures["bytes"]))
    add("sse_gaps_total", "counter", "Gaps that clients were told.", ("", figures["gaps"]))
    add("sse_drops_total", "counter", "Clients gone, by reason.",
        *((f'{{reason="{reason}"}}', count) for reason, count in figures["drops"].items()))
    add("sse_refused_total", "counter", "Requests refused, by status.",
        *((f'{{status="{status}"}}', count) for status, count in sorted(figures["refused"].items())))
    add("sse_turn_seconds", "summary", "Time of the publisher's turns, without waiting.",
        ("_sum", figures["turn_seconds"]), ("_count", figures["turns"]))
    return "\n".join(lines) + "\n"


class TLSSocket(ssl.SSLSocket):
    """A TLS socket that behaves like a plain one: it says BlockingIOError, and may be offered other bytes after that.

    OpenSSL encrypts a record, of RECORD bytes at most, before it finds the socket full, and wants to be offered the
    same again (SSL_write(3), the notes on retries). So such a record is kept, and all but its last byte reported as
    sent: the caller, who comes back with that byte, sends it off and needs to know nothing of it.
    """
    _begun = b""        # a record that OpenSSL has begun, all but whose last byte the caller thinks sent

    def send(self, data: Union[bytes, memoryview], flags: int = 0) -> int:
        if self._begun:
            self._offer(self._begun)
            self._begun = b""
            return 1
        piece = bytes(data[:RECORD])
        try:
            return self._offer(piece)
        except BlockingIOError:
            self._begun = piece
            if len(piece) == 1:
                raise
            return len(piece) - 1

    def _offer(self, data: bytes) -> int:
        try:
            return super().send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def recv(self, size: int = 1024, flags: int = 0) -> bytes:
        try:
            return super().recv(size, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None


def _no_password() -> NoReturn:
    raise ValueError("its key is encrypted, and a service has nobody to type a password")


def tls_context(cert: str, key: Optional[str]) -> ssl.SSLContext:
    """Return a server's context for this certificate. Raises OSError or ssl.SSLError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslsocket_class = TLSSocket
    context.load_cert_chain(cert, key, password=_no_password)
    return context


def parse_arguments(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    """Parse the command line; a bad one ends the process with one line on standard error and status 2."""
    parser = Parser(prog=PROGRAM, description="A small Server-Sent Events server.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=port_number, default=6500, help="port to listen on; 0 picks one (default 6500)")
    parser.add_argument("--interval", type=seconds, default=1.0, metavar="SECONDS",
                        help="time between two ticks of the clock (default 1)")
    parser.add_argument("--stdin", action="store_true", help="each line of standard input is an event, in place of the "
                        "clock; after the last one, everyone served, the server stops")
    parser.add_argument("--redis", metavar="URL", help="redis://HOST:PORT/DB: events come from a Redis stream, and what is "
                        "published goes to it, so that many servers serve the same")
    parser.add_argument("--stream", default="sse", metavar="KEY", help="key of that stream (default sse)")
    parser.add_argument("--patience", type=seconds_or_none, default=5.0, metavar="SECONDS",
                        help="--stdin waits for a slow client that takes 16 KiB a second, over so many seconds "
                        "(default 5; 0: for none)")
    parser.add_argument("--token", action="append", default=[], metavar="TOKEN",
                        help="who may watch; can be repeated, and come from SSE_TOKEN instead (default: everybody)")
    parser.add_argument("--publish-token", metavar="TOKEN",
                        help="who may publish by POST; can come from SSE_PUBLISH_TOKEN instead (default: nobody)")
    parser.add_argument("--origin", action="append", default=[], metavar="ORIGIN",
                        help="of pages that may read and publish, as https://example.org; can be repeated (default: all)")
    parser.add_argument("--cert", metavar="FILE", help="certificate chain for TLS, PEM")
    parser.add_argument("--key", metavar="FILE", help="its key, if that is not in the same file")
    parser.add_argument("--history", type=whole_number, default=1024, metavar="FRAMES", help="events kept for clients "
                        "that come back; 0: no ids, the wire of the original (default 1024)")
    parser.add_argument("--heartbeat", type=seconds_or_none, default=15.0, metavar="SECONDS",
                        help="silence after which a client is sent a comment; 0: never (default 15)")
    parser.add_argument("--retry", type=seconds_or_none, default=3.0, metavar="SECONDS",
                        help="pause of a client before it reconnects, +-50 %% at random (default 3)")
    parser.add_argument("--max-clients", type=whole_number, default=10000, metavar="N",
                        help="clients at a time (default 10000)")
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("--verbose", action="store_true", help="log connects and disconnects too")
    loudness.add_argument("--quiet", action="store_true", help="log warnings only")
    options = parser.parse_args(arguments)
    options.token += os.environ.get("SSE_TOKEN", "").split()
    options.publish_token = options.publish_token or os.environ.get("SSE_PUBLISH_TOKEN")
    if options.key and not options.cert:
        parser.error("--key needs --cert")
    if options.stdin and sys.stdin is None:
        parser.error("--stdin needs a standard input")
    return options


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help shows the options)\n")


def port_number(text: str) -> int:
    return number(text, int, lambda value: 0 <= value < 65536, "a port from 0 to 65535")


def whole_number(text: str) -> int:
    return number(text, int, lambda value: 0 <= value < 1 << 31, "a whole number from 0 on")


def seconds(text: str) -> float:
    return number(text, float, lambda value: 0 < value < 1e6, "a number of seconds above 0")


def seconds_or_none(text: str) -> float:
    return number(text, float, lambda value: 0 <= value < 1e6, "a number of seconds from 0 on")


def number(text: str, kind: Callable, fits: Callable, description: str):
    """Convert an option's value, or raise the error that argparse reports."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {description}")
    return value


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the server until Enter, SIGINT or SIGTERM. Returns the exit status. Call it in the main thread."""
    options = parse_arguments(arguments)
    set_up_logging(options)
    try:
        server = make_server(options)
    except ValueError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    wakee, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)      # that it came is read from the wake-up socket
    print(f"{'' if options.stdin else 'Press enter to terminate' + chr(10)}Listening on {server.url}", flush=True)
    stopping = threading.Event()
    source = server._thread("source", lambda: run_source(server, options, stopping, waker))
    server.on_fault = lambda: waker.send(b"\0")
    try:
        with server:
            source.start()
            wait_for_stop(wakee, not options.stdin, StatusLine(server) if sys.stderr.isatty() and not options.quiet else None)
            stopping.set()
    except RuntimeError:        # it was logged when it happened
        return 1
    finally:
        if source.ident is not None:        # else the server could not start
            source.join()
    return 0


def make_server(options: argparse.Namespace) -> SSEServer:
    """Return the server that the command line asks for. Raises OSError or ValueError with a text for its user."""
    try:
        tls_context(options.cert, options.key) if options.cert else None
    except OSError as error:        # ssl.SSLError is one too
        raise ValueError(f"cannot use {options.cert} and {options.key or 'the key in it'}: {error.strerror or error}") from None
    try:
        return SSEServer(
            options.host, options.port, history=options.history, heartbeat=options.heartbeat, retry=options.retry,
            max_clients=options.max_clients, tokens=options.token, origins=options.origin, cert=options.cert,
            publish_tokens=[options.publish_token] if options.publish_token else [], key=options.key,
            patience=options.patience, redis=options.redis, stream=options.stream)
    except OSError as error:
        raise ValueError(f"cannot listen on {options.host} port {options.port}: {error.strerror}") from None


def run_source(server: SSEServer, options: argparse.Namespace, stopping: threading.Event, waker: socket.socket) -> None:
    """Publish what the source that was asked for gives, until its end; then, everyone served, have the server stop."""
    try:
        if options.stdin:
            sources.lines(server.publish, stopping, sys.stdin.fileno())
            server.drain()
        elif options.redis:
            stopping.wait()
        else:
            sources.clock(server.publish, stopping, options.interval)
    finally:
        waker.send(b"\0")


def set_up_logging(options: argparse.Namespace) -> None:
    """Log to standard error; on a terminal, over the status line."""
    level = logging.DEBUG if options.verbose else logging.WARNING if options.quiet else logging.INFO
    logging.basicConfig(format=(CLEAR_LINE if sys.stderr.isatty() else "") + "%(message)s")
    log.setLevel(level)


class StatusLine:
    """One line at the bottom of a terminal that renews itself."""

    def __init__(self, server: SSEServer) -> None:
        self._server = server
        self._last = time.monotonic(), 0

    def show(self) -> None:
        counters = self._server.figures()
        before, deliveries = self._last
        self._last = time.monotonic(), counters["deliveries"]
        rate = (counters["deliveries"] - deliveries) / max(0.001, self._last[0] - before)
        sys.stderr.write(f"{CLEAR_LINE}{counters['clients']} clients, {counters['events']} events, {rate:.0f} deliveries/s")
        sys.stderr.flush()

    def clear(self) -> None:
        sys.stderr.write(CLEAR_LINE)
        sys.stderr.flush()


def wait_for_stop(wakee: socket.socket, watch_input: bool, status: Optional[StatusLine]) -> None:
    """Return on Enter or when `wakee` can be read. The end of standard input is no Enter: services have none."""
    watched = [wakee, sys.stdin.fileno()] if watch_input and sys.stdin is not None else [wakee]
    while True:
        ready = select.select(watched, [], [], 1.0 if status else None)[0]
        if status:
            status.clear() if ready else status.show()
        if wakee in ready:
            return
        if not ready:
            continue
        try:
            typed = os.read(ready[0], 4096)
        except OSError:         # not open for reading, as nohup leaves it, or a terminal that was hung up
            typed = b""
        if b"\n" in typed:
            return
        if not typed:
            watched.remove(ready[0])


if __name__ == "__main__":
    sys.exit(main())
