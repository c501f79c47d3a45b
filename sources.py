"""Turn what happens outside into events: where events come from.

A source is a function that is given `publish` and a stop flag, runs in the thread `source`, and returns when it has
no more events or the flag is set.
"""
import random
import threading
import time
from typing import Callable


def clock(publish: Callable[..., object], stopping: threading.Event, interval: float = 1.0) -> None:
    """Publish the local time every `interval` seconds as the original does: four times in ten as `custom`."""
    due = time.monotonic()
    while True:
        due = max(due + interval, time.monotonic())     # after a suspend: go on, do not catch up
        if stopping.wait(max(0.0, due - time.monotonic())):
            return
        event = "custom" if random.randint(0, 9) > 5 else None
        publish(time.strftime("%m/%d/%Y %H:%M:%S"), event)
