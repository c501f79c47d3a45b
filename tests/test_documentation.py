"""The documentation keeps its word: every command on every page is run, every table compared."""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import requests

import publisher
from browser import browser
from documentation import COMMANDS, PAGES, blocks, commands, program
from helpers import PATIENCE, TOP, Client, free_port, get, need, wait_until
from sse_core.engine import clients, frames, log, stalls
from sse_core.http import connections, http1, parameters, signed
from sse_server import SSEServer


def test_the_table_of_flags_is_the_one_of_help():
    shown = subprocess.run([sys.executable, TOP / "sse_server.py", "--help"], text=True,
                           capture_output=True, env={**os.environ, "COLUMNS": "200"}).stdout
    helped = dict(re.findall(r"^  (--[a-z-]+(?: [A-Z]+)?)(?:  +|\n +)(.*)$", shown, re.MULTILINE))
    table = {flag: (meaning, default) for flag, meaning, default in
             re.findall(r"^\| `(--[^`]+)` \| (.+?) \| (.+?) \|$", PAGES["docs/operations.md"],
                        re.MULTILINE)}
    assert set(table) == set(helped)
    for flag, (_, default) in table.items():
        said = re.search(r"\(default[: ]+([^;)]+)", helped[flag])
        assert default == (said[1] if said else "off"), flag


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
    serve, post, watch = commands("--publish-token SECRET", "-d 'hello' 'http",
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
    disk = program("disk_usage")
    port = free_port()
    process = subprocess.Popen([sys.executable, "-c", disk.replace("6500", str(port))], cwd=TOP)
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


def test_the_three_lines_of_python_publish(shell):
    three = program("3 new").replace("6500", shell.ports["6500"])
    process = shell.start(f"PYTHONPATH={TOP} exec {sys.executable} -c {shlex.quote(three)}")
    assert "Press Enter" in process.stdout.read(11)
    with Client(int(shell.ports["6500"]), get("/?channel=ann&since=all")) as client:
        event, = client.read_events(1)
    assert (event.name, event.data) == ("mail", "3 new")
    process.communicate("\n", timeout=PATIENCE)
    assert process.returncode == 0


def test_the_page_of_ten_lines_shows_named_events_and_gaps(tmp_path):
    page, = blocks("html")
    with SSEServer(port=0) as server, browser(tmp_path / "profile") as tab:
        path = tmp_path / "page.html"
        path.write_text(page.replace("http://127.0.0.1:6500", server.url))
        tab.open(path.as_uri())
        tab.wait_for("source.readyState === 1")
        server.publish("plain")
        server.publish("named", "custom")
        tab.wait_for("list.children.length === 2")
        assert tab.evaluate("[...list.children].map(item => item.textContent)") == [
            "plain", "custom: named"]


def test_other_programs_read_and_add_rows_of_the_file(shell):
    need("sqlite3", "sqlite3")
    read, add, copy = commands("'select * from event'", "insert into event", "vacuum into")
    with SSEServer(port=0, history_file=shell.folder / "events.db") as server:
        with Client(server.port, get("/?since=all")) as client:
            client.open()
            server.publish("ours")
            client.read_until_data("ours")
            shell.output(add)
            client.read_until_data("hello")
        assert shell.output(read).splitlines()[-1].endswith("|hello")
        shell.output(copy)
        server.publish("not in the copy")
    remove, install = commands("rm -f events.db", "install -m 600")
    shell.output(remove), shell.output(install)
    with SSEServer(port=0, history_file=shell.folder / "events.db") as server:
        with Client(server.port, get("/?since=all")) as client:
            assert [event.data for event in client.read_events(2)] == ["ours", "hello"]


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name):
    folder = (TOP / name).parent
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[name]):
        path, _, anchor = target.partition("#")
        if target.startswith(("http:", "https:")):
            continue
        assert not path or (folder / path).exists(), target
        if anchor:
            text = (folder / path).read_text() if path else PAGES[name]
            heads = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-")
                     for head in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
            assert anchor in heads, target


@pytest.mark.parametrize("unit", ["sse-server.service", "sse-server@.service"])
def test_systemd_calls_the_exposure_of_the_units_ok(unit):
    """`systemd-analyze security` rates from 0 to 10; below 5 is OK."""
    analyze = shutil.which("systemd-analyze") or pytest.skip("systemd-analyze is not installed")
    said = subprocess.run([analyze, "security", "--offline=yes", TOP / "examples" / unit],
                          capture_output=True, text=True)
    rating = re.search(r"Overall exposure level .*: ([0-9.]+) ", said.stdout)
    if not rating:
        pytest.skip("this systemd-analyze cannot rate a unit that is not installed")
    assert float(rating[1]) < 5


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 200
    assert len(PAGES["README.md"].split()) < 1300


def test_every_command_is_run_by_a_test():
    """By its own words: each test here, in test_bridges or test_recipes names what it runs."""
    source = "".join((TOP / "tests" / name).read_text()
                     for name in ("test_documentation.py", "test_bridges.py", "test_recipes.py"))
    named = [text for call in re.findall(r"= commands\(([^)]*)\)", source)
             for text in re.findall(r'"([^"]+)"', call)]
    run = ["make test", *commands(*named)]
    assert len(COMMANDS) > 20
    assert [command for command in COMMANDS if command not in run] == []


def test_the_table_of_bounds_is_what_the_code_says():
    table = [int(value) for value in re.findall(
        r"^\| [^|]+ \| (\d+)(?: (?:s|bytes|characters))? \|$", PAGES["docs/operations.md"],
        re.M)]
    assert table == [
        connections.REQUEST_TIME, connections.IDLE_TIME, connections.LINGER_TIME,
        connections.MAX_CONNECTIONS, connections.MAX_NEWCOMERS, connections.MAX_THREADS,
        connections.PLACE_TIME, connections.STORE_TIME, http1.MAX_LINE, http1.MAX_HEAD,
        http1.MAX_FIELDS,
        frames.MAX_EVENT, connections.MAX_BODIES, frames.MAX_NAME,
        parameters.MAX_ASKED, parameters.MAX_NAMES, log.MAX_LATEST, http1.MAX_LAST_ID,
        signed.MAX_TOKEN, clients.MAX_LISTED, stalls.STALL_TIMEOUT, publisher.MAX_INPUT]


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
    code = program("asyncio").replace("sleep(1)", "sleep(0.01)")
    code = code.replace("6500", shell.ports["6500"])
    shell.start(f"PYTHONPATH={TOP} exec {sys.executable} -c {shlex.quote(code)}")
    port = int(shell.ports["6500"])
    wait_until(lambda: subprocess.run(["curl", "-s", "-I", f"http://127.0.0.1:{port}/"],
                                      capture_output=True).returncode == 0)
    with Client(port) as client:
        assert client.read_events(2)[1].data.isdigit()


def test_a_signed_token_lets_its_user_in(shell):
    pytest.importorskip("jwt")
    signing = subprocess.run([sys.executable, "-c", program("jwt.encode")],
                             capture_output=True, text=True)
    serve, = commands("SSE_JWT_KEY='a secret of")
    shell.serve(serve)
    url = f"http://127.0.0.1:{shell.ports['6500']}/{signing.stdout.strip()}?channel="
    assert requests.head(url + "user-42/mail", timeout=PATIENCE).status_code == 200
    assert requests.head(url + "user-420/mail", timeout=PATIENCE).status_code == 403
