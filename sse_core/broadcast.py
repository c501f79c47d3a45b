"""Take events and clients from any thread, and keep them for the publisher: the log, the list of clients, one mutex.

Every method may be called from any thread, but those of the last section, which are the publisher's. All that is in
here is guarded by the mutex, but for two things: a client that is registered belongs to the publisher thread, whose
cursors others read under the mutex, where an old value does no harm because cursors only grow; and `len` is atomic.
The mutex is never held across a system call, nor across a scan whose length a client chooses.
"""
import logging
import math
import socket
import threading
import time
from itertools import chain, islice
from typing import Any, Callable, Dict, FrozenSet, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from sse_core import frames
from sse_core.frames import Id
from sse_core.log import Batch, Bytes, Frame, Log

STOP_TIME = 1.0         # seconds that stop gives clients to take what is in the log
LOOK = 0.1              # seconds between two looks of one who waits for clients: whether they keep the pace changes by time
PACE = 16 << 10         # bytes a second: a client that takes less is not waited for
WAITERS_SHARE = 0.75    # of the log, that one who waits for clients may fill; the rest is for those who do not
ID_LENGTH = 64          # bytes that an id adds to a frame, at most
AT_ONCE = 256           # clients greeted, and others sent what they are due, before the publisher looks for new events
LISTED = 1000           # clients that a status names
SNAPSHOT = 1.0          # seconds for which a status is kept

NOTHING = Batch((), True)

logger = logging.getLogger("sse_server")


class NotRunning(RuntimeError):
    """The server does not run (yet, or any more), so it takes no event."""


class Unavailable(Exception):
    """The place that events go to does not answer now; trying again later may help."""


class Event(NamedTuple):
    """An event from a source that gives it an id, encoded."""
    id: Id
    payload: bytes
    channel: Optional[str]


class Subscription(NamedTuple):
    """What a client asked for: clients with the same one are sent the same bytes."""
    channels: FrozenSet[str]
    chunked: bool

    def framed(self, chunk: bytes) -> bytes:
        """Return a chunk as such a client gets it."""
        return chunk if self.chunked else bytes(frames.unchunk(chunk))

    def wants(self, frame: Frame) -> bool:
        return frame.channel is None or frame.channel in self.channels


class Client:
    """One connected socket and its cursor. It belongs to the publisher from its registration on."""
    __slots__ = ("sock", "peer", "asked", "since", "index", "cursor", "rest", "after", "gap", "ahead", "last_id",
                 "registered_at", "sent_at", "awaited_until", "group", "bytes")

    def __init__(self, sock: socket.socket, peer: str, asked: Subscription, rest: bytes) -> None:
        self.sock = sock
        self.peer = peer                    # for the log, as it is not known any more after a reset
        self.asked = asked
        self.since = 0.0                    # when it was registered, in seconds since the epoch
        self.index = -1                     # in the list of clients
        self.cursor = 0                     # number of the next frame due; while it is current, that is the publisher's
        self.rest: Bytes = rest             # bytes to send before that frame: a head, or the end of a frame begun
        self.after: Optional[Id] = None     # it has had everything up to this id
        self.gap: Optional[Tuple[Optional[str], str]] = None    # to be told before that frame: an id, a reason
        self.ahead = False                  # it brought an id that this server has not come to yet
        self.last_id: Optional[str] = None  # that it brought
        self.registered_at = 0.0
        self.sent_at = 0.0                  # when its socket last took a byte, or when it became lagging
        self.awaited_until = math.inf       # a patient source waits for it until then; each byte taken moves that on
        self.group: Any = None              # the publisher's, of the clients with the same subscription
        self.bytes = 0                      # sent to it; while it is current, add `group.bytes`: so this can be negative


Snapshot = Tuple[Client, int, int, float]       # a client, bytes sent, frames due, since when it is due the first


class Broadcast:
    """Take events and clients, and say what there is to be sent.

    history: frames kept for clients that come back; 0: events have no id, as in the original.
    retry: seconds a client should wait before it reconnects, told with +-50 % jitter.
    max_clients: how many clients can be registered at a time.
    patience: seconds in which a slow client must keep the pace, to be waited for by those who publish with `wait`.
    shared: the events come from a log that other servers have, too, with ids of its own: see `preload`.
    on_fault: called when a fault in one of the server's threads has ended it, in that thread.
    clock: monotonic seconds; wall: seconds since the epoch. Both are there for tests.
    """

    def __init__(self, *, history: int = 1024, retry: float = 3.0, max_clients: int = 10000, patience: float = 5.0,
                 shared: bool = False, clock: Callable[[], float] = time.monotonic,
                 wall: Callable[[], float] = time.time, on_fault: Callable[[], None] = lambda: None) -> None:
        if not all(0 <= option < 1 << 31 for option in (history, retry, max_clients, patience)):
            raise ValueError("history, retry, max_clients and patience must be numbers from 0 on")
        # One thread can enter it twice: a signal handler that publishes, while its thread does. `_append` refuses that
        self._mutex = threading.RLock()
        self._moved = threading.Condition(self._mutex)  # notified when the publisher or the source has moved on, and at the end
        self._log = Log(history, (0, 0) if shared else (int(wall() * 1000), 0))
        self._clients: List[Client] = []
        self._joining: List[Client] = []        # registered, and not yet seen by the publisher
        self._lagging: Dict[Client, None] = {}  # ordered: the one that was served longest ago comes first
        self.fanned_out = 0                     # number of the frame with which the next fan-out begins
        self.newest = self._log.last_id         # the newest id before that
        self._woken = False                     # the publisher will look at the log and at _joining without a wake-up
        self._floor = 0                         # no client that is waited for is due a frame below that
        self._loaded = not shared               # the log has what was in the shared one before this server
        self._complete_at = -math.inf if shared else math.inf   # then it had all that was in there
        self._stop_by: Optional[float] = None   # None while the server takes events and clients
        self._appending = False
        self._snapshot: Tuple[float, List[Snapshot]] = (-math.inf, [])
        self.published = 0                      # events, without those that were preloaded
        self.fault: Optional[BaseException] = None      # that ended one of the server's threads

        self.ids = history > 0
        self.shared = shared
        self.patience = patience
        self.retry = retry
        self._max_clients = max_clients
        self.clock = clock
        self._wall = wall
        self._on_fault = on_fault
        self.wake: Callable[[], None] = lambda: None    # makes the publisher look; set by it
        self.publisher: Optional[int] = None            # identifies its thread; set by it

    def __len__(self) -> int:
        """Return how many clients are registered."""
        return len(self._clients)

    # Events

    def publish(self, data: str, event: Optional[str] = None, channel: Optional[str] = None, wait: bool = False
                ) -> Optional[str]:
        """Append an event to the log and return its id, None with `history=0`; the clients get it from there.

        data: at most 1 MiB of text; event, channel: names, at most 1 KiB. An event with a channel is for those who
        asked for it, any other for everyone.

        wait: when the log is full, wait for every slow client that keeps the pace (`patience`), so that it loses
        nothing. Else this waits for no client; only, when most of the log has not been fanned out, for the publisher.

        Raises ValueError for what no event can hold, NotRunning after `stop`, RuntimeError in a signal handler that
        interrupts a `publish` of its own thread, Unavailable in the publisher's own thread (a logging handler, say)
        when it would wait for itself.
        """
        frames.check_event(event, channel)
        payload = frames.encode(data, event)
        with self._mutex:
            id, wake = self._append(payload, channel, None, wait)
        if wake:
            self.wake()
        return frames.format_id(id)

    def add(self, event: Event) -> None:
        """Append an event that has its id from a shared log. Raises NotRunning after `stop`."""
        with self._mutex:
            _, wake = self._append(event.payload, event.channel, event.id, wait=False)
        if wake:
            self.wake()

    def preload(self, events: Sequence[Event]) -> None:
        """Fill the empty log with the newest events of a shared one; clients that are there already do not get them.

        Evicts what does not fit.
        """
        with self._mutex:
            assert self._log.next == 0, "only an empty log is filled"
            for event in events if self.ids else ():
                while not self._log.fits(len(event.payload) + ID_LENGTH):
                    self._log.evict()
                if self._log.next == 0:
                    self._log.begin(event.id)
                self._log.append(event.payload, event.id, event.channel, self.clock())
            # The publisher has nothing under way: the log was empty
            self.fanned_out, self.newest = self._log.next, self._log.last_id
            self._loaded = True

    def complete(self, at: float) -> None:
        """Say that the log has all that was in the shared one at that time, on `clock`."""
        with self._mutex:
            self._complete_at = at
            self._moved.notify_all()

    def has(self, event: Event) -> bool:
        """Say whether the log has this very event."""
        with self._mutex:
            return self._log.has(event.id, event.payload)

    def tell_gap(self, after: Optional[Id], resumed: Optional[Id]) -> None:
        """Tell all clients that the source itself has lost what was between these two ids."""
        payload = frames.gap_payload(frames.format_id(after), frames.format_id(resumed), "evicted")
        with self._mutex:
            self._make_room(len(payload))
            self._log.append(payload, None, None, self.clock())
        self.wake()

    def check_running(self) -> None:
        """Raise NotRunning if nothing can be published any more."""
        if self._stop_by is not None:
            raise NotRunning("a fault has ended the server" if self.fault else "the server is stopped")

    def drain(self) -> None:
        """Wait until clients have all that was published; those that do not keep the pace are not waited for."""
        began = self.clock()
        until = began + max(1.0, self.patience)
        with self._mutex:
            while self._complete_at < began and self._stop_by is None and self.clock() < until:
                self._moved.wait(LOOK)      # for what is in the shared log and has not come back from it
            end = self._log.next
            while self._stop_by is None and not self._all_have(end):
                self._moved.wait(LOOK)

    # Clients

    def register(self, sock: socket.socket, head: bytes, *, peer: str = "", chunked: bool = True,
                 channels: Iterable[str] = (), last_id: Optional[str] = None) -> bool:
        """Hand over a non-blocking socket, to be sent `head` and then every frame after `last_id`, or every new one.

        Returns False if there are `max_clients` already or the server is stopping: the socket is still the caller's
        then. Whether it is taken and where its stream begins are decided in one hold of the mutex, so no frame is
        missed or sent twice.
        """
        client = Client(sock, peer, Subscription(frozenset(channels), chunked), head)
        client.since, client.registered_at = self._wall(), self.clock()
        with self._mutex:
            if self._stop_by is not None or len(self._clients) >= self._max_clients:
                return False
            client.cursor, client.after = self._log.next, self._log.last_id
            if self.ids:
                client.rest = self._greeting(client, last_id)
            if self.ids and last_id is not None:
                client.last_id, client.after = last_id, frames.parse_id(last_id)
                client.ahead = not self._can_place(client)
            if client.last_id is not None and not client.ahead:
                self._locate(client)
            self._floor = min(self._floor, client.cursor)
            client.index = len(self._clients)
            self._clients.append(client)
            self._joining.append(client)
            wake, self._woken = not self._woken, True
        if wake:
            self.wake()
        return True

    def figures(self) -> Dict[str, int]:
        """Return what is counted in here."""
        return {"clients": len(self), "lagging": len(self._lagging), "events": self.published}

    def describe_clients(self) -> List[dict]:
        """Return what there is to know of the clients, the lagging ones first: LISTED at most, as of a second ago."""
        with self._mutex:
            now = self.clock()
            if now - self._snapshot[0] >= SNAPSHOT:
                chosen = islice(chain(self._lagging, (each for each in self._clients if each not in self._lagging)), LISTED)
                self._snapshot = now, [self._snap(client) for client in chosen]
            at, snapshot = self._snapshot
        return [{"peer": client.peer, "since": round(client.since, 3), "channels": sorted(client.asked.channels),
                 "bytes": size, "lag_frames": lag, "lag_seconds": round(max(0.0, at - due_since), 3)}
                for client, size, lag, due_since in snapshot]

    # The end

    def run(self, thread: Callable[[], None]) -> None:
        """Run what one of the server's threads does: a fault in it is logged, and ends the server."""
        try:
            thread()
        except NotRunning:      # it was publishing when the server stopped
            pass
        except BaseException as error:
            logger.critical("a fault ended the thread %s, and with it the server", threading.current_thread().name,
                            exc_info=True)
            self.fail(error)

    def fail(self, fault: BaseException) -> None:
        """End the server because of a fault in one of its threads: nothing is published or registered any more."""
        with self._mutex:
            self.fault = self.fault or fault
        self.stop(0.0)
        self._on_fault()

    def stop(self, seconds: float = STOP_TIME) -> None:
        """Take nothing any more; clients have so many seconds to get what is in the log."""
        with self._mutex:
            if self._stop_by is None:
                self._stop_by = self.clock() + seconds
            self._moved.notify_all()
        self.wake()

    def abandon(self) -> List[Client]:
        """In a forked child, where no thread of the server runs: take nothing, and return the clients to be closed."""
        self._mutex = threading.RLock()     # the old one may be held by a thread that is not here
        self._moved = threading.Condition(self._mutex)
        self._stop_by = -math.inf
        self.wake = lambda: None
        return self._clients

    # Requires holding the mutex

    def _append(self, payload: bytes, channel: Optional[str], id: Optional[Id], wait: bool
                ) -> Tuple[Optional[Id], bool]:
        """Append an event. Returns its id, and whether the publisher has to be woken for it."""
        length = len(payload) + ID_LENGTH
        self.check_running()
        while wait and not self._fits_without_loss(length):
            self._wait()
        self._make_room(length)
        if self._appending:
            raise RuntimeError("publish was interrupted by a signal handler that publishes: set a flag there instead")
        self._appending = True
        try:
            if not self.ids:
                id = None
            elif id is None:
                id = self._log.next_id(int(self._wall() * 1000))
            self._log.append(payload, id, channel, self.clock())
        finally:
            self._appending = False
        self.published += 1
        wake, self._woken = not self._woken, True
        return id, wake

    def _wait(self) -> None:
        """Wait until something has changed."""
        if threading.get_ident() == self.publisher:
            raise Unavailable("the log is full, and the publisher cannot wait for itself")
        self._moved.wait(LOOK)
        self.check_running()

    def _make_room(self, length: int) -> None:
        """Evict until `length` more bytes fit, and wait while most of the log has not been fanned out."""
        log = self._log
        while not log.fits(length):
            if (log.next - self.fanned_out) * 4 > (log.next - log.first) * 3:
                self._wait()
            else:
                log.evict()

    def _fits_without_loss(self, length: int) -> bool:
        """Evict what nobody who is waited for is due. Returns whether `length` bytes fit then, in the waiters' share."""
        log = self._log
        while not log.fits(length, WAITERS_SHARE):
            if log.first >= self._floor:
                self._floor = min([self.fanned_out, *(client.cursor for client in self._awaited())])
            if log.first >= self._floor:
                return False
            log.evict()
        return True

    def _awaited(self) -> Iterator[Client]:
        """Yield the clients that are not current and keep the pace."""
        now = self.clock()
        lagging = (client for client in self._lagging if client.awaited_until > now)
        return (client for client in chain(lagging, self._joining) if not client.ahead)

    def _all_have(self, end: int) -> bool:
        """Say whether all clients that are waited for have everything up to the frame with this number."""
        return self.fanned_out >= end and all(client.cursor - bool(client.rest) >= end for client in self._awaited())

    def _greeting(self, client: Client, last_id: Optional[str]) -> bytes:
        """Return the head and the first block of a stream: where a client stands that has not said it."""
        newest = self._log.last_id if last_id is None else None
        return bytes(client.rest) + client.asked.framed(frames.greeting(self.retry, newest))

    def _can_place(self, client: Client) -> bool:
        """Say whether it is known what the client's last id is: one of ours, or unknown.

        If the log is shared, other servers can be further than this one. The id may come yet, until the log has all
        that there was when the client brought it.
        """
        return self._loaded and (client.after is None or client.after <= self._log.last_id
                                 or self._complete_at > client.registered_at)

    def _locate(self, client: Client) -> None:
        """Set the cursor behind the last id that the client has had; where that cannot be, it begins with a gap."""
        client.ahead = False
        client.cursor, reason = self._log.locate(client.after, client.asked.channels)
        client.gap = reason and (client.last_id, reason)

    def _snap(self, client: Client) -> Snapshot:
        """Return a client, the bytes sent to it, its lag in frames, and since when it is due the first of these."""
        if client not in self._lagging or client.ahead:
            current = client.group is not None and client in client.group.current
            return client, client.bytes + (client.group.bytes if current else 0), 0, math.inf
        lag, due = self._log.next - client.cursor, max(client.cursor, self._log.first)
        return client, client.bytes, lag, self._log.frame(due).time if due < self._log.next else math.inf

    # Called by the publisher thread

    def has_work(self) -> bool:
        """Say whether there is work, and whoever brings some from now on has to wake the publisher if there is none."""
        with self._mutex:
            self._woken = self.fanned_out < self._log.next or bool(self._joining)
            return self._woken

    def take(self) -> Tuple[List[Client], List[Frame]]:
        """Return clients that joined, and the next batch to fan out."""
        with self._mutex:
            self._woken = True      # until the next look, and that saves whoever publishes in a burst a system call
            joining, self._joining = self._joining[:AT_ONCE], self._joining[AT_ONCE:]
            return joining, self._log.collect(self.fanned_out, self._log.next)[0]

    def moved(self, run: Sequence[Frame]) -> None:
        """Say that these frames are fanned out, and that clients have moved: whoever waits for either looks again."""
        with self._mutex:
            if run:
                self.fanned_out, self.newest = run[-1].number + 1, run[-1].newest
            self._moved.notify_all()

    def due(self, client: Client, batch_at: Callable[[int], Tuple[Batch, int]]) -> Tuple[bytes, Batch, int, int]:
        """Return what a client that is not current is due after its rest: a gap, a batch, the cursors around that.

        batch_at: returns the batch from a cursor on, and the cursor after it. The others are served before it is again.
        """
        with self._mutex:
            log = self._log
            if client in self._lagging:
                self._lagging[client] = self._lagging.pop(client)
            if client.ahead or len(client.rest) >= frames.BATCH:
                return b"", NOTHING, client.cursor, client.cursor
            lost = client.cursor < log.first and log.lost(client.cursor, client.asked.channels)
            start = max(client.cursor, log.first)
            gap = client.gap or (frames.format_id(client.after) if self.ids else None, "lagging")
            told = b""
            if lost or client.gap:
                payload = frames.gap_payload(gap[0], frames.format_id(log.first_id(start)), gap[1])
                told = client.asked.framed(frames.chunk(payload))
            batch, end = batch_at(start)
            return told, batch, start, end

    def collect(self, cursor: int, wants: Callable[[Frame], bool]) -> Tuple[List[Frame], int]:
        """Return the frames that have been fanned out from this cursor on, a batch of them, and the cursor after it."""
        with self._mutex:
            return self._log.collect(cursor, max(cursor, self.fanned_out), wants)

    def place_arrived(self, ahead: Iterable[Client]) -> List[Client]:
        """Return those of the clients that were ahead whose place can be told now: some hundreds at a time."""
        with self._mutex:
            arrived = list(islice(filter(self._can_place, ahead), AT_ONCE))
            for client in arrived:
                self._locate(client)
            return arrived

    def set_lagging(self, client: Client) -> None:
        """Sort a client among those that read on from their own cursor."""
        with self._mutex:
            client.awaited_until = self.clock() + self.patience
            self._lagging[client] = None
            if client in client.group.current:
                client.group.remove(client)

    def set_aside(self, client: Client) -> None:
        """Sort a client among those that are ahead."""
        with self._mutex:
            self._lagging.pop(client, None)

    def set_current(self, client: Client) -> None:
        """Sort a client among those that have had every frame."""
        with self._mutex:
            self._lagging.pop(client, None)
            client.group.add(client)

    def remove(self, client: Client) -> None:
        """Forget a client."""
        with self._mutex:
            self._lagging.pop(client, None)
            last = self._clients.pop()
            if last is not client:
                self._clients[client.index] = last
                last.index = client.index

    def lagging(self) -> Iterable[Client]:
        """Return the lagging clients, the one that was served longest ago first. Only the publisher changes them."""
        return self._lagging.keys()

    @property
    def stopping(self) -> bool:
        return self._stop_by is not None

    def done(self) -> bool:
        """Say whether the publisher may end: asked to stop, with nothing to send, or no time left for it."""
        with self._mutex:
            if self._stop_by is None:
                return False
            idle = self.fanned_out >= self._log.next and not self._joining and not self._lagging
            return idle or self.clock() >= self._stop_by

    def close(self) -> List[Client]:
        """Take nothing any more, and return all clients, which are the publisher's to close."""
        with self._mutex:
            self._stop_by = self.clock() if self._stop_by is None else self._stop_by
            self._moved.notify_all()
            clients, self._clients = self._clients, []
            self._joining.clear()
            self._lagging.clear()
            return clients
