"""Channels: an event reaches those who asked for its channel, however published, and as it was."""
import json
import random

import pytest
import requests

from helpers import PATIENCE, PUBLISH_TOKEN, Client, ask, get, post, wait_until
from wire import Decoder


def test_a_client_gets_its_channels_and_what_is_for_everyone_live_and_on_resume(open_server):
    def client(path, last_id=None):
        header = f"Last-Event-ID: {last_id}\r\n" if last_id else ""
        return Client(open_server.port, f"GET {path} HTTP/1.1\r\nHost: x\r\n{header}\r\n".encode())
    with client("/") as every, client("/?channel=a") as a, \
            client("/?channel=a&channel=b%20c") as both:
        every.open(), a.open(), both.open()
        ids = [open_server.publish("1")]
        answer = post(open_server.port, f"/{PUBLISH_TOKEN}?channel=a", b"2")
        ids.append(json.loads(answer.partition(b"\r\n\r\n")[2])["id"])
        ids.append(open_server.publish("3", channel="b c"))
        ids.append(open_server.publish("4"))
        for each, number, expected in ((every, 2, "14"), (a, 3, "124"), (both, 4, "1234")):
            assert "".join(event.data for event in each.read_events(number)) == expected
    with client("/?channel=b%20c", ids[0]) as back:
        assert "".join(event.data for event in back.read_events(2)) == "34"
    with client("/", ids[0]) as back:
        assert "".join(event.data for event in back.read_events(1)) == "4"
    assert ask(open_server.port, get("/?channel=a%0A")).startswith(b"HTTP/1.1 400 ")


def test_every_event_arrives_as_it_was_published(open_server):
    """Random Unicode for data, names and channels, by the library and by POST."""
    seed = random.randrange(1 << 32)
    draw = random.Random(seed)

    def text(least=0, forbidden=""):
        alphabet = "\r\n\0: \t\x0b\x85\u2028\ufeff\U0001f600é%&=+#?/ab"
        others = range(32, 0xd800), range(0xe000, 0x110000)
        letters = [draw.choice(alphabet) if draw.random() < 0.6
                   else chr(draw.choice(draw.choice(others)))
                   for _ in range(draw.randrange(least, 12))]
        return "".join(letter for letter in letters if letter not in forbidden) or "x" * least
    names = [text(1, "\r\n\0") for _ in range(8)]
    session = requests.Session()
    with session, requests.get(open_server.url, params={"channel": names}, stream=True,
                               timeout=PATIENCE) as watching:
        wait_until(lambda: open_server.clients == 1)
        sent = []
        for number in range(200):
            data, event = text(), draw.choice([None, text(1, "\r\n\0")])
            channel = draw.choice([None, *names])
            if number % 2:
                open_server.publish(data, event, channel)
            else:
                given = {"event": event, "channel": channel}
                given = {name: value for name, value in given.items() if value is not None}
                session.post(f"{open_server.url}/{PUBLISH_TOKEN}", params=given,
                             data=data.encode(), timeout=PATIENCE).raise_for_status()
            sent.append((event or "message", data.replace("\r\n", "\n").replace("\r", "\n")))
        decoder = Decoder(chunked=False)        # requests has taken the chunks off
        decoder.feed(b"HTTP/1.1 200 OK\r\n\r\n")
        for piece in watching.iter_content(None):
            decoder.feed(piece)
            if len(decoder.events) == len(sent):
                break
        assert [(event.name, event.data) for event in decoder.events] == sent, f"seed {seed}"


def asked(channels: list) -> bytes:
    return get("/?" + "&".join(f"channel={each}" for each in channels), method="HEAD")


@pytest.mark.parametrize("channels, status", [
    ([f"c{number}" for number in range(32)], 200), ([f"c{number}" for number in range(33)], 400),
    (["c"] * 33, 400), (["x" * 1024], 200), (["x" * 1025], 400), (["x" * 512, "y" * 512], 200),
    (["x" * 512, "y" * 513], 400), (["%C3%A4" * 600], 400), (["%C3%A4" * 512], 200), ([""], 400)])
def test_a_client_has_so_many_channels_and_characters_of_their_names(open_server, channels, status):
    answer = ask(open_server.port, asked(channels))
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    if status == 400 and channels != [""] and "%" not in channels[0]:
        assert b"at most 32 channels, with at most 1024 characters in all" in ask(
            open_server.port, asked(channels).replace(b"HEAD", b"GET"))
