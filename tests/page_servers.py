"""Servers for the page that are not ours: they answer what a test says, and keep what was asked."""
import threading
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Callable, Iterator, List

from helpers import PATIENCE, TOP

ANY_ORIGIN = {"Access-Control-Allow-Origin": "*"}
PREFLIGHT = {**ANY_ORIGIN, "Access-Control-Allow-Headers": "Authorization, Last-Event-ID"}
STREAM = {"Content-Type": "text/event-stream", **ANY_ORIGIN}
POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
          "connect-src *; img-src data:; base-uri 'none'; form-action 'none'; "
          "frame-ancestors 'none'")


class Request(BaseHTTPRequestHandler):
    """One request. `server.answer` is asked what to do with it."""

    timeout = 0.5               # a browser opens connections that it may need; do not wait for it

    def _any(self) -> None:
        self.server.requests.append(self)
        if self.path.startswith("/page"):
            self.reply(200, (TOP / "index.html").read_bytes(), **{
                "Content-Type": "text/html", "Content-Security-Policy": POLICY})
        elif self.path != "/favicon.ico":
            self.server.answer(self)

    do_GET = do_POST = do_OPTIONS = _any

    def reply(self, status: int, body: bytes = b"", **fields: str) -> None:
        """Send an answer; its end is that of the connection."""
        self.send_response(status)
        for name, value in fields.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def hold(self) -> None:
        """Leave the connection open until the server stops."""
        self.wfile.flush()
        assert self.server.stopping.wait(2 * PATIENCE)

    def log_message(self, *arguments) -> None:
        pass


class Foreign(ThreadingHTTPServer):
    """A server on a free port. `requests`: all that came, also preflights, in order."""

    daemon_threads = False

    def __init__(self, answer: Callable[[Request], None]) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.answer = answer
        self.requests: List[Request] = []
        self.stopping = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def gets(self) -> List[Request]:
        return [each for each in self.requests
                if each.command == "GET" and not each.path.startswith(("/page", "/favicon.ico"))]

    def handle_error(self, request, client_address) -> None:
        """Say nothing: a browser leaves when it likes."""


@contextmanager
def foreign(answer: Callable[[Request], None]) -> Iterator[Foreign]:
    server = Foreign(answer)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        thread.join()
        server.server_close()


def strip_prefix(prefix: str, port: int) -> Callable[[Request], None]:
    """Return an answer that forwards what is under this path to a server, as a proxy does."""
    def answer(request: Request) -> None:
        if not request.path.startswith(prefix + "/"):
            return request.reply(404)
        upstream = HTTPConnection("127.0.0.1", port)
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        upstream.request(request.command, request.path[len(prefix):], body, dict(request.headers))
        response = upstream.getresponse()
        fields = dict(response.getheaders())
        for hop_by_hop in ("Transfer-Encoding", "Content-Length", "Connection"):
            fields.pop(hop_by_hop, None)
        request.reply(response.status, **fields)
        while True:
            data = response.read1(65536)
            if not data:
                return upstream.close()
            request.wfile.write(data)
    return answer
