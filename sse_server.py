"""Turn connections into clients of one stream of events: start, stop, and the accept loop.

    python sse_server.py --port 6500        streams the clock; Enter stops it
    curl -N http://127.0.0.1:6500/token     watches it

SSEServer puts the parts together, and starts and stops them. Each part has a thread of its own:

    accept        accepts a socket and gives it to Connections, all in this file
    connections   reads requests, answers them, or registers a client (sse_core/http/connections.py)
    publisher     sends events to the clients, whose sockets it owns (publisher.py)
    source        reads a store, if there is one (sse_core/stores/store.py)
    store         writes to it

So a socket goes from accept to connections to publisher. A stop takes the same way: first nothing
is accepted any more, then no request is read, and last the clients are sent what is in the log and
the end of their streams.

The command, `main`, adds a thread `source` for its clock or its pipe. What a person at a terminal
meets is in sse_core/cli/command_line.py.
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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Callable, NoReturn

from publisher import Publisher
from sse_core.cli import command_line, descriptors, sources
from sse_core.engine import frames
from sse_core.engine.hub import Hub
from sse_core.errors import NotRunning, Unavailable
from sse_core.http.access import Access, Authorize
from sse_core.http.answers import Answers
from sse_core.http.connections import Connections
from sse_core.http.http1 import Request
from sse_core.http.tls import Certificate, Password
from sse_core.stores.redis import RedisStore
from sse_core.stores.sqlite import SQLiteStore
from sse_core.stores.store import StoreHub

# Connections that the kernel holds ready to be accepted. The system may allow fewer (somaxconn).
BACKLOG = 1024

# Bytes of kernel memory for what one client has not read yet. Linux would let it grow to 4 MiB for
# a client that has stalled. A whole batch fits in, so one call sends it to a client that reads.
SEND_BUFFER = 64 << 10

# Seconds until the next try when the process is out of descriptors. Peers wait in the backlog.
ACCEPT_PAUSE = 0.1

# Seconds without a failed accept after which the next one is worth a warning.
RECOVERED = 10.0

# Seconds that a stop waits: for the connection to itself, for requests that have begun, and in all.
# The publisher has a second, too (STOP_TIME in hub.py). The store has what is left: it commits what
# was published.
SELF_CONNECT_TIME = 1.0
REQUESTS_TIME = 1.0
TOTAL_STOP_TIME = 3.0

# Seconds that a start waits for the newest events of a store. If that is not enough, or the store
# is away, the server starts all the same, and refuses clients until it has them.
LOAD_TIME = 1.0

# Seconds between two checks whether the clients of --wait-clients are there.
WAIT_CHECK = 0.05

# Without the charset, some HTTP clients take Latin-1. The original sends none.
STREAM_TYPE = "text/event-stream; charset=utf-8"
ORIGINAL_STREAM_TYPE = "text/event-stream"

# Each --host that only this machine can reach.
LOOPBACK = ("127.0.0.1", "::1", "localhost")

# Where the page can be: in a checkout, else where `pip install` or `pip install --target` puts it.
_DATA_FOLDERS = (Path(__file__).parent, sysconfig.get_path("data"),
                 sysconfig.get_path("data", f"{os.name}_user"))
_PAGES = (Path(__file__).with_name("index.html"),
          *(Path(folder, "share", "sse-server", "index.html") for folder in _DATA_FOLDERS))
PAGE = next((page for page in _PAGES if page.exists()), None)

__all__ = ["Fault", "NotRunning", "Request", "SSEServer", "Unavailable", "main"]
logger = logging.getLogger("sse_server")


class Fault(RuntimeError):
    """A fault has ended one of the server's threads, and so the server. It is the cause."""


class _Listener(socketserver.ThreadingTCPServer):
    """A listening socket, and the loop that accepts from it.

    The loop of socketserver asks a selector before each accept, and polls a stop flag twice a
    second. This one blocks in `accept` and is woken by a connection to itself, as in the original.

    connections: is given each accepted socket. stopping: set it, then call `_unblock_accept`, and
    the loop ends. reuse_port: see SSEServer.

    Raises OSError, which names host and port, if it cannot listen.
    """

    # As servers do: a port can be used again at once, while old connections on it still time out.
    allow_reuse_address = True
    request_queue_size = BACKLOG

    def __init__(self, host: str, port: int, connections: Connections, stopping: threading.Event,
                 reuse_port: bool) -> None:
        self._connections = connections
        self._stopping = stopping
        self._reuse_port = reuse_port

        # When an accept failed last, on time.monotonic. It belongs to the accept loop.
        self._accept_failed_at = -math.inf

        try:
            self.address_family, address = _local_address(host, port)
            super().__init__(address, socketserver.BaseRequestHandler)
        except OSError as error:
            what = f"cannot listen on {host} port {port}: {error.strerror}"
            raise OSError(error.errno, what) from error

    def server_bind(self) -> None:
        """Set options and bind. socketserver calls this.

        Accepted sockets inherit the options, so these cost no system call for each client.
        """
        set_option = self.socket.setsockopt
        set_option(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)

        # In the end, this closes connections whose peer vanished without a word.
        set_option(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

        # A small event is sent at once, also when the one before was not acknowledged yet.
        set_option(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._reuse_port:
            set_option(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()

    def _accept(self) -> None:
        """Accept until the stop flag is set. The thread `accept` runs this."""
        while not self._stopping.is_set():
            try:
                sock, address = self.get_request()
            except OSError as error:
                self._accept_failed(error)
                continue
            # The last one may be our own, by which `stop` unblocked us.
            if self._stopping.is_set() or not self.verify_request(sock, address):
                sock.close()
            else:
                self._connections.take(sock, "%s:%d" % address[:2])

    def _accept_failed(self, error: OSError) -> None:
        """Pause when there is no descriptor to accept with, and have connections evicted."""
        # The peer has left before it was accepted, or the socket was shut down by a stop.
        if error.errno == errno.ECONNABORTED or self._stopping.is_set():
            return
        last, self._accept_failed_at = self._accept_failed_at, time.monotonic()
        if self._accept_failed_at - last > RECOVERED:
            logger.warning("cannot accept (%s); trying again until it works", error.strerror)
        self._connections.make_room()
        self._stopping.wait(ACCEPT_PAUSE)

    def _unblock_accept(self) -> None:
        """Connect to ourselves, so that the accept loop goes on and sees the stop flag."""
        host, port = self.server_address[:2]
        with suppress(OSError):
            socket.create_connection((str(host), port), SELF_CONNECT_TIME).close()

        # That cannot work if there is no descriptor to connect with, if the backlog is full, or if
        # the system connects us to another server on the same port. On Linux, this does.
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def _not_used(self, *_: object, **__: object) -> NoReturn:
        """Raise RuntimeError: this method of socketserver has no place here."""
        raise RuntimeError("SSEServer accepts and answers in threads of its own: "
                           "call start(), or serve_forever() to wait until it is stopped")

    handle_request = process_request = process_request_thread = finish_request = _not_used


def _local_address(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """Return family and address of the first of a name's addresses that this machine has.

    IPv4 comes first. That another program listens on an address is no reason to take the next one:
    clients that connect to the first would take that program for this server. If there is no such
    address, the result is one for which `bind` says why.
    """
    with suppress(OSError):
        # The numbers of the families are in this order.
        found = sorted(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM), key=itemgetter(0))
        for family, *_, address in found:
            # Port 0 is free on every address that this machine has.
            with suppress(OSError), socket.socket(family) as probe:
                probe.bind((address[0], 0, *address[2:]))
                return family, address
    return socket.AF_INET6 if ":" in host else socket.AF_INET, (host, port)


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise ValueError for the first option of SSEServer that cannot be meant."""
    for name in ("host", "jwt_key", "cert", "key", "redis", "stream", "history_file"):
        # What an unset variable gives would be no TLS, no history, or a server open to everybody.
        if options[name] == "":
            raise ValueError(f"{name} is empty: was a variable not set?")
    # Without a store, an event reaches only the clients of the process that published it.
    for name, needed in (("key", "cert"), ("stream", "redis"), ("sync", "history_file"),
                         ("reuse_port", "history_file or redis")):
        if options[name] and not any(options[each] for each in needed.split(" or ")):
            raise ValueError(f"{name} needs {needed}")
    if options["redis"] and options["history_file"]:
        raise ValueError("redis and history_file cannot be combined")
    if not isinstance(options["port"], int) or not 0 <= options["port"] < 1 << 16:
        raise ValueError("port is not from 0 to 65535")
    if not isinstance(options["history"], int):
        raise ValueError("history is not a whole number")
    if not callable(options["authorize"] or len):
        raise ValueError("authorize is not a function")
    # Other systems have this option, too, and give all clients to one server.
    if options["reuse_port"] and not sys.platform.startswith("linux"):
        raise ValueError("reuse_port needs Linux, which shares out the clients of a port")


class _Documented(type):
    """A class whose `help` shows its own methods, and not the many that it inherits.

    Most of what SSEServer inherits from socketserver has no use in it.
    """

    def __dir__(cls) -> set[str]:
        documented = (each for each in cls.__mro__ if isinstance(each, _Documented))
        return {name for each in documented for name in vars(each)}


class SSEServer(_Listener, metaclass=_Documented):
    """Serve one stream of events to every client that asks for it.

    Use it as a context manager, or call `start` and `stop`, or call `serve_forever`. Any thread may
    call any method. If a program ends without `stop`, the server is stopped then.

    option          meaning
    host, port      where to listen, from the constructor on; port 0 picks a free one
    history         events kept for clients that come back, 64 at least; 0: no ids, the wire of the
                    original
    heartbeat       seconds of silence after which a client is sent a comment; 0: never
    retry           seconds a client should wait before it reconnects, +-50 % at random
    max_clients     how many clients there can be at a time, as far as the limit of descriptors
                    (`ulimit -n`) allows: some of them are kept for requests
    patience        seconds for which `publish(..., wait=True)` waits for a slow client that makes
                    no progress; 0: not at all. One that reads 16 KiB a second is waited for as long
                    as it does
    tokens          who may watch, by `/TOKEN` or `Authorization: Bearer TOKEN`; none: everybody
    publish_tokens  who may POST events, in the same way; none: nobody
    jwt_key         key of signed tokens, which list the channels of their owner: a secret (HS256)
                    or a public key in PEM (RS256, ES256). Needs the package PyJWT
    authorize       a function of a `Request`, called in place of `tokens` and `jwt_key`. It returns
                    whether the client may watch, or which channels. It may block; if it raises,
                    the answer is 500
    origins         of pages that may read and publish, as `https://example.org`; none: all
    allowed_hosts   names and addresses that requests may be for; none: any
    cert, key       PEM files for TLS; the key may be in the first. They are loaded again when they
                    change
    key_password    of an encrypted key, or a function that returns it
    redis, stream   redis://HOST:PORT/DB, and the key of a stream there. What is published on any
                    server goes to that stream and comes back to the clients of all servers. Needs
                    the package `redis`
    history_file    the same with an SQLite file, which servers on one machine share. What is
                    published survives a restart, and with `sync` a power failure
    reuse_port      other servers may listen on the same port: the system shares out the clients.
                    Needs a history_file or redis, which the servers share
    on_fault        called when a fault has ended the server, in the thread that met it

    Raises ValueError for an option that cannot be meant, and OSError if it cannot listen.

    It is a socketserver.ThreadingTCPServer, but has neither a thread for each client nor a loop
    that polls. So there is no handler class; `process_request`, `finish_request` and
    `handle_request` raise RuntimeError; `handle_error`, `handle_timeout` and `service_actions` are
    never called. `serve_forever` starts the server and waits, `shutdown` and `server_close` are
    other names of `stop`, and `verify_request` is asked about each socket.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 6500, *, history: int = 1024,
                 heartbeat: float = 15.0, retry: float = 3.0, max_clients: int = 10000,
                 patience: float = 5.0, tokens: Sequence[str] = (),
                 publish_tokens: Sequence[str] = (), authorize: Authorize | None = None,
                 origins: Sequence[str] = (), allowed_hosts: Sequence[str] = (),
                 jwt_key: str | None = None, cert: str | None = None, key: str | None = None,
                 key_password: Password | None = None, redis: str | None = None,
                 stream: str | None = None, history_file: str | None = None, sync: bool = False,
                 reuse_port: bool = False, on_fault: Callable[[], object] | None = None) -> None:
        """Begin to listen. The options are explained above."""
        _check_options(locals())

        # Held by the thread that starts or stops the server. Guards the next two, which only become
        # true. Reentrant, because a start that fails stops the server.
        self._lifecycle = threading.RLock()

        # `start` was called, whether or not all threads could be started.
        self._started = False

        # `stop` was called, whether or not it has ended.
        self._stopped = False

        # Set when `stop` has ended, or when a fault has ended the server.
        self._ended = threading.Event()

        # The process that the server runs in. In one that was forked from it, nothing works.
        self._process = os.getpid()

        self._on_fault = on_fault or (lambda: None)
        self._scheme = "https" if cert else "http"
        host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        access = Access(tokens, publish_tokens, authorize, origins, self._scheme, host=host,
                        allowed_hosts=allowed_hosts, jwt_key=jwt_key)
        context = Certificate(cert, key, key_password).context if cert else None
        kept: dict[str, Any] = {"history": history, "retry": retry, "patience": patience,
                                "max_clients": min(max_clients, descriptors.for_clients()),
                                "heartbeat": heartbeat}
        store = (RedisStore(redis, stream or "sse", history) if redis else
                 SQLiteStore(history_file, history, sync) if history_file else None)

        # The hub takes events and clients from any thread. If there is a store, events come back
        # from it; then `_store_hub` is the same object, else None.
        self._store_hub = StoreHub(store, **kept) if store else None
        self._hub = self._store_hub or Hub(**kept)

        self._publisher = Publisher(self._hub)
        answers = Answers(access, self._hub, page=PAGE.read_bytes() if PAGE else None,
                          stream_type=STREAM_TYPE if history else ORIGINAL_STREAM_TYPE,
                          stats=self.stats, status=self.status)
        submit_all = self._store_hub.submit_all if self._store_hub else None
        connections = Connections(answers, self._hub.register, submit_all, context)
        stopping = threading.Event()
        self._acceptor = self._thread("accept", self._accept)
        self._serving = self._thread("connections", self._serve)
        self._sender = self._thread("publisher", self._publisher.run)
        self._store_threads = [
            self._thread("source", partial(store.follow, self._store_hub, stopping)),
            self._thread("store", store.write)] if store and self._store_hub else []

        # Last, because from here on peers can connect. If it cannot bind, socketserver calls
        # `server_close`, which is `stop`, and so all is closed again.
        super().__init__(host, port, connections, stopping, reuse_port)

    def _thread(self, name: str, target: Callable[[], None]) -> threading.Thread:
        """Return a thread in which a fault is logged and ends the server.

        No thread is missed in silence: publishing raises from then on, `/-/health` answers 503,
        `serve_forever` returns, and `stop` raises Fault.
        """
        def run() -> None:
            try:
                # Raised by a source that was publishing when the server stopped.
                with suppress(NotRunning):
                    target()
            except BaseException as fault:
                self._hub.fail(fault)
                self._ended.set()
                # A logging handler may raise.
                try:
                    logger.critical("a fault ended the thread %s, and with it the server", name,
                                    exc_info=fault)
                finally:
                    self._on_fault()
        return threading.Thread(target=run, name=name, daemon=True)

    def _serve(self) -> None:
        self._hub.forbid_waiting()
        self._connections.run()

    def start(self) -> SSEServer:
        """Start the threads and return the server. Does nothing if they run.

        With a store, it waits up to a second for the newest events. Raises NotRunning after `stop`,
        and in a process that was forked after the server was made: then make a new one.
        RuntimeError means that the system gives no more threads; then the server is stopped.
        """
        self._refuse_fork()
        with self._lifecycle:
            if self._stopped:
                raise NotRunning("the server was stopped; make a new one")
            if not self._started:
                self._started = True
                try:
                    self._start()
                except BaseException:
                    self.stop()
                    raise
        return self

    def _start(self) -> None:
        # So that streams end in order also if the program forgets to stop it. A fault was logged
        # when it happened, so Fault is not raised then.
        atexit.register(self.__exit__, Fault)

        # The publisher first: whoever fills the log may have to wait until it has sent something.
        self._sender.start()
        for thread in self._store_threads:
            thread.start()
        if self._store_hub:
            self._store_hub.loaded.wait(LOAD_TIME)
        self._serving.start()
        self._acceptor.start()

    def stop(self) -> None:
        """Stop within 3 seconds: clients get what is in the log, and their streams end.

        When it returns, all threads and sockets are gone. It can be called again. In a thread of
        the server's own (a hook, a logging handler) it returns at once, and another thread stops
        the server. In a forked child it does nothing, because the server is the parent's.

        Raises Fault if a fault had ended the server, and RuntimeError in a signal handler that
        interrupts a `publish` of its thread.
        """
        if self._process != os.getpid():
            return
        self._hub.refuse_inside()
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
            finally:
                # Whatever a logging handler raises.
                atexit.unregister(self.__exit__)
                self._ended.set()
            if self._hub.fault:
                raise Fault("a fault has ended the server") from self._hub.fault

    def _stop(self) -> None:
        # Whatever the other steps leave of this time is for the store.
        until = time.monotonic() + TOTAL_STOP_TIME

        # All clients are gone when this is logged.
        clients = self.clients

        # Each thread is only joined if it was started. A start may have failed, or never come.
        if self._acceptor.is_alive():
            self._unblock_accept()
            self._acceptor.join()
        self._stop_connections()
        self._hub.stop()
        if self._sender.ident is None:
            self._publisher.close()
        else:
            self._sender.join()
        super().server_close()

        # What was published before is still committed, if the store takes it in time.
        if self._store_hub:
            self._store_hub.store.end()
        for thread in self._store_threads:
            if thread.is_alive():
                thread.join(max(0.0, until - time.monotonic()))
        if self._store_hub and not any(thread.is_alive() for thread in self._store_threads):
            self._store_hub.store.close()

        # Last, because here a logging handler that raises leaves nothing undone.
        if self._started:
            logger.info("stopped; clients: %d", clients)

    def _stop_connections(self) -> None:
        """Close all connections, and wait a moment for what is at work.

        A program's `authorize` may never return. Its thread is a daemon, and its result is dropped.
        """
        until = time.monotonic() + REQUESTS_TIME
        self._connections.stop()
        if self._serving.is_alive():
            self._serving.join(REQUESTS_TIME)
        else:
            self._connections.close()
        self._connections.join_jobs(until)

    # As socketserver calls it.
    shutdown = server_close = stop

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Start, and wait until the server is stopped or a fault ends it. Raises what `stop` does.

        poll_interval: ignored, because nothing is polled.
        """
        self.start()
        self._ended.wait()
        self.stop()

    def __enter__(self) -> SSEServer:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.stop()
        except Fault:
            # It was logged, and must not hide the block's own exception.
            if kind is None:
                raise

    def publish(self, data: str, event: str | None = None, channel: str | None = None,
                wait: bool = False) -> str | None:
        """Publish an event and return its id, None with `history=0`. Waits for no client.

        data: text of at most 1 MiB. event: its name. channel: if there is one, only clients that
        asked for this channel get it. wait: wait for slow clients as long as `patience` says, and
        for a store that is away; if the answer of the store was lost, the event is then published
        twice.

        Raises ValueError for what no event can hold, NotRunning if the server does not run, and,
        without `wait`, Unavailable if the store does not take the event within 4 seconds. In a
        signal handler that interrupts another call it raises RuntimeError: set a flag there.
        """
        self._refuse_fork()
        if not self._started:
            raise NotRunning("the server has not been started")
        return self._hub.publish(data, event, channel, wait)

    def drain(self) -> None:
        """Wait until clients have every event, but for those that `patience` gives up.

        Raises NotRunning in a forked child, and what `publish` raises in a signal handler.
        """
        self._refuse_fork()
        self._hub.drain()

    @property
    def port(self) -> int:
        """The port it listens on, also if 0 was asked for."""
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        """Where a client on this machine finds it: `http://127.0.0.1:6500`."""
        return self._url_at(str(self.server_address[0]))

    def _url_at(self, host: str) -> str:
        return f"{self._scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def clients(self) -> int:
        """How many clients are registered."""
        return len(self._hub.clients)

    def stats(self) -> dict[str, Any]:
        """Return what `/-/status` shows: what was counted since the start.

        `turn_seconds` is the time that all the publisher's `turns` took.
        """
        return {**self._publisher.stats(), "refused": self._connections.refusals}

    # What it was called in 1.1.0.
    figures = stats

    def status(self) -> dict[str, Any]:
        """Return the stats, and a list of at most 1000 clients, as `/-/status?list` shows it.

        Times are in seconds.
        """
        return {**self.stats(), "list": self._hub.describe_clients()}

    def _refuse_fork(self) -> None:
        """Raise NotRunning in a child of the process in which the server was made.

        The child has none of the threads, one of them may hold any lock there for ever, and what
        the selectors watch is the parent's.
        """
        if self._process != os.getpid():
            raise NotRunning(f"the server runs in process {self._process}, from which this one was "
                             "forked: start a server of its own here, after the fork")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the server until Enter, SIGINT or SIGTERM, and return the exit status.

    arguments: of the command line; None: those of this process. Call it in the main thread, which
    gets the signals.

    The status is 0 after an orderly end, 1 after a fault, and 2 if the server could not start; then
    one line on standard error says why. Bad arguments raise SystemExit with status 2.
    """
    command_line.open_missing_streams()
    options = command_line.parse_arguments(arguments)
    writer = command_line.set_up_logging(options)
    descriptors.raise_limit(options.max_clients)

    # Whatever ends the server writes a byte here: a signal, a fault, the end of the input. The
    # main thread waits for that and for Enter.
    wakee, waker = socket.socketpair()
    waker.setblocking(False)
    wake = partial(waker.send, b"\0")

    # The options that are the server's own. The others are the command's.
    names = inspect.signature(SSEServer).parameters
    try:
        server = SSEServer(on_fault=wake, **{name: value for name, value in vars(options).items()
                                             if name in names})
    except (OSError, ValueError) as error:
        # Without the number of an OSError.
        reason = error.args[-1]
        if isinstance(error, ValueError):
            reason = command_line.with_flags(reason)
        elif error.errno == errno.EADDRINUSE:
            reason += ": stop the program that listens there, or choose another port with --port"
        logger.error("%s: %s", command_line.PROGRAM, reason)
        return 2
    # Only now, because signals may interrupt what comes before: the question for a password.
    command_line.catch_signals(waker)
    if not options.stdin:
        command_line.ask_about_input()
    command_line.say(*_first_lines(server, options))
    has_status = sys.stderr.isatty() and not options.quiet
    status = command_line.status_lines(server.stats) if has_status else None
    source = server._thread("source", lambda: _run_source(server, options, wake))

    # A fault was logged when it happened.
    with suppress(Fault), server:
        source.start()
        command_line.wait_for_stop(wakee, not options.stdin, status, writer)
    source.join()
    return 1 if server._hub.fault else 0


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

    # Who starts a server without a token may not know that a web page can read it, too.
    who = ("anybody with a token" if asks else
           "everybody on this machine" if options.host in LOOPBACK else
           "everybody who can reach this address")
    pages = "" if asks or options.origins else ", and every web page that is open there"
    publishers = ("anybody with a token that grants it" if options.jwt_key else
                  "anybody with a publish token" if options.publish_tokens else "nobody")
    yield f"May watch: {who}{pages}. May publish: {publishers}"
    # They can be left over from another day.
    if options.variables:
        yield f"Set in the environment: {', '.join(options.variables)}"


def _host_to_visit(listening_on: str, allowed_hosts: Sequence[str]) -> str:
    """Return a host by which this server can be visited.

    If it is open to other machines, they find it there, too.
    """
    if allowed_hosts and listening_on not in allowed_hosts:
        return allowed_hosts[0].strip("[]")
    if listening_on not in ("0.0.0.0", "::"):
        return listening_on
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        # An address that nobody has: it is kept for documentation (RFC 5737). This sends nothing
        # there. It looks for the way out of here, and takes the address where that begins.
        sock.connect(("192.0.2.1", 9))
        return str(sock.getsockname()[0])
    # There is no way. Somebody may know the machine by its name.
    return socket.gethostname()


def _run_source(server: SSEServer, options: argparse.Namespace, wake: Callable[[], object]) -> None:
    """Publish the lines of a pipe, or the ticks of the clock, until the server stops.

    After the last line, when every client has it, call `wake`. The thread `source` runs this.
    """
    if options.stdin:
        while server.clients < options.wait_clients and not server._stopping.wait(WAIT_CHECK):
            pass
        number = sources.lines(server._hub.publish_all, server._stopping, sys.stdin.fileno(),
                               frames.parse_event if options.json else frames.Event)
        clients, stopped = server.clients, server._stopping.is_set()
        server.drain()
        # A server that was told to stop has not seen the end.
        if not stopped:
            logger.log(logging.INFO if clients else logging.WARNING,
                       "the input has ended; events: %d, clients: %d", number, clients)
        wake()
    elif options.interval:
        sources.clock(server.publish, server._stopping, options.interval)


if __name__ == "__main__":
    sys.exit(main())
