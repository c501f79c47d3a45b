"""Use a Redis stream as the log that servers share: each follows it, and publishes to it.

An entry has the field `data`, and may have `event` and `channel`, all in UTF-8. Its id is the id of
the event.

Redis does not tell a reader that entries were trimmed, that the stream was created anew, or that it
was restored from an older copy. So each read also asks for the entry after which it reads: if that
is not there, or is another one, something may be lost.
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

from sse_core.engine.frames import Event, Id, format_id, parse_id
from sse_core.engine.log import NOTHING
from sse_core.stores.store import EventStore, Row

# Milliseconds that Redis waits for new entries before it answers that there are none.
BLOCK = 250

# Entries read at once. To load 600 entries of 1 MB took 219 MB of memory with 24, 401 MB with 64.
READ_COUNT = 24

# Seconds without an answer after which Redis counts as away.
REDIS_TIMEOUT = 2.0

# The fields of an entry, in the order of a row.
FIELDS = (b"channel", b"event", b"data")
Entry = tuple[bytes, dict[bytes, bytes]]


class RedisStore(EventStore):
    """A Redis stream. See EventStore for who may call what.

    url: redis://HOST:PORT/DB. key: the key of the stream. history: see EventStore. Raises
    ValueError without the package `redis`, and for a URL that cannot be used.
    """
    _away, _back = "%s; trying again until it is back", "Redis is back"
    _skips, _refuses = "entries of the Redis stream", "Redis"

    def __init__(self, url: str, key: str, history: int) -> None:
        super().__init__(history)
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise ValueError("--redis needs the package redis: "
                             "python -m pip install redis") from None
        try:
            # What this raises may quote the password, so the text is replaced.
            _ = urlsplit(url).port
        except ValueError:
            raise ValueError("the URL of Redis has no host and port that can be: percent-encode "
                             "what is special in its password") from None
        parse_url: Any = redis.connection.parse_url
        options = parse_url(url)
        # These win over the URL. Retries of `redis` itself would add an event twice.
        options.update(
            socket_timeout=REDIS_TIMEOUT, socket_connect_timeout=REDIS_TIMEOUT, protocol=2,
            decode_responses=False, encoding="utf-8", retry=Retry(NoBackoff(), 0))
        try:
            self._redis: Any = redis.Redis(connection_pool=redis.ConnectionPool(**options))
            # This checks the options, and connects to nothing yet.
            self._redis.connection_pool.make_connection()
        except (TypeError, AttributeError, redis.RedisError) as error:
            raise ValueError(f"the URL of Redis has an option that cannot be: {error}") from None
        self._faults, self._no_key = (redis.RedisError,), redis.ResponseError
        self._key = key

        # Set after a fault, such as a failover. The thread that follows then connects anew.
        self._is_stale = False

        # The others belong to the thread that follows. How many entries were gone when the stream
        # was empty.
        self._gone = 0

        # What `_last` and `_gone` become when all newest rows have been read.
        self._place: tuple[Row | None, int] = None, 0

        # The hash of each row that was read last, by its id.
        self._known: OrderedDict[Id, int] = OrderedDict()

    # For the thread that writes

    def _commit(self, events: Sequence[Event]) -> list[str]:
        pipe = self._redis.pipeline(transaction=len(events) > 1)
        for event in events:
            fields = {"data": event.data, "event": event.name, "channel": event.channel}
            given = {name: value for name, value in fields.items() if value is not None}
            pipe.xadd(self._key, given, maxlen=self._kept, approximate=True)
        return [new.decode() for new in pipe.execute()]

    def _probe(self, size: int) -> None:
        # Redis refuses the event when it is queued, as it would refuse another. It is not executed.
        pipe = self._redis.pipeline(transaction=False)
        pipe.execute_command("MULTI")
        pipe.xadd(self._key, {"data": "x" * size})
        pipe.execute_command("DISCARD")
        pipe.execute()

    # For the thread that follows

    def _read(self) -> tuple[list[Row] | None, bool]:
        """Wait a moment for entries that follow the last one; see EventStore.

        The last entry is asked for after the read, because a burst could trim it in between. If the
        stream was empty before, nothing is lost as long as no entry is gone since, and there are no
        more entries than `_known` remembers.
        """
        if self._is_stale:
            self._is_stale = False
            self.close()
        last = format_id(self._last and self._last[:2]) or "0-0"
        pipe = self._redis.pipeline(transaction=False)
        pipe.xread({self._key: last}, count=READ_COUNT, block=BLOCK)
        pipe.xrange(self._key, last, last)
        streams, there = pipe.execute()
        rows = _rows(streams[0][1]) if streams else []
        is_lost = self._last is not None and _rows(there) != [self._last]
        if rows and self._last is None:
            first, info = self._look("xrange")
            is_lost = (first[:1] != rows[:1] or _gone(info) != self._gone
                       or info["length"] > self._history)
        if is_lost:
            return None, True
        self._last = rows[-1] if rows else self._last
        return self._new(rows), len(rows) < READ_COUNT

    def _page(self, before: Row | None) -> list[Row]:
        if before:
            page = _rows(self._redis.xrevrange(
                self._key, max=format_id(before[:2]), count=READ_COUNT + 1))
            # If the entry is not there, this is another stream now: the next read will see it.
            return page[1:] if page[:1] == [before] else []
        rows, info = self._look("xrevrange")
        self._place = rows[0] if rows else None, _gone(info)
        return rows

    def _removed(self) -> Id:
        """Return the newest id of all entries that were removed; see EventStore.

        Redis 7 says which entry was deleted last, but of trimmed entries only how many there were;
        before 7, it does not say that either. Then everything before the oldest entry counts as
        removed.
        """
        _, info = self._look("xrange")
        if not info or "entries-added" in info and not _gone(info):
            return NOTHING
        deleted = _id(info.get("max-deleted-entry-id", b"0-0"))
        ms, n = _id(info["first-entry"][0]) if info["length"] else _id(info["last-generated-id"])
        return max(deleted, (ms, n - bool(info["length"])))

    def _unread(self, rows: list[Row]) -> list[Row]:
        self._last, self._gone = self._place
        # What is older than a row that was read is older than this server's log, too.
        known = [index for index, row in enumerate(rows) if self._known.get(row[:2]) == hash(row)]
        return self._new(rows[known[-1]::-1] if known else rows[::-1])[::-1]

    def _look(self, command: str) -> tuple[list[Row], dict[str, Any]]:
        """Return some rows, and what Redis says of the stream: nothing if there is none."""
        # One transaction, so that both are of the same moment.
        pipe = self._redis.pipeline()
        getattr(pipe, command)(self._key, count=READ_COUNT)
        pipe.xinfo_stream(self._key)
        entries, info = pipe.execute(raise_on_error=False)
        if entries == [] and isinstance(info, self._no_key):
            return [], {}
        for answer in (entries, info):
            if isinstance(answer, Exception):
                raise answer
        return _rows(entries), info

    def _new(self, rows: list[Row]) -> list[Row]:
        """Return the rows that are new. A stream that was restored or renamed has old ones, too."""
        new = []
        for row in rows:
            if self._known.pop(row[:2], None) != hash(row):
                new.append(row)
            self._known[row[:2]] = hash(row)
        while len(self._known) > 2 * self._history:
            self._known.popitem(last=False)
        return new

    # For both

    def _failed(self, fault: Exception) -> str:
        self.close()
        self._is_stale = True
        return f"Redis is away ({type(fault).__name__})"

    def close(self) -> None:
        """Close the connections that are not in use. New ones go to whatever server answers then.
        """
        self._redis.connection_pool.disconnect(inuse_connections=False)


def _rows(entries: Iterable[Entry]) -> list[Row]:
    return [(*_id(entry_id), *map(fields.get, FIELDS)) for entry_id, fields in entries]


def _id(text: bytes) -> Id:
    return parse_id(text.decode()) or (0, 0)


def _gone(info: dict[str, Any]) -> int:
    """Return how many entries are gone; 0 before Redis 7, which does not say it."""
    return int(info.get("entries-added", info.get("length", 0)) - info.get("length", 0))
