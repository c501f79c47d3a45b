"""Behind each proxy of examples/: streams pass at once, and a restart ends no EventSource."""
import signal
import socketserver
import threading
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from select import select
from typing import Iterator

import pytest
import requests

from browser import browser
from helpers import (PATIENCE, PUBLISH_TOKEN, Client, Server, ask, connect, free_port, get, reset,
                     serving, wait_until)
from proxies import BUSY, PROXIES, running

pytestmark = pytest.mark.interop

STREAM = "Accept: text/event-stream"

# Seconds until a proxy or the server ends a connection that is idle
IDLE_TIME = 120.0

# As many as Chromium has to one host
SOURCES = 6
SCRIPT = """window.seen = Array.from({length: %d}, () => []);
window.sources = seen.map(list => {
    const source = new EventSource('http://127.0.0.1:%d/');
    for (const name of ['message', 'größe'])
        source.addEventListener(name, event => list.push([name, event.data]));
    return source;
}); true"""

# These tell the server at once that a client has left. The others notice when they cannot pass on
# what the server sends, which is a heartbeat at the latest.
WATCHFUL = ("nginx", "haproxy", "caddy")

each_proxy = pytest.mark.parametrize("name", PROXIES)


@contextmanager
def proxied(name: str, port: int, folder: Path) -> Iterator[int]:
    """Run a proxy in front of the server on this port, and give the port of the proxy."""
    front = free_port()
    # An example with two servers has the same one twice
    with running(name, [front, port, port], folder):
        yield front


def publish(port: int, data: str, event: str = "message") -> str:
    """POST an event and return its id."""
    query = "" if event == "message" else f"?event={event}"
    answer = requests.post(f"http://127.0.0.1:{port}/{PUBLISH_TOKEN}{query}", timeout=PATIENCE,
                           data=data.encode())
    assert answer.status_code == 200, answer.text
    return answer.json()["id"]


def resume(port: int, last_id: str) -> Client:
    """Open a stream through a proxy, after this id."""
    return Client(port, get("/", STREAM, f"Last-Event-ID: {last_id}"), proxied=True,
                  last_id=last_id)


# What passes

@each_proxy
def test_every_event_passes_a_proxy_at_once_and_as_it_was(name, tmp_path):
    # Without heartbeats nothing pushes out what a buffer holds back
    with serving("--publish-token", PUBLISH_TOKEN, "--heartbeat", "0") as server, \
            proxied(name, server.port, tmp_path) as port:
        begin, sent = publish(server.port, "begin"), []
        with resume(port, begin) as client:
            for event, data in [("message", "grüße 🎉\nsecond line"), ("größe", "x" * 300_000),
                                ("größe", ""), ("message", "last")]:
                sent.append((event, data, publish(port, data, event)))
                assert client.read_events(len(sent)) == sent
            head = "\n".join(client.stream.head).lower()
            assert "\ncontent-type: text/event-stream; charset=utf-8\n" in head + "\n"
        with resume(port, sent[1][2]) as client:
            assert client.read_events(2) == sent[2:]


@each_proxy
def test_an_answer_that_refuses_passes_a_proxy_as_it_is(name, tmp_path):
    with serving("--token", "TOKEN", "--interval", "0") as server, \
            proxied(name, server.port, tmp_path) as port:
        answer = ask(port, get("/wrong", STREAM, "Connection: close"))
        assert answer.startswith(b"HTTP/1.1 401 ")


@each_proxy
def test_the_server_notices_that_a_client_behind_a_proxy_left(name, tmp_path):
    heartbeat = "0" if name in WATCHFUL else "0.2"
    with serving("--interval", "0", "--heartbeat", heartbeat) as server, \
            proxied(name, server.port, tmp_path) as port:
        def clients() -> int:
            status = requests.get(f"http://127.0.0.1:{server.port}/-/status", timeout=PATIENCE)
            return status.json()["clients"]
        with Client(port, get("/", STREAM), proxied=True) as client:
            client.open()
            assert clients() == 1
        wait_until(lambda: clients() == 0)


# While no server is there

@each_proxy
def test_a_restart_behind_a_proxy_ends_no_event_source_and_loses_no_event(name, tmp_path):
    port = free_port()

    def start() -> Server:
        return Server("--port", str(port), "--history-file", str(tmp_path / "events.db"),
                      "--publish-token", PUBLISH_TOKEN, "--retry", "0.3")
    server = start()
    try:
        with browser(tmp_path / "profile") as page, proxied(name, port, tmp_path) as front:
            page.open(f"http://127.0.0.1:{port}/-/health")
            page.evaluate(SCRIPT % (SOURCES, front))
            page.wait_for("sources.every(source => source.readyState === 1)")
            sent = []

            def both_kinds(text: str) -> None:
                for event in ("message", "größe"):
                    publish(port, text, event)
                    sent.append([event, text])
            for by in (signal.SIGTERM, signal.SIGKILL):
                both_kinds(f"before {by!r}")
                server.stop(by), server.close()
                page.wait_for("sources.every(source => source.readyState === 0)")
                check_outage(front)
                server = start()
                both_kinds(f"after {by!r}")
                page.wait_for("sources.every(source => source.readyState === 1)")
            both_kinds("end")
            page.wait_for(f"seen.every(list => list.length >= {len(sent)})")
            assert page.evaluate("seen") == [sent] * SOURCES
    finally:
        assert "Traceback" not in server.close()


def check_outage(port: int) -> None:
    """Check what a proxy answers while no server is there: only a stream is told to come back."""
    url, accept = f"http://127.0.0.1:{port}/", {"Accept": "text/event-stream"}
    busy = requests.get(url, headers=accept, timeout=PATIENCE)
    assert (busy.status_code, busy.content.decode()) == (200, BUSY)
    assert busy.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert busy.headers["Cache-Control"] == "no-cache"
    assert busy.headers["Access-Control-Allow-Origin"] == "*"
    for answer in (requests.get(url, timeout=PATIENCE),
                   requests.post(url, "x", headers=accept, timeout=PATIENCE)):
        assert answer.status_code in (502, 503)


# Connections that are kept

class PassOn(socketserver.BaseRequestHandler):
    """Pass a connection on to a server, and hide it from the peer when the server ends it.

    So does a network, while the end is on its way. What the peer sends meanwhile is lost, and
    resets the connection.
    """

    def handle(self) -> None:
        has_posted = False
        with connect(self.server.target) as server:
            # Raised where a peer resets its connection, which is an end like any other
            with suppress(ConnectionResetError):
                while True:
                    source = select([self.request, server], [], [])[0][0]
                    data = source.recv(65536)
                    if not data:
                        break
                    has_posted = has_posted or data.startswith(b"POST ")
                    (self.request if source is server else server).sendall(data)
            if has_posted:
                self.server.ended.set()
            with suppress(ConnectionResetError):
                if source is server:
                    self.request.recv(1)
        reset(self.request)


class Relay(socketserver.ThreadingTCPServer):
    """Pass connections on to a server on another port."""

    def __init__(self, target: int) -> None:
        super().__init__(("127.0.0.1", 0), PassOn)
        self.target = target
        self.port = self.server_address[1]

        # Set when a connection that had a POST has ended, whoever ended it
        self.ended = threading.Event()


@contextmanager
def relayed(port: int) -> Iterator[Relay]:
    with Relay(port) as relay:
        thread = threading.Thread(target=relay.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield relay
        finally:
            relay.shutdown()
            thread.join()


def test_no_proxy_loses_a_post_on_a_connection_that_the_server_just_ended(tmp_path):
    with ExitStack() as stack:
        server = stack.enter_context(serving("--publish-token", PUBLISH_TOKEN))
        relays = {}
        for name in PROXIES:
            relay = stack.enter_context(relayed(server.port))
            folder = tmp_path / name
            folder.mkdir()
            port = stack.enter_context(proxied(name, relay.port, folder))
            relays[port] = relay
        # All at once: it takes as long as a connection may be idle
        for port in relays:
            publish(port, "before")
        for relay in relays.values():
            assert relay.ended.wait(IDLE_TIME)
        for port in relays:
            publish(port, "after")
