"""A client that lags is told what it missed, between whole frames, and only what it asked for."""
import json
import random

import pytest

from bench import HEAD
from sse_core.engine import frames
from sse_core.engine.log import NOTHING, SCAN_LIMIT
from sse_core.stores.store import StoredEvent


def test_a_lagging_client_finishes_its_frame_and_is_told_the_gap(bench):
    b = bench(history=100)
    narrow = b.peer(narrow=True)
    # The head, the retry line and some of the frames fit.
    narrow.server_end.room = len(HEAD) + 200
    ids = [b.publish(f"{number}") for number in range(50)]
    b.turn()
    for number in range(50, 300):
        ids.append(b.publish(f"{number}"))
        b.turn()
    before = len(narrow.data())
    narrow.server_end.room = 1 << 20
    b.turn(3)
    events = narrow.take().events
    gaps = [event for event in events if event.name == "gap"]
    assert len(gaps) == 1 and events.index(gaps[0]) == before + 1
    had, resumed = events[before], events[before + 2]
    told = json.loads(gaps[0].data)
    assert told == {"after": had.id, "resumed": resumed.id, "reason": "lagging"}
    # A gap does not move the client's id.
    assert gaps[0].id == had.id
    assert (int(had.data), int(resumed.data)) == (before, 200)
    assert [event.data for event in events[before + 2:]] == [*map(str, range(200, 300))]
    assert [event.id for event in events[before + 2:]] == ids[200:]


def test_a_gap_is_told_before_the_first_frame_and_between_frames(bench):
    b = bench(history=64)
    narrow = b.peer(narrow=True)
    narrow.server_end.room = 1 << 20
    b.turn()
    narrow.server_end.room = 0
    for number in range(200):
        b.publish(f"{number}")
        b.turn()
    narrow.server_end.room = 1 << 20
    b.turn(2)
    events = narrow.take().events
    # The gap comes after the id that the client was told it stands at.
    assert events[0].name == "gap" and f'"after": "{events[0].id}"' in events[0].data
    assert [event.data for event in events[1:]] == [str(number) for number in range(136, 200)]
    last = events[-1].id
    narrow.server_end.room = 0
    for number in range(200):
        b.publish(f"{number}")
        b.turn()
    narrow.server_end.room = 1 << 20
    b.turn(2)
    events = narrow.take().events
    gaps = [event.data for event in events if event.name == "gap"]
    assert len(gaps) == 2 and f'"after": "{last}"' in gaps[1]


def test_a_gap_that_is_cut_is_told_once(bench):
    for cut in range(1, 130, 7):
        b = bench(history=64)
        narrow = b.peer(narrow=True)
        narrow.server_end.room = 1 << 20
        b.turn()
        narrow.server_end.room = 0
        for number in range(100):
            b.publish(f"{number}")
            b.turn()
        narrow.server_end.room = cut
        b.turn(2)
        narrow.server_end.room = 1 << 20
        b.turn(3)
        assert [event.name for event in narrow.take().events] == ["gap"] + ["message"] * 64, cut


def test_without_ids_a_gap_is_told_all_the_same(bench):
    b = bench(history=0)
    narrow = b.peer(narrow=True)
    for number in range(100):
        b.publish(str(number))
        b.turn()
    narrow.server_end.room = 1 << 20
    b.turn(2)
    events = narrow.take().events
    assert events[0][:2] == ("gap", '{"after": null, "resumed": null, "reason": "lagging"}')
    assert [event.data for event in events[1:]] == [str(number) for number in range(36, 100)]


def test_a_client_that_is_lapped_is_sent_whole_frames_and_a_gap_for_each_hole(bench):
    """Random room, random publishing: the stream stays well-formed, every hole has its gap."""
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    b = bench(history=64)
    narrow = b.peer(narrow=True)
    number = 0
    for _ in range(3000):
        for _ in range(draw.randrange(6)):
            b.publish(f"{number} " + "x" * draw.randrange(60))
            number += 1
        narrow.server_end.room = draw.choice((0, 1, 7, 50, 200, 900))
        b.turn()
        narrow.take()
    narrow.server_end.room = 1 << 20
    b.turn(10)
    expected = None
    gaps = 0
    for event in narrow.take().events:
        if event.name == "gap":
            gaps, expected = gaps + 1, None
            continue
        value = int(event.data.split()[0])
        assert expected is None or value == expected, f"seed {seed}"
        expected = value + 1
    assert expected == number and gaps > 3, f"seed {seed}"


def test_the_list_says_how_far_behind_a_client_is(bench):
    b = bench(history=64)
    b.now += 0.25049
    narrow, other = b.peer(narrow=True, channels=["a"]), b.peer(peer="10.0.0.1:7")
    b.turn()
    b.publish("x")
    b.publish("y")
    b.turn()
    b.now += 3.25049
    b.turn()
    lagging, current = b.hub.describe_clients()
    assert lagging == {"peer": "", "since": 1000.25, "channels": 1, "lag_frames": 2,
                       "lag_seconds": 3.25}
    assert current == {"peer": "10.0.0.1:7", "since": 1000.25, "channels": 0, "lag_frames": 0,
                       "lag_seconds": 0.0}
    assert narrow.data() == [] and other.data() == ["x", "y"]


def test_events_evicted_on_other_channels_are_no_gap(bench):
    b = bench(history=64)
    narrow = b.peer(narrow=True, channels=["a"])
    narrow.server_end.room = 1 << 20
    b.turn()
    narrow.server_end.room = 3
    b.publish("mine", channel="a")
    b.turn()
    for _ in range(200):
        b.publish("other", channel="b")
        b.turn()
    narrow.server_end.room = 1 << 20
    b.turn(3)
    assert narrow.data() == ["mine"]
    last = narrow.stream.last_id
    back = b.peer(channels=["a"], last_id=last)
    other = b.peer(channels=["b"], last_id=last)
    b.turn(3)
    assert back.data() == []
    assert [event.name for event in other.take().events[:2]] == ["gap", "message"]


@pytest.mark.parametrize("others", [36, 3 * SCAN_LIMIT])
def test_a_gap_names_the_first_event_that_this_client_gets(bench, others):
    """However many events of other channels are before that."""
    b = bench(history=2 * others)
    b.publish("lost", channel="mine")
    for _ in range(2 * others):
        b.publish("other", channel="other")
        b.turn()
    mine = b.publish("mine", channel="mine")
    b.turn()
    back = b.peer(channels=["mine"], last_id="nonsense")
    b.turn(8)
    gap, event = back.take().events
    assert json.loads(gap.data)["resumed"] == mine == event.id


@pytest.mark.parametrize("brought, carried", [("5-0", "5-0"), ("nonsense", "nonsense")])
def test_a_gap_carries_the_clients_own_id_if_it_can_be_one(bench, brought, carried):
    b = bench(history=64)
    back = b.peer(last_id=brought)
    b.turn(2)
    (gap,) = back.take().events
    assert (b"id: 5-0" in back.raw) is (brought == "5-0")
    assert (gap.name, gap.id, json.loads(gap.data)["after"]) == ("gap", carried, brought)


def test_a_gap_for_everybody_carries_the_id_after_which_something_is_lost(bench):
    b = bench(history=64, shared=True)
    b.hub.preload(iter([]), NOTHING)
    reader = b.peer()
    b.hub.add(StoredEvent((7, 0), frames.encode("x"), None))
    b.hub.tell_gap((9, 0))
    b.turn(2)
    gap = reader.take().events[-1]
    assert (gap.name, gap.id) == ("gap", "7-0") and json.loads(gap.data)["resumed"] == "9-0"


def test_a_client_that_has_had_nothing_yet_is_told_no_id_after_which_something_is_lost(bench):
    b = bench(history=64)
    b.publish("old")
    b.turn()
    back = b.peer(last_id="nonsense", narrow=True)
    # That is the head, `retry:` and a part of the gap.
    back.server_end.room = len(HEAD) + 50
    b.turn()
    for number in range(200):
        b.publish(str(number))
        b.turn()
    back.server_end.room = 1 << 20
    b.turn(3)
    gaps = [json.loads(event.data) for event in back.take().events if event.name == "gap"]
    assert [(gap["after"], gap["reason"]) for gap in gaps] == [("nonsense", "unknown"),
                                                               (None, "lagging")]


def test_a_gap_for_which_there_was_no_room_is_told_before_the_next_event(bench):
    b = bench(history=64)
    back = b.peer(last_id="nonsense", narrow=True)
    # That is the head and `retry:`, and not a byte more.
    back.server_end.room = len(HEAD) + len(frames.retry_line(3.0))
    b.turn()
    assert not back.server_end.room
    back.server_end.room = 1 << 20
    b.publish("next")
    b.turn(2)
    assert [event.name for event in back.take().events] == ["gap", "message"]
