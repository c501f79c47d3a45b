"""Keep the registered clients, sorted by what they wait for.

A client belongs to the publisher thread from its registration on. Others read its cursor, under
the mutex, where an old value does no harm, because cursors only grow.
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

# clients greeted, and others served, before there is a look for new events
CLIENTS_PER_TURN = 256
MAX_LISTED = 1000           # clients that are described one by one, at most


class Subscription(NamedTuple):
    """What a client asked for. Those with the same one are sent the same bytes."""
    channels: frozenset[str]
    chunked: bool

    def framed(self, chunk: bytes) -> bytes:
        """Return a chunk as such a client gets it."""
        return chunk if self.chunked else bytes(frames.unchunk(chunk))

    def wants(self, frame: Frame) -> bool:
        """Say whether such a client gets this frame."""
        return frame.channel is None or frame.channel in self.channels


class Opening(NamedTuple):
    """A stream to be opened: its head, what was asked for, and after which id it goes on."""
    head: bytes
    subscription: Subscription
    last_id: str | None = None      # None: it begins with the next event
    since: float | None = None      # or with those of a time, in milliseconds; inf: see Log.latest
    # When the stream ends because its token expires, in seconds since the epoch. It is no part of
    # the subscription: a thousand clients with tokens of their own are still one group.
    ends_at: float = math.inf
    # When it was asked for, on the monotonic clock. Only a store needs to know.
    came_at: float = 0.0


class Gap(NamedTuple):
    """What a client has to be told before it is sent anything else."""

    # The id up to which it has everything, or what it brought in place of one.
    after: str | None

    # `evicted`, `unknown` or `lagging`.
    reason: str

    # The client's own id, if it has one.
    own: Id | None


class Client:
    """One connected socket and its cursor."""
    __slots__ = ("sock", "peer", "subscription", "registered_at", "cursor", "unsent",
                 "delivered_id", "gap", "ends_at", "sent_at", "received")

    def __init__(self, sock: socket.socket, peer: str, opening: Opening) -> None:
        self.sock = sock
        self.peer = peer                    # for the logger: it is not known any more after a reset
        self.subscription = opening.subscription
        self.registered_at = 0.0            # on the monotonic clock
        self.cursor = 0                     # the next frame due; while it is current, not kept up
        # due before that frame: a head, or what is left of one
        self.unsent: Bytes = opening.head
        self.delivered_id = NOTHING                # it has had everything up to this id
        self.gap: Gap | None = None         # to be told first
        self.ends_at = opening.ends_at
        self.sent_at = 0.0                  # when its socket last took a byte, or it fell behind
        self.received = 0                   # bytes that it has sent after its request

    def advance(self, batch: Batch, end: int, sent: int) -> int:
        """Move over the frames that `sent` bytes of a batch begin, and return how many that is.

        end: the cursor after all of them, and after those behind them that it does not want.
        """
        begun, self.unsent = batch.cut(sent)
        if begun:
            last = batch.frames[begun - 1]
            self.cursor, self.delivered_id = last.number + 1, last.newest_id
        if sent == len(batch.data):
            self.cursor = end
        return begun


class Clients:
    """All registered clients: in a list, and apart those that join and those that lag."""

    def __init__(self, mutex: threading.RLock, patience: float) -> None:
        self._mutex = mutex                     # guards all in here
        self.pace = Pace(patience)
        self._all: dict[Client, None] = {}      # ordered set
        self.joining: list[Client] = []         # not yet seen by the publisher
        self.lagging: dict[Client, None] = {}   # ordered: served longest ago first

    def __len__(self) -> int:
        """Return how many clients there are. Any thread may ask, without the mutex."""
        return len(self._all)

    # Requires holding the mutex

    def add(self, client: Client) -> None:
        """Add a client, which joins."""
        self._all[client] = None
        self.joining.append(client)

    def remove_all(self) -> list[Client]:
        """Return all clients, and forget them."""
        clients, self._all, self.joining, self.lagging = [*self._all], {}, [], {}
        return clients

    def _awaited(self, now: float) -> Iterator[Client]:
        """Yield the clients that are not current and keep the pace."""
        lagging = (client for client in self.lagging if self.pace.waits_for(client, now))
        return chain(lagging, self.joining)

    def oldest_needed(self, fanned_out: int, now: float) -> int:
        """Return the number of the oldest frame that must be kept for those who are waited for."""
        return min([fanned_out, *(client.cursor for client in self._awaited(now))])

    def all_have(self, end: int, now: float) -> bool:
        """Say whether those who are waited for have everything before the frame numbered `end`."""
        return all(client.cursor - bool(client.unsent) >= end for client in self._awaited(now))

    def describe(self, log: Log, now: float, wall: float) -> list[dict[str, Any]]:
        """Return what there is to say of clients, the lagging ones first, MAX_LISTED at most."""
        others = (client for client in self._all if client not in self.lagging)
        return [{"peer": client.peer, "since": round(wall - now + client.registered_at, 3),
                 "channels": len(client.subscription.channels), **self._lag(client, log, now)}
                for client in islice(chain(self.lagging, others), MAX_LISTED)]

    def _lag(self, client: Client, log: Log, now: float) -> dict[str, float]:
        due = max(client.cursor, log.first)
        if client not in self.lagging or due >= log.next:
            return {"lag_frames": 0, "lag_seconds": 0.0}
        return {"lag_frames": log.next - client.cursor,
                "lag_seconds": round(now - log.frame(due).time, 3)}

    # Called by the publisher thread, without the mutex

    def remove_joining(self, number: int) -> None:
        """Say that so many have joined: each is sorted by now, and was waited for until then."""
        with self._mutex:
            del self.joining[:number]

    def mark_lagging(self, client: Client, now: float) -> None:
        """Sort a client among those that read on from their own cursor."""
        with self._mutex:
            self.pace.fall_behind(client, now)
            self.lagging[client] = None

    def count_taken(self, client: Client, size: int, now: float) -> None:
        """Say how many bytes a client that lags has taken."""
        with self._mutex:
            self.pace.pay(client, size, client.cursor, now)

    def mark_current(self, client: Client, now: float) -> None:
        """Sort a client that is due nothing."""
        with self._mutex:
            if client in self.lagging:
                del self.lagging[client]
                self.pace.catch_up(client, now)

    def remove(self, client: Client) -> None:
        """Forget a client."""
        with self._mutex:
            self.lagging.pop(client, None)
            self.pace.forget(client)
            del self._all[client]
