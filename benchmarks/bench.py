"""Measure the server, and in the same run a bare C loop of send(): ratios first.

The server is pinned to core 0, this process, which is all of its clients, to core 1. Costs are the
CPU time of the server's process. A ratio is that of the minima of several alternating runs, because
noise only ever adds. `make bench` runs it all.
"""
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from typing import Callable, Dict, List, Optional, Tuple

from load import (GET, Clients, Measure, ServerProcess, c_loop, describe, nchan, our_pipe,
                  our_server, percentile, pin_load)

RATE = 20               # events a second in the steady runs
BURST = 200             # events at once
PARTS = ["fan-out", "connects", "memory", "resume", "channels", "tokens", "redis", "file", "crowd",
         "storm", "stalled"]
SECRET = "a secret of at least 32 bytes, of this benchmark"
Result = Dict[str, float]


def say(text: str) -> None:
    print(text, flush=True)


def deliver(server: ServerProcess, clients: Clients, events: int, pause: float,
            channel: str = "") -> Result:
    """Publish events and receive them all; return us of server CPU per delivery, and latencies."""
    clients.latencies.clear()
    with Measure(server) as measure:
        server.publish(events, pause, channel)
        clients.read_until(server.published)
    server.wait()
    ordered = sorted(clients.latencies)
    return {"cpu": measure.cpu / events / len(clients) * 1e6, "load": measure.load,
            "p50": percentile(ordered, .5) * 1e3, "p99": percentile(ordered, .99) * 1e3,
            "max": ordered[-1] * 1e3}


def best(results: List[Result]) -> Result:
    """Return the least of each figure; of the load, the most."""
    return {name: (max if name == "load" else min)(result[name] for result in results)
            for name in results[0]}


def alternate(servers: List[Tuple[ServerProcess, Clients]], runs: int,
              measure: Callable) -> List[Result]:
    """Measure all servers in turn, `runs` times over, and return the best of each."""
    results: List[List[Result]] = [[] for _ in servers]
    for _ in range(runs):
        for place, (server, clients) in enumerate(servers):
            results[place].append(measure(server, clients))
    return [best(each) for each in results]


def fan_out(number: int, runs: int, loop: Optional[ServerProcess], pipe: bool) -> None:
    """Steady rate and burst at so many clients, from a program and a pipe, beside the C loop."""
    own = [our_server(max_clients=20000), *([our_pipe()] if pipe else [])]
    pairs = [(server, Clients(server.port)) for server in (loop, *own) if server]
    for _, clients in pairs:
        clients.connect(number)
    events, rate = 40, min(RATE, 40000 / number)    # a core can make some 100,000 deliveries a s
    steady = alternate(
        pairs, runs, lambda server, clients: deliver(server, clients, events, 1 / rate))
    burst = alternate(pairs, runs, lambda server, clients: deliver(server, clients, BURST, 0))
    say(f"\n{number} clients, {rate:.0f} events/s, and bursts of {BURST}: CPU per delivery")
    for (server, _), one, many in zip(pairs, steady, burst):
        beside = f", {one['cpu'] / steady[0]['cpu']:.3f} and {many['cpu'] / burst[0]['cpu']:.4f} " \
            "of the C loop" if loop else ""
        say(f"  {server.name:12} steady {one['cpu']:6.2f} us  "
            f"p50 {one['p50']:6.2f}  p99 {one['p99']:6.2f}  max {one['max']:6.2f} ms"
            f"  load {one['load']:4.0%} | burst {many['cpu']:6.3f} us  load {many['load']:4.0%}"
            f"{beside}")
    for _, clients in pairs:
        clients.close()
    for server in own:
        server.stop()


def crowd(number: int, events: int = 60, in_flight: int = 4) -> None:
    """Latency with so many events under way at a time: the next is sent when all have one."""
    server = our_server(max_clients=number + 100)
    clients = Clients(server.port)
    clients.connect(number)
    with Measure(server) as measure:
        latencies = sorted(clients.keep_in_flight(server, events, in_flight))
    each = ", ".join(f"p{share * 100:.0f} {percentile(latencies, share) * 1e3:.0f} ms"
                     for share in (.5, .95, .99))
    say(f"\n{number} clients, {events} events, {in_flight} in flight: {each} from publish to "
        f"receipt ({len(latencies)} of them); {measure.cpu / len(latencies) * 1e6:.2f} us of CPU "
        f"a delivery, {events / measure.wall:.1f} events/s, load {measure.load:.0%}")
    clients.close()
    server.stop()


BROWSER = GET[:-2] + b"".join(line + b"\r\n" for line in (
    b'sec-ch-ua: "Chromium";v="142", "Not_A Brand";v="99"', b"sec-ch-ua-mobile: ?0",
    b'sec-ch-ua-platform: "Linux"', b"Connection: keep-alive", b"Cache-Control: no-cache",
    b"User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) "
    b"Chrome/142.0.0.0 Safari/537.36", b"Sec-Fetch-Site: same-origin", b"Sec-Fetch-Mode: cors",
    b"Sec-Fetch-Dest: empty", b"Referer: http://localhost:6500/",
    b"Accept-Encoding: gzip, deflate, br, zstd", b"Accept-Language: en-GB,en;q=0.9",
    b"Pragma: no-cache")) + b"\r\n"       # 15 fields, 620 bytes


def connects(runs: int, folder: str, number: int = 2000) -> None:
    """Server CPU of a connect, with a bare head and a browser's, beside the C loop and nchan."""
    ours = partial(our_server, max_clients=20000)
    kinds = {"bare": (ours, GET), "browser": (ours, BROWSER),
             "C loop": (partial(c_loop, folder), GET), "nchan": (nchan, GET)}
    costs: Dict[str, List[float]] = {}
    rates: Dict[str, List[float]] = {}
    for _ in range(runs):
        for name, (start, request) in kinds.items():
            server = start()
            if server:
                clients = Clients(server.port, request)
                clients.connect(100)        # what a first client costs once is not counted
                with Measure(server) as measure:
                    clients.connect(number)
                    time.sleep(.1)          # what is to be done beside the answer counts
                costs.setdefault(name, []).append(measure.cpu / number * 1e6)
                rates.setdefault(name, []).append(number / (measure.wall - .1))
                clients.close()
                server.stop()
    least = {name: min(values) for name, values in costs.items()}
    say(f"\nconnects, {number} of them, server CPU each: " + ", ".join(
        f"{name} {cost:.1f} us ({1e6 / cost:.0f} a CPU second, {max(rates[name]):.0f} a second "
        "of wall time)" for name, cost in least.items()))
    say(f"  a browser's head {least['browser'] / least['bare']:.2f} of a bare one" + "".join(
        f", a bare one {least['bare'] / least[name]:.2f} of {name}"
        for name in ("C loop", "nchan") if name in least))


def idle_memory(number: int) -> None:
    server = our_server(max_clients=20000)
    clients = Clients(server.port)
    clients.connect(100)
    before = server.memory()
    clients.connect(number)
    threads = len(os.listdir(f"/proc/{server.process.pid}/task"))
    each = (server.memory() - before) / number / 1024
    say(f"\n{number} idle clients: {each:.2f} KiB of process memory each, {threads} threads in all")
    clients.close()
    server.stop()


def stalled(runs: int, number: int = 1000, deaf: int = 50) -> None:
    """Latency of clients that read, without and with some that never do, and these's memory."""
    quiet, noisy = our_server(), our_server()
    pairs = []
    for server in (quiet, noisy):
        clients = Clients(server.port)
        clients.connect(number - deaf)
        pairs.append((server, clients))
    others, extra = Clients(noisy.port), Clients(quiet.port)
    others.connect(deaf, receive_buffer=4096)
    extra.connect(deaf)
    before = noisy.memory()
    for server, clients in pairs:       # fill the kernel's buffers of those that do not read
        deliver(server, clients, 4000, 0.0005)
    extra.read_until(quiet.published)

    def run(server: ServerProcess, clients: Clients) -> Result:
        result = deliver(server, clients, 60, 1 / RATE)
        if server is quiet:
            extra.read_until(server.published)
        return result
    without, beside = alternate(pairs, runs, run)
    say(f"\n{deaf} stalled among {number} clients")
    say(f"  p99 of the others: {beside['p99'] / without['p99']:.2f} of what it is without "
        f"(p50 {beside['p50'] / without['p50']:.2f})")
    say(f"  without p99 {without['p99']:.2f} ms, with {beside['p99']:.2f} ms; "
        f"memory grew by {(noisy.memory() - before) / 1024:.0f} KiB")
    for clients in (pairs[0][1], pairs[1][1], others, extra):
        clients.close()
    quiet.stop(), noisy.stop()


def resume(runs: int, number: int = 1000, missed: int = 1000) -> None:
    """What it costs to resume clients, connects and all, beside sending the same bytes live."""
    server = our_server(history=missed + 10)
    current = Clients(server.port)
    current.connect(number)
    sent, resumed = [], []
    for _ in range(runs):
        deliver(server, current, 10, 0)
        before = current.received
        sent.append(deliver(server, current, missed, 0)["cpu"] * missed * number / 1e6)
        size = current.received - before
        last = current.id_before(missed)        # that all have by now
        after = b"GET / HTTP/1.1\r\nHost: x\r\nLast-Event-ID: %b\r\n\r\n" % last
        back = Clients(server.port)
        with Measure(server) as measure:
            back.connect(number, request=lambda _: after)
            back.read_bytes(size)
        assert back.received >= size
        resumed.append(measure.cpu)
        back.close()
    say(f"\n{number} clients resume after {missed} missed events each")
    say(f"  {min(resumed) / min(sent):.2f} times what the same bytes to current clients cost "
        f"({min(resumed) * 1e3:.0f} and {min(sent) * 1e3:.0f} ms of CPU, {size / 1e6:.0f} MB)")
    current.close()
    server.stop()


def channels(runs: int, number: int = 10000) -> None:
    """An event on a channel touches only those who asked for it, however many others there are."""
    crowd, alone, hundred, one = (our_server(name, max_clients=20000)
                                  for name in ("crowd", "alone", "hundred", "one"))

    def connect(server: ServerProcess, count: int, channel: Callable[[int], str]) -> Clients:
        clients = Clients(server.port)
        request = "GET /?channel={} HTTP/1.1\r\nHost: x\r\n\r\n"
        clients.connect(count, request=lambda index: request.format(channel(index)).encode())
        return clients
    rest = connect(crowd, number - 1, lambda index: f"c{index}")
    first = [(crowd, connect(crowd, 1, lambda _: "mine")),
             (alone, connect(alone, 1, lambda _: "mine"))]
    many, single = alternate(
        first, runs, lambda server, clients: deliver(server, clients, 40, .02, "mine"))
    say(f"\none event to one of {number} clients, each on a channel of its own: "
        f"{many['cpu'] / single['cpu']:.2f} times one client "
        f"alone ({many['cpu']:.0f} and {single['cpu']:.0f} us)")
    tens = connect(hundred, 1000, lambda index: f"c{index % 100}")
    second = [(hundred, tens), (one, connect(one, 1000, lambda _: "c0"))]
    parted, whole = alternate(second, runs, lambda server, clients: spread(
        server, clients, 100 if server is hundred else 1))
    say(f"100 channels of 10 clients: {parted['cpu'] / whole['cpu']:.2f} per delivery of one "
        f"channel of 1000 ({parted['cpu']:.2f} and {whole['cpu']:.2f} us)")
    for clients in (rest, *(clients for _, clients in first + second)):
        clients.close()
    for server in (crowd, alone, hundred, one):
        server.stop()


def spread(server: ServerProcess, clients: Clients, channels: int, rounds: int = 20) -> Result:
    """Publish one event to each channel at once, time and again; return the cost of a delivery."""
    with Measure(server) as measure:
        for _ in range(rounds):
            clients.latencies.clear()
            server.publish(channels, 0, "c", channels)
            clients.read_each()
            server.wait()
            time.sleep(1 / RATE)
    return {"cpu": measure.cpu / rounds / len(clients) * 1e6, "load": measure.load}


def tokens(runs: int, number: int = 1000) -> None:
    """What a delivery costs when each client has a signed token of its own, beside none."""
    try:
        import jwt
    except ImportError:
        return say("\nsigned tokens: left out, there is no PyJWT")
    ends = int(time.time()) + 3600

    def request(index: int) -> bytes:
        token = jwt.encode({"exp": ends + index, "subscribe": ["*"]}, SECRET, "HS256")
        return f"GET /{token} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    pairs = []
    for server in (our_server(), our_server("tokens", jwt_key=SECRET)):
        pairs.append((server, Clients(server.port)))
        pairs[-1][1].connect(number, request=request)
    one, own = alternate(
        pairs, runs, lambda server, clients: deliver(server, clients, 40, 1 / RATE))
    say(f"\n{number} clients with a signed token each: {own['cpu'] / one['cpu']:.3f} of the CPU "
        f"per delivery without tokens ({own['cpu']:.2f} and {one['cpu']:.2f} us)")
    for server, clients in pairs:
        clients.close()
        server.stop()


def redis_stream(runs: int, folder: str, number: int = 1000) -> None:
    """What it costs to follow a Redis stream; how much later another's clients have an event."""
    if not shutil.which("redis-server"):
        return say("\nRedis: left out, there is no redis-server")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    store = subprocess.Popen(["redis-server", "--port", str(port), "--dir", folder, "--save", ""],
                             stdout=subprocess.DEVNULL)
    time.sleep(1)
    try:
        url = {"redis": f"redis://127.0.0.1:{port}/0"}
        pairs = []
        for server in (our_server(), our_server("following", **url)):
            pairs.append((server, Clients(server.port)))
            pairs[-1][1].connect(number)
        local, following = alternate(
            pairs, runs, lambda server, clients: deliver(server, clients, 40, 1 / RATE))
        say(f"\nfollowing a Redis stream, {number} clients: "
            f"{following['cpu'] / local['cpu']:.2f} of the local log's CPU per "
            f"delivery ({following['cpu']:.2f} and {local['cpu']:.2f} us)")
        for server, clients in pairs:
            clients.close()
            server.stop()
        one, two = our_server("one", **url), our_server("two", **url)
        same, other = Clients(one.port), Clients(two.port)
        same.connect(1), other.connect(1)
        for _ in range(100):
            one.publish(1)
            same.read_until(one.published), other.read_until(one.published)
            one.wait()
        # Read in turn, so what the other has beyond this includes its wait to be read
        median = [percentile(clients.latencies, .5) * 1e3 for clients in (same, other)]
        say(f"an event posted on one server: median {median[0]:.2f} ms to its own clients, "
            f"{median[1] - median[0]:+.2f} ms to the other's")
        for clients in (same, other):
            clients.close()
        one.stop(), two.stop()
    finally:
        store.terminate()
        store.wait()


def history_file(runs: int, folder: str, number: int = 1000) -> None:
    """What a history file costs a delivery, with one process on it and with two."""
    options = {"history_file": os.path.join(folder, "bench.db"), "reuse_port": 1}
    pairs = []
    for server in (our_server(), our_server("file", **options)):
        pairs.append((server, Clients(server.port)))
        pairs[-1][1].connect(number)
    memory, file = alternate(
        pairs, runs, lambda server, clients: deliver(server, clients, 40, 1 / RATE))
    say(f"\nthrough a history file, {number} clients: {file['cpu'] / memory['cpu']:.2f} of the "
        f"log in memory per delivery ({file['cpu']:.2f} and {memory['cpu']:.2f} us)")
    one, clients = pairs[1]
    two = our_server("second", **options)
    others = Clients(two.port)
    others.connect(number)
    costs = []
    for _ in range(runs):
        with Measure(one) as first, Measure(two) as second:
            one.publish(40, 1 / RATE)
            clients.read_until(one.published), others.read_until(one.published)
        one.wait()
        costs.append((first.cpu + second.cpu) / 40 / (2 * number) * 1e6)
    say(f"two processes on one file, {2 * number} clients: {min(costs) / file['cpu']:.2f} of one "
        f"per delivery ({min(costs):.2f} us)")
    three = our_server("third", **options)
    time.sleep(4)       # until it looks as seldom as it does
    with Measure(three) as idle:
        time.sleep(10)
    three.stop()
    say(f"an idle server on a file: {idle.cpu / idle.wall:.2%} of a core")
    for each in (clients, others):
        each.close()
    for server in (pairs[0][0], one, two):
        server.stop()
    pairs[0][1].close()


def storm(folder: str, number: int) -> None:
    """How long it takes until clients that `kill -9` of their server has cut are all back."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    options = {"history_file": os.path.join(folder, "storm.db"), "port": port,
               "max_clients": number + 100}
    server = our_server(**options)
    clients = Clients(port)
    clients.connect(number)
    server.publish(20)
    clients.read_until(20)
    server.wait()
    last = clients.id_before(10).decode()
    server.process.kill()
    server.process.wait()
    clients.close()
    back = Clients(port, GET[:-2] + f"Last-Event-ID: {last}\r\n\r\n".encode())
    server = our_server(**options)
    began = time.monotonic()
    back.connect(number)
    back.read_until(20)
    say(f"\n{number} clients cut by kill -9 of a server with a history file: all are back, and "
        f"have the 10 events they missed, {time.monotonic() - began:.2f} s after it listens again")
    back.close()
    server.stop()


def main() -> None:
    parser = describe(__doc__)
    parser.add_argument("only", nargs="*", metavar="PART",
                        help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--runs", type=int, default=9,
                        help="alternating runs of each measurement (default 9)")
    options = parser.parse_args()
    chosen = options.only or PARTS
    if not set(chosen) <= set(PARTS):
        parser.error(f"the parts are {', '.join(PARTS)}")
    limit = pin_load()
    with tempfile.TemporaryDirectory() as folder:
        say(f"Python {sys.version.split()[0]}, {time.strftime('%Y-%m-%d')}, descriptor limit "
            f"{limit}. `load` is the share of its core that the load took:\n"
            "below 100 % it was not the bottleneck.")
        if "fan-out" in chosen:
            for number in filter(lambda number: number * 2 + 100 < limit, (100, 1000, 9500)):
                loop = c_loop(folder) or say("no C compiler: the C loop is left out")
                fan_out(number, options.runs, loop, number * 3 + 100 < limit)
                if loop:
                    loop.stop()
        if "connects" in chosen:
            connects(options.runs, folder)
        if "memory" in chosen:
            idle_memory(min(10000, limit - 200))
        if "resume" in chosen:
            resume(options.runs)
        if "channels" in chosen:
            channels(options.runs, min(10000, limit - 200))
        if "tokens" in chosen:
            tokens(options.runs)
        if "redis" in chosen:
            redis_stream(options.runs, folder)
        if "file" in chosen:
            history_file(options.runs, folder)
        if "crowd" in chosen:
            crowd(min(18000, limit - 200))
        if "storm" in chosen:
            storm(folder, min(9500, limit - 200))
        if "stalled" in chosen:
            stalled(options.runs)


if __name__ == "__main__":
    main()
