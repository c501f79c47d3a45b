"""Stream a text into a page, word by word, so that a reload shows all of it and goes on.

Run it, in the folder of sse_server.py, and open http://127.0.0.1:8000/:
    python -m examples.streamed_text
"""
import json
import threading
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from sse_server import SSEServer

PAGE = """<!DOCTYPE html>
<meta charset="utf-8">
<title>Streamed text</title>
<button id="ask">Ask</button>
<p id="text" style="white-space: pre-wrap; font: 1.1rem/1.5 system-ui; max-width: 40rem"></p>
<script>
  const text = document.getElementById("text");

  function show(run) {
    const source = new EventSource(`http://${location.hostname}:6500/?channel=run/${run}&since=all`);
    source.addEventListener("part", event => text.append(JSON.parse(event.data)));
    source.addEventListener("done", () => source.close());
    source.addEventListener("gap", () => text.append("[some of the text is no longer kept] "));
  }

  document.getElementById("ask").onclick = async event => {
    event.target.disabled = true;
    const run = await (await fetch("/ask", {method: "POST"})).text();
    // The run stands in the address, so that a reload, or somebody with the link, finds it again.
    location.hash = run;
    show(run);
  };

  if (location.hash) show(location.hash.slice(1));
</script>
"""

# Each run has a channel of its own. Keep enough events for all runs that may be loaded again.
events = SSEServer(port=6500, history=10_000, origins=["http://127.0.0.1:8000", "http://localhost:8000"])


def answer(run):
    """Publish a text in parts. A model's answer would go here."""
    for number in range(1, 101):
        part = f"{number} " if number % 10 else f"{number}\n"
        # As JSON, because a part may begin or end with a line break.
        events.publish(json.dumps(part), "part", f"run/{run}")
        time.sleep(0.1)
    events.publish("", "done", f"run/{run}")


class App(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(PAGE, "text/html; charset=utf-8")

    def do_POST(self):
        # Whoever knows the name of a run may read it, so nobody can guess it.
        run = str(uuid.uuid4())
        threading.Thread(target=answer, args=(run,), daemon=True).start()
        self.reply(run, "text/plain")

    def reply(self, text, kind):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(text.encode())


if __name__ == "__main__":
    with events, ThreadingHTTPServer(("127.0.0.1", 8000), App) as app:
        app.serve_forever()
