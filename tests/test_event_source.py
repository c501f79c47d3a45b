"""A browser's EventSource, across restarts: directly, and behind nginx and HAProxy as examples/
configure them."""
import signal
import socket
from contextlib import ExitStack

import pytest
import requests

from browser import browser
from helpers import PATIENCE, PUBLISH_TOKEN, Server, free_port, wait_until
from proxies import BUSY, running

SOURCES = 6         # as many as Chromium has to one host
SCRIPT = """window.seen = Array.from({length: %d}, () => []);
window.sources = seen.map(list => {
    const source = new EventSource('http://127.0.0.1:%d/');
    source.onmessage = event => list.push(event.data);
    return source;
}); true"""


def server(port: int, path) -> Server:
    return Server("--port", str(port), "--history-file", str(path), "--interval", "0",
                  "--publish-token", PUBLISH_TOKEN, "--retry", "0.3")


def post(port: int, text: str) -> bool:
    try:
        return requests.post(f"http://127.0.0.1:{port}/{PUBLISH_TOKEN}", data=text,
                             timeout=PATIENCE).ok
    except requests.RequestException:       # it was on its way to one that stopped
        return False


@pytest.mark.parametrize("name", ["nginx", "haproxy"])
def test_a_rolling_restart_and_an_outage_keep_every_event_source(name, tmp_path):
    ports = [free_port() for _ in range(3)]
    with ExitStack() as stack:
        page = stack.enter_context(browser(tmp_path / "profile"))
        stack.enter_context(running(name, ports, tmp_path))
        servers = [server(port, tmp_path / "events.db") for port in ports[1:]]
        try:
            wait_until(lambda: post(ports[0], "start"))
            page.open(f"http://127.0.0.1:{ports[1]}/-/health")
            page.evaluate(SCRIPT % (SOURCES, ports[0]))
            page.wait_for("sources.every(source => source.readyState === 1)")
            posted = []

            def publish(text: str) -> None:
                wait_until(lambda: post(ports[0], text))
                posted.append(text)
            for number in range(2):         # one after the other
                publish(f"before {number}")
                assert servers[number].stop(signal.SIGTERM) == 0
                servers[number].close()
                publish(f"while {number} is away")
                servers[number] = server(ports[1 + number], tmp_path / "events.db")
            for each in servers:            # and both at once
                each.stop(signal.SIGTERM), each.close()
            answer = requests.get(f"http://127.0.0.1:{ports[0]}/", timeout=PATIENCE,
                                  headers={"Accept": "text/event-stream"})
            assert answer.status_code == 200 and answer.text == BUSY
            assert requests.post(f"http://127.0.0.1:{ports[0]}/x", data="x",
                                 timeout=PATIENCE).status_code in (502, 503)
            page.wait_for("sources.every(source => source.readyState === 0)")
            servers = [server(port, tmp_path / "events.db") for port in ports[1:]]
            publish("end")
            page.wait_for("seen.every(list => list[list.length - 1] === 'end')")
            for seen in page.evaluate("seen"):
                # A post whose answer was lost may be there twice: what is seen once is enough here
                assert list(dict.fromkeys(seen)) == posted
        finally:
            for each in servers:
                assert "Traceback" not in each.close()


def test_since_counts_once_and_then_the_last_id(tmp_path):
    port = free_port()
    with browser(tmp_path / "profile") as page:
        first = server(port, tmp_path / "events.db")
        try:
            for number in range(3):
                assert post(port, str(number))
            page.open(f"http://127.0.0.1:{port}/-/health")
            page.evaluate(SCRIPT.replace("%d/'", "%d/?since=all'") % (1, port))
            page.wait_for("seen[0].length === 3")
            first.process.kill()
            first.close()
            page.wait_for("sources[0].readyState === 0")
            first = server(port, tmp_path / "events.db")
            assert post(port, "3")
            page.wait_for("seen[0][seen[0].length - 1] === '3'")
            assert page.evaluate("seen[0]") == ["0", "1", "2", "3"]
        finally:
            assert "Traceback" not in first.close()


def test_haproxy_finds_a_server_healthy_that_answers_for_one_host_alone(tmp_path):
    """Its checks name no Host, and its clients do."""
    ports = [free_port() for _ in range(3)]
    with running("haproxy", ports, tmp_path):
        with socket.create_server(("127.0.0.1", ports[1])) as unhealthy:
            unhealthy.settimeout(PATIENCE)
            # When the second check comes, the first has failed, and the server counts as down
            for _ in range(2):
                unhealthy.accept()[0].close()
        first = Server("--port", str(ports[1]), "--allowed-host", "localhost", "--interval", "0",
                       "--publish-token", PUBLISH_TOKEN)
        try:
            url = f"http://localhost:{ports[0]}/{PUBLISH_TOKEN}"
            wait_until(lambda: requests.post(url, data="x", timeout=PATIENCE).ok)
        finally:
            assert "Traceback" not in first.close()
