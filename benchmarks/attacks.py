"""Hostile peers, as a process: hold connections to a server and do one thing with each, for ever.

    attacks.py NAME PORT        one of ATTACKS; a connection that is cut comes again. Prints a line
                                when all are there; the end of standard input ends it
"""
import os
import selectors
import socket
import ssl
import sys
import time
from contextlib import suppress
from typing import Dict, NamedTuple


class Attack(NamedTuple):
    number: int             # of connections
    first: bytes            # what each sends at first
    more: bytes = b""       # what it goes on sending
    leaves: bool = False    # once it is answered; it comes again, too
    rate: int = 1000        # connections a second that come again
    tls: str = ""           # the kind of key of a server that has TLS
    options: Dict[str, str] = {}    # of the server, see serve.py


def client_hello() -> bytes:
    """Return how a TLS handshake begins."""
    outgoing = ssl.MemoryBIO()
    context = ssl._create_unverified_context()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


HELLO = client_hello()
HOST = b" HTTP/1.1\r\nHost: localhost\r\n"
ENCODED = b"&".join([b"%61" * 12 + b"=" + b"%C3%A9" * 6] * 99)      # 7,700 bytes
BAD_TOKEN = b".".join([b"e" * 1365] * 3)
SLOW = {"slow": "5000"}      # milliseconds in `authorize`
ATTACKS = {
    "refused": Attack(1200, b"X\r\n\r\n", options=SLOW),
    "silent": Attack(1500, b"", tls="P-256"),
    "slow": Attack(300, b"GET /slow" + HOST + b"\r\n", options=SLOW),
    "dribbling": Attack(600, b"POST /x" + HOST + b"Content-Length: 100000\r\n\r\n", b"x",
                        options=SLOW),
    "status": Attack(100, b"GET /-/status" + HOST + b"\r\n", options=SLOW),
    "parameters": Attack(50, b"GET /?" + ENCODED + HOST + b"\r\n", leaves=True),
    "token": Attack(50, b"GET /" + BAD_TOKEN + HOST + b"\r\n", leaves=True,
                    options={"token": "token", "jwt_key": "k" * 40}),
    **{f"tls-{name}-{number}": Attack(number, first, tls="P-256")
       for number in (1000, 3000)
       for name, first in (("byte", HELLO[:1]), ("half", HELLO[:len(HELLO) // 2]),
                           ("whole", HELLO))},
    "tls-rsa": Attack(3000, HELLO, tls="RSA-2048", rate=500),
}
PER_LOOK = 20       # connections made between two looks at those that are there


def connect(selector: selectors.BaseSelector, port: int, first: bytes) -> None:
    sock = socket.socket()
    sock.setblocking(False)
    sock.connect_ex(("127.0.0.1", port))
    selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, first)


def serve(selector: selectors.BaseSelector, key: selectors.SelectorKey, mask: int,
          leaves: bool) -> bool:
    """Send what is to be sent, throw away what comes. Returns False when it is over."""
    try:
        if mask & selectors.EVENT_WRITE:
            if key.data:
                key.fileobj.send(key.data)
            selector.modify(key.fileobj, selectors.EVENT_READ)
        return not mask & selectors.EVENT_READ or bool(key.fileobj.recv(1 << 16)) and not leaves
    except OSError:         # it was cut
        return False


def main(name: str, port: int) -> None:
    number, first, more, leaves, rate = ATTACKS[name][:5]
    os.nice(10)
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    told, dribble_at, connect_at, began = False, 0.0, 0.0, time.monotonic()
    while True:
        missing = number + 1 - len(selector.get_map())
        if not told or time.monotonic() > connect_at:
            connect_at = time.monotonic() + PER_LOOK / rate
            for _ in range(min(PER_LOOK, missing)):
                connect(selector, port, first)
        for key, mask in selector.select(0.01):
            if key.fileobj is sys.stdin:
                return
            if not serve(selector, key, mask, leaves):
                selector.unregister(key.fileobj)
                key.fileobj.close()
        if more and time.monotonic() > dribble_at:
            dribble_at = time.monotonic() + 0.5
            for key in [*selector.get_map().values()][1:]:
                try:
                    key.fileobj.send(more)
                except OSError:         # it is told so by the selector, too
                    pass
        if not told and (len(selector.get_map()) > number - PER_LOOK
                         or time.monotonic() > began + 3):
            told = print("there", flush=True) is None


if __name__ == "__main__":
    if "--help" in sys.argv:
        sys.exit(print(__doc__))
    if len(sys.argv) != 3 or sys.argv[1] not in ATTACKS:
        sys.exit(f"usage: attacks.py {'|'.join(ATTACKS)} PORT")
    main(sys.argv[1], int(sys.argv[2]))
