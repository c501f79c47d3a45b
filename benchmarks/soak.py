"""An hour of hard life for two servers on one history file. Status 1 if anything was wrong.

One is restarted every minute under load, by SIGTERM and by `kill -9` in turn; the other, the
resident, lives for the whole run. Programs publish to both; clients watch both, and are cut, cut
themselves, stall and come back; peers that mean no good come and go.

What a client must get is what the history file has: see checker.py. At the end of each minute all
is quiet: then each client must have everything, and the resident be as it was. The figures of a
line are of that minute; the last three are of the resident.
"""
import json
import os
import queue
import random
import selectors
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple

from checker import HISTORY, Checker, Decoder, Report, Row, Truth, parse_id
from load import GET, HERE, cpu_clock, describe, memory

CHANNELS = ("news", "mail", "chat")
CLIENTS = 30            # of each server
PUBLISHERS = 2          # of each server
POSTS = 10.0            # a second, of each publisher; of 2.5 events in the mean
TROUBLE = 15.0          # seconds between two troubles that a client makes, in the mean
STALL = 35.0            # seconds that a client reads nothing, at most; at 30 it is dropped
DROPPED = 25.0          # seconds of a stall from which on that is no surprise
QUIET = 9.0             # seconds of each minute without load
GRACE = 15.0            # seconds for anything to come about
WARM_UP = 2             # minutes until the resident is as it must stay
GROWTH = 4096           # KiB that it may grow by: two page caches of SQLite fill, up to 2 MiB each,
                        # and Python frees its memory by the MiB
TOKEN = "soak"
RESET = b"\1\0\0\0\0\0\0\0"     # for SO_LINGER: close with a reset
COLUMNS = ("acknowledged", "unanswered", "deliveries", "gaps", "restarts", "cuts", "resets",
           "stalls", "rough", "faults")
State = Tuple[int, int, int]    # descriptors, threads, KiB of memory


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

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *exc_info) -> None:
        """Make sure that no process is left."""
        self.process.kill()
        self.process.wait()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL,
                                            stdout=subprocess.PIPE, stderr=log)
        if not self.process.stdout.readline():
            raise RuntimeError(f"{self.name} does not start: {self.log.read_text()[-2000:]}")

    def stop(self, by: int) -> None:
        """End it by a signal, as it should end by that."""
        self.process.send_signal(by)
        try:
            status = self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            status = self.process.wait()
        self.process.stdout.close()
        if status != (0 if by == signal.SIGTERM else -by):
            self._report.fault(f"{self.name}: signal {by}, status {status}")

    def state(self) -> State:
        folder = f"/proc/{self.process.pid}"
        descriptors, threads = (len(os.listdir(f"{folder}/{what}")) for what in ("fd", "task"))
        return descriptors, threads, memory(self.process.pid) // 1024


class Client:
    """An EventSource that is checked. It makes trouble: cuts itself, or reads nothing for a while.

    The selector has its socket while it reads.
    """

    def __init__(self, soak: "Soak", server: Server, number: int) -> None:
        self._soak, self._server, self._draw = soak, server, soak.draw
        self._name = f"{server.name} client {number}"
        self._channels = CHANNELS[:number % 4] if number % 2 else ()
        self._is_old = number % 6 == 5              # speaks HTTP/1.0
        self._is_small = number % 3 == 0            # its buffer is, so the server feels a stall
        self._sock: Optional[socket.socket] = None
        self._stalled_at: Optional[float] = None
        self._may_be_dropped = False                # it stalled for long
        self._next_at = 0.0                         # when it does something again
        self._forget()

    def _forget(self) -> None:
        """Be as one that was never there."""
        self._stream = Decoder()
        self._checker = Checker(self._soak.truth, self._soak.report, self._name, self._channels)

    def act(self, now: float, is_quiet: bool) -> None:
        """Do what is due: connect, read on after a stall, make trouble."""
        if now < self._next_at and not (is_quiet and self._stalled_at):
            return
        self._next_at = now + self._draw.expovariate(1 / TROUBLE)
        if not self._sock:
            self._connect()
        elif self._stalled_at:
            self._may_be_dropped = now - self._stalled_at > DROPPED
            self._soak.report.count("long stalls", self._may_be_dropped)
            self._stalled_at = None
            self._soak.selector.register(self._sock, selectors.EVENT_READ, self)
        elif not is_quiet:
            self._draw.choice((self._cut, self._cut, self._stall))(now)

    def _connect(self) -> None:
        query = "&".join(f"channel={channel}" for channel in self._channels)
        head = GET.replace(b"/token", f"/?{query}".encode())
        head = head.replace(b"HTTP/1.1", b"HTTP/1.0") if self._is_old else head
        if self._stream.last_id:
            head = head[:-2] + f"Last-Event-ID: {self._stream.last_id}\r\n\r\n".encode()
        self._stream = Decoder(not self._is_old, self._stream.last_id)
        self._may_be_dropped = False
        self._sock = socket.socket()
        if self._is_small:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._sock.settimeout(GRACE)
        try:
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
        """Take what there is, and have it checked."""
        try:
            data = self._sock.recv(65536)
            self._stream.feed(data)
            if not data:
                self._lose("the stream ended")
            elif self._stream.head and self._stream.status != 200:
                self._lose(self._stream.head[0])
            else:
                self._check()
        except OSError as error:
            self._lose(str(error))
        except AssertionError as error:
            self._soak.report.fault(f"{self._name}: {error}")
            self.close()

    def _check(self) -> None:
        stream, checker = self._stream, self._checker
        if stream.welcome and not checker.last_id:
            checker.begin(parse_id(stream.welcome.id))
        assert checker.last_id or not stream.events, "it is not welcomed"
        for event in stream.events:
            checker.take(event)
        assert not checker.last_id or parse_id(stream.last_id) == checker.last_id, "id, no event"
        stream.payloads.clear()
        stream.events.clear()

    def _lose(self, why: str) -> None:
        """It is not its own doing, so the server must have been restarted."""
        if self._server.is_resident and not self._may_be_dropped:
            self._soak.report.fault(f"{self._name} is cut: {why}")
        self.close()

    def is_current(self) -> bool:
        return bool(self._sock and self._checker.last_id and not self._checker.due())

    def __str__(self) -> str:
        due = self._checker.due() if self._checker.last_id else "a beginning"
        return f"{self._name}, {'connected' if self._sock else 'away'}: due is {due}"

    def close(self) -> None:
        """Close, and come back soon."""
        if self._sock:
            if self._sock.fileno() in self._soak.selector.get_map():
                self._soak.selector.unregister(self._sock)
            self._sock.close()
        self._sock = self._stalled_at = None
        self._next_at = time.monotonic() + self._draw.uniform(0.05, 0.5)


class Publisher:
    """Post events, one or some at a time, on a kept connection. It never repeats one."""

    def __init__(self, soak: "Soak", server: Server, number: int) -> None:
        self._name, self._server, self._soak = f"{server.name}-{number}", server, soak
        self._draw = random.Random(soak.draw.random())
        self._number = 0

    def run(self, until: float) -> None:
        """Publish until a time on the monotonic clock. In a thread of its own."""
        connection = HTTPConnection("127.0.0.1", self._server.port, timeout=GRACE)
        while time.monotonic() < until and not self._soak.over.is_set():
            self._post(connection)
            self._soak.over.wait(self._draw.expovariate(POSTS))
        connection.close()

    def _post(self, connection: HTTPConnection) -> None:
        size = self._draw.choice((1, 1, 1, 2, 3, 7))
        events = [self._event(size - 1 - index, size) for index in range(size)]
        query = "&".join(f"{key}={events[0][key]}" for key in events[0] if key != "data")
        lines = "\n".join(map(json.dumps, events)).encode()
        try:
            if size == 1:
                connection.request("POST", f"/{TOKEN}?{query}", events[0]["data"].encode())
            else:
                kind = {"Content-Type": "application/x-ndjson"}
                connection.request("POST", f"/{TOKEN}", lines, kind)
            response = connection.getresponse()
            status, answer = response.status, response.read()
        except (OSError, HTTPException) as error:
            status, answer = 0, repr(error).encode()
        if status == 200:
            self._acknowledged(events, json.loads(answer))
            return
        self._soak.report.count("unanswered", size)     # they may be published, or not
        connection.close()
        if self._server.is_resident or status not in (0, 503):      # the other may be stopping
            self._soak.report.fault(f"publisher {self._name}: {status} {answer!r}")

    def _event(self, follow: int, size: int) -> Dict[str, str]:
        self._number += 1
        padding = "é" * self._draw.randrange(400)
        event = {"data": f"{self._name} {self._number} {follow} {size} {padding}"}
        if self._draw.random() < 0.5:
            event["channel"] = self._draw.choice(CHANNELS)
        if self._draw.random() < 0.3:
            event["event"] = "custom"
        return event

    def _acknowledged(self, events: List[Dict[str, str]], answer: dict) -> None:
        self._soak.report.count("acknowledged", len(events))
        for event_id, event in zip(answer.get("ids") or [answer["id"]], events):
            self._soak.acknowledged.put(Row(parse_id(event_id), event.get("channel"),
                                            event.get("event"), event["data"]))


class Rough:
    """Peers that mean no good, some twenty a second: none may cost the others anything."""

    def __init__(self, soak: "Soak") -> None:
        self._soak = soak
        self._draw = random.Random(soak.draw.random())
        self._slow: List[socket.socket] = []        # send their heads byte by byte

    def run(self, until: float) -> None:
        """Come and go until a time on the monotonic clock. In a thread of its own."""
        while time.monotonic() < until and not self._soak.over.is_set():
            self._soak.report.count("rough")
            for act in (self._come, *[lambda sock=sock: sock.send(b"G") for sock in self._slow]):
                try:
                    act()
                except OSError:     # the server was quicker, or is being restarted
                    pass
            self._leave(10)
            self._soak.over.wait(self._draw.expovariate(20))
        self._leave(0)

    def _come(self) -> None:
        port = self._draw.choice(self._soak.servers).port
        sock = socket.create_connection(("127.0.0.1", port), GRACE)
        if self._draw.random() < 0.1:
            self._slow.append(sock)
            return
        with sock:
            sock.sendall(self._draw.choice((
                b"", GET, GET[:self._draw.randrange(len(GET))], self._draw.randbytes(300),
                b"POST /soak HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\nhalf", b"A" * 9000)))
            if self._draw.random() < 0.5:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    def _leave(self, number: int) -> None:
        """Close the slow ones but for so many."""
        while len(self._slow) > number:
            self._slow.pop(0).close()


class Soak:
    """The whole of it, by minutes. All but publishers, restarts and rough peers is one thread."""

    def __init__(self, servers: List[Server], path: Path, report: Report, seed: int) -> None:
        self.servers = servers                      # the resident, and the one that is restarted
        self.report = report
        self.truth = Truth(path, report)
        self.draw = random.Random(seed)
        self.selector = selectors.DefaultSelector()
        self.acknowledged: "queue.SimpleQueue[Row]" = queue.SimpleQueue()
        self.states: List[State] = []               # of the resident, by minutes
        self.over = threading.Event()
        numbered = [(server, number) for server in servers for number in range(CLIENTS)]
        self._clients = [Client(self, *each) for each in numbered]
        self._workers = [Publisher(self, *each) for each in numbered if each[1] < PUBLISHERS]
        self._workers[0].run(time.monotonic() + 0.2)    # so there is an event to begin after
        self._workers.append(Rough(self))
        self._pool = ThreadPoolExecutor(len(self._workers) + 1)

    def minute(self, seconds: float) -> None:
        """Load for most of it, with a restart; then quiet, when all must be as it should."""
        quiet = min(QUIET, seconds / 2)
        ends = time.monotonic() + seconds
        work = [self._pool.submit(worker.run, ends - quiet) for worker in self._workers]
        work.append(self._pool.submit(self._restart, self.draw.uniform(1, seconds / 2)))
        self._turn_until(lambda: all(each.done() for each in work), seconds + 10 * GRACE)
        for each in work:
            each.result()
        self._turn_until(lambda: all(each.is_current() for each in self._clients), GRACE, True)
        for client in self._clients:
            if not client.is_current():
                self.report.fault(str(client))
        self.truth.verify()
        self._turn_until(lambda: time.monotonic() > ends, GRACE, True)
        self._look()

    def _restart(self, pause: float) -> None:
        if self.over.wait(pause):
            return
        self.servers[1].stop(signal.SIGKILL if len(self.states) % 2 else signal.SIGTERM)
        self.servers[1].start()
        self.report.count("restarts")

    def _turn_until(self, condition: Callable[[], bool], seconds: float,
                    is_quiet: bool = False) -> None:
        """Let clients act and receive until something is so, or time is up."""
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            for key, _ in self.selector.select(0.05):
                key.data.receive()
            while not self.acknowledged.empty():
                self.truth.confirm(self.acknowledged.get())
            now = time.monotonic()
            for client in self._clients:
                client.act(now, is_quiet)

    def _look(self) -> None:
        """The resident must be as it was after the first minutes."""
        state = self.servers[0].state
        if len(self.states) >= WARM_UP:
            usual = self.states[WARM_UP - 1][:2]
            self._turn_until(lambda: state()[:2] == usual, GRACE, True)
            if state()[:2] != usual:
                self.report.fault(f"descriptors, threads: {state()[:2]}, were {usual}")
        self.states.append(state())

    def growth(self) -> int:
        """Return the KiB by which the resident grew: medians of five minutes, first and last."""
        sizes = [kib for _, _, kib in self.states[WARM_UP:]]
        return int(statistics.median(sizes[-5:]) - statistics.median(sizes[:5])) if sizes else 0

    def end(self) -> None:
        """Stop all in order; neither server may have warned of anything but long stalls."""
        for client in self._clients:
            client.close()
        drops = 0
        for server in self.servers:
            server.stop(signal.SIGTERM)
            for line in server.log.read_text().splitlines():
                is_drop = line.endswith(" dropped: stalled")
                drops += is_drop
                if not is_drop:
                    self.report.fault(f"{server.name} says: {line}")
        if drops > self.report.counts["long stalls"]:
            self.report.fault(f"{drops} drops for stalls")
        if self.growth() > GROWTH:
            self.report.fault(f"the resident grew by {self.growth()} KiB")

    def close(self) -> None:
        """Have all threads end, wherever they are."""
        self.over.set()
        self._pool.shutdown()
        self.truth.close()


def run(soak: Soak, minutes: float) -> None:
    """Run all minutes; print a line of the table for each, and one for all."""
    number = max(1, round(minutes))
    columns = ("minute", *COLUMNS, "descriptors", "threads", "KiB")
    say(*columns)
    say(*["---:"] * len(columns))
    before: Counter = Counter()
    for minute in range(1, number + 1):
        soak.minute(60 * minutes / number)
        now = soak.report.counts.copy()
        say(minute, *(now[what] - before[what] for what in COLUMNS), *soak.states[-1])
        before = now
    resident = cpu_clock(soak.servers[0].process.pid) / 60 / minutes
    soak.end()
    say("all", *(soak.report.counts[what] for what in COLUMNS), *soak.states[-1])
    print(f"\nThe resident grew by {soak.growth()} KiB. CPU: it {resident:.0%} of a core, all "
          f"clients and the checks {time.process_time() / 60 / minutes:.0%}.")


def say(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


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
    report = Report()
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "events.db")
        servers = [stack.enter_context(Server(name, path, report))
                   for name in ("resident", "restarted")]
        soak = Soak(servers, path, report, seed)
        stack.callback(soak.close)
        run(soak, options.minutes)
    sys.exit(1 if report.counts["faults"] else 0)


if __name__ == "__main__":
    main()
