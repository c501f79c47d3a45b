"""Find clients that acknowledge nothing: their network is gone, or they have stopped reading.

Our own kernel tells of neither. It takes what is sent as long as its buffer has room, and small
events find room for a quarter of an hour. So what counts is what the peer's kernel acknowledges.

    A client is stalled when bytes that it owes an acknowledgement for are there at one look, and
    STALL_TIMEOUT seconds later it still has not acknowledged any.

Bytes that a client owes for are in flight, or wait in our kernel because the peer has no room for
them. A peer with no room answers the kernel's probes, which acknowledge nothing: one that does not
read is as stalled as one that is gone. One that reads slowly makes room in steps of at most half
its buffer or one segment, whichever is less, and acknowledges a byte for each step.

Linux says all this in TCP_INFO (tcp(7), linux/tcp.h). Elsewhere only a client whose socket would
not take all is looked at, and what counts is what its socket took.
"""
from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Callable

from sse_core.engine.clients import Client, Clients

# Seconds without an acknowledgement after which a client is dropped
STALL_TIMEOUT = 30.0

# Clients asked in a second: of those that owe an acknowledgement, and of all in turn. To ask one
# takes 1.5 us.
RECHECKS_PER_SECOND = 256
CHECKS_PER_SECOND = 512

# Of struct tcp_info: tcpi_unacked (segments in flight), tcpi_bytes_acked, tcpi_notsent_bytes
_INFO = struct.Struct("=24xI92xQ16xI")


class Stalls:
    """Ask the clients in turn whether they have acknowledged anything. The publisher thread's."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients

        # Clients that owe an acknowledgement, asked longest ago first: what they had acknowledged,
        # and when
        self._owing: dict[Client, tuple[float, float]] = {}

        # What is left of all clients in this round
        self._round: Iterator[Client] = iter(())

    def check_soon(self, client: Client) -> None:
        """Have a client asked soon, because its socket did not take all."""
        self._owing.setdefault(client, (-1.0, 0.0))

    def forget(self, client: Client) -> None:
        """Forget a client that is gone."""
        self._owing.pop(client, None)

    def find_stalled(self, everyone: Callable[[], Iterable[Client]], share: float, now: float
             ) -> list[Client]:
        """Ask some clients, as many as are due in this share of a second; return the stalled."""
        number = max(1, round(CHECKS_PER_SECOND * share))
        due = [*islice(self._round, number)]
        if not due:
            self._round = iter([*everyone()])
            due = [*islice(self._round, number)]
        due += islice(self._owing, max(1, round(RECHECKS_PER_SECOND * share)))
        return [client for client in dict.fromkeys(due) if self._is_stalled(client, now)]

    def _is_stalled(self, client: Client, now: float) -> bool:
        before, owed = self._owing.pop(client, None), self._owed(client, now)
        if before and owed and before[0] == owed[0]:
            owed = before
        elif before and client not in self._clients.lagging:
            # It goes on acknowledging, and is asked again when it is its turn
            return False
        if owed:
            self._owing[client] = owed
        return owed is not None and now - owed[1] >= STALL_TIMEOUT

    def _owed(self, client: Client, now: float) -> tuple[float, float] | None:
        """Return what a client has acknowledged so far, and when; None if it owes nothing."""
        info = b""
        if sys.platform == "linux":
            try:
                info = client.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
            except OSError:     # it is closed, or no TCP socket
                pass
        if len(info) < _INFO.size:
            is_lagging = client in self._clients.lagging
            return (client.sent_at, client.sent_at) if is_lagging else None
        in_flight, acknowledged, unsent = _INFO.unpack(info)
        return (acknowledged, now) if in_flight or unsent else None
