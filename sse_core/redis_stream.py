"""Turn a Redis stream into the log that many servers share."""
import logging
import random
import threading
import time
from typing import TYPE_CHECKING, Iterator, Optional, Tuple

from sse_core.frames import Id, check_event, encode, format_id, parse_id

if TYPE_CHECKING:
    from publisher import Publisher

BLOCK = 250             # milliseconds that Redis holds back an answer that has no entries: the same for a stream
READ_COUNT = 500        # entries read at once
REDIS_TIMEOUT = 2.0     # seconds until Redis counts as away
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0       # seconds between two tries, growing, +-50 % at random

log = logging.getLogger("sse_server")


class Unavailable(Exception):
    """The place that events go to does not answer now; trying again later may help."""


class RedisStream:
    """A Redis stream as the log that many servers share: each follows it, and what is published goes to it.

    url: redis://HOST:PORT/DB. key: of the stream. history: how many entries `follow` begins with. Needs the package
    `redis`; ValueError without it, or for a URL that cannot be.

    An entry has the fields `data` and, if it likes, `event` and `channel`, in UTF-8; its id is the event's.
    """

    def __init__(self, url: str, key: str, history: int) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError:
            raise ValueError("--redis needs the package redis: python -m pip install redis") from None
        # Its own retries are off: they would add an event twice without anybody having asked for it
        self._redis = redis.Redis.from_url(url, socket_timeout=REDIS_TIMEOUT, socket_connect_timeout=REDIS_TIMEOUT,
                                           retry=Retry(NoBackoff(), 0), protocol=2)
        self._error = redis.RedisError
        self._key = key
        self._history = history
        self._last: Id = (0, 0)         # id of the newest entry that was read; owned by the thread that follows, as are those below
        self._warned = False            # of an entry that is no event
        self.newest_added = ""          # id of the last event that was published here, by whatever thread
        self._away = False              # Redis did not answer last time
        self._loaded = False            # the log has the entries from before this server
        self._since = 0                 # milliseconds since the epoch, when it was started

    def publish(self, data: str, event: Optional[str] = None, channel: Optional[str] = None) -> str:
        """Add an event to the stream and return its id. Any thread may call it.

        Raises Unavailable if Redis does not take it. It may have taken it all the same, and the answer been lost:
        whoever tries again then publishes twice.
        """
        fields = {"data": data, **({"event": event} if event else {}), **({"channel": channel} if channel else {})}
        try:
            id = self._redis.xadd(self._key, fields, maxlen=max(10000, 10 * self._history), approximate=True).decode()
        except self._error as error:
            raise Unavailable(f"Redis does not take events now ({type(error).__name__})") from None
        self.newest_added = id
        return id

    def load(self, publisher: "Publisher") -> None:
        """Fill the publisher's log with the newest entries, if Redis answers; to be called before there are clients."""
        self._since = int(time.time() * 1000)
        try:
            publisher.preload(self._events(self._newest()))
            self._loaded = True
        except self._error as error:
            self._note_fault(error)

    def follow(self, publisher: "Publisher", stopping: threading.Event) -> None:
        """Publish each entry that comes, until the flag is set, whatever happens to Redis."""
        pause = FIRST_PAUSE
        while not stopping.is_set():
            try:
                entries, is_gap = self._following() if self._loaded else (self._load_late(publisher), False)
            except self._error as error:
                self._note_fault(error)
                stopping.wait(pause * random.uniform(0.5, 1.5))
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            if self._away:
                log.warning("Redis is back")
            pause, self._away = FIRST_PAUSE, False
            if is_gap:
                publisher.tell_gap(self._last, parse_id(entries[0][0].decode()))
            for id, data, event, channel in self._events(entries):
                publisher.publish(data, event, channel, id=id)

    def _load_late(self, publisher: "Publisher") -> list:
        """Load what is older than this server, and return the entries since: clients may be waiting for those."""
        entries = self._newest()
        old = [entry for entry in entries if parse_id(entry[0].decode())[0] < self._since]
        publisher.preload(self._events(old))
        self._loaded = True
        return entries[len(old):]

    def _note_fault(self, error: Exception) -> None:
        if not self._away:
            log.warning("Redis is away (%s); trying again until it is back", type(error).__name__)
        self._away = True

    def _newest(self) -> list:
        return self._redis.xrevrange(self._key, count=max(1, self._history))[::-1]

    def _following(self) -> Tuple[list, bool]:
        """Return the entries after the last one, and whether the stream was trimmed past that: some may be missing.

        One request asks for both, so that nothing can come between. An answer that waits for an entry misses none.
        """
        last = format_id(self._last)
        pipe = self._redis.pipeline(transaction=False)
        pipe.xrange(self._key, last, last)
        pipe.xread({self._key: last}, count=READ_COUNT, block=BLOCK)
        still_there, streams = pipe.execute()
        entries = streams[0][1] if streams else []
        return entries, bool(entries) and not still_there and self._last > (0, 0)

    def _events(self, entries: list) -> Iterator[Tuple[Id, str, Optional[str], Optional[str]]]:
        """Yield the entries that are events; skip the others, with one warning."""
        for raw_id, fields in entries:
            id = self._last = parse_id(raw_id.decode())
            try:
                data = fields[b"data"].decode()
                event, channel = (fields[name].decode() if name in fields else None for name in (b"event", b"channel"))
                check_event(event, channel)
                encode(data)
            except (KeyError, ValueError):
                if not self._warned:
                    log.warning("the Redis stream has entries without data or with a bad name; they are skipped")
                self._warned = True
                continue
            yield id, data, event, channel
