"""Who gets in, from where, and with TLS; and nothing secret in a log."""
import random
import ssl
import subprocess
import sys
import threading
import time

import pytest
import requests

from sse_core import handshake
import sse_server
from helpers import GET, PATIENCE, TOP, Client, ask, connect, need, reset, serving, wait_until
from sse_server import SSEServer
from test_http1 import mutated

SECRETS = ("WATCHSECRET", "PUBLISHSECRET", "QUERYSECRET")


def get(path: str = "/", *fields: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *fields, "", ""]).encode()


@pytest.mark.parametrize("path, fields, admitted", [
    ("/one", [], True), ("/two", [], True), ("/%6fne", [], True), ("/one?channel=a", [], True),
    ("/", ["Authorization: Bearer two"], True), ("/any", ["Authorization: bearer one"], True),
    ("/", [], False), ("/three", [], False), ("//one", [], False), ("/one/", [], False), ("/ONE", [], False),
    ("/", ["Authorization: Bearer three"], False), ("/", ["Authorization: Basic one"], False),
    ("/?token=one", [], False)])
def test_tokens(path, fields, admitted):
    line = b"HTTP/1.1 200 OK\r\n" if admitted else b"HTTP/1.1 401 Unauthorized\r\n"
    with SSEServer(port=0, tokens=["one", "two"]) as server:
        with connect(server.port) as sock:
            sock.sendall(get(path, *fields))
            assert sock.recv(1000).startswith(line)
        assert ask(server.port, get(path, *fields, method="HEAD")).startswith(line)


@pytest.mark.parametrize("options", [{"tokens": [""]}, {"publish_tokens": [""]}, {"origins": ["https://a.test/"]},
                                     {"origins": ["https://A.test"]}, {"origins": ["a.test"]}, {"retry": float("inf")}])
def test_options_that_would_let_in_everybody_or_nobody_are_refused(options):
    with pytest.raises(ValueError):
        SSEServer(port=0, **options)


def test_a_bearer_token_may_be_utf_8():
    with SSEServer(port=0, tokens=["\u00e9t\u00e9"]) as server, connect(server.port) as sock:
        sock.sendall(get("/", "Authorization: Bearer \u00e9t\u00e9"))
        assert sock.recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_program_that_takes_its_time_to_authorize_does_not_hold_up_stop():
    release = threading.Event()
    server = SSEServer(port=0, authorize=lambda request: release.wait(20)).start()
    socks = [connect(server.port) for _ in range(6)]
    for sock in socks:
        sock.sendall(GET)
    wait_until(lambda: len(server._handshakes) == 6)
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < 3
    release.set()
    for sock in socks:
        sock.close()
    wait_until(lambda: not any(thread.name.startswith("handshake-") for thread in threading.enumerate()))


def test_many_tls_clients_at_once_are_all_served(certificate, monkeypatch):
    monkeypatch.setattr(handshake, "MAX_HANDSHAKES", 8)
    served = []

    def visit(port):
        with SecureClient(port) as client:
            client.open()
            served.append(client.stream.status)
    with SSEServer(port=0, cert=certificate[0], key=certificate[1]) as server:
        threads = [threading.Thread(target=visit, args=(server.port,)) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert served == [200] * 40


def test_the_page_is_for_everybody_but_its_stream_is_not():
    with SSEServer(port=0, tokens=["one"]) as server:
        assert ask(server.port, get("/", "Accept: text/html")).startswith(b"HTTP/1.1 200 ")
        assert ask(server.port, get("/x", "Accept: text/html")).startswith(b"HTTP/1.1 401 ")


def test_nothing_secret_reaches_a_log_or_an_error_text():
    answers = b""
    with serving("--verbose", "--token", SECRETS[0], "--publish-token", SECRETS[1], "--interval", "0.01") as server:
        for path in (*(f"/{secret}" for secret in SECRETS), f"/?x={SECRETS[2]}", f"//{SECRETS[0]}?x={SECRETS[2]}",
                     f"/{SECRETS[1]}?event=%0a{SECRETS[2]}", f"/%zz{SECRETS[2]}"):
            for method in ("GET", "POST", "PUT", "BREW", "HEAD"):
                with connect(server.port) as sock:
                    length = "Content-Length: 1" if method == "POST" else "X: y"
                    sock.sendall(get(path, length, f"Authorization: Bearer {SECRETS[2]}", method=method) + b"x")
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


ORIGIN = "https://good.test"


def test_cross_origin_by_default_is_for_all(server):
    for request in (get("/", f"Origin: {ORIGIN}"), get("/", method="OPTIONS"), get("/favicon.ico")):
        with connect(server.port) as sock:
            sock.sendall(request)
            assert b"Access-Control-Allow-Origin: *\r\n" in sock.recv(2000)


@pytest.mark.parametrize("origin, allowed", [(ORIGIN, True), ("https://evil.test", False), ("null", False), (None, None),
                                             ("https://good.test.evil.test", False), ("http://good.test", False)])
def test_with_origins_only_those_are_echoed(origin, allowed):
    fields = [f"Origin: {origin}"] if origin else []
    with SSEServer(port=0, origins=[ORIGIN, "https://other.test"], publish_tokens=["t"]) as server:
        for request in (get("/", *fields), get("/", *fields, method="OPTIONS"), get("/favicon.ico", *fields)):
            with connect(server.port) as sock:
                sock.sendall(request)
                head = sock.recv(2000).decode().partition("\r\n\r\n")[0].split("\r\n")
                assert "Vary: Origin" in head
                assert (f"Access-Control-Allow-Origin: {origin}" in head) is bool(allowed)
                assert not any(line.endswith("Origin: *") for line in head)
        post = get("/t", *fields, "Content-Length: 2", "Connection: close", method="POST") + b"hi"
        assert ask(server.port, post).startswith(b"HTTP/1.1 403 " if allowed is False else b"HTTP/1.1 200 ")


def test_null_is_an_origin_if_named_and_a_page_of_our_own_may_always_post():
    with SSEServer(port=0, origins=["null"], publish_tokens=["t"]) as server:
        for origin, status in (("null", b"200"), ("http://x", b"200"), ("https://x", b"403"), ("http://y", b"403")):
            post = get("/t", f"Origin: {origin}", "Content-Length: 2", "Connection: close", method="POST") + b"hi"
            assert ask(server.port, post).startswith(b"HTTP/1.1 " + status)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run([need("openssl", "openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
                    "-nodes", "-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=localhost", "-addext",
                    "subjectAltName=DNS:localhost,IP:127.0.0.1"], check=True, capture_output=True)
    return str(cert), str(key)


@pytest.fixture
def secure(certificate):
    with SSEServer(port=0, cert=certificate[0], key=certificate[1], publish_tokens=["t"], history=1024) as server:
        yield server


class SecureClient(Client):
    """A client over TLS, not verifying."""

    def __init__(self, port: int, request: bytes = GET, receive_buffer=None) -> None:
        super().__init__(port, b"", receive_buffer)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self.sock = context.wrap_socket(self.sock)
        self.sock.sendall(request)


def test_tls_streams_resumes_and_takes_posts_with_a_verified_certificate(secure, certificate):
    url = f"https://localhost:{secure.port}/"
    with requests.Session() as session:
        session.verify, session.trust_env = certificate[0], False
        assert session.get(url, headers={"Accept": "text/html"}, timeout=PATIENCE).text.startswith("<!DOCTYPE html>")
        ids = [session.post(url + "t", data=str(n), timeout=PATIENCE).json()["id"] for n in range(20)]
        with session.get(url, stream=True, headers={"Last-Event-ID": ids[9]}, timeout=PATIENCE) as response:
            lines = response.iter_lines()
            got = [next(line for line in lines if line.startswith(b"data: ")) for _ in range(10)]
            assert got == [b"data: %d" % n for n in range(10, 20)]
            secure.stop()
            assert all(line[:4] in (b"", b"id: ", b"data") for line in lines)   # and ends without an exception


def test_tls_with_a_client_that_reads_slowly_and_is_lapped(secure):
    """The socket is full in the middle of TLS records, again and again: whole frames, in order, with their gaps."""
    with SecureClient(secure.port, receive_buffer=4096) as slow, SecureClient(secure.port) as fast:
        slow.open(), fast.open()
        wait_until(lambda: secure.clients == 2)
        for number in range(3000):
            secure.publish(f"{number} " + "x" * 2000)
            fast.read_events(number + 1 if not any(e.name == "gap" for e in fast.stream.events) else 0)
            if number % 100 == 0:
                slow.receive(1000)
        slow.read_until(lambda stream: stream.events and stream.events[-1].data.startswith("2999 "))
        events = slow.stream.events
        assert any(event.name == "gap" for event in events)
        expected = 0
        for event in events:
            if event.name == "gap":
                expected = None
            else:
                value = int(event.data.split()[0])
                assert expected in (None, value)
                expected = value + 1


def test_tls_handshakes_hold_up_nobody_and_are_cut(secure, monkeypatch):
    monkeypatch.setattr(handshake, "HEAD_TIME", 0.3)
    with connect(secure.port) as silent, SecureClient(secure.port) as client:
        client.open()
        assert silent.recv(1) == b""


def test_plain_on_a_tls_port_and_tls_on_a_plain_port(certificate):
    arguments = ("--verbose", "--interval", "100")
    with serving(*arguments, "--cert", certificate[0], "--key", certificate[1]) as server:
        assert f"https://127.0.0.1:{server.port}" in server.output.decode()
        with connect(server.port) as sock:
            sock.sendall(GET)
            try:
                assert not sock.recv(1000).startswith(b"HTTP")
            except ConnectionResetError:        # closed with our request unread
                pass
        server.stop()
        assert len(server.peer_lines()) == 1
    with serving(*arguments) as server:
        with pytest.raises(ssl.SSLError):
            SecureClient(server.port)
        server.stop()
        assert len(server.peer_lines()) == 1


@pytest.mark.parametrize("arguments, said", [
    (["--cert", "/nowhere"], "cannot use /nowhere"), (["--key", "x"], "--key needs --cert"),
    (["--cert", str(TOP / "Makefile")], "cannot use "), (["--token", ""], "a token is empty"),
    (["--origin", "example.org"], "the origin 'example.org' is not one")])
def test_a_bad_certificate_is_one_line_and_status_2(arguments, said):
    done = subprocess.run([sys.executable, TOP / "sse_server.py", "--port", "0", *arguments], capture_output=True,
                          text=True, stdin=subprocess.DEVNULL, timeout=PATIENCE)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_an_encrypted_key_is_one_line_and_no_prompt(certificate, tmp_path):
    locked = tmp_path / "locked.pem"
    subprocess.run(["openssl", "ec", "-in", certificate[1], "-aes256", "-passout", "pass:x", "-out", locked], check=True,
                   capture_output=True)
    done = subprocess.run([sys.executable, TOP / "sse_server.py", "--port", "0", "--cert", certificate[0], "--key", locked],
                          capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=PATIENCE)
    assert done.returncode == 2 and "encrypted" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("options", [{}, {"tokens": ["one"], "publish_tokens": ["t"]}], ids=["open", "tokens"])
def test_fuzz_the_server(request, options):
    """Random and mutated heads, cut at random points, some reset: it serves on, and is back where it began."""
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    with SSEServer(port=0, **options) as server, Client(server.port, get("/one")) as steady:
        steady.open()
        for number in range(request.config.getoption("fuzz") * 300):
            raw = mutated(draw) if draw.random() < 0.8 else bytes(draw.randrange(256) for _ in range(draw.randrange(300)))
            sock = connect(server.port)
            try:
                sock.sendall(raw[:draw.randrange(len(raw) + 1)])
                if draw.random() < 0.3:
                    sock.sendall(raw)
                if draw.random() < 0.2:
                    sock.settimeout(0.02)
                    sock.recv(1000)
            except OSError:     # it was refused and closed, or sends nothing
                pass
            reset(sock) if draw.random() < 0.5 else sock.close()
            if number % 50 == 0:
                server.publish(str(number))
        server.publish("end")
        events = steady.read_until(lambda stream: stream.events and stream.events[-1].data == "end").stream.events
        assert not any(event.name == "gap" for event in events), f"seed {seed}"
        wait_until(lambda: server.clients == 1 and not server._handshakes)
        assert {"accept", "publisher"} <= {thread.name for thread in threading.enumerate()}, f"seed {seed}"
