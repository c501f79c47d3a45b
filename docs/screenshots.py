"""Make the pictures of the page and of the example dashboard, in this folder: takes a minute."""
import json
import math
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Iterator, List

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


def readings(newest: float, swing: float, step: bool) -> List[List[float]]:
    """Make up two minutes of what a producer of the dashboard publishes, a reading a second."""
    now, level, made = time.time() * 1000, newest, []
    for seconds in range(122, 1, -1):
        if not step or seconds % 12 == 0:
            level = newest + swing * (math.sin(seconds / 17) + random.random() - 0.5)
        made.append([now - 1000 * seconds, round(max(0.0, level), 2)])
    return made


def shoot_dashboard(page: Page, server: SSEServer) -> None:
    """Take the picture of examples/dashboard.html, as it is after two minutes."""
    metrics = {"load": (0.9, 0.4, True), "cpu": (38, 18, False), "memory": (46.3, 1.2, False),
               "processes": (214, 6, False), "disk": (61.8, 0.1, True), "write": (1.9, 0.8, False)}
    kept = {name: json.dumps(readings(*made)) for name, made in metrics.items()}
    with page.at_start(f"Object.assign(sessionStorage, {json.dumps(kept)})"):
        for name, (newest, *_) in metrics.items():
            server.publish(str(newest), name, name)
        page.open((DOCS.parent / "examples" / "dashboard.html").as_uri() + f"?server={server.url}/")
        page.wait_for("document.getElementById('status').textContent === 'Live'")
        take(page, "dashboard", 1280, 800)


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
            shoot_dashboard(page, server)


if __name__ == "__main__":
    main()
