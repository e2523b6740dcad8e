"""Nothing in the code is called by a word that docs/style.md says is not a name."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("vllm_vtprune", "server", "evaluation", "checkpoints", "training", "loadtests", "deploy", "scripts", "tests")


def no_names() -> set[str]:
    rule = next(line for line in (ROOT / "docs/style.md").read_text().splitlines() if "are not names" in line)
    return set(re.findall(r"`(\w+)`", rule))


def names(tree: ast.AST) -> set[str]:
    """What a module calls its functions, classes, parameters, attributes and variables."""
    bound = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            bound.add(node.attr)
    return {name.strip("_").lower() for name in bound}


def test_nothing_is_called_by_a_pronoun() -> None:
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 400
    wrong = {str(file.relative_to(ROOT)): names(ast.parse(file.read_text())) & no_names() for file in files}
    assert not {file: called for file, called in wrong.items() if called}
