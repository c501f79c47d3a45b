"""Keep the newest frames, bounded, in the order of their ids."""
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from itertools import accumulate
from typing import Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from sse_core.frames import BATCH, Id, chunk, parse_id, unchunk

MAX_LOG = 64 << 20          # bytes of frames in the log
MIN_HISTORY = 64            # frames the log keeps even for --history 0, so that a slow client finds its place again
MAX_CHANNELS = 10000        # channels of which the log remembers what left it; older ones share one memory


class Frame(NamedTuple):
    """One event, encoded once."""
    number: int                 # its place in the log, counted from 0 and never used again
    id: Optional[Id]
    channel: Optional[str]
    time: float                 # seconds, on the caller's clock, when it was appended
    chunk: bytes


class Evicted(NamedTuple):
    """What is remembered of a frame that left the log."""
    number: int
    id: Id


class Log:
    """Hold the newest frames: at most `history` of them (64 at least) and at most `size` bytes.

    Kept are the frames `first <= number < next`. Nothing leaves by itself: while `fits` is false the caller evicts,
    and so decides whether the oldest may go. Not locked: use it while holding the mutex that guards it.
    """

    def __init__(self, history: int, size: int = MAX_LOG) -> None:
        self.first = 0
        self.next = 0
        self.first_id: Optional[Id] = None      # the first ever appended, kept or not
        self.last_id: Id = (0, 0)
        self._evicted: "OrderedDict[Optional[str], Evicted]" = OrderedDict()    # the last that left, by channel
        self._forgotten = Evicted(-1, (0, 0))       # the same for every channel that is not in there
        self._count = max(MIN_HISTORY, history)
        self._size = size
        self._bytes = 0
        self._frames: Dict[int, Frame] = {}

    def fits(self, length: int) -> bool:
        """Say whether a frame of `length` bytes can be appended without an eviction."""
        kept = self.next - self.first
        return kept == 0 or (kept < self._count and self._bytes + length <= self._size)

    def evict(self) -> None:
        """Let go of the oldest frame."""
        frame = self._frames.pop(self.first)
        self._bytes -= len(frame.chunk)
        self.first += 1
        self._evicted[frame.channel] = Evicted(frame.number, frame.id or (0, 0))
        self._evicted.move_to_end(frame.channel)
        if len(self._evicted) > MAX_CHANNELS:
            self._forgotten = self._evicted.popitem(last=False)[1]

    def append(self, payload: bytes, id: Optional[Id], channel: Optional[str], time: float, show_id: bool = True
               ) -> Frame:
        """Append an encoded event under the next number; an id, if it has one, must be greater than the last.

        show_id: whether clients are told the id; a gap has one for its place in the log only.
        """
        if id is not None:
            assert id > self.last_id, "ids only grow"
            self.first_id, self.last_id = self.first_id or id, id
            payload = b"id: %d-%d\n%b" % (*id, payload) if show_id else payload
        frame = Frame(self.next, id, channel, time, chunk(payload))
        self._frames[frame.number] = frame
        self._bytes += len(frame.chunk)
        self.next += 1
        return frame

    def next_id(self, milliseconds: int) -> Id:
        """Return the id for an event at this time: greater than every id before it, even if the clock was set back."""
        last = self.last_id
        return (milliseconds, 0) if milliseconds > last[0] else (last[0], last[1] + 1)

    def after(self, id: Id) -> int:
        """Return the number of the first frame kept whose id is greater than `id`, or `next`."""
        low, high = self.first, self.next
        while low < high:
            middle = (low + high) // 2
            if self._frames[middle].id <= id:
                low = middle + 1
            else:
                high = middle
        return low

    def locate(self, last_id: str, channels: Iterable[str] = ()) -> Tuple[int, Optional[str]]:
        """Return the number of the frame that follows `last_id`, and None or why there may be a gap before it.

        The reason is "evicted" for an id of ours after which frames on these channels, or on none, are gone; else
        "unknown": the id is from before a restart, from the future, or not ours at all. What is kept beyond it, or
        all of it, is then the best there is.
        """
        id = parse_id(last_id)
        if id is None or id > self.last_id:
            return self.first, "unknown"
        number = self.after(id)
        if number > self.first:
            return number, None if self._frames[number - 1].id == id else "unknown"
        if not self.first_id or id < self.first_id:
            return number, "unknown"
        return number, "evicted" if self._last_evicted(channels).id > id else None

    def lost(self, cursor: int, channels: Iterable[str]) -> bool:
        """Say whether a frame on these channels, or on none, has left the log since it was at `cursor`."""
        return self._last_evicted(channels).number >= cursor

    def _last_evicted(self, channels: Iterable[str]) -> "Evicted":
        return max(self._evicted.get(channel, self._forgotten) for channel in (None, *channels))

    def frame(self, number: int) -> Frame:
        """Return the frame with this number, which must be kept."""
        return self._frames[number]

    def read(self, start: int, stop: int) -> Iterator[Frame]:
        """Yield the frames `start <= number < stop`, all of which must be kept."""
        return (self._frames[number] for number in range(start, stop))


    def collect(self, start: int, stop: int, wants: Optional[Callable[[Frame], bool]] = None
                ) -> Tuple[List[Frame], int]:
        """Return the wanted frames from `start` on, at most a batch of them, and the number of the frame after these."""
        found: List[Frame] = []
        length = 0
        for number in range(start, stop):
            frame = self._frames[number]
            if wants is None or wants(frame):
                length += len(frame.chunk)
                if length > BATCH and found:
                    return found, number
                found.append(frame)
        return found, stop


class Batch:
    """Join frames once for one send, and find the frame in which a send stopped."""

    def __init__(self, frames: Sequence[Frame], chunked: bool) -> None:
        self.frames = frames
        self._parts: List[Union[bytes, memoryview]] = [frame.chunk if chunked else unchunk(frame.chunk) for frame in frames]
        self.data = b"".join(self._parts)
        self._ends: List[int] = []      # made by the first cut: most batches are taken whole

    def cut(self, sent: int, committed: int = 0) -> Tuple[int, memoryview]:
        """Return how many frames are begun after `sent` bytes, and what is left to be sent of these.

        Begun is also what reaches into the `committed` bytes after those that are sent.
        """
        self._ends = self._ends or list(accumulate(map(len, self._parts)))
        first = bisect_right(self._ends, sent)
        start = self._ends[first - 1] if first else 0
        if sent == start and not committed:
            return first, memoryview(b"")
        last = bisect_left(self._ends, sent + committed) if committed else first
        parts = self._parts[first:last + 1]         # one of them is not copied: it can be long, and the log has it too
        return last + 1, memoryview(parts[0] if len(parts) == 1 else b"".join(parts))[sent - start:]
