"""Signed tokens on a running server: what they grant, and that a stream ends with its token."""
import subprocess
import sys
import time

import pytest
import requests
from helpers import PATIENCE, TOP, Client, ask, get, serving, wait_until

from sse_core.engine.clients import CLIENTS_PER_TURN
from sse_server import SSEServer

jwt = pytest.importorskip("jwt", reason="signed tokens need the package PyJWT")
SECRET = "the-secret-of-this-server-is-long"


def token(seconds: float = 60, **claims) -> str:
    return jwt.encode({"exp": time.time() + seconds, **claims}, SECRET, "HS256")


@pytest.fixture
def server():
    with SSEServer(port=0, jwt_key=SECRET, heartbeat=0.2) as server:
        yield server


def test_a_user_watches_the_channels_of_the_token_and_no_other(server):
    mine = token(subscribe=["user-42/*"])
    with Client(server.port, get(f"/{mine}?channel=user-42/mail")) as client:
        client.open()
        server.publish("not mine", channel="user-7/mail")
        server.publish("mine", channel="user-42/mail")
        assert [event.data for event in client.read_events(1)] == ["mine"]
    for channel in ("user-7/mail", "user-420/mail", "user-42"):
        answer = ask(server.port, get(f"/{mine}?channel={channel}"))
        assert answer.startswith(b"HTTP/1.1 403 ") and channel.encode() in answer
    assert ask(server.port, get("/")).startswith(b"HTTP/1.1 401 ")


def test_a_stream_ends_in_order_when_its_token_expires_and_then_it_is_a_401(server):
    short = token(1.5, subscribe=["*"])
    with Client(server.port, get(f"/{short}")) as client, \
            Client(server.port, get(f"/{token(subscribe=['*'])}")) as other:
        client.open(), other.open()
        began = time.monotonic()
        server.publish("before")
        stream = client.read_to_end()
        assert stream.ended and [event.data for event in stream.events] == ["before"]
        assert time.monotonic() - began < 3.5
        server.publish("after")
        assert [event.data for event in other.read_events(2)] == ["before", "after"]
    assert server.stats()["drops"]["expired"] == 1
    assert ask(server.port, get(f"/{short}")).startswith(b"HTTP/1.1 401 ")


def test_a_lagging_stream_ends_with_its_token_however_many_lag_before_it(server):
    lag = get(f"/{token(subscribe=['*'])}")
    stalled = [Client(server.port, lag, receive_buffer=4096).open()
               for _ in range(CLIENTS_PER_TURN + 1)]
    last = Client(server.port, get(f"/{token(1.5, subscribe=['*'])}"), receive_buffer=4096).open()
    for _ in range(3):
        server.publish("x" * 1_000_000)
    wait_until(lambda: server.stats()["lagging"] == CLIENTS_PER_TURN + 2
               or server.stats()["drops"]["expired"])
    last.receive(1)
    wait_until(lambda: server.stats()["drops"]["expired"] == 1, timeout=6)
    for client in [*stalled, last]:
        client.close()


def test_a_post_goes_where_its_token_says(server):
    mine = {"Authorization": f"Bearer {token(publish=['news'])}"}

    def post(query: str = "", body: str = "x", **fields) -> int:
        return requests.post(server.url + "/" + query, data=body, headers={**mine, **fields},
                             timeout=PATIENCE).status_code
    lines = {"Content-Type": "application/x-ndjson"}
    assert post("?channel=news") == 200 and post("?channel=other") == 403 and post() == 403
    assert post("", '{"data": "1", "channel": "news"}\n', **lines) == 200
    assert post("", '{"data": "1", "channel": "news"}\n{"data": "2"}', **lines) == 403
    assert post("", '{"data": "1", "channel": "other"}\n', **lines) == 403


def test_the_cookie_lets_a_page_watch_and_never_publish(server):
    both = token(subscribe=["*"], publish=["*"])
    cookie = f"Cookie: a=b; sse_token={both}"
    with Client(server.port, get("/", cookie)) as client:
        assert client.open().stream.status == 200
    answer = ask(server.port, get("/", cookie, "Content-Length: 1", method="POST") + b"x")
    assert answer.startswith(b"HTTP/1.1 401 ")


def test_the_key_may_come_from_the_environment_and_a_short_one_is_one_line():
    with serving("--interval", "0.05", env={"SSE_JWT_KEY": SECRET}) as server:
        assert ask(server.port, get("/")).startswith(b"HTTP/1.1 401 ")
        with Client(server.port, get(f"/{token(subscribe=['*'])}")) as client:
            client.read_events(1)
    command = [sys.executable, TOP / "sse_server.py", "--port", "0", "--jwt-key", "short"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and "32 bytes" in done.stderr and done.stderr.count("\n") == 1
