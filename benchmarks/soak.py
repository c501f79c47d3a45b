"""An hour of hard life for two servers on one history file. Status 1 if anything was wrong.

One is restarted every minute under load, by SIGTERM and by `kill -9` in turn; the other, the
resident, lives for the whole run. Programs publish to both; clients watch both, and are cut, cut
themselves, stall and come back; peers that mean no good come and go.

What a client must get is what the history file has, read by a connection of this process: every
row that it wants, once, in order, as it was published; or a gap that says which not, and then only
rows that had left the log. Every event that was acknowledged must be a row. At the end of each
minute all is quiet: then each client must have everything, and the resident be as it was.
"""
import json
import os
import queue
import random
import re
import selectors
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Dict, FrozenSet, List, NamedTuple, Optional, Tuple

from load import GET, HERE, cpu_clock, describe, memory

sys.path.insert(0, str(HERE.parent / "tests"))

from wire import Decoder, Event     # noqa: E402  the strict parser, which shares no code with us

HISTORY = 1024          # of both servers: some ten seconds of events
KEPT = 10 * HISTORY     # rows that the file keeps, and that are remembered here
CHANNELS = ("news", "mail", "chat")
CLIENTS = 24            # of each server
PUBLISHERS = 2          # of each server
POSTS = 10.0            # a second, of each publisher; of 2.5 events in the mean
TROUBLE = 20.0          # seconds between two troubles that a client makes, in the mean
STALL = 35.0            # seconds that a client reads nothing, at most; at 30 it is dropped
DROPPED = 25.0          # seconds of a stall from which on that is no surprise
QUIET = 9.0             # seconds of each minute without load
GRACE = 15.0            # seconds for anything to come about
WARM_UP = 2             # minutes until the resident is as it must stay
GROWTH = 2048           # KiB: what two page caches of SQLite may still grow by
TOKEN = "soak"
RESET = b"\1\0\0\0\0\0\0\0"     # for SO_LINGER: close with a reset
COLUMNS = ("acknowledged", "unanswered", "deliveries", "gaps", "restarts", "cuts", "resets",
           "stalls", "rough", "faults")
Id = Tuple[int, int]


class Report:
    """What was counted, and what was wrong. Any thread may call it."""

    def __init__(self) -> None:
        self.counts: Counter = Counter()
        self._lock = threading.Lock()

    def count(self, what: str, number: int = 1) -> None:
        with self._lock:
            self.counts[what] += number

    def fault(self, text: str) -> None:
        self.count("faults")
        if self.counts["faults"] <= 200:
            print(f"FAULT {time.strftime('%H:%M:%S')}: {text}", flush=True)


class Row(NamedTuple):
    """A row of the history file."""
    id: Id
    channel: Optional[str]
    event: Optional[str]
    data: str               # begins with: publisher, number, how many of its POST follow, and had


class Truth:
    """The rows of the file, in order, each with a place that it keeps; the oldest are forgotten."""

    def __init__(self, path: Path, report: Report) -> None:
        self._path = path
        self._report = report
        self._file = self._open()
        self._rows: List[Row] = []
        self._base = 0                              # the place of the first of them
        self._last: Dict[str, Tuple[int, int]] = {}     # publisher: number, how many follow

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, timeout=GRACE)

    @property
    def end(self) -> int:
        """The place after the newest row."""
        return self._base + len(self._rows)

    def read(self) -> None:
        """Read what is new, and forget what is old."""
        for row in self._after(self._file, self._rows[-1].id if self._rows else (0, -1)):
            self._check_order(row)
            self._rows.append(row)
        if len(self._rows) > 2 * KEPT:
            self._base += len(self._rows) - KEPT
            del self._rows[:-KEPT]

    @staticmethod
    def _after(file: sqlite3.Connection, last: Id) -> List[Row]:
        rows = file.execute("select ms, n, channel, event, data from event where (ms, n) > (?, ?) "
                            "order by ms, n", last).fetchall()
        return [Row((ms, n), *texts) for ms, n, *texts in rows]

    def _check_order(self, row: Row) -> None:
        """A publisher's events must be in its order, each once, and of a POST all or none."""
        publisher, *numbers = row.data.split(" ", 4)[:4]
        number, follow, had = map(int, numbers)
        last, due = self._last.get(publisher, (-1, 0))
        if (number, follow) != (last + 1, due - 1) if due else number <= last or follow != had - 1:
            self._report.fault(f"file: {row.id} {row.data[:40]!r} follows number {last} of it, "
                               f"of whose POST {due} are due")
        self._last[publisher] = number, follow

    def row(self, place: int) -> Optional[Row]:
        """Return the row at a place, None if there is none yet. Raises KeyError if forgotten."""
        if place >= self.end:
            self.read()
        if place < self._base:
            raise KeyError(place)
        return self._rows[place - self._base] if place < self.end else None

    def place(self, event_id: Id) -> int:
        """Return the place of the first row that has this id or a higher one."""
        if not self._rows or event_id > self._rows[-1].id:
            self.read()
        return self._base + bisect_left(self._rows, (event_id,))

    def has(self, event_id: Id) -> bool:
        row = self.row(self.place(event_id))
        return row is not None and row.id == event_id

    def confirm(self, row: Row) -> None:
        """What was acknowledged must be there, as it was published."""
        found = self.row(self.place(row.id))
        if found != row:
            self._report.fault(f"file: acknowledged {row}, and there is {found}")

    def close(self) -> None:
        self._file.close()

    def verify(self) -> None:
        """All that was ever read must still be there, for one who opens the file now."""
        self.read()
        known = self._rows[-KEPT * 3 // 4:]
        fresh = self._open()
        if known and self._after(fresh, (known[0].id[0], known[0].id[1] - 1)) != known:
            self._report.fault("file: it has not the rows any more that it had")
        self._file.close()
        self._file = fresh


class Checker:
    """Check what one client gets: all that it wants from where it began, once, in order."""

    def __init__(self, truth: Truth, report: Report, name: str, channels: FrozenSet[str]) -> None:
        self._truth = truth
        self._report = report
        self._name = name
        self._channels = channels
        self._place = 0                 # in the truth: of the first row that it has not had
        self.last_id: Optional[Id] = None       # None: it has not begun

    def _fault(self, text: str) -> None:
        self._report.fault(f"{self._name}, last id {self.last_id}: {text}")

    def begin(self, event_id: Id) -> None:
        """It was told that it stands after this event."""
        if not self._truth.has(event_id):
            self._fault(f"it is told to stand at {event_id}, which is no event")
        self.last_id, self._place = event_id, self._truth.place((event_id[0], event_id[1] + 1))

    def due(self) -> Optional[Row]:
        """Return the next row that it wants, None if it has all."""
        try:
            row = self._truth.row(self._place)
            while row and row.channel is not None and row.channel not in self._channels:
                self._place += 1
                row = self._truth.row(self._place)
        except KeyError:
            self._fault(f"it has not had row {self._place}, long ago")
            self._place = self._truth.end
            return self.due()
        return row

    def take(self, event: Event) -> None:
        """It got this."""
        if event.name == "gap":
            self._take_gap(**json.loads(event.data))
            return
        due, given = self.due(), parse_id(event.id)
        if due is None or given != due.id:
            is_old = self.last_id is None or given <= self.last_id
            self._fault(f"it gets {given} {'again or out of order' if is_old else 'too early'}, "
                        f"due is {due and due.id}")
            self._place = max(self._place, self._truth.place((given[0], given[1] + 1)))
        else:
            self._place += 1
            if (event.name, event.data) != (due.event or "message", due.data):
                self._fault(f"it gets {event}, published was {due}")
        self.last_id = given
        self._report.count("deliveries")

    def _take_gap(self, after: str, resumed: Optional[str], reason: str) -> None:
        """What is skipped must lie between the ids, and have left the log."""
        self._report.count("gaps")
        due, told = self.due(), f"gap from {after} to {resumed}, {reason}"
        if self.last_id is None or due is None or resumed is None:
            self._fault(f"{told}: nothing is missing")
            return
        if not self.last_id <= parse_id(after) < due.id or not self._truth.has(parse_id(resumed)):
            self._fault(f"{told}: due is {due.id}")
        end, skipped = self._truth.place(parse_id(resumed)), -1
        while due and self._place < end:
            skipped = self._place
            self._place += 1
            due = self.due()
        if skipped < 0 or self._truth.end - skipped <= HISTORY:
            self._fault(f"{told}: that much has not left the log")


def parse_id(text: str) -> Id:
    milliseconds, _, number = text.partition("-")
    return int(milliseconds), int(number)


class Client:
    """An EventSource that is checked. It makes trouble: cuts itself, or reads nothing for a while.

    The selector has its socket while it reads.
    """

    def __init__(self, soak: "Soak", server: "Server", number: int) -> None:
        self._soak, self._server, self._draw = soak, server, soak.draw
        channels = CHANNELS[:number % 4] if number % 2 else ()
        self._name = f"{server.name} client {number}"
        self._channels = frozenset(channels)
        self._is_old = number % 6 == 5              # speaks HTTP/1.0
        query = "?" + "&".join(f"channel={channel}" for channel in channels)
        self._head = GET.replace(b"/token", f"/{query}".encode())
        self._small = number % 3 == 0               # its buffer is small, so a stall is felt
        self._sock: Optional[socket.socket] = None
        self._stalled_at: Optional[float] = None
        self._may_be_dropped = False                # it stalled for long
        self._next_at = 0.0                         # when it does something again
        self._forget()

    def _forget(self) -> None:
        """Be as one that was never there."""
        self._stream = Decoder(not self._is_old)
        self.checker = Checker(self._soak.truth, self._soak.report, self._name, self._channels)

    def act(self, now: float, is_quiet: bool) -> None:
        """Do what is due: connect, read on after a stall, make trouble."""
        if now < self._next_at and not (is_quiet and self._stalled_at):
            return
        self._next_at = now + self._draw.expovariate(1 / TROUBLE)
        if not self._sock:
            self._connect()
        elif self._stalled_at:
            self._may_be_dropped = now - self._stalled_at > DROPPED
            self._stalled_at = None
            self._soak.selector.register(self._sock, selectors.EVENT_READ, self)
        elif not is_quiet:
            self._draw.choice((self._cut, self._cut, self._stall))(now)

    def _connect(self) -> None:
        head = self._head.replace(b"HTTP/1.1", b"HTTP/1.0") if self._is_old else self._head
        if self._stream.last_id:
            head = head[:-2] + f"Last-Event-ID: {self._stream.last_id}\r\n\r\n".encode()
        self._stream = Decoder(not self._is_old, self._stream.last_id)
        self._sock = socket.socket()
        self._may_be_dropped = False
        if self._small:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            self._sock.settimeout(GRACE)
            self._sock.connect(("127.0.0.1", self._server.port))
            self._sock.sendall(head)
            self._soak.selector.register(self._sock, selectors.EVENT_READ, self)
        except OSError as error:
            self._lose(str(error))

    def _cut(self, now: float) -> None:
        if self._draw.random() < 0.5:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self._soak.report.count("resets")
        self._soak.report.count("cuts")
        self.close()
        if self._draw.random() < 0.2:
            self._forget()

    def _stall(self, now: float) -> None:
        self._soak.report.count("stalls")
        self._soak.selector.unregister(self._sock)
        self._stalled_at, self._next_at = now, now + self._draw.uniform(1, STALL)

    def receive(self) -> None:
        try:
            data = self._sock.recv(65536)
        except OSError as error:
            self._lose(str(error))
            return
        if not data:
            self._lose("the stream ended")
            return
        try:
            self._stream.feed(data)
            if self._stream.head and self._stream.status != 200:
                self._lose(self._stream.head[0])
                return
            self._take()
        except AssertionError as error:
            self._soak.report.fault(f"{self._name}: not to be read: {error}")
            self.close()

    def _take(self) -> None:
        """Have the checker look at what has arrived."""
        stream = self._stream
        if stream.payloads and self.checker.last_id is None:
            told = re.match(rb"id: ([0-9]+-[0-9]+)\nretry:", stream.payloads[0])
            assert told, f"it is not told where it stands: {stream.payloads[0]!r}"
            self.checker.begin(parse_id(told[1].decode()))
        for event in stream.events:
            self.checker.take(event)
        if self.checker.last_id:
            assert parse_id(stream.last_id) == self.checker.last_id, "an id without an event"
        stream.payloads.clear()
        stream.events.clear()

    def _lose(self, why: str) -> None:
        """It is not its own doing, so the server must have been restarted."""
        if self._server.is_resident and not self._may_be_dropped:
            self._soak.report.fault(f"{self._name} is cut: {why}")
        self.close()

    def is_current(self) -> bool:
        return bool(self._sock and self.checker.last_id and not self.checker.due())

    def describe(self) -> str:
        due = self.checker.due() if self.checker.last_id else "a beginning"
        return f"{self._name}, {'connected' if self._sock else 'away'}: due is {due}"

    def close(self) -> None:
        """Close, and come back soon."""
        if self._sock:
            if self._sock.fileno() in self._soak.selector.get_map():
                self._soak.selector.unregister(self._sock)
            self._sock.close()
        self._sock = self._stalled_at = None
        self._next_at = time.monotonic() + self._draw.uniform(0.05, 0.5)


class Server:
    """A server process that keeps its port over restarts."""

    def __init__(self, name: str, path: Path, report: Report) -> None:
        self.name = name
        self.is_resident = name == "resident"
        self.log = path.with_name(f"{name}.log")
        self._report = report
        with socket.create_server(("127.0.0.1", 0)) as sock:
            self.port: int = sock.getsockname()[1]
        self._command = [
            sys.executable, str(HERE.parent / "sse_server.py"), "--port", str(self.port), "--quiet",
            "--interval", "0", "--history", str(HISTORY), "--history-file", str(path),
            "--publish-token", TOKEN]
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL,
                                            stdout=subprocess.PIPE, stderr=log)
        if not self.process.stdout.readline():
            raise RuntimeError(f"{self.name} does not start: {self.log.read_text()[-2000:]}")

    def restart(self, by: int) -> None:
        if self.stop(by) != (0 if by == signal.SIGTERM else -by):
            self._report.fault(f"{self.name}: signal {by}, status {self.process.returncode}")
        self._report.count("restarts")
        self.start()

    def stop(self, by: int) -> int:
        self.process.send_signal(by)
        try:
            return self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
        finally:
            self.process.stdout.close()

    def state(self) -> Tuple[int, int, int]:
        """Return descriptors, threads and KiB of memory."""
        folder = f"/proc/{self.process.pid}"
        descriptors, threads = (len(os.listdir(f"{folder}/{what}")) for what in ("fd", "task"))
        return descriptors, threads, memory(self.process.pid) // 1024


class Publisher:
    """Post events, one or some at a time, on a kept connection. It never repeats one."""

    def __init__(self, name: str, server: Server, soak: "Soak") -> None:
        self._name, self._server, self._soak = name, server, soak
        self._draw = random.Random(soak.draw.random())
        self._number = 0

    def run(self, until: float) -> None:
        """Publish until a time on the monotonic clock. In a thread of its own."""
        connection = HTTPConnection("127.0.0.1", self._server.port, timeout=GRACE)
        while time.monotonic() < until:
            self.post(connection)
            time.sleep(self._draw.expovariate(POSTS))
        connection.close()

    def post(self, connection: HTTPConnection) -> None:
        size = self._draw.choice((1, 1, 1, 2, 3, 7))
        drafts = [self._draft(size - 1 - index, size) for index in range(size)]
        lines = "\n".join(json.dumps(draft) for draft in drafts)
        try:
            if size > 1:
                connection.request("POST", f"/{TOKEN}", lines.encode(),
                                   {"Content-Type": "application/x-ndjson"})
            else:
                query = "&".join(f"{key}={drafts[0][key]}" for key in drafts[0] if key != "data")
                connection.request("POST", f"/{TOKEN}?{query}", drafts[0]["data"].encode())
            response = connection.getresponse()
            answer = response.read()
        except (OSError, HTTPException) as error:
            self._not_taken(size, repr(error), connection)
            return
        if response.status != 200:
            self._not_taken(size, f"{response.status} {answer!r}", connection)
            if response.status != 503:      # of a server that is stopping
                self._soak.report.fault(f"publisher {self._name}: {response.status} {answer!r}")
            return
        ids = json.loads(answer)["ids"] if size > 1 else [json.loads(answer)["id"]]
        self._soak.report.count("acknowledged", size)
        for event_id, draft in zip(ids, drafts):
            self._soak.acknowledged.put(Row(parse_id(event_id), draft.get("channel"),
                                            draft.get("event"), draft["data"]))

    def _draft(self, follow: int, size: int) -> Dict[str, str]:
        self._number += 1
        padding = "é" * self._draw.randrange(400)
        draft = {"data": f"{self._name} {self._number} {follow} {size} {padding}"}
        if self._draw.random() < 0.5:
            draft["channel"] = self._draw.choice(CHANNELS)
        if self._draw.random() < 0.3:
            draft["event"] = "custom"
        return draft

    def _not_taken(self, size: int, why: str, connection: HTTPConnection) -> None:
        """The answer is missing: they may be published or not. The resident always answers."""
        if self._server.is_resident:
            self._soak.report.fault(f"publisher {self._name}: {why}")
        self._soak.report.count("unanswered", size)
        connection.close()


class Rough:
    """Peers that mean no good, some twenty a second: none may cost the others anything."""

    def __init__(self, servers: List[Server], soak: "Soak") -> None:
        self._servers, self._report = servers, soak.report
        self._draw = random.Random(soak.draw.random())
        self._slow: List[socket.socket] = []        # send their heads byte by byte

    def run(self, until: float) -> None:
        """Come and go until a time on the monotonic clock. In a thread of its own."""
        while time.monotonic() < until:
            self._report.count("rough")
            try:
                self._come()
            except OSError:     # the server was quicker, or is being restarted
                pass
            self._dribble()
            time.sleep(self._draw.expovariate(20))
        self._keep(0)

    def _come(self) -> None:
        head = GET + b"X" * self._draw.randrange(100)
        sock = socket.create_connection(("127.0.0.1", self._draw.choice(self._servers).port), GRACE)
        if self._draw.random() < 0.1:
            self._slow.append(sock)
            return
        with sock:
            sock.sendall(self._draw.choice((
                b"", GET, head, GET[:self._draw.randrange(len(GET))], self._draw.randbytes(300),
                b"POST /soak HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nhalf", b"A" * 9000)))
            if self._draw.random() < 0.5:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    def _dribble(self) -> None:
        for sock in self._slow:
            try:
                sock.send(b"G" if self._draw.random() < 0.3 else b"")
            except OSError:
                pass
        self._keep(10)

    def _keep(self, number: int) -> None:
        while len(self._slow) > number:
            self._slow.pop(0).close()


class Soak:
    """The whole of it, by minutes. All but publishers, restarts and rough peers is one thread."""

    def __init__(self, path: Path, seed: int) -> None:
        self.draw = random.Random(seed)
        self.report = Report()
        self.selector = selectors.DefaultSelector()
        self.acknowledged: "queue.SimpleQueue[Row]" = queue.SimpleQueue()
        self.servers = [Server(name, path, self.report) for name in ("resident", "restarted")]
        self.truth = Truth(path, self.report)
        self._publishers = [Publisher(f"{server.name}-{number}", server, self)
                            for server in self.servers for number in range(PUBLISHERS)]
        self._publishers[0].run(time.monotonic() + 0.2)     # so there is a place to begin at
        self._clients = [Client(self, server, number)
                         for server in self.servers for number in range(CLIENTS)]
        self._rough = Rough(self.servers, self)
        self._pool = ThreadPoolExecutor(PUBLISHERS * 2 + 2)
        self._restarts = 0
        self.states: List[Tuple[int, int, int]] = []    # of the resident, by minutes

    def minute(self, seconds: float) -> None:
        """Load for most of it, with a restart; then quiet, when all must be as it should."""
        until = time.monotonic() + seconds - min(QUIET, seconds / 2)
        work = [self._pool.submit(worker.run, until) for worker in (*self._publishers, self._rough)]
        work.append(self._pool.submit(self._restart, self.draw.uniform(1, seconds / 2)))
        self._turn_until(lambda: all(each.done() for each in work), 10 * GRACE + seconds)
        for each in work:
            each.result()
        ends = time.monotonic() + min(QUIET, seconds / 2)
        if not self._turn_until(lambda: all(client.is_current() for client in self._clients),
                                GRACE, is_quiet=True):
            for client in self._clients:
                if not client.is_current():
                    self.report.fault(client.describe())
        self.truth.verify()
        self._turn_until(lambda: time.monotonic() > ends, GRACE, is_quiet=True)
        self._look()

    def _restart(self, pause: float) -> None:
        time.sleep(pause)
        self._restarts += 1
        self.servers[1].restart(signal.SIGTERM if self._restarts % 2 else signal.SIGKILL)

    def _turn_until(self, condition, seconds: float, is_quiet: bool = False) -> bool:
        """Let clients act and receive until something is so; say whether it came in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            for key, _ in self.selector.select(0.05):
                key.data.receive()
            while not self.acknowledged.empty():
                self.truth.confirm(self.acknowledged.get())
            now = time.monotonic()
            for client in self._clients:
                client.act(now, is_quiet)
        return True

    def _look(self) -> None:
        """The resident must be as it was after the first minutes."""
        resident = self.servers[0]
        if len(self.states) >= WARM_UP:
            usual = self.states[WARM_UP - 1][:2]
            self._turn_until(lambda: resident.state()[:2] == usual, GRACE, is_quiet=True)
            if resident.state()[:2] != usual:
                self.report.fault(f"descriptors, threads: {resident.state()[:2]}, were {usual}")
        self.states.append(resident.state())

    def growth(self) -> int:
        """Return the KiB by which the resident grew: medians of five minutes, first and last."""
        sizes = [state[2] for state in self.states[WARM_UP:]]
        return int(statistics.median(sizes[-5:]) - statistics.median(sizes[:5])) if sizes else 0

    def end(self) -> None:
        """Stop all in order; neither server may have warned of anything."""
        for client in self._clients:
            client.close()
        for server in self.servers:
            if server.process.poll() is not None or server.stop(signal.SIGTERM):
                self.report.fault(f"{server.name}: status {server.process.returncode}")
            for line in server.log.read_text().splitlines()[:20]:
                self.report.fault(f"{server.name} says: {line}")
        if self.growth() > GROWTH:
            self.report.fault(f"the resident grew by {self.growth()} KiB")

    def kill(self) -> None:
        """Make sure that no process is left."""
        for server in self.servers:
            server.process.kill()
            server.process.wait()


def say(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def run(soak: Soak, minutes: float) -> None:
    """Run all minutes, and print a line of the table for each, and one for all."""
    number = max(1, round(minutes))
    columns = (*COLUMNS, "descriptors", "threads", "KiB")
    say("minute", *columns)
    say(*["---:"] * (len(columns) + 1))
    before: Counter = Counter()
    for minute in range(1, number + 1):
        soak.minute(60 * minutes / number)
        now = soak.report.counts.copy()
        say(minute, *(now[what] - before[what] for what in COLUMNS), *soak.states[-1])
        before = now
    resident = cpu_clock(soak.servers[0].process.pid)
    soak.end()
    say("all", *(soak.report.counts[what] for what in COLUMNS), *soak.states[-1])
    seconds = 60 * minutes
    print(f"\nThe resident after {min(WARM_UP, number)} minutes, and at the end: descriptors, "
          f"threads, KiB {soak.states[min(WARM_UP, number) - 1]}, {soak.states[-1]}; it grew by "
          f"{soak.growth()} KiB. CPU: it {resident / seconds:.0%} of a core, its clients and the "
          f"checks {time.process_time() / seconds:.0%}.")


def main() -> None:
    parser = describe(__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="how long (default 60)")
    parser.add_argument("--seed", type=int, help="of all that is at random (default: a new one)")
    options = parser.parse_args()
    if not 0.2 <= options.minutes <= 24 * 60:
        parser.error("--minutes must be from 0.2 to 1440")
    if not os.path.exists("/proc/self/smaps_rollup"):
        sys.exit("Linux is needed: its /proc")
    seed = random.SystemRandom().randrange(1 << 32) if options.seed is None else options.seed
    print(f"seed {seed}, {options.minutes:g} minutes, Python {sys.version.split()[0]}\n")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder, "events.db"), seed)
        try:
            run(soak, options.minutes)
        finally:
            soak.kill()
    sys.exit(1 if soak.report.counts["faults"] else 0)


if __name__ == "__main__":
    main()
