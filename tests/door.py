"""A door before a server: a TCP proxy of the test's own that notes, cuts, refuses and answers.

    client  <->  door  <->  server

Clients know the door's port only, so a server behind it may die and come back on another port.
Meanwhile a test decides what a client meets:

    shut            nobody listens
    hold            somebody listens, but does not answer yet
    cut, cut_after  the connection ends, at once or in the middle of what is sent
    answer          an answer that no server of ours gave
"""
from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager
from typing import Iterator

from helpers import PATIENCE, connect

# Requests for this path are for the server of the test's pages, so that a page and a stream can
# have one origin.
PAGES = b"GET /interop/"


class Door:
    """Forward connections to `target`, a port on this machine."""

    def __init__(self, target: int, pages: int | None = None) -> None:
        self.target, self.pages = target, pages

        # Sent to every GET instead of forwarding it, if not None. A preflight is forwarded.
        self.answer: bytes | None = None

        # Once these bytes have been sent to a client, its connection is cut, if not None. Then it
        # is None again.
        self.cut_after: bytes | None = None

        # The heads of all requests for streams, in order, and when each came, in seconds of the
        # monotonic clock. Appended to by the threads below.
        self.requests: list[bytes] = []
        self.times: list[float] = []

        # All that servers sent, in order of arrival.
        self.sent = bytearray()

        # Cleared while connections are taken but nothing is done with them.
        self._is_serving = threading.Event()

        # Guards the two below, which the test's thread empties.
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

        self._listener: socket.socket | None = None
        self.port = 0
        self.open()

    def open(self) -> None:
        """Listen, on the same port as before, and serve."""
        self._is_serving.set()
        if self._listener:
            return
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self._listener.getsockname()[1]
        self._start(self._accept, self._listener)

    def shut(self) -> None:
        """Refuse connections, and cut those there are."""
        listener, self._listener = self._listener, None
        if listener:
            # Wakes the thread that accepts, which `close` alone would not.
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self.cut()

    def hold(self) -> None:
        """Cut the connections there are, and let new ones wait until `open`."""
        self._is_serving.clear()
        self.cut()

    def cut(self) -> None:
        """End every connection in the middle, as a server that dies does."""
        with self._lock:
            sockets, self._sockets = self._sockets, set()
        for sock in sockets:
            quietly_shut(sock)

    def stop(self) -> None:
        """End everything, and wait for the threads."""
        self.shut()
        self._is_serving.set()
        for thread in self._threads:
            thread.join(PATIENCE)

    def streams(self) -> int:
        """Return how many requests for a stream have come."""
        return len(self.requests)

    def _start(self, target, *arguments) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                inner, _ = listener.accept()
            except OSError:
                return
            self._start(self._serve, inner)

    def _serve(self, inner: socket.socket) -> None:
        """Carry one connection until it ends."""
        with inner:
            with self._lock:
                self._sockets.add(inner)
            self._is_serving.wait()
            try:
                self._forward_first(inner)
            except OSError:
                # The peer, or the server behind us, went away: that is what doors are for.
                pass
            with self._lock:
                self._sockets.discard(inner)

    def _forward_first(self, inner: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            data = inner.recv(65536)
            if not data:
                return
            head += data
        if head.startswith(PAGES):
            target = self.pages
        else:
            target = self.target
            self._note(head)
            if self.answer is not None and head.startswith(b"GET "):
                inner.sendall(self.answer)
                inner.shutdown(socket.SHUT_WR)
                inner.recv(65536)
                return
        with connect(target) as outer:
            outer.settimeout(None)
            with self._lock:
                self._sockets.add(outer)
            outer.sendall(head)
            upwards = threading.Thread(target=self._pump_up, args=(inner, outer), daemon=True)
            upwards.start()
            try:
                self._pump_down(outer, inner)
            finally:
                quietly_shut(inner), quietly_shut(outer)
                upwards.join(PATIENCE)
                with self._lock:
                    self._sockets.discard(outer)

    def _pump_up(self, inner: socket.socket, outer: socket.socket) -> None:
        try:
            for data in iter(lambda: inner.recv(65536), b""):
                self._note(data)
                outer.sendall(data)
        except OSError:
            pass
        quietly_shut(outer)

    def _pump_down(self, outer: socket.socket, inner: socket.socket) -> None:
        for data in iter(lambda: outer.recv(65536), b""):
            cut_after = self.cut_after
            if cut_after and cut_after in data:
                self.cut_after = None
                inner.sendall(data[:data.index(cut_after) + len(cut_after)])
                return
            self.sent += data
            inner.sendall(data)

    def _note(self, data: bytes) -> None:
        # Clients write a head at once, so that it arrives whole.
        for head in data.split(b"\r\n\r\n"):
            # A browser asks for an icon of its own accord.
            if head.startswith(b"GET ") and not head.startswith(b"GET /favicon.ico "):
                self.times.append(time.monotonic())
                self.requests.append(head)


def quietly_shut(sock: socket.socket) -> None:
    """End both directions of a socket that may have ended already."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


@contextmanager
def door_before(target: int, pages: int | None = None) -> Iterator[Door]:
    """Run a door before the server on this port."""
    door = Door(target, pages)
    try:
        yield door
    finally:
        door.stop()
