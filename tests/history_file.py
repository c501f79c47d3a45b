"""Servers, streams and programs on one history file, for the tests of it."""
import json
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing, contextmanager

import requests

from helpers import KEPT, PATIENCE, PUBLISH_TOKEN, TOP, Client, Server, in_a_thread
from sse_core.stores.sqlite import SQLiteStore
from sse_core.stores.store import StoreHub

PUBLISHER = f"""if True:
    import sys
    sys.path.insert(0, {str(TOP)!r})
    import threading
    from sse_core.stores.sqlite import SQLiteStore
    from sse_core.stores.store import Event
    stream, name = SQLiteStore(sys.argv[1], 100000, False), sys.argv[2]
    stream._open()
    threading.Thread(target=stream.write, daemon=True).start()
    for number in range(int(sys.argv[3])):
        ids = stream.publish([Event(f"{{name}} {{number}}-{{each}}") for each in range(3)])
        print(number, *ids, flush=True)
    stream.end()
    """


# Run first in a server: it waits for another process that writes for half a second, and not for two
IMPATIENT = "from sse_core.stores import sqlite; sqlite.BUSY_TIME = 0.5"


@contextmanager
def on_file(path, number: int = 1, *arguments: str, before: str = ""):
    """Run so many servers on the file; none may write a traceback."""
    servers = []
    try:
        for _ in range(number):
            servers.append(Server("--history-file", str(path), "--publish-token", PUBLISH_TOKEN,
                                  "--interval", "0", *arguments, before=before))
        yield servers
    finally:
        for server in servers:
            assert "Traceback" not in server.close(), server.errors


@contextmanager
def publishing(path, history: int = 64, sync: bool = False):
    """Yield a stream that has loaded its rows and takes orders, and close it."""
    stream = SQLiteStore(path, history, sync)
    turned(stream)
    writer = in_a_thread(stream.write)
    try:
        yield stream
    finally:
        stream.end()
        writer.join()
        stream.close()


def publisher(path, name: str, number: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", PUBLISHER, str(path), name, str(number)],
                            stdout=subprocess.PIPE, text=True)


def post(server: Server, text: str) -> requests.Response:
    return requests.post(f"http://127.0.0.1:{server.port}/{PUBLISH_TOKEN}", data=text,
                         timeout=PATIENCE)


def resume(server: Server, last_id: str) -> Client:
    request = f"GET / HTTP/1.1\r\nHost: x\r\nLast-Event-ID: {last_id}\r\n\r\n"
    return Client(server.port, request.encode(), last_id=last_id)


def query(path, text: str, *values) -> list:
    with closing(sqlite3.connect(path, timeout=PATIENCE)) as connection, connection:
        return connection.execute(text, values).fetchall()


def rows(path) -> list:
    """Return id and data of all there is in the file, in order."""
    return [(f"{ms}-{n}", data) for ms, n, data in query(
        path, "select ms, n, data from event order by ms, n")]


def count(path) -> int:
    """Return how many rows there are in the file."""
    return query(path, "select count(*) from event")[0][0]


def add_rows(path, number: int) -> None:
    """Add so many rows to a file, as another program would."""
    query(path, "with recursive count(n) as (select 1 union all select n + 1 from count where n < ?"
                ") insert into event select 1, n, null, null, 'x' from count", number)


def turned(stream: SQLiteStore) -> StoreHub:
    """Return what a stream has loaded its rows into, and is turned by hand for."""
    shared = StoreHub(stream, **{**KEPT, "history": 64})
    turn(shared)
    return shared


def turn(shared: StoreHub) -> float:
    """Let the stream read on, and return the seconds until the next turn."""
    return shared.store.turn(shared, threading.Event())


def texts(client: Client) -> list:
    return [event.data for event in client.stream.events]


def gaps(client: Client) -> list:
    return [json.loads(event.data) for event in client.stream.events if event.name == "gap"]


def key(event_id: str) -> tuple:
    return tuple(map(int, event_id.split("-")))
