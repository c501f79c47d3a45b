"""The page in a real browser: headless Chromium on a real server, on others, and on the file."""
import json
import signal
import socket
import subprocess
import threading
import time
from contextlib import contextmanager

import pytest

from browser import browser
from helpers import TOP, connect, free_port, need, serving, wait_until
from page_cases import CASES
from page_servers import ANY_ORIGIN, PREFLIGHT, STREAM, foreign, strip_prefix
from sse_server import SSEServer

CONNECTED = "document.getElementById('status').textContent === 'Connected'"
FAILED = "document.getElementById('status').className === 'failed'"
KEPT = 10000


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        page.call("Emulation.setFocusEmulationEnabled", enabled=True)
        page.folder = tmp_path_factory.mktemp("downloads")
        page.browser_call("Browser.setDownloadBehavior", behavior="allow",
                          downloadPath=str(page.folder))
        yield page


@pytest.fixture(autouse=True)
def blank(request):
    """Leave no page running that would come back to the next test's server."""
    yield
    if "tab" in request.fixturenames:
        request.getfixturevalue("tab").open("about:blank")


def watching(tab, server, rest: str = "/"):
    """Open the server's page and wait until it is a client."""
    tab.open(server.url + rest)
    tab.wait_for(CONNECTED)
    wait_until(lambda: server.clients == 1)
    return tab


def kinds(page) -> set:
    return {line.partition(": ")[0] for line in page.lines()}


def numbers(page) -> list:
    return [line[len("Data: "):] for line in page.lines() if line.startswith("Data: ")]


def outages(page) -> list:
    return [line for line in page.lines() if line.startswith("Connection failed")]


# The parser alone

PARSE = """(pieces => {
    const events = [], retries = [], comments = [];
    let lastId = "";
    const parser = new Parser({event: ({name, data, id}) => events.push([name, data, id]),
                               retry: number => retries.push(number),
                               comment: text => comments.push(text), id: id => lastId = id});
    for (const piece of pieces) parser.feed(Uint8Array.from(piece));
    return [events, lastId, retries, comments];
})"""


@pytest.fixture
def parse(tab):
    tab.open((TOP / "index.html").as_uri())
    tab.evaluate("stop.abort(), wake()")
    return lambda pieces: tab.evaluate(f"{PARSE}({json.dumps([list(each) for each in pieces])})")


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_parser_follows_the_standard(parse, case):
    expected = [[list(event) for event in case.events], case.last_id, list(case.retries),
                list(case.comments)]
    assert parse([case.sent]) == expected
    singly = [case.sent[at:at + 1] for at in range(len(case.sent))]
    assert parse(singly) == expected
    assert parse([piece for each in singly for piece in (each, b"")]) == expected
    assert parse([case.sent[at:at + 3] for at in range(0, len(case.sent), 3)]) == expected


# What is shown

def test_the_page_shows_both_kinds_of_lines(tab):
    with serving("--interval", "0.01") as server:
        tab.open(f"http://127.0.0.1:{server.port}/")
        wait_until(lambda: kinds(tab) >= {"Data", "Custom"})
        assert tab.evaluate("document.querySelector('h1').textContent") == "Getting server updates"
        tab.wait_for(CONNECTED)


def test_it_keeps_the_newest_rows_and_says_how_many_are_gone(tab):
    with SSEServer(port=0, history=20000) as server:
        watching(tab, server)
        for number in range(KEPT + 1234):
            server.publish(str(number))
        wait_until(lambda: numbers(tab)[-1:] == [str(KEPT + 1233)])
        assert tab.text("kept") == "10,000 rows kept, 1,234 gone"
        assert len(tab.lines()) < 200                       # only those in view are elements
        tab.evaluate("list.scrollTop = 0")
        wait_until(lambda: numbers(tab)[:1] == ["1234"])
        top = numbers(tab)[0]
        server.publish("new")                               # what one looks at stays where it is
        tab.wait_for("stream.events === 11235 && !view.isDue")
        assert numbers(tab)[0] == str(int(top) + 1)         # but what is gone is gone
        tab.evaluate("list.scrollTop = 100 * view.rowHeight + 14")
        tab.wait_for("!view.follows && !view.isDue && rows.gone === 1235")
        server.publish("newer")
        tab.wait_for("rows.gone === 1236 && !view.isDue")
        assert tab.evaluate("list.scrollTop - 99 * view.rowHeight") == 14
        tab.wait_for("!document.getElementById('newest').hidden")
        tab.evaluate("list.scrollTop += 10, find('newest').click()")     # both before a frame
        wait_until(lambda: numbers(tab)[-1:] == ["newer"])


def test_the_newest_row_stays_in_view_when_the_page_gets_another_size(tab, server):
    watching(tab, server)
    for number in range(500):
        server.publish(str(number))
    for width, height in ((1280, 800), (390, 844), (1280, 2600)):
        tab.resize(width, height)
        tab.wait_for(f"innerWidth === {width} && !view.isDue")
        wait_until(lambda: numbers(tab)[-1:] == ["499"])
        assert tab.evaluate("document.getElementById('newest').hidden")


def test_rows_are_bounded_in_size_too(tab, server):
    watching(tab, server)
    for number in range(40):
        server.publish(f"{number} " + "x" * 1_000_000)
        tab.wait_for(f"stream.events === {number + 1}")
    assert tab.evaluate("rows.characters <= CHARACTERS_KEPT && rows.length < 40")
    assert tab.evaluate("rows.length + rows.gone") == 40


def test_an_event_without_an_end_is_not_kept(tab):
    def answer(request):
        request.reply(200, b"data: a\n\ndata: " + b"x" * 17_000_000, **STREAM)
        request.hold()
    with SSEServer(port=0) as ours, foreign(answer) as server:
        tab.open(f"{ours.url}/?url={server.url}/")
        wait_until(lambda: len(tab.lines()) == 2)
        assert tab.lines() == ["Data: a", "Connection failed: an event is too long"]
        assert tab.text("status") == "Disconnected"


def test_text_goes_in_as_text(tab, server):
    evil = "<img src=x onerror='document.title=1'>&amp;"
    watching(tab, server)
    server.publish(evil)
    server.publish(evil, "custom")
    server.publish(evil, evil)
    server.publish(json.dumps({evil: [evil]}), "json")
    wait_until(lambda: len(tab.lines()) == 4)
    assert tab.lines()[:3] == ["Data: " + evil, "Custom: " + evil, f"{evil}: {evil}"]
    for row in range(4):
        tab.evaluate(f"select(view.rows[{row}])")
        assert evil in tab.text("detail")
    tab.type_in("search", "<img")
    tab.evaluate("everySecond()")
    assert tab.evaluate("document.images.length") == 0


def test_every_name_is_shown_as_a_name(tab):
    names = ["disk", "error", "open", "gap", "close", "__proto__", "constructor", "<b>x</b>", "é"]

    def answer(request):
        events = "".join(f"event: {name}\ndata: {number}\n\n" for number, name in enumerate(names))
        request.reply(200, events.encode(), **STREAM)
        request.hold()
    with SSEServer(port=0) as ours, foreign(answer) as server:
        tab.open(f"{ours.url}/?url={server.url}/x")
        wait_until(lambda: len(tab.lines()) == len(names))
        assert tab.lines() == [f"{name}: {number}" for number, name in enumerate(names)]
        assert tab.text("status") == "Connected"
        tab.evaluate("everySecond()")
        offered = tab.evaluate("[...find('shown').options].map(option => option.value)")
        assert sorted(offered[1:]) == sorted(names)
        assert tab.text("legend").endswith("others 4")


def test_the_program_of_the_readme_shows_its_events(tab, server):
    watching(tab, server)
    server.publish("1234 MiB free", event="disk")
    wait_until(lambda: tab.lines() == ["disk: 1234 MiB free"])


def test_a_row_has_time_id_size_and_the_event_whole(tab, server):
    watching(tab, server)
    text = "grüße\n" + "x" * 60000
    event_id = server.publish(text, "long")
    wait_until(lambda: len(tab.lines()) == 1)
    assert tab.lines()[0].startswith("long: grüße\u21b5xxx")
    assert len(tab.lines()[0]) < 500
    row = "document.querySelector('.row ." + "{}').textContent"
    assert tab.evaluate(row.format("id")) == event_id
    assert tab.evaluate(row.format("size")) == "58.6 KiB"
    assert tab.evaluate("/^[0-9:]{8}[.][0-9]{3}$/.test("
                        "document.querySelector('.row time').textContent)")
    tab.evaluate("document.querySelector('.row').click()")
    assert "60,008 bytes" in tab.text("facts") and event_id in tab.text("facts")
    assert tab.text("whole").endswith("Show all 60,006 characters")
    tab.evaluate("document.querySelector('#whole button').click()")
    assert tab.text("whole") == text


def test_a_row_that_is_opened_stays_in_view(tab, server):
    watching(tab, server)
    for number in range(200):
        server.publish(str(number))
    wait_until(lambda: numbers(tab)[-1:] == ["199"])
    tab.evaluate("[...document.querySelectorAll('.row')].pop().click()")
    for number in range(200, 400):
        server.publish(str(number))
    tab.wait_for("stream.events === 400 && !view.isDue")
    assert tab.text("whole") == "199" and "199" in numbers(tab)
    assert tab.text("newest") == "Newest (200 below)"


def test_json_is_folded_and_made_when_it_is_opened(tab, server):
    watching(tab, server)
    data = json.dumps({"a": {"b": [None, True, "text"]}, "many": list(range(1000))})
    server.publish(data)
    wait_until(lambda: len(tab.lines()) == 1)
    tab.evaluate("document.querySelector('.row').click()")
    tab.wait_for("find('whole').textContent.includes('many: [ 1000 ]')")
    assert "text" not in tab.text("whole")
    tab.evaluate("find('whole').querySelectorAll('details').forEach(each => each.open = true)")
    tab.wait_for("find('whole').textContent.includes('199800 more')")
    tab.evaluate("find('whole').querySelectorAll('details').forEach(each => each.open = true)")
    tab.wait_for("find('whole').textContent.includes('0: null1: true2: \"text\"')")
    tab.click("raw")
    assert tab.text("whole") == data


def test_from_a_file_it_watches_port_6500(tab):
    try:
        connect(6500).close()
        pytest.skip("something else listens on port 6500")
    except ConnectionRefusedError:
        pass
    with serving("--interval", "0.01", "--port", "6500"):
        tab.open((TOP / "index.html").as_uri())
        wait_until(lambda: kinds(tab) >= {"Data", "Custom"})


# Connections that break

def test_a_lost_connection_is_said_and_comes_back(tab):
    with SSEServer(port=0, retry=0.1) as server:
        port = server.port
        tab.open(server.url)
        tab.wait_for(CONNECTED)
    tab.wait_for(FAILED)
    wait_until(lambda: any("failed 3 times since" in line for line in tab.lines()))
    assert len(outages(tab)) == 1
    with SSEServer(port=port) as server:
        tab.wait_for(CONNECTED)
        wait_until(lambda: "; back after " in outages(tab)[0])
        assert tab.text("reconnects") == "1"


class Proxy(threading.Thread):
    """Forward one TCP port to another; `cut` resets every connection, and new ones are taken."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.target = port
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.pairs = []

    def run(self) -> None:
        threads = []
        while True:
            inner, _ = self.listener.accept()
            if self.target is None:
                break
            outer = connect(self.target)
            self.pairs.append((inner, outer))
            for pair in ((inner, outer), (outer, inner)):
                threads.append(threading.Thread(target=self.forward, args=pair))
                threads[-1].start()
        inner.close(), self.listener.close()
        self.cut()
        for thread in threads:
            thread.join()

    @staticmethod
    def forward(source: socket.socket, sink: socket.socket) -> None:
        try:
            while True:
                data = source.recv(65536)
                if not data:
                    break
                sink.sendall(data)
        except OSError:
            pass
        for sock in (source, sink):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def cut(self) -> None:
        for pair in self.pairs:
            for sock in pair:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
                sock.close()
        self.pairs = []

    def stop(self) -> None:
        self.target = None
        connect(self.port).close()
        self.join()


@contextmanager
def proxied(port: int):
    proxy = Proxy(port)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


def test_a_cut_connection_comes_back_and_the_page_holds_every_event_once(tab):
    with SSEServer(port=0, retry=0.2) as server, proxied(server.port) as proxy:
        tab.open(f"http://127.0.0.1:{proxy.port}/")
        wait_until(lambda: server.clients == 1)
        for number in range(60):
            server.publish(str(number))
            if number in (20, 40):
                wait_until(lambda: len(numbers(tab)) > number - 5)
                proxy.cut()
                tab.wait_for(FAILED)
        wait_until(lambda: len(numbers(tab)) >= 60)
        assert numbers(tab) == [str(number) for number in range(60)]
        assert "gap" not in kinds(tab)
        assert len(outages(tab)) == 2


def test_a_killed_and_restarted_server_is_one_outage_a_gap_and_every_event(tab):
    port = str(free_port())
    arguments = ("--port", port, "--stdin", "--retry", "0.2")
    with serving(*arguments) as server:
        tab.open(f"http://127.0.0.1:{port}/")
        tab.wait_for(CONNECTED)
        server.process.stdin.write(b"before\n"), server.process.stdin.flush()
        wait_until(lambda: numbers(tab) == ["before"])
        server.process.send_signal(signal.SIGKILL)
        tab.wait_for(FAILED)
    with SSEServer(port=int(port), retry=0.2) as server:
        for number in range(5):
            server.publish(str(number))
        wait_until(lambda: numbers(tab) == ["before", *"01234"])
    assert len([line for line in outages(tab) if "; back after " in line]) == 1
    gap, = [line for line in tab.lines() if line.startswith("gap: Missed some events after ")]
    assert " until " in gap and "(unknown: " in gap


def test_a_page_that_reads_on_goes_on_where_it_was_asked_to(tab):
    """Last-Event-ID, `retry` and 204 are those of EventSource."""
    answers = [b"id: 7\nretry: 300\ndata: a\n\nid: no\ndata: lost", b"data: b\n\nid\n\n", b""]
    times = []

    def answer(request):
        times.append(time.monotonic())
        if len(times) > 3:
            return request.reply(204)
        return request.reply(200, answers[len(times) - 1], **STREAM)
    with foreign(answer) as server:
        tab.open(f"{server.url}/page?url={server.url}/stream?a=%20b")
        tab.wait_for("document.getElementById('status').textContent === 'Ended'")
        asked = [(each.path, each.headers["Last-Event-ID"]) for each in server.gets()]
        assert asked == [("/stream?a=%20b", each) for each in (None, "7", None, None)]
        assert all(0.3 <= later - sooner < 2 for sooner, later in zip(times, times[1:]))
        assert numbers(tab) == ["a", "b"]
        assert len(outages(tab)) == 3
        wait_until(lambda: tab.lines()[-1] == "The server has no more to send (204)")


def test_a_retry_of_years_and_one_of_nothing_are_bounded(tab, server):
    watching(tab, server)
    tab.evaluate("""window.pauses = []; window.setTimeout = (act, time) => pauses.push(time);
                    sleep(1e15), sleep(0), 0""")
    assert tab.evaluate("pauses") == [3600000, 100]


@pytest.mark.parametrize("status, text, state", [
    (401, "401 Unauthorized Who are you?", "Disconnected"),
    (403, "403 Forbidden Who are you?", "Disconnected"),
    (404, "404 Not Found Who are you?", "Disconnected"),
    (503, "503 Service Unavailable Who are you?", "Reconnecting"),
    (200, "this is no event stream: text/plain", "Disconnected")])
def test_a_refusal_is_shown_as_what_it_is(tab, status, text, state):
    def answer(request):
        request.reply(status, b"Who are you?\n", **{"Content-Type": "text/plain"})
    with foreign(answer) as server:
        tab.open(f"{server.url}/page?url={server.url}/stream")
        wait_until(lambda: tab.lines() == ["Connection failed: " + text])
        assert tab.text("status") == state
        assert not tab.evaluate("document.getElementById('again').hidden")


def test_a_refused_page_is_let_in_with_a_token_typed_in(tab):
    with SSEServer(port=0, tokens=["look"]) as server:
        tab.open(server.url + "/")
        wait_until(lambda: outages(tab) and "401" in outages(tab)[0])
        assert tab.evaluate("document.getElementById('stream').open")
        tab.type_in("token", "look")
        tab.evaluate("document.querySelector('#where button').click()")
        tab.wait_for(CONNECTED)
        assert "look" not in tab.evaluate("location.href")


def test_a_token_goes_in_the_header_and_to_no_other_server(tab):
    def answer(request):
        if request.command == "OPTIONS":
            return request.reply(204, **PREFLIGHT)
        return request.reply(200, b"retry: 100\ndata: a\n\n", **STREAM)
    with foreign(answer) as server, foreign(answer) as other, SSEServer(port=0) as ours:
        tab.open(f"{ours.url}/?url={server.url}/stream#gr%C3%BCn,say")
        wait_until(lambda: numbers(tab))
        tab.type_in("url", other.url + "/stream"), tab.type_in("token", "secret")
        number = len(server.gets())
        wait_until(lambda: len(server.gets()) > number + 1)
        assert {each.path for each in server.gets()} == {"/stream"}
        assert {each.headers["Authorization"] for each in server.gets()} == {
            "Bearer grün".encode().decode("latin-1")}       # what is watched keeps its own
        tab.type_in("token", "")
        tab.evaluate("document.querySelector('#where button').click()")
        wait_until(lambda: other.gets())
        assert other.gets()[0].headers["Authorization"] is None
        assert tab.evaluate("document.getElementById('publish').hidden")
        assert tab.evaluate("location.hash") == ""
        assert tab.evaluate("new URLSearchParams(location.search).get('url')").startswith(other.url)


def test_a_server_that_lets_no_page_read_it_is_told_from_one_that_is_away(tab, server):
    with foreign(lambda request: request.reply(200, b"data: a\n\n")) as other:
        tab.open(f"{server.url}/?url={other.url}/")
        wait_until(lambda: outages(tab))
        assert "(CORS)" in outages(tab)[0]
    tab.open(f"{server.url}/?url=http://127.0.0.1:{free_port()}/")
    wait_until(lambda: outages(tab))
    assert outages(tab)[0].startswith("Connection failed: the server cannot be reached")


def test_a_server_that_takes_no_last_id_from_a_page_is_still_watched(tab, server):
    def answer(request):
        if request.command == "OPTIONS":
            return request.reply(405)
        return request.reply(200, b"retry: 100\nid: 1\ndata: a\n\n", **STREAM)
    with foreign(answer) as other:
        tab.open(f"{server.url}/?url={other.url}/")
        wait_until(lambda: len(numbers(tab)) > 2)
        notes = [line for line in tab.lines() if line.startswith("The server lets no page send")]
        assert len(notes) == 1


@pytest.mark.parametrize("url", ["javascript:alert(1)", "nothing", "file:///etc/passwd", ""])
def test_what_is_no_url_is_said(tab, server, url):
    tab.open(f"{server.url}/")
    tab.wait_for(CONNECTED)
    tab.evaluate(f"find('url').value = {url!r}; connect()")
    tab.wait_for("document.getElementById('status').textContent === 'Disconnected'")


def test_a_browser_without_event_source_is_told(tab, server):
    with tab.at_start("delete window.EventSource"):
        tab.open(server.url)
    sentence = "Sorry, your browser does not support server-sent events..."
    assert tab.text("nothing") == sentence
    assert tab.lines() == []


def test_where_fetch_gives_no_streams_event_source_is_used(tab):
    with SSEServer(port=0, tokens=["look"], retry=0.2) as server, proxied(server.port) as proxy:
        with tab.at_start("delete window.ReadableStream"):
            tab.open(f"http://127.0.0.1:{proxy.port}/?event=mail&event=error#look")
            tab.wait_for(CONNECTED)
        for number in range(3):
            server.publish(str(number)), server.publish(str(number), "mail")
            wait_until(lambda: len(numbers(tab)) == number + 1)
            proxy.cut()
            tab.wait_for(FAILED)
        assert [line for line in tab.lines() if line.startswith("mail")] == [
            "mail: 0", "mail: 1", "mail: 2"]
        assert numbers(tab) == ["0", "1", "2"]
        assert kinds(tab) == {"Data", "mail", "Connection failed"}
        tab.wait_for(CONNECTED)


# What a person does

def submit(tab) -> None:
    tab.evaluate("document.querySelector('#where button').click()")


def test_publish_from_the_page_and_watch_a_channel(tab):
    with SSEServer(port=0, tokens=["look"], publish_tokens=["say it"]) as server:
        tab.open(server.url + "/")
        wait_until(lambda: outages(tab))        # without a token
        assert tab.evaluate("document.getElementById('publish').hidden")
        tab.open(server.url + "/?channel=news&event=mail#look,say%20it")
        wait_until(lambda: server.clients == 1)
        for text, event, channel in (("plain", "", ""), ("<b>", "mail", "news"),
                                     ("no", "", "sport")):
            tab.type_in("text", text), tab.type_in("event", event)
            tab.type_in("channel", channel)
            tab.evaluate("document.querySelector('#publish button').click()")
            tab.wait_for("document.getElementById('text').value === ''")
        assert tab.text("said").startswith('Published {"id": "')
        wait_until(lambda: len(tab.lines()) == 2)
        assert tab.lines() == ["Data: plain", "mail: <b>"]
        tab.type_in("channels", "news, sport")
        submit(tab)
        wait_until(lambda: set(server._publisher._groups._by_channel) == {"news", "sport"})
        server.publish("goal", channel="sport")
        wait_until(lambda: tab.lines()[-1] == "Data: goal")
        assert tab.evaluate("location.search + location.hash") == (
            "?channel=news&channel=sport&event=mail#look,say%20it")


def test_under_a_path_of_a_proxy_the_page_watches_and_publishes_there(tab):
    with foreign(lambda request: proxied(request)) as proxy:
        with SSEServer(port=0, tokens=["look"], publish_tokens=["say"]) as server:
            proxied = strip_prefix("/live", server.port)
            tab.open(proxy.url + "/live/#look,say")
            tab.wait_for(CONNECTED)
            assert tab.text("watched") == proxy.url + "/live/token"
            tab.type_in("text", "hello")
            tab.evaluate("document.querySelector('#publish button').click()")
            wait_until(lambda: tab.lines() == ["Data: hello"])
            assert tab.evaluate("location.href") == proxy.url + "/live/#look,say"


def test_a_page_that_was_opened_by_its_token_watches_with_it(tab):
    """The server answers /TOKEN with the page. The token is sent as every other one is."""
    with foreign(lambda request: answer(request)) as pages:
        with SSEServer(port=0, tokens=["it's"], publish_tokens=["say"]) as server:
            forward = strip_prefix("", server.port)

            def answer(request):
                if request.path.startswith("/it"):
                    request.path = "/"
                forward(request)
            tab.open(pages.url + "/it%27s#,say")
            tab.wait_for(CONNECTED)
            assert tab.text("watched") == pages.url + "/token"
            assert tab.evaluate("location.href") == pages.url + "/it%27s#,say"
            tab.type_in("token", "other")
            submit(tab)
            wait_until(lambda: outages(tab))
            assert tab.evaluate("location.href") == pages.url + "/"


def test_what_was_not_published_is_said(tab, open_server):
    watching(tab, open_server, "/#,wrong")
    tab.type_in("text", "a")
    tab.evaluate("document.querySelector('#publish button').click()")
    wait_until(lambda: tab.lines() and tab.lines()[0].startswith("Not published: 401 This pub"))
    assert tab.evaluate("document.getElementById('text').value") == "a"


def test_pause_filter_and_chart(tab, server):
    watching(tab, server)
    server.publish("one")
    wait_until(lambda: tab.lines() == ["Data: one"])
    tab.click("pause")
    assert tab.evaluate("document.getElementById('pause').getAttribute('aria-pressed')") == "true"
    server.publish("two")
    server.publish("three", "custom")
    wait_until(lambda: tab.text("pause") == "Go on (2 held)")
    assert tab.lines() == ["Data: one"]
    tab.click("pause")
    wait_until(lambda: tab.lines() == ["Data: one", "Data: two", "Custom: three"])
    tab.evaluate("everySecond()")
    tab.type_in("shown", "custom")
    wait_until(lambda: tab.lines() == ["Custom: three"])
    server.publish("four")
    server.publish("five", "custom")
    wait_until(lambda: tab.lines() == ["Custom: three", "Custom: five"])
    assert tab.text("kept") == "2 shown of 5 rows kept, 0 gone"
    tab.type_in("shown", "")
    wait_until(lambda: len(tab.lines()) == 5)
    tab.wait_for("/now [0-9]+, at most [1-9]/.test(find('bars').getAttribute('aria-label'))")
    unnamed = ("[...document.querySelectorAll('input, select, button')].filter("
               "e => !(e.ariaLabel || e.labels.length || e.textContent))")
    assert tab.evaluate(unnamed + ".length") == 0


def test_search_finds_in_data_name_and_id_and_marks_it(tab, server):
    watching(tab, server)
    server.publish("x" * 1000 + "Needle (1)" + "y" * 1000)
    server.publish("hay", "needle (1)")
    event_id = server.publish("other")
    wait_until(lambda: len(tab.lines()) == 3)
    tab.type_in("search", "needle (1)")
    wait_until(lambda: len(tab.lines()) == 2)
    assert tab.evaluate("document.querySelector('mark').textContent") == "Needle (1)"
    tab.type_in("search", event_id)
    wait_until(lambda: tab.lines() == ["Data: other"])
    tab.type_in("search", ".*")
    wait_until(lambda: tab.lines() == [])
    assert tab.text("nothing") == "Nothing matches"
    tab.type_in("search", "")
    wait_until(lambda: len(tab.lines()) == 3)
    tab.click("clear")
    wait_until(lambda: tab.lines() == [])


def save(tab) -> list:
    """Save what is shown, and return it as soon as the file has it all."""
    rows = tab.evaluate("view.rows.length")
    for old in tab.folder.glob("*"):        # of this second, it would have the same name
        old.unlink()

    def lines() -> list:
        return [line for path in tab.folder.glob("events-*.jsonl")
                for line in path.read_bytes().splitlines(True) if line.endswith(b"\n")]
    tab.click("save")
    wait_until(lambda: len(lines()) == rows)
    return [json.loads(line) for line in lines()]


def test_a_row_is_copied_and_what_is_shown_is_saved_as_json_lines(tab, server):
    tab.browser_call("Browser.grantPermissions",
                     permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    watching(tab, server)
    ids = [server.publish("é\n" + text, name) for text, name in (("1", None), ("2", "custom"))]
    wait_until(lambda: len(tab.lines()) == 2)
    tab.evaluate("document.querySelectorAll('.row')[1].click()")
    tab.click("copy")
    tab.wait_for("find('said').textContent === 'Row copied'")
    row = json.loads(tab.evaluate("navigator.clipboard.readText()"))
    assert (row["event"], row["id"], row["data"]) == ("custom", ids[1], "é\n2")
    saved = save(tab)
    assert [(each["event"], each["id"]) for each in saved] == [
        ("message", ids[0]), ("custom", ids[1])]
    assert saved[1] == row


def test_the_curl_command_shows_the_same_stream(tab):
    with SSEServer(port=0, tokens=["it's"]) as server:
        watching(tab, server, "/?channel=a%20b#it's")
        command = tab.evaluate("curlCommand()")
        assert command.startswith("curl -N -H 'Authorization: Bearer it'\\''s' 'http://")
        need("curl", "curl")
        with subprocess.Popen(["sh", "-c", "exec " + command], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL) as process:
            wait_until(lambda: server.clients == 2)
            server.publish("to both", channel="a b")
            while b"to both" not in process.stdout.readline():
                pass
            process.kill()
        wait_until(lambda: tab.lines() == ["Data: to both"])


def test_the_address_says_what_is_watched(tab, server):
    watching(tab, server)
    tab.type_in("channels", "news, a b")
    tab.type_in("since", "all")
    submit(tab)
    tab.wait_for("location.search === '?channel=news&channel=a+b&since=all'")
    assert tab.text("watched") == server.url + "/token?channel=news&channel=a+b&since=all"
    tab.open(tab.evaluate("location.href"))
    tab.wait_for(CONNECTED)
    assert tab.evaluate("find('channels').value") == "news, a b"


def test_other_channels_go_on_where_it_is_and_another_beginning_does_not(tab):
    def answer(request):
        request.reply(200, b"id: 1\ndata: a\n\n", **STREAM)
        request.hold()
    with foreign(answer) as server:
        tab.open(f"{server.url}/page?url={server.url}/stream")
        for number, (channels, since) in enumerate((("", ""), ("b", ""), ("b", "all")), 1):
            tab.type_in("channels", channels), tab.type_in("since", since)
            submit(tab) if number > 1 else None
            tab.wait_for(f"rows.length === {number}")
        assert [(each.path, each.headers["Last-Event-ID"]) for each in server.gets()] == [
            ("/stream", None), ("/stream?channel=b", "1"), ("/stream?channel=b&since=all", None)]


def test_figures_tell_about_the_stream(tab):
    with SSEServer(port=0, heartbeat=0.2) as server:
        watching(tab, server)
        event_id = server.publish("x" * 2000)
        tab.wait_for("stream.comments > 1")
        tab.evaluate("everySecond()")
        assert tab.text("events") == "1" and tab.text("last-id") == event_id
        assert tab.text("bytes").startswith("2.") and tab.text("bytes").endswith(" KiB")
        assert tab.evaluate("/^[1-4][.][0-9] s$/.test(find('retry').textContent)")
        assert tab.evaluate("/^[0-9:]{8}$/.test(find('since-when').textContent)")


def test_the_chart_stacks_the_five_commonest_names(tab, server):
    watching(tab, server)
    for number, name in enumerate("abcdefg"):
        for _ in range(10 - number):
            server.publish("", name)
    tab.wait_for("stream.events === 49")
    tab.evaluate("everySecond(), everySecond()")
    assert tab.evaluate("[...find('legend').children].map(each => each.textContent)") == [
        "a 10", "b 9", "c 8", "d 7", "e 6", "others 9"]
    tab.wait_for("[...document.querySelectorAll('#bars path[class]')].every("
                 "path => path.getAttribute('d'))")
    tab.evaluate("find('legend').children[1].click()")
    wait_until(lambda: kinds(tab) == {"b"})
    tab.evaluate("find('legend').children[1].click()")
    wait_until(lambda: len(kinds(tab)) == 7)


def test_names_without_end_are_bounded(tab):
    with SSEServer(port=0, history=20000) as server:
        watching(tab, server)
        for number in range(KEPT + 1000):
            server.publish("", f"name {number}")
        tab.wait_for(f"stream.events === {KEPT + 1000}")
        tab.evaluate("everySecond()")
        assert tab.evaluate("seconds.every(second => second.names.size <= NAMES_COUNTED + 1)")
        assert tab.evaluate("rows.names.size") == KEPT
        assert tab.evaluate("find('shown').options.length") <= 202


def test_keys_do_what_the_help_says(tab, server):
    watching(tab, server)
    for number in range(5):
        server.publish(str(number))
    wait_until(lambda: len(tab.lines()) == 5)
    tab.press("?")
    assert tab.evaluate("find('help').open && find('keys').textContent.includes('jump to')")
    tab.click("help-close")
    tab.press("p")
    assert tab.text("pause") == "Pause" or tab.evaluate("Boolean(frozen)")
    tab.press("p")
    tab.evaluate("list.focus()")
    tab.press("ArrowUp", "ArrowUp", "Enter")
    assert tab.text("whole") == "3"
    assert tab.evaluate("document.activeElement.id") == "detail"
    tab.press("Escape")
    assert tab.evaluate("find('detail').hidden && document.activeElement === list")
    tab.press("Home", "Enter")
    assert tab.text("whole") == "0"
    assert tab.evaluate("document.getElementById(list.getAttribute('aria-activedescendant'))"
                        ".getAttribute('aria-selected')") == "true"
    tab.press("/")
    assert tab.evaluate("document.activeElement.id") == "search"
    tab.press("p", "x")
    wait_until(lambda: tab.text("nothing") == "Nothing matches")
    assert tab.evaluate("find('search').value") == "px"
    tab.evaluate("document.activeElement.blur(); find('keys-on').checked = false")
    tab.press("x")
    assert tab.evaluate("rows.length") == 5


def test_it_works_under_the_policy_that_the_server_sends(tab, open_server):
    watch = "document.addEventListener('securitypolicyviolation', each => broken.push(each));"
    with foreign(lambda request: request.reply(404)) as pages:
        with tab.at_start("window.broken = []; " + watch):
            tab.open(f"{pages.url}/page?url={open_server.url}/token#,SECRET")
            tab.wait_for(CONNECTED)
        tab.type_in("text", "hello")
        tab.evaluate("document.querySelector('#publish button').click()")
        wait_until(lambda: tab.lines() == ["Data: hello"])
        assert len(save(tab)) == 1
        tab.click("ask"), tab.click("help-close")
        tab.evaluate("everySecond(); document.querySelector('.row').click()")
        tab.evaluate("list.focus()")
        assert tab.evaluate("getComputedStyle(find('lines')).position") == "relative"
        assert tab.evaluate("broken.length") == 0


# Speed

LONGEST = 100           # milliseconds of work after which the page must let the browser draw


@contextmanager
def smooth(tab):
    """In a window of usual size, fail if a task of the page freezes it.

    What counts is the time of its thread, not that of the clock: a busy machine adds none.
    """
    tab.resize(1280, 800)
    try:
        with tab.tasks() as tasks:
            yield
    finally:
        tab.resize(1280, 2600)
    assert max(tasks) < LONGEST


def test_a_burst_of_20_000_events_freezes_nothing(tab):
    with smooth(tab), SSEServer(port=0, history=30000) as server:
        watching(tab, server)
        for number in range(20000):
            server.publish(f'{{"number": {number}, "text": "some text of usual length"}}',
                           f"name {number % 7}")
        tab.wait_for("stream.events === 20000 && !view.isDue")


def test_300_000_events_that_are_there_at_once_freeze_nothing(tab):
    body = b"".join(b"event: %d\ndata: number %d and some more text\n\n" % (number % 7, number)
                    for number in range(300000))

    def answer(request):
        request.reply(200, body, **STREAM)
        request.hold()
    with foreign(answer) as server, smooth(tab):
        tab.open(f"{server.url}/page?url={server.url}/stream")
        tab.wait_for("stream.events === 300000 && !view.isDue")


def flood(tab, seconds: float) -> None:
    """Publish 2,000 events a second."""
    with smooth(tab), SSEServer(port=0, history=30000) as server:
        watching(tab, server)
        start = time.monotonic()
        for number in range(int(2000 * seconds)):
            server.publish(f"number {number} and some more", f"name {number % 7}")
            if number % 20 == 0:
                time.sleep(max(0, start + number / 2000 - time.monotonic()))
        tab.wait_for(f"stream.events === {int(2000 * seconds)} && !view.isDue")


def test_2_000_events_a_second_are_drawn_without_a_long_frame(tab):
    flood(tab, 3)


@pytest.mark.long
def test_2_000_events_a_second_for_a_minute(tab):
    flood(tab, 60)


# For everybody

@contextmanager
def everything_shown(tab, width: int, height: int, dark: bool):
    """Open a page on which there is one of everything."""
    def answer(request):
        request.reply(200, b'retry: 100\nid: 1\ndata: a\n\nevent: custom\ndata: {"a": [1, "b"]}\n\n'
                      b'event: gap\ndata: {"after": "1", "resumed": null, "reason": "evicted"}\n\n'
                      + b"event: d\ndata\n\nevent: e\ndata\n\nevent: f\ndata\n\n"
                      + b"data: " + b"x" * 1000 + b"\n\n", **STREAM)
        if len(server.gets()) > 1:
            request.hold()
    tab.resize(width, height, dark)
    with foreign(answer) as server:
        try:
            tab.open(f"{server.url}/page?url={server.url}/stream#,say")
            tab.wait_for("stream.opens === 2 && rows.length > 14")
            tab.evaluate("everySecond(); select(view.rows[1]); find('stream').open = true;"
                         "find('more').classList.add('open')")
            yield tab
        finally:
            tab.resize(1280, 2600)


SIZES = pytest.mark.parametrize("width, height", [(1280, 800), (390, 844)])
COLOURS = pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])


@SIZES
def test_nothing_is_wider_than_the_page(tab, width, height):
    with everything_shown(tab, width, height, False):
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        wide = """[...document.querySelectorAll('body *')].filter(each => !each.closest(
            '#list, #legend, .unseen') && each.getBoundingClientRect().right > innerWidth)
            .map(each => each.tagName + each.id)"""
        assert tab.evaluate(wide) == []
        assert tab.evaluate("find('list').clientHeight") > 90


def test_on_a_phone_targets_are_large_and_controls_leave_the_room_to_the_rows(tab, server):
    with everything_shown(tab, 390, 844, False):
        fields = "button, input:not([type=checkbox]), select, .row"
        small = f"""[...document.querySelectorAll('{fields}')]
            .filter(each => each.offsetParent && !each.closest('#whole') &&
                    (each.offsetHeight < 44 || each.offsetWidth < 44 ||
                     (!each.matches('.row') && parseFloat(getComputedStyle(each).fontSize) < 16)))
            .map(each => [each.id, each.offsetWidth, each.offsetHeight])"""
        assert tab.evaluate(small) == []
    tab.resize(390, 844)
    watching(tab, server)
    assert tab.evaluate("find('lines').getBoundingClientRect().top") < 844 / 3
    tab.resize(1280, 2600)


CONTRAST = """(() => {
    const light = text => { const parts = text.match(/[0-9.]+/g).map(Number).slice(0, 3);
        const [r, g, b] = parts.map(each => (each /= 255) <= .04045 ? each / 12.92
                                             : ((each + .055) / 1.055) ** 2.4);
        return .2126 * r + .7152 * g + .0722 * b + .05; };
    const paper = light(getComputedStyle(document.body).backgroundColor);
    return Math.min(...[...document.querySelectorAll('input, select, #pause, #save')].map(each => {
        const edge = light(getComputedStyle(each).borderTopColor);
        return Math.min(...[paper, light(getComputedStyle(each).backgroundColor)].map(
            ground => Math.max(ground, edge) / Math.min(ground, edge))); })); })()"""


@COLOURS
def test_borders_of_fields_can_be_seen(tab, dark):
    with everything_shown(tab, 1280, 800, dark):
        assert tab.evaluate(CONTRAST) >= 3


def test_rows_are_not_read_out_but_state_and_a_sum_are(tab, server):
    watching(tab, server)
    assert tab.evaluate("find('lines').getAttribute('role')") == "log"
    assert tab.evaluate("find('lines').getAttribute('aria-live')") == "off"
    assert tab.evaluate("find('status').getAttribute('role')") == "status"
    server.publish("a"), server.publish("b")
    wait_until(lambda: len(tab.lines()) == 2)
    tab.evaluate("summarise()")
    assert tab.text("summary") == "2 events in half a minute"


@pytest.fixture(scope="module")
def axe(tmp_path_factory) -> str:
    """The checker axe-core, as a script."""
    folder = tmp_path_factory.mktemp("npm")
    install = [need("npm", "npm"), "install", "--no-audit", "--no-fund", "--prefix", str(folder),
               "axe-core"]
    done = subprocess.run(install, cwd=folder, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip("npm cannot install axe-core: " + done.stderr.strip()[-300:])
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text("utf-8")


@pytest.mark.interop
@SIZES
@COLOURS
def test_axe_finds_nothing(tab, axe, width, height, dark):
    with everything_shown(tab, width, height, dark):
        tab.evaluate(axe + "; 0")
        found = tab.evaluate("axe.run().then(each => each.violations.map("
                             "one => [one.id, one.nodes.map(node => node.html)]))")
        assert found == []
        tab.click("ask")
        assert tab.evaluate("axe.run().then(each => each.violations.length)") == 0
