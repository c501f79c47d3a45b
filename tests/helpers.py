"""Real sockets and real processes for the tests: clients that wait on conditions, and servers."""
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Callable, Iterator, Optional, Tuple

import pytest

from wire import Decoder

TOP = Path(__file__).resolve().parent.parent
PATIENCE = 20.0         # seconds until a condition that is waited for counts as failed
MAIN = TOP / "sse_server.py"
GET = b"GET /token HTTP/1.1\r\nHost: test\r\n\r\n"
PUBLISH_TOKEN = "SECRET"    # of the fixture `open_server`
# What SSEServer makes a Hub with, by default
KEPT = {"history": 1024, "retry": 3.0, "max_clients": 10000, "patience": 5.0,
        "heartbeat": 15.0}


def wait_until(condition: Callable[[], object], timeout: float = PATIENCE) -> None:
    """Poll until the condition holds. For state that has no event to wait on."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {timeout} s"
        time.sleep(0.002)


def halt(process: subprocess.Popen) -> None:
    """Stop a process as SIGSTOP does, and wait until it is."""
    process.send_signal(signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])


def unfinished(server) -> int:
    """Return how many connections of a server are no clients."""
    connections = server._connections
    return sum(map(len, (connections._newcomers, connections._busy, connections._idle)))


def in_a_thread(function, *arguments, **options) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments, kwargs=options)
    thread.start()
    return thread


def run_together(*targets) -> None:
    """Run each target in a thread, and raise what any of them raised."""
    errors = []

    def guard(target):
        try:
            target()
        except BaseException as error:
            errors.append(error)
    threads = [threading.Thread(target=guard, args=(target,)) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def request_threads() -> int:
    """Return how many threads the servers of this process have for what may block."""
    return sum(thread.name.startswith("request-") for thread in threading.enumerate())


def connect(port: int, **options) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE, **options)


class Client:
    """A client on a real socket whose stream is decoded strictly."""
    host = "127.0.0.1"

    def __init__(self, port: int, request: bytes = GET, receive_buffer: Optional[int] = None,
                 last_id: str = "", proxied: bool = False) -> None:
        self.sock = socket.socket()
        self.sock.settimeout(PATIENCE)
        if receive_buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            self.sock.connect((self.host, port))
            self.sock.sendall(request)
        except OSError:
            self.sock.close()
            raise
        self.stream = Decoder(b"HTTP/1.0" not in request, last_id, proxied)
        self.closed = False

    def receive(self, size: int = 65536) -> bytes:
        data = self.sock.recv(size)
        self.closed = not data
        self.stream.feed(data)
        return data

    def read_until(self, condition: Callable[[Decoder], object]) -> "Client":
        """Receive until the condition holds of the stream.

        Fails if the stream ends before, or if it never does while heartbeats come.
        """
        deadline = time.monotonic() + 2 * PATIENCE
        while not condition(self.stream):
            is_late = time.monotonic() > deadline
            assert not is_late and self.receive(), (
                f"{'still not so' if is_late else 'the stream ended early'}: "
                f"{self.stream.events[-3:]}, {self.stream.partial!r}")
        return self

    def read_until_data(self, data: str) -> list:
        """Receive until the newest event has this data, and return all events."""
        return self.read_until(lambda stream: stream.events and stream.events[-1].data == data
                               ).stream.events

    def read_events(self, number: int) -> list:
        """Receive until there are so many events in all, and return them."""
        return self.read_until(lambda stream: len(stream.events) >= number).stream.events

    def read_to_end(self) -> Decoder:
        deadline = time.monotonic() + 2 * PATIENCE
        while self.receive():
            assert time.monotonic() < deadline, f"no end: {self.stream.events[-3:]}"
        return self.stream

    def open(self) -> "Client":
        """Receive until the head is there."""
        return self.read_until(lambda stream: stream.head)

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """Close with a reset instead of an orderly end."""
        reset(self.sock)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()


class SecureClient(Client):
    """A client over TLS, not verifying."""

    def __init__(self, port: int, request: bytes = GET, receive_buffer: Optional[int] = None
                 ) -> None:
        super().__init__(port, b"", receive_buffer)
        self.wrap()
        self.sock.sendall(request)

    def wrap(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        # An end without close_notify is an error to this client
        self.sock = context.wrap_socket(self.sock, suppress_ragged_eofs=False)


def reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


def ask(port: int, request: bytes) -> bytes:
    """Send bytes and return everything that comes back until the server closes."""
    with connect(port) as sock:
        sock.sendall(request)
        received = b""
        while True:
            try:
                data = sock.recv(65536)
            except ConnectionResetError:
                return received
            if not data:
                return received
            received += data


def get(path: str = "/", *fields: str, method: str = "GET") -> bytes:
    """Return a request's head."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: x", *fields, "", ""]).encode()


def post(port: int, path: str = f"/{PUBLISH_TOKEN}", body: bytes = b"hello", *fields: str) -> bytes:
    """POST a body and return the answer."""
    length = f"Content-Length: {len(body)}"
    return ask(port, get(path, length, "Connection: close", *fields, method="POST") + body)


def free_port() -> int:
    """Return a port on which nobody listens now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def listens(port: int) -> bool:
    """Return whether anybody listens on a port."""
    try:
        connect(port).close()
        return True
    except OSError:
        return False


def make_certificate(folder: Path) -> Tuple[str, str]:
    """Make a certificate for this machine: return the paths of cert.pem and key.pem."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run([need("openssl", "openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt",
                    "ec_paramgen_curve:P-256", "-nodes", "-keyout", key, "-out", cert, "-days", "2",
                    "-subj", "/CN=localhost", "-addext",
                    "subjectAltName=DNS:localhost,IP:127.0.0.1"], check=True, capture_output=True)
    return str(cert), str(key)


class Server:
    """`python sse_server.py` as a process, on a free port. before: code that it runs first."""

    def __init__(self, *arguments: str, stdin=None, env: Optional[dict] = None,
                 before: str = "") -> None:
        if stdin is None:
            stdin = subprocess.PIPE if "--stdin" in arguments else subprocess.DEVNULL
        loudness = () if {"--verbose", "--loud"} & set(arguments) else ("--quiet",)
        arguments = [argument for argument in arguments if argument != "--loud"]
        code = f"import sys; sys.path.insert(0, {str(TOP)!r})\n{before}\nimport sse_server\n"
        program = ["-c", f"{code}sys.exit(sse_server.main())"] if before else [str(MAIN)]
        command = [sys.executable, *program, "--port", "0", *loudness, *arguments]
        self.process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, env={**os.environ, **(env or {})})
        self.errors = None
        self.output = b""
        while not re.search(rb":([0-9]+)\n", self.output):
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read().decode()
            self.output += line
        self.port = int(re.search(rb":([0-9]+)\n", self.output)[1])

    def stop(self, by: Optional[int] = None) -> int:
        """Stop it by a signal, and return its exit status."""
        self.process.send_signal(by or signal.SIGINT)
        return self.process.wait(PATIENCE)

    def peer_lines(self) -> list:
        """Make sure it is gone, and return what it logged about peers."""
        edges = ("listening", "stopping", "stopped")
        return [line for line in self.close().splitlines() if not line.startswith(edges)]

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert "Traceback" not in self.close(), self.errors

    def close(self) -> str:
        """Make sure it is gone, and return what it wrote to standard error."""
        if self.process.poll() is None:
            self.process.kill()
        if self.errors is None:
            self.errors = self.process.communicate()[1].decode()
        return self.errors


@contextmanager
def serving(*arguments: str, **options) -> Iterator[Server]:
    """Run a server process; it must write no traceback to standard error."""
    server = Server(*arguments, **options)
    try:
        yield server
    finally:
        errors = server.close()
        assert "Traceback" not in errors, errors


def need(command: str, package: str) -> str:
    """Return the path of a program that a test needs; where it is missing, skip, but in CI fail."""
    path = shutil.which(command)
    if not path:
        lack(f"{command} (Debian package {package})")
    return path


def need_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("this Python has no IPv6")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")


def lack(what: str) -> None:
    """Skip a test because the machine lacks this; in CI fail."""
    reason = f"{what} is not installed"
    pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
