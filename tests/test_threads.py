"""Everything at once: servers, threads, resets; also with the interpreter switching wildly."""
import random
import sys
import threading

import pytest

from helpers import GET, Client, connect, reset, run_together, unfinished, wait_until
from sse_server import SSEServer


@pytest.fixture(params=[0.005, 1e-6], ids=["normal", "switching"])
def switching(request):
    before = sys.getswitchinterval()
    sys.setswitchinterval(request.param)
    yield
    sys.setswitchinterval(before)


def test_eight_threads_publish_and_all_clients_see_one_order(switching, server):
    clients = [Client(server.port).open() for _ in range(5)]
    wait_until(lambda: server.clients == 5)

    def publish(name):
        for number in range(100):
            server.publish(f"{name} {number}")
    run_together(
        *(lambda name=name: publish(name) for name in range(8)),
        *(lambda client=client: client.read_events(800) for client in clients))
    first = [event.data for event in clients[0].stream.events]
    for client in clients:
        assert [event.data for event in client.stream.events] == first
        client.close()
    for name in range(8):
        own = [data for data in first if data.startswith(f"{name} ")]
        assert own == [f"{name} {number}" for number in range(100)]


def test_clients_come_and_go_at_random_while_events_flow(switching):
    """Resets before the request, in its middle, before and during the first sends, during stop."""
    seed = random.randrange(1 << 32)
    stopping = threading.Event()
    with SSEServer(port=0, heartbeat=0.05) as server:
        def publish():
            while not stopping.wait(0.0005):
                server.publish("x" * 3000)

        def visit(draw):
            for _ in range(250):
                sock = connect(server.port)
                sock.sendall(GET[:draw.choice((0, 3, len(GET) - 1, len(GET), len(GET), len(GET)))])
                if draw.random() < 0.3:
                    sock.settimeout(0.01)
                    try:
                        sock.recv(draw.randrange(1, 10000))
                    except OSError:
                        pass
                reset(sock) if draw.random() < 0.7 else sock.close()

        with Client(server.port) as steady:
            steady.open()
            visitors = [lambda draw=random.Random(seed + n): visit(draw) for n in range(4)]
            publisher = threading.Thread(target=publish)
            publisher.start()
            reader = threading.Thread(target=lambda: steady.read_until(lambda _: stopping.is_set()))
            reader.start()
            run_together(*visitors)
            wait_until(lambda: server.clients == 1)
            stopping.set()
            publisher.join(), reader.join()
            server.publish("end")
            events = steady.read_until(lambda stream: stream.events[-1].data == "end").stream.events
            assert not any(event.name == "gap" for event in events), f"seed {seed}"
        names = {thread.name for thread in threading.enumerate()}
        wait_until(lambda: not unfinished(server))
        assert {"accept", "connections", "publisher"} <= names
    assert server.clients == 0


def test_stop_works_while_clients_connect_and_threads_publish(switching):
    for _ in range(10):
        server = SSEServer(port=0).start()
        stopped = threading.Event()

        def publish():
            try:
                while True:
                    server.publish("x")
            except RuntimeError:
                assert stopped.is_set() or server._stopping.is_set()

        def visit():
            while not stopped.is_set():
                try:
                    with Client(server.port) as client:
                        client.open()
                except (OSError, AssertionError):     # it was stopping
                    pass
        threads = [threading.Thread(target=target) for target in (publish, publish, visit, visit)]
        for thread in threads:
            thread.start()
        with Client(server.port) as client:
            client.read_events(50)
            server.stop()
            stopped.set()
            client.read_to_end()        # whole frames; but the last one, if it did not read in time
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()


def test_a_thousand_starts_and_stops_leave_nothing():
    for number in range(1000):
        with SSEServer(port=0) as server:
            if number % 50 == 0:
                with Client(server.port) as client:
                    client.open()
                    server.publish("x")
                    client.read_events(1)


def test_several_servers_in_one_process_keep_apart():
    with SSEServer(port=0) as one, SSEServer(port=0) as two, \
            Client(one.port) as a, Client(two.port) as b:
        a.open(), b.open()
        one.publish("from one")
        two.publish("from two")
        assert a.read_events(1)[0].data == "from one" and b.read_events(1)[0].data == "from two"
