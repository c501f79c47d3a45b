"""Arguments that cannot be meant are refused at once, with a sentence."""
import configparser
import os
import socket
import sys
import sysconfig
from pathlib import Path

import pytest

import sse_server
from helpers import GET, PATIENCE, TOP, need_ipv6
from sse_server import SSEServer


LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux shares a port")


@pytest.mark.parametrize("options, said", [
    ({"tokens": "secret"}, "list of strings"), ({"publish_tokens": "secret"}, "list of strings"),
    ({"origins": "https://x.test"}, "list of strings"), ({"tokens": [" x"]}, "white space"),
    ({"tokens": [""]}, "empty"), ({"key": "key.pem"}, "key needs cert"),
    ({"port": 70000}, "port is not"), ({"port": "6500"}, "port is not"),
    ({"history": 1.5}, "whole number"), ({"history": -1}, "numbers from 0 on"),
    ({"authorize": "no"}, "not a function"), ({"host": ""}, "host is empty"),
    ({"stream": "x"}, "stream needs redis"), ({"sync": True}, "sync needs history_file"),
    ({"redis": "redis://x", "history_file": "x"}, "cannot be combined"),
    ({"jwt_key": "short"}, "32 bytes"), ({"heartbeat": -1}, "heartbeat"),
    ({"allowed_hosts": ["a/b"]}, "write a in place of 'a/b'"),
    ({"jwt_key": ""}, "jwt_key is empty: was a variable not set"), ({"cert": ""}, "cert is empty"),
    ({"key": ""}, "key is empty"), ({"redis": ""}, "redis is empty"),
    ({"stream": ""}, "stream is empty"), ({"history_file": ""}, "history_file is empty"),
    ({"origins": [""]}, "the origin ''"), ({"allowed_hosts": [""]}, "in place of ''"),
    ({"publish_tokens": [""]}, "publish_tokens: one is empty"),
    pytest.param({"reuse_port": True}, "reuse_port needs history_file or redis", marks=LINUX)])
def test_an_option_that_cannot_be_meant_is_refused_with_a_sentence(options, said):
    with pytest.raises((ValueError, TypeError), match=said):
        SSEServer(**{"port": 0, **options})


@pytest.mark.parametrize("event, said", [
    (({"a": 1},), "json.dumps"), ((b"x",), "json.dumps"), ((None,), "json.dumps"),
    ((1,), "json.dumps"), (("x", 1), "strings"), (("x", None, ["a"]), "strings")])
def test_an_argument_that_is_no_text_is_a_type_error(event, said):
    with SSEServer(port=0) as server, pytest.raises(TypeError, match=said):
        server.publish(*event)


def test_the_page_is_looked_for_where_it_is_installed():
    setup = configparser.ConfigParser()
    setup.read(TOP / "setup.cfg")
    (folder, names), = setup["options.data_files"].items()
    for where in (sysconfig.get_path("data"), sysconfig.get_path("data", f"{os.name}_user")):
        assert Path(where, folder, names) in sse_server._PAGES
    assert sse_server._PAGES[0] == TOP / "index.html"


def test_the_brackets_of_an_address_are_taken_off():
    with SSEServer("[127.0.0.1]", 0) as server:
        assert server.url.startswith("http://127.0.0.1:")


@pytest.mark.parametrize("host", ["[127.0.0.12", "7127.0.0.1]"])
def test_half_a_pair_of_brackets_is_no_address(host):
    with pytest.raises(OSError):
        SSEServer(host, 0)


def test_an_ipv6_address_may_have_its_brackets():
    need_ipv6()
    with SSEServer("[::1]", 0) as server:
        assert server.url.startswith("http://[::1]:")


def addresses(*found):
    """Return a resolver that finds these addresses for any name."""
    def getaddrinfo(host, port, **_):
        return [(socket.AF_INET6 if ":" in each else socket.AF_INET, socket.SOCK_STREAM, 6, "",
                 (each, port, 0, 0) if ":" in each else (each, port)) for each in found]
    return getaddrinfo


@pytest.mark.parametrize("found, host", [
    (["192.0.2.1", "127.0.0.1"], "127.0.0.1"), (["2001:db8::1", "::1"], "::1"),
    (["192.0.2.1", "::1"], "::1"), (["::1", "127.0.0.1"], "127.0.0.1")])
def test_every_address_of_a_name_is_tried_ipv4_first(monkeypatch, found, host):
    with SSEServer("localhost", 0) as server:
        assert server.url.startswith(("http://127.0.0.1:", "http://[::1]:"))
    if ":" in host:
        need_ipv6()
    with monkeypatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", addresses(*found))
        server = SSEServer("a.test", 0)
    with server:
        assert server.server_address[0] == host
        with socket.create_connection((host, server.port), PATIENCE) as sock:
            sock.sendall(GET)
            assert sock.recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_name_of_no_address_here_is_refused_and_a_busy_address_is_not_left_for_another(
        monkeypatch):
    """Who connects to the busy one would meet another program, and take it for this server."""
    monkeypatch.setattr(socket, "getaddrinfo", addresses("192.0.2.1", "2001:db8::1"))
    with pytest.raises(OSError, match="cannot listen on a.test port 0: "):
        SSEServer("a.test", 0)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        monkeypatch.setattr(socket, "getaddrinfo", addresses("127.0.0.1", "127.0.0.2"))
        with pytest.raises(OSError, match="cannot listen on a.test"):
            SSEServer("a.test", busy.getsockname()[1])
