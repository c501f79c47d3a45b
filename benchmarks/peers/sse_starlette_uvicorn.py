"""sse-starlette on uvicorn, with uvloop and httptools: a queue for each client."""
import asyncio
import socket
from typing import AsyncIterator, Set

from orders import begin, obey_in_loop, payload

begin(__doc__, "uvicorn", "uvloop", "sse_starlette")

import uvicorn  # noqa: E402
import uvloop  # noqa: E402
from sse_starlette import EventSourceResponse  # noqa: E402
from starlette.applications import Starlette  # noqa: E402
from starlette.requests import Request  # noqa: E402
from starlette.routing import Route  # noqa: E402

queues: Set[asyncio.Queue] = set()


async def events(queue: asyncio.Queue) -> AsyncIterator[dict]:
    """Yield what the queue gets."""
    try:
        while True:
            yield await queue.get()
    finally:
        queues.discard(queue)


async def stream(request: Request) -> EventSourceResponse:
    """Answer a client with all events from now on."""
    queue: asyncio.Queue = asyncio.Queue()
    queues.add(queue)
    return EventSourceResponse(events(queue))


async def publish(sequence: int) -> None:
    """Give the event to every client's queue."""
    event = {"id": str(sequence), "data": payload(sequence)}
    for queue in queues:
        queue.put_nowait(event)


async def main() -> None:
    """Serve, and publish on command."""
    sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    app = Starlette(routes=[Route("/token", stream)])
    server = uvicorn.Server(uvicorn.Config(app, http="httptools", log_level="error",
                                           access_log=False))
    print(sock.getsockname()[1], flush=True)
    await asyncio.gather(server.serve(sockets=[sock]), obey_in_loop(publish))


uvloop.run(main())
