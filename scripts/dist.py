"""Build the sdist and the wheel for PyPI, and check them with twine: `make dist REPOSITORY=https://github.com/OWNER/NAME`.

PyPI shows README.md away from the repository, so links must be absolute there. They and the project's URLs follow from
the address of the repository. Everything is built in a copy of the tracked files.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!https?://|#)(?P<target>[^)\s]+)\)")


def absolute(readme: str, repository: str, version: str) -> str:
    """A README with absolute links to the files of a version.

    Args:
        readme: Markdown, with links relative to the repository.
        repository: address of the repository, without a slash at its end.
        version: version whose tag, ``v`` and the version, the links lead to.
    """

    def link(match: re.Match[str]) -> str:
        kind = "raw" if match["image"] else "blob"
        return f"{match['image']}[{match['text']}]({repository}/{kind}/v{version}/{match['target']})"

    return LINK.sub(link, readme)


def urls(repository: str, version: str) -> str:
    """The table ``[project.urls]`` of pyproject.toml."""
    pages = {
        "Source": repository,
        "Documentation": f"{repository}/blob/v{version}/docs/index.md",
        "Changelog": f"{repository}/blob/v{version}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }
    return "\n[project.urls]\n" + "".join(f'{name} = "{url}"\n' for name, url in pages.items())


def build(repository: str, out: Path, isolated: bool = True) -> None:
    """Build sdist and wheel into a folder, and check them.

    Args:
        repository: address of the repository.
        out: folder; it is made, and emptied if it exists.
        isolated: build with a setuptools fetched from PyPI; otherwise with the installed one.

    Raises:
        subprocess.CalledProcessError: a command failed; it says why on standard error.
    """
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    shutil.rmtree(out, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        for name in filter(None, tracked.split("\0")):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
        [version] = re.findall(r'^__version__ = "(.+)"$', (copy / "vllm_vtprune/__init__.py").read_text(), re.MULTILINE)
        readme = copy / "README.md"
        readme.write_text(absolute(readme.read_text(), repository, version))
        with (copy / "pyproject.toml").open("a") as project:
            project.write(urls(repository, version))
        options = [] if isolated else ["--no-isolation"]
        subprocess.run([sys.executable, "-m", "build", "--outdir", out.resolve(), *options, copy], check=True)
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *sorted(out.iterdir())], check=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Build the sdist and the wheel for PyPI.")
    parser.add_argument("repository", help="address of the public repository, as https://github.com/OWNER/NAME")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder, emptied first (default: dist)")
    parser.add_argument("--no-isolation", action="store_true", help="build with the installed setuptools, offline")
    args = parser.parse_args(argv)
    if not re.fullmatch(r"https://[^/\s]+(/[^/\s]+)+", args.repository):
        parser.error(f"repository: {args.repository!r} is no address; expected https://HOST/OWNER/NAME")
    try:
        build(args.repository, args.out, isolated=not args.no_isolation)
    except subprocess.CalledProcessError as error:
        sys.exit(f"dist: {' '.join(map(str, error.cmd[:4]))} failed with status {error.returncode}")


if __name__ == "__main__":
    main()
