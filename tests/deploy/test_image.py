"""The image, as far as its files show without Docker: what it is made of, installs and starts."""

import json
import re
import subprocess
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from deploy.docker.lock import OUTPUT, closure, missing_beside_vllm, vllm_package
from tests.deploy.conftest import values
from tests.support.fake_chat import Reply, fake_chat
from tests.support.programs import ROOT, succeed

DOCKERFILE = ROOT / "Dockerfile"
PINNED: dict[str, str] = dict(re.findall(r"^([\w.-]+)==(\S+)", OUTPUT.read_text(), re.MULTILINE))


def test_hadolint_finds_nothing() -> None:
    succeed("hadolint", DOCKERFILE)


def test_the_base_is_the_vllm_that_is_tested() -> None:
    assert f"VLLM_VERSION={version(vllm_package())}" in values(DOCKERFILE, "ARG")
    bases = [value.split()[0] for value in values(DOCKERFILE, "FROM")]
    assert bases[:2] == ["vllm/vllm-openai:v${VLLM_VERSION}", "vllm/vllm-openai-cpu:v${VLLM_VERSION}"]


def test_the_version_in_the_label_is_the_package_s() -> None:
    assert f"VERSION={version('vllm-vtprune')}" in values(DOCKERFILE, "ARG", "server")


def test_labels_are_those_of_the_open_container_initiative() -> None:
    names = set(re.findall(r"([\w.]+)=", " ".join(values(DOCKERFILE, "LABEL"))))
    assert names == {
        f"org.opencontainers.image.{name}"
        for name in ("title", "description", "licenses", "version", "revision", "base.name")
    }


def test_it_does_not_run_as_root() -> None:
    assert values(DOCKERFILE, "USER", "server")[-1] == "2000:0"
    assert values(DOCKERFILE, "ENTRYPOINT") == ['["vtprune", "serve"]']


def test_the_text_pipeline_s_model_is_pinned_for_the_spacy_that_is_installed() -> None:
    (added,) = values(DOCKERFILE, "ADD")
    assert re.search(r"--checksum=sha256:[0-9a-f]{64}\b", added)
    (model,) = re.findall(r"en_core_web_sm-([\d.]+)-py3", added)
    assert model.split(".")[:2] == PINNED["spacy"].split(".")[:2]
    digest, url = re.fullmatch(r"--checksum=sha256:(\w+)\s+(\S+)\s+\S+", added).groups()  # type: ignore[union-attr]
    assert f"{url}#sha256={digest}" in (ROOT / "docs/install.md").read_text(), "the documented command installs another"


def test_nothing_that_vllm_brings_is_pinned_and_what_we_ask_for_is() -> None:
    vllm_packages = closure(vllm_package())
    assert set(PINNED) == set(missing_beside_vllm()), "run deploy/docker/lock.py"
    for line in requires("vllm-vtprune") or ():
        need = Requirement(line)
        if "extra ==" not in line and canonicalize_name(need.name) not in vllm_packages:
            assert need.specifier.contains(PINNED[canonicalize_name(need.name)]), "run deploy/docker/lock.py"


def test_every_install_leaves_dependencies_alone() -> None:
    installs = [value for value in values(DOCKERFILE, "RUN") if "pip install" in value or "pip wheel" in value]
    assert len(installs) == 2
    assert all(value.count("--no-deps") == value.count("pip install") + value.count("pip wheel") for value in installs)


def test_what_it_copies_is_not_ignored() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    kept = [line[1:] for line in lines if line.startswith("!")]
    copied = [word for value in values(DOCKERFILE, "COPY") for word in value.split()[:-1] if not word.startswith("--")]
    copied += re.findall(r"type=bind,source=([^,]+)", " ".join(values(DOCKERFILE, "RUN")))
    assert "deploy/docker/requirements.txt" in copied
    for path in copied:
        assert any(f"{path}/".startswith(f"{prefix}/") for prefix in kept), (
            f"{path} is not in .dockerignore's exceptions"
        )
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("named", [True, False])
def test_a_user_that_nobody_knows_has_a_name(named: bool) -> None:
    """Clusters choose users that are not in /etc/passwd, and torch asks for the name."""
    (setting,) = [value for value in values(DOCKERFILE, "ENV", "server") if "HOME=" in value]
    environment = dict(pair.split("=") for pair in setting.split()) if named else {}
    code = "import getpass, os; os.getuid = lambda: 1000540000; print(getpass.getuser())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == ("vllm\n" if named else ""), done.stderr


def test_its_health_check_tells_a_server_from_none() -> None:
    (check,) = values(DOCKERFILE, "HEALTHCHECK")
    command = json.loads(check[check.index("[") :])
    assert command[0] == "python3"
    with fake_chat(lambda _: Reply(())) as fake:
        for url, healthy in ((fake.url, True), ("http://127.0.0.1:9", False)):
            code = command[2].replace("http://127.0.0.1:8000", url)
            assert url in code
            done = subprocess.run([sys.executable, "-c", code], capture_output=True)
            assert (done.returncode == 0) is healthy, done.stderr


def test_vllm_serve_is_ours_and_its_other_commands_are_vllm_s(tmp_path: Path) -> None:
    for program in ("vllm", "vtprune"):
        (tmp_path / program).write_text(f"#!/bin/sh\necho {program}: $*\n")
        (tmp_path / program).chmod(0o755)
    path = f"{ROOT / 'deploy/docker'}:{tmp_path}:/usr/bin:/bin"
    for command, expected in (("bench serve", "vllm: bench serve\n"), ("serve model", "vtprune: serve model\n")):
        done = subprocess.run(["bash", "-c", f"vllm {command}"], capture_output=True, text=True, env={"PATH": path})
        assert done.stdout == expected, done.stderr
