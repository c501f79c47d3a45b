"""A model of what each client of the engine must have been sent.

`Story` is all that was published and how much of it is kept, `Reader` is a client. Both are written
from what the server promises, and share no code with it but the list of bounds.
"""
import json
import re
from typing import Iterable, List, NamedTuple, Optional, Tuple
from zlib import crc32

from bench import Bench, Narrow, Peer
from wire import Decoder, Event

ID_ROOM = 64            # bytes for which there must be room beside an event, whatever its id
OVERHEAD = 330          # bytes that an entry counts beside those of its frame
WIDE = 1 << 40
Id = Tuple[int, int]


def spelled(id: Optional[Id]) -> Optional[str]:
    return id and f"{id[0]}-{id[1]}"


def parsed(text: str) -> Optional[Id]:
    match = re.fullmatch(r"(0|[1-9]\d{0,19})-(0|[1-9]\d{0,19})", text, re.ASCII)
    return match and (int(match[1]), int(match[2]))


def with_one_end(data: str) -> str:
    """Return data as a client sees it, whose lines all end in LF."""
    return data.replace("\r\n", "\n").replace("\r", "\n")


class Entry(NamedTuple):
    """One place in the log: an event, or the gap that a source tells."""
    number: int
    id: Optional[Id]
    channel: Optional[str]
    name: str
    data: str
    size: int


class Story:
    """All that was ever published, and how much of it is kept."""

    def __init__(self, history: int, size: int, began: Id) -> None:
        self.ids, self.count, self.size = history > 0, max(64, history), size
        self.entries: List[Entry] = []
        self.first, self.kept_bytes = 0, 0      # the oldest one kept, and the bytes of all that are
        self.began, self.last, self.epoch = began, began, 0
        self.missing: Id = (-1, 0)              # the newest event of those before the first entry

    def begin(self, missing: Id) -> None:
        self.missing = missing
        self.began, self.last = max(missing, (0, 0)), max(missing, self.last)

    def evictions(self, length: int) -> int:
        """Return how many entries must go, so that so many bytes fit."""
        first, kept = self.first, self.kept_bytes
        while first < len(self.entries) and (len(self.entries) - first >= self.count
                                             or kept + length + OVERHEAD > self.size):
            kept -= self.entries[first].size + OVERHEAD
            first += 1
        return first - self.first

    def append(self, id: Optional[Id], channel: Optional[str], name: str, data: str, payload: int,
               room: int) -> None:
        for _ in range(self.evictions(payload + room)):
            self.kept_bytes -= self.entries[self.first].size + OVERHEAD
            self.first += 1
        if id is not None:
            if id <= self.last:
                self.epoch, self.began, self.missing = len(self.entries), id, (-1, 0)
            self.last = id
        size = payload + 12 + (len(f"id: {spelled(id)}\n") if id else 0)
        self.entries.append(Entry(len(self.entries), id, channel, name,
                                  with_one_end(data), size))
        self.kept_bytes += size + OVERHEAD

    def next_wanted(self, start: int, channels: Iterable[str],
                    stop: Optional[int] = None) -> Optional[Entry]:
        for number in range(start, len(self.entries) if stop is None else stop):
            if self.entries[number].channel is None or self.entries[number].channel in channels:
                return self.entries[number]
        return None

    def place(self, text: str, channels: Iterable[str]) -> Tuple[int, Optional[str]]:
        """Return where a client goes on that has had this id, and why it is told a gap first."""
        id, oldest = parsed(text), max(self.first, self.epoch)
        if id is None or id > self.last:
            return oldest, "unknown"
        if id < self.began:
            return oldest, "evicted" if id < self.missing else "unknown"
        newer = next((each.number for each in self.entries[self.epoch:]
                      if each.id and each.id >= id), len(self.entries))
        if newer < len(self.entries) and self.entries[newer].id == id:
            newer += 1
        elif id == self.began:
            newer = self.epoch          # no event has it: what a source told is after it, too
        elif newer > oldest or self.first <= self.epoch:
            return newer, "unknown"     # else it may as well be one of ours that has left the log
        lost = self.next_wanted(newer, channels, self.first)
        return newer, "evicted" if lost else None


class Judged(Narrow):
    """The server's end of a client: takes `room` bytes, each judged in the moment it is sent."""
    reader: "Reader"

    def send(self, data) -> int:
        if self.reader.blocked_at is None:
            self.reader.blocked_at = self.reader.now()
        sent = super().send(data)
        if sent == len(data):
            self.reader.blocked_at = None
        self.reader.judge(bytes(data[:sent]))
        return sent


class Reader:
    """A client, and what it must be sent next."""

    def __init__(self, bench: Bench, story: Story, name: str, narrow: bool, chunked: bool,
                 channels: List[str], last_id: Optional[str]) -> None:
        self.bench, self.story, self.name = bench, story, name
        self.channels, self.chunked = channels, chunked
        self.last_id = last_id if story.ids else None
        self.stream = Decoder(chunked, self.last_id or "", original=not story.ids)
        self.at = len(story.entries)            # the entry due next
        self.gap: Optional[str] = None          # why it must be told a gap before that
        self.had = {spelled(story.last) if last_id is None else last_id} if story.ids else {None}
        if self.last_id is not None and parsed(last_id) is None:
            self.had.add(None)
        self.greeting = self.had.copy()
        self.since = self.at                    # from here on it may be said to have had the ids
        self.whole = self.gaps = self.bytes = self.sum = self.beats = 0
        # The oldest entry kept, and the number of entries, when the frame under way began
        self.then = story.first, len(story.entries)
        self.sent_at = bench.now
        self.blocked_at: Optional[float] = None
        self.held_up_at = 0.0                   # when it last could take nothing
        self.gone = self.was_full = False
        self.lags = False                       # more was due when it last took a byte
        if self.last_id is not None:
            self.at, self.gap = story.place(self.last_id, channels)
            self.since = self.at
        self.peer = Peer(bench.hub, narrow=True, peer=name, chunked=chunked,
                         channels=channels, last_id=last_id)
        self.sock = self.peer.server_end
        self.sock.__class__, self.sock.reader = Judged, self
        self.sock.room, self.narrow = 0 if narrow else WIDE, narrow
        bench.peers.append(self.peer)

    def now(self) -> float:
        return self.bench.now

    def judge(self, data: bytes) -> None:
        """Hold bytes that are being sent against what is due."""
        now, stream, story = self.bench.now, self.stream, self.story
        silent, under_way = now - self.sent_at, stream.partial if stream.head else b""
        self.sent_at, self.bytes, self.sum = now, self.bytes + len(data), crc32(data, self.sum)
        self.was_full = False
        payloads, events, comments = len(stream.payloads), len(stream.events), stream.comments
        stream.feed(data)
        if story.ids and not payloads and stream.payloads:
            self.greeted(stream.payloads[0])
        if stream.comments > comments and not under_way:
            assert silent >= self.bench.heartbeat > 0, "a heartbeat too early"
        began_now = not under_way or stream.comments > comments or story.ids and not payloads
        kept = story.first, len(story.entries)
        for index, event in enumerate(stream.events[events:]):
            self.told(event, *(kept if index or began_now else self.then))
        if began_now or len(stream.payloads) > payloads:
            self.then = kept
        self.lags = self.due() is not None
        assert not (stream.ended and self.lags), "ended while something is due"

    def greeted(self, payload: bytes) -> None:
        due = rb"retry: \d+\n"
        if self.last_id is None:
            id = self.greeting.copy().pop().encode()
            due = rb"event: welcome\nretry: \d+\ndata: {\"heartbeat\": \d+}\nid: %b\n\n" % id
        assert re.fullmatch(due, payload), payload

    def told(self, event: Event, first: int, end: int) -> None:
        lost = self.story.next_wanted(self.at, self.channels, first)
        if not (self.gap or lost):
            entry = self.due()
            assert entry, f"nothing is due: {event}"
            assert (event.name, event.data) == (entry.name, entry.data), f"due is {entry}"
            assert not entry.id or event.id == spelled(entry.id)
            self.at, self.since, self.whole = entry.number + 1, entry.number, self.whole + 1
            earlier = self.story.entries[entry.number::-1]
            newest = next((each.id for each in earlier if each.id), None)
            self.had = {event.id, spelled(newest)} if self.story.ids else {None}
            return
        assert event.name == "gap", f"no gap is told before {event}, due is {self.due()}"
        told = json.loads(event.data)
        had = {self.last_id} if self.gap else self.had | {
            spelled(each.id) for each in self.story.entries[self.since:lost.number] if each.id}
        at = max(self.at, first)
        resumed = next((each.id for each in self.story.entries[at:end] if each.id and (
            each.channel is None or each.channel in self.channels)), None)
        assert told["after"] in had, f"{told}, not after {had}"
        assert told["resumed"] == spelled(resumed), (told, resumed)
        assert told["reason"] == (self.gap or "lagging"), told
        self.at, self.gap, self.gaps = at, None, self.gaps + 1

    def due(self) -> Optional[Entry]:
        return self.story.next_wanted(self.at, self.channels)

    def is_full(self) -> bool:
        """Say whether the kernel may hold so much that the socket does not count as writable."""
        return self.bytes - len(self.peer.raw) > 50_000

    def take(self) -> None:
        self.peer.stream = self     # the bytes were judged when sent: only their sum is compared
        self.peer.take()

    def feed(self, data: bytes) -> None:
        """Take the place of the decoder at the peer's end."""
