"""A real redis-server, servers that follow a stream in it, and a wire between that can be cut."""
import os
import selectors
import shutil
import socket
import subprocess
import threading
from contextlib import contextmanager

import pytest
import requests

from helpers import PATIENCE, Client, Server, connect, free_port, need, wait_until

redis = pytest.importorskip("redis") if not os.environ.get("CI") else __import__("redis")
POST = "SECRET"


class Redis:
    """A redis-server of the test's own, with append-only persistence."""

    def __init__(self, folder) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.client = redis.Redis(port=self.port)
        self.process = None
        self.start()

    def start(self) -> None:
        command = [need("redis-server", "redis-server"), "--port", str(self.port),
                   "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", "",
                   "--appendonly", "yes", "--appendfsync", "always"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(self.answers)

    def answers(self) -> bool:
        try:
            return self.client.ping()
        except redis.RedisError:        # not yet, or still loading
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wipe(self) -> None:
        """Start again without data."""
        self.kill()
        shutil.rmtree(self.folder / "appendonlydir")
        self.start()

    def add(self, id: str = "*", **fields) -> str:
        return self.client.xadd("sse", fields, id=id).decode()


@pytest.fixture
def store(tmp_path):
    store = Redis(tmp_path)
    yield store
    store.kill()
    store.client.close()


@contextmanager
def following(store: Redis, number: int = 1, *arguments: str, ports=None):
    """Run so many servers that follow the stream."""
    servers = []
    try:
        for index in range(number):
            port = ("--port", str(ports[index])) if ports else ()
            servers.append(Server("--redis", store.url, "--publish-token", POST, "--retry", "0.1",
                                  *port, *arguments, stdin=subprocess.DEVNULL))
        yield servers
    finally:
        for server in servers:
            assert "Traceback" not in server.close()


def post(port: int, text: str, **options) -> requests.Response:
    return requests.post(f"http://127.0.0.1:{port}/{POST}", data=text, timeout=PATIENCE, **options)


def resume(port: int, last_id: str, proxied: bool = False) -> Client:
    header = f"Last-Event-ID: {last_id}\r\n" if last_id else ""
    return Client(port, f"GET / HTTP/1.1\r\nHost: x\r\n{header}\r\n".encode(), last_id=last_id,
                  proxied=proxied)


def data(client: Client) -> list:
    return [event.data for event in client.stream.events]


def check_told(events: list, published: list) -> None:
    """Fail unless a client got each of these texts once and in order, or a gap where it did not."""
    texts = [event.data for event in events if event.name != "gap"]
    assert len(texts) == len(set(texts)), "an event came twice"
    last, is_told = -1, False
    for event in events:
        if event.name == "gap":
            is_told = True
        elif event.data in published:       # else its answer was lost
            place = published.index(event.data)
            is_next = place == last + 1 or is_told and place > last
            assert is_next, f"{event.data} after {published[last:last + 1]}"
            last, is_told = place, False
    assert last == len(published) - 1 or is_told, f"nothing after {published[last:last + 1]}"


def add_many(client, *, trimmed: bool = False, number: int = 50, name: str = "burst") -> list:
    """Add entries in one transaction; return their data."""
    texts = [f"{name} {index}" for index in range(number)]
    pipe = client.pipeline(transaction=True)
    for text in texts:
        pipe.xadd("sse", {"data": text}, **({"maxlen": 1, "approximate": False} if trimmed else {}))
    pipe.execute()
    return texts


class Forwarder(threading.Thread):
    """Copies bytes between its port and another, unless it is blocked.

    Then all stands still, and nothing is closed.
    """

    def __init__(self, port: int) -> None:
        super().__init__()
        self.target = port      # of connections from now on
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._way = threading.Event()
        self._way.set()
        self._ended = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def block(self) -> None:
        self._way.clear()

    def open(self) -> None:
        self._way.set()

    def run(self) -> None:
        while not self._ended:
            ready = self._selector.select(0.02)
            self._way.wait()
            for key, _ in ready:
                self._accept() if key.data is None else self._copy(key.fileobj, key.data)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()
        self._selector.close()

    def _accept(self) -> None:
        here = self._listener.accept()[0]
        try:
            there = connect(self.target)
        except OSError:
            here.close()
            return
        self._selector.register(here, selectors.EVENT_READ, there)
        self._selector.register(there, selectors.EVENT_READ, here)

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        if source.fileno() < 0:         # closed in the same round
            return
        try:
            data = source.recv(65536)
            target.sendall(data)
        except OSError:
            data = b""
        if not data:
            for sock in (source, target):
                self._selector.unregister(sock)
                sock.close()

    def __enter__(self) -> "Forwarder":
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended = True
        self.open()
        self.join()
