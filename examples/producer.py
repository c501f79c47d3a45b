"""Publish how full the disk is and how long it takes to write, for dashboard.html.

Run it, in the folder of sse_server.py, while the server runs with --publish-token SECRET:
    SSE_PUBLISH_TOKEN=SECRET python examples/producer.py
"""
import os
import shutil
import sys
import tempfile
import time
from urllib.error import HTTPError
from urllib.request import Request, urlopen

BEARER = {"Authorization": f"Bearer {os.environ['SSE_PUBLISH_TOKEN']}"}


def publish(channel, data):
    """Publish an event. What cannot be published now is old in a second, so leave it out."""
    url = f"http://127.0.0.1:6500/?channel={channel}&event={channel}"
    try:
        with urlopen(Request(url, data.encode(), BEARER), timeout=5):
            pass
    except HTTPError as error:
        # The server says what to do.
        print(f"not published: {error.read().decode()}", end="", file=sys.stderr)
    except OSError as error:
        print(f"not published: {error}", file=sys.stderr)


def write_time():
    """Return the milliseconds that it takes until 1 MiB is on the disk."""
    with tempfile.TemporaryFile() as file:
        began = time.perf_counter()
        file.write(bytes(1 << 20))
        file.flush()
        os.fsync(file.fileno())
        return (time.perf_counter() - began) * 1000


while True:
    disk = shutil.disk_usage("/")
    publish("disk", f"{100 * disk.used / disk.total:.1f}")
    publish("write", f"{write_time():.2f}")
    time.sleep(1)
