"""Make the pictures of the page, in this folder: python docs/screenshots.py. Takes a minute."""
import json
import math
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Iterator

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS.parent / "tests")]

from browser import Page, browser    # noqa: E402
from sse_server import SSEServer     # noqa: E402

# Seconds: the chart shows the last 60, and shortly before the end the server is restarted.
MINUTE = 62
OUTAGE = 0.2
CONNECTED = "document.getElementById('status').textContent === 'Connected'"
# Name: how often, of a hundred.
EVENTS = {"price": 36, "order": 22, "temperature": 16, "message": 14, "disk": 7, "mail": 5}


def data(name: str) -> str:
    """Make up the data of one event."""
    number = random.randrange(1000, 9999)
    made = {
        "price": {"item": random.choice(["tea", "salt", "rice"]), "price": number / 100},
        "order": {"order": number, "customer": "Ada", "lines": [{"item": "tea", "pieces": 3}]},
        "mail": {"to": "ann@example.org", "unread": number % 9 + 1}}
    degrees = 21 + 2 * math.sin(time.time() / 9) + random.random() / 3
    text = {"disk": f"{number} MiB free", "message": time.strftime("%m/%d/%Y %H:%M:%S"),
            "temperature": f"{degrees:.2f}"}
    return json.dumps(made[name]) if name in made else text[name]


def pauses() -> Iterator[float]:
    """Give the seconds between two events: the rate goes up and down."""
    while True:
        yield random.uniform(0.4, 1.6) / (9 + 7 * random.random() + 6 * (time.time() % 23 > 15))


def feed(server: SSEServer, seconds: float) -> None:
    end = time.monotonic() + seconds
    for pause in pauses():
        name, = random.choices(list(EVENTS), list(EVENTS.values()))
        server.publish(data(name), None if name == "message" else name)
        if time.monotonic() > end:
            return
        time.sleep(pause)


def take(page: Page, name: str, width: int, height: int, *, dark: bool = False) -> None:
    page.resize(width, height, dark)
    time.sleep(0.5)         # a frame or two, and the size is taken in
    page.screenshot(DOCS / f"{name}.png")


def shoot(page: Page, server: SSEServer) -> None:
    """Take the pictures of a stream, while events go on."""
    thread = threading.Thread(target=feed, args=(server, 6))
    thread.start()
    take(page, "page", 1280, 800)
    page.evaluate("select(view.rows.findLast(row => row.name === 'order'))")
    take(page, "page-dark", 1280, 800, dark=True)
    page.evaluate("closeDetail(), toNewest(), document.activeElement.blur()")
    take(page, "page-phone", 390, 844)
    page.evaluate("look('lanes')")
    take(page, "page-lanes", 1280, 800)
    thread.join()


def main() -> None:
    options = {"retry": 0.5, "publish_tokens": ["say"]}
    with tempfile.TemporaryDirectory() as folder, browser(folder) as page:
        page.resize(1280, 800)
        with SSEServer(port=0, **options) as server:
            page.open(server.url + "/#,say")
            page.wait_for(CONNECTED)
            take(page, "page-empty", 1280, 800)
            feed(server, MINUTE - OUTAGE)
        with SSEServer(port=server.port, **options) as server:
            page.wait_for("stream.opens === 2")
            feed(server, OUTAGE)
            shoot(page, server)


if __name__ == "__main__":
    main()
