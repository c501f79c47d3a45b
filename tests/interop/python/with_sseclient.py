"""sseclient (not sseclient-py, whose module has the same name) reconnects by itself.

It raises when the port refuses; the loop around it, which goes on with the last id, is a user's.
It prints why a stream ended, to standard output.
"""
import contextlib
import io
import sys
import time
from pathlib import Path

# `make interop` installs it here, beside sseclient-py.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python_modules"))

import requests  # noqa: E402
import say  # noqa: E402
from sseclient import SSEClient  # noqa: E402

url = sys.argv[1]
last_id = None
session = requests.Session()
session.trust_env = False
while True:
    try:
        client = SSEClient(url, last_id=last_id, session=session)
        while True:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                event = next(client)
            if printed.getvalue():
                say.error("the stream ended")
            last_id = client.last_id
            if say.event(event.event, event.data, event.id):
                client.resp.close()
                say.closed("by itself")
    except requests.HTTPError as error:
        say.closed(error)
    except requests.RequestException as error:
        say.error(error)
    time.sleep(0.2)
