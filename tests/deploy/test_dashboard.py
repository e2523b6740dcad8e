"""The dashboard, the rules and the alerts against a real Prometheus that watches the real server under load."""

import json
import re
from pathlib import Path

import pytest

from deploy.grafana import generate, plot
from tests.deploy.conftest import Watched, prometheus_rules

INTERVAL = "10s"
MAY_BE_ZERO = (
    "vllm:kv_cache_usage_perc",
    "vllm:num_requests",
    "vllm:prefix_cache_hits",
    "vtprune:encoder_restarts",
    "vtprune:requests_waiting",
)
"""What may be at 0 at every scrape of a server that is under little load."""
PANELS = list(plot.panels(json.loads(plot.DASHBOARD.read_text())))
RULES = prometheus_rules()


def test_the_committed_dashboard_is_what_the_generator_makes() -> None:
    assert plot.DASHBOARD.read_text() == generate.dashboard(), "run deploy/grafana/generate.py"


def test_panels_have_numbers_and_places_of_their_own() -> None:
    panels = json.loads(plot.DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{panel['title']} covers another panel"
        taken |= cells


def test_it_links_to_vllm_s_dashboards() -> None:
    (link,) = json.loads(plot.DASHBOARD.read_text())["links"]
    assert (link["type"], link["tags"], link["keepTime"]) == ("dashboards", ["vllm"], True)


@pytest.mark.engine
def test_its_variables_find_the_server(watched: Watched) -> None:
    variables = json.loads(plot.DASHBOARD.read_text())["templating"]["list"]
    queries = [variable["query"]["query"] for variable in variables if variable["type"] == "query"]
    label_values = {}
    for query in queries:
        metric, label = re.fullmatch(r"label_values\((.*),(\w+)\)", query).groups()  # type: ignore[union-attr]
        label_values[label] = watched.prometheus.get(f"label/{label}/values", **{"match[]": metric})
    assert label_values == {"job": ["vtprune"], "instance": label_values["instance"], "model_name": ["vtprune-demo"]}
    assert len(label_values["instance"]) == 1


@pytest.mark.engine
@pytest.mark.parametrize("panel", PANELS, ids=[panel.title for panel in PANELS])
def test_every_query_of_every_panel_has_an_answer(watched: Watched, panel: plot.Panel) -> None:
    (instance,) = watched.prometheus.get("label/instance/values", **{"match[]": "vtprune:build_info"})
    selection = {"job": "vtprune", "instance": instance, "model_name": "vtprune-demo"}
    for expr, _ in panel.queries:
        query = plot.filled(expr, INTERVAL, selection)
        series = watched.prometheus.over(query, watched.start, watched.end, 1)
        assert series, f"no data for {query}"
        if not any(name in expr for name in MAY_BE_ZERO):
            assert any(value > 0 for curve in series for _, value in curve.values), f"nothing but zeros for {query}"


@pytest.mark.engine
@pytest.mark.parametrize("rule", RULES, ids=[rule.get("record") or rule["alert"] for rule in RULES])
def test_every_rule_has_an_answer(watched: Watched, rule: dict[str, str]) -> None:
    """Alerts should not be raised here: with `bool`, each comparison is answered all the same, with 0 or 1."""
    if "record" in rule:
        assert watched.prometheus.over(rule["record"], watched.start, watched.end, 1), "not recorded"
    for part in rule["expr"].split("unless on (job, instance)"):
        expr = re.sub(r" (>|==) (?=[\d.]+)", r" \1 bool ", part) if "alert" in rule else part
        assert watched.prometheus.over(expr, watched.start, watched.end, 1), f"no data for {expr}"


@pytest.mark.engine
def test_every_rule_is_healthy(watched: Watched) -> None:
    groups = watched.prometheus.get("rules")["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(RULES)
    assert [rule["name"] for rule in rules if rule["health"] != "ok" or rule.get("lastError")] == []


@pytest.mark.engine
def test_its_panels_can_be_plotted(watched: Watched, tmp_path: Path) -> None:
    answers = plot.answers(watched.prometheus, watched.start, watched.end, interval=INTERVAL, step=1)
    assert all(series for _, series in answers)
    plot.plot(answers, tmp_path / "dashboard.png")
    assert (tmp_path / "dashboard.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
