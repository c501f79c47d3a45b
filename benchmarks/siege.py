"""What hostile peers cost the others: prints the figures. Everything is bounded, on loopback.

The server is pinned to core 0, the load and the attack to core 1.
"""
import importlib.util
import os
import random
import resource
import selectors
import shutil
import socket
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from typing import Any, Dict, Iterator, List, Optional, Tuple

from attacks import ATTACKS, HOST
from bench import RATE, deliver, say
from load import (GET, HERE, Clients, ServerProcess, cpu_clock, describe, our_server, percentile,
                  pin_load)

EVENTS = 100            # of each run
POST = b"POST /PUBLISH" + HOST + b"Content-Length: 5\r\n\r\nhello"


def state(server: ServerProcess) -> tuple:
    """Return threads, descriptors and KiB of memory of a server."""
    folder = f"/proc/{server.process.pid}"
    threads, descriptors = (len(os.listdir(f"{folder}/{what}")) for what in ("task", "fd"))
    return threads, descriptors, server.memory() // 1024


def answered_in(port: int) -> float:
    """Return the seconds until a new client has the head of its stream."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
        sock.sendall(GET)
        assert sock.recv(100).startswith(b"HTTP/1.1 200")
    return time.monotonic() - began


def silent_and_dribbling() -> None:
    server = our_server()
    clients = Clients(server.port)
    clients.connect(200)
    quiet = min((deliver(server, clients, EVENTS, 1 / RATE) for _ in range(3)),
                key=lambda result: result["p99"])
    attack = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(600)]
    stopping = threading.Event()

    def dribble() -> None:
        at = 0
        while not stopping.wait(1.0):
            for sock in attack[-100:]:
                try:
                    sock.send(GET[at % 40:at % 40 + 1])
                except OSError:         # it was cut; an attacker would come again, and here does
                    again = socket.create_connection(("127.0.0.1", server.port))
                    attack[attack.index(sock)] = again
            at += 1
    thread = threading.Thread(target=dribble)
    thread.start()
    besieged, slowest = [], 0.0
    for _ in range(3):
        besieged.append(deliver(server, clients, EVENTS, 1 / RATE))     # fails if one is missed
        slowest = max(slowest, answered_in(server.port))
    stopping.set()
    thread.join()
    p99 = min(result["p99"] for result in besieged)
    say("500 silent and 100 dribbling connections beside 200 clients:\n"
        f"  p99 {p99:.2f} ms, {p99 / quiet['p99']:.2f} times the {quiet['p99']:.2f} ms without; "
        f"a new client is answered in {slowest * 1e3:.0f} ms at most; threads {state(server)[0]}")
    for sock in attack:
        sock.close()
    clients.close()
    server.stop()


def newcomers(port: int, context: Optional[ssl.SSLContext], number: int = 150,
              request: bytes = GET) -> Tuple[List[float], int]:
    """Return the milliseconds in which so many peers, one after the other, have an answer.

    And how many of these answers were no 200, or none at all.
    """
    times, refused = [], 0
    for _ in range(number):
        began = time.monotonic()
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
                with context.wrap_socket(sock) if context else sock as talk:
                    talk.sendall(request)
                    answer = talk.recv(100)
                    assert answer.startswith(b"HTTP/1.1 ")
                    refused += not answer.startswith(b"HTTP/1.1 200")
        except OSError:             # closed unanswered: it counts as the longest
            began -= 10
            refused += 1
        times.append((time.monotonic() - began) * 1e3)
        time.sleep(0.01)
    return times, refused


def at_the_doors(name: str, folder: str) -> None:
    """What an attack on the accept loop costs those who come, and those who are there."""
    attack = ATTACKS[name]
    tls = bool(attack.tls)
    server = our_server(**(make_certificate(folder, attack.tls) if tls else attack.options))
    context = ssl._create_unverified_context() if tls else None
    clients = Clients(server.port)
    if not tls:
        clients.connect(200)
    figures = []
    process = None
    for besieged in (False, True):
        if besieged:
            command = [sys.executable, str(HERE / "attacks.py"), name, str(server.port)]
            process = subprocess.Popen(command, text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert process.stdout.readline() == "there\n"
        times, refused = newcomers(server.port, context)
        events = [] if tls else [deliver(server, clients, EVENTS, 1 / RATE)["p99"]
                                 for _ in range(3)]
        figures.append((percentile(times, .5), percentile(times, .99), min(events, default=0)))
    process.communicate()
    (p50, p99, quiet), (p50_then, p99_then, then) = figures
    say(f"{name}: {attack.number} peers; a newcomer is answered in p50 {p50_then:.1f} p99 {p99_then:.1f} ms "
        f"(quiet {p50:.1f} and {p99:.1f}), {refused} of {len(times)} are refused; "
        + ("over TLS" if tls
           else f"events p99 {then:.2f} ms, {then / quiet:.2f} times the quiet run"))
    clients.close()
    server.stop()


KEYS = {"P-256": ["ec", "-pkeyopt", "ec_paramgen_curve:P-256"], "RSA-2048": ["rsa:2048"]}


def make_certificate(folder: str, kind: str) -> Dict[str, str]:
    """Make a certificate, and return the options of a server that has it."""
    cert, key = (os.path.join(folder, f"{kind}-{name}.pem") for name in ("cert", "key"))
    subprocess.run(["openssl", "req", "-x509", "-newkey", *KEYS[kind], "-nodes", "-subj",
                    "/CN=localhost", "-days", "2", "-out", cert, "-keyout", key],
                   check=True, stderr=subprocess.DEVNULL)
    return {"cert": cert, "key": key}


def crowd_over_tls(folder: str) -> None:
    """Honest clients that all come at once, as after a restart."""
    for kind in KEYS:
        for number in (600, 3000):
            server = our_server(**make_certificate(folder, kind))
            times, lost = all_at_once(server.port, number, ssl._create_unverified_context())
            say(f"{number} honest TLS clients at once, {kind}: {len(times)} are in after "
                f"{max(times):.2f} s, half of them after {percentile(times, .5):.2f} s; {lost} were "
                f"closed; the server used {server.cpu():.2f} s of CPU")
            server.stop()


def all_at_once(port: int, number: int, context: Optional[ssl.SSLContext],
                request: bytes = GET) -> Tuple[List[float], int]:
    """Connect so many at once; return the seconds until each has its stream, and how many have none.

    One core is all of them, so nobody begins while another could go on: else each would answer the
    server only when all others have.
    """
    poll, began = selectors.DefaultSelector(), time.monotonic()
    times: List[float] = []
    lost, socks = 0, []
    while (len(socks) < number or poll.get_map()) and time.monotonic() < began + 60:
        ready = poll.select(0 if len(socks) < number else 1)
        if not ready and len(socks) < number:
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", port))
            socks.append(sock)
            poll.register(sock.fileno(), selectors.EVENT_WRITE,
                          join(socks, len(socks) - 1, context, request))
        for key, _ in ready:
            try:
                poll.modify(key.fd, next(key.data), key.data)
                continue
            except StopIteration:
                times.append(time.monotonic() - began)
            except OSError:
                lost += 1
            poll.unregister(key.fd)
    for sock in socks:
        sock.close()
    return sorted(times), lost + len(poll.get_map())


def join(socks: List[socket.socket], place: int, context: Optional[ssl.SSLContext],
         request: bytes) -> Iterator[int]:
    """Go on with a client each time its socket is ready; yield what it waits for next."""
    if context:     # once it is connected
        socks[place] = context.wrap_socket(socks[place], do_handshake_on_connect=False)
    sock = socks[place]
    while context:
        try:
            sock.do_handshake()
            break
        except ssl.SSLWantReadError:
            yield selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            yield selectors.EVENT_WRITE
    sock.send(request)
    while True:
        yield selectors.EVENT_READ
        try:
            answer = sock.recv(1000)
        except (BlockingIOError, ssl.SSLWantReadError):
            continue
        if not answer.startswith(b"HTTP/1.1 200") or b"event: busy" in answer:
            raise ConnectionError(answer)
        return


def crowd_at_authorize(_: str) -> None:
    """Honest clients whose `authorize` takes half a second, and others meanwhile."""
    server = our_server(slow=500, publish="PUBLISH")
    slow = threading.Thread(target=lambda: result.extend(
        all_at_once(server.port, 600, None, GET.replace(b"token", b"slow"))))
    result: List[Any] = []
    slow.start()
    time.sleep(0.2)
    asked = []
    for request in (b"GET /-/health" + HOST + b"\r\n", POST):
        times, _ = newcomers(server.port, None, 100, request)
        asked.append(f"p50 {percentile(times, .5):.1f} p99 {percentile(times, .99):.1f}")
    slow.join()
    times, lost = result
    say(f"600 clients whose authorize takes 0.5 s: {len(times)} are in after {max(times):.1f} s, "
        f"{lost} are not; health meanwhile {asked[0]} ms, POST {asked[1]} ms")
    server.stop()


def locked_file(folder: str) -> None:
    """POSTs into a history file that another process holds for 0.6 s, and newcomers meanwhile."""
    path = os.path.join(folder, "events.db")
    server = our_server(history_file=path, publish="PUBLISH")
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("begin immediate")
    began = time.monotonic()
    socks = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(250)]
    for sock in socks:
        sock.sendall(POST)
    times, _ = newcomers(server.port, None, 30)
    time.sleep(max(0, began + 0.6 - time.monotonic()))
    holder.execute("rollback")
    taken = sum(sock.recv(1000).startswith(b"HTTP/1.1 200 ") for sock in socks)
    say(f"250 POSTs into a file that is locked for 0.6 s: {taken} are 200 after "
        f"{time.monotonic() - began:.2f} s; a newcomer meanwhile p50 {percentile(times, .5):.1f} "
        f"p99 {percentile(times, .99):.1f} ms")
    for sock in socks:
        sock.close()
    holder.close()
    server.stop()


def out_of_descriptors() -> None:
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
    process = subprocess.Popen([sys.executable, str(HERE / "serve.py")], text=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, preexec_fn=limit)
    port = int(process.stdout.readline())
    clients = Clients(port)
    clients.connect(20)
    crowd = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
    for sock in crowd:
        sock.sendall(GET)
    cpu, began = cpu_clock(process.pid), time.monotonic()
    time.sleep(3)
    share = (cpu_clock(process.pid) - cpu) / (time.monotonic() - began)
    process.stdin.write("10 10000\n")
    process.stdin.flush()
    clients.read_until(10)
    for sock in crowd:
        sock.close()
    recovered = answered_in(port)
    process.stdin.close()
    warnings = process.stderr.read().count("\n")
    process.wait(10)
    say(f"out of descriptors (limit 128): {share:.1%} of a core, existing clients served, "
        f"{warnings} warning, a new client answered in {recovered * 1e3:.0f} ms afterwards")
    clients.close()


def hostile_connections(number: int = 10000) -> None:
    server = our_server()
    clients = Clients(server.port)
    clients.connect(10)
    draw = random.Random(20261122)

    def attack(count: int) -> None:
        for _ in range(count):
            sock = socket.create_connection(("127.0.0.1", server.port))
            raw = draw.choice((b"", GET[:draw.randrange(len(GET))], b"\x16\x03\x01\0", b"A" * 9000,
                               GET, b"POST / HTTP/1.1\r\n\r\n"))
            try:
                sock.sendall(raw)
                if draw.random() < 0.5:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            except OSError:     # it was quicker
                pass
            sock.close()

    def settled() -> tuple:
        time.sleep(2)
        return state(server)
    attack(number // 2)         # what these allocate for good is no leak: the others add nothing
    before = settled()
    attack(number // 2)
    after = settled()
    server.publish(1)
    clients.read_until(1)
    say(f"{number} hostile connections: threads {before[0]} and {after[0]}, "
        f"descriptors {before[1]} and {after[1]}, "
        f"memory {before[2]} and {after[2]} KiB, after the first half and after all")
    clients.close()
    server.stop()


def main() -> None:
    parts = {**{name: partial(at_the_doors, name) for name in ATTACKS},
             "crowd": crowd_over_tls, "authorize": crowd_at_authorize, "locked": locked_file,
             "dribble": lambda _: silent_and_dribbling(),
             "descriptors": lambda _: out_of_descriptors(),
             "hostile": lambda _: hostile_connections()}
    parser = describe(__doc__)
    parser.add_argument("only", nargs="*", metavar="PART",
                        help=f"{', '.join(parts)} (default: all)")
    chosen = parser.parse_args().only or list(parts)
    if not set(chosen) <= set(parts):
        parser.error(f"the parts are {', '.join(parts)}")
    if not shutil.which("openssl"):
        sys.exit("openssl is needed: it makes certificates")
    if not importlib.util.find_spec("jwt") and "token" in chosen:
        say("token: left out, it needs the package pyjwt")
        chosen.remove("token")
    pin_load()
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            parts[name](folder)


if __name__ == "__main__":
    main()
