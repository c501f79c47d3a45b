"""The page in a real browser: headless Chromium on a real server, and on the file."""
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


def test_a_browser_without_event_source_is_told(tab, server):
    tab.call("Page.enable")
    script = tab.call("Page.addScriptToEvaluateOnNewDocument", source="delete window.EventSource")
    tab.open(server.url)
    tab.call("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])
    assert tab.lines() == ["Sorry, your browser does not support server-sent events..."]
