"""The table of clients: which there are, how each is run, and what each does that it should not.

`tests/test_client_table.py` drives every row through every step, and asserts for each of them what
stands here: that the client does what it should, or the very thing that it does instead.

    python tests/client_table.py    writes the tables of docs/clients.md anew
"""
from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

from helpers import TOP

INTEROP = TOP / "tests" / "interop"
PAGE = TOP / "docs" / "clients.md"
PYTHON_PINS = "requirements.txt", "python_modules.txt"

# What each step is called, in the order of the table, and what it is called in the table's head.
STEPS = {
    "receives": "receives",
    "large": "1 MB",
    "cut_before_first": "cut before its first event",
    "cut_inside": "cut inside an event",
    "restart": "`kill -9`",
    "heartbeats": "heartbeats",
    "gap": "gap",
    "full": "busy",
    "status_204": "204",
    "status_401": "401",
    "close": "its own close",
}

# The outcome of a step that went as it should.
YES = "yes"


class Deviation(NamedTuple):
    """What a client does at a step instead of what it should."""

    # A word of `test_client_table.py`.
    outcome: str

    # Why, for users: a sentence of the table's notes.
    reason: str


class Row(NamedTuple):
    """A client of the table."""

    name: str

    # Where it comes from: "npm", "PyPI" or "Debian"; and its name there.
    source: str
    package: str

    # A program of tests/interop and its arguments before the stream's address; for a browser the
    # engine and the page.
    driver: tuple[str, ...]

    # By step; the others must go as they should.
    deviations: dict[str, Deviation] = {}

    # For a browser: whether the page has the stream's origin. The other origin is named by
    # `--origin`.
    own_origin: bool = True

    # What a program has to add to it, or to know of it; sentences of the table's notes.
    note: str = ""

    @property
    def version(self) -> str:
        """The version that is tested."""
        if self.source == "npm":
            pinned = json.loads((INTEROP / "package.json").read_text())["dependencies"]
            return pinned[self.package].rpartition("@")[2]
        if self.source == "PyPI":
            pinned = "".join((INTEROP / name).read_text() for name in PYTHON_PINS)
            return re.search(rf"^{re.escape(self.package)}==(.+)$", pinned, re.M)[1]
        return "Debian's"

    def expected(self, step: str) -> str:
        """Return the outcome that the step must have."""
        return self.deviations[step].outcome if step in self.deviations else YES


def python(program: str, *arguments: str) -> tuple[str, ...]:
    return sys.executable, str(INTEROP / "python" / program), *arguments


def node(program: str, *arguments: str) -> tuple[str, ...]:
    return "node", str(INTEROP / "node" / program), *arguments


PAGE_OF_ANOTHER_ORIGIN = "The page's origin is named by `--origin`."
GLUES = Deviation(
    "misreads", "When the connection breaks in the middle of an event, it keeps the lines that it "
    "had, and puts them before the same event when that is sent again. Check that the data is "
    "whole, as `JSON.parse` does, and load the state again if it is not. Only events of more than "
    "one packet, some 1,400 bytes, are concerned.")
HTMX_STOPS = "It comes back for ever after any answer. Remove the element to stop it."
STOPS_AT = ("It does not stop at 204 and 401 by itself; the program tested does what its README "
            "shows for that.")

LOOP = "It does not reconnect; the program tested has the loop around it that a user would write."
LONG_LINE = Deviation("gives up", "It raises an exception at a line of more than 512 KiB.")
RECONNECTS = "To come back after any answer is what it is made for. Call `close()` to stop it."
RN_STOPS = "It comes back after any answer. Call `close()` when `xhrStatus` is 401."

ROWS = [
    Row("Chromium", "Debian", "chromium", ("chromium", "event_source.html")),
    Row("Chromium, other origin", "Debian", "chromium", ("chromium", "event_source.html"),
        own_origin=False, note=PAGE_OF_ANOTHER_ORIGIN),
    Row("Firefox", "Debian", "firefox-esr", ("firefox", "event_source.html")),
    Row("Firefox, other origin", "Debian", "firefox-esr", ("firefox", "event_source.html"), {
        "restart": Deviation(
            "gives up", "Firefox closes an EventSource of another origin for good when the port "
            "refuses a connection. Let something hold the port over a restart (a second process "
            "with `--reuse-port`, or a proxy that waits for the server), or make a new EventSource "
            "when `readyState` is 2, with the last id as `?lastEventId=`. Tested, too: while the "
            "port is held, it stays.")},
        own_origin=False, note=PAGE_OF_ANOTHER_ORIGIN),
    Row("WebKitGTK", "Debian", "webkit2gtk-driver", ("webkit", "event_source.html"),
        {"cut_inside": GLUES}),
    Row("WebKitGTK, other origin", "Debian", "webkit2gtk-driver", ("webkit", "event_source.html"),
        {"cut_inside": GLUES}, own_origin=False, note=PAGE_OF_ANOTHER_ORIGIN),
    Row("htmx 2, htmx-ext-sse", "npm", "htmx-ext-sse", ("chromium", "htmx_2.html"),
        {"status_204": Deviation("comes back", HTMX_STOPS),
         "status_401": Deviation("comes back", HTMX_STOPS)}),
    Row("htmx 2, other origin", "npm", "htmx-ext-sse", ("chromium", "htmx_2.html"),
        {"status_204": Deviation("comes back", HTMX_STOPS),
         "status_401": Deviation("comes back", HTMX_STOPS)},
        own_origin=False, note="It sends credentials, so the page's origin must be named by "
        "`--origin`: an open server is not enough."),
    Row("htmx 4, hx-sse", "npm", "htmx-4", ("chromium", "htmx_4.html"),
        {"status_204": Deviation("comes back", HTMX_STOPS),
         "status_401": Deviation("comes back", HTMX_STOPS)}),
    Row("htmx 4, other origin", "npm", "htmx-4", ("chromium", "htmx_4.html"),
        {"status_204": Deviation("comes back", HTMX_STOPS),
         "status_401": Deviation("comes back", HTMX_STOPS)},
        own_origin=False, note='The page needs `<meta name="htmx-config" content=\'{"mode": '
        '"cors"}\'>`, and its origin is named by `--origin`.'),
    Row("@microsoft/fetch-event-source", "npm", "@microsoft/fetch-event-source",
        ("chromium", "fetch_event_source.html"), own_origin=False, note=STOPS_AT),
    Row("event-source-polyfill", "npm", "event-source-polyfill", ("chromium", "polyfill.html"),
        own_origin=False, note="It waits a second at least before it comes back, and reconnects "
        "when 45 s pass without a byte: keep `--heartbeat` below that."),
    Row("sse.js", "npm", "sse.js", ("chromium", "sse_js.html"), {
        "status_204": Deviation("comes back", "It comes back after 204, and does not tell of it.")},
        own_origin=False, note="It needs `autoReconnect: true` and `headers: {Accept: "
        "\"text/event-stream\"}`. It does not stop at 401 by itself; the page tested calls "
        "`close()` then."),
    Row("reconnecting-eventsource", "npm", "reconnecting-eventsource",
        ("chromium", "reconnecting.html"),
        {"status_204": Deviation("comes back", RECONNECTS),
         "status_401": Deviation("comes back", RECONNECTS)}, own_origin=False),
    Row("eventsource 2", "npm", "eventsource-2", node("event_source.mjs", "eventsource-2"),
        {"cut_inside": GLUES}),
    Row("eventsource 3", "npm", "eventsource-3", node("event_source.mjs", "eventsource-3")),
    Row("eventsource 4", "npm", "eventsource-4", node("event_source.mjs", "eventsource-4")),
    Row("undici 6", "npm", "undici-6", node("event_source.mjs", "undici-6"), {
        "restart": Deviation("gives up", "It closes for good when the port refuses a connection. "
                             "undici 7 does not.")}),
    Row("undici 7", "npm", "undici-7", node("event_source.mjs", "undici-7")),
    Row("launchdarkly-eventsource (npm)", "npm", "launchdarkly-eventsource",
        node("event_source.mjs", "launchdarkly-eventsource")),
    Row("eventsource-client", "npm", "eventsource-client", node("eventsource_client.mjs"),
        note="It stops at 204 but not at 401; the program tested gives it a `fetch` that looks at "
        "the status and calls `close()`."),
    Row("eventsource-parser", "npm", "eventsource-parser", node("eventsource_parser.mjs"),
        note=LOOP),
    Row("react-native-sse", "npm", "react-native-sse", node("react_native_sse.mjs"), {
        "restart": Deviation("is silent", "When the port refuses a connection it tells an error "
                             "and does not come back. Call `close()` and `open()` after an error "
                             "with `xhrStatus` 0."),
        "status_204": Deviation("comes back", RN_STOPS),
        "status_401": Deviation("comes back", RN_STOPS)},
        note="Tested in Node, on an XMLHttpRequest that behaves like React Native's."),
    Row("httpx-sse", "PyPI", "httpx-sse", python("with_httpx_sse.py"), note=LOOP),
    Row("sseclient-py", "PyPI", "sseclient-py", python("with_sseclient_py.py"), note=LOOP),
    Row("sseclient", "PyPI", "sseclient", python("with_sseclient.py"), {
        "cut_inside": GLUES,
        "full": Deviation("misreads", "It reads the connection itself, and makes an event without "
                          "data of the last chunk, wherever a stream ends in order."),
        "status_204": Deviation("comes back", "It takes 204 for a stream that has ended.")},
        note="Not to be installed beside sseclient-py: both are the module `sseclient`. When the "
        "port refuses, it raises an exception; the program tested has a loop around it."),
    Row("requests-sse", "PyPI", "requests-sse", python("with_requests_sse.py"),
        note="It gives up after five attempts in a row (`max_connect_retry`)."),
    Row("aiohttp-sse-client", "PyPI", "aiohttp-sse-client", python("with_aiohttp_sse_client.py"),
        {"large": LONG_LINE}, note="It raises an exception when the connection breaks; the program "
        "tested has a loop around it. Give it a `timeout`: aiohttp's own ends every stream after "
        "five minutes."),
    Row("aiosseclient", "PyPI", "aiosseclient", python("with_aiosseclient.py"), {
        "large": LONG_LINE,
        "full": Deviation("comes back early", "It does not tell its user what `retry:` says."),
        "status_204": Deviation("comes back", "It does not tell its user the status of an answer; "
                                "`raise_for_status=True` raises at 401 only.")},
        note=LOOP),
    Row("launchdarkly-eventsource (Python)", "PyPI", "launchdarkly-eventsource",
        python("with_launchdarkly.py"),
        {"full": Deviation("comes back early", "It ignores `retry:`, and doubles a pause of its "
                           "own.")},
        note="It fails at the first error, or comes back after every one; the program tested has an "
        "error strategy that stops at 204 and 401."),
    Row("donovanhide/eventsource", "Debian", "golang-github-donovanhide-eventsource-dev",
        ("go", str(INTEROP / "go" / "with_donovanhide.go")), {
            "close": Deviation("stays connected", "`Close` ends its connection only when the next "
                               "event comes.")},
        note="It does not stop at 204 and 401 by itself; the program tested calls `Close` then."),
]


class Reader(NamedTuple):
    """A package that reads the output of a model, which takes every event for a part of it."""

    name: str
    source: str
    package: str
    driver: tuple[str, ...]

    # The name of a run in `test_client_table.py`, in the format of this package.
    run: str

    version = Row.version


READERS = [
    Reader("openai (Python)", "PyPI", "openai", python("read_model_output.py", "openai"), "chat"),
    Reader("anthropic (Python)", "PyPI", "anthropic", python("read_model_output.py", "anthropic"),
           "messages"),
    Reader("openai (npm)", "npm", "openai", node("read_model_output.mjs", "openai"), "chat"),
    Reader("@anthropic-ai/sdk", "npm", "@anthropic-ai/sdk",
           node("read_model_output.mjs", "@anthropic-ai/sdk"), "messages"),
    Reader("ai", "npm", "ai", node("read_model_output.mjs", "ai"), "parts"),
]


# Between these the page's tables stand.
BEGIN, END = "<!-- tables -->\n", "<!-- end of the tables -->\n"


def tables() -> str:
    """Return the tables as they must stand in the page, with the notes that they refer to."""
    notes: list[str] = []

    def note(text: str) -> str:
        """Return the reference to a note; what is said twice is one note."""
        if text not in notes:
            notes.append(text)
        return f"[{notes.index(text) + 1}](#notes)"

    lines = ["| client | version | " + " | ".join(STEPS.values()) + " |",
             "| --- | --- |" + " --- |" * len(STEPS)]
    for row in ROWS:
        name = f"{row.name} {note(row.note)}" if row.note else row.name
        cells = [f"{deviation.outcome} {note(deviation.reason)}" if deviation else YES
                 for deviation in map(row.deviations.get, STEPS)]
        lines.append("| " + " | ".join([name, row.version, *cells]) + " |")
    lines += ["", "| reader of model output | version | gets a run and nothing else |",
              "| --- | --- | --- |"]
    lines += [f"| {reader.name} | {reader.version} | {YES} |" for reader in READERS]
    lines += ["", "## Notes", ""]
    lines += [f"{number}. {text}" for number, text in enumerate(notes, 1)]
    return "\n".join(lines) + "\n"


def tables_of(page: Path) -> str:
    """Return what stands in the page where the tables belong."""
    return page.read_text().partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + tables() + END + rest.partition(END)[2])
