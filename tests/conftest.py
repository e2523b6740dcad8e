"""Settings of every test: no model hub, small KV caches, one thread for small tensors; and who runs what.

`make test` and `make verify` run them in several processes. What is started once for many tests must not be started in
each of those, so the tests of an engine or a server go to one of them together, and so do the other tests of a file.
"""

import ctypes
import gc
import os
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # several engines run at a time: each has its own, smaller setting
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # of eager engines, one small function would be compiled by each
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more crawl where engines keep the cores busy
os.environ.setdefault("VTPRUNE_ENCODER_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # vLLM binds every engine to the same core
os.environ.setdefault("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "0")  # idle ones have nothing to finish, and take 10 s

# `make test` draws its examples from a fixed seed, so that what fails there was broken by the change, and `make verify`
# from another each time. Neither minds that a busy machine takes long over one.
settings.register_profile(
    "unhurried",
    derandomize=not os.environ.get("VTPRUNE_VERIFY"),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("unhurried")

gc.disable()  # until the tests are collected: what is imported for them stays

SHARED = {
    "server": "server",
    **dict.fromkeys(("cached", "uncached", "chunked"), "llava"),
    "qwen": "qwen",
    "watched": "watched",
}
"""The fixtures that several files share, and the name of those who share them."""


@pytest.fixture(scope="session", autouse=True)
def models_inspected_here() -> Iterator[None]:
    """vLLM inspects the class of a model in a process that imports vLLM anew: ten seconds for each class not cached."""
    with pytest.MonkeyPatch.context() as patch:
        if "vllm" in sys.modules:
            patch.setattr("vllm.model_executor.models.registry._run_in_subprocess", lambda function: function())
        yield


@pytest.fixture(scope="module", autouse=True)
def freed_memory_is_returned() -> Iterator[None]:
    """glibc keeps what engines and training freed, beside which the servers of other tests may not fit."""
    yield
    ctypes.CDLL(None).malloc_trim(0)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Groups before xdist reads them, the order after pytest has put together what shares a parameter of a session."""
    if not os.environ.get("VTPRUNE_VERIFY"):
        config.hook.pytest_deselected(items=[item for item in items if takes_minutes(item)])
        items[:] = [item for item in items if not takes_minutes(item)]
    for item in items:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))
    yield
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=turn)


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> object:
    """Stop what several files share after the last test of the group: idle servers take gigabytes."""
    if "PYTEST_XDIST_WORKER" in os.environ and nextitem is not None:
        group = group_of(item)
        if group in SHARED.values() and group_of(nextitem) != group:
            return item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
    return None


def turn(item: pytest.Item) -> tuple[bool, bool, bool, bool]:
    """What is shared comes first, since it makes the longest chains, and of it the server, which idles between tests.

    Then tests without an engine; then the others' engines, servers before those in the tests' own processes.
    """
    group = group_of(item)
    engine = item.get_closest_marker("engine") is not None
    return group != SHARED["server"], group not in SHARED.values(), engine, "tests/engine/" in item.nodeid


def takes_minutes(item: pytest.Item) -> bool:
    """Whether only `make verify` runs this test."""
    return item.get_closest_marker("verify") is not None or "watched" in fixtures_of(item)


def group_of(item: pytest.Item) -> str:
    """What a test shares an engine with, or its file; there, families and model runners have engines of their own."""
    shared = {SHARED[name] for name in fixtures_of(item) & SHARED.keys()}
    if shared:
        return shared.pop()
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    apart = [parameters[name] for name in ("model_runner", "family") if isinstance(parameters.get(name), str)]
    return " ".join((item.nodeid.partition("::")[0], *apart))


def fixtures_of(item: pytest.Item) -> set[str]:
    return set(getattr(item, "fixturenames", ()))
