"""Take events and clients from any thread, and keep them for the publisher.

All in here is guarded by one mutex, never held across a system call, nor across a scan whose length
a client chooses. Any thread may call any method, but the last section is the publisher's.
"""
from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Callable

from sse_core.engine import frames
from sse_core.engine.clients import CLIENTS_PER_TURN, Client, Clients, Gap, Opening, Subscription
from sse_core.engine.frames import Draft, Id
from sse_core.engine.log import NOTHING, Batch, Frame, Log
from sse_core.engine.wakeup import WakeUp
from sse_core.errors import NotRunning, WouldWait

STOP_TIME = 1.0         # seconds that stop gives clients to take what is in the log
# seconds between two looks of one who waits: a pace changes by time alone
POLL_INTERVAL = 0.1
WAITERS_SHARE = 0.75    # of the log, for those who wait for clients; the rest is for who does not
CACHED_BATCHES = 64       # clients that lag and are at the same place share them
ID_LENGTH = 64          # bytes that an id adds to a frame, at most


class Broadcast:
    """Take events and clients, and say what there is to be sent. Options as of SSEServer.

    clock: monotonic seconds; wall: seconds since the epoch. Both are there for tests.
    """

    def __init__(self, *, history: int, retry: float, max_clients: int, patience: float,
                 heartbeat: float, clock: Callable[[], float] = time.monotonic,
                 wall: Callable[[], float] = time.time) -> None:
        options = history, retry, max_clients, patience, heartbeat
        if not all(0 <= option < 1 << 31 for option in options):
            raise ValueError("history, retry, max_clients, patience and heartbeat must be numbers "
                             "from 0 on")
        # A signal handler can come while its thread holds it: see `refuse_inside`
        self._mutex = threading.RLock()
        # clients have, or the log, or it is the end
        self._changed = threading.Condition(self._mutex)
        self._log = Log(history, (int(wall() * 1000), 0))
        self.clients = Clients(self._mutex, patience)
        self.fanned_out = 0                     # number of the frame that the fan-out begins with
        self.fanned_out_id = self._log.last_id         # the newest id before that
        self._woken = False                     # the publisher looks for work without a wake-up
        self._floor = 0                         # below, nobody who is waited for is due a frame
        self._stop_by: float | None = None      # None while events and clients are taken
        self._published = 0
        self._batch_at = lru_cache(CACHED_BATCHES)(self._join_from)
        self.fault: BaseException | None = None         # that ended one of the server's threads
        # False with `history=0`: then the stream is the original's, byte for byte.
        self._ids = history > 0

        # Seconds, both. Set here and never changed.
        self.retry = retry
        self.heartbeat = heartbeat

        self._max_clients = max_clients
        self.clock = clock
        self.wall = wall
        # Makes the publisher look, which waits in it.
        self.wakeup = WakeUp()

        # `may_wait` of each thread: False after `forbid_waiting`.
        self._thread = threading.local()

    # Events

    def publish(self, data: str, event: str | None = None, channel: str | None = None,
                wait: bool = False) -> str | None:
        """Publish one event and return its id, None with `history=0`. See `publish_all`."""
        return self.publish_all([Draft(data, event, channel)], wait)[0]

    def publish_all(self, drafts: Sequence[Draft], wait: bool = False) -> list[str | None]:
        """Append events to the log in order, and return their ids.

        wait: when the log is full, wait for every slow client that keeps the pace. Else no client
        is waited for, and the publisher only when most of the log has not been fanned out.
        Raises NotRunning after `stop`. When that comes between two events, the others are appended
        all the same, without a wait for anybody; but with `wait` it is raised there, too. Raises
        RuntimeError in a signal handler that interrupts a `publish` of its thread; WouldWait after
        `forbid_waiting`, as in a logging handler that one of the server's own threads calls.
        """
        self.refuse_inside()
        return [self._publish(draft.payload, draft.channel, None, wait,
                              is_begun=index > 0 and not wait)
                for index, draft in enumerate(drafts)]

    def _publish(self, payload: bytes, channel: str | None, given: Id | None, wait: bool = False,
                 is_begun: bool = False) -> str | None:
        """Append an encoded event, and see to it that the publisher looks. Returns its id.

        is_begun: it belongs to others that were appended, so also after `stop`.
        """
        payload = self._line_ends(payload)
        length = len(payload) + ID_LENGTH
        with self._mutex:
            self._make_room(length, wait, is_begun)
            if not is_begun:
                self.check_running()
            new = (given or self._log.next_id(int(self.wall() * 1000))) if self._ids else None
            self._log.append(payload, new, channel, self.clock())
            self._published += 1
        self._wake()
        return frames.format_id(new)

    def drain(self) -> None:
        """Wait until clients have all that was published, but for those that are given up."""
        self.refuse_inside()
        with self._mutex:
            end = self._log.next
            while not self.stopping and (
                    self.fanned_out < end or not self.clients.all_have(end, self.clock())):
                if self.fanned_out >= end:      # else it waits for the publisher
                    now = self.clock()
                    self.clients.pace.hold(self.clients.oldest_needed(end, now), now)
                self._wait()
            self.clients.pace.release(self.clock())

    def forbid_waiting(self) -> None:
        """Have WouldWait raised in the calling thread, from now on, where others wait.

        For the publisher itself, and for the thread that serves all connections.
        """
        self._thread.may_wait = False

    # Clients

    def register(self, sock: socket.socket, opening: Opening, peer: str = "") -> bool:
        """Hand over a non-blocking socket: its head and every frame after its id are sent to it.

        Returns False, and leaves it to the caller, at `max_clients` or when the server is stopping.
        Where the stream begins is decided in the hold of the mutex in which the client is added, so
        no frame is missed or sent twice.
        """
        client = Client(sock, peer, opening)
        client.registered_at = self.clock()
        with self._mutex:
            if self.stopping or len(self.clients) >= self._max_clients:
                return False
            client.cursor = self._log.next
            if self._ids:
                self._begin_stream(client, opening)
            self.clients.add(client)
        self._wake()
        return True

    def figures(self) -> dict[str, Any]:
        """Return what is counted in here."""
        return {"clients": len(self.clients), "lagging": len(self.clients.lagging),
                "events": self._published}

    def describe_clients(self) -> list[dict[str, Any]]:
        """Return what there is to say of each client: times in seconds, at most 1000 of them."""
        with self._mutex:
            return self.clients.describe(self._log, self.clock(), self.wall())

    # The end

    def fail(self, fault: BaseException) -> None:
        """End at once, because a thread of the server met a fault."""
        self.fault = self.fault or fault
        self.stop(0.0)

    @property
    def stopping(self) -> bool:
        """Whether nothing is taken any more."""
        return self._stop_by is not None

    def refuse_inside(self) -> None:
        """Raise RuntimeError in a signal handler that came while its thread was at work in here."""
        if self._changed._is_owned():     # type: ignore[attr-defined]  # as Condition itself asks
            raise RuntimeError("a signal handler interrupted a call of the server's by another: "
                               "let it set a flag instead")

    def trouble(self) -> str | None:
        """Return why no event is taken now, or None."""
        ended = "a fault has ended the server" if self.fault else "the server is stopped"
        return ended if self.stopping else None

    def check_running(self) -> None:
        """Raise NotRunning if nothing is taken any more."""
        if self.stopping:
            raise NotRunning(Broadcast.trouble(self))

    def stop(self, seconds: float = STOP_TIME) -> None:
        """Take nothing any more; clients have so many seconds to get what is in the log."""
        with self._mutex:
            if self._stop_by is None:
                self._stop_by = self.clock() + seconds
        self.wakeup.wake()

    def _wake(self) -> None:
        """Have the publisher look for work that was added. Needs no mutex.

        Work that was added before its last look was seen there. After that the flag is False, until
        somebody wakes it.
        """
        if not self._woken:
            self._woken = True
            self.wakeup.wake()

    def _line_ends(self, payload: bytes) -> bytes:
        return payload if self._ids else frames.with_original_line_ends(payload)

    # Requires holding the mutex

    def _wait(self) -> None:
        """Wait until something has changed. Raises WouldWait."""
        if not getattr(self._thread, "may_wait", True):
            raise WouldWait("this thread may not wait for the publisher")
        self._changed.wait(POLL_INTERVAL)

    def _make_room(self, length: int, wait: bool = False, is_begun: bool = False) -> None:
        """Evict until `length` bytes fit, but wait while most of the log is not fanned out.

        wait: evict only what nobody who is waited for is due, and leave the others their share.
        """
        while not self._log.has_room(length, WAITERS_SHARE if wait else 1.0):
            if not is_begun:
                self.check_running()
            if self.stopping or self._may_evict(wait):
                self._log.evict()
            else:
                self._wait()
        if wait:
            self.clients.pace.release(self.clock())

    def _may_evict(self, wait: bool) -> bool:
        """Say whether nobody needs the oldest frame for whom a publisher would wait."""
        log = self._log
        if not wait:
            return (log.next - self.fanned_out) * 4 <= (log.next - log.first) * 3
        if log.first >= self._floor:
            self._floor = self.clients.oldest_needed(self.fanned_out, self.clock())
        is_needed = log.first >= self._floor
        if is_needed and self._floor < self.fanned_out:     # else it waits for the publisher
            self.clients.pace.hold(self._floor, self.clock())
        return not is_needed

    def _begin_stream(self, client: Client, opening: Opening) -> None:
        """Put a client behind the id it brought, or tell it the newest one if it has none."""
        if opening.last_id is None:
            client.delivered_id = self._log.last_id
            begin = [frames.welcome(self._log.last_id, self.retry, self.heartbeat)]
        else:
            begin = [frames.retry_line(self.retry), *self._place(client, opening)]
        client.unsent = b"".join([client.unsent, *map(client.subscription.framed, begin)])

    def _place(self, client: Client, opening: Opening) -> Iterable[bytes]:
        """Set the cursor behind the client's last id; if that cannot be, it begins with a gap.

        Returns the frames that it is sent before those at its cursor.
        """
        channels = client.subscription.channels
        own, latest = None, []
        if opening.since is None:
            own = frames.parse_id(opening.last_id or "")
            client.cursor, reason = self._log.locate(own, channels)
        else:
            client.cursor, reason = self._log.locate_time(opening.since, channels)
            latest = self._log.latest(channels) if opening.since == math.inf else []
        client.delivered_id = own or NOTHING
        client.gap = Gap(opening.last_id, reason, own) if reason else None
        self._floor = min(self._floor, client.cursor)
        return latest

    def _join_from(self, cursor: int, subscription: Subscription) -> tuple[Batch, int]:
        """Return a batch of what is fanned out from a cursor on, and the cursor after it."""
        run, end = self._log.collect(cursor, max(cursor, self.fanned_out), subscription.wants)
        return Batch(run, subscription.chunked), end

    # Called by the publisher thread

    def has_work(self) -> bool:
        """Say whether there is work. If not, whoever brings some wakes the publisher for it."""
        with self._mutex:
            self._woken = self.fanned_out < self._log.next or bool(self.clients.joining)
            return self._woken

    def next_work(self) -> tuple[list[Client], list[Frame]]:
        """Return clients that join, CLIENTS_PER_TURN at most, and the next batch to fan out."""
        with self._mutex:
            self._woken = True      # until the next look: in a burst, that saves system calls
            run, _ = self._log.collect(self.fanned_out, self._log.next)
            return self.clients.joining[:CLIENTS_PER_TURN], run

    def fanned_out_to(self, run: Sequence[Frame]) -> None:
        """Say that these frames are fanned out, and that clients may have moved."""
        with self._mutex:
            if run:
                self.fanned_out, self.fanned_out_id = run[-1].number + 1, run[-1].newest_id
            self._batch_at.cache_clear()
            self._changed.notify_all()

    def next_batch(self, client: Client) -> tuple[Batch, int, bool]:
        """Return the batch that follows a client's rest, and the cursor after it.

        Also whether the first frame of the batch tells the client its gap.
        """
        lagging = self.clients.lagging
        with self._mutex:
            if client in lagging:       # all others that lag are served before it is again
                lagging[client] = lagging.pop(client)
            if len(client.unsent) >= frames.BATCH:
                return Batch((), True), client.cursor, False
            start = max(client.cursor, self._log.first)
            if start > client.cursor and not client.gap and self._log.has_lost(
                    client.cursor, client.subscription.channels):
                own = client.delivered_id if self._ids and client.delivered_id > NOTHING else None
                client.gap = Gap(frames.format_id(own), "lagging", own)
            batch, end = self._batch_at(start, client.subscription)
            # `resumed` names the client's next event, so the gap waits until that has been found.
            if not client.gap or not batch.frames and end < self.fanned_out:
                return batch, end, False
            told = self._gap_frame(client, client.gap, start)
            return Batch([told, *batch.frames], client.subscription.chunked), end, True

    def _gap_frame(self, client: Client, gap: Gap, start: int) -> Frame:
        """Return what a client is told before it goes on at `start`: a frame of its own."""
        resumed = frames.format_id(self._log.first_id(start, client.subscription.wants))
        payload = self._line_ends(frames.gap_payload(gap.after, resumed, gap.reason, gap.own))
        return Frame(start - 1, None, client.delivered_id, None, 0.0, frames.chunk(payload))

    def done(self) -> bool:
        """Say whether the publisher may end: nothing is to be sent any more, or time is up."""
        with self._mutex:
            if self._stop_by is None:
                return False
            busy = self.fanned_out < self._log.next or self.clients.joining or self.clients.lagging
            return not busy or self.clock() >= self._stop_by

    def close(self) -> list[Client]:
        """Take nothing any more, and return all clients, whose sockets are to be closed."""
        self.stop(0.0)
        with self._mutex:
            return self.clients.remove_all()
