"""Run by Ray's own Python: serve a configuration of Ray Serve LLM on this machine's CPUs, ask it, say what it answered.

``python ray_serve.py CONFIG CHECKPOINT REQUESTS`` puts the checkpoint in the place of the configuration's model, sends
each of the requests (a JSON list of bodies), and prints one JSON object: the answers, ``/metrics`` of the replica, what
Ray exports for its node, and the GPUs that Ray lets a replica see: null for all of them.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import ray
import yaml
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.llm import LLMServingArgs, build_openai_app
from ray.serve.schema import ServeDeploySchema

from deploy.ray.replicas import replicas

ATTEMPTS = 60
PASSED_ON = ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTHONPATH", "VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND")


def on_cpus(arguments: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """The application's arguments for a machine without GPUs."""
    (model,) = arguments["llm_configs"]
    model["model_loading_config"]["model_source"] = checkpoint
    del model["accelerator_type"]
    model["accelerator_config"] = {"kind": "cpu"}
    model["placement_group_config"] = {"bundles": [{"CPU": 1}]}
    model["deployment_config"] = {"num_replicas": 1}
    model["engine_kwargs"] = {"max_model_len": 2048, "enforce_eager": True}
    model["runtime_env"]["env_vars"] |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return arguments


@ray.remote(num_cpus=0)
class Replica:
    """What a replica is to Ray: an actor that asks for no GPU."""

    def visible(self) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")


def exported() -> str:
    """What Ray exports for this node, as soon as vLLM's requests are in it: Ray collects every ten seconds."""
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    for _ in range(ATTEMPTS):
        text = httpx.get(url, timeout=60).text
        if "vllm_request_success_total{" in text:
            return text
        time.sleep(1)
    raise TimeoutError(f"no requests of vLLM at {url}")


def main(config: Path, checkpoint: str, requests: Path) -> None:
    read = ServeDeploySchema.model_validate(yaml.safe_load(config.read_text()))
    (application,) = read.applications
    LLMServingArgs.model_validate(application.args)
    (environment,) = [model["runtime_env"] for model in application.args["llm_configs"]]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    ray.init(num_cpus=4, num_gpus=1, include_dashboard=False, object_store_memory=200 * 2**20)
    try:
        host = read.http_options.host  # replicas listen there too, and are scraped at the node's address
        serve.start(http_options=HTTPOptions(host=host, port=port))
        serve.run(build_openai_app(on_cpus(application.args, checkpoint)))
        url = f"http://127.0.0.1:{port}"
        answers = [
            httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60) for body in json.loads(requests.read_text())
        ]
        (replica,) = replicas()
        outcome = {
            "answers": [[answer.status_code, answer.json(), answer.headers.get("x-vtprune")] for answer in answers],
            "replica": httpx.get(f"http://{replica}/metrics", timeout=60).text,
            "node": exported(),
            "visible": ray.get(Replica.options(runtime_env=environment).remote().visible.remote()),
        }
        print(json.dumps(outcome))
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
