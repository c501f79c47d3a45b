"""aiohttp-sse-client comes back after the orderly end of a stream, and raises at a broken one.

So there is a loop around it, a user's, which gives the last id to the next one.
"""
import asyncio
import sys
from datetime import timedelta

import aiohttp
import say
from aiohttp_sse_client.client import EventSource


async def main(url: str) -> None:
    last_id = ""
    while True:
        headers = {"Last-Event-ID": last_id} if last_id else {}
        try:
            # aiohttp would end every stream after five minutes.
            async with EventSource(url, headers=headers, timeout=aiohttp.ClientTimeout(),
                                   reconnection_time=timedelta(seconds=0.1),
                                   on_error=lambda: say.error("error")) as source:
                async for event in source:
                    last_id = event.last_event_id
                    if say.event(event.type, event.data, event.last_event_id):
                        break
            say.closed("by itself")
        except aiohttp.ClientError as error:
            say.error(error)
        except aiohttp.http_exceptions.LineTooLong as error:
            # It would be as long the next time.
            say.closed(error)
        except (ConnectionRefusedError, ConnectionAbortedError) as error:
            # Its own, for an answer with another status than 200.
            say.closed(error)
        await asyncio.sleep(0.2)

asyncio.run(main(sys.argv[1]))
