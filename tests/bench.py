"""A publisher without its thread: turned by hand, over socket pairs, by a clock of the test's.

`Bench` is the publisher and its hub, `Peer` a client of it and the test's end of its socket.
"""
import math
import socket
import threading
from functools import partial

from helpers import KEPT, in_a_thread
from publisher import Publisher
from sse_core.engine.clients import StreamRequest, Subscription
from sse_core.engine.hub import Hub
from sse_core.stores.store import StoreHub
from wire import Decoder

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


class Narrow:
    """A real socket that takes as many bytes as the test allows: a send is cut where it wants."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.room = 0
        self.fileno, self.recv, self.close = sock.fileno, sock.recv, sock.close
        self.getsockopt = sock.getsockopt
        self.shutdown = sock.shutdown

    def send(self, data) -> int:
        if not self.room:
            raise BlockingIOError
        sent = self.sock.send(data[:self.room])
        self.room -= sent
        return sent


def stream_request(chunked: bool = True, channels=(), last_id: str = None, since: float = None,
            ends_at: float = math.inf, came_at: float = 0.0) -> StreamRequest:
    return StreamRequest(HEAD, Subscription(frozenset(channels), chunked), last_id, since, ends_at,
                   came_at)


class Peer:
    """A registered client and the test's end of its socket pair."""

    def __init__(self, hub: Hub, narrow: bool = False, peer: str = "",
                 wrap=lambda sock: sock, **options) -> None:
        ours, self.sock = socket.socketpair()
        ours.setblocking(False)
        self.sock.setblocking(False)
        self.server_end = Narrow(ours) if narrow else wrap(ours)
        self.stream = Decoder(options.get("chunked", True), options.get("last_id") or "",
                              original=not hub._log.has_ids)
        self.raw = bytearray()
        assert hub.register(self.server_end, stream_request(**options), peer)

    def take(self) -> Decoder:
        """Receive all that is there now."""
        try:
            while True:
                data = self.sock.recv(1 << 17)
                if not data:
                    return self.stream
                self.raw += data
                self.stream.feed(data)
        except BlockingIOError:
            return self.stream

    def data(self) -> list:
        return [event.data for event in self.take().events]


class Bench:
    """A publisher turned by hand."""

    def __init__(self, heartbeat: float, **options) -> None:
        self.now = 1000.0
        self.peers = []
        self.thread = None
        self.watched = None                     # a thread of which it is told when it looks
        self.looked = threading.Event()         # at the clock, as who waits does at each turn
        make = partial(StoreHub, None) if options.pop("shared", False) else Hub
        self.hub = make(clock=self.clock, wall=lambda: self.now,
                              **{**KEPT, **options, "heartbeat": heartbeat})
        self.publisher = Publisher(self.hub)
        self.publish = self.hub.publish

    def clock(self) -> float:
        if threading.current_thread() is self.watched:
            self.looked.set()
        return self.now

    def peer(self, **options) -> Peer:
        self.peers.append(Peer(self.hub, **options))
        return self.peers[-1]

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.publisher.turn(0)

    def turn_until_it_waits(self) -> None:
        """Turn until the thread that is watched has done all it may before time goes on.

        It has if it looked twice after a turn, and neither published nor ended.
        """
        idle = 0
        while idle < 2 and self.watched.is_alive():
            before = self.hub.stats()["events"]
            self.looked.clear()
            self.turn()
            idle += self.looked.wait(0.02)
            if self.hub.stats()["events"] != before or self.hub.has_work():
                idle = 0

    def groups(self) -> int:
        """Return how many groups of clients that are sent the same bytes there are."""
        return len([*self.publisher._groups])

    def start(self) -> None:
        """Let a thread turn the publisher from now on."""
        self.thread = in_a_thread(self.publisher.run)

    def stop(self) -> None:
        self.hub.stop()
        if self.thread:
            self.thread.join()
        else:
            self.publisher.close()

    def pass_time(self, seconds: float, step: float = 0.5) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + step)
            self.turn()


def piped(b, texts: list, read, step: float = 0.25, seconds: float = 1000.0) -> float:
    """Publish texts with `wait`, and drain, beside readers that `read` once a step.

    Returns how many seconds that took, on the clock of the bench.
    """
    began = b.now
    done = threading.Event()

    def pipe():
        for text in texts:
            b.publish(text, wait=True)
        b.hub.drain()
        done.set()
    b.watched = in_a_thread(pipe)
    while not done.is_set() and b.now - began < seconds:
        read()
        b.turn_until_it_waits()
        b.now += step
    b.hub.stop()
    b.watched.join()
    assert done.is_set()
    return b.now - began
