"""Nothing silently lost: who comes back gets exactly what it missed, or is told that it cannot."""
import json
import random
import threading
import time

import pytest

from helpers import Client, ask, get, wait_until
from sse_server import SSEServer


def request(last_id=None, version="1.1", path="/token") -> bytes:
    header = b"" if last_id is None else b"Last-Event-ID: %b\r\n" % (
        last_id if isinstance(last_id, bytes) else last_id.encode())
    return f"GET {path} HTTP/{version}\r\nHost: x\r\n".encode() + header + b"\r\n"


def first_events(port: int, number: int, last_id, **options) -> list:
    with Client(port, request(last_id, **options), last_id=str(last_id)) as client:
        return client.read_events(number)[:number]


def test_ids_are_milliseconds_and_a_counter_and_only_grow(server):
    ids = [server.publish("x") for _ in range(500)]
    keys = [tuple(map(int, id.split("-"))) for id in ids]
    assert keys == sorted(set(keys)) and abs(keys[0][0] / 1000 - time.time()) < 60
    wait_until(lambda: time.time() * 1000 > keys[-1][0] + 1)    # a process takes longer to start
    with SSEServer(port=0) as later:
        assert tuple(map(int, later.publish("x").split("-"))) > keys[-1]


def test_with_history_0_there_is_no_id_no_retry_and_no_resume():
    with SSEServer(port=0, history=0) as server, Client(server.port, request("1-0")) as client:
        client.open()
        assert server.publish("x") is None
        assert client.read_events(1) == [("message", "x", "")]
        assert client.stream.payloads == [b"data: x\r\n\r\n"]


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("by", ["header", "query"])
def test_resume_gives_what_came_after_and_then_what_comes(server, version, by):
    ids = [server.publish(str(number)) for number in range(100)]
    asked = {"last_id": ids[41]} if by == "header" else {"path": f"/token?lastEventId={ids[41]}"}
    with Client(server.port, request(version=version, **asked)) as client:
        client.read_events(58)
        ids += [server.publish(str(number)) for number in range(100, 110)]
        events = client.read_events(68)
    assert [event.data for event in events] == [str(number) for number in range(42, 110)]
    assert [event.id for event in events] == ids[42:]


def test_the_header_wins_over_the_query(server):
    ids = [server.publish(str(number)) for number in range(10)]
    event, = first_events(server.port, 1, ids[6], path=f"/?lastEventId={ids[2]}")
    assert event.data == "7"


def test_head_retry_and_missed_frames_leave_in_one_send(server):
    ids = [server.publish(str(number)) for number in range(100)]
    with Client(server.port, request(ids[0])) as client:
        first = client.receive()
    assert first.startswith(b"HTTP/1.1 200 OK") and b"retry: " in first
    assert b"data: 99\nid: %b\n\n" % ids[99].encode() in first


def test_an_event_that_breaks_off_has_no_id_yet(server):
    """Some clients take an id as soon as its line is there, and would never get this event."""
    with Client(server.port) as client:
        client.open()
        event_id = server.publish("one\ntwo", "name")
        client.read_events(1)
        assert client.stream.payloads[-1] == (
            b"event: name\ndata: one\ndata: two\nid: %b\n\n" % event_id.encode())


def test_a_new_client_gets_only_what_comes(server):
    server.publish("before")
    with Client(server.port) as client:
        client.open()
        server.publish("after")
        assert [event.data for event in client.read_events(1)] == ["after"]


def test_retry_is_jittered():
    retries = set()
    with SSEServer(port=0, retry=4.0) as server:
        for _ in range(30):
            with Client(server.port) as client:
                client.read_until(lambda stream: stream.retries)
                retries.add(client.stream.retries[0])
    assert len(retries) > 10 and min(retries) >= 2000 and max(retries) <= 6000


UNKNOWN_IDS = ["0-0", "1000-0", "99999999999999-0", "x", "-5-0", "5--1", "٣-٠", "1-0 ",
               "1764000000000", "18446744073709551615-18446744073709551615", "9" * 5000,
               "\xff".encode("latin-1"), b"\xc3\x28", "null"]


@pytest.mark.parametrize("last_id", UNKNOWN_IDS, ids=lambda id: repr(id)[:24])
@pytest.mark.parametrize("version", ["1.1", "1.0"])
def test_an_id_that_is_not_ours_gives_one_gap_and_all_there_is(server, last_id, version):
    ids = [server.publish(str(number)) for number in range(5)]
    events = first_events(server.port, 6, last_id, version=version)
    assert [event.name for event in events] == ["gap"] + ["message"] * 5
    text = last_id.decode(errors="replace") if isinstance(last_id, bytes) else last_id
    told = text.strip(" ") if len(text) <= 64 else "(too long)"
    assert json.loads(events[0].data) == {"after": told, "resumed": ids[0], "reason": "unknown"}
    assert [event.data for event in events[1:]] == list("01234")


@pytest.mark.parametrize("head", [get("/", "Last-Event-ID:"), get("/?lastEventId=")])
def test_an_empty_id_means_none(server, head):
    """It is the value that every client begins with (WHATWG HTML section 9.2.2)."""
    last = server.publish("before")
    with Client(server.port, head) as client:
        client.read_until(lambda stream: stream.welcome)
        server.publish("after")
        assert [event.data for event in client.read_events(1)] == ["after"]
        assert client.stream.welcome.id == last


def test_an_empty_header_leaves_the_id_of_the_query(server):
    first, _ = server.publish("1"), server.publish("2")
    with Client(server.port, get(f"/?lastEventId={first}", "Last-Event-ID:")) as client:
        assert [event.data for event in client.read_events(1)] == ["2"]


def test_an_id_is_unknown_to_an_empty_log(server):
    event, = first_events(server.port, 1, "5-0")
    assert event.name == "gap" and json.loads(event.data) == {"after": "5-0", "resumed": None,
                                                              "reason": "unknown"}


def test_an_evicted_id_gives_a_gap_and_then_all_that_is_kept():
    with SSEServer(port=0, history=100) as server:
        ids = [server.publish(str(number)) for number in range(300)]
        wait_until(lambda: server._hub.fanned_out == 300)
        events = first_events(server.port, 101, ids[50])
        assert json.loads(events[0].data) == {"after": ids[50], "resumed": ids[200],
                                              "reason": "evicted"}
        assert [event.data for event in events[1:]] == [str(number) for number in range(200, 300)]
        assert events[0].id == ids[50]          # a gap does not move the client's id
        assert [event.data for event in first_events(server.port, 1, ids[199])] == ["200"]


def test_an_id_of_a_former_run_is_unknown_to_the_next():
    with SSEServer(port=0) as server:
        old = server.publish("old")
        port = server.port
    time.sleep(0.002)       # so that the new run begins in a later millisecond
    with SSEServer(port=port) as server:
        new = server.publish("new")
        events = first_events(port, 2, old)
        assert json.loads(events[0].data) == {"after": old, "resumed": new, "reason": "unknown"}
        assert events[1].data == "new"


@pytest.mark.parametrize("bad", [b"1-0\0", b"1-\x01", b"1-0\rX: y", b"1-0\nX: y"])
def test_a_bad_byte_in_the_head_is_a_400(server, bad):
    assert ask(server.port, request(bad)).startswith(b"HTTP/1.1 400 ")


def test_an_endless_id_is_a_431(server):
    assert ask(server.port, request(b"1" * 65536)).startswith(b"HTTP/1.1 431 ")
    assert ask(server.port,
               request(path="/?lastEventId=" + "1" * 65536)).startswith(b"HTTP/1.1 414 ")


def test_two_ids_are_a_400(server):
    assert ask(server.port, request(b"1-0\r\nlast-event-id: 2-0")).startswith(b"HTTP/1.1 400 ")


def test_a_heartbeat_never_moves_an_id():
    with SSEServer(port=0, heartbeat=0.05) as server, Client(server.port) as client:
        client.open()
        id = server.publish("x")
        client.read_until(lambda stream: stream.comments >= 3)
        assert client.stream.last_id == id and len(client.stream.events) == 1


def test_a_thousand_random_cuts_while_publishing_at_full_speed():
    """Chunked and not, fast and slow: all that a client sees over its lives is 1..n, in order."""
    seed = random.randrange(1 << 32)
    lives_each, readers = 125, 8
    done = threading.Event()
    results = {}
    with SSEServer(port=0, history=1 << 17) as server:
        anchor = server.publish("0")

        def publish():
            number = 0
            while not done.is_set():
                number += 1
                server.publish(f"{number}")
                if number % 20 == 0:
                    # Some 15,000 events a second beside the readers of this one process
                    time.sleep(0.001)
            server.publish("end")

        def read(name):
            draw = random.Random(seed + name)
            last, seen = anchor, []
            version = "1.0" if name % 2 else "1.1"
            for life in range(lives_each + 1):
                final = life == lives_each
                if final:
                    finished.release()
                with Client(server.port, request(last, version), last_id=last,
                            receive_buffer=4096 if name % 4 >= 2 else None) as client:
                    wanted = draw.randrange(1, 200)
                    stream = client.stream
                    while not (stream.events and stream.events[-1].data == "end" if final
                               else len(stream.events) >= wanted):
                        client.receive(draw.choice((1, 100, 5000, 65536)))
                    seen += stream.events
                    last = stream.last_id
            results[name] = seen
        finished = threading.Semaphore(0)
        threads = [threading.Thread(target=read, args=(name,)) for name in range(readers)]
        publisher = threading.Thread(target=publish)
        for thread in (publisher, *threads):
            thread.start()
        for _ in range(readers):
            assert finished.acquire(timeout=50)
        done.set()
        for thread in (publisher, *threads):
            thread.join(50)
    for name in range(readers):
        values = [event.data for event in results[name]]
        assert values == [*map(str, range(1, len(values))), "end"], f"seed {seed}, reader {name}"
