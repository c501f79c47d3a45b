"""http.server's ThreadingHTTPServer: a thread and a queue for each client."""
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from queue import SimpleQueue
from typing import List

from orders import begin, obey, payload

begin(__doc__)

queues: List[SimpleQueue] = []


class Server(ThreadingHTTPServer):
    # With the default of 5, a thousand connects would wait for each other's retries
    request_queue_size = 1024
    daemon_threads = True


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        """Send the head, then every event that comes."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        queue: SimpleQueue = SimpleQueue()
        queues.append(queue)
        self.end_headers()
        while True:
            self.wfile.write(queue.get())

    def log_message(self, *args) -> None:
        """Say nothing."""


def publish(sequence: int) -> None:
    """Give the event to every client's queue."""
    frame = f"id: {sequence}\ndata: {payload(sequence)}\n\n".encode()
    for queue in queues:
        queue.put(frame)


server = Server(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(server.server_port, flush=True)
obey(publish)
os._exit(0)         # a thousand threads wait for their queues
