"""The server under test, as a process: SSEServer, and events on command.

Prints its port. Then each line `COUNT MICROSECONDS [CHANNEL [CHANNELS]]` on standard input
publishes COUNT events with that pause between two of them, on that channel or on so many numbered
ones in turn, and is answered by a line. The end of standard input ends it. Arguments: NAME=VALUE
for SSEServer; slow=MILLISECONDS lets requests for /slow wait so long in `authorize`; token=TOKEN
and publish=TOKEN are those of who may watch and publish.
"""
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sse_server import SSEServer   # noqa: E402


def stamped(sequence: int) -> str:
    """Return 68 characters of data that say when this was, and the number of the event."""
    return f"{time.monotonic_ns():019d} {sequence:09d} ".ljust(68, "x")


def main() -> None:
    if "--help" in sys.argv:
        print(__doc__)
        return
    options = {name: int(value) if value.isdigit() else value
               for name, value in (argument.split("=") for argument in sys.argv[1:])}
    slow = options.pop("slow", 0) / 1000
    if slow:
        options["authorize"] = lambda request: request.path != "/slow" or not time.sleep(slow)
    for name, option in (("token", "tokens"), ("publish", "publish_tokens")):
        if name in options:
            options[option] = [options.pop(name)]
    sequence = 0
    with SSEServer(**{"port": 0, **options}) as server:
        print(server.port, flush=True)
        for line in sys.stdin:
            events, pause, channel, channels = [*line.split(), None, None][:4]
            due = time.monotonic()
            for number in range(int(events)):
                server.publish(stamped(sequence), None,
                               f"{channel}{number % int(channels)}" if channels else channel)
                sequence += 1
                due += int(pause) / 1e6
                if int(pause):
                    time.sleep(max(0, due - time.monotonic()))
            print("done", flush=True)


if __name__ == "__main__":
    main()
