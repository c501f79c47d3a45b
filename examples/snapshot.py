"""Show a state that changes: load a snapshot of it, then apply the changes since it was taken.

Run it, in the folder of sse_server.py, and open http://127.0.0.1:8000/:
    python -m examples.snapshot
"""
import json
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sse_server import SSEServer

PAGE = """<!DOCTYPE html>
<meta charset="utf-8">
<title>Stock</title>
<table id="stock"></table>
<script>
  let stock = {}, source;

  async function load() {
    source?.close();
    const snapshot = await (await fetch("/stock")).json();
    stock = snapshot.stock;
    show();
    source = new EventSource(`http://${location.hostname}:6500/?channel=stock&since=${snapshot.time}`);
    source.addEventListener("stock", event => {
      // A change says what is now, not by how much it differs. So it does no harm that some changes
      // are in the snapshot already.
      const {item, pieces} = JSON.parse(event.data);
      stock[item] = pieces;
      show();
    });
    // Some changes are gone: begin again.
    source.addEventListener("gap", load);
  }

  function show() {
    const rows = Object.entries(stock).map(([item, pieces]) => {
      const row = document.createElement("tr");
      row.insertCell().textContent = item;
      row.insertCell().textContent = pieces;
      return row;
    });
    document.getElementById("stock").replaceChildren(...rows);
  }

  load();
</script>
"""

# The state. Your database goes here.
stock = {"tea": 100, "salt": 100, "rice": 100}

# Held while something changes and is published, so that changes are published in their order.
changing = threading.Lock()

events = SSEServer(port=6500, origins=["http://127.0.0.1:8000", "http://localhost:8000"])


def snapshot():
    """Return the state, and a time before it was read: no change after that time is missed."""
    now = int(time.time())
    return {"time": now, "stock": dict(stock)}


def change(item, pieces):
    """Change the state first, then publish what it is."""
    with changing:
        stock[item] = pieces
        events.publish(json.dumps({"item": item, "pieces": pieces}), "stock", "stock")


def sell():
    while True:
        change(random.choice(list(stock)), random.randrange(100))
        time.sleep(0.5)


class App(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/stock":
            kind, text = "application/json", json.dumps(snapshot())
        else:
            kind, text = "text/html; charset=utf-8", PAGE
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())


if __name__ == "__main__":
    with events, ThreadingHTTPServer(("127.0.0.1", 8000), App) as app:
        threading.Thread(target=sell, daemon=True).start()
        app.serve_forever()
