"""A publisher that can wait, such as the pipe, waits for clients that keep the pace."""
import time

import pytest

from bench import piped
from helpers import PATIENCE, in_a_thread, wait_until
from sse_core.errors import NotRunning
from sse_core.engine.frames import Event


@pytest.mark.parametrize("patience, awaited", [(0, False), (5.0, True)])
def test_without_patience_no_client_is_waited_for(bench, patience, awaited):
    b = bench(history=64, patience=patience)
    b.peer(narrow=True)
    b.turn()
    b.publish("x")
    b.turn()
    clients = b.hub.clients
    assert len(clients.lagging) == 1
    with b.hub._mutex:
        assert clients.oldest_needed(b.hub.fanned_out, b.now) == (0 if awaited else 1)
        assert clients.all_have(1, b.now) != awaited


def test_a_patient_publish_keeps_what_a_resuming_client_is_due(bench):
    b = bench(history=64)
    ids = [b.publish(str(number)) for number in range(64)]
    b.turn()
    back = b.peer(last_id=ids[0], narrow=True)
    waiting = in_a_thread(b.publish, "late", wait=True)
    b.pass_time(12)
    assert waiting.is_alive()
    back.server_end.room = 1 << 20
    while waiting.is_alive():
        b.turn()
    b.turn(3)
    assert back.data() == [*map(str, range(1, 64)), "late"]
    waiting.join()


def test_a_client_that_resumes_while_a_pipe_goes_on_is_waited_for_from_there(bench):
    b = bench(history=64)
    ids = [b.publish(str(number)) for number in range(64)]
    b.turn()
    b.publish("64", wait=True)
    b.turn()
    back = b.peer(last_id=ids[20], narrow=True)
    waiting = in_a_thread(lambda: [b.publish(str(number), wait=True) for number in range(65, 80)])
    b.pass_time(12)
    assert waiting.is_alive()
    back.server_end.room = 1 << 20
    while waiting.is_alive():
        b.turn()
    b.turn(3)
    assert back.data() == [*map(str, range(21, 80))]


def test_a_resuming_client_is_waited_for_at_every_moment_of_its_greeting(bench, monkeypatch):
    """It once was neither among those who join nor among those who lag, for a moment."""
    b = bench(history=64)
    ids = [b.publish(str(number)) for number in range(64)]
    b.turn()
    back = b.peer(last_id=ids[0], narrow=True)
    floors = []

    def send(data):
        with b.hub._mutex:
            floors.append(b.hub.clients.oldest_needed(b.hub.fanned_out, b.now))
        raise BlockingIOError
    monkeypatch.setattr(back.server_end, "send", send)
    b.turn(2)
    assert floors and set(floors) == {1}
    monkeypatch.undo()
    back.server_end.room = 1 << 20
    b.turn(3)
    assert len(back.data()) == 63 and not b.hub.clients.joining


def test_a_patient_publish_gives_up_a_client_that_does_not_read_after_one_pause(bench):
    b = bench(history=64, patience=5.0)
    deaf, reader = b.peer(narrow=True), b.peer()
    for number in range(64):
        b.publish(str(number))
        b.turn()
    done = []
    waiting = in_a_thread(lambda: done.append([b.publish("late", wait=True) for _ in range(100)]))
    while waiting.is_alive():
        # The clock stops at 13.5 s, so there is one pause of 13 s and not one for each event.
        b.now = min(b.now + 0.5, 1013.5)
        b.turn()
    waiting.join()
    b.turn()
    assert done and reader.data()[-100:] == ["late"] * 100
    deaf.server_end.room = 1 << 20
    b.turn(3)
    assert deaf.take().events[0].name == "gap"


@pytest.mark.parametrize("pace", [17_000, 50_000, 1_000_000])
@pytest.mark.parametrize("lumps", [1, 4])
def test_a_reader_of_a_steady_pace_gets_every_line_of_a_pipe(bench, pace, lumps):
    """Patience counts progress, not age; also of a socket that takes it in lumps, 1 s apart."""
    b = bench(history=64)
    steady = b.peer(narrow=True)
    steady.server_end.room = 1000
    b.turn()
    texts = [f"{number} ".ljust(10_000, "x") for number in range(100)]
    count = iter(range(10**9))

    def read():
        if next(count) % lumps == 0:
            steady.server_end.room = pace // 4 * lumps
        steady.take()
    piped(b, texts, read)
    b.turn(3)
    assert steady.data() == texts


def test_a_trickling_reader_holds_up_a_pipe_once(bench):
    b = bench(history=64)
    trickling, reader = b.peer(narrow=True), b.peer()
    trickling.server_end.room = 1000
    b.turn()
    texts = [f"{number} ".ljust(1_000, "x") for number in range(2000)]

    def read():
        trickling.server_end.room = 1
        reader.take()
        trickling.take()
    assert piped(b, texts, read) < 20
    b.turn(3)
    assert reader.data() == texts and trickling.data() == []


# Large lines make the pipe wait for room, small ones only make it drain at its end.
@pytest.mark.parametrize("size", [50_000, 700])
def test_clients_that_never_read_and_come_one_by_one_hold_up_a_pipe_once(bench, size):
    b = bench(history=64)
    began = b.now
    texts = [f"{number} ".ljust(size, "x") for number in range(100)]

    def come_anew():
        if (b.now - began) % 10 == 0:
            b.peer(narrow=True, last_id="0-0")
            b.turn()
    assert piped(b, texts, come_anew, step=1.0) < 13 + 3 + 1


def test_a_reader_that_is_current_now_and_then_is_not_waited_for_anew_each_time(bench):
    """A small log of short lines fits into a kernel's buffer: it catches up, falls behind again."""
    b = bench(history=64)
    slow, reader = b.peer(narrow=True), b.peer()
    slow.server_end.room = 1000
    b.turn()
    texts = [f"{number} ".ljust(100, "x") for number in range(5000)]
    count = iter(range(10**9))

    def read():
        # It reads 1 kB a second, in lumps that make it current.
        if next(count) % 40 == 0:
            slow.server_end.room = 10_000
        slow.take()
        reader.take()
    assert piped(b, texts, read, seconds=300) < 40
    slow.server_end.room = 1 << 20
    b.turn(3)
    assert reader.data() == texts and "gap" in {event.name for event in slow.take().events}


def test_posts_beside_a_pipe_cost_its_readers_no_line(bench):
    """Who does not wait has the last quarter of the log to himself."""
    b = bench(history=64)
    slow = b.peer(narrow=True)
    slow.server_end.room = 1000
    b.turn()
    texts = [f"{number} ".ljust(10_000, "x") for number in range(100)]
    posts = []

    def read():
        slow.server_end.room = 25_000
        if len(posts) < 30:
            posts.append(b.publish(f"post {len(posts)}"))
        slow.take()
    piped(b, texts, read)
    b.turn(3)
    assert [text for text in slow.data() if not text.startswith("post")] == texts
    assert len([text for text in slow.data() if text.startswith("post")]) == 30 == len(posts)


def test_posts_that_evict_are_told_as_a_gap_and_the_client_is_waited_for_as_before(bench):
    b = bench(history=64)
    slow = b.peer(narrow=True)
    slow.server_end.room = 1000
    b.turn()
    for number in range(200):
        b.publish(f"post {number}")
        b.turn()
    texts = [f"{number} ".ljust(1_000, "x") for number in range(100)]

    def read():
        slow.server_end.room = 10_000
        slow.take()
    piped(b, texts, read)
    b.turn(3)
    names = [event.name for event in slow.take().events]
    assert names.count("gap") == 1
    assert [text for text in slow.data() if not text.startswith(("post", "{"))] == texts


def test_drain_waits_for_a_client_that_keeps_the_pace_and_for_no_other(bench):
    b = bench(history=64)
    narrow, deaf = b.peer(narrow=True), b.peer(narrow=True)
    b.turn()
    text = "x" * 500_000
    b.publish(text)
    b.turn()
    began = b.now
    draining = in_a_thread(b.hub.drain)
    while draining.is_alive():
        narrow.server_end.room = 5000
        narrow.take()
        b.publish("more", channel="other")
        b.pass_time(0.25, 0.25)
        time.sleep(0.001)
    draining.join()
    assert narrow.data() == [text] and 20 < b.now - began < 30
    assert deaf.data() == []


def test_a_publish_that_waits_for_room_is_refused_when_the_server_stops(bench):
    b = bench(history=64)
    for _ in range(48):
        b.publish("x")
    raised = []

    def publish():
        try:
            b.publish("late", wait=True)
        except NotRunning as error:
            raised.append(error)
    b.watched = in_a_thread(publish)
    # It waits, because nothing is fanned out.
    assert b.looked.wait(5)
    b.hub.stop()
    b.watched.join(5)
    assert raised and b.publisher.stats()["events"] == 48


def test_a_publish_that_a_stop_refuses_costs_clients_nothing(bench):
    b = bench(history=64)
    reader = b.peer()
    texts = [str(number) for number in range(64)]
    for text in texts:
        b.publish(text)
    b.hub.stop()
    with pytest.raises(NotRunning):
        b.publish("late")
    b.turn()
    assert reader.data() == texts


def test_a_stop_in_the_middle_of_many_events_publishes_them_all(bench):
    b = bench(history=64)
    reader = b.peer()
    b.turn()
    texts, ids = [str(number) for number in range(1000)], []
    thread = in_a_thread(lambda: ids.extend(b.hub.publish_all([Event(text) for text in texts])))
    # The log is full, and nothing is fanned out.
    wait_until(lambda: b.hub._changed._waiters)
    b.hub.stop()
    # It goes on waiting, because the publisher has all of the log still to send.
    with b.hub._changed:
        b.hub._changed.notify_all()
    wait_until(lambda: b.hub._changed._waiters or not thread.is_alive())
    b.start()
    thread.join()
    b.stop()
    assert len(set(ids)) == b.publisher.stats()["events"] == 1000
    # The stream may have ended before the last of them came, but none is left out.
    data = reader.data()
    assert len(data) >= 64 and data == texts[:len(data)] and reader.stream.ended
    with pytest.raises(NotRunning):
        b.hub.publish_all([Event("late")])


def test_what_the_publisher_thread_takes_is_charged_to_no_client(bench):
    b = bench(history=64)
    slow = b.peer(narrow=True)
    slow.server_end.room = 1000
    b.turn()
    for _ in range(48):
        b.publish("x")
    b.watched = in_a_thread(b.publish, "late", wait=True)
    # It waits, because nothing has been fanned out. It checks at least once after that.
    for seconds in (20, 0):
        b.looked.clear()
        assert b.looked.wait(PATIENCE)
        b.now += seconds
    slow.server_end.room = 0
    while b.watched.is_alive() and not b.hub.clients.lagging:
        b.turn()
    with b.hub._mutex:
        assert b.hub.clients.oldest_needed(b.hub.fanned_out, b.now) == 0
    slow.server_end.room = 1 << 20
    while b.watched.is_alive():
        b.turn()
