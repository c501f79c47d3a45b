"""The log keeps the newest frames in order, and knows where in them a client goes on.

An event is encoded once, as a frame, and appended here. A client is a cursor: the number of the
next frame that it is due. So a slow client costs one integer, and all clients share one copy of
every event.

    number       -1         0          1         2         3         4
             (evicted)  (evicted)  | frame  |  frame  |  frame  |
                                    first     ^                   next
                                              a client's cursor

Frames enter at the back and leave at the front. Nothing leaves by itself: the caller asks
`has_room` and calls `evict`, because only the caller knows which clients still need the oldest
frame. What has left is remembered by channel, as the last frame that was evicted there. So a client
is told a gap only if something was lost that it wanted.

A number is a place in this process. An id is what clients see: `MILLISECONDS-N`, growing, also over
restarts. A client that comes back brings an id, and `locate` turns it into a number:

    known       Every frame after the id is kept. The client goes on as if it had never left.
    evicted     Frames that it wanted are gone: a gap.
    unknown     The id is from the future, from another epoch, or not ours at all: a gap, too.

An epoch is a stretch of the log in which ids grow. A new one begins when a store comes back with
lower ids, because it was restored from a backup. A client with an id from before gets all that is
kept of the new epoch.

No socket, no thread, no clock and no lock in here: hold the mutex of the hub.
"""
from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, Union

from sse_core.engine import frames as encoding
from sse_core.engine.frames import BATCH, Id, chunk, unchunk, with_id

# Bytes of all frames, with what Python needs for each. That is 64 events of the largest size.
MAX_BYTES = 64 << 20

# Bytes that Python needs to keep a frame, beside those of its chunk. Measured: 325 to 330.
FRAME_COST = 330

# Frames that are kept even with `history=0`, for clients whose sockets are full for a moment.
MIN_FRAMES = 64

# Channels whose last evicted frame is remembered one by one. Beyond that, the channels that have
# been quiet longest share one memory. They may be told a gap that was none, never the reverse.
MAX_CHANNELS = 10_000

# Bytes of chunks that `latest` returns, at most. Each client that asks has them to itself.
MAX_LATEST = BATCH

# Frames that a scan looks at before it ends, so that a client which wants none of them holds up
# nobody.
SCAN_LIMIT = 1024

# Lagging clients with one subscription often stand at one place, and then share a batch.
CACHED_BATCHES = 64

# Sorts before every id. As the newest id that is missing, it means that nothing is missing.
NOTHING: Id = (-1, 0)

Bytes = Union[bytes, memoryview]


class Frame(NamedTuple):
    """An event as it is sent."""

    # Its place in the log.
    number: int

    # None for an event of the server's own, such as a gap, and without ids.
    id: Id | None

    # The newest id up to and including this frame.
    newest_id: Id

    # None for an event that goes to every client.
    channel: str | None

    # When it was appended, in seconds of the caller's clock.
    time: float

    # The event as exactly one HTTP chunk.
    chunk: bytes


# A frame that was evicted: its number, and its id or one that sorts between its neighbours'.
Evicted = tuple[int, tuple[int, ...]]


class Log:
    """Keep the newest `history` frames, MIN_FRAMES at least, and at most `size` bytes of them.

    began_with: the id after which ids begin.
    """

    def __init__(self, history: int, began_with: Id = (0, 0), size: int = MAX_BYTES) -> None:
        # False with `history=0`: then the wire is the original's, byte for byte.
        self.has_ids = history > 0

        # The frames that are kept: first <= number < next.
        self.first = self.next = 0
        self._frames: dict[int, Frame] = {}

        # Their bytes, and the bounds of both.
        self._bytes = 0
        self._size = size
        self._count = max(MIN_FRAMES, history)

        # The id of the newest event, which `next_id` exceeds.
        self.last_id = began_with

        # The current epoch: the number of its first frame, and an id for which nothing of it is
        # missing.
        self._epoch = 0
        self._began_with = began_with

        # The newest event that was missing already when the epoch began, on whatever channel: a
        # store may have removed it, or hold more than was loaded.
        self._missing = NOTHING

        # The last frame that was evicted, by channel. The channel whose turn was last stands last.
        self._evicted: OrderedDict[str | None, Evicted] = OrderedDict()

        # The same for every channel that is not in there.
        self._forgotten: Evicted = -1 << 63, (0, 0)

        # The newest event that is kept, by channel.
        self._newest: dict[str | None, Frame] = {}

        # Call `batch.cache_clear` now and then, so that what it remembers does not stay in memory.
        self.batch = lru_cache(CACHED_BATCHES)(self._join)

    # What enters and leaves

    def has_room(self, length: int, share: float = 1.0) -> bool:
        """Return whether a frame of `length` bytes fits into this share of the log.

        An empty log has room for any frame.
        """
        kept = self.next - self.first
        is_small = self._bytes + length + FRAME_COST <= self._size * share
        return kept == 0 or kept < self._count * share and is_small

    def append(self, payload: bytes, event_id: Id | None, channel: str | None,
               time: float) -> Frame:
        """Append an encoded event, and return its frame. An event of the server's own has no id."""
        event_id = event_id if self.has_ids else None
        if event_id is not None:
            if event_id <= self.last_id:
                self._epoch, self._began_with = self.next, event_id
                self._missing = NOTHING
            self.last_id = event_id
            payload = with_id(payload, event_id)
        frame = Frame(self.next, event_id, self.last_id, channel, time, chunk(payload))
        self._frames[frame.number] = frame
        if event_id is not None:
            self._newest[channel] = frame
        self._bytes += len(frame.chunk) + FRAME_COST
        self.next += 1
        return frame

    def evict(self) -> None:
        """Remove the oldest frame, and remember that its channel has lost it."""
        frame = self._frames.pop(self.first)
        self._bytes -= len(frame.chunk) + FRAME_COST
        self.first += 1
        if self._newest.get(frame.channel) is frame:
            del self._newest[frame.channel]
        # A frame without an id came after the newest one: (ms, n) < (ms, n, 1) < (ms, n + 1).
        self._evicted[frame.channel] = frame.number, frame.id or (*frame.newest_id, 1)
        self._evicted.move_to_end(frame.channel)
        if len(self._evicted) > MAX_CHANNELS:
            self._forgotten = self._evicted.popitem(last=False)[1]

    def begin(self, missing: Id) -> None:
        """Note, once what a store held is loaded, which event is the newest that is missing in it.

        NOTHING: none is.
        """
        self._missing = missing
        self._began_with = max(missing, (0, 0))
        self.last_id = max(missing, self.last_id)

    def next_id(self, milliseconds: int) -> Id:
        """Return the id of an event that is published at this time, in milliseconds since 1970.

        If the clock was set back, the last time is used on, with a higher counter.
        """
        last = self.last_id
        return (milliseconds, 0) if milliseconds > last[0] else (last[0], last[1] + 1)

    def with_line_ends(self, payload: bytes) -> bytes:
        """Return an encoded event with the line ends of this log."""
        return payload if self.has_ids else encoding.with_original_line_ends(payload)

    # Where a client goes on

    def locate(self, event_id: Id | None, channels: Iterable[str] = ()) -> tuple[int, str | None]:
        """Return the number of the frame that follows an id, and the reason of a gap, or None.

        channels: those that the client asked for.

        An id that is not kept is `unknown` if it lies between two frames that are, or before the
        epoch. It can be one of ours only if it lies before the oldest frame, and something of this
        epoch was evicted.
        """
        oldest = max(self.first, self._epoch)
        # It is no id, or from the future: nobody knows what the client has had.
        if event_id is None or event_id > self.last_id:
            return oldest, "unknown"
        number = self._at(event_id)
        is_kept = number < self.next and self._frames[number].id == event_id
        # A store had newer events than this one which are not in the log.
        if event_id < self._missing:
            return number + is_kept, "evicted"
        if is_kept:
            return number + 1, None
        may_have_left = number == oldest > self._epoch and event_id > self._began_with
        if event_id != self._began_with and not may_have_left:
            return number, "unknown"
        return number, "evicted" if self._newest_gone(channels) > event_id else None

    def locate_time(self, milliseconds: float, channels: Iterable[str]) -> tuple[int, str | None]:
        """Return the number of the first frame from a time on, and the reason of a gap, or None.

        milliseconds: since 1970; 0 for all there ever was.
        """
        begin = int(milliseconds), 0
        number = self._at(begin)
        # A gap that was told to everybody says what is missing before the frame that follows it.
        if number > self.first and self._frames[number - 1].id is None:
            number -= 1
        return number, "evicted" if self._newest_gone(channels) >= begin else None

    def latest(self, channels: Iterable[str]) -> tuple[list[bytes], int, str | None]:
        """Return what `since=latest` gives: the newest event on each channel, and without one.

        That is all of these events but the last one, as chunks in order; the number of the last
        one; and the reason of a gap, or None. If the chunks have more than MAX_LATEST bytes, the
        oldest are left out, which is a gap.
        """
        newest = sorted(self._newest[each] for each in (None, *channels) if each in self._newest)
        kept: list[bytes] = []
        for frame in newest[-2::-1]:
            if sum(map(len, kept)) + len(frame.chunk) > MAX_LATEST:
                break
            kept.insert(0, frame.chunk)
        reason = "evicted" if len(kept) < len(newest) - 1 else None
        return kept, newest[-1].number if newest else self.next, reason

    def has_lost(self, cursor: int, channels: Iterable[str]) -> bool:
        """Return whether a frame that a client at this cursor wanted has left the log."""
        return self._last_evicted(channels)[0] >= cursor

    def _at(self, event_id: Id) -> int:
        """Return the number of the first frame of this epoch that is not older, or `next`."""
        low, high = max(self.first, self._epoch), self.next
        while low < high:
            middle = (low + high) // 2
            if self._frames[middle].newest_id < event_id:
                low = middle + 1
            else:
                high = middle
        return low

    def _newest_gone(self, channels: Iterable[str]) -> tuple[int, ...]:
        """Return the newest id of this epoch that was evicted, or missing, on these channels."""
        number, newest = self._last_evicted(channels)
        return max(self._missing, newest) if number >= self._epoch else self._missing

    def _last_evicted(self, channels: Iterable[str]) -> Evicted:
        # Events without a channel go to everybody, so their loss concerns every client.
        return max(self._evicted.get(channel, self._forgotten) for channel in (None, *channels))

    # What is read

    def frame(self, number: int) -> Frame:
        """Return the frame with this number, which must be kept."""
        return self._frames[number]

    def first_id(self, start: int, channels: Collection[str]) -> Id | None:
        """Return the id of the first event from `start` on for a client of these channels.

        None if SCAN_LIMIT frames have none.
        """
        kept = (self._frames[number] for number in range(start, min(self.next, start + SCAN_LIMIT)))
        return next((frame.id for frame in kept if frame.id and (
            frame.channel is None or frame.channel in channels)), None)

    def collect(self, start: int, stop: int, channels: Collection[str] | None = None
                ) -> tuple[list[Frame], int]:
        """Return a batch of frames from `start` on, and the number after them, `stop` at most.

        channels: those of a client, which gets frames without a channel, too. None: all frames.

        It looks at SCAN_LIMIT frames, so the number can be less than `stop`, whatever was found.
        """
        found: list[Frame] = []
        length = 0
        end = min(stop, start + SCAN_LIMIT)
        for number in range(start, end):
            frame = self._frames[number]
            if channels is None or frame.channel is None or frame.channel in channels:
                length += len(frame.chunk)
                if length > BATCH and found:
                    return found, number
                found.append(frame)
        return found, end

    def _join(self, start: int, stop: int, channels: frozenset[str], chunked: bool
              ) -> tuple[Batch, int]:
        """Return what `collect` does, joined for one send. `batch` remembers some of it."""
        found, end = self.collect(start, stop, channels)
        return Batch(found, chunked), end


class Batch:
    """Frames that are joined for one send. One frame alone is not copied.

    chunked: False for clients of HTTP/1.0.
    """

    def __init__(self, frames: Sequence[Frame], chunked: bool) -> None:
        self.frames = frames

        # Each frame as it is sent, and all of them.
        self._parts: list[Bytes] = [f.chunk if chunked else unchunk(f.chunk) for f in frames]
        self.data: Bytes = self._parts[0] if len(frames) == 1 else b"".join(self._parts)

        # Where in the data each frame ends. Made by the first cut: most batches are sent whole.
        self._ends: list[int] = []

    def cut(self, sent: int) -> tuple[int, Bytes]:
        """Return how many frames are begun after `sent` bytes, and what is left of the last one."""
        self._ends = self._ends or list(accumulate(map(len, self._parts)))
        whole = bisect_right(self._ends, sent)
        start = self._ends[whole - 1] if whole else 0
        if sent == start:
            return whole, b""
        # A view, because a copy of a long frame for each send of a part of it would cost too much.
        return whole + 1, memoryview(self._parts[whole])[sent - start:]
