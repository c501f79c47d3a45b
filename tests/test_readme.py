"""The README keeps its word: every command in it is run, its table of flags is that of --help."""
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest
import requests

import publisher
from helpers import PATIENCE, TOP, Client, free_port, get, need, wait_until
from sse_core.engine import clients, frames, log, stalls
from sse_core.http import connections, http1, parameters, signed
from sse_server import SSEServer

README = (TOP / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
            for line in block.splitlines()]
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_table_of_flags_is_the_one_of_help():
    shown = subprocess.run([sys.executable, TOP / "sse_server.py", "--help"], text=True,
                           capture_output=True, env={**os.environ, "COLUMNS": "200"}).stdout
    helped = dict(re.findall(r"^  (--[a-z-]+(?: [A-Z]+)?)(?:  +|\n +)(.*)$", shown, re.MULTILINE))
    table = {flag: (meaning, default) for flag, meaning, default in
             re.findall(r"^\| `(--[^`]+)` \| (.+?) \| (.+?) \|$", README, re.MULTILINE)}
    assert set(table) == set(helped)
    for flag, (_, default) in table.items():
        said = re.search(r"\(default[: ]+([^;)]+)", helped[flag])
        assert default == (said[1] if said else "off"), flag


class Shell:
    """Run a command of the README as it stands but for its ports, which are free ones here."""

    def __init__(self, folder) -> None:
        self.ports = {"6500": str(free_port()), "6501": str(free_port()), "6502": str(free_port()),
                      "6379": str(free_port())}
        self.folder = folder
        self.processes = []

    def start(self, command: str, **options) -> subprocess.Popen:
        for old, new in self.ports.items():
            command = command.replace(old, new)
        command = command.replace("redis-cli ", f"redis-cli -p {self.ports['6379']} ")
        command = command.replace("python sse_server.py",
                                  f"{shlex.quote(sys.executable)} {TOP}/sse_server.py")
        process = subprocess.Popen(["bash", "-c", command], cwd=self.folder, text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL, start_new_session=True, **options)
        self.processes.append(process)
        return process

    def serve(self, command: str) -> None:
        process = self.start(command)
        while "Listening" not in process.stdout.readline():
            assert process.poll() is None, command

    def output(self, command: str) -> str:
        process = self.start(command)
        return process.communicate(timeout=PATIENCE)[0]

    def watch(self, command: str, text: str) -> subprocess.Popen:
        process = self.start(command)
        line = process.stdout.readline()
        while line and text not in line:
            line = process.stdout.readline()
        assert text in line, command
        return process

    def stop(self) -> None:
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.communicate()
        self.processes = []


@pytest.fixture
def shell(tmp_path):
    need("curl", "curl")
    shell = Shell(tmp_path)
    yield shell
    shell.stop()


def commands(*starts: str) -> list:
    """The commands of the README that these texts are in, in order; each text names one."""
    return [next(command for command in COMMANDS if start in command) for start in starts]


def test_run_and_see_the_clock_and_its_figures(shell):
    run, see = commands("python sse_server.py --port 6500", "curl -N http://127.0.0.1:6500/token")
    shell.serve(run)
    shell.watch(see, "data: ")
    health, metrics, status = commands("/-/health", "/-/metrics", "/-/status")
    assert shell.output(health) == "ok\n"
    assert "sse_clients 1\n" in shell.output(metrics)
    assert '"clients": 1' in shell.output(status)


def test_a_pipe_of_a_hundred_thousand_lines_reaches_a_client_to_the_last(shell):
    pipe, = commands("seq 1 100000 |")
    shell.start(pipe)
    port = int(shell.ports["6500"])
    wait_until(lambda: subprocess.run(["curl", "-s", "-I", f"http://127.0.0.1:{port}/"],
                                      capture_output=True).returncode == 0)
    with Client(port) as client:
        tail = b""
        while True:
            data = client.sock.recv(1 << 18)
            if not data:
                break
            tail = (tail + data)[-500:]
    assert b"data: 100000\n" in tail and tail.endswith(b"0\r\n\r\n")


def test_a_log_file(shell):
    tail, = commands("tail -n 0 -F app.log")
    (shell.folder / "app.log").write_text("old\n")
    shell.serve(tail)
    with Client(int(shell.ports["6500"])) as client, open(shell.folder / "app.log", "a") as log:
        client.open()
        print("new", file=log, flush=True)
        assert [event.data for event in client.read_events(1)] == ["new"]


def test_a_pipe_of_json_lines(shell):
    serve, = commands("--stdin --json --wait-clients 1")
    process = shell.start(serve)
    while "Listening" not in process.stdout.readline():
        assert process.poll() is None
    with Client(int(shell.ports["6500"]), get()) as client:
        event, = client.read_to_end().events
    assert (event.name, event.data) == ("alert", '{"disk": 93}') and process.wait(PATIENCE) == 0


def test_many_posts_at_once(shell):
    serve, post = commands("--publish-token SECRET", "x-ndjson")
    shell.serve(serve)
    assert len(json.loads(shell.output(post))["ids"]) == 2


def test_a_post_on_a_channel_reaches_who_watches_it(shell):
    serve, post, watch = commands("--publish-token SECRET", "curl -d 'hello' 'http",
                                  "'http://127.0.0.1:6500/?channel=news'")
    shell.serve(serve)
    watching = shell.start(watch)
    status = f"http://127.0.0.1:{shell.ports['6500']}/-/status"
    wait_until(lambda: requests.get(status, timeout=PATIENCE).json()["clients"])
    assert '{"id": "' in shell.output(post)
    line = watching.stdout.readline()
    while line and "hello" not in line:
        line = watching.stdout.readline()
    assert line


def test_the_program_serves_its_events(tmp_path):
    program = PROGRAMS[0]
    assert len(program.splitlines()) < 15
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", program.replace("6500", str(port))], cwd=TOP)
    try:
        wait_until(lambda: subprocess.run(["curl", "-s", "-I", f"http://127.0.0.1:{port}/"],
                                          capture_output=True).returncode == 0)
        with Client(port) as client:
            event, = client.read_events(1)
            assert event.name == "disk" and event.data.endswith(" MiB free")
    finally:
        process.kill()
        process.wait()


def test_tokens_let_in_origins_are_taken_and_tls_is_spoken(shell):
    env, origin, tls = commands("SSE_TOKEN=", "--origin", "--cert cert.pem")
    url = f"http://127.0.0.1:{shell.ports['6500']}"
    shell.serve(env)
    assert requests.head(url + "/two", timeout=PATIENCE).status_code == 200
    assert requests.post(url + "/three", data="x", timeout=PATIENCE).status_code == 200
    shell.stop()
    shell.serve(origin)
    assert requests.head(url + "/one", timeout=PATIENCE).status_code == 200
    assert requests.head(url + "/two", timeout=PATIENCE).status_code == 401
    shell.stop()
    make, = commands("openssl req")
    shell.output(make)
    shell.serve(tls)
    with requests.Session() as session:
        session.trust_env = False
        with pytest.raises(requests.exceptions.SSLError):
            session.head(url.replace("http:", "https:"), timeout=PATIENCE)


def test_two_servers_on_one_redis_stream_send_the_same(shell):
    need("redis-server", "redis-server")
    pytest.importorskip("redis")
    shell.start(f"exec redis-server --port {shell.ports['6379']} --save '' --dir {shell.folder}")
    one, two, post, add = commands("--port 6501 --redis", "--port 6502 --redis",
                                   "http://127.0.0.1:6502/SECRET", "XADD")
    wait_until(lambda: "PONG" in shell.output("redis-cli ping"))
    shell.serve(one), shell.serve(two)
    request = b"GET /?channel=news HTTP/1.1\r\nHost: x\r\n\r\n"
    with Client(int(shell.ports["6501"]), request) as client:
        client.open()
        shell.output(post), shell.output(add)
        got = [event[:2] for event in client.read_events(2)]
        assert got == [("message", "hello"), ("custom", "hello")]


def test_every_command_is_run_by_a_test():
    """By its own words: each test here, or in test_bridges, names the commands that it runs."""
    source = "".join((TOP / "tests" / name).read_text()
                     for name in ("test_readme.py", "test_bridges.py"))
    named = [text for call in re.findall(r"= commands\(([^)]*)\)", source)
             for text in re.findall(r'"([^"]+)"', call)]
    run = ["make test", *commands(*named)]
    assert [command for command in COMMANDS if command not in run] == []


def test_the_table_of_bounds_is_what_the_code_says():
    table = [int(value) for value in re.findall(
        r"^\| [^|]+ \| (\d+)(?: (?:s|bytes|characters))? \|$", README.partition("## Flags")[0],
        re.M)]
    assert table == [
        connections.REQUEST_TIME, connections.IDLE_TIME, connections.LINGER_TIME,
        connections.MAX_CONNECTIONS, connections.MAX_NEWCOMERS, connections.MAX_THREADS,
        connections.PLACE_TIME, http1.MAX_LINE, http1.MAX_HEAD, http1.MAX_FIELDS,
        frames.MAX_EVENT, connections.MAX_BODIES, frames.MAX_NAME,
        parameters.MAX_ASKED, parameters.MAX_NAMES, log.MAX_LATEST, http1.MAX_LAST_ID,
        signed.MAX_TOKEN, clients.LISTED, stalls.STALL, publisher.MAX_INPUT]


def test_since(shell):
    run, since = commands("python sse_server.py --port 6500", "since=10m")
    shell.serve(run)
    shell.watch(since, "data: ")


def test_a_history_file_outlives_the_server(shell):
    serve, = commands("--history-file events.db --publish-token SECRET")
    url = f"http://127.0.0.1:{shell.ports['6500']}/SECRET"
    shell.serve(serve)
    requests.post(url, data="kept", timeout=PATIENCE)
    shell.stop()
    shell.serve(serve)
    with Client(int(shell.ports["6500"]), get("/?since=all")) as client:
        client.read_until(lambda stream: "kept" in [event.data for event in stream.events])


def test_another_program_reads_the_history_file_and_adds_to_it(shell):
    serve, = commands("--history-file events.db --publish-token SECRET")
    read, add = commands("select * from event", "insert into event")
    need("sqlite3", "sqlite3")
    shell.serve(serve)
    with Client(int(shell.ports["6500"])) as client:
        client.open()
        shell.output(add)
        assert client.read_events(1)[0].data == "hello"
    assert "hello" in shell.output(read)


def test_all_cores_serve_one_stream(shell):
    many, = commands("for i in 1 2 3 4")
    shell.start(many)
    port = int(shell.ports["6500"])
    url = f"http://127.0.0.1:{port}/SECRET"

    def reaches(number: int) -> bool:
        try:
            return requests.post(url, data=str(number), timeout=PATIENCE).ok
        except requests.ConnectionError:        # none listens yet
            return False
    wait_until(lambda: reaches(0))
    clients = [Client(port, get("/?since=all")).open() for _ in range(12)]
    for number in range(1, 9):
        assert reaches(number)
    for client in clients:
        client.read_until_data("8")
        assert [event.data for event in client.stream.events][-8:] == list("12345678")
        client.close()


def test_the_program_on_asyncio_serves_its_events(shell):
    program = PROGRAMS[2].replace("6500", shell.ports["6500"]).replace("sleep(1)", "sleep(0.01)")
    shell.start(f"PYTHONPATH={TOP} exec {sys.executable} -c {shlex.quote(program)}")
    port = int(shell.ports["6500"])
    wait_until(lambda: subprocess.run(["curl", "-s", "-I", f"http://127.0.0.1:{port}/"],
                                      capture_output=True).returncode == 0)
    with Client(port) as client:
        assert client.read_events(2)[1].data.isdigit()


def test_a_signed_token_lets_its_user_in(shell):
    pytest.importorskip("jwt")
    signing = subprocess.run([sys.executable, "-c", PROGRAMS[1]], capture_output=True, text=True)
    key = re.search(r'key = "(.*)"', PROGRAMS[1])[1]
    with SSEServer(port=0, jwt_key=key) as server:
        url = f"{server.url}/{signing.stdout.strip()}?channel="
        assert requests.head(url + "user-42/mail", timeout=PATIENCE).status_code == 200
        assert requests.head(url + "user-420/mail", timeout=PATIENCE).status_code == 403
