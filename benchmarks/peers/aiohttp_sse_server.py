"""aiohttp-sse on aiohttp: a queue for each client."""
import asyncio
import socket
from typing import Set

from orders import begin, obey_in_loop, payload

begin(__doc__, "aiohttp", "aiohttp_sse")

from aiohttp import web  # noqa: E402
from aiohttp_sse import EventSourceResponse, sse_response  # noqa: E402

queues: Set[asyncio.Queue] = set()


async def stream(request: web.Request) -> EventSourceResponse:
    """Answer a client with all events from now on."""
    queue: asyncio.Queue = asyncio.Queue()
    queues.add(queue)
    try:
        async with sse_response(request) as response:
            while True:
                data, number = await queue.get()
                await response.send(data, id=number)
    finally:
        queues.discard(queue)
    return response


async def publish(sequence: int) -> None:
    """Give the event to every client's queue."""
    event = payload(sequence), str(sequence)
    for queue in queues:
        queue.put_nowait(event)


async def main() -> None:
    """Serve, and publish on command."""
    app = web.Application()
    app.router.add_get("/token", stream)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    await web.SockSite(runner, sock, backlog=1024).start()
    print(sock.getsockname()[1], flush=True)
    await obey_in_loop(publish)


asyncio.run(main())
