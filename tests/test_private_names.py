"""Private names of vLLM are in `vllm_vtprune/plugin/compat` alone, and what is overridden in its table of hooks."""

from __future__ import annotations

import ast
import inspect
import pkgutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from vllm_vtprune.plugin import compat

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "vllm_vtprune": "vllm_vtprune",
    "vllm_vtprune_server": "server",
    "vllm_vtprune_checkpoints": "checkpoints",
    "vllm_vtprune_evaluation": "evaluation",
}
COMPAT = "vllm_vtprune.plugin.compat"


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier() and name[0] == "_" and name != "_" and name[:2] != "__"


def defined(tree: ast.AST) -> set[str]:
    """Private names that a module defines or assigns."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_own_class(node.value):
            names.add(node.attr)
    return {name for name in names if is_private(name)}


def of_own_class(value: ast.expr) -> bool:
    """Whether an expression is ``self``, ``cls`` or ``super()``."""
    return ast.unparse(value) in ("self", "cls", "super()")


def foreign(tree: ast.AST, everywhere: set[str]) -> Iterator[str]:
    """Private names that a module takes from somebody else.

    Args:
        tree: the module.
        everywhere: names that our classes define; of other objects, those count that the module itself defines.
    """
    here = defined(tree)
    everywhere = everywhere | here
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr not in (everywhere if of_own_class(node.value) else here):
                yield f"line {node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.ImportFrom):
            for name in (*str(node.module).split("."), *(alias.name for alias in node.names)):
                if is_private(name):
                    yield f"line {node.lineno}: import of {name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(name.value) and name.value not in here:
                yield f"line {node.lineno}: {ast.unparse(node)}"


def trees() -> dict[Path, ast.Module]:
    files = (file for folder in FOLDERS.values() for file in (ROOT / folder).rglob("*.py"))
    return {file.relative_to(ROOT): ast.parse(file.read_text()) for file in files}


def test_private_names_of_others_are_in_compat_alone() -> None:
    modules = trees()
    own = set().union(*map(defined, modules.values())) | set(compat.PROCESSOR_HOOKS)
    hooks = {f".{name}" for name in compat.PROCESSOR_HOOKS}
    seen = [
        (file, what)
        for file, tree in modules.items()
        for what in foreign(tree, own)
        if not any(what.endswith(hook) for hook in hooks)
    ]
    assert [(file, what) for file, what in seen if "compat" not in file.parts] == []
    assert seen, "compat has some"


def our_classes() -> set[type]:
    modules = []
    for package in FOLDERS:
        root = import_module(package)
        modules += [import_module(m.name) for m in pkgutil.walk_packages(root.__path__, f"{package}.")]
    return {
        value for module in modules for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__
    }  # fmt: skip


def test_private_methods_of_vllm_are_overridden_in_the_table_of_hooks_alone() -> None:
    """An override of a name that vLLM has given up would have no effect, so each is checked when it is imported."""
    overridden = {
        (owner.__module__, name)
        for owner in our_classes()
        for name, value in vars(owner).items()
        if is_private(name)
        and inspect.isroutine(value)
        and any(name in vars(base) for base in owner.__mro__[1:] if base.__module__.split(".")[0] == "vllm")
    }
    outside = {(module, name) for module, name in overridden if not module.startswith(COMPAT)}
    assert {name for _, name in outside} <= set(compat.PROCESSOR_HOOKS)
    assert "_get_mm_hashes" in {name for _, name in outside}
