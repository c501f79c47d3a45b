"""aiosseclient has no reconnect: the loop around it is a user's.

It does not tell its user the status of an answer; `raise_for_status` at least raises at a 401.
"""
import asyncio
import sys

import aiohttp
import say
from aiosseclient import aiosseclient


async def main(url: str) -> None:
    last_id = ""
    while True:
        try:
            async for event in aiosseclient(url, last_id=last_id, raise_for_status=True):
                last_id = event.id or last_id
                if say.event(event.event, event.data, event.id):
                    say.closed("by itself")
            say.error("the stream ended")
        except aiohttp.ClientResponseError as error:
            say.closed(error.status)
        except aiohttp.ClientError as error:
            say.error(error)
        except aiohttp.http_exceptions.LineTooLong as error:
            # It would be as long the next time.
            say.closed(error)
        # It says only that there was a `retry:`, not which.
        await asyncio.sleep(0.2)

asyncio.run(main(sys.argv[1]))
