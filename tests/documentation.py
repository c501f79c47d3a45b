"""The commands and programs of README and docs, for the tests that run them as they stand."""
import os
import re
import shlex
import signal
import subprocess
import sys

from helpers import PATIENCE, TOP, free_port

PAGES = {"README.md": (TOP / "README.md").read_text(),
         **{f"docs/{path.name}": path.read_text() for path in sorted((TOP / "docs").glob("*.md"))}}


def blocks(language: str) -> list:
    """Return the blocks in this language, of all pages; one that stands on two pages once."""
    found = [block for text in PAGES.values()
             for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]
    return list(dict.fromkeys(found))


COMMANDS = list(dict.fromkeys(line for block in blocks("sh") for line in block.splitlines()))


def commands(*starts: str) -> list:
    """Return the command that each of these texts is, or else the first one that it is in."""
    return [start if start in COMMANDS else next(each for each in COMMANDS if start in each)
            for start in starts]


def program(part: str) -> str:
    """Return the Python program that this text is in."""
    found, = (block for block in blocks("python") if part in block)
    return found


class Shell:
    """Run a command of a page as it stands but for its ports, which are free ones here."""

    def __init__(self, folder) -> None:
        self.ports = {port: str(free_port())
                      for port in ("6500", "6501", "6502", "6379", "8000", "8080")}
        self.folder = folder
        self.processes = []

    def moved(self, text: str) -> str:
        """Return a text with the ports of this shell in place of those of the documentation."""
        return re.sub(rf"\b({'|'.join(self.ports)})\b", lambda port: self.ports[port[0]], text)

    def start(self, command: str, **options) -> subprocess.Popen:
        command = self.moved(command)
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
