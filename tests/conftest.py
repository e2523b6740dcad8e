"""Settings of every test: no model hub, small KV caches, and one thread for small tensors."""

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("OMP_NUM_THREADS", "1")  # more crawl where engines keep the cores busy

LONG_FIXTURES = {"deployed", "watched"}  # the image's server, and a Prometheus that watches it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave to `make verify` what would make `make test` take more than its 25 minutes on two cores."""
    if os.environ.get("VTPRUNE_VERIFY"):
        return
    for item in items:
        if item.get_closest_marker("verify") or LONG_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.skip(reason="takes minutes: part of `make verify`"))
