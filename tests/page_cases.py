"""What the page's parser must make of bytes: the rules of WHATWG HTML 9.2.6, one case a line.

Each case is a name, the stream's bytes, the events (name, data, id) that it must make, and what
else it says: the last id, the values of `retry`, and the comments.
"""
from typing import List, NamedTuple, Tuple

Seen = Tuple[str, str, str]     # name, data, id


class Case(NamedTuple):
    name: str
    sent: bytes
    events: List[Seen]
    last_id: str = ""
    retries: Tuple[int, ...] = ()
    comments: Tuple[str, ...] = ()


def one(data: str, name: str = "message", last_id: str = "") -> List[Seen]:
    return [(name, data, last_id)]


CASES = [
    Case("nothing", b"", []),
    Case("one event", b"data: a\n\n", one("a")),
    Case("ends of lines: LF", b"data: a\ndata: b\n\n", one("a\nb")),
    Case("ends of lines: CR", b"data: a\rdata: b\r\r", one("a\nb")),
    Case("ends of lines: CRLF", b"data: a\r\ndata: b\r\n\r\n", one("a\nb")),
    Case("ends of lines: all in one", b"data: a\r\ndata: b\rdata: c\n\r", one("a\nb\nc")),
    Case("LF then CR are two ends", b"data: a\n\rdata: b\n\n", one("a") + one("b")),
    Case("CR CRLF are two ends", b"data: a\r\r\ndata: b\n\n", one("a") + one("b")),
    Case("CRLF CR, and a LF that belongs to it", b"data: a\r\n\r\ndata: b\r\n\r\n",
         one("a") + one("b")),
    Case("a lone CR ends the block at once", b"data: a\r\r", one("a")),
    Case("form feed, NEL and the line separator end no line",
         "data: a\x0b\x0c\x1c\x85\u2028\u2029b\n\n".encode(),
         one("a\x0b\x0c\x1c\x85\u2028\u2029b")),
    Case("no blank line, no event", b"data: a\n", []),
    Case("the rest at the end is dropped", b"data: a\n\ndata: b\ndata: c", one("a")),
    Case("blank lines alone", b"\n\r\r\n\n", []),
    Case("a name alone makes no event and is forgotten", b"event: x\n\ndata: a\n\n", one("a")),
    Case("a name", b"event: x\ndata: a\n\ndata: b\n\n", one("a", "x") + one("b")),
    Case("the last name counts", b"event: x\nevent: y\ndata: a\n\n", one("a", "y")),
    Case("an empty name is none", b"event: x\nevent:\ndata: a\n\n", one("a")),
    Case("a name after its data", b"data: a\nevent: x\n\n", one("a", "x")),
    Case("names of JavaScript's own", b"event: __proto__\ndata: a\n\nevent: constructor\ndata\n\n",
         one("a", "__proto__") + one("", "constructor")),
    Case("one space after the colon is dropped, no more",
         b"data:a\ndata: b\ndata:  c\ndata:\td\ndata:e \n\n", one("a\nb\n c\n\td\ne ")),
    Case("a space before the colon makes another field", b"data : a\ndata: b\n\n", one("b")),
    Case("a colon in the value", b"data: a: b:c\n\n", one("a: b:c")),
    Case("no colon: an empty value", b"data\n\n", one("")),
    Case("two empty lines of data", b"data\ndata:\n\n", one("\n")),
    Case("data that is empty is still an event", b"data:\n\n", one("")),
    Case("only a space", b"data: \n\n", one("")),
    Case("names of fields are exact", b"Data: a\nDATA: b\n data: c\ndata: d\n\n", one("d")),
    Case("unknown fields", b"foo: a\ndata: b\nbar\n\n", one("b")),
    Case("comments", b": a\n:b\n:\ndata: c\n: data: d\n\n", one("c"),
         comments=(" a", "b", "", " data: d")),
    Case("a comment makes no event", b": a\n\n", [], comments=(" a",)),
    Case("an id stays", b"id: 1\ndata: a\n\ndata: b\n\n", one("a", last_id="1")
         + one("b", last_id="1"), "1"),
    Case("an empty id takes it back", b"id: 1\ndata: a\n\nid\ndata: b\n\n",
         one("a", last_id="1") + one("b")),
    Case("an id with NUL is ignored", b"id: 1\nid: 2\0\ndata: a\n\n", one("a", last_id="1"), "1"),
    Case("an id without data counts", b"id: 1\n\n", [], "1"),
    Case("an id whose block has not ended does not count yet", b"data: a\n\nid: 1\n", one("a")),
    Case("an id that is no number", "id: grüße 你好\ndata: a\n\n".encode(),
         one("a", last_id="grüße 你好"), "grüße 你好"),
    Case("retry", b"retry: 1000\n\nretry: 0\nretry:2\n", [], retries=(1000, 0, 2)),
    Case("what is no retry", b"retry: 1000x\nretry: -1\nretry: 1.5\nretry\nretry: 1e3\n"
         b"retry:  5\nretry: 0x10\n" + "retry: ٣\n".encode(), []),
    Case("a byte order mark at the start", b"\xef\xbb\xbfdata: a\n\n", one("a")),
    Case("a second one belongs to the field's name", b"\xef\xbb\xbf\xef\xbb\xbfdata: a\n\n", []),
    Case("one in the data stays", b"data: \xef\xbb\xbfa\n\n", one("\ufeffa")),
    Case("one at the start of another line", b"data: a\n\xef\xbb\xbfdata: b\n\n", one("a")),
    Case("half of one is no mark", b"\xef\xbbdata: a\n\ndata: b\n\n", one("b")),
    Case("NUL in data", b"data: a\0b\n\n", one("a\0b")),
    Case("characters of two, three, four bytes", "data: é你🎉\n\n".encode(), one("é你🎉")),
    Case("bytes that are no UTF-8", b"data: a\xff\xc3(\xe4\xbd\ndata: b\n\n",
         one("a\ufffd\ufffd(\ufffd\nb")),
    Case("half a character before a line's end", b"data: \xf0\x9f\x8e\r\ndata: b\n\n",
         one("\ufffd\nb")),
    Case("a long line", b"data: " + b"x" * 20000 + b"\n\n", one("x" * 20000)),
    Case("many lines", b"data: x\n" * 2000 + b"\n", one("\n".join(["x"] * 2000))),
    Case("many events", b"data: x\n\n" * 500, one("x") * 500),
]
