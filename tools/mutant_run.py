"""Run pytest in a copy of the tree, and note what becomes of each test. See tools/mutants.py."""
import faulthandler
import json
import mmap
import sys
import time
from typing import Any, Dict, List

import pytest

LIMIT = 120     # seconds for the beginning, the end, and a test of which none is known


class Inside:
    """A plugin of pytest: run the tests that are wanted, in this order; note what becomes of each.

    order: tests, None for all; limits: seconds for each; notes and marks: files.
    """

    def __init__(self, order: Dict[str, Any]) -> None:
        self._order = order
        self._notes = open(order["notes"], "w", buffering=1)
        self._began = 0.0
        if order["marks"]:
            with open(order["marks"], "r+b") as file:
                self._marks = mmap.mmap(file.fileno(), 0)

        self._watch(LIMIT)

    def _watch(self, seconds: float) -> None:
        """End this process if it takes longer than this until the next call."""
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)

    def _note(self, **note: object) -> None:
        print(json.dumps(note), file=self._notes)

    def _note_done(self, test: str) -> None:
        marks = self._marks[:] if self._order["marks"] else b""
        self._note(done=test, seconds=round(time.monotonic() - self._began, 3),
                   marks=[place for place, mark in enumerate(marks) if mark])
        if marks:
            self._marks[:] = bytes(len(marks))

    def pytest_collection_modifyitems(self, items: List[Any]) -> None:
        if self._order["tests"] is not None:
            known = {item.nodeid: item for item in items}
            items[:] = [known[test] for test in self._order["tests"] if test in known]

    def pytest_collection_finish(self) -> None:
        self._note_done("")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._note(begun=nodeid)
        self._began = time.monotonic()
        self._watch(self._order["limits"].get(nodeid, LIMIT))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._note(failed=report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._note_done(nodeid)
        self._watch(LIMIT)      # the end can hang, too


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        order = json.load(file)
    sys.exit(pytest.main([*order["arguments"], "-p", "no:cacheprovider",
                          "-o", "faulthandler_timeout=0"], [Inside(order)]))
