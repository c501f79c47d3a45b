"""launchdarkly-eventsource reconnects by itself if its error strategy says so.

By default it fails at the first error. Its `always_continue` would come back after 204 and 401,
too; so the strategy is the one that a user needs who wants what an EventSource does.
"""
import sys

import say
from ld_eventsource import SSEClient
from ld_eventsource.actions import Event, Fault
from ld_eventsource.config import ErrorStrategy
from ld_eventsource.errors import HTTPStatusError


def strategy(error):
    is_final = isinstance(error, HTTPStatusError) and error.status in (204, 401)
    return (ErrorStrategy.FAIL if is_final else ErrorStrategy.CONTINUE), None


client = SSEClient(sys.argv[1], initial_retry_delay=0.2,
                   error_strategy=ErrorStrategy.from_lambda(strategy))
try:
    for action in client.all:
        if isinstance(action, Fault):
            say.error(action.error)
        elif isinstance(action, Event) and say.event(action.event, action.data,
                                                     action.last_event_id):
            client.close()
            say.closed("by itself")
except HTTPStatusError as error:
    say.closed(error.status)
say.closed("no more events")
