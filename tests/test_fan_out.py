"""What is published reaches every client, whole, in order and once, however its socket takes it."""
import random
import socket
import ssl

import pytest

from bench import HEAD
from sse_core.engine import frames
from sse_core.engine.clients import CLIENTS_PER_TURN
from sse_core.http.tls import TLSSocket


def test_the_head_and_the_first_frames_leave_in_one_send(bench):
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
        assert not b.hub.clients.lagging
        # The publisher does not wait for the socket any more, either.
        assert not b.publisher._selector.select(0)


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


def test_all_but_the_last_byte_of_a_record_that_tls_has_begun_counts_as_sent():
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
            # A whole record is sent at once.
            assert sock.send(b"x" * 20_000) == 16_384 == len(theirs.recv(1 << 20))
            openssl.room = 0


def test_a_record_that_tls_has_begun_is_offered_again_first(bench):
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


def test_a_client_that_never_reads_delays_none_of_fifty_that_do(bench):
    b = bench(history=64)
    deaf, readers = b.peer(), [b.peer() for _ in range(50)]
    texts = [f"{number} " + "x" * 5000 for number in range(300)]
    for text in texts:
        b.publish(text)
        b.turn()
        for reader in readers:
            assert reader.take().events[-1].data == text
    assert all(reader.data() == texts for reader in readers)
    assert len(b.hub.clients.lagging) == 1 and len(b.hub.clients) == 51
    b.turn(1)
    for _ in range(300):
        deaf.take()
        b.turn()
    assert [event.name for event in deaf.stream.events].count("gap") == 1
    assert deaf.data()[-1] == texts[-1] and not b.hub.clients.lagging


def test_a_reset_during_the_fan_out_harms_no_other_client(bench):
    b = bench()
    peers = [b.peer() for _ in range(10)]
    b.turn()
    for peer in peers[::3]:
        peer.sock.close()
    b.publish("x")
    # Before the selector tells that they are gone
    b.publisher._fan_out([b.hub._log.frame(0)])
    assert len(b.hub.clients) == 6
    assert all(peer.data() == ["x"] for index, peer in enumerate(peers) if index % 3)


def test_an_event_on_a_channel_reaches_only_the_clients_that_asked_for_it(bench):
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
    assert not b.publisher._groups._by_channel and b.groups() == 1


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
    assert b.hub.clients.lagging
    for _ in range(10):
        b.turn()
        mine.take()
    assert not b.hub.clients.lagging
    b.publish("late", channel="a")
    b.turn()
    assert mine.data()[-1] == "late"


def test_clients_with_tokens_of_their_own_share_a_group_and_each_ends_in_time(bench):
    """A group for each token made of a thousand clients a thousand groups, at twice the cost."""
    b = bench()
    soon = [b.peer(ends_at=b.now + 5 + number) for number in range(3)]
    lagging, later = b.peer(narrow=True, ends_at=b.now + 5), b.peer(ends_at=b.now + 60)
    b.publish("one")
    b.turn(2)
    assert b.groups() == 1
    b.pass_time(6)
    assert [peer.take().ended for peer in (*soon, later)] == [True, True, False, False]
    b.publish("two")
    b.turn()
    assert soon[0].data() == ["one"] and soon[2].data() == later.data() == ["one", "two"]
    assert lagging.sock.recv(100) == b"" and len(b.hub.clients) == 2
    assert b.publisher.counters.drops["expired"] == 3


def test_a_turn_serves_some_hundreds_of_lagging_clients_and_then_looks_for_events(bench):
    b = bench(history=100)
    lagging = [b.peer(narrow=True) for _ in range(3 * CLIENTS_PER_TURN)]
    reader = b.peer()
    b.turn(4)
    # It was greeted, though more clients joined than a turn takes.
    assert len(reader.take().head) == 1
    b.publish("x" * 1000)
    b.turn()
    assert len(b.hub.clients.lagging) == 3 * CLIENTS_PER_TURN
    for peer in lagging:
        peer.server_end.room = 1 << 20
    b.publish("new")
    b.turn()
    assert reader.data()[-1] == "new"
    served = [peer for peer in lagging if peer.take().head]
    assert len(served) == CLIENTS_PER_TURN
    b.turn(2)
    # They are served in turn, so no client starves.
    assert all(peer.take().head for peer in lagging)
    b.turn(6)
    assert all(peer.data() == ["x" * 1000, "new"] for peer in lagging)
