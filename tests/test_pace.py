"""How long a slow client is waited for: a table of cases; what all clients together can cost."""
import random

import pytest

from sse_core.engine.pace import MAX_LUMP, MIN_RATE, Pace

LONGEST = 5.0 + MAX_LUMP / MIN_RATE     # seconds, with a patience of 5
OLDEST, LATER = 7, 8            # frames at which clients stand


def after(events, patience: float = 5.0) -> Pace:
    """Return a pace after events of one client: (seconds, what it does, bytes)."""
    pace = Pace(patience)
    for now, what, *size in events:
        where = (*size, OLDEST) if what == "pay" else ()
        getattr(pace, what)("client", *where, now)
    return pace


# One client

BEHIND = (0.0, "fall_behind")
CASES = {
    "one that has just fallen behind": ([BEHIND], 0.0, True),
    "one that takes nothing, before its longest pause is over": ([BEHIND], LONGEST - 0.1, True),
    "one that takes nothing, after that": ([BEHIND], LONGEST, False),
    "what it takes pays for the pause before":
        ([BEHIND, (8.0, "pay", 8 * MIN_RATE)], 8.0 + LONGEST - 0.1, True),
    "but for that pause only: nothing is paid in advance":
        ([BEHIND, (2.0, "pay", MIN_RATE), (8.0, "pay", 1000 * MIN_RATE)], 8.0 + LONGEST, False),
    "a part of it pays for a part":
        ([BEHIND, (8.0, "pay", 3 * MIN_RATE)], 3.0 + LONGEST, False),
    "one that takes a byte a second":
        ([BEHIND, *((float(second), "pay", 1) for second in range(1, 14))], 13.1, False),
    "one that takes 16 KiB each second, for an hour":
        ([BEHIND, *((float(second), "pay", 16 << 10) for second in range(1, 3600))], 3600.0, True),
    "one that takes half of the least pace, for half a minute":
        ([BEHIND, *((float(second), "pay", MIN_RATE // 2) for second in range(1, 28))],
         28.0, False),
    "one that was given up and has paid what it owed":
        ([BEHIND, (60.0, "pay", 60 * MIN_RATE)], 60.1, True),
    "one that was given up and has paid half of it":
        ([BEHIND, (60.0, "pay", 30 * MIN_RATE)], 60.1, False),
    "one that caught up and falls behind again owes nothing":
        ([BEHIND, (39.0, "catch_up"), (40.0, "fall_behind")], 40.1, True),
}


@pytest.mark.parametrize("events, now, is_waited_for", CASES.values(), ids=CASES.keys())
def test_a_client_is_waited_for_while_it_keeps_the_least_pace(events, now, is_waited_for):
    assert after(events).waits_for("client", now) is is_waited_for


def test_without_patience_nobody_is_waited_for():
    assert not after([BEHIND], patience=0.0).waits_for("client", 0.0)


def test_fuzz_a_reader_whose_kernel_reports_it_in_lumps_is_waited_for_at_every_moment(request):
    """Whatever the lumps: it is never further behind the least pace than one of them."""
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)
    for _ in range(200 * request.config.getoption("fuzz")):
        pace, now, behind = after([BEHIND]), 0.0, 0.0
        for _ in range(100):
            pause = draw.uniform(0.0, MAX_LUMP / MIN_RATE + 4.9 - behind)
            now, behind = now + pause, behind + pause
            assert pace.waits_for("client", now), f"seed {seed}: after {now} s"
            lump = draw.uniform(0.0, 1.5) * behind
            pace.pay("client", int(lump * MIN_RATE) + 1, OLDEST, now)
            behind = max(0.0, behind - lump)


# All clients together

def held(pace: Pace, client: str, began: float) -> float:
    """Have a client fall behind and take nothing. Return how many seconds a source waits for it."""
    now = began
    pace.fall_behind(client, now)
    while pace.waits_for(client, now):
        pace.hold(OLDEST, now)
        now += 0.1
    pace.release(now)
    pace.forget(client)
    return now - began


def test_after_one_that_took_nothing_the_next_is_waited_for_a_tenth_of_the_time():
    pace = Pace(5.0)
    assert held(pace, "first", 0.0) == pytest.approx(LONGEST, abs=0.2)
    assert held(pace, "second", LONGEST) == pytest.approx(0.1 * LONGEST, abs=0.3)


def test_the_shared_credit_comes_back_in_the_course_of_two_minutes():
    pace = Pace(5.0)
    held(pace, "first", 0.0)
    assert held(pace, "second", 2 * 60.0) == pytest.approx(LONGEST, abs=0.2)


def test_peers_that_connect_anew_and_take_nothing_cost_an_eighth_of_the_time():
    pace, now, lost = Pace(5.0), 0.0, 0.0
    while now < 600.0:
        lost_now = held(pace, f"at {now}", now)
        lost, now = lost + lost_now, now + max(10.0, lost_now)
    assert lost < 1.2 * LONGEST + 600.0 / 8


def test_a_pause_that_is_made_good_costs_no_credit():
    pace = after([BEHIND])
    for second in range(8, 800, 8):
        pace.hold(OLDEST, second - 8.0)
        pace.pay("client", MAX_LUMP, OLDEST, float(second))
    assert held(pace, "another", 800.0) == pytest.approx(LONGEST, abs=0.2)


def test_a_pause_that_held_up_nobody_costs_no_credit():
    pace = after([BEHIND])
    pace.forget("client")
    assert held(pace, "another", 60.0) == pytest.approx(LONGEST, abs=0.2)


def test_those_that_take_nothing_one_after_the_other_share_one_pause():
    """As clients do that resume at the oldest frame: it is the same one that is held for each."""
    pace = Pace(5.0)
    clients = []
    for second in range(60):
        if second % 10 == 0:
            clients.append(second)
            pace.fall_behind(second, float(second))
        if not any(pace.waits_for(client, float(second)) for client in clients):
            break
        pace.hold(OLDEST, float(second))
    assert LONGEST < second < 1.2 * LONGEST


def test_a_pause_that_is_partly_made_good_costs_the_rest():
    pace = after([BEHIND])
    pace.hold(OLDEST, 0.0)
    pace.pay("client", 4 * MIN_RATE, OLDEST, 10.0)
    assert held(pace, "another", 10.0) == pytest.approx(LONGEST - 5.0 + 0.9, abs=0.2)


def test_a_pause_is_not_made_good_by_clients_that_do_not_hold_up_the_source():
    pace = after([BEHIND])
    pace.hold(OLDEST, 0.0)
    pace.pay("client", MAX_LUMP, LATER, 8.0)
    pace.release(10.0)
    assert held(pace, "another", 10.0) < 0.5 * LONGEST


def test_the_time_after_the_slowest_has_moved_is_not_lost():
    """The source wakes up a moment later: of a fast pipe, these moments are a good part."""
    pace = after([BEHIND])
    pace.hold(OLDEST, 0.0)
    pace.pay("client", MIN_RATE, OLDEST, 1.0)
    pace.release(10.0)
    assert held(pace, "another", 10.0) == pytest.approx(LONGEST, abs=0.2)


def test_when_the_source_waits_for_the_next_what_the_last_has_cost_is_taken():
    pace = after([BEHIND])
    pace.hold(OLDEST, 0.0)
    pace.hold(LATER, 10.0)
    assert not pace.waits_for("client", 10.0)


def deaf_ones_use_up_the_credit(pace: Pace, now: float) -> float:
    """Hold up a source by some that take nothing, beside a client that does. Return when it ends.
    """
    for number in range(5):
        now += held(pace, f"deaf {number}", now)
        pace.pay("client", MAX_LUMP * 2, LATER, now)
    return now


def test_a_slow_reader_that_is_steady_is_waited_for_though_others_have_used_up_the_credit():
    pace = after([BEHIND, (8.0, "pay", MAX_LUMP)])
    now = deaf_ones_use_up_the_credit(pace, 8.0)
    pace.fall_behind("new", now)
    assert pace.waits_for("client", now + 5.6) and not pace.waits_for("new", now + 5.6)


@pytest.mark.parametrize("owed, is_waited_for", [(0.0, True), (60.0, False)])
def test_one_that_falls_behind_again_is_trusted_if_it_has_paid_its_debts(owed, is_waited_for):
    pace = after([BEHIND, (8.0, "pay", MAX_LUMP)])
    now = deaf_ones_use_up_the_credit(pace, 8.0) + owed
    pace.catch_up("client", now)
    pace.fall_behind("client", now + 1.0)
    assert pace.waits_for("client", now + 1.0 + 8.0) is is_waited_for
