"""Where events come from: the lines of a pipe, through a real process, to their last."""
import errno
import json
import os
import selectors
import subprocess
import threading
import time

import pytest

from helpers import PATIENCE, Client, ask, get, serving, wait_until
from sse_core.cli import sources
from sse_core.engine import frames


def split(*pieces: bytes) -> list:
    splitter = sources.LineSplitter(frames.Event)
    events = [event for piece in pieces for event in splitter.feed(piece)]
    return [event.data for event in events + splitter.end()]


@pytest.mark.parametrize("data, lines", [
    (b"", []), (b"\n", [""]), (b"a", ["a"]), (b"a\n", ["a"]), (b"a\nb", ["a", "b"]),
    (b"a\r\nb\r\n", ["a", "b"]),
    (b"a\rb\n", ["a\rb"]), (b"\n\n", ["", ""]), ("é\u2028x\n".encode(), ["é\u2028x"]),
    (b"\xff\xfe\nok\n", ["\ufffd\ufffd", "ok"]), (b"a\0b\n", ["a\0b"])])
def test_lines_come_whole_and_a_byte_at_a_time_alike(data, lines, caplog):
    assert split(data) == lines
    assert split(*(data[index:index + 1] for index in range(len(data)))) == lines
    assert len(caplog.records) <= 2


MARK = b"\xef\xbb\xbf"


@pytest.mark.parametrize("data, lines", [
    (MARK + b"a\nb", ["a", "b"]), (MARK, []), (MARK + b"\n", [""]), (MARK[:2], ["\ufffd"]),
    (MARK * 2 + b"\n", ["\ufeff"]), (b"a\n" + MARK + b"b", ["a", "\ufeffb"]),
    (MARK + b"x" * frames.MAX_EVENT + b"\r\n", ["x" * frames.MAX_EVENT])])
def test_a_byte_order_mark_at_the_start_is_not_content(data, lines):
    assert split(data) == lines
    assert split(*(data[index:index + 1] for index in range(9)), data[9:]) == lines


def test_a_line_over_1_mib_is_left_out_and_the_next_is_unharmed(caplog):
    most = b"x" * frames.MAX_EVENT
    for end in (b"\n", b"\r\n"):
        assert split(most + end + b"next") == [most.decode(), "next"]
    caplog.clear()
    assert split(most + b"yy\n" + b"next") == ["next"]
    caplog.clear()
    data = most + b"y\n" + b"next\n" + most * 3 + b"\nlast"
    pieces = (data[index:index + 65536] for index in range(0, len(data), 65536))
    assert split(data) == split(*pieces) == ["next", "last"]
    assert [record.getMessage() for record in caplog.records] == [
        "standard input: lines that are no events are left out (first: line 1): it is longer than "
        "1048576 bytes"] * 2
    assert split(b"\xff" * 400_000 + b"\n", b"next\n") == ["next"]      # 1.2 MB as U+FFFD


def test_a_line_that_is_too_long_is_not_called_bad_utf_8_for_being_cut(caplog):
    assert split("é".encode() * frames.MAX_EVENT + b"\n") == []
    assert len(caplog.records) == 1 and "longer than" in caplog.text


def test_lines_over_1_mib_are_not_held_and_counted():
    splitter = sources.LineSplitter(frames.Event)
    for _ in range(2):
        for _ in range(40):
            assert not splitter.feed(b"x" * 65536)
            assert len(splitter._held) <= sources.MAX_LINE + 1
        assert not splitter.feed(b"\n")
    assert splitter.left_out == 2


def test_a_character_that_stands_for_what_is_not_utf_8_may_be_sent_itself(caplog):
    assert split("\ufffd\n".encode()) == ["\ufffd"] and not caplog.records


def test_a_pipe_is_served_to_the_end_and_then_it_stops():
    with serving("--stdin") as server:
        clients = [Client(server.port).open() for _ in range(3)]
        server.process.stdin.write(b"one\ntwo\r\n\xff\nlast")
        server.process.stdin.close()
        for client in clients:
            stream = client.read_to_end()
            assert [event.data for event in stream.events] == ["one", "two", "\ufffd", "last"]
            assert stream.ended
            client.close()
        assert server.process.wait(PATIENCE) == 0
        server.process.stdin = None
        assert server.close() == ("standard input: bytes that are not UTF-8 are published as "
                                  "U+FFFD (first: line 3)\n")


def test_lines_that_are_there_are_published_together(tmp_path):
    (tmp_path / "lines").write_bytes(b"x\n" * 30_000)
    batches = []
    with open(tmp_path / "lines", "rb") as file:
        sources.lines(lambda events, wait: batches.append(len(events)), threading.Event(),
                      file.fileno())
    assert sum(batches) == 30_000 and len(batches) <= 3


def test_a_signal_stops_a_pipe_that_is_open():
    with serving("--stdin") as server, Client(server.port) as client:
        client.open()
        server.process.stdin.write(b"one\n")
        server.process.stdin.flush()
        client.read_events(1)
        began = time.monotonic()
        assert server.stop(15) == 0 and client.read_to_end().ended
        assert time.monotonic() - began < 3


def test_a_source_that_cannot_be_read_is_at_its_end(caplog):
    descriptor = os.open(os.devnull, os.O_WRONLY)
    assert sources.lines(lambda events, wait: None, threading.Event(), descriptor) == 0
    os.close(descriptor)
    assert [record.getMessage() for record in caplog.records] == [
        f"standard input: {os.strerror(errno.EBADF)}; taken for its end"]


def test_a_pipe_that_is_silent_costs_nothing():
    read, write = os.pipe()
    stopping, spent = threading.Event(), []

    def run():
        sources.lines(lambda events, wait: None, stopping, read)
        spent.append(time.thread_time())
    thread = threading.Thread(target=run)
    thread.start()
    stopping.wait(0.5)          # the time over which the cost of waiting is measured
    stopping.set()
    thread.join()
    os.close(read), os.close(write)
    assert spent[0] < 0.05


def drain(clients: list, counts: dict) -> None:
    """Read all clients to their end, count events and check their order.

    Decoding strictly would take minutes.
    """
    selector = selectors.DefaultSelector()
    tails = {}
    for client in clients:
        selector.register(client.sock, selectors.EVENT_READ, client)
        counts[client], tails[client] = 0, client.stream.partial
    while selector.get_map():
        for key, _ in selector.select(PATIENCE):
            data = key.fileobj.recv(1 << 18)
            if not data:
                selector.unregister(key.fileobj)
                continue
            data = tails[key.data] + data
            whole = data.rfind(b"\n\n\r\n") + 4
            tails[key.data] = data[whole:] if whole > 3 else data
            for part in data[:max(whole, 0) if whole > 3 else 0].split(b"data: ")[1:]:
                if part[:1].isdigit():
                    counts[key.data] += 1
                    if counts[key.data] != int(part[:part.index(b"\n")]):
                        raise AssertionError(f"{part[:20]!r} after {counts[key.data] - 1} events")
    selector.close()


def lagging(port: int) -> int:
    return json.loads(ask(port, get("/-/status")).partition(b"\r\n\r\n")[2])["lagging"]


def memory(process: subprocess.Popen) -> int:
    """Return the KiB of memory that a process has."""
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(process.pid)], capture_output=True)
    return int(done.stdout)


# So that a client that does not read is given up after 2 s, and not after 9
SHORT_PAUSE = "from sse_core.engine import pace; pace.MAX_LUMP = pace.MIN_RATE"


def flood(number: int, readers: int, slow: bool) -> None:
    """Pipe so many lines to clients that read, and perhaps one that hardly does."""
    with serving("--stdin", "--patience", "1" if slow else "5", before=SHORT_PAUSE) as server:
        clients = [Client(server.port).open() for _ in range(readers)]
        sluggish = Client(server.port, receive_buffer=4096).open() if slow else None
        counts = {}

        def read():
            wait_until(lambda: lagging(server.port) == readers + slow)      # so the pipe must wait
            drain(clients, counts)
        reader = threading.Thread(target=read)
        reader.start()
        lines = [b"%d\n" % line for line in range(1, number + 1)]
        server.process.stdin.write(b"".join(lines[:number // 2]))
        server.process.stdin.flush()
        middle = memory(server.process)
        server.process.stdin.write(b"".join(lines[number // 2:]))
        server.process.stdin.flush()
        end = memory(server.process)
        server.process.stdin.close()
        server.process.stdin = None
        if sluggish:
            sluggish.read_until(lambda stream: any(event.name == "gap" for event in stream.events))
            gap = next(event for event in sluggish.stream.events if event.name == "gap")
            assert json.loads(gap.data)["reason"] == "lagging"
            sluggish.close()
        reader.join(100)
        assert not reader.is_alive() and server.process.wait(PATIENCE) == 0
        assert list(counts.values()) == [number] * readers
        most = max(2048, number * 8 // 1000)    # KiB: 16 bytes for each line of the second half
        assert end - middle < most, f"grew from {middle} to {end} KiB"
        for client in clients:
            client.close()


def test_a_hundred_thousand_lines_lose_nothing_and_take_no_memory():
    flood(100_000, 2, slow=False)


@pytest.mark.long
def test_a_million_lines_reach_fifty_clients():
    flood(1_000_000, 50, slow=False)


def test_a_client_that_hardly_reads_costs_one_pause_and_is_told_its_gap():
    flood(50_000, 5, slow=True)
