"""A client is taken once it can be said what it has had, and is told first where it stands."""
import socket

from bench import stream_request
from sse_core.engine.log import NOTHING
from sse_core.stores.store import StoredEvent


def test_a_client_without_an_id_is_told_where_it_stands_before_anything_else(bench):
    """So one that is cut before its first event misses nothing: with an empty log, too."""
    b = bench(history=100)
    first = b.peer()
    b.turn()
    assert first.take().last_id == "1000000-0"
    assert not first.stream.events and len(first.stream.retries) == 1
    ids = [b.publish("one"), b.publish("two")]
    back = b.peer(last_id=first.stream.last_id)
    second = b.peer()
    b.turn(2)
    assert back.data() == ["one", "two"] and second.take().last_id == ids[1]
    assert b"id: " not in b.peer(last_id=ids[1]).take().partial and second.data() == []


def test_no_client_is_taken_before_the_log_is_loaded(bench):
    """It could not be said what came before such a client, and what after."""
    b = bench(history=64, shared=True)
    ours, peer = socket.socketpair()
    with ours, peer:
        assert not b.hub.loaded.is_set() and not b.hub.register(ours, stream_request())
        b.hub.preload(iter([StoredEvent((1, 0), b"data: 1\n\n", None)]), NOTHING)
        assert not b.hub.has_work()
    new = b.peer()
    b.hub.add(StoredEvent((2, 0), b"data: 2\n\n", None))
    b.turn(2)
    assert new.data()[-1:] == ["2"] and "1" not in new.data()


def test_no_client_is_taken_before_what_it_had_has_come_back_from_the_store(bench):
    """Else it could not be said whether its id is known, and what follows it."""
    b = bench(history=64, shared=True)

    def add(*numbers):
        for number in numbers:
            b.hub.add(StoredEvent((number, 0), b"data: %d\n\n" % number, None))
        b.turn(2)
    b.hub.preload(iter([StoredEvent((1, 0), b"data: 1\n\n", None)]), NOTHING)
    b.hub.complete(b.now)
    came_at = b.now
    b.now += 1
    ours, peer = socket.socketpair()
    with ours, peer:
        for id in ("3-0", "99-0"):
            assert not b.hub.register(ours, stream_request(last_id=id, came_at=came_at))
    add(2, 3)
    resumed = b.peer(last_id="3-0", came_at=came_at)
    # Now the log has all there was when the client came, and its id is not in it.
    b.hub.complete(b.now)
    nowhere = b.peer(last_id="99-0", came_at=came_at)
    add(4)
    assert resumed.data() == ["4"] and nowhere.take().events[0].name == "gap"
    assert nowhere.data()[1:] == ["1", "2", "3", "4"]
