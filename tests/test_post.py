"""Publishing by POST: what is taken, what is refused and why, and how its connection goes on."""
import json
import random
import shutil
import subprocess

import pytest
import requests

from helpers import PATIENCE, PUBLISH_TOKEN, Client, ask, connect, get, handshakes, post
from sse_core import frames


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
        assert handshakes() == 1


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


def test_a_post_without_a_length_is_a_411(open_server):
    for field in ("Transfer-Encoding: chunked", "X: y"):
        request = f"POST /{PUBLISH_TOKEN} HTTP/1.1\r\nHost: x\r\n{field}\r\n\r\n".encode()
        assert ask(open_server.port, request).startswith(b"HTTP/1.1 411 ")


def test_posting_is_off_unless_there_is_a_token(server):
    answer = post(server.port)
    assert answer.startswith(b"HTTP/1.1 403 ") and b"--publish-token" in answer


def test_a_refused_post_leaves_no_event_and_no_continue(open_server):
    with connect(open_server.port) as sock:
        sock.sendall(get("/wrong", "Content-Length: 5", "Expect: 100-continue", method="POST"))
        assert sock.recv(1000).startswith(b"HTTP/1.1 401 ")
