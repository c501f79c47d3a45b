"""How a driver tells the test what its client sees: a JSON object on each line of its output."""
from __future__ import annotations

import json
import sys

# An event with this data asks the driver to close its client, as a program does that has enough.
CLOSE = "close yourself"


def event(name: str | None, data: str, last_id: str | None) -> bool:
    """Print an event, and return whether it asks to close."""
    say(event=name or "message", data=data, id=last_id or "")
    return data == CLOSE


def error(what: object) -> None:
    """Print that the connection ended or could not be made; the client will come back."""
    say(error=f"{type(what).__name__}: {what}")


def closed(why: object) -> None:
    """Print that the client is closed for good, and end."""
    say(closed=str(why))
    sys.exit()


def say(**line: str) -> None:
    print(json.dumps(line), flush=True)
