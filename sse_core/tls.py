"""Turn a certificate into TLS sockets that behave like plain ones."""
import ssl
from typing import Any, NoReturn, Optional

RECORD = 16 << 10           # bytes of data in a TLS record, at most (RFC 8446 section 5.1)


class TLSSocket(ssl.SSLSocket):
    """A TLS socket that, without blocking, raises BlockingIOError where a plain one does.

    When OpenSSL finds the socket full it has encrypted a record already. The next `send` must
    begin with the same bytes (SSL_write(3), the notes on retries): `committed` says how many.
    """
    committed = 0

    def send(self, data: Any, flags: int = 0) -> int:
        """Send at most RECORD bytes, and return how many of them the socket took."""
        piece = data[:RECORD]
        try:
            sent = super().send(piece, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            self.committed = max(self.committed, len(piece))
            raise BlockingIOError from None
        self.committed = 0
        return sent

    def recv(self, size: int = 1024, flags: int = 0) -> bytes:
        """Receive as a plain socket does."""
        try:
            return super().recv(size, flags)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None


def tls_context(cert: str, key: Optional[str] = None) -> ssl.SSLContext:
    """Return a server's context for this certificate.

    Raises OSError or ssl.SSLError if the files cannot be used, ValueError if the key is encrypted.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.sslsocket_class = TLSSocket
    context.load_cert_chain(cert, key, password=_no_password)
    return context


def _no_password() -> NoReturn:
    raise ValueError("its key is encrypted, and a service has nobody to type a password")
