"""Turn a Redis stream into the log that servers share: each follows it, and publishes to it.

An entry has the fields `data` and, if it likes, `event` and `channel`, in UTF-8. Its id is the
event's.

Nobody is told that a stream lost entries: it may be trimmed past the place where one stands, be
made anew with lower ids, or be restored older. So after each read there is a look whether the entry
at that place is still the same. If not, a gap is told, and it goes on with the newest entries, so
far as they were not read before.
"""
from __future__ import annotations

import logging
import math
import random
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sse_core.broadcast import Unavailable
from sse_core.frames import Draft, Id, parse_id
from sse_core.log import MAX_LOG
from sse_core.shared import Event, Shared

BLOCK = 250             # milliseconds that Redis waits for entries before it answers with none
FIRST_COUNT, READ_BYTES = 8, 4 << 20        # entries read first, and bytes read at once then:
                        # 600 of 1 MB took 476 MB at the start, 64 at a time
READ_COUNT = 64         # entries read at once: no more than a log holds, even of the longest
CONNECTIONS = 1000      # at most: each thread that publishes has one meanwhile
REDIS_TIMEOUT = 2.0     # seconds until Redis counts as away
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0       # seconds between two tries, growing, +-50 % at random
Entry = tuple[bytes, dict[bytes, bytes]]

logger = logging.getLogger("sse_server")


class RedisStream:
    """A Redis stream, followed by one thread; any thread may call `publish`.

    url: redis://HOST:PORT/DB. key: of the stream. history: how many entries it begins with. Needs
    the package `redis`; ValueError without it, or for a URL that cannot be.
    """

    def __init__(self, url: str, key: str, history: int) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise ValueError("--redis needs the package redis: "
                             "python -m pip install redis") from None
        parse_url: Any = redis.connection.parse_url
        options = {"max_connections": CONNECTIONS, **parse_url(url)}
        options.update(     # over what the URL says; its own retries would add an event twice
            socket_timeout=REDIS_TIMEOUT, socket_connect_timeout=REDIS_TIMEOUT, protocol=2,
            decode_responses=False, encoding="utf-8", encoding_errors="strict",
            retry=Retry(NoBackoff(), 0))
        try:
            self._redis: Any = redis.Redis(connection_pool=redis.ConnectionPool(**options))
            self._redis.connection_pool.make_connection()       # it connects to nothing yet
        except (TypeError, AttributeError, redis.RedisError) as error:
            raise ValueError(f"the URL of Redis has an option that cannot be: {error}") from None
        self._error, self._refused = redis.RedisError, redis.ResponseError
        self._key = key
        self._history = max(READ_COUNT, history)
        self._count = FIRST_COUNT               # entries to read at once; the follower's, as below
        # What follows belongs to the thread that follows, and to `load` before there is one
        self._last: Entry | None = None         # the newest one read; None: the stream was empty
        self._gone = 0                          # entries that were gone from it then
        self._known: OrderedDict[bytes, int] = OrderedDict()  # read last: id, hash of the fields
        self._loaded = False                    # the log has the entries from before this server
        self._since = math.inf                  # seconds since the epoch, when it was started
        self.trouble: str | None = None         # Redis did not answer last time
        self._warned = False                    # of an entry that is no event

    def publish(self, drafts: Sequence[Draft]) -> list[str]:
        """Add events to the stream in one transaction, and return their ids.

        Raises Unavailable if the answer is missing: trying again may publish them twice.
        """
        pipe = self._redis.pipeline(transaction=len(drafts) > 1)
        for draft in drafts:
            fields = {name: value for name, value in draft._asdict().items()
                      if value or name == "data"}
            pipe.xadd(self._key, fields, maxlen=max(10000, 10 * self._history), approximate=True)
        try:
            return [new.decode() for new in pipe.execute()]
        except self._error as error:
            raise Unavailable(f"Redis does not take events now ({type(error).__name__})") from None

    def load(self, shared: Shared, now: float) -> None:
        """Fill the log with the newest entries, if Redis answers. now: seconds since the epoch."""
        self._step(shared)
        self._since = now       # what comes later and is loaded later is for clients, too

    def follow(self, shared: Shared, stopping: threading.Event) -> None:
        """Add what comes to the log, until the flag is set, whatever happens to Redis."""
        pause = FIRST_PAUSE
        try:
            while not stopping.is_set():
                self._step(shared)
                if self.trouble:
                    stopping.wait(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, LONGEST_PAUSE) if self.trouble else FIRST_PAUSE
        finally:
            self._redis.connection_pool.disconnect(inuse_connections=False)

    def _step(self, shared: Shared) -> None:
        """Load or read on, and note whether Redis answers."""
        before = self.trouble
        try:
            self._read_on(shared) if self._loaded else self._load(shared)
            self.trouble = None
        except self._error as error:
            self.trouble = f"Redis is away ({type(error).__name__})"
        if self.trouble and not before:
            logger.warning("%s; trying again until it is back", self.trouble)
        if before and not self.trouble:
            logger.warning("Redis is back")

    def _load(self, shared: Shared) -> None:
        """Load what is older than this server, and add what is not: clients may wait for that."""
        began = shared.clock()
        entries = self._new(self._newest())
        old = sum(_id(entry)[0] < self._since * 1000 for entry in entries)
        shared.preload(list(self._events(entries[:old])))
        self._loaded = True
        self._add(shared, entries[old:])
        shared.complete(began)

    def _read_on(self, shared: Shared) -> None:
        """Wait a moment for entries, and add them; if some are missing, a gap and the newest."""
        began, count = shared.clock(), self._count
        entries, is_same = self._following()
        self._measure(entries)
        if is_same:
            self._last = entries[-1] if entries else self._last
            new = self._new(entries)
        else:
            after = _id(self._last) if self._last else None
            new = self._new(self._newest())
            resumed = next(self._events(new), None)
            shared.tell_gap(after, resumed and resumed.id)
        self._add(shared, new)
        if len(entries) < count:
            shared.complete(began)

    def _following(self) -> tuple[list[Entry], bool]:
        """Return the entries after the last one, and whether nothing before them can be missing.

        The look at the last one comes after the read: a burst that trims could come between. Where
        the stream was empty, nothing may have gone since, and no more be there than is known again.
        """
        last = self._last[0] if self._last else b"0-0"
        pipe = self._redis.pipeline(transaction=False)
        pipe.xread({self._key: last}, count=self._count, block=BLOCK)
        pipe.xrange(self._key, last, last)
        streams, there = pipe.execute()
        entries = streams[0][1] if streams else []
        if self._last:
            return entries, there == [self._last]
        if not entries:
            return entries, True
        first, length, gone = self._look("xrange")
        is_whole = first[:1] == entries[:1] and gone == self._gone and length <= self._history
        return first, is_whole

    def _newest(self) -> list[Entry]:
        """Return the newest entries, and stand behind them; at the beginning if there are none."""
        page, _, self._gone = self._look("xrevrange")
        entries, size = page, 0
        while page and len(entries) < self._history and size < MAX_LOG:
            size += self._measure(page)
            page = self._redis.xrevrange(self._key, max=entries[-1][0], count=self._count + 1)
            page = [entry for entry in page if entry[0] != entries[-1][0]]
            entries = entries + page
        self._last = entries[0] if entries else None
        return entries[:self._history][::-1]

    def _measure(self, entries: list[Entry]) -> int:
        """Return the bytes of entries, and read as many next time as have READ_BYTES like these."""
        size = sum(len(value) for _, fields in entries for value in fields.values())
        if entries:
            fitting = READ_BYTES * len(entries) // max(1, size)
            self._count = max(1, min(READ_COUNT, 2 * self._count, fitting))
        return size

    def _look(self, command: str) -> tuple[list[Entry], int, int]:
        """Return some entries, how many there are, and how many are gone: 0 before Redis 7.0."""
        pipe = self._redis.pipeline()       # one transaction, so that the one belongs to the other
        getattr(pipe, command)(self._key, count=self._count)
        pipe.xinfo_stream(self._key)
        entries, info = pipe.execute(raise_on_error=False)
        if entries == [] and isinstance(info, self._refused):       # there is no such key
            return [], 0, 0
        for answer in (entries, info):
            if isinstance(answer, Exception):
                raise answer
        return entries, info["length"], info.get("entries-added", info["length"]) - info["length"]

    def _new(self, entries: list[Entry]) -> list[Entry]:
        """Return the entries that are new: a stream restored or renamed has old ones, too."""
        new = []
        for entry in entries:
            fields = hash(frozenset(entry[1].items()))
            if self._known.pop(entry[0], None) != fields:
                new.append(entry)
            self._known[entry[0]] = fields
        while len(self._known) > 2 * self._history:
            self._known.popitem(last=False)
        return new

    def _add(self, shared: Shared, entries: list[Entry]) -> None:
        for event in self._events(entries):
            shared.add(event)

    def _events(self, entries: Iterable[Entry]) -> Iterator[Event]:
        """Yield the entries that are events; skip the others, with one warning."""
        for entry in entries:
            fields = entry[1]
            try:
                draft = Draft(fields[b"data"].decode(), *(
                    fields[name].decode() if name in fields else None
                    for name in (b"event", b"channel")))
                payload = draft.encoded()
            except (KeyError, ValueError):
                if not self._warned:
                    logger.warning("the Redis stream has entries without data or with a bad name; "
                                   "they are skipped")
                self._warned = True
            else:
                yield Event(_id(entry), payload, draft.channel)


def _id(entry: Entry) -> Id:
    return parse_id(entry[0].decode()) or (0, 0)
