"""What comes in at the door: silent, garbled and broken connections cost nobody else anything."""
import logging
import random
import re
import threading
import time
from email.utils import parsedate_to_datetime

import pytest

import sse_server
from heads import mutated
from helpers import GET, PUBLISH_TOKEN, Client, ask, connect, get, reset, unfinished, wait_until
from sse_core.http import connections, http1
from sse_server import SSEServer


def test_a_silent_connection_does_not_hold_up_the_next(server):
    silent = [connect(server.port) for _ in range(20)]
    with Client(server.port) as client:
        client.open()
        server.publish("on time")
        assert client.read_events(1)[0].data == "on time"
    for sock in silent:
        sock.close()


def test_a_request_may_arrive_a_byte_at_a_time(server):
    with Client(server.port, b"") as client:
        for index in range(len(GET)):
            client.sock.sendall(GET[index:index + 1])
        assert client.open().stream.status == 200


def test_the_part_of_a_head_that_was_scanned_is_not_scanned_again(server, monkeypatch):
    parse, looked = http1.parse, []

    def watched(raw, seen):
        looked.append((seen, len(raw)))
        return parse(raw, seen)
    monkeypatch.setattr(http1, "parse", watched)
    with Client(server.port, GET[:10]) as client:
        wait_until(lambda: server._connections._busy and looked[-1:] == [(0, 10)])
        client.sock.sendall(GET[10:])
        client.open()
    assert looked[-1] == (10, len(GET))


def test_a_client_that_stops_reading_does_not_hold_up_the_others(server):
    with Client(server.port, receive_buffer=4096) as deaf, Client(server.port) as client:
        deaf.open(), client.open()
        wait_until(lambda: server.clients == 2)
        for number in range(500):
            server.publish(f"{number} " + "x" * 10000)
            assert client.read_events(number + 1)[number].data.startswith(f"{number} ")


@pytest.mark.parametrize("garbage, status", [
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    (b"hello\r\n\r\n", 400),
    (b"GET / HTTP/1.1\n\n", 400),
    (b"GET /" + b"a" * 9000, 414),
    (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 4000, 431),
    (b"GET / HTTP/1.1\r\nX: " + b"y" * 20000, 431),
    (bytes(range(256)) * 40, 400),
], ids=["tls", "hello", "bare LF", "long line", "many fields", "endless head", "binary"])
def test_garbage_is_answered_and_closed(server, garbage, status):
    with Client(server.port) as client:
        client.open()
        answer = ask(server.port, garbage)
        assert answer.startswith(b"HTTP/1.1 %d " % status) and b"Connection: close" in answer
        server.publish("unharmed")
        assert client.read_events(1)[0].data == "unharmed"
    wait_until(lambda: server.clients == 0)


@pytest.mark.parametrize("begun", [b"", b"GET / HT"])
def test_a_head_that_never_ends_is_cut(server, monkeypatch, begun):
    monkeypatch.setattr(connections, "REQUEST_TIME", 0.1)
    began = time.monotonic()
    with connect(server.port) as sock:
        sock.sendall(begun)
        assert sock.recv(1000).startswith(b"HTTP/1.1 408 ") and time.monotonic() - began < 1


def test_resets_at_any_moment_harm_nobody(server):
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    with Client(server.port) as client:
        client.open()
        for number in range(300):
            sock = connect(server.port)
            sock.sendall(GET[:draw.randrange(len(GET) + 1)])
            reset(sock) if draw.random() < 0.7 else sock.close()
            if number % 10 == 0:
                server.publish(str(number))
        server.publish("end")
        data = [event.data for event in client.read_until_data("end")]
        assert data == [*map(str, range(0, 300, 10)), "end"], f"seed {seed}"
        wait_until(lambda: server.clients == 1)


def test_a_client_that_leaves_during_its_request_is_one_line_of_verbose(server, caplog):
    caplog.set_level(logging.DEBUG)
    sock = connect(server.port)
    sock.sendall(GET[:10])
    wait_until(lambda: unfinished(server))
    reset(sock)
    wait_until(lambda: not unfinished(server) and caplog.records)
    assert caplog.text.count("left during its request") == len(caplog.records) == 1


@pytest.mark.parametrize("options", [{}, {"tokens": ["one"], "publish_tokens": ["t"]}],
                         ids=["open", "tokens"])
def test_fuzz_of_heads_and_resets_harms_nobody(request, options):
    """Random and mutated heads, cut at random, some reset: it serves on, and nothing is left."""
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    with SSEServer(port=0, **options) as server, Client(server.port, get("/one")) as steady:
        steady.open()
        for number in range(request.config.getoption("fuzz") * 300):
            raw = mutated(draw)
            if draw.random() < 0.2:
                raw = bytes(draw.randrange(256) for _ in range(draw.randrange(300)))
            sock = connect(server.port)
            try:
                sock.sendall(raw[:draw.randrange(len(raw) + 1)])
                if draw.random() < 0.3:
                    sock.sendall(raw)
                if draw.random() < 0.2:
                    sock.settimeout(0.02)
                    sock.recv(1000)
            except OSError:     # it was refused and closed, or sends nothing
                pass
            reset(sock) if draw.random() < 0.5 else sock.close()
            if number % 50 == 0:
                server.publish(str(number))
        server.publish("end")
        events = steady.read_until_data("end")
        assert not any(event.name == "gap" for event in events), f"seed {seed}"
        wait_until(lambda: server.clients == 1 and not unfinished(server))
        threads = {thread.name for thread in threading.enumerate()}
        assert {"accept", "connections", "publisher"} <= threads, f"seed {seed}"


def test_a_browser_gets_the_page_and_others_the_stream(server):
    page = ask(server.port, b"GET / HTTP/1.1\r\nHost: x\r\nAccept: text/html,*/*;q=0.8\r\n\r\n")
    head, _, body = page.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"Content-Type: text/html; charset=utf-8" in head
    assert body == sse_server.PAGE.read_bytes()
    for accept in ("*/*", "text/event-stream"):
        with Client(server.port, get("/", f"Accept: {accept}")) as client:
            assert client.open().stream.fields["Content-Type"] == \
                "text/event-stream; charset=utf-8"


def test_head_gets_the_head_and_registers_nobody(server):
    with Client(server.port) as client:
        head = client.open().stream.head
        answer = ask(server.port, GET.replace(b"GET", b"HEAD"))
        *same, date, _, _ = answer.decode().split("\r\n")
        same.remove("Connection: close")        # it closes: nothing follows
        assert same == head[:-1] and date.startswith("Date: ") and answer.endswith(b"\r\n\r\n")
        assert server.clients == 1


def test_every_answer_has_a_date(open_server):
    before = int(time.time())
    for request in (get("/-/status"), get("/", "Accept: text/html"), get("/", method="HEAD"),
                    get("/", method="OPTIONS"), get("/favicon.ico"), get("/", method="BREW"),
                    get(f"/{PUBLISH_TOKEN}", "Content-Length: 0", "Connection: close",
                        method="POST"), b"hello\r\n\r\n"):
        date, = re.findall("\r\nDate: (.*)\r\n", ask(open_server.port, request).decode())
        assert before <= parsedate_to_datetime(date).timestamp() <= time.time()
        assert re.fullmatch("[A-Z][a-z]{2}, [0-9]{2} [A-Z][a-z]{2} [0-9]{4} [0-9:]{8} GMT", date)


def test_there_is_no_icon_and_a_preflight_is_answered(server):
    assert ask(server.port, get("/favicon.ico")).startswith(b"HTTP/1.1 404 ")
    answer = ask(server.port, b"OPTIONS /token HTTP/1.1\r\nHost: x\r\nOrigin: http://a.test\r\n"
                              b"Access-Control-Request-Method: POST\r\n\r\n").decode()
    assert answer.startswith("HTTP/1.1 204 ") and "Access-Control-Allow-Origin: *\r\n" in answer
    assert "Last-Event-ID" in answer and "Access-Control-Max-Age" in answer
