"""Print where the replicas of Ray Serve answer, as a file for Prometheus's ``file_sd_configs``.

Run it every minute on a node of the cluster, as replicas come and go; docs/deploy.md says how. Ray tells where they
are to its own load balancer and to nobody else, so this asks what that asks; another version of Ray may differ.
"""

from __future__ import annotations

import json

import ray
from ray.serve.context import _get_global_client


def replicas() -> list[str]:
    """Address and port of each replica that answers requests."""
    groups = ray.get(_get_global_client()._controller.get_target_groups.remote(from_proxy_manager=True))
    answering = [group for group in groups if group.protocol == "HTTP" and group.ingress_deployment_name]
    return [f"{target.ip}:{target.port}" for group in answering for target in group.targets]


if __name__ == "__main__":
    ray.init(address="auto", namespace="serve", log_to_driver=False)
    print(json.dumps([{"targets": replicas()}]))
