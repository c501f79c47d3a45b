"""The errors that more than one part of the server raises, and its users catch."""
from __future__ import annotations

from collections.abc import Iterable


class NotRunning(RuntimeError):
    """The server does not run, yet or any more, so it takes no event."""


class Unavailable(Exception):
    """The place that events go to does not answer now; trying again later may help."""


class WouldWait(Unavailable):
    """A thread that may not wait would have to wait for the publisher. Nothing was published."""


class HTTPError(Exception):
    """An answer that says what was wrong with a request.

    text: a sentence that says what to do. fields: header fields of the answer, as `Name: value`.
    """

    def __init__(self, status: int, text: str, fields: Iterable[str] = ()) -> None:
        super().__init__(status, text)
        self.status = status
        self.text = text
        self.fields = tuple(fields)
