"""The clients: what each has been sent, and which of them still need something.

A client is a socket and a cursor, the number of the next frame that it is due. From its
registration on it belongs to the publisher thread, which moves it along the log:

    joining     It was registered, and the publisher has not greeted it yet.
    current     It has had every frame. Its group is sent the next ones, and its cursor is not kept
                up: only the number of frames that were fanned out counts.
    lagging     Its socket would not take all. It reads the log from its own cursor, and becomes
                current when it has caught up.

The table lists all clients, and apart from that those that join and those that lag. Whoever
publishes and waits for slow clients looks only at these two.

Other threads read cursors, under the mutex, while the publisher moves them without it. An old value
does no harm, because cursors only grow: a frame is kept a moment longer than it is needed.
"""
from __future__ import annotations

import math
import socket
import threading
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, NamedTuple

from sse_core.engine import frames
from sse_core.engine.frames import Id
from sse_core.engine.log import NOTHING, Batch, Bytes, Frame, Log
from sse_core.engine.pace import Pace

# Clients that are greeted in one turn of the publisher, and lagging ones that are served, before it
# looks for new events again.
CLIENTS_PER_TURN = 256

# Clients that are described one by one, at most.
MAX_LISTED = 1000


class Subscription(NamedTuple):
    """What a client asked for. Clients that asked for the same are sent the same bytes."""

    channels: frozenset[str]

    # False for a client of HTTP/1.0, which knows no chunks.
    chunked: bool

    def framed(self, chunk: bytes) -> bytes:
        """Return a chunk as such a client gets it."""
        return chunk if self.chunked else bytes(frames.unchunk(chunk))


class StreamRequest(NamedTuple):
    """A stream that is to be opened: its head, the subscription, and where it begins."""

    # The head of the HTTP answer.
    head: bytes

    subscription: Subscription

    # It begins after the event with this id. None: with the next event.
    last_id: str | None = None

    # It begins with the events from this time on, in milliseconds since 1970, of which `last_id` is
    # then the text. Infinity: with the newest event of each channel, see Log.latest.
    since: float | None = None

    # When the stream ends because its token expires, in seconds since 1970. This is no part of the
    # subscription, so that a thousand clients with tokens of their own are still one group.
    ends_at: float = math.inf

    # When it was asked for, on the monotonic clock. Only a store needs to know.
    came_at: float = 0.0


class Gap(NamedTuple):
    """What a client has to be told before it is sent anything else."""

    # The id up to which the client has everything, or what it brought in place of one.
    after: str | None

    # `evicted`, `unknown` or `lagging`.
    reason: str

    # The client's own id, if it has one.
    own: Id | None


class Client:
    """One connected socket and its cursor. Only the publisher thread changes it."""

    # Without a dict of attributes, an idle client takes less memory.
    __slots__ = ("sock", "peer", "subscription", "registered_at", "cursor", "unsent",
                 "delivered_id", "gap", "ends_at", "sent_at", "received")

    def __init__(self, sock: socket.socket, peer: str, stream_request: StreamRequest,
                 registered_at: float = 0.0) -> None:
        self.sock = sock

        # Its address, for the log. A socket that was reset does not know it any more.
        self.peer = peer

        self.subscription = stream_request.subscription

        # On the monotonic clock.
        self.registered_at = registered_at

        # The number of the next frame it is due. Not kept up while it is current.
        self.cursor = 0

        # Bytes that are due before that frame: the head of the answer, the rest of a frame.
        self.unsent: Bytes = stream_request.head

        # It has had everything up to this id. NOTHING if that is not known.
        self.delivered_id = NOTHING

        # What it must be told before the frame at its cursor.
        self.gap: Gap | None = None

        # On the wall clock; infinite without a token that expires.
        self.ends_at = stream_request.ends_at

        # When its socket last took a byte, or would not take all. Not kept up while it is current:
        # then `Group.sent_at` counts, too.
        self.sent_at = 0.0

        # Bytes that it has sent after its request.
        self.received = 0

    # With the mutex of the log held

    def begin(self, log: Log, stream_request: StreamRequest, retry: float,
              heartbeat: float) -> None:
        """Set where the stream begins, and what is sent before the frames from there on.

        retry, heartbeat: seconds, which the client is told.
        """
        self.cursor, self.delivered_id = log.next, log.last_id
        if not log.has_ids:
            return
        begin = [frames.welcome(log.last_id, retry, heartbeat)]
        if stream_request.last_id is not None:
            begin = [frames.retry_line(retry), *self._locate(log, stream_request)]
        self.unsent = b"".join([self.unsent, *map(self.subscription.framed, begin)])

    def _locate(self, log: Log, stream_request: StreamRequest) -> list[bytes]:
        """Set the cursor behind the id or the time that the client brought, and its gap, if any.

        Returns frames that are sent before the one at the cursor.
        """
        channels, own = self.subscription.channels, None
        latest: list[bytes] = []
        if stream_request.since is None:
            own = frames.parse_id(stream_request.last_id or "")
            self.cursor, reason = log.locate(own, channels)
        elif stream_request.since == math.inf:
            latest, self.cursor, reason = log.latest(channels)
        else:
            self.cursor, reason = log.locate_time(stream_request.since, channels)
        self.delivered_id = own or NOTHING
        self.gap = Gap(stream_request.last_id, reason, own) if reason else None
        return latest

    def next_batch(self, log: Log, fanned_out: int) -> tuple[Batch, int, bool]:
        """Return the next batch, the cursor after it, and whether its first frame tells a gap.

        fanned_out: the number of the frame up to which the client reads.

        A gap names the event with which the client goes on, so it waits until that has been found.
        It is made anew if the socket takes nothing of it.
        """
        channels, chunked = self.subscription
        # Frames before the first one have been evicted.
        start = max(self.cursor, log.first)
        if start > self.cursor and not self.gap and log.has_lost(self.cursor, channels):
            own = self.delivered_id if log.has_ids and self.delivered_id > NOTHING else None
            self.gap = Gap(frames.format_id(own), "lagging", own)
        batch, end = log.batch(start, max(start, fanned_out), channels, chunked)
        is_found = batch.frames or end >= fanned_out
        if not self.gap or not is_found:
            return batch, end, False
        told = self._gap_frame(log, self.gap, start)
        return Batch([told, *batch.frames], chunked), end, True

    def _gap_frame(self, log: Log, gap: Gap, start: int) -> Frame:
        """Return a frame that tells the gap, before the client goes on at `start`.

        The client has it to itself. It moves the cursor, but not the id of what was delivered.
        """
        resumed = frames.format_id(log.first_id(start, self.subscription.channels))
        payload = frames.gap_payload(gap.after, resumed, gap.reason, gap.own)
        chunk = frames.chunk(log.with_line_ends(payload))
        return Frame(start - 1, None, self.delivered_id, None, 0.0, chunk)

    # For the publisher thread

    def advance(self, batch: Batch, end: int, sent: int) -> int:
        """Move over the frames that `sent` bytes of a batch begin, and return how many they are.

        end: the cursor after the whole batch. It can be beyond frames that the client does not
        want.
        """
        begun, self.unsent = batch.cut(sent)
        if begun:
            last = batch.frames[begun - 1]
            self.cursor, self.delivered_id = last.number + 1, last.newest_id
        if sent == len(batch.data):
            self.cursor = end
        return begun


class Clients:
    """The table of all registered clients.

    mutex: the hub's, which guards all in here. patience: seconds, as of SSEServer.
    """

    def __init__(self, mutex: threading.RLock, patience: float) -> None:
        self._mutex = mutex

        # For which of the lagging clients a publisher waits.
        self.pace = Pace(patience)

        # An ordered set: the values mean nothing.
        self._all: dict[Client, None] = {}

        # Those that the publisher has not greeted yet, oldest first.
        self.joining: list[Client] = []

        # An ordered set: the one that was served longest ago comes first. Only the publisher thread
        # changes it, and reads it without the mutex.
        self.lagging: dict[Client, None] = {}

    def __len__(self) -> int:
        """Return how many clients there are. Any thread may ask, without the mutex."""
        return len(self._all)

    def is_mutex_held(self) -> bool:
        """Return whether the calling thread holds the mutex."""
        # As threading.Condition itself asks.
        return self._mutex._is_owned()  # type: ignore[attr-defined, no-any-return]

    def assert_mutex_is_held(self) -> None:
        """Fail if the calling thread does not hold the mutex."""
        assert self.is_mutex_held(), "hold the mutex"

    # With the mutex held

    def add(self, client: Client) -> None:
        """Add a client, which joins."""
        self.assert_mutex_is_held()
        self._all[client] = None
        self.joining.append(client)

    def remove_all(self) -> list[Client]:
        """Remove all clients, and return them."""
        clients, self._all, self.joining, self.lagging = [*self._all], {}, [], {}
        return clients

    def oldest_needed(self, fanned_out: int, now: float) -> int:
        """Return the number of the oldest frame that a client needs which is waited for.

        fanned_out: the number that counts for all current clients.
        """
        return min([fanned_out, *(client.cursor for client in self._awaited(now))])

    def all_have(self, end: int, now: float) -> bool:
        """Return whether those that are waited for have all before the frame with this number.

        A client whose last frame is not sent whole stands behind it already.
        """
        return all(client.cursor - bool(client.unsent) >= end for client in self._awaited(now))

    def _awaited(self, now: float) -> Iterator[Client]:
        """Yield the clients that are not current, and keep the pace if they lag."""
        self.assert_mutex_is_held()
        lagging = (client for client in self.lagging if self.pace.waits_for(client, now))
        return chain(lagging, self.joining)

    def describe(self, log: Log, now: float, wall: float) -> list[dict[str, Any]]:
        """Return what there is to say of clients, MAX_LISTED at most, the lagging ones first.

        now, wall: the same moment, in seconds on the monotonic clock and since 1970.
        """
        others = (client for client in self._all if client not in self.lagging)
        return [{"peer": client.peer, "since": round(wall - now + client.registered_at, 3),
                 "channels": len(client.subscription.channels), **self._lag(client, log, now)}
                for client in islice(chain(self.lagging, others), MAX_LISTED)]

    def _lag(self, client: Client, log: Log, now: float) -> dict[str, float]:
        """Return how many frames a client is behind, and how old the first of them is."""
        due = max(client.cursor, log.first)
        if client not in self.lagging or due >= log.next:
            return {"lag_frames": 0, "lag_seconds": 0.0}
        return {"lag_frames": log.next - client.cursor,
                "lag_seconds": round(now - log.frame(due).time, 3)}

    # For the publisher thread, which does not hold the mutex

    def remove_joining(self, number: int) -> None:
        """Note that so many clients were greeted. Each is current or lagging by now.

        Until then they were among those that join, so a publisher waited for them all the time.
        """
        with self._mutex:
            del self.joining[:number]

    def mark_lagging(self, client: Client, now: float) -> None:
        """Note that a client reads on from its own cursor."""
        with self._mutex:
            self.pace.fall_behind(client, now)
            self.lagging[client] = None

    def count_taken(self, client: Client, size: int, now: float) -> None:
        """Note how many bytes a lagging client has taken."""
        with self._mutex:
            self.pace.pay(client, size, client.cursor, now)

    def mark_current(self, client: Client, now: float) -> None:
        """Note that a lagging client has had everything."""
        with self._mutex:
            del self.lagging[client]
            self.pace.catch_up(client, now)

    def remove(self, client: Client) -> None:
        """Remove a client that is gone."""
        with self._mutex:
            self.lagging.pop(client, None)
            self.pace.forget(client)
            del self._all[client]
