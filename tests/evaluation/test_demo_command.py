"""`vtprune demo` from end to end, and interrupted: of a wheel made as the image makes it, away from the repository."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from tests.deploy.conftest import values
from tests.support.process_tree import command_of, family, interruptible, kill, survivors
from tests.support.programs import program
from vllm_vtprune_evaluation.questions import is_right

pytestmark = pytest.mark.engine

TIMEOUT = 300  # seconds
STOPPED_WITHIN = 30  # seconds: well before it would lose patience with the server
GONE_WITHIN = 60  # seconds after the demo's own end
ROOT = Path(__file__).parents[2]
# The environment's own installation leads to the repository, also to what the wheel lacks.
WITHOUT_REPOSITORY = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in getattr(finder, "__module__", "")]
"""


@dataclass
class Demo:
    """A demo that runs, and every process that was seen to belong to it."""

    process: subprocess.Popen[bytes]
    stdout: Path
    stderr: Path
    seen: set[psutil.Process] = field(default_factory=set)

    def wait(self, until: Callable[["Demo"], bool] = lambda demo: False) -> None:
        """Until the demo ends, or the condition holds."""
        deadline = time.monotonic() + TIMEOUT
        while self.process.poll() is None and not until(self):
            assert time.monotonic() < deadline, self.stderr.read_text()
            try:
                self.seen.update(family(self.process.pid))
            except psutil.NoSuchProcess:
                continue
            time.sleep(0.2)

    def has_started(self, name: str) -> bool:
        """Whether a process of that name runs among those seen."""
        return any(name in command_of(process) for process in self.seen)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel of what the Dockerfile copies, installed without dependencies."""
    folder = tmp_path_factory.mktemp("wheel")
    source, wheels, site = folder / "src", folder / "wheels", folder / "site"
    for copied in values(ROOT / "Dockerfile", "COPY", "wheels"):
        *names, target = copied.split()
        for name in names:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, source / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                (source / target).mkdir(exist_ok=True, parents=True)
                shutil.copy(ROOT / name, source / target)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", wheels, source], check=True)
    install = [program("uv"), "pip", "install", "--quiet", "--offline", "--no-deps", "--python", sys.executable]
    subprocess.run([*install, "--target", site, *wheels.iterdir()], check=True)
    (site / "sitecustomize.py").write_text(WITHOUT_REPOSITORY)
    return site


@pytest.fixture
def demo(site: Path, tmp_path: Path) -> Iterator[Demo]:
    stdout, stderr = tmp_path / "stdout", tmp_path / "stderr"
    with stdout.open("wb") as out, stderr.open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, site / "bin" / "vtprune", "demo", "--json"],
            cwd=tmp_path,
            stdout=out,
            stderr=err,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(site)},
            preexec_fn=interruptible,
        )
    started = Demo(process, stdout, stderr)
    try:
        yield started
    finally:
        kill(list(started.seen))
        process.kill()
        process.wait()


@pytest.mark.verify  # `.ci/run` runs the demo; tests/server/test_evaluation.py has its report, from the shared server
def test_one_picture_unpruned_and_pruned(demo: Demo) -> None:
    demo.wait()
    assert demo.process.returncode == 0, demo.stderr.read_text()
    lines = demo.stdout.read_text().splitlines()
    result = json.loads(lines[-1])
    assert result["weights"] == "trained"
    for arm in (result["unpruned"], result["pruned"]):
        assert is_right(arm["answer"], result["right_answer"])
    [image] = result["pruned"]["pruning"]["images"]
    assert 32 <= image["kept_tokens"] < image["visual_tokens"] == 576
    assert image["nouns"], "of the question about the scene"

    assert len(demo.seen) >= 3, "itself, the server, its engine"
    assert survivors(list(demo.seen), within=GONE_WITHIN) == []


@pytest.mark.verify  # another start; test_running_server.py interrupts a stand-in for the server
def test_interrupted_while_the_engine_starts_it_stops_the_server(demo: Demo) -> None:
    demo.wait(lambda demo: demo.has_started("EngineCore"))
    assert demo.process.poll() is None, demo.stderr.read_text()
    assert "Serving on" not in demo.stderr.read_text()
    assert len(demo.seen) >= 3, "itself, the server, its engine"

    interrupted = time.monotonic()
    demo.process.send_signal(signal.SIGINT)
    demo.wait()
    assert time.monotonic() - interrupted < STOPPED_WITHIN
    assert demo.process.returncode == 130, demo.stderr.read_text()
    assert demo.stderr.read_text().endswith("Interrupted; the server is stopped.\n")
    assert demo.stdout.read_text() == ""
    assert survivors(list(demo.seen), within=GONE_WITHIN) == []
