"""What holds for every test: no thread and no descriptor is left behind."""
import os
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import Bench                                    # noqa: E402
from documentation import Shell                            # noqa: E402
from helpers import PUBLISH_TOKEN, need, wait_until        # noqa: E402
from sse_server import SSEServer                 # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=1,
                     help="how many times as long the fuzz tests are")
    parser.addoption("--switch-interval", type=float,
                     help="seconds between two switches of threads, for tests of locks")


def pytest_configure(config):
    interval = config.getoption("--switch-interval")
    if interval:
        sys.setswitchinterval(interval)


def descriptors() -> set:
    folder = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    return set(os.listdir(folder))


@pytest.fixture(autouse=True)
def nothing_left():
    threads, before = set(threading.enumerate()), len(descriptors())
    yield
    left = [thread.name for thread in threading.enumerate() if thread not in threads]
    assert not left, f"threads left: {left}"
    wait_until(lambda: len(descriptors()) <= before, timeout=2)


@pytest.fixture
def server():
    """A running server on a free port that publishes only what the test does."""
    with SSEServer(port=0) as server:
        yield server


@pytest.fixture
def open_server():
    """A running server that takes POSTs with PUBLISH_TOKEN."""
    with SSEServer(port=0, publish_tokens=[PUBLISH_TOKEN]) as server:
        yield server


@pytest.fixture
def path(tmp_path):
    """Return the path of a history file that is not there yet."""
    return tmp_path / "events.db"


@pytest.fixture
def shell(tmp_path):
    """Run commands of the documentation, in a folder of their own."""
    need("curl", "curl")
    shell = Shell(tmp_path)
    yield shell
    shell.stop()


@pytest.fixture
def bench():
    """Make benches: publishers that the test turns by hand."""
    benches = []

    def make(**options) -> Bench:
        benches.append(Bench(**{"history": 0, "heartbeat": 0.0, **options}))
        return benches[-1]
    yield make
    for each in benches:
        each.stop()
        for peer in each.peers:
            peer.sock.close()
