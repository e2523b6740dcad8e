"""What the processes of a server hold does not grow once its caches are full."""

from collections.abc import Callable

import pytest

from benchmarks.memory import TOLERANCE, measure

pytestmark = [pytest.mark.engine, pytest.mark.verify]

REQUESTS = 2000


@pytest.mark.timeout(3600)
def test_memory_stays_flat(record_property: Callable[[str, object], None]) -> None:
    result = measure(REQUESTS)
    record_property("requests", result.requests)
    record_property("grown", {process.role: round(process.grown, 4) for process in result.processes})
    assert len(result.processes) >= 2, "the API process and the engine"
    for process in result.processes:
        assert process.grown <= TOLERANCE, process
    assert result.feature_cache_limit / 2 < result.feature_cache_bytes <= result.feature_cache_limit
