"""Publishing by POST: what is taken, what is refused and why, and how its connection goes on."""
import json
import random
import shutil
import socket
import subprocess
import time

import pytest
import requests

from helpers import (PATIENCE, PUBLISH_TOKEN, Client, ask, connect, get, post, request_threads,
                     unfinished, wait_until)
from sse_core.engine import frames
from sse_core.http import connections


def test_curl_posts_and_the_answer_has_the_id(open_server):
    curl = shutil.which("curl") or pytest.skip("curl is not installed")
    url = f"{open_server.url}/{PUBLISH_TOKEN}?event=custom&channel=news"
    with Client(open_server.port, b"GET /?channel=news HTTP/1.1\r\nHost: x\r\n\r\n") as client, \
            Client(open_server.port) as other:
        client.open(), other.open()
        done = subprocess.run([curl, "-sS", "-d", "hello", url], capture_output=True,
                              timeout=PATIENCE)
        event, = client.read_events(1)
        assert (event.name, event.data) == ("custom", "hello")
        assert json.loads(done.stdout) == {"id": event.id}
        big = "x" * 200_000         # over 1 KiB: curl expects 100-continue, and waits for it
        subprocess.run([curl, "-sS", "-H", "Expect: 100-continue", "--data-binary", "@-",
                        open_server.url, "-H", f"Authorization: Bearer {PUBLISH_TOKEN}"],
                       input=big.encode(), check=True, timeout=PATIENCE)
        assert client.read_events(2)[1].data == big
        assert other.read_events(1)[0].data == big


def test_requests_posts_hundreds_on_one_connection_in_order(open_server):
    with Client(open_server.port) as client, requests.Session() as session:
        client.open()
        headers = {"Authorization": f"Bearer {PUBLISH_TOKEN}"}
        ids = [session.post(open_server.url, data=str(number), headers=headers,
                            timeout=PATIENCE).json()["id"] for number in range(300)]
        events = client.read_events(300)
        assert [event.data for event in events] == [str(number) for number in range(300)]
        assert [event.id for event in events] == ids
        assert unfinished(open_server) == 1 and not request_threads()


def test_posts_in_a_row_may_arrive_in_any_pieces(open_server):
    one = f"POST /{PUBLISH_TOKEN} HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello".encode()
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    with Client(open_server.port) as client, connect(open_server.port) as sock:
        client.open()
        data = one * 50
        while data:
            size = draw.choice((1, 2, 10, len(one), 300))
            sock.sendall(data[:size])
            data = data[size:]
        assert [event.data for event in client.read_events(50)] == ["hello"] * 50, f"seed {seed}"


@pytest.mark.parametrize("path, body, fields, status, said", [
    (f"/{PUBLISH_TOKEN}", b"\xff", [], 400, b"not UTF-8"),
    (f"/{PUBLISH_TOKEN}?event=a%0Ab", b"x", [], 400, b"event name"),
    (f"/{PUBLISH_TOKEN}?channel=a%0Db", b"x", [], 400, b"channel"),
    (f"/{PUBLISH_TOKEN}?channel=", b"x", [], 400, b"channel"),
    (f"/{PUBLISH_TOKEN}?event=%00", b"x", [], 400, b"event name"),
    (f"/{PUBLISH_TOKEN}?event=%zz", b"x", [], 400, b"two hex digits"),
    (f"/{PUBLISH_TOKEN}", b"x" * (frames.MAX_EVENT + 1), [], 413, b"1048576"),
    ("/", b"x", [], 401, b"publish token"),
    ("/SECRE", b"x", [], 401, b"publish token"),
    ("/wrong", b"x", ["Authorization: Bearer wrong"], 401, b"publish token"),
    ("/wrong", b"x", ["Authorization: Basic SECRET"], 401, b"publish token"),
    (f"//{PUBLISH_TOKEN}", b"x", [], 401, b"publish token"),
])
def test_refused_posts_say_why(open_server, path, body, fields, status, said):
    answer = post(open_server.port, path, body, *fields)
    head, _, text = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status) and said in text
    assert b"Content-Length: %d" % len(text) in head and b"Connection: close" in head
    assert PUBLISH_TOKEN.encode() not in answer


@pytest.mark.parametrize("field, said", [
    ("Content-Encoding: gzip", "uncompressed"), ("Content-Encoding: identity, br", "uncompressed"),
    ("Content-Type: text/plain; charset=iso-8859-1", "UTF-8"),
    ('Content-Type: text/plain;Charset="ISO-8859-1"', "UTF-8"),
    ("Content-Type: application/x-ndjson; charset=utf-16", "UTF-8")])
def test_a_body_that_is_compressed_or_not_utf_8_is_told_what_to_do(open_server, field, said):
    with Client(open_server.port) as client:
        client.open()
        answer = post(open_server.port, f"/{PUBLISH_TOKEN}", b"hello", field).decode()
        assert answer.startswith("HTTP/1.1 415 ") and said in answer
        assert ("Accept-Encoding: identity\r\n" in answer) == (said == "uncompressed")
        # Whoever may not publish is told that first
        assert post(open_server.port, "/wrong", b"hello", field).startswith(b"HTTP/1.1 401 ")
        open_server.publish("the first")
        assert client.read_events(1)[0].data == "the first"


@pytest.mark.parametrize("field", [
    "Content-Encoding: identity", "Content-Encoding:", "Content-Encoding: Identity",
    "Content-Type: text/plain", "Content-Type: text/plain;charset=UTF-8",
    'Content-Type: text/plain ; charset="utf-8"', "Content-Type: text/plain; charset=utf8; x=y",
    "Content-Type: text/plain; charset=us-ascii", "Content-Type: application/octet-stream",
    "Content-Type: multipart/form-data; boundary=charset"])
def test_a_body_that_says_it_is_plain_utf_8_is_published(open_server, field):
    with Client(open_server.port) as client:
        client.open()
        answer = post(open_server.port, f"/{PUBLISH_TOKEN}", "hellö".encode(), field)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert client.read_events(1)[0].data == "hellö"


def test_a_post_without_a_length_is_a_411(open_server):
    request = f"POST /{PUBLISH_TOKEN} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    assert ask(open_server.port, request).startswith(b"HTTP/1.1 411 ")


CHUNKED = get(f"/{PUBLISH_TOKEN}", "Transfer-Encoding: chunked", method="POST")


def test_chunked_posts_in_a_row_may_arrive_in_any_pieces(open_server):
    one = CHUNKED + b"3\r\nhel\r\n2;a=b\r\nlo\r\n0\r\nA: b\r\n\r\n"
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    with Client(open_server.port) as client, connect(open_server.port) as sock:
        client.open()
        data = one * 50
        while data:
            size = draw.choice((1, 2, 10, len(one), 300))
            sock.sendall(data[:size])
            data = data[size:]
        assert [event.data for event in client.read_events(50)] == ["hello"] * 50, f"seed {seed}"


def test_clients_that_do_not_know_the_length_may_post(open_server):
    curl = shutil.which("curl") or pytest.skip("curl is not installed")
    big = "é" * 200_000
    with Client(open_server.port) as client:
        client.open()
        for fields in ([], ["-H", "Expect: 100-continue"]):
            subprocess.run([curl, "-sSf", "-T", "-", "-X", "POST", *fields,
                            f"{open_server.url}/{PUBLISH_TOKEN}"],
                           input=big.encode(), check=True, timeout=PATIENCE)
        requests.post(f"{open_server.url}/{PUBLISH_TOKEN}", timeout=PATIENCE,
                      data=(piece.encode() for piece in ("from ", "a ", "generator"))
                      ).raise_for_status()
        assert [event.data for event in client.read_events(3)] == [big, big, "from a generator"]


@pytest.mark.parametrize("body, status", [
    (b"hello", 400), (b"5\nhello\r\n0\r\n\r\n", 400), (b"4\r\nhello\r\n0\r\n\r\n", 400),
    (b"1\r\n\xff\r\n0\r\n\r\n", 400), (b"100001\r\n", 413)])
def test_chunks_that_cannot_be_are_refused_and_publish_nothing(open_server, body, status):
    with Client(open_server.port) as client:
        client.open()
        assert ask(open_server.port, CHUNKED + body).startswith(b"HTTP/1.1 %d " % status)
        open_server.publish("the first")
        assert client.read_events(1)[0].data == "the first"


ONE = get(f"/{PUBLISH_TOKEN}", "Content-Length: 3", method="POST") + b"one"


@pytest.mark.parametrize("bad, status", [
    (CHUNKED + b"0x3\r\nbad\r\n0\r\n\r\n", 400), (CHUNKED + b"3;\nbad\r\n0\r\n\r\n", 400),
    (ONE[:-3].replace(b"3", b"2") + b"\xff\xfe", 400), (b"garbage\r\n\r\n", 400),
    (ONE.replace(b" HTTP", b"?chanel=a HTTP"), 400), (ONE.replace(b"h: 3", b"h: 3, 3"), 400),
    (ONE.replace(b"Content-Length: 3", b"Transfer-Encoding: chunked, chunked"), 501),
    (CHUNKED.replace(b"chunked", b"xchunked") + b"0\r\n\r\n", 501),
    (ONE.replace(b"Host: x", b"Transfer-Encoding: chunked\r\nHost: x"), 400),
    (ONE.replace(PUBLISH_TOKEN.encode(), b"wrong"), 401), (ONE.replace(b"POST", b"PUT"), 405),
    (ONE.replace(b"POST", b"GET"), 400), (get("/", method="HEAD"), 200),
    (get("/", method="OPTIONS"), 204), (ONE.replace(b"/1.1", b"/1.0"), 200)],
    ids=lambda value: repr(value)[:50])
def test_a_request_behind_one_that_is_refused_or_closes_is_never_done(open_server, bad, status):
    with Client(open_server.port) as client:
        client.open()
        assert b"HTTP/1.1 %d " % status in ask(open_server.port, ONE + bad + b"\r\n" + ONE)
        open_server.publish("the end")
        done = [event.data for event in client.read_until_data("the end")]
        assert done == ["one"] * (2 if b"HTTP/1.0" in bad else 1) + ["the end"]


def test_a_chunked_body_that_is_cut_short_is_not_published(open_server):
    with Client(open_server.port) as client, connect(open_server.port) as sock:
        client.open()
        sock.sendall(CHUNKED + b"5\r\nhello\r\n")
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(100) == b""
        open_server.publish("the first")
        assert client.read_events(1)[0].data == "the first"


def test_a_kept_connection_on_which_nothing_comes_is_closed_in_silence(open_server, monkeypatch):
    """A 408 could pass for the answer to what comes; but not if that has begun."""
    monkeypatch.setattr(connections, "REQUEST_TIME", 0.3)
    monkeypatch.setattr(connections, "IDLE_TIME", 0.3)
    for more, answer in ((b"", b""), (CHUNKED[:10], b"HTTP/1.1 408 ")):
        with connect(open_server.port) as sock:
            sock.sendall(CHUNKED + b"0\r\n\r\n")
            assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
            sock.sendall(more)
            assert sock.recv(len(b"HTTP/1.1 408 ")) == answer


def test_each_request_of_a_kept_connection_has_its_own_time(open_server, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_TIME", 0.3)
    until = time.monotonic() + 2 * connections.REQUEST_TIME
    with connect(open_server.port) as sock:
        while time.monotonic() < until:
            sock.sendall(CHUNKED + b"0\r\n\r\n")
            assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("version, expects, body, answer", [
    ("1.1", True, b"", b"HTTP/1.1 100 Continue\r\n\r\n"), ("1.1", False, b"", b"HTTP/1.1 200 "),
    ("1.0", True, b"", b"HTTP/1.1 200 "), ("1.1", True, b"hello", b"HTTP/1.1 200 ")])
def test_only_a_client_that_waits_for_100_continue_gets_it(open_server, version, expects, body,
                                                         answer):
    expect = ["Expect: 100-continue"] if expects else []
    head = get(f"/{PUBLISH_TOKEN}", "Content-Length: 5", *expect, method="POST")
    with connect(open_server.port) as sock:
        sock.sendall(head.replace(b"/1.1", b"/" + version.encode()) + body)
        wait_until(lambda: unfinished(open_server))      # it has read the head
        if b"200" in answer:
            sock.sendall(b"hello"[len(body):])
        assert sock.recv(len(answer)) == answer


def test_posting_is_off_unless_there_is_a_token(server):
    answer = post(server.port)
    assert answer.startswith(b"HTTP/1.1 403 ") and b"--publish-token" in answer


def test_a_refused_post_leaves_no_event_and_no_continue(open_server):
    with connect(open_server.port) as sock:
        sock.sendall(get("/wrong", "Content-Length: 5", "Expect: 100-continue", method="POST"))
        assert sock.recv(1000).startswith(b"HTTP/1.1 401 ")
