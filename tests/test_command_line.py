"""`python sse_server.py` as people and service managers run it: every test is a real process."""
import inspect
import ipaddress
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from typing import Iterator
from urllib.parse import urlsplit

import pytest
import requests

from helpers import (PATIENCE, PUBLISH_TOKEN, TOP, Client, ask, connect, get, need_ipv6, post,
                     serving, wait_until)
from sse_core.cli.command_line import parse_arguments, status_lines
from sse_server import SSEServer

FAST = ("--interval", "0.02")


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_stops_within_a_second_with_status_0_and_the_end_chunk(by):
    with serving(*FAST) as server, Client(server.port) as client:
        client.read_events(2)
        began = time.monotonic()
        assert server.stop(by) == 0
        assert time.monotonic() - began < 1
        assert client.read_to_end().ended
        assert server.close() == ""


def test_says_once_where_it_listens_and_nothing_of_enter_where_no_terminal_is():
    with serving("--verbose", stdin=subprocess.PIPE) as server:
        server.stop()
        shown = server.output + server.process.stdout.read()
        assert shown.startswith(b"Listening on http://127.0.0.1:%d\n" % server.port)
        assert b"enter" not in shown and "istening" not in server.close()


def test_end_of_standard_input_does_not_stop_it():
    with serving(*FAST, stdin=subprocess.DEVNULL) as server, Client(server.port) as client:
        client.read_events(3)
        assert server.process.poll() is None
        assert server.stop(signal.SIGTERM) == 0
        assert client.read_to_end().ended


def test_runs_without_any_standard_input():
    command = f'exec "{sys.executable}" "{TOP}/sse_server.py" --port 0 <&-'
    with subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.terminate()
        assert process.wait(PATIENCE) == 0


def test_runs_on_with_a_standard_input_that_cannot_be_read():
    """As nohup leaves it: a write-only /dev/null."""
    command = (f'exec "{sys.executable}" "{TOP}/sse_server.py" --port 0 --quiet '
               "--interval 0.02 0>/dev/null")
    with subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        port = int(re.search(rb":([0-9]+)\n", process.stdout.readline())[1])
        with Client(port) as client:
            client.read_events(1)
            process.terminate()
            assert process.wait(PATIENCE) == 0 and process.stderr.read() == b""


def test_curl_ticks_and_ends_with_status_0():
    curl = shutil.which("curl") or pytest.skip("curl is not installed")
    with serving(*FAST) as server:
        process = subprocess.Popen([curl, "-sN", f"http://127.0.0.1:{server.port}/token"],
                                   stdout=subprocess.PIPE)
        with process:
            line = process.stdout.readline()
            while line and not re.match(rb"data: [0-9]", line):
                line = process.stdout.readline()
            assert re.fullmatch(rb"data: [ -~]+\n", line)
            server.stop()
            process.stdout.read()
            assert process.wait(PATIENCE) == 0


def test_clients_that_go_by_the_content_type_read_all_of_unicode(server):
    """Without a charset, requests takes Latin-1, and ends a line at the 0x85 of Å and ✅."""
    with requests.get(server.url, params={"since": "all"}, stream=True,
                      timeout=PATIENCE) as response:
        server.publish("Ångström ✅ 😀")
        lines = response.iter_lines(decode_unicode=True)
        data = next(line for line in lines if line.startswith("data: "))
    assert data == "data: Ångström ✅ 😀"


def test_requests_iterates_and_ends_without_an_exception():
    with serving(*FAST) as server:
        with requests.get(f"http://127.0.0.1:{server.port}/token", stream=True,
                          timeout=PATIENCE) as response:
            lines = response.iter_lines()
            assert next(line for line in lines if line.startswith(b"data: "))
            server.stop()
            assert all(line[:4] in (b"", b"id: ", b"data", b"even", b"retr") for line in lines)


@pytest.mark.parametrize("arguments, said", [
    (["--port", "65536"], ": --port is not from 0 to 65535"),
    (["--port", "x"], "argument --port: invalid int value: 'x'"),
    (["--port", "-1"], "port is not from 0 to 65535"),
    (["--interval", "-1"], "interval must be a number of seconds from 0 on"),
    (["--interval", "nan"], "interval must be a number of seconds from 0 on"),
    (["--json"], "--json and --wait-clients need --stdin"),
    (["--sync"], ": --sync needs --history-file\n"), (["--stream", "x"], ": --stream needs --redis\n"),
    (["--key", "x"], ": --key needs --cert\n"), (["--port", "0", "--token", ""], ": --token: one is empty"),
    (["--port", "0", "--origin", "https://a.test/"], "write https://a.test\n"),
    (["--port", "0", "--allowed-host", "a.test:80"], "write a.test in place of 'a.test:80'\n"),
    (["--nonsense"], "unrecognized argument --nonsense (--help shows the options)"),
    (["--prot", "6500"], "unrecognized argument --prot: was --port meant?"),
    (["--jwt-kay=SECRET"], "unrecognized argument --jwt-kay: was --jwt-key meant?"),
    (["6500"], "unrecognized argument 6500"),
    (["--host", "256.0.0.1", "--port", "0"], "cannot listen on 256.0.0.1 port 0"),
    (["--host", "192.0.2.1", "--port", "0"], "cannot listen on 192.0.2.1 port 0"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_a_bad_flag_is_one_line_and_status_2(arguments, said):
    done = subprocess.run([sys.executable, TOP / "sse_server.py", *arguments], text=True,
                          capture_output=True, stdin=subprocess.DEVNULL, timeout=PATIENCE)
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and done.stderr.count("\n") == 1


def test_a_busy_port_is_one_line_and_status_2():
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        done = subprocess.run([sys.executable, TOP / "sse_server.py", "--port", port], text=True,
                              capture_output=True, stdin=subprocess.DEVNULL, timeout=PATIENCE)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (f"sse_server.py: cannot listen on 127.0.0.1 port {port}: "
                           "Address already in use: stop the program that listens there, or "
                           "choose another port with --port\n")


def test_works_from_any_folder_with_nothing_installed(tmp_path):
    command = [sys.executable, "-E", "-s", "-S", str(TOP / "sse_server.py"), "--port", "0"]
    process = subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout.readline()
        process.terminate()
        process.communicate(timeout=PATIENCE)
        assert process.returncode == 0


def test_an_ipv6_address_is_listened_on_and_told_in_brackets():
    need_ipv6()
    with serving("--host", "::1") as server:
        assert f"http://[::1]:{server.port}" in server.output.decode()
        assert server.stop() == 0


def test_a_port_can_be_used_again_at_once():
    with serving(*FAST) as server, Client(server.port) as client:
        client.read_events(1)
        assert server.stop() == 0
        command = [sys.executable, TOP / "sse_server.py", "--port", str(server.port)]
        again = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        with again:
            assert again.stdout.readline()
            again.terminate()
            again.communicate(timeout=PATIENCE)
            assert again.returncode == 0


def test_verbose_says_who_left_and_no_more():
    with serving("--verbose", *FAST) as server:
        with Client(server.port) as client:
            client.read_events(1)
        connect(server.port).close()
        server.stop()
        assert all(re.search(" connected$| dropped: | left ", line) for line in server.peer_lines())
        assert re.search(r"stopped; clients: \d+\n$", server.close())


# Refused requests, each of which is a line of --verbose: more than a pipe and the server hold.
REFUSED = 1400
FEW_LINES = "from sse_core.cli import log_writer; log_writer.MAX_LINES = 100"


def test_a_log_that_nobody_reads_stops_nothing():
    """A pager, or a stuck collector: after 816 lines nobody was accepted any more."""
    with serving("--verbose", "--interval", "100", before=FEW_LINES) as server:
        for _ in range(REFUSED):
            ask(server.port, get("/", method="BREW"))
        with Client(server.port) as client:
            client.open()
            server.process.send_signal(signal.SIGTERM)
            assert client.read_to_end().ended
        assert server.process.wait(3) == 0
        lines = server.close().splitlines()
    assert all(" refused: 501 " in line for line in lines[:-1])


def test_lines_left_out_of_the_log_are_counted_once_somebody_reads_it_again():
    with serving("--verbose", "--interval", "100", before=FEW_LINES) as server:
        for _ in range(REFUSED):
            ask(server.port, get("/", method="BREW"))
        asked, lines = REFUSED, []
        reading = threading.Thread(target=lambda: lines.extend(server.process.stderr))
        reading.start()

        def is_told() -> bool:
            """Have one more line logged: what was left out is told before the next line."""
            nonlocal asked
            asked += 1
            ask(server.port, get("/", method="BREW"))
            return any(line.startswith(b"lines left out") for line in lines)
        wait_until(is_told)
        server.stop()
        reading.join(PATIENCE)
    left_out = [int(line.split(b": ")[1]) for line in lines if line.startswith(b"lines left out")]
    assert left_out and sum(b"refused: 501" in line for line in lines) + sum(left_out) == asked


def test_without_a_flag_only_the_edges_are_logged_and_quiet_logs_nothing():
    for flag, expected in (("--loud", ["stopped;"]), ("--quiet", [])):
        with serving(flag, *FAST) as server:
            with Client(server.port) as client:
                client.read_events(1)
            server.stop()
            assert [line.split()[0] for line in server.close().splitlines()] == expected


def test_a_terminal_gets_a_status_line_that_renews_itself():
    controller, terminal = os.openpty()
    code = (f"import sys; sys.path.insert(0, {str(TOP)!r}); from sse_core.cli import command_line; "
            "command_line.STATUS_EVERY = 0.2; import sse_server; sys.exit(sse_server.main())")
    process = subprocess.Popen([sys.executable, "-c", code, "--port", "0", "--interval", "0.05"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=terminal)
    os.close(terminal)
    with process:
        seen = b""
        line = rb"\r\x1b\[Kclients: 0, events: [0-9]+, deliveries/s: 0"
        while not re.search(line + line, seen):
            seen += os.read(controller, 1000)
        process.terminate()
        process.communicate(timeout=PATIENCE)
    os.close(controller)
    assert process.returncode == 0


def test_stop_is_bounded_even_with_a_client_that_does_not_read():
    with serving("--interval", "100", "--publish-token", PUBLISH_TOKEN) as server, \
            Client(server.port, receive_buffer=4096) as deaf:
        deaf.open()
        with Client(server.port) as client:
            client.open()
            for number in range(10):        # more than a kernel holds for the one that is deaf
                post(server.port, body=b"x" * 100_000)
                client.read_events(number + 1)
            began = time.monotonic()
            assert server.stop() == 0
            assert time.monotonic() - began < 3
            assert client.read_to_end().ended
        assert deaf.sock.recv(1)


def test_the_command_begins_where_the_library_does(monkeypatch, capsys):
    """And --help says so."""
    for name in ("SSE_TOKEN", "SSE_PUBLISH_TOKEN", "SSE_JWT_KEY"):
        monkeypatch.delenv(name, raising=False)
    options = vars(parse_arguments([]))
    defaults = {name: parameter.default
                for name, parameter in inspect.signature(SSEServer).parameters.items()}
    both = defaults.keys() & options
    assert both == defaults.keys() - {"authorize", "on_fault"}
    assert {name: options[name] or None for name in both} == {
        name: defaults[name] or None for name in both}
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for name in ("host", "port", "history", "heartbeat", "retry", "max_clients", "patience"):
        flag = "--" + name.replace("_", "-")
        said = re.search(rf"{flag} [A-Z]+ [^()]*\(default ([^;)]*)", shown)
        assert said and said[1] == re.sub(r"\.0$", "", str(defaults[name])), flag


EMPTY = ["--host", "--redis", "--stream", "--history-file", "--token", "--publish-token",
         "--jwt-key", "--token-file", "--publish-token-file", "--allowed-host", "--origin",
         "--cert", "--key"]


@pytest.mark.parametrize("flag", EMPTY)
def test_an_empty_option_as_an_unset_variable_gives_it_is_refused(capsys, flag):
    """`--jwt-key "$UNSET"` began a server that was open to everybody, without a word."""
    names = inspect.signature(SSEServer).parameters
    with pytest.raises((SystemExit, ValueError)) as ended:
        options = vars(parse_arguments(["--port", "0", flag, ""]))
        SSEServer(**{name: value for name, value in options.items() if name in names})
    said = f"{ended.value} {capsys.readouterr().err}"
    assert "empty" in said or "''" in said


@pytest.mark.parametrize("variable", ["SSE_TOKEN", "SSE_PUBLISH_TOKEN", "SSE_JWT_KEY"])
@pytest.mark.parametrize("value", ["", " "])
def test_a_variable_that_is_set_and_empty_is_refused(monkeypatch, capsys, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as ended:
        parse_arguments([])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and f"{variable} is set, and empty" in error


@pytest.mark.parametrize("arguments, interval", [
    ([], 1.0), (["--token", "x"], 1.0), (["--interval", "0"], 0.0), (["--stdin"], 0.0),
    (["--history-file", "x"], 0.0), (["--publish-token", "x"], 0.0), (["--redis", "x"], 0.0),
    (["--jwt-key", "x"], 0.0), (["--history-file", "x", "--interval", "2"], 2.0),
    (["--redis", "x", "--interval", "2"], 2.0)])
def test_the_clock_runs_only_where_nothing_else_brings_events_or_where_it_is_asked_for(
        arguments, interval):
    """Its ticks filled the file, and pushed real events out after 2.8 hours."""
    assert parse_arguments(arguments).interval == interval


def test_beside_a_publish_token_there_is_no_clock_and_beside_an_interval_there_is():
    with serving("--publish-token", PUBLISH_TOKEN, "--interval", "0.02") as server, \
            Client(server.port) as client:
        client.read_events(2)
        assert server.stop() == 0
    with serving("--publish-token", PUBLISH_TOKEN, before=HASTY) as server, \
            Client(server.port) as client:
        client.open()
        time.sleep(0.2)         # the time of ten ticks: that none comes is what is tested
        post(server.port, body=b"real")
        assert [event.data for event in client.read_events(1)] == ["real"]
        assert server.stop() == 0


# A clock that no flag asks for ticks so fast that a test need not wait for it
HASTY = "from sse_core.cli import command_line; command_line.TICK = 0.02"


def test_an_option_taken_from_the_environment_is_named():
    """It can be left over from another day."""
    pytest.importorskip("jwt", reason="signed tokens need the package PyJWT")
    key = "a-secret-of-this-test-that-is-long"
    shown = []
    for flags, env in (((), {"SSE_TOKEN": "x", "SSE_PUBLISH_TOKEN": "y", "SSE_JWT_KEY": key}),
                       (("--token", "x"), {})):
        with serving("--loud", *flags, env=env) as server:
            server.stop()
            text = server.process.stdout.read().decode()
            shown.append(text.partition("Set in the environment: ")[2])
    assert shown == ["SSE_TOKEN, SSE_PUBLISH_TOKEN, SSE_JWT_KEY\n", ""]


def test_tokens_come_from_files_too(tmp_path):
    watch, publish, empty = (tmp_path / name for name in ("watch", "publish", "empty"))
    watch.write_text("\ufeffone\n# a comment\n\n  two \n  # three\n", "utf-8")
    publish.write_text("three\n")
    empty.write_text(" \n")
    files = ["--token-file", str(watch), "--publish-token-file", str(publish)]
    options = parse_arguments(["--token", "zero", *files, "--token-file", str(publish)])
    assert options.tokens == ["zero", "one", "two", "three"]
    assert options.publish_tokens == ["three"]


@pytest.mark.parametrize("flag", ["--token-file", "--publish-token-file"])
@pytest.mark.parametrize("name, said", [
    ("empty", "empty' holds no token"), ("none", "none': No such file"),
    ("odd", "odd': 'utf-8' codec can't decode")])
def test_a_file_without_a_token_lets_in_nobody_and_does_not_start(tmp_path, capsys, flag, name,
                                                                 said):
    """Else a server that was to be closed would be open."""
    (tmp_path / "empty").write_text(" \n# none\n")
    (tmp_path / "odd").write_bytes(b"\xff\xfe\n")
    (tmp_path / "good").write_text("one\n")
    with pytest.raises(SystemExit) as ended:
        parse_arguments([flag, str(tmp_path / name), flag, str(tmp_path / "good")])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and error.count("\n") == 1


def test_a_signal_that_was_ignored_at_the_start_is_so_only_if_nohup_did_it():
    """The shell ignores SIGINT for what a script runs in the background; that is no nohup."""
    ignored = ("import signal\nfor each in (signal.SIGHUP, signal.SIGINT): "
               "signal.signal(each, signal.SIG_IGN)")
    with serving(*FAST, before=ignored) as server, Client(server.port) as client:
        client.read_events(1)
        server.process.send_signal(signal.SIGHUP)
        client.read_events(5)
        assert server.stop(signal.SIGINT) == 0
        assert client.read_to_end().ended


def test_quiet_says_only_what_the_original_does_and_else_where_to_look():
    shown = {}
    for loudness in ("--quiet", "--verbose"):
        with serving(loudness) as server:
            server.stop(signal.SIGTERM)
            rest = server.process.stdout.read()
            shown[loudness] = (server.output + rest).decode().splitlines()
    assert len(shown["--quiet"]) == 1
    assert [line.partition(":")[0] for line in shown["--verbose"][1:]] == ["Watch", "May watch"]


@contextmanager
def addresses(*flags: str, before: tuple = ()) -> Iterator[tuple]:
    """Start the command, and give what it says to give to curl, and to open in a browser."""
    command = [*before, sys.executable, str(TOP / "sse_server.py"), "--port", "0", *flags]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.DEVNULL) as process:
        try:
            line = process.stdout.readline()
            while line and not line.startswith("Watch: "):
                line = process.stdout.readline()
            told = re.fullmatch(r"Watch: curl -N (\S+), or open (\S+) in a browser\n", line)
            assert told, line
            yield told.groups()
        finally:
            process.terminate()


@pytest.mark.parametrize("flags, by_curl, by_browser", [
    ([], "/token", "/"), (["--token", "one"], "/one", "/#one"),
    (["--token", "one", "--allowed-host", "localhost"], "/one", "/#one"),
    (["--host", "0.0.0.0"], "/token", "/"), (["--host", "::"], "/token", "/")])
def test_the_addresses_that_the_start_prints_work(flags, by_curl, by_browser):
    """TOKEN stands for one."""
    if "::" in flags:
        need_ipv6()
    with addresses(*flags) as (for_curl, for_browser):
        assert for_curl.endswith(by_curl.replace("one", "TOKEN"))
        assert for_browser.endswith(by_browser.replace("one", "TOKEN"))
        stream = requests.get(for_curl.replace("TOKEN", "one"), stream=True, timeout=PATIENCE)
        with stream as answer:
            assert answer.headers["Content-Type"].startswith("text/event-stream")
        page = requests.get(for_browser, timeout=PATIENCE, headers={"Accept": "text/html"})
        assert page.ok and page.headers["Content-Type"].startswith("text/html")


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_a_server_that_is_open_to_others_prints_an_address_that_is_not_of_this_machine_alone(host):
    if host == "::":
        need_ipv6()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("this machine has no network")
    with addresses("--host", host) as told:
        for each in told:
            address = ipaddress.ip_address(urlsplit(each).hostname)
            assert not address.is_loopback and not address.is_unspecified


def test_without_a_network_it_prints_the_name_of_the_machine():
    alone = ("unshare", "--user", "--map-root-user", "--net")
    try:
        subprocess.run([*alone, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine gives no network namespace")
    with addresses("--host", "0.0.0.0", before=alone) as told:
        assert {urlsplit(each).hostname for each in told} == {socket.gethostname().lower()}


def test_the_status_line_divides_by_no_time_at_all(monkeypatch):
    """Two looks can come at one moment of a coarse clock."""
    monkeypatch.setattr("time.monotonic", lambda: 5.0)
    monkeypatch.setattr("os.get_terminal_size", lambda _: os.terminal_size((80, 24)))
    lines = status_lines(lambda: {"clients": 1, "events": 2, "deliveries": 0})
    assert next(lines) == next(lines) == "clients: 1, events: 2, deliveries/s: 0"
