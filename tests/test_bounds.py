"""What one peer can cost: every bound is hit once."""
import errno
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

import sse_server
from helpers import (GET, PATIENCE, PUBLISH_TOKEN, TOP, Client, ask, connect, get, handshakes, post,
                     wait_until)
from sse_core import frames, handshake, http1
from sse_server import SSEServer

POST = get(f"/{PUBLISH_TOKEN}", "Content-Length: 5", method="POST")


def test_the_oldest_unfinished_request_makes_room(server, monkeypatch):
    monkeypatch.setattr(handshake, "MAX_HANDSHAKES", 10)
    monkeypatch.setattr(handshake, "MOMENT", 0.0)
    silent = []
    for number in range(30):
        silent.append(connect(server.port))
        if number < 10:
            wait_until(lambda: handshakes() == number + 1)
            waiting = server._handshakes._unfinished
            wait_until(lambda: all(each.safe_until < math.inf for each in [*waiting]))
        else:
            assert silent[number - 10].recv(1) == b""       # the oldest, at once
    silent[-1].sendall(GET)
    assert silent[-1].recv(100).startswith(b"HTTP/1.1 200 OK")
    for sock in silent:
        sock.close()


def test_a_request_in_two_pieces_gets_in_while_a_crowd_of_others_keeps_coming_back(
        server, monkeypatch):
    """Whose request came a moment after its connection was cut first, each time."""
    monkeypatch.setattr(handshake, "MAX_HANDSHAKES", 8)
    stopping = threading.Event()

    def come_back():
        while not stopping.is_set():
            with connect(server.port) as sock:
                sock.sendall(GET[:9])
                sock.settimeout(0.01)
                while not stopping.is_set():
                    with suppress(socket.timeout):
                        if not sock.recv(1):
                            break
    crowd = [threading.Thread(target=come_back) for _ in range(12)]
    for each in crowd:
        each.start()
    try:
        wait_until(lambda: handshakes() == 8)
        for _ in range(5):
            with Client(server.port, GET[:5]) as client:
                time.sleep(handshake.MOMENT / 4)        # the time that the rest is on its way
                client.sock.sendall(GET[5:])
                assert client.open().stream.status == 200
    finally:
        stopping.set()
        for each in crowd:
            each.join()


def test_a_dribbling_request_is_cut_by_the_total(server, monkeypatch):
    monkeypatch.setattr(handshake, "HEAD_TIME", 0.5)
    began = time.monotonic()
    with connect(server.port) as sock:
        answer = b""
        sock.settimeout(0.02)
        while not answer:
            sock.send(b"G")
            try:
                answer = sock.recv(1000)
            except socket.timeout:
                assert time.monotonic() - began < 5
    assert answer.startswith(b"HTTP/1.1 408 ") and time.monotonic() - began >= 0.5


def can_be_cut(unfinished) -> bool:
    return all(each.safe_until <= time.monotonic() for each in [*unfinished])


def test_who_was_refused_or_sent_nothing_makes_room_before_the_oldest(server, monkeypatch):
    monkeypatch.setattr(handshake, "MAX_HANDSHAKES", 2)
    unfinished = server._handshakes._unfinished
    with connect(server.port) as half:
        wait_until(handshakes)      # so its thread receives it
        half.sendall(GET[:10])
        wait_until(lambda: not any(each.goes_first for each in [*unfinished]))
    with connect(server.port) as half, connect(server.port) as silent:
        half.sendall(GET[:10])
        wait_until(lambda: [each.goes_first for each in [*unfinished]] == [False, True])
        wait_until(lambda: can_be_cut(unfinished))
        with connect(server.port) as refused:
            assert silent.recv(1) == b""
            refused.sendall(b"GET /" + b"a" * http1.MAX_LINE)
            assert refused.recv(1000).startswith(b"HTTP/1.1 414 ")
            lingering = [*unfinished][1]
            wait_until(lambda: can_be_cut([lingering]))
            with connect(server.port):
                wait_until(lambda: lingering not in unfinished)
                half.sendall(GET[10:])
                assert half.recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_connection_that_was_kept_is_as_old_as_its_last_request(open_server, monkeypatch):
    monkeypatch.setattr(handshake, "MAX_HANDSHAKES", 2)
    unfinished = open_server._handshakes._unfinished

    def publish():
        used.sendall(POST + b"hello")
        assert used.recv(1000).startswith(b"HTTP/1.1 200 ")
    with connect(open_server.port) as used:
        publish()
        mine, = [*unfinished]
        with connect(open_server.port) as half:
            half.sendall(GET[:10])
            wait_until(lambda: [each.goes_first for each in [*unfinished]] == [False, False])
            publish()
            wait_until(lambda: [*unfinished][-1] is mine and can_be_cut(unfinished))
            with connect(open_server.port):
                assert half.recv(1) == b""
                publish()


def test_a_connection_that_was_kept_makes_room_too(open_server, monkeypatch):
    monkeypatch.setattr(handshake, "MAX_HANDSHAKES", 1)
    with connect(open_server.port) as kept:
        kept.sendall(POST + b"hello")
        assert kept.recv(1000).startswith(b"HTTP/1.1 200 ")
        with Client(open_server.port, b"") as client:
            assert kept.recv(1) == b""
            client.sock.sendall(GET)
            client.open()


def test_a_request_whose_time_is_up_is_read_no_further(open_server, monkeypatch):
    """Though more of it is there: so a peer that never pauses gets no more time than others."""
    monkeypatch.setattr(handshake, "HEAD_TIME", 0.0)
    body = b"x" * (2 * http1.MAX_HEAD)
    assert post(open_server.port, body=body).startswith(b"HTTP/1.1 408 ")


def test_a_peer_that_does_not_take_its_answer_is_cut(open_server, monkeypatch):
    monkeypatch.setattr(handshake, "LINGER_TIME", 0.2)
    body = b'{"data": ""}\n' * 60_000
    head = get(f"/{PUBLISH_TOKEN}", f"Content-Length: {len(body)}",
               "Content-Type: application/x-ndjson", method="POST")
    with Client(open_server.port, head + body, receive_buffer=4096):
        wait_until(handshakes)
        wait_until(lambda: open_server.figures()["events"] == 60_000)
        wait_until(lambda: not handshakes(), timeout=handshake.HEAD_TIME / 2)


def test_who_takes_a_long_answer_gets_all_of_it(open_server):
    body = b'{"data": ""}\n' * 60_000
    answer = post(open_server.port, f"/{PUBLISH_TOKEN}", body, "Connection: close",
                  "Content-Type: application/x-ndjson")
    head, _, text = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ") and len(json.loads(text)["ids"]) == 60_000


def test_more_than_max_clients_are_refused_and_later_taken():
    with SSEServer(port=0, max_clients=2) as server, \
            Client(server.port) as one, Client(server.port) as two:
        one.open(), two.open()
        answer = ask(server.port, GET)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"\r\nRetry-After: " in answer
        one.close()
        wait_until(lambda: server.clients == 1)
        with Client(server.port) as three:
            assert three.open().stream.status == 200


@pytest.mark.parametrize("jitter, pause", [(0.5, 10000), (1.0, 20000), (1.5, 30000)])
def test_an_event_source_over_max_clients_is_told_to_come_back_ten_times_later(
        monkeypatch, jitter, pause):
    """A 503 would make a browser's EventSource give up for good."""
    def uniform(low, high):
        assert (low, high) == (0.5, 1.5)
        return jitter
    monkeypatch.setattr(frames.random, "uniform", uniform)
    request = GET.replace(b"Host", b"Accept: text/event-stream\r\nHost")
    with SSEServer(port=0, max_clients=0, retry=2.0) as server:
        with Client(server.port, request) as client:
            stream = client.read_to_end()
            assert stream.status == 200 and stream.ended and stream.retries == [pause]
            assert stream.events == [("busy", f'{{"retry": {pause // 1000}}}', "")]
        with Client(server.port, request.replace(b"HTTP/1.1", b"HTTP/1.0")) as client:
            assert client.read_to_end().retries and client.stream.partial == b""


def test_the_kernel_holds_little_for_a_stalled_client(server):
    with Client(server.port, receive_buffer=4096) as deaf, Client(server.port) as reader:
        deaf.open(), reader.open()
        wait_until(lambda: server.clients == 2)
        registered = next(iter(server._broadcast.clients._all)).sock
        buffer = registered.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        assert buffer == 128 << 10 if sys.platform == "linux" else 64 << 10    # it doubles it
        assert registered.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not registered.getblocking()
        for number in range(100):
            server.publish("x" * 100000)
            reader.read_events(number + 1)
        lagging, = server._broadcast.clients.lagging
        assert lagging.cursor <= 4      # of 100 frames of 100 kB, so 400 kB is all that it was sent


def test_a_head_full_of_spaces_costs_linear_time():
    """One such head once stopped the process for a second: a field pattern with two stars."""
    def cost(size):
        head = b"GET / HTTP/1.1\r\nHost: x\r\nX: a" + b" " * size + b"b\r\n\r\n"
        best = 1.0
        for _ in range(5):
            began = time.perf_counter()
            assert http1.parse(head)
            best = min(best, time.perf_counter() - began)
        return best
    assert cost(16000) < 0.02


def test_a_head_that_arrives_a_byte_at_a_time_costs_linear_time():
    head = b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * 90 + b"Y: " + b"z" * 15000 + b"\r\n\r\n"
    began = time.process_time()
    seen = 0
    for length in range(1, len(head)):
        assert http1.parse(head[:length], seen) is None
        seen = length
    assert http1.parse(head, seen)
    assert time.process_time() - began < 1.0    # it was 3.5 s when every byte looked at all again


def test_a_system_that_gives_no_more_threads_is_survived(server, monkeypatch):
    """The accept loop goes on when it gives some again."""
    def fail(self):
        raise RuntimeError("can't start new thread")
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with connect(server.port) as silent:
            assert silent.recv(1) == b""
        with Client(server.port) as whole:
            whole.sock.settimeout(2)
            try:
                whole.open()
            except (AssertionError, ConnectionResetError):      # its request came after accept
                pass
    with Client(server.port, b"") as slow:
        slow.sock.sendall(GET[:10])
        slow.sock.sendall(GET[10:])
        assert slow.open().stream.status == 200


OUT_OF_DESCRIPTORS = """
import resource, sys, threading, time
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
sys.path.insert(0, sys.argv[1])
import logging
logging.basicConfig()
from sse_server import SSEServer
with SSEServer(port=0) as server:
    print(server.port, flush=True)
    while True:
        line = sys.stdin.readline()
        if not line:
            break
        server.publish(line.strip())
        print(time.process_time(), flush=True)
"""


def test_out_of_descriptors_pauses_warns_once_serves_on_and_recovers():
    process = subprocess.Popen([sys.executable, "-c", OUT_OF_DESCRIPTORS, str(TOP)], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)

    def publish(text):
        process.stdin.write(text + "\n")
        process.stdin.flush()
        return float(process.stdout.readline())
    with process:
        port = int(process.stdout.readline())
        with Client(port) as client:
            client.open()
            crowd = [connect(port) for _ in range(100)]
            for sock in crowd:
                sock.sendall(GET)
            before = publish("one")
            assert client.read_events(1)[0].data == "one"
            time.sleep(0.5)         # the time over which the cost of waiting is measured
            assert publish("two") - before < 0.05
            assert client.read_events(2)[1].data == "two"
            for sock in crowd:
                sock.close()
            with Client(port) as late:
                late.open()
                publish("three")
                late.read_until(lambda stream: stream.events)
        process.stdin.close()
        errors = process.stderr.read()
        assert process.wait(PATIENCE) == 0
    assert errors.count("\n") == 1 and "cannot accept (Too many open files)" in errors


@pytest.mark.parametrize("number, warned, paused", [
    (errno.ECONNABORTED, 0, False), (errno.ENFILE, 1, True), (errno.EMFILE, 1, True)])
def test_a_connection_that_was_given_up_is_no_trouble_of_ours(server, caplog, number, warned,
                                                             paused):
    began = time.monotonic()
    server._accept_failed(OSError(number, "it failed"))
    assert (time.monotonic() - began >= sse_server.ACCEPT_PAUSE) == paused
    assert caplog.text.count("cannot accept") == warned
    caplog.clear()
    server.stop()
    server._accept_failed(OSError(number, "it was shut down"))
    assert not caplog.records


@pytest.mark.skipif(not os.path.exists("/proc/sys/net/core/somaxconn"), reason="not Linux")
def test_the_backlog_is_1024_or_what_the_system_allows():
    server = SSEServer(port=0)
    try:
        state = subprocess.run(["ss", "-ltn", f"sport = :{server.port}"],
                               capture_output=True, text=True).stdout
        allowed = int(Path("/proc/sys/net/core/somaxconn").read_text())
        assert str(min(1024, allowed)) in state.split()
    except FileNotFoundError:
        pytest.skip("ss is not installed")
    finally:
        server.stop()


def test_only_so_many_requests_are_thought_about_at_a_time(monkeypatch):
    """`authorize` may take for ever: the others get a 503, and whoever needs none is served."""
    monkeypatch.setattr(handshake, "MAX_AT_WORK", 2)
    release, at_work = threading.Event(), []

    def authorize(request):
        at_work.append(request)
        return release.wait(PATIENCE)
    with SSEServer(port=0, authorize=authorize) as server:
        slow = [connect(server.port) for _ in range(2)]
        for sock in slow:
            sock.sendall(GET)
        wait_until(lambda: len(at_work) == 2)       # else the third could be one of two
        wait_until(lambda: ask(server.port, GET).startswith(b"HTTP/1.1 503 "))
        began = time.monotonic()
        answer = ask(server.port, GET)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"\r\nRetry-After: " in answer
        assert time.monotonic() - began < 1
        release.set()
        for sock in slow:
            assert sock.recv(100).startswith(b"HTTP/1.1 200 ")
            sock.close()


def test_who_has_sent_what_we_had_no_time_to_read_is_not_cut():
    """Nor is the accept loop held up by the time that the socket has for its peer."""
    ours, peer = socket.socketpair()
    ours.settimeout(PATIENCE)
    slow = handshake.Handshake(ours, "", handshake.Handshakes(None, None, None))
    with peer:
        assert not slow.cut_if_idle(0.0)        # it cannot be cut yet
        slow.safe_until = 0.0
        peer.sendall(b"GET")
        assert not slow.cut_if_idle(0.0)
        assert ours.recv(3) == b"GET"
        began = time.monotonic()
        assert slow.cut_if_idle(0.0) and peer.recv(1) == b""
        assert time.monotonic() - began < 1
    slow.close()


def test_what_comes_when_the_time_is_up_is_not_received():
    """A TLS hello in records of a byte each, a millisecond apart at most, held on for minutes."""
    ours, peer = socket.socketpair()
    late = handshake.Handshake(ours, "", handshake.Handshakes(None, None, None))
    late._deadline = time.monotonic()
    with peer:
        peer.sendall(b"x")
        with pytest.raises(socket.timeout):
            late._patiently(lambda: ours.recv(1))
    late.close()


def test_who_is_sent_100_continue_has_not_been_answered():
    ours, peer = socket.socketpair()
    slow = handshake.Handshake(ours, "", handshake.Handshakes(None, None, None))
    with peer:
        slow._send(b"HTTP/1.1 100 Continue\r\n\r\n")
        slow.safe_until = 0.0
        peer.sendall(b"its body")
        assert not slow.cut_if_idle(0.0)
    slow.close()


def test_what_comes_while_one_is_cut_is_not_done():
    """It was published, and nobody was told."""
    ours, peer = socket.socketpair()
    slow = handshake.Handshake(ours, "", handshake.Handshakes(None, None, None))
    ends = []

    def receive():
        try:
            ends.append(slow._patiently(lambda: ours.recv(100)))
        except ConnectionAbortedError as error:
            ends.append(str(error))
    thread = threading.Thread(target=receive)
    with peer:
        with slow._lock:
            thread.start()
            wait_until(lambda: slow.safe_until < math.inf)
            peer.sendall(b"POST")
            thread.join(0.05)       # it has seen that, and waits for the lock
            slow.cut()
        thread.join()
    assert ends == ["it was cut"]
    slow.close()


def test_when_nobody_can_be_cut_newcomers_queue_and_then_are_closed(monkeypatch):
    monkeypatch.setattr(handshake, "MAX_HANDSHAKES", 2)
    monkeypatch.setattr(handshake, "MAX_QUEUE", 1)
    release = threading.Event()
    with SSEServer(port=0, authorize=lambda request: release.wait(PATIENCE)) as server:
        slow = [connect(server.port) for _ in range(2)]
        for sock in slow:
            sock.sendall(GET)
        wait_until(lambda: len(server._handshakes._unfinished) == 2 and all(
            each.safe_until > time.monotonic() for each in server._handshakes._unfinished))
        queued, closed = connect(server.port), connect(server.port)
        queued.sendall(GET)
        assert closed.recv(100) == b""          # at once: the accept loop waits for nobody
        release.set()
        for sock in (*slow, queued):
            assert sock.recv(100).startswith(b"HTTP/1.1 200 ")
            sock.close()
        closed.close()


def test_bodies_under_way_are_bounded_in_all(monkeypatch):
    monkeypatch.setattr(handshake, "MAX_BODIES", 3000)
    with SSEServer(port=0, publish_tokens=["t"]) as server:
        head = b"POST /t HTTP/1.1\r\nHost: x\r\nContent-Length: 2000\r\n\r\n"
        one, two = connect(server.port), connect(server.port)
        one.sendall(head + b"x" * 1900)
        wait_until(lambda: server._handshakes._held == 1900)
        two.sendall(head + b"x" * 1900)
        answer = two.recv(1000)
        assert answer.startswith(b"HTTP/1.1 503 ") and b"too many bodies" in answer
        with connect(server.port) as last:
            last.sendall(head + b"x" * 1100)        # there is room for as much
            wait_until(lambda: server._handshakes._held == 3000)
        wait_until(lambda: server._handshakes._held == 1900)
        one.sendall(b"x" * 100)
        assert one.recv(1000).startswith(b"HTTP/1.1 200 ")
        assert ask(server.port, head[:-4] + b"\r\nConnection: close\r\n\r\n" + b"x" * 2000
                   ).startswith(b"HTTP/1.1 200 ")
        assert server._handshakes._held == 0
        one.close(), two.close()


@pytest.mark.parametrize("request_, status", [
    (b"X\r\n\r\n", 400), (get("/-/what"), 404), (POST + b"\xff" * 5, 400)])
def test_a_refused_request_that_wholly_came_is_not_lingered_for(open_server, request_, status):
    with connect(open_server.port) as sock:
        sock.sendall(request_)
        assert sock.recv(1000).startswith(b"HTTP/1.1 %d " % status)
        wait_until(lambda: handshakes() == 0, timeout=0.5)      # with the peer still there
        began = time.monotonic()
        assert ask(open_server.port, get("/-/health")).endswith(b"ok\n")
        assert time.monotonic() - began < 0.5


@pytest.mark.parametrize("request_, status", [
    (b"GET /" + b"a" * http1.MAX_LINE, 414), (POST.replace(b"SECRET", b"wrong"), 401)])
def test_who_is_refused_while_it_sends_may_go_on_for_a_while(open_server, request_, status):
    """To close would reset the connection, and could lose the answer."""
    with connect(open_server.port) as sock:
        sock.sendall(request_)
        assert sock.recv(1000).startswith(b"HTTP/1.1 %d " % status) and sock.recv(1000) == b""
        until = time.monotonic() + handshake.LINGER_TIME / 4
        wait_until(lambda: sock.send(b"a") and time.monotonic() > until)
    wait_until(lambda: handshakes() == 0, timeout=handshake.LINGER_TIME / 4)


def test_who_is_refused_and_sends_without_end_is_cut(server, monkeypatch):
    monkeypatch.setattr(handshake, "LINGER_TIME", 0.2)
    with connect(server.port) as sock, pytest.raises(OSError):
        sock.sendall(b"GET /" + b"a" * http1.MAX_LINE)
        wait_until(lambda: not sock.send(b"a"))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_authorize_that_exits_costs_its_connection_alone(monkeypatch, caplog):
    monkeypatch.setattr(handshake, "MAX_HANDSHAKES", 2)
    with SSEServer(port=0, authorize=lambda request: sys.exit()) as server:
        for _ in range(5):
            assert ask(server.port, GET) == b""
        assert ask(server.port, get("/-/health")).endswith(b"ok\n")
        wait_until(lambda: handshakes() == 0)
    assert caplog.text.count("a fault ended a request") == 5
