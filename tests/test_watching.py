"""What an operator sees: metrics, read by an independent strict parser, and the status."""
import json
import re

import pytest
import requests

from helpers import PATIENCE, Client, ask, wait_until
from sse_server import SSEServer


def parse_metrics(text: str) -> dict:
    """Parse the text format of Prometheus, version 0.0.4, strictly.

    HELP, TYPE and samples in this order, no metric twice.
    """
    word = "[a-zA-Z_:][a-zA-Z0-9_:]*"
    sample = rf'({word})(\{{[a-z]+="[^"\\\n]*"\}})? ([0-9.e+-]+)'
    samples, kinds, current = {}, {}, None
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            current, _, words = line[len("# HELP "):].partition(" ")
            assert words and current not in kinds and re.fullmatch(word, current)
            kinds[current] = None
        elif line.startswith("# TYPE "):
            name, kind = line[len("# TYPE "):].split(" ")
            assert name == current and kinds[name] is None
            assert kind in ("counter", "gauge", "summary", "histogram")
            kinds[name] = kind
        else:
            name, labels, value = re.fullmatch(sample, line).groups()
            parts = [f"{current}{part}" for part in ("_sum", "_count")]
            assert name == current or kinds[current] == "summary" and name in parts, line
            assert kinds[current] != "counter" or name.endswith("_total")
            assert (name + (labels or "")) not in samples
            samples[name + (labels or "")] = float(value)
    return samples


@pytest.fixture
def server():
    with SSEServer(port=0, tokens=["SECRET"], publish_tokens=["PUBLISH"], history=64) as server:
        yield server


def fetch(server: SSEServer, path: str, token: str = "SECRET") -> requests.Response:
    answer = requests.get(server.url + path, headers={"Authorization": f"Bearer {token}"},
                          timeout=PATIENCE)
    answer.raise_for_status()
    return answer


def watch(server: SSEServer, **options) -> Client:
    return Client(server.port, b"GET /SECRET?channel=a HTTP/1.1\r\nHost: x\r\n\r\n",
                  **options).open()


def test_metrics_count_what_happened(server):
    with watch(server) as one, watch(server) as two:
        wait_until(lambda: server.clients == 2)
        for number in range(10):
            server.publish(str(number))
        server.publish("a", channel="a")
        server.publish("b", channel="b")
        one.read_events(11), two.read_events(11)
        ask(server.port, b"GET /wrong HTTP/1.1\r\nHost: x\r\n\r\n")
        ask(server.port, b"nonsense\r\n\r\n")
        wait_until(lambda: server.stats()["deliveries"] == 22)
        answer = fetch(server, "/-/metrics")
        values = parse_metrics(answer.text)
        received = sum(len(part) for client in (one, two) for part in client.stream.payloads)
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert values["sse_clients"] == 2 and values["sse_lagging_clients"] == 0
    assert values["sse_events_total"] == 12
    assert values["sse_deliveries_total"] == 22 and values["sse_gaps_total"] == 0
    assert values["sse_sent_bytes_total"] > received
    for status in (401, 400):
        assert values[f'sse_refused_total{{status="{status}"}}'] == 1
    assert values["sse_turn_seconds_count"] > 0 and 0 < values["sse_turn_seconds_sum"] < 60
    closed = 'sse_drops_total{reason="closed"}'
    wait_until(lambda: parse_metrics(fetch(server, "/-/metrics").text)[closed] == 2)


def test_the_bytes_are_those_that_were_sent(server):
    total = 0
    with watch(server) as client:
        for number in range(200):
            server.publish("x" * number)
        client.read_events(200)
        wait_until(lambda: server.stats()["deliveries"] == 200)
        head = len("\r\n".join(client.stream.head)) + 4
        total = head + sum(len(payload) + 12 for payload in client.stream.payloads)
        assert fetch(server, "/-/status").json()["bytes"] == total


def test_status_tells_the_lag_of_each_client_and_no_token(server):
    with watch(server, receive_buffer=4096) as deaf, watch(server) as reader:
        wait_until(lambda: server.clients == 2)
        for number in range(100):
            server.publish("x" * 20000)
            reader.read_events(number + 1)
        assert "list" not in fetch(server, "/-/status").json()
        answer = fetch(server, "/-/status?list", "PUBLISH")
        status = answer.json()
        assert "SECRET" not in answer.text and "PUBLISH" not in answer.text
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert (status["clients"], status["lagging"], status["events"]) == (2, 1, 100)
        first, second = status["list"]
        assert first["lag_frames"] > 10 and first["lag_seconds"] > 0 and first["channels"] == 1
        assert (second["lag_frames"], second["lag_seconds"]) == (0, 0)
        assert first["peer"].startswith("127.0.0.1:")
        assert abs(first["since"] - second["since"]) < 60
        deaf.read_until(lambda stream: any(event.name == "gap" for event in stream.events))
        wait_until(lambda: fetch(server, "/-/status").json()["gaps"] == 1)  # it is sent before


def test_they_are_under_the_same_token_rule(server):
    for path in ("/-/metrics", "/-/status", "/-/status?list", "/SECRET/../-/status?list"):
        answer = ask(server.port, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 401 ")
    with pytest.raises(requests.HTTPError):         # who may watch may not see who else does
        fetch(server, "/-/status?list")
    head = ask(server.port,
               b"HEAD /-/status HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer SECRET\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ") and head.endswith(b"\r\n\r\n")
    with SSEServer(port=0) as open_server:
        body = ask(open_server.port,
                   b"GET /-/status HTTP/1.1\r\nHost: x\r\n\r\n").partition(b"\r\n\r\n")[2]
        assert json.loads(body)["clients"] == 0


def test_health_asks_no_token_and_tells_why_nothing_is_taken(server):
    health = b"GET /-/health HTTP/1.1\r\nHost: x\r\n\r\n"
    assert ask(server.port, health).endswith(b"\r\n\r\nok\n")
    server._hub.stop(PATIENCE)        # in the middle of a stop; publicly it is too short
    answer = ask(server.port, health)
    assert answer.startswith(b"HTTP/1.1 503 ") and b"the server is stopped." in answer
    with pytest.raises(requests.HTTPError, match="404"):
        fetch(server, "/-/other")
