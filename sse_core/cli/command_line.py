"""Turn flags into options, and Enter and signals into the end of the process.

This is what a person at a terminal meets, and a service manager. It knows no server: what it shows,
and what it waits for, is handed in. All of it runs in the main thread.

To add an option: add a flag to one of the four groups below, and an argument of the same name to
SSEServer. Whether its value makes sense is decided there, because programs give options, too. Here
are only the checks of what no program can give: --interval, the pipe, the environment.

Enter and signals are delicate, because a process can be in the foreground of a terminal or not, and
that can change:

    foreground      Enter and Ctrl-C stop the server. The start says so.
    background      With `&`, or after Ctrl-Z and `bg`, Enter belongs to the shell.
    no terminal     As a service. Standard input can be at its end, which means nothing. SIGHUP asks
                    to load the configuration again, and is ignored.
    nohup           The terminal may close: SIGHUP is ignored.
"""
from __future__ import annotations

import argparse
import logging
import os
import re
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
from pathlib import Path
from typing import Any, Callable, NoReturn, TextIO

from sse_core import __version__
from sse_core.cli.log_writer import LogWriter

PROGRAM = Path(sys.argv[0]).name or "sse_server.py"

# Seconds between two status lines, and between two checks whether Enter counts now.
STATUS_EVERY = 1.0

# Seconds between two ticks of the clock, as in the original.
TICK = 1.0

# Environment variables that hold tokens or a key. In a command line, everybody could see these.
VARIABLES = ("SSE_TOKEN", "SSE_PUBLISH_TOKEN", "SSE_JWT_KEY")

# Options of SSEServer that its messages name, and their flags.
OPTIONS = {name: name.replace("_", "-") for name in (
    "cert", "heartbeat", "history", "history_file", "host", "jwt_key", "key", "max_clients",
    "patience", "port", "redis", "retry", "reuse_port", "stream", "sync")}
OPTIONS.update(tokens="token", publish_tokens="publish-token")

# The method `add_argument` of one group of --help.
Add = Callable[..., object]

logger = logging.getLogger("sse_server")


class Parser(argparse.ArgumentParser):
    """A parser that reports an error on one line."""

    def error(self, message: str) -> NoReturn:
        """End the process with this message and status 2."""
        self.exit(2, f"{self.prog}: {message} (--help shows the options)\n")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, or that of this process if it is None.

    The result has the options of SSEServer under their names there, and those of the command. A bad
    command line ends the process with one line on standard error and status 2.
    """
    parser = Parser(prog=PROGRAM, usage="%(prog)s [OPTION ...]",
                    description="A small Server-Sent Events server. Without options, it "
                    "streams the local time on http://127.0.0.1:6500/.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("--verbose", action="store_true", help="log connects and disconnects too")
    loudness.add_argument("--quiet", action="store_true", help="log warnings only")
    for title, add_flags in (("events", _events_in), ("access", _who_may),
                             ("limits", _how_long), ("network", _where)):
        add_flags(parser.add_argument_group(title).add_argument)
    # Not `parse_args`, which would show all that it does not know.
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        # Only the name, because what follows can be a token.
        name = unknown[0].partition("=")[0]
        near = get_close_matches(name, re.findall("--[a-z-]+", parser.format_help()), 1)
        parser.error(f"unrecognized argument {name}" + "".join(f": was {each} meant?"
                                                               for each in near))
    options.variables = [name for name in VARIABLES if name in os.environ]
    for name in options.variables:
        # Whoever set it wanted a server that is closed. Without a token it would be open.
        if not os.environ[name].strip():
            parser.error(f"{name} is set, and empty: give it a value, or unset it")
    if (options.json or options.wait_clients) and not options.stdin:
        parser.error("--json and --wait-clients need --stdin")
    if options.interval is None:
        # Ticks would push real events out of the log and fill the file.
        comes_from_elsewhere = (options.stdin or options.redis or options.history_file
                                or options.publish_tokens or options.jwt_key)
        options.interval = 0.0 if comes_from_elsewhere else TICK
    if not 0 <= options.interval < 1e6:
        parser.error("interval must be a number of seconds from 0 on")
    # Where no terminal is, an encrypted key is an error and not a question.
    options.key_password = ask_password if has_foreground(sys.stdin) else None
    return options


def _events_in(add: Add) -> None:
    """Add the flags that say where events come from, and where they are kept."""
    add("--interval", type=float, metavar="SECONDS",
        help=f"time between two ticks of the clock; 0: no clock (default {TICK:g}; 0 with --stdin, "
             "--redis, --history-file, --publish-token or --jwt-key, which bring events, too)")
    add("--stdin", action="store_true",
        help="publish each line of standard input; after the last one, stop when all have it")
    add("--json", action="store_true",
        help='with --stdin: each line is {"data": ..., "event": ..., "channel": ...}')
    add("--wait-clients", type=int, default=0, metavar="N",
        help="with --stdin: begin when so many clients are there")
    add("--redis", metavar="URL",
        help="redis://HOST:PORT/DB: share events with other servers through a Redis stream")
    add("--stream", metavar="KEY", help="key of that stream (default sse)")
    add("--history-file", metavar="FILE",
        help="an SQLite file that keeps events over restarts; servers on this machine can share it")
    add("--sync", action="store_true", help="that file survives a power failure, too; slower")


def _who_may(add: Add) -> None:
    """Add the flags that say who may watch and publish. Their values are never shown."""
    add("--token", action="append", dest="tokens", metavar="TOKEN",
        default=os.environ.get("SSE_TOKEN", "").split(),
        help="let in who has this token; can be repeated; also from SSE_TOKEN (default: everybody)")
    add("--publish-token", action="append", dest="publish_tokens", metavar="TOKEN",
        default=os.environ.get("SSE_PUBLISH_TOKEN", "").split(),
        help="let who has this token publish by POST; can be repeated; also from "
             "SSE_PUBLISH_TOKEN (default: nobody)")
    add("--token-file", type=tokens_in, action="extend", dest="tokens", metavar="FILE",
        help="file with tokens for --token, one on each line; # begins a comment; can be repeated")
    add("--publish-token-file", type=tokens_in, action="extend", dest="publish_tokens",
        metavar="FILE", help="the same for --publish-token")
    add("--jwt-key", default=os.environ.get("SSE_JWT_KEY"), metavar="KEY",
        help="secret or PEM public key of signed tokens, which grant channels; or SSE_JWT_KEY")
    add("--origin", action="append", dest="origins", default=[], metavar="ORIGIN",
        help="whose pages may read and publish: https://example.org; repeatable (default: all)")
    add("--allowed-host", action="append", dest="allowed_hosts", default=[], metavar="NAME",
        help="refuse requests for any other host name; can be repeated (default: any)")


def _how_long(add: Add) -> None:
    """Add the flags that set bounds in time and number."""
    add("--history", type=int, default=1024, metavar="FRAMES",
        help="events kept for clients that come back, 64 at least; 0: no ids (default %(default)s)")
    add("--patience", type=float, default=5.0, metavar="SECONDS",
        help="how long --stdin waits for a client that stalls; 0: not at all (default %(default)g)")
    add("--heartbeat", type=float, default=15.0, metavar="SECONDS",
        help="silence after which a client is sent a comment; 0: never (default %(default)g)")
    add("--retry", type=float, default=3.0, metavar="SECONDS",
        help="pause of a client before it reconnects, +-50 %% at random (default %(default)g)")
    add("--max-clients", type=int, default=10000, metavar="N",
        help="clients at a time, as far as the limit of open files allows (default %(default)s)")


def _where(add: Add) -> None:
    """Add the flags that say where clients find the server."""
    add("--host", default="127.0.0.1", help="address or name to listen on (default %(default)s)")
    add("--port", type=int, default=6500,
        help="port to listen on; 0 picks a free one (default %(default)s)")
    add("--reuse-port", action="store_true", help="other servers may listen on the same port, too")
    add("--cert", metavar="FILE", help="certificate chain for TLS, PEM")
    add("--key", metavar="FILE",
        help="private key, if not in the file of --cert; if encrypted, its password is asked for")


def tokens_in(path: str) -> list[str]:
    """Return the tokens in a file, one a line. Blank lines and those that begin with # hold none.

    A byte order mark is skipped. Raises ArgumentTypeError, which argparse shows, also if there is
    no token, because the server would be open to everybody then.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", error)
        raise argparse.ArgumentTypeError(f"cannot read {path!r}: {reason}") from None
    tokens = [line for line in lines if line and not line.startswith("#")]
    if not tokens:
        raise argparse.ArgumentTypeError(f"{path!r} holds no token")
    return tokens


def with_flags(message: str) -> str:
    """Return a message of SSEServer with flags in place of the options that it names.

    Only where an option is meant, because many are common words: at the start and in a list.
    """
    names = "|".join(sorted(OPTIONS, key=len, reverse=True))
    return re.sub(rf"(^|needs |, | or | and )({names})\b(?!-)",
                  lambda match: f"{match[1]}--{OPTIONS[match[2]]}", message)


def open_missing_streams() -> None:
    """Open standard streams that are closed, as with `2>&-`, on /dev/null.

    Then no socket or file gets their numbers, and nobody needs to ask whether they are there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))


def set_up_logging(options: argparse.Namespace) -> LogWriter:
    """Log to standard error, and return what writes there. Nothing waits until it is read.

    In a program that uses SSEServer, nothing is set up: it decides itself what it logs, and where.
    """
    writer = LogWriter(sys.stderr)
    logging.basicConfig(format="%(message)s", stream=writer)
    logger.setLevel("DEBUG" if options.verbose else "WARNING" if options.quiet else "INFO")
    return writer


def say(*lines: str) -> None:
    """Print lines on standard output. If it is full, or if nobody reads it, they are lost."""
    # Not by `print`: what that could not write, Python would try again at exit.
    with suppress(OSError):
        os.write(sys.stdout.fileno(), "".join(f"{line}\n" for line in lines).encode())


def status_lines(stats: Callable[[], Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for the bottom of a terminal, again and again.

    stats: see SSEServer.stats. The rate is that of the time since the last line.
    """
    deliveries, before = 0, time.monotonic()
    while True:
        now, shown = time.monotonic(), stats()
        # Two lines can come at one moment of a coarse clock.
        rate = (shown["deliveries"] - deliveries) / max(0.001, now - before)
        deliveries, before = shown["deliveries"], now
        line = (f"clients: {shown['clients']}, events: {shown['events']}, "
                f"deliveries/s: {rate:.0f}")
        # Some terminals say that they have no columns.
        yield line[:(os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1]


def catch_signals(waker: socket.socket) -> None:
    """Turn SIGINT and SIGTERM into a byte to this socket, and SIGHUP if a terminal sends it.

    A handler can interrupt anything, so it does nothing itself: Python writes the byte. SIGHUP is
    ignored without a terminal, where it asks a service to load its configuration again. A changed
    certificate is noticed without it.

    The shell ignores SIGINT for what a script runs in the background. It is caught all the same.
    """
    signal.set_wakeup_fd(waker.fileno())
    # A read just after the terminal was given to another job fails then, and does not stop us.
    signal.signal(signal.SIGTTIN, signal.SIG_IGN)
    caught = [signal.SIGINT, signal.SIGTERM]
    # It is ignored if nohup started us, and stays so.
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        # This fails without a controlling terminal.
        with suppress(OSError):
            os.close(os.open(os.ctermid(), os.O_RDONLY))
            caught.append(signal.SIGHUP)
    for signum in caught:
        # That it came is read from the socket.
        signal.signal(signum, lambda *_: None)


@cache
def ask_password() -> str:
    """Return the password that is typed at the terminal.

    It is asked for once, and kept for the time when the certificate is loaded again. Raises
    ValueError if nothing is typed.
    """
    # Imported late, because it loads termios for a question that is rare.
    import getpass
    try:
        return getpass.getpass("Password of the key of the certificate: ")
    except (EOFError, KeyboardInterrupt):
        raise ValueError("no password was typed") from None


def has_foreground(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that has this process in its foreground.

    It has not while another job of the shell runs there.
    """
    # This fails if it controls no session. Then there are no jobs.
    with suppress(OSError):
        return stream.isatty() and os.tcgetpgrp(stream.fileno()) == os.getpgrp()
    return True


def ask_about_input() -> None:
    """Ask whether --stdin was meant, if a pipe or a file is given without it.

    The server runs on, because a service manager can give it such an input, too.
    """
    mode = os.fstat(sys.stdin.fileno()).st_mode
    if stat.S_ISFIFO(mode) or stat.S_ISREG(mode):
        logger.warning("standard input is not read: was --stdin meant?")


def wait_for_stop(wakee: socket.socket, watch_input: bool, status: Iterator[str] | None,
                  writer: LogWriter) -> None:
    """Return on Enter, or when `wakee` can be read. Until then, renew the status line.

    watch_input: Enter counts, as long as this process is in the foreground of a terminal. status:
    what to show, if anything, at the bottom of a terminal. writer: what shows it there.

    The end of standard input is no Enter, because services have no input.
    """
    # Whether the next look leaves standard input out. A terminal at its end (Ctrl-D) says so at
    # once, again and again.
    rests = False
    while True:
        watched: list[Any] = [wakee]
        if watch_input and not rests and has_foreground(sys.stdin):
            watched.append(sys.stdin)
        ready = select.select(watched, [], [], STATUS_EVERY)[0]
        # The line is taken away before the end. Another job keeps the terminal for itself.
        if status and has_foreground(sys.stderr):
            writer.show_status("" if ready else next(status))
        typed = b""
        if sys.stdin in ready:
            # It fails if the terminal was hung up, or given to another process just now.
            with suppress(OSError):
                typed = os.read(sys.stdin.fileno(), 4096)
        if wakee in ready or b"\n" in typed:
            return
        rests = sys.stdin in ready and not typed
