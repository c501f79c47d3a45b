"""The command under test, fed by a pipe: `python sse_server.py --stdin`, and lines on command.

The protocol of serve.py, but the first line has the port and the process id of the server, which
keeps the core that this was given; this process, which only writes the lines, leaves it.
"""
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from serve import stamped

SERVER = Path(__file__).resolve().parent.parent / "sse_server.py"


def main() -> None:
    if "--help" in sys.argv:
        print(__doc__)
        return
    server = subprocess.Popen([sys.executable, SERVER, "--port", "0", "--stdin", "--quiet",
                               "--max-clients", "20000"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
    port = re.search(r":(\d+)$", server.stdout.readline())
    print(port[1], server.pid, flush=True)
    sequence = 0
    for line in sys.stdin:
        events, pause = map(int, line.split()[:2])
        due = time.monotonic()
        for _ in range(events):
            print(stamped(sequence), file=server.stdin, flush=pause > 0)
            sequence += 1
            due += pause / 1e6
            if pause:
                time.sleep(max(0, due - time.monotonic()))
        server.stdin.flush()
        print("done", flush=True)
    server.stdin.close()
    server.wait()


if __name__ == "__main__":
    main()
