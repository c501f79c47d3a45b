"""How long a slow client is waited for: the whole rule. Pure: no socket, thread or clock.

A source that can wait, such as a pipe, must not evict what a slow client still needs. It also must
not be held up by a client that reads nothing. So a client that falls behind runs up a debt:

    debt    Seconds since it fell behind, less one second for each MIN_RATE bytes it has taken
    since.
            Nothing can be paid in advance, so the debt is never below zero.

A client that reads at MIN_RATE or faster pays for each pause with what it takes after it. It never
owes
more than its longest pause. It is waited for as long as its debt is below both of these:

    longest     `patience` seconds, and what the kernel may hide: see MAX_LUMP.
    trust       What it has paid back so far, less what it has not when it caught up; and the
                credit that all clients share.

The shared credit bounds what all clients together can cost. When a source was held up and nobody
made good for it, CHARGED_SHARE of that time is taken from the credit, which refills slowly.
Without it, a
peer that connects anew every ten seconds and reads nothing would hold up a pipe for ever. With it,
such peers cost a pause of little more than `longest` seconds, and a ninth of the time from then
on. The credit is never spent to the last, so that a reader whose debt is short is waited for even
then, and one that has paid its debts before has its own trust.

The precedent for a least rate over a time of grace is MinDataRate of ASP.NET Core's Kestrel.
"""
from __future__ import annotations

from collections.abc import Hashable

# Bytes a second that a client must take to be waited for
MIN_RATE = 16 << 10

# The kernel reports what a reader took in steps of up to its buffer. With the defaults of Linux, a
# reader of 17 kB a second seemed to take nothing for 8 s, and later for 5.6 s each time.
MAX_LUMP = 128 << 10

# Seconds of shared credit that come back in a second
REFILL_RATE = 0.1

# Share of the time lost that is taken from the shared credit. The rest is what is left of it when
# clients that read nothing have used all they can.
CHARGED_SHARE = 0.9


class Pace:
    """Decide for which of the clients that lag a source waits.

    Requires holding the mutex of the clients. `now` is in seconds and never goes back.
    """

    def __init__(self, patience: float) -> None:
        # Seconds: the most that one client is waited for at a time
        self.longest = patience and patience + MAX_LUMP / MIN_RATE

        # For each client that lags, or did: seconds of trust that it has earned, and up to when
        # what it took has paid
        self._paid: dict[Hashable, tuple[float, float]] = {}

        # The shared credit in seconds, as it was at a time
        self._credit = self.longest
        self._credit_at = 0.0

        # The oldest frame for which a source waits, and since when; None if none waits
        self._held: tuple[int, float] | None = None

    def fall_behind(self, client: Hashable, now: float) -> None:
        """Begin to count what a client owes."""
        trust, _ = self._paid.get(client, (0.0, now))
        self._paid[client] = trust, now

    def pay(self, client: Hashable, size: int, cursor: int, now: float) -> None:
        """Count bytes that a client which lags has taken, standing at a frame."""
        trust, paid = self._paid[client]
        payment = min(size / MIN_RATE, now - paid)
        self._paid[client] = trust + payment, paid + payment
        # The time from here on, until the source wakes up, is nobody's. A fast pipe has much of it
        if self._held and cursor <= self._held[0]:
            self.release(now, payment)

    def catch_up(self, client: Hashable, now: float) -> None:
        """Forgive a client that has everything what it still owes, at the cost of its trust."""
        trust, paid = self._paid[client]
        self._paid[client] = max(0.0, trust - (now - paid)), now

    def forget(self, client: Hashable) -> None:
        """Forget a client that is gone."""
        self._paid.pop(client, None)

    def waits_for(self, client: Hashable, now: float) -> bool:
        """Say whether a client that lags is waited for."""
        trust, paid = self._paid[client]
        # Others may have held up the source before this one did: that is spent
        shared = self._shared(now) - self._lost(paid)
        return now - paid < min(self.longest, trust + shared)

    def hold(self, frame: int, now: float) -> None:
        """Say that a source waits, for clients that are due this frame. Call it at each look."""
        if self._held and self._held[0] != frame:
            self.release(now)
        self._held = self._held or (frame, now)

    def release(self, now: float, payment: float = 0.0) -> None:
        """Say that no source waits any more: take what that cost from the credit.

        payment: seconds of it that the client which moved has paid back.
        """
        if self._held:
            lost = max(0.0, self._lost(now) - payment)
            self._credit, self._credit_at = max(0.0, self._shared(now) - lost), now
            self._held = None

    def _lost(self, now: float) -> float:
        """Return what of the credit a hold-up has cost until then."""
        return CHARGED_SHARE * max(0.0, now - self._held[1]) if self._held else 0.0

    def _shared(self, now: float) -> float:
        return min(self.longest, self._credit + REFILL_RATE * (now - self._credit_at))
