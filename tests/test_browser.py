"""What a real browser may do with a server of another origin, and what it makes of our answers."""
import json

import pytest

from browser import browser
from helpers import PUBLISH_TOKEN, Client, get, wait_until
from origin_cases import ORIGINS
from page_servers import ANY_ORIGIN, STREAM, foreign
from sse_server import SSEServer

CONNECTED = "document.getElementById('status').textContent === 'Connected'"

# What tracing, htmx and Datastar add to every request of a page
FIELDS = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
          "sentry-trace": "0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
          "X-Requested-With": "XMLHttpRequest", "Datastar-Request": "true", "HX-Request": "true",
          "HX-Current-URL": "http://page.test/", "Authorization": f"Bearer {PUBLISH_TOKEN}"}


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(tab):
    """A tab that shows a page of another origin than the servers of the tests."""
    with foreign(lambda request: request.reply(200, b"a page", **{"Content-Type": "text/html"})
                 ) as pages:
        tab.origin = pages.url
        tab.open(pages.url + "/some")
        yield tab
        tab.open("about:blank")


def status_of(page, url: str, **options) -> object:
    """Fetch in the page, and return the status, or what was wrong if it may not read the answer."""
    return page.evaluate(f"""fetch({url!r}, {json.dumps(options)}).then(
        answer => (answer.body?.cancel(), answer.status), error => error.name)""")


@pytest.mark.parametrize("credentials", ["include", "omit"])
def test_a_page_of_a_named_origin_reads_and_publishes_with_cookies_and_fields_of_its_own(
        page, credentials):
    with SSEServer(port=0, origins=[page.origin], publish_tokens=[PUBLISH_TOKEN]) as server, \
            Client(server.port) as client:
        client.open()
        options = {"credentials": credentials, "headers": FIELDS}
        assert status_of(page, server.url, **options) == 200
        assert status_of(page, server.url, method="POST", body="hellö", **options) == 200
        assert client.read_events(1)[-1].data == "hellö"
    with SSEServer(port=0, origins=["https://other.test"]) as server:
        assert status_of(page, server.url, **options) == "TypeError"


def test_where_anyone_may_read_a_page_sends_any_field_but_no_cookie(page):
    with SSEServer(port=0) as server:
        assert status_of(page, server.url, headers=FIELDS) == 200
        assert status_of(page, server.url, credentials="include") == "TypeError"


def test_an_event_source_with_credentials_is_let_in_from_a_named_origin(page):
    with SSEServer(port=0, origins=[page.origin]) as server:
        page.evaluate(f"""window.got = [];
            window.source = new EventSource({server.url!r}, {{withCredentials: true}});
            source.onmessage = event => got.push(event.data); true""")
        page.wait_for("source.readyState === 1")
        server.publish("hello")
        page.wait_for("got.length === 1")
        page.evaluate("source.close()")


def test_a_page_that_made_itself_null_gets_no_cookies(page):
    """Any page can do that, so cookies would then count for all."""
    frame = """new Promise(resolve => {
        window.onmessage = event => resolve(event.data);
        const frame = document.createElement("iframe");
        frame.sandbox = "allow-scripts";
        frame.srcdoc = `<script>fetch(%r, {credentials: %r}).then(
            answer => parent.postMessage(answer.status, "*"),
            error => parent.postMessage(error.name, "*"))</script>`;
        document.body.append(frame); })"""
    with SSEServer(port=0, origins=["null"]) as server:
        assert page.evaluate(frame % (server.url, "omit")) == 200
        assert page.evaluate(frame % (server.url, "include")) == "TypeError"


def test_what_we_tell_to_write_for_an_origin_is_what_browsers_send(tab):
    written = json.dumps([text for text, _ in ORIGINS])
    assert tab.evaluate(f"{written}.map(text => new URL(text).origin)") == [
        origin for _, origin in ORIGINS]


@pytest.mark.parametrize("token", ["look", "gr%C3%BCn"])
def test_a_browser_that_opens_the_path_of_a_token_gets_the_page_connected_with_it(tab, token):
    with SSEServer(port=0, tokens=["look", "grün"]) as server:
        tab.open(f"{server.url}/{token}")
        tab.wait_for(CONNECTED)
        server.publish("hello")
        wait_until(lambda: "Data: hello" in tab.lines())
        tab.open("about:blank")


def test_a_browser_that_opens_the_path_of_a_signed_token_watches_its_channels(tab):
    jwt = pytest.importorskip("jwt", reason="signed tokens need the package PyJWT")
    secret = "the-secret-of-this-server-is-long"
    token = jwt.encode({"exp": 9_000_000_000, "subscribe": ["news"]}, secret, "HS256")
    with SSEServer(port=0, jwt_key=secret) as server:
        tab.open(f"{server.url}/{token}?channel=news")
        tab.wait_for(CONNECTED)
        server.publish("hello", channel="news")
        wait_until(lambda: "Data: hello" in tab.lines())
        tab.open(f"{server.url}/{token}?channel=other")
        assert "You may not use the channel 'other'" in tab.evaluate("document.body.textContent")
        tab.open(f"{server.url}/{token[:-2]}")
        assert "not known" in tab.evaluate("document.body.textContent")
        tab.open("about:blank")


def test_a_token_in_the_address_of_the_page_is_told_to_no_other_server(tab):
    def answer(request):
        if request.command == "OPTIONS":
            return request.reply(204, **ANY_ORIGIN, **{"Access-Control-Allow-Headers": "*"})
        return request.reply(200, b"id: 1\nretry: 100\ndata: a\n\n", **STREAM)
    with foreign(answer) as other, SSEServer(port=0, tokens=["look"]) as server:
        tab.open(f"{server.url}/look?url={other.url}/stream")
        wait_until(lambda: len(other.gets()) > 1)
        tab.open("about:blank")
        for request in other.requests:
            assert "look" not in str(request.headers) + request.path, request.headers
            # Older browsers would tell the whole address
            assert request.headers["Referer"] is None


def test_a_page_of_our_own_publishes_though_it_tells_nobody_its_address(tab):
    """Browsers that keep an address to themselves may make the origin null, too."""
    with SSEServer(port=0, origins=["https://other.test"], tokens=["look"],
                   publish_tokens=[PUBLISH_TOKEN]) as server, \
            Client(server.port, get("/look")) as client:
        client.open()
        tab.open(f"{server.url}/look#,{PUBLISH_TOKEN}")
        tab.wait_for(CONNECTED)
        tab.type_in("text", "hello")
        tab.evaluate("document.querySelector('#publish button').click()")
        assert client.read_events(1)[0].data == "hello"
        tab.open("about:blank")
