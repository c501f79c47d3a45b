"""Turn the files of a certificate into TLS sockets that behave like plain ones.

The rest of the server knows no TLS but for the handshake. It sends and receives on non-blocking
sockets, and expects BlockingIOError from one that is not ready. TLSSocket raises that, and hides
the two ways in which OpenSSL is different: it must be offered the same bytes again, and a stream
needs an end of its own.
"""
from __future__ import annotations

import logging
import os
import ssl
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, NoReturn, TypeVar, Union

# Seconds between two checks whether the files of a certificate have changed, at least.
LOOK_INTERVAL = 1.0

# Bytes of data in a TLS record, at most (RFC 8446 section 5.1).
RECORD = 16 << 10

# Of an encrypted key: itself, or what is called to get it.
Password = Union[str, Callable[[], str]]
T = TypeVar("T")

logger = logging.getLogger("sse_server")


class TLSSocket(ssl.SSLSocket):
    """A TLS socket that raises BlockingIOError where a plain one does, and wants no bytes again.

    OpenSSL encrypts a record before it finds the socket full, and must be offered the same data
    again (SSL_write(3), the notes on retries). So that record is kept, and all but its last byte
    is reported as sent. The caller comes back with that byte, and needs to know nothing of it.
    """

    # The data of a record that OpenSSL has encrypted and the socket has not taken.
    _begun = b""

    def send(self, data: Any, flags: int = 0) -> int:
        """Send at most RECORD bytes, and return how many of them the socket took.

        Raises BlockingIOError if it took none, and OSError if the connection is gone.
        """
        if self._begun:
            # What the caller offers now begins with the last byte of that record.
            self._offer(self._begun)
            self._begun = b""
            return 1
        # One record, of which OpenSSL takes all or nothing. A copy, because it may be offered again
        # when the caller's buffer is gone.
        piece = bytes(data[:RECORD])
        try:
            return self._offer(piece)
        except BlockingIOError:
            self._begun = piece
            # Of a single byte, nothing can be reported as sent.
            if len(piece) == 1:
                raise
            return len(piece) - 1

    def recv(self, size: int = 1024, flags: int = 0) -> bytes:
        """Receive as a plain socket does. b"" is the end, with or without close_notify."""
        return self._call(super().recv, size, flags)

    def shutdown(self, how: int) -> None:
        """Send close_notify, which the end of a TLS stream needs, and shut down. Never waits.

        See RFC 9112 section 9.8. After a record that was not sent whole there is no close_notify.
        """
        if not self._begun:
            # The peer's own close_notify is not waited for, which is what the error says.
            with suppress(OSError):
                self.unwrap()
        super().shutdown(how)

    def _offer(self, data: bytes) -> int:
        return self._call(super().send, data)

    def _call(self, method: Callable[..., T], *arguments: object) -> T:
        """Call a method of the base class, and raise what a plain socket would."""
        try:
            return method(*arguments)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None


class Certificate:
    """A certificate and its key in files, which are loaded again when they have changed.

    They are checked at a handshake, once a second at most, so that no thread and no signal is
    needed. Tools that renew certificates write one file after the other: in between, the two do not
    fit together, there is one warning, and the old certificate stays. Clients that are connected
    keep the one they were shown.

    cert, key, password: see SSEServer. Raises ValueError if they cannot be used at the start.
    """

    def __init__(self, cert: str, key: str | None, password: Password | None) -> None:
        # Paths. Without the second, the key is in the first.
        self._cert = cert
        self._key = key
        self._password = password

        # What the files looked like, and when to look again, on time.monotonic. Looked at before
        # they are loaded: a change in between is noticed the next time. All that changes belongs to
        # the thread that does handshakes.
        self._seen = self._look()
        self._look_at = time.monotonic() + LOOK_INTERVAL

        # Never changed once it is in use. A changed certificate gets a context of its own.
        self._context = self._load()

    def context(self) -> ssl.SSLContext:
        """Return the context for the next handshake. Only the thread that does these may call it.
        """
        if time.monotonic() >= self._look_at:
            self._look_at = time.monotonic() + LOOK_INTERVAL
            seen, self._seen = self._seen, self._look()
            try:
                if self._seen != seen:
                    self._context = self._load()
                    logger.info("%s has changed: its certificate is served from now on", self._cert)
            except ValueError as error:
                logger.warning("%s; the old certificate is served on", error)
        return self._context

    def _look(self) -> list[tuple[int, int]]:
        """Return what changes when a file is written or replaced. Nothing, if one is missing.

        Of a symbolic link, that is what it points to.
        """
        with suppress(OSError):
            states = [os.stat(path) for path in (self._cert, self._key or self._cert)]
            return [(each.st_ino, each.st_ctime_ns) for each in states]
        return []

    def _load(self) -> ssl.SSLContext:
        """Return a context with what is in the files now. Raises ValueError, which names them."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # What came before is forbidden by RFC 8996.
        context.minimum_version = ssl.TLSVersion.TLSv1_2

        # What its `wrap_socket` makes.
        context.sslsocket_class = TLSSocket
        try:
            context.load_cert_chain(self._cert, self._key, self._password or _no_password)
        except OSError as error:
            files = " and ".join(filter(None, (self._cert, self._key)))
            raise ValueError(f"cannot use {files}: {self._why(error)}") from None
        return context

    def _why(self, error: OSError) -> str:
        """Say in words why the files cannot be used. OpenSSL says `PEM lib`, whatever it is."""
        if not isinstance(error, ssl.SSLError):
            return error.strerror or str(error)
        # Two files that were mixed up, or the first half of a renewal.
        if error.reason == "KEY_VALUES_MISMATCH":
            return "the key is that of another certificate"
        # The key may stand in the file of the certificate.
        if not self._key and b"PRIVATE KEY-----" not in Path(self._cert).read_bytes():
            return "it holds no private key, and --key is missing"
        return "not PEM, or the password of the key is wrong"


def _no_password() -> NoReturn:
    """Raise ValueError where OpenSSL would ask at whatever terminal there is."""
    raise ValueError("the key of the certificate is encrypted: its password is typed at a terminal,"
                     " or given as key_password")
