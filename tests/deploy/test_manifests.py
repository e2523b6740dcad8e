"""Compose, Kubernetes and chart files, by the schemas of the tools that read them, and against what the server says."""

import json
import re
from pathlib import Path
from typing import Any

import compose_spec
import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from jsonschema import Draft202012Validator

from server.launch import SHUTDOWN_TIMEOUT
from tests.deploy.conftest import Watched
from vllm_vtprune import __version__
from vllm_vtprune.policy import BUILTIN_PRESETS

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBERNETES_VERSION = "1.33"
Document = dict[str, Any]

CHART_VALUES = {
    "type": "object",
    "required": ["servingEngineSpec"],
    "properties": {
        "servingEngineSpec": {
            "type": "object",
            "required": ["modelSpec"],
            "properties": {
                "runtimeClassName": {"type": "string"},
                "containerPort": {"type": "integer"},
                "servicePort": {"type": "integer"},
                "securityContext": {"type": "object"},
                "containerSecurityContext": {"properties": {"runAsNonRoot": {"type": "boolean"}}},
                "startupProbe": {"$ref": "#/$defs/probe"},
                "livenessProbe": {"$ref": "#/$defs/probe"},
                "modelSpec": {"type": "array", "items": {"$ref": "#/$defs/model"}},
            },
            "additionalProperties": False,
        },
        "routerSpec": {"properties": {"enableRouter": {"type": "boolean"}}, "additionalProperties": False},
        "extraObjects": {"type": "array"},
    },
    "additionalProperties": False,
    "$defs": {
        "probe": {
            "properties": {
                "failureThreshold": {"type": "integer"},
                "initialDelaySeconds": {"type": "integer"},
                "periodSeconds": {"type": "integer"},
                "httpGet": {
                    "properties": {"path": {"const": "/health"}, "port": {"type": ["integer", "string"]}},
                    "additionalProperties": False,
                },
            },
            "additionalProperties": False,
        },
        "model": {
            "required": ["name", "repository", "tag", "modelURL", "requestCPU", "requestMemory"],
            "properties": {
                "name": {"type": "string"},
                "repository": {"type": "string"},
                "tag": {"type": "string"},
                "modelURL": {"type": "string"},
                "replicaCount": {"type": "integer"},
                "requestCPU": {"type": "integer"},
                "requestMemory": {"type": "string"},
                "requestGPU": {"type": ["integer", "number", "string"]},
                "limitMemory": {"type": "string"},
                "vllmConfig": {
                    "properties": {
                        "enablePrefixCaching": {"type": "boolean"},
                        "extraArgs": {"type": "array", "items": {"type": "string"}},
                    },
                    "additionalProperties": False,
                },
            },
            "additionalProperties": False,
        },
    },
}
"""The keys of the production-stack chart that we use, with the types of its values.schema.json (read in 2026)."""


def documents(name: str) -> list[Document]:
    return list(yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text()))


def composed() -> Document:
    """compose.yaml, with every variable at its default and the merge keys followed."""
    text = (DEPLOY / "compose.yaml").read_text()
    return yaml.safe_load(re.sub(r"\$\{(\w+):-([^}]*)\}", r"\2", text))


def test_compose_is_valid() -> None:
    compose = compose_spec.PyCompose.from_json(json.dumps(composed()))
    compose.validate()
    compose.to_spec()


def test_every_service_of_compose_is_limited_and_restarts() -> None:
    for name, service in composed()["services"].items():
        assert service["restart"] == "unless-stopped", name
        assert {"cpus", "memory"} <= service["deploy"]["resources"]["limits"].keys(), name


@pytest.mark.parametrize("profile", ["gpu", "cpu"])
def test_a_profile_of_compose_brings_all_three(profile: str) -> None:
    services = {name: one for name, one in composed()["services"].items() if profile in one["profiles"]}
    assert set(services) == {f"server-{profile}", "prometheus", "grafana"}
    assert services[f"server-{profile}"]["image"].startswith(f"vllm-vtprune:{__version__}")


def test_what_compose_mounts_is_there() -> None:
    for service in composed()["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).is_dir(), source
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    assert scraped[0]["static_configs"][0]["targets"] == ["server:8000"]
    assert all(
        composed()["services"][f"server-{one}"]["networks"]["default"]["aliases"] == ["server"]
        for one in ("gpu", "cpu")
    )


@pytest.mark.parametrize("document", documents("server.yaml"), ids=lambda document: document["kind"])
def test_manifests_are_valid(document: Document) -> None:
    kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


def test_pods_are_probed_where_the_server_says_how_it_is_and_have_time_to_stop() -> None:
    deployment, service, budget = documents("server.yaml")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert all(
        container[f"{probe}Probe"]["httpGet"]["path"] == "/health" for probe in ("startup", "readiness", "liveness")
    )
    asked = int(container["args"][container["args"].index("--shutdown-timeout") + 1])
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert asked == SHUTDOWN_TIMEOUT
    assert asked + pause < pod["terminationGracePeriodSeconds"]
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    for selector in (deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"]):
        assert selector.items() <= labels
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels
    assert container["image"] == f"vllm-vtprune:{__version__}"


def test_the_presets_that_are_named_exist() -> None:
    for args in (
        documents("server.yaml")[0]["spec"]["template"]["spec"]["containers"][0]["args"],
        documents("production-stack-values.yaml")[0]["servingEngineSpec"]["modelSpec"][0]["vllmConfig"]["extraArgs"],
        composed()["services"]["server-gpu"]["command"],
    ):
        assert args[args.index("--pruning-default") + 1] in BUILTIN_PRESETS


def autoscalers() -> list[Document]:
    return [*documents("autoscaling.yaml"), *documents("production-stack-values.yaml")[0]["extraObjects"]]


@pytest.mark.parametrize("document", autoscalers(), ids=["manifest", "chart"])
def test_autoscalers_are_valid(document: Document) -> None:
    read = ScaledObject.model_validate(document)
    assert read.model_dump(by_alias=True, exclude_unset=True, mode="json") == document, "an unknown key is dropped"


def test_the_autoscaler_scales_the_deployment() -> None:
    (autoscaler,) = documents("autoscaling.yaml")
    assert autoscaler["spec"]["scaleTargetRef"]["name"] == documents("server.yaml")[0]["metadata"]["name"]


@pytest.mark.engine
@pytest.mark.parametrize("document", autoscalers(), ids=["manifest", "chart"])
def test_what_autoscalers_ask_prometheus_has_an_answer(watched: Watched, document: Document) -> None:
    for trigger in document["spec"]["triggers"]:
        query = trigger["metadata"]["query"].replace("llava-hf/llava-1.5-7b-hf", "vtprune-demo")
        assert watched.prometheus.over(query, watched.start, watched.end, 1), f"no data for {query}"


def test_values_of_the_chart_are_of_the_types_that_it_takes() -> None:
    (values,) = documents("production-stack-values.yaml")
    Draft202012Validator(CHART_VALUES).validate(values)


@pytest.mark.parametrize(
    "file", sorted((DEPLOY / "grafana" / "provisioning").glob("*/*.yaml")), ids=lambda file: file.name
)
def test_grafana_is_provisioned_from_where_compose_mounts(file: Path) -> None:
    provisioned = yaml.safe_load(file.read_text())
    assert provisioned["apiVersion"] == 1
    mounts = [volume.split(":")[1] for volume in composed()["services"]["grafana"]["volumes"]]
    for provider in provisioned.get("providers", []):
        assert provider["options"]["path"] in mounts
    for source in provisioned.get("datasources", []):
        assert source["url"] == "http://prometheus:9090"
