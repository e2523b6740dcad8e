"""The GPU's form of the greedy picks, in Triton's interpreter, against the CPU's."""

import os
import subprocess
import sys
from pathlib import Path

CASES = 9


def test_same_picks_as_on_a_cpu() -> None:
    """In a process of its own: Triton decides on import whether it interprets."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.support.interpreted_pivots"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.splitlines()[-1] == f"{CASES} cases agree"
