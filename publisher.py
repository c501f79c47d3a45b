"""Turn the log into sends: what is new is joined once, and every client is a cursor along the log.

The life of a client:

    joining     A connection registered it. The next turn greets it: it is sent the head of its
                stream and, if it resumes, the first batch of what it missed.
    current     It has had every frame. All current clients of a group are sent the next frames
                together, as the same bytes.
    lagging     Its socket did not take all. The selector tells when it takes more. Then the client
                reads the next batch from its own cursor, until it is current again.
    dropped     It closed, was reset, acknowledged nothing for 30 s, sent too much, or cannot be
                watched. Or its token has expired: then its stream is ended in order first,
                unless it is in the middle of a frame.

A turn does a bounded amount of each kind of work: one batch of frames, and some hundreds of clients
that join or lag. So a burst of events costs one send for each client, a slow client delays nobody,
and a backlog delays neither joins nor drops.

The publisher thread owns all in here: the sockets of clients, none of which ever blocks, the
clients themselves, their groups, the selector. What it shares with other threads, the log and the
table of clients, is in the hub (sse_core/engine/hub.py).
"""
from __future__ import annotations

import logging
import math
import os
import selectors
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from types import SimpleNamespace
from typing import Any

from sse_core.engine import frames
from sse_core.engine.clients import CLIENTS_PER_TURN, Client
from sse_core.engine.groups import Group, Groups
from sse_core.engine.hub import POLL_INTERVAL, Hub
from sse_core.engine.log import Batch, Bytes, Frame
from sse_core.engine.stalls import Stalls

# Seconds between two sweeps for silent and stalled clients and expired tokens, at most.
SWEEP_INTERVAL = 1.0

# Bytes that a client may send after its request. It has nothing to say then, but some proxies and
# libraries send a little. Two clients that sent without end cost 70 % of a core.
MAX_INPUT = 64 << 10

# Why a client was dropped, as metrics name it: it closed the connection, it was reset, it
# acknowledged nothing for too long, the system could not watch its socket, its token has expired,
# or it sent more than MAX_INPUT.
CLOSED, RESET, STALLED, UNWATCHED, EXPIRED, FLOODING = REASONS = (
    "closed", "reset", "stalled", "unwatched", "expired", "flooding")

# What a current client is watched for, and what a lagging one is.
READ, BOTH = selectors.EVENT_READ, selectors.EVENT_READ | selectors.EVENT_WRITE

# Lets a thread that makes more work, and shares the core, go on first. Of 3,000 connects in a row,
# 50 were greeted in a turn then instead of 3, at 15 % less CPU. 0.3 us where there is no such
# thread.
_yield = getattr(os, "sched_yield", lambda: None)

logger = logging.getLogger("sse_server")


class Publisher:
    """Send what is in the log of a hub to all clients of the hub."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._clients = hub.clients

        # Monotonic seconds.
        self._clock = hub.clock

        # Over all clients: frames begun, bytes sent, gaps told, drops by reason. Any thread may
        # read them.
        self.counters = SimpleNamespace(deliveries=0, bytes=0, gaps=0, turns=0, turn_seconds=0.0,
                                        drops=dict.fromkeys(REASONS, 0))

        # The current clients, by what they are sent.
        self._groups = Groups()

        self._stalls = Stalls(hub.clients)

        # Seconds of silence after which a client is sent a comment; 0: never.
        self._heartbeat = heartbeat = hub.heartbeat

        # Seconds from one sweep to the next, and when that is. A comment is late by an eighth at
        # most.
        self._sweep_every = min(SWEEP_INTERVAL, heartbeat / 8) if heartbeat else SWEEP_INTERVAL
        self._sweep_at = self._clock() + self._sweep_every

        # The data of each socket is its client; that of the wake-up is None.
        self._selector = selectors.DefaultSelector()
        self._selector.register(hub.wakeup.open(), READ)

    def stats(self) -> dict[str, Any]:
        """Return all that is counted, for `/-/metrics`, `/-/status` and the status line.

        Any thread may call it.
        """
        counters = self.counters
        return {**self._hub.stats(), **vars(counters), "drops": dict(counters.drops),
                "turn_seconds": round(counters.turn_seconds, 6)}

    # For the publisher thread

    def run(self) -> None:
        """Take turns until the hub is stopped and has nothing left to send, or time is up."""
        try:
            self._hub.forbid_waiting()
            while not self._hub.done():
                longest = POLL_INTERVAL if self._hub.stopping else math.inf
                self.turn(min(longest, max(0.0, self._sweep_at - self._clock())))
        except BaseException:
            # A stream may be in the middle of a frame. So none is ended in order.
            self._groups = Groups()
            raise
        finally:
            self.close()

    def turn(self, timeout: float) -> None:
        """Wait for work, at most `timeout` seconds, then do one round of it.

        Tests take turns by themselves.
        """
        _yield()
        ready = self._selector.select(0 if self._hub.has_work() else timeout)
        began = self._clock()
        self._serve(ready)
        joining, run = self._hub.next_work()
        self._fan_out(run)
        self._hub.fanned_out_to(run)
        for client in joining:
            self._greet(client)
        self._clients.remove_joining(len(joining))
        if self._clock() >= self._sweep_at:
            self._sweep()
        self.counters.turns += 1
        self.counters.turn_seconds += self._clock() - began

    def close(self) -> None:
        """End all streams that are not in the middle of a frame, and close all sockets.

        If the publisher thread was never started, another thread may call it.
        """
        for client in [client for group in self._groups for client in group.current]:
            self._end(client)
        for client in self._hub.close():
            client.sock.close()
        self._selector.close()
        self._hub.wakeup.close()

    # Fan-out to current clients

    def _fan_out(self, run: Sequence[Frame]) -> None:
        """Send frames to the current clients of every group that wants some of them."""
        for group, batch in self._groups.batches(run):
            self._send_to_group(group, batch)

    def _send_to_group(self, group: Group, batch: Batch) -> None:
        """Send a batch to all current clients of a group.

        The loop over the clients is the hot path of the server: nothing in it is done that can be
        done once for all of them, or for those alone whose sockets did not take everything.
        """
        data, size = batch.data, len(batch.data)
        short = []
        for client in group.current:
            try:
                sent = client.sock.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                # It was reset. The fan-out to the others goes on.
                sent = -1
            if sent != size:
                short.append((client, sent))
        whole = len(group.current) - len(short)
        group.sent_at = self._clock()
        self.counters.bytes += whole * size
        self.counters.deliveries += whole * len(batch.frames)
        for client, sent in short:
            if sent < 0:
                self._drop(client, RESET)
            else:
                self._fall_behind(client, batch, sent)

    def _fall_behind(self, client: Client, batch: Batch, sent: int) -> None:
        """Make a current client lagging, whose socket took `sent` bytes of a batch."""
        client.cursor, client.delivered_id = batch.frames[0].number, self._hub.fanned_out_id
        self._watch(client)
        self.counters.bytes += sent
        self.counters.deliveries += client.advance(batch, client.cursor, sent)

    # Clients that join or lag

    def _greet(self, client: Client) -> None:
        """Send a new client its head and, if it resumes, the first batch of what it missed."""
        self._groups.join(client)
        try:
            self._selector.register(client.sock, READ, client)
        except OSError:
            # The system watches no more sockets.
            self._drop(client, UNWATCHED)
            return
        logger.debug("%s connected", client.peer)
        self._advance(client)

    def _serve(self, ready: list[tuple[selectors.SelectorKey, int]]) -> None:
        """Discard what clients have sent, and let lagging ones read on whose sockets have room.

        At most CLIENTS_PER_TURN of these are served, those first that have waited longest.
        """
        writable: set[Client] = set()
        for key, mask in ready:
            client = key.data
            if client is None:
                self._hub.wakeup.clear()
            # One that closed is dropped here, and must not be served after that.
            elif (not mask & READ or self._discard_input(client)) and mask & ~READ:
                writable.add(client)
        if writable:
            in_turn = filter(writable.__contains__, self._clients.lagging)
            for client in list(islice(in_turn, CLIENTS_PER_TURN)):
                self._advance(client)

    def _advance(self, client: Client) -> None:
        """Send a client what it is due by itself: its unsent bytes and a batch, in one send."""
        unsent = client.unsent
        batch, end, tells_gap = self._hub.next_batch(client)
        both = b"".join((unsent, batch.data)) if unsent and batch.data else unsent or batch.data
        sent = self._send(client, both)
        if sent < 0:
            return
        if sent < len(unsent):
            client.unsent = memoryview(unsent)[sent:]
        else:
            begun = client.advance(batch, end, sent - len(unsent))
            # A gap of which nothing was sent stays due, and is made anew then.
            if begun and tells_gap:
                client.gap = None
                self.counters.gaps += 1
                begun -= 1
            self.counters.deliveries += begun
        self._settle(client)

    def _settle(self, client: Client) -> None:
        """Sort a client, after a send, among those that lag or those that are current."""
        is_lagging = client in self._clients.lagging
        # The cursor can also be beyond the fan-out, if the client joined amid a backlog.
        is_level = client.cursor == self._hub.fanned_out
        if client.unsent or client.gap or not is_level:
            if not is_lagging:
                self._watch(client)
            return
        if is_lagging:
            self._selector.modify(client.sock, READ, client)
            self._clients.mark_current(client, self._clock())
        self._groups.current_in_group_of(client)[client] = None

    def _watch(self, client: Client) -> None:
        """Make a client lagging: it reads on whenever its socket has room."""
        client.sent_at = self._clock()
        self._clients.mark_lagging(client, client.sent_at)
        self._groups.current_in_group_of(client).pop(client, None)
        self._stalls.check_soon(client)
        self._selector.modify(client.sock, BOTH, client)

    def _send(self, client: Client, data: Bytes) -> int:
        """Send what the socket takes, and return how many bytes that was.

        -1: the client was reset, and is dropped.
        """
        try:
            sent = client.sock.send(data) if data else 0
        except BlockingIOError:
            return 0
        except OSError:
            self._drop(client, RESET)
            return -1
        if sent:
            client.sent_at = self._clock()
            if client in self._clients.lagging:
                self._clients.count_taken(client, sent, client.sent_at)
            self.counters.bytes += sent
        return sent

    def _discard_input(self, client: Client) -> bool:
        """Discard what a client has sent after its request. Return False if it is dropped."""
        try:
            received = len(client.sock.recv(MAX_INPUT))
            client.received += received
            reason = CLOSED if not received else FLOODING if client.received > MAX_INPUT else ""
        except BlockingIOError:
            reason = ""
        except OSError:
            reason = RESET
        if reason:
            self._drop(client, reason)
        return not reason

    # What time brings about

    def _sweep(self) -> None:
        """Drop clients that are stalled or whose tokens have expired; send comments to silent ones.
        """
        now, wall = self._clock(), self._hub.wall()
        self._sweep_at = now + self._sweep_every
        # To look at all takes 0.1 to 0.3 ms for 10,000 clients.
        for client in [client for client in self._everyone() if client.ends_at <= wall]:
            if self._end(client):
                self._drop(client, EXPIRED)
        for client in self._stalls.find_stalled(self._everyone, self._sweep_every, now):
            self._drop(client, STALLED)
        if self._heartbeat:
            since = now - self._heartbeat
            silent = [client for group in self._groups if group.sent_at <= since
                      for client in group.current if client.sent_at <= since]
            for client in silent:
                self._beat(client)

    def _everyone(self) -> Iterator[Client]:
        current = chain.from_iterable(group.current for group in self._groups)
        return chain(current, self._clients.lagging)

    def _beat(self, client: Client) -> None:
        """Send a current client a comment. If its socket does not take all, it lags from here."""
        comment = client.subscription.framed(frames.HEARTBEAT)
        sent = self._send(client, comment)
        if 0 <= sent < len(comment):
            client.cursor = self._hub.fanned_out
            client.delivered_id = self._hub.fanned_out_id
            client.unsent = memoryview(comment)[sent:]
            self._watch(client)

    def _end(self, client: Client) -> bool:
        """End a stream in order, unless it is in the middle of a frame.

        Returns False if the client turned out to be gone, and was dropped.
        """
        if client.unsent:
            return True
        is_there = self._send(client, frames.END if client.subscription.chunked else b"") >= 0
        if is_there:
            # Over TLS this sends close_notify, without which the client could take the end for a
            # cut. It fails if the peer has just closed.
            with suppress(OSError):
                client.sock.shutdown(socket.SHUT_WR)
        return is_there

    def _drop(self, client: Client, reason: str) -> None:
        """Close a client's socket and forget the client. reason: one of REASONS."""
        if reason != UNWATCHED:
            self._selector.unregister(client.sock)
        client.sock.close()
        self.counters.drops[reason] += 1
        self._stalls.forget(client)
        self._clients.remove(client)
        self._groups.leave(client)
        # The others are the client's own doing.
        level = logging.WARNING if reason in (STALLED, UNWATCHED) else logging.DEBUG
        logger.log(level, "%s dropped: %s", client.peer, reason)
