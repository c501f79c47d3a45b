"""Turn the log into sends: every event is joined once, every client is a cursor moving along the log.

All that is in this file belongs to the publisher thread: the sockets that are registered, none of which ever blocks,
the clients, the groups, the selector. Only `start`, `join` and the waker are for others, and they may read the figures.
What is shared with other threads, the log and the list of clients, is in sse_core/broadcast.py.

The life of a client:

    registered      by a handshake; in the list of clients, and in that of those who join
    greeted         it was sent the head of its stream and, if it resumes, what it missed
    ahead           it brought an id that this server has not come to yet: it is sent heartbeats until that can be told
    current         it has had every frame, and is sent the next ones together with the others of its group
    lagging         its socket did not take all: it is watched for writability, and reads on from its own cursor
    dropped         it closed, was reset, took no byte for STALL seconds, or could not be watched
"""
import logging
import math
import os
import selectors
import socket
import threading
from itertools import chain, islice
from typing import Callable, Dict, Iterable, List, Sequence, Set, Tuple

from sse_core import frames
from sse_core.broadcast import LOOK, PACE, Broadcast
from sse_core.clients import AT_ONCE, Client, Subscription
from sse_core.groups import Group, Groups
from sse_core.log import Batch, Bytes, Frame

STALL = 30.0            # seconds without a byte taken after which a lagging client is dropped
SWEEP = 1.0             # seconds between two looks for silent and stalled clients, at most
BATCHES_KEPT = 64       # joined in one turn for clients that are not current: those at the same place share them

CLOSED, RESET, STALLED, UNWATCHED = "closed", "reset", "stalled", "unwatched"      # why a client is dropped
READ, BOTH = selectors.EVENT_READ, selectors.EVENT_READ | selectors.EVENT_WRITE

# Lets a thread that shares the core and makes more work go on before the publisher looks for it: of 3000 connects in a
# row, 50 were then greeted in one turn instead of 3, at 15 % less CPU. Costs 0.3 us where there is no such thread.
_yield = getattr(os, "sched_yield", lambda: None)

logger = logging.getLogger("sse_server")


class Counters:
    """What the publisher has done since it began. Any thread may read them."""

    def __init__(self) -> None:
        self.deliveries = 0                 # frames begun, over all clients
        self.bytes = 0
        self.gaps = 0                       # told to one client each
        self.turns = 0
        self.turn_seconds = 0.0             # in all, without the waiting
        self.drops: Dict[str, int] = {CLOSED: 0, RESET: 0, STALLED: 0, UNWATCHED: 0}


class Publisher:
    """Fan one log out to all registered clients, in one thread named `publisher`.

    heartbeat: seconds of silence after which a client is sent a comment; 0: none.
    """

    def __init__(self, broadcast: Broadcast, heartbeat: float = 15.0) -> None:
        if not 0 <= heartbeat < 1 << 31:
            raise ValueError("heartbeat must be a number from 0 on")
        self._broadcast = broadcast
        self._clients = broadcast.clients
        self._clock = broadcast.clock
        self.counters = Counters()
        self._heartbeat = heartbeat
        self._groups = Groups()
        self._ahead: Dict[Client, None] = {}
        self._batches: Dict[Tuple[int, Subscription], Tuple[Batch, int]] = {}      # see _batch_at
        self._sweep_every = min(SWEEP, heartbeat / 8) if heartbeat else SWEEP
        self._sweep_at = self._clock() + self._sweep_every
        self._selector = selectors.DefaultSelector()
        self._waker, self._wakee = socket.socketpair()
        self._waker.setblocking(False)
        self._wakee.setblocking(False)
        self._selector.register(self._wakee, selectors.EVENT_READ)
        broadcast.wake = self._wake

    # Called from any thread

    def abandon(self) -> None:
        """In a forked child, where the thread does not run: close what belongs to it."""
        self._broadcast.abandon()
        self._close_own()

    def figures(self) -> Dict[str, object]:
        """Return all that is counted: what `/-/metrics`, `/-/status` and the status line show."""
        counters = self.counters
        return {**self._broadcast.figures(), "deliveries": counters.deliveries, "bytes": counters.bytes,
                "gaps": counters.gaps, "drops": dict(counters.drops), "turns": counters.turns,
                "turn_seconds": round(counters.turn_seconds, 6)}

    def _wake(self) -> None:
        try:
            self._waker.send(b"\0")
        except BlockingIOError:     # it has bytes enough to wake up from
            pass
        except OSError:             # it has stopped since, and closed the socket
            pass

    # Run by the publisher thread

    def run(self) -> None:
        """Do rounds until there is nothing more to send after `Broadcast.stop`, or no time."""
        self._broadcast.publisher = threading.get_ident()
        try:
            while not self._broadcast.done():
                self.turn(self._idle_time())
        finally:
            self.close()

    def _idle_time(self) -> float:
        """Return for how many seconds there is nothing to do if nothing happens."""
        longest = LOOK if self._ahead or self._broadcast.stopping else math.inf
        return min(longest, max(0.0, self._sweep_at - self._clock()))

    def turn(self, timeout: float) -> None:
        """Wait at most `timeout` seconds for work, then do one round: one batch of frames, some hundreds of clients.

        So a backlog delays neither joins nor drops, and clients that lag delay no event. It is public for tests,
        where no thread runs.
        """
        _yield()
        ready = self._selector.select(0 if self._broadcast.has_work() else timeout)
        began = self._clock()
        self._serve(ready)
        joining, run = self._broadcast.take()
        if run:
            self._fan_out(run)
        self._broadcast.moved(run)
        self._batches.clear()
        for client in joining:
            self._greet(client)
        for client in self._broadcast.place_arrived(self._ahead) if self._ahead else ():
            self._watch(client)
        if self._clock() >= self._sweep_at:
            self._sweep()
        self.counters.turns += 1
        self.counters.turn_seconds += self._clock() - began

    def _serve(self, ready: List[Tuple[selectors.SelectorKey, int]]) -> None:
        """Discard what clients send, and advance those whose sockets take more: those that waited longest for it."""
        writable: Set[Client] = set()
        for key, mask in ready:
            if key.data is None:
                self._wakee.recv(4096)
            elif (not mask & selectors.EVENT_READ or self._discard_input(key.data)) and mask & selectors.EVENT_WRITE:
                writable.add(key.data)
        if writable:
            in_turn = filter(writable.__contains__, self._clients.lagging)
            for client in list(islice(in_turn, AT_ONCE)):
                self._advance(client)

    def _fan_out(self, run: Sequence[Frame]) -> None:
        """Send frames to the current clients of every group that wants them; equal bytes are joined once."""
        named = frozenset([frame.channel for frame in run if frame.channel is not None])
        batches: Dict[Subscription, Batch] = {}
        for group in self._groups.that_want(run):
            channels = group.asked.channels & named if named else named
            key = Subscription(channels, group.asked.chunked)
            if key not in batches:
                batches[key] = Batch([frame for frame in run if key.wants(frame)], key.chunked)
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
        group.bytes += size
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
        client.cursor, client.after = batch.frames[0].number, self._broadcast.newest
        self._watch(client)
        client.bytes -= len(batch.data) - sent      # the group is counted to have had it all
        self.counters.bytes += sent
        self._move_cursor(client, batch, sent)

    def _move_cursor(self, client: Client, batch: Batch, sent: int) -> None:
        """Move a client over the frames of a batch that are begun; what is left of the last becomes its rest."""
        begun, client.rest = batch.cut(sent)
        if begun:
            self.counters.deliveries += begun
            client.cursor, client.after = batch.frames[begun - 1].number + 1, batch.frames[begun - 1].newest

    def _watch(self, client: Client) -> None:
        """Give a client a cursor of its own, and wait for its socket."""
        client.sent_at = self._clock()
        self._ahead.pop(client, None)
        self._clients.set_lagging(client, client.sent_at)
        self._selector.modify(client.sock, BOTH, client)

    def _greet(self, client: Client) -> None:
        """Send a new client its head and, if it resumes, the first batch of what it missed."""
        self._groups.join(client)
        client.sent_at = self._clock()
        try:
            self._selector.register(client.sock, READ, client)
        except OSError:         # the system watches no more sockets
            self._drop(client, UNWATCHED)
            return
        logger.debug("%s connected", client.peer)
        self._advance(client)

    def _advance(self, client: Client) -> None:
        """Send a client that is not current what it is due: its rest, a gap, one batch from its cursor."""
        rest = client.rest
        told, batch, start, end = self._broadcast.due(client, lambda cursor: self._batch_at(cursor, client.asked))
        parts = [part for part in (rest, told, batch.data) if part]
        sent = self._send(client, parts[0] if len(parts) == 1 else b"".join(parts))
        if sent < 0:
            return
        if sent < len(rest):
            client.rest = memoryview(rest)[sent:]
        else:
            self._move(client, told, batch, start, end, sent - len(rest))
        self._settle(client)

    def _move(self, client: Client, told: bytes, batch: Batch, start: int, end: int, sent: int) -> None:
        """Move a client on that has its rest, and `sent` bytes of what followed that."""
        client.rest = b""
        if told and not sent:       # it is told anew, as it is then
            return
        client.cursor = start
        if told:
            client.gap = None
            self.counters.gaps += 1
        if sent < len(told):
            client.rest = told[sent:]
            return
        self._move_cursor(client, batch, sent - len(told))
        if sent == len(told) + len(batch.data):
            client.cursor = end     # beyond frames that it does not want, too

    def _settle(self, client: Client) -> None:
        """Sort a client that was just advanced."""
        lagging = client in self._clients.lagging
        # It can be beyond the fan-out, if it joined while there was more to do
        if client.rest or client.gap or not client.ahead and client.cursor != self._broadcast.fanned_out:
            if not lagging:
                self._watch(client)
            return
        if lagging:
            self._selector.modify(client.sock, READ, client)
        if client.ahead:
            self._clients.set_aside(client)
            self._ahead[client] = None
        else:
            self._clients.set_current(client)

    def _batch_at(self, cursor: int, asked: Subscription) -> Tuple[Batch, int]:
        """Return the batch from this cursor on and the cursor after it, joined once for all clients that are there."""
        found = self._batches.get((cursor, asked))
        if found is None:
            if len(self._batches) >= BATCHES_KEPT:
                self._batches.clear()
            run, end = self._broadcast.collect(cursor, asked.wants)
            found = self._batches[cursor, asked] = Batch(run, asked.chunked), end
        return found

    def _send(self, client: Client, data: Bytes) -> int:
        """Send what the socket takes and return how much that was; -1 if the client was dropped."""
        try:
            sent = client.sock.send(data) if data else 0
        except BlockingIOError:
            return 0
        except OSError:
            self._drop(client, RESET)
            return -1
        if sent:
            now = client.sent_at = self._clock()
            if client.awaited_until > now:
                client.awaited_until = min(client.awaited_until + sent / PACE, now + self._broadcast.credit)
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
        for client in list(islice(self._clients.lagging, AT_ONCE)):
            if now - client.sent_at >= STALL:
                self._drop_if_stalled(client)
        if self._heartbeat:
            silent_since = now - self._heartbeat
            silent = [client for group in self._groups if group.sent_at <= silent_since
                      for client in group.current if client.sent_at <= silent_since]
            for client in silent + [client for client in self._ahead if client.sent_at <= silent_since]:
                self._beat(client)

    def _drop_if_stalled(self, client: Client) -> None:
        """Drop a client, unless its socket does take a byte: it is only reported when a third of its buffer is free."""
        self._advance(client)
        if self._clock() - client.sent_at >= STALL and client in self._clients.lagging:
            self._drop(client, STALLED)

    def _beat(self, client: Client) -> None:
        heartbeat = client.asked.framed(frames.HEARTBEAT)
        sent = self._send(client, heartbeat)
        if 0 <= sent < len(heartbeat):
            if not client.ahead:
                client.cursor, client.after = self._broadcast.fanned_out, self._broadcast.newest
            client.rest = memoryview(heartbeat)[sent:]
            self._watch(client)

    def _drop(self, client: Client, reason: str) -> None:
        """Close a client and forget it."""
        if reason != UNWATCHED:
            self._selector.unregister(client.sock)
        client.sock.close()
        self.counters.drops[reason] += 1
        self._ahead.pop(client, None)
        self._clients.remove(client)
        self._groups.leave(client)
        level = logging.WARNING if reason in (STALLED, UNWATCHED) else logging.DEBUG
        logger.log(level, "%s dropped: %s", client.peer, reason)

    def close(self) -> None:
        """End the stream of every client that is not in the middle of a frame, and close all sockets."""
        ended = [client for group in self._groups if group.asked.chunked for client in group.current]
        for client in ended + [client for client in self._ahead if client.asked.chunked]:
            self._send(client, frames.END)
        for client in self._broadcast.close():
            client.sock.close()
        self._close_own()

    def _close_own(self) -> None:
        self._selector.close()
        self._waker.close()
        self._wakee.close()
