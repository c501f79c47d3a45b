"""Turn the rows of a history file into what each client must get, and find what is wrong.

It shares no code with the server, and reads the file by a connection of its own. What is found is
printed at once; nothing is asked twice, so nothing that was lost can come about later.
"""
import json
import sqlite3
import sys
import threading
import time
from bisect import bisect_left
from collections import Counter
from pathlib import Path
from typing import Collection, Dict, List, NamedTuple, Optional, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from wire import Decoder, Event     # noqa: E402,F401  the strict parser of the tests

HISTORY = 1024          # of the servers: what has left their log may be told as a gap
KEPT = 10 * HISTORY     # rows that the file keeps, and that are remembered here
PRINTED = 200           # faults, at most
GRACE = 15.0            # seconds to wait for the file
REASONS = ("evicted", "unknown", "lagging")
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
        if self.counts["faults"] <= PRINTED:
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
        """Return the row at a place, None if there is none yet."""
        if place >= self.end:
            self.read()
        if place < self._base:
            self._report.fault(f"a client has not had row {place}, which is forgotten by now")
        return self._rows[max(0, place - self._base)] if place < self.end else None

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

    def verify(self) -> None:
        """All that was ever read must still be there, for one who opens the file now."""
        self.read()
        known = self._rows[-KEPT * 3 // 4:]
        fresh = self._open()
        if known and self._after(fresh, (known[0].id[0], known[0].id[1] - 1)) != known:
            self._report.fault("file: it has not the rows any more that it had")
        self._file.close()
        self._file = fresh

    def close(self) -> None:
        self._file.close()


class Checker:
    """Check what one client gets: all that it wants from where it began, once, in order."""

    def __init__(self, truth: Truth, report: Report, name: str,
                 channels: Collection[str]) -> None:
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
        row = self._truth.row(self._place)
        while row and row.channel is not None and row.channel not in self._channels:
            self._place += 1
            row = self._truth.row(self._place)
        return row

    def take(self, event: Event) -> None:
        """It got this."""
        if event.name == "gap":
            self._take_gap(**json.loads(event.data))
            return
        due, given = self.due(), parse_id(event.id)
        if due is None or given != due.id:
            self._fault(f"it gets {given}, and not {due and due.id}: lost, doubled or disordered")
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
        if self.last_id is None or due is None or reason not in REASONS:
            self._fault(f"{told}: nothing is missing")
            return
        if not self.last_id <= parse_id(after) < due.id or (
                resumed and not self._truth.has(parse_id(resumed))):
            self._fault(f"{told}: due is {due.id}")
        # Without `resumed`, nothing that it wants was kept
        end, skipped = self._truth.end - HISTORY, -1
        if resumed:
            end = self._truth.place(parse_id(resumed))
        while due and self._place < end:
            skipped = self._place
            self._place += 1
            due = self.due()
        if skipped < 0 or self._truth.end - skipped <= HISTORY:
            self._fault(f"{told}: that much has not left the log")


def parse_id(text: str) -> Id:
    milliseconds, _, number = text.partition("-")
    return int(milliseconds), int(number)
