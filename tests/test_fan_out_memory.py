"""Memory and work of one turn are bounded, whatever channels clients choose."""
import json
import random
import tracemalloc

from sse_core.engine import groups
from sse_core.engine.log import SCAN_LIMIT, Batch


def test_equal_bytes_are_joined_once_whatever_channels_clients_choose(bench):
    """Clients of HTTP/1.0, each with a channel of its own beside a common one, and 1 MB on that.

    With 1000 of them it was 984 MiB.
    """
    b = bench(history=64)
    for number in range(200):
        b.peer(chunked=False, channels=["news", f"u{number}"])
    b.turn(2)
    tracemalloc.start()
    b.publish("x" * 1_000_000, channel="news")
    b.turn(3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(b.hub.clients.lagging) == 200 and peak < 32 << 20


def test_memory_of_a_turn_is_bounded_however_many_sets_of_channels_there_are(bench):
    """9,000 clients with different sets of 40 channels and one POST of 63 KB took 300 MB."""
    b = bench(history=2000)
    draw = random.Random(1)
    channels = [f"c{number}" for number in range(40)]
    for number in range(600):
        b.peer(channels=draw.sample(channels, 20), chunked=number % 2)
    b.turn(4)
    texts = [f"{number} ".ljust(1500, "x") for number in range(40)]
    for text, channel in zip(texts, channels):
        b.publish(text, channel=channel)
    tracemalloc.start()
    b.turn()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert b.groups() > 590 and peak < 8 << 20
    assert all(len(peer.data()) == 20 for peer in b.peers)


def test_a_batch_is_joined_once_for_the_channels_that_are_in_it(bench, monkeypatch):
    """With 10,000 clients on channels of their own and 600 events it was 585 MiB and 1.1 s."""
    joined = []

    def batch(run, chunked):
        joined.append(len(run))
        return Batch(run, chunked)
    monkeypatch.setattr(groups, "Batch", batch)
    b = bench()
    for number in range(300):
        b.peer(channels=[f"u{number}", "all"])
    b.turn(2)
    joined.clear()
    for number in range(60):
        b.publish(str(number))
    b.publish("mine", channel="u7")
    b.turn()
    assert joined == [60, 61]
    assert b.peers[7].data()[-1] == "mine" and b.peers[8].data() == [*map(str, range(60))]


def test_resuming_on_a_channel_without_events_scans_the_log_in_pieces(bench):
    b = bench(history=20 * SCAN_LIMIT)
    start = b.publish("start")
    for _ in range(10 * SCAN_LIMIT):
        b.publish("other", channel="other")
    b.turn(20)
    back = b.peer(channels=["mine"], last_id=start)
    unknown = b.peer(channels=["mine"], last_id="1-0")
    turns = 0
    while turns == 0 or b.hub.clients.lagging:
        b.turn()
        turns += 1
    assert 8 <= turns <= 14
    b.publish("mine", channel="mine")
    b.turn()
    assert back.data() == ["mine"] and unknown.data()[1:] == ["start", "mine"]
    gap = json.loads(unknown.data()[0])
    assert gap == {"after": "1-0", "resumed": start, "reason": "unknown"}
