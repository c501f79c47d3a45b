"""A client that has gone, stalls or floods is dropped with a reason, and no other is."""
import errno
import logging
import socket
import sys
import time

import pytest

import publisher
from bench import HEAD, stream_request
from helpers import wait_until
from sse_core.engine import stalls
from sse_core.engine.stalls import STALL_TIMEOUT


def tcp_pair(receive_buffer: int, send_buffer: int) -> tuple:
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        theirs = socket.socket()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        theirs.connect(listening.getsockname())
        return listening.accept()[0], theirs


def stops_reading(b, events: int) -> float:
    """Have a client on a real TCP socket read a little of so many events, and then stop.

    Returns after how many seconds it is dropped. Sizes are such that its kernel's buffers are full
    when it stops, but for a part of which our selector tells nothing.
    """
    ours, theirs = tcp_pair(4096, 65536)
    with ours, theirs:
        ours.setblocking(False)
        theirs.settimeout(5)
        assert b.hub.register(ours, stream_request())
        for _ in range(events):
            b.publish("x" * 1000)
            b.turn()
        b.pass_time(10)
        theirs.recv(8000)
        wait_until(lambda: b.pass_time(0.01) or not unsent_moves(ours))
        stopped = b.now
        while len(b.hub.clients):
            b.pass_time(0.5)
            assert b.now < stopped + 100
        return b.now - stopped


def unsent_moves(sock: socket.socket) -> bool:
    """Say whether a kernel still moves data to the peer's."""
    before = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 148)[120:]
    # Longer than a kernel may delay an acknowledgement.
    time.sleep(0.1)
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 148)[120:] != before


def test_a_stalled_client_is_dropped_after_30_seconds_and_logged_once(bench, caplog):
    b = bench()
    narrow, other = b.peer(narrow=True, peer="10.0.0.1:7"), b.peer()
    narrow.server_end.room = len(HEAD) + 5
    b.publish("x")
    b.turn()
    b.pass_time(STALL_TIMEOUT - 1)
    assert len(b.hub.clients) == 2
    # It takes one byte, so the time begins anew.
    narrow.server_end.room = 1
    b.turn()
    b.pass_time(STALL_TIMEOUT - 1)
    assert len(b.hub.clients) == 2
    with caplog.at_level(logging.WARNING):
        b.pass_time(10)
    assert len(b.hub.clients) == 1 and narrow.sock.recv(100) and narrow.sock.recv(100) == b""
    assert [record.getMessage() for record in caplog.records] == ["10.0.0.1:7 dropped: stalled"]
    b.publish("y")
    b.turn()
    assert other.data() == ["x", "y"]


@pytest.mark.parametrize("size, every", [(4096, 3.0), (12000, 7.0)])
def test_a_reader_with_a_small_buffer_is_not_dropped_as_long_as_it_takes_a_byte(bench, size, every):
    """Its kernel reports it writable only when a third of the buffer is free: too late."""
    b = bench(history=100)
    ours, theirs = tcp_pair(4096, 65536)
    with ours, theirs:
        ours.setblocking(False)
        theirs.settimeout(5)
        assert b.hub.register(ours, stream_request())
        for _ in range(40):
            b.publish("x" * 10_000)
            b.turn()
        read = 0
        for _ in range(int(200 / every)):
            read += len(theirs.recv(size))
            time.sleep(0.002)
            b.pass_time(every)
        assert read and len(b.hub.clients) == 1
        # Its kernel takes what it has room for when it likes, and not by our clock.
        wait_until(lambda: b.pass_time(1) or not len(b.hub.clients))
        drops = {**dict.fromkeys(publisher.REASONS, 0), "stalled": 1}
        assert b.publisher.counters.drops == drops


@pytest.mark.skipif(sys.platform != "linux", reason="what a peer acknowledges is asked on Linux")
# Twenty events fit into our kernel's buffer, 400 do not.
@pytest.mark.parametrize("events", [20, 400])
def test_a_client_that_stops_reading_is_dropped_after_30_seconds_whoever_holds_the_bytes(
        bench, events):
    """It was 60: at 30 there was room in our own kernel for some bytes more. And never, if all fit.
    """
    b = bench(history=64, heartbeat=15.0)
    assert 28 <= stops_reading(b, events) <= 33
    assert b.publisher.counters.drops["stalled"] == 1


def test_clients_are_asked_what_they_acknowledged_by_some_hundreds_a_second(bench, monkeypatch):
    monkeypatch.setattr(stalls, "CHECKS_PER_SECOND", 10)
    monkeypatch.setattr(stalls, "RECHECKS_PER_SECOND", 5)
    # With this heartbeat there are eight sweeps in a second.
    b = bench(history=64, heartbeat=1.0)
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


def test_a_client_that_fell_behind_is_asked_again_at_once_among_any_number(bench, monkeypatch):
    # Of 100 clients, each comes in its turn every 100 seconds.
    monkeypatch.setattr(stalls, "CHECKS_PER_SECOND", 1)
    b = bench()
    for _ in range(99):
        b.peer()
    narrow = b.peer(narrow=True)
    b.turn()
    b.pass_time(20)
    # It takes one byte, so the time begins anew.
    narrow.server_end.room = 1
    b.turn()
    b.pass_time(STALL_TIMEOUT - 2)
    assert len(b.hub.clients) == 100
    b.pass_time(4)
    assert len(b.hub.clients) == 99


def test_a_client_that_the_system_cannot_watch_is_dropped_and_counted(bench, caplog,
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
    stats = b.publisher.stats()
    assert stats["drops"]["unwatched"] == 1 and stats["clients"] == 1
    assert stats["deliveries"] == 1
    assert [record.getMessage() for record in caplog.records] == ["10.0.0.1:7 dropped: unwatched"]


def test_a_client_that_closes_is_removed_at_once_and_what_it_sends_is_discarded(bench):
    b = bench()
    closing, talking = b.peer(), b.peer()
    b.turn()
    talking.sock.send(b"x" * 60_000)
    closing.sock.close()
    b.turn(3)
    assert len(b.hub.clients) == 1
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
        assert len(b.hub.clients) == 2
    talking.sock.send(b"x")
    b.publish("to the other")
    b.turn(2)
    assert len(b.hub.clients) == 1 and other.data() == ["to the other"]
    assert b.publisher.counters.drops["flooding"] == 1


def test_no_more_than_max_clients_are_taken_until_one_leaves(bench):
    b = bench(max_clients=3)
    first = b.peer()
    b.peer(), b.peer()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert not b.hub.register(ours, stream_request())
        b.turn()
        first.sock.close()
        b.turn()
        assert b.hub.register(ours, stream_request())
        b.turn()
        assert theirs.recv(100) == HEAD
