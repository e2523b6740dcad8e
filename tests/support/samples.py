"""How much of a large grid runs: a fixed fifth in `make test`, all of it with `VTPRUNE_VERIFY`."""

import os

from hypothesis import settings


def examples(count: int) -> settings:
    """Of a test with generated examples."""
    return settings(max_examples=count if os.environ.get("VTPRUNE_VERIFY") else count // 5)
