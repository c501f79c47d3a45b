"""The publisher as a whole: how it stops, who may publish amid what, and what it counts."""
import gc
import logging
import math
import os
import sys
import threading

import pytest

from bench import HEAD, stream_request
from helpers import KEPT, PATIENCE, in_a_thread, wait_until
from publisher import Publisher
from sse_core.engine.hub import Hub
from sse_core.errors import Unavailable
from sse_core.engine.log import NOTHING
from sse_core.stores.store import StoredEvent


def test_stop_serves_what_is_in_the_log_and_ends_the_stream(bench):
    b = bench()
    chunked, plain, deaf = b.peer(), b.peer(chunked=False), b.peer(narrow=True)
    b.turn()
    deaf.server_end.room = len(HEAD) + 3
    b.start()
    for number in range(100):
        b.publish(str(number))
    stopper = threading.Thread(target=b.stop)
    stopper.start()
    wait_until(lambda: b.hub.stopping and b.hub.fanned_out == 100)
    # The client that takes nothing keeps it waiting until the second is over.
    b.now += 2
    b.hub.wakeup.wake()
    stopper.join(5)
    assert not stopper.is_alive()
    assert chunked.data() == plain.data() == [str(number) for number in range(100)]
    assert chunked.stream.ended and not plain.stream.ended
    assert not deaf.take().ended
    assert not b.hub.register(deaf.server_end, stream_request())


def test_a_stop_gives_a_slow_client_a_second_and_a_fault_gives_none(bench):
    b = bench()
    b.peer(narrow=True)
    b.turn()
    b.publish("x")
    b.turn()
    b.hub.stop()
    b.now += 0.99
    assert not b.hub.done()
    # Stopping again gives no more time.
    b.hub.stop()
    b.now += 0.01
    assert b.hub.done()
    other = bench()
    other.peer(narrow=True)
    other.turn()
    other.hub.fail(ZeroDivisionError())
    assert other.hub.done()


@pytest.mark.parametrize("bad", [{"history": -1}, {"heartbeat": -1.0}, {"retry": -0.1},
                                 {"max_clients": -1}, {"patience": -1.0},
                                 {"heartbeat": 2.0**31}, {"heartbeat": math.nan}])
def test_options_that_are_negative_or_no_number_are_a_value_error(bad):
    with pytest.raises(ValueError):
        Hub(**{**KEPT, **bad})


def test_a_logging_handler_may_publish(bench):
    """It runs in the publisher thread, which must not wait for itself."""
    b = bench(history=64)

    class Publishing(logging.Handler):
        lines = refused = 0

        def emit(self, record):
            try:
                b.publish(record.getMessage())
                self.lines += 1
            except Unavailable:
                self.refused += 1
    handler = Publishing()
    logger = logging.getLogger("sse_server")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        peers = [b.peer(peer=str(number)) for number in range(300)]
        b.start()
        for peer in peers:
            wait_until(lambda: peer.take().head)
        for peer in peers[1:]:
            peer.sock.close()
        wait_until(lambda: len(b.hub.clients) == 1)
        b.stop()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert handler.lines and handler.lines + handler.refused >= 300


@pytest.mark.parametrize("call", ["drain", "refuse_inside"])
def test_a_signal_handler_amid_a_publish_is_refused_and_never_waits(bench, call):
    b = bench()
    b.publish("x")
    with b.hub._mutex, pytest.raises(RuntimeError, match="signal handler"):
        getattr(b.hub, call)()


def test_a_publish_inside_a_publish_of_the_same_thread_is_refused_or_done(bench):
    """As from a signal handler that interrupts it, at whatever line."""
    b = bench(history=64)
    outcomes = []
    for line in range(40):
        countdown = [line]

        def trace(frame, event, argument):
            if frame.f_code.co_filename.endswith(("hub.py", "log.py")):
                countdown[0] -= 1
                if countdown[0] == 0:
                    sys.settrace(None)
                    try:
                        outcomes.append(b.publish(f"inner {line}"))
                    except RuntimeError as error:
                        assert "signal handler" in str(error)
                        outcomes.append(None)
            return trace
        reader = b.peer()
        b.turn()
        sys.settrace(trace)
        try:
            b.publish(f"outer {line}")
        finally:
            sys.settrace(None)
        b.turn(2)
        inner = bool(outcomes and outcomes[-1])
        assert f"outer {line}" in reader.data() and len(reader.data()) == 1 + inner
        ids = [event.id for event in reader.stream.events]
        assert len(set(ids)) == len(ids)
        reader.sock.close()
        b.turn()
    assert None in outcomes and any(outcomes)


def test_figures_begin_at_zero_and_count_frames_and_bytes_however_they_are_sent(bench):
    b = bench(history=64)
    stats = b.publisher.stats()
    assert {stats[name] for name in vars(b.publisher.counters) if name != "drops"} == {0}
    assert set(stats["drops"].values()) == {0}
    ids = [b.publish(str(number)) for number in range(3)]
    back, live, narrow = b.peer(last_id=ids[0]), b.peer(), b.peer(narrow=True)
    narrow.server_end.room = 1 << 20
    b.turn(2)
    narrow.server_end.room = 10
    b.publish("live")
    b.turn()
    narrow.server_end.room = 1 << 20
    b.turn(2)
    assert back.data() == ["1", "2", "live"] and live.data() == narrow.data() == ["live"]
    stats = b.publisher.stats()
    assert stats["deliveries"] == 5
    assert stats["bytes"] == sum(len(peer.raw) for peer in b.peers)
    assert stats["turns"] == 5 and stats["turn_seconds"] == 0
    b.publisher.counters.turn_seconds = 0.1234567
    assert b.publisher.stats()["turn_seconds"] == 0.123457


def test_figures_count_gaps_told_and_events_published(bench):
    b = bench(history=64, shared=True)
    b.hub.preload(iter([StoredEvent((number, 0), b"data: old\n\n", None)
                         for number in range(1, 100)]), NOTHING)
    back = b.peer(last_id="1-0", narrow=True)
    for _ in range(50):
        b.turn()
    # The gap could not be told yet: its socket takes nothing.
    assert b.publisher.stats()["gaps"] == 0
    back.server_end.room = 1 << 20
    b.turn(3)
    b.hub.tell_gap(None)
    b.hub.add(StoredEvent((200, 0), b"data: new\n\n", None))
    b.turn()
    stats = b.publisher.stats()
    assert (stats["gaps"], stats["events"]) == (1, 1)
    assert [event.name for event in back.take().events].count("gap") == 2


def test_the_pipe_is_closed_when_nobody_writes_to_it_any_more():
    """Its number was given to a file between the decision to wake and the system call."""
    def stop_before_the_system_call(_frame, event, function):
        if event == "c_call" and function.__name__ == "write":
            arrived.set()
            closed.wait(PATIENCE)

    def wake():
        sys.setprofile(stop_before_the_system_call)
        hub.wakeup.wake()
    arrived, closed = threading.Event(), threading.Event()
    # So that nothing left by earlier tests is closed meanwhile.
    gc.collect()
    before = os.listdir("/dev/fd")
    hub = Hub(**KEPT)
    publisher = Publisher(hub)
    waker = in_a_thread(wake)
    assert arrived.wait(PATIENCE)
    publisher.close()
    assert len(os.listdir("/dev/fd")) == len(before) + 2
    closed.set()
    waker.join()
    assert os.listdir("/dev/fd") == before


def test_what_needs_the_mutex_fails_without_it(bench):
    b = bench()
    clients = b.hub.clients
    for call in (lambda: clients.oldest_needed(0, b.now), lambda: clients.all_have(0, b.now),
                 lambda: clients.add(None), lambda: b.hub._may_evict(wait=False)):
        with pytest.raises(AssertionError, match="hold the mutex"):
            call()
