"""Turn a certificate into TLS sockets that behave like plain ones."""
from __future__ import annotations

import ssl
from contextlib import suppress
from typing import Any, NoReturn

RECORD = 16 << 10           # bytes of data in a TLS record, at most (RFC 8446 section 5.1)


class TLSSocket(ssl.SSLSocket):
    """A TLS socket that raises BlockingIOError where a plain one does, and wants no bytes again.

    OpenSSL encrypts a record before it finds the socket full, and wants to be offered the same
    again (SSL_write(3), the notes on retries). So that record is kept, and all but its last byte
    is reported as sent: the caller comes back with that byte, and needs to know nothing of it.
    """
    _begun = b""        # such a record

    def send(self, data: Any, flags: int = 0) -> int:
        """Send at most RECORD bytes, and return how many of them the socket took."""
        if self._begun:
            self._offer(self._begun)
            self._begun = b""
            return 1
        piece = bytes(data[:RECORD])
        try:
            return self._offer(piece)
        except BlockingIOError:
            self._begun = piece
            if len(piece) == 1:
                raise
            return len(piece) - 1

    def shutdown(self, how: int) -> None:
        """Send close_notify, which the end of a TLS stream needs, and shut down.

        RFC 9112 section 9.8. It waits for nothing. There is no close_notify after a record that is
        not sent whole.
        """
        if not self._begun:
            # The peer's own close_notify is not waited for, which is what the error says.
            with suppress(OSError):
                self.unwrap()
        super().shutdown(how)

    def _offer(self, data: bytes) -> int:
        try:
            return super().send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def recv(self, size: int = 1024, flags: int = 0) -> bytes:
        """Receive as a plain socket does."""
        try:
            return super().recv(size, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None


def tls_context(cert: str, key: str | None = None) -> ssl.SSLContext:
    """Return a server's context for this certificate. Raises ValueError if that cannot be used."""
    def no_password() -> NoReturn:
        raise ValueError("the key of the certificate is encrypted, and nobody is there to type its "
                         "password")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslsocket_class = TLSSocket
    try:
        context.load_cert_chain(cert, key, password=no_password)
    except OSError as error:        # ssl.SSLError is one too
        raise ValueError(f"cannot use {cert} and {key or 'the key in it'}: "
                         f"{error.strerror or error}") from None
    return context
