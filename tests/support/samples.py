"""How much of a large grid runs: a fixed fifth in `make test`, all of it with `VTPRUNE_VERIFY`."""

import os
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import settings


def examples(count: int) -> settings:
    """Of a test with generated examples."""
    return settings(max_examples=count if os.environ.get("VTPRUNE_VERIFY") else count // 5)


def fifth(grid: Iterable[Any]) -> list[Any]:
    """Parameters of a test: each fifth runs in `make test`, the others in `make verify`."""
    return [pytest.param(value, marks=[pytest.mark.verify] if index % 5 else []) for index, value in enumerate(grid)]
