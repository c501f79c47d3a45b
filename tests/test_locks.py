"""Each lock keeps its promise: while one thread is in the middle, another waits.

One thread is stopped inside the lock, by a clock or a function that it calls there. Another that
does not wait is done in a moment; on a busy machine it may take longer: then a test finds less, but
fails never.
"""
import socket
import threading
import time

import pytest

from helpers import KEPT, PATIENCE, run_together
from sse_core.engine.hub import Hub
from sse_core.engine.clients import StreamRequest, Subscription
from sse_core.stores.sqlite import SQLiteStore
from sse_core.engine.frames import Event, parse_id
from sse_core.http.pool import Pool
from sse_core.stores.store import StoreHub
from sse_server import SSEServer

MOMENT = 0.02
STREAM_REQUEST = StreamRequest(b"HEAD", Subscription(frozenset(), True))


class Door:
    """Stops one thread where it is called, until the other has had its moment."""

    def __init__(self, call) -> None:
        self.arrived, self.opened = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=call)

    def enter(self) -> None:
        """Have the one thread stand in it."""
        self.thread.start()
        assert self.arrived.wait(PATIENCE)

    def __call__(self, *_) -> float:
        if threading.current_thread() is self.thread:
            self.arrived.set()
            self.opened.wait(PATIENCE)
        return 1000.0


def waits(door, call, enter=True) -> bool:
    """Say whether a call in another thread waits until the door is opened, and no longer.

    enter: somebody stands in the door before; else the call sees to it.
    """
    other = threading.Thread(target=call)
    if enter:
        door.enter()
    other.start()
    assert door.arrived.wait(PATIENCE)
    other.join(MOMENT)
    has_waited = other.is_alive()
    door.opened.set()
    other.join(PATIENCE), door.thread.join(PATIENCE)
    return has_waited and not other.is_alive()


@pytest.fixture
def pair():
    ours, peer = socket.socketpair()
    ours.setblocking(False)
    with ours, peer:
        yield ours, peer


@pytest.fixture
def sock(pair):
    return pair[0]


HUB = {
    "publish": lambda hub, _: hub.publish("x"),
    "drain": lambda hub, _: hub.drain(),
    "register": lambda hub, client: hub.register(client.sock, STREAM_REQUEST),
    "describe_clients": lambda hub, _: hub.describe_clients(),
    "stop": lambda hub, _: hub.stop(),
    "close": lambda hub, _: hub.close(),
    "has_work": lambda hub, _: hub.has_work(),
    "next_work": lambda hub, _: hub.next_work(),
    "fanned_out_to": lambda hub, _: hub.fanned_out_to([]),
    "next_batch": lambda hub, client: hub.next_batch(client),
    "done": lambda hub, _: hub.done(),
    "remove_joining": lambda hub, _: hub.clients.remove_joining(1),
    "mark_lagging": lambda hub, client: hub.clients.mark_lagging(client, 1000.0),
    "mark_current": lambda hub, client: hub.clients.mark_current(client, 1000.0),
    "count_taken": lambda hub, client: hub.clients.count_taken(client, 1, 1000.0),
    "remove": lambda hub, client: hub.clients.remove(client)}
SHARED = {
    "preload": lambda shared: shared.preload(iter(()), (-1, 0)),
    "complete": lambda shared: shared.complete(1.0),
    "tell_gap": lambda shared: shared.tell_gap(None)}


@pytest.mark.parametrize("first", ["publish", "describe_clients"])
@pytest.mark.parametrize("second", HUB)
def test_no_thread_is_in_the_hub_while_another_is(sock, first, second):
    """The first has read the newest id, or is going through the clients: it asks for the time."""
    door = Door(lambda: HUB[first](hub, client))
    hub = Hub(**KEPT, clock=door, wall=lambda: 1000.0)
    hub.register(sock, STREAM_REQUEST)
    client, = hub.next_work()[0]
    client.unsent = b""
    hub.clients.mark_lagging(client, 1000.0)
    if (first, second) == ("publish", "drain"):
        hub.fanned_out = 1        # nobody does it here
        client.cursor = 1
    assert waits(door, lambda: HUB[second](hub, client))


def test_two_that_publish_at_once_get_two_ids_in_the_order_of_the_log():
    door = Door(lambda: ids.append(hub.publish("first")))
    hub, ids = Hub(**KEPT, clock=door, wall=lambda: 1000.0), []
    assert waits(door, lambda: ids.append(hub.publish("second")))
    assert len(set(ids)) == 2
    assert [frame.id for frame in hub.next_work()[1]] == sorted(map(parse_id, ids))


def test_many_that_publish_and_register_are_all_counted(sock):
    hub = Hub(**{**KEPT, "history": 10000, "max_clients": 100})
    ids, taken = [], []

    def publish():
        for _ in range(200):
            ids.append(hub.publish("x"))

    def register():
        for _ in range(50):
            taken.append(hub.register(sock, STREAM_REQUEST))
    run_together(*[publish] * 4, *[register] * 4)
    assert len(set(ids)) == hub.stats()["events"] == 800
    assert taken.count(True) == len(hub.close()) == 100


def test_all_clients_are_removed_only_when_no_thread_goes_through_them():
    door = Door(lambda: hub.describe_clients())
    hub = Hub(**KEPT, clock=door)
    hub.wakeup.wake = door.enter         # after the stop, which would have waited for it
    assert waits(door, hub.close, enter=False)


class Stream:
    """A shared log that does something at each publish."""
    trouble = None

    def __init__(self, do=lambda: None) -> None:
        self.do = do

    def publish(self, events) -> list:
        self.do()
        return ["1-0"] * len(events)


@pytest.mark.parametrize("second", SHARED)
def test_no_thread_changes_the_log_of_a_store_hub_while_another_is_in_it(second):
    door = Door(lambda: shared.describe_clients())
    shared = StoreHub(Stream(), **KEPT, clock=door)
    assert waits(door, lambda: SHARED[second](shared))


def test_a_publish_that_waits_for_clients_looks_alone_whether_there_is_room():
    door, came = Door(lambda: shared.describe_clients()), []
    shared = StoreHub(Stream(lambda: came.append(door.opened.is_set())), **KEPT, clock=door)
    assert waits(door, lambda: shared.publish("x", wait=True)) and came == [True]


def test_a_publish_that_has_come_back_and_waits_says_so_alone():
    door = Door(lambda: shared.describe_clients())
    shared = StoreHub(Stream(door.enter), **KEPT, clock=door)
    assert waits(door, lambda: shared.publish("x", wait=True), enter=False)


@pytest.mark.parametrize("second", ["submit", "cancel", "stop", "take"])
def test_no_thread_changes_the_queue_of_a_pool_while_another_does(second):
    pool, begun, opened = Pool(1), threading.Event(), threading.Event()
    first = pool.submit(lambda: begun.set() or opened.wait(PATIENCE))
    assert begun.wait(PATIENCE)
    waiting = pool.submit(lambda: None)
    calls = {"submit": lambda: pool.submit(lambda: None), "cancel": waiting.cancel,
             "stop": lambda: pool.stop(0.0), "take": lambda: waiting.result(PATIENCE)}
    other = threading.Thread(target=calls[second])
    with pool._changed:
        other.start()
        if second == "take":
            opened.set()
        other.join(MOMENT)
        assert other.is_alive()
    opened.set()
    other.join(PATIENCE)
    assert not other.is_alive() and first.result(PATIENCE)
    pool.stop(time.monotonic() + PATIENCE)


def test_no_thread_queues_an_order_while_another_ends_the_queue(tmp_path):
    stream = SQLiteStore(tmp_path / "events.db", 10, False)
    other = threading.Thread(target=stream.submit, args=([Event("x")],))
    with stream._mutex:
        other.start()
        other.join(MOMENT)
        assert stream._orders.empty()
        stream.end()
    other.join(PATIENCE)
    stream.write()      # it ends at once: nothing came after the end


class Slow(SSEServer):
    door = None

    def _start(self) -> None:
        self.door()
        super()._start()


@pytest.mark.parametrize("second", ["start", "stop"])
def test_no_thread_starts_or_stops_a_server_while_another_starts_it(second):
    server = Slow(port=0)
    server.door = Door(server.start)
    try:
        assert waits(server.door, getattr(server, second))
    finally:
        server.stop()
