"""Events as JSON: lines of a pipe, and many in one POST, all or none."""
import json
import logging
import os
import signal
import threading

import pytest

from helpers import PATIENCE, PUBLISH_TOKEN, Client, ask, get, post, serving, wait_until
from sse_core.cli import sources
from sse_core.engine import frames
from sse_server import SSEServer

# A line, and the data, the name and the channel of its event.
GOOD = [
    ('{"data": "x"}', ("x", None, None)),
    ('{"data": "", "event": null, "channel": null}', ("", None, None)),
    ('{"data": "x", "event": ""}', ("x", None, None)),
    ('{"data": {"a": [1, "é"]}, "event": "e"}', ('{"a": [1, "é"]}', "e", None)),
    ('{"data": null}', ("null", None, None)), ('{"data": 1.5}', ("1.5", None, None)),
    ('{"data": true}', ("true", None, None)),
    (' {"channel": "c", "data": "a\\nb"} ', ("a\nb", None, "c")),
    ('{"d\\u0061ta" :\t[ "data" ] , "event":"data"}', ('[ "data" ]', "data", None)),
    ('{"data": [1], "event": "e", "data": [2]}', ("[2]", "e", None)),
]
BAD = [
    ("{", "Expecting"), ("[]", 'not an object with "data"'),
    ('"x"', 'not an object with "data"'), ("{}", 'not an object with "data"'),
    ('{"data": "x", "chanel": "c"}', "nothing is known of 'chanel'"),
    ('{"data": "x", "event": 1}', "event and channel are strings"),
    ('{"data": "x", "channel": ["c"]}', "event and channel are strings"),
    ('{"data": "x", "channel": ""}', "the channel has no name"),
    ('{"data": "x", "event": "a\\nb"}', "CR, LF, NUL"), ('{"data": "\\ud800"}', "surrogate"),
    ('{"data": "x", "event": "gap"}', "server's own"), ('{"data": NaN}', "JSON"),
    ('{"data": 01}', "Expecting"), ('{"data": [-Infinity]}', "JSON"),
    ("[" * 100_000, "nested too deeply"),
    ('{"data": "%s"}' % ("x" * (frames.MAX_EVENT + 1)), "longer than"),
]


@pytest.fixture
def server():
    with SSEServer(port=0, publish_tokens=[PUBLISH_TOKEN]) as server:
        yield server


@pytest.mark.parametrize("line, event", GOOD)
def test_a_line_of_json_is_an_event(line, event):
    parsed = frames.parse_event(line)
    assert (parsed.data, parsed.name, parsed.channel) == event


@pytest.mark.parametrize("line, said", BAD, ids=range(len(BAD)))
def test_a_bad_event_is_told_why_it_is_refused(line, said):
    with pytest.raises(ValueError, match=said):
        frames.parse_event(line)


@pytest.mark.parametrize("number", [
    "0.1234567890123456789", "12345678901234567890", "-0", "1E+2", "1e999", "9" * 5000])
def test_a_number_keeps_its_digits(number):
    assert frames.parse_event(f'{{"data": {number}}}').data == number
    assert frames.parse_event(f'{{"data": {{"x":[{number}]}}}}').data == f'{{"x":[{number}]}}'


@pytest.mark.parametrize("line, quoted", [
    ("{nonsense", "'{nonsense'"), ("\u202e\x00\x1b[31m", r"'\u202e\x00\x1b[31m'"),
    ("x" * 1000, f"'{'x' * 80}...'")])
def test_a_line_that_is_no_event_is_quoted_without_harm(line, quoted):
    with pytest.raises(ValueError) as raised:
        frames.parse_event(line)
    assert str(raised.value).endswith(f": {quoted}")


@pytest.mark.parametrize("line", ["", " ", "\t\r"])
def test_a_blank_line_is_no_event_and_no_fault(line):
    assert frames.parse_event(line) is None


def post_lines(port: int, body: bytes, query: str = "") -> tuple:
    """POST lines and return the status and the body of the answer."""
    answer = post(port, f"/{PUBLISH_TOKEN}{query}", body, "Content-Type: application/x-ndjson")
    head, _, text = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), text.decode()


def test_many_events_in_one_post_are_published_in_order(server):
    with Client(server.port, get("/?channel=c")) as client:
        client.open()
        lines = "".join(line + "\r\n" for line, _ in GOOD) + "\n"
        status, text = post_lines(server.port, lines.encode())
        got = client.read_events(len(GOOD))
    assert status == 200 and json.loads(text)["ids"] == [event.id for event in got]
    assert [event.data for event in got] == [data for _, (data, *_) in GOOD]


@pytest.mark.parametrize("kind, is_list", [
    ("application/x-ndjson", True), ("Application/X-NDJSON ; charset=utf-8", True),
    ("application/x-ndjson;charset=utf-8", True), ("application/json", False),
    ("application/x-ndjsonX", False), ("text/plain; application/x-ndjson", False)])
def test_the_type_of_a_body_says_whether_its_lines_are_events(server, kind, is_list):
    answer = post(server.port, f"/{PUBLISH_TOKEN}", b'{"data": "1"}', f"Content-Type: {kind}")
    assert (b'"ids"' in answer, b'"id"' in answer) == (is_list, not is_list)


@pytest.mark.parametrize("line, said", BAD[:6], ids=range(6))
def test_one_bad_line_and_none_is_published(server, line, said):
    with Client(server.port) as client:
        client.open()
        body = '{"data": "1"}\n' + line + '\n{"data": "2"}'
        status, text = post_lines(server.port, body.encode())
        assert status == 400 and text.startswith("Line 2 ") and "none was published" in text
        server.publish("last")
        assert [event.data for event in client.read_events(1)] == ["last"]


def test_an_empty_list_is_an_empty_list(server):
    assert post_lines(server.port, b"\n") == (200, '{"ids": []}\n')


def test_a_byte_order_mark_before_a_list_is_not_content(server):
    mark = b"\xef\xbb\xbf"
    status, text = post_lines(server.port, mark + b'{"data": "x"}\n')
    assert status == 200 and len(json.loads(text)["ids"]) == 1
    status, text = post_lines(server.port, b'{"data": "x"}\n' + mark + b'{"data": "y"}')
    assert status == 400 and text.startswith("Line 2 ")


@pytest.mark.parametrize("query, said", [
    ("?channel=a&channel=b", "one channel"), ("?chanel=a", "'chanel' is not known"),
    ("?event=a&event=b", "one event"), ("?data=x", "'data' is not known")])
def test_a_post_that_cannot_be_meant_is_told_so(server, query, said):
    answer = post(server.port, f"/{PUBLISH_TOKEN}{query}", b"x")
    assert answer.startswith(b"HTTP/1.1 400 ") and said in answer.decode()
    assert post_lines(server.port, b'{"data": "x"}', "?event=a")[0] == 400


@pytest.mark.parametrize("query, status", [
    ("?chanel=a", 400), ("?channels=a", 400), ("?Channel=a", 400), ("?lasteventid=1", 400),
    ("?utm_source=x", 200), ("?_=1", 200), ("?" + "x" * 5000, 200), ("?c", 200)])
def test_a_parameter_that_is_nearly_a_known_one_is_asked_about(server, query, status):
    answer = ask(server.port, get("/" + query, method="HEAD"))
    assert answer.startswith(b"HTTP/1.1 %d " % status)


def test_bad_lines_of_a_pipe_are_left_out_warned_of_once_and_counted(caplog):
    caplog.set_level(logging.WARNING)
    got = []

    read, write = os.pipe()
    os.write(write, b'{"data": "1"}\n\nno\n \r\n{"data": "2"}\n{"data": 3, "x": 1}\n')
    os.close(write)
    number = sources.lines(lambda events, wait: got.extend(events), threading.Event(), read,
                           frames.parse_event)
    os.close(read)
    assert (number, [event.data for event in got]) == (2, ["1", "2"])
    first, last = (record.getMessage() for record in caplog.records)
    assert first == ("standard input: lines that are no events are left out (first: line 3): "
                     "Expecting value in column 1: 'no'")
    assert last == "standard input: 2 lines were left out"


def test_a_pipe_waits_for_its_clients_and_says_whom_it_reached():
    with serving("--stdin", "--wait-clients", "2", "--loud") as server:
        server.process.stdin.write(b"1\n2\n")
        server.process.stdin.close()
        server.process.stdin = None
        with Client(server.port) as one:
            one.open()
            with Client(server.port) as two:
                for client in (one, two):
                    assert [event.data for event in client.read_to_end().events] == ["1", "2"]
        assert server.process.wait(PATIENCE) == 0
        assert "the input has ended; events: 2, clients: 2\n" in server.close()


def test_a_pipe_that_is_stopped_before_its_end_does_not_say_that_it_ended():
    with serving("--stdin", "--loud") as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0
        assert "the input has ended" not in server.close()


def test_a_pipe_that_reached_nobody_is_a_warning():
    with serving("--stdin") as server:
        server.process.stdin.write(b"1\n")
        server.process.stdin.close()
        server.process.stdin = None
        wait_until(lambda: server.process.poll() is not None)
        assert server.close() == "the input has ended; events: 1, clients: 0\n"
