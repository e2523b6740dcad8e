"""What the processes of a server hold does not grow once its caches are full."""

import os
from collections.abc import Callable

import pytest

from benchmarks.memory import FULL_BY, TOLERANCE, measure

pytestmark = pytest.mark.engine

REQUESTS = 2000 if os.environ.get("VTPRUNE_VERIFY") else 2 * FULL_BY


@pytest.mark.timeout(3600)
def test_memory_stays_flat(record_property: Callable[[str, object], None]) -> None:
    result = measure(REQUESTS)
    record_property("requests", result.requests)
    record_property("grown", {process.role: round(process.grown, 4) for process in result.processes})
    assert len(result.processes) >= 2, "the API process and the engine"
    for process in result.processes:
        assert process.grown <= TOLERANCE, process
    assert result.feature_cache_limit / 2 < result.feature_cache_bytes <= result.feature_cache_limit
