"""Take events from a log that servers share, in place of this server's own.

What is published goes to the store, and what comes back from it is sent. So every server sends
the same events, in one order. EventStore is all that this server knows of a store.

Two threads work on it, and neither waits for the other:

    source    follows the store: it loads the newest rows, then adds those that come
    store     takes what is published from a queue, and commits all that waits there at once

Until the newest rows are loaded, the server takes no client: nobody could say which events came
before such a client, and which after. From then on, if rows are removed before this server has read
them, all clients are told a gap.
"""
from __future__ import annotations

import logging
import math
import queue
import random
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import Any, Callable, NamedTuple, TypeVar

from sse_core.engine import frames
from sse_core.engine.clients import StreamRequest
from sse_core.engine.frames import Event, Id
from sse_core.engine.hub import ID_LENGTH, POLL_INTERVAL, Hub
from sse_core.engine.log import FRAME_COST, MAX_BYTES, MIN_FRAMES, NOTHING, SCAN_LIMIT
from sse_core.errors import Unavailable

# Rows that a store keeps at least.
MIN_KEPT = 10000

# Seconds between two tries while the log cannot be used. The pause doubles from one to the other.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0

# Places in EventStore._troubles.
READING, WRITING = 0, 1

T = TypeVar("T")
# ms and n of the id, then channel, event name and data, each as bytes or None.
Row = tuple[Any, ...]

logger = logging.getLogger("sse_server")


class StoredEvent(NamedTuple):
    """An encoded event, with the id that the store gave it."""
    id: Id
    payload: bytes
    channel: str | None


class Order(NamedTuple):
    """Events to be committed together. The future is given their ids, or Unavailable."""
    events: Sequence[Event]
    future: Future[list[str]]


class EventStore(ABC):
    """A log that servers share, and how it is followed and written to. Each kind is a subclass.

    history: how many of the newest rows are loaded, which is all that clients can get. The store
    keeps ten times as many, MIN_KEPT at least.

    Any thread may call `submit`, `publish` and `end`, and read `trouble`. All else belongs to the
    thread that runs `follow`, or to the one that runs `write` where it says so. A subclass has the
    methods that stand last.
    """
    # What a subclass raises while the log cannot be used.
    _faults: tuple[type[Exception], ...]

    # Texts of a subclass: when it cannot be used and when it can again, what is skipped or lost,
    # and the subject of a refusal.
    _away, _back, _skips, _refuses = "%s", "", "", ""

    def __init__(self, history: int) -> None:
        # Guards the next two. It is reentrant, so that a signal handler that publishes, which none
        # should (see hub.py), cannot deadlock.
        self._mutex = threading.RLock()
        # None is the end of the queue.
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._ended = False

        # Why the log cannot be read, and why it cannot be written to. Each is set by the thread
        # that does it. The lock lets one warning tell of both.
        self._troubles_lock = threading.Lock()
        self._troubles: list[str | None] = [None, None]

        self._history = max(MIN_FRAMES, history)
        self._kept = max(MIN_KEPT, 10 * history)

        # The next four belong to the thread that follows. The newest row that was read, or None.
        self._last: Row | None = None

        # Seconds until the next read after one that found all there was.
        self._poll = 0.0

        # Seconds until the next try after a fault. 0: the last try met none.
        self._pause = 0.0

        # Whether it was logged that rows are skipped.
        self._warned = False

        # The others belong to the thread that writes. When it looks after the log again, on
        # time.monotonic, and the pause until then after a fault.
        self._due_at = 0.0
        self._write_pause = 0.0

        # How many bytes must be taken until all is well again after a refusal. 0: all is well.
        self._lacking = 0

    # For any thread

    @property
    def trouble(self) -> str | None:
        """Why events cannot be read or written now, or None."""
        return self._troubles[READING] or self._troubles[WRITING]

    def submit(self, events: Sequence[Event]) -> Future[list[str]]:
        """Have events committed, all or none, and return a future of their ids at once.

        It raises Unavailable if they could not be committed. Its callbacks run in the thread that
        writes, so they must not wait. What is cancelled before that thread begins it is not
        committed.
        """
        future: Future[list[str]] = Future()
        with self._mutex:
            if not self._ended:
                self._orders.put(Order(events, future))
                return future
        future.set_exception(self._unavailable("the server is stopped"))
        return future

    def publish(self, events: Sequence[Event]) -> list[str]:
        """Commit events, all or none, and return their ids.

        Raises Unavailable while that cannot be. After that they may have been committed all the
        same, if only the answer was lost.
        """
        return self.submit(events).result()

    def end(self) -> None:
        """Take no more events. The thread that writes commits those that wait, and ends."""
        with self._mutex:
            self._ended = True
            self._orders.put(None)

    def _note(self, thread: int, trouble: str | None) -> None:
        """Note why a thread cannot do its work, or that it can, and log it if that is news."""
        with self._troubles_lock:
            before, self._troubles[thread] = self.trouble, trouble
            now = self.trouble
        if now and not before:
            logger.warning(self._away, now)
        if before and not now:
            logger.warning(self._back)

    def _unavailable(self, reason: str) -> Unavailable:
        return Unavailable(f"{self._refuses} does not take events now ({reason})")

    # For the thread that writes

    def write(self) -> None:
        """Commit what is published, all that waits at once, until `end` is called."""
        orders: list[Order | None] = []
        try:
            while None not in orders:
                orders = self._next_orders()
                wanted = [order for order in orders
                          if order and order.future.set_running_or_notify_cancel()]
                if wanted:
                    self._serve(wanted)
                if time.monotonic() >= self._due_at:
                    self._look_after()
        finally:
            self.end()
            while not self._orders.empty():
                orders.append(self._orders.get())
            for order in orders:
                # Only after a fault of our own is there one that was not answered.
                if order and not order.future.done():
                    order.future.set_exception(self._unavailable("a fault has ended it"))

    def _next_orders(self) -> list[Order | None]:
        """Wait for an order, and return it and all others that wait. None came if it is time to
        look after the log.
        """
        orders: list[Order | None] = []
        try:
            orders.append(self._orders.get(timeout=max(0.0, self._due_at - time.monotonic())))
            while True:
                orders.append(self._orders.get_nowait())
        except queue.Empty:
            return orders

    def _serve(self, orders: Sequence[Order]) -> None:
        """Commit the events of all orders at once, and answer each order."""
        events = [event for order in orders for event in order.events]
        size = sum(1 + len(event.data.encode()) for event in events)
        ids, trouble = self._tried(lambda: iter(self._commit(events)), size)
        for order in orders:
            if ids is None:
                order.future.set_exception(self._unavailable(str(trouble)))
            else:
                order.future.set_result(list(islice(ids, len(order.events))))

    def _look_after(self) -> None:
        """After a refusal, try whether as much can be written again; otherwise tidy up."""
        if self._lacking:
            self._tried(lambda: self._probe(self._lacking), self._lacking)
        else:
            pause, _ = self._tried(self._tidy, 0)
            self._due_at = time.monotonic() + (pause or self._write_pause)

    def _tried(self, write: Callable[[], T], size: int) -> tuple[T | None, str | None]:
        """Call what writes so many bytes. Return its result, or None and what is wrong.

        After a refusal, all is well again when as much has been written as was refused, and not
        before: a full disk may have room for less.
        """
        result, trouble = None, None
        try:
            result = write()
            self._lacking = max(0, self._lacking - size)
        except self._faults as fault:
            trouble = self._failed(fault)
            self._lacking = max(1, self._lacking, size)
            self._write_pause = _longer(self._write_pause)
            self._due_at = time.monotonic() + self._write_pause
        if trouble or not self._lacking:
            self._note(WRITING, trouble)
        if not self._lacking:
            self._write_pause = 0.0
        return result, trouble

    # For the thread that follows

    def follow(self, hub: StoreHub, stopping: threading.Event) -> None:
        """Load the newest rows, then add those that come, until the flag is set."""
        while not stopping.is_set():
            self._rest(stopping, self.turn(hub, stopping))

    def turn(self, hub: StoreHub, stopping: threading.Event) -> float:
        """Read on once, whatever is wrong with the log. Return the seconds until the next turn."""
        is_all, trouble = True, None
        try:
            is_all = self._read_on(hub, stopping)
        except self._faults as fault:
            trouble = self._failed(fault)
        self._note(READING, trouble)
        self._pause = _longer(self._pause) if trouble else 0.0
        return (self._pause * random.uniform(0.5, 1.0) or self._poll) if is_all else 0.0

    def _read_on(self, hub: StoreHub, stopping: threading.Event) -> bool:
        """Add one batch of new events. Return whether there are no more."""
        began = hub.clock()
        rows, is_all = self._read() if hub.loaded.is_set() else (None, True)
        if rows is None:
            rows = self._begin(hub, stopping)
        for event in self._events(rows):
            hub.add(event)
        if is_all:
            hub.complete(began)
        return is_all

    def _begin(self, hub: StoreHub, stopping: threading.Event) -> list[Row]:
        """Load the newest rows; or, if rows are lost, tell a gap and return the new rows."""
        newest, missing = self._collect(stopping)
        if stopping.is_set():
            return []
        rows = self._unread(newest)
        if hub.loaded.is_set():
            logger.warning("%s are gone that were not read: a gap is told", self._skips)
            first = next(self._events(reversed(rows)), None)
            # An event on a channel is not the first one for every client.
            hub.tell_gap(first.id if first and first.channel is None else None)
            return rows[::-1]
        hub.preload(self._events(_taken_from(rows)), missing)
        return []

    def _collect(self, stopping: threading.Event) -> tuple[list[Row], Id]:
        """Return the newest rows, newest first, as many as the log keeps, and what is missing.

        What is missing is the newest id before them, or NOTHING. They are read in pages: nobody
        waits for this, and a stop is seen between two pages.
        """
        rows: list[Row] = []
        size, page = 0, self._page(None)
        while page and len(rows) < self._history and size < MAX_BYTES and not stopping.is_set():
            rows += page
            size += sum(len(row[4] or b"") + FRAME_COST for row in page)
            page = self._page(rows[-1])
        older = [*rows[self._history:], *page][:1]
        return rows[:self._history], max(self._removed(), *(row[:2] for row in older), NOTHING)

    def _events(self, rows: Iterable[Row]) -> Iterator[StoredEvent]:
        """Yield the rows that are events; skip the others, with one warning."""
        for ms, n, *texts in rows:
            try:
                channel, event, data = (text if text is None else text.decode() for text in texts)
                payload = Event(data or "", event, channel).payload
                if data is None:
                    raise ValueError("there is no data")
            except ValueError:
                if not self._warned:
                    logger.warning("%s without data, or too long, or with a bad name; they are "
                                   "skipped", self._skips)
                self._warned = True
            else:
                yield StoredEvent((ms, n), payload, channel)

    # For a subclass to implement. All but the last two raise one of `_faults` while the log cannot
    # be used.

    @abstractmethod
    def _read(self) -> tuple[list[Row] | None, bool]:
        """Return the rows after the last one, or None if some are lost, and whether these are all.
        """

    @abstractmethod
    def _page(self, before: Row | None) -> list[Row]:
        """Return the next older rows before this one, newest first; before None, the newest."""

    @abstractmethod
    def _removed(self) -> Id:
        """Return the newest id of all rows that were removed, or NOTHING."""

    @abstractmethod
    def _unread(self, rows: list[Row]) -> list[Row]:
        """Return those of the newest rows that were not read before, and read on after them."""

    @abstractmethod
    def _commit(self, events: Sequence[Event]) -> list[str]:
        """Commit events, all or none, and return their ids. Called by the thread that writes."""

    @abstractmethod
    def _probe(self, size: int) -> None:
        """Try whether so many bytes can be written. Called by the thread that writes."""

    @abstractmethod
    def _failed(self, fault: Exception) -> str:
        """Return what is wrong, in a line. Called by either thread."""

    @abstractmethod
    def close(self) -> None:
        """Close what is open. Call it when both threads have ended."""

    def _tidy(self) -> float:
        """Clean up, and return the seconds until that is due again.

        Called by the thread that writes.
        """
        return 60.0

    def _rest(self, stopping: threading.Event, seconds: float) -> None:
        """Wait until the next turn."""
        stopping.wait(seconds)


class StoreHub(Hub):
    """A Hub whose events, and their ids, come from a store. It has the same options."""

    def __init__(self, store: EventStore, *, history: int, **options: Any) -> None:
        super().__init__(history=history, began_with=(0, 0), **options)
        self.store = store

        # On `clock`: the log has all that the store had at this time.
        self._complete_at = -math.inf

        # Set by the thread that follows, when the log has the events from before the start. From
        # then on the server takes clients.
        self.loaded = threading.Event()

        # How many events a publisher that waits commits at once. They fit into the share of the log
        # of those that do not wait.
        self._piece = max(MIN_FRAMES, history) // 4

        # The newest id that publishers that wait have committed, and the time after that.
        self._own = self.fanned_out_id
        self._own_at = -math.inf

        # The id that came back last.
        self._arrived = self.fanned_out_id

    def register(self, sock: socket.socket, stream_request: StreamRequest, peer: str = "") -> bool:
        """Hand over a socket, see Hub.

        Returns False, too, before the log is loaded, and when it cannot be said yet what the id is
        that the client brought. Another server may have given it out, and its event may be on the
        way here, until the log has all that the store had when the client came.
        """
        brought = frames.parse_id(stream_request.last_id or "") if self._log.has_ids else None
        may_come = (brought and brought > self._log.last_id
                    and self._complete_at <= stream_request.came_at)
        is_ready = self.loaded.is_set() and not may_come
        return is_ready and super().register(sock, stream_request, peer)

    def drain(self) -> None:
        """Wait for what has not come back from the store, for a while, then as Hub does."""
        began = self.clock()
        until = began + max(1.0, self.clients.pace.longest)
        self.refuse_inside()
        with self._mutex:
            while self._complete_at < began and self.clock() < until and not self.stopping:
                self._wait()
        super().drain()

    def publish_all(self, events: Sequence[Event], wait: bool = False) -> list[str | None]:
        """Publish to the store, all or none; see Hub. Raises Unavailable, too.

        With `wait`, the events are published in pieces, and each piece is tried until the log takes
        it. If only the answer was lost, a piece is published twice.
        """
        if not wait:
            return [*self.submit_all(events).result()]
        ids: list[str | None] = []
        for start in range(0, len(events), self._piece):
            ids += self._publish_piece(events[start:start + self._piece])
        return ids

    def submit_all(self, events: Sequence[Event]) -> Future[list[str]]:
        """Have events committed to the store, all or none; see EventStore.submit.

        Raises NotRunning after `stop`.
        """
        self.check_running()
        return self.store.submit(events)

    def _publish_piece(self, events: Sequence[Event]) -> list[str]:
        """Publish as soon as slow clients leave room for it and the store takes it."""
        self.refuse_inside()
        while True:
            with self._mutex:
                # What was published before takes room only when it has come back.
                while self._arrived < self._own and self._complete_at < self._own_at:
                    self._wait()
                    self.check_running()
                self._make_room(1, wait=True)
                self.check_running()
            try:
                ids = self.store.publish(events)
            except Unavailable:
                time.sleep(POLL_INTERVAL)
            else:
                with self._mutex:
                    self._own = max(self._own, frames.parse_id(ids[-1]) or self._own)
                    self._own_at = self.clock()
                return ids

    def trouble(self) -> str | None:
        """Return why no event is taken now, or None."""
        loading = None if self.loaded.is_set() else "events from before the start are being read"
        return super().trouble() or self.store.trouble or loading

    def add(self, event: StoredEvent) -> None:
        """Append an event of the store. Raises NotRunning after `stop`."""
        self._publish(event.payload, event.channel, event.id)
        self._arrived = event.id

    def preload(self, events: Iterator[StoredEvent], missing: Id) -> None:
        """Fill the log with the newest events of the store, as far as they fit.

        Only before there are clients. missing: see Log.begin.
        """
        assert self._log.next == 0, "only an empty log is filled"
        while some := list(islice(events, SCAN_LIMIT)):
            # The mutex is held for some events, and not for all of a long history.
            with self._mutex:
                for event in some if self._log.has_ids else ():
                    while not self._log.has_room(len(event.payload) + ID_LENGTH):
                        self._log.evict()
                    self._log.append(event.payload, event.id, event.channel, self.clock())
                # They count as sent: there is nobody to send them to.
                self.fanned_out = self._log.next
        with self._mutex:
            self._log.begin(missing)
            self.fanned_out_id = self._log.last_id
        self.loaded.set()

    def complete(self, at: float) -> None:
        """Note that the log has all that was in the store at that time, on `clock`."""
        with self._mutex:
            self._complete_at = at
            self._changed.notify_all()

    def tell_gap(self, resumed: Id | None) -> None:
        """Tell all clients that events before this id are lost.

        None stands for an id that is not known yet, or not the same for all clients. The gap begins
        after the newest event of this log, and not after the newest row: that may be no event, so
        that no client could resume at it.
        """
        after = self._log.last_id if self._log.has_ids else None
        ids = frames.format_id(after), frames.format_id(resumed)
        payload = self._log.with_line_ends(frames.gap_payload(*ids, "evicted", after))
        with self._mutex:
            self._make_room(len(payload))
            self._log.append(payload, None, None, self.clock())
        self.wakeup.wake()


def _longer(pause: float) -> float:
    return min(max(2 * pause, FIRST_PAUSE), LONGEST_PAUSE)


def _taken_from(rows: list[Row]) -> Iterator[Row]:
    """Remove and yield the rows, the last one first, so that each is held in memory only once."""
    while rows:
        yield rows.pop()
