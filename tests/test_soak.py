"""The soak itself: its checker finds what it must, and its servers stand half a minute."""
import json
import re
import sqlite3
import subprocess
import sys

import pytest

from helpers import TOP
from wire import Event

sys.path.insert(0, str(TOP / "benchmarks"))

from checker import HISTORY, Checker, Report, Row, Truth     # noqa: E402


class Case:
    """A file of events, a client that began with the first of them, and what is found wrong."""

    def __init__(self, path) -> None:
        self.report = Report()
        self.file = sqlite3.connect(path, isolation_level=None)
        self.file.execute("pragma synchronous = off")
        self.file.execute("create table event(ms, n, channel, event, data, primary key (ms, n))")
        self.truth = Truth(path, self.report)
        self.client = Checker(self.truth, self.report, "client", ("news",))
        self.rows = [self.add(number) for number in range(8)]
        self.client.begin(self.rows[0].id)

    def add(self, number: int, channel=None, post: str = "0 1") -> Row:
        row = Row((1000 + number // 3, number % 3), channel, None, f"p {number} {post} text")
        self.file.execute("insert into event values (?, ?, ?, ?, ?)", (*row.id, *row[1:]))
        return row

    def send(self, *numbers: int) -> None:
        for number in numbers:
            row = self.rows[number]
            self.client.take(Event("message", row.data, "%d-%d" % row.id))

    def gap(self, after: Row, resumed: Row) -> None:
        told = {"after": "%d-%d" % after.id, "resumed": "%d-%d" % resumed.id, "reason": "lagging"}
        self.client.take(Event("gap", json.dumps(told), "%d-%d" % self.client.last_id))

    @property
    def faults(self) -> int:
        return self.report.counts["faults"]


@pytest.fixture
def case(tmp_path):
    case = Case(tmp_path / "events.db")
    yield case
    case.file.close()
    case.truth.close()


def test_events_that_come_once_and_in_order_are_no_fault(case):
    assert case.client.due() == case.rows[1]
    case.send(*range(1, 8))
    assert case.client.due() is None
    case.rows.append(case.add(8))
    assert case.client.due() == case.rows[8]        # it has it not yet, and is not done
    case.send(8)
    case.truth.verify()
    assert case.faults == 0 and case.report.counts["deliveries"] == 8


@pytest.mark.parametrize("numbers", [
    (1, 2, 4, 5), (2,), (1, 2, 2, 3), (1, 2, 1), (1, 3, 2, 4), (0,), (1, 2, 3, 1, 2, 3)],
    ids=["lost", "first lost", "doubled", "old", "out of order", "the one before", "all anew"])
def test_an_event_lost_doubled_or_out_of_order_is_a_fault(case, numbers):
    case.send(*numbers)
    assert case.faults


def test_one_loss_is_one_fault_and_the_rest_is_checked_from_there(case):
    case.send(1, 3, 4, 5)
    assert case.faults == 1
    case.send(7)
    assert case.faults == 2


def test_an_event_that_is_not_as_it_was_published_is_a_fault(case):
    for event in (Event("message", "other", "%d-%d" % case.rows[1].id),
                  Event("custom", case.rows[2].data, "%d-%d" % case.rows[2].id),
                  Event("message", case.rows[3].data, "1000-9")):       # and it is not in the file
        before = case.faults
        case.client.take(event)
        assert case.faults == before + 1


def test_a_client_gets_its_channels_and_no_other(case):
    case.send(*range(1, 8))
    case.rows += [case.add(8, "mail"), case.add(9, "news"), case.add(10, "mail")]
    assert case.client.due() == case.rows[9]
    case.send(9)
    assert case.client.due() is None and case.faults == 0
    case.send(10)
    assert case.faults == 1


def test_a_gap_that_had_to_be_is_no_fault(case):
    case.send(1, 2)
    case.rows += [case.add(number) for number in range(8, 8 + HISTORY)]
    case.gap(case.rows[2], case.rows[8])
    assert case.client.due() == case.rows[8]
    case.send(8, 9)
    assert case.faults == 0 and case.report.counts["gaps"] == 1


@pytest.mark.parametrize("after, resumed", [(2, 9), (1, 8), (3, 8), (2, 3), (2, 2)],
                         ids=["too much", "old", "too late", "nothing", "back"])
def test_a_gap_that_is_not_so_is_a_fault(case, after, resumed):
    case.send(1, 2)
    case.rows += [case.add(number) for number in range(8, 8 + HISTORY)]
    case.gap(case.rows[after], case.rows[resumed])
    assert case.faults


def test_a_loss_beside_a_gap_is_a_fault(case):
    case.send(1, 2)
    case.rows += [case.add(number) for number in range(8, 8 + HISTORY)]
    case.gap(case.rows[2], case.rows[8])
    case.send(9)
    assert case.faults == 1


def test_to_stand_at_an_event_that_never_was_is_a_fault(case):
    case.client.begin((1000, 7))
    assert case.faults == 1


def test_an_acknowledged_event_must_be_in_the_file(case):
    case.truth.confirm(case.rows[3])
    assert case.faults == 0
    case.truth.confirm(case.rows[3]._replace(data="p 3 0 1 other"))
    case.truth.confirm(case.rows[7]._replace(id=(2000, 0)))
    assert case.faults == 2


@pytest.mark.parametrize("number, post", [(7, "0 1"), (3, "0 1"), (9, "0 2")],
                         ids=["twice", "out of order", "half a POST"])
def test_a_row_that_nobody_published_so_is_a_fault(case, number, post):
    case.file.execute("insert into event values (2000, 0, null, null, ?)", (f"p {number} {post} ",))
    case.truth.read()
    assert case.faults == 1


def test_a_row_that_goes_is_a_fault(case):
    case.truth.read()
    case.file.execute("delete from event where (ms, n) = (?, ?)", case.rows[7].id)
    case.truth.verify()
    assert case.faults == 1


@pytest.mark.long
def test_half_a_minute():
    ran = subprocess.run([sys.executable, str(TOP / "benchmarks" / "soak.py"), "--minutes", "0.5",
                          "--seed", "1"], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"\n\| all \| \d{3,} \|", ran.stdout), ran.stdout
