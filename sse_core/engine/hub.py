"""Take events and clients from any thread, and hold them for the publisher.

    any thread      publish, register  ->  the log, the clients that join  ->  the publisher thread
                    drain, publish with `wait`  <-  clients have moved     <-

One mutex guards all of it: the log, the table of clients, and what each publisher waits for. Two
rules keep that short. The mutex is never held across a system call. And it is never held across a
loop whose length a client chooses: scans of the log end after a fixed number of frames.

There are two kinds of publishers, and they meet a full log differently:

    does not wait   A POST or a program evicts the oldest frame, even if a slow client needs it,
                    which is then told a gap. It waits for the publisher thread alone, and only
                    while that has not sent most of the log yet.
    waits           A pipe never evicts a frame that a client worth waiting for still needs; pace.py
                    says which clients are. It leaves the last quarter of the log to the others.

Any thread may call any method, except those at the end, which are the publisher thread's. None may
be called from a signal handler: set a flag there instead.
"""
from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from typing import Any, Callable

from sse_core.engine import frames
from sse_core.engine.clients import CLIENTS_PER_TURN, Client, Clients, StreamRequest
from sse_core.engine.frames import Event, Id
from sse_core.engine.log import Batch, Frame, Log
from sse_core.engine.wakeup import WakeUp
from sse_core.errors import NotRunning, WouldWait

# Seconds that a stop gives clients to take what is in the log.
STOP_TIME = 1.0

# Seconds between two checks by a thread that waits. Nobody wakes it when time alone has made a
# client too slow to be waited for.
POLL_INTERVAL = 0.1

# The share of the log that a publisher may fill if it can wait.
WAITERS_SHARE = 0.75

# Bytes that an id adds to a frame, at most.
ID_LENGTH = 64


class Hub:
    """Hold the log and the clients, and say what there is to be sent.

    history, retry, max_clients, patience, heartbeat: as of SSEServer. Raises ValueError for one
    that is negative or no number.

    began_with   The id after which ids begin. By default it is the present time.
    clock        Monotonic seconds.
    wall         Seconds since 1970. Tests have clocks of their own.
    """

    def __init__(self, *, history: int, retry: float, max_clients: int, patience: float,
                 heartbeat: float, began_with: Id | None = None,
                 clock: Callable[[], float] = time.monotonic,
                 wall: Callable[[], float] = time.time) -> None:
        options = history, retry, max_clients, patience, heartbeat
        if not all(0 <= option < 1 << 31 for option in options):
            raise ValueError("history, retry, max_clients, patience and heartbeat must be numbers "
                             "from 0 on")

        # Guards all that is not said to belong to one thread. It is reentrant only so that a signal
        # handler which publishes meets an error, and not a deadlock: see `refuse_inside`.
        self._mutex = threading.RLock()

        # Notified when frames were fanned out, when clients may have moved, and at the end.
        self._changed = threading.Condition(self._mutex)

        self._log = Log(history, began_with or (int(wall() * 1000), 0))
        self.clients = Clients(self._mutex, patience)

        # The number of the frame with which the fan-out goes on, and the newest id before it. Once
        # there are clients, only the publisher thread changes them, and reads them without mutex.
        self.fanned_out = 0
        self.fanned_out_id = self._log.last_id

        # Every client that is waited for has all frames below this number. It is found anew only
        # when these have been evicted.
        self._floor = 0

        # When a stop gives clients no more time, on `clock`. None while the hub takes anything.
        self._stop_by: float | None = None

        # The publisher has ended, so nobody needs the log any more.
        self._closed = False

        # Events that were published here.
        self._published = 0

        # What ended one of the server's threads, and so the server.
        self.fault: BaseException | None = None

        # Seconds, both. Set here and never changed.
        self.retry = retry
        self.heartbeat = heartbeat

        self._max_clients = max_clients
        self.clock = clock
        self.wall = wall

        # The publisher thread waits in it. While the flag is True, that thread is going to look for
        # work anyway.
        self.wakeup = WakeUp()
        self._woken = False

        # `may_wait` of each thread: False after `forbid_waiting`.
        self._thread = threading.local()

    # Events

    def publish(self, data: str, event: str | None = None, channel: str | None = None,
                wait: bool = False) -> str | None:
        """Publish one event and return its id, None with `history=0`. See `publish_all`."""
        return self.publish_all([Event(data, event, channel)], wait)[0]

    def publish_all(self, events: Sequence[Event], wait: bool = False) -> list[str | None]:
        """Append events to the log in order, and return their ids.

        wait: wait for every slow client that keeps the pace, while the log is full.

        Raises NotRunning after `stop`. If the stop comes between two of the events, the others are
        still appended, so that all are published or none; with `wait`, it is raised there, too.
        Raises WouldWait in a thread that has called `forbid_waiting`, and RuntimeError in a signal
        handler that has interrupted another call: set a flag there instead.
        """
        self.refuse_inside()
        return [self._publish(event.payload, event.channel, None, wait,
                              is_begun=index > 0 and not wait)
                for index, event in enumerate(events)]

    def _publish(self, payload: bytes, channel: str | None, given: Id | None, wait: bool = False,
                 is_begun: bool = False) -> str | None:
        """Append an encoded event, wake the publisher, and return the event's id.

        given: the id that a store gave it. is_begun: others that belong to it were appended, so it
        is appended also after `stop`.
        """
        payload = self._log.with_line_ends(payload)
        length = len(payload) + ID_LENGTH
        with self._mutex:
            self._make_room(length, wait, is_begun)
            if not is_begun:
                self.check_running()
            new = given or self._log.next_id(int(self.wall() * 1000))
            frame = self._log.append(payload, new, channel, self.clock())
            self._published += 1
        self._wake()
        return frames.format_id(frame.id)

    def drain(self) -> None:
        """Wait until clients have all that was published, except for those too slow to wait for.

        Returns at once after `stop`. Raises WouldWait and RuntimeError as `publish_all` does.
        """
        self.refuse_inside()
        with self._mutex:
            end = self._log.next
            while not self.stopping and (
                    self.fanned_out < end or not self.clients.all_have(end, self.clock())):
                # Before the fan-out has come so far, it is the publisher that is waited for.
                if self.fanned_out >= end:
                    now = self.clock()
                    self.clients.pace.hold(self.clients.oldest_needed(end, now), now)
                self._wait()
            self.clients.pace.release(self.clock())

    def forbid_waiting(self) -> None:
        """Have WouldWait raised in the calling thread, from now on, where others wait.

        For the publisher thread, which would wait for itself, and for the thread that serves all
        connections. A logging handler may publish in either.
        """
        self._thread.may_wait = False

    def _wait(self) -> None:
        """Wait until something has changed, or a moment. Requires the mutex."""
        self.clients.assert_mutex_is_held()
        if not getattr(self._thread, "may_wait", True):
            raise WouldWait("this thread may not wait for the publisher")
        self._changed.wait(POLL_INTERVAL)

    def _make_room(self, length: int, wait: bool = False, is_begun: bool = False) -> None:
        """Evict until `length` bytes fit, and wait as `publish_all` says. Requires the mutex.

        Raises NotRunning after `stop`, but with `is_begun` it goes on until there is room.
        """
        while not self._log.has_room(length, WAITERS_SHARE if wait else 1.0):
            if not is_begun:
                self.check_running()
            if self._closed or self._may_evict(wait):
                self._log.evict()
            else:
                self._wait()
        if wait:
            self.clients.pace.release(self.clock())

    def _may_evict(self, wait: bool) -> bool:
        """Return whether a publisher may evict the oldest frame. If not, it has to wait."""
        self.clients.assert_mutex_is_held()
        log = self._log
        if not wait:
            # At most three quarters of the log may wait for the publisher thread.
            return (log.next - self.fanned_out) * 4 <= (log.next - log.first) * 3
        if log.first >= self._floor:
            self._floor = self.clients.oldest_needed(self.fanned_out, self.clock())
        is_needed = log.first >= self._floor
        # Else it is the publisher thread that is waited for, and no client.
        if is_needed and self._floor < self.fanned_out:
            self.clients.pace.hold(self._floor, self.clock())
        return not is_needed

    # Clients

    def register(self, sock: socket.socket, stream_request: StreamRequest, peer: str = "") -> bool:
        """Hand over a non-blocking socket, to which the publisher sends the stream.

        Returns False, and leaves the socket to the caller, if there are `max_clients`, or the
        server is stopping. Where the stream begins is decided in the hold of the mutex in which the
        client is added. So it misses no frame, and gets none twice.
        """
        client = Client(sock, peer, stream_request, self.clock())
        with self._mutex:
            if self.stopping or len(self.clients) >= self._max_clients:
                return False
            client.begin(self._log, stream_request, self.retry, self.heartbeat)
            self._floor = min(self._floor, client.cursor)
            self.clients.add(client)
        self._wake()
        return True

    def _wake(self) -> None:
        """Have the publisher thread look for work that was just added. Any thread may call it.

        The mutex is not needed. If the flag is True, the publisher looks after this, and sees the
        work. Two threads that both find it False wake the publisher twice, which does no harm.
        """
        if not self._woken:
            self._woken = True
            self.wakeup.wake()

    def stats(self) -> dict[str, Any]:
        """Return what is counted in here."""
        return {"clients": len(self.clients), "lagging": len(self.clients.lagging),
                "events": self._published}

    def describe_clients(self) -> list[dict[str, Any]]:
        """Return what there is to say of each client, of at most 1000. Times are in seconds."""
        with self._mutex:
            return self.clients.describe(self._log, self.clock(), self.wall())

    # The end

    def stop(self, seconds: float = STOP_TIME) -> None:
        """Take nothing any more. Clients have so many seconds to take what is in the log."""
        with self._mutex:
            if self._stop_by is None:
                self._stop_by = self.clock() + seconds
        self.wakeup.wake()

    def fail(self, fault: BaseException) -> None:
        """Stop at once, because a thread of the server met a fault."""
        self.fault = self.fault or fault
        self.stop(0.0)

    @property
    def stopping(self) -> bool:
        """Whether nothing is taken any more."""
        return self._stop_by is not None

    def trouble(self) -> str | None:
        """Return why no event is taken now, or None."""
        ended = "a fault has ended the server" if self.fault else "the server is stopped"
        return ended if self.stopping else None

    def check_running(self) -> None:
        """Raise NotRunning if nothing is taken any more."""
        if self.stopping:
            raise NotRunning(Hub.trouble(self))

    def refuse_inside(self) -> None:
        """Raise RuntimeError in a signal handler whose thread was in the middle of another call.

        What that call has begun is only half done, and its thread cannot go on before the handler
        returns.
        """
        if self.clients.is_mutex_held():
            raise RuntimeError("a signal handler interrupted a call of the server's by another: "
                               "let it set a flag instead")

    # Called by the publisher thread

    def has_work(self) -> bool:
        """Return whether there is work. If not, whoever brings some wakes the publisher."""
        with self._mutex:
            self._woken = self.fanned_out < self._log.next or bool(self.clients.joining)
            return self._woken

    def next_work(self) -> tuple[list[Client], list[Frame]]:
        """Return some of the clients that join, and the next batch of frames to fan out."""
        with self._mutex:
            # In a burst of events, this saves a system call for each of them.
            self._woken = True
            run, _ = self._log.collect(self.fanned_out, self._log.next)
            return self.clients.joining[:CLIENTS_PER_TURN], run

    def fanned_out_to(self, run: Sequence[Frame]) -> None:
        """Note that these frames were fanned out, and let those that wait for clients look."""
        with self._mutex:
            if run:
                self.fanned_out, self.fanned_out_id = run[-1].number + 1, run[-1].newest_id
            # The next turn has other batches, and these may hold 64 MiB that the log has evicted.
            self._log.batch.cache_clear()
            self._changed.notify_all()

    def next_batch(self, client: Client) -> tuple[Batch, int, bool]:
        """Return what follows a client's unsent bytes; see Client.next_batch.

        That is nothing as long as those bytes fill a batch by themselves.
        """
        lagging = self.clients.lagging
        with self._mutex:
            # All others that lag are served before this one is served again.
            if client in lagging:
                lagging[client] = lagging.pop(client)
            if len(client.unsent) >= frames.BATCH:
                return Batch((), True), client.cursor, False
            return client.next_batch(self._log, self.fanned_out)

    def done(self) -> bool:
        """Return whether the publisher may end: nothing is left to be sent, or time is up."""
        with self._mutex:
            if self._stop_by is None:
                return False
            busy = self.fanned_out < self._log.next or self.clients.joining or self.clients.lagging
            return not busy or self.clock() >= self._stop_by

    def close(self) -> list[Client]:
        """Take nothing any more, and return all clients, whose sockets the caller closes."""
        self.stop(0.0)
        with self._mutex:
            self._closed = True
            return self.clients.remove_all()
