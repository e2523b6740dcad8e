"""Fetch media over HTTP without reaching internal addresses (protection against SSRF).

A host is resolved once; the checked address is the one connected to, so DNS rebinding has no effect. Each redirect is
checked like the first request. Status codes, size limits and retries are as in vLLM.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
from vllm.connections import HTTPConnection, MediaDownloadSizeExceededError
from yarl import URL

from vllm_vtprune import envs
from vllm_vtprune.plugin.compat.server import read_bounded, request_headers, retried
from vllm_vtprune_server.problem import MediaProblem, too_large

MAX_REDIRECTS = 3
NAT64 = ipaddress.ip_network("64:ff9b::/96")


class GuardedConnection(HTTPConnection):
    """Replaces vLLM's HTTP connection.

    Args:
        allowed_hosts: the hosts that may be requested, as in URLs.
    """

    def __init__(self, allowed_hosts: Collection[str]) -> None:
        super().__init__()
        self._allowed_hosts = {host.lower() for host in allowed_hosts}

    async def async_get_bytes(
        self,
        url: str,
        *,
        timeout: float | None = None,
        allow_redirects: bool = True,
        max_bytes: int | None = None,
        **budgets: Any,
    ) -> bytes:
        """Fetch the decompressed body of a URL.

        Makes up to ``VLLM_MEDIA_FETCH_MAX_RETRIES`` attempts if the server does not answer, is slow or fails; the
        timeout grows fourfold each time.

        Args:
            url: an HTTP or HTTPS URL.
            timeout: seconds for the first attempt, including redirects.
            allow_redirects: whether to follow redirects.
            max_bytes: limit of decompressed bytes, besides ``VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB``.
            budgets: the request's budgets, as vLLM passes them (from 0.33 on).

        Raises:
            MediaProblem: the URL is not allowed or not found, or the body is too large or too slow.
            HTTPResponseSizeExceededError: the body exceeds `max_bytes`.
            ValueError: the body exceeds a budget.
        """
        redirects = MAX_REDIRECTS if allow_redirects else 0
        try:
            return await self._attempt(url, timeout=timeout, redirects=redirects, max_bytes=max_bytes, **budgets)
        except aiohttp.ClientResponseError as error:
            raise MediaProblem(f"could not be fetched: its server answered with status {error.status}") from None
        except MediaDownloadSizeExceededError as error:
            raise too_large(error.max_bytes, "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB") from None
        except TimeoutError:
            raise MediaProblem(f"could not be fetched: no answer in time (first attempt: {timeout:g} s)") from None
        except (aiohttp.ClientError, OSError) as error:
            raise MediaProblem(f"could not be fetched ({type(error).__name__})") from None

    def get_bytes(self, *args: Any, **kwargs: Any) -> bytes:
        """Synchronous `async_get_bytes`; works inside and outside of event loops."""
        with ThreadPoolExecutor(max_workers=1) as thread:
            return thread.submit(lambda: asyncio.run(self.async_get_bytes(*args, **kwargs))).result()

    @retried
    async def _attempt(
        self, url: str, *, timeout: float | None, redirects: int, max_bytes: int | None, **budgets: Any
    ) -> bytes:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(socket_factory=_checked_socket),
            timeout=aiohttp.ClientTimeout(total=timeout),
            headers=request_headers(self),
        ) as session:
            try:
                return await self._get(session, _parsed(url), redirects, max_bytes, **budgets)
            except aiohttp.ClientConnectorError as error:
                if isinstance(error.os_error, _AddressRejected):
                    raise MediaProblem("is at an address that is not public") from None
                raise

    async def _get(
        self, session: aiohttp.ClientSession, url: URL, redirects: int, max_bytes: int | None, **budgets: Any
    ) -> bytes:
        self._check(url)
        async with session.get(url, allow_redirects=False) as response:
            location = response.headers.get("Location")
            if 300 <= response.status < 400 and location is not None:
                if redirects == 0:
                    raise MediaProblem("could not be fetched: too many redirects")
                return await self._get(session, url.join(_parsed(location)), redirects - 1, max_bytes, **budgets)
            response.raise_for_status()
            return await read_bounded(response, max_bytes, **budgets)

    def _check(self, url: URL) -> None:
        host = (url.host or "").rstrip(".").lower()
        if url.scheme not in ("http", "https"):
            raise MediaProblem("could not be fetched: it redirects to a URL that is neither http nor https")
        if host not in self._allowed_hosts:
            raise MediaProblem("is at a host that --allowed-media-domains does not name")


def _parsed(url: str) -> URL:
    try:
        return URL(url)
    except ValueError:
        raise MediaProblem("could not be fetched: its URL, or that of a redirect, is not valid") from None


class _AddressRejected(OSError):
    """An address of a host must not be connected to; another of its addresses may be allowed."""


def _checked_socket(address: Any) -> socket.socket:
    """Create the socket for one resolved address.

    Raises:
        _AddressRejected: the address is not public, and private ones are not allowed.
    """
    family, kind, protocol, _, target = address
    if not envs.fetch_private_addresses() and not is_public(target[0]):
        raise _AddressRejected("not a public address")
    return socket.socket(family, kind, protocol)


def is_public(address: str) -> bool:
    """Whether an IP address is globally reachable, as well as an IPv4 address embedded in it."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:  # such as 2130706433, which the system resolves to 127.0.0.1
        return False
    if ip.is_multicast or not ip.is_global:
        return False
    inner = None if isinstance(ip, ipaddress.IPv4Address) else _ipv4_within(ip)
    return inner is None or is_public(str(inner))


def _ipv4_within(ip: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address embedded in an IPv6 address."""
    return ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else ip.ipv4_mapped or ip.sixtofour
