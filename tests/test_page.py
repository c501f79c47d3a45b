"""The page in a real browser: headless Chromium on a real server, on others, and on the file."""
import json
import os
import signal
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from glob import glob
from pathlib import Path

import pytest

from browser import browser
from helpers import GET, TOP, connect, free_port, need, serving, wait_until
from interop.in_browser import WEBKIT, command
from page_cases import CASES
from page_servers import POLICY, PREFLIGHT, STREAM, foreign, strip_prefix
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
    if "tab" in request.fixturenames and "parse" not in request.fixturenames:
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
    if not tab.evaluate("location.protocol === 'file:'"):
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
    assert tab.evaluate("rows.characters <= CHARACTERS_KEPT && rows.list.length < 40")
    assert tab.evaluate("rows.list.length + rows.gone") == 40


def test_names_and_ids_are_bounded_in_size_too(tab):
    name = "n" * 1_000_000

    def answer(request):
        request.reply(200, f"event: {name}\nid: {name}\ndata: x\n\n".encode() * 20, **STREAM)
        request.hold()
    with SSEServer(port=0) as ours, foreign(answer) as server:
        tab.open(f"{ours.url}/?url={server.url}/")
        tab.wait_for("stream.events === 20 && !view.isDue")
        assert tab.evaluate("rows.characters <= CHARACTERS_KEPT && rows.list.length === 15")
        tab.evaluate("everySecond(), select(view.rows[0])")
        assert tab.evaluate("document.body.innerText.length") < 30_000


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
        assert tab.text("legend").endswith("others 1")


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
    # The scroll event of the last drawing may come after the click, and is no scrolling
    tab.evaluate("toNewest(), [...document.querySelectorAll('.row')].pop().click(), "
                 "list.dispatchEvent(new Event('scroll'))")
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


def test_json_is_shown_with_the_numbers_and_keys_that_were_sent(tab, server):
    watching(tab, server)
    server.publish('{"id": 12345678901234567890, "price": 1.10, "huge": 1e999, "k": 1, "k": [2]}')
    server.publish(r'["gr\u00fc\u00dfe, \"you\" {[", {"": "\\"}, {}, []]')
    wait_until(lambda: len(tab.lines()) == 2)
    tab.evaluate("select(view.rows[0])")
    tab.wait_for("find('whole').textContent.includes('{ 5 }')")
    for part in ("id: 12345678901234567890", "price: 1.10", "huge: 1e999", "k: 1", "k: [ 1 ]"):
        tab.wait_for(f"find('whole').textContent.includes({part!r})")
    tab.evaluate("select(view.rows[1])")
    tab.wait_for("find('whole').textContent.includes('3: [ 0 ]')")
    assert tab.text("whole") == r'[ 4 ]0: "grüße, \"you\" {["1: { 1 }2: { 0 }3: [ 0 ]'


def test_each_name_is_told_from_every_other_and_is_the_same_everywhere(tab, server):
    watching(tab, server)
    names = [None, "custom", "Custom", "Data", '"Custom"', " ", "data"]
    for name in names:
        server.publish("x", name)
    wait_until(lambda: len(tab.lines()) == len(names))
    shown = ["Data", "Custom", '"Custom"', '"Data"', r'"\"Custom\""', '" "', "data"]
    assert tab.lines() == [name + ": x" for name in shown]
    tab.evaluate("everySecond()")
    assert sorted(tab.evaluate("[...find('shown').options].map(each => each.text)")[1:]) == sorted(
        shown)
    assert sorted(tab.evaluate("[...find('legend').children].map(each => each.textContent)")) == (
        sorted(name + " 1" for name in shown))
    for number, name in enumerate(shown):
        tab.evaluate(f"select(view.rows[{number}])")
        assert tab.text("detail-name") == name


def test_characters_that_cannot_be_seen_are_shown_and_turn_nothing_round(tab):
    texts = ["a\0b", "a\x1b[31mb", "user\u202egpj.exe", "\u2066x\u2069", "", "  \xa0", "a\tb"]

    def answer(request):
        events = "".join(f"event: n\u202e\ndata: {text}\n\n" for text in texts)
        request.reply(200, events.encode(), **STREAM)
        request.hold()
    with SSEServer(port=0) as ours, foreign(answer) as server:
        tab.open(f"{ours.url}/?url={server.url}/x")
        wait_until(lambda: len(tab.lines()) == len(texts))
        shown = ["a⟨U+0000⟩b", "a⟨U+001B⟩[31mb", "user⟨U+202E⟩gpj.exe", "⟨U+2066⟩x⟨U+2069⟩",
                 "empty", "␣␣␣", "a⇥b"]
        assert tab.lines() == ["n⟨U+202E⟩: " + text for text in shown]
        # What stands for nothing cannot be taken for data
        style = "getComputedStyle(find('rows').children[{}].querySelector('.text')).fontStyle"
        assert [tab.evaluate(style.format(row)) for row in (0, 4)] == ["normal", "italic"]
        tab.evaluate("select(view.rows[5])")
        assert tab.text("whole") == "␣␣␣"
        tab.evaluate("select(view.rows[2])")
        assert tab.text("whole") == "user⟨U+202E⟩gpj.exe"
        assert "U+202E" in tab.text("facts")
        tab.browser_call("Browser.grantPermissions",
                         permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
        tab.click("copy-data")
        tab.wait_for("find('said').textContent === 'Data copied'")
        assert tab.evaluate("navigator.clipboard.readText()") == texts[2]
        assert tab.evaluate("document.body.innerText.match(/[\\u202e\\0]/)") is None


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
    wait_until(lambda: any("(3 attempts since" in line for line in tab.lines()))
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
    gap, = [line for line in tab.lines() if line.startswith("gap: ")]
    assert gap.startswith("gap: Events may be missing after ")


def test_an_orderly_end_is_no_failure_and_the_next_attempt_is_counted_down(tab):
    with SSEServer(port=0, retry=60) as server:
        watching(tab, server)
    wait_until(lambda: tab.lines())
    assert tab.lines()[0].startswith("The server ended the stream; next attempt at ")
    assert tab.evaluate("!document.querySelector('.row.failed, #status.failed')")
    assert tab.text("status") == "Reconnecting"     # a screen reader is not told each second
    tab.wait_for("/^in ([1-9][0-9]?|1 min [0-9]+|2 min 0) s$/.test(find('countdown').textContent)")
    before = tab.text("countdown")
    wait_until(lambda: tab.text("countdown") != before)
    tab.wait_for("document.title.startsWith('Reconnecting in ')")


def test_the_title_of_the_tab_says_state_and_rate(tab, server):
    watching(tab, server)
    tab.wait_for("document.title === 'Connected 0/s \u2013 Server updates'")
    for _ in range(3):
        server.publish("x")
    tab.wait_for("stream.events === 3")
    tab.wait_for("/^Connected [1-3].s/.test(document.title)")


def test_welcome_is_no_row_and_not_counted(tab):
    def answer(request):
        request.reply(200, b'id: 5-0\nretry: 2000\nevent: welcome\ndata: {"heartbeat": 15}\n\n'
                           b"event: welcome\ndata: home\n\n"
                           b'event: busy\ndata: {"retry": "no"}\n\n', **STREAM)
        request.hold()
    with SSEServer(port=0) as ours, foreign(answer) as server:
        tab.open(f"{ours.url}/?url={server.url}/x")
        # Somebody else's events that are called so are rows
        wait_until(lambda: tab.lines() == ["welcome: home", 'busy: {"retry": "no"}'])
        tab.evaluate("everySecond()")
        assert tab.evaluate("[stream.events, stream.lastId, stream.retry]") == [2, "5-0", 2000]
        assert tab.text("heartbeat") == "15 s"


def test_a_server_that_is_full_is_told_in_words_with_the_time_of_the_next_attempt(tab):
    with SSEServer(port=0, max_clients=1, retry=0.3) as server:
        with connect(server.port) as other:
            other.sendall(GET)
            wait_until(lambda: server.clients == 1)
            tab.open(server.url + "/")
            busy = "The server is busy: it is full, or not ready; next attempt at "
            wait_until(lambda: tab.lines() and tab.lines()[0].startswith(busy))
            assert len(tab.lines()) == 1 and tab.text("status") == "Reconnecting"
            assert tab.evaluate("stream.nextAt - Date.now() > 1000 && !document.querySelector("
                                "'.row.failed')")
            tab.click("again")
            wait_until(lambda: "(2 attempts since " in tab.lines()[0])
            assert len(tab.lines()) == 1 and tab.text("reconnects") == "0"
        wait_until(lambda: server.clients == 0)
        tab.click("again")
        tab.wait_for(CONNECTED)
        assert "; back after " in tab.lines()[0]


@pytest.mark.parametrize("after, resumed, reason, text", [
    ("1795709887000-0", "1795709899000-3", "evicted",
     "Events are missing after {0} and before {1}: the server no longer keeps them. "
     "How many is not known"),
    ("1795709887000-0", None, "lagging",
     "Events are missing after {0}: this page read too slowly. How many is not known"),
    ("77", "1795709899000-3", "unknown",
     "Events may be missing after the id 77 and before {1}: the server does not know this id "
     "and cannot tell"),
    ("0-0", "1795709899000-3", "evicted",
     "Events are missing after the beginning and before {1}: the server no longer keeps them. "
     "How many is not known")])
def test_a_gap_says_what_is_known_to_be_lost_and_what_is_not(tab, after, resumed, reason, text):
    gap = json.dumps({"after": after, "resumed": resumed, "reason": reason})

    def answer(request):
        request.reply(200, f"event: gap\ndata: {gap}\n\n".encode(), **STREAM)
        request.hold()
    with SSEServer(port=0) as ours, foreign(answer) as server:
        tab.open(f"{ours.url}/?url={server.url}/x")
        wait_until(tab.lines)
        times = [time.strftime("%Y-%m-%d %H:%M:%S.000", time.localtime(seconds))
                 for seconds in (1795709887, 1795709899)]
        shown = tab.lines()[0].replace(time.strftime("%Y-%m-%d "), "")
        assert shown == "gap: " + text.format(*times).replace(time.strftime("%Y-%m-%d "), "")


def test_counts_and_units_are_right_while_paused_and_after_too_many(tab):
    with SSEServer(port=0, history=20000) as server:
        watching(tab, server)
        server.publish("x")
        wait_until(lambda: tab.lines() == ["Data: x"])
        tab.evaluate("select(view.rows[0])")
        assert "1 byte" in tab.text("facts") and "1 bytes" not in tab.text("facts")
        assert tab.text("kept") == "1 row kept, 0 gone"
        tab.click("pause")
        for number in range(KEPT + 5):
            server.publish(str(number))
        tab.wait_for(f"stream.events === {KEPT + 6} && !view.isDue")
        # What is looked at stays, and the newest 10,000 that came meanwhile are kept
        assert tab.lines() == ["Data: x"]
        assert tab.text("pause") == "Go on (10,000 held)"
        assert tab.text("kept") == "1 row held still, 10,000 rows kept, 6 gone"
        tab.click("pause")
        wait_until(lambda: numbers(tab)[-1:] == [str(KEPT + 4)])
        assert tab.text("kept") == "10,000 rows kept, 6 gone"


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
        ends = [line for line in tab.lines() if line.startswith("The server ended the stream")]
        assert len(ends) == 2 and outages(tab) == []
        wait_until(lambda: tab.lines()[-1] == "The server has no more to send (204)")


def test_a_retry_of_years_and_one_of_nothing_are_bounded(tab, server):
    watching(tab, server)
    tab.evaluate("""stop.abort(), wake(), window.pauses = [];
        setTimeout = (act, time) => { pauses.push(time), nextTask().then(act); };
        attempt = async stream => {
            if (pauses.length > 1) stop.abort();
            stream.retry = pauses.length ? 0 : 1e15;
            return failed("x");
        };
        stop = new AbortController(), follow(stream, stop.signal)""")
    assert tab.evaluate("pauses") == [3600000, 100]


@pytest.mark.parametrize("status, text, state, field", [
    (401, "the server asks for a token", "Disconnected", "token"),
    (403, "the server does not allow this (403 Forbidden): Who are you?", "Disconnected", "token"),
    (404, "there is nothing at this address", "Disconnected", "url"),
    (503, "the server cannot answer now (503 Service Unavailable); next attempt at ",
     "Reconnecting", ""),
    (200, "this address sends no events, but text/plain", "Disconnected", "url")])
def test_a_refusal_is_a_sentence_and_the_field_that_needs_attention_has_the_focus(
        tab, status, text, state, field):
    def answer(request):
        request.reply(status, b"Who are you?\n", **{"Content-Type": "text/plain"})
    with foreign(answer) as server:
        tab.open(f"{server.url}/page?url={server.url}/stream")
        failure = f"Connection failed: {text}"
        wait_until(lambda: outages(tab) and outages(tab)[0].startswith(failure))
        assert len(tab.lines()) == 1
        assert tab.text("status") == state
        assert not tab.evaluate("document.getElementById('again').hidden")
        assert tab.evaluate("document.activeElement.id") == field
        if field:
            assert tab.text("trouble").lower() == text.lower() + "."
            assert tab.evaluate("document.activeElement.getAttribute('aria-invalid')") == "true"
        tab.evaluate("select(view.rows[0])")
        assert "Who are you?" in tab.text("whole")      # what the server said is there, too


def test_a_refused_page_is_let_in_with_a_token_typed_in(tab):
    with SSEServer(port=0, tokens=["look"]) as server:
        tab.open(server.url + "/")
        wait_until(lambda: outages(tab) == ["Connection failed: the server asks for a token"])
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


def test_a_token_that_was_typed_in_survives_a_reload_and_is_kept_nowhere_else(tab):
    with SSEServer(port=0, tokens=["look"], publish_tokens=["say"]) as server:
        tab.open(server.url + "/")
        wait_until(lambda: outages(tab))
        tab.type_in("token", "look"), tab.type_in("publish-token", "say")
        submit(tab)
        tab.wait_for(CONNECTED)
        tab.call("Page.reload")
        wait_until(lambda: server.clients == 1 and tab.evaluate("typeof stream === 'object'"))
        tab.wait_for(CONNECTED)
        assert not tab.evaluate("find('publish').hidden")
        kept = "[location.href, document.cookie, {...localStorage}, history.state, name]"
        assert "look" not in json.dumps(tab.evaluate(kept))
        # To another server it does not go, not even after a reload
        with foreign(lambda request: request.reply(200, b"data: a\n\n", **STREAM)) as other:
            tab.open(f"{server.url}/?url={other.url}/stream")
            wait_until(lambda: numbers(tab))
            assert other.gets()[0].headers["Authorization"] is None


def test_a_server_that_lets_no_page_read_it_is_told_from_one_that_is_away(tab, server):
    with foreign(lambda request: request.reply(200, b"data: a\n\n")) as other:
        tab.open(f"{server.url}/?url={other.url}/")
        wait_until(lambda: outages(tab))
        assert "(CORS)" in outages(tab)[0]
        assert outages(tab)[0].endswith("--origin " + server.url)
        assert tab.evaluate("document.activeElement.id") == "url"
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
    assert tab.text("trouble") == (
        "This is no web address. Write http:// or https://, and then the host.")
    assert tab.evaluate("document.activeElement.id") == "url"


def test_a_browser_without_event_source_is_told(tab, server):
    with tab.at_start("delete window.EventSource"):
        tab.open(server.url)
    sentence = "Sorry, your browser does not support server-sent events..."
    assert tab.text("nothing") == sentence
    assert tab.lines() == []


# What a person does

def submit(tab) -> None:
    tab.evaluate("document.querySelector('#where button').click()")


def test_publish_from_the_page_and_watch_a_channel(tab):
    with SSEServer(port=0, tokens=["look"], publish_tokens=["say it"]) as server:
        tab.open(server.url + "/")
        wait_until(lambda: outages(tab))        # without a token
        assert tab.evaluate("document.getElementById('publish').hidden")
        tab.open(server.url + "/?channel=news#look,say%20it")
        wait_until(lambda: server.clients == 1)
        for text, event, channel in (("plain", "", ""), ("<b>", "mail", "news"),
                                     ("no", "", "sport")):
            tab.type_in("text", text), tab.type_in("event", event)
            tab.type_in("channel", channel)
            tab.evaluate("document.querySelector('#publish button').click()")
            tab.wait_for("document.getElementById('text').value === ''")
        wait_until(lambda: len(tab.lines()) == 2)
        assert tab.lines() == ["Data: plain", "mail: <b>"]
        tab.type_in("channels", "news, sport")
        submit(tab)
        wait_until(lambda: set(server._publisher._groups._by_channel) == {"news", "sport"})
        server.publish("goal", channel="sport")
        wait_until(lambda: tab.lines()[-1] == "Data: goal")
        assert tab.evaluate("location.search + location.hash") == (
            "?channel=news&channel=sport#look,say%20it")


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
    with SSEServer(port=0, tokens=["it's"], publish_tokens=["say"]) as server:
        watching(tab, server, "/it%27s#,say")
        assert tab.text("watched") == server.url + "/token"
        assert tab.evaluate("location.href") == server.url + "/it%27s#,say"
        tab.type_in("text", "hello")
        publish(tab)
        wait_until(lambda: tab.lines() == ["Data: hello"])
        tab.type_in("token", "other")
        submit(tab)
        wait_until(lambda: "Connection failed: the server does not know this token" in tab.lines())
        assert tab.evaluate("location.href") == server.url + "/"        # no token that is not used


def publish(tab) -> None:
    tab.evaluate("document.querySelector('#publish button').click()")


def test_what_was_published_is_said_in_words_and_where_it_went(tab):
    with SSEServer(port=0, publish_tokens=["say"]) as server:
        watching(tab, server, "/?channel=news#,say")
        assert tab.evaluate("find('channel').value") == "news"      # of the address
        tab.type_in("text", "a")
        publish(tab)
        wait_until(lambda: tab.lines() == ["Data: a"])
        said = "Published to the channel {}, with the id {}"
        last_id = tab.evaluate("stream.lastId")
        tab.wait_for("find('text').value === ''")
        assert tab.text("said") == said.format("news", last_id)
        tab.type_in("text", "b"), tab.type_in("channel", "sport")
        publish(tab)
        tab.wait_for("find('text').value === ''")
        assert tab.text("said").endswith(
            ". It is not shown here: this page does not watch that channel")
    tab.type_in("text", "c")
    publish(tab)
    tab.wait_for("find('said').textContent === 'Not published: the server cannot be reached'")
    assert tab.evaluate("find('text').value") == "c"


def test_what_was_not_published_is_said(tab, open_server):
    watching(tab, open_server, "/#,wrong")
    tab.type_in("text", "a")
    publish(tab)
    tab.wait_for("find('said').textContent === "
                 "'Not published: the server does not know the publish token'")
    assert tab.evaluate("document.getElementById('text').value") == "a"


def test_a_signed_token_of_the_address_publishes_too(tab):
    jwt = pytest.importorskip("jwt")
    key = "a secret of thirty-two bytes or more"
    token = jwt.encode({"exp": time.time() + 600, "subscribe": ["news"], "publish": ["news"]}, key)
    with SSEServer(port=0, jwt_key=key) as server:
        watching(tab, server, f"/?channel=news#{token}")
        assert tab.text("may-watch") == "This page, the channels news."
        assert tab.text("may-publish") == "This page, to the channels news."
        tab.type_in("text", "a")
        publish(tab)
        wait_until(lambda: tab.lines() == ["Data: a"])


def test_an_empty_page_teaches_what_to_do_with_lines_that_work(tab, server):
    with SSEServer(port=0, tokens=["it's"], publish_tokens=["say it"]) as server:
        watching(tab, server, "/?channel=a%20b#it's,say%20it")
        assert tab.text("nothing") == "Nothing has come yet"
        lines = tab.evaluate("['try-publish', 'try-watch'].map(id => find(id).line)")
        need("curl", "curl")
        # Secrets are in the line that is copied, and not on the screen
        assert "it's" not in tab.text("lesson") and "say" not in tab.text("try-publish")
        tab.evaluate(f"window.seen = []; console.log = text => seen.push(text); {lines[1]}; 0")
        wait_until(lambda: server.clients == 2)
        subprocess.run(["sh", "-c", lines[0]], check=True, capture_output=True)
        tab.wait_for("seen.length === 1 && seen[0] === 'hello'")
        wait_until(lambda: tab.lines() == ["Data: hello"])
        assert tab.evaluate("find('empty').hidden")
        tab.press("?")                  # the same is in the help, where events have come
        assert tab.evaluate("find('help').contains(find('try-publish'))")
        tab.click("help-close")
        tab.wait_for("find('lesson').contains(find('try-publish'))")
        assert tab.evaluate("stream.token") == "it's"


def test_without_a_token_the_lines_say_where_one_goes(tab, server):
    watching(tab, server)
    assert tab.text("try-publish") == f"curl -d hello '{server.url}/PUBLISH_TOKEN'"
    assert tab.text("may-watch").startswith("Anyone who can reach this server")
    assert "--publish-token" in tab.text("may-publish")


def test_what_was_cleared_can_be_brought_back(tab, server):
    watching(tab, server)
    server.publish("1"), server.publish("2", "custom")
    wait_until(lambda: len(tab.lines()) == 2)
    tab.press("x")
    wait_until(lambda: tab.text("nothing") == "Cleared" and not tab.lines())
    assert tab.text("said") == "Cleared 2 rows"
    server.publish("3")
    wait_until(lambda: tab.lines() == ["Data: 3"])
    tab.click("undo")
    wait_until(lambda: tab.lines() == ["Data: 1", "Custom: 2", "Data: 3"])
    assert tab.text("kept") == "3 rows kept, 0 gone"
    tab.press("x")
    wait_until(lambda: not tab.lines())
    tab.press("u")
    wait_until(lambda: len(tab.lines()) == 3)
    assert tab.evaluate("find('undo').hidden")


def contrast(tab, selector: str) -> float:
    """The contrast of an element's label to its background (WCAG 2.2)."""
    return tab.evaluate("""(element => {
        const light = text => { const [r, g, b] = text.match(/[0-9.]+/g).map(Number).map(
            each => (each /= 255) <= .04045 ? each / 12.92 : ((each + .055) / 1.055) ** 2.4);
            return .2126 * r + .7152 * g + .0722 * b + .05; };
        const {color, backgroundColor} = getComputedStyle(element);
        const [a, b] = [light(color), light(backgroundColor)];
        return Math.max(a, b) / Math.min(a, b); })""" + f"(document.querySelector({selector!r}))")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_label_of_a_pressed_button_can_be_read_while_the_mouse_is_on_it(tab, server, dark):
    tab.resize(1280, 800, dark)
    watching(tab, server)
    server.publish('{"a": 1}')
    wait_until(lambda: tab.lines())
    tab.evaluate("everySecond(); select(view.rows[0])")
    for selector in ("#pause", "#legend button", "#raw"):
        button = f"document.querySelector({selector!r})"
        tab.evaluate(f"{button}.click()")
        tab.wait_for(f"{button}.getAttribute('aria-pressed') === 'true'")
        x, y = tab.evaluate(f"(({{x, y}}) => [x, y])({button}.getBoundingClientRect())")
        tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + 5, y=y + 5)
        tab.wait_for(f"{button}.matches(':hover')")
        tab.wait_for("document.getAnimations().length === 0")
        assert contrast(tab, selector) >= 4.5
    tab.resize(1280, 2600)


def test_columns_have_heads_where_there_are_columns(tab, server):
    tab.resize(1280, 800)
    watching(tab, server)
    server.publish("x")
    wait_until(lambda: tab.lines())
    lefts = """[find('heads'), document.querySelector('.row')].map(each =>
               [...each.children].map(child => Math.round(child.getBoundingClientRect().left)))"""
    assert tab.evaluate("[...find('heads').children].map(each => each.textContent)") == [
        "Time", "Event", "Data", "Id", "Size"]
    heads, row = tab.evaluate(lefts)
    assert heads == row
    tab.resize(1280, 2600)


def test_lanes_show_the_newest_of_each_name_and_a_line(tab, server):
    watching(tab, server)
    for number in range(20):
        server.publish(str(20 + number % 3), "temperature")
        server.publish(f"order {number}", "order")
    tab.wait_for("stream.events === 40")
    tab.press("v")
    lanes = "[...find('lanes').children].map(each => [...each.children].map(c => c.textContent))"
    assert tab.evaluate(lanes) == [["order", "order 19", "", "20"], ["temperature", "21", "", "20"]]
    # Of numbers the line shows the numbers, else how many came each second
    line = "find('lanes').children[{}].querySelector('path').getAttribute('d').split('L').length"
    assert tab.evaluate(line.format(1)) == 20 and tab.evaluate(line.format(0)) == 60
    assert tab.evaluate("location.search") == "?view=lanes"
    server.publish("order 20", "order")
    tab.wait_for("find('lanes').textContent.includes('order 20')")
    tab.press("v")
    wait_until(lambda: len(tab.lines()) == 41)


def test_the_delay_from_id_to_arrival_is_shown_without_what_was_replayed(tab, server):
    server.publish("before")
    time.sleep(0.01)
    watching(tab, server, "/?since=all")
    tab.wait_for("stream.events === 1")
    tab.evaluate("everySecond()")
    assert tab.text("delay") == "none"
    server.publish("after")
    tab.wait_for("stream.events === 2")
    tab.evaluate("everySecond()")
    assert tab.evaluate("/^([0-9]+ m?s, ){3}[0-9]+ m?s$/.test(find('delay').textContent)")


def test_the_address_holds_the_view(tab, server):
    watching(tab, server)
    for name in ("a", "b"):
        server.publish("x1", name), server.publish("x2", name)
    wait_until(lambda: len(tab.lines()) == 4)
    tab.evaluate("everySecond()")
    tab.type_in("search", "x2"), tab.type_in("shown", "b")
    wait_until(lambda: tab.lines() == ["b: x2"])
    address = tab.evaluate("location.href")
    assert address.endswith("/?event=b&search=x2")
    tab.open(address + "&since=all&view=lanes")
    tab.wait_for(CONNECTED)
    tab.wait_for("stream.events === 4 && !find('lanes').hidden")
    tab.press("v")
    wait_until(lambda: tab.lines() == ["b: x2"])


def test_a_recording_is_saved_and_opened_again(tab):
    with SSEServer(port=0, retry=0.1) as server:
        watching(tab, server)
        server.publish('{"a": 1}'), server.publish("é\n2", "custom")
        wait_until(lambda: len(tab.lines()) == 2)
    wait_until(lambda: len(outages(tab)) == 1 and "cannot be reached" in outages(tab)[0])
    tab.evaluate("stop.abort()")
    lines = tab.lines()
    times = tab.evaluate("view.rows.map(row => row.at.toISOString())")
    save(tab)
    recording, = tab.folder.glob("events-*.jsonl")
    with SSEServer(port=0) as server:
        watching(tab, server)
        server.publish("live")
        wait_until(lambda: tab.lines() == ["Data: live"])
        document = tab.call("DOM.getDocument")["root"]["nodeId"]
        field = tab.call("DOM.querySelector", nodeId=document, selector="#file")["nodeId"]
        tab.call("DOM.setFileInputFiles", nodeId=field, files=[str(recording)])
        wait_until(lambda: tab.lines() == lines)
        assert tab.evaluate("view.rows.map(row => row.at.toISOString())") == times
        assert tab.text("status") == "Recording" and tab.text("watched") == recording.name
        assert tab.evaluate("view.rows[2].kind") == "failed"
        wait_until(lambda: server.clients == 0)         # it is not mixed with what is live
        tab.click("undo")                               # and what was there is not lost
        wait_until(lambda: tab.lines() == ["Data: live", *lines])
        tab.click("again")
        tab.wait_for(CONNECTED)
        server.publish("again")
        wait_until(lambda: tab.lines()[-1:] == ["Data: again"])


DROP = """(() => { const files = new DataTransfer();
    files.items.add(new File([%s], "case 12.jsonl"));
    document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true,
                                                       cancelable: true})); })()"""


def test_a_recording_is_opened_by_dropping_it_on_the_page(tab, server):
    watching(tab, server)
    server.publish("live")
    wait_until(lambda: tab.lines() == ["Data: live"])
    good = json.dumps({"time": "2026-11-26T12:00:00.000Z", "event": "message", "data": "old"})
    for bad in ("no JSON", '{"event": "x"}', '{"time": "2026-11-26T12:00:00.000Z", "event": 5}'):
        tab.evaluate(DROP % json.dumps(f"{good}\n{bad}\n"))
        tab.wait_for("find('said').textContent === "
                     "'case 12.jsonl was not opened: line 2 is no recorded event'")
        assert tab.lines() == ["Data: live"] and tab.text("status") == "Connected"
        tab.evaluate("say('')")
    tab.evaluate("Object.defineProperty(File.prototype, 'size', "
                 "{value: 4 * CHARACTERS_KEPT + 1, configurable: true}), 0")
    tab.evaluate(DROP % json.dumps(good + "\n"))
    tab.wait_for("find('said').textContent === "
                 "'case 12.jsonl was not opened: it is too large'")
    tab.evaluate("delete File.prototype.size")
    tab.evaluate(DROP % json.dumps(good + "\n"))
    wait_until(lambda: tab.lines() == ["Data: old"])


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
        command = tab.evaluate("find('try-curl').line")
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
            tab.wait_for(f"rows.list.length === {number}")
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
        assert tab.evaluate("/^[1-5] s$/.test(find('retry').textContent)")
        assert tab.text("heartbeat") == "200 ms"
        assert tab.evaluate("/^[0-9:]{8}$/.test(find('since-when').textContent)")


def test_the_chart_stacks_the_eight_commonest_names_and_leads_to_the_others(tab, server):
    watching(tab, server)
    names = ["name 10", "name 9", "é", "f", "Zebra", "apple", "b", "d", "rare", "rarer"]
    for number, name in enumerate(names):
        for _ in range(12 - number):
            server.publish("x", name)
    tab.wait_for("stream.events === 75")
    tab.evaluate("everySecond(), everySecond()")
    # In the order of people, so that no button moves because another name overtakes its own
    assert tab.evaluate("[...find('legend').children].map(each => each.textContent)") == [
        "apple 7", "b 6", "d 5", "é 10", "f 9", "name 9 11", "name 10 12", "Zebra 8", "others 7"]
    assert tab.evaluate("new Set([...find('legend').children].map("
                        "each => getComputedStyle(each).color)).size") == 9
    tab.wait_for("[...document.querySelectorAll('#bars path[class]')].every("
                 "path => path.getAttribute('d'))")
    tab.evaluate("find('legend').children[1].click()")
    wait_until(lambda: kinds(tab) == {"b"})
    tab.evaluate("find('legend').children[1].click()")
    wait_until(lambda: len(kinds(tab)) == 10)
    tab.evaluate("find('legend').lastElementChild.click()")
    assert tab.evaluate("[...find('lanes').children].map(each => each.key)") == [
        "apple", "b", "d", "é", "f", "name 9", "name 10", "rare", "rarer", "Zebra"]
    tab.evaluate("[...find('lanes').children].find(each => each.key === 'rare').click()")
    wait_until(lambda: kinds(tab) == {"rare"})


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
    assert tab.evaluate("rows.list.length") == 5


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

LONGEST = 50            # milliseconds of work after which the page must let the browser draw


@contextmanager
def smooth(tab):
    """In a window of usual size, fail if a task of the page freezes it once it is there.

    What counts is the time of its thread, not that of the clock: a busy machine adds none.
    """
    tab.evaluate("everySecond()")
    with tab.tasks() as tasks:
        yield
    assert max(tasks) < LONGEST


@pytest.fixture
def window(tab):
    """The tab in a window of usual size."""
    tab.resize(1280, 800)
    yield tab
    tab.resize(1280, 2600)


def test_a_burst_of_20_000_events_freezes_nothing(window):
    with SSEServer(port=0, history=30000) as server:
        watching(window, server)
        with smooth(window):
            for number in range(20000):
                server.publish(f'{{"number": {number}, "text": "some text of usual length"}}',
                               f"name {number % 7}")
            window.wait_for("stream.events === 20000 && !view.isDue")


def test_300_000_events_that_are_there_at_once_freeze_nothing(window):
    body = b"".join(b"event: %d\ndata: number %d and some more text\n\n" % (number % 7, number)
                    for number in range(300000))

    def answer(request):
        if request.path == "/none":
            return request.reply(204)
        request.reply(200, body, **STREAM)
        request.hold()
    with foreign(answer) as server:
        window.open(f"{server.url}/page?url={server.url}/none")
        window.wait_for("document.getElementById('status').textContent === 'Ended'")
        window.type_in("url", server.url + "/stream")
        with smooth(window):
            submit(window)
            window.wait_for("stream.events === 300000 && !view.isDue")


def flood(window, seconds: float, address: str = "/") -> None:
    """Publish 2,000 events a second."""
    with SSEServer(port=0, history=30000) as server:
        watching(window, server, address)
        with smooth(window):
            start = time.monotonic()
            for number in range(int(2000 * seconds)):
                server.publish(f"number {number} and some more", f"name {number % 7}")
                if number % 20 == 0:
                    time.sleep(max(0, start + number / 2000 - time.monotonic()))
            window.wait_for(f"stream.events === {int(2000 * seconds)} && !view.isDue")


def test_2_000_events_a_second_are_drawn_without_a_long_frame(window):
    flood(window, 3)


def test_2_000_events_a_second_are_drawn_as_lanes_without_a_long_frame(window):
    flood(window, 3, "/?view=lanes")


@pytest.mark.long
def test_2_000_events_a_second_for_a_minute(window):
    flood(window, 60)


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
            tab.wait_for("stream.opens === 2 && rows.list.length > 14")
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
        wide = """[...document.querySelectorAll('body *')].filter(each => !each.closest(
            '#list, #legend, .unseen') && each.getBoundingClientRect().right > innerWidth)
            .map(each => each.tagName + each.id)"""
        assert tab.evaluate(wide) == []
        assert tab.evaluate("find('list').clientHeight") > 90
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        tab.evaluate("stream.nextAt = Date.now() + 5e6, setStatus('Reconnecting', 'failed')")
        assert tab.evaluate(wide) == []
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        if width > 600:         # the way to the names without a colour is always in view
            tab.evaluate("['a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', 'i'].forEach(name => "
                         "count(name.repeat(40), new Date()))")
            tab.evaluate("everySecond()")
            legend, others = tab.evaluate(
                "[find('legend'), find('legend').lastChild].map("
                "each => each.getBoundingClientRect().right)")
            assert abs(legend - others) < 2


def test_on_a_phone_the_chart_has_a_scale_and_a_legend(tab):
    with everything_shown(tab, 390, 844, False):
        for name in ("scale", "times", "legend"):
            assert tab.evaluate(f"find('{name}').getBoundingClientRect().height > 0")
        assert tab.text("scale").endswith("0") and "now" in tab.text("times")
        assert len(tab.evaluate("[...find('legend').children]")) > 3


def test_on_a_phone_targets_are_large_and_controls_leave_the_room_to_the_rows(tab, server):
    with everything_shown(tab, 390, 844, False):
        fields = "button, input:not([type=checkbox]), select, .row"
        typed = "input, select"     # a phone zooms in on smaller ones
        small = f"""[...document.querySelectorAll('{fields}')]
            .filter(each => each.offsetParent && !each.closest('#whole') &&
                    (each.offsetHeight < 44 || each.offsetWidth < 44 ||
                     (each.matches('{typed}') && parseFloat(getComputedStyle(each).fontSize) < 16)))
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
@pytest.mark.parametrize("width, height", [(1920, 1080), (1280, 800), (390, 844)])
@COLOURS
def test_axe_finds_nothing(tab, axe, width, height, dark):
    found = ("axe.run().then(each => each.violations.map("
             "one => [one.id, one.nodes.map(node => node.html)]))")
    with everything_shown(tab, width, height, dark):
        tab.evaluate(axe + "; 0")
        assert tab.evaluate(found) == []
        tab.evaluate("find('legend').firstElementChild.click(), find('pause').click()")
        assert tab.evaluate(found) == []
        tab.evaluate("find('pause').click(), look('lanes')")
        assert tab.evaluate(found) == []
        tab.click("ask")
        assert tab.evaluate(found) == []
        tab.evaluate("find('help-close').click(), look('events'), closeDetail(), clear()")
        tab.wait_for("!find('lesson').hidden && find('lesson').contains(find('lesson-text'))")
        assert tab.evaluate(found) == []
        tab.evaluate("failed('x', 'token'), end(failed('the server asks for a token', 'token'))")
        assert tab.evaluate(found) == []


# Other engines: the page drives itself, and reports

DRIVER = """<script>
  const until = async condition => {
    while (!condition()) await new Promise(requestAnimationFrame);
  };
  const lines = () => [...document.querySelectorAll(".row")].map(row =>
    row.querySelector("b").textContent + row.querySelector(".text").textContent);
  const report = what => fetch("/report", {method: "POST", body: JSON.stringify(what)});
  const errors = [];
  onerror = onunhandledrejection = event => errors.push(String(event.reason || event));
  document.addEventListener("securitypolicyviolation", event => errors.push(event.blockedURI));
  (async () => {
    await until(() => find("status").textContent === "Connected");
    find("text").value = "gr\u00fc\u00dfe \u2705";
    document.querySelector("#publish button").click();
    await until(() => find("said").textContent.startsWith("Published"));
    await report("published");
    await until(() => find("status").textContent === "Reconnecting");
    await until(() => find("status").textContent === "Connected");
    await until(() => rows.list.length > 3);
    await report("back");
    await until(() => stream.events === 20003 && !view.isDue);
    pause(), clear(), undo(), pause();
    await until(() => rows.list.length === ROWS_KEPT && !view.isDue);
    select(rows.list.at(-1));
    await until(() => find("whole").textContent.includes("}") && find("whole").children[0].open);
    await until(() => find("whole").textContent.includes("n: 12345678901234567890"));
    look("lanes");
    const lanes = [...find("lanes").children].map(each => each.textContent);
    look("events");
    await openRecording(new File([JSON.stringify({time: new Date(), event: "custom", data: "old"})],
                                 "recording.jsonl"));
    await until(() => lines().length === 1);
    await report({errors, lanes, lines: lines(), title: document.title,
                  isWide: document.documentElement.scrollWidth > innerWidth,
                  heads: [find("heads"), document.querySelector(".row")].map(each =>
                    [...each.children].map(child => child.getBoundingClientRect().left))});
  })();
</script>"""


@contextmanager
def engine(name: str, folder: Path, url: str):
    """Run a browser with an empty profile on a page, and take all its processes with it."""
    folder.mkdir()
    home = {each: str(folder) for each in
            ("HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME")}
    process = subprocess.Popen(
        command(name, str(folder), url), env={**os.environ, **home}, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.interop
@pytest.mark.parametrize("name", ["chromium", "firefox", "webkit"])
def test_the_page_works_in_each_engine(name, tmp_path):
    need(*{"chromium": ("chromium", "chromium"), "firefox": ("firefox-esr", "firefox-esr"),
           "webkit": ("xvfb-run", "xvfb")}[name])
    if name == "webkit" and not glob(WEBKIT):
        pytest.skip("MiniBrowser is not installed (Debian package webkit2gtk-driver)")
    reports = []
    page = (TOP / "index.html").read_bytes() + DRIVER.encode()

    def answer(request):
        if request.path == "/report":
            length = int(request.headers["Content-Length"])
            reports.append(json.loads(request.rfile.read(length)))
            return request.reply(204)
        return request.reply(200, page, **{"Content-Type": "text/html; charset=utf-8",
                                           "Content-Security-Policy": POLICY})

    options = {"publish_tokens": ["say"], "retry": 0.2, "history": 30000,
               "history_file": tmp_path / "events.db"}
    with foreign(answer) as pages, SSEServer(port=0, **options) as server:
        url = f"{pages.url}/driven?url={server.url}/token#,say"
        with engine(name, tmp_path / "profile", url):
            wait_until(lambda: reports == ["published"], 60)
            server.stop()
            with SSEServer(port=server.port, **options) as server:
                server.publish("while it was away, or after")
                server.publish("x", "custom")
                wait_until(lambda: "back" in reports, 60)
                for number in range(20000):
                    server.publish('{"n": 12345678901234567890, "n": {}}', "json")
                wait_until(lambda: len(reports) == 3, 120)
    last = reports[-1]
    assert last["errors"] == [] and last["isWide"] is False
    assert last["lines"] == ["Custom: old"] and last["title"].startswith("Recording")
    assert [lane.partition("{")[0] for lane in last["lanes"]] == ["json"]
    heads, row = last["heads"]
    assert [round(left) for left in heads] == [round(left) for left in row]
