"""Who gets in and from where, and nothing secret in a log."""
import threading

import pytest

from helpers import PATIENCE, Client, ask, connect, get, post, serving
from sse_server import SSEServer


@pytest.mark.parametrize("path, fields, admitted", [
    ("/one", [], True), ("/two", [], True), ("/%6fne", [], True), ("/one?channel=a", [], True),
    ("/", ["Authorization: Bearer two"], True), ("/any", ["Authorization: bearer one"], True),
    ("/", [], False), ("/three", [], False), ("//one", [], False), ("/one/", [], False),
    ("/ONE", [], False),
    ("/", ["Authorization: Bearer three"], False), ("/", ["Authorization: Basic one"], False),
    ("/?token=one", [], False)])
def test_a_token_in_the_path_or_as_bearer_lets_in_and_nothing_else_does(path, fields, admitted):
    line = b"HTTP/1.1 200 OK\r\n" if admitted else b"HTTP/1.1 401 Unauthorized\r\n"
    with SSEServer(port=0, tokens=["one", "two"]) as server:
        with connect(server.port) as sock:
            sock.sendall(get(path, *fields))
            assert sock.recv(1000).startswith(line)
        assert ask(server.port, get(path, *fields, method="HEAD")).startswith(line)


@pytest.mark.parametrize("options", [
    {"tokens": [""]}, {"publish_tokens": [""]}, {"origins": ["https://a.test/"]},
    {"origins": ["https://A.test"]}, {"origins": ["a.test"]}, {"retry": float("inf")}])
def test_options_that_would_let_in_everybody_or_nobody_are_refused(options):
    with pytest.raises(ValueError):
        SSEServer(port=0, **options)


def test_a_bearer_token_may_be_utf_8():
    with SSEServer(port=0, tokens=["\u00e9t\u00e9"]) as server, connect(server.port) as sock:
        sock.sendall(get("/", "Authorization: Bearer \u00e9t\u00e9"))
        assert sock.recv(100).startswith(b"HTTP/1.1 200 ")


def test_tokens_may_come_from_the_environment():
    env = {"SSE_TOKEN": "watch1 watch2", "SSE_PUBLISH_TOKEN": "publish"}
    with serving("--interval", "100", env=env) as server:
        assert ask(server.port, get("/wrong")).startswith(b"HTTP/1.1 401 Unauthorized\r\n")
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
        if request.path == "/gone":
            raise ConnectionResetError("by what the program asked, not by the peer")
        return request.fields.get("cookie") == "ok"
    with SSEServer(port=0, authorize=authorize) as server, connect(server.port) as slow:
        slow.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        with Client(server.port, b"GET /a?b=c HTTP/1.1\r\nHost: x\r\nCookie: ok\r\n\r\n") as client:
            assert client.open().stream.status == 200
        assert ask(server.port, b"GET /a HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 401 ")
        for path in ("/fault", "/gone"):
            assert ask(server.port, get(path)).startswith(b"HTTP/1.1 500 ")
        release.set()
        assert slow.recv(100).startswith(b"HTTP/1.1 401 ")
    assert any(request.query == {"b": ["c"]} and request.method == "GET" for request in asked)


# As a browser's address line sends it
NAVIGATION = "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"


def kind_of(port, path, *fields, method="GET"):
    """Return the status of an answer and its type, also of a stream."""
    with connect(port) as sock:
        sock.sendall(get(path, *fields, method=method))
        head = sock.recv(4000).decode().partition("\r\n\r\n")[0]
    kind = [line for line in head.split("\r\n") if line.startswith("Content-Type: ")]
    return int(head.split()[1]), kind[0].split()[1].rstrip(";")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_page_is_for_everybody_at_the_top_and_for_known_tokens_below(method):
    with SSEServer(port=0, tokens=["one"], publish_tokens=["two"]) as server:
        for path, answer in (("/", (200, "text/html")), ("/one", (200, "text/html")),
                             ("/one?channel=a&since=all", (200, "text/html")),
                             ("/x", (401, "text/plain")), ("/two", (401, "text/plain")),
                             ("/-/status", (401, "text/plain")), ("/-/x", (401, "text/plain")),
                             ("/favicon.ico", (404, "text/plain"))):
            assert kind_of(server.port, path, NAVIGATION, method=method) == answer, path
        bearer = "Authorization: Bearer one"
        assert kind_of(server.port, "/-/status", NAVIGATION, bearer) == (200, "application/json")


def test_without_tokens_a_browser_gets_the_page_at_every_path():
    with SSEServer(port=0) as server:
        for path in ("/", "/token", "/any/path"):
            assert kind_of(server.port, path, NAVIGATION) == (200, "text/html")
        assert kind_of(server.port, "/-/x", NAVIGATION) == (404, "text/plain")


def test_a_program_decides_who_gets_the_page_below_the_top():
    with SSEServer(port=0, authorize=lambda request: request.path == "/ann") as server:
        for path, answer in (("/", (200, "text/html")), ("/ann", (200, "text/html")),
                             ("/eve", (401, "text/plain"))):
            assert kind_of(server.port, path, NAVIGATION) == answer


@pytest.mark.parametrize("accept", [
    "text/event-stream", "text/html, text/event-stream",                # htmx 4
    "text/event-stream, text/html, application/json",                   # Datastar
    "text/html;q=0.5,text/event-stream;q=0.1", "*/*", "application/json", "text/html;q=0", ""])
@pytest.mark.parametrize("path", ["/", "/one"])
def test_a_client_that_accepts_a_stream_gets_it_though_it_accepts_html_too(path, accept):
    with SSEServer(port=0, tokens=["one"]) as server:
        bearer = "Authorization: Bearer one"
        assert kind_of(server.port, path, f"Accept: {accept}", bearer) == (200, "text/event-stream")


def test_a_browser_that_takes_no_stream_gets_the_page():
    with SSEServer(port=0) as server:
        assert kind_of(server.port, "/", "Accept: text/html, text/event-stream;q=0") == (
            200, "text/html")


def test_the_page_tells_nobody_its_address():
    """That may hold a token."""
    with SSEServer(port=0) as server:
        assert b"\r\nReferrer-Policy: no-referrer\r\n" in ask(server.port, get("/", NAVIGATION))


def test_health_answers_a_preflight_as_every_path_does():
    with SSEServer(port=0, allowed_hosts=["good.test"]) as server:
        for host, status in (("good.test", b"204"), ("evil.test", b"421")):
            head = get("/-/health", method="OPTIONS").replace(b"Host: x", b"Host: " + host.encode())
            assert ask(server.port, head).startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize("path, head, status", [
    ("/-/health", "Host: 10.0.0.7:6500", b"200"), ("/-/health", "", b"200"),     # HAProxy's, AWS's
    ("/-/health?x", "Host: evil.test", b"200"), ("/-/health", "Host: good.test", b"200"),
    ("/-/status", "Host: 10.0.0.7", b"421"), ("/", "", b"421"), ("/-/healthy", "", b"421")])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_health_is_told_whatever_host_a_load_balancer_asks_for(path, head, status, method):
    with SSEServer(port=0, allowed_hosts=["good.test"], tokens=["one"]) as server:
        lines = [f"{method} {path} HTTP/1.0", *([head] if head else []), "", ""]
        answer = ask(server.port, "\r\n".join(lines).encode())
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert answer.endswith(b"ok\n") == (status == b"200" and method == "GET")


ORIGIN = "https://good.test"


def test_by_default_every_page_may_read_answers(server):
    for request in (get("/", f"Origin: {ORIGIN}"), get("/", method="OPTIONS"), get("/favicon.ico")):
        with connect(server.port) as sock:
            sock.sendall(request)
            assert b"Access-Control-Allow-Origin: *\r\n" in sock.recv(2000)


@pytest.mark.parametrize("origin, allowed", [
    (ORIGIN, True), ("https://evil.test", False), ("null", False), (None, None),
    ("https://good.test.evil.test", False), ("http://good.test", False)])
def test_with_origins_only_those_are_echoed_and_may_post(origin, allowed):
    fields = [f"Origin: {origin}"] if origin else []
    with SSEServer(port=0, origins=[ORIGIN, "https://other.test"], publish_tokens=["t"]) as server:
        for request in (get("/", *fields), get("/", *fields, method="OPTIONS"),
                        get("/favicon.ico", *fields)):
            with connect(server.port) as sock:
                sock.sendall(request)
                head = sock.recv(2000).decode().partition("\r\n\r\n")[0].split("\r\n")
                assert "Vary: Origin" in head
                assert (f"Access-Control-Allow-Origin: {origin}" in head) is bool(allowed)
                assert not any(line.endswith("Origin: *") for line in head)
        status = b"403" if allowed is False else b"200"
        assert post(server.port, "/t", b"hi", *fields).startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize("origin, credentials", [
    (ORIGIN, True), ("null", False), ("https://evil.test", False)])
def test_a_named_origin_may_send_cookies_with_each_request_and_null_may_not(origin, credentials):
    with SSEServer(port=0, origins=[ORIGIN, "null"], publish_tokens=["t"]) as server:
        for path, method in (("/", "GET"), ("/", "HEAD"), ("/", "OPTIONS"), ("/favicon.ico", "GET"),
                             ("/-/status", "GET"), ("/wrong", "POST"), ("/t", "POST")):
            length = ["Content-Length: 0"] if method == "POST" else []
            with connect(server.port) as sock:
                sock.sendall(get(path, f"Origin: {origin}", *length, method=method))
                head = sock.recv(2000).decode()
            assert ("\r\nAccess-Control-Allow-Credentials: true\r\n" in head) is credentials, path


@pytest.mark.parametrize("options", [{}, {"origins": [ORIGIN]}, {"tokens": ["one"]}])
@pytest.mark.parametrize("asked, allowed", [
    ("traceparent,sentry-trace", "traceparent,sentry-trace"),
    ("datastar-request", "datastar-request"), ("hx-current-url, HX-Request", None),
    ("authorization,last-event-id,x-requested-with", None),
    ("x-y: z", "Authorization, Cache-Control, Content-Type, Last-Event-ID"),
    ("x," * 500, "Authorization, Cache-Control, Content-Type, Last-Event-ID")])
def test_a_page_that_may_read_may_send_any_header_field(options, asked, allowed):
    with SSEServer(port=0, **options) as server:
        answer = ask(server.port, get(
            "/", f"Origin: {ORIGIN}", "Access-Control-Request-Method: GET",
            f"Access-Control-Request-Headers: {asked}", method="OPTIONS")).decode()
    lines = answer.split("\r\n")
    assert lines[0] == "HTTP/1.1 204 No Content"
    assert f"Access-Control-Allow-Headers: {allowed or asked}" in lines
    assert "Access-Control-Allow-Methods: GET, HEAD, OPTIONS, POST" in lines
    assert "Vary: Access-Control-Request-Headers" in lines
    assert ("Vary: Origin" in lines) == ("origins" in options)


def test_null_is_an_origin_if_named_and_a_page_of_our_own_may_always_post():
    with SSEServer(port=0, origins=["null"], publish_tokens=["t"]) as server:
        own = f"localhost:{server.port}"
        for origin, status in (("null", b"200"), (f"http://{own}", b"200"),
                               (f"https://{own}", b"403"), ("http://localhost", b"403")):
            head = get("/t", "Content-Length: 0", "Connection: close", f"Origin: {origin}",
                       method="POST").replace(b"Host: x", f"Host: {own}".encode())
            assert ask(server.port, head).startswith(b"HTTP/1.1 " + status)
        stranger = post(server.port, "/t", b"hi", "Origin: http://x")       # of Host x: rebound
        assert stranger.startswith(b"HTTP/1.1 403 ")


SECRETS = ("WATCHSECRET", "PUBLISHSECRET", "QUERYSECRET")


def test_nothing_secret_reaches_a_log_or_an_error_text():
    answers = b""
    with serving("--verbose", "--token", SECRETS[0], "--publish-token", SECRETS[1],
                 "--interval", "0.01") as server:
        for path in (*(f"/{secret}" for secret in SECRETS), f"/?x={SECRETS[2]}",
                     f"//{SECRETS[0]}?x={SECRETS[2]}", f"/{SECRETS[1]}?event=%0a{SECRETS[2]}",
                     f"/%zz{SECRETS[2]}"):
            for method in ("GET", "POST", "PUT", "BREW", "HEAD"):
                with connect(server.port) as sock:
                    length = "Content-Length: 1" if method == "POST" else "X: y"
                    bearer = f"Authorization: Bearer {SECRETS[2]}"
                    sock.sendall(get(path, length, bearer, method=method) + b"x")
                    answers += sock.recv(300)
            with connect(server.port) as sock:
                sock.sendall(get(path)[:-9])
        server.stop()
        errors = server.close()
    assert "refused: 401" in errors and "refused: 403" not in errors
    for secret in SECRETS:
        assert secret not in errors and secret.encode() not in answers


def test_log_lines_are_one_line_and_escaped():
    with serving("--verbose", "--interval", "100") as server:
        for evil in (b"GET /\x1b[2J HTTP/1.1\r\n\r\n", b"GET /%0aForged%20line HTTP/1.1\r\n\r\n",
                     b"EVIL\x07 / HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\nHost: \x1b]0;x\r\n\r\n"):
            ask(server.port, evil)
        server.stop()
        lines, errors = server.peer_lines(), server.close()
    assert len([line for line in lines if "refused" in line]) == 4 and "Forged" not in errors
    assert all(char == "\n" or char.isprintable() for char in errors)
