"""The orders that every peer takes, as serve.py does: `COUNT MICROSECONDS`, answered by `done`."""
import asyncio
import importlib.util
import os
import sys
import time
from typing import Awaitable, Callable


def begin(text: str, *packages: str) -> None:
    """Show the text and end if --help is asked for; end with a line if a package is missing."""
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    if "--help" in sys.argv:
        print(f"{text}\n\nIt takes the orders of serve.py; peers.py starts it.")
        sys.exit()
    if missing:
        sys.exit(f"{sys.argv[0]} needs the package {missing[0]}: peers.py installs it")


def payload(sequence: int) -> str:
    """Return the 68 bytes of an event: when it was published, and its number."""
    return f"{time.monotonic_ns():019d} {sequence:09d} ".ljust(68, "x")


def obey(publish: Callable[[int], None]) -> None:
    """Publish on command from this thread until standard input ends."""
    sequence = 0
    for line in sys.stdin:
        events, pause = (int(word) for word in line.split()[:2])
        due = time.monotonic()
        for number in range(sequence, sequence + events):
            publish(number)
            due += pause / 1e6
            if pause:
                time.sleep(max(0, due - time.monotonic()))
        sequence += events
        print("done", flush=True)


async def obey_in_loop(publish: Callable[[int], Awaitable[None]]) -> None:
    """Publish on command from the running event loop; end the process when standard input ends."""
    loop = asyncio.get_running_loop()
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)
    sequence = 0
    async for line in orders:
        events, pause = (int(word) for word in line.split()[:2])
        due = loop.time()
        for number in range(sequence, sequence + events):
            await publish(number)
            due += pause / 1e6
            if pause:
                await asyncio.sleep(max(0, due - loop.time()))
        sequence += events
        print("done", flush=True)
    os._exit(0)         # a graceful end would wait for clients that stay


if __name__ == "__main__":
    begin(__doc__)
