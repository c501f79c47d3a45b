"""Turn events into sends: every event goes into one log, every client is a cursor moving along it.

`publish` may be called from any thread: it encodes, appends to the log, wakes the publisher thread and returns.
`register` hands a socket over. From then on only the publisher thread touches it: no registered socket ever blocks,
so nobody waits for a client. What is new in the log is joined once and sent to all current clients. A client whose
socket takes only a part becomes lagging: it is watched for writability and reads on from its own cursor until it is
current again.

Who owns what (the publisher thread owns whatever is not named here):

    attribute                           guarded by   changed by              read by
    _log, _joining, _woken, _stop_by    the mutex    publish, register,      publisher
                                                     stop, publisher
    _clients                            the mutex    register, publisher     any thread, by len()
    _snapshot                           the mutex    status, publisher       the same
    counters                            -            publisher               any thread
    _next                               the mutex    publisher, preload      publish, drain
    _spared                             the mutex    publisher, register     publish, drain
    _patiences                          the mutex    publish, drain          publisher
    _groups, _channels, _lagging,       -            publisher               publisher
      _batches, _selector, _sweep_at,
      every Client and Group, registered sockets

The mutex is never held across a system call.
"""
import logging
import math
import os
import random
import selectors
import socket
import threading
import time
from contextlib import contextmanager
from itertools import chain, islice
from typing import Callable, Dict, FrozenSet, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

from sse_core import frames
from sse_core.log import Batch, Frame, Log

STALL = 30.0            # seconds without a byte taken after which a lagging client is dropped
SWEEP = 1.0             # seconds between two looks for silent and stalled clients, at most
STOP_TIME = 1.0         # seconds that stop gives clients to take what is in the log
PATIENCE_STEP = 0.1     # seconds between two looks at the age of what clients are due, while somebody waits for them
ID_LENGTH = 64          # bytes that an id adds to a frame, at most
BATCHES_KEPT = 64       # joined for clients that are not current, so that those at the same place share them
RECHECK = 1.0           # seconds between two looks at a condition, should its notification get lost

CLOSED, RESET, STALLED, UNWATCHED = "closed", "reset", "stalled", "unwatched"      # why a client is dropped
SNAPSHOT = 1000         # clients that a status names, so that it takes the publisher a few milliseconds
NOTHING = Batch((), True)
Bytes = Union[bytes, memoryview]

# Lets a thread that shares the core and makes more work go on before the publisher looks for it: of 3000 connects in a
# row, 50 were then greeted in one turn instead of 3, at 15 % less CPU. Costs 0.3 us where there is no such thread.
_yield = getattr(os, "sched_yield", lambda: None)

log = logging.getLogger("sse_server")


def jittered(seconds: float) -> int:
    """Return milliseconds, +-50 %, so that clients that left together do not come back together."""
    return round(seconds * 1000 * random.uniform(0.5, 1.5))


class Stopped(RuntimeError):
    """The server does not run (yet, or any more), so it takes no event."""


class Counters:
    """What the publisher has done since it began. Changed by its thread only; any thread may read."""

    def __init__(self) -> None:
        self.deliveries = 0                 # frames begun, over all clients
        self.bytes = 0
        self.gaps = 0
        self.turns = 0
        self.turn_seconds = 0.0             # without the waiting
        self.drops: Dict[str, int] = {CLOSED: 0, RESET: 0, STALLED: 0, UNWATCHED: 0}


class Group:
    """Clients that are sent the same bytes: those with the same set of channels and the same framing."""
    __slots__ = ("channels", "chunked", "current", "size", "sent_at", "last", "bytes")

    def __init__(self, channels: FrozenSet[str], chunked: bool) -> None:
        self.channels = channels
        self.chunked = chunked
        self.current: Dict["Client", None] = {}     # ordered set: the clients that have had every frame
        self.size = 0                               # current and lagging clients
        self.sent_at = -math.inf                    # when all current clients were last sent something
        self.last: Tuple[int, Optional[frames.Id]] = (-1, None)     # number and id of the last frame sent to all
        self.bytes = 0                              # sent to each that was current all the time

    def framed(self, chunk: bytes) -> bytes:
        """Return a chunk as this group's clients get it."""
        return chunk if self.chunked else bytes(frames.unchunk(chunk))

    def wants(self, frame: Frame) -> bool:
        return frame.channel is None or frame.channel in self.channels


class Client:
    """One connected socket and its cursor.

    `cursor` and `rest` are valid while the client is lagging. While it is current, `cursor` is the number of the
    frame with which it became current: what it is due next is what the publisher sends next.
    """
    __slots__ = ("sock", "peer", "group", "place", "cursor", "rest", "after", "sent_at", "awaited", "since", "bytes")

    def __init__(self, sock: socket.socket, peer: str, group: Group, rest: bytes) -> None:
        self.sock = sock
        self.peer = peer            # for the log, as it is not known any more after a reset
        self.group = group
        self.place = -1             # index in the list of clients
        self.cursor = 0             # number of the next frame due
        self.rest = rest            # bytes to send before that frame: a head, or the end of a frame begun
        self.after: Optional[str] = None    # id of the last frame it had before the cursor
        self.sent_at = 0.0          # when its socket last took a byte
        self.since = 0.0            # when it was registered, on the wall's clock
        self.bytes = 0              # sent to it; while it is current, this and what its group has been sent
        self.awaited = True         # a patient source waits for it; False from when it was given up until it is current


def committed(client: Client) -> int:
    """Return how many bytes a TLS socket that was full has begun to send all the same: they must be offered again."""
    return getattr(client.sock, "committed", 0)


class Publisher:
    """Fan one log out to all registered clients, in one thread named `publisher`.

    history: frames kept for clients that come back; 0: events have no id, as in the original.
    heartbeat: seconds of silence after which a client is sent a comment; 0: none.
    retry: seconds a client should wait before it reconnects, told with +-50 % jitter.
    max_clients: how many clients can be registered at a time.
    clock: monotonic seconds; wall: seconds since the epoch. Both are there for tests.
    """

    def __init__(self, *, history: int = 1024, heartbeat: float = 15.0, retry: float = 3.0, max_clients: int = 10000,
                 clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        self._mutex = threading.Lock()      # guards what the table at the top of the file says
        self._moved = threading.Condition(self._mutex)      # notified when _next has grown, and on stop
        self._clients: List[Client] = []
        self._joining: List[Client] = []    # registered, and not yet seen by the publisher
        self._log = Log(history)
        self._woken = False                 # the publisher will look at the log and at _joining without a wake-up
        self._next = 0                      # number of the frame with which the next fan-out begins
        self._stop_by: Optional[float] = None
        self._patiences: List[float] = []   # seconds that each who waits for lagging clients now does so
        self._spared = 0                    # number of the oldest frame that is kept for one, when that was last asked

        if not all(0 <= option < 1 << 31 for option in (history, heartbeat, retry, max_clients)):
            raise ValueError("history, heartbeat, retry and max_clients must be numbers from 0 on")
        self.counters = Counters()
        self._snapshot: Optional[List[dict]] = []       # of the clients, made by the publisher when it is None
        self._ids = history > 0
        self._heartbeat = heartbeat
        self._retry = retry
        self._max_clients = max_clients
        self._clock = clock
        self._wall = wall

        self._groups: Dict[Tuple[FrozenSet[str], bool], Group] = {}
        self._channels: Dict[str, Dict[Group, None]] = {}   # channel -> groups that want it
        self._lagging: Dict[Client, None] = {}
        self._batches: Dict[Tuple[int, Group], Tuple[Batch, int]] = {}      # see _batch_at
        self._sweep_every = min(SWEEP, heartbeat / 8) if heartbeat else SWEEP
        self._sweep_at = clock() + self._sweep_every
        self._selector = selectors.DefaultSelector()
        self._waker, self._wakee = socket.socketpair()
        self._waker.setblocking(False)
        self._wakee.setblocking(False)
        self._selector.register(self._wakee, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="publisher")

    # Called from any thread

    def start(self) -> None:
        """Start the publisher thread. Call it once."""
        self._thread.start()

    def __len__(self) -> int:
        """Return how many clients are registered."""
        return len(self._clients)

    def publish(self, data: str, event: Optional[str] = None, channel: Optional[str] = None, wait: float = 0.0,
                id: Optional[frames.Id] = None) -> Optional[str]:
        """Append an event to the log and return its id, None with `history=0`; the clients get it from there.

        data: at most 1 MiB of text; event, channel: names, at most 1 KiB. An event with a channel is for those who
        asked for it, any other for everyone. Waits for no client, unless `wait` is given; only, when most of the log
        has not been fanned out yet, for the publisher thread.

        wait: before a frame is evicted that a lagging client is due, wait for that client as long as the frame is
        younger than so many seconds. A client that is not waited for any longer must have been current to be so again.

        id: the event's, greater than all before, from a source that has its own; else it gets one from the clock.

        Raises ValueError for what no event can hold, Stopped after `stop`.
        """
        frames.check_event(event, channel)
        payload = frames.encode(data, event)
        length = len(payload) + ID_LENGTH
        appended = None
        with self._mutex:
            if not wait or self._evict_spared(length, wait):
                appended = self._append(payload, length, id, channel)
        if appended is None:
            with self._asking(wait):
                while self._stop_by is None and not self._evict_spared(length, wait):
                    self._moved.wait(RECHECK)
                appended = self._append(payload, length, id, channel)
        id, wake = appended
        if wake:
            self._wake()
        return frames.format_id(id)

    def preload(self, events: Iterable[Tuple[frames.Id, str, Optional[str], Optional[str]]]) -> None:
        """Fill an empty log with events from before this run, for clients that resume; those that are there miss none.

        events: id, data, event name, channel. Evicts what does not fit.
        """
        encoded = [(id, frames.encode(data, event), channel) for id, data, event, channel in events if self._ids]
        with self._mutex:
            assert self._log.next == 0, "only an empty log is filled"
            for id, payload, channel in encoded:
                while not self._log.fits(len(payload) + ID_LENGTH):
                    self._log.evict()
                self._log.append(payload, id, channel, self._clock())
            self._next = self._log.next     # the publisher has nothing under way: the log was empty

    def tell_gap(self, after: frames.Id, resumed: frames.Id) -> None:
        """Tell all clients that the source itself has lost what was between these two ids."""
        payload = frames.gap_payload(frames.format_id(after), frames.format_id(resumed), "evicted")
        with self._mutex:
            self._make_room(len(payload))
            # It takes the first place that was lost, so that whoever resumes from before it is told, too
            self._log.append(payload, (after[0], after[1] + 1) if self._ids else None, None, self._clock(), show_id=False)
        self._wake()

    def await_id(self, text: str, seconds: float) -> None:
        """Wait, at most so many seconds, until the log has come to the id that a client got from another server."""
        id = frames.parse_id(text)
        until = self._clock() + seconds
        with self._mutex:
            while id and id > self._log.last_id and self._stop_by is None and self._clock() < until:
                self._moved.wait(until - self._clock())

    def drain(self, seconds: float) -> None:
        """Wait until clients have all that is in the log now, leaving out those due a frame older than so many seconds."""
        with self._asking(seconds):
            end = self._log.next
            while self._stop_by is None and (self._joining or self._next < end or self._spared < end):
                self._moved.wait(RECHECK)

    @contextmanager
    def _asking(self, seconds: float) -> Iterator[None]:
        """Hold the mutex, and have the publisher keep `_spared` up to date meanwhile."""
        with self._mutex:
            self._patiences.append(seconds)
        self._wake()
        with self._mutex:
            try:
                yield
            finally:
                self._patiences.remove(seconds)

    def register(self, sock: socket.socket, head: bytes, *, peer: str = "", chunked: bool = True,
                 channels: Iterable[str] = (), last_id: Optional[str] = None) -> bool:
        """Hand over a non-blocking socket, to be sent `head` and then every frame after `last_id`, or every new one.

        Returns False if there are `max_clients` already or the publisher is stopping: the socket is still the
        caller's then. That and the first frame are decided under the mutex, so no frame falls between the two.
        """
        group = Group(frozenset(channels), chunked)     # stands for the real one, which the publisher owns
        client = Client(sock, peer, group, head)
        client.since = self._wall()
        if self._ids:
            client.rest += group.framed(frames.retry(jittered(self._retry)))
        with self._mutex:
            if self._stop_by is not None or len(self._clients) >= self._max_clients:
                return False
            self._place_cursor(client, last_id if self._ids else None)
            self._spared = min(self._spared, client.cursor)
            client.place = len(self._clients)
            self._clients.append(client)
            self._joining.append(client)
            wake, self._woken = not self._woken, True
        if wake:
            self._wake()
        return True

    @property
    def events(self) -> int:
        """How many events were published."""
        return self._log.next

    @property
    def lagging(self) -> int:
        """How many clients are lagging."""
        return len(self._lagging)

    def status(self) -> List[dict]:
        """Return what there is to know of the clients, the lagging ones first, SNAPSHOT of them at most."""
        with self._mutex:
            self._snapshot = None
        self._wake()
        with self._mutex:
            self._moved.wait_for(lambda: self._snapshot is not None or self._stop_by is not None, 2 * RECHECK)
            return self._snapshot or []

    def stop(self) -> None:
        """Stop: for at most a second clients can take what is in the log, then all are closed. Joins the thread."""
        with self._mutex:
            if self._stop_by is None:
                self._stop_by = self._clock() + STOP_TIME
            self._moved.notify_all()
        if self._thread.ident is None:
            self._close()
            return
        self._wake()
        self._thread.join()

    def _wake(self) -> None:
        try:
            self._waker.send(b"\0")
        except BlockingIOError:     # it has bytes enough to wake up from
            pass
        except OSError:             # it has stopped since, and closed the socket
            pass

    # Requires holding the mutex

    def _append(self, payload: bytes, length: int, id: Optional[frames.Id], channel: Optional[str]
                ) -> Tuple[Optional[frames.Id], bool]:
        """Append an event. Returns its id, and whether the publisher has to be woken for it."""
        self._make_room(length)
        if not self._ids:
            id = None
        elif id is None:
            id = self._log.next_id(int(self._wall() * 1000))
        self._log.append(payload, id, channel, self._clock())
        wake, self._woken = not self._woken, True
        return id, wake

    def _evict_spared(self, length: int, wait: float) -> bool:
        """Evict frames for which no client is waited for, or not that long. Returns whether `length` bytes fit then."""
        log, before = self._log, self._clock() - wait
        while not log.fits(length) and (
                log.first < self._spared or log.first < self._next and log.frame(log.first).time <= before):
            log.evict()
        return log.fits(length)

    def _spare(self) -> None:
        """Find the oldest frame that must be kept for a client that is waited for: while somebody asks for it.

        Run by the publisher, after a turn. No client that falls behind later is due an older frame than that; one that
        registers to resume can be, and lowers it.
        """
        patience = max(self._patiences, default=0.0)
        before = self._clock() - patience
        spared = self._next
        for client in (*self._lagging, *self._joining):
            due = client.cursor - bool(client.rest)
            if client.awaited and due < self._next:
                client.awaited = due >= self._log.first and self._log.frame(due).time > before
                if client.awaited:
                    spared = min(spared, due)
        self._spared = spared
        self._moved.notify_all()

    def _make_room(self, length: int) -> None:
        """Evict until `length` more bytes fit, and wait while most of the log has not been fanned out."""
        log = self._log
        while True:
            if self._stop_by is not None:
                raise Stopped("the server is stopped")
            if log.fits(length):
                return
            if (log.next - self._next) * 4 > (log.next - log.first) * 3:
                self._moved.wait(RECHECK)
            else:
                log.evict()

    def _place_cursor(self, client: Client, last_id: Optional[str]) -> None:
        """Set the cursor behind the last id that the client has had; where that cannot be, begin with a gap."""
        client.cursor = self._log.next
        if last_id is not None:
            client.after = last_id
            client.cursor, reason = self._log.locate(last_id, client.group.channels)
            if reason:
                client.rest += self._gap(client.group, client.cursor, last_id, reason)

    def _gap(self, group: Group, cursor: int, after: Optional[str], reason: str) -> bytes:
        """Return the gap event for a client that goes on from `cursor`."""
        self.counters.gaps += 1
        due = (frame.id for frame in self._log.read(cursor, self._log.next) if group.wants(frame))
        return group.framed(frames.chunk(frames.gap_payload(after, frames.format_id(next(due, None)), reason)))

    def _read_on(self, client: Client) -> Tuple[Bytes, Batch, int, int]:
        """Return what a client that is not current is due: bytes, a batch, and the cursors before and after that.

        A gap is told only once the frame before it is finished, so that a client never has two of them to be sent.
        """
        log = self._log
        lost = client.cursor < log.first and log.lost(client.cursor, client.group.channels)
        if client.rest and (lost or len(client.rest) >= frames.BATCH):
            return client.rest, NOTHING, client.cursor, client.cursor
        cursor = max(client.cursor, log.first)
        told = self._gap(client.group, cursor, client.after, "lagging") if lost else b""
        batch, end = self._batch_at(cursor, client.group)
        return bytes(client.rest) + told, batch, cursor, end

    def _batch_at(self, cursor: int, group: Group) -> Tuple[Batch, int]:
        """Return the batch from this cursor on and the cursor after it, joined once for all clients that are there."""
        found = self._batches.get((cursor, group))
        if found is None:
            if len(self._batches) >= BATCHES_KEPT:
                self._batches.clear()
            run, after = self._log.collect(cursor, max(cursor, self._next), group.wants)
            found = self._batches[cursor, group] = Batch(run, group.chunked), after
        return found

    def _has_work(self) -> bool:
        return self._next < self._log.next or bool(self._joining)

    # Run by the publisher thread

    def _run(self) -> None:
        try:
            while not self._done():
                self.turn(self._idle_time())
        finally:        # also if there is a fault in here: nobody may wait for a thread that is gone
            with self._mutex:
                self._stop_by = self._clock()
                self._moved.notify_all()
            self._close()

    def _done(self) -> bool:
        with self._mutex:
            if self._stop_by is None:
                return False
            return not (self._has_work() or self._lagging) or self._clock() >= self._stop_by

    def _idle_time(self) -> float:
        """Return for how many seconds there is nothing to do if nothing happens."""
        until = self._sweep_at if self._stop_by is None else min(self._sweep_at, self._stop_by)
        idle = max(0.0, until - self._clock())
        return min(idle, PATIENCE_STEP) if self._patiences else idle

    def turn(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for something to do, and do some: one batch, so that nothing waits for long.

        It is public for tests, where no thread runs.
        """
        _yield()
        with self._mutex:
            self._woken = self._has_work()
        for key, events in self._selector.select(0 if self._woken else timeout):
            self._on_ready(key.data, events)
        began = self._clock()
        with self._mutex:
            self._woken = True      # until the next look, and that saves whoever publishes in a burst a system call
            joining, self._joining = self._joining, []
            run, after_run = self._log.collect(self._next, self._log.next)
        if run:
            self._fan_out(run)
            with self._mutex:
                self._next = after_run
                self._batches.clear()
                self._moved.notify_all()
        for client in joining:
            self._greet(client)
        if self._patiences:
            with self._mutex:
                self._spare()
        if self._snapshot is None:
            self._take_snapshot()
        if self._clock() >= self._sweep_at:
            self._sweep()
        self.counters.turns += 1
        self.counters.turn_seconds += self._clock() - began

    def _take_snapshot(self) -> None:
        now, next_number = self._clock(), self._next
        chosen = list(islice(chain(self._lagging, *(group.current for group in self._groups.values())), SNAPSHOT))
        with self._mutex:
            self._snapshot = [self._describe(client, now, next_number) for client in chosen]
            self._moved.notify_all()

    def _describe(self, client: Client, now: float, next_number: int) -> dict:
        """Return a client as /-/status has it. Requires holding the mutex."""
        lagging = client in self._lagging
        due = max(client.cursor, self._log.first)
        return {"peer": client.peer, "since": round(client.since, 3), "channels": sorted(client.group.channels),
                "bytes": client.bytes + (0 if lagging else client.group.bytes),
                "lag_frames": next_number - client.cursor if lagging else 0,
                "lag_seconds": round(now - self._log.frame(due).time, 3) if lagging and due < next_number else 0.0}

    def _on_ready(self, client: Optional[Client], events: int) -> None:
        if client is None:
            self._wakee.recv(4096)
        elif events & selectors.EVENT_READ and not self._discard_input(client):
            return
        elif events & selectors.EVENT_WRITE and self._advance(client):
            self._settle(client)

    def _fan_out(self, run: Sequence[Frame]) -> None:
        """Send frames to the current clients of every group that wants them; equal bytes are joined once."""
        batches: Dict[Tuple[int, bool], Batch] = {}
        for group, wanted in self._wanted(run):
            key = id(wanted), group.chunked
            if key not in batches:
                batches[key] = Batch(wanted, group.chunked)
            self._send_to_group(group, batches[key])

    def _wanted(self, run: Sequence[Frame]) -> Iterable[Tuple[Group, Sequence[Frame]]]:
        """Return every group that wants any of the frames, with those it wants; no other group is touched."""
        if all([frame.channel is None for frame in run]):
            return [(group, run) for group in self._groups.values()]
        wanted: Dict[Group, List[Frame]] = {}
        for frame in run:
            every = self._groups.values() if frame.channel is None else self._channels.get(frame.channel, ())
            for group in every:
                wanted.setdefault(group, []).append(frame)
        return wanted.items()

    def _send_to_group(self, group: Group, batch: Batch) -> None:
        data, size = batch.data, len(batch.data)
        short = []
        for client in group.current:
            try:
                sent = client.sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:         # a reset: the rest of the fan-out goes on
                sent = -1
            if sent != size:
                short.append((client, sent))
        whole = len(group.current) - len(short)
        group.bytes += size
        self.counters.bytes += whole * size
        self.counters.deliveries += whole * len(batch.frames)
        for client, sent in short:
            if sent < 0:
                self._drop(client, RESET)
            else:
                self._fall_behind(client, batch, sent)
        group.sent_at = self._clock()
        group.last = batch.frames[-1].number, batch.frames[-1].id

    def _fall_behind(self, client: Client, batch: Batch, sent: int) -> None:
        """Make a current client lagging, `sent` bytes into a batch."""
        self._set_lagging(client)
        client.bytes -= len(batch.data) - sent      # the group is counted to have had it all
        self.counters.bytes += sent
        client.cursor = batch.frames[0].number
        self._move_cursor(client, batch, sent, committed(client))

    def _move_cursor(self, client: Client, batch: Batch, sent: int, committed: int) -> None:
        """Move a client over the frames of a batch that are begun; what is left of these becomes its rest."""
        begun, client.rest = batch.cut(sent, committed)
        if begun:
            self.counters.deliveries += begun
            client.cursor = batch.frames[begun - 1].number + 1
            client.after = frames.format_id(batch.frames[begun - 1].id) or client.after

    def _set_lagging(self, client: Client) -> None:
        """Give a current client a cursor of its own, and wait for its socket."""
        number, id = client.group.last
        if id and number >= client.cursor:      # sent to it too, as it was current by then
            client.after = frames.format_id(id)
        client.cursor = self._next
        client.bytes += client.group.bytes
        del client.group.current[client]
        self._watch(client)

    def _watch(self, client: Client) -> None:
        self._lagging[client] = None
        client.sent_at = self._clock()
        self._selector.modify(client.sock, selectors.EVENT_READ | selectors.EVENT_WRITE, client)

    def _settle(self, client: Client) -> None:
        """Sort a client that was just advanced: it is current, or lagging with its socket watched."""
        is_lagging = client in self._lagging
        if client.rest or client.cursor != self._next:      # it can be ahead, if it joined while there was more to do
            if not is_lagging:
                self._watch(client)
            return
        if is_lagging:
            del self._lagging[client]
            self._selector.modify(client.sock, selectors.EVENT_READ, client)
        client.awaited = True
        client.bytes -= client.group.bytes
        client.group.current[client] = None

    def _greet(self, client: Client) -> None:
        """Send a new client its head and, if it resumes, the first batch of what it missed."""
        group = client.group = self._groups.setdefault((client.group.channels, client.group.chunked), client.group)
        if not group.size:
            for channel in group.channels:
                self._channels.setdefault(channel, {})[group] = None
        group.size += 1
        client.sent_at = self._clock()
        try:
            self._selector.register(client.sock, selectors.EVENT_READ, client)
        except OSError:         # the system watches no more sockets
            self._drop(client, UNWATCHED)
            return
        log.debug("%s connected", client.peer)
        if self._advance(client):
            self._settle(client)

    def _advance(self, client: Client) -> bool:
        """Send a client that is not current one batch from its cursor. Returns False if it was dropped."""
        with self._mutex:
            rest, batch, start, end = self._read_on(client)
        sent = self._send(client, b"".join((rest, batch.data)) if batch.data else rest)
        if sent is None:
            return False
        begun = sent + committed(client)
        if not begun:
            if not rest and not batch.data:     # nothing up to there is for this client
                client.cursor = end
            return True             # else nothing has changed: a gap is told anew, as it is then
        client.cursor = start
        done = max(0, sent - len(rest))
        self._move_cursor(client, batch, done, max(0, begun - len(rest)) - done)
        if sent < len(rest):
            left = memoryview(rest)[sent:]
            client.rest = memoryview(b"".join((left, client.rest))) if client.rest else left
        elif done == len(batch.data):
            client.cursor = end     # beyond frames that its group does not want, too
        return True

    def _send(self, client: Client, data: Bytes) -> Optional[int]:
        """Send what the socket takes and return how much that was; None if the client was dropped."""
        try:
            sent = client.sock.send(data) if data else 0
        except BlockingIOError:
            return 0
        except OSError:
            self._drop(client, RESET)
            return None
        if sent:
            client.sent_at = self._clock()
            client.bytes += sent
            self.counters.bytes += sent
        return sent

    def _discard_input(self, client: Client) -> bool:
        """Throw away what a client sends after its request. Returns False if it was dropped, having closed."""
        try:
            if client.sock.recv(frames.BATCH):
                return True
        except BlockingIOError:
            return True
        except OSError:
            self._drop(client, RESET)
            return False
        self._drop(client, CLOSED)
        return False

    def _sweep(self) -> None:
        """Drop stalled clients, and send a comment to those that were sent nothing for a heartbeat's time."""
        now = self._clock()
        self._sweep_at = now + self._sweep_every
        for client in [client for client in self._lagging if now - client.sent_at >= STALL]:
            self._drop(client, STALLED)
        if self._heartbeat:
            silent_since = now - self._heartbeat
            silent = [client for group in self._groups.values() if group.sent_at <= silent_since
                      for client in group.current if client.sent_at <= silent_since]
            for client in silent:
                self._beat(client)

    def _beat(self, client: Client) -> None:
        heartbeat = client.group.framed(frames.HEARTBEAT)
        sent = self._send(client, heartbeat)
        if sent is not None and sent < len(heartbeat):
            self._set_lagging(client)
            client.rest = memoryview(heartbeat)[sent:]

    def _drop(self, client: Client, reason: str) -> None:
        """Close a client and forget it."""
        if reason != UNWATCHED:
            self._selector.unregister(client.sock)
        client.sock.close()
        self.counters.drops[reason] += 1
        group = client.group
        group.current.pop(client, None)
        self._lagging.pop(client, None)
        group.size -= 1
        if not group.size:
            self._forget(group)
        with self._mutex:
            last = self._clients.pop()
            if last is not client:
                self._clients[client.place] = last
                last.place = client.place
        level = logging.WARNING if reason in (STALLED, UNWATCHED) else logging.DEBUG
        log.log(level, "%s dropped: %s", client.peer, reason)

    def _forget(self, group: Group) -> None:
        del self._groups[group.channels, group.chunked]
        for channel in group.channels:
            del self._channels[channel][group]
            if not self._channels[channel]:
                del self._channels[channel]

    def _close(self) -> None:
        """End the stream of every current client in order, and close all sockets."""
        for client in [client for group in self._groups.values() if group.chunked for client in group.current]:
            self._send(client, frames.END)
        with self._mutex:
            clients, self._clients = self._clients, []
        for client in clients:
            client.sock.close()
        self._selector.close()
        self._waker.close()
        self._wakee.close()
