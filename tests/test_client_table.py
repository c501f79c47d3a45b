"""Other people's clients go through the same steps: what each does is a table, and asserted.

A client is a driver: a program that gets a URL and names of events, and prints a JSON object for
each thing that happens to it:

    {"event": NAME, "data": DATA, "id": ID}   an event
    {"error": WHY}                            the connection ended or failed; it will come back
    {"closed": WHY}                           it is closed for good

A step drives a client and returns a word for what came out: "yes", or what it did instead, one of

    loses       never got some events            doubles     got some twice
    misreads    got what nobody sent             gives up    closed itself for good
    comes back  though it was told to stop       is silent   nothing more was seen of it
    comes back early                             before `retry:` had passed

Tests and drivers talk over a door (`door.py`), which cuts, refuses and notes.
"""
from __future__ import annotations

import atexit
import functools
import glob
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator
from unittest.mock import patch

import pytest
import requests
from client_table import INTEROP, PAGE, READERS, ROWS, STEPS, YES, Reader, Row, tables, tables_of
from door import Door, door_before
from helpers import PUBLISH_TOKEN, Client, Server, free_port, lack, need, wait_until

from sse_core.http import answers
from sse_server import SSEServer

# Seconds until a client that shows nothing counts as silent: more than any of them waits before
# it comes back.
PATIENCE = 15.0

# Seconds in which a client that was told to stop has time to come back: many times RETRY.
QUIET = 1.5
RETRY = 0.1

# Letters whose UTF-8 holds the byte 0x85, which some take for the end of a line, and one outside
# the first plane.
TEXT = "grüße, Ångström ✅ 🎉"
EVENTS = [(TEXT, None), (f"one\n\n{TEXT}", "custom"), (TEXT, "größe ✅"), ('{"a": 1}', None)]
NAMES = ["custom", "größe ✅", "enough"]

# What asks a driver to close its client, as its `say` knows it.
CLOSE, CLOSE_NAME = "close yourself", "enough"

STOP_204 = (b"HTTP/1.1 204 No Content\r\nAccess-Control-Allow-Origin: %b\r\n"
            b"Access-Control-Allow-Credentials: true\r\nConnection: close\r\n\r\n")


class Driver:
    """A running client, and what it has said."""

    def __init__(self, command: list[str]) -> None:
        self.events: list[tuple[str, str, str]] = []
        self.errors: list[str] = []
        self.closed = ""
        environment = {**os.environ, "NODE_NO_WARNINGS": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        encoding="utf-8", env=environment)
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            said = json.loads(line)
            if "event" in said:
                self.events.append((said["event"], said["data"], said["id"]))
            elif "error" in said:
                self.errors.append(said["error"])
            else:
                self.closed = said.get("closed") or line
        self.closed = self.closed or "its program ended"

    def published(self) -> list:
        """Return all events but the server's own that say nothing of others."""
        return [event for event in self.events if event[0] not in ("welcome", "busy")]

    def wait_for(self, condition) -> bool:
        """Wait until the condition holds, the client is closed, or for PATIENCE; is it so?"""
        deadline = time.monotonic() + PATIENCE
        while not condition() and not self.closed and time.monotonic() < deadline:
            time.sleep(0.005)
        return bool(condition())

    def outcome(self, expected: list) -> str:
        """Wait until the last of these events is there, and say how what came compares."""
        self.wait_for(lambda: expected[-1] in self.events)
        got = self.published()
        if got == expected:
            return YES
        if any(event not in expected for event in got):
            return "misreads"
        if len(set(got)) < len(got):
            return "doubles"
        if self.closed:
            return "gives up"
        return "loses" if expected[-1] in got else "is silent"

    def stop(self) -> None:
        with self.process:
            self.process.terminate()
            self._reader.join()


class Stage:
    """What a step plays on: a client, a door, and where its page comes from."""

    def __init__(self, row: Row, folder: Path) -> None:
        self.row, self.folder = row, folder
        self.is_page = row.driver[0] in ("chromium", "firefox", "webkit")
        self.page_port = free_port() if self.is_page else None
        self.origin = f"http://127.0.0.1:{self.page_port}"

    def server(self, **options) -> SSEServer:
        """Make a server that lets the client's page in."""
        return SSEServer(**{"port": 0, "retry": RETRY, "heartbeat": 0, **self.origins(), **options})

    def origins(self) -> dict:
        return {"origins": [self.origin]} if self.is_page and not self.row.own_origin else {}

    @contextmanager
    def playing(self, port: int, path: str = "/token") -> Iterator[tuple[Driver, Door]]:
        """Run a door to this port and the client before it."""
        with door_before(port, self.page_port) as door:
            driver = Driver(self.command(f"http://127.0.0.1:{door.port}{path}", door))
            try:
                yield driver, door
            finally:
                driver.stop()

    def command(self, url: str, door: Door) -> list[str]:
        if self.row.driver[0] == "go":
            return [built(self.row.driver[1]), url, *NAMES]
        if not self.is_page:
            return [*self.row.driver, url, *NAMES]
        base = f"http://127.0.0.1:{door.port}" if self.row.own_origin else self.origin
        return [sys.executable, str(INTEROP / "in_browser.py"), *self.row.driver,
                str(self.page_port), base, url, *NAMES]


@functools.lru_cache(maxsize=None)
def built(program: str) -> str:
    """Build a Go program against Debian's packages, once, and return its path."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    binary = os.path.join(folder, "driver")
    environment = {**os.environ, "GO111MODULE": "off", "GOPATH": "/usr/share/gocode",
                   "GOCACHE": os.path.join(folder, "cache")}
    subprocess.run(["go", "build", "-o", binary, program], env=environment, check=True)
    return binary


def publish(server: SSEServer, *events: tuple) -> list:
    """Publish, and return what a client must see of it."""
    return [(name or "message", data, server.publish(data, name)) for data, name in events]


# Runs of a model, as its packages expect them: data and names of events. The last ends the run for
# the package, or is ours.
WORDS = ["grüße, ", "Ång", "ström ✅"]
RUNS = {
    "chat": [*((json.dumps({"id": "1", "object": "chat.completion.chunk", "created": 1,
                            "model": "m", "choices": [{"index": 0, "delta": {"content": word},
                                                       "finish_reason": None}]}), None)
               for word in WORDS), ("[DONE]", None)],
    "messages": [*((json.dumps({"type": "content_block_delta", "index": 0,
                                "delta": {"type": "text_delta", "text": word}}),
                    "content_block_delta") for word in WORDS),
                 ('{"type": "message_stop"}', "message_stop")],
    "parts": [('{"type": "start"}', None), ('{"type": "text-start", "id": "1"}', None),
              *((json.dumps({"type": "text-delta", "id": "1", "delta": word}), None)
                for word in WORDS),
              ('{"type": "finish"}', None), ("[DONE]", None)],
}


# The steps

def receives(stage: Stage) -> str:
    """Named and unnamed events with umlauts and emoji come as they were, after a welcome."""
    with stage.server() as server, stage.playing(server.port) as (driver, _):
        wait_until(lambda: server.clients == 1)
        outcome = driver.outcome(publish(server, *EVENTS))
        greeting = driver.events[0]
        assert greeting[0] == "welcome" and greeting[2], greeting
        return outcome


def large(stage: Stage) -> str:
    """An event nearly as large as can be comes whole, and the next one, too."""
    with stage.server() as server, stage.playing(server.port) as (driver, _):
        wait_until(lambda: server.clients == 1)
        return driver.outcome(publish(server, ("é" * 500_000, None), ("next", None)))


def cut_before_first(stage: Stage) -> str:
    """It is cut when it has had nothing but the welcome, and misses nothing."""
    with stage.server() as server, stage.playing(server.port) as (driver, door):
        wait_until(lambda: server.clients == 1)
        assert driver.wait_for(lambda: driver.events), "no welcome"
        door.hold()
        missed = publish(server, ("missed", None), ("missed, too", "custom"))
        door.open()
        driver.wait_for(lambda: door.streams() > 1 and server.clients == 1)
        return driver.outcome([*missed, *publish(server, ("last", None))])


def cut_inside(stage: Stage) -> str:
    """It is cut in the middle of an event, and has it whole when it is back."""
    with stage.server() as server, stage.playing(server.port) as (driver, door):
        wait_until(lambda: server.clients == 1)
        published = publish(server, ("first", None))
        driver.wait_for(lambda: published[0] in driver.events)
        door.cut_after = b"data: half\n"
        published += publish(server, ("half\n" + TEXT * 100, "custom"))
        driver.wait_for(lambda: door.streams() > 1 and server.clients == 1)
        return driver.outcome(published + publish(server, ("last", None)))


def restart(stage: Stage, is_held: bool = False) -> str:
    """The server is killed and comes back with its file: every event, once.

    is_held: somebody listens on the port all the time.
    """
    origin = ["--origin", stage.origin] if stage.origins() else []
    arguments = ["--history-file", str(stage.folder / "events.db"), "--interval", "0",
                 "--retry", str(RETRY), "--publish-token", PUBLISH_TOKEN, *origin]
    servers = [Server(*arguments)]
    try:
        with stage.playing(servers[0].port) as (driver, door):
            assert driver.wait_for(lambda: driver.events), "no welcome"
            published = [post(servers[0], "a")]
            driver.wait_for(lambda: published[0] in driver.events)

            # Acknowledged, but not necessarily sent.
            published += [post(servers[0], "b"), post(servers[0], "c")]
            servers[0].process.kill()
            door.hold() if is_held else door.shut()
            servers.append(Server(*arguments))
            published.append(post(servers[1], "while it is away"))

            # One error for the end of the stream, and one for an attempt in vain.
            driver.wait_for(lambda: len(driver.errors) > (0 if is_held else 1))
            door.target = servers[1].port
            door.open()
            if not driver.wait_for(lambda: door.streams() > 1):
                return "gives up" if driver.closed else "is silent"
            published.append(post(servers[1], "last"))
            return driver.outcome(published)
    finally:
        for server in servers:
            assert "Traceback" not in server.close()


def post(server: Server, data: str) -> tuple[str, str, str]:
    """POST an event, and return what a client must see of it."""
    url = f"http://127.0.0.1:{server.port}/{PUBLISH_TOKEN}"
    answer = requests.post(url, data, timeout=PATIENCE)
    return "message", data, answer.json()["id"]


def heartbeats(stage: Stage) -> str:
    """Heartbeats come before, between and after events, and it shows nothing of them."""
    with stage.server(heartbeat=0.05) as server, stage.playing(server.port) as (driver, door):
        wait_until(lambda: server.clients == 1)
        published = []
        for number, event in enumerate(EVENTS, 1):
            wait_until(lambda: door.sent.count(b"\n:\n") > 3 * number)
            published += publish(server, event)
        outcome = driver.outcome(published)
        return "loses the connection" if driver.errors or door.streams() > 1 else outcome


def gap(stage: Stage) -> str:
    """It is away for longer than the log reaches: it is told so and goes on, also after a cut."""
    with stage.server(history=64) as server, stage.playing(server.port) as (driver, door):
        wait_until(lambda: server.clients == 1)
        published = publish(server, ("first", None))
        driver.wait_for(lambda: published[0] in driver.events)
        door.hold()
        published += publish(server, *((str(number), None) for number in range(200)))
        door.open()
        if not driver.wait_for(lambda: published[-1] in driver.events):
            return driver.outcome(published)
        name, data, last_id = driver.published()[1]
        told = json.loads(data)
        assert name == "gap" and told["after"] == last_id == published[0][2], driver.events[:4]
        resumed = [event[2] for event in published].index(told["resumed"])
        door.cut()
        published += publish(server, ("away again", None))
        driver.wait_for(lambda: door.streams() > 2 and server.clients == 1)
        published += publish(server, ("last", None))
        return driver.outcome([published[0], (name, data, last_id), *published[resumed:]])


def full(stage: Stage) -> str:
    """There is no place for it: it is told so, waits as long as that says, and then gets in."""
    with patch.object(answers, "COME_BACK", 2), stage.server(max_clients=1) as server, \
            Client(server.port) as other, stage.playing(server.port) as (driver, door):
        wait_until(lambda: server.clients == 1)
        if not driver.wait_for(lambda: driver.events):
            return "is silent"
        name, data, last_id = driver.events[0]
        assert (name, last_id) == ("busy", ""), driver.events
        other.close()
        driver.wait_for(lambda: door.streams() > 1 and server.clients == 1)

        # Some vary the time that they are told, htmx 4 by 30 %.
        is_early = door.times[1] - door.times[0] < 0.6 * json.loads(data)["retry"]
        outcome = driver.outcome(publish(server, ("last", None)))
        return "comes back early" if is_early and outcome == YES else outcome


def status_204(stage: Stage) -> str:
    """It is answered 204 when it comes back, and stops."""
    with stage.server() as server, stage.playing(server.port) as (driver, door):
        assert driver.wait_for(lambda: driver.events), "no welcome"
        base = stage.origin if stage.origins() else f"http://127.0.0.1:{door.port}"
        door.answer = STOP_204 % base.encode()
        door.cut()
        return stopped(driver, door, server)


def status_401(stage: Stage) -> str:
    """Its token is unknown when it comes back, and it stops."""
    with stage.server(tokens=["one"]) as first, stage.server(tokens=["two"]) as second, \
            stage.playing(first.port, "/one") as (driver, door):
        assert driver.wait_for(lambda: driver.events), "no welcome"
        door.target = second.port
        door.cut()
        return stopped(driver, door, second)


def close(stage: Stage) -> str:
    """It has enough and closes: the server sees it leave, and it does not come back."""
    with stage.server() as server, stage.playing(server.port) as (driver, door):
        wait_until(lambda: server.clients == 1)
        server.publish(CLOSE, CLOSE_NAME)
        driver.wait_for(lambda: server.clients == 0)
        return stopped(driver, door, server, requests=1)


def stopped(driver: Driver, door: Door, server: SSEServer, requests: int = 2) -> str:
    """Return whether the client, after so many requests in all, makes no more."""
    driver.wait_for(lambda: door.streams() > requests)
    if driver.closed:
        # What it says it must do.
        time.sleep(QUIET)
    if door.streams() > requests:
        return "comes back"
    if server.clients:
        return "stays connected"
    return YES if driver.closed else "is silent"


# Requirements

def installed(package: str) -> bool:
    if next((INTEROP / "python_modules").glob(f"{package}-*.dist-info"), None):
        return True
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def require(row: Row | Reader) -> None:
    """Skip, or with CI set fail, where the machine lacks something."""
    program = row.driver[0]
    if program == "webkit":
        need("xvfb-run", "xvfb")
        if not glob.glob("/usr/lib/*/webkit2gtk-4.*/MiniBrowser"):
            lack("MiniBrowser (Debian package webkit2gtk-driver)")
    elif program == "firefox":
        need("firefox-esr", "firefox-esr")
    elif program in ("node", "chromium", "go"):
        need(program, {"node": "nodejs", "go": "golang-go"}.get(program, program))
    if program == "go" and not Path("/usr/share/gocode/src/github.com", row.name).exists():
        lack(f"Debian package {row.package}")
    if row.source == "PyPI" and not installed(row.package):
        lack(f"the package {row.package} (make interop installs it)")
    if row.source == "npm" and not (INTEROP / "node_modules" / row.package).exists():
        lack(f"the npm package {row.package} (make interop installs it)")


@pytest.mark.interop
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "-"))
def test_a_client_does_what_the_table_says(row, step, tmp_path):
    require(row)
    assert globals()[step](Stage(row, tmp_path)) == row.expected(step)


@pytest.mark.interop
def test_firefox_stays_on_another_origin_when_the_port_is_held_over_a_restart(tmp_path):
    row = next(row for row in ROWS if row.name == "Firefox, other origin")
    require(row)
    assert restart(Stage(row, tmp_path), is_held=True) == YES


@pytest.mark.interop
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name.replace(" ", "-"))
def test_a_reader_of_model_output_gets_a_run_and_nothing_else(reader):
    require(reader)
    *parts, end = RUNS[reader.run]
    with SSEServer(port=0) as server:
        def publish_run(events) -> None:
            for data, name in events:
                server.publish(data, name, channel="run")
                server.publish("not of this run", channel="another")

        # Half of it is there when the reader comes, half comes while it reads.
        publish_run(parts[:2])
        process = subprocess.Popen([*reader.driver, f"{server.url}/token"], encoding="utf-8",
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        with process:
            try:
                wait_until(lambda: server.clients == 1 or process.poll() is not None)
                publish_run([*parts[2:], end])

                # Those that know no end of a run get the end of the stream.
                expected = [json.loads(data) for data, _ in [*parts, end] if data != "[DONE]"]
                got = [json.loads(process.stdout.readline()) for _ in expected]
                assert got == expected
                server.stop()
                assert process.stdout.read() == ""
                assert process.wait(PATIENCE) == 0
            finally:
                process.kill()


def test_the_page_about_clients_holds_the_table_that_is_tested():
    assert tables_of(PAGE) == tables(), "python tests/client_table.py writes it anew"
