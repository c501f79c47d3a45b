"""Turn flags into options, and Enter and signals into the end: what a person at a terminal meets.

It knows no server: what it shows and waits for is handed in.
"""
from __future__ import annotations

import argparse
import logging
import os
import select
import signal
import socket
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Callable, NoReturn, TextIO

from sse_core import __version__
from sse_core.log_writer import LogWriter

PROGRAM = Path(sys.argv[0]).name or "sse_server.py"
STATUS_EVERY = 1.0          # seconds between two status lines
TICK = 1.0                  # seconds between two ticks of the clock, as in the original

logger = logging.getLogger("sse_server")


def _number(kind: Callable[[str], float], limit: float, what: str) -> Callable[[str], float]:
    """Return a function that converts an option's value, or raises the error argparse reports."""
    def convert(text: str) -> float:
        with suppress(ValueError):
            value = kind(text)
            if 0 <= value < limit:
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return convert


def text(value: str) -> str:
    """Return an option's value. An empty one is refused: it is what an unset variable gives."""
    if not value:
        raise argparse.ArgumentTypeError("it is empty: was a variable not set?")
    return value


port_number = _number(int, 1 << 16, "a port from 0 to 65535")
whole_number = _number(int, 1 << 31, "a whole number from 0 on")
seconds = _number(float, 1e6, "a number of seconds from 0 on")


VARIABLES = ("SSE_TOKEN", "SSE_PUBLISH_TOKEN", "SSE_JWT_KEY")

NEEDS = {"json": "stdin", "wait_clients": "stdin", "stream": "redis", "sync": "history_file",
         "key": "cert"}     # flags that mean nothing without another one

# A flag with what it takes; its type, `list` if it can be repeated; the default; the help
FLAGS: Sequence[tuple[str, Callable[[str], Any], Any, str]] = (
    ("--host HOST", text, "127.0.0.1",
     "address to listen on, or the name of one (default %(default)s)"),
    ("--port PORT", port_number, 6500, "port to listen on; 0 picks one (default %(default)g)"),
    ("--interval SECONDS", seconds, None,
     f"time between two ticks of the clock; 0: no clock (default {TICK:g}; but 0 where events can "
     "come from elsewhere: with --stdin, --redis, --history-file, --publish-token, --jwt-key)"),
    ("--stdin", bool, False, "each line of standard input is an event, in place of the clock; "
     "after the last one, everyone served, the server stops"),
    ("--json", bool, False,
     'with --stdin: each line is {"data": ..., "event": ..., "channel": ...}'),
    ("--wait-clients N", whole_number, 0, "with --stdin: begin when so many clients are there"),
    ("--redis URL", text, None, "redis://HOST:PORT/DB: events come from a Redis stream, and what "
     "is published goes to it, so that many servers serve the same"),
    ("--stream KEY", text, None, "key of that stream (default sse)"),
    ("--history-file FILE", text, None, "an SQLite file that keeps what is published: it is there "
     "after a restart, and servers on this machine can share it"),
    ("--sync", bool, False, "what is in that file survives a power failure, too; slower"),
    ("--reuse-port", bool, False, "let other servers that say so listen on the same port"),
    ("--patience SECONDS", seconds, 5.0,
     "how long --stdin waits for a slow client that makes no progress (default %(default)g; "
     "0: not at all)"),
    ("--token TOKEN", list, [],
     "who may watch; can be repeated, and come from SSE_TOKEN instead (default: everybody)"),
    ("--publish-token TOKEN", list, [],
     "who may publish by POST; in the same way, or from SSE_PUBLISH_TOKEN (default: nobody)"),
    ("--jwt-key KEY", text, None, "secret of 32 bytes, or PEM public key, of signed tokens that "
     "grant channels; can come from SSE_JWT_KEY instead"),
    ("--token-file FILE", list, [], "a file with who may watch, a token a line; "
     "lines that begin with # are comments; can be repeated"),
    ("--publish-token-file FILE", list, [], "the same for who may publish"),
    ("--allowed-host NAME", list, [], "refuse requests whose Host is another; can be repeated "
     "(default: any)"),
    ("--origin ORIGIN", list, [], "of pages that may read and publish, as https://example.org; "
     "can be repeated (default: all)"),
    ("--cert FILE", text, None, "certificate chain for TLS, PEM"),
    ("--key FILE", text, None, "its key, if that is not in the same file; "
     "the password of an encrypted one is asked for at a terminal"),
    ("--history FRAMES", whole_number, 1024, "events kept for clients that come back, 64 at least; "
     "0: no ids, the wire of the original (default %(default)g)"),
    ("--heartbeat SECONDS", seconds, 15.0,
     "silence after which a client is sent a comment; 0: never (default %(default)g)"),
    ("--retry SECONDS", seconds, 3.0,
     "pause of a client before it reconnects, +-50 %% at random (default %(default)g)"),
    ("--max-clients N", whole_number, 10000, "clients at a time, as far as the limit of open files "
     "allows (default %(default)g)"),
)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; None: of this process.

    A bad one ends the process with one line on standard error and status 2.
    """
    parser = Parser(prog=PROGRAM, description="A small Server-Sent Events server.")
    for flag, kind, default, about in FLAGS:
        name, _, metavar = flag.partition(" ")
        if not metavar:
            parser.add_argument(name, action="store_true", help=about)
        elif kind is list:
            plural = name[2:].replace("-", "_") + "s"       # as SSEServer calls it
            parser.add_argument(name, action="append", type=text, default=[], dest=plural,
                                metavar=metavar, help=about)
        else:
            parser.add_argument(name, type=kind, default=default, metavar=metavar, help=about)
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("--verbose", action="store_true", help="log connects and disconnects too")
    loudness.add_argument("--quiet", action="store_true", help="log warnings only")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        # Only the name: what follows can be a token
        name = unknown[0].partition("=")[0]
        known = [each.partition(" ")[0] for each, *_ in FLAGS]
        near = get_close_matches(name, [*known, "--verbose", "--quiet", "--version"], 1)
        parser.error("".join([f"unrecognized argument {name}",
                              *(f": was {each} meant?" for each in near)]))
    _add_environment(options, parser)
    try:
        options.tokens += chain(*map(_tokens_in, options.token_files))
        options.publish_tokens += chain(*map(_tokens_in, options.publish_token_files))
    except (OSError, ValueError) as error:
        parser.error(f"cannot read a file of tokens: {error}")
    for name, needed in NEEDS.items():
        if getattr(options, name) and not getattr(options, needed):
            parser.error(f"--{name} needs --{needed}".replace("_", "-"))
    if options.stdin and sys.stdin is None:
        parser.error("--stdin needs a standard input")
    if options.interval is None:
        # Ticks would push real events out of the log and fill the file
        comes_from_elsewhere = (options.stdin or options.redis or options.history_file
                                or options.publish_tokens or options.jwt_key)
        options.interval = 0.0 if comes_from_elsewhere else TICK
    options.key_password = ask_password if has_foreground(sys.stdin) else None
    return options


def _add_environment(options: argparse.Namespace, parser: Parser) -> None:
    """Add what comes from the environment; `options.variables` are those that were used.

    One that is empty is refused: whoever set it wanted a server that is closed.
    """
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    for name, value in found.items():
        if not value.strip():
            parser.error(f"{name} is set, and empty: give it a value, or unset it")
    if options.jwt_key:
        found.pop("SSE_JWT_KEY", None)
    options.tokens += found.get("SSE_TOKEN", "").split()
    options.publish_tokens += found.get("SSE_PUBLISH_TOKEN", "").split()
    options.jwt_key = options.jwt_key or found.get("SSE_JWT_KEY")
    options.variables = [*found]


def _tokens_in(path: str) -> list[str]:
    """Return the tokens in a file, one a line; lines that are blank or begin with `#` are none.

    Raises OSError; ValueError if there is none, or if the file is not UTF-8.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8") from None
    tokens = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not tokens:
        raise ValueError(f"{path} holds no token")
    return tokens


class Parser(argparse.ArgumentParser):
    """A parser that reports an error on one line."""

    def error(self, message: str) -> NoReturn:
        """End the process with this message and status 2."""
        self.exit(2, f"{self.prog}: {message} (--help shows the options)\n")


def set_up_logging(options: argparse.Namespace) -> LogWriter | None:
    """Log to standard error, as far as that takes it. Returns what writes it; None if it is closed.
    """
    writer = LogWriter(sys.stderr) if sys.stderr else None
    logging.basicConfig(format="%(message)s", handlers=[writer or logging.NullHandler()])
    quiet = logging.WARNING if options.quiet else logging.INFO
    logger.setLevel(logging.DEBUG if options.verbose else quiet)
    return writer


def has_terminal() -> bool:
    """Say whether standard error is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def say(*lines: str) -> None:
    """Print lines on standard output, as far as that takes them."""
    try:
        print(*lines, sep="\n", flush=True)
    except OSError:         # it is full, or nobody reads it: then nothing is to be flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def count_of(number: int, noun: str) -> str:
    """Return the number with its noun."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def status_lines(figures: Callable[[], Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for the bottom of a terminal, again and again, from the server's figures."""
    deliveries, before = 0, time.monotonic()
    while True:
        now, shown = time.monotonic(), figures()
        rate = (shown["deliveries"] - deliveries) / max(0.001, now - before)
        deliveries, before = shown["deliveries"], now
        line = (f"{count_of(shown['clients'], 'client')}, {count_of(shown['events'], 'event')}, "
                f"{rate:.0f} deliveries/s")
        yield line[:(os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1]


def catch_signals(waker: socket.socket) -> None:
    """Turn SIGINT and SIGTERM into a byte to this socket, and SIGHUP if a terminal sends it.

    Without a terminal, as a service, SIGHUP is ignored: there it means that configuration has
    changed, and a new certificate is noticed anyway. Call this in the main thread.
    """
    signal.set_wakeup_fd(waker.fileno())
    # A read just after the terminal was given to another job fails then, and does not stop us
    signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: None)      # that it came is read from the socket
    if not _has_controlling_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    elif signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:     # by nohup
        signal.signal(signal.SIGHUP, lambda *_: None)


def _has_controlling_terminal() -> bool:
    try:
        os.close(os.open(os.ctermid(), os.O_RDONLY))
    except OSError:
        return False
    return True


@cache
def ask_password() -> str:
    """Return what is typed at the terminal; it is asked once. Raises ValueError if nothing is."""
    import getpass
    try:
        return getpass.getpass("Password of the key of the certificate: ")
    except (EOFError, KeyboardInterrupt):
        raise ValueError("no password was typed") from None


def has_foreground(stream: TextIO | None) -> bool:
    """Say whether a stream is a terminal, and not one that has given itself to another job."""
    if stream is None or not stream.isatty():
        return False
    try:
        return os.tcgetpgrp(stream.fileno()) == os.getpgrp()
    except OSError:         # it controls no session: there are no jobs
        return True


def ask_about_input() -> None:
    """Ask whether --stdin was meant, if what could be events is piped in without it."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, AttributeError, ValueError):       # no standard input
        return
    if stat.S_ISFIFO(mode) or stat.S_ISREG(mode):
        logger.warning("standard input is not read: was --stdin meant?")


def wait_for_stop(wakee: socket.socket, watch_input: bool, status: Iterator[str] | None,
                  writer: LogWriter | None) -> None:
    """Return on Enter or when `wakee` can be read. Have lines of status shown now and then.

    Enter counts from a terminal in whose foreground this process is, as long as it is: so a job
    that was begun with `&` goes on. The end of standard input is no Enter: services have none.
    """
    rests = False       # a terminal at its end says so at once, again and again
    while True:
        watches = watch_input and has_foreground(sys.stdin) and not rests
        watched = [wakee.fileno(), *([sys.stdin.fileno()] if watches else [])]
        ready = select.select(watched, [], [], STATUS_EVERY if watch_input or status else None)[0]
        if status and writer and has_foreground(sys.stderr):
            writer.show_status("" if ready else next(status))
        if wakee.fileno() in ready:
            return
        typed = _typed() if ready else b""
        if b"\n" in typed:
            return
        rests = bool(ready) and not typed


def _typed() -> bytes:
    try:
        return os.read(sys.stdin.fileno(), 4096)
    except OSError:         # the terminal was hung up, or given to another process just now
        return b""
