"""httpx-sse has no reconnect: the loop is the one of its own README."""
import sys
import time

import httpx
import say
from httpx_sse import connect_sse

url = sys.argv[1]
last_id, pause = "", 1.0
# trust_env: no proxy of the environment. A stream may be silent for as long as it likes.
client = httpx.Client(timeout=None, trust_env=False)
while True:
    headers = {"Last-Event-ID": last_id} if last_id else {}
    try:
        with connect_sse(client, "GET", url, headers=headers) as source:
            if source.response.status_code in (204, 401):
                say.closed(source.response.status_code)
            for event in source.iter_sse():
                last_id = event.id
                if event.retry is not None:
                    pause = event.retry / 1000
                if say.event(event.event, event.data, event.id):
                    client.close()
                    say.closed("by itself")
        say.error("the stream ended")
    except httpx.TransportError as error:
        say.error(error)
    time.sleep(pause)
