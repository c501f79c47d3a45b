"""Turn flags into options, and Enter and signals into the end: what a person at a terminal meets.

It knows no server: what it shows and waits for is handed in.
"""
import argparse
import logging
import math
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, Callable, Mapping, NoReturn, Optional, Sequence, Tuple

CLEAR_LINE = "\r\x1b[K"     # of a terminal
PROGRAM = Path(sys.argv[0]).name or "sse_server.py"
STATUS_EVERY = 1.0          # seconds between two status lines

logger = logging.getLogger("sse_server")


def parse_arguments(arguments: Optional[Sequence[str]]) -> argparse.Namespace:
    """Parse the command line; None: of this process.

    A bad one ends the process with one line on standard error and status 2.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    options.token += os.environ.get("SSE_TOKEN", "").split()
    options.publish_token = options.publish_token or os.environ.get("SSE_PUBLISH_TOKEN")
    if options.key and not options.cert:
        parser.error("--key needs --cert")
    if options.stdin and sys.stdin is None:
        parser.error("--stdin needs a standard input")
    return options


def _parser() -> "Parser":
    parser = Parser(prog=PROGRAM, description="A small Server-Sent Events server.")
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    add("--port", type=port_number, default=6500,
        help="port to listen on; 0 picks one (default 6500)")
    _add_sources(add)
    _add_access(add)
    add("--history", type=whole_number, default=1024, metavar="FRAMES", help="events kept for "
        "clients that come back; 0: no ids, the wire of the original (default 1024)")
    add("--heartbeat", type=seconds_or_none, default=15.0, metavar="SECONDS",
        help="silence after which a client is sent a comment; 0: never (default 15)")
    add("--retry", type=seconds_or_none, default=3.0, metavar="SECONDS",
        help="pause of a client before it reconnects, +-50 %% at random (default 3)")
    add("--max-clients", type=whole_number, default=10000, metavar="N",
        help="clients at a time (default 10000)")
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("--verbose", action="store_true", help="log connects and disconnects too")
    loudness.add_argument("--quiet", action="store_true", help="log warnings only")
    return parser


def _add_sources(add: Callable[..., object]) -> None:
    add("--interval", type=seconds, default=1.0, metavar="SECONDS",
        help="time between two ticks of the clock (default 1)")
    add("--stdin", action="store_true", help="each line of standard input is an event, in place "
        "of the clock; after the last one, everyone served, the server stops")
    add("--redis", metavar="URL", help="redis://HOST:PORT/DB: events come from a Redis stream, and "
        "what is published goes to it, so that many servers serve the same")
    add("--stream", default="sse", metavar="KEY", help="key of that stream (default sse)")
    add("--patience", type=seconds_or_none, default=5.0, metavar="SECONDS",
        help="how long --stdin waits for a client that is slow (default 5; 0: not at all)")


def _add_access(add: Callable[..., object]) -> None:
    add("--token", action="append", default=[], metavar="TOKEN", help="who may watch; can be "
        "repeated, and come from SSE_TOKEN instead (default: everybody)")
    add("--publish-token", metavar="TOKEN", help="who may publish by POST; can come from "
        "SSE_PUBLISH_TOKEN instead (default: nobody)")
    add("--origin", action="append", default=[], metavar="ORIGIN", help="of pages that may read "
        "and publish, as https://example.org; can be repeated (default: all)")
    add("--cert", metavar="FILE", help="certificate chain for TLS, PEM")
    add("--key", metavar="FILE", help="its key, if that is not in the same file")


class Parser(argparse.ArgumentParser):
    """A parser that reports an error on one line."""

    def error(self, message: str) -> NoReturn:
        """End the process with this message and status 2."""
        self.exit(2, f"{self.prog}: {message} (--help shows the options)\n")


def _number(kind: Callable[[str], float], fits: Callable[[float], bool],
            description: str) -> Callable[[str], float]:
    """Return a function that converts an option's value, or raises the error argparse reports."""
    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan        # which fits nowhere
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {description}")
        return value
    return convert


port_number = _number(int, lambda port: 0 <= port < 65536, "a port from 0 to 65535")
whole_number = _number(int, lambda value: 0 <= value < 1 << 31, "a whole number from 0 on")
seconds = _number(float, lambda value: 0 < value < 1e6, "a number of seconds above 0")
seconds_or_none = _number(float, lambda value: 0 <= value < 1e6, "a number of seconds from 0 on")


def set_up_logging(options: argparse.Namespace) -> None:
    """Log to standard error; on a terminal, over the status line."""
    logging.basicConfig(format=(CLEAR_LINE if sys.stderr.isatty() else "") + "%(message)s")
    quiet = logging.WARNING if options.quiet else logging.INFO
    logger.setLevel(logging.DEBUG if options.verbose else quiet)


class StatusLine:
    """One line at the bottom of a terminal that renews itself. Used by the main thread.

    counters: returns the numbers of clients, events and deliveries, by these names.
    """

    def __init__(self, counters: Callable[[], Mapping[str, Any]]) -> None:
        self._counters = counters
        self._last = time.monotonic(), 0        # when it was shown, and deliveries by then

    def show(self) -> None:
        """Show the line anew."""
        counters, now = self._counters(), time.monotonic()
        (before, deliveries), self._last = self._last, (now, counters["deliveries"])
        rate = (counters["deliveries"] - deliveries) / max(0.001, now - before)
        self._write(f"{counters['clients']} clients, {counters['events']} events, "
                    f"{rate:.0f} deliveries/s")

    def clear(self) -> None:
        """Take the line away."""
        self._write("")

    def _write(self, text: str) -> None:
        sys.stderr.write(CLEAR_LINE + text)
        sys.stderr.flush()


def catch_signals() -> Tuple[socket.socket, socket.socket]:
    """Turn SIGINT and SIGTERM into a byte: return the socket it is read from, and the other end.

    Call it in the main thread. Any thread may send a byte of its own into the other end.
    """
    wakee, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno())
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: None)      # that it came is read from the socket
    return wakee, waker


def wait_for_stop(wakee: socket.socket, watch_input: bool, status: Optional[StatusLine]) -> None:
    """Return on Enter or when `wakee` can be read.

    The end of standard input is no Enter: services have none.
    """
    watched = [wakee.fileno()]
    if watch_input and sys.stdin is not None:
        watched.append(sys.stdin.fileno())
    while True:
        ready = select.select(watched, [], [], STATUS_EVERY if status else None)[0]
        if status:
            status.clear() if ready else status.show()
        if wakee.fileno() in ready:
            return
        if not ready:
            continue
        try:
            typed = os.read(ready[0], 4096)
        except OSError:     # not open for reading, as nohup leaves it, or a terminal was hung up
            typed = b""
        if b"\n" in typed:
            return
        if not typed:
            watched.remove(ready[0])
