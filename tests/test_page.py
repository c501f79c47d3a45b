"""The page in a real browser: headless Chromium on a real server, and on the file."""
import socket
import threading

import pytest

from browser import browser
from helpers import TOP, connect, serving, wait_until
from sse_server import SSEServer


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


def kinds(page) -> set:
    return {line.partition(": ")[0] for line in page.lines()}


def test_the_page_shows_both_kinds_of_lines(tab):
    with serving("--interval", "0.01") as server:
        tab.open(f"http://127.0.0.1:{server.port}/")
        wait_until(lambda: kinds(tab) >= {"Data", "Custom"})
        assert tab.evaluate("document.querySelector('h1').textContent") == "Getting server updates"
        tab.wait_for("document.getElementById('status').textContent === 'Connected'")
        wait_until(lambda: len(tab.lines()) == 300)         # and never more
        last = tab.lines()[-1]
        wait_until(lambda: last not in tab.lines()[-1:])
        assert len(tab.lines()) == 300


def test_text_goes_in_as_text(tab, server):
    evil = "<img src=x onerror='document.title=1'>&amp;"
    tab.open(server.url)
    wait_until(lambda: server.clients == 1)
    server.publish(evil)
    server.publish(evil, "custom")
    wait_until(lambda: len(tab.lines()) == 2)
    assert tab.lines() == ["Data: " + evil, "Custom: " + evil]
    assert tab.evaluate("document.images.length") == 0


def test_from_a_file_it_watches_port_6500(tab):
    try:
        connect(6500).close()
        pytest.skip("something else listens on port 6500")
    except ConnectionRefusedError:
        pass
    with serving("--interval", "0.01", "--port", "6500"):
        tab.open((TOP / "index.html").as_uri())
        wait_until(lambda: kinds(tab) >= {"Data", "Custom"})


def test_a_lost_connection_is_said_and_comes_back(tab):
    with SSEServer(port=0) as server:
        port = server.port
        tab.open(server.url)
        tab.wait_for("document.getElementById('status').textContent === 'Connected'")
    tab.wait_for("document.getElementById('status').className === 'failed'")
    assert tab.lines()[-1] == "Connection failed"
    with SSEServer(port=port) as server:
        tab.wait_for("document.getElementById('status').textContent === 'Connected'")


class Proxy(threading.Thread):
    """Forward one TCP port to another; `cut` ends every connection, new ones are forwarded."""

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


def numbers(page) -> list:
    return [line[len("Data: "):] for line in page.lines() if line.startswith("Data: ")]


def test_a_cut_connection_comes_back_and_the_page_holds_every_event_once(tab):
    with SSEServer(port=0, retry=0.2) as server:
        proxy = Proxy(server.port)
        proxy.start()
        try:
            tab.open(f"http://127.0.0.1:{proxy.port}/")
            wait_until(lambda: server.clients == 1)
            for number in range(60):
                server.publish(str(number))
                if number in (20, 40):
                    wait_until(lambda: len(numbers(tab)) > number - 5)
                    proxy.cut()
                    tab.wait_for("document.getElementById('status').className === 'failed'")
            wait_until(lambda: len(numbers(tab)) >= 60)
            assert numbers(tab) == [str(number) for number in range(60)]
            assert not any(line.startswith("Missed") for line in tab.lines())
        finally:
            proxy.stop()


def test_a_restarted_server_is_found_again_and_the_gap_is_shown(tab):
    with SSEServer(port=0, retry=0.2) as server:
        port = server.port
        tab.open(server.url)
        wait_until(lambda: server.clients == 1)
        server.publish("before")
        wait_until(lambda: numbers(tab) == ["before"])
    with SSEServer(port=port, retry=0.2) as server:
        server.publish("after")
        wait_until(lambda: numbers(tab) == ["before", "after"])
    assert [line for line in tab.lines() if line.startswith("Missed some events after ")]


def test_a_browser_without_event_source_is_told(tab, server):
    tab.call("Page.enable")
    script = tab.call("Page.addScriptToEvaluateOnNewDocument", source="delete window.EventSource")
    tab.open(server.url)
    tab.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])
    assert tab.lines() == ["Sorry, your browser does not support server-sent events..."]


def type_in(page, field: str, text: str) -> None:
    page.evaluate(f"(() => {{ const field = document.getElementById('{field}');"
                  f"field.value = {text!r}; field.dispatchEvent(new Event('change')); }})()")


def test_publish_from_the_page_and_watch_a_channel(tab):
    with SSEServer(port=0, tokens=["look"], publish_tokens=["say it"]) as server:
        tab.open(server.url + "/")
        wait_until(lambda: tab.lines() == ["Connection failed"])        # without a token
        assert tab.evaluate("document.getElementById('publish').hidden")
        tab.open("about:blank")
        tab.open(server.url + "/?channel=news&event=mail#look,say%20it")
        wait_until(lambda: server.clients == 1)
        for text, event, channel in (("plain", "", ""), ("<b>", "mail", "news"),
                                     ("no", "", "sport")):
            for field, typed in (("text", text), ("event", event), ("channel", channel)):
                type_in(tab, field, typed)
            tab.evaluate("document.querySelector('#publish button').click()")
            tab.wait_for("document.getElementById('text').value === ''")
        wait_until(lambda: len(tab.lines()) == 2)
        assert tab.lines() == ["Data: plain", "mail: <b>"]
        type_in(tab, "channels", "news, sport")
        wait_until(lambda: set(server._publisher._groups._by_channel) == {"news", "sport"})
        server.publish("goal", channel="sport")
        wait_until(lambda: tab.lines()[-1] == "Data: goal")


def test_pause_filter_and_chart(tab, server):
    tab.open(server.url + "/")
    wait_until(lambda: server.clients == 1)
    server.publish("one")
    wait_until(lambda: tab.lines() == ["Data: one"])
    tab.evaluate("document.getElementById('pause').click()")
    assert tab.evaluate("document.getElementById('pause').getAttribute('aria-pressed')") == "true"
    server.publish("two")
    server.publish("three", "custom")
    wait_until(lambda: tab.evaluate("held.length") == 2)
    assert tab.lines() == ["Data: one"]
    tab.evaluate("document.getElementById('pause').click()")
    assert tab.lines() == ["Data: one", "Data: two", "Custom: three"]
    type_in(tab, "shown", "custom")
    visible = ("[...document.querySelectorAll('#lines > div:not([hidden])')]"
               ".map(line => line.textContent)")
    assert tab.evaluate(visible) == ["Custom: three"]
    server.publish("four")
    server.publish("five", "custom")
    wait_until(lambda: tab.evaluate(visible) == ["Custom: three", "Custom: five"])
    type_in(tab, "shown", "")
    assert len(tab.evaluate(visible)) == 5
    tab.wait_for("/now [0-9]+, at most [1-9]/"
                 ".test(document.getElementById('chart').getAttribute('aria-label'))")
    unnamed = ("[...document.querySelectorAll('input, select, button')]"
               ".filter(e => !(e.ariaLabel || e.labels.length || e.textContent))")
    assert tab.evaluate(unnamed + ".length") == 0
