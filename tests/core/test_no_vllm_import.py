"""The core stands alone: no vLLM, and nothing heavy before it is needed."""

import subprocess
import sys

import pytest

STAGES = (
    ("import vllm_vtprune; vllm_vtprune.__version__; dir(vllm_vtprune)", set()),
    ("from vllm_vtprune import PruningPolicy; PruningPolicy.parse('balanced').selection_digest()", {"pydantic"}),
    ("import vllm_vtprune.selectors.registry", {"pydantic"}),
    (
        "import torch\nfrom vllm_vtprune import *\n"
        "f = VisualFeatures(torch.randn(9, 4), torch.randn(9, 4), (3, 3))\n"
        "for m in ('resprune', 'random', 'uniform'):\n"
        "    plan_tokens(f, PruningPolicy.parse({'method': m, 'budget': {'min_tokens': 1}}))",
        {"torch", "pydantic"},
    ),
    (
        "from vllm_vtprune.text import read_prompt; assert read_prompt('Where is the dog?').nouns == ('dog',)",
        {"spacy", "pydantic", "torch"},
    ),
)
"""What one process does, one after the other, and which heavy modules it may have loaded by then."""

LOADED = (
    "import sys; print(','.join(m for m in ('vllm', 'torch', 'spacy', 'transformers', 'pydantic') if m in sys.modules))"
)


def test_imports() -> None:
    code = "\n".join(f"{stage}\n{LOADED}" for stage, _ in STAGES)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    lines = done.stdout.splitlines()
    assert len(lines) == len(STAGES)
    for line, (stage, allowed) in zip(lines, STAGES, strict=True):
        assert {name for name in line.split(",") if name} <= allowed, stage


def test_unknown_names_are_attribute_errors() -> None:
    import vllm_vtprune

    with pytest.raises(AttributeError, match="nothing_here"):
        _ = vllm_vtprune.nothing_here
