"""Measure the server beside others that do the same, install these, and write docs/peers.md.

Every server gets the load of bench.py's fan-out, in turn and in a fresh process for each run; see
load.py. A figure is the best of its runs, because noise only ever adds. Peers that need packages
get them in the folder PEERS_DIR, or in one that is removed at the end. One that cannot be had, or
takes too long, is left out with a word why. `make bench-peers` runs it.
"""
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Tuple

from bench import BROWSER, BURST, RATE, Result, deliver
from load import (NCHAN, Clients, Measure, PeerProcess, ServerProcess, c_loop, descendants,
                  describe, nchan, our_server, pin_load)

CLIENTS = 1000
RUNS = 3
EVENTS = 40             # in a steady run
PATIENCE = 60.0         # seconds that one peer may take in all, without its installation
PEERS = Path(__file__).resolve().parent / "peers"
DOCS = Path(__file__).resolve().parent.parent / "docs"
# The mark before the data, and how much after it, with a space or without, says when and which
MARK, STAMP = b"\ndata:", 37
PACKAGES = ("sse-starlette", "uvicorn", "uvloop", "httptools", "aiohttp", "aiohttp-sse")
FEW = 100               # clients, of which the steady run is repeated
COLUMNS = (("cpu", "CPU per delivery, steady", "us", 2),
           ("few", f"the same, {FEW} clients", "us", 2),
           ("burst", "CPU per delivery, burst", "us", 3),
           ("p99", "p99 latency, steady", "ms", 1), ("wall", "connects per s", "", 0),
           ("connects", "connects per CPU s", "", 0),
           ("browser", "the same, a browser's head", "", 0),
           ("memory", "memory per idle client", "KiB", 2))
LABELS, WIDTH, TOP = 170, 270, 36      # of the chart
STYLE = """<style>
text { font: 12px system-ui, sans-serif; fill: #333 }
.title { font-weight: 600 } .tick { font-size: 10px; fill: #666 }
line { stroke: #8884 } .bar { fill: #7d8fa3 } .ours { fill: #d9730d }
@media (prefers-color-scheme: dark) { text { fill: #ddd } .tick { fill: #aaa } }
</style>"""
INTRODUCTION = """# Comparison with other servers

The same load for all: {clients} clients, each event 68 bytes of data. The server has core 0, its
clients core 1. Steady is {events} events at {rate} a second, a burst {burst} events at once. CPU
is that of the server's process or processes, read from outside. Every figure is the best of its
runs, {runs} at most, in turn and each in a fresh process.

{rows}

![Server CPU per delivery, steady and in a burst](peers.svg)

{machine}; Python {python}; {date}. Command: `make bench-peers`.

{versions}

What the figures do not say:

- They compare what each costs out of the box, not what each offers: the C loop has no log, no
  resume and no heartbeat.
- In a burst, each client of this server and of Node gets what has gathered in one piece; those of
  the others get it in several or many.
- nginx + nchan gets its events by HTTP, one POST after the answer to the last, from a process that
  is not counted. That nginx parses them is counted.
- Memory is anonymous memory of the process: neither the kernel's sockets, nor what nginx shares,
  nor what a garbage collector or an allocator has kept for later and gives to the next client.
- All clients are one process on one core: where a server is faster than that, connects per second
  are the load's limit; those per second of CPU are not.
"""


class Peer(NamedTuple):
    name: str
    start: Callable[[str], Optional[ServerProcess]]     # in this folder
    version: Callable[[str], str]


class Left(Exception):
    """A peer is left out; the word why."""


class TolerantClients(Clients):
    """Clients of any server, however it ends its frames: a line of data that starts as ours do."""

    def _receive(self, fd: int) -> None:
        data = os.read(fd, 262144)
        assert data, "a client was dropped"
        self.received += len(data)
        data = self._tails.get(fd, b"") + data
        at = data.rfind(MARK, 0, max(0, len(data) - STAMP))         # the last one that is whole
        # what is kept starts after the mark that was read, so that no event counts twice
        self._tails[fd] = data[max(at + 1, len(data) - len(MARK) - STAMP):]
        if at >= 0:
            self._note(fd, data[at + len(MARK):at + len(MARK) + STAMP])

    def _note(self, fd: int, stamp: bytes) -> None:
        stamp = stamp.lstrip()
        self._last[fd] = int(stamp[20:29])
        self.latencies.append(time.monotonic() - int(stamp[:19]) / 1e9)


def output(*command: str) -> str:
    """Return the first line that a command says, in either stream."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=PATIENCE)
    return (done.stdout.splitlines() or [""])[0].strip()


def install(*command: str) -> None:
    """Run an installer quietly; what it cannot get leaves the peer out."""
    try:
        subprocess.run(command, check=True, timeout=2 * PATIENCE, stdout=subprocess.DEVNULL,
                       stderr=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        raise Left("unavailable") from None


def venv_python(folder: str) -> str:
    """Return the interpreter of a virtual environment that has the Python peers' packages."""
    python = os.path.join(folder, "venv", "bin", "python")
    ready = os.path.join(folder, "venv", "ready")
    if not os.path.exists(ready):
        install(sys.executable, "-m", "venv", os.path.dirname(os.path.dirname(python)))
        install(python, "-m", "pip", "install", "--quiet", *PACKAGES)
        Path(ready).touch()
    return python


def python_peer(name: str, file: str) -> Callable[[str], ServerProcess]:
    return lambda folder: PeerProcess(name, [venv_python(folder), str(PEERS / file)])


def python_version(*packages: str) -> Callable[[str], str]:
    script = ("import sys; from importlib.metadata import version as v; "
              "print(', '.join(p + ' ' + v(p) for p in sys.argv[1:]))")
    return lambda folder: output(venv_python(folder), "-c", script, *packages)


def node_modules(folder: str) -> str:
    """Return the folder of the Node peer's package, installed on demand."""
    if not shutil.which("node"):
        raise Left("unavailable")
    modules = os.path.join(folder, "node_modules")
    if not os.path.exists(os.path.join(modules, "better-sse")):
        install("npm", "install", "--silent", "--prefix", folder, "better-sse")
    return modules


def node_peer(folder: str) -> ServerProcess:
    os.environ["NODE_PATH"] = node_modules(folder)
    return PeerProcess("better-sse", ["node", str(PEERS / "better_sse.cjs")])


def node_version(folder: str) -> str:
    with open(os.path.join(node_modules(folder), "better-sse", "package.json")) as file:
        version = json.load(file)["version"]
    return f"better-sse {version}, Node {output('node', '--version').lstrip('v')}"


def nchan_version(folder: str) -> str:
    """Return the versions of the system's packages."""
    if not shutil.which("nginx") or not os.path.exists(NCHAN):
        raise Left("unavailable")
    query = ["dpkg-query", "-W", "-f", "${Version}\n", "libnginx-mod-nchan"]
    nchan = output(*query) if shutil.which("dpkg-query") else ""
    return f"nchan {nchan.split(':')[-1]}, nginx {output('nginx', '-v').split('/')[-1]}"


def this_python(folder: str) -> str:
    return f"Python {platform.python_version()}"


def all_peers() -> List[Peer]:
    """Return who is measured: this server and the yardstick first."""
    return [
        Peer("this server", lambda folder: our_server(), this_python),
        Peer("C loop", c_loop, lambda folder: output("cc", "--version")),
        Peer("nginx + nchan", lambda folder: nchan(), nchan_version),
        Peer("Node better-sse", node_peer, node_version),
        Peer("sse-starlette, uvicorn", python_peer("sse-starlette", "sse_starlette_uvicorn.py"),
             python_version("sse-starlette", "uvicorn", "uvloop")),
        Peer("aiohttp-sse", python_peer("aiohttp-sse", "aiohttp_sse_server.py"),
             python_version("aiohttp-sse", "aiohttp")),
        Peer("ThreadingHTTPServer",
             lambda folder: PeerProcess("threads", [sys.executable, str(PEERS / "threads.py")]),
             this_python)]


def end(server: ServerProcess) -> None:
    """Kill a server and what it started; harmless where it has ended."""
    if server.process.poll() is None:
        for pid in [*descendants(server.process.pid), server.process.pid]:
            os.kill(pid, signal.SIGKILL)


def connect(server: ServerProcess, clients: Clients) -> Result:
    """Connect who is missing; return connects per second, of wall and of CPU, and their memory."""
    before, number = server.memory(), CLIENTS - len(clients)
    with Measure(server) as measure:
        clients.connect(number)
        time.sleep(.1)          # what a server has to do beside the answer is to count
    return {"wall": number / (measure.wall - .1), "connects": number / measure.cpu,
            "memory": (server.memory() - before) / number / 1024}


def measure(server: ServerProcess) -> Result:
    """Return all figures of one run of a server."""
    clients, browsers = TolerantClients(server.port), TolerantClients(server.port, BROWSER)
    try:
        clients.connect(FEW)                # what a first client costs once is not counted
        few = deliver(server, clients, EVENTS, 1 / RATE)
        result = connect(server, clients)
        result.update(deliver(server, clients, EVENTS, 1 / RATE))
        burst = deliver(server, clients, BURST, 0)
        return {**result, "few": few["cpu"], "burst": burst["cpu"],
                "load": max(result["load"], burst["load"]),
                "browser": connect(server, browsers)["connects"]}
    finally:
        clients.close()
        browsers.close()


def run(peer: Peer, folder: str, patience: float) -> Result:
    """Start a peer, measure it, and end it, within so many seconds."""
    server = peer.start(folder)
    if not server:
        raise Left("unavailable")
    # a server that is killed ends every wait for it: its clients are dropped and its answers end
    timer = threading.Timer(patience, end, [server])
    timer.start()
    deadline = time.monotonic() + patience
    try:
        result = measure(server)
        server.stop()
        return result
    except (AssertionError, OSError, subprocess.SubprocessError):
        raise Left("failed" if time.monotonic() < deadline else "slow") from None
    finally:
        timer.cancel()
        end(server)


def better(results: List[Result]) -> Result:
    """Return the best of each figure: the most connects, the least of all else."""
    most = ("wall", "connects", "browser", "load")
    return {name: (max if name in most else min)(result[name] for result in results)
            for name in results[0]}


def attempt(peer: Peer, folder: str, patience: float) -> Result:
    """Run a peer once; what goes wrong leaves it out."""
    try:
        return run(peer, folder, patience)
    except (ValueError, OSError, subprocess.SubprocessError):   # it does not start, or says no port
        raise Left("failed") from None


def alternate(peers: List[Peer], folder: str, words: Dict[str, str]) -> Dict[str, List[Result]]:
    """Run all peers in turn, RUNS times; return their results, add words for those left out."""
    results: Dict[str, List[Result]] = {}
    spent = dict.fromkeys((peer.name for peer in peers), 0.0)
    for _ in range(RUNS):
        for peer in peers:
            done = results.get(peer.name, [])
            if peer.name in words or done and spent[peer.name] * (1 + 1 / len(done)) > PATIENCE:
                continue                # one that is slow keeps the runs it has
            began = time.monotonic()
            try:
                result = attempt(peer, folder, PATIENCE - spent[peer.name])
                results.setdefault(peer.name, []).append(result)
            except Left as left:
                words[peer.name] = str(left)
            spent[peer.name] += time.monotonic() - began
            print(f"{peer.name:24} {time.monotonic() - began:5.1f} s  {words.get(peer.name, '')}",
                  file=sys.stderr, flush=True)
    return {name: runs for name, runs in results.items() if runs}


def prepare(peers: List[Peer], folder: str) -> Tuple[Dict[str, str], Dict[str, str]]:
    """Install what is missing, outside the peers' time; return versions, and words for the rest."""
    versions: Dict[str, str] = {}
    words: Dict[str, str] = {}
    for peer in peers:
        try:
            versions[peer.name] = peer.version(folder)
        except Left as left:
            words[peer.name] = str(left)
        except (OSError, subprocess.SubprocessError):
            words[peer.name] = "unavailable"
    return versions, words


def row(name: str, cells: List[str]) -> str:
    return "| " + " | ".join([name, *cells]) + " |"


def ratio(value: float, reference: float) -> str:
    """Return a ratio with two decimals, or as many as a small one needs."""
    quotient = value / reference
    return f"{quotient:.2f}" if quotient >= .1 else f"{quotient:.2g}"


def table(figures: Dict[str, Result], words: Dict[str, str], runs: Dict[str, int]) -> str:
    """Return the Markdown table: ratios to the C loop, then the absolute figures."""
    base = figures.get("C loop")
    heads = [f"{title}{', ' + unit if unit else ''}" for _, title, unit, _ in COLUMNS]
    compared = ("cpu", "few", "burst", "connects", "browser") if base else ()
    ratios = [f"{title}, of the C loop" for key, title, _, _ in COLUMNS if key in compared]
    lines = [row("server", ratios + heads + ["runs"]),
             row("---", ["---:"] * (len(ratios) + len(heads) + 1))]
    for name, result in figures.items():
        cells = [ratio(result[key], base[key]) for key in compared]
        cells += [f"{result[key]:.{digits}f}" for key, _, _, digits in COLUMNS]
        lines.append(row(name, cells + [str(runs[name])]))
    lines += [row(name, [f"left out: {word}"] + [""] * (len(ratios) + len(heads)))
              for name, word in words.items() if name not in figures]
    return "\n".join(lines)


def bar(x: float, y: int, width: float, text: str, ours: bool) -> str:
    """Return a bar and its figure."""
    kind = "ours" if ours else "bar"
    return (f'<rect class="{kind}" x="{x}" y="{y}" width="{width:.1f}" height="16" rx="2"/>'
            f'<text x="{x + width + 6:.1f}" y="{y + 12}">{text}</text>')


def decades(figures: Dict[str, Result]) -> Tuple[int, int]:
    """Return the powers of ten between which all costs lie."""
    values = [result[key] for result in figures.values() for key in ("cpu", "burst")]
    return math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))


def panel(figures: Dict[str, Result], key: str, title: str, left: int) -> List[str]:
    """Return one panel: bars from the lowest power of ten, on a logarithmic scale."""
    low, high = decades(figures)
    step = WIDTH / (high - low)
    bottom = TOP + 24 * len(figures)
    parts = [f'<text class="title" x="{left}" y="20">{title}</text>']
    for power in range(low, high + 1):
        x = left + (power - low) * step
        parts.append(f'<line x1="{x:.1f}" y1="{TOP - 6}" x2="{x:.1f}" y2="{bottom}"/>'
                     f'<text class="tick" x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">'
                     f'{10.0 ** power:g}</text>')
    for place, (name, result) in enumerate(figures.items()):
        width = (math.log10(result[key]) - low) * step
        parts.append(bar(left, TOP + 24 * place, width, f"{result[key]:.3g}",
                         name == "this server"))
    return parts


def chart(figures: Dict[str, Result]) -> str:
    """Return an SVG of the CPU per delivery, steady and in a burst; readable in light and dark."""
    height = TOP + 24 * len(figures) + 40
    names = [f'<text x="{LABELS - 10}" y="{TOP + 24 * place + 12}" text-anchor="end">{name}</text>'
             for place, name in enumerate(figures)]
    parts = ['<svg xmlns="http://www.w3.org/2000/svg" '
             f'viewBox="0 0 {2 * LABELS + 2 * WIDTH} {height}" role="img" '
             'aria-label="Server CPU per delivery">', STYLE, *names,
             *panel(figures, "cpu", f"us of CPU per delivery, {RATE} events/s", LABELS),
             *panel(figures, "burst", f"in a burst of {BURST} events", LABELS + WIDTH + 80),
             f'<text class="tick" x="{LABELS}" y="{height - 6}">'
             'logarithmic scales; less is better</text>', "</svg>"]
    return "\n".join(parts) + "\n"


def machine() -> str:
    """Return what this runs on."""
    model = ""
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":")[1].strip() for line in file if line.startswith("model name")),
                     platform.machine())
    return f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"


def report(rows: str, figures: Dict[str, Result], versions: Dict[str, str]) -> str:
    """Return the page: what was measured, where and when, the table and the chart."""
    listed = "\n".join(f"- {name}: {versions[name]}" for name in figures)
    return INTRODUCTION.format(clients=CLIENTS, rate=RATE, burst=BURST, events=EVENTS, runs=RUNS,
                               rows=rows, versions=listed, machine=machine(),
                               python=platform.python_version(), date=time.strftime("%Y-%m-%d"))


def write(figures: Dict[str, Result], words: Dict[str, str], runs: Dict[str, int],
          versions: Dict[str, str]) -> None:
    """Print the table; write the page and its chart."""
    rows = table(figures, words, runs)
    print(rows)
    (DOCS / "peers.md").write_text(report(rows, figures, versions))
    (DOCS / "peers.svg").write_text(chart(figures))


def main() -> None:
    """Measure everyone, and write down what came of it."""
    describe(__doc__).parse_args()
    pin_load()
    peers = all_peers()
    with tempfile.TemporaryDirectory() as scratch:
        folder = os.path.abspath(os.environ.get("PEERS_DIR") or scratch)
        os.makedirs(folder, exist_ok=True)
        versions, words = prepare(peers, folder)
        results = alternate(peers, folder, words)
    figures = {name: better(runs) for name, runs in results.items()}
    write(figures, words, {name: len(runs) for name, runs in results.items()}, versions)


if __name__ == "__main__":
    main()
