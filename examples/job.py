"""A job that publishes its result, and tries again when the server is away. For cron, or Celery.

Run it, in the folder of sse_server.py, while the server runs with --publish-token SECRET:
    SSE_PUBLISH_TOKEN=SECRET python examples/job.py
"""
import json
import os
import sys
import time
import uuid
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

SERVER = "http://127.0.0.1:6500/"

# Seconds of pause before each further try: a minute in all, enough for a restart.
PAUSES = [0.5, 1, 2, 4, 8, 15, 30]


def publish(data, event, channel):
    """Publish an event and return its id, trying for a minute.

    Raises OSError if it could not be published. It may be published twice, when an answer was lost:
    so put something into the data by which a reader can tell.
    """
    url = f"{SERVER}?{urlencode({'event': event, 'channel': channel})}"
    bearer = {"Authorization": f"Bearer {os.environ['SSE_PUBLISH_TOKEN']}"}
    pauses = iter(PAUSES)
    while True:
        try:
            with urlopen(Request(url, data.encode(), bearer), timeout=5) as answer:
                return json.load(answer)["id"]
        except (OSError, HTTPException) as error:
            is_answer = isinstance(error, HTTPError)
            # The server's own words say what to do.
            what = error.read().decode().strip() if is_answer else str(error)
            pause = next(pauses, None)
            # What is wrong with a request does not pass by itself.
            if pause is None or is_answer and error.code < 500:
                raise OSError(what) from error
        print(f"{what}; next try in {pause} s", file=sys.stderr)
        time.sleep(pause)


# With Celery, let it wait instead of a worker: call this with PAUSES = [], and decorate it with
# @app.task(autoretry_for=(OSError,), retry_backoff=True)
def report():
    result = {"job": str(uuid.uuid4()), "rows": 42}
    return publish(json.dumps(result), "report", "job")


if __name__ == "__main__":
    try:
        print(report())
    except OSError as error:
        sys.exit(f"not published: {error}")
