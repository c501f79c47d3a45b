"""Keep the newest frames, bounded in number and bytes; find the place of a client in them.

No socket, no thread, no clock and no lock in here: hold the mutex that guards it.
"""
from __future__ import annotations

import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Callable, NamedTuple, Union

from sse_core.engine.frames import BATCH, Id, chunk, unchunk, with_id

MAX_BYTES = 64 << 20          # bytes of frames in the log, with what Python needs for each
MIN_FRAMES = 64            # frames it keeps even for --history 0, for clients that are slow

# Bytes that Python needs to keep a frame, beside those of its chunk. Measured: 325 to 330.
FRAME_COST = 330
MAX_LATEST = BATCH          # bytes that `latest` returns, which each client has to itself
MAX_CHANNELS = 10000        # of which it remembers what left it; older ones share one memory
# frames looked at in one go: who wants none of them holds up nobody
SCAN_LIMIT = 1024
Bytes = Union[bytes, memoryview]
Evicted = tuple[int, tuple[int, ...]]   # of a frame that is gone: number; id, or one between two

# Older than every id: no event is missing before the log.
NOTHING: Id = (-1, 0)


class Frame(NamedTuple):
    """One event, encoded once."""
    number: int                 # its place in the log; what was loaded is numbered up to -1
    id: Id | None               # None: the event has none
    newest_id: Id                  # the newest id up to here: its own, if it has one
    channel: str | None
    time: float                 # seconds, on the caller's clock, when it was appended
    chunk: bytes


class Log:
    """Hold the newest frames: at most `history` of them (64 at least) and at most `size` bytes.

    Kept are the frames `first <= number < next`. Nothing leaves by itself: while `has_room` is
    false
    the caller evicts, and so decides whether the oldest may go.

    Ids grow. One that does not begins a new epoch: ids from before are unknown from there on, and
    a client that has one gets all that is kept of the new epoch.

    Events can be missing from the beginning: a store may have removed them, or hold more than was
    loaded. `begin` is told the newest of their ids.
    """

    def __init__(self, history: int, began_with: Id = (0, 0), size: int = MAX_BYTES) -> None:
        self.first = self.next = 0
        self.last_id = began_with               # of the newest event that has one

        # The first id of this epoch, or one before it: a client that has it missed nothing.
        self._began_with = began_with

        # Number of the frame with which this epoch began.
        self._epoch = 0

        # The newest id that was missing when it began, on whatever channel.
        self._missing = NOTHING

        self._evicted: OrderedDict[str | None, Evicted] = OrderedDict()  # the last, by channel
        self._forgotten: Evicted = -1 << 63, (0, 0)     # for every channel that is not in there
        self._count = max(MIN_FRAMES, history)
        self._size = size
        self._bytes = 0
        self._frames: dict[int, Frame] = {}
        self._newest: dict[str | None, Frame] = {}      # kept of each channel

    def has_room(self, length: int, share: float = 1.0) -> bool:
        """Say whether `length` bytes can be appended within this share of the log."""
        kept = self.next - self.first
        is_small = self._bytes + length + FRAME_COST <= self._size * share
        return kept == 0 or kept < self._count * share and is_small

    def evict(self) -> None:
        """Let go of the oldest frame."""
        frame = self._frames.pop(self.first)
        self._bytes -= len(frame.chunk) + FRAME_COST
        self.first += 1
        if self._newest.get(frame.channel) is frame:
            del self._newest[frame.channel]
        # A frame without an id came after the newest one: (ms, n) < (ms, n, 1) < (ms, n + 1)
        self._evicted[frame.channel] = frame.number, frame.id or (*frame.newest_id, 1)
        self._evicted.move_to_end(frame.channel)
        if len(self._evicted) > MAX_CHANNELS:
            self._forgotten = self._evicted.popitem(last=False)[1]

    def append(self, payload: bytes, event_id: Id | None, channel: str | None,
               time: float) -> Frame:
        """Append an encoded event under the next number. A gap has no id."""
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

    def begin(self, missing: Id) -> None:
        """Say which event is the newest of those that are missing in what was loaded, or NOTHING.
        """
        self._missing = missing
        self._began_with = max(missing, (0, 0))
        self.last_id = max(missing, self.last_id)

    def next_id(self, milliseconds: int) -> Id:
        """Return the id for an event at this time: it grows even if the clock was set back."""
        last = self.last_id
        return (milliseconds, 0) if milliseconds > last[0] else (last[0], last[1] + 1)

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

    def locate(self, event_id: Id | None, channels: Iterable[str] = ()) -> tuple[int, str | None]:
        """Return the number of the frame that follows an id, and why there may be a gap, if so.

        "evicted": the id may be ours, and frames after it on these channels, or on none, are gone.
        "unknown": it is of another epoch, of the future, or not ours at all. So is one that lies
        before the oldest frame kept, unless it is the beginning, or something was evicted since.
        """
        oldest = max(self.first, self._epoch)
        if event_id is None or event_id > self.last_id:
            return oldest, "unknown"
        number = self._at(event_id)
        is_kept = number < self.next and self._frames[number].id == event_id
        if event_id < self._missing:
            return number + is_kept, "evicted"
        if is_kept:
            return number + 1, None
        may_have_left = number == oldest > self._epoch and event_id > self._began_with
        if event_id != self._began_with and not may_have_left:
            return number, "unknown"
        return number, "evicted" if self._newest_gone(channels) > event_id else None

    def locate_time(self, milliseconds: float, channels: Iterable[str]) -> tuple[int, str | None]:
        """Return the number of the first kept frame from a time on; "evicted" if newer are gone.

        0 is for all there ever was, and inf for the newest frames, see `latest`: "evicted" if that
        leaves some of these out.
        """
        if milliseconds == math.inf:
            found = self._newest_of(channels)
            is_cut = len(self.latest(channels)) < len(found) - 1
            return (found[-1].number if found else self.next), "evicted" if is_cut else None
        begin = int(milliseconds), 0
        number = self._at(begin)
        # A gap that was told to everybody says what is missing before the frame that follows it.
        if number > self.first and self._frames[number - 1].id is None:
            number -= 1
        return number, "evicted" if self._newest_gone(channels) >= begin else None

    def _newest_gone(self, channels: Iterable[str]) -> tuple[int, ...]:
        """Return the newest id of this epoch that these channels, or none, have not any more."""
        number, newest = self._last_evicted(channels)
        return max(self._missing, newest) if number >= self._epoch else self._missing

    def latest(self, channels: Iterable[str]) -> list[bytes]:
        """Return the newest kept frame of each of these channels and of none, in order.

        Without the last of them, with which `locate_time` begins; MAX_LATEST bytes of the newest.
        """
        kept: list[bytes] = []
        for frame in self._newest_of(channels)[-2::-1]:
            if sum(map(len, kept)) + len(frame.chunk) > MAX_LATEST:
                break
            kept.insert(0, frame.chunk)
        return kept

    def _newest_of(self, channels: Iterable[str]) -> list[Frame]:
        return sorted(self._newest[each] for each in (None, *channels) if each in self._newest)

    def has_lost(self, cursor: int, channels: Iterable[str]) -> bool:
        """Say whether a frame on these channels, or on none, has left the log from `cursor` on."""
        return self._last_evicted(channels)[0] >= cursor

    def _last_evicted(self, channels: Iterable[str]) -> Evicted:
        return max(self._evicted.get(channel, self._forgotten) for channel in (None, *channels))

    def frame(self, number: int) -> Frame:
        """Return the frame with this number, which must be kept."""
        return self._frames[number]

    def first_id(self, start: int, wants: Callable[[Frame], bool]) -> Id | None:
        """Return the first id of a wanted frame from `start` on; None if SCAN_LIMIT frames have
        none."""
        kept = (self._frames[number] for number in range(start, min(self.next, start + SCAN_LIMIT)))
        return next((frame.id for frame in kept if frame.id and wants(frame)), None)

    def collect(self, start: int, stop: int, wants: Callable[[Frame], bool] | None = None
                ) -> tuple[list[Frame], int]:
        """Return the wanted frames from `start` on, a batch at most, and the number after these.

        It looks at SCAN_LIMIT frames, so that number can be less than `stop`, whatever was found.
        """
        found: list[Frame] = []
        length = 0
        end = min(stop, start + SCAN_LIMIT)
        for number in range(start, end):
            frame = self._frames[number]
            if wants is None or wants(frame):
                length += len(frame.chunk)
                if length > BATCH and found:
                    return found, number
                found.append(frame)
        return found, end


class Batch:
    """Join frames for one send; find the frame in which that stopped. One alone is not copied."""

    def __init__(self, frames: Sequence[Frame], chunked: bool) -> None:
        self.frames = frames
        self._parts: list[Bytes] = [f.chunk if chunked else unchunk(f.chunk) for f in frames]
        self.data: Bytes = self._parts[0] if len(frames) == 1 else b"".join(self._parts)
        self._ends: list[int] = []      # made by the first cut: most batches are taken whole

    def cut(self, sent: int) -> tuple[int, Bytes]:
        """Return how many frames are begun after `sent` bytes, and what is left of the last one."""
        self._ends = self._ends or list(accumulate(map(len, self._parts)))
        whole = bisect_right(self._ends, sent)
        start = self._ends[whole - 1] if whole else 0
        if sent == start:
            return whole, b""
        return whole + 1, memoryview(self._parts[whole])[sent - start:]     # no copy of a long one
