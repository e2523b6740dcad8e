"""The commands of docs/loadtests.md do what they say, on a real server."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtests.drive import KINDS, drive
from tests.support.chat import VISUAL_TOKENS, Server, random_model
from vllm_vtprune_server.process import running_server

pytestmark = [pytest.mark.engine, pytest.mark.verify]

ROOT = Path(__file__).parent.parent.parent
KEPT = 64
ONLY_THEIRS = {"rtfx", "tokenizer_id", "burstiness", "queue_times"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("served") / "server.log"
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    options = [*random_model(), "--max-model-len", "2048", "--enforce-eager"]
    with running_server(options, environment=environment, log=log) as url:
        yield Server(url, log)


def recipe(containing: str) -> list[str]:
    """The words of the documented command in which this stands."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "docs" / "loadtests.md").read_text(), re.DOTALL | re.MULTILINE)
    [command] = [block for block in blocks if containing in block]
    return shlex.split(command.replace("\\\n", ""))


def test_vllm_s_own_benchmark_drives_the_field(served: Server, tmp_path: Path) -> None:
    place = {"python": sys.executable, "http://localhost:8000": served.url, "build/bench": str(tmp_path)}
    command = [place.get(word, word) for word in recipe("vllm.benchmarks.serve")]
    before = served.metrics()
    environment = {**os.environ, "VLLM_PLUGINS": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    [path] = tmp_path.glob("openai-chat-*.json")
    benchmark = json.loads(path.read_text())
    assert (benchmark["completed"], benchmark["failed"]) == (8, 0)
    assert all(KEPT < length < KEPT + 100 for length in benchmark["input_lens"]), "visual tokens were pruned"
    images, tokens = served.metrics().since(
        before, "vtprune:keep_ratio_count|method=resprune", "vtprune:visual_tokens_kept_total|method=resprune"
    )
    assert images >= 8, "and those of its warm-up"
    assert tokens == images * KEPT

    records = drive(
        served.url, tmp_path / "ours", users=2, seconds=3, kinds=["FreshImages"], options=["--pruning", "fast"]
    )
    assert {record.error for record in records} == {None}
    result = json.loads((tmp_path / "ours" / "result.json").read_text())
    assert set(benchmark) - set(result) == ONLY_THEIRS
    assert result["vtprune"]["keep_ratio"] == pytest.approx(KEPT / VISUAL_TOKENS)


def test_every_kind_of_user_is_served(served: Server, tmp_path: Path) -> None:
    """Also long conversations about the answers of a model that talks nonsense."""
    records = drive(served.url, tmp_path, users=9, seconds=8, kinds=[], options=["--goodput", "ttft:60000"])
    assert {record.error for record in records} == {None}
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["vtprune"]["kinds"]) == set(KINDS)
    assert result["vtprune"]["without_usage"] == 0
    assert all(record.output_tokens == 16 for record in records)
