"""requests-sse reconnects by itself."""
import sys
from datetime import timedelta

import requests
import say
from requests_sse import EventSource, InvalidStatusCodeError

session = requests.Session()
session.trust_env = False
source = EventSource(sys.argv[1], session=session, reconnection_time=timedelta(seconds=0.1),
                     on_error=lambda: say.error("error"))
try:
    with source:
        for event in source:
            if say.event(event.type, event.data, event.last_event_id):
                break
        source.close()
    say.closed("by itself")
except InvalidStatusCodeError as error:
    say.closed(error.status_code)
except requests.RequestException as error:
    say.closed(f"gave up: {error}")
