"""Find clients that acknowledge nothing: their network is gone, or they have stopped reading.

Our own kernel tells of neither. It takes what is sent as long as its buffer has room, and small
events find room for a quarter of an hour. So what counts is what the peer's kernel acknowledges.

    A client is stalled when it owes an acknowledgement at one check, and STALL_TIMEOUT seconds
    later it still has not acknowledged a single byte.

A client owes one for bytes that are in flight, and for bytes that wait in our kernel because the
peer has no room for them. A peer without room answers the kernel's probes, but those answers
acknowledge nothing: one that does not read is as stalled as one that is gone. One that reads slowly
makes room in steps of at most half its buffer or one segment, whichever is less, and acknowledges a
byte for each step. So it is not stalled, however small its buffer.

Linux says all this in TCP_INFO (tcp(7), linux/tcp.h). Elsewhere only lagging clients are checked,
and what counts is what their sockets took.

To check a client takes 1.5 us. So not all are checked at once: each sweep takes some of all clients
in turn, and some of those that owed an acknowledgement at their last check.
"""
from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Callable

from sse_core.engine.clients import Client, Clients

# Seconds without an acknowledgement after which a client is dropped.
STALL_TIMEOUT = 30.0

# Of all clients, and of those that owe an acknowledgement.
CHECKS_PER_SECOND = 512
RECHECKS_PER_SECOND = 256

# Of struct tcp_info: tcpi_unacked (segments in flight), tcpi_bytes_acked, tcpi_notsent_bytes.
_INFO = struct.Struct("=24xI92xQ16xI")


class Stalls:
    """Check clients in turn for acknowledgements. All in here is the publisher thread's."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients

        # The clients that owe an acknowledgement, checked longest ago first: how many bytes they
        # had acknowledged, and when that was seen first.
        self._owing: dict[Client, tuple[float, float]] = {}

        # The clients that are not checked yet in this round of all.
        self._round: Iterator[Client] = iter(())

    def check_soon(self, client: Client) -> None:
        """Have a client checked in one of the next sweeps, because its socket did not take all."""
        self._owing.setdefault(client, (-1.0, 0.0))

    def forget(self, client: Client) -> None:
        """Forget a client that is gone."""
        self._owing.pop(client, None)

    def find_stalled(self, everyone: Callable[[], Iterable[Client]], share: float, now: float
                     ) -> list[Client]:
        """Check some clients, and return the stalled ones.

        everyone: returns all clients. share: of a second, for which clients are checked. now:
        monotonic seconds.
        """
        number = max(1, round(CHECKS_PER_SECOND * share))
        due = [*islice(self._round, number)]
        # A round of all is over. The next one takes in whoever has come meanwhile.
        if not due:
            self._round = iter([*everyone()])
            due = [*islice(self._round, number)]
        due += islice(self._owing, max(1, round(RECHECKS_PER_SECOND * share)))
        return [client for client in dict.fromkeys(due) if self._is_stalled(client, now)]

    def _is_stalled(self, client: Client, now: float) -> bool:
        before, owed = self._owing.pop(client, None), self._owed(client, now)
        if before and owed and before[0] == owed[0]:
            # Nothing was acknowledged since: the time counts from the first check on.
            owed = before
        elif before and client not in self._clients.lagging:
            # It goes on acknowledging. It is checked again in its turn of all.
            return False
        if owed:
            self._owing[client] = owed
        return owed is not None and now - owed[1] >= STALL_TIMEOUT

    def _owed(self, client: Client, now: float) -> tuple[float, float] | None:
        """Return how much a client has acknowledged, and a time; None if it owes nothing."""
        info = b""
        if sys.platform == "linux":
            # It fails if the socket is closed, or is no TCP socket.
            with suppress(OSError):
                info = client.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
        # Older kernels, and other systems, say less.
        if len(info) < _INFO.size:
            is_lagging = client in self._clients.lagging
            return (client.sent_at, client.sent_at) if is_lagging else None
        in_flight, acknowledged, unsent = _INFO.unpack(info)
        return (acknowledged, now) if in_flight or unsent else None
