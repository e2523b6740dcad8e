"""Our server watched by a real Prometheus, and what is left of it to look at."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deploy.grafana import plot
from loadtests.drive import KINDS
from loadtests.observe import BROWSERS, fast, names, screenshot
from tests.support.programs import ROOT, run_module

BROWSER = """#!/bin/sh
for word; do case $word in --screenshot=*) out=${word#*=} ;; esac; done
echo "$@" >"$(dirname "$0")/arguments"
[ -n "$out" ] && cp "$(dirname "$0")/taken.png" "$out"
"""


def test_prometheus_looks_at_this_server_every_second_with_our_rules() -> None:
    source = {"scrape_configs": [{"job_name": "vtprune", "static_configs": []}], "rule_files": ["rules/*.yml"]}
    config = fast({**source, "global": {"scrape_interval": "5s"}}, "http://127.0.0.1:81")
    assert config["global"] == {"scrape_interval": "1s", "evaluation_interval": "1s"}
    assert config["scrape_configs"] == [{"job_name": "vtprune", "static_configs": [{"targets": ["127.0.0.1:81"]}]}]
    assert config["rule_files"] == [str(ROOT / "deploy" / "prometheus" / "rules" / "*.yml")]


def test_no_line_is_drawn_where_there_was_no_data() -> None:
    line = plot.with_gaps([(0.0, 5.0), (1.0, 6.0), (4.0, 7.0), (5.0, 8.0)])
    assert [second for second, _ in line] == [0.0, 1.0, 1.0, 4.0, 5.0]
    assert [value for _, value in line if value == value] == [5.0, 6.0, 7.0, 8.0]
    assert plot.with_gaps([(0.0, 5.0)]) == [(0.0, 5.0)]


def test_alerts_are_named_once_by_state() -> None:
    alerts = [
        {"labels": {"alertname": name}, "state": state}
        for name, state in (("B", "firing"), ("A", "firing"), ("A", "firing"), ("C", "pending"))
    ]
    assert (names(alerts, "firing"), names(alerts, "pending"), names([], "firing")) == ("A, B", "C", "none")


def test_without_a_browser_the_command_that_installs_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "old.png").write_bytes(b"of an earlier run")
    complaint = screenshot(tmp_path / "report.html", tmp_path / "old.png")
    assert complaint is not None
    assert "apt-get install chromium" in complaint
    assert not (tmp_path / "old.png").exists()


def test_a_picture_by_the_browser_beside_this_python_is_cut_below_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser, programs = tmp_path / "venv/chromium-headless-shell", tmp_path / "bin"
    browser.parent.mkdir()
    browser.write_text(BROWSER)
    browser.chmod(0o755)
    programs.mkdir()
    for name in ("sh", "cp", "dirname"):
        (programs / name).symlink_to(f"/bin/{name}")
    page = np.full((900, 300, 3), 255, np.uint8)
    page[100:200, 10:20] = 0
    Image.fromarray(page).save(browser.with_name("taken.png"))
    monkeypatch.setattr(sys, "executable", str(browser.with_name("python")))
    monkeypatch.setenv("PATH", str(programs))
    assert screenshot(tmp_path / "report.html", tmp_path / "report.png") is None
    assert Image.open(tmp_path / "report.png").size == (300, 232)
    assert browser.with_name("arguments").read_text().split()[-1] == f"file://{tmp_path}/report.html"


def test_a_browser_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / BROWSERS[0]).write_text("#!/bin/sh\necho no display >&2\nexit 3\n")
    (tmp_path / BROWSERS[0]).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none" / "python"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    complaint = screenshot(tmp_path / "report.html", tmp_path / "report.png")
    assert complaint == f"{tmp_path / BROWSERS[0]} ended with status 3: no display\n"


@pytest.mark.engine
@pytest.mark.verify
def test_a_server_is_watched_under_load(tmp_path: Path) -> None:
    done = run_module("loadtests.observe", "--out", str(tmp_path), "--minutes", "0.4")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["vtprune"]["kinds"]) == set(KINDS)
    assert len((tmp_path / "requests.jsonl").read_text().splitlines()) == result["completed"] > 0
    assert "panels without data: none\n" in done.stdout
    assert "alerts that fire: " in done.stdout
    for name in ("dashboard.png", "report.html"):
        assert f"\n{tmp_path / name}\n" in done.stdout
    columns = 3
    rows = -(-len(list(plot.panels(json.loads(plot.DASHBOARD.read_text())))) // columns)
    assert Image.open(tmp_path / "dashboard.png").size == (6 * columns * 80, 3 * rows * 80)
    if (tmp_path / "report.png").exists():
        assert np.array(Image.open(tmp_path / "report.png")).std() > 5, "it shows something"
    else:
        assert "no report.png: found none of chromium" in done.stdout
