"""Start, stop and the end of a program, from any thread; and streams that end in order."""
import errno
import importlib
import logging
import pydoc
import re
import signal
import socketserver
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest

import publisher
import sse_server
from helpers import GET, PATIENCE, TOP, Client, connect, request_threads, unfinished, wait_until
from publisher import Publisher
from sse_server import SSEServer


def test_start_and_stop_can_be_called_twice_and_from_any_thread():
    server = sse_server.SSEServer(port=0).start()
    assert server.start() is server
    threads = [threading.Thread(target=server.stop) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    server.stop()
    with pytest.raises(sse_server.NotRunning):
        server.start()
    with pytest.raises(sse_server.NotRunning):
        server.publish("too late")


def test_a_server_that_was_never_started_can_be_stopped():
    server = sse_server.SSEServer(port=0)
    with pytest.raises(sse_server.NotRunning):
        server.publish("too early")
    server.stop()


def test_stop_cuts_requests_that_have_not_arrived(server):
    with connect(server.port) as silent:
        silent.sendall(b"GET /to")
        wait_until(lambda: unfinished(server))
        server.stop()
        assert silent.recv(1) == b""


def test_a_program_that_takes_its_time_to_authorize_does_not_hold_up_stop(monkeypatch):
    monkeypatch.setattr(sse_server, "REQUESTS_TIME", 0.2)
    release = threading.Event()
    server = SSEServer(port=0, authorize=lambda request: release.wait(20)).start()
    socks = [connect(server.port) for _ in range(6)]
    for sock in socks:
        sock.sendall(GET)
    wait_until(lambda: request_threads() == 6)
    began = time.monotonic()
    server.stop()
    assert time.monotonic() - began < 2
    release.set()
    for sock in socks:
        sock.close()
    wait_until(lambda: not request_threads())


@contextmanager
def program(text: str, folder):
    """Run a program that prints its server's port; yield the process and the port."""
    path = folder / "program.py"
    path.write_text(f"import sys; sys.path.insert(0, {str(TOP)!r})\n"
                    f"from sse_server import SSEServer\n{text}")
    with subprocess.Popen([sys.executable, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process, int(process.stdout.readline())
        finally:
            if process.poll() is None:
                process.kill()


def test_a_program_of_its_own_serves_and_ends_its_streams(tmp_path):
    with program("""
with SSEServer(port=0) as server:
    print(server.port, flush=True)
    for line in sys.stdin:
        server.publish(line.strip(), event="line")
""", tmp_path) as (process, port), Client(port) as client:
        client.open()
        process.stdin.write("hello\n")
        process.stdin.flush()
        assert client.read_events(1)[0][:2] == ("line", "hello")
        process.stdin.close()
        assert client.read_to_end().ended and process.wait(PATIENCE) == 0


@pytest.mark.parametrize("end, status", [("", 0), ("sys.exit(3)", 3), ("raise KeyError", 1)])
def test_a_program_that_forgets_stop_ends_and_its_streams_end_in_order(tmp_path, end, status):
    with program(f"""
servers = [SSEServer(port=0).start() for _ in range(2)]
print(servers[1].port, flush=True)
sys.stdin.readline()
servers[1].publish("last")
{end}
""", tmp_path) as (process, port), Client(port) as client:
        client.open()
        process.stdin.write("\n")
        process.stdin.close()
        stream = client.read_to_end()
        assert [event.data for event in stream.events] == ["last"] and stream.ended
        assert process.wait(PATIENCE) == status
        assert ("KeyError" if status == 1 else "") in process.stderr.read()


def test_an_authorize_that_never_returns_keeps_no_program_alive(tmp_path):
    with program("""
import threading
import sse_server
sse_server.REQUESTS_TIME = 0.2
asked = threading.Event()
server = SSEServer(port=0, authorize=lambda request: asked.set() or threading.Event().wait())
print(server.start().port, flush=True)
asked.wait()
""", tmp_path) as (process, port), Client(port):
        assert process.wait(PATIENCE) == 0


def test_a_forked_child_that_ends_leaves_the_server_to_its_parent(tmp_path):
    with program("""
import os, time
server = SSEServer(port=0).start()
print(server.port, flush=True)
while not server._connections._busy:
    time.sleep(0.01)
if os.fork() == 0:
    sys.exit(0)
os.wait()
print("child is gone", flush=True)
sys.stdin.readline()
""", tmp_path) as (process, port), Client(port, GET[:10]) as client:
        assert process.stdout.readline() == "child is gone\n"
        client.sock.sendall(GET[10:])
        client.open()
        process.stdin.close()
        assert client.read_to_end().ended and process.wait(PATIENCE) == 0


def test_serve_forever_in_a_program_ends_by_ctrl_c_with_the_streams_ended(tmp_path):
    with program("""
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)    # whoever runs the tests may ignore it
server = SSEServer(port=0)
print(server.port, flush=True)
server.serve_forever()
""", tmp_path) as (process, port), Client(port) as client:
        client.open()
        process.send_signal(signal.SIGINT)
        assert client.read_to_end().ended
        assert process.wait(PATIENCE) != 0 and "KeyboardInterrupt" in process.stderr.read()


@pytest.mark.parametrize("name", ["stop", "shutdown", "server_close"])
def test_serve_forever_starts_the_server_and_returns_when_it_is_stopped(name):
    server = SSEServer(port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    with Client(server.port) as client:
        client.open()
        server.publish("served")
        assert client.read_events(1)[0].data == "served"
        assert thread.is_alive()
        getattr(server, name)()
        thread.join(PATIENCE)
        assert not thread.is_alive() and client.read_to_end().ended
    with pytest.raises(sse_server.NotRunning):
        server.serve_forever()


@pytest.mark.parametrize("name", ["handle_request", "process_request", "process_request_thread",
                                  "finish_request"])
def test_hooks_of_socketserver_that_are_replaced_say_so(server, name):
    arguments = () if name == "handle_request" else (None, ("127.0.0.1", 1))
    with pytest.raises(RuntimeError, match="serve_forever"):
        getattr(server, name)(*arguments)
    with Client(server.port) as client:
        client.open()


class Derived(SSEServer):
    def more(self):
        """Do more."""


@pytest.mark.parametrize("kind", [SSEServer, Derived])
def test_help_shows_what_a_user_may_call_and_not_half_of_socketserver(kind):
    shown = pydoc.render_doc(kind, renderer=pydoc.plaintext)
    # From Python 3.13 on, a long signature begins on the next line
    methods = set(re.findall(r"^ \|  (\w+)(?: = \w+)?\((?:self|$)", shown, re.M))
    assert methods - {kind.__name__, "SSEServer"} == {
        "__enter__", "__exit__", "__init__", "drain", "figures", "publish", "serve_forever",
        "server_close", "shutdown", "start", "stats", "status", "stop",
        *(["more"] * (kind is Derived))}
    assert issubclass(kind, socketserver.ThreadingTCPServer)


def test_verify_request_decides_before_a_socket_is_taken():
    class Picky(SSEServer):
        let_in = False

        def verify_request(self, request, client_address):
            assert client_address[0] == "127.0.0.1"
            return self.let_in
    with Picky(port=0) as server:
        with connect(server.port) as refused:
            assert refused.recv(1) == b""
        server.let_in = True
        with Client(server.port) as client:
            client.open()


def test_a_start_that_finds_no_thread_leaves_nothing(monkeypatch):
    def fail(self):
        raise RuntimeError("can't start new thread")
    server = SSEServer(port=0)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="new thread"):
            server.start()
    with pytest.raises(sse_server.NotRunning):
        server.start()


def test_a_port_that_is_taken_leaves_nothing_and_is_named(server):
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1 port {server.port}: ") as raised:
        SSEServer(port=server.port)
    assert raised.value.errno == errno.EADDRINUSE
    with pytest.raises(OSError, match="cannot listen on nowhere.invalid port 0: "):
        SSEServer("nowhere.invalid", 0)
    with pytest.raises(ValueError):
        SSEServer(port=0, retry=-1)


def test_a_forked_child_is_told_where_the_server_runs_and_ends_none_of_its_streams(tmp_path):
    with program("""
import os
from sse_server import NotRunning
server = SSEServer(port=0).start()
print(server.port, flush=True)
while not (server.clients and server._connections._busy):
    pass
parent = os.getpid()
if os.fork() == 0:
    told = 0
    for call in (lambda: server.publish("to nobody"), server.drain, server.start):
        try:
            call()
        except NotRunning as error:
            told += f"runs in process {parent}" in str(error) and "after the fork" in str(error)
    server.stop()
    print(told, flush=True)
    sys.exit(0)
os.wait()
server.publish("from the parent")
sys.stdin.readline()
""", tmp_path) as (process, port), Client(port, GET[:10]) as half, Client(port) as client:
        assert process.stdout.readline() == "3\n"
        client.read_until_data("from the parent")
        half.sock.sendall(GET[10:])
        half.open()
        process.stdin.close()
        assert client.read_to_end().ended and process.wait(PATIENCE) == 0


def test_stop_waits_for_requests_that_are_nearly_done():
    """So that nothing of the server runs any more when it returns."""
    asked = threading.Event()

    def authorize(_):
        asked.set()
        time.sleep(0.2)         # what it takes
    server = SSEServer(port=0, authorize=authorize).start()
    with Client(server.port):
        assert asked.wait(PATIENCE)
        server.stop()
        assert not request_threads()


def test_a_server_that_was_made_before_a_fork_is_not_started_after_it(tmp_path):
    """Children that share one set of watched sockets would send each other's events."""
    with program("""
import os
from sse_server import NotRunning
server = SSEServer(port=0)
print(server.port, flush=True)
if os.fork() == 0:
    try:
        server.start()
    except NotRunning as error:
        os._exit(7 if f"runs in process {os.getppid()}" in str(error) else 1)
_, status = os.wait()
print(status >> 8, flush=True)
server.start().stop()
""", tmp_path) as (process, _):
        assert process.stdout.readline() == "7\n" and process.wait(PATIENCE) == 0


def test_a_fork_while_another_thread_publishes_does_not_hang_the_child(tmp_path):
    """That thread is not in the child, and will never let go of what it holds there."""
    with program("""
import os
import threading
from sse_server import NotRunning
server = SSEServer(port=0).start()
print(server.port, flush=True)
held, forked = threading.Event(), threading.Event()
def hold():
    with server._hub._mutex, server._lifecycle:
        held.set()
        forked.wait()
threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if child == 0:
    try:
        server.publish("to nobody")
    except NotRunning:
        server.stop()
        os._exit(7)
forked.set()
_, status = os.waitpid(child, 0)
print(status >> 8, flush=True)
server.stop()
""", tmp_path) as (process, _):
        assert process.stdout.readline() == "7\n" and process.wait(PATIENCE) == 0


def faulty(monkeypatch, thread: str) -> None:
    """Have a thread of every server that is made from now on meet a fault."""
    def fault(*_):
        raise ZeroDivisionError(f"a fault in {thread}")
    where = {"publisher": (Publisher, "_sweep"), "accept": (SSEServer, "get_request")}[thread]
    monkeypatch.setattr(*where, fault)


@pytest.mark.parametrize("thread", ["publisher", "accept"])
def test_a_fault_in_a_thread_is_logged_and_ends_the_server_and_stop_reports_it(
        monkeypatch, caplog, thread):
    faulty(monkeypatch, thread)
    with pytest.raises(RuntimeError) as raised:
        with SSEServer(port=0, publish_tokens=["T"], heartbeat=0.1) as server:
            connect(server.port).close()
            wait_until(lambda: server._hub.fault)
            with pytest.raises(sse_server.NotRunning):
                server.publish("x")
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    record, = [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert thread in record.getMessage() and record.exc_info[0] is ZeroDivisionError
    server.stop()       # the second time it does nothing


def test_a_fault_is_told_once_also_if_the_program_forgets_stop(tmp_path):
    with program("""
from publisher import Publisher
def fault(self): raise ZeroDivisionError("a fault in publisher")
Publisher._sweep = fault
server = SSEServer(port=0, heartbeat=0.1).start()
print(server.port, flush=True)
server._sender.join()
""", tmp_path) as (process, _):
        assert process.wait(PATIENCE) == 0
        assert process.stderr.read().count("Traceback") == 1


def test_serve_forever_reports_a_fault(monkeypatch):
    faulty(monkeypatch, "publisher")
    server = SSEServer(port=0, heartbeat=0.1)
    with pytest.raises(sse_server.Fault):
        server.serve_forever()


def test_stop_in_a_thread_of_the_server_is_done_by_another():
    class Stopping(SSEServer):
        def verify_request(self, request, client_address):
            self.stop()
            return False
    server = Stopping(port=0)
    port = server.port
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    wait_until(lambda: server._acceptor.is_alive())
    connect(server.port).close()
    thread.join(5)
    assert not thread.is_alive()
    with pytest.raises(OSError):
        connect(port)
    wait_until(lambda: not any(thread.name == "stop" for thread in threading.enumerate()))


def test_a_logging_handler_that_raises_leaves_nothing_of_stop_undone():
    class Naive(logging.Handler):
        def emit(self, record):
            server.publish(record.getMessage())
    logger, handler = logging.getLogger("sse_server"), Naive()
    server = SSEServer(port=0).start()
    port, level = server.port, logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with pytest.raises(sse_server.NotRunning):
            server.stop()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    with pytest.raises(OSError):
        connect(port)
    server.stop()


def test_a_server_on_which_nothing_happens_looks_for_heartbeats_and_does_nothing_else():
    with SSEServer(port=0, heartbeat=1.6) as server, Client(server.port) as client:
        client.open()
        server.publish("x")
        client.read_events(1)
        turns = server._publisher.counters.turns + 1    # of the one that may be under way
        began = time.monotonic()
        wait_until(lambda: server._publisher.counters.turns >= turns + 4)
        assert 0.5 < time.monotonic() - began < 3       # one each 0.2 s


def test_all_that_is_logged_has_one_name():
    """So that a program says once what it wants to be told."""
    paths = (TOP / "sse_core").rglob("[a-z]*.py")
    modules = [importlib.import_module(".".join(path.relative_to(TOP).with_suffix("").parts))
               for path in paths]
    named = {module.__name__: module.logger.name for module in [publisher, sse_server, *modules]
             if hasattr(module, "logger")}
    assert len(named) > 5 and set(named.values()) == {"sse_server"}, named


def test_a_fault_does_not_hide_the_exception_that_ends_a_with_block(monkeypatch):
    faulty(monkeypatch, "publisher")
    with pytest.raises(KeyError):
        with SSEServer(port=0, heartbeat=0.1) as server:
            wait_until(lambda: server._hub.fault)
            raise KeyError("the program's own")


@pytest.mark.parametrize("source", [["--interval", "1000"], ["--stdin"]])
@pytest.mark.parametrize("broken", [
    "publisher:Publisher._sweep", "sse_server:SSEServer.verify_request",
    "sse_core.cli.sources:clock", "sse_core.cli.sources:lines"])
def test_a_fault_in_a_thread_ends_the_process_with_status_1_and_a_traceback(source, broken):
    """So that a service manager starts it again: with the clock it once was 0."""
    if broken.startswith("sse_core") and broken.endswith("lines") != ("--stdin" in source):
        pytest.skip("this source is not used")
    module, _, attribute = broken.partition(":")
    code = f"""
import sys; sys.path.insert(0, {str(TOP)!r})
import functools, importlib
def fault(*_): raise ZeroDivisionError("a fault")
*path, name = {attribute!r}.split(".")
setattr(functools.reduce(getattr, path, importlib.import_module({module!r})), name, fault)
import publisher
import sse_server
sys.exit(sse_server.main(["--port", "0", "--heartbeat", "0.1", *{source!r}]))
"""
    with subprocess.Popen([sys.executable, "-c", code], text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        lines = iter(process.stdout.readline, "")
        port = int(next(line for line in lines if line.startswith("Listening")).rpartition(":")[2])
        try:
            connect(port).close()
        except OSError:         # it was quicker
            pass
        process.wait(PATIENCE)      # with its standard input open
        errors = process.stderr.read()
        assert process.returncode == 1
        assert errors.count("Traceback") == 1 and "ZeroDivisionError: a fault" in errors
        thread = {"publisher": "publisher", "sse_server": "accept"}.get(module, "source")
        assert f"a fault ended the thread {thread}," in errors
