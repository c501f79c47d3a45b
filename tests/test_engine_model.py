"""Random operations on the engine, against a model of what each client must have been sent.

The engine is turned by hand, so that the model (model.py) judges each byte as it is sent.
"""
import json
import random
import socket
import time
from typing import List, Optional, Tuple
from zlib import crc32

import pytest

from bench import Bench, Peer, stream_request, piped
from helpers import in_a_thread
from model import ID_ROOM, WIDE, Id, Reader, Story, parsed, spelled, with_one_end
from sse_core.engine import frames
from sse_core.engine.log import NOTHING
from sse_core.stores.store import StoredEvent as Coming
from wire import Decoder, Event

STALL = 30.0


class Driver:
    """Random operations, and what must hold after each."""

    def __init__(self, seed: int) -> None:
        self.draw = draw = random.Random(seed)
        history = draw.choice((0, 64, 64, 100, 400))
        self.shared = bool(history) and draw.random() < 0.4
        self.skew = 0.0
        self.bench = Bench(draw.choice((0.0, 2.0, 10.0)), history=history, shared=self.shared,
                           max_clients=40)
        self.bench.heartbeat = self.bench.publisher._heartbeat
        self.hub, self.publisher = self.bench.hub, self.bench.publisher
        self.hub.wall = lambda: self.bench.now + self.skew
        size = self.hub._log._size = draw.choice((64 << 20, 300_000, 20_000))
        self.story = Story(history, size, (0, 0) if self.shared else (1_000_000, 0))
        self.complete_at, self.preloaded = -1.0 if self.shared else 1e9, 0
        self.readers: List[Reader] = []
        self.left: List[Reader] = []
        self.texts, self.closed = 0, False
        # Who joins amid a backlog is sent nothing in the turn that ends it, unlike its group
        self.is_behind, self.behind_at = False, 0.0

    def run(self, operations: int) -> None:
        choices = [self.publish] * 6 + [self.register] * 2 + [self.give_room] * 8
        choices += [self.turn] * 8 + [self.take] * 2
        choices += [self.burst, self.leave, self.later, self.set_clock]
        choices += [self.tell_gap, self.complete] * self.shared
        if self.shared:
            self.preload()
        for _ in range(operations):
            self.draw.choice(choices)()
        self.finish()

    # Events

    def event(self) -> Tuple[str, str, Optional[str], int]:
        sizes = 0, 1, 10, 50, 50, 200, 200, 2000, 9000, 70_000, 200_000
        size = self.draw.choice(sizes[:self.draw.choice((6, 8, 11))])
        self.texts += 1
        filling = self.draw.choice(("x", "\n", "é\r\n", "y\r")) if size < 500 else "x"
        data = (f"{self.texts} " + filling * size)[:size]
        name = self.draw.choice(("", "", "custom", "n\u00e4me"))
        end = "\n" if self.story.ids else "\r\n"
        lines = with_one_end(data).replace("\n", f"{end}data: ")
        payload = f"event: {name}\n" * bool(name) + f"data: {lines}{end}{end}"
        return data, name, self.draw.choice((None, None, "a", "b", "c")), len(payload.encode())

    def make_way(self, length: int) -> None:
        """Turn until an event can be published without waiting for the publisher."""
        gone, kept = self.story.evictions(length), len(self.story.entries) - self.story.first
        most = (kept - gone + 1) * 3 / 4
        while gone and self.hub._log.next - self.hub.fanned_out > most:
            self.turn()

    def publish(self, small: bool = False) -> None:
        data, name, channel, length = self.event()
        while small and length > 500:
            data, name, channel, length = self.event()
        self.make_way(length + ID_ROOM)
        if self.shared:
            return self.add(data, name, channel, length)
        last, ms = self.story.last, int((self.bench.now + self.skew) * 1000)
        id = ((ms, 0) if ms > last[0] else (last[0], last[1] + 1)) if self.story.ids else None
        assert self.hub.publish(data, name or None, channel) == spelled(id)
        self.story.append(id, channel, name or "message", data, length, ID_ROOM)

    def add(self, data: str, name: str, channel: Optional[str], length: int) -> None:
        ms, n = self.story.last
        id = self.draw.choice(((ms, n + 1), (ms + 1, 0), (ms + self.draw.randrange(1, 50), 3)))
        if ms > 10 and self.draw.random() < 0.004:      # a new epoch
            id = self.draw.randrange(ms), self.draw.randrange(3)
            self.tell_gap()
            self.make_way(length + ID_ROOM)
        self.hub.add(Coming(id, frames.encode(data, name), channel))
        self.story.append(id, channel, name or "message", data, length, ID_ROOM)

    def burst(self) -> None:
        for _ in range(self.draw.randrange(2 * self.story.count)):
            self.publish(small=True)

    def tell_gap(self) -> None:
        after, resumed = self.story.last, (self.story.last[0], self.story.last[1] + 5)
        data = json.dumps({"after": spelled(after), "resumed": spelled(resumed),
                           "reason": "evicted"})
        self.make_way(len(data) + 30)
        self.hub.tell_gap(resumed)
        payload = f"event: gap\ndata: {data}\nid: {spelled(after)}\n\n"
        self.story.append(None, None, "gap", data, len(payload), 0)

    def preload(self) -> None:
        """There are no clients yet."""
        coming, missing = [], self.draw.choice(((-1, 0), (7, 3), (49, 9)))
        for number in range(self.draw.choice((0, 5, 150))):
            data, name, channel, length = self.event()
            id = 50 + number // 3, number % 3
            coming.append(Coming(id, frames.encode(data, name), channel))
            self.story.append(id, channel, name or "message", data, length, ID_ROOM)
        self.hub.preload(iter(coming), missing)
        self.story.begin(missing)
        self.preloaded = len(coming)

    def complete(self) -> None:
        self.complete_at = self.bench.now - self.draw.choice((0, 0, 1))
        self.hub.complete(self.complete_at)

    # Clients

    def register(self) -> None:
        if len(self.readers) >= 40:
            return
        entries = self.story.entries
        known = self.draw.sample(entries[-600:], min(5, len(entries)))
        first = max(0, self.story.first - 3)        # where it is decided what is lost
        known += entries[first:first + 6]
        ids = [entry.id for entry in known if entry.id] + [self.story.last, self.story.began]
        ms = self.story.last[0]
        others = ("", "0-0", "garbage", "5-05", f"{ms + 40}-0", f"{ms + 10**6}-7",
                  f"{max(0, ms - 3)}-{self.draw.randrange(9)}")
        known_id = spelled(self.draw.choice(ids))
        last_id = self.draw.choice((None, None, known_id, known_id, self.draw.choice(others)))
        channels = [name for name in "abd" if self.draw.random() < 0.4]
        id = parsed(last_id or "x")
        came_at = self.bench.now - self.draw.choice((0, 1))
        if self.story.ids and id and id > self.story.last and self.complete_at <= came_at:
            return self.refuse(last_id, came_at)
        self.readers.append(Reader(self.bench, self.story,
                                   f"peer {len(self.left) + len(self.readers)}",
                                   self.draw.random() < 0.7, self.draw.random() < 0.8, channels,
                                   last_id))

    def refuse(self, last_id: str, came_at: float) -> None:
        """What it had before it came may come yet."""
        ours, peer = socket.socketpair()
        with ours, peer:
            assert not self.hub.register(ours, stream_request(last_id=last_id, came_at=came_at))

    def give_room(self) -> None:
        for reader in self.draw.sample(self.readers, min(2, len(self.readers))):
            if reader.narrow:
                frame = reader.due().size + self.draw.randrange(-2, 3) if reader.due() else 5
                some = self.draw.randrange(300)
                reader.sock.room = self.draw.choice(
                    (frame, frame, 0, 1, 2, 13, some, 5000, 70_000, 1 << 20))

    def take(self) -> None:
        for reader in self.readers:
            reader.take()

    def leave(self) -> None:
        if self.readers and self.draw.random() < 0.3:
            reader = self.draw.choice(self.readers)
            reader.peer.sock.close()
            reader.gone = True
            self.turn()
            self.turn()

    # Time

    def set_clock(self) -> None:
        self.skew = self.draw.choice((0.0, -5.0, 3.0))

    def later(self) -> None:
        for _ in range(self.draw.choice((1, 3, 40))):
            self.bench.now += self.draw.choice((0.01, 0.3, 1.0))
            self.turn()

    def turn(self) -> None:
        self.publisher.turn(0)
        if self.is_behind:
            self.behind_at = self.bench.now
        self.is_behind = self.hub.has_work()
        self.check_drops()
        self.check_heartbeats()

    def check_drops(self) -> None:
        """Dropped are those that left, or took no byte for STALL seconds, and no others."""
        for reader in list(self.readers):
            reader.was_full |= reader.is_full()
            lagged = ((reader.was_full or reader.lags)
                      and self.bench.now - reader.sent_at >= STALL)
            stalled = self.bench.now - max(reader.sent_at, reader.blocked_at or 0.0)
            if reader.sock.sock.fileno() < 0:
                is_due = reader.gone or stalled >= STALL or lagged
                assert is_due, f"{reader.name} was dropped after {stalled}"
                self.readers.remove(reader)
                self.left.append(reader)
            else:
                late = reader.blocked_at is not None and stalled >= STALL + 2
                assert not late, f"{reader.name} was not dropped after {stalled}"

    def check_heartbeats(self) -> None:
        longest = self.bench.heartbeat + min(1.0, self.bench.heartbeat / 8) + 1e-6
        for reader in self.readers if self.bench.heartbeat else ():
            if reader.blocked_at is not None or reader.is_full():
                reader.held_up_at = self.bench.now
            silent = self.bench.now - max(reader.sent_at, reader.held_up_at, self.behind_at)
            assert silent < longest, f"{reader.name} was sent nothing for {silent}"

    # The end

    def finish(self) -> None:
        for _ in range(3):      # whoever left is gone then
            self.turn()
        self.check_figures()
        if self.draw.random() < 0.3:
            return self.stop()
        self.serve_all()
        for reader in self.readers:
            assert not reader.due(), f"{reader.name} lacks {reader.due()}"
            assert not reader.gap and not reader.stream.partial, reader.name
            self.compare(reader)
        self.check_figures()
        if self.draw.random() < 0.5:
            return self.stop()
        for reader in list(self.readers):
            reader.peer.sock.close()
            reader.gone = True
        for _ in range(3):
            self.turn()
        assert not self.readers and not len(self.hub.clients)
        groups = self.publisher._groups
        assert not any((groups._groups, groups._by_channel, self.publisher._stalls._owing,
                        self.hub.clients.lagging,
                        self.hub.clients.pace._paid))

    def serve_all(self) -> None:
        """Give everybody room until nobody lags."""
        for round in range(100_000):
            for reader in self.readers:
                reader.sock.room = WIDE
            self.turn()
            self.take()
            if not self.hub.has_work() and not self.hub.stats()["lagging"]:
                for reader in self.readers:
                    reader.sock.room = 0 if reader.narrow else WIDE
                return
        raise AssertionError("somebody lags for ever")

    def compare(self, reader: Reader) -> None:
        """What arrived is what was judged; decoded again, a byte at a time, it says the same."""
        reader.take()
        assert crc32(reader.peer.raw) == reader.sum
        if len(reader.peer.raw) < 5000:
            again = Decoder(reader.chunked, reader.last_id or "",
                            original=not self.story.ids)
            for byte in reader.peer.raw:
                again.feed(bytes([byte]))
            assert again.events == reader.stream.events and again.ended == reader.stream.ended

    def check_figures(self) -> None:
        everyone, stats = self.readers + self.left, self.publisher.stats()
        partial = sum(bool(reader.stream.partial) for reader in everyone)
        own = sum(entry.name == "gap" for entry in self.story.entries)
        assert stats["events"] == len(self.story.entries) - self.preloaded - own
        assert stats["clients"] == len(self.readers)
        assert stats["bytes"] == sum(reader.bytes for reader in everyone)
        for figure, told in (("deliveries", [each.whole for each in everyone]),
                             ("gaps", [each.gaps for each in everyone])):
            assert 0 <= stats[figure] - sum(told) <= partial, figure
        assert sum(stats["drops"].values()) == len(self.left)
        listed = {each["peer"]: each for each in self.hub.describe_clients()}
        assert listed.keys() == {reader.name for reader in self.readers}
        for reader in self.readers:
            shown = listed[reader.name]
            assert shown["channels"] == len(reader.channels), reader.name
            assert 0 <= shown["lag_frames"] <= len(self.story.entries) and shown["lag_seconds"] >= 0
            is_held_up = reader.blocked_at is not None or reader.is_full()
            under_way = is_held_up or self.hub.has_work()
            assert under_way or not shown["lag_frames"] or reader.due()

    def stop(self) -> None:
        """All that do not hold it up get the end chunk, but those in the middle of a frame."""
        self.hub.stop()
        while not self.hub.done():
            self.bench.now += 0.05
            self.turn()
        before = {reader.name: (reader.blocked_at, reader.stream.partial, reader.bytes)
                  for reader in self.readers}
        for reader in self.readers:
            reader.sock.room = self.draw.choice((0, 2, WIDE))
        self.close()
        for reader in self.readers:
            blocked, partial, had = before[reader.name]
            assert not partial or reader.bytes == had, f"{reader.name}: after part of a frame"
            served = not (partial or reader.due() or reader.gap or blocked is not None)
            has_room = reader.sock.room > 5 and not reader.is_full()
            can_end = served and has_room and reader.chunked and reader.bytes
            assert not can_end or reader.stream.ended, reader.name

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.bench.stop()
        for reader in self.readers + self.left:
            reader.peer.sock.close()


def run(seed: int, operations: int = 400) -> None:
    driver = Driver(seed)
    try:
        driver.run(operations)
    except Exception as error:
        for reader in driver.readers:
            reader.judge = lambda data: None
        raise AssertionError(f"seed {seed}: {error}") from error
    finally:
        driver.close()


def test_fuzz_every_client_is_sent_what_the_model_says(request):
    for _ in range(request.config.getoption("fuzz") * 6):
        run(random.randrange(1 << 32))


def check_whole(events: List[Event], texts: List[str], seed: int) -> None:
    """Hold what a client got against what was published: a gap where something is missing only."""
    at, gap = 0, False
    for event in events:
        if event.name == "gap":
            gap = True
            continue
        number = texts.index(event.data, at)
        where = f"seed {seed}: {event.data[:20]} after {at} of {len(texts)}, gap: {gap}"
        assert gap == (number > at), where
        at, gap = number + 1, False
    assert at == len(texts) and not gap, f"seed {seed}: ends at {at} of {len(texts)}"


def test_fuzz_a_pipe_waits_for_clients_that_keep_the_pace_and_tells_the_others(request):
    for _ in range(request.config.getoption("fuzz") * 3):
        patience(random.randrange(1 << 32))


def patience(seed: int) -> None:
    """A pipe, and POSTs: who keeps pace loses nothing, who does not is told, costs one pause."""
    draw = random.Random(seed)
    bench = Bench(0.0, history=64, patience=4.0)
    # Bytes a second, and seconds between two helpings
    readers = [(draw.choice((18_000, 40_000, 200_000, WIDE)), draw.choice((0.25, 0.5, 1.0)))
               for _ in range(3)]
    peers = [bench.peer(narrow=True) for _ in readers]
    deaf = [bench.peer(narrow=True) for _ in range(draw.randrange(3))]
    bench.turn()
    size = draw.choice((100, 3000, 20_000, 60_000))
    texts = [f"{number} ".ljust(draw.randrange(size), "x")
             for number in range(min(400, 2_000_000 // size))]
    posts: List[str] = []
    steps = 0

    def read() -> None:
        nonlocal steps
        for peer, (pace, every) in zip(peers, readers):
            if steps % (every * 4) == 0:
                peer.server_end.room = int(pace * every)
            peer.take()
        for peer in deaf:       # one takes nothing, one next to nothing
            peer.server_end.room = 10 * deaf.index(peer)
            peer.take()
        if len(posts) < 12:     # they are fewer than the last quarter of the log holds
            posts.append(f"post {len(posts)}")
            bench.publish(posts[-1])
        steps += 1
    try:
        took = piped(bench, texts, read)
        slowest = min(pace for pace, _ in readers)
        size = sum(map(len, texts)) + 60 * len(texts)
        assert took < size * 1.3 / min(slowest, 1 << 20) + 40, f"seed {seed}: {took} s"
        for peer in peers + deaf:
            peer.server_end.room = WIDE
        for _ in range(500):
            bench.turn()
            for peer in peers + deaf:
                peer.take()
        for peer in peers:
            got = peer.data()
            assert [text for text in got if not text.startswith("post")] == texts, f"seed {seed}"
            assert [text for text in got if text.startswith("post")] == posts, f"seed {seed}"
        for peer in deaf:
            if peer.server_end.fileno() >= 0:     # not dropped
                check_whole(peer.stream.events, peers[0].data(), seed)
    finally:
        close(bench)


def test_fuzz_a_publisher_that_sleeps_is_woken_by_any_thread(request):
    """It has no sweep, and looks of itself twice a second: a forgotten wake-up costs that much."""
    for _ in range(request.config.getoption("fuzz") * 2):
        threads(random.randrange(1 << 32))


def threads(seed: int) -> None:
    draw = random.Random(seed)
    bench = Bench(0.0, history=2000)
    bench.publisher._sweep_at = bench.now + 0.5     # the clock stands still
    bench.start()
    published: List[Tuple[Id, str]] = []

    def publish(name: int) -> None:
        own = random.Random(seed + name)
        for number in range(300):
            text = f"{name}.{number} ".ljust(own.choice((10, 100, 3000)), "x")
            published.append((parsed(bench.publish(text)), text))
            if own.random() < 0.1:
                time.sleep(0.001)
    try:
        peers = [bench.peer() for _ in range(5)]
        running = [in_a_thread(publish, name) for name in range(3)]
        while any(thread.is_alive() for thread in running):
            if len(peers) < 30 and published:
                peers.append(bench.peer(last_id=spelled(draw.choice(published)[0])))
            for peer in peers:
                peer.take()
            time.sleep(0.0005)
        for thread in running:
            thread.join()
        order = [text for _, text in sorted(published)]
        deadline = time.monotonic() + 10
        newest = max(published)[0]
        while any(peer.data()[-1:] != order[-1:] for peer in peers
                  if parsed(peer.stream.last_id) != newest):
            assert time.monotonic() < deadline, f"seed {seed}: somebody waits for ever"
            time.sleep(0.0005)
        began = time.monotonic()
        for number in range(20):
            order.append(f"one by one {number}")
            bench.publish(order[-1])
            while any(peer.data()[-1:] != order[-1:]
                      for peer in peers) and time.monotonic() < began + 5:
                time.sleep(0.0005)
        assert time.monotonic() < began + 5, f"seed {seed}: it was not woken"
        for peer in peers:
            peer.take()
            data = peer.data()
            assert data == order[len(order) - len(data):], f"seed {seed}"
    finally:
        close(bench)


def close(bench: Bench) -> None:
    bench.hub.stop()
    bench.now += 10         # nobody is waited for
    bench.hub.wakeup.wake()
    bench.stop()
    for peer in bench.peers:
        peer.sock.close()


# Faults that the model found, each by itself


@pytest.fixture
def bench():
    benches = []

    def make(**options) -> Bench:
        benches.append(Bench(**{"history": 64, "heartbeat": 0.0, **options}))
        return benches[-1]
    yield make
    for each in benches:
        close(each)


def resumed_with_half_a_heartbeat(bench) -> Tuple[Bench, Peer]:
    b = bench(shared=True, heartbeat=10.0)
    b.hub.preload(iter([Coming((1, 0), frames.encode("1"), None)]), NOTHING)
    resumed = b.peer(narrow=True, last_id="1-0")
    resumed.server_end.room = WIDE
    b.turn()
    resumed.server_end.room = 7
    b.pass_time(12)
    return b, resumed


def test_half_a_heartbeat_does_not_make_a_client_forget_its_id(bench):
    b, resumed = resumed_with_half_a_heartbeat(bench)
    resumed.server_end.room = WIDE
    for number in (2, 3, 4):
        b.hub.add(Coming((number, 0), frames.encode(str(number)), None))
    b.turn(3)
    assert resumed.data() == ["2", "3", "4"]


def test_half_a_heartbeat_is_followed_by_its_other_half(bench):
    b, resumed = resumed_with_half_a_heartbeat(bench)
    b.pass_time(12)
    resumed.server_end.room = WIDE
    b.turn(2)
    assert resumed.take().comments == 1 and not resumed.stream.partial


def test_the_gap_of_a_source_that_has_left_the_log_is_told(bench):
    b = bench(shared=True)
    b.hub.preload(iter([Coming((1, 0), frames.encode("1"), None)]), NOTHING)
    b.hub.tell_gap((5, 0))
    for number in range(5, 69):
        b.hub.add(Coming((number, 0), frames.encode(str(number)), None))
        b.turn()
    back = b.peer(last_id="1-0")
    b.turn(2)
    assert b.hub._log.first == 2
    assert [event.name for event in back.take().events[:2]] == ["gap", "message"]
