"""Where a stream begins without an id: `?since=`."""
import json
import math
import time

import pytest

from helpers import Client, ask, get
from sse_core import http1, parameters
from sse_core import log as log_module
from sse_core.log import Log
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


def test_all_is_what_is_kept_and_never_a_gap(server):
    ids = [server.publish(str(number), None, channel)
           for number, channel in enumerate([None, "a", "b", "c"])]
    assert texts(server, "&since=all") == ["0", "1", "2", "last"]
    assert texts(server, "&last_event_id=earliest")[:3] == ["0", "1", "2"]
    assert texts(server, f"&since={ids[1]}")[0] == "2"
    for number in range(100):
        server.publish(str(number))
    got = texts(server, "&since=all")
    assert got[0].isdigit() and got[-2:] == ["99", "last"] and len(got) == 65


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
def test_what_is_no_beginning_is_a_400(server, since):
    good = since in ("10", "10m")
    answer = ask(server.port, get(f"/?since={since.replace(' ', '+')}", method="HEAD"))
    assert answer.startswith(b"HTTP/1.1 200 " if good else b"HTTP/1.1 400 ")


def test_the_earliest_is_what_is_kept_and_never_a_gap(server):
    for number in range(100):
        server.publish(str(number))
    assert texts(server, "&last_event_id=earliest")[0].isdigit()


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


def test_an_id_that_may_come_yet_is_waited_for_until_all_from_then_is_here():
    log = Log(64, (5, 0))
    log.complete_at = 7.0
    assert log.can_locate((5, 0), 99.0) and log.can_locate(None, 99.0)
    assert not log.can_locate((6, 0), 7.0) and log.can_locate((6, 0), 6.999)
    log.is_loaded = False
    assert not log.can_locate((5, 0), 0.0)


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


def test_of_a_full_load_older_events_were_left_in_the_shared_log():
    log = Log(64)
    log.begin((1000, 0), -64)
    for number in range(64):
        log.append(b"x", (1000 + number, 0), None, 0.0)
    assert log.locate_time(500, ()) == (-64, "evicted")
    assert log.locate_time(1000, ()) == (-64, None) and log.locate_time(0, ()) == (-64, None)
    assert log.locate_time(1063.5, ()) == (-1, None)


def test_what_latest_copies_for_a_client_is_bounded_and_the_newest_is_no_copy(monkeypatch):
    monkeypatch.setattr(log_module, "MAX_LATEST", 200)
    log = Log(64)
    for number, channel in enumerate("abcd"):
        log.append(channel.encode() * 60, (number + 1, 0), channel, 0.0)
    latest = log.latest("abcd")
    assert [b"b" * 60 in each for each in latest] == [True, False] and b"c" * 60 in latest[1]
    assert log.locate_time(math.inf, "abcd") == (3, None)
    assert log.latest("a") == [] and log.locate_time(math.inf, "a") == (0, None)
    assert log.locate_time(math.inf, "x") == (4, None)
    length = len(log.frame(1).chunk)
    for bound, kept in ((2 * length, "bc"), (2 * length - 1, "c")):
        monkeypatch.setattr(log_module, "MAX_LATEST", bound)
        assert [each[-10:-9] for each in log.latest("abcd")] == [each.encode() for each in kept]


@pytest.mark.parametrize("since", ["latest", "all", "10m", "1-0"])
def test_a_client_that_says_where_to_begin_is_not_welcomed(server, since):
    """Readers of model output take every event for a piece of the text."""
    with Client(server.port, get(f"/?channel=a&since={since}")) as client:
        client.read_until(lambda stream: stream.retries)
        server.publish("1", None, "a")
        assert client.read_until_data("1")[0].name in ("message", "gap")
        assert client.stream.welcome is None
