"""What a person at a terminal meets: all real processes, most on a terminal of their own."""
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import time

import pytest

from helpers import PATIENCE, TOP, Client, make_certificate, wait_until

SERVER = [sys.executable, str(TOP / "sse_server.py"), "--port", "0"]
# The same, but it renews its status line ten times a second.
OFTEN = [sys.executable, "-c", (
    f"import sys; sys.path.insert(0, {str(TOP)!r}); from sse_core.cli import command_line; "
    "command_line.STATUS_EVERY = 0.1; import sse_server; sys.exit(sse_server.main())"),
    "--port", "0"]


class Terminal:
    """A process that leads a session on a terminal, and what it has written there."""

    def __init__(self, *command: str) -> None:
        self.pid, self.screen = pty.fork()
        if self.pid == 0:
            os.execvp(command[0], command)
        self.text = ""

    def look(self, seconds: float = 0.05) -> str:
        while select.select([self.screen], [], [], seconds)[0]:
            try:
                self.text += os.read(self.screen, 65536).decode(errors="replace")
            except OSError:         # the process has ended
                break
        return self.text

    def until(self, pattern: str) -> re.Match:
        wait_until(lambda: re.search(pattern, self.look()))
        return re.search(pattern, self.text)

    def type(self, keys: str) -> None:
        os.write(self.screen, keys.encode())

    def status(self) -> int:
        """Wait until it ends, and return its exit status."""
        def ended() -> bool:
            self.look()
            pid, self._status = os.waitpid(self.pid, os.WNOHANG)
            return pid != 0
        wait_until(ended)
        return os.waitstatus_to_exitcode(self._status)

    def close(self) -> None:
        os.close(self.screen)


@pytest.fixture
def terminal():
    terminals = []

    def make(*command: str) -> Terminal:
        terminals.append(Terminal(*command))
        return terminals[-1]
    yield make
    for each in terminals:
        try:
            os.killpg(each.pid, signal.SIGKILL)
            os.waitpid(each.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        each.close()


def test_enter_stops_it_and_clients_get_their_end(terminal):
    screen = terminal(*SERVER, "--interval", "0.05")
    port = int(screen.until(r"Listening on http://127.0.0.1:(\d+)")[1])
    with Client(port) as client:
        client.read_events(1)
        screen.type("\n")
        assert client.read_to_end().ended
    assert screen.status() == 0 and "Traceback" not in screen.text


def test_the_start_says_where_to_look_and_who_may(terminal):
    screen = terminal(*OFTEN)
    text = screen.until(r"May publish: nobody")[0] and screen.text
    assert "Press enter to terminate" in text and "Watch: curl -N http://127.0.0.1:" in text
    assert "May watch: everybody on this machine, and every web page that is open there" in text
    assert screen.until(r"clients: 0, events: \d+,")
    port = int(screen.until(r"Listening on http://127.0.0.1:(\d+)")[1])
    with Client(port) as client:
        client.open()
        assert screen.until(r"clients: 1, events: \d+,")


@pytest.mark.parametrize("flags, shown", [(["--quiet"], False), ([], True)])
def test_quiet_has_no_status_line(terminal, flags, shown):
    screen = terminal(*OFTEN, "--interval", "0.05", *flags)
    port = int(screen.until(r"Listening on http://127.0.0.1:(\d+)")[1])
    with Client(port) as client:
        client.read_events(5)       # so many looks at the terminal are done, too
    screen.type("\n")
    assert screen.status() == 0
    assert ("deliveries/s" in screen.text) == shown


def test_enter_after_the_end_of_input_still_stops_it(terminal):
    screen = terminal(*OFTEN, "--quiet")
    screen.until("Listening")
    screen.type("\x04")
    time.sleep(0.2)         # there is nothing to see: that it runs on is what is tested
    assert os.waitpid(screen.pid, os.WNOHANG)[0] == 0
    deadline = time.monotonic() + PATIENCE
    while os.waitpid(screen.pid, os.WNOHANG) == (0, 0):
        assert time.monotonic() < deadline
        screen.type("\n")   # the first may come while it rests
        screen.look(0.2)


def test_a_job_in_the_background_runs_on_and_leaves_enter_to_the_shell(terminal):
    shell = terminal("bash", "--norc", "-i")
    command = f"{' '.join(SERVER)} --interval 0.05 2>/dev/null"
    shell.type(f"PS1=; stty -echo; {command} & echo job is $!\n")
    pid = int(shell.until(r"job is (\d+)")[1])
    port = int(shell.until(r"Listening on http://127.0.0.1:(\d+)")[1])
    assert "Press enter" not in shell.text
    with Client(port) as client:
        for number in range(3):
            shell.type(f"echo typed $(({number} + 70))\n")
            shell.until(f"typed {number + 70}")
        count = len(client.read_events(3))
        client.read_events(count + 5)
        with open(f"/proc/{pid}/stat") as file:
            assert file.read().rpartition(")")[2].split()[0] != "T"
        os.kill(pid, signal.SIGTERM)
        assert client.read_to_end().ended


def test_stopped_and_continued_in_the_background_it_serves_on(terminal):
    shell = terminal("bash", "--norc", "-i")
    shell.type(f"PS1=; stty -echo; {shlex.join(OFTEN)} --interval 0.05 --quiet\n")
    port = int(shell.until(r"Listening on http://127.0.0.1:(\d+)")[1])
    with Client(port) as client:
        client.read_events(1)
        shell.type("\x1a")
        shell.until("Stopped")
        shell.type("bg\n")
        shell.type("echo still $((6 * 7))\n")
        shell.until("still 42")
        client.read_events(len(client.stream.events) + 10)
        shell.type("fg\n")
        wait_until(lambda: shell.look() and ended(client, shell))
        assert client.stream.ended


def ended(client: Client, shell: Terminal) -> bool:
    """Type Enter, and say whether the stream has ended: `fg` takes its time to give it."""
    shell.type("\n")
    client.receive()
    return client.stream.ended


def test_a_terminal_that_is_closed_ends_the_streams_in_order(terminal):
    screen = terminal(*SERVER, "--interval", "0.05", "--quiet")
    port = int(screen.until(r"Listening on http://127.0.0.1:(\d+)")[1])
    with Client(port) as client:
        client.read_events(1)
        os.kill(screen.pid, signal.SIGHUP)
        assert client.read_to_end().ended
    assert screen.status() == 0


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """The flags for a certificate whose key is encrypted with the password `x`."""
    folder = tmp_path_factory.mktemp("locked")
    cert, key = make_certificate(folder)
    subprocess.run(["openssl", "ec", "-in", key, "-aes256", "-passout", "pass:x", "-out",
                    folder / "locked.pem"], check=True, capture_output=True)
    return ["--cert", cert, "--key", str(folder / "locked.pem")]


def test_the_password_of_an_encrypted_key_is_asked_at_a_terminal(terminal, locked):
    screen = terminal(*SERVER, *locked)
    screen.until("Password of the key")
    screen.type("x\n")
    screen.until("Listening on https://")
    assert screen.text.count("Password") == 1
    screen.type("\n")
    assert screen.status() == 0


@pytest.mark.parametrize("typed, said", [
    ("wrong\n", "locked.pem: .* password of the key is wrong"), ("\x03", "no password was typed"),
    ("\x04", "no password was typed")])
def test_a_password_that_is_wrong_or_not_typed_is_one_line_and_status_2(terminal, locked, typed,
                                                                       said):
    screen = terminal(*SERVER, *locked)
    screen.until("Password of the key")
    screen.type(typed)
    assert screen.status() == 2 and re.search(said, screen.text) and "Traceback" not in screen.text


STREAMS = ["</dev/null >/dev/full", "</dev/null 2>/dev/full", "</dev/zero",
           "</dev/null > >(head -0)", "</dev/null >&-", "</dev/null 2>&-", "<&- >&- 2>&-",
           "</dev/null >/dev/full 2>&1"]


def run_on(streams: str) -> subprocess.Popen:
    command = f'exec "{sys.executable}" "{TOP}/sse_server.py" --port 0 {streams}'
    return subprocess.Popen(["bash", "-c", command], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def has_begun(process: subprocess.Popen) -> bool:
    """Say whether it has its threads: main, accept, connections, publisher, source."""
    return process.poll() is not None or len(os.listdir(f"/proc/{process.pid}/task")) >= 5


def cpu(process: subprocess.Popen) -> float:
    """Return the seconds of CPU that a process took; see clock_getcpuclockid(3)."""
    return time.clock_gettime((~process.pid << 3) | 2) if process.poll() is None else 0.0


def test_closed_and_full_streams_are_no_traceback_and_no_busy_loop():
    processes = {streams: run_on(streams) for streams in STREAMS}
    wait_until(lambda: all(map(has_begun, processes.values())))
    before = {streams: cpu(process) for streams, process in processes.items()}
    time.sleep(1)       # the time over which the cost of waiting is measured
    used = {streams: cpu(processes[streams]) - before[streams] for streams in STREAMS}
    for process in processes.values():
        process.send_signal(signal.SIGINT)
    for streams, process in processes.items():
        errors = process.communicate(timeout=PATIENCE)[1]
        assert "Traceback" not in errors and "Exception" not in errors, (streams, errors)
        assert process.returncode == 0 and used[streams] < 0.05, (streams, used)


def test_a_terminal_that_is_held_by_ctrl_s_stops_nothing_and_enter_still_counts(terminal):
    screen = terminal(*OFTEN, "--interval", "0.05", "--verbose")
    port = int(screen.until(r"Listening on http://127.0.0.1:(\d+)")[1])
    screen.until("deliveries/s")
    screen.type("\x13")
    with Client(port) as client:
        count = len(client.read_events(1))
        client.read_events(count + 5)       # so some looks at the terminal are done, too
        screen.type("\n")
        assert client.read_to_end().ended
    assert screen.status() == 0


def test_a_pipe_without_its_flag_runs_on_and_asks():
    with subprocess.Popen([*SERVER, "--interval", "0.05"], stdin=subprocess.PIPE, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        port = int(re.search(r":(\d+)\n", process.stdout.readline())[1])
        process.stdin.write("1\n2\n")
        process.stdin.close()
        process.stdin = None
        with Client(port) as client:
            client.read_events(3)
            process.send_signal(signal.SIGTERM)
            assert client.read_to_end().ended
        assert "was --stdin meant?" in process.communicate(timeout=PATIENCE)[1]
        assert process.returncode == 0


def test_the_version_is_told():
    done = subprocess.run([*SERVER, "--version"], capture_output=True, text=True, timeout=PATIENCE)
    assert re.fullmatch(r"sse_server.py \d+\.\d+\.\d+\n", done.stdout) and done.returncode == 0


