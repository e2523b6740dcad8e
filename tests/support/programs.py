"""Programs that tests call and that are not Python packages."""

import shutil
import sys
from pathlib import Path

import pytest


def program(name: str) -> str:
    """The path of a program: beside this Python, where the set-up puts it, or on the PATH. A test fails without it."""
    beside = Path(sys.executable).with_name(name)
    path = str(beside) if beside.exists() else shutil.which(name)
    if path is None:
        pytest.fail(f"{name} is missing: `make setup` brings it; see CONTRIBUTING.md for what it needs")
    return path
