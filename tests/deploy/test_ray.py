"""Ray Serve LLM with our configuration, in an environment of its own: Ray is large."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import yaml

from tests.support.chat import VISUAL_TOKENS, fresh_url, user
from vllm_vtprune.demo.checkpoint import tiny_checkpoint

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "ray" / "serve.yaml"
RAY = "ray[serve]==2.60.0"
NEEDED = (
    "fsspec",
    "jsonref",
    "pandas",
    "pyarrow",
)  # of ray[llm], which asks for another vLLM than the one that is here
DIRECT = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1"}


def test_the_plugin_is_named_in_every_replica() -> None:
    (application,) = yaml.safe_load(FILE.read_text())["applications"]
    for model in application["args"]["llm_configs"]:
        variables = model["runtime_env"]["env_vars"]
        assert variables["VLLM_PLUGINS"] == variables["VLLM_MEDIA_CONNECTOR"] == "vtprune"


def test_it_says_what_ray_must_be_started_with() -> None:
    comment = FILE.read_text().partition("\napplications:")[0]
    assert all(f"{name}={value}" in comment for name, value in DIRECT.items())


@pytest.fixture
def ray_python(tmp_path: Path) -> Path:
    """A Python that has Ray, and everything that this one has."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "ray"], check=True)
    python = tmp_path / "ray" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    here = sysconfig.get_path("purelib")
    Path(site, "here.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-compile", RAY, *NEEDED], check=True)
    return python


@pytest.mark.engine
@pytest.mark.skipif(not os.environ.get("VTPRUNE_VERIFY"), reason="takes three minutes and downloads Ray: `make verify`")
def test_ray_serves_pruned_requests_with_reports_and_metrics(ray_python: Path, tmp_path: Path) -> None:
    messages = [user("Where is the dog?", fresh_url())]
    policies = ["fast", {"budget": {"type": "tokens", "keep": 100}}, False, {"method": "no such"}]
    bodies = [{"model": "llava", "max_tokens": 4, "messages": messages, "pruning": policy} for policy in policies]
    bodies.append({"model": "llava@fast", "max_tokens": 4, "messages": messages})
    (tmp_path / "requests.json").write_text(json.dumps(bodies))
    script = ROOT / "tests" / "support" / "ray_serve.py"
    environment = {**os.environ, **DIRECT, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [ray_python, script, FILE, str(tiny_checkpoint()), tmp_path / "requests.json"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"answers"')]
    found = json.loads(line)
    kept = [VISUAL_TOKENS // 9, 100, VISUAL_TOKENS, None, VISUAL_TOKENS // 9]
    for (status, answer, header), tokens in zip(found["answers"], kept, strict=True):
        if tokens is None:
            assert (status, answer["error"]["param"]) == (400, "pruning.method")
        else:
            assert status == 200, answer
            assert [image["kept_tokens"] for image in answer["pruning"]["images"]] == [tokens]
            assert f"kept={tokens}" in header
    counted = {line.split("{")[0]: 0.0 for line in found["metrics"]}
    for line in found["metrics"]:
        counted[line.split("{")[0]] += float(line.rsplit(" ", 1)[1])
    assert counted["vtprune:visual_tokens_total"] == 4 * VISUAL_TOKENS
    assert counted["vtprune:visual_tokens_kept_total"] == sum(tokens for tokens in kept if tokens is not None)
    assert counted["vtprune:errors_total"] == 1
