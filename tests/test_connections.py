"""What every connection is promised before it is a client: its time, its turn, its answer."""
import json
import logging
import re
import socket
import sqlite3
import ssl
import threading
import time
from contextlib import closing, contextmanager, suppress

import pytest

from helpers import (GET, PATIENCE, PUBLISH_TOKEN, Client, ask, connect, get, make_certificate,
                     post, request_threads, reset, unfinished, wait_until)
from sse_core.http import connections, http1
from sse_core.http.connections import Connections
from sse_core.http.pool import Pool
from sse_server import SSEServer

POST = get(f"/{PUBLISH_TOKEN}", "Content-Length: 5", method="POST")
CHUNKED = get(f"/{PUBLISH_TOKEN}", "Transfer-Encoding: chunked", method="POST")
LAST = get(f"/{PUBLISH_TOKEN}", "Content-Length: 4", "Connection: close", method="POST") + b"last"
HEAD = get("/", method="HEAD")
EVENT_SOURCE = get("/", "Accept: text/event-stream")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def secure(certificate):
    with SSEServer(port=0, cert=certificate[0], key=certificate[1],
                   publish_tokens=[PUBLISH_TOKEN]) as server:
        yield server


def client_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


class Peer:
    """A peer that sends its bytes, below TLS if it speaks that, in pieces of one size."""

    def __init__(self, port: int, piece: int, secure: bool) -> None:
        self.sock = connect(port)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.piece = piece
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = None
        if secure:
            self.tls = client_context().wrap_bio(self.incoming, self.outgoing)
            self.do(self.tls.do_handshake)

    def do(self, call, *arguments):
        """Do something of TLS, however many bytes have to go to and fro for it."""
        while True:
            try:
                done = call(*arguments)
                self.flush()
                return done
            except ssl.SSLWantReadError:
                self.flush()
                data = self.sock.recv(65536)
                self.incoming.write(data) if data else self.incoming.write_eof()

    def flush(self) -> None:
        data = self.outgoing.read()
        for at in range(0, len(data), self.piece):
            self.sock.sendall(data[at:at + self.piece])

    def send(self, data: bytes) -> None:
        """Send, until it is closed. Over TLS each byte is a record of its own, if pieces are."""
        with suppress(OSError):
            for at in range(0, len(data), self.piece):
                piece = data[at:at + self.piece]
                self.do(self.tls.write, piece) if self.tls else self.sock.sendall(piece)

    def receive(self) -> bytes:
        """Receive until the server closes, over TLS with close_notify."""
        received = b""
        with suppress(ssl.SSLZeroReturnError, ConnectionResetError):
            while True:
                data = self.do(self.tls.read, 65536) if self.tls else self.sock.recv(65536)
                if not data:
                    break
                received += data
        return received


CASES = {
    "page": (get("/", "Accept: text/html"), [200]),
    "head": (HEAD, [200]),
    "an empty line before": (b"\r\n" + HEAD, [200]),
    "post": (LAST, [200]),
    "posts in a row": ((POST + b"hello") * 2 + LAST, [200] * 3),
    "chunks": (CHUNKED + b"3\r\nhel\r\n2;a=b\r\nlo\r\n0\r\nA: b\r\n\r\n" + LAST, [200, 200]),
    "a post and a head": (POST + b"hello" + HEAD, [200, 200]),
    "what it expects": (POST.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n") + b"hello"
                        + LAST, [200, 200]),
    "not utf-8": (POST + b"\xff" * 5 + LAST, [400]),
    "wrong token": (POST.replace(b"SECRET", b"wrong") + b"hello" + LAST, [401]),
    "garbage": (b"garbage\r\n\r\n" + LAST, [400]),
    "bare LF": (b"GET / HTTP/1.1\n\n", [400]),
    "long line": (b"GET /" + b"a" * (http1.MAX_LINE + 1), [414]),
    "garbage after a post": (POST + b"hello" + b"\0", [200, 400]),
    "chunks that are none": (CHUNKED + b"5\nhello", [400]),
    "unknown path": (get("/-/what"), [404]),
}


# However it arrives

@pytest.mark.parametrize("piece", [1 << 20, 1], ids=["whole", "bytes"])
@pytest.mark.parametrize("kind", ["plain", "tls"])
@pytest.mark.parametrize("case", CASES)
def test_requests_are_answered_alike_however_they_arrive(request, kind, piece, case):
    data, statuses = CASES[case]
    server = request.getfixturevalue("secure" if kind == "tls" else "open_server")
    if piece == 1 and len(data) > 2000:
        piece = 97
    peer = Peer(server.port, piece, kind == "tls")
    with closing(peer.sock):
        peer.send(data)
        received = peer.receive()
    got = [int(status) for status in re.findall(rb"HTTP/1[.]1 ([0-9]+) ", received)]
    assert [status for status in got if status != 100] == statuses


def test_a_stream_over_tls_in_pieces_of_a_byte_is_a_stream(secure):
    peer = Peer(secure.port, 1, True)
    with closing(peer.sock):
        peer.send(GET)
        assert peer.do(peer.tls.read, 100).startswith(b"HTTP/1.1 200 ")
        wait_until(lambda: secure.clients == 1 and not unfinished(secure))


def test_requests_in_one_packet_of_tls_records_are_all_served(secure):
    """What OpenSSL has read and nobody else has, no selector would tell of."""
    peer = Peer(secure.port, 1 << 20, True)
    with closing(peer.sock):
        for data in (POST[:30], POST[30:] + b"hello" + POST + b"hel", b"lo", LAST):
            peer.tls.write(data)
        peer.flush()
        assert peer.receive().count(b"HTTP/1.1 200 ") == 3


def test_an_answer_over_tls_ends_with_close_notify(secure):
    """Without it, an answer could have been cut by anybody on the way (RFC 9112 section 9.8)."""
    for data in (LAST, HEAD, b"X\r\n\r\n", b"GET /" + b"a" * (http1.MAX_LINE + 1)):
        with connect(secure.port) as sock:
            tls = client_context().wrap_socket(sock, suppress_ragged_eofs=False)
            with closing(tls):
                tls.sendall(data)
                while tls.recv(65536):
                    pass


def test_100_continue_is_sent_once_and_gives_no_more_time(open_server, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_TIME", 0.8)
    began = time.monotonic()
    with connect(open_server.port) as sock:
        time.sleep(0.6)         # the most of its time
        sock.sendall(POST.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert sock.recv(1000).startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - began < 1.3


@contextmanager
def held(server, monkeypatch):
    """Hold up the thread that serves all connections, between two turns."""
    mine, arrived, release = server._connections, threading.Event(), threading.Event()

    def hold(now):
        mine._look_at = now + PATIENCE
        arrived.set()
        assert release.wait(PATIENCE)
    monkeypatch.setattr(mine, "_look_for_deadlines", hold)
    mine._look_at = 0.0
    mine._wakeup.wake()
    assert arrived.wait(PATIENCE)
    yield
    release.set()


def test_a_request_is_served_before_the_second_of_another_connection(open_server, monkeypatch):
    with Client(open_server.port) as client, connect(open_server.port) as one, \
            connect(open_server.port) as other:
        client.open()
        wait_until(lambda: len(open_server._connections._busy) == 2)
        with held(open_server, monkeypatch):
            one.sendall((POST + b"first") * 10)
            other.sendall(POST + b"other")
        data = [event.data for event in client.read_events(11)]
        assert data.index("other") <= 1 and data.count("first") == 10


def test_newcomers_are_taken_over_in_the_middle_of_a_long_turn(server, monkeypatch):
    """Else so many would wait at its end that some were closed."""
    monkeypatch.setattr(connections, "MAX_NEWCOMERS", 3)
    parse = http1.parse

    def slow(received, seen=0):
        if seen:
            time.sleep(0.02)
        return parse(received, seen)
    crowd = []
    for number in range(25):
        crowd.append(connect(server.port))
        crowd[-1].sendall(GET[:5])
        wait_until(lambda: len(server._connections._busy) == number + 1)
    monkeypatch.setattr(http1, "parse", slow)
    with held(server, monkeypatch):
        for sock in crowd:
            sock.sendall(GET[5:9])
    newcomers = []
    for _ in range(10):
        newcomers.append(connect(server.port))
        newcomers[-1].sendall(GET[:5])
        time.sleep(0.03)        # slower than they are taken over, faster than the turn ends
    for sock in newcomers:
        sock.sendall(GET[5:])
        assert sock.recv(100).startswith(b"HTTP/1.1 200 ")
    for sock in crowd + newcomers:
        sock.close()


# Its time

def test_a_dribbling_request_is_cut_by_the_total(server, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_TIME", 0.5)
    began = time.monotonic()
    with connect(server.port) as sock:
        answer = b""
        sock.settimeout(0.02)
        while not answer:
            sock.send(b"G")
            with suppress(socket.timeout):
                answer = sock.recv(1000)
            assert time.monotonic() - began < 5
    assert answer.startswith(b"HTTP/1.1 408 ") and time.monotonic() - began >= 0.5


def test_a_request_whose_time_is_up_is_read_no_further(open_server, monkeypatch):
    """Though more of it is there: so a peer that never pauses gets no more time than others."""
    monkeypatch.setattr(connections, "REQUEST_TIME", 0.3)
    with connect(open_server.port) as sock:
        sock.sendall(CHUNKED)
        sock.settimeout(0.0)
        began, answer = time.monotonic(), b""
        while not answer:
            with suppress(BlockingIOError):
                sock.sendall(b"10\r\n" + b"x" * 16 + b"\r\n")
            with suppress(BlockingIOError):
                answer = sock.recv(1000)
            assert time.monotonic() - began < 5
            time.sleep(0.001)       # all of it would be too long a body
    assert answer.startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("sent", [0, 1, 5])
def test_a_tls_handshake_that_dribbles_is_cut_by_the_total(secure, monkeypatch, sent):
    monkeypatch.setattr(connections, "REQUEST_TIME", 0.3)
    began = time.monotonic()
    with connect(secure.port) as sock, suppress(ConnectionResetError):
        sock.sendall(b"\x16\x03\x01\x02\0"[:sent])
        assert sock.recv(1000) == b""
    assert 0.25 < time.monotonic() - began < 5


def test_a_peer_that_does_not_take_its_answer_is_cut(open_server, monkeypatch):
    body = b'{"data": ""}\n' * 60_000
    head = get(f"/{PUBLISH_TOKEN}", f"Content-Length: {len(body)}",
               "Content-Type: application/x-ndjson", method="POST")
    with Client(open_server.port, head + body, receive_buffer=4096):
        wait_until(lambda: unfinished(open_server))
        monkeypatch.setattr(connections, "REQUEST_TIME", 0.2)
        wait_until(lambda: open_server.stats()["events"] == 60_000)
        wait_until(lambda: not unfinished(open_server), timeout=connections.PLACE_TIME / 2)


def test_a_client_gets_all_of_a_long_answer(open_server):
    body = b'{"data": ""}\n' * 60_000
    answer = post(open_server.port, f"/{PUBLISH_TOKEN}", body, "Connection: close",
                  "Content-Type: application/x-ndjson")
    head, _, text = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ") and len(json.loads(text)["ids"]) == 60_000


# Too many

def test_one_too_many_evicts_the_one_whose_request_began_first(server, monkeypatch):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 10)
    monkeypatch.setattr(connections, "GRACE_TIME", 0.0)
    silent = []
    for number in range(30):
        silent.append(connect(server.port))
        if number < 10:
            wait_until(lambda: unfinished(server) == number + 1)
        else:
            assert silent[number - 10].recv(1) == b""       # the oldest, at once
    silent[-10].sendall(GET)
    assert silent[-10].recv(100).startswith(b"HTTP/1.1 200 OK")
    for sock in silent:
        sock.close()


def test_an_idle_connection_makes_room_before_a_request_that_is_older(open_server, monkeypatch):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 2)
    with connect(open_server.port) as half, connect(open_server.port) as kept:
        half.sendall(GET[:10])
        kept.sendall(POST + b"hello")
        assert kept.recv(1000).startswith(b"HTTP/1.1 200 ")
        wait_until(lambda: unfinished(open_server) == 2)
        with connect(open_server.port):
            assert kept.recv(1) == b""
            half.sendall(GET[10:])
            assert half.recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_connection_that_lingers_makes_room_before_a_request_that_is_older(server, monkeypatch):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(connections, "LINGER_TIME", PATIENCE)
    with connect(server.port) as half, connect(server.port) as refused:
        half.sendall(GET[:10])
        refused.sendall(b"GET /" + b"a" * (http1.MAX_LINE + 1))
        assert refused.recv(1000).startswith(b"HTTP/1.1 414 ")
        wait_until(lambda: server._connections._idle)
        with connect(server.port):
            wait_until(lambda: not server._connections._idle)
            half.sendall(GET[10:])
            assert half.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("more", [b"", POST + b"hello"], ids=["one by one", "at once"])
def test_a_kept_connection_is_as_old_as_its_last_request(open_server, monkeypatch, more):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(connections, "GRACE_TIME", 0.0)
    with connect(open_server.port) as used:
        used.sendall(POST + b"hello")
        assert used.recv(1000).startswith(b"HTTP/1.1 200 ")
        with connect(open_server.port) as half:
            half.sendall(GET[:10])
            both = open_server._connections
            wait_until(lambda: len(both._busy) == len(both._idle) == 1)
            used.sendall(POST + b"hello" + more + POST[:10])
            assert used.recv(1000).startswith(b"HTTP/1.1 200 ")
            wait_until(lambda: len(both._busy) == 2)
            with connect(open_server.port):
                assert half.recv(1) == b""
                used.sendall(POST[10:] + b"hello")
                wait_until(lambda: open_server.stats()["events"] == 3 + bool(more))


def test_no_connection_is_evicted_before_a_time_of_grace(server, monkeypatch):
    """So that an honest crowd gets in, which has sent all but what it is about to."""
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 1)
    monkeypatch.setattr(connections, "GRACE_TIME", 0.5)
    began = time.monotonic()
    with connect(server.port) as first, connect(server.port) as second:
        assert first.recv(1) == b"" and 0.5 <= time.monotonic() - began < 5
        second.sendall(GET)
        assert second.recv(100).startswith(b"HTTP/1.1 200 ")


def test_there_is_no_grace_while_too_many_wait(server, monkeypatch):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 1)
    monkeypatch.setattr(connections, "GRACE_TIME", 2 * PATIENCE)
    monkeypatch.setattr(connections, "GRACE_NEWCOMERS", 1)
    with connect(server.port) as first:
        wait_until(lambda: unfinished(server) == 1)
        with connect(server.port), connect(server.port):
            assert first.recv(1) == b""


def test_sockets_that_nobody_takes_over_are_bounded(monkeypatch):
    """As they are when the thread is behind: the accept loop waits for nobody."""
    monkeypatch.setattr(connections, "MAX_NEWCOMERS", 2)
    behind = Connections(None, lambda *_: True, None,
                         lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    pairs = [socket.socketpair() for _ in range(4)]
    for ours, _ in pairs:
        behind.take(ours, "")
    peers = [peer for _, peer in pairs]
    assert [peer.recv(1) for peer in peers[2:]] == [b"", b""]
    peers[0].settimeout(0.0)
    with pytest.raises(BlockingIOError):
        peers[0].recv(1)
    behind.close()
    assert [peer.recv(1) for peer in peers[:2]] == [b"", b""]
    behind.close()      # again, as after a bind that failed
    for peer in peers:
        peer.close()


def test_bodies_under_way_are_bounded_in_all(monkeypatch, open_server):
    monkeypatch.setattr(connections, "MAX_BODIES", 3000)
    held = lambda: open_server._connections._held       # noqa: E731
    head = get(f"/{PUBLISH_TOKEN}", "Content-Length: 2000", method="POST")
    with connect(open_server.port) as one, connect(open_server.port) as two:
        one.sendall(head + b"x" * 1900)
        wait_until(lambda: held() == 1900)
        two.sendall(head + b"x" * 1900)
        answer = two.recv(1000)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"too many bodies" in answer
        with connect(open_server.port) as last:
            last.sendall(head + b"x" * 1100)        # there is room for as much
            wait_until(lambda: held() == 3000)
        wait_until(lambda: held() == 1900)
        one.sendall(b"x" * 100)
        assert one.recv(1000).startswith(b"HTTP/1.1 200 ")
        assert post(open_server.port, body=b"x" * 2000).startswith(b"HTTP/1.1 200 ")
        wait_until(lambda: held() == 0)


# What may block

class Gate:
    """An `authorize` that returns when it is told to."""

    def __init__(self) -> None:
        self.asked = []
        self.opened = threading.Event()

    def __call__(self, request) -> bool:
        self.asked.append(request.path)
        return self.opened.wait(PATIENCE)


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
def gated(gate, monkeypatch):
    """A server with two threads for its `authorize`."""
    monkeypatch.setattr(connections, "MAX_THREADS", 2)
    with SSEServer(port=0, authorize=gate, publish_tokens=[PUBLISH_TOKEN]) as server:
        yield server
        gate.opened.set()


def send_many(server, number: int, request: bytes = GET) -> list:
    """Make connections that ask for something, one after the other."""
    socks = []
    for _ in range(number):
        socks.append(connect(server.port))
        socks[-1].sendall(request)
    return socks


def count_turns(server) -> list:
    """Return a list that grows with each turn of the thread that serves all connections."""
    turns, mine = [], server._connections
    select = mine._selector.select

    def counted(timeout):
        turns.append(timeout)
        return select(timeout)
    mine._selector.select = counted
    mine._wakeup.wake()
    wait_until(lambda: turns)
    turns.clear()
    return turns


def test_requests_wait_for_a_thread_while_all_others_are_answered(gated, gate):
    crowd = send_many(gated, 6)
    wait_until(lambda: len(gate.asked) == 2 and unfinished(gated) == 6)
    for request, end in ((get("/-/health"), b"ok\n"), (get("/", "Accept: text/html"), b"</html>\n"),
                         (get("/", method="OPTIONS"), b"\r\n\r\n")):
        assert ask(gated.port, request).endswith(end)
    assert post(gated.port).startswith(b"HTTP/1.1 200 ")
    assert len(gate.asked) == request_threads() == 2
    gate.opened.set()
    for sock in crowd:
        assert sock.recv(100).startswith(b"HTTP/1.1 200 ")
        sock.close()
    assert request_threads() == 2


def test_a_client_that_gets_no_thread_in_time_is_asked_to_come_back(gated, gate, monkeypatch):
    monkeypatch.setattr(connections, "PLACE_TIME", 0.3)
    at_work = send_many(gated, 2)
    wait_until(lambda: len(gate.asked) == 2)
    answer = ask(gated.port, get("/", "Accept: */*"))
    assert answer.startswith(b"HTTP/1.1 503 ") and b"\r\nRetry-After: " in answer
    with Client(gated.port, EVENT_SOURCE) as client:
        stream = client.read_to_end()
        assert stream.status == 200 and stream.retries and stream.ended
    gate.opened.set()
    for sock in at_work:        # these had a thread, and so all the time they need
        assert sock.recv(100).startswith(b"HTTP/1.1 200 ")
        sock.close()
    assert len(gate.asked) == 2
    assert gated.stats()["refused"] == {"503": 2}


def test_a_job_is_dropped_with_its_connection(gated, gate, monkeypatch):
    """Nobody is asked about a request whose connection has gone, and no answer is lost on it."""
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 3)
    monkeypatch.setattr(connections, "GRACE_TIME", 0.1)
    crowd = send_many(gated, 3)
    wait_until(lambda: len(gate.asked) == 2 and unfinished(gated) == 3)
    newer = send_many(gated, 3, get("/newer"))
    for sock in crowd:
        with suppress(ConnectionResetError):        # its request was not read to its end
            assert sock.recv(1) == b""
        sock.close()
    gate.opened.set()
    for sock in newer:
        assert sock.recv(100).startswith(b"HTTP/1.1 200 ")
        sock.close()
    assert sorted(gate.asked) == ["/newer"] * 3 + ["/token"] * 2


def test_bytes_that_come_during_a_job_are_read_after_it(gated, gate):
    """And costs nothing meanwhile: a socket that stays readable would spin."""
    with Client(gated.port, GET[:10]) as client:
        wait_until(lambda: unfinished(gated))       # it is waited for
        client.sock.sendall(GET[10:])
        wait_until(lambda: gate.asked)
        client.sock.sendall(b"what it should not send")
        turns = count_turns(gated)
        time.sleep(0.3)         # the time over which the cost is measured
        assert len(turns) < 5
        gate.opened.set()
        client.open()
        gated.publish("still there")
        assert client.read_until_data("still there")


def test_a_system_that_gives_no_more_threads_is_survived(gated, gate, monkeypatch):
    gate.opened.set()

    def fail(self):
        raise RuntimeError("can't start new thread")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with connect(gated.port) as waiting:
            waiting.sendall(GET)
            wait_until(lambda: unfinished(gated) == 1)
            assert ask(gated.port, get("/-/health")).endswith(b"ok\n")
            patch.undo()
            with Client(gated.port) as client:
                client.open()
            assert waiting.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("error", [SystemExit(), KeyError("x"), ConnectionResetError("x")])
def test_an_authorize_that_raises_costs_its_request_alone(caplog, error):
    def authorize(_):
        raise error
    with SSEServer(port=0, authorize=authorize) as server:
        for _ in range(3):
            assert ask(server.port, get()).startswith(b"HTTP/1.1 500 ")
        with Client(server.port, EVENT_SOURCE) as client:
            assert client.read_to_end().status == 200 and client.stream.retries
        assert ask(server.port, get("/-/health")).endswith(b"ok\n")
        assert server.stats()["refused"] == {"500": 4} and request_threads()
    assert caplog.text.count("could not be answered") == 4 and type(error).__name__ in caplog.text


def test_a_post_that_would_wait_for_the_publisher_does_so_elsewhere(monkeypatch):
    """The thread that serves all connections goes on, and so does the post in the end."""
    release = threading.Event()
    with SSEServer(port=0, history=0, publish_tokens=[PUBLISH_TOKEN]) as server:
        fan_out = server._publisher._fan_out

        def wait(run):
            assert release.wait(PATIENCE)
            fan_out(run)
        monkeypatch.setattr(server._publisher, "_fan_out", wait)
        with connect(server.port) as kept:
            kept.sendall((POST + b"hello") * 100)
            wait_until(request_threads)
            assert ask(server.port, get("/-/health")).endswith(b"ok\n")
            release.set()
            answers = b""
            while answers.count(b"HTTP/1.1 200 ") < 100:
                answers += kept.recv(65536)


def test_posts_wait_for_a_file_without_a_thread_each(tmp_path):
    path = tmp_path / "events.db"
    with SSEServer(port=0, history_file=path, publish_tokens=[PUBLISH_TOKEN]) as server, \
            closing(sqlite3.connect(path, isolation_level=None)) as holder:
        wait_until(lambda: server._store_hub.loaded.is_set())
        holder.execute("begin immediate")
        crowd = send_many(server, 20, POST + b"hello")
        wait_until(lambda: unfinished(server) == 20)
        for _ in range(3):
            assert ask(server.port, get("/-/status")).startswith(b"HTTP/1.1 200 ")
        assert not request_threads() and server.stats()["events"] == 0
        holder.execute("rollback")
        for sock in crowd:
            assert sock.recv(1000).startswith(b"HTTP/1.1 200 ")
            sock.close()


@pytest.fixture
def behind(tmp_path):
    """A server on a history file that never says it has all of it; its file, and an id to come."""
    path, ms = tmp_path / "events.db", int(time.time() * 1000) + 60_000
    with SSEServer(port=0, history_file=path) as server:
        wait_until(lambda: server._store_hub.loaded.is_set())
        server._store_hub.complete = lambda at: None
        yield server, path, ms


def test_a_client_whose_id_has_not_come_back_from_the_store_waits_for_it(behind, monkeypatch):
    server, path, ms = behind
    monkeypatch.setattr(connections, "STORE_TIME", PATIENCE)
    with Client(server.port, get("/", f"Last-Event-ID: {ms}-0"), last_id=f"{ms}-0") as client:
        wait_until(lambda: unfinished(server) == 1)
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            for number, text in enumerate(("its own", "the next")):
                other.execute("insert into event values (?, ?, null, null, ?)",
                              (ms, number, text))
        assert [event.data for event in client.read_until_data("the next")] == ["the next"]
    assert not request_threads()


def test_a_client_whose_id_does_not_come_in_time_is_asked_to_come_back(behind, monkeypatch):
    server, _, ms = behind
    monkeypatch.setattr(connections, "STORE_TIME", 0.2)
    turns = count_turns(server)
    began = time.monotonic()
    with Client(server.port, get("/", "Accept: text/event-stream", f"Last-Event-ID: {ms}-0"),
                last_id=f"{ms}-0") as client:
        events = client.read_to_end().events
    assert len(turns) < 20          # it is not asked for all the time
    assert [event.name for event in events] == ["busy"] and time.monotonic() - began >= 0.2
    assert ask(server.port, get("/", f"Last-Event-ID: {ms}-0")).startswith(b"HTTP/1.1 503 ")
    with Client(server.port) as new:
        new.open()


@pytest.mark.parametrize("name, body, status", [
    ("", b"\xff", 400), ("?event=gap", b"hello", 400), ("?channel=", b"hello", 400)])
def test_an_event_that_cannot_be_is_refused_by_a_store_too(tmp_path, name, body, status):
    with SSEServer(port=0, history_file=tmp_path / "events.db",
                   publish_tokens=[PUBLISH_TOKEN]) as server:
        answer = post(server.port, f"/{PUBLISH_TOKEN}{name}", body)
        assert answer.startswith(b"HTTP/1.1 %d " % status)


def test_a_pool_begins_no_more_threads_than_it_needs_and_forgets_what_is_cancelled():
    pool, release, ran = Pool(2), threading.Event(), []
    before = request_threads()
    assert pool.submit(lambda: 7).result(PATIENCE) == 7
    wait_until(lambda: pool._idle == 1)
    assert pool.submit(lambda: 8).result(PATIENCE) == 8 and request_threads() == before + 1
    running = [pool.submit(lambda: release.wait(PATIENCE)) for _ in range(2)]
    wait_until(lambda: all(each.running() for each in running))
    waiting = [pool.submit(lambda number=number: ran.append(number)) for number in range(3)]
    assert waiting[1].cancel() and len(pool._line) == 2 and not running[0].cancel()
    release.set()
    assert waiting[2].result(PATIENCE) is None and request_threads() == before + 2
    wait_until(lambda: ran == [0, 2])
    pool.stop(time.monotonic() + PATIENCE)
    assert request_threads() == before


# Its end

@pytest.mark.parametrize("request_, status", [
    (b"X\r\n\r\n", 400), (get("/-/what"), 404), (POST + b"\xff" * 5, 400)])
def test_a_refused_request_that_wholly_came_is_not_lingered_for(open_server, monkeypatch, request_,
                                                                status):
    monkeypatch.setattr(connections, "LINGER_TIME", 2 * PATIENCE)
    with connect(open_server.port) as sock:
        sock.sendall(request_)
        assert sock.recv(1000).startswith(b"HTTP/1.1 %d " % status)
        # With the peer still there.
        wait_until(lambda: not unfinished(open_server))


@pytest.mark.parametrize("request_, status", [
    (b"GET /" + b"a" * http1.MAX_LINE, 414), (POST.replace(b"SECRET", b"wrong"), 401)])
def test_a_client_refused_while_it_sends_may_go_on_for_a_while(open_server, monkeypatch, request_,
                                                               status):
    """To close would reset the connection, and could lose the answer."""
    monkeypatch.setattr(connections, "LINGER_TIME", 2 * PATIENCE)
    with connect(open_server.port) as sock:
        sock.sendall(request_)
        assert sock.recv(1000).startswith(b"HTTP/1.1 %d " % status) and sock.recv(1000) == b""
        until = time.monotonic() + 0.25
        wait_until(lambda: sock.send(b"a") and time.monotonic() > until)
    wait_until(lambda: not unfinished(open_server))


def test_a_client_that_is_refused_and_sends_without_end_is_cut(server, monkeypatch):
    monkeypatch.setattr(connections, "LINGER_TIME", 0.2)
    with connect(server.port) as sock, pytest.raises(OSError):
        sock.sendall(b"GET /" + b"a" * http1.MAX_LINE)
        wait_until(lambda: not sock.send(b"a"))


def test_a_fault_of_a_connection_costs_that_connection_alone(server, monkeypatch, caplog):
    def fault(*_):
        raise ZeroDivisionError("a fault")
    with monkeypatch.context() as patch:
        patch.setattr(server._connections.answers, "refuse", fault)
        with connect(server.port) as sock, suppress(ConnectionResetError):
            sock.sendall(b"GET /" + b"a" * (http1.MAX_LINE + 1))
            assert sock.recv(1000) == b""
    wait_until(lambda: caplog.text.count("a fault ended a connection") == 1)
    assert ask(server.port, get("/-/health")).endswith(b"ok\n")


def test_an_error_in_a_logging_handler_costs_one_connection_alone(server):
    class Naive(logging.Handler):
        def emit(self, record):
            raise ZeroDivisionError("a fault of the handler's own")
    logger, handler = logging.getLogger("sse_server"), Naive()
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    try:
        with connect(server.port) as refused, suppress(ConnectionResetError):
            refused.sendall(b"GET /" + b"a" * (http1.MAX_LINE + 1))
            assert refused.recv(1000) == b""
        sock = connect(server.port)
        sock.sendall(GET[:10])
        wait_until(lambda: unfinished(server) == 1)
        reset(sock)
        wait_until(lambda: not unfinished(server))
        assert ask(server.port, get("/-/health")).endswith(b"ok\n")
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_all_connections_are_closed_when_their_thread_ends_by_a_fault(monkeypatch, caplog):
    def fault(_):
        raise ZeroDivisionError("a fault of the thread")
    with suppress(RuntimeError), SSEServer(port=0) as server, connect(server.port) as silent:
        wait_until(lambda: unfinished(server))
        monkeypatch.setattr(server._connections, "_look_for_deadlines", fault)
        server._connections._look_at = 0.0
        connect(server.port).close()
        assert silent.recv(1) == b""
        wait_until(lambda: server._hub.fault)
    assert "a fault ended the thread connections" in caplog.text


def test_no_connection_costs_a_thread(server):
    crowd = [connect(server.port) for _ in range(50)]
    wait_until(lambda: unfinished(server) == 50)
    names = sorted(thread.name for thread in threading.enumerate())
    assert {name for name in names if not name.startswith("MainThread")} == {
        "accept", "connections", "publisher"}, names
    for sock in crowd:
        sock.close()


def test_waiting_costs_nothing(server):
    """Nobody looks for deadlines before there is one."""
    with connect(server.port):
        wait_until(lambda: unfinished(server))
        turns = count_turns(server)
        time.sleep(0.3)         # the time over which the cost is measured
        assert not turns
