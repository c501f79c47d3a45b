"""A Redis stream that loses entries, goes back or goes away: each event once, or a gap is told."""
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
import requests

from helpers import (KEPT, PATIENCE, TOP, Client, Server, ask, connect, get, halt, in_a_thread,
                     wait_until)
from redis_server import store      # noqa: F401
from redis_server import POST, Forwarder, Redis, add_many, check_told, data, following, post, resume
from sse_core.stores import store as shared_module
from sse_core.errors import NotRunning
from sse_core.stores.redis import RedisStore
from sse_core.stores.store import Event, StoredEvent, StoreHub
from sse_server import SSEServer


@contextmanager
def watched(store, number: int = 1):
    """Run so many servers, and a client at each; at the end all must live, and deliver a post."""
    with following(store, number) as servers, ExitStack() as stack:
        clients = [stack.enter_context(Client(server.port)).open() for server in servers]
        yield servers, clients
        wait_until(lambda: post(servers[0].port, "the end").status_code == 200)
        for client in clients:
            read_to(client, "the end")


def read_to(client: Client, text: str) -> list:
    """Receive until an event with this data is there, and return all events."""
    return client.read_until(
        lambda stream: any(event.data == text for event in stream.events)).stream.events


def read_to_gap(client: Client, number: int = 1) -> list:
    return client.read_until(
        lambda stream: names(stream.events).count("gap") >= number).stream.events


def names(events: list) -> list:
    return [event.name for event in events]


def gaps(events: list) -> list:
    return [json.loads(event.data) for event in events if event.name == "gap"]


def health(server) -> int:
    url = f"http://127.0.0.1:{server.port}/-/health"
    return requests.get(url, timeout=PATIENCE).status_code


def holds_no_thread(server) -> bool:
    """Say whether it has the threads of a server without clients, and hardly another one."""
    return len(os.listdir(f"/proc/{server.process.pid}/task")) < 12


# Entries that are gone


def test_the_newest_entry_is_deleted_and_the_next_one_has_the_id_after_it(store):
    with watched(store) as (_, (client,)):
        store.add("5-1", data="a")
        read_to(client, "a")
        store.client.xdel("sse", "5-1")
        read_to_gap(client)
        store.add("5-2", data="b")
        events = read_to(client, "b")
        assert [(event.name, event.id) for event in events] == [
            ("message", "5-1"), ("gap", "5-1"), ("message", "5-2")]
        assert gaps(events) == [{"after": "5-1", "resumed": None, "reason": "evicted"}]


def test_what_was_in_a_stream_before_the_server_is_sent_to_nobody_when_the_newest_is_deleted(store):
    add_many(store.client, number=100)
    newest = store.add("9000000000000-0", data="newest")
    with following(store, 1, "--history", "64") as (server,), resume(server.port, newest) as client:
        client.open()
        store.client.xdel("sse", newest)
        read_to_gap(client)
        store.add("9000000000000-1", data="next")
        assert [event.data for event in read_to(client, "next")[1:]] == ["next"]
        assert gaps(client.stream.events)[0]["after"] == newest


def test_an_entry_before_the_newest_is_deleted_without_anybody_noticing(store):
    with watched(store) as (_, (client,)):
        ids = [store.add(data=str(number)) for number in range(3)]
        read_to(client, "2")
        store.client.xdel("sse", *ids[:2])
        store.add(data="3")
        assert data(client) == ["0", "1", "2"] and not gaps(read_to(client, "3"))


def test_a_stream_of_one_entry_gives_each_event_or_a_gap(store):
    with watched(store, 2) as (_, clients):
        texts = [str(number) for number in range(100)]
        for text in texts:
            store.client.xadd("sse", {"data": text}, maxlen=1, approximate=False)
        for client in clients:
            check_told(read_to(client, "99"), texts)


@pytest.mark.parametrize("before", [[], ["before"]], ids=["empty", "with entries"])
def test_a_burst_that_is_trimmed_in_its_transaction_is_told_as_a_gap(store, before):
    with watched(store) as (_, (client,)):
        for text in before:
            store.add(data=text)
            read_to(client, text)
        texts = add_many(store.client, trimmed=True)
        events = read_to(client, texts[-1])
        assert names(events) == ["message"] * len(before) + ["gap", "message"]
        check_told(events, before + texts)


def test_a_burst_on_an_empty_stream_is_no_gap(store):
    with watched(store) as (_, (client,)):
        for round in range(5):
            texts = add_many(store.client, number=1024, name=f"round {round}")
            read_to(client, texts[-1])
            assert data(client)[-len(texts):] == texts
            assert len(gaps(client.stream.events)) == round
            store.client.xtrim("sse", maxlen=0, approximate=False)
            read_to_gap(client, round + 1)


def test_what_is_trimmed_while_the_follower_waits_is_told_as_a_gap(store):
    with watched(store) as (_, (client,)):
        store.client.client_pause(400)
        pipe = store.client.pipeline(transaction=True)
        for number in range(10):
            pipe.xadd("sse", {"data": str(number)})
        pipe.xtrim("sse", maxlen=4, approximate=False)
        pipe.execute()
        events = read_to(client, "9")
        assert gaps(events)[0]["after"] == "0-0" and data(client)[1:] == ["6", "7", "8", "9"]


def test_xsetid_alone_loses_nothing(store):
    with watched(store) as (_, (client,)):
        store.add(data="one")
        read_to(client, "one")
        store.client.execute_command("XSETID", "sse", f"{int(time.time() * 1000) + 100000}-7")
        store.add(data="two")
        assert names(read_to(client, "two")) == ["message", "message"]


# Ids that go back


def test_a_stream_begun_anew_with_lower_ids_is_told_as_a_gap(store):
    with watched(store) as ((server,), (client,)):
        for number in range(5):
            store.add(f"900-{number}", data=f"old {number}")
        read_to(client, "old 4")
        pipe = store.client.pipeline(transaction=True)
        pipe.flushall()
        for number in range(5):
            pipe.xadd("sse", {"data": f"new {number}"}, id=f"800-{number}")
        pipe.execute()
        events = read_to(client, "new 4")
        texts = [f"{age} {number}" for age in ("old", "new") for number in range(5)]
        assert data(client)[:5] + data(client)[6:] == texts
        assert gaps(events) == [{"after": "900-4", "resumed": "800-0", "reason": "evicted"}]
        with resume(server.port, "800-2") as other, resume(server.port, "900-2") as lost:
            assert names(read_to(other, "new 4")) == ["message"] * 2
            assert names(read_to(lost, "new 4")) == ["gap"] + ["message"] * 5
            assert gaps(lost.stream.events)[0]["reason"] == "unknown"


def test_the_same_id_with_other_data_is_told_as_a_gap(store):
    with watched(store) as (_, (client,)):
        store.add("5-1", data="old")
        read_to(client, "old")
        pipe = store.client.pipeline(transaction=True)
        pipe.flushall().xadd("sse", {"data": "new"}, id="5-1").execute()
        assert names(read_to(client, "new")) == ["message", "gap", "message"]


def test_a_stream_that_is_deleted_and_made_anew_is_told_as_a_gap(store):
    with watched(store, 2) as (_, clients):
        texts = [f"{round} {number}" for round in range(4) for number in range(3)]
        for text in texts:
            if text.endswith("0"):
                store.client.delete("sse")
            store.add(data=text)
            if text.endswith("2"):
                for client in clients:
                    read_to(client, text)
        for client in clients:
            check_told(client.stream.events, texts)
            assert data(client)[0] == "0 0" and len(gaps(client.stream.events)) >= 3


@pytest.mark.parametrize("number", [1, 700, 3000])
def test_renamed_and_back_again_brings_nothing_twice(store, number):
    with watched(store) as (_, (client,)):
        store.add(data="first")
        read_to(client, "first")    # with that in the stream, a burst may be longer than the log
        texts = ["first", *add_many(store.client, number=number)]
        read_to(client, texts[-1])
        store.client.rename("sse", "other")
        read_to_gap(client)
        store.client.rename("other", "sse")
        store.add(data="more")
        check_told(read_to(client, "more"), [*texts, "more"])
        got = [event.data for event in client.stream.events if event.name != "gap"]
        assert got == [*texts, "more"]


class Poster:
    """Posts texts on servers in turn, one after the other; keeps those that were acknowledged."""

    def __init__(self, servers: list) -> None:
        self.texts, self.number = [], 0
        self._servers, self._session = servers, requests.Session()

    def post(self, number: int) -> None:
        for _ in range(number):
            self.number += 1
            port = self._servers[self.number % len(self._servers)].port
            answer = self._session.post(f"http://127.0.0.1:{port}/{POST}", data=f"p{self.number}",
                                        timeout=PATIENCE)
            if answer.status_code == 200:
                self.texts.append(f"p{self.number}")

    def close(self) -> None:
        self._session.close()

    def post_until_taken(self) -> None:
        before = len(self.texts)
        wait_until(lambda: self.post(1) or len(self.texts) > before)


@pytest.mark.parametrize("ahead", [0.15, 0.5, 600])
def test_redis_without_data_and_its_clock_behind_is_told_as_a_gap(store, ahead):
    with watched(store, 2) as (servers, clients):
        poster = Poster(servers)
        first = f"{int((time.time() + ahead) * 1000)}-0"    # the ids that follow are no less
        store.add(first, data="ahead")
        poster.post(100)
        stopped = threading.Event()
        thread = threading.Thread(target=lambda: [store.wipe(), stopped.set()])
        thread.start()
        while not stopped.is_set():
            poster.post(1)
        thread.join()
        poster.post_until_taken()
        poster.post(200)
        for client in clients:
            events = read_to(client, poster.texts[-1])
            check_told(events, ["ahead", *poster.texts])
            assert gaps(events)
        poster.close()


def test_a_stream_restored_older_again_and_again_is_told_as_a_gap_each_time(store, tmp_path):
    kept, copy = store.folder / "appendonlydir", tmp_path / "copy"
    with watched(store, 2) as (servers, clients):
        poster = Poster(servers)
        poster.post(20)
        store.kill()
        shutil.copytree(kept, copy)
        store.start()
        poster.post_until_taken()
        for hours in (2, 1):
            store.add(f"{int((time.time() + hours * 3600) * 1000)}-0", data=f"ahead {hours}")
            poster.texts.append(f"ahead {hours}")
            poster.post(20)
            for client in clients:
                read_to(client, poster.texts[-1])
            store.kill()
            shutil.rmtree(kept)
            shutil.copytree(copy, kept)
            store.start()
            poster.post_until_taken()
            poster.post(20)
            for client in clients:
                read_to(client, poster.texts[-1])
        for client in clients:
            check_told(client.stream.events, poster.texts)
            assert len(gaps(client.stream.events)) == 2
        poster.close()


# Redis that is there, and does not do as it should


@contextmanager
def publishing(store):
    """Yield a stream that nobody follows and that takes orders, and close it."""
    stream = RedisStore(store.url, "sse", 64)
    writer = in_a_thread(stream.write)
    try:
        yield stream
    finally:
        stream.end()
        writer.join()
        stream.close()


def calls(store, command: str) -> int:
    """Return how often Redis was given a command."""
    return store.client.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"]


def test_two_events_are_a_transaction_and_one_needs_none(store):
    with publishing(store) as stream:
        stream.publish([Event("one")])
        assert calls(store, "multi") == 0
        ids = stream.publish([Event("two"), Event("three")])
        assert calls(store, "multi") == 1
        assert [each.decode() for each, _ in store.client.xrange("sse")][1:] == ids


def test_ten_thousand_entries_are_kept_and_hardly_more(store):
    add_many(store.client, number=11000)
    with publishing(store) as stream:
        stream.publish([Event("x")])
    assert 10000 <= store.client.xlen("sse") <= 10100      # whole nodes of 100 are let go of


def test_what_is_read_at_the_start_is_bounded_in_bytes(store, monkeypatch):
    monkeypatch.setattr(shared_module, "MAX_BYTES", 100000)
    ids = [store.add(data=str(number) * 5000) for number in range(64)]
    with publishing(store) as stream:
        rows, missing = stream._collect(threading.Event())
        assert len(rows) == 24      # a page
        assert "%d-%d" % missing == ids[64 - 25]        # the one before


def test_all_that_wait_for_redis_are_one_transaction_and_a_stop_lets_them(store):
    with publishing(store) as stream:
        store.client.client_pause(10000, all=False)
        first = stream.submit([Event("first")])
        wait_until(first.running)
        waiting = [stream.submit([Event(str(number))]) for number in range(120)]
        stream.end()
        assert not any(order.done() for order in waiting)
        store.client.client_unpause()
        assert len({order.result(PATIENCE)[0] for order in [first, *waiting]}) == 121
        assert calls(store, "multi") == 1
    wait_until(lambda: len(store.client.client_list()) == 1)


def test_an_idle_stream_is_asked_four_times_a_second(store):
    with following(store):
        wait_until(lambda: calls(store, "xread"))
        began, before = time.monotonic(), calls(store, "xread")
        wait_until(lambda: calls(store, "xread") >= before + 5)
        assert time.monotonic() - began > 0.8


def test_who_waits_for_slow_clients_waits_for_no_other_read(store):
    with SSEServer(port=0, redis=store.url) as server:
        began = time.monotonic()
        for _ in range(20):
            server.publish("x", wait=True)
        assert time.monotonic() - began < 2.5       # 250 ms each would be 5 s


def test_what_redis_does_not_answer_is_refused_in_time_and_not_tried_again(store):
    with Forwarder(store.port) as wire:
        store.url = wire.url
        with watched(store) as ((server,), (client,)):
            post(server.port, "before").raise_for_status()
            read_to(client, "before")
            wire.block()
            began = time.monotonic()
            assert post(server.port, "refused").status_code == 503
            assert 1.5 < time.monotonic() - began < 2.9
            wire.open()


@pytest.mark.parametrize("query", ["protocol=3", "decode_responses=true", "retry_on_timeout=true",
                                   "max_connections=5", "encoding=utf-16"])
def test_a_url_cannot_say_how_redis_is_spoken_to(store, query):
    store.url += f"?{query}"
    with watched(store) as (_, (client,)):
        store.add(data="one")
        read_to(client, "one")
        store.client.xtrim("sse", maxlen=0, approximate=False)
        read_to_gap(client)
        store.add(data="two")
        read_to(client, "two")


def test_while_redis_refuses_posts_are_503_and_then_all_goes_on(store):
    with watched(store) as ((server,), (client,)):
        poster = Poster([server])
        poster.post(3)
        for setting, value, usual in (("maxmemory", 1, 0), ("requirepass", "secret", "")):
            store.client.config_set(setting, value)
            store.client.client_kill_filter(_type="normal", skipme=True)    # who is in stays so
            wait_until(lambda: post(server.port, "refused").status_code == 503)
            store.client.config_set(setting, usual)
            poster.post_until_taken()
        store.client.rename("sse", "other")
        store.client.set("sse", "x")
        wait_until(lambda: post(server.port, "refused").status_code == 503)
        store.client.delete("sse")
        store.client.rename("other", "sse")
        poster.post_until_taken()
        check_told(read_to(client, poster.texts[-1]), poster.texts)
        poster.close()


def test_after_a_failover_publishing_goes_on_with_the_new_master(store, tmp_path):
    """As behind a proxy: connections that are there stay with the old one, new ones go to the new.
    """
    (tmp_path / "replica").mkdir()
    replica = Redis(tmp_path / "replica")
    try:
        replica.client.replicaof("127.0.0.1", store.port)
        with Forwarder(store.port) as wire:
            store.url = wire.url
            with following(store) as (server,), Client(server.port) as client:
                client.open()
                post(server.port, "before").raise_for_status()
                wait_until(lambda: replica.client.xlen("sse") == 1)
                wire.target = replica.port
                store.client.execute_command("FAILOVER")
                wait_until(lambda: replica.client.role()[0] == b"master")
                wait_until(lambda: post(server.port, "after").status_code == 200, timeout=5)
                assert replica.client.xlen("sse") == 2
                store.kill()        # what is read from it, too, comes from the new one then
                post(server.port, "last").raise_for_status()
                assert not gaps(read_to(client, "last"))
                wait_until(lambda: health(server) == 200)
    finally:
        replica.kill()
        replica.client.close()


@pytest.mark.parametrize("setting", ["maxmemory", "min-replicas-to-write"])
def test_health_says_so_as_long_as_redis_is_read_and_takes_no_event(store, setting):
    def reads() -> int:
        return store.client.info("commandstats")["cmdstat_xread"]["calls"]

    with watched(store) as ((server,), (client,)):
        post(server.port, "one").raise_for_status()
        store.client.config_set(setting, 1)
        assert post(server.port, "refused").status_code == 503
        before = reads()
        wait_until(lambda: reads() > before + 3)
        assert health(server) == 503 and store.client.xlen("sse") == 1
        store.client.config_set(setting, 0)
        wait_until(lambda: health(server) == 200, timeout=2)
        post(server.port, "two").raise_for_status()
        assert names(read_to(client, "two")) == ["message", "message"]


@contextmanager
def at_the_second_page(store, monkeypatch, action):
    """Yield what follows the stream, loaded; when it reads newest entries, action comes between."""
    stream = RedisStore(store.url, "sse", 64)
    shared, page = StoreHub(stream, **{**KEPT, "history": 64}), stream._redis.xrevrange

    def act_and_read(*values, **options):
        monkeypatch.undo()
        action()
        return page(*values, **options)
    try:
        stream.turn(shared, threading.Event())
        monkeypatch.setattr(stream._redis, "xrevrange", act_and_read)
        yield shared, lambda: shared._log.collect(shared._log.first, shared._log.next)[0]
    finally:
        stream.close()


def test_a_fault_while_a_gap_is_looked_into_loses_no_gap(store, monkeypatch):
    def fail():
        store.client.config_set("requirepass", "secret")
        store.client.client_kill_filter(_type="normal", skipme=True)
    with at_the_second_page(store, monkeypatch, fail) as (shared, frames):
        pipe = store.client.pipeline()
        for number in range(50):
            pipe.xadd("sse", {"data": str(number)})
        pipe.xtrim("sse", maxlen=30, approximate=False).execute()
        shared.store.turn(shared, threading.Event())
        assert shared.store.trouble and not frames()
        store.client.config_set("requirepass", "")
        wait_until(lambda: shared.store.turn(shared, threading.Event()) == 0
                   and b"data: 49" in frames()[-1].chunk)
        assert b"event: gap" in frames()[0].chunk and len(frames()) == 31


def test_a_stream_that_is_made_anew_between_two_pages_is_not_mixed_with_the_old_one(
        store, monkeypatch):
    def make_anew():
        store.client.delete("sse")
        store.add("4-0", data="new")
    with at_the_second_page(store, monkeypatch, make_anew) as (shared, frames):
        add_many(store.client, trimmed=True, number=1)
        pipe = store.client.pipeline()
        pipe.delete("sse")
        for number in range(50):
            pipe.xadd("sse", {"data": str(number)}, id=f"5-{number}")
        pipe.xtrim("sse", maxlen=30, approximate=False).execute()
        for _ in range(3):
            shared.store.turn(shared, threading.Event())
        assert [frame.id for frame in frames()] == [
            None, *((5, number) for number in range(26, 50)), None, (4, 0)]


def test_a_key_of_another_kind_at_the_start_is_told_until_it_is_gone(store):
    store.client.set("sse", "x")
    with following(store) as (server,):
        health = f"http://127.0.0.1:{server.port}/-/health"
        assert "ResponseError" in requests.get(health, timeout=PATIENCE).text
        store.client.delete("sse")
        wait_until(lambda: requests.get(health, timeout=PATIENCE).status_code == 200)
        with Client(server.port) as client:
            client.open()
            store.add(data="one")
            read_to(client, "one")


def test_entries_of_a_megabyte_and_others_that_are_no_events(store):
    with watched(store) as (_, (client,)):
        texts = [str(number) + "x" * (1000 << 10) for number in range(40)]
        for text in texts:
            store.client.xadd("sse", {"data": text})
        store.client.xadd("sse", {"data": "x" * (2 << 20)})
        store.client.xadd("sse", {"no": "event"})
        store.client.xtrim("sse", maxlen=1, approximate=False)      # to the one that is no event
        store.add(data="last")
        assert len(read_to(client, "last")) >= 2
        check_told(client.stream.events, [*texts, "last"])


def test_whatever_happens_to_redis_each_event_comes_once_or_a_gap_is_told(store):
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    print(f"seed {seed}")

    def freeze():
        halt(store.process)
        threading.Timer(0.3, store.process.send_signal, (signal.SIGCONT,)).start()
    moves = [store.client.flushall, store.wipe, freeze, lambda: (store.kill(), store.start()),
             lambda: store.client.xtrim("sse", maxlen=draw.choice((0, 1, 5)), approximate=False),
             lambda: store.client.client_pause(100),
             lambda: store.client.xadd("sse", {"no": "event"}),
             lambda: store.client.client_kill_filter(_type="normal", skipme=True)]
    with watched(store, 2) as (servers, clients):
        poster = Poster(servers)

        def see_the_newest():
            """What is made and deleted after a look at no stream, and before the next, is unseen.
            """
            poster.post_until_taken()
            for client in clients:
                read_to(client, poster.texts[-1])
        see_the_newest()
        for _ in range(12):
            poster.post(draw.randrange(20))
            draw.choice(moves)()
            poster.post(draw.randrange(5))
            see_the_newest()
        poster.close()
        for client in clients:
            check_told(client.stream.events, poster.texts)


# Clients that are ahead of a server


@contextmanager
def cut_off(store):
    """Run two servers, of which the second gets to Redis through a wire that can be blocked."""
    with Forwarder(store.port) as wire, following(store, 1, "--heartbeat", "0.2") as (near,):
        direct, store.url = store.url, wire.url
        with following(store, 1, "--heartbeat", "0.2") as (far,):
            store.url = direct
            yield near, far, wire


def status(server) -> requests.Response:
    return requests.get(f"http://127.0.0.1:{server.port}/-/status", timeout=PATIENCE)


def test_a_client_ahead_of_this_server_comes_back_and_gets_what_follows_its_id(store):
    with cut_off(store) as (near, far, wire), Client(near.port) as client:
        client.open()
        store.add(data="old")
        with resume(far.port, "0-1") as probe:
            read_to(probe, "old")
        wire.block()
        for number in range(5):
            store.add(data=str(number))
        ids = [event.id for event in read_to(client, "4") if event.data != "old"][-5:]
        began = time.monotonic()
        asked = get("/", "Accept: text/event-stream", f"Last-Event-ID: {ids[1]}")
        assert b"event: busy" in ask(far.port, asked)
        assert 0.9 < time.monotonic() - began < 5       # a second, on an idle machine
        assert status(far).status_code == 200
        wire.open()
        for number, follow in ((1, ["2", "3", "4", "new"]), (4, ["new"])):
            wait_until(lambda number=number: b"event: busy" not in ask_for(far.port, ids[number]))
            store.add(data="new")
            with resume(far.port, ids[number]) as back:
                read_to(back, "new")
                assert data(back)[:len(follow)] == follow and not gaps(back.stream.events)


def ask_for(port: int, last_id: str) -> bytes:
    """Return the first bytes of a stream that goes on after an id."""
    with connect(port) as sock:
        sock.sendall(get("/", "Accept: text/event-stream", f"Last-Event-ID: {last_id}"))
        received = b""
        while b"retry:" not in received:
            received += sock.recv(1000)
        return received


def test_a_thousand_clients_ahead_of_a_server_hold_up_no_newcomer(store):
    with cut_off(store) as (near, far, wire), ExitStack() as stack:
        store.add(data="old")
        with resume(far.port, "0-1") as probe:
            read_to(probe, "old")
        wire.block()
        ids = [store.add(data=str(number)) for number in range(5)]
        ahead = [stack.enter_context(connect(far.port)) for _ in range(1000)]
        for number, sock in enumerate(ahead):
            sock.sendall(get("/", "Accept: text/event-stream", f"Last-Event-ID: {ids[number % 5]}"))
        began = time.monotonic()
        with Client(far.port) as newcomer:
            newcomer.open()
        assert time.monotonic() - began < 0.5
        assert holds_no_thread(far)
        for sock in ahead:
            assert b"event: busy" in sock.recv(1000)


def test_an_id_that_is_nowhere_becomes_unknown(store):
    with watched(store) as ((server,), _):
        store.add(data="one")
        began = time.monotonic()
        with resume(server.port, f"{int(time.time() * 1000) + 3600000}-0") as client:
            events = read_to(client, "one")
            assert time.monotonic() - began < 1.5     # a second, on an idle machine
            assert names(events) == ["gap", "message"] and gaps(events)[0]["reason"] == "unknown"
            store.add(data="two")
            assert names(read_to(client, "two")) == ["gap", "message", "message"]


def test_a_server_that_was_there_before_redis_has_clients_come_back_and_misses_nothing(store):
    ids = [store.add(data=str(number)) for number in range(10)]
    store.kill()
    with following(store, 1) as (server,), ExitStack() as stack:
        health = requests.get(f"http://127.0.0.1:{server.port}/-/health", timeout=PATIENCE)
        assert health.status_code == 503
        for last_id in ("", ids[3]):
            fields = ["Accept: text/event-stream"] + [f"Last-Event-ID: {last_id}"] * bool(last_id)
            answer = ask(server.port, get("/", *fields))
            assert b"event: busy" in answer and answer.endswith(b"0\r\n\r\n")
            assert b"not ready" in ask(server.port, get("/"))
        store.start()
        store.add(data="meanwhile")
        wait_until(lambda: status(server).status_code == 200 and requests.get(
            f"http://127.0.0.1:{server.port}/-/health", timeout=PATIENCE).status_code == 200)
        back = [stack.enter_context(resume(server.port, ids[number])) for number in range(10)]
        store.add(data="new")
        for number, client in enumerate(back):
            read_to(client, "new")
            assert data(client) == [*map(str, range(number + 1, 10)), "meanwhile", "new"]


def reasons_and_data(port: int, path: str, last_id: str = "") -> list:
    """Return what a client gets before an event that is posted then: gaps as their reasons."""
    field = [f"Last-Event-ID: {last_id}"] * bool(last_id)
    with Client(port, get(path, *field), last_id=last_id) as client:
        client.open()
        last = post(port, "last").json()["id"]
        client.read_until(lambda stream: stream.last_id == last)
        return [json.loads(event.data)["reason"] if event.name == "gap" else event.data
                for event in client.stream.events][:-1]


@pytest.mark.parametrize("skew", [0, -5, 30])
def test_more_than_the_log_holds_while_redis_was_away_at_the_start_is_a_gap(store, skew):
    """Whatever the clock of the server says: it is not compared with ids."""
    first = store.add(data="first")
    store.kill()
    with Server("--redis", store.url, "--publish-token", POST, "--history", "1024", before=(
            f"import time; real = time.time; time.time = lambda: real() + {skew}")) as server:
        # Else it could read the first entry before the others are there.
        halt(server.process)
        store.start()
        add_many(store.client, number=3000)
        server.process.send_signal(signal.SIGCONT)
        wait_until(lambda: health(server) == 200)
        newest = [f"burst {number}" for number in range(3000 - 1024, 3000)]
        assert reasons_and_data(server.port, "/", first) == ["evicted", *newest]
        assert reasons_and_data(server.port, "/?since=1h") == ["evicted", *newest[1:], "last"]


def test_what_was_trimmed_from_a_stream_is_a_gap_for_all(store):
    add_many(store.client, number=20)
    with following(store) as (server,):
        assert reasons_and_data(server.port, "/?since=all") == [f"burst {n}" for n in range(20)]
    store.client.xtrim("sse", maxlen=10, approximate=False)
    with following(store) as (server,):
        got = reasons_and_data(server.port, "/?since=all")
        assert got[:2] == ["evicted", "burst 11"] and got[-1] == "last"


def test_an_id_from_before_redis_lost_its_data_is_unknown(store):
    old = [store.add(data=str(number)) for number in range(3)][1]
    store.wipe()
    with following(store) as (server,):
        post(server.port, "new")
        assert reasons_and_data(server.port, "/", old) == ["unknown", "new"]


# A fault of our own


def fail(event: Event) -> None:
    raise ZeroDivisionError("a fault")


def test_a_fault_in_the_follower_ends_the_server(store, monkeypatch, caplog):
    server = SSEServer(port=0, redis=store.url).start()
    try:
        monkeypatch.setattr(server._hub, "add", fail)
        with Client(server.port) as client:
            client.open()
            store.add(data="one")
            client.read_to_end()
        with pytest.raises(NotRunning):
            server.publish("two")
    finally:
        with pytest.raises(RuntimeError) as raised:
            server.stop()
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    record, = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert record.exc_info[0] is ZeroDivisionError and "source" in record.getMessage()


def test_a_fault_in_the_follower_ends_the_process(store):
    code = f"""if True:
        import sys
        sys.path.insert(0, {str(TOP)!r})
        import sse_server
        sse_server.StoreHub.add = lambda self, event: 1 / 0
        sys.exit(sse_server.main(["--port", "0", "--redis", {store.url!r}]))"""
    process = subprocess.Popen([sys.executable, "-c", code], text=True, stdin=subprocess.DEVNULL,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        port = int(process.stdout.readline().rpartition(":")[2])
        with Client(port) as client:
            client.open()
            store.add(data="one")
            client.read_to_end()
        errors = process.communicate(timeout=PATIENCE)[1]
    finally:
        process.kill()
    assert process.returncode == 1
    assert errors.count("Traceback") == 1 and "ZeroDivisionError" in errors


def test_a_full_stream_from_the_future_does_not_hold_up_the_start(store):
    """As when another machine's clock is ahead: there is no publisher yet to make room."""
    ahead = int((time.time() + 60) * 1000)
    for number in range(1100):
        store.add(id=f"{ahead + number}-0", data="x" * 70_000)
    server = SSEServer(port=0, redis=store.url)
    thread = threading.Thread(target=server.start, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    server.stop()
