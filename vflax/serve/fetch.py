"""Pictures from elsewhere, where the operator allows it: from public addresses only, and never much or for long."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from urllib.parse import urljoin

import httpx

from vflax.serve.errors import ApiError, bad

MAX_REDIRECTS = 3
_MAX_URL = 4096
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_DEFAULT_PORTS = {"http": 80, "https": 443}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]


def is_public(address: Address) -> bool:
    """Whether anybody on the internet would reach the same host there: no private, local, shared, reserved address, and
    no IPv6 address that stands for such an IPv4 address."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.scope_id or address.teredo or address.sixtofour:
            return False
        if address.ipv4_mapped:
            return is_public(address.ipv4_mapped)
        if address in _NAT64:
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


async def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host, as the system finds them.

    Raises:
        OSError: it has none.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Fetcher:
    """Fetches pictures.

    A name is resolved once for each hop, all its addresses must be public, and the connection goes to the address that
    was looked at: a name that means something else a moment later (DNS rebinding) gains nothing.

    Args:
        most: bytes of a picture.
        seconds: for one, redirects included.
        resolve, public: for tests.
        verify: as httpx takes it: whose certificates are believed.
    """

    def __init__(
        self,
        most: int,
        seconds: float,
        *,
        resolve: Resolve = resolve,
        public: Callable[[Address], bool] = is_public,
        verify: bool = True,
    ) -> None:
        self._most, self._seconds = most, seconds
        self._resolve, self._public = resolve, public
        # No proxies, .netrc or certificates that the environment names. No connection is used twice: a pool knows them
        # by address, and two names may share one.
        self._client = httpx.AsyncClient(
            trust_env=False,
            follow_redirects=False,
            timeout=seconds,
            verify=verify,
            limits=httpx.Limits(max_connections=64, max_keepalive_connections=0),
        )

    async def fetch(self, url: str, where: str, take: Callable[[int], None]) -> bytes:
        """The bytes at a URL.

        Args:
            url: http or https.
            where: the field that names it.
            take: told of all bytes that are kept.

        Raises:
            ApiError: 400: it may not be fetched, is too large, or does not come. What the other side said is not told:
                it would be a way of looking around from here.
        """
        try:
            async with asyncio.timeout(self._seconds):
                for _ in range(MAX_REDIRECTS + 1):
                    data, url = await self._hop(url, where, take)
                    if data is not None:
                        return data
        except TimeoutError:
            raise _refused(where, f"did not come within {self._seconds:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError):
            raise _refused(where, "cannot be fetched") from None
        raise _refused(where, f"more than {MAX_REDIRECTS} redirects")

    async def close(self) -> None:
        await self._client.aclose()

    async def _hop(self, url: str, where: str, take: Callable[[int], None]) -> tuple[bytes | None, str]:
        """(the bytes, "") or (None, where to go on)."""
        request = await self._request(url, where)
        response = await self._client.send(request, stream=True)
        try:
            if response.has_redirect_location:
                return None, urljoin(url, response.headers["location"])
            if response.status_code != 200:
                raise _refused(where, "cannot be fetched")
            if response.headers.get("content-encoding", "identity") != "identity":
                raise _refused(where, "comes compressed, which it was not asked to")
            return await self._read(response, where, take), ""
        finally:
            await response.aclose()

    async def _request(self, url: str, where: str) -> httpx.Request:
        """To the address that was looked at, with the name that the URL has."""
        if len(url) > _MAX_URL:
            raise _refused(where, f"a URL of more than {_MAX_URL} characters")
        target = httpx.URL(url)
        if target.scheme not in _DEFAULT_PORTS or not target.host or target.userinfo:
            raise _refused(where, "expected http(s)://HOST/... without a user name")
        port = target.port or _DEFAULT_PORTS[target.scheme]
        found = [
            ipaddress.ip_address(one) for one in await self._resolve(target.raw_host.decode("ascii"), port)
        ]
        if not found or not all(map(self._public, found)):
            raise _refused(where, "is not on a public address")
        headers = {"host": target.netloc.decode("ascii"), "accept": "image/*", "accept-encoding": "identity"}
        pinned = target.copy_with(host=str(found[0]), fragment=None)
        extensions = {"sni_hostname": target.raw_host.decode("ascii")}
        return self._client.build_request("GET", pinned, headers=headers, extensions=extensions)

    async def _read(self, response: httpx.Response, where: str, take: Callable[[int], None]) -> bytes:
        chunks, size = [], 0
        async for chunk in response.aiter_raw():
            size += len(chunk)
            if size > self._most:
                raise bad(f"{where}: more than {self._most} bytes", where, "image_too_large")
            take(len(chunk))
            chunks.append(chunk)
        return b"".join(chunks)


def _refused(where: str, reason: str) -> ApiError:
    return bad(f"{where}: {reason}", where, "invalid_image_url")
