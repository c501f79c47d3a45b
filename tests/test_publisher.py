"""The publisher without its thread: turned by hand, over socket pairs, by a clock of the test's."""
import errno
import gc
import json
import logging
import math
import os
import random
import socket
import ssl
import sys
import threading
import time
import tracemalloc

import pytest

import publisher
from bench import HEAD, opening, piped
from helpers import KEPT, PATIENCE, in_a_thread, wait_until
from publisher import Publisher
from sse_core.engine import frames, stalls
from sse_core.engine.hub import Broadcast
from sse_core.errors import NotRunning, Unavailable
from sse_core.engine.clients import CLIENTS_PER_TURN
from sse_core.engine.log import NOTHING, SCAN_LIMIT, Batch
from sse_core.engine.frames import Draft
from sse_core.stores.store import Event
from sse_core.engine.stalls import STALL_TIMEOUT
from sse_core.http.tls import TLSSocket


def test_head_and_first_frames_leave_in_one_send(bench):
    b = bench()
    peer = b.peer()
    b.publish("one")
    b.publish("two", "custom")
    b.turn()
    assert peer.sock.recv(1 << 16) == HEAD + b"".join(
        map(frames.chunk, (b"data: one\r\n\r\n", b"event: custom\ndata: two\r\n\r\n")))


def test_a_client_gets_what_is_published_from_its_registration_on(bench):
    b = bench()
    b.publish("before")
    peer = b.peer()
    b.publish("after")
    b.turn()
    assert peer.data() == ["after"]


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("history", [0, 100])
def test_a_send_that_is_cut_at_any_byte_is_finished_before_the_next_frame(bench, chunked, history):
    """Every cut of three frames, and the frames that follow while the client lags."""
    length = 3 * 60
    for cut in range(length):
        b = bench(history=history, retry=1)
        whole, narrow = b.peer(chunked=chunked), b.peer(narrow=True, chunked=chunked)
        narrow.server_end.room = 1 << 20
        b.turn()
        narrow.server_end.room = cut
        for text in ("one", "two\nlines", "three"):
            b.publish(text)
        b.turn(2)
        b.publish("four")
        b.turn()
        narrow.server_end.room = 1 << 20
        b.turn(2)
        b.publish("five")
        b.turn()
        assert whole.data() == narrow.data() == ["one", "two\nlines", "three", "four", "five"], cut
        assert whole.raw[-150:] == narrow.raw[-150:]
        assert not b.broadcast.clients.lagging
        assert not b.publisher._selector.select(0)      # nor is it told that the socket takes more


def test_a_client_that_takes_a_byte_a_turn_gets_everything(bench):
    b = bench()
    narrow = b.peer(narrow=True)
    for number in range(20):
        b.publish(f"event {number}")
    for _ in range(1000):
        narrow.server_end.room = 1
        b.turn()
        narrow.take()
    assert narrow.data() == [f"event {number}" for number in range(20)]


def test_a_lagging_client_finishes_its_frame_and_is_told_the_gap(bench):
    b = bench(history=100)
    narrow = b.peer(narrow=True)
    narrow.server_end.room = len(HEAD) + 200        # head, retry, and some of the frames
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
    assert gaps[0].id == had.id                     # a gap does not move the client's id
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
    # After where it was told that it stands
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


class Committing:
    """An OpenSSL that begins a record although its socket is full, and wants the same one again."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.room, self.held = 0, b""

    def write(self, data: bytes) -> int:
        assert not self.held or data == self.held, "not what was begun"
        if not self.room:
            self.held = data
            raise ssl.SSLWantWriteError
        self.held, self.room = b"", max(0, self.room - len(data))
        return socket.socket.send(self.sock, data)

    def read(self, *_) -> bytes:
        raise ssl.SSLWantReadError

    def shutdown(self) -> None:
        """Send no close_notify."""


def over_openssl(ours: socket.socket) -> TLSSocket:
    """Return a TLS socket without TLS, for what it does when OpenSSL finds the socket full."""
    sock = TLSSocket.__new__(TLSSocket)
    socket.socket.__init__(sock, fileno=ours.detach())
    sock.setblocking(False)
    sock._sslobj = Committing(sock)
    return sock


def test_of_a_record_that_tls_has_begun_all_but_the_last_byte_is_sent():
    ours, theirs = socket.socketpair()
    with over_openssl(ours) as sock, theirs:
        openssl = sock._sslobj
        for data in (b"a", b"ab", b"abc"):
            if len(data) == 1:
                with pytest.raises(BlockingIOError):
                    sock.send(data)
            else:
                assert sock.send(data) == len(data) - 1
            openssl.room = 1 << 20
            assert sock.send(data[-1:]) == 1 and theirs.recv(100) == data
            assert sock.send(b"x" * 20_000) == 16_384 == len(theirs.recv(1 << 20))  # a whole record
            openssl.room = 0


def test_what_tls_has_begun_is_offered_again(bench):
    """Random room and laps: what a full socket was offered first, it is offered first again."""
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    b = bench(history=64)
    peer = b.peer(wrap=over_openssl)
    openssl = peer.server_end._sslobj
    number, laps = 0, 0
    for _ in range(3000):
        for _ in range(draw.choice((0, 0, 1, 1, 2, 40))):
            b.publish(f"{number} " + "x" * draw.randrange(80))
            number += 1
        openssl.room = draw.choice((0, 0, 1, 90, 5000))
        b.now += 0.5
        b.turn()
        peer.take()
    for _ in range(300):
        openssl.room = 1 << 20
        b.turn()
        peer.take()
    expected = None
    for event in peer.take().events:
        if event.name == "gap":
            laps, expected = laps + 1, None
            continue
        value = int(event.data.split()[0])
        assert expected is None or value == expected, f"seed {seed}"
        expected = value + 1
    assert expected == number and laps, f"seed {seed}: {laps} laps"


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


def test_a_client_that_takes_a_few_bytes_at_a_time_is_lapped_with_whole_frames_only(bench):
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


def test_a_client_that_never_reads_beside_fifty_that_do(bench):
    b = bench(history=64)
    deaf, readers = b.peer(), [b.peer() for _ in range(50)]
    texts = [f"{number} " + "x" * 5000 for number in range(300)]
    for text in texts:
        b.publish(text)
        b.turn()
        for reader in readers:
            assert reader.take().events[-1].data == text
    assert all(reader.data() == texts for reader in readers)
    assert len(b.broadcast.clients.lagging) == 1 and len(b.broadcast.clients) == 51
    b.turn(1)
    for _ in range(300):
        deaf.take()
        b.turn()
    assert [event.name for event in deaf.stream.events].count("gap") == 1
    assert deaf.data()[-1] == texts[-1] and not b.broadcast.clients.lagging


def test_a_stalled_client_is_dropped_after_30_seconds_and_logged_once(bench, caplog):
    b = bench()
    narrow, other = b.peer(narrow=True, peer="10.0.0.1:7"), b.peer()
    narrow.server_end.room = len(HEAD) + 5
    b.publish("x")
    b.turn()
    b.pass_time(STALL_TIMEOUT - 1)
    assert len(b.broadcast.clients) == 2
    narrow.server_end.room = 1      # one byte taken: the time begins anew
    b.turn()
    b.pass_time(STALL_TIMEOUT - 1)
    assert len(b.broadcast.clients) == 2
    with caplog.at_level(logging.WARNING):
        b.pass_time(10)
    assert len(b.broadcast.clients) == 1 and narrow.sock.recv(100) and narrow.sock.recv(100) == b""
    assert [record.getMessage() for record in caplog.records] == ["10.0.0.1:7 dropped: stalled"]
    b.publish("y")
    b.turn()
    assert other.data() == ["x", "y"]


def test_heartbeats_go_only_to_those_who_were_sent_nothing(bench):
    b = bench(heartbeat=10.0)
    early = b.peer()
    b.turn()
    b.pass_time(6)
    late = b.peer()
    b.pass_time(6)
    assert (early.take().comments, late.take().comments) == (1, 0)
    b.pass_time(6)
    assert (early.take().comments, late.take().comments) == (1, 1)
    for _ in range(8):
        b.publish("x")
        b.turn()
        b.pass_time(5)
    assert (early.take().comments, late.take().comments) == (1, 1)
    assert early.stream.last_id == ""


def test_who_waits_for_room_when_it_stops_is_refused_and_publishes_nothing(bench):
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
    assert b.looked.wait(5)     # it waits: nothing is fanned out
    b.broadcast.stop()
    b.watched.join(5)
    assert raised and b.publisher.figures()["events"] == 48


def test_of_many_events_all_are_published_when_it_stops_amid_them(bench):
    b = bench(history=64)
    ids = []
    drafts = [Draft(str(number)) for number in range(1000)]
    thread = in_a_thread(lambda: ids.extend(b.broadcast.publish_all(drafts)))
    wait_until(lambda: b.broadcast._changed._waiters)     # nothing is fanned out
    b.broadcast.stop()
    thread.join()
    assert len(set(ids)) == b.publisher.figures()["events"] == 1000
    with pytest.raises(NotRunning):
        b.broadcast.publish_all(drafts)


def test_stop_gives_a_slow_client_a_second_and_a_fault_none(bench):
    b = bench()
    b.peer(narrow=True)
    b.turn()
    b.publish("x")
    b.turn()
    b.broadcast.stop()
    b.now += 0.99
    assert not b.broadcast.done()
    b.broadcast.stop()      # again: it gives no second more
    b.now += 0.01
    assert b.broadcast.done()
    other = bench()
    other.peer(narrow=True)
    other.turn()
    other.broadcast.fail(ZeroDivisionError())
    assert other.broadcast.done()


@pytest.mark.parametrize("patience, awaited", [(0, False), (5.0, True)])
def test_without_patience_nobody_is_waited_for_not_for_a_moment(bench, patience, awaited):
    b = bench(history=64, patience=patience)
    b.peer(narrow=True)
    b.turn()
    b.publish("x")
    b.turn()
    clients = b.broadcast.clients
    assert len(clients.lagging) == 1
    assert clients.oldest_needed(b.broadcast.fanned_out, b.now) == (0 if awaited else 1)
    assert clients.all_have(1, b.now) != awaited


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
    lagging, current = b.broadcast.describe_clients()
    assert lagging == {"peer": "", "since": 1000.25, "channels": 1, "lag_frames": 2,
                       "lag_seconds": 3.25}
    assert current == {"peer": "10.0.0.1:7", "since": 1000.25, "channels": 0, "lag_frames": 0,
                       "lag_seconds": 0.0}
    assert narrow.data() == [] and other.data() == ["x", "y"]


def test_who_took_a_heartbeat_whole_lags_behind_nothing(bench):
    b = bench(heartbeat=10.0)
    peer = b.peer()
    b.turn()
    b.now += 20
    b.turn()
    assert peer.take().comments == 1 and b.publisher.figures()["lagging"] == 0


def test_a_client_that_the_system_watches_no_more_is_dropped_and_counted(bench, caplog,
                                                                       monkeypatch):
    b = bench()
    first = b.peer()
    b.turn()

    def full(*_):
        raise OSError(errno.ENOSPC, "too many watches")
    with monkeypatch.context() as patch:
        patch.setattr(b.publisher._selector, "register", full)
        late = b.peer(peer="10.0.0.1:7")
        b.publish("x")
        b.turn()
    assert late.sock.recv(100) == b"" and first.data() == ["x"]
    figures = b.publisher.figures()
    assert figures["drops"]["unwatched"] == 1 and figures["clients"] == 1
    assert figures["deliveries"] == 1
    assert [record.getMessage() for record in caplog.records] == ["10.0.0.1:7 dropped: unwatched"]


def test_heartbeats_to_http_1_0_are_comments_without_a_chunk(bench):
    b = bench(heartbeat=10.0)
    plain = b.peer(chunked=False)
    b.turn()
    b.pass_time(25)
    assert plain.take().comments == 2 and plain.raw == HEAD + b":\n" * 2


def test_no_heartbeat_inside_a_frame_and_none_if_turned_off(bench):
    b = bench(heartbeat=1.0)
    narrow = b.peer(narrow=True)
    narrow.server_end.room = len(HEAD) + 20
    b.publish("hello")
    b.turn()
    b.pass_time(20)
    narrow.server_end.room = 1 << 20
    b.turn()
    assert narrow.data() == ["hello"] and narrow.stream.comments == 0
    quiet = bench(heartbeat=0.0)
    peer = quiet.peer()
    quiet.turn()
    quiet.pass_time(300, step=10)
    assert peer.take().comments == 0


def test_a_heartbeat_cut_in_two_is_finished_before_the_next_frame(bench):
    length = len(frames.HEARTBEAT)
    for cut in range(length + 1):
        b = bench(heartbeat=10.0, history=10)
        narrow = b.peer(narrow=True)
        narrow.server_end.room = 1 << 20
        b.turn()
        id = b.publish("first")
        b.turn()
        narrow.server_end.room = cut
        b.pass_time(11)
        b.publish("second")
        b.turn()
        narrow.server_end.room = 1 << 20
        b.turn(2)
        assert narrow.data() == ["first", "second"] and narrow.stream.comments == 1
        assert narrow.stream.events[0].id == id


def test_a_client_that_closes_is_removed_at_once_and_what_it_sends_is_discarded(bench):
    b = bench()
    closing, talking = b.peer(), b.peer()
    b.turn()
    talking.sock.send(b"x" * 60_000)
    closing.sock.close()
    b.turn(3)
    assert len(b.broadcast.clients) == 1
    b.publish("still there")
    b.turn()
    assert talking.data() == ["still there"]


def test_a_client_that_sends_64_kib_after_its_request_is_dropped(bench):
    """Two that sent without end cost 70 % of a core."""
    b = bench()
    talking, other = b.peer(), b.peer()
    b.turn()
    for size in (40_000, (64 << 10) - 40_000):
        talking.sock.send(b"x" * size)
        b.turn(2)
        assert len(b.broadcast.clients) == 2
    talking.sock.send(b"x")
    b.publish("to the other")
    b.turn(2)
    assert len(b.broadcast.clients) == 1 and other.data() == ["to the other"]
    assert b.publisher.counters.drops["flooding"] == 1


def test_a_reset_during_the_fan_out_harms_nobody_else(bench):
    b = bench()
    peers = [b.peer() for _ in range(10)]
    b.turn()
    for peer in peers[::3]:
        peer.sock.close()
    b.publish("x")
    # Before the selector tells that they are gone
    b.publisher._fan_out([b.broadcast._log.frame(0)])
    assert len(b.broadcast.clients) == 6
    assert all(peer.data() == ["x"] for index, peer in enumerate(peers) if index % 3)


def test_no_more_than_max_clients_are_taken_until_one_leaves(bench):
    b = bench(max_clients=3)
    first = b.peer()
    b.peer(), b.peer()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not b.broadcast.register(ours, opening())
        b.turn()
        first.sock.close()
        b.turn()
        assert b.broadcast.register(ours, opening())
        b.turn()
        assert theirs.recv(100) == HEAD


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
    wait_until(lambda: b.broadcast.stopping and b.broadcast.fanned_out == 100)
    b.now += 2      # the deaf one keeps it waiting until its second is over
    b.broadcast.wakeup.wake()
    stopper.join(5)
    assert not stopper.is_alive()
    assert chunked.data() == plain.data() == [str(number) for number in range(100)]
    assert chunked.stream.ended and not plain.stream.ended
    assert not deaf.take().ended
    assert not b.broadcast.register(deaf.server_end, opening())


def test_channels_reach_only_those_who_asked(bench):
    b = bench(history=100)
    every, a, both = b.peer(), b.peer(channels=["a"]), b.peer(channels=["a", "b"])
    b.turn()
    for text, channel in (("1", None), ("2", "a"), ("3", "b"), ("4", None), ("5", "c"), ("6", "a")):
        b.publish(text, channel=channel)
    b.turn()
    assert every.data() == ["1", "4"] and a.data() == ["1", "2", "4", "6"]
    assert both.data() == ["1", "2", "3", "4", "6"]
    a.sock.close(), both.sock.close()
    b.turn()
    assert not b.publisher._groups._by_channel and len(list(b.publisher._groups)) == 1


def test_no_gap_for_what_was_evicted_on_other_channels(bench):
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


def test_a_client_that_joins_ahead_of_a_backlog_gets_nothing_twice(bench):
    """One turn sends one batch, so a client can join, and resume, beyond what is fanned out."""
    b = bench(history=1000)
    old = b.peer()
    b.turn()
    ids = [b.publish(f"{number} " + "x" * 30000) for number in range(10)]
    ahead, resumed = b.peer(), b.peer(last_id=ids[6])
    for _ in range(20):
        b.turn()
        for peer in b.peers:
            peer.take()
    b.publish("10 live")
    b.turn(2)

    def numbers(peer):
        return [int(data.split()[0]) for data in peer.data()]
    assert numbers(old) == list(range(11))
    assert numbers(ahead) == [10] and numbers(resumed) == [7, 8, 9, 10]


@pytest.mark.parametrize("bad", [{"history": -1}, {"heartbeat": -1.0}, {"retry": -0.1},
                                 {"max_clients": -1}, {"patience": -1.0},
                                 {"heartbeat": 2.0**31}, {"heartbeat": math.nan}])
def test_options_that_are_negative_or_no_number_are_a_value_error(bad):
    with pytest.raises(ValueError):
        Broadcast(**{**KEPT, **bad})


def test_a_client_for_whom_nothing_is_left_becomes_current(bench):
    """It once stayed lagging, with a socket always ready: that burned a core."""
    b = bench(history=1000)
    b.turn()
    for number in range(3):
        b.publish("x" * 40000, channel="a")
    b.publish("other", channel="b")
    b.turn(5)
    mine = b.peer(channels=["a"], last_id="0-0")
    b.turn()
    assert b.broadcast.clients.lagging
    for _ in range(10):
        b.turn()
        mine.take()
    assert not b.broadcast.clients.lagging
    b.publish("late", channel="a")
    b.turn()
    assert mine.data()[-1] == "late"


def test_a_patient_publish_keeps_what_a_resuming_client_is_due(bench):
    b = bench(history=64)
    ids = [b.publish(str(number)) for number in range(64)]
    b.turn()
    back = b.peer(last_id=ids[0], narrow=True)
    waiting = in_a_thread(b.publish, "late", wait=True)
    b.pass_time(12)
    assert waiting.is_alive() and b.broadcast._log.first <= 1
    back.server_end.room = 1 << 20
    while waiting.is_alive():
        b.turn()
    b.turn(3)
    assert back.data() == [*map(str, range(1, 64)), "late"]
    waiting.join()


def test_a_resuming_client_is_waited_for_at_every_moment_of_its_greeting(bench, monkeypatch):
    """It once was neither among those who join nor among those who lag, for a moment."""
    b = bench(history=64)
    ids = [b.publish(str(number)) for number in range(64)]
    b.turn()
    back = b.peer(last_id=ids[0], narrow=True)
    floors = []

    def send(data):
        floors.append(b.broadcast.clients.oldest_needed(b.broadcast.fanned_out, b.now))
        raise BlockingIOError
    monkeypatch.setattr(back.server_end, "send", send)
    b.turn(2)
    assert floors and set(floors) == {1}
    monkeypatch.undo()
    back.server_end.room = 1 << 20
    b.turn(3)
    assert len(back.data()) == 63 and not b.broadcast.clients.joining


def test_a_patient_publish_gives_up_a_client_that_does_not_read_after_one_pause(bench):
    b = bench(history=64, patience=5.0)
    deaf, reader = b.peer(narrow=True), b.peer()
    for number in range(64):
        b.publish(str(number))
        b.turn()
    done = []
    waiting = in_a_thread(lambda: done.append([b.publish("late", wait=True) for _ in range(100)]))
    while waiting.is_alive():
        b.now = min(b.now + 0.5, 1013.5)    # no further: one pause of 13 s, and not one an event
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


@pytest.mark.parametrize("size", [50_000, 700])      # the pipe waits for room; or drains at its end
def test_deaf_clients_one_after_the_other_hold_up_a_pipe_once(bench, size):
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
        if next(count) % 40 == 0:       # 1 kB a second, in lumps that make it current
            slow.server_end.room = 10_000
        slow.take()
        reader.take()
    assert piped(b, texts, read, seconds=300) < 40
    slow.server_end.room = 1 << 20
    b.turn(3)
    assert reader.data() == texts and "gap" in {event.name for event in slow.take().events}


def test_posts_beside_a_pipe_cost_no_line(bench):
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
    draining = in_a_thread(b.broadcast.drain)
    while draining.is_alive():
        narrow.server_end.room = 5000
        narrow.take()
        b.publish("more", channel="other")
        b.pass_time(0.25, 0.25)
        time.sleep(0.001)
    draining.join()
    assert narrow.data() == [text] and 20 < b.now - began < 30
    assert deaf.data() == []


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


def test_equal_bytes_are_joined_once_whatever_channels_clients_choose(bench):
    """Clients of HTTP/1.0, each with a channel of its own beside a common one, and 1 MB on that.

    With 1000 of them it was 984 MiB.
    """
    b = bench(history=64)
    for number in range(200):
        b.peer(chunked=False, channels=["news", f"u{number}"])
    b.turn(2)
    tracemalloc.start()
    b.publish("x" * 1_000_000, channel="news")
    b.turn(3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(b.broadcast.clients.lagging) == 200 and peak < 32 << 20


def test_memory_of_a_turn_is_bounded_however_many_sets_of_channels_there_are(bench):
    """9,000 clients with different sets of 40 channels and one POST of 63 KB took 300 MB."""
    b = bench(history=2000)
    draw = random.Random(1)
    channels = [f"c{number}" for number in range(40)]
    for number in range(600):
        b.peer(channels=draw.sample(channels, 20), chunked=number % 2)
    b.turn(4)
    texts = [f"{number} ".ljust(1500, "x") for number in range(40)]
    for text, channel in zip(texts, channels):
        b.publish(text, channel=channel)
    tracemalloc.start()
    b.turn()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len([*b.publisher._groups]) > 590 and peak < 8 << 20
    assert all(len(peer.data()) == 20 for peer in b.peers)


def test_a_batch_is_joined_once_for_the_channels_that_are_in_it(bench, monkeypatch):
    """With 10,000 clients on channels of their own and 600 events it was 585 MiB and 1.1 s."""
    joined = []

    def batch(run, chunked):
        joined.append(len(run))
        return Batch(run, chunked)
    monkeypatch.setattr(publisher, "Batch", batch)
    b = bench()
    for number in range(300):
        b.peer(channels=[f"u{number}", "all"])
    b.turn(2)
    joined.clear()
    for number in range(60):
        b.publish(str(number))
    b.publish("mine", channel="u7")
    b.turn()
    assert joined == [60, 61]
    assert b.peers[7].data()[-1] == "mine" and b.peers[8].data() == [*map(str, range(60))]


def test_clients_with_tokens_of_their_own_share_a_group_and_end_each_at_its_own_time(bench):
    """A group for each token made of a thousand clients a thousand groups, at twice the cost."""
    b = bench()
    soon = [b.peer(ends_at=b.now + 5 + number) for number in range(3)]
    lagging, later = b.peer(narrow=True, ends_at=b.now + 5), b.peer(ends_at=b.now + 60)
    b.publish("one")
    b.turn(2)
    assert len([*b.publisher._groups]) == 1
    b.pass_time(6)
    assert [peer.take().ended for peer in (*soon, later)] == [True, True, False, False]
    b.publish("two")
    b.turn()
    assert soon[0].data() == ["one"] and soon[2].data() == later.data() == ["one", "two"]
    assert lagging.sock.recv(100) == b"" and len(b.broadcast.clients) == 2
    assert b.publisher.counters.drops["expired"] == 3


def test_a_turn_serves_some_hundreds_of_lagging_clients_and_then_looks_for_events(bench):
    b = bench(history=100)
    lagging = [b.peer(narrow=True) for _ in range(3 * CLIENTS_PER_TURN)]
    reader = b.peer()
    b.turn(4)
    assert len(reader.take().head) == 1     # greeted, though more clients joined than a turn takes
    b.publish("x" * 1000)
    b.turn()
    assert len(b.broadcast.clients.lagging) == 3 * CLIENTS_PER_TURN
    for peer in lagging:
        peer.server_end.room = 1 << 20
    b.publish("new")
    b.turn()
    assert reader.data()[-1] == "new"
    served = [peer for peer in lagging if peer.take().head]
    assert len(served) == CLIENTS_PER_TURN
    b.turn(2)
    assert all(peer.take().head for peer in lagging)        # in turn: nobody starves
    b.turn(6)
    assert all(peer.data() == ["x" * 1000, "new"] for peer in lagging)


def test_resuming_on_a_channel_without_events_scans_the_log_in_pieces(bench):
    b = bench(history=20 * SCAN_LIMIT)
    start = b.publish("start")
    for _ in range(10 * SCAN_LIMIT):
        b.publish("other", channel="other")
    b.turn(20)
    back = b.peer(channels=["mine"], last_id=start)
    unknown = b.peer(channels=["mine"], last_id="1-0")
    turns = 0
    while turns == 0 or b.broadcast.clients.lagging:
        b.turn()
        turns += 1
    assert 8 <= turns <= 14
    b.publish("mine", channel="mine")
    b.turn()
    assert back.data() == ["mine"] and unknown.data()[1:] == ["start", "mine"]
    gap = json.loads(unknown.data()[0])
    assert gap == {"after": "1-0", "resumed": start, "reason": "unknown"}


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
    b.broadcast.preload(iter([]), NOTHING)
    reader = b.peer()
    b.broadcast.add(Event((7, 0), frames.encode("x"), None))
    b.broadcast.tell_gap((9, 0))
    b.turn(2)
    gap = reader.take().events[-1]
    assert (gap.name, gap.id) == ("gap", "7-0") and json.loads(gap.data)["resumed"] == "9-0"


def tcp_pair(receive_buffer: int, send_buffer: int) -> tuple:
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        theirs = socket.socket()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        theirs.connect(listening.getsockname())
        return listening.accept()[0], theirs


@pytest.mark.parametrize("size, every", [(4096, 3.0), (12000, 7.0)])
def test_a_reader_with_a_small_buffer_is_not_dropped_as_long_as_it_takes_a_byte(bench, size, every):
    """Its kernel reports it writable only when a third of the buffer is free: longer than STALL_TIMEOUT."""
    b = bench(history=100)
    ours, theirs = tcp_pair(4096, 65536)
    with ours, theirs:
        ours.setblocking(False)
        theirs.settimeout(5)
        assert b.broadcast.register(ours, opening())
        for _ in range(40):
            b.publish("x" * 10_000)
            b.turn()
        read = 0
        for _ in range(int(200 / every)):
            read += len(theirs.recv(size))
            time.sleep(0.002)
            b.pass_time(every)
        assert read and len(b.broadcast.clients) == 1
        # Its kernel takes what it has room for when it likes: by no clock of ours
        wait_until(lambda: b.pass_time(1) or not len(b.broadcast.clients))
        drops = {**dict.fromkeys(publisher.REASONS, 0), "stalled": 1}
        assert b.publisher.counters.drops == drops


def stops_reading(b, events: int) -> float:
    """Have a client on a real TCP socket read a little of so many events, and then stop.

    Returns after how many seconds it is dropped. Sizes are such that its kernel's buffers are full
    when it stops, but for a part of which our selector tells nothing.
    """
    ours, theirs = tcp_pair(4096, 65536)
    with ours, theirs:
        ours.setblocking(False)
        theirs.settimeout(5)
        assert b.broadcast.register(ours, opening())
        for _ in range(events):
            b.publish("x" * 1000)
            b.turn()
        b.pass_time(10)
        theirs.recv(8000)
        wait_until(lambda: b.pass_time(0.01) or not unsent_moves(ours))
        stopped = b.now
        while len(b.broadcast.clients):
            b.pass_time(0.5)
            assert b.now < stopped + 100
        return b.now - stopped


def unsent_moves(sock: socket.socket) -> bool:
    """Say whether a kernel still moves data to the peer's."""
    before = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 148)[120:]
    time.sleep(0.1)     # longer than a kernel may delay an acknowledgement
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 148)[120:] != before


@pytest.mark.skipif(sys.platform != "linux", reason="what a peer acknowledges is asked on Linux")
@pytest.mark.parametrize("events", [20, 400])       # they fit into our kernel's buffer, or do not
def test_a_client_that_stops_reading_is_dropped_after_30_seconds_whoever_holds_the_bytes(
        bench, events):
    """It was 60: at 30 there was room in our own kernel for some bytes more. And never, if all fit.
    """
    b = bench(history=64, heartbeat=15.0)
    assert 28 <= stops_reading(b, events) <= 33
    assert b.publisher.counters.drops["stalled"] == 1


def test_some_hundreds_of_clients_are_asked_in_a_second_and_all_in_turn(bench, monkeypatch):
    monkeypatch.setattr(stalls, "CHECKS_PER_SECOND", 10)
    monkeypatch.setattr(stalls, "RECHECKS_PER_SECOND", 5)
    b = bench(history=64, heartbeat=1.0)        # so there are eight sweeps in a second
    asked, ask = [], stalls.Stalls._owed

    def owed(self, client, now):
        asked.append(client)
        return ask(self, client, now)
    monkeypatch.setattr(stalls.Stalls, "_owed", owed)
    for number in range(40):
        b.peer(narrow=number % 2)
    b.turn(2)
    for _ in range(5):
        before = len(asked)
        b.pass_time(1, step=0.125)
        assert 8 <= len(asked) - before <= 16
    assert len(set(asked)) == 40


def test_who_fell_behind_is_asked_again_at_once_however_many_others_there_are(bench, monkeypatch):
    monkeypatch.setattr(stalls, "CHECKS_PER_SECOND", 1)     # of 100: it comes in its turn every 100 seconds
    b = bench()
    for _ in range(99):
        b.peer()
    narrow = b.peer(narrow=True)
    b.turn()
    b.pass_time(20)
    narrow.server_end.room = 1      # one byte taken: the time begins anew
    b.turn()
    b.pass_time(STALL_TIMEOUT - 2)
    assert len(b.broadcast.clients) == 100
    b.pass_time(4)
    assert len(b.broadcast.clients) == 99


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
        wait_until(lambda: len(b.broadcast.clients) == 1)
        b.stop()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert handler.lines and handler.lines + handler.refused >= 300


@pytest.mark.parametrize("call", ["drain", "refuse_inside"])
def test_who_interrupts_his_own_publish_waits_for_nothing(bench, call):
    b = bench()
    b.publish("x")
    with b.broadcast._mutex, pytest.raises(RuntimeError, match="signal handler"):
        getattr(b.broadcast, call)()


def test_publish_inside_a_publish_of_the_same_thread_is_refused_or_done_never_stuck(bench):
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


def test_figures_begin_at_nothing_and_count_frames_and_bytes_however_they_are_sent(bench):
    b = bench(history=64)
    figures = b.publisher.figures()
    assert {figures[name] for name in vars(b.publisher.counters) if name != "drops"} == {0}
    assert set(figures["drops"].values()) == {0}
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
    figures = b.publisher.figures()
    assert figures["deliveries"] == 5
    assert figures["bytes"] == sum(len(peer.raw) for peer in b.peers)
    assert figures["turns"] == 5 and figures["turn_seconds"] == 0
    b.publisher.counters.turn_seconds = 0.1234567
    assert b.publisher.figures()["turn_seconds"] == 0.123457


def test_figures_count_what_was_told_and_published(bench):
    b = bench(history=64, shared=True)
    b.broadcast.preload(iter([Event((number, 0), b"data: old\n\n", None)
                         for number in range(1, 100)]), NOTHING)
    back = b.peer(last_id="1-0", narrow=True)
    for _ in range(50):
        b.turn()
    assert b.publisher.figures()["gaps"] == 0           # it could not be told yet
    back.server_end.room = 1 << 20
    b.turn(3)
    b.broadcast.tell_gap(None)
    b.broadcast.add(Event((200, 0), b"data: new\n\n", None))
    b.turn()
    figures = b.publisher.figures()
    assert (figures["gaps"], figures["events"]) == (1, 1)
    assert [event.name for event in back.take().events].count("gap") == 2


def test_nobody_is_taken_before_the_log_is_loaded(bench):
    """It could not be said what came before such a client, and what after."""
    b = bench(history=64, shared=True)
    ours, peer = socket.socketpair()
    with ours, peer:
        assert not b.broadcast.loaded.is_set() and not b.broadcast.register(ours, opening())
        b.broadcast.preload(iter([Event((1, 0), b"data: 1\n\n", None)]), NOTHING)
        assert not b.broadcast.has_work()
    new = b.peer()
    b.broadcast.add(Event((2, 0), b"data: 2\n\n", None))
    b.turn(2)
    assert new.data()[-1:] == ["2"] and "1" not in new.data()


def test_nobody_is_taken_before_what_it_had_has_come_back_from_the_store(bench):
    """Else it could not be said whether its id is known, and what follows it."""
    b = bench(history=64, shared=True)

    def add(*numbers):
        for number in numbers:
            b.broadcast.add(Event((number, 0), b"data: %d\n\n" % number, None))
        b.turn(2)
    b.broadcast.preload(iter([Event((1, 0), b"data: 1\n\n", None)]), NOTHING)
    b.broadcast.complete(b.now)
    came_at = b.now
    b.now += 1
    ours, peer = socket.socketpair()
    with ours, peer:
        for id in ("3-0", "99-0"):
            assert not b.broadcast.register(ours, opening(last_id=id, came_at=came_at))
    add(2, 3)
    resumed = b.peer(last_id="3-0", came_at=came_at)
    b.broadcast.complete(b.now)     # the log has all there was when it came: its id is not in that
    nowhere = b.peer(last_id="99-0", came_at=came_at)
    add(4)
    assert resumed.data() == ["4"] and nowhere.take().events[0].name == "gap"
    assert nowhere.data()[1:] == ["1", "2", "3", "4"]


def test_the_pipe_is_closed_when_nobody_writes_to_it_any_more():
    """Its number was given to a file between the decision to wake and the system call."""
    def stop_before_the_system_call(_frame, event, function):
        if event == "c_call" and function.__name__ == "write":
            arrived.set()
            closed.wait(PATIENCE)

    def wake():
        sys.setprofile(stop_before_the_system_call)
        broadcast.wakeup.wake()
    arrived, closed = threading.Event(), threading.Event()
    gc.collect()        # what earlier tests have left is not closed meanwhile
    before = os.listdir("/dev/fd")
    broadcast = Broadcast(**KEPT)
    publisher = Publisher(broadcast)
    waker = in_a_thread(wake)
    assert arrived.wait(PATIENCE)
    publisher.close()
    assert len(os.listdir("/dev/fd")) == len(before) + 2
    closed.set()
    waker.join()
    assert os.listdir("/dev/fd") == before
