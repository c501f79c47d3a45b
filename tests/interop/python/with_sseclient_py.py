"""sseclient-py reads a response of requests; the loop around it is a user's."""
import sys
import time

import requests
import say
import sseclient

url = sys.argv[1]
last_id, pause = "", 1.0
session = requests.Session()
session.trust_env = False
while True:
    headers = {"Accept": "text/event-stream"}
    if last_id:
        headers["Last-Event-ID"] = last_id
    try:
        with session.get(url, headers=headers, stream=True) as response:
            if response.status_code in (204, 401):
                say.closed(response.status_code)
            for event in sseclient.SSEClient(response).events():
                last_id = event.id or last_id
                if event.retry:
                    pause = int(event.retry) / 1000
                if say.event(event.event, event.data, event.id):
                    session.close()
                    say.closed("by itself")
        say.error("the stream ended")
    except requests.RequestException as error:
        say.error(error)
    time.sleep(pause)
