"""Programs that tests call: those of the repository, and some that are not Python packages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest

ROOT = Path(__file__).parents[2]


def program(name: str) -> str:
    """The path of a program: beside this Python, where the set-up puts it, or on the PATH. A test fails without it."""
    beside = Path(sys.executable).with_name(name)
    path = str(beside) if beside.exists() else shutil.which(name)
    if path is None:
        pytest.fail(f"{name} is missing: `make setup` brings it; see CONTRIBUTING.md for what it needs")
    return path


def succeed(name: str, *arguments: str | Path) -> None:
    """Run a program to its end. A test fails with what it wrote unless it ends with status 0."""
    done = subprocess.run([program(name), *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def run_module(module: str, *arguments: str) -> CompletedProcess[str]:
    """Run ``python -m MODULE ARGUMENTS`` in the repository to its end."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=550, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
