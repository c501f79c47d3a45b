"""Servers on one SQLite file: real processes, killed and started again; nothing lost or twice."""
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing

import pytest
import requests

import sse_server
from helpers import (KEPT, PATIENCE, PUBLISH_TOKEN, TOP, Client, Server, get, halt, in_a_thread,
                     wait_until)
from history_file import (add_rows, count, gaps, key, on_file, post, publisher, publishing, query,
                          resume, rows, texts, turn, turned)
from sse_core.stores import sqlite as file_stream
from sse_core.errors import NotRunning, Unavailable
from sse_core.stores.sqlite import SQLiteStore
from sse_core.engine.log import NOTHING
from sse_core.stores.store import Event, StoredEvent, StoreHub
from sse_server import SSEServer


@pytest.fixture
def counting_often(monkeypatch):
    """Have streams of this process count their rows ten times a second, and not once."""
    monkeypatch.setattr(file_stream, "COUNT_EVERY", 0.1)


# One process after another


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_clients_resume_exactly_once_after_a_restart(path, how):
    with on_file(path) as (server,):
        ids = [post(server, str(number)).json()["id"] for number in range(20)]
        server.process.send_signal(how)
        server.process.wait(PATIENCE)
    assert rows(path) == [(each, str(number)) for number, each in enumerate(ids)]
    with on_file(path) as (server,), resume(server, ids[4]) as client, Client(server.port) as new:
        new.open()
        ids.append(post(server, "20").json()["id"])
        assert [event.id for event in client.read_until_data("20")] == ids[5:]
        assert texts(client) == [str(number) for number in range(5, 21)]
        assert len(new.read_until_data("20")) == 1


def test_names_and_any_text_come_back_as_they_were(path):
    text = "a\0b \u20ac\U0001f600\ntwo"
    with on_file(path) as (server,):
        answer = requests.post(f"http://127.0.0.1:{server.port}/{PUBLISH_TOKEN}?event=mail&"
                               "channel=ann", data=text.encode(), timeout=PATIENCE)
    assert query(path, "select ms || '-' || n, channel, event, data from event") == [
        (answer.json()["id"], "ann", "mail", text)]
    assert abs(key(answer.json()["id"])[0] / 1000 - time.time()) < PATIENCE
    assert query(path, "pragma application_id") == [(0x73736531,)]     # for other releases
    assert query(path, "pragma user_version") == [(2,)]
    request = b"GET /?channel=ann HTTP/1.1\r\nHost: x\r\nLast-Event-ID: 0-1\r\n\r\n"
    with on_file(path) as (server,), Client(server.port, request, last_id="0-1") as client:
        assert client.read_events(2)[1][:2] == ("mail", text)


def test_ids_grow_when_the_clock_is_set_back(path, monkeypatch):
    ids = []
    for ahead in (0, -3600, -7200, 5):
        monkeypatch.setattr(file_stream.time, "time", lambda now=time.time() + ahead: now)
        with publishing(path) as stream:
            ids += [stream.publish([Event("x")] * 2) for _ in range(3)]
    ids = [key(each) for pair in ids for each in pair]
    assert ids == sorted(set(ids)) and len(ids) == 24


def test_the_lowest_ids_are_ids(path):
    with SSEServer(port=0, history_file=str(path)) as server, Client(server.port) as client:
        client.open()
        for ms, n in ((0, 0), (0, 1), (1, 0)):
            query(path, "insert into event values (?, ?, null, null, ?)", ms, n, f"{ms}-{n}")
            assert client.read_until_data(f"{ms}-{n}")[-1].id == f"{ms}-{n}"
    with SSEServer(port=0, history_file=str(path)) as server, \
            Client(server.port, get("/?since=all")) as client:
        client.read_until_data("1-0")
        assert texts(client)[-2:] == ["0-1", "1-0"]


def test_a_server_begins_with_the_newest_rows_and_trims_the_oldest(path, counting_often):
    with publishing(path, 100) as stream:
        for _ in range(40):
            ids = stream.publish([Event(str(number)) for number in range(500)])
        wait_until(lambda: count(path) == 10000)
    assert [each for each, _ in rows(path)[-500:]] == ids
    with SSEServer(port=0, history=100, history_file=str(path)) as server:
        log = server._hub._log
        assert log.frame(log.first).id == key(ids[400]) and log.last_id == key(ids[-1])


def test_a_longer_history_is_kept_ten_times(path, counting_often):
    with publishing(path, 1200) as stream:
        for _ in range(30):
            stream.publish([Event("x")] * 500)
        wait_until(lambda: count(path) == 12000)


def test_a_file_does_not_grow_on_while_it_is_written_to_all_the_time(path):
    with publishing(path) as stream:
        add_rows(path, 12000)
        deadline = time.monotonic() + PATIENCE
        while count(path) > 10500:
            stream.publish([Event("x")] * 100)
            assert time.monotonic() < deadline
        assert count(path) >= 10000


def test_rows_that_another_program_adds_are_trimmed_like_others(path):
    with publishing(path):
        add_rows(path, 15001)
        wait_until(lambda: count(path) == 10000)


def test_an_empty_file_and_a_link_are_taken(path, tmp_path):
    path.write_bytes(b"")
    (tmp_path / "link").symlink_to(path)
    with publishing(tmp_path / "link") as stream:
        stream.publish([Event("x")])
    assert count(path) == 1


def test_without_such_a_file_sqlite_is_not_imported():
    code = "import sse_server, sys; sys.exit('sqlite3' in sys.modules or 'fcntl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=TOP).returncode == 0


@pytest.mark.parametrize("sync, level", [(False, 1), (True, 2)])
def test_sync_is_what_sqlite_calls_full(path, sync, level):
    with publishing(path, sync=sync) as stream:
        assert stream._writer.execute("pragma synchronous").fetchone() == (level,)


# Who publishes


def test_all_that_wait_for_the_file_are_committed_together(path):
    with publishing(path) as stream, closing(sqlite3.connect(path)) as other:
        other.execute("begin immediate")
        waiting = [stream.submit([Event(str(n)), Event(f"{n}+")]) for n in range(50)]
        other.rollback()
        ids = [each.result(PATIENCE) for each in waiting]
    found = dict(rows(path))
    assert len({key(first)[0] for first, _ in ids}) <= 2        # transactions, by their times
    for number, (first, second) in enumerate(ids):
        assert (found[first], found[second]) == (str(number), f"{number}+")
        assert key(second) == (key(first)[0], key(first)[1] + 1)


def test_an_order_that_is_cancelled_in_time_is_not_committed(path):
    with publishing(path) as stream, closing(sqlite3.connect(path)) as other:
        other.execute("begin immediate")
        first = stream.submit([Event("0")])
        wait_until(first.running)
        second, third = (stream.submit([Event(str(n))]) for n in (1, 2))
        assert second.cancel() and not first.cancel()
        other.rollback()
        third.result(PATIENCE)
        assert [data for _, data in rows(path)] == ["0", "2"]


def test_a_stop_waits_for_what_was_published_before_and_refuses_the_rest(path):
    with publishing(path) as stream, closing(sqlite3.connect(path)) as other:
        other.execute("begin immediate")
        waiting = [stream.submit([Event(str(n))]) for n in range(3)]
        stream.end()
        with pytest.raises(Unavailable, match="stopped"):
            stream.publish([Event("late")])
        assert not any(each.done() for each in waiting)
        other.rollback()
        for each in waiting:
            assert len(each.result(PATIENCE)) == 1
    assert [data for _, data in rows(path)] == ["0", "1", "2"]
    assert os.listdir(path.parent) == ["events.db"]


def test_a_fault_of_our_own_while_committing_refuses_all_that_wait(path, monkeypatch):
    stream = SQLiteStore(path, 64, False)
    orders = [stream.submit([Event(str(number))]) for number in range(3)]
    monkeypatch.setattr(stream, "_commit", lambda events: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stream.write()
    for order in [*orders, stream.submit([Event("late")])]:
        with pytest.raises(Unavailable):
            order.result(0)


def test_a_lock_is_tried_every_few_milliseconds_until_time_is_up():
    tries = []

    def take():
        tries.append(time.monotonic())
        raise sqlite3.OperationalError("database is locked")
    with pytest.raises(sqlite3.OperationalError):
        file_stream._insist(take, 0.5)
    assert 20 < len(tries) < 2000 and tries[-1] - tries[0] > 0.4


def test_a_publish_that_a_signal_handler_makes_amid_another_is_taken(path):
    with publishing(path) as stream:
        with stream._mutex:
            assert len(stream.publish([Event("x")])) == 1
        assert stream.publish([]) == [] and count(path) == 1


# Many processes


def test_many_processes_begin_with_the_same_new_file(path):
    processes = [publisher(path, str(number), 5) for number in range(6)]
    for process in processes:
        assert len(process.communicate(timeout=PATIENCE)[0].splitlines()) == 5
    assert count(path) == 6 * 15


@pytest.mark.parametrize("history", ["0", "64", "1024"])
def test_a_pipe_is_held_back_for_a_client_that_reads(path, history):
    lines = [f"{number} {'x' * 1000}" for number in range(6000)]
    server = Server("--stdin", "--wait-clients", "1", "--history-file", str(path), "--history",
                    history)
    with Client(server.port, receive_buffer=4096) as client, ThreadPoolExecutor(1) as pool:
        client.open()
        written = pool.submit(server.process.communicate, "\n".join(lines).encode())
        client.read_to_end()
        written.result()
        assert [event.data for event in client.stream.events] == lines


def test_each_server_sees_all_in_one_order(path):
    with on_file(path, 3) as servers, ExitStack() as stack:
        clients = [stack.enter_context(Client(server.port)).open() for server in servers]
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda n: post(servers[n % 3], str(n)).raise_for_status(), range(150)))
        end = post(servers[0], "end").json()["id"]
        for client in clients:
            client.read_until_data("end")
            assert [(event.id, event.data) for event in client.stream.events] == rows(path)
            assert sorted(texts(client)) == sorted([*map(str, range(150)), "end"])
        query(path, "insert into event values (?, 0, null, 'x', 'a person')", key(end)[0] + 1)
        for client in clients:
            assert client.read_events(152)[-1][:2] == ("x", "a person")


def test_a_client_that_moves_to_another_server_at_once_misses_nothing(path):
    with on_file(path, 2) as servers:
        last = post(servers[0], "start").json()["id"]
        for number in range(12):
            here, there = servers[number % 2], servers[1 - number % 2]
            newest = post(here, f"{number} a").json()["id"]
            with resume(there, newest) as ahead, resume(there, last) as client:
                last = post(here, f"{number} b").json()["id"]
                ahead.read_until_data(f"{number} b")
                client.read_until_data(f"{number} b")
                assert texts(client) == [f"{number} a", f"{number} b"]
                assert texts(ahead) == [f"{number} b"]


def acknowledged_by(process: subprocess.Popen) -> dict:
    """Return the texts by their ids, of those that a killed publisher had told of."""
    name, told = process.args[4], {}
    with process:
        lines = process.stdout.read().split("\n")[:-1]
    for line in lines:
        number, *ids = line.split()
        told.update((each, f"{name} {number}-{n}") for n, each in enumerate(ids))
    return told


@pytest.mark.parametrize("number", [12, pytest.param(40, marks=pytest.mark.long)])
def test_an_acknowledged_event_is_there_after_kill_9_at_any_moment(path, number):
    seed = random.randrange(1 << 32)
    draw, killed, running = random.Random(seed), [], []
    with on_file(path, 1, "--history", "100000") as (server,), Client(server.port) as client:
        client.open()
        reading = threading.Thread(target=client.read_until_data, args=("end",))
        reading.start()
        for name in range(number):
            running.append(publisher(path, f"p{name}", 100000))
            if name > 2:
                running[0].stdout.readline() if draw.random() < 0.5 else None
                time.sleep(draw.uniform(0, 0.1))
                killed.append(running.pop(draw.randrange(len(running))))
                killed[-1].kill()
        for process in running:
            process.kill()
        told = [acknowledged_by(process) for process in killed + running]
        end = post(server, "end").json()["id"]
        reading.join(PATIENCE)
    found, got = rows(path), [(event.id, event.data) for event in client.stream.events]
    acknowledged = {end: "end", **{each: text for texts in told for each, text in texts.items()}}
    print(f"seed {seed}: {len(found)} events")
    assert len(acknowledged) > 100 and acknowledged.items() <= dict(found).items()
    assert got == found and len(set(text for _, text in found)) == len(found)
    for process in killed + running:        # whole transactions, in their order
        own = [text for _, text in found if text.startswith(f"{process.args[4]} ")]
        assert own == [f"{process.args[4]} {n // 3}-{n % 3}" for n in range(len(own))]
        assert len(own) % 3 == 0
    assert query(path, "pragma integrity_check") == [("ok",)]


# Reading


def trim_to(path, number: int) -> None:
    """Delete all but so many of the newest rows, in one transaction."""
    query(path, "delete from event where (ms, n) < (select ms, n from event "
                "order by ms desc, n desc limit 1 offset ?)", number - 1)


def test_a_follower_that_was_trimmed_past_tells_a_gap(path, counting_often):
    with on_file(path, 1, "--history", "64") as (server,), Client(server.port) as client:
        client.open()
        first = post(server, "first").json()["id"]
        client.read_until_data("first")
        halt(server.process)
        with publishing(path) as stream:
            for _ in range(30):
                stream.publish([Event(str(number)) for number in range(500)])
            wait_until(lambda: count(path) == 10000)
        server.process.send_signal(signal.SIGCONT)
        client.read_until_data("499")
        newest = rows(path)[-64:]
        assert gaps(client) == [{"after": first, "resumed": newest[0][0], "reason": "evicted"}]
        assert [(event.id, event.data) for event in client.stream.events[2:]] == newest


def test_a_gap_for_everybody_carries_the_id_of_an_event_and_not_of_a_row_that_is_none(path):
    with on_file(path) as (server,), Client(server.port) as client:
        client.open()
        first = post(server, "first").json()["id"]
        client.read_until_data("first")
        query(path, "insert into event select max(ms) + 1, 0, null, null, null from event")
        halt(server.process)
        with publishing(path) as stream:
            stream.publish([Event(str(number)) for number in range(100)])
        trim_to(path, 10)
        server.process.send_signal(signal.SIGCONT)
        client.read_until_data("99")
        assert gaps(client)[0]["after"] == first
        with resume(server, first) as back:
            back.read_until_data("99")
            assert [gap["reason"] for gap in gaps(back)] == ["evicted"]


def test_a_gap_for_everybody_does_not_name_an_event_of_another_channel(path):
    with on_file(path) as (server,), Client(server.port) as client:
        client.open()
        first = post(server, "first").json()["id"]
        client.read_until_data("first")
        halt(server.process)
        with publishing(path) as stream:
            stream.publish([Event(str(number), channel="b") for number in range(20)])
            trim_to(path, 10)
            stream.publish([Event("for everybody")])
        server.process.send_signal(signal.SIGCONT)
        client.read_until_data("for everybody")
        assert gaps(client) == [{"after": first, "resumed": None, "reason": "evicted"}]


def test_rows_trimmed_exactly_up_to_where_a_server_stands_are_no_gap(path):
    with on_file(path) as (server,), Client(server.port) as client:
        client.open()
        post(server, "one")
        client.read_until_data("one")
        query(path, "delete from event")
        post(server, "two")
        client.read_until_data("two")
        assert texts(client) == ["one", "two"]


def test_a_burst_that_was_trimmed_before_an_empty_file_was_looked_at_is_a_gap(path):
    with on_file(path) as (server,), Client(server.port) as client:
        client.open()
        halt(server.process)
        add_rows(path, 100)
        trim_to(path, 10)
        server.process.send_signal(signal.SIGCONT)
        client.read_until(lambda stream: stream.last_id == "1-100")
        gap = client.stream.events[0]
        assert gap.name == "gap" and gap.id == gaps(client)[0]["after"] == "0-0"
        assert len(client.stream.events) == 11


def test_looks_are_10_ms_apart_while_others_write_and_50_ms_some_seconds_later(path):
    with publishing(path) as stream, publishing(path) as other:
        shared = turned(stream)
        stream._is_own = True       # what it has loaded is no news
        assert turn(shared) == 0.05
        stream._is_own = False
        other.publish([Event("x")])
        pauses = [turn(shared) for _ in range(200)]
        assert pauses[0] == 0.01 and pauses == sorted(pauses) and pauses[-1] == 0.05
        assert 3 < sum(pause for pause in pauses if pause < 0.05) < 5
        for publisher, pause in ((stream, 0.05), (other, 0.01)):    # its own, it knows of
            publisher.publish([Event("x")])
            stream._rest(threading.Event(), 0.0)
            assert turn(shared) == pause
        assert shared._log.next == 3


def test_loading_rows_and_telling_a_gap_keep_the_log_in_its_bounds(path):
    with publishing(path) as stream:
        events = [StoredEvent((number, 0), b"data: x\n\n", None) for number in range(1, 100)]
        for size in range(500, 1500, 7):
            shared = StoreHub(stream, **{**KEPT, "history": 64})
            shared._log._size = size
            shared.preload(iter(events), NOTHING)
            assert shared._log._bytes <= size
            assert shared._log.last_id == shared.fanned_out_id == (99, 0)
        shared = StoreHub(stream, **{**KEPT, "history": 64})
        shared.preload(iter(events), NOTHING)
        assert (shared._log.first, shared._log.next, shared.fanned_out) == (35, 99, 99)
        woken = []
        shared.wakeup.wake = lambda: woken.append(True)
        shared.tell_gap(None)     # and clients are sent it at once
        assert (shared._log.first, shared._log.next) == (36, 100) and woken


def test_rows_that_are_no_events_are_skipped_with_one_warning(path):
    with on_file(path) as (server,), Client(server.port) as client:
        client.open()
        post(server, "one")
        for values in ("1, null, null, null", "2, '', null, 'x'", "3, null, 'a' || char(10), 'x'",
                       "4, null, null, cast(x'ff' as text)", "5, null, null, x'ff'",
                       "6, null, 'gap', 'x'", "7, null, null, 7"):
            query(path, f"insert into event values (900000000000000, {values})")
        for ms in ("-1", "'x'", "1.5", "null", "1e15"):
            with pytest.raises(sqlite3.IntegrityError):
                query(path, f"insert into event values ({ms}, 0, null, null, 'x')")
        query(path, "insert into event values (900000000000000, 9, null, null, zeroblob(3000000))")
        last = post(server, "two").json()["id"]
        client.read_until_data("two")
        assert texts(client) == ["one", "7", "two"] and last == "900000000000000-10"
        server.stop(signal.SIGTERM)
        assert server.close().count("skipped") == 1


def test_megabytes_are_read_in_small_batches(path, monkeypatch):
    large, sizes = [Event(str(number) + "x" * 1000000) for number in range(20)], []
    fetch = file_stream._fetch
    monkeypatch.setattr(file_stream, "_fetch", lambda *values: (
        lambda found: [sizes.append(sum(len(row[4]) for row in found[0])), found][1])(
            fetch(*values)))
    with SSEServer(port=0, history_file=str(path)) as server, Client(server.port) as client:
        client.open()
        with publishing(path) as other:
            other.publish(large)
        client.read_until_data(large[-1].data)
        assert texts(client) == [event.data for event in large] and not gaps(client)
        assert max(sizes) < (1 << 20) + 1000100
        with publishing(path) as other:
            sizes.clear()
            other.publish([Event("x")] * 400 + [Event("end")])
        client.read_until_data("end")
        assert len(sizes) < 10


def test_its_thread_ends_at_once(path):
    with SSEServer(port=0, history_file=str(path)) as server:
        server.publish("x")
        wait_until(lambda: server._hub._log.next)
        began = time.monotonic()
    assert time.monotonic() - began < 1 and os.listdir(path.parent) == ["events.db"]
    for wait in (False, True):
        with pytest.raises(NotRunning):
            server.publish("y", wait=wait)


@pytest.mark.parametrize("wait", [False, True])
def test_a_bad_event_and_a_publish_of_a_signal_handler_are_refused(path, wait):
    with SSEServer(port=0, history_file=str(path)) as server:
        with pytest.raises(ValueError):
            server.publish("x", event="a\nb", wait=wait)
        with server._hub._mutex, pytest.raises(RuntimeError, match="signal handler"):
            server._hub.publish("x", wait=True)
        assert rows(path) == []


def test_a_publish_that_waits_for_slow_clients_waits_for_no_look_at_the_file(path):
    with SSEServer(port=0, history_file=str(path)) as server:
        began = time.monotonic()
        for _ in range(100):
            server.publish("x", wait=True)
        assert time.monotonic() - began < 2.5       # 50 ms each would be 5 s


def test_a_drain_goes_on_at_once_when_all_is_read(path):
    with publishing(path) as stream, ThreadPoolExecutor(1) as pool:
        shared, waited = turned(stream), 0.0
        for _ in range(10):
            drain = pool.submit(shared.drain)
            wait_until(lambda: shared._changed._waiters)
            began = time.monotonic()
            shared.complete(shared.clock())
            drain.result(PATIENCE)
            waited += time.monotonic() - began
        assert waited < 0.5


def test_a_publish_that_waits_for_the_file_tries_ten_times_a_second(path, monkeypatch):
    tries = []
    with SSEServer(port=0, history_file=str(path)) as server, ThreadPoolExecutor(1) as pool:
        stream = server._hub.store
        monkeypatch.setattr(stream, "publish", lambda events, publish=stream.publish: (
            tries.append(time.monotonic()), publish(events))[1])
        path.parent.rename(f"{path.parent}.away")
        publish = pool.submit(server.publish, "x", wait=True)
        wait_until(lambda: len(tries) == 5)
        os.rename(f"{path.parent}.away", path.parent)
        assert [(publish.result(PATIENCE), "x")] == rows(path) and tries[4] - tries[0] > 0.3


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux shares out a port")
def test_each_of_those_that_share_a_port_stops_at_once(path):
    """The system gives a connect to the port to any of them, so none can wake itself by one."""
    shared = {"history_file": str(path), "reuse_port": True}
    first = SSEServer(port=0, **shared)
    servers = [first] + [SSEServer(port=first.port, **shared) for _ in range(3)]
    for server in servers:
        server.start()
    for server in servers:
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 2

# What was removed


def begin(server, since: str) -> list:
    """Return what a client gets that begins there: gaps as their reasons, and data."""
    with Client(server.port, get(f"/?since={since}")) as client:
        client.open()
        last = server.publish("last")
        client.read_until(lambda stream: stream.last_id == last)
        return [json.loads(event.data)["reason"] if event.name == "gap" else event.data
                for event in client.stream.events][:-1]


def serving_file(path, **options) -> SSEServer:
    return SSEServer(port=0, history_file=str(path), **options)


def test_the_id_of_a_new_and_empty_file_is_no_gap_after_a_restart(path):
    with serving_file(path) as server, Client(server.port) as client:
        client.read_until(lambda stream: stream.last_id)
        assert client.stream.last_id == "0-0"
        server.publish("one")
    with serving_file(path) as server:
        assert begin(server, "0-0") == begin(server, "all")[:-1] == ["one"]


@pytest.mark.parametrize("since", ["all", "7d"])
def test_rows_that_a_start_leaves_in_the_file_are_a_gap(path, since):
    with publishing(path) as stream:
        for number in range(75):
            stream.publish([Event(str(number).ljust(1000000))])
    with serving_file(path, history=1024) as server:
        got = begin(server, since)
        assert got[0] == "evicted" and len(got) == 68


@pytest.mark.parametrize("history, reason", [(100, "evicted"), (151, None), (1000, None)])
def test_all_is_a_gap_after_a_restart_only_if_something_is_missing(path, history, reason):
    with publishing(path) as stream:
        stream.publish([Event("x")] * 150)
        query(path, "insert into event values (1, 0, null, null, null)")    # no event
    with serving_file(path, history=history) as server:
        got = begin(server, "all")
        assert got[0] == (reason or "x") and len(got) == min(history, 150) + bool(reason)


def test_rows_removed_from_the_file_are_a_gap_also_with_a_larger_history(path):
    with publishing(path) as stream:
        ids = stream.publish([Event("x")] * 20)
        trim_to(path, 10)
    with serving_file(path, history=1000) as server:
        for since, gap in (("all", True), ("1h", True), ("0-0", True), (ids[8], True),
                           (ids[9], False), (ids[10], False)):
            assert (begin(server, since)[0] == "evicted") == gap, since


V1 = ("create table event(ms integer, n integer, channel text, event text, data text, "
      "primary key (ms, n)) without rowid", "pragma application_id = 0x73736531",
      "pragma user_version = 1", "pragma journal_mode = wal")


@pytest.mark.parametrize("number, is_in_doubt", [(9999, False), (10000, True)])
def test_a_file_of_1_1_0_is_brought_up_to_date_and_hides_no_loss(path, number, is_in_doubt):
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in V1:
            connection.execute(statement)
    add_rows(path, number)
    with serving_file(path, history=20000) as server:
        got = begin(server, "all")
        assert (got[0] == "evicted") == is_in_doubt and len(got) == number + is_in_doubt
        assert begin(server, "1-1")[:1] == ["x"]
    assert query(path, "pragma user_version") == [(2,)]
    assert count(path) == number + 2


def test_an_id_from_before_the_file_was_lost_is_unknown(path):
    with serving_file(path) as server:
        old = server.publish("old")
    path.unlink()
    time.sleep(0.002)       # so that the new file begins in a later millisecond
    with serving_file(path) as server:
        server.publish("new")
        wait_until(lambda: server._hub._log.next)
        assert begin(server, old) == ["unknown", "new"]


# What other programs may do


def test_the_insert_of_the_documentation_adds_an_event_also_to_an_empty_file(path):
    text = (TOP / "docs" / "operations.md").read_text()
    statement, = re.findall(r'sqlite3 events.db "(insert .*)"\n', text)
    with on_file(path) as (server,), Client(server.port) as client:
        client.open()
        for number in range(3):
            query(path, statement)
            client.read_events(number + 1)
        post(server, "after")
        client.read_until_data("after")
        assert texts(client) == ["hello"] * 3 + ["after"]
        assert abs(key(client.stream.events[0].id)[0] / 1000 - time.time()) < PATIENCE


def test_a_new_file_is_its_owners_alone_and_one_that_is_there_keeps_its_mode(path, tmp_path):
    before = os.umask(0)
    try:
        with publishing(path):
            for ending in ("", "-wal", "-shm"):
                assert os.stat(f"{path}{ending}").st_mode & 0o777 == 0o600
        path.chmod(0o640)
        with publishing(path):
            assert os.stat(f"{path}-wal").st_mode & 0o777 == path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def peak_memory(server: Server) -> int:
    """Return the most memory that a process ever had, in MiB."""
    with open(f"/proc/{server.process.pid}/status") as status:
        return int(re.search(r"VmHWM:\s+(\d+)", status.read())[1]) >> 10


@pytest.mark.parametrize("values", [
    "null, null, cast(zeroblob(?) as text)", "null, null, hex(zeroblob(? / 2))",
    "zeroblob(?), null, 'data'", "null, hex(zeroblob(? / 2)), 'data'"])
def test_a_row_of_many_megabytes_costs_no_memory(path, values):
    with on_file(path) as (server,), Client(server.port) as client:
        client.open()
        post(server, "one")
        query(path, f"insert into event select max(ms) + 1, 0, {values} from event", 100_000_000)
        query(path, "insert into event select max(ms) + 1, 0, null, null, 'two' from event")
        client.read_until_data("two")
        assert texts(client) == ["one", "two"] and peak_memory(server) < 80
        server.stop(signal.SIGTERM)
        assert server.close().count("skipped") == 1


def test_the_wal_shrinks_again_after_a_reader_that_was_forgotten(path, monkeypatch):
    monkeypatch.setattr(file_stream, "WAL_LIMIT", 1 << 20)
    wal = path.with_name(path.name + "-wal")
    with publishing(path) as stream:
        with closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("begin")
            reader.execute("select count(*) from event").fetchall()
            for _ in range(10):
                stream.publish([Event("x" * 1000000)])
            assert wal.stat().st_size > 9 << 20
        stream.publish([Event("x" * 1000000)])      # it is copied, and the next begins anew
        stream.publish([Event("x")])
        assert wal.stat().st_size <= 1 << 20


# A long history


# As many as fill the log's 64 MiB; and what is enough to be in the way
@pytest.mark.parametrize("number", [pytest.param(300_000, marks=pytest.mark.long), 60_000])
def test_servers_that_start_at_once_on_a_long_history_hold_up_nobody(path, number):
    with publishing(path) as stream:
        stream.publish([Event("x")])
    add_rows(path, number)
    servers, answers = [], []
    with on_file(path, 1, "--history", "100000") as (running,):
        starting = [in_a_thread(lambda: servers.append(Server(
            "--history-file", str(path), "--history", "1000000", "--interval", "0")))
            for _ in range(3)]
        while any(thread.is_alive() for thread in starting):
            answers.append(post(running, "meanwhile").status_code)
        for thread in starting:
            thread.join()
        try:
            assert len(servers) == 3 and set(answers) == {200}
            for server in servers:
                wait_until(lambda: requests.get(f"http://127.0.0.1:{server.port}/-/health",
                                                timeout=PATIENCE).status_code == 200)
                assert peak_memory(server) < 160
        finally:
            for server in servers:
                server.close()


def test_a_start_on_a_long_history_can_be_stopped_and_tells_that_it_is_not_ready(
        path, monkeypatch):
    page, row = file_stream.SQLiteStore._page, (1, 1, None, None, b"x")

    def endless(self, before):
        page(self, before)
        time.sleep(0.02)
        return [row]
    monkeypatch.setattr(file_stream.SQLiteStore, "_page", endless)
    monkeypatch.setattr(sse_server, "LOAD_TIME", 0.2)
    began = time.monotonic()
    with serving_file(path, history=100_000) as server:
        assert time.monotonic() - began < 2
        answer = requests.get(f"{server.url}/-/health", timeout=PATIENCE)
        assert answer.status_code == 503 and "being read" in answer.text
        began = time.monotonic()
    assert time.monotonic() - began < 1


def test_another_process_may_write_between_two_pages_of_a_load(path, monkeypatch):
    with publishing(path) as stream:
        for _ in range(5):
            stream.publish([Event("x")] * 500)
    page, pages = file_stream.SQLiteStore._page, []

    def write_and_read(self, before):
        pages.append(before)
        with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
            other.execute("insert into event values (900000000000000, ?, null, null, 'new')",
                          (len(pages),))
        return page(self, before)
    monkeypatch.setattr(file_stream.SQLiteStore, "_page", write_and_read)
    with serving_file(path, history=2000) as server:
        got = begin(server, "all")
        assert len(pages) > 3 and got[0] == "evicted" and got.count("x") == 1999
        assert got.count("new") == len(pages)
