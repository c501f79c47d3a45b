"""Turn connections into clients of one stream of events: start, stop, and the accept loop.

    python sse_server.py --port 6500        streams the clock; Enter stops it
    curl -N http://127.0.0.1:6500/token     watches it

A socket goes one way: the thread `accept` accepts it. The thread `connections`
(sse_core/connections.py) asks Answers (sse_core/answers.py) what it gets, and sends that or
registers a client. From then on the publisher (publisher.py) owns the socket. An event goes another
way: `publish`, the log, the publisher.

`_started` and `_stopped` belong to who holds `_lifecycle`, `_accept_failed_at` to the accept loop.
All else is set in the constructor, and guards itself.
"""
from __future__ import annotations

import argparse
import atexit
import errno
import inspect
import logging
import math
import os
import socket
import socketserver
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Callable, NoReturn

from publisher import Publisher
from sse_core import command_line, descriptors, frames, sources
from sse_core.access import Access, Authorize
from sse_core.answers import Answers
from sse_core.broadcast import Broadcast, NotRunning, Unavailable
from sse_core.command_line import count_of
from sse_core.connections import Connections
from sse_core.file_stream import FileStream
from sse_core.http1 import Request
from sse_core.redis_stream import RedisStream
from sse_core.shared import Shared
from sse_core.tls import Certificate, Password

BACKLOG = 1024              # connections the kernel holds ready for accept
SEND_BUFFER = 64 << 10      # bytes of kernel memory for a client; else 4 MiB for a stalled one
ACCEPT_PAUSE = 0.1          # seconds to wait when the process is out of descriptors
RECOVERED = 10.0            # seconds without a failure after which the next is worth a warning
SELF_CONNECT_TIME = 1.0     # seconds
REQUESTS_TIME = 1.0         # seconds for what requests have begun
STORE_TIME = 2.0            # seconds for the threads that read and write a shared log to end
LOAD_TIME = 1.0             # seconds in which a start waits for the newest events of a shared log
WAIT_CHECK = 0.05           # seconds between two looks whether --wait-clients are there
# Without the charset, some HTTP clients take Latin-1. The original sends none.
STREAM_TYPE = "text/event-stream; charset=utf-8"
ORIGINAL_STREAM_TYPE = "text/event-stream"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}    # and how to connect to it
SOMEWHERE = ("192.0.2.1", 9)            # an address that is kept for documentation (RFC 5737)
_DATA_FOLDERS = (Path(__file__).parent,      # by `pip install --target`
                 sysconfig.get_path("data"), sysconfig.get_path("data", f"{os.name}_user"))
_PAGES = (Path(__file__).with_name("index.html"),       # in a checkout; else where it is installed
          *(Path(data, "share", "sse-server", "index.html") for data in _DATA_FOLDERS))
PAGE = next((page for page in _PAGES if page.exists()), None)

__all__ = ["Fault", "NotRunning", "Request", "SSEServer", "Unavailable", "main"]
logger = logging.getLogger("sse_server")


class Fault(RuntimeError):
    """A fault in one of the server's threads, its cause, had ended it."""


_running: set[SSEServer] = set()


@atexit.register
def _stop_all() -> None:
    """Stop what a program that ends has left running, so that streams end in order."""
    for server in list(_running):
        try:
            server.stop()
        except Fault:       # it was logged when it happened
            pass


class _Listener(socketserver.ThreadingTCPServer):
    """A listening socket, and the loop that accepts from it and gives each socket to `take`.

    make_room: called when there is no descriptor to accept with.
    """
    allow_reuse_address = True
    request_queue_size = BACKLOG

    def __init__(self, host: str, port: int, take: Callable[[socket.socket, str], None],
                 make_room: Callable[[], None], stopping: threading.Event,
                 reuse_port: bool) -> None:
        self._take = take
        self._make_room = make_room
        self._reuse_port = reuse_port
        self._stopping = stopping               # set before `_connect_to_self` is called
        self._accept_failed_at = -math.inf      # on the monotonic clock
        try:
            self.address_family, address = _local_address(host, port)
            super().__init__(address, socketserver.BaseRequestHandler)
        except OSError as error:
            what = f"cannot listen on {host} port {port}: {error.strerror}"
            raise OSError(error.errno, what) from error

    def server_bind(self) -> None:
        """Bind; with others on the same port if that is wanted."""
        if self._reuse_port:
            if not sys.platform.startswith("linux"):    # others have it, and share out nothing
                raise OSError(errno.ENOPROTOOPT, "only Linux shares out the clients of a port")
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()

    def server_activate(self) -> None:
        """Listen. Accepted sockets inherit these options, so they cost nothing for each."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().server_activate()

    def _accept(self) -> None:
        """Accept until the stop flag is set. There is nothing to poll: stop connects to us."""
        while not self._stopping.is_set():
            try:
                sock, address = self.get_request()
            except OSError as error:
                self._accept_failed(error)
                continue
            if self._stopping.is_set() or not self.verify_request(sock, address):
                sock.close()
            else:
                self._take(sock, "%s:%d" % address[:2])

    def _accept_failed(self, error: OSError) -> None:
        """Pause when there is nothing to accept with: connections wait in the backlog."""
        if error.errno == errno.ECONNABORTED or self._stopping.is_set():
            return
        last, self._accept_failed_at = self._accept_failed_at, time.monotonic()
        if self._accept_failed_at - last > RECOVERED:
            logger.warning("cannot accept (%s); trying again until it works", error.strerror)
        self._make_room()
        self._stopping.wait(ACCEPT_PAUSE)

    def _connect_to_self(self) -> None:
        """Unblock accept, which then sees the stop flag."""
        host, port = str(self.server_address[0]), self.server_address[1]
        try:
            if self._reuse_port:        # the system may connect us to another server there
                raise OSError("the port is not ours alone")
            address = (ANY_ADDRESS.get(host, host), port)
            socket.create_connection(address, SELF_CONNECT_TIME).close()
        except OSError:         # no descriptor is left, or the backlog is full: on Linux, this
            self.socket.shutdown(socket.SHUT_RDWR)      # unblocks it without either

    def _not_used(self, *_: object, **__: object) -> NoReturn:
        """Raise RuntimeError: this hook of socketserver is replaced."""
        raise RuntimeError("SSEServer accepts and answers in threads of its own: "
                           "call start(), or serve_forever() to wait until it is stopped")

    handle_request = process_request = process_request_thread = finish_request = _not_used


def _local_address(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """Return family and address of the first of a name's addresses that this machine has.

    IPv4 comes first. That another program listens there is no reason to take the next: its clients
    would be taken for ours. Raises OSError for a name that has no address.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    found.sort(key=lambda each: each[0] != socket.AF_INET)
    for family, *_, address in found:
        with suppress(OSError), socket.socket(family) as probe:
            probe.bind((address[0], 0, *address[2:]))
            return family, address
    # None: to bind the first will say why
    return found[0][0], found[0][4]


class _Documented(type):
    """A class whose `help` shows its own methods, and not the many that it inherits."""

    def __dir__(cls) -> set[str]:
        documented = (each for each in cls.__mro__ if isinstance(each, _Documented))
        return {name for each in documented for name in vars(each)}


class SSEServer(_Listener, metaclass=_Documented):
    """Serve one stream of events to every client that asks for it.

    Use it as a context manager, or call `start` and `stop`; or call `serve_forever`. Any thread
    may call any method. A program that ends without `stop` stops it at its end.

    option          meaning
    host, port      where to listen, from the constructor on; port 0 picks a free one
    history         events kept for clients that come back, 64 at least; 0: no ids, the wire of the
                    original
    heartbeat       seconds of silence after which a client is sent a comment; 0: never
    retry           seconds a client should wait before it reconnects, +-50 % at random
    max_clients     how many clients there can be at a time, as far as the limit of descriptors
                    (`ulimit -n`) allows: some of them are kept for requests
    patience        seconds without progress for which `publish(..., wait=True)` holds back for a
                    slow client; it is waited for as long as it takes 16 KiB a second; 0: for none
    tokens          who may watch, by `/TOKEN` or `Authorization: Bearer TOKEN`; none: everybody
    publish_tokens  who may POST events, in the same way; none: nobody
    jwt_key         of signed tokens, which name the channels granted and need the package PyJWT:
                    a secret (HS256), or a public key in PEM (RS256, ES256)
    authorize       says of a `Request` whether it may watch, or which channels, in place of
                    `tokens` and `jwt_key`. It runs in a thread of that request and may take its
                    time; if it raises, that is a 500
    origins         of pages that may read and publish, as `https://example.org`; none: all
    allowed_hosts   names and addresses that requests may be for; none: any
    cert, key       PEM files for TLS; the key may be in the first. They are loaded again when they
                    change
    key_password    of an encrypted key, or a function that returns it
    redis, stream   redis://HOST:PORT/DB and the key of a stream, which takes the place of this
                    server's own events: what is published on any server goes to it, and comes
                    back to the clients of all. Needs the package `redis`
    history_file    the same with an SQLite file, which servers on one machine share; what is
                    published is there after a restart. sync: after a power failure, too
    reuse_port      other servers may listen on the same port: the system shares out the clients
    on_fault        called when a fault has ended the server, in the thread that met it

    Raises ValueError for an option that cannot be; OSError if it cannot listen.

    It is a socketserver.ThreadingTCPServer without its handlers: a thread for each client, and a
    loop that polls, are what this server does without. So `process_request`, `finish_request` and
    `handle_request` raise RuntimeError, no handler class is taken, and `handle_error`,
    `handle_timeout` and `service_actions` are not called. `serve_forever` starts it and waits;
    `shutdown` and `server_close` are `stop`; `verify_request` is asked before a socket is taken.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 6500, *, history: int = 1024,
                 heartbeat: float = 15.0, retry: float = 3.0, max_clients: int = 10000,
                 patience: float = 5.0, tokens: Sequence[str] = (),
                 publish_tokens: Sequence[str] = (),
                 authorize: Authorize | None = None, origins: Sequence[str] = (),
                 allowed_hosts: Sequence[str] = (), jwt_key: str | None = None,
                 cert: str | None = None, key: str | None = None,
                 key_password: Password | None = None,
                 redis: str | None = None, stream: str | None = None,
                 history_file: str | None = None, sync: bool = False,
                 reuse_port: bool = False,
                 on_fault: Callable[[], object] | None = None) -> None:
        """Begin to listen. The options stand above."""
        host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        texts = {"host": host, "jwt_key": jwt_key, "cert": cert, "key": key, "redis": redis,
                 "stream": stream, "history_file": history_file}
        _refuse(
            # What an unset variable gives would be no TLS, no history, a server open to everybody
            *((value == "", f"{name} is empty: was a variable not set?")
              for name, value in texts.items()),
            (not isinstance(port, int) or not 0 <= port < 65536, "port is not from 0 to 65535"),
            (not isinstance(history, int), "history is not a whole number"),
            (not callable(authorize or len), "authorize is not a function"),
            (key and not cert, "key needs cert"),
            (stream and not redis, "stream needs redis"),
            (sync and not history_file, "sync needs history_file"),
            (redis and history_file, "one shared log is enough: redis, or history_file"))
        self._lifecycle = threading.RLock()
        self._process = os.getpid()             # the one that it serves in
        self._started = False
        self._stopped = False                   # or `stop` is at it
        self._ended = threading.Event()         # set when `stop` has done all it does
        self._scheme = "https" if cert else "http"
        self._on_fault = on_fault
        access = Access(tokens, publish_tokens, authorize, origins, self._scheme, host=host,
                        allowed_hosts=allowed_hosts, jwt_key=jwt_key)
        context = Certificate(cert, key, key_password).context if cert else None
        kept: dict[str, Any] = {"history": history, "retry": retry, "patience": patience,
                                "max_clients": min(max_clients, descriptors.for_clients()),
                                "heartbeat": heartbeat}
        shared_log = (RedisStream(redis, stream or "sse", history) if redis else
                      FileStream(history_file, history, sync) if history_file else None)
        self._shared = Shared(shared_log, **kept) if shared_log else None
        self._broadcast = self._shared or Broadcast(**kept)
        self._publisher = Publisher(self._broadcast)
        answers = Answers(access, page=PAGE.read_bytes() if PAGE else None, retry=retry,
                          stream_type=STREAM_TYPE if history else ORIGINAL_STREAM_TYPE,
                          publish_all=self._broadcast.publish_all, figures=self.figures,
                          status=self.status, trouble=self._broadcast.trouble)
        stopping = threading.Event()
        self._connections = Connections(
            answers, self._broadcast.register,
            self._shared.submit_all if self._shared else None, context)
        self._acceptor = self._thread("accept", self._accept)
        self._serving = self._thread("connections", self._serve)
        self._store_threads = [
            self._thread("source", partial(shared_log.follow, self._shared, stopping)),
            self._thread("store", shared_log.write)] if shared_log and self._shared else []
        self._sender = self._thread("publisher", self._publisher.run)
        try:
            super().__init__(host, port, self._connections.take, self._connections.make_room,
                             stopping, reuse_port)
        except BaseException:
            self._connections.close()
            self._publisher.close()
            raise

    def _thread(self, name: str, target: Callable[[], None]) -> threading.Thread:
        """Return a thread in which a fault is logged, and ends the server."""
        def run() -> None:
            try:
                target()
            except NotRunning:      # it was publishing when the server stopped
                pass
            except BaseException as fault:
                self._broadcast.fail(fault)
                logger.critical("a fault ended the thread %s, and with it the server", name,
                                exc_info=fault)
            finally:
                if self._broadcast.fault:
                    self._ended.set()
                    if self._on_fault:
                        self._on_fault()
        return threading.Thread(target=run, name=name, daemon=True)

    def start(self) -> SSEServer:
        """Start the threads and return the server. Does nothing if they run.

        Raises NotRunning after `stop`, and in a process that was forked after the server was made:
        then make a new one.
        """
        self._refuse_fork()
        with self._lifecycle:
            if self._stopped:
                raise NotRunning("the server was stopped; make a new one")
            if not self._started:
                self._started = True
                try:
                    self._start()
                except BaseException:       # the system gives no more threads
                    self.stop()
                    raise
        return self

    def _start(self) -> None:
        _running.add(self)
        self._sender.start()
        if self._shared:
            for thread in self._store_threads:
                thread.start()
            self._shared.loaded.wait(LOAD_TIME)
        self._serving.start()
        self._acceptor.start()

    def stop(self) -> None:
        """Stop within 3 seconds: clients get what is in the log, and their streams end.

        Threads and sockets are gone when it returns, whoever stops it. Can be called again.
        In a thread of the server's own (a hook, a logging handler) it only sees to it that this is
        done. Raises Fault if one had ended the server; RuntimeError in a signal handler that
        interrupts a `publish` of its thread. In a forked child it does nothing: the server is the
        parent's.
        """
        if self._process != os.getpid():
            return
        self._broadcast.refuse_inside()
        self._stopping.set()
        if threading.current_thread() in (self._acceptor, self._serving, self._sender,
                                          *self._store_threads):
            threading.Thread(target=self.stop, name="stop", daemon=True).start()
            return
        with self._lifecycle:
            if self._stopped:
                return
            self._stopped = True
            try:
                self._stop()
            finally:        # whatever a logging handler raises
                _running.discard(self)
                self._ended.set()
            if self._broadcast.fault:
                raise Fault("a fault has ended the server") from self._broadcast.fault

    def _stop(self) -> None:
        clients = self.clients
        if self._acceptor.is_alive():
            self._connect_to_self()
            self._acceptor.join()
        self._stop_connections()
        self._broadcast.stop()
        if self._sender.ident is None:
            self._publisher.close()
        else:
            self._sender.join()
        super().server_close()
        if self._shared:
            self._shared.stream.end()
        until = time.monotonic() + STORE_TIME
        for thread in self._store_threads:
            if thread.is_alive():
                thread.join(max(0.0, until - time.monotonic()))
        if self._shared and not any(thread.is_alive() for thread in self._store_threads):
            self._shared.stream.close()
        if self._started:       # only now: whatever a logging handler does harms nothing any more
            logger.info("stopped; clients: %d", clients)

    def _stop_connections(self) -> None:
        """Close all connections, and wait for what is at work: an `authorize` may never return."""
        until = time.monotonic() + REQUESTS_TIME
        self._connections.stop()
        if self._serving.ident is not None:
            self._serving.join(REQUESTS_TIME)
        if not self._serving.is_alive():
            self._connections.close()
        self._connections.join_jobs(until)

    shutdown = server_close = stop      # what socketserver calls it

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Start, and wait until the server is stopped. It polls nothing."""
        self.start()
        self._ended.wait()
        self.stop()

    def __enter__(self) -> SSEServer:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.stop()
        except Fault:       # it was logged, and is not to hide the block's own
            if kind is None:
                raise

    def publish(self, data: str, event: str | None = None, channel: str | None = None,
                wait: bool = False) -> str | None:
        """Publish an event and return its id, None with `history=0`. Clients get it from there.

        data: text of at most 1 MiB. event: its name. channel: None is for everyone; else it is
        for clients that asked for this channel. wait: slow clients may hold it back, see
        `patience`. Raises ValueError for what no event can hold, NotRunning if the server does
        not run, and Unavailable if the shared log does not take it within 4 seconds: with `wait`
        that is waited for, too. An event whose answer was lost may then be published twice.
        """
        self._refuse_fork()
        if not self._started:
            raise NotRunning("the server has not been started")
        return self._broadcast.publish(data, event, channel, wait)

    def drain(self) -> None:
        """Wait until clients have every event; those that `patience` gives up are left out."""
        self._refuse_fork()
        self._broadcast.drain()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        """Where a client on this machine finds it."""
        return self._url_at(str(self.server_address[0]))

    def _url_at(self, host: str) -> str:
        return f"{self._scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def clients(self) -> int:
        """How many clients are registered."""
        return len(self._broadcast.clients)

    def figures(self) -> dict[str, Any]:
        """Return what `/-/status` shows. `turn_seconds` is the time of all the publisher's `turns`.
        """
        return {**self._publisher.figures(), "refused": self._connections.refusals}

    def status(self) -> dict[str, Any]:
        """Return the figures, and a list of clients: times in seconds, at most 1000 of them."""
        return {**self.figures(), "list": self._broadcast.describe_clients()}

    def _refuse_fork(self) -> None:
        """Raise NotRunning in a child of the process in which the server was made.

        It has none of the threads, any lock may be held for ever by one of them, and what the
        selectors watch is the parent's.
        """
        if self._process != os.getpid():
            raise NotRunning(f"the server runs in process {self._process}, from which this one was "
                             "forked: start a server of its own here, after the fork")

    def _serve(self) -> None:
        with self._broadcast.not_waiting():
            self._connections.run()


def _refuse(*options: tuple[object, str]) -> None:
    """Raise ValueError for the first option that is wrong."""
    for is_wrong, what in options:
        if is_wrong:
            raise ValueError(what)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server until Enter, SIGINT or SIGTERM, and return the exit status.

    Call it in the main thread.
    """
    command_line.open_missing_streams()
    options = command_line.parse_arguments(arguments)
    writer = command_line.set_up_logging(options)
    descriptors.raise_limit(options.max_clients)
    wakee, waker = socket.socketpair()
    waker.setblocking(False)
    wake = partial(waker.send, b"\0")
    names = inspect.signature(SSEServer).parameters
    try:
        server = SSEServer(on_fault=wake, **{name: value for name, value in vars(options).items()
                                             if name in names})
    except (OSError, ValueError) as error:
        # Of an OSError, this is its text without the number.
        logger.error("%s: %s", command_line.PROGRAM, error.args[-1])
        return 2
    command_line.catch_signals(waker)
    if not options.stdin:
        command_line.ask_about_input()
    command_line.say(*_first_lines(server, options))
    has_status = sys.stderr.isatty() and not options.quiet
    status = command_line.status_lines(server.figures) if has_status else None
    source = server._thread("source", lambda: _run_source(server, options, wake))
    # A fault was logged when it happened.
    with suppress(Fault), server:
        source.start()
        command_line.wait_for_stop(wakee, not options.stdin, status, writer)
    source.join()
    return 1 if server._broadcast.fault else 0


def _first_lines(server: SSEServer, options: argparse.Namespace) -> Iterator[str]:
    """Yield what a person needs to know at the start. The original's two lines come first."""
    if not options.stdin and command_line.has_foreground(sys.stdin):
        yield "Press enter to terminate"
    yield f"Listening on {server.url}"
    if options.quiet:
        return
    asks = options.tokens or options.jwt_key
    url = server._url_at(_host_to_visit(str(server.server_address[0]), options.allowed_hosts))
    token, fragment = ("TOKEN", "#TOKEN") if asks else ("token", "")
    yield f"Watch: curl -N {url}/{token}, or open {url}/{fragment} in a browser"
    who = ("anybody with a token" if asks else
           "everybody on this machine" if options.host in LOOPBACK else
           "everybody who can reach this address")
    pages = "" if asks or options.origins else ", and every web page that is open there"
    publishers = ("anybody with a token that grants it" if options.jwt_key else
                  "anybody with a publish token" if options.publish_tokens else "nobody")
    yield f"May watch: {who}{pages}. May publish: {publishers}"
    # They can be left over from another day.
    if options.variables:
        yield f"Tokens and keys come from the environment, too: {', '.join(options.variables)}"


def _host_to_visit(listening_on: str, allowed_hosts: Sequence[str]) -> str:
    """Return a host by which this server can be visited, from other machines if it is open to them.
    """
    if allowed_hosts and listening_on not in allowed_hosts:
        return allowed_hosts[0].strip("[]")
    if listening_on not in ANY_ADDRESS:
        return listening_on
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        # This sends nothing. It looks for the way out of here, and takes the address where that
        # begins.
        sock.connect(SOMEWHERE)
        return str(sock.getsockname()[0])
    # There is no way. Somebody may know the machine by its name.
    return socket.gethostname()


def _run_source(server: SSEServer, options: argparse.Namespace, wake: Callable[[], object]) -> None:
    """Publish what the source gives. After the last line, when everyone has it, call `wake`."""
    if options.stdin:
        while server.clients < options.wait_clients and not server._stopping.wait(WAIT_CHECK):
            pass
        number = sources.lines(server._broadcast.publish_all, server._stopping, sys.stdin.fileno(),
                               frames.parse_draft if options.json else frames.Draft)
        clients = server.clients
        server.drain()
        logger.log(logging.INFO if clients else logging.WARNING,
                   "%s published; at the end %s connected", count_of(number, "event"),
                   f"{count_of(clients, 'client')} {'was' if clients == 1 else 'were'}")
        wake()
    elif options.interval:
        sources.clock(server.publish, server._stopping, options.interval)


if __name__ == "__main__":
    sys.exit(main())
