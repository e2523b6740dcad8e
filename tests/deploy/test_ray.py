"""Ray Serve LLM with our configuration, in an environment of its own: Ray is large."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import yaml
from vllm import AsyncEngineArgs
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.plugins import load_general_plugins

from deploy.grafana import plot
from deploy.grafana.plot import Prometheus
from tests.deploy.conftest import prometheus_rules, values
from tests.support.chat import VISUAL_TOKENS, by_energy, fresh_url, user
from tests.support.programs import ROOT, program, succeed
from vllm_vtprune import __version__
from vllm_vtprune.devices import GIB, reserve
from vllm_vtprune.plugin.gpu import footprint_of
from vllm_vtprune_checkpoints import tiny_checkpoint
from vllm_vtprune_checkpoints.llava import write_llava_checkpoint
from vllm_vtprune_server.process import free_port, stop

FILE = ROOT / "deploy" / "ray" / "serve.yaml"
DOCKERFILE = ROOT / "deploy" / "ray" / "Dockerfile"
DIRECT = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING": "1"}


ATTEMPTS = 60
NOT_UNDER_RAY = {"http_requests_total"}
"""What the dashboard asks for and Ray's way to a replica does not count."""


def asked_for() -> set[str]:
    """The metrics that rules, alerts and dashboard ask for, without those that rules record."""
    panels = plot.panels(json.loads(plot.DASHBOARD.read_text()))
    queries = [rule["expr"] for rule in prometheus_rules()] + [expr for panel in panels for expr, _ in panel.queries]
    return {name for query in queries for name in re.findall(r"\b(?:vllm:|vtprune:|http_)\w+", query)}


def names(page: str, prefix: str) -> set[str]:
    """The metrics on a page whose names begin like this."""
    return {line.split("{")[0] for line in page.splitlines() if line.startswith(prefix)}


@contextmanager
def scraped(folder: Path) -> Iterator[Prometheus]:
    """Prometheus with the configuration for Ray, but faster, after it has seen the pages that are in the folder."""
    configuration = yaml.safe_load((ROOT / "deploy" / "ray" / "prometheus.yml").read_text())
    configuration["global"] = {"scrape_interval": "1s"}
    del configuration["rule_files"]
    handler = partial(SimpleHTTPRequestHandler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever).start()
        for scrape, page in zip(configuration["scrape_configs"], ("replica", "node"), strict=True):
            (discovery,) = scrape["file_sd_configs"]
            discovery["files"] = [str(folder / f"{page}.json")]
            targets = [{"targets": [f"127.0.0.1:{server.server_port}"]}]
            (folder / f"{page}.json").write_text(json.dumps(targets))
            scrape["metrics_path"] = f"/{page}.txt"
        (folder / "prometheus.yml").write_text(yaml.safe_dump(configuration))
        url = f"127.0.0.1:{free_port()}"
        command = [program("prometheus"), f"--config.file={folder / 'prometheus.yml'}"]
        command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={url}"]
        with (folder / "prometheus.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            prometheus = Prometheus(f"http://{url}")
            for _ in range(ATTEMPTS):
                with suppress(OSError):
                    if prometheus.get("query", query="count(up == 1) == 2")["result"]:
                        break
                time.sleep(0.5)
            else:
                pytest.fail((folder / "prometheus.log").read_text())
            yield prometheus
        finally:
            stop(process)
            server.shutdown()


def test_the_configuration_of_prometheus_for_ray_is_valid() -> None:
    succeed("promtool", "check", "config", ROOT / "deploy/ray/prometheus.yml")


def test_the_plugin_is_named_in_every_replica() -> None:
    (application,) = yaml.safe_load(FILE.read_text())["applications"]
    for model in application["args"]["llm_configs"]:
        variables = model["runtime_env"]["env_vars"]
        assert variables["VLLM_PLUGINS"] == variables["VLLM_MEDIA_CONNECTOR"] == "vtprune"


def test_the_engine_leaves_room_for_the_vision_encoder_of_its_replica(tmp_path: Path) -> None:
    """Nothing else reserves it under Ray."""
    (application,) = yaml.safe_load(FILE.read_text())["applications"]
    (model,) = application["args"]["llm_configs"]
    assert model["model_loading_config"]["model_source"] == "llava-hf/llava-1.5-7b-hf"
    load_general_plugins()
    checkpoint = write_llava_checkpoint(tmp_path, size="7b", weights=False, dtype="bfloat16")
    config = AsyncEngineArgs(model=str(checkpoint), **model["engine_kwargs"]).create_model_config()
    processor = MULTIMODAL_REGISTRY.create_processor(config)
    need = footprint_of(config, processor.family, processor.info.get_max_image_tokens())
    operator_gib = config.get_multimodal_config().mm_ipc_gpu_memory_gb
    assert reserve(need, processes=1, card=80 * GIB, operator_gib=operator_gib).warning == ""


def test_it_says_what_ray_must_be_started_with_and_the_image_does_so() -> None:
    comment = FILE.read_text().partition("\napplications:")[0]
    assert all(f"{name}={value}" in comment for name, value in DIRECT.items())
    (setting,) = values(DOCKERFILE, "ENV")
    assert dict(pair.split("=") for pair in setting.split()) == DIRECT


def test_the_image_with_ray_is_made_of_ours() -> None:
    succeed("hadolint", DOCKERFILE)
    assert f"IMAGE=vllm-vtprune:{__version__}" in values(DOCKERFILE, "ARG")


def installed_with_ray() -> list[str]:
    """What the image with Ray installs."""
    (command,) = values(DOCKERFILE, "RUN")
    (packages,) = re.findall(r"--constraint \S+ (.*?) &&", command)
    return [package.strip('"') for package in packages.split()]


@pytest.fixture
def ray_python(tmp_path: Path) -> Path:
    """A Python that has Ray, and everything that this one has."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "ray"], check=True)
    python = tmp_path / "ray" / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    here = sysconfig.get_path("purelib")
    Path(site, "here.pth").write_text(f"import site; site.addsitedir({here!r})\n")
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-compile", *installed_with_ray()], check=True)
    return python


@pytest.mark.engine
@pytest.mark.verify
def test_ray_serves_pruned_requests_with_reports_and_metrics(ray_python: Path, tmp_path: Path) -> None:
    messages = [user("Where is the dog?", fresh_url())]
    # twice whole: the second time, the prefix cache has it
    policies = ["fast", by_energy(100), False, {"method": "no such"}, False]
    bodies = [{"model": "llava", "max_tokens": 4, "messages": messages, "pruning": policy} for policy in policies]
    bodies.append({"model": "llava@fast", "max_tokens": 4, "messages": messages})
    (tmp_path / "requests.json").write_text(json.dumps(bodies))
    script = ROOT / "tests" / "support" / "ray_serve.py"
    environment = {**os.environ, **DIRECT, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    # Ray gives its processes the least priority, and gives up where they take long to start
    environment |= {"RAY_worker_niceness": "0", "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
    done = subprocess.run(
        [ray_python, script, FILE, str(tiny_checkpoint()), tmp_path / "requests.json"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"answers"')]
    outcome = json.loads(line)
    kept = [VISUAL_TOKENS // 9, 100, VISUAL_TOKENS, None, VISUAL_TOKENS, VISUAL_TOKENS // 9]
    for (status, answer, header), tokens in zip(outcome["answers"], kept, strict=True):
        if tokens is None:
            assert (status, answer["error"]["param"]) == (400, "pruning.method")
        else:
            assert status == 200, answer
            assert [image["kept_tokens"] for image in answer["pruning"]["images"]] == [tokens]
            assert f"kept={tokens}" in header
    assert outcome["visible"] is None, "a replica is to see the GPU of its engine"
    (tmp_path / "replica.txt").write_text(outcome["replica"])
    (tmp_path / "node.txt").write_text(outcome["node"])
    assert names(outcome["replica"], "vllm") == set(), "vLLM's are where they are without Ray"
    assert names(outcome["node"], "vtprune") == names(outcome["node"], "vllm:") == set()
    with scraped(tmp_path) as prometheus:
        for metric, count in {
            "vtprune:visual_tokens_total": 5 * VISUAL_TOKENS,
            "vtprune:visual_tokens_kept_total": sum(tokens for tokens in kept if tokens is not None),
            "vtprune:errors_total": 1,
            "vllm:request_success_total": 5,
        }.items():
            ((_, value),) = [sample["value"] for sample in prometheus.get("query", query=f"sum({metric})")["result"]]
            assert float(value) == count, metric
        there = set(prometheus.get("label/__name__/values"))
        assert {"ray_serve_deployment_replica_healthy", "ray_serve_deployment_replica_starts_total"} <= there
        assert asked_for() - there == NOT_UNDER_RAY
        (inactive,) = [rule["expr"] for rule in prometheus_rules() if rule.get("alert") == "VtpruneInactive"]
        assert prometheus.get("query", query=inactive)["result"] == []
        unpruned = inactive.replace('placement!="none"', 'placement="none"')
        assert prometheus.get("query", query=unpruned)["result"] != [], (
            "would not be raised either where nothing is pruned"
        )
