"""Events to bytes, and the log: no socket, no thread, no clock."""
import json
import random
import re
import sys

import pytest

from sse_core.engine import frames
from sse_core.engine.log import (BATCH, FRAME_COST, MAX_BYTES, MAX_CHANNELS, NOTHING, SCAN_LIMIT,
                                 Batch, Log)
from helpers import TOP
from wire import Decoder, Event


def decode(*chunks: bytes, chunked: bool = True) -> Decoder:
    decoder = Decoder(chunked)
    decoder.feed(b"HTTP/1.1 200 OK\r\n\r\n" + b"".join(chunks))
    assert decoder.partial == b""
    return decoder


@pytest.mark.parametrize("data, event, payload", [
    ("hello", None, b"data: hello\n\n"),
    ("hello", "custom", b"event: custom\ndata: hello\n\n"),
    ("", None, b"data: \n\n"),
    ("", "", b"data: \n\n"),
    ("a\nb", None, b"data: a\ndata: b\n\n"),
    ("a\rb", None, b"data: a\ndata: b\n\n"),
    ("a\r\nb", None, b"data: a\ndata: b\n\n"),
    ("a\n\rb\n", None, b"data: a\ndata: \ndata: b\ndata: \n\n"),
    (" a", None, b"data:  a\n\n"),
    ("a\x0b\x0c\x1c\x85\u2028b", None, "data: a\x0b\x0c\x1c\x85\u2028b\n\n".encode()),
    ("data: x\n\nevent: y", None, b"data: data: x\ndata: \ndata: event: y\n\n"),
    ("\0\ufeff", None, b"data: \0\xef\xbb\xbf\n\n"),
])
def test_an_event_is_encoded_as_fields_that_say_just_what_it_was(data, event, payload):
    assert frames.encode(data, event) == payload
    lines = data.replace("\r\n", "\n").replace("\r", "\n")
    assert decode(frames.chunk(payload)).events == [Event(event or "message", lines, "")]


@pytest.mark.parametrize("data, event", [
    ("x", "a\nb"), ("x", "a\rb"), ("x", "a\0b"), ("x", "\ud800"), ("\udfff", None),
    ("x", "n" * 1025), ("x", "gap"),
    ("x" * (frames.MAX_EVENT + 1), None), ("é" * (frames.MAX_EVENT // 2 + 1), None)])
def test_a_value_that_no_event_can_hold_is_a_value_error(data, event):
    with pytest.raises(ValueError):
        frames.Event(data, event)


def test_the_largest_event_fits():
    assert len(frames.encode("x" * frames.MAX_EVENT)) == frames.MAX_EVENT + 8
    assert len(frames.encode("\n" * frames.MAX_EVENT)) < MAX_BYTES


def test_a_chunk_has_a_length_of_eight_digits_and_gives_its_payload_back():
    for payload in (b"", b"x", b"x" * 70000):
        chunk = frames.chunk(payload)
        assert chunk == b"%08x\r\n" % len(payload) + payload + b"\r\n"
        assert frames.unchunk(chunk) == payload


def test_random_text_arrives_as_it_was():
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    special = "\r\n\0:\t \x0b\x0c\x85\u2028\u2029\ufeff\U0001f600é"
    for _ in range(2000):
        data = "".join(draw.choice(special) if draw.random() < 0.5 else chr(draw.randrange(0xd800))
                       for _ in range(draw.randrange(30)))
        event = "".join(char for char in data[::-1] if char not in "\r\n\0")
        got = decode(frames.chunk(frames.encode(data, event))).events
        lines = data.replace("\r\n", "\n").replace("\r", "\n")
        assert got == [Event(event or "message", lines, "")], f"seed {seed}"


def test_a_client_without_an_id_is_welcomed_by_an_event_that_has_one():
    stream = decode(frames.welcome((5, 7), 3, 15.0), frames.HEARTBEAT)
    assert stream.welcome == Event("welcome", '{"heartbeat": 15}', "5-7")
    assert stream.last_id == "5-7" and 1500 <= stream.retries[0] <= 4500
    assert stream.comments == 1 and not stream.events


def test_a_lone_retry_belongs_to_the_block_of_the_next_event():
    assert re.fullmatch(rb"0000000c\r\nretry: [0-9]{4}\n\r\n", frames.retry_line(3))
    stream = decode(frames.retry_line(3), frames.HEARTBEAT, frames.chunk(frames.encode("x")))
    assert len(stream.retries) == 1 and stream.events == [Event("message", "x", "")]


def test_a_busy_event_says_in_its_data_what_retry_says():
    stream = decode(frames.busy(30))
    (event,) = stream.events
    assert event.name == "busy" and event.id == ""
    assert json.loads(event.data) == {"retry": stream.retries[0] / 1000}


def test_a_pause_is_a_number_that_every_client_can_keep():
    assert "retry: 2147483647\n" in frames.retry_line(2 ** 31).decode()


@pytest.mark.parametrize("name", ["welcome", "gap", "busy"])
def test_the_names_of_the_servers_own_events_cannot_be_published(name):
    with pytest.raises(ValueError, match=f"{name} is the server's own"):
        frames.Event("x", name)


def fill(log: Log, *ids, size: int = 0) -> None:
    for id in ids:
        payload = frames.encode("x" * size)
        while not log.has_room(len(payload) + 64):
            log.evict()
        log.append(payload, id, None, 0.0)


def test_the_log_is_bounded_in_number():
    log = Log(history=100)
    fill(log, *((n, 0) for n in range(1, 1001)))
    assert (log.first, log.next) == (900, 1000)
    kept = [log.frame(number).id for number in range(900, 1000)]
    assert kept == [(number, 0) for number in range(901, 1001)]


def test_the_log_is_bounded_in_bytes():
    log = Log(history=100, size=10000)
    fill(log, *((n, 0) for n in range(1, 1001)), size=1000)
    kept = [log.frame(number) for number in range(log.first, log.next)]
    assert 5 < len(kept) < 10 and sum(len(frame.chunk) for frame in kept) <= 10000


def test_the_log_keeps_64_frames_at_least():
    log = Log(history=0)
    fill(log, *((n, 0) for n in range(1, 101)))
    assert log.next - log.first == 64


def test_ids_only_grow_even_if_the_clock_goes_back():
    log, given = Log(100), []
    for now in (1000, 1000, 1001, 5, 1001, 2000, 1999):
        given.append(log.next_id(now))
        fill(log, given[-1])
    assert given == [(1000, 0), (1000, 1), (1001, 0), (1001, 1), (1001, 2), (2000, 0), (2000, 1)]


@pytest.mark.parametrize("text, id", [
    ("0-0", (0, 0)), ("1764000000000-12", (1764000000000, 12)),
    ("18446744073709551615-0", (18446744073709551615, 0)),
    ("", None), ("1", None), ("-1", None), ("1-", None), ("-1-0", None), ("1--1", None),
    ("01-0", None), ("1-00", None), (" 1-0", None), ("1-0\n", None), ("1-0-0", None),
    ("١-٠", None), ("1e3-0", None), ("1" * 21 + "-0", None), ("*", None)])
def test_an_id_is_parsed_only_in_its_canonical_spelling(text, id):
    assert frames.parse_id(text) == id
    assert id is None or frames.format_id(id) == text


def test_locate_finds_the_frame_after_an_id_or_says_why_there_may_be_a_gap():
    log = Log(64)
    log.begin((9, 0))
    assert log.locate((10, 0)) == (0, "unknown")                # nothing was published yet
    assert log.locate((9, 0)) == (0, None) and log.locate((5, 0)) == (0, "evicted")
    fill(log, *((n, 0) for n in range(10, 110)))                # of these, 46-0 to 109-0 are kept
    assert (log.first, log.next) == (36, 100)
    assert log.locate((109, 0)) == (100, None)                  # has everything
    assert log.locate((108, 0)) == (99, None)
    assert log.locate((46, 0)) == (37, None)
    assert log.locate((45, 0)) == (36, None)                    # gone, but nothing after it is
    assert log.locate((44, 0)) == (36, "evicted")
    assert log.locate((10, 0)) == (36, "evicted")
    assert log.locate((9, 0)) == (36, "evicted")                # after it, all was there once
    assert log.locate((8, 0)) == (36, "evicted")
    assert log.locate((110, 0)) == (36, "unknown")              # from the future
    assert log.locate((60, 5)) == (51, "unknown")               # between two of ours
    assert log.locate(None) == (36, "unknown")


def test_an_event_that_never_was_begins_a_log_without_a_gap():
    log = Log(64, (10, 0))
    assert log.locate((10, 0)) == (0, None) and log.locate((9, 9)) == (0, "unknown")
    fill(log, (11, 0))
    assert log.locate((10, 0)) == (0, None) and log.locate((11, 0)) == (1, None)


def test_a_gap_of_the_source_is_told_to_whoever_resumes_from_before_it():
    log = Log(64)
    log.begin(NOTHING)
    fill(log, (1, 0), (2, 0))
    log.append(b"gap", None, None, 0.0)
    fill(log, (3, 0))
    assert log.locate((2, 0)) == (2, None) and log.frame(2).id is None
    assert log.locate((3, 0)) == (4, None)
    assert log.first_id(2, []) == (3, 0)
    fill(log, *((n, 0) for n in range(4, 65)))
    log.evict()
    assert log.locate((2, 0)) == (2, None)      # its own frame is gone, the gap is not


def test_an_id_that_goes_back_begins_a_new_epoch():
    log = Log(64)
    fill(log, *((n, 0) for n in range(100, 180)))
    log.append(b"gap", None, None, 0.0)
    epoch = log.next
    fill(log, (5, 0), (6, 0), (7, 0))
    assert log.locate((6, 0)) == (epoch + 2, None)
    assert log.locate((179, 0)) == (epoch, "unknown")   # of the former epoch: all of the new one
    assert log.locate((4, 0)) == (epoch, "unknown")
    assert log.locate((5, 1)) == (epoch + 1, "unknown")
    assert log.last_id == (7, 0) and log.next_id(1) == (7, 1)
    fill(log, *((n, 0) for n in range(8, 80)))
    assert log.locate((8, 0)) == (log.first, "evicted")


def frames_of(*payloads: bytes) -> list:
    log = Log(1000)
    return [log.append(payload, None, None, 0.0) for payload in payloads]


@pytest.mark.parametrize("chunked", [True, False])
def test_a_batch_can_be_cut_at_every_byte(chunked):
    batch = Batch(frames_of(b"a", b"bcd", b"", b"e" * 20), chunked)
    whole = {0}
    for begun, part in enumerate(batch._parts, 1):
        whole.add(max(whole) + len(part))
    for sent in range(len(batch.data) + 1):
        begun, rest = batch.cut(sent)
        done = b"".join(batch._parts[:begun])
        assert done[:sent] + bytes(rest) == done and len(done) == sent + len(rest)
        assert bool(rest) == (sent not in whole)


def test_collect_takes_only_what_is_wanted_and_a_batch_at_most():
    log = Log(1000)
    for number in range(100):
        log.append(b"x" * 10000, None, "odd" if number % 2 else "even", 0.0)
    found, cursor = log.collect(0, 100, ["odd"])
    assert [frame.number for frame in found] == [1, 3, 5, 7, 9, 11] and cursor == 13
    assert log.collect(90, 100, []) == ([], 100)


def test_a_scan_ends_after_a_fixed_number_of_frames():
    log = Log(5 * SCAN_LIMIT)
    for number in range(3 * SCAN_LIMIT):
        log.append(b"", None, "other", 0.0)
    assert log.collect(7, 3 * SCAN_LIMIT, []) == ([], 7 + SCAN_LIMIT)
    assert log.first_id(0, ["other"]) is None


def test_no_import_beyond_the_standard_library():
    names = getattr(sys, "stdlib_module_names", None)
    if not names:
        pytest.skip("this Python does not list its modules")
    for path in (*TOP.glob("*.py"), *TOP.glob("sse_core/*.py")):
        lines = path.read_text().splitlines()
        imports = [line for line in lines if line.startswith(("import ", "from "))]
        used = {line.split()[1].split(".")[0] for line in imports}
        assert used <= set(names) | {"publisher", "sse_core"}, path


def test_what_left_of_ten_thousand_channels_is_known_of_each():
    """Beyond that, the one whose event left first is as every channel that is not known."""
    assert MAX_CHANNELS == 10000
    log = Log(64)
    for number in range(MAX_CHANNELS + 2):
        log.append(b"x", (1000 + number, 0), f"c{number}", 0.0)
    for _ in range(MAX_CHANNELS):
        log.evict()
    assert log.has_lost(0, ["c0"]) and not log.has_lost(1, ["c0"])
    assert log.has_lost(9999, ["c9999"]) and not log.has_lost(0, ["new"])
    log.evict()
    assert log.has_lost(0, ["new"]) and not log.has_lost(1, ["new"])
    assert log.has_lost(1, ["c1"]) and not log.has_lost(2, ["c1"])


def test_a_batch_is_64_kib_at_most_or_one_frame():
    log = Log(64)
    log.append(b"x" * 40, (1, 0), None, 0.0)
    rest = BATCH - len(log.frame(0).chunk)
    overhead = len(log.frame(0).chunk) - 40
    for number, more in enumerate((0, 1), 1):
        log.append(b"x" * (rest - overhead + more), (number + 1, 0), None, 0.0)
    assert sum(len(log.frame(number).chunk) for number in (0, 1)) == BATCH
    assert log.collect(0, 2)[1] == 2 and log.collect(0, 3)[1] == 2 and log.collect(2, 3)[1] == 3
    log.append(b"x" * (rest - overhead + 1), (4, 0), None, 0.0)
    assert log.collect(2, 4)[1] == 3


@pytest.mark.parametrize("share, fit", [(1.0, 4000), (0.75, 3000), (0.5, 2000)])
def test_a_share_of_the_log_is_one_of_its_bytes_and_of_its_frames(share, fit):
    log = Log(64, size=4000)
    log.append(b"x" * 69, (1, 0), None, 0.0)
    used = len(log.frame(0).chunk) + 2 * FRAME_COST
    assert log.has_room(fit - used, share) and not log.has_room(fit - used + 1, share)
    log = Log(100)
    while log.has_room(10, share):
        log.append(b"", (log.next + 1, 0), None, 0.0)
    assert log.next == fit / 40
