"""Fetching: only from hosts that are allowed, only at public addresses, only so much, redirects included."""

import asyncio
import gzip
import inspect
import reprlib
import socket
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import aiohttp
import pytest
from vllm import connections
from vllm.connections import HTTPResponseSizeExceededError

from tests.server.test_images import Allowance, saved
from tests.support.chat import fresh_picture
from vllm_vtprune import envs
from vllm_vtprune_server.errors import MediaRejected
from vllm_vtprune_server.fetch import GuardedConnection, is_public
from vllm_vtprune_server.media import GuardedConnector
from vllm_vtprune_server.problem import MediaProblem

PICTURE = fresh_picture()
MAX_MB = "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB"
UNPACKS_TO_64_MIB = gzip.compress(bytes(2**26), compresslevel=1)


class Pages(BaseHTTPRequestHandler):
    """What the other side answers, by path. It notes whom it was asked for."""

    seen: list[tuple[str, str]]

    def do_GET(self) -> None:
        self.seen.append((self.headers["Host"], self.path))
        port = self.server.server_address[1]
        redirects = {
            "/moved": "/picture",
            "/loop": "/loop",
            "/to-localhost": f"http://localhost:{port}/picture",
            "/to-file": "file:///etc/passwd",
            "/to-nowhere": "http://[",
            "/3": "/2",
            "/2": "/1",
            "/1": "/picture",
            "/4": "/3",
        }
        if self.path in redirects:
            self.send_response(302)
            self.send_header("Location", redirects[self.path])
            self.end_headers()
        elif self.path == "/picture":
            self._send(saved(PICTURE))
        elif self.path.startswith("/status/"):
            self._send(saved(PICTURE), status=int(self.path.removeprefix("/status/")))
        elif self.path.startswith("/busy/"):  # so many times before it answers
            times = int(self.path.removeprefix("/busy/"))
            self._send(saved(PICTURE), status=503 if len(self.seen) <= times else 200)
        elif self.path == "/gzip":
            self._send(gzip.compress(saved(PICTURE)), encoding="gzip")
        elif self.path == "/deflate":
            self._send(zlib.compress(saved(PICTURE)), encoding="deflate")
        elif self.path == "/bomb":
            self._send(UNPACKS_TO_64_MIB, encoding="gzip")
        elif self.path == "/broken-gzip":
            self._send(saved(PICTURE), encoding="gzip")
        elif self.path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"\0" * 65536)
            except OSError:
                self.seen.append(("", "cut off"))
        elif self.path == "/slow":
            threading.Event().wait(30)
        elif self.path == "/page":
            self._send(b"<html>")
        else:
            self.send_error(404)

    def _send(self, body: bytes, status: int = 200, encoding: str = "") -> None:
        self.send_response(status)
        if encoding:
            self.send_header("Content-Encoding", encoding)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def pages() -> Iterator[ThreadingHTTPServer]:
    handler = type("Handler", (Pages,), {"seen": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails is not tried again, for the sake of time."""
    monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", "1")


Fetch = Callable[..., bytes]


@pytest.fixture
def fetch(pages: ThreadingHTTPServer) -> Fetch:
    """Gets a path of the other side, at 127.0.0.1 unless another host is named."""

    def get(path: str, *, host: str = "127.0.0.1", allowed: tuple[str, ...] = ("127.0.0.1",), **options: Any) -> bytes:
        connection = GuardedConnection(allowed)
        url = f"http://{host}:{pages.server_address[1]}{path}"
        return asyncio.run(connection.async_get_bytes(url, **{"timeout": 20, **options}))

    return get


@pytest.fixture
def private(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator allows private addresses, as this machine's own is one."""
    monkeypatch.setenv(envs.fetch_private_addresses.name, "1")


def seen(pages: ThreadingHTTPServer) -> list[tuple[str, str]]:
    return pages.RequestHandlerClass.seen  # type: ignore[attr-defined]


# --- addresses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "127.1", "0x7f000001", "[::1]", "0.0.0.0"])
def test_an_allowed_host_at_this_machine_is_not_asked(fetch: Fetch, pages: ThreadingHTTPServer, host: str) -> None:
    with pytest.raises(MediaProblem, match=r"could not be fetched|an address that is not public"):
        fetch("/picture", host=host, allowed=(host.strip("[]"),))
    assert seen(pages) == []


@pytest.mark.parametrize("also", ["::ffff:127.0.0.1", "169.254.169.254", "fe80::1"])
def test_a_name_is_worth_its_addresses(
    fetch: Fetch, pages: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, also: str
) -> None:
    async def resolve(self: Any, host: str, port: int = 0, family: Any = socket.AF_INET) -> list[Any]:
        asked.append(host)
        return [
            dict(hostname=host, host=address, port=port, family=family, proto=0, flags=socket.AI_NUMERICHOST)
            for address, family in (("127.0.0.1", socket.AF_INET), (also, socket.AF_INET6 if ":" in also else 2))
        ]

    asked: list[str] = []
    monkeypatch.setattr(aiohttp.DefaultResolver, "resolve", resolve)
    with pytest.raises(MediaProblem, match="an address that is not public"):
        fetch("/picture", host="pictures.example", allowed=("pictures.example",))
    assert asked == ["pictures.example"], "looked up once"
    assert seen(pages) == []


@pytest.mark.usefixtures("private")
def test_a_name_is_looked_up_once_and_named_to_the_other_side(
    fetch: Fetch, pages: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def resolve(self: Any, host: str, port: int = 0, family: Any = socket.AF_INET) -> list[Any]:
        asked.append(host)
        address = "127.0.0.1" if len(asked) == 1 else "127.0.0.2"
        return [dict(hostname=host, host=address, port=port, family=2, proto=0, flags=socket.AI_NUMERICHOST)]

    asked: list[str] = []
    monkeypatch.setattr(aiohttp.DefaultResolver, "resolve", resolve)
    assert fetch("/picture", host="Pictures.example.", allowed=("pictures.EXAMPLE",)) == saved(PICTURE)
    assert asked == ["pictures.example."]
    assert seen(pages) == [(f"pictures.example:{pages.server_address[1]}", "/picture")]


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700:4700::1111", True),
        ("64:ff9b::808:808", True),
        ("2002:808:808::1", True),
        ("127.0.0.1", False),
        ("10.0.0.1", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("239.255.255.250", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
        ("192.0.2.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1", False),
        ("fe80::1%eth0", False),
        ("fc00::1", False),
        ("ff02::1", False),
        ("2001:db8::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::7f00:1", False),
        ("64:ff9b::a00:1", False),
        ("2002:7f00:1::", False),
        ("2002:c0a8:101::", False),
        ("2130706433", False),
        ("127.1", False),
        ("0x7f000001", False),
        ("", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


# --- hosts and redirects --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("private")
def test_what_an_allowed_host_has_is_fetched(fetch: Fetch) -> None:
    assert fetch("/picture") == fetch("/moved") == fetch("/3") == saved(PICTURE)


@pytest.mark.usefixtures("private")
@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/to-localhost", "at a host that --allowed-media-domains does not name"),
        ("/to-file", "neither http nor https"),
        ("/to-nowhere", "could not be fetched"),
        ("/loop", "too many redirects"),
        ("/4", "too many redirects"),
        ("/missing", "answered with status 404"),
    ],
)
def test_where_a_redirect_leads_is_checked_too(
    fetch: Fetch, pages: ThreadingHTTPServer, path: str, problem: str
) -> None:
    with pytest.raises(MediaProblem, match=problem):
        fetch(path)
    assert ("localhost", "/picture") not in seen(pages)
    assert len(seen(pages)) <= 4


@pytest.mark.usefixtures("private")
def test_redirects_can_be_switched_off(fetch: Fetch) -> None:
    with pytest.raises(MediaProblem, match="too many redirects"):
        fetch("/moved", allow_redirects=False)


@pytest.mark.usefixtures("private")
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1@localhost", "localhost#@127.0.0.1"])
def test_another_host_is_not_asked(fetch: Fetch, pages: ThreadingHTTPServer, host: str) -> None:
    with pytest.raises(MediaProblem, match="at a host that --allowed-media-domains does not name"):
        fetch("/picture", host=host)
    assert seen(pages) == []


@pytest.mark.usefixtures("private")
def test_no_more_is_read_than_allowed(fetch: Fetch, pages: ThreadingHTTPServer) -> None:
    with pytest.raises(HTTPResponseSizeExceededError):
        fetch("/endless", max_bytes=2**20)
    assert fetch("/picture", max_bytes=len(saved(PICTURE))) == saved(PICTURE)


@pytest.mark.usefixtures("private")
def test_no_longer_is_waited_than_allowed(fetch: Fetch) -> None:
    with pytest.raises(MediaProblem, match=r"no answer in time \(first attempt: 0\.2 s\)"):
        fetch("/slow", timeout=0.2)


def test_a_closed_port_is_a_problem_of_the_image(private: None) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/"
        with pytest.raises(MediaProblem, match="could not be fetched"):
            asyncio.run(GuardedConnection(["127.0.0.1"]).async_get_bytes(url, timeout=20))


# --- as vLLM does it ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("private")
@pytest.mark.parametrize("status", [200, 203, 206, 226])
def test_every_answer_that_is_no_failure_is_taken(fetch: Fetch, status: int) -> None:
    assert fetch(f"/status/{status}") == saved(PICTURE)


@pytest.mark.usefixtures("private")
@pytest.mark.parametrize(
    ("path", "retries", "attempts", "problem"),
    [
        ("/busy/2", None, 3, None),
        ("/busy/9", None, 3, "status 503"),
        ("/busy/9", "2", 2, "status 503"),
        ("/status/500", None, 3, "status 500"),
        ("/slow", None, 3, "no answer in time"),
        ("/status/404", None, 1, "status 404"),
        ("/status/429", None, 1, "status 429"),
        ("/broken-gzip", None, 1, "could not be fetched"),
        ("/to-localhost", None, 1, "at a host that"),
    ],
)
def test_what_may_pass_is_tried_again(
    fetch: Fetch,
    pages: ThreadingHTTPServer,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    retries: str | None,
    attempts: int,
    problem: str | None,
) -> None:
    async def sleep(seconds: float, result: Any = None) -> Any:
        if seconds:
            slept.append(seconds)
        return await real_sleep(0, result)

    slept: list[float] = []
    real_sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", sleep)
    if retries is None:
        monkeypatch.delenv("VLLM_MEDIA_FETCH_MAX_RETRIES")
    else:
        monkeypatch.setenv("VLLM_MEDIA_FETCH_MAX_RETRIES", retries)
    if problem is None:
        assert fetch(path) == saved(PICTURE)
    else:
        with pytest.raises(MediaProblem, match=problem):
            fetch(path, timeout=0.02 if path == "/slow" else 20)
    assert len(seen(pages)) == attempts
    assert slept == [1, 4][: attempts - 1]


@pytest.mark.usefixtures("private")
def test_a_compressed_answer_is_unpacked(fetch: Fetch) -> None:
    assert fetch("/gzip") == fetch("/deflate") == saved(PICTURE)


@pytest.mark.usefixtures("private")
def test_a_small_answer_does_not_unpack_beyond_the_limit(fetch: Fetch) -> None:
    assert len(UNPACKS_TO_64_MIB) < 2**20
    tracemalloc.start()
    try:
        with pytest.raises(HTTPResponseSizeExceededError):
            fetch("/bomb", max_bytes=2**20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**23


@pytest.mark.usefixtures("private")
def test_what_is_downloaded_counts_against_the_budget_of_the_request(
    fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = connections._async_read_response_bytes
    if "request_budget" not in inspect.signature(stock).parameters:  # before vLLM 0.33

        async def read(response: Any, max_bytes: int | None, request_budget: Allowance) -> bytes:
            body = await stock(response, max_bytes)
            request_budget.charge(len(body))
            return body

        monkeypatch.setattr(connections, "_async_read_response_bytes", read)
    size = len(saved(PICTURE))
    budget = Allowance(2 * size, "VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB")
    for path in ("/gzip", "/moved"):
        fetch(path, request_budget=budget)
    assert budget.used == 2 * size
    with pytest.raises(ValueError, match="VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB"):
        fetch("/picture", request_budget=budget)


# --- the connector --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("private")
@pytest.mark.parametrize("way", ["async", "sync"])
def test_the_connector_fetches_from_the_hosts_that_the_operator_names(pages: ThreadingHTTPServer, way: str) -> None:
    def load(connector: GuardedConnector, path: str) -> Any:
        url = f"http://127.0.0.1:{pages.server_address[1]}{path}"
        return connector.fetch_image(url) if way == "sync" else asyncio.run(connector.fetch_image_async(url))

    opened = GuardedConnector(allowed_media_domains=["127.0.0.1"])
    assert load(opened, "/picture").media.tobytes() == PICTURE.tobytes()
    for connector, path, problem in (
        (opened, "/page", "is not an image in a known format"),
        (opened, "/missing", "answered with status 404"),
        (GuardedConnector(allowed_media_domains=["example.com"]), "/picture", "at a host that --allowed-media-domains"),
        (GuardedConnector(), "/picture", "is on the web, and --allowed-media-domains is not set"),
    ):
        with pytest.raises(MediaRejected, match=problem):
            load(connector, path)


@pytest.mark.usefixtures("private")
@pytest.mark.parametrize("way", ["async", "sync"])
@pytest.mark.parametrize(
    ("modality", "settings", "path", "accepted"),
    [
        ("image", {envs.max_image_mb.name: "1"}, "/endless", "at most 1 MiB (VTPRUNE_MAX_IMAGE_MB)"),
        ("image", {envs.max_image_mb.name: "1"}, "/bomb", "at most 1 MiB (VTPRUNE_MAX_IMAGE_MB)"),
        ("image", {}, "/bomb", "at most 32 MiB (VTPRUNE_MAX_IMAGE_MB)"),
        ("image", {MAX_MB: "2"}, "/bomb", f"at most 2 MiB ({MAX_MB})"),
        ("image", {MAX_MB: "2", envs.max_image_mb.name: "1"}, "/bomb", "at most 1 MiB (VTPRUNE_MAX_IMAGE_MB)"),
        ("image", {MAX_MB: "1", envs.max_image_mb.name: "2"}, "/bomb", f"at most 1 MiB ({MAX_MB})"),
        ("image", {MAX_MB: "0"}, "/bomb", "at most 32 MiB (VTPRUNE_MAX_IMAGE_MB)"),
        ("video", {MAX_MB: "1"}, "/endless", f"at most 1 MiB ({MAX_MB})"),
        ("video", {MAX_MB: "1"}, "/bomb", f"at most 1 MiB ({MAX_MB})"),
        ("audio", {MAX_MB: "1"}, "/endless", f"at most 1 MiB ({MAX_MB})"),
        ("audio", {}, "/bomb", "at most 25 MiB (VLLM_MAX_AUDIO_CLIP_FILESIZE_MB)"),
    ],
)
def test_of_several_limits_the_strictest_holds_and_is_named(
    pages: ThreadingHTTPServer,
    monkeypatch: pytest.MonkeyPatch,
    modality: str,
    settings: dict[str, str],
    path: str,
    accepted: str,
    way: str,
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    connector = GuardedConnector(allowed_media_domains=["127.0.0.1"])
    url = f"http://127.0.0.1:{pages.server_address[1]}{path}"
    fetch = getattr(connector, f"fetch_{modality}" if way == "sync" else f"fetch_{modality}_async")
    with pytest.raises(MediaRejected) as refused:
        fetch(url) if way == "sync" else asyncio.run(fetch(url))
    assert str(refused.value) == f"{modality}_url: {reprlib.repr(url)} is too large; expected {accepted}."


def test_files_are_loaded_from_the_folder_that_the_operator_opens_alone(tmp_path: Any) -> None:
    (tmp_path / "open").mkdir()
    inside, outside = tmp_path / "open" / "picture.png", tmp_path / "picture.png"
    for path in (inside, outside):
        path.write_bytes(saved(PICTURE))
    connector = GuardedConnector(allowed_local_media_path=str(tmp_path / "open"))
    assert connector.fetch_image(f"file://{inside}").media.tobytes() == PICTURE.tobytes()
    for url in (f"file://{outside}", f"file://{tmp_path}/open/../picture.png", f"file://{inside}.missing"):
        with pytest.raises(MediaRejected, match="could not be loaded") as refused:
            connector.fetch_image(url)
        assert str(tmp_path) not in str(refused.value).replace(url, "")
    with pytest.raises(MediaRejected, match="is a local file"):
        GuardedConnector().fetch_image(f"file://{inside}")
