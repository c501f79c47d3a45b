"""How long a slow client is waited for: the whole rule.

A source that can wait, such as a pipe, must not evict what a slow client still needs. It also must
not be held up by a client that reads nothing. So a client that falls behind runs up a debt:

    debt        Seconds since it fell behind, less one second for each MIN_RATE bytes that it has
                taken since. Nothing can be paid in advance, so the debt is never below zero.

A client that reads at MIN_RATE or faster pays for each pause with what it takes after it. It never
owes more than its longest pause. It is waited for as long as its debt is below both of these:

    longest     `patience` seconds, and what the kernel may hide: see MAX_LUMP.
    trust       What it has paid back so far, less what it still owed when it caught up; and the
                credit that all clients share.

The shared credit bounds what all clients together can cost. When a source was held up and nobody
paid for that, CHARGED_SHARE of the time is taken from the credit, which comes back slowly. Without
it, a peer that connects anew every ten seconds and reads nothing would hold up a pipe for ever.
With it, such peers cost one pause of little more than `longest` seconds, and a ninth of the time
from then on. The credit is never spent to the last, so a reader whose debt is small is waited for
even then. One that has paid its debts before has its own trust.

The precedent for a least rate after a time of grace is MinDataRate of ASP.NET Core's Kestrel.

No socket, no thread, no clock and no lock in here: hold the mutex of the clients.
"""
from __future__ import annotations

from collections.abc import Hashable

# Bytes a second that a client must take to be waited for.
MIN_RATE = 16 << 10

# Bytes. The kernel reports what a reader took in lumps of up to its receive buffer. With the
# defaults of Linux, a reader of 17 kB a second seemed to take nothing for 8 s, and later for 5.6 s
# each time.
MAX_LUMP = 128 << 10

# Seconds of shared credit that come back in a second.
REFILL_RATE = 0.1

# The share of the time lost that is taken from the shared credit. The rest is what is left of it
# when clients that read nothing have used all they can.
CHARGED_SHARE = 0.9


class Pace:
    """Decide for which of the lagging clients a source waits.

    patience: seconds, as of SSEServer; 0: it waits for nobody. A client can be anything that a dict
    takes as a key. `now` is in seconds, and never goes back from one call to the next.
    """

    def __init__(self, patience: float) -> None:
        # Seconds that one client is waited for at a time, at most.
        self.longest = patience and patience + MAX_LUMP / MIN_RATE

        # For each client that lags, or did: the trust that it has earned, in seconds, and the time
        # up to which it has paid. Its debt is what has passed since then.
        self._paid: dict[Hashable, tuple[float, float]] = {}

        # The shared credit in seconds, as it was at a time.
        self._credit = self.longest
        self._credit_at = 0.0

        # The oldest frame for which a source waits, and since when. None if none waits.
        self._held: tuple[int, float] | None = None

    # What a client does

    def fall_behind(self, client: Hashable, now: float) -> None:
        """Begin to count what a client owes."""
        trust, _ = self._paid.get(client, (0.0, now))
        self._paid[client] = trust, now

    def pay(self, client: Hashable, size: int, cursor: int, now: float) -> None:
        """Count bytes that a lagging client has taken. cursor: the number of the frame it is at."""
        trust, paid = self._paid[client]
        payment = min(size / MIN_RATE, now - paid)
        self._paid[client] = trust + payment, paid + payment
        # The source may go on now. The time until it wakes up is nobody's fault, and a fast pipe
        # has much of it.
        if self._held and cursor <= self._held[0]:
            self.release(now, payment)

    def catch_up(self, client: Hashable, now: float) -> None:
        """Forgive a client that has everything what it still owes, at the cost of its trust."""
        trust, paid = self._paid[client]
        self._paid[client] = max(0.0, trust - (now - paid)), now

    def forget(self, client: Hashable) -> None:
        """Forget a client that is gone."""
        self._paid.pop(client, None)

    # What a source does

    def waits_for(self, client: Hashable, now: float) -> bool:
        """Return whether a source waits for a client that lags."""
        trust, paid = self._paid[client]
        # What others have cost, if the source was held up before this client fell behind, is spent.
        shared = self._shared(now) - self._cost(paid)
        return now - paid < min(self.longest, trust + shared)

    def hold(self, frame: int, now: float) -> None:
        """Note that a source waits for clients that are due this frame. Call it at each check."""
        if self._held and self._held[0] != frame:
            self.release(now)
        self._held = self._held or (frame, now)

    def release(self, now: float, payment: float = 0.0) -> None:
        """Note that no source waits any more, and take from the credit what that has cost.

        payment: seconds of it that were paid by the client for which it waited.
        """
        if self._held:
            cost = max(0.0, self._cost(now) - payment)
            self._credit, self._credit_at = max(0.0, self._shared(now) - cost), now
            self._held = None

    def _cost(self, now: float) -> float:
        """Return how much of the credit the present wait has cost up to a time."""
        return CHARGED_SHARE * max(0.0, now - self._held[1]) if self._held else 0.0

    def _shared(self, now: float) -> float:
        """Return the shared credit at a time, before the present wait is paid for."""
        return min(self.longest, self._credit + REFILL_RATE * (now - self._credit_at))
