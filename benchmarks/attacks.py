"""Hostile peers, as a process: hold connections to a server and do one thing with each, for ever.

    attacks.py NAME PORT        one of ATTACKS; a connection that is cut comes again. Prints a line
                                when all are there; the end of standard input ends it
"""
import os
import selectors
import socket
import sys
import time

HOST = b" HTTP/1.1\r\nHost: localhost\r\n"
ATTACKS = {     # how many connections; what each sends at first; what it goes on sending
    "refused": (1200, b"X\r\n\r\n", b""),
    "silent": (1500, b"", b""),
    "slow": (300, b"GET /slow" + HOST + b"\r\n", b""),
    "dribbling": (600, b"POST /x" + HOST + b"Content-Length: 100000\r\n\r\n", b"x"),
    "status": (100, b"GET /-/status" + HOST + b"\r\n", b""),
}
PER_LOOK = 20       # connections made between two looks at those that are there
RATE = 1000         # connections a second that come again after they were cut


def connect(selector: selectors.BaseSelector, port: int, first: bytes) -> None:
    sock = socket.socket()
    sock.setblocking(False)
    sock.connect_ex(("127.0.0.1", port))
    selector.register(sock, selectors.EVENT_READ | selectors.EVENT_WRITE, first)


def serve(selector: selectors.BaseSelector, key: selectors.SelectorKey, mask: int) -> bool:
    """Send what is to be sent, throw away what comes. Returns False when the peer has closed."""
    try:
        if mask & selectors.EVENT_WRITE:
            if key.data:
                key.fileobj.send(key.data)
            selector.modify(key.fileobj, selectors.EVENT_READ)
        return not mask & selectors.EVENT_READ or bool(key.fileobj.recv(1 << 16))
    except OSError:         # it was cut
        return False


def main(name: str, port: int) -> None:
    number, first, more = ATTACKS[name]
    os.nice(10)
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    told, dribble_at, connect_at, began = False, 0.0, 0.0, time.monotonic()
    while True:
        missing = number + 1 - len(selector.get_map())
        if not told or time.monotonic() > connect_at:
            connect_at = time.monotonic() + PER_LOOK / RATE
            for _ in range(min(PER_LOOK, missing)):
                connect(selector, port, first)
        for key, mask in selector.select(0.01):
            if key.fileobj is sys.stdin:
                return
            if not serve(selector, key, mask):
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
