"""The wire is the original's: a capture of its answer and our own output agree, shape by shape."""
import random
import re
import threading
import time
from collections import Counter
from pathlib import Path

from sse_core.cli import sources
from helpers import Client, serving
from sse_server import SSEServer
from wire import Decoder

CAPTURE = (Path(__file__).parent / "data" / "wire.bin").read_bytes()
TIME = r"[0-9]{2}/[0-9]{2}/[0-9]{4} [0-9]{2}:[0-9]{2}:[0-9]{2}"


def decoded(raw: bytes) -> Decoder:
    decoder = Decoder()
    decoder.feed(raw)
    return decoder


def shapes(raw: bytes) -> set:
    """The chunks of a stream with every time replaced: all that there is to compare."""
    body = raw.partition(b"\r\n\r\n")[2].decode()
    return set(re.findall(r"[0-9a-f]{8}\r\n(?:event|data)[^\0]+?\r\n\r\n\r\n",
                          re.sub(TIME, "TIME", body)))


def test_the_capture_is_24_events_at_one_second():
    events = decoded(CAPTURE).events
    times = [time.mktime(time.strptime(event.data, "%m/%d/%Y %H:%M:%S")) for event in events]
    assert len(events) >= 24 and {event.name for event in events} == {"message", "custom"}
    assert [late - early for early, late in zip(times, times[1:])] == [1] * (len(times) - 1)


def test_head_and_chunks_are_those_of_the_capture():
    raw = b""
    with serving("--interval", "0.01", "--history", "0") as server, Client(server.port) as client:
        while len(shapes(raw)) < 2:
            raw += client.receive()
    ours, original = decoded(raw), decoded(CAPTURE)
    assert ours.head[:4] == original.head[:4] == original.head
    assert ours.head[4:-1] == ["Cache-Control: no-cache, no-transform", "X-Accel-Buffering: no"]
    assert ours.head[-1].startswith("Date: ")
    assert shapes(raw) == shapes(CAPTURE) == {
        "0000001d\r\ndata: TIME\r\n\r\n\r\n", "0000002b\r\nevent: custom\ndata: TIME\r\n\r\n\r\n"}
    assert not ours.retries and not ours.last_id


def test_four_events_in_ten_are_custom():
    class Enough(Exception):
        pass

    seed = 20261122
    random.seed(seed)
    names = []

    def publish(data, event):
        assert re.fullmatch(TIME, data)
        names.append(event)
        if len(names) == 2000:
            raise Enough
    try:
        sources.clock(publish, threading.Event(), interval=1e-6)
    except Enough:
        share = Counter(names)["custom"] / len(names)
    assert set(names) == {None, "custom"} and 0.36 < share < 0.44, f"{share}, seed {seed}"


def test_clock_ticks_at_its_interval_and_stops_at_once():
    stopping, ticks, began = threading.Event(), [], time.monotonic()
    thread = threading.Thread(target=sources.clock,
                              args=(lambda *event: ticks.append(time.monotonic()), stopping, 0.05))
    thread.start()
    while len(ticks) < 5:
        assert not stopping.wait(0.01)
    stopping.set()
    thread.join(1)
    assert not thread.is_alive()
    assert 0.25 <= ticks[4] - began < 5         # late on a busy machine, never early


def test_every_path_is_a_good_token():
    with SSEServer(port=0) as server:
        for path in (b"/token", b"/", b"/a/b?c=d", b"/%20", b"//token"):
            with Client(server.port, b"GET %b HTTP/1.1\r\nHost: x\r\n\r\n" % path) as client:
                assert client.open().stream.status == 200


def test_http_1_0_gets_the_same_events_unchunked(server):
    with Client(server.port, b"GET / HTTP/1.0\r\n\r\n") as plain, Client(server.port) as chunked:
        plain.open(), chunked.open()
        for number in range(10):
            server.publish(f"line {number}\nnext", "custom" if number % 2 else None)
        assert plain.read_events(10) == chunked.read_events(10)
        # But the first one, which is the jittered retry
        assert plain.stream.payloads[1:] == chunked.stream.payloads[1:]
        assert "Transfer-Encoding" not in plain.stream.fields
        server.stop()
        assert plain.read_to_end().partial == b"" and chunked.read_to_end().ended
