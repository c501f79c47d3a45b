"""Drive headless Chromium through its DevTools protocol, over two pipes: no package is needed."""
import base64
import json
import os
import subprocess
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from select import select
from typing import Iterator, List

from helpers import need, wait_until

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-sync", "--disable-background-networking", "--disable-component-update",
         "--disable-dev-shm-usage", "--remote-debugging-pipe", "about:blank"]
ROWS = """[...document.querySelectorAll('.row')].map(
    row => row.querySelector('b').textContent + row.querySelector('.text').textContent)"""


class Page:
    """One tab. `evaluate` runs an expression in it and returns its JSON value."""

    def __init__(self, requests: int, answers: int) -> None:
        self._requests, self._answers = requests, answers
        self._numbers = count(1)
        self._received = b""
        targets = self._call("Target.getTargets")["targetInfos"]
        target = next(info for info in targets if info["type"] == "page")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        self.resize(1280, 2600)         # so that many rows are in view

    def _call(self, method: str, session: str = "", **parameters) -> dict:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._requests, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next_message()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next_message(self) -> dict:
        while b"\0" not in self._received:
            assert select([self._answers], [], [], 30)[0], "the browser does not answer"
            data = os.read(self._answers, 1 << 20)
            assert data, "the browser is gone"
            self._received += data
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **parameters) -> dict:
        return self._call(method, self._session, **parameters)

    def browser_call(self, method: str, **parameters) -> dict:
        """Call what concerns the whole browser, as permissions and downloads do."""
        return self._call(method, **parameters)

    def open(self, url: str) -> "Page":
        """Load the page anew, also if only the fragment differs from what is shown."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        path = url.partition("#")[0].partition("?")[0].rstrip("/")
        wait_until(lambda: self.evaluate(
            f"location.href.startsWith({path!r}) && document.readyState === 'complete'"))
        return self

    def evaluate(self, expression: str):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True,
                           awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def lines(self) -> list:
        """The names and texts of the rows that are in view."""
        return self.evaluate(ROWS)

    def wait_for(self, expression: str) -> None:
        wait_until(lambda: self.evaluate(expression))

    def text(self, name: str) -> str:
        """The text of the element with this id."""
        return self.evaluate(f"document.getElementById({name!r}).textContent")

    def click(self, name: str) -> None:
        self.evaluate(f"document.getElementById({name!r}).click()")

    def type_in(self, name: str, text: str) -> None:
        """Fill in a field as a person does: both events come."""
        self.evaluate(f"""(() => {{ const field = document.getElementById({name!r});
            field.value = {json.dumps(text)}; field.dispatchEvent(new Event('input'));
            field.dispatchEvent(new Event('change')); }})()""")

    def press(self, *keys: str) -> None:
        """Press keys, by their names in `KeyboardEvent.key`."""
        for key in keys:
            text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
            self.call("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
            self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        """Give the tab a size, below 600 pixels that of a phone, and light or dark colours."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    @contextmanager
    def tasks(self) -> Iterator[List[float]]:
        """Collect what each task of pages took meanwhile: milliseconds of their threads' time.

        What else runs on the machine adds nothing to that. They are there at the end.
        """
        taken: List[float] = []
        categories = ["devtools.timeline", "disabled-by-default-devtools.timeline"]
        self._call("Tracing.start", transferMode="ReportEvents", traceConfig={
            "includedCategories": categories, "excludedCategories": ["*"]})
        try:
            yield taken
        finally:
            self._call("Tracing.end")
            events, message = [], self._next_message()
            while message.get("method") != "Tracing.tracingComplete":
                events += message.get("params", {}).get("value", ())
                message = self._next_message()
            # Only the threads of pages draw frames
            pages = {(each["pid"], each["tid"]) for each in events
                     if each["name"] == "FireAnimationFrame"}
            taken += [each["tdur"] / 1000 for each in events if each["name"] == "RunTask"
                      and "tdur" in each and (each["pid"], each["tid"]) in pages]

    @contextmanager
    def at_start(self, script: str) -> Iterator[None]:
        """Run a script before those of every page that is opened meanwhile."""
        self.call("Page.enable")
        added = self.call("Page.addScriptToEvaluateOnNewDocument", source=script)
        try:
            yield
        finally:
            self.call("Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"])


@contextmanager
def browser(folder) -> Iterator[Page]:
    """Run Chromium with an empty profile in `folder` and give its one tab."""
    command = need("chromium", "chromium")
    request_end, requests = os.pipe()
    answers, answer_end = os.pipe()

    def wire() -> None:     # the protocol wants its pipes as descriptors 3 and 4
        first, second = os.dup(request_end), os.dup(answer_end)
        os.dup2(first, 3)
        os.dup2(second, 4)

    process = subprocess.Popen([command, *FLAGS[:-1], f"--user-data-dir={folder}", FLAGS[-1]],
                               preexec_fn=wire, close_fds=False, stderr=subprocess.DEVNULL,
                               stdout=subprocess.DEVNULL)
    try:
        os.close(request_end), os.close(answer_end)
        yield Page(requests, answers)
    finally:
        os.close(requests), os.close(answers)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
