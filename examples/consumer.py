"""Count what was ordered, each order exactly once, whatever breaks.

Run it, in the folder of sse_server.py, each line in a terminal of its own:
    python sse_server.py --port 6500 --history-file events.db --publish-token SECRET
    python examples/consumer.py 'http://127.0.0.1:6500/?channel=orders' shop.db
    curl -H 'Authorization: Bearer SECRET' -d '{"item": "tea", "pieces": 2}' \\
        'http://127.0.0.1:6500/?channel=orders&event=order'

Each event changes the table `sold`, and its id goes to the table `place`, in one transaction. So
after a crash the consumer asks for what follows the last order that it has counted: it counts no
order twice, and leaves none out. What it cannot get any more is told by a gap.
"""
import json
import sqlite3
import sys
import time
from http.client import HTTPException
from urllib.error import HTTPError
from urllib.request import Request, urlopen

TABLES = """
create table if not exists sold(item text primary key, pieces integer not null);
create table if not exists place(id text);
create table if not exists gap(id text, resumed text, reason text);
create table if not exists rejected(id text, data text, why text);
insert into place select null where not exists (select * from place);
"""

# Longer than the silence between two heartbeats of the server, which is 15 seconds.
READ_TIMEOUT = 40

# Seconds until the next try, unless the server says something else.
PAUSE = 3.0


def main(url, file):
    db = sqlite3.connect(file)
    db.executescript(TABLES)
    while True:
        place, = db.execute("select id from place").fetchone()
        pause = PAUSE
        try:
            for event in read(url, place):
                pause = event.get("retry", pause)
                place = handle(db, place, event)
        except HTTPError as error:
            # 401 and the like do not pass by themselves.
            if error.code < 500:
                sys.exit(f"the server refuses: {error.read().decode()}")
        except (OSError, HTTPException) as error:
            print(f"the stream broke: {error}", file=sys.stderr)
        time.sleep(pause)


def read(url, last_id):
    """Yield each event that came whole, as a dict of its fields, until the stream ends."""
    beginning = f"{url}{'&' if '?' in url else '?'}since=all"
    request = Request(url if last_id else beginning, headers={
        "Accept": "text/event-stream", **({"Last-Event-ID": last_id} if last_id else {})})
    with urlopen(request, timeout=READ_TIMEOUT) as stream:
        event, data = {}, []
        for line in stream:
            name, _, value = line.decode().removesuffix("\n").partition(": ")
            if name in ("data", "data:"):
                data.append(value)
            elif name == "retry":
                event["retry"] = int(value) / 1000
            elif name in ("id", "event"):
                event[name] = value
            elif line == b"\n":
                yield {**event, "data": "\n".join(data)}
                event, data = {}, []


def handle(db, place, event):
    """Take in an event and its id, both or neither, and return the new place."""
    kind = event.get("event")
    with db:
        if kind == "order":
            count(db, event)
        elif kind == "gap":
            note_gap(db, json.loads(event["data"]))
        new = event.get("id", place)
        if not db.execute("update place set id = ? where id is ?", (new, place)).rowcount:
            raise SystemExit("another consumer uses this file")
    return new


def count(db, event):
    try:
        order = json.loads(event["data"])
        row = str(order["item"]), int(order["pieces"])
    except (ValueError, TypeError, KeyError) as error:
        # It would fail in the same way each time, so put it aside and go on.
        db.execute("insert into rejected values (?, ?, ?)",
                   (event["id"], event["data"], repr(error)))
        return
    db.execute("insert into sold values (?, ?) "
               "on conflict (item) do update set pieces = pieces + excluded.pieces", row)


def note_gap(db, gap):
    """Orders after `after` and before `resumed` are gone from the server.

    No consumer can bring them back. Here you would count them where the orders come from.
    """
    db.execute("insert into gap values (?, ?, ?)", (gap["after"], gap["resumed"], gap["reason"]))
    print(f"orders are missing after {gap['after']}: {gap['reason']}", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
