"""The kernel that drafts picks on a GPU: in Triton's interpreter against NumPy, and through its compiler."""

import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.support.kernel_forms import form_of
from vllm_vtprune.selectors import pivots_triton
from vllm_vtprune.selectors.pivots_triton import TILE, WARPS, WIDTH

CASES = 16
KERNEL = pivots_triton._draft
TYPES = dict.fromkeys(pivots_triton.POINTERS, "*fp64") | {
    "seed": "*i64",
    "order": "*i64",
    "candidates": "i32",
    "count": "i32",
    "WIDTH": "constexpr",
    "TILE": "constexpr",
}


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


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_it_compiles_for_a_gpu(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    source = ASTSource(KERNEL, {name: TYPES[name] for name in KERNEL.arg_names}, {"WIDTH": WIDTH, "TILE": TILE})
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": WARPS})
    assert len(compiled.asm["cubin"]) > 1000
    assert f".target sm_{capability}" in compiled.asm["ptx"]
    assert "bar.sync" in compiled.asm["ptx"], "what a step wrote, the next one reads elsewhere"
    assert compiled.metadata.shared < 1024


def forms(kernel: Any) -> int:
    """Of how many forms of it Triton would compile, over all sizes of drafts and any alignment of their tensors."""
    form = form_of(kernel)
    seen = set()
    sizes = (1, 2, 8, 15, 16, 32, 48, 64, 100, 128)
    for candidates, count, offset in product(sizes, sizes, (0, 1)):
        doubles, places = torch.empty(8, dtype=torch.float64)[offset:], torch.empty(8, dtype=torch.long)[offset:]
        pointers = [places if TYPES[name] == "*i64" else doubles for name in pivots_triton.POINTERS]
        seen.add(form(*pointers, candidates, count))
    return len(seen)


def test_there_is_one_form_of_it() -> None:
    """So that the first image of a process compiles what all others use, of whatever size and count."""
    assert forms(KERNEL) == 1
    assert forms(triton.jit(KERNEL.fn)) > 1, "else the count says nothing"
