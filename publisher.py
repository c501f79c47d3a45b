"""Turn the log into sends: what is new is joined once, and every client is a cursor along the log.

All that is in here belongs to the publisher thread: the sockets that are registered, none of which
ever blocks, their clients, the groups, the selector. What it shares with other threads, the log
and the list of clients, is in sse_core/engine/hub.py. The life of a client:

    registered      by a connection: it is listed, and joins
    greeted         it was sent the head of its stream and, if it resumes, what it missed
    current         it has had every frame, and is sent the next ones together with its group
    lagging         its socket did not take all: it reads on from its own cursor, when that does
    dropped         it closed, was reset, acknowledged nothing for 30 s, went on sending, cannot be
                    watched, or its token has expired: then its stream is ended in order
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
from sse_core.engine.clients import CLIENTS_PER_TURN, Client, Subscription
from sse_core.engine.groups import Group, Groups
from sse_core.engine.hub import POLL_INTERVAL, Broadcast
from sse_core.engine.log import Batch, Bytes, Frame
from sse_core.engine.stalls import Stalls

# Bytes of batches that are joined in one turn and kept for the next client that wants the same
MAX_JOINED = 4 << 20
# Bytes that a frame takes in a batch beside its own, at most
FRAME_COST = 200
SWEEP_INTERVAL = 1.0             # seconds between two looks for silent and stalled clients, at most

# Bytes that a client may send after its request
MAX_INPUT = 64 << 10
CLOSED, RESET, STALLED, UNWATCHED, EXPIRED, FLOODING = REASONS = (      # of drops
    "closed", "reset", "stalled", "unwatched", "expired", "flooding")
READ, BOTH = selectors.EVENT_READ, selectors.EVENT_READ | selectors.EVENT_WRITE

# Lets a thread that shares the core and makes more work go on first: of 3000 connects in a row, 50
# were greeted in a turn then instead of 3, at 15 % less CPU. 0.3 us where there is no such thread
_yield = getattr(os, "sched_yield", lambda: None)

logger = logging.getLogger("sse_server")


class Publisher:
    """Fan one log out to all registered clients."""

    def __init__(self, broadcast: Broadcast) -> None:
        self._broadcast = broadcast
        self._clients = broadcast.clients
        self._clock = broadcast.clock
        # Any thread may read these. Deliveries: frames begun, and gaps: told, over all clients
        self.counters = SimpleNamespace(deliveries=0, bytes=0, gaps=0, turns=0, turn_seconds=0.0,
                                        drops=dict.fromkeys(REASONS, 0))
        self._heartbeat = heartbeat = broadcast.heartbeat
        self._groups = Groups()
        self._stalls = Stalls(broadcast.clients)
        self._sweep_every = min(SWEEP_INTERVAL, heartbeat / 8) if heartbeat else SWEEP_INTERVAL
        self._sweep_at = self._clock() + self._sweep_every
        self._selector = selectors.DefaultSelector()
        self._selector.register(broadcast.wakeup.open(), READ)

    # Called from any thread

    def figures(self) -> dict[str, Any]:
        """Return all that is counted, for `/-/metrics`, `/-/status` and the status line."""
        counters = self.counters
        return {**self._broadcast.figures(), **vars(counters), "drops": dict(counters.drops),
                "turn_seconds": round(counters.turn_seconds, 6)}

    # Run by the publisher thread

    def run(self) -> None:
        """Do rounds until nothing is left to be sent after `Broadcast.stop`, or time is up."""
        try:
            self._broadcast.forbid_waiting()
            while not self._broadcast.done():
                longest = POLL_INTERVAL if self._broadcast.stopping else math.inf
                self.turn(min(longest, max(0.0, self._sweep_at - self._clock())))
        except BaseException:       # a stream may be in the middle of a frame: none is ended
            self._groups = Groups()
            raise
        finally:
            self.close()

    def turn(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for work, then do one round of it. Public for tests.

        That is one batch of frames and some hundreds of clients, so a backlog delays neither joins
        nor drops, and clients that lag delay no event.
        """
        _yield()
        ready = self._selector.select(0 if self._broadcast.has_work() else timeout)
        began = self._clock()
        self._serve(ready)
        joining, run = self._broadcast.next_work()
        if run:
            self._fan_out(run)
        self._broadcast.fanned_out_to(run)
        for client in joining:
            self._greet(client)
        if joining:
            self._clients.remove_joining(len(joining))
        if self._clock() >= self._sweep_at:
            self._sweep()
        self.counters.turns += 1
        self.counters.turn_seconds += self._clock() - began

    def _serve(self, ready: list[tuple[selectors.SelectorKey, int]]) -> None:
        """Discard what clients send; advance those whose sockets take more, in their turn."""
        writable: set[Client] = set()
        for key, mask in ready:
            client = key.data
            if client is None:
                self._broadcast.wakeup.clear()
            elif (not mask & READ or self._discard_input(client)) and mask & ~READ:
                writable.add(client)
        if writable:
            in_turn = filter(writable.__contains__, self._clients.lagging)
            for client in list(islice(in_turn, CLIENTS_PER_TURN)):
                self._advance(client)

    def _fan_out(self, run: Sequence[Frame]) -> None:
        """Send frames to the current clients of all who want them; equal bytes are joined once.

        With thousands of different subscriptions, joined batches are dropped beyond MAX_JOINED
        bytes, and those that are wanted again are joined anew.
        """
        by_channel: dict[str | None, list[Frame]] = {}
        for frame in run:
            by_channel.setdefault(frame.channel, []).append(frame)
        named = frozenset(channel for channel in by_channel if channel)
        batches: dict[Subscription, Batch] = {}
        joined = 0
        for group in self._groups.wanting(by_channel):
            channels = group.subscription.channels & named if named else named
            key = Subscription(channels, group.subscription.chunked)
            if key not in batches:
                if joined > MAX_JOINED:
                    batches, joined = {}, 0
                wanted = [by_channel.get(channel, ()) for channel in (None, *channels)]
                batches[key] = batch = Batch(sorted(chain.from_iterable(wanted)), key.chunked)
                joined += len(batch.data) + FRAME_COST * (1 + len(batch.frames))
            self._send_to_group(group, batches[key])

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
        group.sent_at = self._clock()
        self.counters.bytes += whole * size
        self.counters.deliveries += whole * len(batch.frames)
        for client, sent in short:
            if sent < 0:
                self._drop(client, RESET)
            else:
                self._fall_behind(client, batch, sent)

    def _fall_behind(self, client: Client, batch: Batch, sent: int) -> None:
        """Make a current client lagging, `sent` bytes into a batch."""
        client.cursor, client.delivered_id = batch.frames[0].number, self._broadcast.fanned_out_id
        self._watch(client)
        self.counters.bytes += sent
        self.counters.deliveries += client.advance(batch, client.cursor, sent)

    def _watch(self, client: Client) -> None:
        """Have a client read on from its own cursor, whenever its socket takes more."""
        client.sent_at = self._clock()
        self._clients.mark_lagging(client, client.sent_at)
        self._groups.current_in_group_of(client).pop(client, None)
        self._stalls.check_soon(client)
        self._selector.modify(client.sock, BOTH, client)

    def _greet(self, client: Client) -> None:
        """Send a new client its head and, if it resumes, the first batch of what it missed."""
        self._groups.join(client)
        try:
            self._selector.register(client.sock, READ, client)
        except OSError:         # the system watches no more sockets
            self._drop(client, UNWATCHED)
            return
        logger.debug("%s connected", client.peer)
        self._advance(client)

    def _advance(self, client: Client) -> None:
        """Send a client that is not current what it is due: its unsent, a gap, one batch."""
        unsent = client.unsent
        batch, end, tells_gap = self._broadcast.next_batch(client)
        both = b"".join((unsent, batch.data)) if unsent and batch.data else unsent or batch.data
        sent = self._send(client, both)
        if sent < 0:
            return
        if sent < len(unsent):
            client.unsent = memoryview(unsent)[sent:]
        else:
            begun = client.advance(batch, end, sent - len(unsent))
            if begun and tells_gap:
                client.gap = None
                self.counters.gaps += 1
                begun -= 1
            self.counters.deliveries += begun
        self._settle(client)

    def _settle(self, client: Client) -> None:
        """Sort a client among those that lag, or those that are current."""
        lags = client in self._clients.lagging
        # It can be beyond the fan-out, if it joined while there was more to do
        is_current = client.cursor == self._broadcast.fanned_out
        if client.unsent or client.gap or not is_current:
            if not lags:
                self._watch(client)
            return
        if lags:
            self._selector.modify(client.sock, READ, client)
            self._clients.mark_current(client, self._clock())
        self._groups.current_in_group_of(client)[client] = None

    def _send(self, client: Client, data: Bytes) -> int:
        """Send what the socket takes, and return how much that was; -1 if the client is gone."""
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
        """Throw away what a client sends after its request. Returns False if it is dropped."""
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

    def _sweep(self) -> None:
        """Drop stalled clients; send a comment to those that were sent nothing for a while."""
        now, wall = self._clock(), self._broadcast.wall()
        self._sweep_at = now + self._sweep_every
        # 0.1 to 0.3 ms for 10,000 clients
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
        """Send a current client a comment."""
        client.cursor = self._broadcast.fanned_out
        client.delivered_id = self._broadcast.fanned_out_id
        client.unsent = client.subscription.framed(frames.HEARTBEAT)
        self._advance(client)

    def _drop(self, client: Client, reason: str) -> None:
        if reason != UNWATCHED:
            self._selector.unregister(client.sock)
        client.sock.close()
        self.counters.drops[reason] += 1
        self._stalls.forget(client)
        self._clients.remove(client)
        self._groups.leave(client)
        level = logging.WARNING if reason in (STALLED, UNWATCHED) else logging.DEBUG
        logger.log(level, "%s dropped: %s", client.peer, reason)

    def _end(self, client: Client) -> bool:
        """End a stream in order, unless it is in the middle of a frame. False: it was gone."""
        if client.unsent:
            return True
        is_there = self._send(client, frames.END if client.subscription.chunked else b"") >= 0
        if is_there:
            with suppress(OSError):     # the peer has closed just now
                # Over TLS this sends close_notify: without it an end could be a cut
                client.sock.shutdown(socket.SHUT_WR)
        return is_there

    def close(self) -> None:
        """End the streams of all that are not in the middle of a frame, and close all sockets."""
        for client in [client for group in self._groups for client in group.current]:
            self._end(client)
        for client in self._broadcast.close():
            client.sock.close()
        self._selector.close()
        self._broadcast.wakeup.close()
