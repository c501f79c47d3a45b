"""TLS: all as without it; records and handshakes hold up nobody; files that are no use are told."""
import logging
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests

from helpers import (GET, PATIENCE, TOP, Client, SecureClient, connect, make_certificate, serving,
                     unfinished, wait_until)
from sse_core.http import connections, tls
from sse_server import SSEServer


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def secure(certificate):
    with SSEServer(port=0, cert=certificate[0], key=certificate[1], publish_tokens=["t"],
                   history=1024) as server:
        yield server


def test_tls_streams_resumes_and_takes_posts_with_a_verified_certificate(secure, certificate):
    url = f"https://localhost:{secure.port}/"
    with requests.Session() as session:
        session.verify, session.trust_env = certificate[0], False
        page = session.get(url, headers={"Accept": "text/html"}, timeout=PATIENCE).text
        assert page.startswith("<!DOCTYPE html>")
        ids = [session.post(url + "t", data=str(n), timeout=PATIENCE).json()["id"]
               for n in range(20)]
        with session.get(url, stream=True, headers={"Last-Event-ID": ids[9]},
                         timeout=PATIENCE) as response:
            lines = response.iter_lines()
            got = [next(line for line in lines if line.startswith(b"data: ")) for _ in range(10)]
            assert got == [b"data: %d" % n for n in range(10, 20)]
            secure.stop()
            assert all(line[:4] in (b"", b"id: ", b"data") for line in lines)   # an orderly end


def test_the_orderly_end_of_a_tls_stream_is_told_by_close_notify(secure):
    """Without it, a client cannot tell an end from a cut (RFC 9112 section 9.8)."""
    with SecureClient(secure.port) as client:
        secure.publish("x")
        client.open()
        secure.stop()
        assert client.read_to_end().ended


def test_a_tls_client_that_reads_slowly_and_is_lapped_gets_whole_frames(secure):
    """The socket is full in the middle of TLS records, again and again."""
    with SecureClient(secure.port, receive_buffer=4096) as slow, SecureClient(secure.port) as fast:
        slow.open(), fast.open()
        wait_until(lambda: secure.clients == 2)
        for number in range(3000):
            secure.publish(f"{number} " + "x" * 2000)
            gapless = not any(event.name == "gap" for event in fast.stream.events)
            fast.read_events(number + 1 if gapless else 0)
            if number % 100 == 0:
                slow.receive(1000)
        slow.read_until(lambda stream: stream.events and stream.events[-1].data.startswith("2999 "))
        events = slow.stream.events
        assert any(event.name == "gap" for event in events)
        expected = 0
        for event in events:
            if event.name == "gap":
                expected = None
            else:
                value = int(event.data.split()[0])
                assert expected in (None, value)
                expected = value + 1


def test_many_tls_clients_at_once_are_all_served(certificate):
    served = []

    def visit(port):
        with SecureClient(port) as client:
            client.open()
            served.append(client.stream.status)
    with SSEServer(port=0, cert=certificate[0], key=certificate[1]) as server:
        threads = [threading.Thread(target=visit, args=(server.port,)) for _ in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert served == [200] * 40


@pytest.mark.parametrize("stage", ["silent", "half", "whole"])
def test_handshakes_that_stop_in_the_middle_hold_up_nobody(secure, stage):
    stalled = [SecureClient(secure.port, b"") if stage == "whole" else Client(secure.port, b"")
               for _ in range(50)]
    for client in stalled:
        if stage == "half":
            client.sock.sendall(b"\x16\x03\x01")
    wait_until(lambda: unfinished(secure) == 50)
    began = time.monotonic()
    with SecureClient(secure.port) as client:
        assert client.open().stream.status == 200
    assert time.monotonic() - began < 5
    for client in stalled:
        client.close()


def test_a_silent_tls_handshake_holds_up_nobody_and_is_cut(secure, monkeypatch):
    monkeypatch.setattr(connections, "REQUEST_TIME", 0.3)
    with connect(secure.port) as silent, SecureClient(secure.port) as client:
        client.open()
        assert silent.recv(1) == b""


def test_a_client_that_closes_without_a_byte_is_no_fault_of_tls(secure, caplog):
    caplog.set_level(logging.DEBUG)
    with connect(secure.port):
        wait_until(lambda: unfinished(secure))
    wait_until(lambda: not unfinished(secure) and caplog.messages)
    message, = caplog.messages
    assert message.endswith("left during its request: it sent nothing")


def test_a_record_that_came_in_part_costs_no_client(secure):
    with SecureClient(secure.port) as client:
        client.open()
        socket.socket.send(client.sock, b"\x17\x03\x03")        # below TLS: how a record begins
        for number in (1, 2):
            secure.publish(str(number))
            client.read_events(number)
        assert secure.clients == 1


def test_plain_on_a_tls_port_and_tls_on_a_plain_port_are_turned_away(certificate):
    arguments = ("--verbose", "--interval", "100")
    with serving(*arguments, "--cert", certificate[0], "--key", certificate[1]) as server:
        assert f"https://127.0.0.1:{server.port}" in server.output.decode()
        with connect(server.port) as sock:
            sock.sendall(GET)
            try:
                assert not sock.recv(1000).startswith(b"HTTP")
            except ConnectionResetError:        # closed with our request unread
                pass
        server.stop()
        assert len(server.peer_lines()) == 1
    with serving(*arguments) as server:
        with pytest.raises(ssl.SSLError):
            SecureClient(server.port)
        server.stop()
        assert len(server.peer_lines()) == 1


def one_line_and_status_2(*arguments) -> str:
    """Run the server with flags that it must refuse, and return what it says."""
    done = subprocess.run([sys.executable, TOP / "sse_server.py", "--port", "0", *arguments],
                          capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          timeout=PATIENCE)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.parametrize("arguments, said", [
    (["--cert", "/nowhere"], "cannot use /nowhere"), (["--key", "x"], "key needs --cert"),
    (["--cert", str(TOP / "Makefile")], "cannot use "),
    (["--token", ""], "--token: one is empty"),
    (["--origin", "example.org"], "no browser sends the origin 'example.org'")])
def test_options_that_would_protect_nothing_are_one_line_and_status_2(arguments, said):
    assert said in one_line_and_status_2(*arguments)


def test_a_certificate_without_its_key_says_what_is_missing(certificate):
    said = one_line_and_status_2("--cert", certificate[0])
    assert f"cannot use {certificate[0]}: it holds no private key, and --key is missing" in said


@pytest.fixture(scope="module")
def locked(certificate, tmp_path_factory):
    """A key that is encrypted with the password `x`."""
    path = tmp_path_factory.mktemp("locked") / "locked.pem"
    subprocess.run(["openssl", "ec", "-in", certificate[1], "-aes256", "-passout", "pass:x",
                    "-out", path], check=True, capture_output=True)
    return str(path)


def test_an_encrypted_key_is_one_line_and_no_prompt_where_no_terminal_is(certificate, locked):
    assert "encrypted" in one_line_and_status_2("--cert", certificate[0], "--key", locked)


@pytest.mark.parametrize("password", ["x", lambda: "x"])
def test_a_program_may_give_the_password_of_an_encrypted_key(certificate, locked, password):
    with SSEServer(port=0, cert=certificate[0], key=locked, key_password=password) as server:
        with SecureClient(server.port) as client:
            client.open()
    with pytest.raises(ValueError, match="locked.pem: .* password of the key is wrong"):
        SSEServer(port=0, cert=certificate[0], key=locked, key_password="y")
    with pytest.raises(ValueError, match="encrypted: .* key_password"):
        SSEServer(port=0, cert=certificate[0], key=locked)


# A certificate that changes

def served(port: int) -> bytes:
    """Return the certificate that a new client is shown."""
    with SecureClient(port) as client:
        return client.sock.getpeercert(binary_form=True)


def in_files(cert: Path) -> bytes:
    return ssl.PEM_cert_to_DER_cert(cert.read_text())


@pytest.fixture
def renewals(tmp_path, monkeypatch):
    """Two certificates with their keys, the first of which is copied to where a server has it."""
    monkeypatch.setattr(tls, "LOOK_INTERVAL", 0.02)
    made = []
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        made.append([Path(path) for path in make_certificate(tmp_path / name)])
    live = [tmp_path / "cert.pem", tmp_path / "key.pem"]
    for source, target in zip(made[0], live):
        shutil.copy(source, target)
    return live, made[1]


def put(source: Path, target: Path) -> None:
    """Replace a file as tools that renew certificates do."""
    copy = target.with_suffix(".new")
    shutil.copy(source, copy)
    os.replace(copy, target)


def test_a_changed_certificate_is_served_without_a_restart(renewals):
    (cert, key), new = renewals
    with SSEServer(port=0, cert=str(cert), key=str(key)) as server, \
            SecureClient(server.port) as client:
        client.open()
        assert served(server.port) == in_files(cert) != in_files(new[0])
        put(new[1], key), put(new[0], cert)
        wait_until(lambda: served(server.port) == in_files(new[0]))
        server.publish("to who was there before")
        client.read_events(1)


def test_a_certificate_that_cannot_be_loaded_is_one_warning_and_the_old_one_stays(renewals, caplog):
    (cert, key), new = renewals
    old = in_files(cert)
    caplog.set_level(logging.INFO, "sse_server")
    with SSEServer(port=0, cert=str(cert), key=str(key)) as server:
        def is_told(text: str) -> bool:
            assert served(server.port) == old
            return any(text in message for message in caplog.messages)
        cert.write_text("half a certif")
        wait_until(lambda: is_told("cannot use"))
        # The time of some more looks: that no more is told is what is tested.
        time.sleep(0.1)
        assert served(server.port) == old and len(caplog.messages) == 1
        assert caplog.messages[0].endswith("; the old certificate is served on")
        cert.unlink()
        wait_until(lambda: is_told("No such file"))
        # Its key is still to come
        put(new[0], cert)
        wait_until(lambda: is_told("that of another certificate"))
        put(new[1], key)
        wait_until(lambda: served(server.port) == in_files(new[0]))
    assert any("has changed: its certificate is served" in each for each in caplog.messages)


def test_a_service_that_is_told_to_reload_by_sighup_serves_the_new_certificate(renewals):
    """It was stopped. A terminal that closes sends the same, and still ends the server."""
    (cert, key), new = renewals
    before = "import os; os.setsid(); from sse_core.http import tls; tls.LOOK_INTERVAL = 0.02"
    with serving("--interval", "0.05", "--cert", str(cert), "--key", str(key),
                 before=before) as server, SecureClient(server.port) as client:
        count = len(client.read_events(1))
        put(new[1], key), put(new[0], cert)
        server.process.send_signal(signal.SIGHUP)
        wait_until(lambda: served(server.port) == in_files(new[0]))
        client.read_events(count + 3)
        assert server.stop() == 0
