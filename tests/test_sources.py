"""Ways in: the pipe, POST and the library, through real processes and real sockets."""
import json
import random
import selectors
import shutil
import subprocess
import sys
import threading

import pytest
import requests

from sse_core import frames
from sse_core import sources
from helpers import PATIENCE, TOP, Client, ask, connect, serving, wait_until
from sse_server import SSEServer
from wire import Decoder

POST = "SECRET"


def split(*pieces: bytes) -> list:
    splitter = sources.LineSplitter()
    lines = [line for piece in pieces for line in splitter.feed(piece)]
    return lines + list(splitter.end())


@pytest.mark.parametrize("data, lines", [
    (b"", []), (b"\n", [""]), (b"a", ["a"]), (b"a\n", ["a"]), (b"a\nb", ["a", "b"]), (b"a\r\nb\r\n", ["a", "b"]),
    (b"a\rb\n", ["a\rb"]), (b"\n\n", ["", ""]), ("é\u2028x\n".encode(), ["é\u2028x"]),
    (b"\xff\xfe\nok\n", ["\ufffd\ufffd", "ok"]), (b"a\0b\n", ["a\0b"])])
def test_lines_whole_and_a_byte_at_a_time(data, lines, caplog):
    assert split(data) == lines
    assert split(*(data[index:index + 1] for index in range(len(data)))) == lines
    assert len(caplog.records) <= 2


def test_a_line_over_1_mib_is_left_out_and_the_next_is_unharmed(caplog):
    most = b"x" * frames.MAX_EVENT
    for end in (b"\n", b"\r\n"):
        assert split(most + end + b"next") == [most.decode(), "next"]
    caplog.clear()
    data = most + b"y\n" + b"next\n" + most * 3 + b"\nlast"
    assert split(data) == split(*(data[i:i + 65536] for i in range(0, len(data), 65536))) == ["next", "last"]
    assert [record.getMessage() for record in caplog.records] == [
        "standard input: lines over 1048576 bytes are left out"] * 2
    assert split(b"\xff" * 400_000 + b"\n", b"next\n") == ["next"]      # 1.2 MB as U+FFFD


def test_a_pipe_is_served_to_the_end_and_then_it_stops():
    with serving("--stdin") as server:
        clients = [Client(server.port).open() for _ in range(3)]
        server.process.stdin.write(b"one\ntwo\r\n\xff\nlast")
        server.process.stdin.close()
        for client in clients:
            stream = client.read_to_end()
            assert [event.data for event in stream.events] == ["one", "two", "\ufffd", "last"] and stream.ended
            client.close()
        assert server.process.wait(PATIENCE) == 0
        server.process.stdin = None
        assert server.close() == "standard input: bytes that are not UTF-8 are published as U+FFFD\n"


def test_a_signal_stops_a_pipe_that_is_open():
    with serving("--stdin") as server, Client(server.port) as client:
        client.open()
        server.process.stdin.write(b"one\n")
        server.process.stdin.flush()
        client.read_events(1)
        assert server.stop(15) == 0 and client.read_to_end().ended


def drain(clients: list, counts: dict) -> None:
    """Read all clients to their end, counting events and checking their order; decoding strictly would take minutes."""
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
            whole = data.rfind(b"\r\n\r\n\r\n") + 6
            tails[key.data] = data[whole:] if whole > 5 else data
            for part in data[:max(whole, 0) if whole > 5 else 0].split(b"data: ")[1:]:
                if part[:1].isdigit():
                    counts[key.data] += 1
                    if counts[key.data] != int(part[:part.index(b"\r")]):
                        raise AssertionError(f"{part[:20]!r} after {counts[key.data] - 1} events")
    selector.close()


def flood(number: int, readers: int, slow: bool) -> None:
    """Pipe so many lines to clients that read, and perhaps one that hardly does."""
    with serving("--stdin", "--patience", "1" if slow else "5") as server:
        clients = [Client(server.port).open() for _ in range(readers)]
        sluggish = Client(server.port, receive_buffer=4096).open() if slow else None
        counts = {}
        reader = threading.Thread(target=drain, args=(clients, counts))
        reader.start()
        server.process.stdin.write(b"".join(b"%d\n" % line for line in range(1, number // 2 + 1)))
        server.process.stdin.flush()
        middle = int(subprocess.run(["ps", "-o", "rss=", "-p", str(server.process.pid)], capture_output=True).stdout)
        server.process.stdin.write(b"".join(b"%d\n" % line for line in range(number // 2 + 1, number + 1)))
        server.process.stdin.flush()
        end = int(subprocess.run(["ps", "-o", "rss=", "-p", str(server.process.pid)], capture_output=True).stdout)
        server.process.stdin.close()
        server.process.stdin = None
        if sluggish:
            sluggish.read_until(lambda stream: any(event.name == "gap" for event in stream.events))
            gap = json.loads(next(event.data for event in sluggish.stream.events if event.name == "gap"))
            assert gap["reason"] == "lagging"
            sluggish.close()
        reader.join(100)
        assert not reader.is_alive() and server.process.wait(PATIENCE) == 0
        assert list(counts.values()) == [number] * readers
        assert end - middle < 8192, f"grew from {middle} to {end} KiB"
        for client in clients:
            client.close()


def test_a_million_lines_lose_nothing_and_take_no_memory():
    flood(1_000_000, 2, slow=False)


@pytest.mark.long
def test_a_million_lines_to_fifty_clients():
    flood(1_000_000, 50, slow=False)


def test_a_client_that_hardly_reads_costs_one_pause_and_is_told_its_gap():
    flood(50_000, 5, slow=True)


def post(port: int, path: str = f"/{POST}", body: bytes = b"hello", *fields: str, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", "Connection: close", *fields, "", ""]
    return ask(port, "\r\n".join(lines).encode() + body)


@pytest.fixture
def open_server():
    with SSEServer(port=0, publish_tokens=[POST]) as server:
        yield server


def test_curl_posts(open_server):
    curl = shutil.which("curl") or pytest.skip("curl is not installed")
    url = f"{open_server.url}/{POST}?event=custom&channel=news"
    with Client(open_server.port, b"GET /?channel=news HTTP/1.1\r\nHost: x\r\n\r\n") as client, \
            Client(open_server.port) as other:
        client.open(), other.open()
        done = subprocess.run([curl, "-sS", "-d", "hello", url], capture_output=True, timeout=PATIENCE)
        event, = client.read_events(1)
        assert (event.name, event.data) == ("custom", "hello")
        assert json.loads(done.stdout) == {"id": event.id}
        big = "x" * 200_000         # over 1 KiB: curl says Expect: 100-continue, and waits for the answer
        subprocess.run([curl, "-sS", "-H", "Expect: 100-continue", "--data-binary", "@-", open_server.url, "-H",
                        f"Authorization: Bearer {POST}"], input=big.encode(), check=True, timeout=PATIENCE)
        assert client.read_events(2)[1].data == big
        assert other.read_events(1)[0].data == big


def test_requests_posts_hundreds_on_one_connection(open_server):
    with Client(open_server.port) as client, requests.Session() as session:
        client.open()
        ids = [session.post(open_server.url, data=str(number), headers={"Authorization": f"Bearer {POST}"},
                            timeout=PATIENCE).json()["id"] for number in range(300)]
        events = client.read_events(300)
        assert [event.data for event in events] == [str(number) for number in range(300)]
        assert [event.id for event in events] == ids
        assert sum(thread.name.startswith("handshake-") for thread in threading.enumerate()) == 1


def test_posts_in_a_row_may_arrive_in_any_pieces(open_server):
    one = f"POST /{POST} HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello".encode()
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    with Client(open_server.port) as client, connect(open_server.port) as sock:
        client.open()
        data = one * 50
        while data:
            size = draw.choice((1, 2, 10, len(one), 300))
            sock.sendall(data[:size])
            data = data[size:]
        assert [event.data for event in client.read_events(50)] == ["hello"] * 50, f"seed {seed}"


@pytest.mark.parametrize("path, body, fields, status, said", [
    (f"/{POST}", b"\xff", [], 400, b"not UTF-8"),
    (f"/{POST}?event=a%0Ab", b"x", [], 400, b"event name"),
    (f"/{POST}?channel=a%0Db", b"x", [], 400, b"channel"),
    (f"/{POST}?channel=", b"x", [], 400, b"channel"),
    (f"/{POST}?event=%00", b"x", [], 400, b"event name"),
    (f"/{POST}?event=%zz", b"x", [], 400, b"two hex digits"),
    (f"/{POST}", b"x" * (frames.MAX_EVENT + 1), [], 413, b"1048576"),
    ("/", b"x", [], 401, b"publish token"),
    ("/SECRE", b"x", [], 401, b"publish token"),
    ("/wrong", b"x", ["Authorization: Bearer wrong"], 401, b"publish token"),
    ("/wrong", b"x", ["Authorization: Basic SECRET"], 401, b"publish token"),
    (f"//{POST}", b"x", [], 401, b"publish token"),
])
def test_refused_posts_say_why(open_server, path, body, fields, status, said):
    answer = post(open_server.port, path, body, *fields)
    head, _, text = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status) and said in text
    assert b"Content-Length: %d" % len(text) in head and b"Connection: close" in head
    assert POST.encode() not in answer


def test_a_post_without_a_length_is_a_411(open_server):
    for field in ("Transfer-Encoding: chunked", "X: y"):
        request = f"POST /{POST} HTTP/1.1\r\nHost: x\r\n{field}\r\n\r\n".encode()
        assert ask(open_server.port, request).startswith(b"HTTP/1.1 411 ")


def test_posting_is_off_unless_there_is_a_token(server):
    answer = post(server.port)
    assert answer.startswith(b"HTTP/1.1 403 ") and b"--publish-token" in answer


def test_a_refused_post_leaves_no_event_and_no_continue(open_server):
    with connect(open_server.port) as sock:
        sock.sendall(b"POST /wrong HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
        assert sock.recv(1000).startswith(b"HTTP/1.1 401 ")


def test_tokens_from_the_environment():
    env = {"SSE_TOKEN": "watch1 watch2", "SSE_PUBLISH_TOKEN": "publish"}
    with serving("--interval", "100", env=env) as server:
        assert ask(server.port, b"GET /wrong HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 401 Unauthorized\r\n")
        with Client(server.port, b"GET /watch2 HTTP/1.1\r\nHost: x\r\n\r\n") as client:
            client.open()
            assert post(server.port, "/publish").startswith(b"HTTP/1.1 200 ")
            assert client.read_events(1)[0].data == "hello"
        server.stop()


def test_authorize_decides_in_place_of_tokens_and_holds_up_nobody():
    asked, release = [], threading.Event()

    def authorize(request):
        asked.append(request)
        if request.path == "/slow":
            release.wait(PATIENCE)
        if request.path == "/fault":
            raise KeyError("a fault in the program")
        return request.fields.get("cookie") == "ok"
    with SSEServer(port=0, authorize=authorize) as server, connect(server.port) as slow:
        slow.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        with Client(server.port, b"GET /a?b=c HTTP/1.1\r\nHost: x\r\nCookie: ok\r\n\r\n") as client:
            assert client.open().stream.status == 200
        assert ask(server.port, b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 401 ")
        assert ask(server.port, b"GET /fault HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 500 ")
        release.set()
        assert slow.recv(100).startswith(b"HTTP/1.1 401 ")
    assert any(request.query == {"b": ["c"]} and request.method == "GET" for request in asked)


def test_channels_over_http_live_and_on_resume(open_server):
    def client(path, last_id=None):
        header = f"Last-Event-ID: {last_id}\r\n" if last_id else ""
        return Client(open_server.port, f"GET {path} HTTP/1.1\r\nHost: x\r\n{header}\r\n".encode())
    with client("/") as every, client("/?channel=a") as a, client("/?channel=a&channel=b%20c") as both:
        every.open(), a.open(), both.open()
        ids = [open_server.publish("1")]
        ids.append(json.loads(post(open_server.port, f"/{POST}?channel=a", b"2").partition(b"\r\n\r\n")[2])["id"])
        ids.append(open_server.publish("3", channel="b c"))
        ids.append(open_server.publish("4"))
        for each, number, expected in ((every, 2, "14"), (a, 3, "124"), (both, 4, "1234")):
            assert "".join(event.data for event in each.read_events(number)) == expected
    with client("/?channel=b%20c", ids[0]) as back:
        assert "".join(event.data for event in back.read_events(2)) == "34"
    with client("/", ids[0]) as back:
        assert "".join(event.data for event in back.read_events(1)) == "4"
    assert ask(open_server.port, b"GET /?channel=a%0A HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 400 ")


def test_what_was_published_is_what_arrives(open_server):
    """Random Unicode for data, event names and channels, by the library and by POST, read by the independent parser."""
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)

    def text(least=0, forbidden=""):
        alphabet = "\r\n\0: \t\x0b\x85\u2028\ufeff\U0001f600é%&=+#?/ab"
        letters = [draw.choice(alphabet) if draw.random() < 0.6 else chr(draw.choice((draw.randrange(32, 0xd800),
                   draw.randrange(0xe000, 0x110000)))) for _ in range(draw.randrange(least, 12))]
        return "".join(letter for letter in letters if letter not in forbidden) or "x" * least
    names = [text(1, "\r\n\0") for _ in range(8)]
    session = requests.Session()
    with session, requests.get(open_server.url, params={"channel": names}, stream=True, timeout=PATIENCE) as watching:
        wait_until(lambda: open_server.clients == 1)
        sent = []
        for number in range(200):
            data, event, channel = text(), draw.choice([None, text(1, "\r\n\0")]), draw.choice([None, *names])
            if number % 2:
                open_server.publish(data, event, channel)
            else:
                given = {"event": event, "channel": channel}
                session.post(f"{open_server.url}/{POST}", params={k: v for k, v in given.items() if v is not None},
                             data=data.encode(), timeout=PATIENCE).raise_for_status()
            sent.append((event or "message", data.replace("\r\n", "\n").replace("\r", "\n")))
        decoder = Decoder(chunked=False)        # requests has taken the chunks off
        decoder.feed(b"HTTP/1.1 200 OK\r\n\r\n")
        for piece in watching.iter_content(None):
            decoder.feed(piece)
            if len(decoder.events) == len(sent):
                break
        assert [(event.name, event.data) for event in decoder.events] == sent, f"seed {seed}"


def test_a_program_of_its_own(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"import sys; sys.path.insert(0, {str(TOP)!r})\n" + """
from sse_server import SSEServer
with SSEServer(port=0) as server:
    print(server.port, flush=True)
    for line in sys.stdin:
        server.publish(line.strip(), event="line")
""")
    with subprocess.Popen([sys.executable, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        with Client(int(process.stdout.readline())) as client:
            client.open()
            process.stdin.write("hello\n")
            process.stdin.flush()
            assert client.read_events(1)[0][:2] == ("line", "hello")
            process.stdin.close()
            assert client.read_to_end().ended and process.wait(PATIENCE) == 0
