"""Drive headless Chromium through its DevTools protocol, over a pair of pipes: with no package."""
import json
import os
import subprocess
from contextlib import contextmanager
from itertools import count
from select import select
from typing import Iterator

from helpers import need, wait_until

FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-sync", "--disable-background-networking", "--disable-component-update",
         "--disable-dev-shm-usage", "--remote-debugging-pipe", "about:blank"]


class Page:
    """One tab. `evaluate` runs an expression in it and returns its JSON value."""

    def __init__(self, requests: int, answers: int) -> None:
        self._requests, self._answers = requests, answers
        self._numbers = count(1)
        self._received = b""
        target = next(info for info in self._call("Target.getTargets")["targetInfos"]
                      if info["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=target["targetId"],
                                   flatten=True)["sessionId"]

    def _call(self, method: str, session: str = "", **parameters) -> dict:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters,
                   **({"sessionId": session} if session else {})}
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

    def open(self, url: str) -> "Page":
        self.call("Page.navigate", url=url)
        path = url.partition("#")[0].rstrip("/")
        self.wait_for(f"location.href.startsWith({path!r}) "
                      "&& document.readyState === 'complete'")
        return self

    def evaluate(self, expression: str):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True,
                           awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def lines(self) -> list:
        """The texts of the lines that the page shows."""
        return self.evaluate("[...document.querySelectorAll('#lines > div')]"
                             ".map(line => line.textContent)")

    def wait_for(self, expression: str) -> None:
        wait_until(lambda: self.evaluate(expression))


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
                               preexec_fn=wire, close_fds=False,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
