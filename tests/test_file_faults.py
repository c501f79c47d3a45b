"""A history file that is full, gone, replaced, locked or bad: refused, told, and recovered from."""
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager

import pytest
import requests

from helpers import PATIENCE, TOP, Client, wait_until
from history_file import (IMPATIENT, gaps, key, on_file, post, publishing, query, resume, rows,
                          texts, turn, turned)
from sse_core.errors import Unavailable
from sse_core.stores import sqlite
from sse_core.stores.sqlite import SQLiteStore
from sse_core.stores.store import Event

NOBODY = 65534


@contextmanager
def watched(path, number: int = 1, before: str = ""):
    """Run so many servers, and a client at each; in the end all live, and deliver."""
    with on_file(path, number, "--heartbeat", "0.05", before=before) as servers, \
            ExitStack() as stack:
        clients = [stack.enter_context(Client(server.port)).open() for server in servers]
        yield servers, clients
        for server in servers:
            wait_until(lambda: post(server, f"end of {server.port}").status_code == 200)
        for client in clients:
            for server in servers:
                read_to(client, f"end of {server.port}")
            ids = [key(event.id) for event in client.stream.events if event.name != "gap"]
            assert ids == sorted(set(ids))
        for server in servers:
            wait_until(lambda: health(server).status_code == 200)
    assert query(path, "pragma integrity_check") == [("ok",)]


def read_to(client: Client, text: str) -> None:
    client.read_until(lambda stream: any(event.data == text for event in stream.events))


def read_to_id(client: Client, last: str) -> None:
    client.read_until(lambda stream: last in [event.id for event in stream.events])


def health(server) -> requests.Response:
    return requests.get(f"http://127.0.0.1:{server.port}/-/health", timeout=PATIENCE)


def refused(server) -> str:
    """Post until that is refused, and return the reason; health must say it, too."""
    answers = []
    wait_until(lambda: answers.append(post(server, "refused?")) or answers[-1].status_code == 503)
    assert "Retry-After" in answers[-1].headers
    wait_until(lambda: health(server).status_code == 503)
    return health(server).text


def warnings_of(server) -> list:
    server.stop(signal.SIGTERM)
    return server.close().splitlines()


# At the start


def database(path, *statements: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement)


def ours(path, *statements: str) -> None:
    with publishing(path) as stream:
        stream.publish([Event("x" * 3000)] * 300)
    database(path, *statements)


def damage(path) -> None:
    ours(path)
    content = bytearray(path.read_bytes())
    content[4096 * 10:] = random.Random(1).randbytes(len(content) - 4096 * 10)
    path.write_bytes(content)


BAD = {
    "not a database": (lambda path: path.write_text("important\n" * 1000), "move it away"),
    "a table": (lambda path: database(path, "create table other(x)"), "another program"),
    "an id": (lambda path: database(path, "pragma application_id = 7"), "another program"),
    "both": (lambda path: database(path, "pragma journal_mode = wal", "create table other(x)",
                                   "pragma application_id = 7"), "another program"),
    "newer": (lambda path: ours(path, "pragma user_version = 3"), "newer version"),
    "damaged": (damage, "malformed: restore a copy"),
    "no table": (lambda path: ours(path, "drop table event"), "no such table"),
    "a folder": (lambda path: path.mkdir(), "must be a file"),
    "no folder": (lambda path: path.parent.rmdir(), "folder does not exist: make it"),
    "no such folder": (lambda path: (path.parent.rmdir(), path.parent.touch()), "Not a directory")}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_at_the_start_is_one_line_and_left_as_it_is(tmp_path, name):
    path = tmp_path / "folder" / "events.db"
    path.parent.mkdir()
    make, says = BAD[name]
    make(path)
    before = sorted((each, each.is_file() and each.read_bytes()) for each in tmp_path.rglob("*"))
    done = subprocess.run([sys.executable, TOP / "sse_server.py", "--port", "0", "--history-file",
                           path], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert says in done.stderr and str(path) in done.stderr
    assert before == sorted((each, each.is_file() and each.read_bytes())
                            for each in tmp_path.rglob("*"))


def test_a_locked_file_at_the_start_is_one_line_in_time(path, monkeypatch):
    monkeypatch.setattr(sqlite, "BUSY_TIME", 0.5)
    with publishing(path) as stream, closing(sqlite3.connect(path)) as other:
        stream.publish([Event("x")])
        other.execute("begin immediate")
        began = time.monotonic()
        with pytest.raises(ValueError, match="locked: end the process"):
            SQLiteStore(path, 64, False)
        assert 0.5 <= time.monotonic() - began < 2.5
        other.rollback()


AS_NOBODY = f"""if True:
    import os, sys, fcntl, sqlite3
    sys.path.insert(0, {str(TOP)!r})
    import sse_server
    from sse_core.stores.sqlite import SQLiteStore
    os.getuid() or os.setuid({NOBODY})
    try:
        SQLiteStore(sys.argv[1], 64, False)
    except ValueError as error:
        sys.exit(str(error))
    """


@pytest.mark.parametrize("file_mode, folder_mode, says", [
    (0o444, 0o777, "let this user write"), (0o000, 0o777, "may read and write"),
    (0o666, 0o555, "may read and write|let this user"), (None, 0o555, "let this user write"),
    (0o666, 0o000, "Permission denied"), (0o666, 0o777, "")])
def test_a_file_without_permission_is_one_line(tmp_path, file_mode, folder_mode, says):
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "events.db"
    if file_mode is not None:
        ours(path)
        path.chmod(file_mode)
    folder.chmod(folder_mode)
    parents = [each for each in list(path.parents)[1:] if str(each).startswith("/tmp/pytest")]
    for each in parents:
        each.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", AS_NOBODY, path], capture_output=True, text=True)
    folder.chmod(0o777)
    assert done.returncode == bool(says), done.stderr
    assert not says or done.stderr.count("\n") == 1 and any(
        each in done.stderr for each in says.split("|")), done.stderr


# While it runs


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder],
                      capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder) -> None:
    with open(folder / "filler", "wb", buffering=0) as filler:
        try:
            while True:
                filler.write(b"x" * 4096)
        except OSError:
            pass


def test_a_full_disk(small_disk):
    with on_file(small_disk / "events.db", 1, "--heartbeat", "0.05") as (server,), \
            Client(server.port) as client:
        client.open()
        for round in range(2):
            post(server, f"before {round}").raise_for_status()
            fill(small_disk)
            assert "full: make room" in refused(server)
            beats = client.stream.comments
            client.read_until(lambda stream: stream.comments >= beats + 2)
            (small_disk / "filler").unlink()
            wait_until(lambda: health(server).status_code == 200)
            post(server, f"after {round}").raise_for_status()
            read_to(client, f"after {round}")
        assert texts(client) == [data for _, data in rows(small_disk / "events.db")]
        assert not gaps(client)
        told = warnings_of(server)
        assert len([line for line in told if "cannot be used now" in line]) == 2, told
        assert len([line for line in told if "is back" in line]) == 2, told


def test_health_is_ok_again_when_as_much_as_was_refused_fits_and_not_before(small_disk):
    large = "x" * 500_000
    with on_file(small_disk / "events.db") as (server,):
        post(server, "before").raise_for_status()
        fill(small_disk)
        os.truncate(small_disk / "filler", (small_disk / "filler").stat().st_size - (200 << 10))
        assert post(server, large).status_code == 503
        until = time.monotonic() + 0.5      # it is tried several times meanwhile
        while time.monotonic() < until:
            assert "full: make room" in health(server).text
            time.sleep(0.02)
        post(server, "small").raise_for_status()
        assert health(server).status_code == 503
        (small_disk / "filler").unlink()
        wait_until(lambda: health(server).status_code == 200)
        post(server, large).raise_for_status()
        assert [data for _, data in rows(small_disk / "events.db")] == ["before", "small", large]
        told = warnings_of(server)
        assert len(told) == 2 and "full" in told[0] and "is back" in told[1]


def test_a_file_that_may_not_grow(path):
    with watched(path, 2) as ((server, other), clients):
        post(server, "before")
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (4096, -1))
        assert "error" in refused(server) or "full" in refused(server)
        post(other, "meanwhile").raise_for_status()
        for client in clients:
            read_to(client, "meanwhile")
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (-1, -1))
        wait_until(lambda: health(server).status_code == 200)
        post(server, "after").raise_for_status()
        for client in clients:
            read_to(client, "after")
            assert texts(client) == [data for _, data in rows(path)] and not gaps(client)


def test_a_server_that_cannot_write_still_reads_at_full_speed(path):
    with watched(path, 2) as ((server, _), (client, _)):
        post(server, "before")
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (4096, -1))
        refused(server)
        began = time.monotonic()
        with publishing(path) as stream:
            for _ in range(16):
                last = stream.publish([Event("x")] * 500)[-1]
            read_to_id(client, last)
        assert time.monotonic() - began < 5
        assert {gap["reason"] for gap in gaps(client)} <= {"lagging"}   # on a busy machine
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (-1, -1))


def test_events_are_taken_all_or_none(path):
    with publishing(path) as stream:
        stream.publish([Event("one")])
        stream._writer.execute("pragma max_page_count = 10")
        with pytest.raises(Unavailable, match="full: make room"):
            stream.publish([Event(str(number) * 1000) for number in range(1000)])
        stream.publish([Event("two")])
        assert [data for _, data in rows(path)] == ["one", "two"]


MOVES = {
    "removed": lambda path: path.unlink(),
    "its -wal removed": lambda path: os.unlink(f"{path}-wal"),
    "renamed": lambda path: path.rename(f"{path}.away"),
    "renamed with its -wal": lambda path: [
        os.rename(f"{path}{ending}", f"{path}.away{ending}") for ending in ("", "-wal", "-shm")],
    "replaced by a copy": lambda path: (copy(path, f"{path}.copy"),
                                        os.replace(f"{path}.copy", path)),
    "its folder renamed": lambda path: path.parent.rename(f"{path.parent}.away")}


def copy(path, target) -> None:
    query(path, "vacuum into ?", str(target))


@pytest.fixture
def nested(tmp_path):
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder" / "events.db"


@pytest.mark.parametrize("how", MOVES)
def test_a_file_that_is_removed_or_replaced_is_told_and_not_followed(nested, how):
    with on_file(nested, 2, "--heartbeat", "0.05") as servers, ExitStack() as stack:
        clients = [stack.enter_context(Client(server.port)).open() for server in servers]
        post(servers[0], "before").raise_for_status()
        for client in clients:
            read_to(client, "before")
        MOVES[how](nested)
        for server, client in zip(servers, clients):
            assert post(server, "after").status_code == 503
            assert "removed or replaced: stop all servers" in health(server).text
            beats = client.stream.comments
            client.read_until(lambda stream: stream.comments >= beats + 2)
            assert texts(client) == ["before"]
            told = [line for line in warnings_of(server) if "cannot be used" in line]
            assert len(told) == 1 and "removed or replaced" in told[0]
        made = nested.exists() and [data for _, data in rows(nested)]
        assert made in (False, ["before"])


@pytest.mark.parametrize("damage", [
    lambda path: os.truncate(path, 0),
    lambda path: path.write_bytes(b"damage" * 1000)], ids=["emptied", "overwritten"])
def test_a_file_that_is_damaged_takes_no_events_because_they_would_reach_nobody(path, damage):
    with on_file(path) as (server,), Client(server.port) as client:
        client.open()
        post(server, "before").raise_for_status()
        read_to(client, "before")
        damage(path)
        assert "not a database" in refused(server)
        assert post(server, "after").status_code == 503


def test_a_file_that_is_moved_away_and_back_is_the_same(nested):
    with watched(nested, 2) as (servers, clients):
        post(servers[0], "before")
        nested.parent.rename(f"{nested.parent}.away")
        for server in servers:
            assert "removed or replaced" in refused(server)
        os.rename(f"{nested.parent}.away", nested.parent)
        wait_until(lambda: all(health(server).status_code == 200 for server in servers))
        post(servers[1], "after").raise_for_status()
        for client in clients:
            read_to(client, "after")
            assert texts(client) == ["before", "after"]


def test_an_event_committed_to_a_file_that_was_just_removed_is_not_acknowledged(path):
    with publishing(path) as stream, closing(sqlite3.connect(path)) as other:
        stream.publish([Event("one")])
        other.execute("begin immediate")
        publish = stream.submit([Event("two")])
        wait_until(publish.running)
        time.sleep(0.1)     # it has seen that the file is in place, and waits for the lock
        path.unlink()
        other.rollback()
        with pytest.raises(Unavailable, match="removed or replaced"):
            publish.result(PATIENCE)


def killed_server(path) -> None:
    """Leave the file as a server leaves it that is killed: what was posted last is in its -wal."""
    with on_file(path) as (server,):
        for number in range(3):
            post(server, f"old {number}").raise_for_status()
        server.process.kill()
        server.process.wait()
    assert os.path.getsize(f"{path}-wal")


def starts(path) -> tuple:
    """Start a server on the file; return its status and what it says, or None if it runs."""
    code = (f"import sys; sys.path.insert(0, {str(TOP)!r}); {IMPATIENT}; import sse_server; "
            "sys.exit(sse_server.main())")
    process = subprocess.Popen([sys.executable, "-c", code, "--port", "0", "--quiet",
                                "--history-file", path], stdin=subprocess.DEVNULL, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        runs = bool(process.stdout.readline())
        process.terminate()
        said = process.stderr.read()
    return None if runs else (process.returncode, said)


@pytest.mark.parametrize("how", ["a copy of this file", "a copy of another", "none"])
def test_no_file_is_opened_beside_the_wal_of_another(path, tmp_path, how):
    with publishing(tmp_path / "other") as stream:
        stream.publish([Event("x" * 3000)] * 100)
    with publishing(path) as stream:
        stream.publish([Event("first")])
    copy(path if how == "a copy of this file" else tmp_path / "other", tmp_path / "copy")
    killed_server(path)
    wal = path.with_name(path.name + "-wal")
    frames = wal.read_bytes()
    os.replace(tmp_path / "copy", path) if how != "none" else path.unlink()
    before = how != "none" and path.read_bytes()
    status, said = starts(path)
    assert status == 2 and said.count("\n") == 1 and "-wal beside it is of another file" in said
    assert wal.read_bytes() == frames and path.exists() == (how != "none")
    assert how == "none" or path.read_bytes() == before
    wal.unlink()
    assert starts(path) is None
    assert query(path, "pragma integrity_check") == [("ok",)]
    assert [data for _, data in rows(path)][:1] == {
        "a copy of this file": ["first"], "a copy of another": ["x" * 3000], "none": []}[how]


def test_a_file_and_its_own_wal_are_taken_after_kill_9_as_a_pair_that_was_checkpointed(path):
    killed_server(path)
    for ending in ("", "-wal"):
        os.rename(f"{path}{ending}", f"{path}.moved{ending}")       # the same files
    os.rename(f"{path}.moved", path), os.rename(f"{path}.moved-wal", f"{path}-wal")
    assert starts(path) is None and len(rows(path)) == 3


def test_four_servers_that_start_at_once_on_a_copy_all_start(path, tmp_path):
    with publishing(path) as stream:
        stream.publish([Event("first")])
    copy(path, tmp_path / "copy.db")
    processes = [subprocess.Popen([sys.executable, TOP / "sse_server.py", "--port", "0", "--quiet",
                                   "--interval", "0", "--history-file", tmp_path / "copy.db"],
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        with process:
            assert process.stdout.readline(), process.stderr.read()
            process.terminate()


def test_a_copy_takes_events_at_once_after_a_restart(path, tmp_path):
    with on_file(path) as (server,):
        ids = [post(server, str(number)).json()["id"] for number in range(3)]
        copy(path, tmp_path / "copy")
        post(server, "lost")
        server.stop(signal.SIGTERM)
    os.replace(tmp_path / "copy", path)
    with on_file(path) as (server,), resume(server, ids[0]) as client:
        post(server, "new").raise_for_status()
        read_to(client, "new")
        assert texts(client) == ["1", "2", "new"]


def test_numbers_where_text_should_be_are_text(path):
    with watched(path) as ((server,), (client,)):
        post(server, "before")
        read_to(client, "before")
        query(path, "drop table event")
        query(path, "create table event(ms, n, channel, event, data)")
        query(path, "insert into event values (999999999999999, 1, null, null, 7)")
        post(server, "after")
        query(path, "insert into event values (999999999999999, 9, null, null, 8)")
        read_to(client, "8")


def test_an_id_that_is_no_number_is_told_until_it_is_gone(path):
    with watched(path) as ((server,), (client,)):
        post(server, "before")
        read_to(client, "before")
        database(path, "pragma ignore_check_constraints = 1",
                 "insert into event values ('x', 1, null, null, 'never')")
        assert "no number" in refused(server)
        database(path, "delete from event where ms = 'x'")
        wait_until(lambda: health(server).status_code == 200)


HOLDER = """if True:
    import os, signal, sqlite3, sys
    connection = sqlite3.connect(sys.argv[1], isolation_level=None)
    connection.execute("begin immediate")
    connection.execute("insert into event values (1, 1, null, null, 'never')")
    print("held", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    """


def test_a_process_that_is_stopped_in_mid_transaction_and_then_killed(path):
    with watched(path, 2, before=IMPATIENT) as ((server, other), clients):
        post(server, "before")
        holder = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE)
        try:
            assert holder.stdout.readline() == b"held\n"
            began = time.monotonic()
            with ThreadPoolExecutor(2) as pool:     # of which one waits for the other, too
                answers = list(pool.map(post, [server] * 2, ["refused"] * 2))
            assert [answer.status_code for answer in answers] == [503] * 2
            assert 0.4 < time.monotonic() - began < 3.5 and "locked" in health(server).text
        finally:
            holder.kill()
            holder.communicate()
        wait_until(lambda: health(server).status_code == 200)
        post(server, "after").raise_for_status()
        for client in clients:
            read_to(client, "after")
            assert texts(client) == ["before", "after"]


def test_reading_on_waits_for_no_other_process(path, monkeypatch):
    monkeypatch.setattr(sqlite, "BUSY_TIME", 1.0)
    with publishing(path) as stream, closing(sqlite3.connect(path)) as other:
        shared = turned(stream)
        other.execute("begin immediate")
        publish = stream.submit([Event("x")])
        began = time.monotonic()
        turn(shared)
        assert time.monotonic() - began < 0.8 and not publish.done()
        with pytest.raises(Unavailable, match="locked"):
            publish.result(PATIENCE)
        assert "locked" in stream.trouble
        other.rollback()
        wait_until(lambda: stream.trouble is None)


def test_a_file_that_is_away_is_tried_at_longer_and_longer_times(nested, caplog):
    with publishing(nested) as stream:
        shared = turned(stream)
        nested.parent.rename(f"{nested.parent}.away")
        for longest in (0.1, 0.2, 0.4, 0.8, *[1.0] * 30):
            assert longest / 2 <= turn(shared) <= longest
        os.rename(f"{nested.parent}.away", nested.parent)
        assert turn(shared) <= 0.05
        # The thread that writes may have met the fault, too, and looks again by itself
        wait_until(lambda: not stream.trouble)
    told = [record.getMessage() for record in caplog.records if record.name == "sse_server"]
    assert [next(part for part in ("cannot be used", "is back") if part in each)
            for each in told] == ["cannot be used", "is back"]


def test_a_stop_does_not_wait_for_a_file_with_a_fault(path):
    with on_file(path, before=IMPATIENT) as (server,), closing(sqlite3.connect(path)) as other:
        other.execute("begin immediate")
        assert post(server, "refused").status_code == 503
        began = time.monotonic()
        server.stop(signal.SIGTERM)
        assert time.monotonic() - began < 2
        other.rollback()


def test_a_table_that_is_dropped_and_comes_back(path):
    with watched(path) as ((server,), (client,)):
        post(server, "before")
        create, = query(path, "select sql from sqlite_master where name = 'event'")
        query(path, "drop table event")
        assert "no such table" in refused(server)
        query(path, *create)
        wait_until(lambda: health(server).status_code == 200)
