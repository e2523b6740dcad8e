"""Who imports whom, by the source alone: no package imports one that stands on it, and modules form no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "vllm_vtprune": "vllm_vtprune",
    "vllm_vtprune_checkpoints": "checkpoints",
    "vllm_vtprune_server": "server",
    "vllm_vtprune_evaluation": "evaluation",
}
"""Package -> folder; each may import those before it."""
NOT_INSTALLED = {"deploy", "loadtests", "tests", "training"}


def modules(package: str) -> dict[str, ast.Module]:
    """A package's modules by their names."""
    folder = ROOT / PACKAGES[package]
    names = {file: (package, *file.relative_to(folder).with_suffix("").parts) for file in folder.rglob("*.py")}
    return {".".join(name).removesuffix(".__init__"): ast.parse(file.read_text()) for file, name in names.items()}


def imported(node: ast.AST, *, late: bool) -> Iterator[str]:
    """Names that are imported, `b` of ``from a import b`` as ``a.b`` too; `late`: also by functions and for types."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (str(child.module), *(f"{child.module}.{alias.name}" for alias in child.names))
        elif late or not (
            isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            or (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING")
        ):
            yield from imported(child, late=late)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_imports_one_that_stands_on_it(package: str) -> None:
    later = NOT_INSTALLED.union(list(PACKAGES)[list(PACKAGES).index(package) + 1 :])
    trees = modules(package)
    assert package in trees
    upwards = [
        (module, name)
        for module, tree in trees.items()
        for name in imported(tree, late=True)
        if name.split(".")[0] in later
    ]
    assert upwards == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    trees = modules(package)
    graph = {module: trees.keys() & set(imported(tree, late=False)) - {module} for module, tree in trees.items()}
    assert any(graph.values())
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(" <- ".join(circle.args[1]))
