"""Downloads from and uploads to addresses that strangers name: public ones alone, checked once and then connected to.

A name is resolved once for each connection, all that it resolves to must be public, and the
socket is opened to the address that was checked: a name that changes its address in between
(DNS rebinding) gains nothing. Redirects are followed by hand through the same check.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import string
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from io import BufferedIOBase
from pathlib import Path
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from dust3r_sfm.errors import InputError
from dust3r_sfm.serving.limits import Allowance

MAX_REDIRECTS = 5
REDIRECTS = (301, 302, 303, 307, 308)
TIMEOUT_S = 30.0
"""For a connection, and for each piece of what comes through it."""
NUM_TRIES = 3
CHUNK = 1 << 20

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class _PassingError(Exception):
    """What another try may mend."""


PASSING = (_PassingError, OSError, http.client.HTTPException)


def is_public(address: IPAddress) -> bool:
    """Whether an address is one of the internet's; those that stand for IPv4 ones count as these, or are refused."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address.sixtofour is not None or address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


class Transfer:
    """Files from and to the internet; also from `local` addresses, unencrypted, which is for tests."""

    def __init__(self, allowance: Allowance, local: Collection[str] = ()) -> None:
        self.allowance = allowance
        self.local = local

    def check(self, url: str) -> None:
        """InputError where a URL may not be reached; nothing is sent."""
        with self._connected(url):
            pass

    def download(self, url: str, path: Path) -> str:
        """Write what is at a URL to a file; its media type. InputError names the URL without its query."""
        for left in reversed(range(NUM_TRIES)):
            try:
                with self._answer(url) as response, open(path, "wb") as file:
                    self._copy(response, file)
                    return response.headers.get_content_type()
            except PASSING as error:
                self.allowance.seconds_left()
                if not left:
                    raise InputError(f"{without_query(url)} could not be read: {error!r}") from error
        raise AssertionError

    def upload(self, path: Path, url: str) -> None:
        """PUT a file to a presigned URL."""
        size = str(path.stat().st_size)
        for left in reversed(range(NUM_TRIES)):
            try:
                with self._connected(url) as (connection, target), open(path, "rb") as file:
                    connection.request("PUT", target, body=file, headers={"Content-Length": size})
                    with connection.getresponse() as response:
                        status, reason = response.status, response.reason
                if status < 300:
                    return
                if status < 500 or not left:
                    raise InputError(f"{without_query(url)} refused the upload: {status} {reason}")
            except (OSError, http.client.HTTPException) as error:
                self.allowance.seconds_left()
                if not left:
                    raise InputError(f"{without_query(url)} took no upload: {error!r}") from error

    @contextmanager
    def _answer(self, url: str) -> Iterator[http.client.HTTPResponse]:
        """The answer to GET after redirects, its status 200."""
        start = without_query(url)
        for _ in range(MAX_REDIRECTS + 1):
            with self._connected(url) as (connection, target):
                connection.request("GET", target, headers={"Accept-Encoding": "identity"})
                with connection.getresponse() as response:
                    if response.status in REDIRECTS and response.headers["Location"]:
                        url = _redirected(url, response.headers["Location"])
                        continue
                    if response.status >= 500:
                        raise _PassingError(f"{response.status} {response.reason}")
                    if response.status != 200:
                        raise InputError(f"{start} answered {response.status} {response.reason}: expected a file")
                    yield response
                    return
        raise InputError(f"{start} leads on more than {MAX_REDIRECTS} times: give the final address")

    def _copy(self, response: http.client.HTTPResponse, file: BufferedIOBase) -> None:
        """Write what comes; its bytes are given back where another try may write them anew."""
        expected, received = response.length, 0
        if expected is not None and expected > self.allowance.limits.max_bytes:
            self.allowance.spend(expected)
        try:
            while chunk := response.read1(CHUNK):
                received += len(chunk)
                self.allowance.spend(len(chunk))
                file.write(chunk)
            self.allowance.seconds_left()  # else it may have been cut
            if expected is not None and received < expected:
                raise _PassingError(f"it ended after {received} of {expected} bytes")
        except PASSING:
            self.allowance.give_back(received)
            raise

    @contextmanager
    def _connected(self, url: str) -> Iterator[tuple[_Pinned, str]]:
        """A connection to the checked address of a URL, and what to ask it for; shut when the job's time is over."""
        parts, shown = split_url(url), without_query(url)
        host, port = parts.hostname, parts.port
        if parts.scheme not in ("https", "http") or not host or parts.username is not None:
            raise InputError(f"{shown} cannot be fetched: expected an address such as https://host/path")
        kind = _PinnedHttps if parts.scheme == "https" else _Pinned
        port = port or kind.default_port
        address = self._checked_address(host, port, shown)
        if parts.scheme == "http" and address not in self.local:
            raise InputError(f"{shown} is not encrypted: expected https://")
        seconds_left = self.allowance.seconds_left()
        connection = kind(host, port, address, min(TIMEOUT_S, seconds_left))
        timer = threading.Timer(seconds_left, connection.shut)
        timer.daemon = True
        timer.start()
        try:
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            yield connection, quote(target, safe=string.punctuation)  # as browsers do with blanks and letters like ä
        finally:
            timer.cancel()
            connection.close()

    def _checked_address(self, host: str, port: int, shown: str) -> str:
        """The first address of a name, resolved once; InputError where any of its addresses is not public."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise InputError(f"{shown}: there is no host of this name") from None
        addresses = [str(entry[4][0]) for entry in found]
        others = [ipaddress.ip_address(address.split("%")[0]) for address in addresses if address not in self.local]
        if not all(map(is_public, others)):
            raise InputError(f"{shown} is not on the public internet: expected a public address")
        return addresses[0]


class _Pinned(http.client.HTTPConnection):
    """A connection to a fixed address, whatever its host's name resolves to by now."""

    def __init__(self, host: str, port: int, address: str, timeout_s: float) -> None:
        super().__init__(host, port, timeout=timeout_s)
        self.address = address
        self.opened: socket.socket | None = None
        """The socket, also while only an answer holds it any more."""

    def connect(self) -> None:
        self.sock = self.opened = socket.create_connection((self.address, self.port), self.timeout)

    def shut(self) -> None:
        """End what is sent and received, from another thread."""
        if self.opened is not None:
            with suppress(OSError):  # closed in the meantime
                self.opened.shutdown(socket.SHUT_RDWR)


class _PinnedHttps(_Pinned):
    default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        super().connect()
        self.sock = self.opened = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)


def split_url(url: str) -> SplitResult:
    """The parts of a URL; InputError where it has no such form."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # read when asked for
    except ValueError:
        raise InputError(f"{without_query(url)} is no address: expected https://host/path") from None
    return parts


def _redirected(url: str, location: str) -> str:
    try:
        return urljoin(url, quote(location.encode("latin-1"), safe=string.punctuation))  # bytes are read as latin-1
    except ValueError:
        raise InputError(f"{without_query(url)} leads on to what is no address: give the final one") from None


def without_query(url: str) -> str:
    """A URL for people to read: the query of a presigned one is a key."""
    return url.split("?")[0].split("#")[0]
