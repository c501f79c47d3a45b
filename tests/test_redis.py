"""Many servers on one Redis stream: a real redis-server, real proxies, killed and started again."""
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import requests

from helpers import PATIENCE, TOP, Client, Server, halt, wait_until
from proxies import running
from redis_server import store      # noqa: F401
from redis_server import POST, data, following, free_port, post, resume


def test_what_is_posted_on_one_server_reaches_the_clients_of_both(store):
    with following(store, 2) as (one, two), Client(one.port) as a, Client(two.port) as b:
        a.open(), b.open()
        first = post(one.port, "from one").json()["id"]
        second = post(two.port, "from two").json()["id"]
        third = store.add(data="from elsewhere", event="custom")
        for client in (a, b):
            events = client.read_events(3)
            assert [event.id for event in events] == [first, second, third]
            assert [event[:2] for event in events] == [
                ("message", "from one"), ("message", "from two"), ("custom", "from elsewhere")]


def test_names_are_fields_where_there_are_any(store):
    request = b"GET /?channel=ann HTTP/1.1\r\nHost: x\r\n\r\n"
    with following(store) as (server,), Client(server.port, request) as client:
        client.open()
        for query in ("", "?event=mail&channel=ann"):
            requests.post(f"http://127.0.0.1:{server.port}/{POST}{query}", data="",
                          timeout=PATIENCE).raise_for_status()
        assert [event[:2] for event in client.read_events(2)] == [("message", ""), ("mail", "")]
    assert [fields for _, fields in store.client.xrange("sse")] == [
        {b"data": b""}, {b"data": b"", b"event": b"mail", b"channel": b"ann"}]


def test_entries_that_are_no_events_are_skipped_with_one_warning(store):
    with following(store) as (server,), Client(server.port) as client:
        client.open()
        store.add(data="one")
        store.client.xadd("sse", {"text": "no data"})
        store.client.xadd("sse", {"data": "bad name", "event": "a\nb"})
        store.client.xadd("sse", {"data": b"\xff"})
        store.client.xadd("sse", {"data": "bad channel", "channel": ""})
        store.add(data="news only", channel="news")
        last = store.add(data="two")
        assert [event.data for event in client.read_events(2)] == ["one", "two"]
        assert client.stream.last_id == last
        server.stop(signal.SIGTERM)
        assert server.close().count("skipped") == 1


def test_a_client_resumes_across_a_restart_and_on_another_server(store):
    ids = [store.add(data=str(number)) for number in range(50)]
    with following(store) as (first,):
        with resume(first.port, ids[9]) as client:
            assert [event.data for event in client.read_events(40)] == [*map(str, range(10, 50))]
    with following(store, 2, "--history", "100") as (one, two):
        for server in (one, two):
            with resume(server.port, ids[9]) as client:
                assert data(client.read_until(lambda stream: len(stream.events) == 40))[0] == "10"
        with Client(one.port) as client:        # one that does not resume gets nothing old
            client.open()
            post(two.port, "new")
            assert data(client.read_until(lambda stream: stream.events)) == ["new"]


def test_while_redis_is_away_posts_are_503_and_clients_stay(store):
    with following(store, 1, "--heartbeat", "0.2") as (server,), Client(server.port) as client:
        client.open()
        store.kill()
        client.read_until(lambda stream: stream.comments >= 2)
        answer = post(server.port, "lost")
        assert answer.status_code == 503
        assert "Retry-After" in answer.headers and "Redis" in answer.text
        store.start()
        for round in range(2):
            wait_until(lambda: post(server.port, f"round {round}").status_code == 200)
            client.read_until_data(f"round {round}")
            beats = client.stream.comments
            store.kill()
            client.read_until(lambda stream: stream.comments >= beats + 2)
            store.start()
        texts = data(client)
        assert sorted(set(texts)) == ["round 0", "round 1"]
        assert "gap" not in {event.name for event in client.stream.events}
        server.stop(signal.SIGTERM)
        assert server.close().count("Redis is away") <= 4


def test_a_stream_trimmed_past_our_position_is_a_gap(store):
    with following(store) as (server,), Client(server.port) as client:
        client.open()
        store.add(data="first")
        client.read_events(1)
        process = server.process
        halt(process)     # it falls behind by more than the stream keeps
        for number in range(100):
            store.add(data=str(number))
        store.client.xtrim("sse", maxlen=10, approximate=False)
        store.client.client_kill_filter(_type="normal", skipme=True)    # and needs a new connection
        process.send_signal(signal.SIGCONT)
        client.read_until(lambda stream: stream.events[-1].data == "99")
        events = client.stream.events
        at, = [index for index, event in enumerate(events) if event.name == "gap"]
        assert at in (1, 2)     # one more entry may have been on its way when it was stopped
        before, after = events[at - 1].id, events[at + 1].id
        assert events[at].id == before
        told = json.loads(events[at].data)
        assert told == {"after": before, "resumed": after, "reason": "evicted"}
        assert data(client)[at + 1:] == [str(number) for number in range(90, 100)]


def test_standard_input_goes_to_the_stream_and_waits_while_redis_is_away(store):
    with following(store) as (watcher,), Client(watcher.port) as client:
        client.open()
        feeder = Server("--redis", store.url, "--stdin")
        feeder.process.stdin.write(b"one\n")
        feeder.process.stdin.flush()
        client.read_events(1)
        store.kill()
        feeder.process.stdin.write(b"two\nthree\n")
        feeder.process.stdin.close()
        feeder.process.stdin = None
        store.start()
        client.read_until(lambda stream: stream.events[-1].data == "three")
        assert list(dict.fromkeys(data(client))) == ["one", "two", "three"]
        assert feeder.process.wait(PATIENCE) == 0
        feeder.close()


class Wanderer(threading.Thread):
    """A client that moves from server to server at random, and never gives up."""

    def __init__(self, ports: list, seed: int, until: threading.Event, stay: bool = False,
                 proxied: bool = False) -> None:
        super().__init__()
        self.proxied = proxied
        self.ports, self.draw, self.until, self.stay = ports, random.Random(seed), until, stay
        self.events, self.last, self.error = [], "", None
        self.connected = threading.Event()

    def run(self) -> None:
        try:
            while not (self.events and self.events[-1].data == "end"):
                self.live_once()
        except BaseException as error:
            self.error = error

    def live_once(self) -> None:
        try:
            with resume(self.draw.choice(self.ports), self.last, self.proxied) as client:
                client.sock.settimeout(5)
                client.open()
                if not client.stream.head[0].endswith("200 OK"):
                    return
                self.connected.set()
                lifetime = self.draw.randrange(1, 60)
                try:
                    while (self.stay or len(client.stream.events) < lifetime) and not client.closed:
                        client.receive(self.draw.choice((100, 65536)))
                        if client.stream.events and client.stream.events[-1].data == "end":
                            break
                finally:
                    self.events += client.stream.events
                    self.last = client.stream.last_id
        except (OSError, AssertionError) as error:
            if isinstance(error, AssertionError) and "early" not in str(error):
                raise
            time.sleep(0.02)        # nobody there: as EventSource waits for its retry time


def check(wanderers: list, posted: list, seed: int) -> None:
    for wanderer in wanderers:
        wanderer.join(40)
        assert not wanderer.is_alive(), f"seed {seed}"
        assert wanderer.error is None, f"seed {seed}: {wanderer.error!r}"
        assert "gap" not in {event.name for event in wanderer.events}, f"seed {seed}"
        texts = [event.data for event in wanderer.events]
        assert texts == [event.data for event in wanderers[0].events], f"seed {seed}"
        ids = [tuple(map(int, event.id.split("-"))) for event in wanderer.events]
        assert ids == sorted(set(ids)), f"seed {seed}"
    assert set(texts) == {*posted, "end"}, f"seed {seed}"
    if len(texts) > len(posted) + 1:    # a post whose answer was lost was sent again: as documented
        assert len(texts) < len(posted) + 20


def test_everyone_sees_the_same_while_moving_between_two_servers(store):
    seed = random.randrange(1 << 32)
    done = threading.Event()
    with following(store, 2) as servers:
        ports = [server.port for server in servers]
        wanderers = [Wanderer(ports, seed + number, done, stay=number < 2) for number in range(6)]
        for wanderer in wanderers:
            wanderer.start()
        for wanderer in wanderers:
            assert wanderer.connected.wait(PATIENCE)
        posted = [f"{number}" for number in range(400)]
        with requests.Session() as session:
            for text in posted:
                session.post(f"http://127.0.0.1:{random.choice(ports)}/{POST}", data=text,
                             timeout=PATIENCE).raise_for_status()
        post(ports[0], "end")
        for wanderer in wanderers:
            wanderer.join(40)
        starts = {wanderer.events[0].data for wanderer in wanderers}
        assert starts == {"0"}, f"seed {seed}: {starts}"
        check(wanderers, posted, seed)
        assert len(wanderers[0].events) == 401


def test_everyone_sees_the_same_while_redis_and_the_servers_are_killed(store):
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    done = threading.Event()
    ports = [free_port(), free_port()]
    before = store.add(data="before")
    arguments = ["--redis", store.url, "--publish-token", POST, "--retry", "0.1"]
    servers = [Server(*arguments, "--port", str(port), stdin=subprocess.DEVNULL) for port in ports]
    wanderers = [Wanderer(ports, seed + number, done) for number in range(4)]
    try:
        for wanderer in wanderers:
            wanderer.last = before
            wanderer.start()
        posted = [f"{number}" for number in range(120)]
        for number, text in enumerate(posted):
            if number in (30, 80):
                store.kill()
                threading.Timer(0.3, store.start).start()
            if number in (50, 100):
                victim = number // 50 - 1
                servers[victim].process.kill()
                servers[victim].close()
                servers[victim] = Server(*arguments, "--port", str(ports[victim]),
                                         stdin=subprocess.DEVNULL)
            while True:
                try:
                    if post(draw.choice(ports), text).status_code == 200:
                        break
                except requests.RequestException:       # a server that is being killed
                    pass
                time.sleep(0.02)
        assert post(ports[0], "end").status_code == 200
        check(wanderers, posted, seed)
    finally:
        for server in servers:
            assert "Traceback" not in server.close()


@pytest.mark.parametrize("proxy", ["nginx", "haproxy"])
def test_behind_a_proxy_of_the_examples_nothing_is_lost_or_held_back(store, tmp_path, proxy):
    ports = [free_port(), free_port(), free_port()]
    with following(store, 2, ports=ports[1:]) as servers, running(proxy, ports, tmp_path):
        wait_until(lambda: requests.head(f"http://127.0.0.1:{ports[0]}/",
                                         timeout=PATIENCE).status_code == 200)
        seed, done = random.randrange(1 << 32), threading.Event()
        start = store.add(data="start")
        wanderers = [Wanderer(ports[:1], seed + number, done, number < 4, proxied=True)
                     for number in range(6)]
        for wanderer in wanderers:
            wanderer.last = start
            wanderer.start()
        for wanderer in wanderers:
            assert wanderer.connected.wait(PATIENCE), wanderer.error
        began = time.monotonic()
        assert post(ports[0], "first").status_code == 200
        with resume(ports[0], start, proxied=True) as probe:
            probe.open()
            post(ports[0], "probe")
            probe.read_until(
                lambda stream: any(event.data == "probe" for event in stream.events))
        assert time.monotonic() - began < 3     # nothing is held back by a buffer
        posted = ["first", "probe"]
        for number in range(100):
            if number == 50:
                servers[0].process.send_signal(signal.SIGKILL)
            while True:
                try:
                    if post(ports[0], str(number)).status_code == 200:
                        break
                except requests.RequestException:       # it was on its way to the killed one
                    pass
                time.sleep(0.05)
            posted.append(str(number))
        assert post(ports[0], "end").status_code == 200
        check(wanderers, posted, seed)


def test_without_the_package_one_line_says_what_to_install(tmp_path):
    (tmp_path / "redis.py").write_text("raise ImportError\n")
    done = subprocess.run([sys.executable, TOP / "sse_server.py", "--port", "0", "--redis",
                           "redis://127.0.0.1:1/0"], capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, timeout=PATIENCE,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "pip install redis" in done.stderr


@pytest.mark.parametrize("url, says", [
    ("nonsense", "redis://"), ("redis://:hidden@127.0.0.1:1/0?db=x", "db"),
    ("redis://:hidden@127.0.0.1:1/0?db_=1", "db_"),
    ("redis://:hidden@127.0.0.1:1/0?max_connections=-1", "max_connections"),
    ("redis://:hidden/more@127.0.0.1:1/0", "percent-encode"),
    ("redis://:hidden:6379:1", "percent-encode"), ("redis://:hidden[@h:1", "percent-encode")])
def test_a_bad_url_is_one_line_without_its_password(url, says):
    done = subprocess.run([sys.executable, TOP / "sse_server.py", "--port", "0", "--redis", url],
                          text=True, capture_output=True, stdin=subprocess.DEVNULL,
                          timeout=PATIENCE)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
    assert "hidden" not in done.stderr
