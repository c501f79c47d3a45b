"""Make the pictures of the page, in this folder: python docs/screenshots.py. Takes a minute."""
import json
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

MINUTE = 62         # seconds: the chart shows the last 60
OUTAGE = 0.2        # seconds before the end the server is restarted
CONNECTED = "document.getElementById('status').textContent === 'Connected'"
EVENTS = {          # name: how often, of a hundred
    "price": 40, "order": 25, "message": 20, "disk": 9, "mail": 6}


def data(name: str) -> str:
    """Make up the data of one event."""
    number = random.randrange(1000, 9999)
    made = {
        "price": {"item": random.choice(["tea", "salt", "rice"]), "price": number / 100},
        "order": {"order": number, "customer": "Ada", "lines": [{"item": "tea", "pieces": 3}]},
        "mail": {"to": "ann@example.org", "unread": number % 9 + 1}}
    text = {"disk": f"{number} MiB free", "message": time.strftime("%m/%d/%Y %H:%M:%S")}
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
    """Take all pictures, while events go on."""
    thread = threading.Thread(target=feed, args=(server, 4))
    thread.start()
    take(page, "page", 1280, 800)
    page.evaluate("select(view.rows.findLast(row => row.name === 'order'))")
    take(page, "page-dark", 1280, 800, dark=True)
    page.evaluate("closeDetail(), toNewest(), document.activeElement.blur()")
    take(page, "page-phone", 390, 844)
    thread.join()


def main() -> None:
    options = {"retry": 0.5, "publish_tokens": ["say"]}
    with tempfile.TemporaryDirectory() as folder, browser(folder) as page:
        page.resize(1280, 800)
        with SSEServer(port=0, **options) as server:
            page.open(server.url + "/#,say")
            page.wait_for(CONNECTED)
            feed(server, MINUTE - OUTAGE)
        with SSEServer(port=server.port, **options) as server:
            page.wait_for(CONNECTED)
            feed(server, OUTAGE)
            shoot(page, server)


if __name__ == "__main__":
    main()
