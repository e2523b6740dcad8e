"""Fetching images over HTTP for clients, without reaching what only this machine can reach.

The address of a host is looked up once, checked, and connected to: a name that resolves to something else a moment
later makes no difference. Redirects are followed by hand, each checked like the first request.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
from vllm.connections import HTTPConnection
from yarl import URL

from vllm_vtprune import envs
from vllm_vtprune_server.images import ImageProblem, check_bytes

MAX_REDIRECTS = 3
CHUNK = 64 * 1024  # bytes
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class GuardedConnection(HTTPConnection):
    """Takes the place of vLLM's HTTP connection.

    Args:
        allowed_hosts: the only ones to be asked, as in URLs.
    """

    def __init__(self, allowed_hosts: Collection[str]) -> None:
        super().__init__()
        self._allowed_hosts = {host.lower() for host in allowed_hosts}

    async def async_get_bytes(
        self, url: str, *, timeout: float | None = None, allow_redirects: bool = True, max_bytes: int | None = None
    ) -> bytes:
        """The body of what a URL names.

        Args:
            timeout: seconds for all of it, redirects included.
            max_bytes: no more than this is read.

        Raises:
            ImageProblem: it is not allowed, not there, too large, or did not come in time.
        """
        connector = aiohttp.TCPConnector(socket_factory=_checked_socket)
        try:
            async with aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(total=timeout),
                auto_decompress=False,  # an image gains nothing by it, and a small answer could unpack to a large one
                headers=self._headers(),
            ) as session:
                return await self._get(session, URL(url), MAX_REDIRECTS if allow_redirects else 0, max_bytes)
        except aiohttp.ClientConnectorError as error:
            refused = isinstance(error.os_error, _AddressRefused)
            raise ImageProblem(
                "is at an address that this server does not fetch from" if refused else "could not be fetched"
            ) from None
        except TimeoutError:
            raise ImageProblem(f"could not be fetched within {timeout:g} s") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:  # ValueError: a URL that cannot be parsed
            raise ImageProblem(f"could not be fetched ({type(error).__name__})") from None

    def get_bytes(self, *args: Any, **kwargs: Any) -> bytes:
        """As `async_get_bytes`, for callers outside of any event loop or within one."""
        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(lambda: asyncio.run(self.async_get_bytes(*args, **kwargs))).result()

    async def _get(self, session: aiohttp.ClientSession, url: URL, redirects: int, max_bytes: int | None) -> bytes:
        self._check(url)
        async with session.get(url, allow_redirects=False) as response:
            location = response.headers.get("Location")
            if 300 <= response.status < 400 and location is not None:
                if redirects == 0:
                    raise ImageProblem("could not be fetched: too many redirects")
                return await self._get(session, url.join(URL(location)), redirects - 1, max_bytes)
            if response.status != 200:
                raise ImageProblem(f"could not be fetched: its server answered with status {response.status}")
            body = bytearray()
            async for chunk in response.content.iter_chunked(CHUNK):
                body += chunk
                if max_bytes is not None:
                    check_bytes(len(body), max_bytes)
            return bytes(body)

    def _check(self, url: URL) -> None:
        host = (url.host or "").rstrip(".").lower()
        if url.scheme not in ("http", "https"):
            raise ImageProblem("could not be fetched: it leads to a URL that is neither http nor https")
        if host not in self._allowed_hosts:
            raise ImageProblem("is at a host that this server does not fetch from")


class _AddressRefused(OSError):
    """The address of a host is not one to connect to; another of its addresses may be."""


def _checked_socket(address: Any) -> socket.socket:
    """A socket for one address, in the moment before it is connected.

    Raises:
        _AddressRefused: it is not public, and private ones are not allowed.
    """
    family, kind, protocol, _, target = address
    if not envs.fetch_private_addresses() and not is_public(target[0]):
        raise _AddressRefused("not a public address")
    return socket.socket(family, kind, protocol)


def is_public(address: str) -> bool:
    """Whether an IP address is globally reachable, and so is the IPv4 one within it."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # such as 2130706433, which the system would take for 127.0.0.1
        return False
    if ip.is_multicast or not ip.is_global:
        return False
    inner = None if isinstance(ip, ipaddress.IPv4Address) else _ipv4_within(ip)
    return inner is None or is_public(str(inner))


def _ipv4_within(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that an IPv6 one leads to."""
    return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else ip.ipv4_mapped or ip.sixtofour
