"""Compose, Kubernetes and chart files: by schemas, and against what the server says."""

import json
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import compose_spec
import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from deploy.kubernetes import rules
from tests.deploy.conftest import Watched
from tests.support.programs import ROOT, succeed
from vllm_vtprune import __version__
from vllm_vtprune.policy import BUILTIN_PRESETS
from vllm_vtprune_server.launch import SHUTDOWN_TIMEOUT

DEPLOY = ROOT / "deploy"
KUBERNETES_VERSION = "1.33"
Document = dict[str, Any]

STRING, INTEGER, BOOLEAN, ARRAY, OBJECT = (
    {"type": name} for name in ("string", "integer", "boolean", "array", "object")
)


def keys(*required: str, **properties: Document) -> Document:
    """The schema of an object that has these keys and no others."""
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


PROBE = keys(
    failureThreshold=INTEGER,
    initialDelaySeconds=INTEGER,
    periodSeconds=INTEGER,
    httpGet=keys(path={"const": "/health"}, port={"type": ["integer", "string"]}),
)
MODEL = keys(
    *("name", "repository", "tag", "modelURL", "requestCPU", "requestMemory"),
    name=STRING,
    repository=STRING,
    tag=STRING,
    modelURL=STRING,
    replicaCount=INTEGER,
    requestCPU=INTEGER,
    requestMemory=STRING,
    requestGPU={"type": ["integer", "number", "string"]},
    limitMemory=STRING,
    vllmConfig=keys(enablePrefixCaching=BOOLEAN, extraArgs={"type": "array", "items": STRING}),
)
ENGINES = keys(
    "modelSpec",
    modelSpec={"type": "array", "items": MODEL},
    runtimeClassName=STRING,
    containerPort=INTEGER,
    servicePort=INTEGER,
    securityContext=OBJECT,
    containerSecurityContext={"properties": {"runAsNonRoot": BOOLEAN}},
    strategy=OBJECT,
    serviceMonitor=keys(enabled=BOOLEAN, additionalLabels=OBJECT, interval=STRING, relabelings=ARRAY),
    startupProbe=PROBE,
    livenessProbe=PROBE,
)
CHART_VALUES = keys(
    "servingEngineSpec", servingEngineSpec=ENGINES, routerSpec=keys(enableRouter=BOOLEAN), extraObjects=ARRAY
)
"""The keys of the production-stack chart that we use, with the types of its values.schema.json of summer 2026.

It is written down by hand: the chart itself is not at hand, and the test does not prove that it takes our values.
"""
CHART = "production-stack/values.yaml"
PROMETHEUS = "prometheus_operator.v1"
OPERATORS = {"ScaledObject": "keda.v1alpha1", "ServiceMonitor": PROMETHEUS, "PrometheusRule": PROMETHEUS}
"""Modules of cloudcoil with what the operators' own definitions of their objects were made into, by kind."""


def documents(name: str) -> list[Document]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


SERVER = documents("kubernetes/server.yaml")[0]["spec"]
CHART_ENGINES = documents(CHART)[0]["servingEngineSpec"]
COMPOSE = ["compose.yaml", "disaggregation/compose.yaml"]


def composed(name: str = "compose.yaml") -> Document:
    """A compose file, with every variable at its default and the merge keys followed."""
    text = (DEPLOY / name).read_text()
    return yaml.safe_load(re.sub(r"\$\{(\w+):-([^}]*)\}", r"\2", text))


@pytest.mark.parametrize("file", COMPOSE)
def test_compose_is_valid(file: str) -> None:
    compose = compose_spec.PyCompose.from_json(json.dumps(composed(file)))
    compose.validate()
    compose.to_spec()


@pytest.mark.parametrize("file", COMPOSE)
def test_every_service_of_compose_is_limited_and_restarts(file: str) -> None:
    for name, service in composed(file)["services"].items():
        assert service["restart"] == "unless-stopped", name
        limits = service["deploy"]["resources"]["limits"]
        assert "memory" in limits, name
        # a share of the time leaves a process all cores, and what computes on CPUs makes a thread for each
        assert ("cpuset" if name == "server-cpu" else "cpus") in {**limits, **service}, name


@pytest.mark.parametrize("profile", ["gpu", "cpu"])
def test_a_profile_of_compose_brings_all_three(profile: str) -> None:
    services = {name: service for name, service in composed()["services"].items() if profile in service["profiles"]}
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
        composed()["services"][f"server-{device}"]["networks"]["default"]["aliases"] == ["server"]
        for device in ("gpu", "cpu")
    )


def test_a_producer_and_a_consumer_differ_in_role_and_gpu_alone() -> None:
    services = composed("disaggregation/compose.yaml")["services"]
    connectors, gpus, commands = [], [], []
    for name in ("producer", "consumer"):
        *command, connector = services[name]["command"]
        connectors.append(json.loads(connector))
        assert connectors[-1].pop("ec_role") == f"ec_{name}"
        (gpu,) = services[name]["deploy"]["resources"]["reservations"]["devices"]
        gpus.append(gpu["device_ids"])
        commands.append(command)
        assert services[name]["volumes"] == ["cache:/home/vllm/.cache"]
        assert services[name]["image"] == f"vllm-vtprune:{__version__}"
    assert connectors[0] == connectors[1]
    assert commands[0] == commands[1]
    assert gpus[0] != gpus[1]
    path = connectors[0]["ec_connector_extra_config"]["shared_storage_path"]
    assert path.startswith("/home/vllm/.cache/"), "in the volume that both have, where the image's user may write"
    assert {"http://producer:8000", "http://consumer:8000"} <= set(services["proxy"]["command"])
    source, target, _ = services["proxy"]["volumes"][0].split(":")
    assert (DEPLOY / "disaggregation" / source).is_file()
    assert services["proxy"]["entrypoint"] == ["python3", target]


DISAGGREGATION = "disaggregation/kubernetes.yaml"


def disaggregated() -> dict[tuple[str, str], Document]:
    """The objects of the disaggregated deployment, by kind and name."""
    return {(document["kind"], document["metadata"]["name"]): document for document in documents(DISAGGREGATION)}


@pytest.mark.parametrize(
    "document",
    [*documents("kubernetes/server.yaml"), *documents(DISAGGREGATION)],
    ids=lambda document: f"{document['kind']} {document['metadata']['name']}",
)
def test_manifests_are_valid(document: Document) -> None:
    kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


def test_pods_of_a_producer_and_a_consumer_differ_in_role_alone() -> None:
    objects = disaggregated()
    pods = []
    for role in ("producer", "consumer"):
        deployment = objects["Deployment", f"vtprune-{role}"]
        assert deployment["spec"]["template"]["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"]
        pods.append(deployment["spec"]["template"]["spec"])
        (container,) = pods[-1]["containers"]
        connector = json.loads(container["args"].pop())
        assert connector.pop("ec_role") == f"ec_{role}"
        path = connector.pop("ec_connector_extra_config")["shared_storage_path"]
        assert {"name": "embeddings", "mountPath": path} in container["volumeMounts"]
        assert container["image"] == f"vllm-vtprune:{__version__}"
    assert pods[0] == pods[1]
    writer = objects["Deployment", "vtprune-producer"]["spec"]
    assert (writer["replicas"], writer["strategy"]) == (1, {"type": "Recreate"}), "one at a time writes"


def test_a_proxy_in_kubernetes_finds_its_script_and_the_instances() -> None:
    objects = disaggregated()
    pod = objects["Deployment", "vtprune-proxy"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    for address in (word for word in container["args"] if word.startswith("http")):
        service = objects["Service", address.removeprefix("http://")]
        name = service["spec"]["selector"]["app.kubernetes.io/name"]
        assert ("Deployment", name) in objects
        assert service["spec"]["ports"][0]["port"] == 80
    clients = objects["Service", "vtprune"]["spec"]["selector"]
    assert clients == objects["Deployment", "vtprune-proxy"]["spec"]["selector"]["matchLabels"]
    (kustomization,) = documents("disaggregation/kustomization.yaml")
    (generated,) = kustomization["configMapGenerator"]
    (mount,) = container["volumeMounts"]
    assert pod["volumes"] == [{"name": mount["name"], "configMap": {"name": generated["name"]}}]
    assert container["command"] == ["python3", f"{mount['mountPath']}/{generated['files'][0]}"]
    assert all((DEPLOY / "disaggregation" / name).is_file() for name in kustomization["resources"] + generated["files"])


def test_pods_are_probed_where_the_server_says_how_it_is_and_have_time_to_stop() -> None:
    deployment, service, budget = documents("kubernetes/server.yaml")
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
        SERVER["template"]["spec"]["containers"][0]["args"],
        CHART_ENGINES["modelSpec"][0]["vllmConfig"]["extraArgs"],
        composed()["services"]["server-gpu"]["command"],
        composed("disaggregation/compose.yaml")["services"]["producer"]["command"],
        documents(DISAGGREGATION)[1]["spec"]["template"]["spec"]["containers"][0]["args"],
    ):
        assert args[args.index("--pruning-default") + 1] in BUILTIN_PRESETS


def autoscalers() -> list[Document]:
    return [*documents("kubernetes/autoscaling.yaml"), *documents(CHART)[0]["extraObjects"]]


@pytest.mark.parametrize(
    "document",
    [*autoscalers(), *documents("kubernetes/monitoring.yaml"), *documents("kubernetes/rules.yaml")],
    ids=["autoscaler", "autoscaler of the chart", "monitoring", "rules"],
)
def test_objects_of_operators_are_valid(document: Document) -> None:
    kind = document["kind"]
    models = import_module(f"cloudcoil.models.{OPERATORS[kind]}")  # thousands of classes: not in every process
    read = getattr(models, kind).model_validate(document)
    assert read.model_dump(by_alias=True, exclude_unset=True, mode="json") == document, "an unknown key is dropped"


def test_the_operator_s_rules_are_those_of_prometheus() -> None:
    assert rules.OUTPUT.read_text() == rules.rules(), "run .venv/bin/python deploy/kubernetes/rules.py"


def test_prometheus_reads_the_operator_s_rules(tmp_path: Path) -> None:
    (manifest,) = documents("kubernetes/rules.yaml")
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(manifest["spec"]))
    succeed("promtool", "check", "rules", tmp_path / "rules.yml")


def test_servers_are_scraped_under_the_job_that_rules_ask_for() -> None:
    (scrape,) = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    _, service, _ = documents("kubernetes/server.yaml")
    (monitor,) = documents("kubernetes/monitoring.yaml")
    (endpoint,) = monitor["spec"]["endpoints"]
    (chart,) = documents(CHART)
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    assert "jobLabel" not in monitor["spec"], "then the job is the service's name"
    (relabelling,) = chart["servingEngineSpec"]["serviceMonitor"]["relabelings"]
    assert relabelling == {"targetLabel": "job", "replacement": scrape["job_name"]}
    assert service["metadata"]["name"] == scrape["job_name"]
    asked = re.findall(r'job="(\w+)"', (DEPLOY / "kubernetes" / "rules.yaml").read_text())
    asked += [
        job
        for autoscaler in autoscalers()
        for trigger in autoscaler["spec"]["triggers"]
        for job in queried_jobs(trigger)
    ]
    assert set(asked) == {scrape["job_name"]}


def queried_jobs(trigger: Document) -> list[str]:
    """The jobs in an autoscaler's query, one for each metric in it."""
    query = trigger["metadata"]["query"]
    jobs = re.findall(r'\w+:\w+{job="(\w+)"', query)
    assert len(jobs) == len(re.findall(r"\w+:\w+", query)), query
    return jobs


@pytest.mark.parametrize("document", autoscalers(), ids=["manifest", "chart"])
def test_an_empty_answer_does_not_scale_down(document: Document) -> None:
    spec = document["spec"]
    assert all(trigger["metadata"]["ignoreNullValues"] == "false" for trigger in spec["triggers"])
    assert spec["fallback"]["replicas"] >= spec["minReplicaCount"]


@pytest.mark.parametrize(
    ("replicas", "strategy", "autoscaler"),
    [
        (SERVER["replicas"], SERVER["strategy"], autoscalers()[0]),
        (CHART_ENGINES["modelSpec"][0]["replicaCount"], CHART_ENGINES["strategy"], autoscalers()[1]),
    ],
    ids=["manifest", "chart"],
)
def test_a_replica_serves_while_another_is_replaced(replicas: int, strategy: Document, autoscaler: Document) -> None:
    fewest = min(replicas, autoscaler["spec"]["minReplicaCount"])
    assert fewest > strategy["rollingUpdate"]["maxUnavailable"]
    assert strategy["rollingUpdate"]["maxSurge"] == 0, "needs GPUs that nothing else uses"


def test_the_autoscaler_scales_the_deployment() -> None:
    (autoscaler,) = documents("kubernetes/autoscaling.yaml")
    assert autoscaler["spec"]["scaleTargetRef"]["name"] == documents("kubernetes/server.yaml")[0]["metadata"]["name"]


@pytest.mark.engine
@pytest.mark.parametrize("document", autoscalers(), ids=["manifest", "chart"])
def test_what_autoscalers_ask_prometheus_has_an_answer(watched: Watched, document: Document) -> None:
    for trigger in document["spec"]["triggers"]:
        query = trigger["metadata"]["query"].replace("llava-hf/llava-1.5-7b-hf", "vtprune-demo")
        assert watched.prometheus.over(query, watched.start, watched.end, 1), f"no data for {query}"


def test_values_of_the_chart_are_of_the_types_that_it_takes() -> None:
    (values,) = documents(CHART)
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
