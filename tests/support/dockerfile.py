"""What a Dockerfile does, without Docker: its RUN lines, in a virtual environment that has vLLM and nothing else."""

import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from dockerfile_parse import DockerfileParser

from deploy.docker.lock import closure, vllm_package
from tests.support.spacy_model import wheel

NOT_RUN = {"useradd": "is for root, and would add a user to this machine"}
"""What a RUN line must not be executed for, where the Dockerfile is not run by Docker."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of a Dockerfile, and the name of the stage that it is in."""

    stage: str
    name: str
    value: str


@dataclass
class Image:
    """What was made of a Dockerfile.

    Attributes:
        root: the folder that stands for the image's root folder, as far as there is one.
        bin: the programs of its Python.
        ran: RUN lines that were executed.
        left: RUN lines that were not, each with the reason.
    """

    root: Path
    bin: Path
    ran: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def instructions(dockerfile: Path) -> list[Instruction]:
    stage = ""
    found = []
    for line in DockerfileParser(str(dockerfile)).structure:
        if line["instruction"] == "COMMENT":
            continue
        if line["instruction"] == "FROM":
            stage = line["value"].rsplit(" AS ", 1)[-1]
        found.append(Instruction(stage, line["instruction"], line["value"]))
    return found


def environment_with_only_vllm(folder: Path, there: Mapping[str, str]) -> Path:
    """A virtual environment that imports vLLM and what it needs from this one, and nothing else. Returns its `bin`.

    Args:
        there: versions of packages that it only seems to have.
    """
    venv.create(folder / "venv", symlinks=True)
    only_vllm = folder / "only-vllm"
    only_vllm.mkdir()
    for package in closure(vllm_package()).values():
        for file in package.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (only_vllm / top).exists():
                (only_vllm / top).symlink_to(Path(str(package.locate_file(top))))
    python = folder / "venv" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
    )
    (Path(site.stdout.strip()) / "vllm.pth").write_text(f"{only_vllm}\n")
    repair = Path(__file__).parents[2] / "scripts" / "torchvision_cpu.py"  # what the set-up does to a CPU build
    subprocess.run([python, repair], check=True, capture_output=True)
    for name, number in there.items():
        about = Path(site.stdout.strip()) / f"{name}-{number}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
        (about / "RECORD").write_text(f"{about.name}/METADATA,,\n{about.name}/RECORD,,\n")
    return python.parent


def build(dockerfile: Path, folder: Path, there: Mapping[str, str] = MappingProxyType({})) -> Image:
    """Execute what the Dockerfile copies and runs, in order, for one image made of all its stages.

    What it adds from elsewhere is spaCy's model; one made here, of the same name and version, takes its place.

    Args:
        there: packages, with their versions, that the base image holds besides vLLM; empty ones.

    Raises:
        AssertionError: a RUN line fails; with its output.
    """
    context = dockerfile.parent
    image = Image(folder / "root", environment_with_only_vllm(folder, there))
    (image.root / "opt").mkdir(parents=True)
    workdir = image.root
    tools = Path(sys.executable).parent  # pip and uv, which the base images bring
    environment = {**os.environ, "PATH": f"{image.bin}:{tools}:{os.environ['PATH']}", "PYTHONPATH": ""}
    environment["VIRTUAL_ENV"] = str(image.bin.parent)
    for instruction in instructions(dockerfile):
        if instruction.name == "WORKDIR":
            workdir = image.root / instruction.value.lstrip("/")
            workdir.mkdir(parents=True, exist_ok=True)
        elif instruction.name == "COPY":
            *sources, target = [word for word in instruction.value.split() if not word.startswith("--")]
            place = image.root / target[1:] if target.startswith("/") else workdir / target
            for source in sources:
                copy(context / source, place)
        elif instruction.name == "ADD":
            *_, url, target = instruction.value.split()
            model = wheel(folder / "model")
            assert model.name == url.rsplit("/", 1)[-1]
            copy(model, image.root / target.strip("/") / model.name)
        elif instruction.name == "RUN":
            if reason := next((why for what, why in NOT_RUN.items() if what in instruction.value), None):
                image.left[instruction.value] = reason
                continue
            done = subprocess.run(
                ["bash", "-euc", translated(instruction.value, image.root, context)],
                cwd=workdir,
                env=environment,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, f"RUN {instruction.value}\n{done.stdout}{done.stderr}"
            image.ran.append(instruction.value)
    return image


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def translated(command: str, root: Path, context: Path) -> str:
    """A RUN line with mounts and absolute paths replaced by where the files are here."""
    binds = re.findall(r"--mount=type=bind,source=(\S+),target=(\S+)", command)
    command = re.sub(r"--mount=\S+", "", command)
    for source, target in binds:
        command = command.replace(target, str(context / source))
    return re.sub(r"(?<![\w.}/-])/(wheels|opt|home)\b", rf"{root}/\1", command)
