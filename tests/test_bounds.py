"""What one peer can cost: every bound is hit once."""
import errno
import os
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Callable, Iterator

import pytest

import sse_server
from helpers import (GET, PATIENCE, PUBLISH_TOKEN, TOP, Client, ask, connect, get, post, serving,
                     wait_until)
from sse_core.engine import frames
from sse_core.http import http1
from sse_server import SSEServer


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
        registered = next(iter(server._hub.clients._all)).sock
        buffer = registered.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        assert buffer == 128 << 10 if sys.platform == "linux" else 64 << 10    # it doubles it
        assert registered.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert not registered.getblocking()
        for number in range(100):
            server.publish("x" * 100000)
            reader.read_events(number + 1)
        lagging, = server._hub.clients.lagging
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


OUT_OF_DESCRIPTORS = """
import os, resource, sys, threading, time
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
sys.path.insert(0, sys.argv[1])
import logging
logging.basicConfig()
from sse_server import SSEServer
with SSEServer(port=0) as server:
    held = []       # by the program for itself, all but a few
    try:
        while True:
            held.append(os.dup(0))
    except OSError:
        for each in held[:40]:
            os.close(each)
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


def limited(soft: int, hard: int) -> str:
    return f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))"


WATCH = get("/", "Accept: text/event-stream")
NO_CLOCK = ("--publish-token", PUBLISH_TOKEN)


def test_the_soft_limit_of_descriptors_is_raised_to_what_the_clients_need():
    """With the usual 1,024, and macOS's 256, nobody could connect after some 1,010 clients."""
    with serving(*NO_CLOCK, before=limited(64, 1024)) as server:
        clients = [Client(server.port).open() for _ in range(300)]
        assert all(client.stream.status == 200 for client in clients)
        for client in clients:
            client.close()
        server.stop()
        said, = server.close().splitlines()
    assert said.startswith("the limit of open files is enough for 960 clients, not for 10000: raise"
                           " it to 14200")
    with serving(*NO_CLOCK, "--max-clients", "500", before=limited(64, 6000)) as server:
        server.stop()
        assert server.close() == ""


def crowded(port: int, clients: int) -> None:
    """Fill a server that has descriptors for so many clients, and see it turn away the others."""
    inside = [Client(port, WATCH).open() for _ in range(clients)]
    assert all(client.stream.status == 200 and not client.closed for client in inside)
    for _ in range(30):
        stream = Client(port, WATCH)
        assert [event.name for event in stream.read_to_end().events] == ["busy"]
        stream.close()
    assert ask(port, GET).startswith(b"HTTP/1.1 503 ")
    # More that send nothing than there are descriptors: they make room for who asks
    silent = [connect(port) for _ in range(100)]
    assert ask(port, get("/-/health")).endswith(b"\r\n\r\nok\n")
    assert post(port).startswith(b"HTTP/1.1 200 ")
    for client in inside:
        client.read_until_data("hello")
    inside.pop().close()
    wait_until(lambda: re.search(rb"\nsse_clients %d\n" % len(inside),
                                 ask(port, get("/-/metrics"))))
    inside.append(Client(port, WATCH).open())
    for each in (*silent, *inside):
        each.close()


def test_clients_beyond_the_descriptors_are_turned_away_and_health_and_posts_are_answered():
    with serving(*NO_CLOCK, before=limited(64, 256)) as server:
        crowded(server.port, 208)
        server.stop()
        said, *_ = server.close().splitlines()
    assert said.startswith("the limit of open files is enough for 208 clients, not for 10000")


def test_a_program_keeps_descriptors_for_requests_too():
    program = f"""
import sys; sys.path.insert(0, {str(TOP)!r})
{limited(256, 256)}
from sse_server import SSEServer
with SSEServer(port=0, publish_tokens=[{PUBLISH_TOKEN!r}]) as server:
    print(server.port, flush=True)
    sys.stdin.readline()
"""
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:
        crowded(int(process.stdout.readline()), 208)
        process.communicate(b"\n", timeout=PATIENCE)
        assert process.returncode == 0


def test_connections_that_wait_make_room_for_clients_when_descriptors_run_short():
    with serving(*NO_CLOCK, before=limited(256, 256)) as server:
        silent = [connect(server.port) for _ in range(225)]
        clients = [Client(server.port).open() for _ in range(150)]
        assert all(client.stream.status == 200 for client in clients)
        assert post(server.port).startswith(b"HTTP/1.1 200 ")
        for client in clients:
            client.read_until_data("hello")
        for each in (*silent, *clients):
            each.close()


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


@contextmanager
def full_pipe(receive: Callable[[socket.socket], bytes]) -> Iterator[tuple]:
    """Pipe lines without end to a client, which takes them by `receive`.

    Yields the port, how many bytes it got, in a list, and what it got with a gap in it.
    """
    line, received, gaps, stopping = b"x" * 1000 + b"\n", [0], [], threading.Event()

    def feed():
        with suppress(BrokenPipeError):
            while not stopping.is_set():
                server.process.stdin.write(line * 100)

    def read():
        while not stopping.is_set():
            data = receive(reader.sock)
            received[0] += len(data)
            gaps.extend([data] * (b"event: gap" in data))
    with serving("--stdin") as server, Client(server.port) as reader:
        reader.open()
        threads = [threading.Thread(target=feed), threading.Thread(target=read)]
        for thread in threads:
            thread.start()
        try:
            yield server.port, received, gaps
        finally:
            stopping.set()
            server.process.kill()
            for thread in threads:
                thread.join()


def speeds(port: int, received: list, times: int) -> list:
    """Return the bytes a second that a client got beside each of some that read nothing."""
    found = []
    for _ in range(times):
        with Client(port, receive_buffer=4096):
            before = received[0]
            time.sleep(10)      # the time over which the speed is measured
            found.append((received[0] - before) / 10)
    return found


@pytest.mark.long
def test_a_peer_that_connects_anew_and_reads_nothing_leaves_a_pipe_half_of_its_speed():
    """It took a pipe from 135 MiB a second to 0.1; and the reader beside it misses nothing."""
    with full_pipe(lambda sock: sock.recv(1 << 20)) as (port, received, gaps):
        time.sleep(10)          # the time over which the speed is measured
        quiet = received[0] / 10
        attacked = speeds(port, received, 6)
    mean = sum(attacked) / len(attacked)
    print(f"{quiet / 2**20:.1f} MiB/s alone, {mean / 2**20:.1f} MiB/s beside such peers: "
          f"{[round(each / quiet, 2) for each in attacked]}")
    assert mean > quiet / 2 and not gaps


@pytest.mark.long
def test_a_slow_reader_that_keeps_the_pace_misses_nothing_beside_peers_that_read_nothing():
    began, had = time.monotonic(), 0

    def receive(sock: socket.socket) -> bytes:
        nonlocal had
        time.sleep(0.1)
        due = int((time.monotonic() - began) * 18_000) - had    # bytes, of 18 kB in each second
        data = sock.recv(due)
        had += len(data)
        return data
    with full_pipe(receive) as (port, received, gaps):
        assert min(speeds(port, received, 6)) > 17_000
    assert not gaps
