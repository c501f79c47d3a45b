"""The load: servers as processes on one core, and this process, on another, as all their clients.

CPU time is read from outside, from each process's own clock in the kernel, so no server reports on
itself.
"""
import argparse
import os
import re
import resource
import select
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, Optional, Sequence

HERE = Path(__file__).resolve().parent
GET = b"GET /token HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n"
FRAME_END = b"\n\r\n"        # of a chunk whose last line ends in LF, or in CRLF as the original's
NCHAN = "/usr/lib/nginx/modules/ngx_nchan_module.so"
TIMEOUT = 60.0          # seconds that anything may take before the run is given up


def cpu_clock(pid: int) -> float:
    """Return the CPU seconds of a process, all threads: see clock_getcpuclockid(3)."""
    return time.clock_gettime((~pid << 3) | 2)


def memory(pid: int) -> int:
    """Return the bytes of anonymous memory that a process holds."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Anonymous:")) * 1024


class ServerProcess:
    """A server that prints its port and publishes on command; see serve.py for the protocol."""

    def __init__(self, name: str, command: Sequence[str], core: Optional[int] = 0) -> None:
        self.name = name
        pin = (lambda: os.sched_setaffinity(0, {core})) if core is not None else None
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, preexec_fn=pin)
        self.port, *pid = map(int, self.process.stdout.readline().split())
        self.pid = pid[0] if pid else self.process.pid      # of the server itself
        self.published = 0

    def publish(self, events: int, pause: float = 0.0, channel: str = "",
                channels: int = 0) -> None:
        """Have it publish so many events, `pause` seconds apart. Returns at once, see `wait`.

        channel: on this one; with `channels`: on as many in turn, so numbered.
        """
        self.process.stdin.write(f"{events} {int(pause * 1e6)} {channel} {channels or ''}\n")
        self.process.stdin.flush()
        self.published += events

    def wait(self) -> None:
        assert self.process.stdout.readline() == "done\n"

    def cpu(self) -> float:
        return cpu_clock(self.pid)

    def memory(self) -> int:
        return memory(self.pid)

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait(TIMEOUT)


def our_server(name: str = "this server", **options) -> ServerProcess:
    arguments = [f"{option}={value}" for option, value in options.items()]
    return ServerProcess(name, [sys.executable, str(HERE / "serve.py"), *arguments])


def our_pipe() -> ServerProcess:
    return ServerProcess("pipe", [sys.executable, str(HERE / "pipe.py")])


class PeerProcess(ServerProcess):
    """A peer; if it has children, these are the server, and it only publishes."""

    def pids(self) -> List[int]:
        return descendants(self.pid) or [self.pid]

    def cpu(self) -> float:
        return sum(map(cpu_clock, self.pids()))

    def memory(self) -> int:
        return sum(map(memory, self.pids()))


def descendants(pid: int) -> List[int]:
    """Return all processes below this one."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = [int(child) for child in file.read().split()]
    return children + [below for child in children for below in descendants(child)]


def nchan() -> Optional[ServerProcess]:
    """Start nginx with nchan; None where it is not installed."""
    if not shutil.which("nginx") or not os.path.exists(NCHAN):
        return None
    return PeerProcess("nginx + nchan", [sys.executable, str(HERE / "peers" / "nchan.py")])


def c_loop(folder: str) -> Optional[ServerProcess]:
    """Compile and start the C loop; None where there is no compiler."""
    program = os.path.join(folder, "loop")
    try:
        subprocess.run(["cc", "-O2", "-o", program, str(HERE / "loop.c")], check=True)
    except FileNotFoundError:
        return None
    return ServerProcess("C loop", [program])


class Clients:
    """Connections to one server. `latencies` are seconds from publish to receipt."""

    def __init__(self, port: int, request: bytes = GET) -> None:
        self.port = port
        self.request = request
        self.latencies: List[float] = []
        self.received = 0               # bytes
        self._last: Dict[int, int] = {}         # descriptor -> number of the last event received
        self._socks: Dict[int, socket.socket] = {}
        self._tails: Dict[int, bytes] = {}      # the start of a frame whose end is still to come
        self._epoll = select.epoll()
        self.ids: List[bytes] = []              # of the events that the first client got
        self._witness = -1

    def __len__(self) -> int:
        return len(self._socks)

    def connect(self, number: int, request=None, at_once: int = 100,
                receive_buffer: int = 0) -> None:
        """Connect so many, some at a time, and wait until each has the head of its stream."""
        requests = request or (lambda index: self.request)
        started = done = 0
        waiting: Dict[int, int] = {}
        deadline = time.monotonic() + TIMEOUT
        while done < number:
            assert time.monotonic() < deadline, f"{done} of {number} connected"
            while started < number and len(waiting) < at_once:
                sock = socket.socket()
                if receive_buffer:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
                sock.connect(("127.0.0.1", self.port))
                sock.send(requests(started))
                sock.setblocking(False)
                self._socks[sock.fileno()] = sock
                self._epoll.register(sock.fileno(), select.EPOLLIN)
                waiting[sock.fileno()] = started
                self._witness = self._witness if self._witness >= 0 else sock.fileno()
                started += 1
            for fd, _ in self._epoll.poll(1.0):
                self._receive(fd)
                done += waiting.pop(fd, None) is not None

    def _receive(self, fd: int) -> None:
        data = os.read(fd, 262144)
        assert data, "a client was dropped"
        self.received += len(data)
        data = self._tails.pop(fd, b"") + data
        end = data.rfind(FRAME_END) + len(FRAME_END)
        if end < len(FRAME_END):
            self._tails[fd] = data[-300:]
            return
        if end < len(data):
            self._tails[fd] = data[end:]
            data = data[:end]
        if fd == self._witness:
            self.ids += re.findall(rb"\ndata: .{68}\r?\nid: ([0-9]+-[0-9]+)\n", data)
        at = data.rfind(b"\ndata: ")
        if at >= 0 and data[at + 7:at + 8].isdigit():       # else it is `welcome`
            sent, number = int(data[at + 7:at + 26]), int(data[at + 27:at + 36])
            self._last[fd] = number
            self.latencies.append(time.monotonic() - sent / 1e9)

    def read_until(self, published: int) -> None:
        """Receive until every client has the last of so many events."""
        pending = {fd for fd in self._socks if self._last.get(fd, -1) < published - 1}
        deadline = time.monotonic() + TIMEOUT
        while pending:
            assert time.monotonic() < deadline, f"{len(pending)} wait for event {published - 1}"
            for fd, _ in self._epoll.poll(1.0):
                self._receive(fd)
                if self._last.get(fd, -1) >= published - 1:
                    pending.discard(fd)

    def keep_in_flight(self, server: ServerProcess, events: int, in_flight: int) -> List[float]:
        """Publish events, so many under way at a time; return the latency of each delivery.

        It counts from before the server is told to publish. The next event is published when one
        has reached every client; what a client gets in one piece, it gets at one time.
        """
        sent: List[float] = []
        missing: List[int] = []         # clients that do not have event I
        latencies: List[float] = []
        first = server.published
        while len(sent) < events or any(missing):
            while len(sent) < events and sum(map(bool, missing)) < in_flight:
                sent.append(time.monotonic())
                missing.append(len(self))
                server.publish(1)
                server.wait()
            for fd, _ in self._epoll.poll(TIMEOUT):
                before = self._last.get(fd, first - 1)
                self._receive(fd)
                now = time.monotonic()
                for number in range(before - first + 1, self._last.get(fd, before) - first + 1):
                    missing[number] -= 1
                    latencies.append(now - sent[number])
        return latencies

    def read_each(self) -> None:
        """Receive until there are as many latencies as clients: one event each."""
        deadline = time.monotonic() + TIMEOUT
        while len(self.latencies) < len(self):
            assert time.monotonic() < deadline, f"{len(self.latencies)} of {len(self)} events"
            for fd, _ in self._epoll.poll(1.0):
                self._receive(fd)

    def read_bytes(self, size: int) -> None:
        """Receive until all together have so many bytes."""
        deadline = time.monotonic() + TIMEOUT
        while self.received < size:
            assert time.monotonic() < deadline, f"{self.received} of {size} bytes"
            for fd, _ in self._epoll.poll(1.0):
                self._receive(fd)

    def id_before(self, events: int) -> bytes:
        """Return the id that came so many events before the last one; `ids` must be on."""
        return self.ids[-events - 1]

    def close(self) -> None:
        for sock in self._socks.values():
            sock.close()
        self._socks.clear()
        self._epoll.close()


class Measure:
    """From enter to exit: CPU seconds of a server, and how much of its core this process used."""

    def __init__(self, server: ServerProcess) -> None:
        self.server = server

    def __enter__(self) -> "Measure":
        self._wall, self._own, self._cpu = time.monotonic(), time.process_time(), self.server.cpu()
        return self

    def __exit__(self, *exc_info) -> None:
        self.cpu = self.server.cpu() - self._cpu
        self.wall = time.monotonic() - self._wall
        self.load = (time.process_time() - self._own) / self.wall


def percentile(values: List[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def descriptor_limit() -> int:
    """Raise the limit on open files as far as it goes, and return it."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def describe(text: str) -> argparse.ArgumentParser:
    """Return a parser whose --help shows this text as it stands."""
    return argparse.ArgumentParser(description=text,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)


def pin_load(descriptors: int = 2000) -> int:
    """Pin this process to core 1, and return the descriptor limit.

    Ends the process, with a line that says why, where it cannot measure.
    """
    if not hasattr(os, "sched_setaffinity") or not os.path.exists("/proc/self/smaps_rollup"):
        sys.exit("Linux is needed: its /proc, epoll and pinning to a core")
    if not {0, 1} <= os.sched_getaffinity(0):
        sys.exit("the cores 0 and 1 are needed: one for the server, one for the load")
    limit = descriptor_limit()
    if limit < descriptors:
        sys.exit(f"{descriptors} descriptors are needed, and the limit is {limit} (ulimit -Hn)")
    os.sched_setaffinity(0, {1})
    return limit
