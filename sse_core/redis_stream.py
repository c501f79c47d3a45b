"""Turn a Redis stream into the log that servers share: each follows it, and publishes to it.

An entry has the fields `data` and, if it likes, `event` and `channel`, in UTF-8. Its id is the
event's.
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

from sse_core.broadcast import Unavailable
from sse_core.frames import Draft, Id, format_id, parse_id
from sse_core.log import MAX_LOG
from sse_core.shared import Row, SharedLog

BLOCK = 250             # milliseconds that Redis waits for entries before it answers with none
READ_COUNT = 24         # entries read at once: 600 of 1 MB took 219 MB at the start, 401 by 64
CONNECTIONS = 1000      # at most: each thread that publishes has one meanwhile
REDIS_TIMEOUT = 2.0     # seconds until Redis counts as away
FIELDS = (b"channel", b"event", b"data")        # of an entry, in the order of a row
Entry = tuple[bytes, dict[bytes, bytes]]


class RedisStream(SharedLog):
    """A Redis stream, followed by one thread; any thread may call `publish`.

    url: redis://HOST:PORT/DB. key: of the stream. history: see SharedLog. Needs the package
    `redis`; ValueError without it, or for a URL that cannot be.
    """
    _away, _back = "%s; trying again until it is back", "Redis is back"
    _skips = "the Redis stream has entries"

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
            _ = urlsplit(url).port      # what it raises may quote the password
        except ValueError:
            raise ValueError("the URL of Redis has no host and port that can be: percent-encode "
                             "what is special in its password") from None
        parse_url: Any = redis.connection.parse_url
        options = {"max_connections": CONNECTIONS, **parse_url(url)}
        options.update(     # over what the URL says; its own retries would add an event twice
            socket_timeout=REDIS_TIMEOUT, socket_connect_timeout=REDIS_TIMEOUT, protocol=2,
            decode_responses=False, encoding="utf-8", retry=Retry(NoBackoff(), 0))
        try:
            self._redis: Any = redis.Redis(connection_pool=redis.ConnectionPool(**options))
            self._redis.connection_pool.make_connection()       # it connects to nothing yet
        except (TypeError, AttributeError, redis.RedisError) as error:
            raise ValueError(f"the URL of Redis has an option that cannot be: {error}") from None
        self._faults, self._refused = (redis.RedisError,), redis.ResponseError
        self._key = key
        # What follows belongs to the thread that follows, and to `load` before there is one
        self._gone = 0                          # entries that were gone when it was empty
        self._known: OrderedDict[Id, int] = OrderedDict()   # read last: id, hash of the row

    def publish(self, drafts: Sequence[Draft]) -> list[str]:
        """Add events to the stream in one transaction, and return their ids.

        Raises Unavailable if the answer is missing: trying again may publish them twice.
        """
        pipe = self._redis.pipeline(transaction=len(drafts) > 1)
        for draft in drafts:
            fields = {name: value for name, value in draft._asdict().items()
                      if value or name == "data"}
            pipe.xadd(self._key, fields, maxlen=self._kept, approximate=True)
        try:
            return [new.decode() for new in pipe.execute()]
        except self._faults as error:
            self.trouble = self._failed(error)
            raise Unavailable(f"Redis does not take events now ({type(error).__name__})") from None

    def _read(self) -> tuple[list[Row] | None, bool]:
        """Wait a moment for entries that follow the last one; see SharedLog.

        The look at the last one comes after the read: a burst that trims could come between. Where
        the stream was empty, nothing may have gone since, and no more be there than is known again.
        """
        last = format_id(self._last and self._last[:2]) or "0-0"
        pipe = self._redis.pipeline(transaction=False)
        pipe.xread({self._key: last}, count=READ_COUNT, block=BLOCK)
        pipe.xrange(self._key, last, last)
        streams, there = pipe.execute()
        rows = _rows(streams[0][1]) if streams else []
        is_lost = self._last is not None and _rows(there) != [self._last]
        if rows and self._last is None:
            first, length, gone = self._look("xrange")
            is_lost = first[:1] != rows[:1] or gone != self._gone or length > self._history
        if is_lost:
            return None, True
        self._last = rows[-1] if rows else self._last
        return self._new(rows), len(rows) < READ_COUNT

    def _newest(self) -> list[Row]:
        page, _, gone = self._look("xrevrange")
        rows, size = page, 0
        while page and len(rows) < self._history and size < MAX_LOG:
            size += sum(len(row[4] or b"") for row in page)
            page = _rows(self._redis.xrevrange(
                self._key, max=format_id(rows[-1][:2]), count=READ_COUNT + 1))
            page = page[1:] if page[:1] == rows[-1:] else []    # else it is another stream now
            rows += page
        self._last, self._gone = rows[0] if rows else None, gone    # not before all was read
        return self._new(rows[:self._history][::-1])

    def _look(self, command: str) -> tuple[list[Row], int, int]:
        """Return some rows, how many there are, and how many are gone: 0 before Redis 7.0."""
        pipe = self._redis.pipeline()       # one transaction, so that the one belongs to the other
        getattr(pipe, command)(self._key, count=READ_COUNT)
        pipe.xinfo_stream(self._key)
        entries, info = pipe.execute(raise_on_error=False)
        if entries == [] and isinstance(info, self._refused):       # there is no such key
            return [], 0, 0
        for answer in (entries, info):
            if isinstance(answer, Exception):
                raise answer
        gone = info.get("entries-added", info["length"]) - info["length"]
        return _rows(entries), info["length"], gone

    def _new(self, rows: list[Row]) -> list[Row]:
        """Return the rows that are new: a stream restored or renamed has old ones, too."""
        new = []
        for row in rows:
            if self._known.pop(row[:2], None) != hash(row):
                new.append(row)
            self._known[row[:2]] = hash(row)
        while len(self._known) > 2 * self._history:
            self._known.popitem(last=False)
        return new

    def _failed(self, fault: Exception) -> str:
        return f"Redis is away ({type(fault).__name__})"

    def _recover(self) -> None:
        pipe = self._redis.pipeline(transaction=False)      # an event is queued, and not executed
        pipe.execute_command("MULTI")
        pipe.xadd(self._key, {"data": ""})
        pipe.execute_command("DISCARD")
        pipe.execute()
        self.trouble = None

    def _close(self) -> None:
        self._redis.connection_pool.disconnect(inuse_connections=False)


def _rows(entries: Iterable[Entry]) -> list[Row]:
    return [(*(parse_id(entry_id.decode()) or (0, 0)), *map(fields.get, FIELDS))
            for entry_id, fields in entries]
