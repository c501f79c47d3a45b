"""Where a stream begins without an id: `?since=`."""
import json
import time

import pytest

from helpers import Client, ask, get
from sse_core.http import http1, parameters
from sse_core.engine import log as log_module
from sse_core.engine.log import NOTHING, Log
from sse_server import SSEServer


def texts(server: SSEServer, query: str, *fields: str) -> list:
    """Return the data, or the name, of what a client gets before an event that comes last."""
    with Client(server.port, get(f"/?channel=a&channel=b{query}", *fields)) as client:
        client.open()
        server.publish("last")
        client.read_until_data("last")
        return [event.data if event.name != "gap" else json.loads(event.data)["reason"]
                for event in client.stream.events]


@pytest.fixture
def server():
    with SSEServer(port=0, history=64) as server:
        yield server


def test_all_is_what_is_kept_and_a_gap_if_that_is_not_all_there_was(server):
    ids = [server.publish(str(number), None, channel)
           for number, channel in enumerate([None, "a", "b", "c"])]
    assert texts(server, "&since=all") == ["0", "1", "2", "last"]
    assert texts(server, "&last_event_id=earliest")[:3] == ["0", "1", "2"]
    assert texts(server, f"&since={ids[1]}")[0] == "2"
    for number in range(100):
        server.publish(str(number))
    got = texts(server, "&since=all")
    assert got[0] == "evicted" and got[1].isdigit()
    assert got[-2:] == ["99", "last"] and len(got) == 66


@pytest.mark.parametrize("channel, is_whole", [("c1", False), ("c2", True), ("c9", True)])
def test_all_of_a_channel_is_a_gap_only_if_some_of_that_channel_has_left(channel, is_whole):
    with SSEServer(port=0, history=1024) as server:
        for _ in range(100):
            server.publish("early", None, "c1")
        for number in range(1000):
            server.publish(str(number), None, f"c{number % 8 + 2}")
        with Client(server.port, get(f"/?channel={channel}&since=all")) as client:
            client.open()
            server.publish("last")
            client.read_until_data("last")
            assert ("gap" in [event.name for event in client.stream.events]) != is_whole


def test_latest_is_the_newest_of_each_channel_asked_for_and_of_none(server):
    for number in range(9):
        server.publish(str(number), None, [None, "a", "c"][number % 3])
    assert texts(server, "&since=latest") == ["6", "7", "last"]
    for _ in range(70):
        server.publish("x", None, "a")
    assert texts(server, "&since=latest") == ["x", "last"]


def test_a_time_is_where_it_begins_and_a_gap_if_newer_events_are_gone(server):
    old = server.publish("old")
    while time.time() * 1000 < int(old.partition("-")[0]) + 2:
        time.sleep(0.001)       # so that a time lies between two events
    between = int(server.publish("new").partition("-")[0]) / 1000
    assert texts(server, f"&since={between:.3f}") == ["new", "last"]
    assert texts(server, "&since=10m")[:2] == ["old", "new"]
    assert texts(server, f"&since={time.time() + 100:.0f}") == ["last"]
    for number in range(70):
        server.publish(str(number))
    assert texts(server, "&since=1h")[0] == "evicted"


def test_an_id_wins_over_since(server):
    ids = [server.publish(str(number)) for number in range(3)]
    assert texts(server, "&since=all", f"Last-Event-ID: {ids[1]}")[:1] == ["2"]
    assert texts(server, f"&since=all&lastEventId={ids[0]}")[:2] == ["1", "2"]


@pytest.mark.parametrize("since", ["", "x", "-1", "10", "10m", "1e3", "10w", "10.5.5m", "all ",
                                   "1" * 13, "%D9%A1%D9%A0m", "0-0-0", "LATEST"])
def test_a_since_that_says_no_beginning_is_a_400(server, since):
    good = since in ("10", "10m")
    answer = ask(server.port, get(f"/?since={since.replace(' ', '+')}", method="HEAD"))
    assert answer.startswith(b"HTTP/1.1 200 " if good else b"HTTP/1.1 400 ")


def test_a_time_is_told_as_a_gap_only_if_something_newer_has_left():
    """On the channels asked for, and in this epoch."""
    log = Log(64, (500, 0))
    for ms, channel in ((1000, None), (2000, "other"), (3000, None)):
        log.append(b"x", (ms, 0), channel, 0.0)
    log.evict()
    log.evict()
    assert log.locate_time(900, ()) == (2, "evicted") and log.locate_time(1000, ())[1]
    assert log.locate_time(1001, ()) == (2, None)
    assert log.locate_time(1001, ["other"]) == (2, "evicted")
    log.append(b"x", (100, 0), None, 0.0)       # its ids went back: a new epoch
    assert log.locate_time(50, ["other"]) == (3, None)


@pytest.mark.parametrize("since, begin", [
    ("1s", 999_000), ("90s", 910_000), ("1.5m", 910_000), ("0.01h", 964_000), ("0.01d", 136_000),
    ("7d", 1), ("900", 900_000), ("900.25", 900_250), ("0", 1)])
def test_a_time_is_in_seconds_minutes_hours_or_days_ago_or_a_unix_time(since, begin):
    request, _ = http1.parse(get(f"/?since={since}"))
    assert parameters.start(request, 1000.0) == (f"{begin}-0", begin)


def test_the_first_event_of_an_epoch_is_missed_if_it_has_left():
    log = Log(64, (1, 0))
    log.append(b"x", (10, 0), None, 0.0)
    log.append(b"x", (3, 0), None, 0.0)         # its ids went back: a new epoch
    log.append(b"x", (4, 0), None, 0.0)
    log.evict(), log.evict()
    assert log.locate((3, 0)) == (2, None) and log.locate((2, 9)) == (2, "unknown")
    log = Log(64, (1, 0))
    for ms in (10, 11):
        log.append(b"x", (ms, 0), None, 0.0)
    log.evict()
    assert log.locate((1, 0)) == (1, "evicted") and log.locate((10, 0)) == (1, None)


def test_events_that_a_store_left_out_or_removed_are_a_gap_for_a_client_before_them():
    log = Log(64)
    log.begin((1000, 5))
    for number in range(3):
        log.append(b"x", (2000 + number, 0), None, 0.0)
    for begin, reason in ((0, "evicted"), (500, "evicted"), (1000, "evicted"), (1001, None)):
        assert log.locate_time(begin, ()) == (0, reason)
    assert log.locate((1000, 4)) == (0, "evicted") and log.locate((1000, 5)) == (0, None)
    assert log.locate((1000, 6)) == (0, "unknown")      # it was not there, and is not here
    assert log.locate((2000, 0)) == (1, None)


def test_an_entry_that_was_removed_from_the_middle_is_a_gap_for_whoever_had_not_come_to_it():
    log = Log(64)
    for ms in (1000, 1001, 1002):
        log.append(b"x", (ms, 0), None, 0.0)
    log.begin((1001, 5))
    assert log.locate((1001, 0)) == (2, "evicted") and log.locate((1002, 0)) == (3, None)
    assert log.locate((1001, 5)) == (2, None)
    assert log.locate_time(1001, ()) == (1, "evicted") and log.locate_time(1002, ()) == (2, None)


def test_nothing_is_missing_where_a_store_was_empty():
    log = Log(64)
    log.begin(NOTHING)
    assert log.locate((0, 0)) == (0, None) and log.locate_time(0, ()) == (0, None)
    log.append(b"x", (5, 0), None, 0.0)
    assert log.locate((0, 0)) == (0, None) and log.locate_time(0, ()) == (0, None)


def test_an_id_from_before_a_store_was_lost_is_unknown_also_when_there_are_new_events():
    log = Log(64)
    log.begin(NOTHING)
    log.append(b"x", (2000, 0), None, 0.0)
    assert log.locate((1000, 0)) == (0, "unknown")
    for ms in range(2001, 2070):
        log.append(b"x", (ms, 0), None, 0.0)
        if not log.has_room(0):
            log.evict()
    assert log.locate((1000, 0))[1] and log.locate((2000, 5))[1] == "evicted"


def test_a_client_that_begins_where_a_gap_was_told_to_all_is_told_it_too():
    log = Log(64)
    log.begin(NOTHING)
    log.append(b"x", (100, 0), None, 0.0)
    log.append(b"gap", None, None, 0.0)
    log.append(b"x", (200, 0), None, 0.0)
    assert log.locate_time(150, ()) == (1, None) and log.locate_time(201, ()) == (3, None)
    assert log.locate_time(100, ()) == (0, None)
    log.append(b"gap", None, None, 0.0)
    log.append(b"x", (50, 0), None, 0.0)        # a new epoch
    assert log.locate_time(0, ()) == (3, None)


def test_the_latest_is_the_newest_event_also_when_a_gap_was_told_after_it():
    log = Log(64)
    log.append(b"x", (1, 0), None, 0.0)
    log.append(b"gap", None, None, 0.0)
    assert log.latest(())[1:] == (0, None)
    log.evict()
    log.evict()
    assert log.latest(())[1:] == (2, None)


def test_what_latest_copies_for_a_client_is_bounded_and_the_newest_is_no_copy(monkeypatch):
    monkeypatch.setattr(log_module, "MAX_LATEST", 200)
    log = Log(64)
    for number, channel in enumerate("abcd"):
        log.append(channel.encode() * 60 + b"\n", (number + 1, 0), channel, 0.0)
    latest, *_ = log.latest("abcd")
    assert [b"b" * 60 in each for each in latest] == [True, False] and b"c" * 60 in latest[1]
    assert log.latest("abcd")[1:] == (3, "evicted")      # one is left out
    assert log.latest("abc")[1:] == (2, None)
    assert log.latest("a") == ([], 0, None)
    assert log.latest("x")[1:] == (4, None)
    length = len(log.frame(1).chunk)
    for bound, kept in ((2 * length, "bc"), (2 * length - 1, "c")):
        monkeypatch.setattr(log_module, "MAX_LATEST", bound)
        latest, *_ = log.latest("abcd")
        assert len(latest) == len(kept)
        assert all(name.encode() * 60 in each for name, each in zip(kept, latest))


@pytest.mark.parametrize("since", ["latest", "all", "10m", "1-0"])
def test_a_client_that_says_where_to_begin_is_not_welcomed(server, since):
    """Readers of model output take every event for a piece of the text."""
    with Client(server.port, get(f"/?channel=a&since={since}")) as client:
        client.read_until(lambda stream: stream.retries)
        server.publish("1", None, "a")
        assert client.read_until_data("1")[0].name in ("message", "gap")
        assert client.stream.welcome is None


def test_events_that_latest_leaves_out_are_told(server):
    for channel in "ab":
        server.publish(channel * 40_000, None, channel)
    server.publish("c")
    assert texts(server, "&since=latest") == ["b" * 40_000, "evicted", "c", "last"]
