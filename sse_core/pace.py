"""How long a slow client is waited for: the whole rule. Pure: no socket, thread or clock.

A source that can wait, such as a pipe, must not evict what a slow client still needs. It also must
not be held up by a client that reads nothing. So a client that falls behind runs up a debt:

    debt    Seconds since it fell behind, less one second for each RATE bytes it has taken since.
            Nothing can be paid in advance, so the debt is never below zero.

A client that reads at RATE or faster pays for each pause with what it takes after it. It never owes
more than its longest pause. It is waited for as long as its debt is below both of these:

    longest     `patience` seconds, and what the kernel may hide: see LUMP.
    trust       What it has paid back since it fell behind, and the credit that all clients share.

The shared credit bounds what all clients together can cost. When a source was held up and nobody
made good for it, CHARGED of that time is taken from the credit, which refills slowly. Without it, a
peer that connects anew every ten seconds and reads nothing would hold up a pipe for ever. With it,
such peers cost a pause of little more than `longest` seconds, and a ninth of the time from then
on. The credit is never spent to the last, so that a reader whose debt is short is waited for even
then, and one that has been slow but steady has its own trust.

The precedent for a least rate over a time of grace is MinDataRate of ASP.NET Core's Kestrel.
"""
from __future__ import annotations

from collections.abc import Hashable

# Bytes a second that a client must take to be waited for
RATE = 16 << 10

# The kernel reports what a reader took in steps of up to its buffer. With the defaults of Linux, a
# reader of 17 kB a second seemed to take nothing for 8 s, and later for 5.6 s each time.
LUMP = 128 << 10

# Seconds of shared credit that come back in a second
REFILL = 0.1

# Share of the time lost that is taken from the shared credit. The rest is what is left of it when
# clients that read nothing have used all they can.
CHARGED = 0.9


class Pace:
    """Decide for which of the clients that lag a source waits.

    Requires holding the mutex of the clients. `now` is in seconds and never goes back.
    """

    def __init__(self, patience: float) -> None:
        # Seconds: the most that one client is waited for at a time
        self.longest = patience and patience + LUMP / RATE

        # For each client that lags: when it fell behind, and up to when what it took has paid
        self._paid: dict[Hashable, tuple[float, float]] = {}

        # The shared credit in seconds, as it was at a time
        self._credit = self.longest
        self._credit_at = 0.0

        # Since when a source is held up and no client has moved; None: none is
        self._held_since: float | None = None

    def fall_behind(self, client: Hashable, now: float) -> None:
        """Begin to count what a client owes."""
        self._paid[client] = now, now

    def take(self, client: Hashable, size: int, now: float) -> None:
        """Count bytes that a client which lags has taken."""
        began, paid = self._paid[client]
        payment = min(size / RATE, now - paid)
        self._paid[client] = began, paid + payment
        self.release(now, payment)

    def forget(self, client: Hashable, now: float) -> None:
        """Forget a client that has caught up, or is gone."""
        del self._paid[client]
        self.release(now)

    def waits_for(self, client: Hashable, now: float) -> bool:
        """Say whether a client that lags is waited for."""
        began, paid = self._paid[client]
        # Others may have held up the source before this one did, and what that cost is not its own
        trust = paid - began + self._shared(now) - self._lost(paid)
        return now - paid < min(self.longest, trust)

    def hold(self, now: float) -> None:
        """Say that a source waits for clients. Call it again whenever it has looked in vain."""
        if self._held_since is None:
            self._held_since = now

    def release(self, now: float, payment: float = 0.0) -> None:
        """Say that no source waits any more, or that one may not have to: a client has moved.

        What the hold-up cost is taken from the credit, but for the seconds that were paid back.
        """
        if self._held_since is not None:
            lost = max(0.0, self._lost(now) - payment)
            self._credit, self._credit_at = max(0.0, self._shared(now) - lost), now
            self._held_since = None

    def _lost(self, now: float) -> float:
        """Return what of the credit a hold-up has cost until then."""
        return 0.0 if self._held_since is None else CHARGED * max(0.0, now - self._held_since)

    def _shared(self, now: float) -> float:
        return min(self.longest, self._credit + REFILL * (now - self._credit_at))
