"""Share out the descriptors that the system gives a process: most for clients, some for the rest.

Each client takes one. The usual soft limit is 1,024, on macOS 256, because of programs that use
select(2). When it is used up, nobody can connect any more, neither to publish nor to ask for
health. So the command raises the soft limit, as Go, nginx and Redis do, and clients never get the
last descriptors.
"""
from __future__ import annotations

import logging
import resource
from contextlib import suppress

# For all that is no client: 2,048 connections, and as many for newcomers, files and Redis.
RESERVED = 4200

# Where the limit is too low for that: a sixteenth of it, but so many at least.
MIN_RESERVED = 48

logger = logging.getLogger("sse_server")


def for_clients() -> int:
    """Return for how many clients there are descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A limit below 0 is none.
    limit = soft if soft >= 0 else 1 << 31
    return max(0, limit - min(RESERVED, max(MIN_RESERVED, limit // 16)))


def raise_limit(clients: int) -> None:
    """Raise the soft limit to what so many clients need. Warn if the hard limit is too low.

    For commands only: a program's own subprocesses would inherit it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = clients + RESERVED
    # macOS has a further limit, and refuses what is beyond it.
    with suppress(ValueError, OSError, OverflowError):
        if 0 <= soft < needed:
            resource.setrlimit(resource.RLIMIT_NOFILE,
                               (needed if hard < 0 else min(needed, hard), hard))
    room = for_clients()
    if room < clients:
        logger.warning(
            "the limit of open files is enough for %d clients, not for %d: raise it to %d (ulimit "
            "-Hn, or LimitNOFILE= in a systemd unit), or set --max-clients", room, clients, needed)
