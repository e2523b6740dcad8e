"""The recording rules and alerts, and the configuration that loads them, by Prometheus's own tool."""

import subprocess
from pathlib import Path

import yaml

from tests.support.programs import program

ROOT = Path(__file__).parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run([program("promtool"), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_configuration_and_its_rules_are_valid() -> None:
    promtool("check", "config", PROMETHEUS / "prometheus.yml")
    promtool("check", "rules", *sorted((PROMETHEUS / "rules").glob("*.yml")))


def test_rules_give_what_made_up_series_call_for() -> None:
    promtool("test", "rules", Path(__file__).with_name("rules.test.yml"))


def alerts() -> list[dict[str, object]]:
    groups = yaml.safe_load((PROMETHEUS / "rules" / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_every_alert_is_raised_in_a_unit_test() -> None:
    units = yaml.safe_load(Path(__file__).with_name("rules.test.yml").read_text())["tests"]
    raised = {case["alertname"] for unit in units for case in unit.get("alert_rule_test", []) if case["exp_alerts"]}
    assert raised == {alert["alert"] for alert in alerts()}


def test_every_alert_leads_to_its_lines_in_the_runbook() -> None:
    headings = [line.strip("# ") for line in (ROOT / "docs/alerts.md").read_text().splitlines() if line[:1] == "#"]
    for alert in alerts():
        assert alert["annotations"]["runbook"] == f"docs/alerts.md#{str(alert['alert']).lower()}"  # type: ignore[index]
        assert alert["alert"] in headings
