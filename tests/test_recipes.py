"""Each recipe of docs/recipes.md does what it says: real apps, workers, proxies and browsers."""
import getpass
import grp
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Iterator

import pytest
import requests

from browser import browser
from documentation import commands
from helpers import PATIENCE, TOP, Client, ask, get, listens, need, wait_until
from sse_server import SSEServer

STREAM = "Accept: text/event-stream"


@pytest.fixture
def recipes(shell, monkeypatch):
    """The shell, with the examples in its folder. They use the ports of the shell."""
    (shell.folder / "examples").mkdir()
    for path in (TOP / "examples").iterdir():
        if path.is_file():
            (shell.folder / "examples" / path.name).write_text(shell.moved(path.read_text()))
    monkeypatch.setenv("PYTHONPATH", str(TOP))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(shell.folder))
    return shell


def change(recipes, name: str, old: str, new: str) -> None:
    """Replace a text in one of the examples, which must be there."""
    path = recipes.folder / "examples" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def start(recipes, command: str, *ports: str) -> subprocess.Popen:
    """Run a command of the page until something listens on its ports."""
    process = recipes.start(command)
    wait_until(lambda: process.poll() is not None
               or all(listens(int(recipes.ports[port])) for port in ports))
    assert process.poll() is None, command
    return process


# A web application with several workers

class User:
    """Somebody who is logged in to an app. port: of the app, or of the proxy before it."""

    def __init__(self, recipes, name: str, port: str, stream_port: str, path: str) -> None:
        self.name = name
        self._url = f"http://127.0.0.1:{recipes.ports[port]}"
        self._stream_port, self._path = int(recipes.ports[stream_port]), path
        self._proxied = port == stream_port
        answer = requests.get(f"{self._url}/login?user={name}", allow_redirects=False,
                              timeout=PATIENCE)
        assert answer.status_code in (302, 303), answer.text
        self._cookies = answer.cookies
        self.cookie = "Cookie: " + "; ".join(f"{each.name}={each.value}" for each in self._cookies)

    def send(self, to: str, text: str) -> None:
        """Let the app notify a user. Each call is a connection of its own, to any worker."""
        answer = requests.post(f"{self._url}/send", params={"to": to, "text": text},
                               cookies=self._cookies, timeout=PATIENCE)
        assert answer.status_code == 204, answer.text

    def watch(self, last_id: str = "") -> Client:
        resume = [f"Last-Event-ID: {last_id}"] if last_id else []
        return Client(self._stream_port, get(f"{self._path}?channel=user/{self.name}&since=24h",
                                             STREAM, self.cookie, *resume),
                      proxied=self._proxied, last_id=last_id).open()

    def status(self, channel: str, *fields: str) -> bytes:
        """Return the status line of a stream that is asked for with these fields."""
        request = get(f"{self._path}?channel={channel}", STREAM, "Connection: close", *fields)
        return ask(self._stream_port, request).split(b"\r\n")[0]


def texts(client: Client) -> list:
    return [event.data for event in client.stream.events]


def check_that_each_user_has_a_channel_of_their_own(ann: User, bob: User) -> None:
    streams = [ann.watch() for _ in range(6)]
    with bob.watch() as of_bob:
        sent = [f"bob: {number}" for number in range(10)]
        for number in range(10):
            bob.send("ann", str(number))
        ann.send("bob", "hello")
        of_bob.read_until_data("ann: hello")
        assert texts(of_bob) == ["ann: hello"]
    for stream in streams:
        stream.read_until_data(sent[-1])
        assert texts(stream) == sent
        stream.close()
    for status, fields in (b" 403 ", [ann.cookie]), (b" 401 ", []), (b" 401 ", ["Cookie: a=b"]):
        assert status in ann.status("user/bob", *fields)


def listeners(port: str) -> int:
    """Return how many sockets listen on a port, which have the state 0A."""
    table = Path("/proc/net/tcp").read_text()
    return len(re.findall(rf" 0100007F:{int(port):04X} 00000000:0000 0A ", table))


def workers(process: subprocess.Popen) -> list:
    """Return the processes that a server of applications has forked, without its helpers."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children
            if "resource_tracker" not in Path(f"/proc/{child}/cmdline").read_text()]


_flask, _fastapi, _django = commands(
    "flask_in_workers:app", "fastapi_in_workers:app",
    "gunicorn --workers 2 --bind 127.0.0.1:8000 examples.django_app:application")
IN_WORKERS = {"flask": _flask, "fastapi": _fastapi, "django": _django}

_flask, _fastapi, _django = commands(
    "flask_beside:app", "fastapi_beside:app",
    "both' gunicorn --workers 2 --bind 127.0.0.1:8000 examples.django_app")
BESIDE = {"flask": _flask, "fastapi": _fastapi, "django": _django}

_nginx, _caddy = commands("nginx -p", "caddy run")
PROXIES = {"nginx": _nginx, "caddy": _caddy}


def need_modules(name: str, command: str) -> None:
    """Skip a test whose framework, or whose server for applications, is not installed."""
    for module in (name, "gunicorn" if "gunicorn" in command else "uvicorn", "jwt"):
        pytest.importorskip(module)


@pytest.fixture(params=IN_WORKERS)
def in_workers(request, recipes):
    """An app that carries the server in each of two workers: the process."""
    need_modules(request.param, IN_WORKERS[request.param])
    process = start(recipes, IN_WORKERS[request.param], "8000", "6500")
    # A worker that is not ready yet hears no signal
    wait_until(lambda: listeners(recipes.ports["6500"]) == 2)
    return process


def start_beside(recipes, name: str, proxy: str) -> None:
    """Start a server, an app beside it, and a proxy in front of both."""
    need_modules(name, BESIDE[name])
    need(proxy, proxy)
    serve, = commands("python sse_server.py --port 6501 --history-file events.db")
    # Started by root, nginx would work as another user, who may not write into the folder
    user, group = getpass.getuser(), grp.getgrgid(os.getgid()).gr_name
    change(recipes, "nginx-login.conf", "/tmp/sse-nginx", f"{recipes.folder}/nginx")
    change(recipes, "nginx-login.conf", "daemon off;", f"daemon off;\nuser {user} {group};")
    # Caddy's port for administrators may be taken
    change(recipes, "Caddyfile-login", "grace_period", "admin off\n\tgrace_period")
    # Soon back after a restart
    recipes.serve(f"{serve} --retry 0.3")
    start(recipes, BESIDE[name], "8000")
    start(recipes, PROXIES[proxy], "8080")


@pytest.mark.interop
def test_users_of_an_app_that_carries_the_server_see_only_their_own(recipes, in_workers):
    ann, bob = (User(recipes, name, "8000", "6500", "/") for name in ("ann", "bob"))
    check_that_each_user_has_a_channel_of_their_own(ann, bob)


@pytest.mark.interop
def test_users_miss_nothing_when_a_worker_is_killed(recipes, in_workers):
    ann = User(recipes, "ann", "8000", "6500", "/")
    ann.send("ann", "before")
    with ann.watch() as stream:
        last_id = stream.read_events(1)[0].id
    killed = workers(in_workers)[0]
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: not os.path.exists(f"/proc/{killed}"))
    wait_until(lambda: listeners(recipes.ports["6500"]) == 2)
    ann.send("ann", "after")
    for _ in range(6):
        with ann.watch(last_id) as stream:
            assert [event.data for event in stream.read_events(1)] == ["ann: after"]


@pytest.mark.interop
def test_a_restart_of_the_workers_ends_streams_in_order_and_loses_nothing(recipes, in_workers):
    ann = User(recipes, "ann", "8000", "6500", "/")
    ann.send("ann", "before")
    with ann.watch() as stream:
        last_id = stream.read_events(1)[0].id
        in_workers.send_signal(signal.SIGTERM)
        assert stream.read_to_end().ended
    in_workers.wait(PATIENCE)
    start(recipes, in_workers.args[2], "8000", "6500")
    ann.send("ann", "after")
    with ann.watch(last_id) as stream:
        assert [event.data for event in stream.read_events(1)] == ["ann: after"]


@pytest.mark.interop
@pytest.mark.parametrize("proxy", PROXIES)
@pytest.mark.parametrize("name", BESIDE)
def test_users_of_an_app_beside_the_server_see_only_their_own(recipes, name, proxy):
    start_beside(recipes, name, proxy)
    ann, bob = (User(recipes, each, "8080", "8080", "/events") for each in ("ann", "bob"))
    check_that_each_user_has_a_channel_of_their_own(ann, bob)
    # Only the proxy may ask for tokens
    answer = ask(int(recipes.ports["8080"]), get("/events-token", ann.cookie, "Connection: close"))
    assert b" 404 " in answer.split(b"\r\n")[0] and b"X-Events-Token" not in answer


@pytest.mark.interop
def test_the_page_shows_notifications_of_an_app_that_carries_the_server(recipes, in_workers):
    with browser(recipes.folder / "profile") as page:
        log_in(page, recipes.ports["8000"])
        check_page(page)


def log_in(page, port: str) -> None:
    """Let the browser log in; the app leads it on to its page."""
    page.call("Page.navigate", url=f"http://127.0.0.1:{port}/login?user=ann")
    page.wait_for("document.title === 'Notifications of ann' && document.readyState === 'complete'")


def check_page(page, *seen: str) -> None:
    page.wait_for("document.getElementById('state').textContent === 'Connected'")
    page.evaluate("form.to.value = 'ann', form.text.value = '<b>hi', form.requestSubmit()")
    wait_until(lambda: items(page) == ["ann: <b>hi", *seen])


def items(page) -> list:
    return page.evaluate("[...document.querySelectorAll('li')].map(item => item.textContent)")


@pytest.mark.interop
@pytest.mark.parametrize("proxy", PROXIES)
def test_the_page_goes_on_over_expiry_and_restarts_until_the_user_logs_out(recipes, proxy):
    change(recipes, "flask_beside.py", "STREAM_TIME = 300", "STREAM_TIME = 1.5")
    start_beside(recipes, "flask", proxy)
    server, app = recipes.processes[:2]
    with browser(recipes.folder / "profile") as page:
        log_in(page, recipes.ports["8080"])
        check_page(page)
        page.evaluate("ends = 0, source.addEventListener('error', () => ends++), true")
        page.wait_for("ends > 0")
        check_page(page, "ann: <b>hi")
        for process in (server, app):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            seen = page.evaluate("ends")
            page.wait_for(f"ends > {seen} + 1 && source.readyState === 0")
            recipes.start(process.args[2])
            check_page(page, *items(page))
        page.evaluate("fetch('/logout')")
        page.wait_for("source.readyState === 2")
        assert "not logged in" in page.evaluate("document.getElementById('state').textContent")


# A consumer that processes exactly once

@contextmanager
def consuming(folder: Path, port: int) -> Iterator[subprocess.Popen]:
    """Run the consumer, and kill it at the end of the block."""
    process = subprocess.Popen([sys.executable, str(TOP / "examples" / "consumer.py"),
                                f"http://127.0.0.1:{port}/?channel=orders", "shop.db"],
                               cwd=folder, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def rows(folder: Path, query: str) -> list:
    """Ask the consumer's file. It may not be there yet."""
    with closing(sqlite3.connect(folder / "shop.db")) as db:
        try:
            return db.execute(query).fetchall()
        except sqlite3.OperationalError:
            return []


def sold(folder: Path) -> dict:
    return dict(rows(folder, "select * from sold"))


def order(server: SSEServer, item: str) -> None:
    server.publish(json.dumps({"item": item, "pieces": 1}), "order", "orders")


def test_a_consumer_counts_each_order_once_although_it_is_killed_three_times(tmp_path):
    with SSEServer(port=0, history_file=tmp_path / "events.db", retry=0.1) as server:
        for killed_at in (100, 400, 700):
            with consuming(tmp_path, server.port):
                for number in range(300):
                    order(server, ("tea", "salt", "rice")[number % 3])
                # It is in the middle of them
                wait_until(lambda: sum(sold(tmp_path).values()) >= killed_at)
        with consuming(tmp_path, server.port):
            order(server, "last")
            wait_until(lambda: "last" in sold(tmp_path))
    assert sold(tmp_path) == {"tea": 300, "salt": 300, "rice": 300, "last": 1}
    assert rows(tmp_path, "select * from gap") == []


def test_a_consumer_counts_no_order_whose_id_it_cannot_keep(tmp_path):
    with SSEServer(port=0, retry=0.1) as server:
        order(server, "tea")
        with consuming(tmp_path, server.port):
            wait_until(lambda: sold(tmp_path) == {"tea": 1})
        with closing(sqlite3.connect(tmp_path / "shop.db")) as db:
            db.execute("create trigger full before update on place "
                       "begin select raise(abort, 'the disk is full'); end")
        order(server, "tea")
        with consuming(tmp_path, server.port) as consumer:
            assert consumer.wait(PATIENCE) == 1 and sold(tmp_path) == {"tea": 1}
        with closing(sqlite3.connect(tmp_path / "shop.db")) as db:
            db.execute("drop trigger full")
        with consuming(tmp_path, server.port):
            wait_until(lambda: sold(tmp_path) == {"tea": 2})


def test_a_consumer_notes_a_gap_and_goes_on(tmp_path):
    with SSEServer(port=0, history=64, retry=0.1) as server:
        order(server, "first")
        with consuming(tmp_path, server.port):
            wait_until(lambda: sold(tmp_path) == {"first": 1})
        for _ in range(100):
            order(server, "lost")
        server.publish("no order", "order", "orders")
        order(server, "last")
        with consuming(tmp_path, server.port):
            wait_until(lambda: "last" in sold(tmp_path))
    assert [reason for reason, in rows(tmp_path, "select reason from gap")] == ["evicted"]
    assert [data for data, in rows(tmp_path, "select data from rejected")] == ["no order"]
    assert 0 < sold(tmp_path)["lost"] < 100


def test_a_second_consumer_on_the_same_file_ends_itself(tmp_path):
    with SSEServer(port=0, retry=0.1) as server:
        order(server, "tea")
        with consuming(tmp_path, server.port) as one, consuming(tmp_path, server.port) as other:
            wait_until(lambda: server.clients == 2 or one.poll() or other.poll())
            order(server, "salt")
            wait_until(lambda: one.poll() is not None or other.poll() is not None)
            wait_until(lambda: sold(tmp_path) == {"tea": 1, "salt": 1})


def test_the_commands_of_the_consumer_count_an_order(recipes):
    need("sqlite3", "sqlite3")
    serve, consume_it, send, look = commands(
        "python sse_server.py --port 6500 --history-file events.db --publish-token SECRET",
        "examples/consumer.py", "channel=orders&event=order", "'select * from sold'")
    recipes.serve(serve)
    recipes.start(consume_it)
    assert '{"id": "' in recipes.output(send)
    wait_until(lambda: recipes.output(look) == "tea|2\n")


# Pages and those who publish for them

def open_file(page, recipes, name: str) -> None:
    page.open((recipes.folder / "examples" / name).as_uri())


def test_a_page_shows_how_far_a_shell_script_is_also_after_a_reload(recipes, monkeypatch):
    serve, job = commands("python sse_server.py --port 6500 --publish-token SECRET",
                          "bash examples/job.sh")
    monkeypatch.setenv("STEP_TIME", "0.2")
    recipes.serve(serve)
    with browser(recipes.folder / "profile") as page:
        open_file(page, recipes, "progress.html")
        page.wait_for("document.getElementById('state').textContent === 'Connected'")
        process = recipes.start(job)
        page.wait_for("document.getElementById('step').textContent === 'copy (2 of 5)'")
        assert process.wait(PATIENCE) == 0
        open_file(page, recipes, "progress.html")
        page.wait_for("document.getElementById('step').textContent === 'finished (5 of 5)'")
        assert page.evaluate("document.getElementById('bar').value") == 1


@pytest.mark.parametrize("name", ["job.sh", "job.py"])
def test_a_job_tries_again_until_the_server_is_there(recipes, monkeypatch, name):
    serve, shell_job, job = commands("python sse_server.py --port 6500 --publish-token SECRET",
                                     "bash examples/job.sh", "python examples/job.py")
    monkeypatch.setenv("STEP_TIME", "0")
    process = recipes.start({"job.sh": shell_job, "job.py": job}[name])
    # It says so when it has tried once
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    recipes.serve(serve)
    with Client(int(recipes.ports["6500"]), get("/?channel=job&since=all")) as client:
        last = client.read_events({"job.sh": 6, "job.py": 1}[name])[-1]
    assert (last.name, process.wait(PATIENCE)) == ({"job.sh": "progress", "job.py": "report"}[name], 0)


def test_a_job_gives_up_at_once_when_the_server_refuses(recipes):
    job, = commands("python examples/job.py")
    with SSEServer(port=int(recipes.ports["6500"])):
        process = recipes.start(job)
        assert process.wait(PATIENCE) == 1


def test_a_dashboard_shows_what_three_producers_publish(recipes):
    need("node", "nodejs")
    serve, shell_producer, python_producer, node_producer = commands(
        "python sse_server.py --port 6500 --publish-token SECRET", "producer.sh", "producer.py",
        "producer.mjs")
    shown = "[...document.querySelectorAll('article:not(.empty)')].length === %d"
    recipes.serve(serve)
    with browser(recipes.folder / "profile") as page:
        open_file(page, recipes, "dashboard.html")
        page.wait_for("document.getElementById('status').textContent === 'Live'")
        assert not page.evaluate("document.getElementById('hint').hidden")
        producers = [recipes.start(each)
                     for each in (shell_producer, python_producer, node_producer)]
        page.wait_for(shown % 6)
        assert page.evaluate("document.getElementById('hint').hidden")
        for producer in producers:
            os.killpg(producer.pid, signal.SIGKILL)
        # What is kept is shown at once, to a new tab as well
        page.evaluate("sessionStorage.clear()")
        open_file(page, recipes, "dashboard.html")
        page.wait_for(shown % 6)
        values = page.evaluate("[...document.querySelectorAll('.number')].map(each => each.textContent)")
        assert all(float(value) >= 0 for value in values), values


def test_a_streamed_text_is_whole_after_a_reload_in_the_middle(recipes):
    text, = commands("python -m examples.streamed_text")
    change(recipes, "streamed_text.py", "time.sleep(0.1)", "time.sleep(0.01)")
    start(recipes, text, "8000", "6500")
    whole = "".join(f"{number} " if number % 10 else f"{number}\n" for number in range(1, 101))
    with browser(recipes.folder / "profile") as page:
        page.open(f"http://127.0.0.1:{recipes.ports['8000']}/")
        page.click("ask")
        page.wait_for("document.getElementById('text').textContent.startsWith('1 2 3 4 ')")
        assert len(page.text("text")) < len(whole)
        for _ in range(2):
            page.evaluate("old = true, location.reload()")
            page.wait_for("!window.old && document.getElementById('text')?.textContent === "
                          + json.dumps(whole))


def test_a_snapshot_and_the_changes_since_make_the_state(recipes):
    snapshot, = commands("python -m examples.snapshot")
    change(recipes, "snapshot.py", "time.sleep(0.5)", "time.sleep(0.01)")
    start(recipes, snapshot, "8000", "6500")
    url = f"http://127.0.0.1:{recipes.ports['8000']}/"
    with browser(recipes.folder / "profile") as page:
        page.open(url)
        for _ in range(3):
            # Nothing sleeps between these two, but something may change
            wait_until(lambda: requests.get(url + "stock", timeout=PATIENCE).json()["stock"]
                       == page.evaluate("stock"))
        shown = page.evaluate("[...document.querySelectorAll('tr')].map(row => row.cells[0].textContent)")
        assert shown == ["tea", "salt", "rice"]
