"""Take events from a log that is shared with other servers, in place of this one's own.

What is published goes to the shared log, and what comes back from it is sent: so every server
sends the same, in one order. All that is known of such a log is SharedLog.

Nobody is told that a log lost rows: it may be trimmed past the place where one stands, be made
anew, or be restored older. So with each read goes a look whether the row at that place is still the
same. If not, a gap is told, and it goes on with the newest rows that were not read before.
"""
from __future__ import annotations

import logging
import math
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from sse_core import frames
from sse_core.broadcast import ID_LENGTH, LOOK, Broadcast, Unavailable
from sse_core.frames import Draft, Id
from sse_core.log import MIN_HISTORY, Log

MIN_KEPT = 10000        # rows that are kept at least
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0       # seconds between two tries, growing; less, at random
Row = tuple[Any, ...]       # ms, n, and as bytes, or None: channel, event, data

logger = logging.getLogger("sse_server")


class Event(NamedTuple):
    """An event from a shared log, which gave it its id; encoded."""
    id: Id
    payload: bytes
    channel: str | None


class SharedLog(ABC):
    """A log that is shared with other servers, and how it is followed, of whatever kind it is.

    history: rows it begins with; ten times as many are kept. Of each kind are `publish` and what
    stands last. Any thread may call `publish` and look at `trouble`; all else belongs to the thread
    that follows, and to `load` before there is one.
    """
    _faults: tuple[type[Exception], ...]    # that a kind raises while it cannot be used
    _away, _back, _skips = "%s", "", ""     # what the logger is told, in its words

    def __init__(self, history: int) -> None:
        self._history = max(MIN_HISTORY, history)
        self._kept = max(MIN_KEPT, 10 * history)
        self.trouble: str | None = None         # why it cannot be used now
        self._last: Row | None = None           # the newest one that was read; None: it was empty
        self._loaded = False                    # the log has the rows from before this server
        self._since = math.inf                  # milliseconds since the epoch: its start
        self._poll = 0.0                        # seconds from a read of all to the next one
        self._pause = 0.0                       # before the next try; 0: no fault was met
        self._warned = False                    # of a row that is no event

    def load(self, shared: Shared, now: float) -> None:
        """Fill the log with the newest rows, if they can be had. now: seconds since the epoch."""
        self._turn(shared)
        self._since = now * 1000        # what comes later and is loaded later is for clients, too

    def follow(self, shared: Shared, stopping: threading.Event) -> None:
        """Add those that come, in order, until the flag is set, whatever happens to the log."""
        try:
            while not stopping.is_set():
                self._rest(stopping, self._turn(shared))
        finally:
            self._close()

    def _turn(self, shared: Shared) -> float:
        """Read on, and say when that cannot be. Returns the seconds until the next turn."""
        is_all = True
        try:
            is_all = self._read_on(shared)
            if self.trouble:
                self._recover()
        except self._faults as fault:
            self.trouble = self._failed(fault)
        trouble, away = self.trouble, self._pause > 0
        self._pause = min(max(2 * self._pause, FIRST_PAUSE), LONGEST_PAUSE) if trouble else 0.0
        if trouble and not away:
            logger.warning(self._away, trouble)
        if away and not trouble:
            logger.warning(self._back)
        return (self._pause * random.uniform(0.5, 1.0) or self._poll) if is_all else 0.0

    def _read_on(self, shared: Shared) -> bool:
        """Add what is new, a batch at most. Returns whether that was all."""
        began = shared.clock()
        rows, is_all = self._read() if self._loaded else (None, True)
        if rows is None:
            rows = self._begin(shared)
        for event in self._events(rows):
            shared.add(event)
        if is_all:
            shared.complete(began)
        return is_all

    def _begin(self, shared: Shared) -> list[Row]:
        """Load the newest rows, or tell a gap before them. Returns those that are to be added."""
        after, rows = self._last and self._last[:2], self._newest()
        if self._loaded:
            resumed = next(self._events(rows), None)
            shared.tell_gap(after, resumed and resumed.id)
            return rows
        old = sum(row[0] < self._since for row in rows)
        events = list(self._events(rows[:old]))
        del rows[:old]      # before the log holds the same once more
        shared.preload(events)
        self._loaded = True
        return rows

    def _events(self, rows: Iterable[Row]) -> Iterator[Event]:
        """Yield the rows that are events; skip the others, with one warning."""
        for ms, n, *texts in rows:
            try:
                channel, event, data = (text if text is None else text.decode() for text in texts)
                payload = Draft(data or "", event, channel).encoded()
                if data is None:
                    raise ValueError("there is no data")
            except ValueError:
                if not self._warned:
                    logger.warning("%s without data or with a bad name; they are skipped",
                                   self._skips)
                self._warned = True
            else:
                yield Event((ms, n), payload, channel)

    # Of each kind

    @abstractmethod
    def publish(self, drafts: Sequence[Draft]) -> list[str]:
        """Add events that have been checked, all or none, and return their ids.

        Raises Unavailable while that cannot be.
        """

    @abstractmethod
    def _read(self) -> tuple[list[Row] | None, bool]:
        """Return rows after the last one, None if some are lost; and whether these are all."""

    @abstractmethod
    def _newest(self) -> list[Row]:
        """Return the newest rows, without those that were read before; stand behind them."""

    @abstractmethod
    def _failed(self, fault: Exception) -> str:
        """Let go of what a read has broken, and return what is wrong, in a line."""

    @abstractmethod
    def _close(self) -> None:
        """Let go of what it has open."""

    def _recover(self) -> None:
        """It can be read: see whether it takes events, too, and note that there is no trouble."""
        raise NotImplementedError

    def _rest(self, stopping: threading.Event, seconds: float) -> None:
        """Wait until the next turn."""
        stopping.wait(seconds)


class Shared(Broadcast):
    """A Broadcast whose events, and their ids, come from a shared log. Options as there."""

    def __init__(self, stream: SharedLog, *, history: int, **options: Any) -> None:
        super().__init__(history=history, **options)
        self.stream = stream
        self._log = Log(history)
        self._log.is_loaded, self._log.complete_at = False, -math.inf
        self.newest = self._log.last_id
        # Of those who wait: how many events at once, which fit into the share of who does not wait
        self._piece = max(MIN_HISTORY, history) // 4
        self._own = self.newest     # the newest id that they published, and the time after that
        self._own_at = -math.inf
        self._arrived = self.newest         # the id that came back last

    def publish_all(self, drafts: Sequence[Draft], wait: bool = False) -> list[str | None]:
        """Publish to the shared log, all or none; with `wait`, in pieces, each when it takes them.

        An event whose answer was lost may then be published twice. Raises what `publish` does.
        """
        for draft in drafts:
            draft.encoded()
        if not wait:
            self.check_running()
            return [*self.stream.publish(drafts)]
        ids: list[str | None] = []
        for start in range(0, len(drafts), self._piece):
            ids += self._publish_piece(drafts[start:start + self._piece])
        return ids

    def _publish_piece(self, drafts: Sequence[Draft]) -> list[str]:
        """Publish when the shared log takes it and slow clients, who hold it back, have room."""
        self.refuse_inside()
        while True:
            with self._mutex:       # what was published before must have come back, to count
                while self._arrived < self._own and self._log.complete_at < self._own_at:
                    self._wait()
                self._make_room(1, wait=True)
                self.check_running()
            try:
                ids = self.stream.publish(drafts)
            except Unavailable:
                time.sleep(LOOK)
            else:
                with self._mutex:
                    self._own = max(self._own, frames.parse_id(ids[-1]) or self._own)
                    self._own_at = self.clock()
                return ids

    def trouble(self) -> str | None:
        """Return why no event is taken now, or None."""
        return super().trouble() or self.stream.trouble

    def add(self, event: Event) -> None:
        """Append an event of the shared log. Raises NotRunning after `stop`."""
        self._publish(event.payload, event.channel, event.id)
        self._arrived = event.id

    def preload(self, events: Sequence[Event]) -> None:
        """Fill the empty log with the newest events of the shared one, as far as they fit.

        Clients that are there already do not get them.
        """
        with self._mutex:
            assert self._log.next == 0, "only an empty log is filled"
            if events and self._ids:
                self._log.begin(events[0].id, -len(events))
            for event in events if self._ids else ():
                while not self._log.fits(len(event.payload) + ID_LENGTH):
                    self._log.evict()
                self._log.append(event.payload, event.id, event.channel, self.clock())
            self.newest = self._log.last_id     # of those before 0, with which the fan-out begins
            self._log.is_loaded = True

    def complete(self, at: float) -> None:
        """Say that the log has all that was in the shared one at that time, on `clock`."""
        with self._mutex:
            self._log.complete_at = at
            self._moved.notify_all()

    def tell_gap(self, after: Id | None, resumed: Id | None) -> None:
        """Tell all clients that the shared log has lost what was between these two ids."""
        ids = frames.format_id(after), frames.format_id(resumed)
        payload = self._line_ends(frames.gap_payload(*ids, "evicted", after if self._ids else None))
        with self._mutex:
            self._make_room(len(payload))
            self._log.append(payload, None, None, self.clock())
        self.wakeup.wake()
