"""Clients that others wrote, on a real server: every event as it was, once, also after a cut."""
import json
import subprocess
import threading
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Callable, Iterator, List, Tuple

import pytest

from door import door_before
from helpers import PATIENCE, lack, need, wait_until
from sse_server import SSEServer

pytestmark = pytest.mark.interop

Got = Tuple[str, str, str]      # an event as a client saw it: name, data, id
EVENTS = [                      # data, name
    ("hello", None),
    ("three\nlines\nof text", None),
    ("\nan empty line first and last\n", "custom"),
    ("\n", None),
    ("", None),
    ("", "custom"),
    (" a space first", None),
    (": no comment", None),
    ("data: x\n\nevent: y\nid: 1", None),
    ("grüße 你好 🎉", "größe"),
    ("no ends of lines: \x0b\x0c\x1c\x85\u2028\u2029", None),
    ("\0\ufeff", None),
    ("x" * 100000, "a name with spaces"),
    ("é" * 100000 + "\n" + "🎉" * 10000, None),
]
# A heartbeat would keep a client waiting that should fail
OPTIONS = {"port": 0, "retry": 0.1, "heartbeat": 0}
NAMES = sorted({name for _, name in EVENTS if name})
SCRIPT = Path(__file__).with_name("interop") / "listen.mjs"


class Listener:
    """A client that runs in the background, and what it has got."""

    def __init__(self) -> None:
        self.got: List[Got] = []
        self.notes: List[str] = []


@pytest.fixture
def eventsource() -> Path:
    """Return the script, if its package is there."""
    need("node", "nodejs")
    if not (SCRIPT.parent / "node_modules" / "eventsource-4").exists():
        lack("the npm package eventsource (make interop installs it)")
    return SCRIPT


@contextmanager
def listening(script: Path, url: str) -> Iterator[Listener]:
    """Run the script until the end of the block, collecting what it prints."""
    listener = Listener()
    process = subprocess.Popen(["node", str(script), url, *NAMES], encoding="utf-8",
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    takes = {process.stdout: lambda line: listener.got.append(tuple(json.loads(line))),
             process.stderr: lambda line: listener.notes.append(line.strip())}
    threads = [threading.Thread(target=collect, args=output) for output in takes.items()]
    with process:
        for thread in threads:
            thread.start()
        try:
            yield listener
        finally:
            process.kill()
            for thread in threads:
                thread.join()


def collect(lines, take: Callable[[str], object]) -> None:
    """Take every line as it comes."""
    for line in lines:
        take(line)


def publish_all(server: SSEServer) -> List[Got]:
    """Publish every kind of event, and return what a client must see."""
    return [(name or "message", data, server.publish(data, name)) for data, name in EVENTS]


def test_eventsource_gets_every_event_as_it_was(eventsource):
    with SSEServer(**OPTIONS) as server, listening(eventsource, server.url + "/token") as client:
        wait_until(lambda: server.clients == 1)
        published = publish_all(server)
        wait_until(lambda: len(client.got) >= len(published))
        assert client.got == published
        assert client.notes == ["open"]


def test_eventsource_comes_back_by_itself_and_misses_nothing(eventsource):
    with SSEServer(**OPTIONS) as server, door_before(server.port) as proxy, \
            listening(eventsource, f"http://127.0.0.1:{proxy.port}/token") as client:
        wait_until(lambda: server.clients == 1)
        published = []
        for cuts in range(1, 4):
            published += publish_all(server)
            # So that some of them may still be on their way
            wait_until(lambda: len(client.got) > len(published) - 4)
            proxy.cut()
            published += publish_all(server)
            wait_until(lambda: client.notes.count("error") == cuts)
            published += publish_all(server)
            wait_until(lambda: client.notes.count("open") == cuts + 1)
        published += publish_all(server)
        wait_until(lambda: len(client.got) >= len(published))
        assert client.got == published


@contextmanager
def by_httpx_sse(url: str, last_id: str) -> Iterator[Iterator[Got]]:
    """Open the stream with httpx-sse."""
    httpx, httpx_sse = pytest.importorskip("httpx"), pytest.importorskip("httpx_sse")
    headers = {"Last-Event-ID": last_id} if last_id else {}
    with httpx.Client(timeout=PATIENCE, trust_env=False) as client, \
            httpx_sse.connect_sse(client, "GET", url, headers=headers) as source:
        yield ((event.event, event.data, event.id) for event in source.iter_sse()
               if event.event != "welcome")


@contextmanager
def by_sseclient(url: str, last_id: str) -> Iterator[Iterator[Got]]:
    """Open the stream with sseclient-py on requests."""
    requests, sseclient = pytest.importorskip("requests"), pytest.importorskip("sseclient")
    headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last_id} if last_id else {})}
    with requests.Session() as session:
        session.trust_env = False
        with closing(session.get(url, headers=headers, stream=True, timeout=PATIENCE)) as response:
            yield ((event.event, event.data, event.id)
                   for event in sseclient.SSEClient(response).events()
                   if event.event != "welcome")


both = pytest.mark.parametrize("opened", [by_httpx_sse, by_sseclient])


def take(stream: Iterator[Got], number: int) -> List[Got]:
    """Take so many events from the stream."""
    return [next(stream) for _ in range(number)]


@both
def test_a_python_client_gets_every_event_as_it_was(opened):
    with SSEServer(**OPTIONS) as server, opened(server.url + "/token", "") as stream:
        wait_until(lambda: server.clients == 1)
        published = publish_all(server)
        assert take(stream, len(published)) == published
        server.stop()
        assert list(stream) == []


@both
def test_a_python_client_comes_back_with_its_last_id_and_misses_nothing(opened):
    with SSEServer(**OPTIONS) as server:
        with opened(server.url + "/token", "") as stream:
            wait_until(lambda: server.clients == 1)
            published = publish_all(server)
            got = take(stream, 3)
        for number in (5, 1, 9):
            published += publish_all(server)
            with opened(server.url + "/token", got[-1][2]) as stream:
                got += take(stream, number)
        with opened(server.url + "/token", got[-1][2]) as stream:
            got += take(stream, len(published) - len(got))
            server.stop()
            assert list(stream) == []
        assert got == published
