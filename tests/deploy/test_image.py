"""The image, as far as it can be proven without Docker: its lines run, and what they make serves."""

import json
import re
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.docker.lock import OUTPUT, closure, vllm_package
from tests.support.chat import VISUAL_TOKENS, Server, fresh_url, kept, user
from tests.support.dockerfile import NOT_RUN, Image, build, instructions
from vllm_vtprune.text import SPACY_MODEL

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "Dockerfile"
PINNED: dict[str, str] = dict(re.findall(r"^([\w.-]+)==(\S+)", OUTPUT.read_text(), re.MULTILINE))


def values(name: str, stage: str | None = None) -> list[str]:
    return [one.value for one in instructions(DOCKERFILE) if one.name == name and stage in (None, one.stage)]


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), DOCKERFILE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_base_is_the_vllm_that_is_tested() -> None:
    assert f"VLLM_VERSION={version(vllm_package())}" in values("ARG")
    bases = [value.split()[0] for value in values("FROM")]
    assert bases[:2] == ["vllm/vllm-openai:v${VLLM_VERSION}", "vllm/vllm-openai-cpu:v${VLLM_VERSION}"]


def test_the_version_in_the_label_is_the_package_s() -> None:
    assert f"VERSION={version('vllm-vtprune')}" in values("ARG", "server")


def test_labels_are_those_of_the_open_container_initiative() -> None:
    names = set(re.findall(r"([\w.]+)=", " ".join(values("LABEL"))))
    assert names == {
        f"org.opencontainers.image.{name}"
        for name in ("title", "description", "licenses", "version", "revision", "base.name")
    }


def test_it_does_not_run_as_root() -> None:
    assert values("USER", "server")[-1] == "2000:0"
    assert values("ENTRYPOINT") == ['["vtprune", "serve"]']


def test_the_text_pipeline_s_model_is_pinned_for_the_spacy_that_is_installed() -> None:
    (added,) = values("ADD")
    assert re.search(r"--checksum=sha256:[0-9a-f]{64}\b", added)
    (model,) = re.findall(r"en_core_web_sm-([\d.]+)-py3", added)
    assert model.split(".")[:2] == PINNED["spacy"].split(".")[:2]
    digest, url = re.fullmatch(r"--checksum=sha256:(\w+)\s+(\S+)\s+\S+", added).groups()  # type: ignore[union-attr]
    assert f"{url}#sha256={digest}" in (ROOT / "docs/install.md").read_text(), "the documented command installs another"


def test_nothing_that_vllm_brings_is_pinned_and_what_we_ask_for_is() -> None:
    theirs = closure(vllm_package())
    assert set(PINNED) & set(theirs) == set()
    for line in requires("vllm-vtprune") or ():
        need = Requirement(line)
        if "extra ==" not in line and canonicalize_name(need.name) not in theirs:
            assert need.specifier.contains(PINNED[canonicalize_name(need.name)]), "run deploy/docker/lock.py"


def test_every_install_leaves_dependencies_alone() -> None:
    installs = [value for value in values("RUN") if "pip install" in value or "pip wheel" in value]
    assert len(installs) == 2
    assert all(value.count("--no-deps") == value.count("pip install") + value.count("pip wheel") for value in installs)


def test_what_it_copies_is_not_ignored() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    kept = [line[1:] for line in lines if line.startswith("!")]
    copied = [word for value in values("COPY") for word in value.split()[:-1] if not word.startswith("--")]
    copied += re.findall(r"type=bind,source=([^,]+)", " ".join(values("RUN")))
    assert "deploy/docker/requirements.txt" in copied
    for path in copied:
        assert any(f"{path}/".startswith(f"{one}/") for one in kept), f"{path} is not in .dockerignore's exceptions"
        assert (ROOT / path).exists(), path


@pytest.mark.engine
def test_every_line_runs_but_those_that_cannot_here(image: Image) -> None:
    assert {*image.ran, *image.left} == set(values("RUN"))
    assert sorted(image.left.values()) == sorted(NOT_RUN.values())


@pytest.mark.engine
@pytest.mark.verify
def test_it_is_not_built_where_it_would_replace_what_vllm_holds(tmp_path: Path) -> None:
    there = {"wrapt": "1.17.3", "wasabi": PINNED["wasabi"]}
    with pytest.raises(AssertionError) as failure:
        build(DOCKERFILE, tmp_path, there)
    named = [line for line in str(failure.value).splitlines() if line in {f"{name}=={v}" for name, v in there.items()}]
    assert named == ["wrapt==1.17.3"], failure.value


@pytest.mark.parametrize("named", [True, False])
def test_a_user_that_nobody_knows_has_a_name(named: bool) -> None:
    """Clusters choose users that are not in /etc/passwd, and torch asks for the name."""
    (setting,) = [value for value in values("ENV", "server") if "HOME=" in value]
    environment = dict(one.split("=") for one in setting.split()) if named else {}
    code = "import getpass, os; os.getuid = lambda: 1000540000; print(getpass.getuser())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == ("vllm\n" if named else ""), done.stderr


@pytest.mark.engine
def test_what_it_installs_is_complete_and_hides_nothing_of_vllm(image: Image) -> None:
    code = """
from importlib.metadata import distributions, version
from packaging.requirements import Requirement
here = [d for d in distributions() if 'only-vllm' not in str(d._path)]
names = sorted(d.metadata['Name'].lower() for d in here)
for d in here:
    for line in d.requires or ():
        need = Requirement(line)
        if need.marker is None or need.marker.evaluate({'extra': ''}):
            assert need.specifier.contains(version(need.name), prereleases=True), (d.metadata['Name'], line)
print(*names)
"""
    done = subprocess.run([image.bin / "python", "-Ic", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    installed = {name.replace("_", "-") for name in done.stdout.split()}
    assert installed == {*PINNED, "vllm-vtprune", "en-core-web-sm"}


@pytest.mark.engine
def test_its_server_prunes(image: Image, deployed: Server) -> None:
    answer = deployed.ask(messages=[user("Is the bus red?", fresh_url())], pruning="fast")
    assert kept(answer) == [VISUAL_TOKENS // 9]
    assert answer["pruning"]["text_pipeline"] == SPACY_MODEL
    assert answer["pruning"]["images"][0]["nouns"] == ["bus", "red"], "not by the model that is installed"
    code = "import vllm_vtprune_server.plugin as plugin, vllm_vtprune; print(plugin.__file__, vllm_vtprune.__file__)"
    done = subprocess.run([image.bin / "python", "-Ic", code], capture_output=True, text=True, check=True)
    assert all(file.startswith(str(image.bin.parent)) for file in done.stdout.split()[-2:]), "not from this checkout"


@pytest.mark.engine
def test_its_health_check_tells_a_server_from_none(image: Image, deployed: Server) -> None:
    (check,) = values("HEALTHCHECK")
    command = json.loads(check[check.index("[") :])
    assert command[0] == "python3"
    for url, healthy in ((deployed.url, True), ("http://127.0.0.1:9", False)):
        code = command[2].replace("http://127.0.0.1:8000", url)
        assert url in code
        done = subprocess.run([image.bin / "python3", "-c", code], capture_output=True)
        assert (done.returncode == 0) is healthy, done.stderr


@pytest.mark.engine
def test_other_commands_of_vllm_are_vllm_s(image: Image, tmp_path: Path) -> None:
    (tmp_path / "vllm").write_text("#!/bin/sh\necho stock $*\n")
    (tmp_path / "vllm").chmod(0o755)
    path = f"{image.root / 'opt/vtprune/bin'}:{tmp_path}:/usr/bin:/bin"
    done = subprocess.run(["bash", "-c", "vllm bench serve"], capture_output=True, text=True, env={"PATH": path})
    assert done.stdout == "stock bench serve\n"
