"""The recording rules and alerts, and the configuration that loads them, by Prometheus's own tool."""

from pathlib import Path

import yaml

from tests.deploy.conftest import prometheus_rules
from tests.support.programs import ROOT, succeed

PROMETHEUS = ROOT / "deploy" / "prometheus"
ALERTS = [rule for rule in prometheus_rules() if "alert" in rule]


def test_the_configuration_and_its_rules_are_valid() -> None:
    succeed("promtool", "check", "config", PROMETHEUS / "prometheus.yml")
    succeed("promtool", "check", "rules", *sorted((PROMETHEUS / "rules").glob("*.yml")))


def test_rules_give_what_made_up_series_call_for() -> None:
    succeed("promtool", "test", "rules", Path(__file__).with_name("rules.test.yml"))


def test_every_alert_is_raised_in_a_unit_test() -> None:
    units = yaml.safe_load(Path(__file__).with_name("rules.test.yml").read_text())["tests"]
    raised = {case["alertname"] for unit in units for case in unit.get("alert_rule_test", []) if case["exp_alerts"]}
    assert raised == {alert["alert"] for alert in ALERTS}


def test_every_alert_leads_to_its_lines_in_the_runbook() -> None:
    headings = [line.strip("# ") for line in (ROOT / "docs/alerts.md").read_text().splitlines() if line[:1] == "#"]
    for alert in ALERTS:
        assert alert["annotations"]["runbook"] == f"docs/alerts.md#{alert['alert'].lower()}"
        assert alert["alert"] in headings
