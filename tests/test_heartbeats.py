"""A client that was sent nothing is sent a heartbeat, between frames."""
from bench import HEAD
from sse_core.engine import frames


def test_a_heartbeat_goes_only_to_clients_that_were_sent_nothing(bench):
    b = bench(heartbeat=10.0)
    early = b.peer()
    b.turn()
    b.pass_time(6)
    late = b.peer()
    b.pass_time(6)
    assert (early.take().comments, late.take().comments) == (1, 0)
    b.pass_time(6)
    assert (early.take().comments, late.take().comments) == (1, 1)
    for _ in range(8):
        b.publish("x")
        b.turn()
        b.pass_time(5)
    assert (early.take().comments, late.take().comments) == (1, 1)
    assert early.stream.last_id == ""


def test_a_client_that_took_a_whole_heartbeat_does_not_lag(bench):
    b = bench(heartbeat=10.0)
    peer = b.peer()
    b.turn()
    b.now += 20
    b.turn()
    assert peer.take().comments == 1 and b.publisher.stats()["lagging"] == 0


def test_a_heartbeat_over_http_1_0_is_a_comment_without_a_chunk(bench):
    b = bench(heartbeat=10.0)
    plain = b.peer(chunked=False)
    b.turn()
    b.pass_time(25)
    assert plain.take().comments == 2 and plain.raw == HEAD + b":\n" * 2


def test_no_heartbeat_is_sent_inside_a_frame_or_if_turned_off(bench):
    b = bench(heartbeat=1.0)
    narrow = b.peer(narrow=True)
    narrow.server_end.room = len(HEAD) + 20
    b.publish("hello")
    b.turn()
    b.pass_time(20)
    narrow.server_end.room = 1 << 20
    b.turn()
    assert narrow.data() == ["hello"] and narrow.stream.comments == 0
    quiet = bench(heartbeat=0.0)
    peer = quiet.peer()
    quiet.turn()
    quiet.pass_time(300, step=10)
    assert peer.take().comments == 0


def test_a_heartbeat_cut_in_two_is_finished_before_the_next_frame(bench):
    length = len(frames.HEARTBEAT)
    for cut in range(length + 1):
        b = bench(heartbeat=10.0, history=10)
        narrow = b.peer(narrow=True)
        narrow.server_end.room = 1 << 20
        b.turn()
        id = b.publish("first")
        b.turn()
        narrow.server_end.room = cut
        b.pass_time(11)
        b.publish("second")
        b.turn()
        narrow.server_end.room = 1 << 20
        b.turn(2)
        assert narrow.data() == ["first", "second"] and narrow.stream.comments == 1
        assert narrow.stream.events[0].id == id
