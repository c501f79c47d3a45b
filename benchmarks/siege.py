"""What hostile peers cost the others: prints the figures. Everything is bounded, on loopback.

The server is pinned to core 0, the load and the attack to core 1.
"""
import os
import random
import resource
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from typing import List, Optional, Tuple

from attacks import ATTACKS
from bench import RATE, deliver, say
from load import (GET, HERE, Clients, ServerProcess, cpu_clock, describe, our_server, percentile,
                  pin_load)

EVENTS = 100            # of each run


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


def newcomers(port: int, context: Optional[ssl.SSLContext], number: int = 150) -> List[float]:
    """Return the milliseconds in which so many clients, one after the other, have an answer."""
    times = []
    for _ in range(number):
        began = time.monotonic()
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
                with context.wrap_socket(sock) if context else sock as talk:
                    talk.sendall(GET)
                    assert talk.recv(100).startswith(b"HTTP/1.1 ")
        except OSError:             # closed unanswered: it counts as the longest
            began -= 10
        times.append((time.monotonic() - began) * 1e3)
        time.sleep(0.01)
    return times


def at_the_doors(name: str, folder: str) -> None:
    """What an attack on the accept loop costs those who come, and those who are there."""
    tls = name == "silent"
    files = make_certificate(folder) if tls else None
    server = our_server(**(dict(cert=files[0], key=files[1]) if tls else {"slow": 1}))
    context = ssl._create_unverified_context() if tls else None
    clients = Clients(server.port)
    if not tls:
        clients.connect(200)
    figures = []
    attack = None
    for besieged in (False, True):
        if besieged:
            command = [sys.executable, str(HERE / "attacks.py"), name, str(server.port)]
            attack = subprocess.Popen(command, text=True,
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            assert attack.stdout.readline() == "there\n"
        times = newcomers(server.port, context)
        events = [] if tls else [deliver(server, clients, EVENTS, 1 / RATE)["p99"]
                                 for _ in range(3)]
        figures.append((percentile(times, .5), percentile(times, .99), min(events, default=0)))
    attack.communicate()
    (p50, p99, quiet), (p50_then, p99_then, then) = figures
    say(f"{name}: a newcomer is answered in p50 {p50_then:.1f} p99 {p99_then:.1f} ms "
        f"(quiet {p50:.1f} and {p99:.1f}); "
        + ("over TLS" if tls
           else f"events p99 {then:.2f} ms, {then / quiet:.2f} times the quiet run"))
    clients.close()
    server.stop()


def make_certificate(folder: str) -> Tuple[str, str]:
    cert, key = os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec",
                    "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=localhost",
                    "-days", "2", "-out", cert, "-keyout", key],
                   check=True, stderr=subprocess.DEVNULL)
    return cert, key


def out_of_descriptors() -> None:
    limit = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
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
    say(f"out of descriptors (limit 64): {share:.1%} of a core, existing clients served, "
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
             "dribble": lambda _: silent_and_dribbling(),
             "descriptors": lambda _: out_of_descriptors(),
             "hostile": lambda _: hostile_connections()}
    parser = describe(__doc__)
    parser.add_argument("only", nargs="*", metavar="PART",
                        help=f"{', '.join(parts)} (default: all)")
    chosen = parser.parse_args().only or list(parts)
    if not set(chosen) <= set(parts):
        parser.error(f"the parts are {', '.join(parts)}")
    if "silent" in chosen and not shutil.which("openssl"):
        sys.exit("openssl is needed: it makes a certificate")
    pin_load()
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen:
            parts[name](folder)


if __name__ == "__main__":
    main()
