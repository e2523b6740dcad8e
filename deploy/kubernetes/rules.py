"""Write rules.yaml: the rules and alerts of ``deploy/prometheus``, as Prometheus's operator reads them.

``.venv/bin/python deploy/kubernetes/rules.py`` rewrites the file beside this one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

OUTPUT = Path(__file__).with_name("rules.yaml")
RULES = Path(__file__).parents[1] / "prometheus" / "rules"
HEADER = "# Made by deploy/kubernetes/rules.py from deploy/prometheus/rules: change those.\n"


class Dumper(yaml.SafeDumper):
    """Writes everything out where it stands, and text of several lines as such."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def as_written(dumper: Dumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


Dumper.add_representer(str, as_written)


def rules() -> str:
    """The rules as a manifest."""
    groups = [group for file in sorted(RULES.glob("*.yml")) for group in yaml.safe_load(file.read_text())["groups"]]
    labels = {"app.kubernetes.io/name": "vtprune", "release": "kube-prometheus-stack"}
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "vtprune", "labels": labels},
        "spec": {"groups": groups},
    }
    return HEADER + yaml.dump(manifest, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


if __name__ == "__main__":
    OUTPUT.write_text(rules())
