"""Clients whose network is gone, behind a real router in network namespaces of the test's own."""
import ctypes
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from typing import Callable

import pytest

from helpers import Client, SecureClient, make_certificate, wait_until
from sse_core.engine import stalls
from sse_server import SSEServer

CLONE_NEWNET = 0x40000000       # linux/sched.h

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"),
    reason="network namespaces need root, and ip (Debian package iproute2)")


class Network:
    """This machine, a router, and a place behind it; addresses are of RFC 2544, for tests."""

    def __init__(self) -> None:
        self.router, self.behind = (f"sse-{name}-{os.getpid()}" for name in ("router", "behind"))
        self.address = "198.18.1.1"

    def build(self) -> None:
        for space in (self.router, self.behind):
            run("ip", "netns", "add", space)
        self.link("198.18.1", None, self.router)
        self.link("198.18.2", self.router, self.behind)
        run("ip", "route", "add", "198.18.2.0/24", "via", "198.18.1.2")
        self.inside(self.behind, "ip", "route", "add", "default", "via", "198.18.2.1")
        self.forward(True)

    def link(self, net: str, one, two: str) -> None:
        """Join two namespaces, the first None for this one, by a cable."""
        names = [f"sse{net[-1]}{end}{os.getpid()}" for end in "ab"]
        run("ip", "link", "add", names[0], "type", "veth", "peer", "name", names[1])
        for space, name, host in ((one, names[0], 1), (two, names[1], 2)):
            if space:
                run("ip", "link", "set", name, "netns", space)
            self.inside(space, "ip", "address", "add", f"{net}.{host}/24", "dev", name)
            self.inside(space, "ip", "link", "set", name, "up")

    def inside(self, space, *command: str) -> None:
        run(*(("ip", "netns", "exec", space) if space else ()), *command)

    def forward(self, does: bool) -> None:
        """Have the router forward, or say nothing and forward no more."""
        self.inside(self.router, "sh", "-c", f"echo {does:d} > /proc/sys/net/ipv4/ip_forward")

    def connect(self, make: Callable[[], Client]) -> Client:
        """Make a client behind the router: a socket belongs where its thread was."""
        made = []

        def enter() -> None:
            with open(f"/run/netns/{self.behind}") as space:
                if ctypes.CDLL(None, use_errno=True).setns(space.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")
            made.append(make())
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        return made[0]

    def remove(self) -> None:
        for space in (self.router, self.behind):        # and their ends of the cables
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, timeout=20)


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=20)


@pytest.fixture
def network():
    network = Network()
    try:
        try:
            network.build()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this system gives no network namespaces: {error.stderr.decode()}")
        yield network
    finally:
        network.remove()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("tls"))


def vanish(network, certificate, secure: bool, heartbeat: float, slow_every: float) -> float:
    """Cut off one of three clients; return how many seconds later it is dropped.

    Of the other two, one reads all, and one a little of a lot, out of a tiny buffer.
    """
    options = {"cert": certificate[0], "key": certificate[1]} if secure else {}
    kind = SecureClient if secure else Client
    with SSEServer("0.0.0.0", 0, heartbeat=heartbeat, **options) as server, ExitStack() as stack:
        far = type("Far", (kind,), {"host": network.address})
        gone = stack.enter_context(network.connect(lambda: far(server.port).open()))
        near = stack.enter_context(kind(server.port).open())
        slow = stack.enter_context(kind(server.port, receive_buffer=4096).open())
        wait_until(lambda: server.clients == 3)
        for _ in range(50):
            server.publish("x" * 10_000)
        gone.read_events(50), near.read_events(50)
        began = time.monotonic()
        network.forward(False)
        while server.clients == 3:
            slow.receive(2000)
            before = time.monotonic()
            while time.monotonic() < before + slow_every and server.clients == 3:
                time.sleep(0.01)
            assert time.monotonic() < began + 100
        took = time.monotonic() - began
        assert server.stats()["drops"]["stalled"] == 1
        server.publish("still there")
        near.read_until_data("still there"), slow.read_until_data("still there")
        return took


@pytest.mark.parametrize("secure", [False, True])
def test_a_client_whose_network_is_gone_is_dropped_though_the_kernel_takes_all_it_is_sent(
        network, certificate, secure, monkeypatch):
    """It stayed for 15 minutes. The time that is waited is shorter here; the kernel's is real."""
    monkeypatch.setattr(stalls, "STALL_TIMEOUT", 1.5)
    assert 1.2 < vanish(network, certificate, secure, heartbeat=0.2, slow_every=0.05) < 30


@pytest.mark.long
@pytest.mark.parametrize("secure", [False, True])
def test_a_client_whose_network_is_gone_is_dropped_after_30_seconds_of_silence(
        network, certificate, secure):
    """It owes nothing until the first heartbeat."""
    assert 30 < vanish(network, certificate, secure, heartbeat=15.0, slow_every=1.0) < 15 + 30 + 5
