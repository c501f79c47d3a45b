"""The documentation's pipes from other systems, run against a real MQTT broker and PostgreSQL."""
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from glob import glob
from pathlib import Path

import pytest

from documentation import commands, program
from helpers import PATIENCE, Client, connect, free_port, get, need, wait_until

pytestmark = pytest.mark.interop
NASTY = 'two\nlines, "quotes", a \\ and größe 🎉'


def watch(shell, query: str) -> Client:
    return Client(int(shell.ports["6500"]), get("/?" + query))


def listens(port: int) -> bool:
    try:
        connect(port).close()
        return True
    except ConnectionRefusedError:          # not yet
        return False


class Daemon:
    """Another system's server on a free port of loopback. options: for the process."""

    def __init__(self, *command: str, port: int, **options) -> None:
        self.command, self.port, self.options = command, port, options
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL, **self.options)
        try:
            wait_until(lambda: listens(self.port) or self.process.poll() is not None)
            assert self.process.poll() is None, self.command
        except AssertionError:
            self.stop()
            raise

    def stop(self) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()


@pytest.fixture
def broker(tmp_path, monkeypatch):
    """A broker without a configuration, which listens on loopback only; its clients find it."""
    need("mosquitto_sub", "mosquitto-clients")
    port = free_port()
    broker = Daemon(need("mosquitto", "mosquitto"), "-p", str(port), port=port)
    for client in ("mosquitto_sub", "mosquitto_pub"):
        (tmp_path / client).write_text(f"-h 127.0.0.1\n-p {port}\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    yield broker
    broker.stop()


def send(topic: str, text: str, *options: str) -> None:
    subprocess.run(["mosquitto_pub", "-q", "1", "-t", topic, "-m", text, *options], check=True,
                   timeout=PATIENCE)


def payloads(client: Client) -> list:
    return [json.loads(event.data)["payload"] for event in client.stream.events]


def test_a_topic_of_mqtt_reaches_clients_whatever_is_in_it(shell, broker):
    pipe, = commands("mosquitto_sub")
    send("home/door", "subscribed", "-r")       # a retained message is sent to who subscribes
    shell.serve(pipe)
    with watch(shell, "channel=home&since=all") as client:
        client.read_events(1)
        send('home/", "channel": "other', NASTY)
        send("office/door", "not asked for")
        send("home/door", "last")
        client.read_until(lambda stream: "last" in payloads(client))
        assert payloads(client) == ["subscribed", NASTY, "last"]
        topic = json.loads(client.stream.events[1].data)["topic"]
        assert topic == 'home/", "channel": "other'


def test_mqtt_goes_on_after_either_end_was_away(shell, broker):
    pipe, = commands("mosquitto_sub")
    send("home/door", "subscribed", "-r")
    shell.serve(pipe)
    with watch(shell, "channel=home&since=all") as client:
        client.read_events(1)
    shell.stop()
    send("home/door", "kept")
    shell.serve(pipe)
    with watch(shell, "channel=home&since=all") as client:
        client.read_until(lambda stream: "kept" in payloads(client))
        broker.stop(), broker.start()
        send("home/door", "after", "-r")
        client.read_until(lambda stream: "after" in payloads(client))


@pytest.fixture
def database(monkeypatch):
    """A PostgreSQL with a database `shop`, which its programs find by the environment."""
    pytest.importorskip("psycopg", reason="psycopg is not installed (PyPI)")
    folders = sorted(glob("/usr/lib/postgresql/*/bin")) + os.environ["PATH"].split(":")
    path = ":".join([str(Path(sys.executable).parent), *folders])     # of `python`, first
    for name, value in (("PATH", path), ("PGHOST", "127.0.0.1"), ("PGUSER", "postgres"),
                        ("PGPORT", str(free_port()))):
        monkeypatch.setenv(name, value)
    need("initdb", "postgresql")
    # Not below tmp_path: where root runs the tests, the user that PostgreSQL wants may not go there
    user = {"user": "postgres"} if os.geteuid() == 0 else {}
    with tempfile.TemporaryDirectory() as folder:
        if user:
            shutil.chown(folder, "postgres")
        subprocess.run(["initdb", "-D", folder + "/data", "-U", "postgres", "-A", "trust", "-E",
                        "UTF8", "--locale=C", "--no-sync"], check=True, capture_output=True,
                       cwd=folder, **user)
        database = Daemon("postgres", "-D", folder + "/data", "-k", folder, "-h", "127.0.0.1",
                          "-F", port=int(os.environ["PGPORT"]), cwd=folder, **user)
        yield database
        database.stop()


def sql(statements: str, name: str = "shop") -> str:
    """Return what psql prints, or nothing while the database is starting."""
    return subprocess.run(["psql", "-XAt", "-d", name, "-c", statements], capture_output=True,
                          encoding="utf-8", timeout=PATIENCE).stdout


def serve_notifications(shell):
    pipe, = commands("python listen.py |")
    (shell.folder / "listen.py").write_text(program("psycopg"))
    shell.serve(pipe)
    wait_until(lambda: sql("select 1 from pg_stat_activity where query = 'LISTEN news'"))
    return shell.processes[-1]


def test_a_notify_reaches_clients_and_a_restart_is_told_as_a_gap(shell, database):
    wait_until(lambda: sql("create database shop", "postgres"))
    process = serve_notifications(shell)
    with watch(shell, "channel=news") as client:
        client.open()
        sql("begin; notify news, 'never'; rollback")
        sql(f"notify news, '{NASTY}'")
        sql("notify other, 'not asked for'")
        sql("notify news, 'last'")
        assert [event.data for event in client.read_events(2)] == [NASTY, "last"]
        database.stop()
        client.read_to_end()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 0          # hence the advice Restart=always
    database.start()
    wait_until(lambda: sql("select 1"))
    serve_notifications(shell)
    with watch(shell, f"channel=news&lastEventId={client.stream.last_id}") as client:
        assert client.read_events(1)[0].name == "gap"
        sql("notify news, 'after'")
        client.read_until_data("after")
